//! Approximate: own decisions that stand for caches that are not seen.
//!
//! A worker that was sent a prompt holds its blocks soon after. Dynamo's router
//! uses that in two ways, and so do we: instead of KV events
//! (`use_kv_events=false`, approximate mode), and besides them until the event
//! comes (`router_predicted_ttl_secs`, predict-on-route). `overlap` asks here as
//! it asks the index.
//!
//! # Terms
//!
//! - *record*: a block of a decision, on the worker that was taken.
//! - *lease*: a running request keeps its records from being dropped for room.
//!
//! # Invariants
//!
//! 1. By time, a record lasts its time from its last decision on, rounded up to
//!    [`APPROXIMATE_TICK_MS`], by the host's monotonic clock.
//! 2. By room, a worker has at most as many records as it holds blocks, those of
//!    running requests aside; the least recently used go first, of one prompt the
//!    last blocks first, as engines drop them.
//! 3. All VMs of a gateway read the same decisions from the ring log, so they
//!    agree.

use std::collections::BTreeMap;

use foldhash::fast::FixedState;
use hashbrown::HashMap;

use crate::ids::{SequenceHash, WorkerSlot};
use crate::index::Index;
use crate::limits::{APPROXIMATE_RECORDS_MAX, APPROXIMATE_TICK_MS};
use crate::load::BookingId;
use crate::overlap::{Overlap, overlaps};

/// A decision, as far as it says what a worker will hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The booking that it belongs to.
    pub id: BookingId,
    /// The worker that computes the prompt.
    pub slot: WorkerSlot,
    /// When it was made, in milliseconds of the host's monotonic clock.
    pub at_ms: u64,
    /// How long its records last.
    pub retention: Retention,
    /// Sequence hashes of the prompt's complete blocks, in prompt order.
    pub hashes: Vec<SequenceHash>,
}

/// How long records last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retention {
    /// Until a number of milliseconds has passed.
    Time(u64),
    /// As long as the worker has room for so many blocks.
    Room(u64),
}

type Key = (WorkerSlot, SequenceHash);

#[derive(Debug)]
enum Kept {
    /// Until this time.
    Until(u64),
    /// For as long as so many requests run.
    Leased(u32),
    /// With this rank among those that may be dropped.
    Ranked(u64),
}

/// All records.
#[derive(Debug)]
pub struct Approximate {
    index: Index,
    kept: HashMap<Key, Kept, FixedState>,
    /// What may end at a time.
    due: BTreeMap<u64, Vec<Key>>,
    /// What may be dropped, least recently used first.
    ranked: BTreeMap<(WorkerSlot, u64), SequenceHash>,
    /// Records of each worker.
    counts: HashMap<WorkerSlot, u64, FixedState>,
    leases: HashMap<BookingId, (WorkerSlot, u64, Vec<SequenceHash>), FixedState>,
    next_rank: u64,
    refused: u64,
}

impl Default for Approximate {
    fn default() -> Self {
        Self {
            index: Index::new(APPROXIMATE_RECORDS_MAX),
            kept: HashMap::default(),
            due: BTreeMap::new(),
            ranked: BTreeMap::new(),
            counts: HashMap::default(),
            leases: HashMap::default(),
            next_rank: 0,
            refused: 0,
        }
    }
}

impl Approximate {
    /// Takes a decision down.
    pub fn record(&mut self, decision: Decision) {
        match decision.retention {
            Retention::Time(ttl_ms) => {
                self.record_until(&decision, decision.at_ms.saturating_add(ttl_ms));
            }
            Retention::Room(blocks) => self.record_leased(decision, blocks),
        }
    }

    fn record_until(&mut self, decision: &Decision, end_ms: u64) {
        let end_ms = end_ms.div_ceil(APPROXIMATE_TICK_MS).saturating_mul(APPROXIMATE_TICK_MS);
        let mut keys = Vec::with_capacity(decision.hashes.len());
        let mut room = APPROXIMATE_RECORDS_MAX.saturating_sub(self.kept.len());
        for hash in &decision.hashes {
            let key = (decision.slot, *hash);
            match self.kept.get_mut(&key) {
                Some(Kept::Until(until)) if *until >= end_ms => continue,
                Some(Kept::Until(until)) => *until = end_ms,
                // Recorded by room before the settings changed.
                Some(Kept::Leased(_) | Kept::Ranked(_)) => continue,
                None if room == 0 => {
                    self.refused += 1;
                    break;
                }
                None => {
                    self.insert(key, Kept::Until(end_ms));
                    room -= 1;
                }
            }
            keys.push(key);
        }
        if !keys.is_empty() {
            self.due.entry(end_ms).or_default().append(&mut keys);
        }
    }

    fn record_leased(&mut self, decision: Decision, room: u64) {
        let Decision { id, slot, hashes, .. } = decision;
        if self.leases.contains_key(&id) {
            return;
        }
        let mut leased = Vec::with_capacity(hashes.len());
        let mut places = APPROXIMATE_RECORDS_MAX.saturating_sub(self.kept.len());
        for hash in hashes {
            let key = (slot, hash);
            match self.kept.get_mut(&key) {
                Some(Kept::Leased(leases)) => *leases += 1,
                Some(kept) => {
                    if let Kept::Ranked(rank) = *kept {
                        self.ranked.remove(&(slot, rank));
                    }
                    *kept = Kept::Leased(1);
                }
                None if places == 0 => {
                    self.refused += 1;
                    break;
                }
                None => {
                    self.insert(key, Kept::Leased(1));
                    places -= 1;
                }
            }
            leased.push(hash);
        }
        self.leases.insert(id, (slot, room, leased));
        self.make_room(slot, room);
    }

    fn insert(&mut self, key: Key, kept: Kept) {
        self.kept.insert(key, kept);
        self.index.store(key.0, key.1);
        *self.counts.entry(key.0).or_default() += 1;
    }

    fn remove(&mut self, key: Key) {
        if self.kept.remove(&key).is_some() {
            self.index.remove(key.0, key.1);
            if let Some(count) = self.counts.get_mut(&key.0) {
                *count -= 1;
            }
        }
    }

    /// Drops the least recently used of a worker that has more than its room.
    fn make_room(&mut self, slot: WorkerSlot, room: u64) {
        while self.counts.get(&slot).is_some_and(|count| *count > room) {
            let first = self.ranked.range((slot, 0)..=(slot, u64::MAX)).next();
            let Some((&at, &hash)) = first else { break };
            self.ranked.remove(&at);
            self.remove((slot, hash));
        }
    }

    /// A request has ended: its records may be dropped.
    pub fn ended(&mut self, id: BookingId) {
        let Some((slot, room, hashes)) = self.leases.remove(&id) else { return };
        for hash in hashes.into_iter().rev() {
            let Some(kept) = self.kept.get_mut(&(slot, hash)) else { continue };
            match kept {
                Kept::Leased(leases) if *leases > 1 => *leases -= 1,
                Kept::Leased(_) => {
                    self.next_rank += 1;
                    *kept = Kept::Ranked(self.next_rank);
                    self.ranked.insert((slot, self.next_rank), hash);
                }
                Kept::Until(_) | Kept::Ranked(_) => {}
            }
        }
        self.make_room(slot, room);
    }

    /// Ends the leases of requests that do not run any more, whatever ended them.
    pub fn end_others(&mut self, runs: impl Fn(BookingId) -> bool) {
        let ended: Vec<BookingId> = self.leases.keys().copied().filter(|id| !runs(*id)).collect();
        for id in ended {
            self.ended(id);
        }
    }

    /// Ends what has lasted its time.
    ///
    /// # Cost
    ///
    /// What has ended since the last call.
    pub fn expire(&mut self, now_ms: u64) {
        while let Some(first) = self.due.first_entry().filter(|it| *it.key() <= now_ms) {
            for key in first.remove() {
                if matches!(self.kept.get(&key), Some(Kept::Until(until)) if *until <= now_ms) {
                    self.remove(key);
                }
            }
        }
    }

    /// A worker is gone, with all that it held.
    pub fn drop_worker(&mut self, slot: WorkerSlot) {
        if self.counts.remove(&slot).is_none() {
            return;
        }
        self.index.clear(slot);
        self.kept.retain(|key, _| key.0 != slot);
        self.ranked.retain(|key, _| key.0 != slot);
        self.leases.retain(|_, (of, _, _)| *of != slot);
    }

    /// Counts the leading blocks of a prompt that each worker should hold at a
    /// time; see [`overlaps`].
    pub fn overlaps(&mut self, prompt: &[SequenceHash], now_ms: u64, out: &mut Vec<Overlap>) {
        self.expire(now_ms);
        overlaps(&mut self.index, prompt, out);
    }

    /// A bounded piece of background work. Returns whether any is left.
    pub fn step(&mut self, tables: usize) -> bool {
        self.index.sweep(tables)
    }

    /// Number of records.
    #[must_use]
    pub fn records(&self) -> usize {
        self.kept.len()
    }

    /// Decisions that were cut short because there were too many records, ever.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn hash(n: u64) -> SequenceHash {
        SequenceHash(xxhash_rust::xxh3::xxh3_64(&n.to_le_bytes()))
    }

    fn decision(
        id: u64,
        slot: u16,
        blocks: core::ops::Range<u64>,
        retention: Retention,
        at_ms: u64,
    ) -> Decision {
        let hashes = blocks.map(hash).collect();
        Decision { id: BookingId(id), slot: WorkerSlot(slot), at_ms, retention, hashes }
    }

    fn answer(it: &mut Approximate, blocks: core::ops::Range<u64>, now_ms: u64) -> Vec<(u16, u32)> {
        let prompt: Vec<SequenceHash> = blocks.map(hash).collect();
        let mut out = Vec::new();
        it.overlaps(&prompt, now_ms, &mut out);
        out.iter().map(|overlap| (overlap.slot.0, overlap.blocks)).collect()
    }

    #[test]
    fn records_last_their_time_and_are_refreshed() {
        let mut it = Approximate::default();
        it.record(decision(1, 1, 0..4, Retention::Time(1_000), 50));
        it.record(decision(2, 2, 0..2, Retention::Time(1_000), 250));
        assert_eq!(answer(&mut it, 0..9, 1_099), [(1, 4), (2, 2)]);
        assert_eq!(answer(&mut it, 0..9, 1_100), [(2, 2)], "1 050 is rounded up to 1 100");
        it.record(decision(3, 2, 0..1, Retention::Time(1_000), 1_100));
        assert_eq!(answer(&mut it, 0..9, 1_300), [(2, 1)], "the first block was taken again");
        assert_eq!(answer(&mut it, 0..9, 2_100), []);
        assert_eq!(it.records(), 0);
    }

    #[test]
    fn no_time_is_no_record() {
        let mut it = Approximate::default();
        it.record(decision(1, 1, 0..4, Retention::Time(0), 100));
        assert_eq!(answer(&mut it, 0..4, 100), []);
    }

    #[test]
    fn room_is_kept_by_dropping_the_least_recently_used() {
        let mut it = Approximate::default();
        let room = Retention::Room(6);
        it.record(decision(1, 1, 0..4, room, 0));
        it.record(decision(2, 1, 10..14, room, 0));
        assert_eq!(it.records(), 8, "running requests are never dropped");
        it.ended(BookingId(1));
        assert_eq!(answer(&mut it, 0..4, 0), [(1, 2)], "the last blocks went first");
        assert_eq!(answer(&mut it, 10..14, 0), [(1, 4)]);
        it.ended(BookingId(2));
        it.record(decision(3, 1, 0..1, room, 0));
        it.ended(BookingId(3));
        it.record(decision(4, 1, 20..22, room, 0));
        assert_eq!(answer(&mut it, 0..4, 0), [(1, 1)], "the first block was used last");
        assert_eq!(answer(&mut it, 10..14, 0), [(1, 3)]);
        it.end_others(|_| false);
        assert_eq!(it.records(), 6);
    }

    #[test]
    fn a_worker_that_is_gone_takes_its_records_along() {
        let mut it = Approximate::default();
        it.record(decision(1, 1, 0..4, Retention::Time(1_000), 0));
        it.record(decision(2, 1, 4..8, Retention::Room(9), 0));
        it.record(decision(3, 2, 0..3, Retention::Time(1_000), 0));
        it.drop_worker(WorkerSlot(1));
        assert_eq!(answer(&mut it, 0..4, 0), [(2, 3)]);
        it.ended(BookingId(2));
        it.expire(5_000);
        assert_eq!(it.records(), 0);
    }

    #[cfg(not(target_arch = "wasm32"))]
    proptest::proptest! {
        /// Goal: by time, what is answered is what a plain list of records says.
        #[test]
        fn answers_equal_a_plain_list(steps in proptest::collection::vec((0_u16..3, 0_u64..6, 0_u64..300), 0..60)) {
            let mut it = Approximate::default();
            let mut plain: Vec<(u16, u64, u64)> = Vec::new();
            let mut now = 0;
            for (slot, len, wait) in steps {
                now += wait;
                it.record(decision(now, slot, 0..len, Retention::Time(500), now));
                let end = (now + 500).div_ceil(APPROXIMATE_TICK_MS) * APPROXIMATE_TICK_MS;
                plain.extend((0..len).map(|block| (slot, block, end)));
                let holds = |slot: u16, block: u64| {
                    plain.iter().any(|it| it.0 == slot && it.1 == block && it.2 > now)
                };
                let expected: Vec<(u16, u32)> = (0..3)
                    .map(|slot| (slot, (0_u32..6).take_while(|block| holds(slot, u64::from(*block))).map(|at| at + 1).last().unwrap_or(0)))
                    .filter(|(_, blocks)| *blocks > 0)
                    .collect();
                proptest::prop_assert_eq!(answer(&mut it, 0..6, now), expected);
            }
        }
    }
}
