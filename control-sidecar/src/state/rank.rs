//! Rank: what one engine's cache holds, in blocks of the model, tier by tier.
//!
//! Engines name pages by hashes of their own and say their tokens once, when a
//! page is stored. A removal names the page only, so every page is remembered
//! with the sequence hash that its tokens gave.
//!
//! # Terms
//!
//! - *page*: what the engine names; for most engines a block of the model.
//! - *tail*: tokens of a prompt after its last complete block, up to the end of
//!   a page. Pages smaller than a block have one, unless they complete a block.
//! - *copy*: the same page, cached twice; both copies are removed one by one.
//! - *lower tier*: where the engine keeps pages that it can bring back to the
//!   device: the host's memory, disks, external storage. Each holds pages of its
//!   own, chained to parents in any tier.
//! - *passed over*: pages that are not indexed but whose removal will come.
//!
//! # Invariants
//!
//! 1. A tier holds a block while at least one page that completes it is in the
//!    tier, and no page inside it has been removed from there.
//! 2. A page announced again from a prompt's start is no further copy: engines
//!    can repeat what they hold on request. So a copy may be missed, and the
//!    block is then given up with the first removal: a lost hit, not a false one.
//! 3. Memory is bounded: pages, pages passed over, orphans and groups have
//!    limits, and reaching one is counted.

use std::collections::HashMap;
use std::sync::Arc;

use warmpath_core::event::{Group, GroupKind, Hashed, KvEvent, Medium, Removed, Stored};
use warmpath_core::hash::{BlockShape, Salt, sequence_hash};
use warmpath_core::ids::{BlockHash, EngineHash, SequenceHash, WorkerSlot};
use warmpath_core::roster::Parity;

use super::counts::{Counts, Notice};
use super::orphans::Orphans;
use super::outbox::Outbox;
use super::tier::{Cursor, Key, Out, Page, Tier};
pub use super::tier::{Held, Sink};
use crate::limits::{RANK_BLOCKS_DEFAULT, RANK_BLOCKS_FACTOR, RANK_GROUPS_MAX, RANK_PAGES_MAX};

/// What a rank's events have shown about its blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Evidence {
    /// Nothing yet.
    #[default]
    None,
    /// A complete block of the model's size, chained to its start, was hashed.
    Proven,
    /// So far only blocks of other sizes.
    Mismatched,
}

/// Pages of one event up to which they are compared pair by pair, which then
/// takes less than sorting a copy.
const PAGES_COMPARED_MAX: usize = 32;

/// The tiers in the order in which a prompt is looked for in them.
const MEDIA: [Medium; 4] = [Medium::Device, Medium::HostPinned, Medium::Disk, Medium::External];

/// A rank's tiers.
#[derive(Clone, Debug, Default)]
struct Tiers {
    device: Tier,
    host: Tier,
    disk: Tier,
    external: Tier,
}

impl Tiers {
    fn of(&self, medium: Medium) -> &Tier {
        match medium {
            Medium::Device => &self.device,
            Medium::HostPinned => &self.host,
            Medium::Disk => &self.disk,
            Medium::External => &self.external,
        }
    }

    fn of_mut(&mut self, medium: Medium) -> &mut Tier {
        match medium {
            Medium::Device => &mut self.device,
            Medium::HostPinned => &mut self.host,
            Medium::Disk => &mut self.disk,
            Medium::External => &mut self.external,
        }
    }

    fn pages(&self) -> usize {
        MEDIA.map(|medium| self.of(medium).pages()).into_iter().sum()
    }

    /// A page in the tier that is asked for, or else in the first that has it.
    fn page(&self, medium: Medium, key: Key) -> Option<&Page> {
        let first = self.of(medium).page(key);
        first.or_else(|| MEDIA.iter().find_map(|medium| self.of(*medium).page(key)))
    }
}

/// One rank's cache.
#[derive(Clone, Debug)]
pub struct Rank {
    shape: BlockShape,
    small_pages: bool,
    blocks_max: u64,
    tiers: Tiers,
    orphans: Orphans,
    groups: HashMap<u32, GroupKind>,
    evidence: Evidence,
    counts: Counts,
}

/// Parts of a rank that one tier's step needs.
struct Step<'r> {
    tier: &'r mut Tier,
    out: Out<'r>,
}

impl Rank {
    /// An empty cache.
    ///
    /// - `shape`: how the model cuts blocks.
    /// - `small_pages`: whether pages smaller than a block are put together;
    ///   otherwise they are passed over, as the partial blocks they are.
    /// - `total_kv_blocks`: blocks the cache holds; 0 if not known.
    #[must_use]
    pub fn new(shape: BlockShape, small_pages: bool, total_kv_blocks: u64) -> Self {
        let blocks_max = match total_kv_blocks {
            0 => RANK_BLOCKS_DEFAULT,
            blocks => blocks.saturating_mul(RANK_BLOCKS_FACTOR),
        };
        Self {
            shape,
            small_pages,
            blocks_max,
            tiers: Tiers::default(),
            orphans: Orphans::default(),
            groups: HashMap::new(),
            evidence: Evidence::None,
            counts: Counts::default(),
        }
    }

    /// Applies one event and puts what it changes into `sink`.
    pub fn apply(&mut self, event: &KvEvent, sink: &mut Sink<'_>) {
        match event {
            KvEvent::Stored(stored) => self.store(stored, sink),
            KvEvent::Hashed(hashed) => self.store_hashed(hashed, sink),
            KvEvent::Removed(removed) => self.remove(removed, sink),
            KvEvent::Cleared => self.clear(sink),
        }
    }

    /// Takes over what a whole account of the cache says, and puts only what
    /// differs from what was known into `sink`.
    pub fn replace(&mut self, events: &[KvEvent], sink: &mut Sink<'_>) {
        let before = MEDIA.map(|medium| self.tiers.of_mut(medium).take());
        self.orphans = Orphans::default();
        let mut unsent = Outbox::default();
        let mut aside =
            Sink { slot: sink.slot, tiers: sink.tiers, slots: sink.slots, outbox: &mut unsent };
        for event in events {
            self.apply(event, &mut aside);
            // What it would have sent is found by comparing.
            aside.outbox.discard();
        }
        for (medium, before) in MEDIA.into_iter().zip(before) {
            let now = self.tiers.of(medium).held();
            let Some(slot) = sink.slot_of(medium) else { continue };
            for gone in before.keys().filter(|hash| !now.contains_key(hash)) {
                sink.outbox.removed(slot, *gone);
            }
            for new in now.keys().filter(|hash| !before.contains_key(hash)) {
                sink.outbox.stored(slot, *new);
            }
        }
    }

    /// Forgets all blocks of all tiers: an engine that clears its cache, or a
    /// relay that says so, means every tier that is the worker's own.
    pub fn clear(&mut self, sink: &mut Sink<'_>) {
        self.orphans = Orphans::default();
        self.counts.cleared += 1;
        for medium in MEDIA {
            let held = self.tiers.of_mut(medium).take();
            if let Some(slot) = sink.slot_of(medium).filter(|_| !held.is_empty()) {
                sink.outbox.clear(slot);
            }
        }
    }

    /// Forgets what is known about the rank's kinds of blocks.
    pub fn forget_evidence(&mut self) {
        self.evidence = Evidence::None;
        self.groups = HashMap::new();
    }

    /// What a tier of the rank holds, as it is now.
    #[must_use]
    pub fn held(&self, medium: Medium) -> Arc<Held> {
        Arc::clone(self.tiers.of(medium).held())
    }

    /// Blocks that a tier of the rank holds.
    #[must_use]
    pub fn blocks(&self, medium: Medium) -> usize {
        self.tiers.of(medium).held().len()
    }

    /// Pages remembered, over all tiers.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.tiers.pages()
    }

    /// Blocks of lower tiers that wait for their parents.
    #[must_use]
    pub fn orphans(&self) -> usize {
        self.orphans.len()
    }

    /// What its events have shown about its blocks.
    #[must_use]
    pub fn evidence(&self) -> Evidence {
        self.evidence
    }

    /// How well its blocks are known.
    #[must_use]
    pub fn parity(&self) -> Parity {
        match self.evidence {
            Evidence::None => Parity::Unproven,
            Evidence::Proven => Parity::Exact,
            Evidence::Mismatched => Parity::Blind,
        }
    }

    /// What has been noticed.
    #[must_use]
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    fn step<'r>(
        &'r mut self,
        medium: Medium,
        slot: WorkerSlot,
        sink: &'r mut Sink<'_>,
    ) -> Step<'r> {
        let out = Out { slot, outbox: sink.outbox, counts: &mut self.counts };
        Step { tier: self.tiers.of_mut(medium), out }
    }

    /// The slot of a tier in which something is to be stored.
    fn slot_for(&mut self, medium: Medium, sink: &mut Sink<'_>) -> Option<WorkerSlot> {
        let slot = sink.slot_for(medium);
        if slot.is_none() {
            self.counts.note(Notice::NoTierSlot, 1);
        }
        slot
    }

    /// Whether a tier has room for one more page.
    fn has_room(&self, medium: Medium, page_size: u32) -> bool {
        let blocks_max = match medium {
            Medium::Device => self.blocks_max,
            // How much they hold is not said; more than the device, as a rule.
            _ => self.blocks_max.max(RANK_BLOCKS_DEFAULT),
        };
        let pages_of_block = u64::from(self.shape.block_size / page_size.max(1));
        (self.tiers.of(medium).pages() as u64) < blocks_max.saturating_mul(pages_of_block)
            && (self.tiers.pages() as u64) < RANK_PAGES_MAX
    }

    fn store(&mut self, stored: &Stored, sink: &mut Sink<'_>) {
        if !self.is_ours(stored.medium, stored.group) || stored.pages.is_empty() {
            return;
        }
        let medium = stored.medium;
        let Some(slot) = self.slot_for(medium, sink) else { return };
        let group = stored.group.index.unwrap_or(0);
        if medium != Medium::Device && stored.tokens.is_empty() {
            self.store_named(stored, group, slot, sink);
            return;
        }
        if let Err(notice) = self.check(stored) {
            self.counts.note(notice, 1);
            let is_first = self.evidence == Evidence::None && medium == Medium::Device;
            if notice == Notice::WrongBlockSize && is_first {
                self.evidence = Evidence::Mismatched;
            }
            self.tiers.of_mut(medium).pass_over(&stored.pages, group, &mut self.counts);
            return;
        }
        let Some((mut cursor, parent_seed)) = self.start(medium, stored.parent, group) else {
            self.note_parent_unknown(medium);
            return;
        };
        let own_seed =
            Salt { lora: stored.lora.as_deref(), cache_salt: stored.cache_salt.as_deref() }.seed();
        // A salt is named at a prompt's start; what follows inherits it.
        let seed = match parent_seed {
            Some(inherited) if stored.cache_salt.is_none() => inherited,
            _ => own_seed,
        };
        let page_tokens = stored.page_size as usize;
        let window = page_tokens + usize::from(stored.pairs);
        let how = (seed, self.shape.block_size as usize);
        let mut objects = stored.objects.iter().peekable();
        for (at, engine) in stored.pages.iter().enumerate() {
            let rest = stored.pages.get(at..).unwrap_or(&[]);
            if at >= stored.understood {
                self.counts.note(Notice::UnknownKeys, 1);
                self.tiers.of_mut(medium).pass_over(rest, group, &mut self.counts);
                return;
            }
            while let Some(object) = objects.next_if(|object| object.page <= at) {
                cursor.objects.push(object.hash);
            }
            let start = at * page_tokens;
            let Some(tokens) = stored.tokens.get(start..start + window) else {
                return;
            };
            let key = (*engine, group);
            let has_room = self.has_room(medium, stored.page_size);
            let Step { tier, mut out } = self.step(medium, slot, sink);
            if let Some(end) = tier.repeat(key, stored.parent.is_some(), &mut out) {
                cursor = end;
                continue;
            }
            if !has_room {
                self.counts.note(Notice::PagesFull, rest.len());
                return;
            }
            if tier.store(key, tokens, stored, how, &mut cursor, &mut out) {
                self.evidence = Evidence::Proven;
            }
        }
    }

    /// Pages of a lower tier that are named without their tokens, as offloading
    /// engines do: those that another tier holds are known from there.
    fn store_named(&mut self, stored: &Stored, group: u32, slot: WorkerSlot, sink: &mut Sink<'_>) {
        let medium = stored.medium;
        for engine in &stored.pages {
            let key = (*engine, group);
            // Of the smallest size that pages may have: no more than in a tier
            // of whole blocks.
            let has_room = self.has_room(medium, self.shape.block_size);
            let known = self.tiers.page(medium, key).cloned();
            let Step { tier, mut out } = self.step(medium, slot, sink);
            if tier.repeat(key, false, &mut out).is_some() {
                continue;
            }
            match known {
                Some(page) if has_room => {
                    tier.store_known(key, &page, &mut out);
                }
                Some(_) => self.counts.note(Notice::PagesFull, 1),
                None => {
                    tier.pass_over(&[*engine], group, out.counts);
                    self.counts.note(Notice::Placeholder, 1);
                }
            }
        }
    }

    /// Blocks whose hashes a relay has computed. Each is a page of its own.
    fn store_hashed(&mut self, hashed: &Hashed, sink: &mut Sink<'_>) {
        let medium = hashed.medium;
        let Some(slot) = self.slot_for(medium, sink) else { return };
        let Some((cursor, _)) = self.start(medium, hashed.parent, 0) else {
            self.note_parent_unknown(medium);
            if let (Some(parent), false) = (hashed.parent, medium == Medium::Device) {
                self.let_wait(medium, parent, &hashed.blocks);
            }
            return;
        };
        let mut before = cursor.block;
        for (at, (engine, hash)) in hashed.blocks.iter().enumerate() {
            if hashed.parent == Some(*engine) {
                self.counts.note(Notice::SelfReference, 1);
                return;
            }
            let block = sequence_hash(before, *hash);
            if let Err(notice) = self.store_block(medium, *engine, block, slot, sink) {
                let is_full = notice == Notice::PagesFull;
                self.counts.note(notice, if is_full { hashed.blocks.len() - at } else { 1 });
                return;
            }
            before = Some(block);
            self.adopt(*engine, block, sink);
        }
    }

    /// Stores one block. If it cannot be, nor can what follows it.
    fn store_block(
        &mut self,
        medium: Medium,
        engine: EngineHash,
        block: SequenceHash,
        slot: WorkerSlot,
        sink: &mut Sink<'_>,
    ) -> Result<(), Notice> {
        let key = (engine, 0);
        if let Some(page) = self.tiers.of(medium).page(key) {
            let is_same = page.block == Some(block);
            // The relay has counted the copies: it says one removal for all.
            self.counts.note(Notice::Repeated, 1);
            // The same name for other tokens: what follows hangs on the block
            // that is known by it.
            return if is_same { Ok(()) } else { Err(Notice::SelfReference) };
        }
        if !self.has_room(medium, self.shape.block_size) {
            return Err(Notice::PagesFull);
        }
        if !self.orphans.is_empty() {
            // Its parent is another one, and known.
            self.orphans.remove((medium, engine));
        }
        let Step { tier, mut out } = self.step(medium, slot, sink);
        tier.store_block(key, block, &mut out);
        // The relay hashes blocks of the card's size only.
        self.evidence = Evidence::Proven;
        Ok(())
    }

    /// Lets blocks of a lower tier wait for the one before them.
    fn let_wait(
        &mut self,
        medium: Medium,
        mut parent: EngineHash,
        blocks: &[(EngineHash, BlockHash)],
    ) {
        for (at, (engine, hash)) in blocks.iter().enumerate() {
            let is_known = *engine == parent || self.tiers.of(medium).page((*engine, 0)).is_some();
            if is_known {
                self.counts.note(Notice::SelfReference, 1);
                return;
            }
            if !self.orphans.add((medium, *engine), parent, *hash) {
                self.counts.note(Notice::OrphansFull, blocks.len() - at);
                return;
            }
            parent = *engine;
        }
    }

    /// Stores the blocks that have waited for one, and those behind them.
    fn adopt(&mut self, engine: EngineHash, block: SequenceHash, sink: &mut Sink<'_>) {
        if self.orphans.is_empty() {
            return;
        }
        let mut known = vec![(engine, block)];
        while let Some((parent, before)) = known.pop() {
            for ((medium, engine), hash) in self.orphans.of_parent(parent) {
                let block = sequence_hash(Some(before), hash);
                let Some(slot) = self.slot_for(medium, sink) else { continue };
                match self.store_block(medium, engine, block, slot, sink) {
                    Ok(()) => known.push((engine, block)),
                    Err(notice) => self.counts.note(notice, 1),
                }
            }
        }
    }

    fn note_parent_unknown(&mut self, medium: Medium) {
        let is_lower = medium != Medium::Device;
        let notice = if is_lower { Notice::LowerTierOrphan } else { Notice::ParentUnknown };
        self.counts.note(notice, 1);
    }

    /// Whether an event is about the cache that is indexed. Learns kinds of
    /// groups from those that name them.
    fn is_ours(&mut self, medium: Medium, group: Group) -> bool {
        let index = group.index.unwrap_or(0);
        let known = self.groups.get(&index).copied();
        if let Some(kind) = group.kind
            && known != Some(kind)
        {
            if known.is_some() || self.groups.len() < RANK_GROUPS_MAX {
                self.groups.insert(index, kind);
            } else {
                self.counts.note(Notice::GroupsFull, 1);
            }
        }
        let is_main = match group.kind.or(known) {
            Some(kind) => kind == GroupKind::Main,
            // What stores on disks and beyond numbers groups in its own way.
            None => index == 0 || matches!(medium, Medium::Disk | Medium::External),
        };
        if !is_main {
            self.counts.note(Notice::OtherGroup, 1);
        }
        is_main
    }

    /// Whether an event's pages can be turned into blocks of the model.
    fn check(&self, stored: &Stored) -> Result<(), Notice> {
        if stored.tokens.is_empty() || stored.page_size == 0 {
            return Err(Notice::Placeholder);
        }
        let BlockShape { block_size, eagle } = self.shape;
        let fits = stored.page_size == block_size
            || self.small_pages && block_size.is_multiple_of(stored.page_size);
        if !fits || stored.pairs != eagle {
            return Err(Notice::WrongBlockSize);
        }
        let pages = stored.pages.len() as u64;
        let tokens = pages * u64::from(stored.page_size) + u64::from(stored.pairs);
        if stored.tokens.len() as u64 != tokens {
            return Err(Notice::TokenCount);
        }
        let own_parent = stored.parent.is_some_and(|parent| stored.pages.contains(&parent));
        if own_parent || has_twice(&stored.pages) {
            return Err(Notice::SelfReference);
        }
        Ok(())
    }

    /// Where a chain of a tier continues after `parent`, and the seed it has
    /// there; `None` if the parent is in no tier.
    fn start(
        &self,
        medium: Medium,
        parent: Option<EngineHash>,
        group: u32,
    ) -> Option<(Cursor, Option<u64>)> {
        let Some(parent) = parent else {
            return Some((Cursor::default(), None));
        };
        let key = (parent, group);
        let page = match medium {
            // What is on the device has all before it there, too.
            Medium::Device => self.tiers.device.page(key)?,
            _ => self.tiers.page(medium, key)?,
        };
        Some((page.end(key), Some(page.seed)))
    }

    fn remove(&mut self, removed: &Removed, sink: &mut Sink<'_>) {
        if !self.is_ours(removed.medium, removed.group) {
            return;
        }
        let medium = removed.medium;
        let group = removed.group.index.unwrap_or(0);
        for engine in &removed.pages {
            let mut is_known = self.orphans.remove((medium, *engine));
            if let Some(slot) = sink.slot_of(medium) {
                let Step { tier, mut out } = self.step(medium, slot, sink);
                is_known |= tier.remove((*engine, group), &mut out);
            }
            if !is_known {
                self.counts.note(Notice::RemovedUnknown, 1);
            }
        }
    }
}

/// Whether a page is named twice.
fn has_twice(pages: &[EngineHash]) -> bool {
    if pages.len() > PAGES_COMPARED_MAX {
        let mut sorted = pages.to_vec();
        sorted.sort_unstable();
        return sorted.windows(2).any(|pair| pair.first() == pair.last());
    }
    let mut rest = pages;
    while let Some((first, after)) = rest.split_first() {
        if after.contains(first) {
            return true;
        }
        rest = after;
    }
    false
}
