//! Remote: what other routers have booked, applied to this VM's loads.

use std::collections::{BTreeMap, VecDeque};

use crate::bookings::Bookings;
use crate::entry::Entry;
use crate::limits::{REMOTE_BOOKINGS_MAX, REMOTE_ENDS_KEPT};
use crate::load::{Booking, BookingId, Loads};

/// Which remote bookings are known.
#[derive(Debug, Default)]
pub(super) struct Remote {
    /// By name, the list in which each was last named.
    known: BTreeMap<BookingId, u64>,
    /// Lists begun so far.
    list: u64,
    /// Names of those that ended last, the oldest first.
    ended: VecDeque<BookingId>,
}

/// Entries that were passed over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Passed {
    /// They mean nothing here.
    pub(super) bad: u64,
    /// There was no room for them.
    pub(super) over_limit: u64,
}

impl Remote {
    /// Applies a frame.
    ///
    /// - `beside`: the frame did not come in the order of the others: it adds
    ///   what is not known and has not ended, and ends nothing.
    pub(super) fn apply(
        &mut self,
        bookings: &Bookings<'_>,
        beside: bool,
        now_ms: u64,
        loads: &mut Loads,
    ) -> Passed {
        if !beside {
            self.list += u64::from(bookings.flags.begins);
        }
        let at = |at_ms: u64| now_ms.saturating_sub(bookings.now_ms.saturating_sub(at_ms));
        let mut passed = Passed::default();
        for entry in bookings.read() {
            match entry {
                Ok(Entry::Booked(booking)) if booking.id.is_remote() => {
                    let at_ms = at(booking.at_ms);
                    if beside && self.ended.contains(&booking.id) {
                        continue;
                    }
                    let has_room = self.add(Booking { at_ms, ..booking }, loads);
                    passed.over_limit += u64::from(!has_room);
                }
                // Also of local ones: their workers may say so themselves.
                Ok(Entry::PrefillDone(id)) => loads.prefill_done(id),
                Ok(Entry::Refreshed(id, at_ms)) if id.is_remote() => loads.refresh(id, at(at_ms)),
                Ok(Entry::Freed(id)) if id.is_remote() => {
                    if !beside {
                        self.known.remove(&id);
                        self.end(id, loads);
                    }
                }
                _ => passed.bad += 1,
            }
        }
        if bookings.flags.ends && !beside {
            let list = self.list;
            let gone: Vec<BookingId> =
                self.known.iter().filter(|(_, named)| **named != list).map(|(id, _)| *id).collect();
            for id in gone {
                self.known.remove(&id);
                self.end(id, loads);
            }
        }
        passed
    }

    /// Returns whether there was room.
    fn add(&mut self, booking: Booking, loads: &mut Loads) -> bool {
        let id = booking.id;
        if self.known.len() >= REMOTE_BOOKINGS_MAX && !self.known.contains_key(&id) {
            return false;
        }
        self.known.insert(id, self.list);
        if loads.contains(id) {
            loads.refresh(id, booking.at_ms);
        } else {
            loads.add(booking);
        }
        true
    }

    fn end(&mut self, id: BookingId, loads: &mut Loads) {
        loads.free(id);
        if self.ended.len() >= REMOTE_ENDS_KEPT {
            self.ended.pop_front();
        }
        self.ended.push_back(id);
    }
}
