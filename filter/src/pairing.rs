//! Pairing: whether the gateway shows bodies while headers are held.
//!
//! Mode `endpoint` holds a request's headers until its body is in. Without
//! `allow_on_headers_stop_iteration` on the plugin the body never comes, and
//! every request would hang. No property tells; so until a VM has seen a body
//! come, it watches the requests that it holds, lets go those that get none, and
//! soon stops holding at all. It says so in the log and in metrics.
//!
//! Mode `buffer` needs two of Envoy's own filters behind the module. Nothing tells
//! whether they are there, either; but an answer tells which worker gave it, and
//! without them that is one that nobody named.

use core::cell::RefCell;
use std::rc::{Rc, Weak};

use crate::host;
use crate::http::{Next, Stream};
use crate::limits::{PAIRING_FAILURES_MAX, PAIRING_PROBE_EVERY, PAIRING_PROBE_MS, WATCHED_MAX};
use crate::metrics::Counter;
use crate::vm;

/// What a VM knows of its gateway's settings.
#[derive(Debug, Default)]
pub(crate) struct Pairing {
    /// Whether a body has ever come while headers were held.
    is_proven: bool,
    /// Requests in a row that were held in vain.
    failures: u32,
    /// Requests since then that were not held.
    passed: u32,
    held: Vec<Held>,
    /// Answers in a row of workers that were not named.
    unnamed: u32,
}

#[derive(Debug)]
struct Held {
    context: u32,
    since_ms: u64,
    stream: Weak<RefCell<Stream>>,
}

impl Pairing {
    /// A body has come.
    pub(crate) fn prove(&mut self) {
        if !self.is_proven {
            *self = Self { is_proven: true, ..Self::default() };
        }
    }

    /// Whether the next request's headers may be held.
    fn may_hold(&mut self) -> bool {
        if self.is_proven || self.failures < PAIRING_FAILURES_MAX {
            return true;
        }
        self.passed = self.passed.wrapping_add(1);
        self.passed.is_multiple_of(PAIRING_PROBE_EVERY)
    }

    /// An answer has come. Returns whether it is time to say that something is
    /// wrong.
    ///
    /// - `is_named`: whether it is of a worker that was named.
    fn note_answer(&mut self, is_named: bool) -> bool {
        self.unnamed = if is_named { 0 } else { self.unnamed.saturating_add(1) };
        self.unnamed == PAIRING_FAILURES_MAX
    }

    /// Requests that have been held for too long.
    fn take_stuck(&mut self, now_ms: u64) -> Vec<(u32, Rc<RefCell<Stream>>)> {
        let mut stuck = Vec::new();
        self.held.retain(|held| {
            let Some(stream) = held.stream.upgrade() else { return false };
            if now_ms.saturating_sub(held.since_ms) < PAIRING_PROBE_MS {
                return true;
            }
            stuck.push((held.context, stream));
            false
        });
        stuck
    }
}

/// Whether this request's headers may be held; if nothing is proven yet, it is
/// watched from now on.
pub(crate) fn may_hold(context: u32, stream: &Rc<RefCell<Stream>>) -> bool {
    let since_ms = host::monotonic_ns() / 1_000_000;
    let may_hold = vm::with(|vm| {
        let pairing = &mut vm.pairing;
        if !pairing.may_hold() {
            return false;
        }
        if !pairing.is_proven && pairing.held.len() < WATCHED_MAX {
            pairing.held.push(Held { context, since_ms, stream: Rc::downgrade(stream) });
        }
        pairing.is_proven || pairing.held.len() < WATCHED_MAX
    });
    may_hold.unwrap_or(false)
}

/// An answer has come in mode `buffer`.
///
/// - `named`: the addresses that were named, with commas between them.
pub(crate) fn check_answer(named: &str) {
    let Some(served) = host::property(&["upstream", "address"]) else { return };
    let is_named = named.split(',').any(|named| named.trim().as_bytes() == served);
    let is_wrong = vm::with(|vm| {
        vm.metrics.add(Counter::PairingWrong, (!is_named).into());
        vm.pairing.note_answer(is_named)
    });
    if is_wrong == Some(true) {
        log::error!(
            "warmpath: mode `buffer` needs the filters `buffer` and `header_mutation` behind the \
             plugin, and a cluster that takes the host from a header; answers come from workers \
             that were not named"
        );
    }
}

/// Lets go the requests that wait for a body that does not come; called on
/// ticks.
pub(crate) fn release_stuck(now_ms: u64) {
    let stuck = vm::with(|vm| vm.pairing.take_stuck(now_ms));
    for (context, stream) in stuck.unwrap_or_default() {
        let Ok(mut stream) = stream.try_borrow_mut() else { continue };
        if !host::enter(context) {
            continue;
        }
        let Some(next) = stream.give_up_body() else { continue };
        drop(stream);
        if next == Next::Continue {
            host::resume_request();
        }
        vm::with(|vm| {
            vm.pairing.failures = vm.pairing.failures.saturating_add(1);
            vm.metrics.add(Counter::PairingWrong, 1);
        });
        log::error!(
            "warmpath: mode `endpoint` needs `allow_on_headers_stop_iteration: true` on the \
             plugin; a request was released without looking at its body"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_others_are_told_of_once_in_a_row() {
        let mut pairing = Pairing::default();
        let told = |pairing: &mut Pairing, named: &[bool]| {
            named.iter().filter(|is_named| pairing.note_answer(**is_named)).count()
        };
        assert_eq!(told(&mut pairing, &[false, false, true, false, false]), 0);
        assert_eq!(told(&mut pairing, &[false; 20]), 1);
        assert_eq!(told(&mut pairing, &[true, false, false, false]), 1);
    }

    #[test]
    fn headers_are_held_until_it_fails_and_then_now_and_then() {
        let mut pairing = Pairing::default();
        assert!((0..10).all(|_| pairing.may_hold()));
        pairing.failures = PAIRING_FAILURES_MAX;
        let held = (0..3 * PAIRING_PROBE_EVERY).filter(|_| pairing.may_hold()).count();
        assert_eq!(held, 3);
        pairing.prove();
        assert!((0..10).all(|_| pairing.may_hold()));
    }
}
