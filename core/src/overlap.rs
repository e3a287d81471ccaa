//! Overlap: how much of a prompt each worker already has in its KV cache.
//!
//! Fifth stage of the request path: `hash` gives the prompt's sequence hashes,
//! this module counts how many of them each worker holds, `score` weighs the
//! count.
//!
//! # Terms
//!
//! - *overlap*: number of **leading** blocks a worker holds, in blocks.
//! - *extension*: what a lower tier adds to the overlap: the blocks that it
//!   holds from where the tiers above it have ended. The tiers come in the order
//!   host, disk, external storage; none is come back to.
//!
//! # Invariants
//!
//! 1. Overlap stops at the first missing block. A block held after a hole is
//!    worth nothing: the engine can only resume from an unbroken prefix.
//! 2. Every worker in the answer holds the first block, in some tier, and its
//!    overlap with all extensions is at most the prompt.
//! 3. A block counts once, for the first tier on the way that holds it (Dynamo:
//!    hits of lower tiers do not overlap with those above).

use crate::ids::{SequenceHash, WorkerSlot};
use crate::index::{Index, Member, SetId};
use crate::roster::{RosterWorker, TierSlots};

/// Overlap of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// The worker.
    pub slot: WorkerSlot,
    /// Leading blocks that its device holds.
    pub blocks: u32,
    /// Blocks by which its host's memory extends them.
    pub host_blocks: u32,
    /// Blocks by which its disks, and external storage behind them, extend both.
    pub disk_blocks: u32,
}

/// Counts the leading blocks of a prompt that each worker's device holds.
///
/// - `prompt`: one sequence hash per complete block, in prompt order.
/// - `out`: is cleared first; then holds each worker with at least one block,
///   in ascending order of slots.
///
/// # Cost
///
/// One look-up a block up to the longest overlap; where neighbouring blocks are
/// held by the same workers nothing else, else one pass over those that are left.
pub fn overlaps(index: &mut Index, prompt: &[SequenceHash], out: &mut Vec<Overlap>) {
    out.clear();
    let mut walk = Walk::new(prompt);
    let Some(mut set) = walk.next(index) else { return };
    let mut tally = Tally::new(index.set_members(set));
    while let Some(next) = walk.next(index) {
        if next != set {
            tally.keep(index.set_members(next), walk.before());
            if tally.alive.is_empty() {
                break;
            }
            set = next;
        }
    }
    tally.keep(&[], walk.found());
    let held = tally.counts().filter_map(|(member, blocks)| {
        let slot = index.slot_of(member)?;
        Some(Overlap { slot, blocks, host_blocks: 0, disk_blocks: 0 })
    });
    out.reserve(tally.first.len());
    out.extend(held);
    in_order(out);
}

/// Counts for each of some members how many leading blocks it has.
pub(crate) struct Tally {
    /// Those that have the first block, ascending.
    first: Vec<Member>,
    /// How many each of them has, once that is known.
    counts: Vec<u32>,
    /// Those of which it is not known yet.
    pub(crate) alive: Vec<Member>,
}

impl Tally {
    /// - `first`: those that have the first block, ascending.
    pub(crate) fn new(first: &[Member]) -> Self {
        Self { first: first.to_vec(), counts: vec![0; first.len()], alive: first.to_vec() }
    }

    /// All that are not among the holders have had `blocks`.
    pub(crate) fn keep(&mut self, holders: &[Member], blocks: u32) {
        let Self { first, counts, alive } = self;
        if alive.len() == first.len() {
            // Those that go on get theirs later.
            counts.fill(blocks);
            return keep_common(alive, holders, |_| ());
        }
        let mut at = 0;
        keep_common(alive, holders, |member| {
            // Both ascend, so that the next one is near, or found by halves.
            let rest = first.get(at..).unwrap_or_default();
            let near = rest.iter().take(LANES).position(|it| *it == member);
            at += near.or_else(|| rest.binary_search(&member).ok()).unwrap_or(0);
            if let Some(count) = counts.get_mut(at) {
                *count = blocks;
            }
        });
    }

    /// The members with their counts, ascending.
    pub(crate) fn counts(&self) -> impl Iterator<Item = (Member, u32)> {
        self.first.iter().copied().zip(self.counts.iter().copied())
    }
}

/// Finds a worker in a list in ascending order of slots.
///
/// - `at`: where the search goes on; 0 before the first. Searches in ascending
///   order take one pass over the list together, others halve it.
pub(crate) fn find_next<'l, T>(
    list: &'l [T],
    slot: WorkerSlot,
    at: &mut usize,
    slot_of: impl Fn(&T) -> WorkerSlot,
) -> Option<&'l T> {
    // In a roster like the list, the next one is the one.
    for next in [*at, *at + 1] {
        if let Some(found) = list.get(next).filter(|it| slot_of(it) == slot) {
            *at = next;
            return Some(found);
        }
    }
    let found = list.binary_search_by_key(&slot, slot_of);
    *at = found.unwrap_or_else(|at| at);
    found.ok().and_then(|at| list.get(at))
}

/// Members are numbered as workers come, mostly as slots are.
fn in_order(out: &mut [Overlap]) {
    if !out.is_sorted_by_key(|overlap| overlap.slot) {
        out.sort_unstable_by_key(|overlap| overlap.slot);
    }
}

/// A walk along a prompt, block after block, to the first that nobody holds.
struct Walk<'p> {
    prompt: &'p [SequenceHash],
    /// The next block.
    at: usize,
    /// Blocks before this one have been asked for ahead.
    warm: usize,
}

/// Blocks that are asked for ahead at first, so that a short overlap costs little,
/// and at most.
const AHEAD_MIN: usize = 4;
const AHEAD_MAX: usize = 32;

impl<'p> Walk<'p> {
    fn new(prompt: &'p [SequenceHash]) -> Self {
        Self { prompt, at: 0, warm: 1 }
    }

    /// Who holds the next block.
    fn next(&mut self, index: &mut Index) -> Option<SetId> {
        if self.at >= self.warm {
            let ahead = self.at.clamp(AHEAD_MIN, AHEAD_MAX);
            let end = self.prompt.len().min(self.at + ahead);
            let hashes = self.prompt.get(self.at..end).unwrap_or_default();
            index.warm(hashes.iter().copied());
            self.warm = end;
        }
        let set = index.holders(*self.prompt.get(self.at)?)?;
        self.at += 1;
        Some(set)
    }

    /// Number of blocks before the last one that was found.
    fn before(&self) -> u32 {
        self.found().saturating_sub(1)
    }

    /// Number of blocks that were found.
    fn found(&self) -> u32 {
        // Prompts are below 2³² blocks.
        u32::try_from(self.at).unwrap_or(u32::MAX)
    }
}

/// Members that are compared at once.
const LANES: usize = 8;

/// Holders are looked for among the members if there are so many times fewer of them.
const FEW: usize = 4;

/// As [`keep_common`], by looking for each holder.
fn keep_few(alive: &mut Vec<Member>, holders: &[Member], mut gone: impl FnMut(Member)) {
    let (mut from, mut to) = (0, 0);
    for holder in holders {
        let rest = alive.get(from..).unwrap_or_default();
        let found = rest.binary_search(holder);
        let skipped = found.unwrap_or_else(|at| at);
        rest.iter().take(skipped).for_each(|member| gone(*member));
        from += skipped;
        if found.is_ok() {
            if let Some(place) = alive.get_mut(to) {
                *place = *holder;
            }
            (from, to) = (from + 1, to + 1);
        }
    }
    alive.iter().skip(from).for_each(|member| gone(*member));
    alive.truncate(to);
}

/// Leaves the members that are among the holders, too; both ascend.
fn keep_common(alive: &mut Vec<Member>, holders: &[Member], mut gone: impl FnMut(Member)) {
    let (mut from, mut to, mut other) = (0, 0, 0);
    if holders.len() * FEW < alive.len() {
        return keep_few(alive, holders, gone);
    }
    while let Some(member) = alive.get(from).copied() {
        // Mostly few are gone, so that long runs are equal.
        let run = |all: &[Member], at: usize| all.get(at..at + LANES)?.first_chunk().copied();
        let lanes: Option<[Member; LANES]> = run(alive, from);
        if let Some(lanes) = lanes
            && run(holders, other) == Some(lanes)
        {
            if let Some(place) = alive.get_mut(to..to + LANES) {
                place.copy_from_slice(&lanes);
            }
            (from, to, other) = (from + LANES, to + LANES, other + LANES);
            continue;
        }
        match holders.get(other) {
            Some(holder) if *holder < member => other += 1,
            Some(holder) if *holder == member => {
                if let Some(place) = alive.get_mut(to) {
                    *place = member;
                }
                (from, to, other) = (from + 1, to + 1, other + 1);
            }
            _ => {
                gone(member);
                from += 1;
            }
        }
    }
    alive.truncate(to);
}

/// Which workers have lower tiers, and under which slots.
#[derive(Clone, Debug, Default)]
pub struct LowerTiers {
    /// In ascending order of the worker's slot.
    of_worker: Vec<(WorkerSlot, TierSlots)>,
    /// The worker of each tier's slot, in ascending order of the tier's.
    worker_of: Vec<(WorkerSlot, WorkerSlot)>,
}

impl LowerTiers {
    /// Those of a roster's workers.
    #[must_use]
    pub fn of(workers: &[RosterWorker]) -> Self {
        let with_tiers = workers.iter().filter(|entry| !entry.tiers.is_empty());
        let mut of_worker: Vec<_> = with_tiers.map(|entry| (entry.slot, entry.tiers)).collect();
        of_worker.sort_unstable_by_key(|(slot, _)| *slot);
        let mut worker_of: Vec<_> = of_worker
            .iter()
            .flat_map(|(worker, tiers)| tiers.in_order().into_iter().map(|tier| (tier, *worker)))
            .filter_map(|(tier, worker)| Some((tier?, worker)))
            .collect();
        worker_of.sort_unstable();
        Self { of_worker, worker_of }
    }

    /// The worker that a slot is of: that of a tier, or its own.
    fn worker_of(&self, slot: WorkerSlot) -> WorkerSlot {
        let found = self.worker_of.binary_search_by_key(&slot, |(tier, _)| *tier);
        found.ok().and_then(|at| self.worker_of.get(at)).map_or(slot, |(_, worker)| *worker)
    }

    fn of_worker(&self, slot: WorkerSlot) -> TierSlots {
        let found = self.of_worker.binary_search_by_key(&slot, |(worker, _)| *worker);
        let tiers = found.ok().and_then(|at| self.of_worker.get(at)).map(|(_, tiers)| *tiers);
        tiers.unwrap_or_default()
    }
}

/// Counts the leading blocks of a prompt that each worker holds in all its tiers.
///
/// - `tiers`: which workers have lower tiers.
/// - `prompt`: as of [`overlaps`].
/// - `out`: is cleared first; then holds each worker with at least one block in
///   any tier, in ascending order of slots.
///
/// # Cost
///
/// That of [`overlaps`] if no worker has lower tiers. Else one look-up a block
/// up to the longest overlap with its extensions; since a prompt is left tier by
/// tier and no tier is come back to, one walk serves all tiers of all workers.
pub fn tiered_overlaps(
    index: &mut Index,
    tiers: &LowerTiers,
    prompt: &[SequenceHash],
    out: &mut Vec<Overlap>,
) {
    if tiers.of_worker.is_empty() {
        return overlaps(index, prompt, out);
    }
    out.clear();
    let mut walk = Walk::new(prompt);
    let Some(mut set) = walk.next(index) else { return };
    let slots = index.set_members(set).iter().filter_map(|member| index.slot_of(*member));
    let mut workers: Vec<WorkerSlot> = slots.map(|slot| tiers.worker_of(slot)).collect();
    workers.sort_unstable();
    workers.dedup();
    let walkers = workers.into_iter().map(|worker| Walker::new(worker, tiers, index));
    let mut alive: Vec<Walker> = walkers.collect();
    let mut settle = |walker: &Walker| out.push(walker.overlap());
    alive.retain_mut(|walker| walker.go_on(index.set_members(set), 0));
    while let Some(next) = walk.next(index) {
        if next != set {
            let holders = index.set_members(next);
            let blocks = walk.before();
            alive.retain_mut(|walker| {
                let goes_on = walker.go_on(holders, blocks);
                if !goes_on {
                    settle(walker);
                }
                goes_on
            });
            if alive.is_empty() {
                break;
            }
            set = next;
        }
    }
    let blocks = walk.found();
    for mut walker in alive {
        walker.go_on(&[], blocks);
        settle(&walker);
    }
    in_order(out);
}

/// One worker on its way through a prompt.
#[derive(Clone, Copy, Debug)]
struct Walker {
    worker: WorkerSlot,
    /// As the index knows the worker's tiers, from the device on.
    members: [Option<Member>; 4],
    /// The tier that it is in; none behind the last.
    at: usize,
    /// The block at which it came there.
    since: u32,
    /// Blocks found in each tier that it has left.
    blocks: [u32; 4],
}

impl Walker {
    fn new(worker: WorkerSlot, tiers: &LowerTiers, index: &Index) -> Self {
        let [host, disk, external] = tiers.of_worker(worker).in_order();
        let members = [Some(worker), host, disk, external]
            .map(|slot| slot.and_then(|slot| index.member_of(slot)));
        Self { worker, members, at: 0, since: 0, blocks: [0; 4] }
    }

    /// Passes on to the next tier that holds a block, unless the one that it is
    /// in does. Returns whether there is one.
    ///
    /// - `holders`: whoever holds the block.
    /// - `block`: its number in the prompt.
    fn go_on(&mut self, holders: &[Member], block: u32) -> bool {
        while let Some(member) = self.members.get(self.at) {
            if member.is_some_and(|member| holders.binary_search(&member).is_ok()) {
                return true;
            }
            if let Some(blocks) = self.blocks.get_mut(self.at) {
                *blocks = block - self.since;
            }
            (self.at, self.since) = (self.at + 1, block);
        }
        false
    }

    /// What it has found, once it is behind the last tier.
    fn overlap(&self) -> Overlap {
        let [blocks, host_blocks, disk_blocks, external_blocks] = self.blocks;
        Overlap {
            slot: self.worker,
            blocks,
            host_blocks,
            disk_blocks: disk_blocks + external_blocks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    /// Spreads small numbers over the tables as real hashes are.
    fn hash(n: u64) -> SequenceHash {
        SequenceHash(xxhash_rust::xxh3::xxh3_64(&n.to_le_bytes()))
    }

    fn answer(index: &mut Index, prompt: &[u64]) -> Vec<(u16, u32)> {
        let prompt: Vec<SequenceHash> = prompt.iter().map(|n| hash(*n)).collect();
        let mut out = Vec::new();
        overlaps(index, &prompt, &mut out);
        out.iter().map(|overlap| (overlap.slot.0, overlap.blocks)).collect()
    }

    /// What the tiers of some workers hold, the worker's slot first; then what
    /// they answer.
    type Rows = Vec<(u16, [u32; 3])>;

    fn tiered(index: &mut Index, tiers: &LowerTiers, prompt: &[u64]) -> Rows {
        let prompt: Vec<SequenceHash> = prompt.iter().map(|n| hash(*n)).collect();
        let mut out = Vec::new();
        tiered_overlaps(index, tiers, &prompt, &mut out);
        let row = |it: &Overlap| (it.slot.0, [it.blocks, it.host_blocks, it.disk_blocks]);
        out.iter().map(row).collect()
    }

    /// Workers in slots 0, 4, 8, …, each with its lower tiers in the slots
    /// behind; those of a bit set in `with`, from the host's on.
    fn fleet(with: &[u16]) -> LowerTiers {
        let entry = |(worker, with): (u16, &u16)| {
            let tier = |at: u16| (with >> (at - 1) & 1 == 1).then_some(WorkerSlot(4 * worker + at));
            let tiers = TierSlots { host: tier(1), disk: tier(2), external: tier(3) };
            RosterWorker { tiers, ..crate::roster::tests::worker(4 * worker) }
        };
        let entries: Vec<RosterWorker> = (0..).zip(with).map(entry).collect();
        LowerTiers::of(&entries)
    }

    /// Dynamo's walk, tier after tier: how far each goes on from where the one
    /// before has ended.
    fn tier_by_tier(held: [u64; 4], blocks: u32) -> [u32; 3] {
        let mut at = 0;
        let counts = held.map(|held| {
            let from = at;
            while at < blocks && held >> at & 1 == 1 {
                at += 1;
            }
            at - from
        });
        [counts[0], counts[1], counts[2] + counts[3]]
    }

    /// Goal: each tier extends what those above it hold, and counts nothing
    /// twice.
    /// Method: three workers of four tiers that each hold or miss 6 blocks,
    /// drawn 4096 times, the first blocks more often, against a walk tier by
    /// tier.
    #[test]
    fn lower_tiers_extend_the_overlap() {
        let tiers = fleet(&[0b111; 3]);
        for case in 0..4096_u64 {
            let mut draws = (0..12_u64).map(|tier| {
                let bits = hash(case << 4 | tier).0;
                (bits | bits >> 8 & 0b11) & 63
            });
            let held: [[u64; 4]; 3] =
                core::array::from_fn(|_| core::array::from_fn(|_| draws.next().unwrap()));
            let mut index = Index::new(1_000);
            for (slot, held) in (0_u16..).zip(held.as_flattened()) {
                for n in (0..6).filter(|n| held >> n & 1 == 1) {
                    index.store(WorkerSlot(slot), hash(n));
                }
            }
            let expected: Rows = [0, 4, 8]
                .into_iter()
                .zip(held.map(|held| tier_by_tier(held, 6)))
                .filter(|(_, blocks)| *blocks != [0; 3])
                .collect();
            assert_eq!(tiered(&mut index, &tiers, &[0, 1, 2, 3, 4, 5]), expected, "case {case}");
        }
    }

    /// Goal: workers with some tiers, or none, are found beside those with all;
    /// without any tier the answer is that of the device alone.
    #[test]
    fn workers_without_tiers_are_found_beside_those_with() {
        let held: [(u16, &[u64]); 5] =
            [(0, &[1, 2]), (2, &[3]), (4, &[1, 2, 3]), (9, &[1, 2]), (11, &[2, 3, 4])];
        let mut index = Index::new(1_000);
        for (slot, blocks) in held {
            for n in blocks {
                index.store(WorkerSlot(slot), hash(*n));
            }
        }
        // The third has the host's memory and external storage only.
        let tiers = fleet(&[0b010, 0b000, 0b101]);
        let expected = vec![(0, [2, 0, 1]), (4, [3, 0, 0]), (8, [0, 2, 2])];
        assert_eq!(tiered(&mut index, &tiers, &[1, 2, 3, 4, 5]), expected);
        let alone = vec![(0, [2, 0, 0]), (4, [3, 0, 0]), (9, [2, 0, 0])];
        assert_eq!(tiered(&mut index, &LowerTiers::default(), &[1, 2, 3, 4, 5]), alone);
        assert_eq!(tiered(&mut index, &tiers, &[]), []);
        // A tier that is cleared is not credited, nor is a worker with nothing else.
        index.clear(WorkerSlot(9));
        assert_eq!(tiered(&mut index, &tiers, &[1, 2, 3, 4, 5]), expected[..2]);
    }

    /// The reference walk that Dynamo's radix tree answers: two workers share
    /// a prefix and part ways.
    #[test]
    fn shared_prefix_then_parting() {
        let mut index = Index::new(100);
        for n in [1, 2, 3] {
            index.store(WorkerSlot(1), hash(n));
        }
        for n in [1, 2, 24] {
            index.store(WorkerSlot(2), hash(n));
        }
        assert_eq!(answer(&mut index, &[1, 2, 3, 34]), [(1, 3), (2, 2)]);
        assert_eq!(answer(&mut index, &[1, 2, 24]), [(1, 2), (2, 3)]);
        assert_eq!(answer(&mut index, &[7, 2, 3]), []);
        assert_eq!(answer(&mut index, &[]), []);
    }

    /// Goal: a hole ends the overlap, wherever it is, for every worker at once.
    /// Method: every way in which two workers hold or miss 6 blocks (4096
    /// cases) against a count too simple to be wrong.
    #[test]
    fn overlap_ends_at_the_first_hole() {
        for case in 0..4096_u64 {
            let held = [case & 63, case >> 6];
            let mut index = Index::new(100);
            for (slot, held) in (0_u16..).zip(held) {
                for n in (0..6).filter(|n| held >> n & 1 == 1) {
                    index.store(WorkerSlot(slot), hash(n));
                }
            }
            let expected: Vec<(u16, u32)> = (0_u16..)
                .zip(held.map(u64::trailing_ones))
                .filter(|(_, overlap)| *overlap > 0)
                .collect();
            assert_eq!(answer(&mut index, &[0, 1, 2, 3, 4, 5]), expected, "case {case:#o}");
        }
    }

    /// Goal: members that are left are those in both lists, and all others are told,
    /// in order, whichever way the lists are gone through.
    /// Method: 4000 drawn pairs of lists, from alike to far apart in length, against
    /// looking for each member.
    #[test]
    fn what_is_common_is_kept() {
        for case in 0..4000_u64 {
            let draw = |salt: u64, share: u64| -> Vec<Member> {
                let is_in = |n: &u16| hash(case << 20 | salt << 16 | u64::from(*n)).0 % 64 < share;
                (0..200).filter(is_in).map(Member).collect()
            };
            let alive = draw(0, case % 65);
            let mut holders = draw(1, case / 65 % 65);
            if case % 3 == 0 {
                // Mostly the same, as along a prompt.
                holders = alive.iter().copied().filter(|it| it.0 % 17 != 3).collect();
            }
            let (kept, lost): (Vec<Member>, Vec<Member>) =
                alive.iter().partition(|member| holders.contains(member));
            let (mut left, mut gone) = (alive, Vec::new());
            keep_common(&mut left, &holders, |member| gone.push(member));
            assert_eq!((left, gone), (kept, lost), "case {case}");
        }
    }

    #[test]
    fn a_cleared_worker_is_not_credited_before_it_is_swept() {
        let mut index = Index::new(100);
        for n in [1, 2] {
            index.store(WorkerSlot(1), hash(n));
            index.store(WorkerSlot(2), hash(n));
        }
        index.clear(WorkerSlot(1));
        assert_eq!(answer(&mut index, &[1, 2]), [(2, 2)]);
        // The same slot again, another incarnation with only one block.
        index.store(WorkerSlot(1), hash(1));
        assert_eq!(answer(&mut index, &[1, 2]), [(1, 1), (2, 2)]);
        while index.sweep(64) {}
        assert_eq!(answer(&mut index, &[1, 2]), [(1, 1), (2, 2)]);
    }
}
