//! Bookings of other routers in a replica.

use super::*;
use crate::bookings::{Flags, REMOTE_BIT};
use crate::load::WorkerLoad;

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const LIST: Flags = Flags { begins: true, ends: true, wanted: true };
const CHANGE: Flags = Flags { begins: false, ends: false, wanted: true };

fn remote(id: u64) -> BookingId {
    BookingId(REMOTE_BIT | id)
}

fn booked(id: u64, at_ms: u64) -> Entry<'static> {
    Entry::Booked(Booking {
        prefill_tokens: 10,
        blocks: vec![hash(1), hash(id)],
        ..Booking::new(remote(id), WorkerSlot(1), at_ms)
    })
}

fn frame(flags: Flags, now_ms: u64, entries: &[Entry<'_>]) -> Vec<u8> {
    let entries: Vec<Vec<u8>> = entries.iter().map(Entry::encode).collect();
    let entries = entries.iter().map(Vec::as_slice).collect();
    let body = Bookings { flags, now_ms, entries }.encode();
    Frame { kind: Kind::Remote, epoch: 7, sequence: 0, body: &body }.encode()
}

fn apply(replica: &mut Replica, flags: Flags, now_ms: u64, entries: &[Entry<'_>]) {
    replica.apply_entry(&Entry::Feed(&frame(flags, now_ms, entries)).encode());
}

fn load(replica: &Replica) -> (u64, u64, u64) {
    let WorkerLoad { prefill_tokens, active_blocks, requests } = replica.loads().of(WorkerSlot(1));
    (prefill_tokens, active_blocks, requests)
}

#[test]
fn remote_bookings_count_like_any_others() {
    let mut replica = Replica::new(16);
    replica.set_now(1_000);
    apply(&mut replica, LIST, 50, &[booked(2, 40), booked(3, 50)]);
    assert_eq!(load(&replica), (20, 3, 2));
    apply(&mut replica, CHANGE, 60, &[Entry::PrefillDone(remote(2)), Entry::Freed(remote(3))]);
    assert_eq!(load(&replica), (0, 2, 1));
    // Twice changes nothing; what has ended stays so.
    apply(&mut replica, CHANGE, 60, &[booked(2, 40), Entry::Freed(remote(3))]);
    assert_eq!(load(&replica), (0, 2, 1));
    // The age counts by this VM's clock: placed at 990, by the sender's at 40.
    assert_eq!(replica.loads.expire(1_289, 300), 0);
    assert_eq!(replica.loads.expire(1_290, 300), 1);
    assert_eq!(load(&replica), (0, 0, 0));
    assert_eq!(replica.counters(), Counters::default());
}

/// Goal: what ended while nobody listened is over with the next list, however
/// many frames that has; what is local stays.
#[test]
fn a_list_ends_what_it_does_not_name() {
    let mut replica = Replica::new(16);
    let local = Booking { prefill_tokens: 5, ..Booking::new(BookingId(1), WorkerSlot(1), 0) };
    replica.apply_entry(&Entry::Booked(local).encode());
    apply(&mut replica, LIST, 0, &[booked(2, 0), booked(3, 0), booked(4, 0)]);
    let begins = Flags { ends: false, ..LIST };
    let ends = Flags { begins: false, ..LIST };
    apply(&mut replica, begins, 0, &[booked(3, 0)]);
    assert_eq!(load(&replica).2, 4);
    apply(&mut replica, ends, 0, &[booked(5, 0)]);
    assert_eq!(load(&replica), (25, 3, 3));
    apply(&mut replica, LIST, 0, &[]);
    assert_eq!(load(&replica), (5, 0, 1));
}

/// Goal: nobody ends this gateway's own bookings from outside, but a worker may
/// say that a prompt is computed.
#[test]
fn local_bookings_are_marked_only() {
    let mut replica = Replica::new(16);
    let local = Booking { prefill_tokens: 5, ..Booking::new(BookingId(1), WorkerSlot(1), 0) };
    replica.apply_entry(&Entry::Booked(local.clone()).encode());
    apply(&mut replica, CHANGE, 0, &[Entry::PrefillDone(BookingId(1))]);
    assert_eq!(load(&replica), (0, 0, 1));
    let foreign =
        [Entry::Freed(BookingId(1)), Entry::Booked(Booking { id: BookingId(9), ..local })];
    apply(&mut replica, CHANGE, 0, &foreign);
    assert_eq!(load(&replica), (0, 0, 1));
    assert_eq!(replica.counters().bad_frames, 2);
}

/// Goal: a VM that starts late gets what there is, though the list comes beside
/// the ring and may be older than what came through it.
#[test]
fn a_list_beside_the_ring_adds_only() {
    let mut replica = Replica::new(16);
    apply(&mut replica, CHANGE, 0, &[Entry::Freed(remote(2)), booked(5, 0)]);
    replica.begin_snapshot();
    let beside = frame(LIST, 0, &[booked(2, 0), booked(3, 0)]);
    assert_eq!(replica.apply_snapshot_frame(&beside), SnapshotProgress::More);
    assert_eq!(load(&replica), (20, 3, 2));
    apply(&mut replica, LIST, 0, &[booked(3, 0)]);
    assert_eq!(load(&replica), (10, 2, 1));
}
