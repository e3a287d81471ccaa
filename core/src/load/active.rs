//! Active: which workers have which blocks booked, asked for all workers at once.
//!
//! Each worker's tree knows its own blocks; asking a thousand trees for a prompt
//! costs a thousand times as much as asking one. So the same blocks are kept in an
//! index a second time, by block.
//!
//! # Invariants
//!
//! 1. A worker is listed with a block if and only if its tree lists it, as far as
//!    the index tells blocks apart (see [`crate::index`]).
//! 2. Booked blocks of a prompt are its leading ones: whoever has one has all that
//!    come before it. So where two blocks have the same workers, all between do.

use crate::ids::{SequenceHash, WorkerSlot};
use crate::index::Index;
use crate::overlap::{Tally, find_next};

/// Leading blocks of a prompt that each worker has booked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ActiveBlocks {
    /// In ascending order of slots; workers without any are left out.
    counts: Vec<(WorkerSlot, u32)>,
}

impl ActiveBlocks {
    /// How many a worker has.
    ///
    /// - `at`: where the one that was asked for last stands; 0 before the first.
    ///   Workers that are asked for in their order are found at once.
    #[must_use]
    pub fn of(&self, slot: WorkerSlot, at: &mut usize) -> u32 {
        let found = find_next(&self.counts, slot, at, |(slot, _)| *slot);
        found.map_or(0, |(_, blocks)| *blocks)
    }
}

/// The blocks of all bookings.
#[derive(Debug)]
pub(super) struct Active(Index);

impl Default for Active {
    fn default() -> Self {
        // Bookings bound themselves.
        Self(Index::new(usize::MAX))
    }
}

impl Active {
    /// The blocks of one worker.
    pub(super) fn of_worker(&mut self, slot: WorkerSlot) -> OfWorker<'_> {
        OfWorker { slot, index: &mut self.0 }
    }

    /// The leading blocks of a prompt that each worker has.
    ///
    /// # Cost
    ///
    /// Logarithmic in the prompt's length for each of the different sets of workers
    /// on its way, and one pass over those that are left.
    pub(super) fn leading(&self, prompt: &[SequenceHash]) -> ActiveBlocks {
        let holders = |at: usize| prompt.get(at).and_then(|hash| self.0.peek(key(*hash)));
        let Some(mut set) = holders(0) else { return ActiveBlocks::default() };
        let mut tally = Tally::new(self.0.set_members(set));
        let mut at = 0;
        while !tally.alive.is_empty() {
            at = end_of_run(at, prompt.len(), |at| holders(at) == Some(set));
            let blocks = u32::try_from(at).unwrap_or(u32::MAX);
            let next = holders(at);
            tally.keep(next.map_or(&[], |set| self.0.set_members(set)), blocks);
            match next {
                Some(next) => set = next,
                None => break,
            }
        }
        let of_slot = |(member, blocks)| Some((self.0.slot_of(member)?, blocks));
        let mut counts: Vec<_> = tally.counts().filter_map(of_slot).collect();
        if !counts.is_sorted_by_key(|(slot, _)| *slot) {
            counts.sort_unstable_by_key(|(slot, _)| *slot);
        }
        ActiveBlocks { counts }
    }

    /// Whether no block is listed.
    #[cfg(all(test, not(target_arch = "wasm32")))]
    pub(super) fn is_empty(&self) -> bool {
        self.0.blocks() == 0
    }
}

/// What a block is called in the index: bookings of other routers bring hashes of
/// their own, whose upper bits need not tell them apart. One to one.
fn key(block: SequenceHash) -> SequenceHash {
    SequenceHash(block.0.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// The blocks of one worker, which tells what it lists.
pub(super) struct OfWorker<'a> {
    slot: WorkerSlot,
    index: &'a mut Index,
}

impl OfWorker<'_> {
    /// Some blocks will be added or removed.
    pub(super) fn warm(&self, blocks: &[SequenceHash]) {
        self.index.warm(blocks.iter().map(|block| key(*block)));
    }

    pub(super) fn add(&mut self, block: SequenceHash) {
        self.index.store(self.slot, key(block));
    }

    pub(super) fn remove(&mut self, block: SequenceHash) {
        self.index.remove(self.slot, key(block));
    }
}

/// The first place behind `from` that is not of its run, at most `len`: found by
/// steps that double, then by halves.
///
/// - `is_of_run`: holds from `from` to the end of the run, and nowhere behind it.
fn end_of_run(from: usize, len: usize, is_of_run: impl Fn(usize) -> bool) -> usize {
    let (mut inside, mut step) = (from, 1);
    let mut outside = loop {
        let next = inside + step;
        if next >= len {
            break len;
        }
        if !is_of_run(next) {
            break next;
        }
        inside = next;
        step *= 2;
    };
    while outside - inside > 1 {
        let middle = inside.midpoint(outside);
        if is_of_run(middle) {
            inside = middle;
        } else {
            outside = middle;
        }
    }
    outside
}
