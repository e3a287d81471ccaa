//! What a filter says to the sidecar, and the parts of blobs that it gets.
//!
//! Input: a byte that chooses the kind, then the body; other bytes are those of a
//! whole frame, as the feed server takes it.

use warmpath_core::bookings::{Bookings, Flags};
use warmpath_core::card::BlobId;
use warmpath_core::entry::Entry;
use warmpath_core::frame::{Frame, Kind};
use warmpath_core::ids::{DpRank, Worker, WorkerId, WorkerSlot};
use warmpath_core::load::{Booking, BookingId};
use warmpath_core::uplink::{BlobPart, FetchBlob, Hello, More, Purpose};
use warmpath_sidecar::publish::blobs::{Blobs, Fetch};
use warmpath_sidecar::replicas::own_path;
use warmpath_sidecar::replicas::tracker::{Directory, Out, Rank, Tracker};

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let hello =
        Hello { purpose: Purpose::Snapshot, vm: 1, epoch: 2, sequence: 3, gateway: 4 }.encode();
    let blob = BlobId::of(b"12345");
    let bodies = [
        (
            0,
            Kind::Hello,
            Hello { purpose: Purpose::Follow, ..Hello::decode(&hello).unwrap() }.encode(),
        ),
        (0, Kind::Hello, hello),
        (1, Kind::More, More { parts: 4 }.encode()),
        (2, Kind::FetchBlob, FetchBlob { blob, offset: 2 }.encode()),
        (5, Kind::Bookings, bookings()),
        (3, Kind::BlobPart, BlobPart { blob, offset: 2, bytes: b"345" }.encode()),
    ];
    let mut seeds = Vec::new();
    for (choice, kind, body) in bodies {
        let frame = Frame { kind, epoch: 0, sequence: 0, body: &body }.encode();
        seeds.push([&[choice], &body[..]].concat());
        seeds.push([&[4], &frame[..]].concat());
    }
    seeds
}

fn bookings() -> Vec<u8> {
    let booking = Booking { prefill_tokens: 3, ..Booking::new(BookingId(7), WorkerSlot(1), 5) };
    let entries = [
        Entry::Booked(booking).encode(),
        Entry::PrefillDone(BookingId(7)).encode(),
        Entry::Freed(BookingId(7)).encode(),
    ];
    let entries = entries.iter().map(Vec::as_slice).collect();
    let flags = Flags { begins: true, ends: true, wanted: false };
    Bookings { flags, now_ms: 9, entries }.encode()
}

/// Whatever a gateway says, what it books can be ended.
fn check_tracker(bookings: &Bookings<'_>) {
    let worker = Worker { id: WorkerId(1), rank: DpRank(0) };
    let rank = Rank { worker, path: own_path().into() };
    let (mut tracker, mut out) = (Tracker::new(1, 1), Out::default());
    tracker.set_directory(Directory::new([(WorkerSlot(1), rank)]), &mut out);
    tracker.attached(1);
    tracker.heard(1, bookings, 100, &mut out);
    tracker.heard(1, bookings, 100, &mut out);
    tracker.set_directory(Directory::default(), &mut out);
    assert_eq!(tracker.levels().own, 0, "nothing is left without its worker");
}

pub(super) fn check(data: &[u8]) {
    let Some((choice, body)) = data.split_first() else { return };
    let kind = match choice {
        0 => Kind::Hello,
        1 => Kind::More,
        2 => Kind::FetchBlob,
        3 => Kind::BlobPart,
        5 => Kind::Bookings,
        _ => {
            let Ok(frame) = Frame::decode(body) else { return };
            return check_body(frame.kind, frame.body);
        }
    };
    check_body(kind, body);
}

fn check_body(kind: Kind, body: &[u8]) {
    match kind {
        Kind::Hello => {
            if let Ok(hello) = Hello::decode(body) {
                assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
            }
        }
        Kind::More => {
            if let Ok(more) = More::decode(body) {
                assert_eq!(More::decode(&more.encode()), Ok(more));
            }
        }
        Kind::FetchBlob => {
            if let Ok(fetch) = FetchBlob::decode(body) {
                assert_eq!(FetchBlob::decode(&fetch.encode()), Ok(fetch));
                let (_, is_last) = Fetch::new(fetch, &Blobs::default()).next_part();
                assert!(is_last, "an unknown blob is one part");
            }
        }
        Kind::Bookings => {
            if let Ok(bookings) = Bookings::decode(body) {
                assert_eq!(Bookings::decode(&bookings.encode()), Ok(bookings.clone()));
                check_tracker(&bookings);
            }
        }
        Kind::BlobPart => {
            if let Ok(part) = BlobPart::decode(body) {
                assert_eq!(BlobPart::decode(&part.encode()), Ok(part));
                assert!(part.offset + part.bytes.len() as u64 <= part.blob.len, "inside its blob");
            }
        }
        _ => {}
    }
}
