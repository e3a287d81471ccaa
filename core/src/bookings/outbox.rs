//! Outbox: what a gateway books, on its way to the sidecar.
//!
//! Whoever follows the feed for a gateway sees every booking and passes it on: a list of all that run first, then every change. Both
//! wait in a bounded queue until they are asked for; if that overflows, everything in
//! it is dropped and a new list made.

use std::collections::VecDeque;

use super::{Bookings, Flags, fits_frame};
use crate::entry::Entry;
use crate::limits::{OUTBOX_BYTES_MAX, OUTBOX_ENTRIES_MAX, OUTBOX_FRAMES};
use crate::load::{BookingId, Loads};

/// What waits to be sent on one stream.
#[derive(Debug, Default)]
pub struct Outbox {
    changes: VecDeque<Vec<u8>>,
    bytes: usize,
    list: List,
}

/// How far the list is.
#[derive(Debug, Default)]
enum List {
    /// It must be made.
    #[default]
    Wanted,
    /// These are still to be sent, from the end; nothing has been sent if it
    /// has not begun.
    Under {
        rest: Vec<BookingId>,
        has_begun: bool,
    },
    Sent,
}

impl Outbox {
    /// Takes in a change. Returns how many were dropped.
    pub fn note(&mut self, entry: &[u8]) -> u64 {
        if matches!(self.list, List::Wanted) {
            // The list will show it.
            return 0;
        }
        if self.changes.len() >= OUTBOX_ENTRIES_MAX || self.bytes + entry.len() > OUTBOX_BYTES_MAX {
            let dropped = self.changes.len() as u64 + 1;
            *self = Self::default();
            return dropped;
        }
        self.bytes += entry.len();
        self.changes.push_back(entry.to_vec());
        0
    }

    /// The bodies of the frames to be sent now: changes first, so that what the
    /// list says of a booking is never older than what was said of it before.
    ///
    /// - `loads`: what runs now.
    /// - `now_ms`: the host's monotonic clock.
    #[must_use]
    pub fn frames(&mut self, loads: &Loads, now_ms: u64) -> Vec<Vec<u8>> {
        if matches!(self.list, List::Wanted) {
            let rest = loads.ids().filter(|id| !id.is_remote()).collect();
            self.list = List::Under { rest, has_begun: false };
        }
        let mut frames = Vec::new();
        if matches!(self.list, List::Under { has_begun: false, .. }) {
            frames.extend(self.next_of_list(loads, now_ms));
        }
        while frames.len() < OUTBOX_FRAMES && !self.changes.is_empty() {
            frames.push(self.next_of_changes(now_ms));
        }
        while frames.len() < OUTBOX_FRAMES {
            let Some(frame) = self.next_of_list(loads, now_ms) else { break };
            frames.push(frame);
        }
        frames
    }

    fn next_of_changes(&mut self, now_ms: u64) -> Vec<u8> {
        let (mut entries, mut bytes) = (Vec::new(), 0);
        while let Some(entry) = self.changes.front()
            && fits_frame(entries.len(), bytes, entry.len())
        {
            bytes += entry.len();
            entries.extend(self.changes.pop_front());
        }
        self.bytes = self.bytes.saturating_sub(bytes);
        encode(&entries, Flags::default(), now_ms)
    }

    fn next_of_list(&mut self, loads: &Loads, now_ms: u64) -> Option<Vec<u8>> {
        let List::Under { rest, has_begun } = &mut self.list else { return None };
        let (mut entries, mut bytes) = (Vec::new(), 0);
        while let Some(id) = rest.last() {
            // What has ended meanwhile is not named.
            if let Some((booking, is_done)) = loads.get(*id) {
                let booked = Entry::Booked(booking.clone()).encode();
                // Room for the mark, too.
                if !fits_frame(entries.len() + 1, bytes, booked.len()) && !entries.is_empty() {
                    break;
                }
                bytes += booked.len();
                entries.push(booked);
                if is_done {
                    entries.push(Entry::PrefillDone(*id).encode());
                }
            }
            rest.pop();
        }
        let begins = !core::mem::replace(has_begun, true);
        let ends = rest.is_empty();
        if ends {
            self.list = List::Sent;
        }
        Some(encode(&entries, Flags { begins, ends, wanted: false }, now_ms))
    }
}

fn encode(entries: &[Vec<u8>], flags: Flags, now_ms: u64) -> Vec<u8> {
    let entries = entries.iter().map(Vec::as_slice).collect();
    Bookings { flags, now_ms, entries }.encode()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bookings::REMOTE_BIT;
    use crate::ids::{SequenceHash, WorkerSlot};
    use crate::load::Booking;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn booking(id: u64, blocks: usize) -> Booking {
        Booking {
            prefill_tokens: 1,
            blocks: (0..blocks as u64).map(|at| SequenceHash(id << 20 | at)).collect(),
            ..Booking::new(BookingId(id), WorkerSlot(1), 1)
        }
    }

    /// Applies what a frame says to a naive account, as the sidecar does.
    #[derive(Default)]
    struct Account {
        loads: Loads,
        named: Vec<BookingId>,
        lists: usize,
    }

    impl Account {
        fn take(&mut self, frames: &[Vec<u8>]) {
            for body in frames {
                let frame = Bookings::decode(body).unwrap();
                if frame.flags.begins {
                    self.named.clear();
                }
                for entry in frame.read() {
                    match entry.unwrap() {
                        Entry::Booked(booking) => {
                            self.named.push(booking.id);
                            if !self.loads.contains(booking.id) {
                                self.loads.add(booking);
                            }
                        }
                        Entry::PrefillDone(id) => self.loads.prefill_done(id),
                        Entry::Freed(id) => self.loads.free(id),
                        other => panic!("{other:?}"),
                    }
                }
                if frame.flags.ends {
                    self.lists += 1;
                    let gone: Vec<BookingId> =
                        self.loads.ids().filter(|id| !self.named.contains(id)).collect();
                    gone.into_iter().for_each(|id| self.loads.free(id));
                }
            }
        }
    }

    /// Goal: whatever changes while the list goes out, and however often the
    /// queue overflows, the other side ends with what runs here.
    #[test]
    fn the_other_side_knows_what_runs() {
        let mut random = crate::choose::Random::seeded(7);
        for round in 0..50 {
            let (mut here, mut outbox) = (Loads::new(), Outbox::default());
            let mut there = Account::default();
            there.loads.add(booking(1 << 40, 1));
            let mut next = 1;
            for step in 0..300_u64 {
                let entry = match random.next_u64() % 3 {
                    0 => {
                        next += 1;
                        Entry::Booked(booking(next, if round % 2 == 0 { 3 } else { 4_000 }))
                    }
                    1 => Entry::PrefillDone(BookingId(random.next_u64() % next)),
                    _ => Entry::Freed(BookingId(random.next_u64() % next)),
                };
                match &entry {
                    Entry::Booked(booking) => here.add(booking.clone()),
                    Entry::PrefillDone(id) => here.prefill_done(*id),
                    Entry::Freed(id) => here.free(*id),
                    _ => {}
                }
                outbox.note(&entry.encode());
                if step == 150 {
                    outbox = Outbox::default();
                }
                if random.next_u64().is_multiple_of(40) {
                    there.take(&outbox.frames(&here, step));
                }
            }
            here.add(booking(REMOTE_BIT | 1, 1));
            loop {
                let frames = outbox.frames(&here, 500);
                if frames.is_empty() {
                    break;
                }
                there.take(&frames);
            }
            here.free(BookingId(REMOTE_BIT | 1));
            assert!(there.lists > 0);
            assert_eq!(there.loads.of(WorkerSlot(1)), here.of(WorkerSlot(1)), "round {round}");
        }
    }

    #[test]
    fn an_overflow_is_counted_and_made_up_for() {
        let mut outbox = Outbox::default();
        assert_eq!(outbox.note(b"before the list"), 0);
        let mut loads = Loads::new();
        loads.add(booking(9, 1));
        assert_eq!(outbox.frames(&loads, 0).len(), 1);
        assert!(outbox.frames(&loads, 0).is_empty(), "once");
        let freed = Entry::Freed(BookingId(9)).encode();
        for _ in 0..OUTBOX_ENTRIES_MAX {
            assert_eq!(outbox.note(&freed), 0);
        }
        assert_eq!(outbox.note(&freed), OUTBOX_ENTRIES_MAX as u64 + 1);
        let frames = outbox.frames(&loads, 0);
        let list = Bookings::decode(&frames[0]).unwrap();
        assert!(list.flags.begins && list.flags.ends && list.entries.len() == 1);
    }
}
