//! Index: which worker holds which block.
//!
//! Last stage of the feed path; `overlap` reads it on the request path. Every
//! filter VM keeps a copy of its own, since a look-up in the gateway's shared
//! data costs a hundred times one in the VM's memory.
//!
//! # How it is laid out
//!
//! A block takes one 8-byte entry in one of 1024 open-addressing tables:
//! a fingerprint of its sequence hash and the number of the *set* of workers
//! that hold it. Sets are interned, so a prefix that a hundred workers share
//! costs no more per block than one that a single worker holds. A table grows
//! alone and by a quarter at a time: the longest pause is the copy of one
//! table, about a thousandth of the index.
//!
//! # Invariants
//!
//! 1. The same deltas in the same order give the same answers on every target.
//! 2. Never more than `blocks_max` blocks. Beyond that, a block that was
//!    neither stored nor looked up for long makes room (a clock per table); it
//!    is counted, and costs hits, never correctness.
//! 3. A fingerprint has 50 bits (10 choose the table, 40 are stored): at 10 M
//!    blocks a look-up of an absent block answers wrongly with probability
//!    10⁻⁸, which costs one prompt some recomputation.
//! 4. A cleared worker's blocks are never credited again, from the moment of
//!    the clear on, although they are swept out of the tables in small steps.

mod sets;
mod shard;

use crate::delta::{Delta, Group, Operation};
use crate::ids::{SequenceHash, WorkerSlot};
use sets::Sets;
pub(crate) use sets::{Member, SetId};
use shard::Shard;

/// Number of tables.
const SHARDS: usize = 1024;
const SHARD_BITS: u32 = SHARDS.trailing_zeros();

/// Blocks that are asked for at once: about what a processor waits for at a time.
const BATCH: usize = 16;

/// The prefix index.
#[derive(Debug)]
pub struct Index {
    shards: Vec<Shard>,
    sets: Sets,
    /// The living member of each slot, by slot number.
    slots: Vec<Option<Member>>,
    /// Slot and block count by member.
    members: Vec<MemberState>,
    /// Members that are in no set any more, ready for use.
    free_members: Vec<Member>,
    /// Members whose blocks are being swept out.
    dying: Vec<Member>,
    /// Next table to sweep, while anything is dying.
    sweep_at: usize,
    /// How many of `dying` died before the present round of the sweep began.
    sweep_round: usize,
    /// Next table to reserve room in.
    reserve_at: usize,
    blocks: usize,
    blocks_max: usize,
    counters: Counters,
}

#[derive(Clone, Copy, Debug, Default)]
struct MemberState {
    /// The slot, while the member lives.
    slot: Option<WorkerSlot>,
    /// Blocks the worker holds.
    blocks: u64,
}

/// What happened so far; each grows only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Operations applied.
    pub operations: u64,
    /// Blocks dropped to keep below `blocks_max`.
    pub evicted: u64,
    /// Stored operations that found no room at all: every set or member number
    /// is in use, or the table that the block belongs in has nothing to evict.
    pub refused: u64,
}

impl Index {
    /// An empty index.
    ///
    /// - `blocks_max`: most blocks it may hold, over all workers; a block that
    ///   several workers hold counts once.
    #[must_use]
    pub fn new(blocks_max: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            sets: Sets::default(),
            slots: Vec::new(),
            members: Vec::new(),
            free_members: Vec::new(),
            dying: Vec::new(),
            sweep_at: 0,
            sweep_round: 0,
            reserve_at: 0,
            blocks: 0,
            blocks_max,
            counters: Counters::default(),
        }
    }

    /// Makes room for blocks that are to come, in tables that are still empty: all
    /// tables fill at the same pace, and would all grow in the same few moments.
    /// Returns whether all tables have been seen to; else call it again.
    ///
    /// - `blocks`: as many as come in all, or more.
    /// - `places`: most places that are made in this call; one table's at least.
    pub fn reserve(&mut self, blocks: usize, places: usize) -> bool {
        let each = blocks.min(self.blocks_max) / SHARDS;
        // Some tables get more than others: at 10 M blocks a sixteenth is six
        // standard deviations.
        let each = each + each / 16;
        let mut made = 0;
        while let Some(shard) = self.shards.get_mut(self.reserve_at) {
            if made > 0 && made >= places {
                return false;
            }
            made += shard.reserve(each);
            self.reserve_at += 1;
        }
        true
    }

    /// Applies a delta or snapshot part.
    ///
    /// # Cost
    ///
    /// About 50 ns an operation, plus the copy of one table now and then.
    pub fn apply(&mut self, delta: &Delta<'_>) {
        for group in delta.groups() {
            self.apply_group(&group);
        }
    }

    fn apply_group(&mut self, group: &Group<'_>) {
        match group.operation {
            Operation::Stored => {
                for hashes in group.batches(BATCH) {
                    self.warm(hashes.clone());
                    hashes.for_each(|hash| self.store(group.slot, hash));
                }
            }
            Operation::Removed => {
                for hashes in group.batches(BATCH) {
                    self.warm(hashes.clone());
                    hashes.for_each(|hash| self.remove(group.slot, hash));
                }
            }
            Operation::Cleared => self.clear(group.slot),
        }
    }

    /// Reads where blocks will be looked for. Blocks lie all over the index, so
    /// each look-up waits for the memory; asked one after another the waits add up,
    /// asked for at once they overlap.
    pub(crate) fn warm(&self, hashes: impl Iterator<Item = SequenceHash>) {
        let first = |hash| {
            let place = place(hash);
            self.shards.get(place.shard).map_or(0, |shard| shard.first(place.fingerprint))
        };
        let read = hashes.map(first).fold(0, |all, entry| all ^ entry);
        core::hint::black_box(read);
    }

    /// The worker in `slot` now holds the block.
    pub fn store(&mut self, slot: WorkerSlot, hash: SequenceHash) {
        self.counters.operations += 1;
        let Some(member) = self.member(slot) else {
            self.counters.refused += 1;
            return;
        };
        let place = place(hash);
        let Some(shard) = self.shards.get(place.shard) else { return };
        match shard.find(place.fingerprint) {
            Ok((at, old)) => self.join(member, place, at, old),
            Err(at) => self.insert(member, place, at),
        }
    }

    /// Adds a member to a block that is already there.
    fn join(&mut self, member: Member, place: Place, at: usize, old: SetId) {
        let Some(new) = self.sets.with(old, member) else {
            self.counters.refused += 1;
            return;
        };
        if new == old {
            return;
        }
        if let Some(shard) = self.shards.get_mut(place.shard) {
            shard.set(at, new);
        }
        self.sets.acquire(new);
        self.sets.release(old);
        self.count_member(member, 1);
    }

    fn insert(&mut self, member: Member, place: Place, mut at: usize) {
        if self.blocks >= self.blocks_max {
            if !self.evict(place.shard) {
                self.counters.refused += 1;
                return;
            }
            // What was evicted may have moved others.
            at = match self.shards.get(place.shard).map(|shard| shard.find(place.fingerprint)) {
                Some(Err(free)) => free,
                _ => return,
            };
        }
        let Some(set) = self.sets.singleton(member) else {
            self.counters.refused += 1;
            return;
        };
        if let Some(shard) = self.shards.get_mut(place.shard) {
            shard.insert(at, place.fingerprint, set);
            self.sets.acquire(set);
            self.blocks += 1;
            self.count_member(member, 1);
        }
    }

    /// The worker in `slot` no longer holds the block.
    pub fn remove(&mut self, slot: WorkerSlot, hash: SequenceHash) {
        self.counters.operations += 1;
        let Some(member) = self.member_of(slot) else { return };
        let place = place(hash);
        if let Some(Ok((at, old))) =
            self.shards.get(place.shard).map(|shard| shard.find(place.fingerprint))
        {
            self.leave(member, place.shard, at, old);
        }
    }

    /// Takes a member out of a block's set, and the block out of its table if
    /// nobody is left. Returns whether the block went.
    fn leave(&mut self, member: Member, shard: usize, at: usize, old: SetId) -> bool {
        let Some(rest) = self.sets.without(old, member) else {
            self.counters.refused += 1;
            return false;
        };
        if rest == Some(old) {
            return false;
        }
        let Some(shard) = self.shards.get_mut(shard) else { return false };
        match rest {
            Some(new) => {
                shard.set(at, new);
                self.sets.acquire(new);
            }
            None => {
                shard.remove(at);
                self.blocks -= 1;
            }
        }
        self.sets.release(old);
        self.count_member(member, -1);
        rest.is_none()
    }

    /// The worker in `slot` holds nothing any more.
    pub fn clear(&mut self, slot: WorkerSlot) {
        self.counters.operations += 1;
        let Some(entry) = self.slots.get_mut(usize::from(slot.0)) else { return };
        let Some(member) = entry.take() else { return };
        if let Some(state) = self.members.get_mut(usize::from(member.0)) {
            state.slot = None;
        }
        self.dying.push(member);
    }

    /// Sweeps cleared workers' blocks out of up to `tables` tables. Call it
    /// now and then, for instance on a tick.
    ///
    /// Returns whether anything is left to sweep.
    pub fn sweep(&mut self, tables: usize) -> bool {
        for _ in 0..tables {
            if self.dying.is_empty() {
                return false;
            }
            if self.sweep_at == 0 {
                self.sweep_round = self.dying.len();
            }
            self.sweep_table(self.sweep_at);
            self.sweep_at += 1;
            if self.sweep_at == SHARDS {
                self.sweep_at = 0;
                let swept: Vec<Member> = self.dying.drain(..self.sweep_round).collect();
                for member in &swept {
                    if let Some(state) = self.members.get_mut(usize::from(member.0)) {
                        *state = MemberState::default();
                    }
                }
                self.free_members.extend(swept);
            }
        }
        !self.dying.is_empty()
    }

    fn sweep_table(&mut self, table: usize) {
        let mut at = 0;
        while let Some(entry) = self.shards.get(table).and_then(|shard| shard.entry(at)) {
            let mut gone = false;
            if let Some(set) = entry {
                gone = self.sweep_entry(table, at, set);
            }
            // A removal shifts a later entry into this place: look again.
            if !gone {
                at += 1;
            }
        }
    }

    fn sweep_entry(&mut self, table: usize, at: usize, set: SetId) -> bool {
        let mut set = set;
        for index in 0..self.dying.len() {
            let Some(member) = self.dying.get(index).copied() else { break };
            if !self.sets.contains(set, member) {
                continue;
            }
            if self.leave(member, table, at, set) {
                return true;
            }
            match self.shards.get(table).and_then(|shard| shard.entry(at)).flatten() {
                Some(now) => set = now,
                None => return true,
            }
        }
        false
    }

    /// The living workers that hold a block, as their set's number; `None` if
    /// nobody does. Marks the block as used.
    pub(crate) fn holders(&mut self, hash: SequenceHash) -> Option<SetId> {
        let place = place(hash);
        let shard = self.shards.get_mut(place.shard)?;
        let (at, set) = shard.find(place.fingerprint).ok()?;
        shard.touch(at);
        Some(set)
    }

    /// The members of a set, ascending.
    pub(crate) fn set_members(&self, set: SetId) -> &[Member] {
        self.sets.members(set)
    }

    /// The slot of a member, while it lives.
    pub(crate) fn slot_of(&self, member: Member) -> Option<WorkerSlot> {
        self.members.get(usize::from(member.0))?.slot
    }

    /// The living member of a slot; `None` if nothing was ever stored for it.
    pub(crate) fn member_of(&self, slot: WorkerSlot) -> Option<Member> {
        self.slots.get(usize::from(slot.0)).copied().flatten()
    }

    /// Blocks in the index; one that several workers hold counts once.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Blocks that the worker in `slot` holds.
    #[must_use]
    pub fn blocks_of(&self, slot: WorkerSlot) -> u64 {
        self.member_of(slot)
            .and_then(|member| self.members.get(usize::from(member.0)))
            .map_or(0, |state| state.blocks)
    }

    /// Bytes of memory that the index holds.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.shards.iter().map(Shard::bytes).sum::<usize>()
            + self.shards.capacity() * size_of::<Shard>()
            + self.sets.bytes()
            + self.slots.capacity() * size_of::<Option<Member>>()
            + self.members.capacity() * size_of::<MemberState>()
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    fn member(&mut self, slot: WorkerSlot) -> Option<Member> {
        let at = usize::from(slot.0);
        if let Some(Some(member)) = self.slots.get(at) {
            return Some(*member);
        }
        let member = match self.free_members.pop() {
            Some(member) => member,
            None => {
                let number = u16::try_from(self.members.len()).ok()?;
                self.members.push(MemberState::default());
                Member(number)
            }
        };
        if let Some(state) = self.members.get_mut(usize::from(member.0)) {
            *state = MemberState { slot: Some(slot), blocks: 0 };
        }
        if self.slots.len() <= at {
            self.slots.resize(at + 1, None);
        }
        if let Some(entry) = self.slots.get_mut(at) {
            *entry = Some(member);
        }
        Some(member)
    }

    fn count_member(&mut self, member: Member, change: i64) {
        if let Some(state) = self.members.get_mut(usize::from(member.0)) {
            state.blocks = state.blocks.saturating_add_signed(change);
        }
    }

    /// Makes room for one block in a table. Returns whether it did.
    fn evict(&mut self, shard: usize) -> bool {
        let Some(set) = self.shards.get_mut(shard).and_then(Shard::evict) else {
            return false;
        };
        for index in 0..self.sets.members(set).len() {
            if let Some(member) = self.sets.members(set).get(index).copied() {
                self.count_member(member, -1);
            }
        }
        self.sets.release(set);
        self.blocks -= 1;
        self.counters.evicted += 1;
        true
    }
}

/// Where a block belongs.
#[derive(Clone, Copy, Debug)]
struct Place {
    shard: usize,
    fingerprint: u64,
}

fn place(hash: SequenceHash) -> Place {
    // The top bits choose the table: below SHARDS on any width of usize.
    let shard = (hash.0 >> (64 - SHARD_BITS)) as usize;
    Place { shard, fingerprint: (hash.0 << SHARD_BITS) >> (64 - shard::FINGERPRINT_BITS) }
}

#[cfg(test)]
mod tests;
