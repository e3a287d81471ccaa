//! Place: choosing a worker and booking it, as one step.
//!
//! A VM decides on the state it has and appends its booking right behind that
//! state in the ring log. If another VM was faster, the state has moved on: it
//! is applied, and the decision made again. So two worker threads never pick on
//! the same stale load.

use warmpath_core::entry::Entry;
use warmpath_core::limits::BOOKING_BLOCKS_MAX;
use warmpath_core::load::{Booking, BookingId};
use warmpath_core::reason::Reason;
use warmpath_core::ring::Append;
use warmpath_core::route::{Choice, Prepared, select};
use warmpath_core::score::Knobs;

use crate::host;
use crate::limits::{BOOKING_ATTEMPTS_MAX, REQUEST_ENTRIES_MAX, REQUEST_RING_NS};
use crate::metrics::Counter;
use crate::vm::Vm;

/// A request that has a worker.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    pub(crate) booking: BookingId,
    pub(crate) choice: Choice,
}

impl Vm {
    /// Chooses a worker and books it; `None` if no worker is there.
    pub(crate) fn place(&mut self, prepared: &Prepared) -> Option<Placed> {
        let id = self.next_booking();
        let started = host::monotonic_ns();
        let now_ms = started / 1_000_000;
        let knobs = Knobs::default();
        for _ in 0..BOOKING_ATTEMPTS_MAX {
            let spent = host::monotonic_ns().saturating_sub(started);
            let is_current =
                self.catch_up(REQUEST_ENTRIES_MAX, REQUEST_RING_NS.saturating_sub(spent));
            if !is_current {
                break;
            }
            let choice = select(&mut self.replica, prepared, &knobs, &mut self.random)?;
            let entry = booked(id, prepared, &choice, now_ms);
            match self.ring.append_at(&self.store, self.position, &entry) {
                Ok(Append::Done) => {
                    self.position += 1;
                    self.replica.apply_entry(&entry);
                    return Some(self.placed(id, choice, now_ms));
                }
                Ok(Append::Moved) => self.metrics.add(Counter::BookingConflicts, 1),
                Err(_) => {
                    self.metrics.add(Counter::HostRefused, 1);
                    break;
                }
            }
        }
        // Others are busier than the attempts allow for: a booking on a state
        // that is a few entries old is better than a request that waits.
        let choice = select(&mut self.replica, prepared, &knobs, &mut self.random)?;
        let entry = booked(id, prepared, &choice, now_ms);
        self.append(&entry);
        self.metrics.add(Counter::BookingUnordered, 1);
        Some(self.placed(id, choice, now_ms))
    }

    fn placed(&mut self, booking: BookingId, mut choice: Choice, now_ms: u64) -> Placed {
        self.own_booking(booking, now_ms);
        let is_stale =
            self.feed_age_ms(now_ms).is_none_or(|age_ms| age_ms > self.config.feed_stale_ms);
        if is_stale && matches!(choice.reason, Reason::Kv | Reason::Batch | Reason::Resyncing) {
            choice.reason = Reason::StaleFeed;
        }
        Placed { booking, choice }
    }
}

fn booked(id: BookingId, prepared: &Prepared, choice: &Choice, at_ms: u64) -> Vec<u8> {
    let blocks = prepared.hashes.get(..BOOKING_BLOCKS_MAX).unwrap_or(&prepared.hashes).to_vec();
    let prefill_tokens = choice.prefill_tokens(prepared);
    Entry::Booked(Booking { id, slot: choice.slot, prefill_tokens, at_ms, blocks }).encode()
}
