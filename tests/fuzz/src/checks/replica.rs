//! The feed as a VM sees it: frames in any order, snapshots among them.
//!
//! Input: steps, each a byte that chooses frame and way, a byte that moves the
//! position, two bytes of length, and the body.

use warmpath_core::entry::Entry;
use warmpath_core::frame::Frame;
use warmpath_core::replica::{Replica, SnapshotProgress};

use super::feed_frame::{bodies, kind_of};

/// Most steps of one input.
const STEPS_MAX: usize = 64;

/// Blocks of the index: few, so that the limit is reached.
const BLOCKS_MAX: usize = 64;

/// Set in a step's first byte: the frame comes by the snapshot's stream.
const BY_SNAPSHOT: u8 = 0x10;

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let bodies = bodies();
    let step = |kind: u8, position: u8| {
        let body = bodies.iter().find(|(own, _)| *own as u8 == kind % 16).map(|(_, body)| body);
        let body = body.map_or(&[][..], |body| body);
        let len = u16::try_from(body.len()).expect("a short body").to_le_bytes();
        [&[kind, position], &len[..], body].concat()
    };
    let snapshot = [(0x20, 0), (0x16, 0), (0x17, 0), (0x18, 0)];
    let log = [(4, 0), (2, 1), (3, 1), (1, 1), (1, 1)];
    let lost = [(1, 3), (0x40, 0), (5, 0), (4, 16)];
    [&[&snapshot[..], &log].concat(), &[&log[..], &snapshot, &log, &lost, &snapshot].concat()]
        .iter()
        .map(|steps| steps.iter().flat_map(|(kind, position)| step(*kind, *position)).collect())
        .collect()
}

pub(super) fn check(data: &[u8]) {
    let mut replica = Replica::new(BLOCKS_MAX);
    let (mut epoch, mut sequence) = (1, 0_u64);
    let mut rest = data;
    for _ in 0..STEPS_MAX {
        let Some(([choice, position, low, high], after)) = rest.split_first_chunk::<4>() else {
            break;
        };
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(after.len());
        let (body, after) = after.split_at(len);
        rest = after;
        epoch += u64::from(position >> 4);
        sequence = sequence.wrapping_add(u64::from(position & 0x0f));
        match kind_of(choice & 0x0f) {
            Some(kind) => {
                let frame = Frame { kind, epoch, sequence, body }.encode();
                if choice & BY_SNAPSHOT == 0 {
                    replica.apply_entry(&Entry::Feed(&frame).encode());
                } else if replica.apply_snapshot_frame(&frame) == SnapshotProgress::Done {
                    assert!(replica.is_live() && replica.has_index());
                }
            }
            None if choice & 0x20 != 0 && replica.wants_snapshot() => replica.begin_snapshot(),
            None if choice & 0x40 != 0 => replica.overrun(),
            None if choice & 0x80 != 0 => replica.abandon_snapshot(),
            None => {
                replica.apply_entry(body);
                replica.apply_state_bytes(body);
            }
        }
        replica.step();
        assert!(replica.index().blocks() <= BLOCKS_MAX, "the index is bounded");
        assert!(!replica.is_live() || replica.has_index());
    }
}
