//! What a filter says to the sidecar, and the parts of blobs that it gets.
//!
//! Input: a byte that chooses the kind, then the body; other bytes are those of a
//! whole frame, as the feed server takes it.

use warmpath_core::card::BlobId;
use warmpath_core::frame::{Frame, Kind};
use warmpath_core::uplink::{BlobPart, FetchBlob, Hello, More, Purpose};
use warmpath_sidecar::publish::blobs::{Blobs, Fetch};

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let hello = Hello { purpose: Purpose::Snapshot, vm: 1, epoch: 2, sequence: 3, gateway: 4 }.encode();
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

pub(super) fn check(data: &[u8]) {
    let Some((choice, body)) = data.split_first() else { return };
    let kind = match choice {
        0 => Kind::Hello,
        1 => Kind::More,
        2 => Kind::FetchBlob,
        3 => Kind::BlobPart,
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
        Kind::BlobPart => {
            if let Ok(part) = BlobPart::decode(body) {
                assert_eq!(BlobPart::decode(&part.encode()), Ok(part));
                assert!(part.offset + part.bytes.len() as u64 <= part.blob.len, "inside its blob");
            }
        }
        _ => {}
    }
}
