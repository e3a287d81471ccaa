//! A replica against a sidecar that is too simple to be wrong.

use super::*;
use crate::cache_usage::{CacheUsage, CacheUsages, Share};
use crate::delta::{Operation, SnapshotStart, encode_operations};
use crate::ids::{DpRank, SequenceHash, Worker, WorkerId};
use crate::limits::PENDING_BYTES_PER_STEP;
use crate::load::{Booking, BookingId};
use crate::roster::{Parity, Role, RosterWorker, TierSlots};
use std::collections::BTreeSet;

mod remote;

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

fn hash(n: u64) -> SequenceHash {
    SequenceHash(xxhash_rust::xxh3::xxh3_64(&n.to_le_bytes()))
}

/// Keeps the truth of one worker's blocks and every log frame.
struct Sidecar {
    epoch: u64,
    log: Vec<Vec<u8>>,
    blocks: BTreeSet<u64>,
}

impl Sidecar {
    fn new(epoch: u64) -> Self {
        Self { epoch, log: Vec::new(), blocks: BTreeSet::new() }
    }

    fn frame(&self, kind: Kind, sequence: u64, body: &[u8]) -> Vec<u8> {
        Frame { kind, epoch: self.epoch, sequence, body }.encode()
    }

    fn sequence(&self) -> u64 {
        self.log.len() as u64
    }

    fn delta(&mut self, stored: &[u64], removed: &[u64]) -> Vec<u8> {
        self.blocks.extend(stored);
        self.blocks.retain(|block| !removed.contains(block));
        let hashes = |blocks: &[u64]| blocks.iter().map(|n| hash(*n)).collect::<Vec<_>>();
        let body = encode_operations(&[
            (Operation::Stored, WorkerSlot(1), &hashes(stored)),
            (Operation::Removed, WorkerSlot(1), &hashes(removed)),
        ]);
        let frame = self.frame(Kind::Delta, self.sequence() + 1, &body);
        self.log.push(frame.clone());
        frame
    }

    fn resync(&self) -> Vec<u8> {
        self.frame(Kind::Resync, self.sequence(), &[])
    }

    fn snapshot(&self) -> Vec<Vec<u8>> {
        let at = self.sequence();
        let start = SnapshotStart { blocks: self.blocks.len() as u64 }.encode();
        let hashes: Vec<_> = self.blocks.iter().map(|n| hash(*n)).collect();
        let part = encode_operations(&[(Operation::Stored, WorkerSlot(1), &hashes)]);
        vec![
            self.frame(Kind::SnapshotStart, at, &start),
            self.frame(Kind::SnapshotPart, at, &part),
            self.frame(Kind::SnapshotEnd, at, &[]),
        ]
    }
}

fn ring(replica: &mut Replica, frame: &[u8]) -> Changed {
    replica.apply_entry(&Entry::Feed(frame).encode())
}

fn load(replica: &mut Replica, frames: &[Vec<u8>]) -> SnapshotProgress {
    let mut progress = SnapshotProgress::More;
    for frame in frames {
        progress = replica.apply_snapshot_frame(frame);
    }
    progress
}

fn held(replica: &mut Replica) -> BTreeSet<u64> {
    (0..100).filter(|n| replica.index.holders(hash(*n)).is_some()).collect()
}

fn live(sidecar: &Sidecar) -> Replica {
    let mut replica = Replica::new(1_000);
    ring(&mut replica, &sidecar.resync());
    assert!(replica.wants_snapshot());
    replica.begin_snapshot();
    assert_eq!(load(&mut replica, &sidecar.snapshot()), SnapshotProgress::Done);
    replica
}

#[test]
fn a_snapshot_and_then_deltas() {
    let mut sidecar = Sidecar::new(7);
    sidecar.delta(&[1, 2], &[]);
    let mut replica = live(&sidecar);
    assert_eq!(held(&mut replica), sidecar.blocks);
    let delta = sidecar.delta(&[3], &[1]);
    ring(&mut replica, &delta);
    assert_eq!(held(&mut replica), sidecar.blocks);
    assert!(replica.is_live());
    assert_eq!(replica.live_at(), Some(Position { epoch: 7, sequence: 2 }));
}

#[test]
fn doubled_frames_change_nothing() {
    let mut sidecar = Sidecar::new(7);
    let mut replica = live(&sidecar);
    let first = sidecar.delta(&[3], &[]);
    let second = sidecar.delta(&[], &[3]);
    for frame in [&first, &second, &first, &second] {
        ring(&mut replica, frame);
    }
    assert_eq!(held(&mut replica), BTreeSet::new());
    assert!(replica.is_live());
    assert_eq!((replica.counters().gaps, replica.counters().replayed), (0, 2));
}

/// Goal: whoever sends frames of the past again, of this log or of one before it,
/// brings back neither blocks nor workers, does not stop the index, and is counted.
#[test]
fn frames_of_the_past_are_refused() {
    let mut old = Sidecar::new(6);
    let of_before = old.delta(&[1, 2], &[]);
    let mut sidecar = Sidecar::new(7);
    let mut replica = live(&sidecar);
    let stored = sidecar.delta(&[3], &[]);
    ring(&mut replica, &stored);
    ring(&mut replica, &sidecar.delta(&[], &[3]));
    ring(&mut replica, &roster_frame(5, &[(1, 1), (2, 2)]));
    ring(&mut replica, &roster_frame(6, &[(1, 1)]));
    let (held_before, seen) = (held(&mut replica), replica.seen());
    for frame in [&of_before, &stored, &roster_frame(5, &[(1, 1), (2, 2)])] {
        let before = replica.counters().replayed;
        ring(&mut replica, frame);
        assert_eq!(replica.counters().replayed, before + 1);
        assert_eq!((held(&mut replica), replica.seen()), (held_before.clone(), seen));
        assert!(replica.is_live());
        assert_eq!(replica.roster().workers.len(), 1);
    }
    let next = sidecar.delta(&[4], &[]);
    ring(&mut replica, &next);
    assert!(replica.is_live() && held(&mut replica).contains(&4));
}

/// Goal: parts of one snapshot are not taken for parts of another.
#[test]
fn a_part_of_another_snapshot_is_refused() {
    let mut sidecar = Sidecar::new(7);
    sidecar.delta(&[1], &[]);
    let older = sidecar.snapshot();
    sidecar.delta(&[2], &[1]);
    let newer = sidecar.snapshot();
    let mut replica = Replica::new(1_000);
    ring(&mut replica, &sidecar.resync());
    replica.begin_snapshot();
    let mixed = [newer[0].clone(), older[1].clone()];
    assert_eq!(load(&mut replica, &mixed), SnapshotProgress::Failed);
    assert!(replica.wants_snapshot());
}

/// Goal: a frame that is lost never leaves a wrong index in force.
#[test]
fn a_gap_asks_for_a_snapshot() {
    let mut sidecar = Sidecar::new(7);
    let mut replica = live(&sidecar);
    sidecar.delta(&[3], &[]);
    let after = sidecar.delta(&[4], &[]);
    ring(&mut replica, &after);
    assert!(!replica.is_live() && replica.wants_snapshot());
    assert!(replica.has_index(), "old answers are better than none");
    assert_eq!(replica.counters().gaps, 1);
    replica.begin_snapshot();
    load(&mut replica, &sidecar.snapshot());
    assert_eq!(held(&mut replica), sidecar.blocks);
}

/// Goal: whatever the order in which a snapshot's frames and the ring's deltas
/// arrive, and wherever the snapshot was taken, the end is the truth.
/// Method: every place of the snapshot in a log of 12 frames, and every split
/// of the deltas between before, among and behind its frames.
#[test]
fn a_snapshot_among_deltas_ends_in_the_truth() {
    for taken_at in 0..=12_usize {
        for first in 0..=taken_at {
            for second in first..=12 {
                let mut sidecar = Sidecar::new(7);
                let mut replica = Replica::new(1_000);
                ring(&mut replica, &sidecar.resync());
                let mut snapshot = if taken_at == 0 { sidecar.snapshot() } else { Vec::new() };
                for n in 0..12_u64 {
                    sidecar.delta(&[n, n + 20], &[n.wrapping_sub(3)]);
                    if sidecar.log.len() == taken_at {
                        snapshot = sidecar.snapshot();
                    }
                }
                let log = sidecar.log.clone();
                // The sidecar takes the snapshot after it is asked for, so
                // what the ring has brought by then is older than it.
                log[..first].iter().for_each(|frame| {
                    ring(&mut replica, frame);
                });
                replica.begin_snapshot();
                replica.apply_snapshot_frame(&snapshot[0]);
                log[first..second].iter().for_each(|frame| {
                    ring(&mut replica, frame);
                });
                replica.apply_snapshot_frame(&snapshot[1]);
                assert_eq!(
                    replica.apply_snapshot_frame(&snapshot[2]),
                    SnapshotProgress::Done,
                    "taken at {taken_at}, {first}, {second}"
                );
                log[second..].iter().for_each(|frame| {
                    ring(&mut replica, frame);
                });
                assert!(replica.is_live(), "taken at {taken_at}, {first}, {second}");
                assert_eq!(
                    held(&mut replica),
                    sidecar.blocks,
                    "taken at {taken_at}, {first}, {second}"
                );
            }
        }
    }
}

/// Goal: a restarted sidecar's log is not mixed with the old one's, and the old
/// index answers until the new snapshot is there.
#[test]
fn another_epoch_starts_over() {
    let mut old = Sidecar::new(7);
    old.delta(&[1, 2], &[]);
    let mut replica = live(&old);
    let mut new = Sidecar::new(8);
    new.delta(&[5], &[]);
    ring(&mut replica, &new.resync());
    assert!(replica.wants_snapshot() && replica.has_index());
    assert_eq!(held(&mut replica), old.blocks);
    replica.begin_snapshot();
    load(&mut replica, &new.snapshot());
    assert_eq!(held(&mut replica), new.blocks);
    let delta = new.delta(&[6], &[]);
    ring(&mut replica, &delta);
    assert_eq!(held(&mut replica), new.blocks);
}

/// Goal: resuming where one is needs no snapshot.
#[test]
fn a_resync_to_where_we_are_keeps_the_index() {
    let mut sidecar = Sidecar::new(7);
    let mut replica = live(&sidecar);
    let delta = sidecar.delta(&[1], &[]);
    ring(&mut replica, &delta);
    ring(&mut replica, &sidecar.resync());
    assert!(replica.is_live());
    sidecar.delta(&[2], &[]);
    ring(&mut replica, &sidecar.resync());
    assert!(replica.wants_snapshot(), "frame 2 was never seen");
}

/// Goal: a VM that starts when the ring holds nothing but heartbeats still
/// finds out that there is a log.
#[test]
fn a_heartbeat_tells_how_far_the_log_is() {
    let mut sidecar = Sidecar::new(7);
    sidecar.delta(&[1], &[]);
    let heartbeat = sidecar.frame(Kind::Heartbeat, 1, &[]);
    let mut replica = Replica::new(100);
    ring(&mut replica, &heartbeat);
    assert_eq!(replica.seen(), Position { epoch: 7, sequence: 1 });
    replica.begin_snapshot();
    load(&mut replica, &sidecar.snapshot());
    ring(&mut replica, &heartbeat);
    assert!(replica.is_live());
    sidecar.delta(&[2], &[]);
    let later = sidecar.frame(Kind::Heartbeat, 2, &[]);
    ring(&mut replica, &later);
    assert!(!replica.is_live(), "frame 2 was never seen");
}

#[test]
fn an_overrun_starts_over() {
    let mut sidecar = Sidecar::new(7);
    let mut replica = live(&sidecar);
    replica.overrun();
    assert!(replica.wants_snapshot());
    sidecar.delta(&[1], &[]);
    replica.begin_snapshot();
    let late = sidecar.delta(&[2], &[]);
    ring(&mut replica, &late);
    load(&mut replica, &sidecar.snapshot());
    assert_eq!(held(&mut replica), sidecar.blocks);
}

#[test]
fn a_damaged_frame_is_counted_and_the_index_taken_anew() {
    let mut sidecar = Sidecar::new(7);
    let mut replica = live(&sidecar);
    let mut bad = sidecar.delta(&[1], &[]);
    bad[41] ^= 1;
    ring(&mut replica, &bad);
    replica.apply_entry(&[9, 9]);
    assert_eq!(replica.counters().bad_frames, 2);
    assert!(replica.wants_snapshot());
}

#[test]
fn a_flood_during_a_snapshot_restarts_it() {
    let mut sidecar = Sidecar::new(7);
    let mut replica = Replica::new(1_000);
    ring(&mut replica, &sidecar.resync());
    replica.begin_snapshot();
    let many: Vec<u64> = (0..1_900).collect();
    while !replica.wants_snapshot() {
        let delta = sidecar.delta(&many, &[]);
        ring(&mut replica, &delta);
    }
    assert_eq!(replica.counters().snapshots_restarted, 1);
    assert_eq!(load(&mut replica, &sidecar.snapshot()[..1]), SnapshotProgress::Failed);
}

/// Goal: much that came while a snapshot did is applied in bounded pieces; until
/// all of it is, the old index answers, and then the new one shows everything.
#[test]
fn what_came_during_a_snapshot_is_applied_in_pieces() {
    let mut old = Sidecar::new(7);
    old.delta(&[99], &[]);
    let mut replica = live(&old);
    let mut new = Sidecar::new(8);
    new.delta(&[1], &[]);
    ring(&mut replica, &new.resync());
    replica.begin_snapshot();
    let snapshot = new.snapshot();
    // Each is larger than one step may apply.
    let many: Vec<u64> = (1_000..2_900).collect();
    let frame_bytes = many.len() * 8;
    let frames = 2 * PENDING_BYTES_PER_STEP / frame_bytes + 3;
    for n in 0..frames as u64 {
        let delta = new.delta(&[n + 2], &many);
        ring(&mut replica, &delta);
    }
    assert_eq!(load(&mut replica, &snapshot), SnapshotProgress::Settling);
    let mut steps = 0;
    while !replica.is_live() {
        assert_eq!(held(&mut replica), old.blocks);
        assert!(!replica.wants_snapshot() && steps < 10);
        replica.step();
        steps += 1;
        if steps == 1 {
            // What comes now is applied behind the rest.
            let delta = new.delta(&[], &[1]);
            ring(&mut replica, &delta);
        }
    }
    assert!(steps >= 2, "applied in {steps} steps");
    assert_eq!(held(&mut replica), new.blocks);
    assert_eq!(replica.live_at().map(|at| at.sequence), Some(new.sequence()));
}

/// Goal: room for a large snapshot is made in bounded pieces, and parts are asked
/// for only when it is there.
#[test]
fn room_for_a_snapshot_is_made_in_pieces() {
    const BLOCKS: u64 = 1_000_000;
    let sidecar = Sidecar::new(7);
    let mut replica = Replica::new(4_000_000);
    ring(&mut replica, &sidecar.resync());
    replica.begin_snapshot();
    assert!(!replica.prepare_snapshot(), "how much comes is not known yet");
    let start = SnapshotStart { blocks: BLOCKS }.encode();
    replica.apply_snapshot_frame(&sidecar.frame(Kind::SnapshotStart, 0, &start));
    let mut calls = 1;
    while !replica.prepare_snapshot() {
        calls += 1;
        assert!(calls < 100);
    }
    assert!(calls >= 10, "made in {calls} pieces");
    assert_eq!(load(&mut replica, &sidecar.snapshot()), SnapshotProgress::Done);
}

fn roster_frame(sequence: u64, ids: &[(u16, u64)]) -> Vec<u8> {
    let workers = ids
        .iter()
        .map(|(slot, id)| RosterWorker {
            slot: WorkerSlot(*slot),
            worker: Worker { id: WorkerId(*id), rank: DpRank(0) },
            model: 0,
            role: Role::Aggregated,
            parity: Parity::Exact,
            namespace: 0,
            endpoint: "127.0.0.1:1".to_owned(),
            total_kv_blocks: 0,
            max_num_batched_tokens: 0,
            taints: Vec::new(),
            tiers: TierSlots::default(),
        })
        .collect();
    let body = Roster { workers, adapters: Vec::new() }.encode();
    Frame { kind: Kind::Roster, epoch: 7, sequence, body: &body }.encode()
}

/// Goal: how full caches are is what the last frame says, of every worker at
/// once; it goes with the worker, and is no frame of the log.
#[test]
fn cache_usage_is_the_last_word_of_workers_that_are_there() {
    let mut replica = Replica::new(10);
    ring(&mut replica, &roster_frame(1, &[(1, 10), (2, 20)]));
    let seen = replica.seen();
    let say = |replica: &mut Replica, said: &[(u16, u64)]| {
        let usage = |(slot, used): &(u16, u64)| {
            let used = Share::of(*used, 2);
            (WorkerSlot(*slot), CacheUsage { used, active: None })
        };
        let body = CacheUsages::of(said.iter().map(usage)).encode();
        let frame = Frame { kind: Kind::CacheUsage, epoch: 7, sequence: 0, body: &body };
        ring(replica, &frame.encode());
    };
    let shares = |replica: &Replica| {
        [1, 2].map(|slot| replica.cache_usage(WorkerSlot(slot)).and_then(|it| it.share()))
    };
    assert_eq!(shares(&replica), [None, None]);
    say(&mut replica, &[(1, 1), (2, 2)]);
    assert_eq!(shares(&replica), [Some(0.5), Some(1.0)]);
    say(&mut replica, &[(2, 1)]);
    assert_eq!(shares(&replica), [None, Some(0.5)]);
    assert_eq!((replica.seen(), replica.counters().bad_frames), (seen, 0));
    // Another worker in the same slot has said nothing.
    ring(&mut replica, &roster_frame(2, &[(1, 10), (2, 21)]));
    assert_eq!(shares(&replica), [None, None]);
    say(&mut replica, &[(1, 2)]);
    replica.forget_cache_usages();
    assert_eq!(shares(&replica), [None, None]);
}

/// Goal: a roster between two deltas is no gap to a snapshot under way.
#[test]
fn a_roster_during_a_snapshot_does_not_spoil_it() {
    let mut sidecar = Sidecar::new(7);
    sidecar.delta(&[1], &[]);
    let mut replica = Replica::new(100);
    ring(&mut replica, &sidecar.resync());
    replica.begin_snapshot();
    let snapshot = sidecar.snapshot();
    let before = sidecar.delta(&[2], &[]);
    let roster = roster_frame(sidecar.sequence() + 1, &[(1, 10)]);
    sidecar.log.push(roster.clone());
    let behind = sidecar.delta(&[3], &[1]);
    for frame in [before, roster, behind] {
        ring(&mut replica, &frame);
    }
    assert_eq!(load(&mut replica, &snapshot), SnapshotProgress::Done);
    assert_eq!(held(&mut replica), sidecar.blocks);
    assert_eq!(replica.counters().gaps, 0);
}

#[test]
fn a_worker_that_leaves_takes_its_bookings_along() {
    let mut replica = Replica::new(10);
    assert!(ring(&mut replica, &roster_frame(1, &[(1, 10), (2, 20)])).roster);
    for (id, slot) in [(1, 1), (2, 2)] {
        let booking = Booking::new(BookingId(id), WorkerSlot(slot), 0);
        replica.apply_entry(&Entry::Booked(booking).encode());
    }
    assert!(!ring(&mut replica, &roster_frame(1, &[(1, 10)])).roster, "the same frame again");
    assert_eq!(replica.loads().bookings(), 2);
    // Slot 2 stands for another worker now.
    ring(&mut replica, &roster_frame(2, &[(1, 10), (2, 21)]));
    assert_eq!(replica.loads().bookings(), 1);
    assert_eq!(replica.loads().of(WorkerSlot(1)).requests, 1);
}

#[test]
fn a_roster_that_cannot_be_read_leaves_the_old_one() {
    let mut replica = Replica::new(10);
    ring(&mut replica, &roster_frame(1, &[(1, 10)]));
    let bad = Frame { kind: Kind::Roster, epoch: 7, sequence: 2, body: &[9] }.encode();
    assert!(!ring(&mut replica, &bad).roster);
    assert_eq!(replica.roster().workers.len(), 1);
    assert_eq!(replica.counters().bad_frames, 1);
}

#[test]
fn the_last_settings_are_kept() {
    let sidecar = Sidecar::new(7);
    let mut replica = live(&sidecar);
    assert_eq!(*replica.settings_of(Some(1)), Settings::default());
    let own = Settings { router_temperature: 0.5, ..Settings::default() };
    let sent = RouterSettings { default: Settings::default(), of_models: vec![(1, own)] };
    let frame = sidecar.frame(Kind::Settings, 1, &sent.encode());
    assert!(ring(&mut replica, &frame).settings);
    assert_eq!(*replica.settings_of(Some(1)), own);
    assert_eq!(*replica.settings_of(None), Settings::default());
    assert!(replica.is_live(), "a settings frame is the log's next");
    // The same again, as at the start of a stream or from shared data.
    assert!(!replica.apply_state_bytes(&frame).settings);
    let bad = sidecar.frame(Kind::Settings, 2, &sent.encode()[1..]);
    assert!(!replica.apply_state_bytes(&bad).settings);
    assert_eq!(*replica.settings_of(Some(1)), own);
    assert_eq!(replica.counters().bad_frames, 1);
}
