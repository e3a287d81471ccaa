//! An entry of the ring log, as another VM (perhaps of another release) left it.
//!
//! Input: the entry.

use warmpath_core::entry::Entry;
use warmpath_core::ids::{SequenceHash, WorkerSlot};
use warmpath_core::load::{Booking, BookingId};
use warmpath_core::replica::Replica;

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let booking = Booking {
        prefill_tokens: 77,
        blocks: (0..4).map(SequenceHash).collect(),
        unshared_blocks: 2,
        expected_output_tokens: 200,
        ..Booking::new(BookingId(9), WorkerSlot(3), 5)
    };
    [
        Entry::Feed(b"frame"),
        Entry::Booked(booking.clone()),
        Entry::BookedPair { serving: booking.clone(), prefill: booking },
        Entry::PrefillDone(BookingId(9)),
        Entry::OutputBlocks { id: BookingId(9), blocks: 2, tokens: 18 },
        Entry::Refreshed(BookingId(9), 10),
        Entry::Freed(BookingId(9)),
    ]
    .iter()
    .map(Entry::encode)
    .collect()
}

pub(super) fn check(data: &[u8]) {
    let entry = Entry::decode(data);
    if let Ok(entry) = &entry {
        assert_eq!(entry.encode(), data, "an entry has one form");
    }
    let mut replica = Replica::new(1_000);
    replica.apply_entry(data);
    replica.apply_entry(data);
    let bad = replica.counters().bad_frames;
    assert!(entry.is_ok() || bad == 2, "what cannot be read is counted");
}
