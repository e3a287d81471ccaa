//! Load: bookings, what this gateway has placed and not yet seen finish.
//!
//! `score` reads it. Each filter VM keeps a copy that follows the ring log, in
//! which every VM writes what it books and frees.
//!
//! # Terms
//!
//! - *booking*: the record of a placed, unfinished request; freed exactly once.
//! - *prefill tokens*: prompt tokens that the worker must compute, until the
//!   first chunk of its answer.
//! - *active blocks*: unique complete prompt blocks of a worker's bookings. A
//!   prefix that several of them share counts once (Dynamo: active sequences).
//!
//! # Invariants
//!
//! 1. With no bookings every worker's load is zero: what is added is what is
//!    taken away.
//! 2. Every booking ends: freed by whoever placed it, or expired, because a VM
//!    that crashes cuts its streams without any callback.
//! 3. Freeing, or marking, a booking that is not there changes nothing: entries
//!    may arrive after an expiry, and after a late start.

use foldhash::fast::FixedState;
use hashbrown::HashMap;

use crate::ids::{SequenceHash, WorkerSlot};
use crate::limits::BOOKINGS_MAX;

/// Name of a booking, unique within a gateway process: the VM in the upper
/// half, its counter in the lower.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BookingId(pub u64);

/// A placed, unfinished request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Booking {
    /// Its name.
    pub id: BookingId,
    /// Where it was placed.
    pub slot: WorkerSlot,
    /// Prompt tokens that the worker must compute.
    pub prefill_tokens: u32,
    /// When it was placed or last refreshed, in milliseconds of the host's
    /// monotonic clock.
    pub at_ms: u64,
    /// Sequence hashes of the prompt's complete blocks, in prompt order.
    pub blocks: Vec<SequenceHash>,
    /// Blocks that the worker holds for this request alone: those of a prompt
    /// that another worker computes for it.
    pub unshared_blocks: u32,
}

#[derive(Debug, Default)]
struct SlotLoad {
    prefill_tokens: u64,
    requests: u64,
    unshared_blocks: u64,
    /// How many bookings hold each block.
    blocks: HashMap<SequenceHash, u32, FixedState>,
}

#[derive(Debug)]
struct Placed {
    booking: Booking,
    prefill_done: bool,
}

/// A worker's load, as `score` wants it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerLoad {
    /// Booked prompt tokens whose prefill is not done.
    pub prefill_tokens: u64,
    /// Unique prompt blocks of the bookings, and their unshared ones.
    pub active_blocks: u64,
    /// Bookings.
    pub requests: u64,
}

/// All bookings.
#[derive(Debug, Default)]
pub struct Loads {
    placed: HashMap<BookingId, Placed, FixedState>,
    slots: HashMap<WorkerSlot, SlotLoad, FixedState>,
    refused: u64,
    expired: u64,
}

impl Loads {
    /// No bookings.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a booking. One whose name is taken, or beyond [`BOOKINGS_MAX`],
    /// changes nothing and is counted as refused.
    pub fn add(&mut self, booking: Booking) {
        if self.placed.len() >= BOOKINGS_MAX || self.placed.contains_key(&booking.id) {
            self.refused += 1;
            return;
        }
        let load = self.slots.entry(booking.slot).or_default();
        load.prefill_tokens += u64::from(booking.prefill_tokens);
        load.requests += 1;
        load.unshared_blocks += u64::from(booking.unshared_blocks);
        for hash in &booking.blocks {
            *load.blocks.entry(*hash).or_default() += 1;
        }
        self.placed.insert(booking.id, Placed { booking, prefill_done: false });
    }

    /// The worker has begun to answer: its prefill is done.
    pub fn prefill_done(&mut self, id: BookingId) {
        let Some(placed) = self.placed.get_mut(&id) else { return };
        if core::mem::replace(&mut placed.prefill_done, true) {
            return;
        }
        if let Some(load) = self.slots.get_mut(&placed.booking.slot) {
            load.prefill_tokens =
                load.prefill_tokens.saturating_sub(u64::from(placed.booking.prefill_tokens));
        }
    }

    /// The request still runs: its expiry counts from `at_ms`.
    pub fn refresh(&mut self, id: BookingId, at_ms: u64) {
        if let Some(placed) = self.placed.get_mut(&id) {
            placed.booking.at_ms = placed.booking.at_ms.max(at_ms);
        }
    }

    /// The request has ended, however.
    pub fn free(&mut self, id: BookingId) {
        self.prefill_done(id);
        let Some(Placed { booking, .. }) = self.placed.remove(&id) else { return };
        let Some(load) = self.slots.get_mut(&booking.slot) else { return };
        load.requests = load.requests.saturating_sub(1);
        load.unshared_blocks =
            load.unshared_blocks.saturating_sub(u64::from(booking.unshared_blocks));
        for hash in &booking.blocks {
            if let Some(holders) = load.blocks.get_mut(hash) {
                *holders -= 1;
                if *holders == 0 {
                    load.blocks.remove(hash);
                }
            }
        }
        if load.requests == 0 {
            self.slots.remove(&booking.slot);
        }
    }

    /// Frees what was neither placed nor refreshed within `expiry_ms`.
    /// Returns how many.
    ///
    /// # Cost
    ///
    /// Looks at every booking; call it about once a second.
    pub fn expire(&mut self, now_ms: u64, expiry_ms: u64) -> usize {
        let stale: Vec<BookingId> = self
            .placed
            .values()
            .filter(|placed| now_ms.saturating_sub(placed.booking.at_ms) >= expiry_ms)
            .map(|placed| placed.booking.id)
            .collect();
        for id in &stale {
            self.free(*id);
        }
        self.expired += stale.len() as u64;
        stale.len()
    }

    /// Frees everything that was placed on a worker that is gone.
    pub fn drop_worker(&mut self, slot: WorkerSlot) {
        let gone: Vec<BookingId> = self
            .placed
            .values()
            .filter(|placed| placed.booking.slot == slot)
            .map(|placed| placed.booking.id)
            .collect();
        for id in gone {
            self.free(id);
        }
    }

    /// Load of a worker.
    #[must_use]
    pub fn of(&self, slot: WorkerSlot) -> WorkerLoad {
        self.slots.get(&slot).map_or_else(WorkerLoad::default, |load| WorkerLoad {
            prefill_tokens: load.prefill_tokens,
            active_blocks: load.blocks.len() as u64 + load.unshared_blocks,
            requests: load.requests,
        })
    }

    /// How many of the prompt's blocks are not active on a worker yet.
    ///
    /// # Cost
    ///
    /// Logarithmic in the prompt's length: a sequence hash stands for its whole
    /// prefix, so active blocks of a prompt are always its leading ones.
    #[must_use]
    pub fn additional_blocks(&self, slot: WorkerSlot, prompt: &[SequenceHash]) -> u64 {
        let Some(load) = self.slots.get(&slot) else { return prompt.len() as u64 };
        let active = prompt.partition_point(|hash| load.blocks.contains_key(hash));
        (prompt.len() - active) as u64
    }

    /// Whether a booking is there.
    #[must_use]
    pub fn contains(&self, id: BookingId) -> bool {
        self.placed.contains_key(&id)
    }

    /// Bookings on some workers whose prefill is not done.
    ///
    /// # Cost
    ///
    /// Looks at every booking.
    pub fn prefills(&self, is_one: impl Fn(WorkerSlot) -> bool) -> u64 {
        let waits = |it: &&Placed| !it.prefill_done && is_one(it.booking.slot);
        self.placed.values().filter(waits).count() as u64
    }

    /// Number of bookings.
    #[must_use]
    pub fn bookings(&self) -> usize {
        self.placed.len()
    }

    /// Bookings that were refused, ever.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Bookings that expired, ever.
    #[must_use]
    pub fn expired(&self) -> u64 {
        self.expired
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn booking(id: u64, slot: u16, prefill_tokens: u32, blocks: &[u64]) -> Booking {
        Booking {
            id: BookingId(id),
            slot: WorkerSlot(slot),
            prefill_tokens,
            at_ms: id,
            blocks: blocks.iter().map(|n| SequenceHash(*n)).collect(),
            unshared_blocks: 0,
        }
    }

    fn hashes(blocks: &[u64]) -> Vec<SequenceHash> {
        blocks.iter().map(|n| SequenceHash(*n)).collect()
    }

    #[test]
    fn a_shared_prefix_counts_once() {
        let mut loads = Loads::new();
        loads.add(booking(1, 0, 100, &[1, 2, 3]));
        loads.add(booking(2, 0, 20, &[1, 2, 9]));
        let load = WorkerLoad { prefill_tokens: 120, active_blocks: 4, requests: 2 };
        assert_eq!(loads.of(WorkerSlot(0)), load);
        assert_eq!(loads.additional_blocks(WorkerSlot(0), &hashes(&[1, 2, 7, 8])), 2);
        assert_eq!(loads.additional_blocks(WorkerSlot(1), &hashes(&[1, 2, 7, 8])), 4);
        loads.free(BookingId(1));
        let load = WorkerLoad { prefill_tokens: 20, active_blocks: 3, requests: 1 };
        assert_eq!(loads.of(WorkerSlot(0)), load);
    }

    #[test]
    fn unshared_blocks_count_for_each_booking() {
        let mut loads = Loads::new();
        let unshared = |id| Booking { unshared_blocks: 5, ..booking(id, 0, 0, &[]) };
        loads.add(unshared(1));
        loads.add(unshared(2));
        loads.add(booking(3, 0, 0, &[1]));
        assert_eq!(loads.of(WorkerSlot(0)).active_blocks, 11);
        assert_eq!(loads.additional_blocks(WorkerSlot(0), &hashes(&[1, 2])), 1);
        loads.prefill_done(BookingId(1));
        assert_eq!(loads.of(WorkerSlot(0)).active_blocks, 11);
        loads.free(BookingId(1));
        assert_eq!(loads.of(WorkerSlot(0)).active_blocks, 6);
    }

    #[test]
    fn each_step_happens_once() {
        let mut loads = Loads::new();
        loads.add(booking(1, 0, 100, &[1]));
        loads.add(booking(1, 0, 100, &[1]));
        assert_eq!(loads.refused(), 1);
        loads.add(booking(2, 0, 50, &[]));
        for _ in 0..2 {
            loads.prefill_done(BookingId(1));
            assert_eq!(loads.of(WorkerSlot(0)).prefill_tokens, 50);
        }
        for _ in 0..2 {
            loads.free(BookingId(1));
            assert_eq!(loads.of(WorkerSlot(0)).requests, 1);
        }
        loads.prefill_done(BookingId(9));
        loads.free(BookingId(9));
        loads.free(BookingId(2));
        assert_eq!(loads.of(WorkerSlot(0)), WorkerLoad::default());
    }

    #[test]
    fn what_is_not_refreshed_expires() {
        let mut loads = Loads::new();
        loads.add(booking(10, 0, 1, &[1]));
        loads.add(booking(20, 0, 1, &[2]));
        loads.refresh(BookingId(10), 500);
        loads.refresh(BookingId(99), 500);
        assert_eq!(loads.expire(319, 300), 0);
        assert_eq!(loads.expire(320, 300), 1);
        assert_eq!((loads.bookings(), loads.expired()), (1, 1));
        assert_eq!(loads.expire(800, 300), 1);
        assert_eq!(loads.of(WorkerSlot(0)), WorkerLoad::default());
    }

    #[test]
    fn a_clock_that_jumps_back_expires_nothing() {
        let mut loads = Loads::new();
        loads.add(booking(1_000_000, 0, 1, &[]));
        assert_eq!(loads.expire(5, 300), 0);
    }

    #[test]
    fn a_worker_that_is_gone_takes_its_bookings_along() {
        let mut loads = Loads::new();
        loads.add(booking(1, 0, 1, &[1]));
        loads.add(booking(2, 1, 1, &[1]));
        loads.drop_worker(WorkerSlot(0));
        assert_eq!(loads.bookings(), 1);
        assert_eq!(loads.of(WorkerSlot(1)).requests, 1);
    }

    #[cfg(not(target_arch = "wasm32"))]
    proptest::proptest! {
        /// Goal: whatever happens in whatever order, loads equal a recount of
        /// the bookings that are left, and end at zero.
        #[test]
        fn loads_equal_a_recount(steps in proptest::collection::vec((0_u8..5, 0_u64..12, 0_u16..3, 0_u64..6), 0..200)) {
            use std::collections::{BTreeMap, BTreeSet};
            let mut loads = Loads::new();
            let mut naive: BTreeMap<u64, (Booking, bool)> = BTreeMap::new();
            for (what, id, slot, len) in steps {
                match what {
                    0 | 1 => {
                        let blocks: Vec<u64> = (0..len).collect();
                        let unshared_blocks = u32::from(what);
                        let booking = Booking { unshared_blocks, ..booking(id, slot, 7, &blocks) };
                        loads.add(booking.clone());
                        naive.entry(id).or_insert((booking, false));
                    }
                    2 => {
                        loads.prefill_done(BookingId(id));
                        if let Some(entry) = naive.get_mut(&id) {
                            entry.1 = true;
                        }
                    }
                    3 => {
                        loads.free(BookingId(id));
                        naive.remove(&id);
                    }
                    _ => {
                        loads.drop_worker(WorkerSlot(slot));
                        naive.retain(|_, (booking, _)| booking.slot.0 != slot);
                    }
                }
                for slot in 0..3 {
                    let here = || naive.values().filter(|(b, _)| b.slot.0 == slot);
                    let blocks: BTreeSet<u64> =
                        here().flat_map(|(b, _)| b.blocks.iter().map(|h| h.0)).collect();
                    let expected = WorkerLoad {
                        prefill_tokens: here().filter(|(_, done)| !done).count() as u64 * 7,
                        active_blocks: blocks.len() as u64
                            + here().map(|(b, _)| u64::from(b.unshared_blocks)).sum::<u64>(),
                        requests: here().count() as u64,
                    };
                    proptest::prop_assert_eq!(loads.of(WorkerSlot(slot)), expected);
                }
            }
        }
    }
}
