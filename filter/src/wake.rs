//! Wake: how a VM gets another turn soon, with others served in between.
//!
//! A tick comes every few milliseconds, which is too seldom for work that takes
//! many turns. A message to a queue comes in a fraction of one. But one that a
//! thread sends to itself is delivered before the thread looks at its connections
//! again, so a chain of them would be one long turn. So it goes by another VM of
//! the process, which only passes it on: one that has never had a request, as the
//! one of Envoy's main thread, if there is such a one.
//!
//! Even so the message may be back before the thread has looked: where both threads
//! share a core. So few turns are taken by messages until something else has come,
//! a request or a tick, which shows that the thread has looked.
//!
//! At most one wake-up of a VM is under way. If it does not come, the tick notices.

use warmpath_core::shared::KEY_PREFIX;

use crate::host;
use crate::limits::{
    MESSAGES_PER_CALL, RELAY_OFFER_MS, TURNS_UNSEEN_MAX, WAKE_MISSED_MS, WAKE_PAUSE_MS,
    WAKES_MISSED_MAX,
};

/// The wake-ups of one VM, and those that it passes on.
#[derive(Debug, Default)]
pub(crate) struct Wake {
    /// The queue whose messages wake this VM.
    own: Option<u32>,
    /// The queue that is passed on from, once it is known.
    relay: Option<u32>,
    /// The same, if this VM has offered to pass on.
    offered: Option<u32>,
    offer_at_ms: u64,
    /// Whether a request has come: its thread has other things to do than to
    /// pass on.
    is_busy: bool,
    asked_at_ms: Option<u64>,
    missed: u32,
    paused_until_ms: u64,
    /// Turns since the thread is known to have looked at its connections.
    unseen: u32,
}

/// What a tick finds of a VM that has work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// A wake-up will come.
    Later,
    /// None is under way: the tick is the next turn.
    Now,
    /// So it is, because the wake-up did not come in time.
    Missed,
}

impl Wake {
    /// Takes the VM's queue over for the root context that is being called.
    ///
    /// - `vm`: its number.
    pub(crate) fn register(&mut self, vm: u64) {
        self.own = host::register_queue(&format!("{KEY_PREFIX}/wake/{vm}")).ok();
        // An offer is the old context's.
        (self.offered, self.offer_at_ms, self.asked_at_ms) = (None, 0, None);
    }

    /// A request has come.
    pub(crate) fn note_request(&mut self) {
        self.is_busy = true;
    }

    /// Something has come that the thread must have looked for.
    pub(crate) fn note_look(&mut self) {
        self.unseen = 0;
    }

    /// Offers to pass wake-ups on; called on ticks. Again and again, because
    /// whoever offered last is taken, and may be busy by now.
    pub(crate) fn offer(&mut self, now_ms: u64) {
        if !self.is_busy && now_ms >= self.offer_at_ms {
            self.offer_at_ms = now_ms + RELAY_OFFER_MS;
            self.offered = host::register_queue(&relay_name()).ok();
        }
    }

    /// Asks for a wake-up, unless one is under way. To be called at the end of a
    /// turn.
    pub(crate) fn ask(&mut self, now_ms: u64) {
        if self.asked_at_ms.is_some()
            || now_ms < self.paused_until_ms
            || self.unseen >= TURNS_UNSEEN_MAX
        {
            return;
        }
        self.relay = self.relay.or_else(|| host::find_queue(&relay_name()).ok());
        if let (Some(own), Some(relay)) = (self.own, self.relay)
            && host::enqueue(relay, &own.to_le_bytes()).is_ok()
        {
            self.asked_at_ms = Some(now_ms);
        }
    }

    /// A message is in one of the queues. Returns whether it wakes this VM.
    pub(crate) fn on_message(&mut self, queue: u32) -> bool {
        for _ in 0..MESSAGES_PER_CALL {
            let Some(message) = host::dequeue(queue) else { break };
            if self.offered == Some(queue)
                && let Some(bytes) = message.first_chunk()
                // To itself it would be no turn of its own.
                && self.own != Some(u32::from_le_bytes(*bytes))
            {
                // A VM that is gone needs no wake-up.
                let _ = host::enqueue(u32::from_le_bytes(*bytes), &[]);
            }
        }
        let is_own = self.own == Some(queue);
        if is_own {
            (self.asked_at_ms, self.missed) = (None, 0);
            self.unseen += 1;
        }
        is_own
    }

    /// Whether the tick has to take a turn; called while there is work.
    pub(crate) fn due(&mut self, now_ms: u64) -> Due {
        let Some(asked_at_ms) = self.asked_at_ms else { return Due::Now };
        if now_ms.saturating_sub(asked_at_ms) < WAKE_MISSED_MS {
            return Due::Later;
        }
        self.asked_at_ms = None;
        self.missed += 1;
        if self.missed >= WAKES_MISSED_MAX {
            (self.missed, self.paused_until_ms) = (0, now_ms + WAKE_PAUSE_MS);
        }
        Due::Missed
    }
}

fn relay_name() -> String {
    format!("{KEY_PREFIX}/relay")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wake_ups_that_do_not_come_are_given_up_for_a_while() {
        let mut wake = Wake { own: Some(1), relay: Some(2), ..Wake::default() };
        assert_eq!(wake.due(0), Due::Now);
        for at_ms in [100, 200, 300] {
            wake.asked_at_ms = Some(at_ms);
            assert_eq!(wake.due(at_ms + WAKE_MISSED_MS - 1), Due::Later);
            assert_eq!(wake.due(at_ms + WAKE_MISSED_MS), Due::Missed);
        }
        assert_eq!(wake.paused_until_ms, 300 + WAKE_MISSED_MS + WAKE_PAUSE_MS);
        wake.asked_at_ms = Some(2_000);
        assert!(wake.on_message(1) && !wake.on_message(7));
        assert_eq!(wake.due(2_001), Due::Now, "it has come");
    }

    #[test]
    fn turns_by_messages_end_unless_something_else_comes() {
        let mut wake = Wake { own: Some(1), ..Wake::default() };
        for _ in 0..TURNS_UNSEEN_MAX {
            assert!(wake.unseen < TURNS_UNSEEN_MAX);
            wake.on_message(1);
        }
        assert_eq!(wake.unseen, TURNS_UNSEEN_MAX);
        wake.note_look();
        assert_eq!(wake.unseen, 0);
    }
}
