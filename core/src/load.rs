//! Load: bookings, what this gateway has placed and not yet seen finish.
//!
//! `score` reads it. Each filter VM keeps a copy that follows the ring log, in
//! which every VM writes what it books and frees. Loads are those of Dynamo's
//! router (1.6.1, active sequences), rounding included: `make test-parity`
//! compares.
//!
//! # Terms
//!
//! - *booking*: the record of a placed, unfinished request; freed exactly once.
//! - *prefill tokens*: prompt tokens that the worker must compute, until the
//!   first chunk of its answer.
//! - *active blocks*: unique complete prompt blocks of a worker's bookings, and
//!   the blocks of their answers. A prefix that several of them share counts once.
//! - *weight*: what a block counts. 1, unless the length of an answer is
//!   expected: then, with each new block of it, the blocks of the answer and those
//!   of its prompt that no other booking holds count `1 − answered / expected`, as
//!   the request is the nearer to its end. A block keeps its weight until the next
//!   time, even if another booking joins it.
//!
//! # Invariants
//!
//! 1. With no bookings every worker's load is zero: what is added is what is
//!    taken away.
//! 2. Every booking ends: freed by whoever placed it, or expired, because a VM
//!    that crashes cuts its streams without any callback.
//! 3. Freeing, or marking, a booking that is not there changes nothing: entries
//!    may arrive after an expiry, and after a late start.

mod active;
mod answer;
mod blocks;

use foldhash::fast::FixedState;
use hashbrown::HashMap;

use crate::ids::{SequenceHash, WorkerSlot};
use crate::limits::{BOOKED_BLOCKS_MAX, BOOKINGS_MAX};

use active::Active;
pub use active::ActiveBlocks;
pub use answer::Answer;
use blocks::{Blocks, Chain};

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
    /// Prompt tokens that the worker must compute; 0 if they are not tracked.
    pub prefill_tokens: u32,
    /// When it was placed or last refreshed, in milliseconds of the host's
    /// monotonic clock.
    pub at_ms: u64,
    /// Sequence hashes of the prompt's complete blocks, in prompt order; none if
    /// they are not tracked.
    pub blocks: Vec<SequenceHash>,
    /// Blocks that the worker holds for this request alone, behind those: of a
    /// prompt that another worker computes for it, or if nothing is to be shared.
    pub unshared_blocks: u32,
    /// How many tokens the answer is expected to have, at least 1; 0 if that is
    /// not known.
    pub expected_output_tokens: u32,
}

impl Booking {
    /// A booking without any load but the request itself.
    ///
    /// - `at_ms`: of the host's monotonic clock.
    #[must_use]
    pub fn new(id: BookingId, slot: WorkerSlot, at_ms: u64) -> Self {
        Self {
            id,
            slot,
            prefill_tokens: 0,
            at_ms,
            blocks: Vec::new(),
            unshared_blocks: 0,
            expected_output_tokens: 0,
        }
    }

    /// What blocks count when so much is answered; `None` if no length is expected.
    fn weight(&self, answered_tokens: u32) -> Option<f64> {
        if self.expected_output_tokens == 0 {
            return None;
        }
        let share = f64::from(answered_tokens) / f64::from(self.expected_output_tokens);
        Some((1.0 - share).max(0.0))
    }
}

#[derive(Debug, Default)]
struct SlotLoad {
    prefill_tokens: u64,
    requests: u64,
    blocks: Blocks,
}

#[derive(Debug)]
struct Placed {
    booking: Booking,
    prefill_done: bool,
    chain: Chain,
}

/// A worker's load, as `score` wants it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerLoad {
    /// Booked prompt tokens whose prefill is not done.
    pub prefill_tokens: u64,
    /// Blocks of the bookings, each by its weight, rounded.
    pub active_blocks: u64,
    /// Bookings.
    pub requests: u64,
}

/// All bookings.
#[derive(Debug, Default)]
pub struct Loads {
    placed: HashMap<BookingId, Placed, FixedState>,
    slots: HashMap<WorkerSlot, SlotLoad, FixedState>,
    /// What [`Loads::of`] answers, by slot number: it is asked for every worker of
    /// every request.
    sums: Vec<WorkerLoad>,
    active: Active,
    /// Hashes of all bookings.
    hashes: usize,
    refused: u64,
    crowded: u64,
    expired: u64,
}

impl Loads {
    /// No bookings.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a booking. One whose name is taken, or beyond [`BOOKINGS_MAX`],
    /// changes nothing and is counted as refused. The blocks of one beyond
    /// [`BOOKED_BLOCKS_MAX`] are not shared with others.
    pub fn add(&mut self, mut booking: Booking) {
        if self.placed.len() >= BOOKINGS_MAX || self.placed.contains_key(&booking.id) {
            self.refused += 1;
            return;
        }
        if self.hashes + booking.blocks.len() > BOOKED_BLOCKS_MAX {
            self.crowded += 1;
            let hidden = u32::try_from(core::mem::take(&mut booking.blocks).len());
            booking.unshared_blocks =
                booking.unshared_blocks.saturating_add(hidden.unwrap_or(u32::MAX));
        }
        self.hashes += booking.blocks.len();
        let load = self.slots.entry(booking.slot).or_default();
        load.prefill_tokens += u64::from(booking.prefill_tokens);
        load.requests += 1;
        let (slot, active) = (booking.slot, &mut self.active.of_worker(booking.slot));
        let chain = load.blocks.acquire(&booking.blocks, booking.unshared_blocks, active);
        self.sum(slot);
        self.placed.insert(booking.id, Placed { booking, prefill_done: false, chain });
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
        let slot = placed.booking.slot;
        self.sum(slot);
    }

    /// The answer fills more blocks. Nothing happens if it does not.
    ///
    /// - `blocks`: how many it fills beyond those of the prompt, a partial one
    ///   counted, in all.
    /// - `tokens`: how many it has.
    pub fn output_blocks(&mut self, id: BookingId, blocks: u32, tokens: u32) {
        let Some(Placed { booking, chain, .. }) = self.placed.get_mut(&id) else { return };
        if let Some(load) = self.slots.get_mut(&booking.slot) {
            load.blocks.extend(chain, blocks, booking.weight(tokens));
            let slot = booking.slot;
            self.sum(slot);
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
        let Some(Placed { booking, chain, .. }) = self.placed.remove(&id) else { return };
        self.hashes = self.hashes.saturating_sub(booking.blocks.len());
        let Some(load) = self.slots.get_mut(&booking.slot) else { return };
        load.requests = load.requests.saturating_sub(1);
        let (slot, active) = (booking.slot, &mut self.active.of_worker(booking.slot));
        load.blocks.release(&chain, &booking.blocks, active);
        if load.requests == 0 {
            self.slots.remove(&slot);
        }
        self.sum(slot);
    }

    /// Brings up to date what [`Self::of`] answers for a worker.
    fn sum(&mut self, slot: WorkerSlot) {
        let sum = self.slots.get(&slot).map_or_else(WorkerLoad::default, |load| WorkerLoad {
            prefill_tokens: load.prefill_tokens,
            active_blocks: rounded(load.blocks.weight()),
            requests: load.requests,
        });
        let at = usize::from(slot.0);
        if self.sums.len() <= at {
            self.sums.resize(at + 1, WorkerLoad::default());
        }
        if let Some(place) = self.sums.get_mut(at) {
            *place = sum;
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
        self.sums.get(usize::from(slot.0)).copied().unwrap_or_default()
    }

    /// Weight of a worker's blocks, of which `active_blocks` is the rounded value.
    #[must_use]
    pub fn weight(&self, slot: WorkerSlot) -> f64 {
        self.slots.get(&slot).map_or(0.0, |load| load.blocks.weight())
    }

    /// The prompt's leading blocks that are active on each worker.
    ///
    /// # Cost
    ///
    /// A comparison for each of those blocks, and one pass over the workers that have
    /// them wherever other prompts part from this one.
    #[must_use]
    pub fn active_blocks(&self, prompt: &[SequenceHash]) -> ActiveBlocks {
        self.active.leading(prompt)
    }

    /// How many of the prompt's blocks are not active on a worker yet.
    ///
    /// # Cost
    ///
    /// A comparison for each block that is.
    #[must_use]
    pub fn additional_blocks(&self, slot: WorkerSlot, prompt: &[SequenceHash]) -> u64 {
        let (active, _) = self.active.find(slot, prompt);
        (prompt.len() as u64).saturating_sub(u64::from(active))
    }

    /// At least how many bookings of a worker share all of the blocks that any of
    /// them shares with the prompt.
    ///
    /// - `active`: how many of its leading blocks are active on the worker.
    #[must_use]
    pub fn sharers(&self, slot: WorkerSlot, prompt: &[SequenceHash], active: u32) -> u64 {
        let last = self.active.edge(slot, prompt, active);
        let Some((load, last)) = self.slots.get(&slot).zip(last) else { return 0 };
        load.blocks.branches(last)
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

    /// The names of all bookings, in no order.
    pub fn ids(&self) -> impl Iterator<Item = BookingId> + '_ {
        self.placed.keys().copied()
    }

    /// A booking, and whether its prefill is done.
    #[must_use]
    pub fn get(&self, id: BookingId) -> Option<(&Booking, bool)> {
        self.placed.get(&id).map(|placed| (&placed.booking, placed.prefill_done))
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

    /// Bookings that share no block because [`BOOKED_BLOCKS_MAX`] was reached,
    /// ever.
    #[must_use]
    pub fn crowded(&self) -> u64 {
        self.crowded
    }

    /// Bookings that expired, ever.
    #[must_use]
    pub fn expired(&self) -> u64 {
        self.expired
    }
}

/// The nearest whole number; half a block counts as one.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rounded sum of blocks; one just below zero is zero"
)]
fn rounded(weight: f64) -> u64 {
    weight.round() as u64
}

#[cfg(test)]
mod tests;
