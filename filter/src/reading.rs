//! Reading: the long prompts that wait to be read, a slice at a time.
//!
//! A thread that reads a megabyte in one go serves nobody else meanwhile. So the
//! request is held, and read on in turns of their own: one slice of one prompt
//! each, whatever the number of those that wait.

use core::cell::RefCell;
use std::rc::Weak;

use warmpath_core::reason::Reason;

use crate::config::Config;
use crate::host;
use crate::http::{Next, Part, Stream, Turn};
use crate::limits::READING_PATIENCE_MS;
use crate::metrics::{Counter, Gauge, Histogram};
use crate::vm::{self, Vm};
use crate::wake::Due;

/// One request that waits.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) context: u32,
    pub(crate) stream: Weak<RefCell<Stream>>,
    /// When its body was complete, in nanoseconds.
    pub(crate) since_ns: u64,
    /// Length of its body, in bytes.
    pub(crate) len: usize,
    pub(crate) part: Part,
}

/// All that wait. At most [`Config::readings_max`] with
/// [`Config::reading_bytes_max`] of bodies.
#[derive(Debug, Default)]
pub(crate) struct Readings {
    waiting: Vec<Waiting>,
    bytes: usize,
}

impl Readings {
    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    fn has_room(&self, len: usize, config: &Config) -> bool {
        self.waiting.len() < config.readings_max
            && self.bytes.saturating_add(len) <= config.reading_bytes_max
    }

    fn add(&mut self, waiting: Waiting) {
        self.bytes += waiting.len;
        self.waiting.push(waiting);
    }

    /// Takes a request out that has ended. Returns whether it was there.
    fn remove(&mut self, context: u32) -> bool {
        let at = self.waiting.iter().position(|waiting| waiting.context == context);
        at.and_then(|at| self.take(at)).is_some()
    }

    fn take(&mut self, at: usize) -> Option<Waiting> {
        if at >= self.waiting.len() {
            return None;
        }
        let waiting = self.waiting.swap_remove(at);
        self.bytes -= waiting.len;
        Some(waiting)
    }

    /// Takes out the one whose turn it is: the one that has waited for too long,
    /// else the one of which least is left to read.
    fn take_next(&mut self, now_ns: u64) -> Option<Waiting> {
        let patience_ns = READING_PATIENCE_MS * 1_000_000;
        let key = |waiting: &Waiting| {
            let is_impatient = now_ns.saturating_sub(waiting.since_ns) >= patience_ns;
            let left = if is_impatient { 0 } else { waiting.part.bytes_left() };
            (!is_impatient, left, waiting.since_ns)
        };
        let next = self.waiting.iter().enumerate().min_by_key(|(_, waiting)| key(waiting));
        let at = next.map(|(at, _)| at)?;
        self.take(at)
    }
}

impl Vm {
    /// Lets a request wait for its turns, if there is room.
    ///
    /// # Errors
    ///
    /// What was to wait.
    pub(crate) fn let_wait(&mut self, waiting: Waiting) -> Result<(), Waiting> {
        if !self.readings.has_room(waiting.len, &self.config) {
            return Err(waiting);
        }
        self.readings.add(waiting);
        self.metrics.add(Counter::ReadingsBegun, 1);
        self.report_readings();
        self.pace.has_to_read();
        self.wake.ask(host::monotonic_ns() / 1_000_000);
        Ok(())
    }

    /// A request has ended while it waited.
    pub(crate) fn forget_waiting(&mut self, context: u32) {
        if self.readings.remove(context) {
            self.metrics.add(Counter::ReadingsEnded, 1);
            self.report_readings();
        }
    }

    pub(crate) fn report_readings(&self) {
        self.metrics.set(Gauge::ReadingsWaiting, self.readings.len() as u64);
    }
}

/// A message is in one of the VM's queues.
pub(crate) fn on_message(queue: u32) {
    if vm::with(|vm| vm.wake.on_message(queue)) == Some(true) {
        read_on();
    }
}

/// Reads on if no wake-up does it; called on ticks.
pub(crate) fn tick(now_ms: u64) {
    let due = vm::with(|vm| {
        vm.wake.note_look();
        vm.wake.offer(now_ms);
        let due = if vm.readings.len() > 0 { vm.wake.due(now_ms) } else { Due::Later };
        vm.metrics.add(Counter::WakesMissed, (due == Due::Missed).into());
        due
    });
    if due.is_some_and(|due| due != Due::Later) {
        read_on();
    }
}

/// Gives one of those that wait its turn, and asks for the next.
fn read_on() {
    let started_ns = host::monotonic_ns();
    let mut has_run = false;
    while !has_run && let Some(Some(waiting)) = vm::with(|vm| vm.readings.take_next(started_ns)) {
        has_run = take_turn(waiting, started_ns).is_some();
        // A request that is gone takes no time.
        vm::with(|vm| vm.metrics.add(Counter::ReadingsEnded, (!has_run).into()));
    }
    if !has_run {
        return;
    }
    let ended_ns = host::monotonic_ns();
    vm::with(|vm| {
        vm.metrics.took(Histogram::ReadingSlice, ended_ns.saturating_sub(started_ns));
        vm.report_readings();
        if vm.readings.len() > 0 {
            vm.wake.ask(ended_ns / 1_000_000);
        }
    });
}

/// Reads on for a slice. `None` if the request is gone.
fn take_turn(waiting: Waiting, now_ns: u64) -> Option<()> {
    let Waiting { context, stream: weak, since_ns, len, part } = waiting;
    let cell = weak.upgrade()?;
    let mut stream = cell.try_borrow_mut().ok()?;
    if !host::enter(context) {
        return None;
    }
    let waited_ms = now_ns.saturating_sub(since_ns) / 1_000_000;
    let is_late = vm::with(|vm| waited_ms >= vm.config.reading_ms_max).unwrap_or(false);
    match stream.take_turn(part, is_late.then_some(Reason::ReadLate)) {
        Turn::More(part) => {
            let waiting = Waiting { context, stream: weak, since_ns, len, part };
            vm::with(|vm| vm.readings.add(waiting));
        }
        Turn::Done(next) => {
            drop(stream);
            let elapsed_ns = host::monotonic_ns().saturating_sub(since_ns);
            vm::with(|vm| {
                vm.metrics.add(Counter::ReadingsEnded, 1);
                vm.metrics.took(Histogram::ReadingElapsed, elapsed_ns);
            });
            if next == Next::Continue {
                host::resume_request();
            }
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use warmpath_core::request::Endpoint;

    fn waiting(context: u32, since_ms: u64, len: usize) -> Waiting {
        Waiting {
            context,
            stream: Weak::new(),
            since_ns: since_ms * 1_000_000,
            len,
            part: Part::Unread { endpoint: Endpoint::Completions, len },
        }
    }

    fn order(readings: &mut Readings, now_ms: u64) -> Vec<u32> {
        core::iter::from_fn(|| readings.take_next(now_ms * 1_000_000))
            .map(|waiting| waiting.context)
            .collect()
    }

    #[test]
    fn short_ones_come_first_unless_others_have_waited_for_long() {
        let mut readings = Readings::default();
        let all = [(1, 1_000, 300), (2, 1_001, 100), (3, 1_002, 200), (4, 1_003, 200)];
        for now_ms in [1_010, 1_001 + READING_PATIENCE_MS] {
            for (context, since_ms, len) in all {
                readings.add(waiting(context, since_ms, len));
            }
            let expected = if now_ms == 1_010 { [2, 3, 4, 1] } else { [1, 2, 3, 4] };
            assert_eq!(order(&mut readings, now_ms), expected);
            assert_eq!((readings.len(), readings.bytes), (0, 0));
        }
    }

    #[test]
    fn both_bounds_hold() {
        let config = Config::parse(br#"{"readings_max":2,"reading_bytes_max":1048576}"#).unwrap();
        let mut readings = Readings::default();
        assert!(readings.has_room(1_048_576, &config) && !readings.has_room(1_048_577, &config));
        readings.add(waiting(1, 0, 1_048_000));
        assert!(readings.has_room(576, &config) && !readings.has_room(577, &config));
        readings.add(waiting(2, 0, 1));
        assert!(!readings.has_room(1, &config));
        assert!(readings.remove(1) && !readings.remove(1));
        assert!(readings.has_room(1_048_575, &config) && !readings.has_room(1_048_576, &config));
        assert!(readings.remove(2));
        assert_eq!(readings.bytes, 0);
    }
}
