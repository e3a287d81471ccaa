//! Rank: what one engine's cache holds, in blocks of the model.
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
//! - *passed over*: pages that are not indexed but whose removal will come.
//!
//! # Invariants
//!
//! 1. A block is held while at least one page that completes it is, and no page
//!    inside it has been removed.
//! 2. A page announced again from a prompt's start is no further copy: engines
//!    can repeat what they hold on request. So a copy may be missed, and the
//!    block is then given up with the first removal: a lost hit, not a false one.
//! 3. Memory is bounded: pages, pages passed over and groups have limits, and
//!    reaching one is counted.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use foldhash::fast::RandomState;
use warmpath_core::event::{Group, GroupKind, Hashed, KvEvent, Medium, Removed, Stored};
use warmpath_core::hash::{BlockShape, Salt, block_hash, block_hash_with_objects, sequence_hash};
use warmpath_core::ids::{EngineHash, SequenceHash, TokenId, WorkerSlot};
use warmpath_core::roster::Parity;

use super::counts::{Counts, Notice};
use super::outbox::Outbox;
use crate::limits::{
    PAGE_COMPLETED_BY_MAX, PAGE_COPIES_MAX, RANK_BLOCKS_DEFAULT, RANK_BLOCKS_FACTOR,
    RANK_GROUPS_MAX, RANK_PAGES_MAX, RANK_PASSED_OVER_MAX,
};

/// The blocks that a rank holds, each with the number of pages that complete it.
pub type Held = HashMap<SequenceHash, u32, RandomState>;

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

/// A page's name within its rank.
type Key = (EngineHash, u32);

/// By page. Seeded at random, so that an engine cannot choose what collides.
type ByPage<T> = HashMap<Key, T, RandomState>;

/// Pages of one event up to which they are compared pair by pair, which then
/// takes less than sorting a copy.
const PAGES_COMPARED_MAX: usize = 32;

#[derive(Clone, Debug)]
struct Page {
    copies: u32,
    seed: u64,
    /// The last block complete at this page's end; `None` inside the first.
    block: Option<SequenceHash>,
    /// The page before, if it lies inside the same block.
    inner: Option<Key>,
    /// What the page leaves open; `None` if it completes a block.
    open: Option<Box<Open>>,
    /// Whether the page completes a block and is counted for it.
    counted: bool,
}

#[derive(Clone, Debug, Default)]
struct Open {
    tail: Vec<TokenId>,
    objects: Vec<u64>,
    /// Pages that complete a block of which this page is a part.
    completed_by: Vec<Key>,
}

/// Where the next page of a chain begins.
#[derive(Clone, Debug, Default)]
struct Cursor {
    block: Option<SequenceHash>,
    inner: Option<Key>,
    tail: Vec<TokenId>,
    objects: Vec<u64>,
}

/// One rank's cache.
#[derive(Clone, Debug)]
pub struct Rank {
    shape: BlockShape,
    small_pages: bool,
    blocks_max: u64,
    pages: ByPage<Page>,
    passed_over: ByPage<u32>,
    groups: HashMap<u32, GroupKind>,
    held: Arc<Held>,
    evidence: Evidence,
    counts: Counts,
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
            pages: ByPage::default(),
            passed_over: ByPage::default(),
            groups: HashMap::new(),
            held: Arc::default(),
            evidence: Evidence::None,
            counts: Counts::default(),
        }
    }

    /// Applies one event and puts what it changes into `outbox` for `slot`.
    pub fn apply(&mut self, event: &KvEvent, slot: WorkerSlot, outbox: &mut Outbox) {
        match event {
            KvEvent::Stored(stored) => self.store(stored, slot, outbox),
            KvEvent::Hashed(hashed) => self.store_hashed(hashed, slot, outbox),
            KvEvent::Removed(removed) => self.remove(removed, slot, outbox),
            KvEvent::Cleared => self.clear(slot, outbox),
        }
    }

    /// Takes over what a whole account of the cache says, and puts only what
    /// differs from what was known into `outbox`.
    pub fn replace(&mut self, events: &[KvEvent], slot: WorkerSlot, outbox: &mut Outbox) {
        let mut unsent = Outbox::default();
        let before = core::mem::take(&mut self.held);
        self.pages = ByPage::default();
        self.passed_over = ByPage::default();
        for event in events {
            self.apply(event, slot, &mut unsent);
            // What it would have sent is found by comparing.
            unsent.discard();
        }
        for gone in before.keys().filter(|hash| !self.held.contains_key(hash)) {
            outbox.removed(slot, *gone);
        }
        for new in self.held.keys().filter(|hash| !before.contains_key(hash)) {
            outbox.stored(slot, *new);
        }
    }

    /// Forgets all blocks.
    pub fn clear(&mut self, slot: WorkerSlot, outbox: &mut Outbox) {
        self.pages = ByPage::default();
        self.passed_over = ByPage::default();
        self.counts.cleared += 1;
        if !self.held.is_empty() {
            self.held = Arc::default();
            outbox.clear(slot);
        }
    }

    /// Forgets what is known about the rank's kinds of blocks.
    pub fn forget_evidence(&mut self) {
        self.evidence = Evidence::None;
        self.groups = HashMap::new();
    }

    /// What the rank holds, as it is now.
    #[must_use]
    pub fn held(&self) -> Arc<Held> {
        Arc::clone(&self.held)
    }

    /// Blocks the rank holds.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.held.len()
    }

    /// Pages remembered.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages.len()
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

    fn store(&mut self, stored: &Stored, slot: WorkerSlot, outbox: &mut Outbox) {
        if !self.is_ours(stored.medium, stored.group) || stored.pages.is_empty() {
            return;
        }
        let group = stored.group.index.unwrap_or(0);
        if let Err(notice) = self.check(stored) {
            self.counts.note(notice, 1);
            if notice == Notice::WrongBlockSize && self.evidence == Evidence::None {
                self.evidence = Evidence::Mismatched;
            }
            self.pass_over(&stored.pages, group);
            return;
        }
        let Some((mut cursor, parent_seed)) = self.start(stored.parent, group) else {
            self.counts.note(Notice::ParentUnknown, 1);
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
        let mut objects = stored.objects.iter().peekable();
        for (at, engine) in stored.pages.iter().enumerate() {
            if at >= stored.understood {
                self.counts.note(Notice::UnknownKeys, 1);
                self.pass_over(stored.pages.get(at..).unwrap_or(&[]), group);
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
            let is_new = self.store_page(key, tokens, stored, seed, &mut cursor, slot, outbox);
            if is_new.is_none() {
                self.counts.note(Notice::PagesFull, stored.pages.len() - at);
                return;
            }
        }
    }

    /// Blocks whose hashes a relay has computed. Each is a page of its own.
    fn store_hashed(&mut self, hashed: &Hashed, slot: WorkerSlot, outbox: &mut Outbox) {
        if hashed.medium != Medium::Device {
            self.counts.note(Notice::LowerTier, 1);
            return;
        }
        let Some((mut cursor, _)) = self.start(hashed.parent, 0) else {
            self.counts.note(Notice::ParentUnknown, 1);
            return;
        };
        for (at, (engine, hash)) in hashed.blocks.iter().enumerate() {
            let key = (*engine, 0);
            if hashed.parent == Some(*engine) {
                self.counts.note(Notice::SelfReference, 1);
                return;
            }
            let block = Some(sequence_hash(cursor.block, *hash));
            if let Some(page) = self.pages.get(&key) {
                // The relay has counted the copies: it says one removal for all.
                self.counts.note(Notice::Repeated, 1);
                if page.block != block {
                    // The same name for other tokens: what follows hangs on the
                    // block that is known by it.
                    self.counts.note(Notice::SelfReference, 1);
                    return;
                }
                cursor.block = block;
                continue;
            }
            if self.pages.len() as u64 >= self.blocks_max.min(RANK_PAGES_MAX) {
                self.counts.note(Notice::PagesFull, hashed.blocks.len() - at);
                return;
            }
            let page = Page { copies: 1, seed: 0, block, inner: None, open: None, counted: true };
            self.pages.insert(key, page);
            cursor.block = block;
            // The relay hashes blocks of the card's size only.
            self.evidence = Evidence::Proven;
            self.hold(block, slot, outbox);
        }
    }

    /// Whether an event is about the cache that is indexed. Learns kinds of
    /// groups from those that name them.
    fn is_ours(&mut self, medium: Medium, group: Group) -> bool {
        if medium != Medium::Device {
            self.counts.note(Notice::LowerTier, 1);
            return false;
        }
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
            None => index == 0,
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

    /// Where a chain continues after `parent`, and the seed it has there;
    /// `None` if the parent is not known.
    fn start(&self, parent: Option<EngineHash>, group: u32) -> Option<(Cursor, Option<u64>)> {
        let Some(parent) = parent else {
            return Some((Cursor::default(), None));
        };
        let key = (parent, group);
        let page = self.pages.get(&key)?;
        Some((page.end(key), Some(page.seed)))
    }

    /// Stores one page and moves the cursor behind it. Returns whether it is
    /// new, or `None` if there is no room for it.
    #[expect(clippy::too_many_arguments, reason = "one step of a loop, split off to be read alone")]
    fn store_page(
        &mut self,
        key: Key,
        tokens: &[TokenId],
        event: &Stored,
        seed: u64,
        cursor: &mut Cursor,
        slot: WorkerSlot,
        outbox: &mut Outbox,
    ) -> Option<bool> {
        if let Some(page) = self.pages.get_mut(&key) {
            if event.parent.is_some() {
                page.copies = page.copies.saturating_add(1).min(PAGE_COPIES_MAX);
            }
            self.counts.note(Notice::Repeated, 1);
            *cursor = page.end(key);
            let (block, inner) = (page.block, page.inner);
            // It lost a page inside its block, which may have come back.
            if page.open.is_none() && !page.counted && self.enter(key, inner) {
                if let Some(page) = self.pages.get_mut(&key) {
                    page.counted = true;
                }
                self.hold(block, slot, outbox);
            }
            return Some(false);
        }
        let pages_of_block = u64::from(self.shape.block_size / event.page_size.max(1));
        if self.pages.len() as u64
            >= self.blocks_max.saturating_mul(pages_of_block).min(RANK_PAGES_MAX)
        {
            return None;
        }
        let page = self.new_page(key, tokens, event, seed, cursor);
        let completed = page.counted.then_some(page.block);
        *cursor = page.end(key);
        self.pages.insert(key, page);
        if let Some(block) = completed {
            self.evidence = Evidence::Proven;
            self.hold(block, slot, outbox);
        }
        Some(true)
    }

    /// Builds the page at the cursor, and enters it into the pages before it if
    /// it completes their block.
    fn new_page(
        &mut self,
        key: Key,
        tokens: &[TokenId],
        event: &Stored,
        seed: u64,
        cursor: &mut Cursor,
    ) -> Page {
        let block_tokens = self.shape.block_size as usize;
        let mut tail = core::mem::take(&mut cursor.tail);
        let objects = core::mem::take(&mut cursor.objects);
        if tail.len() + event.page_size as usize >= block_tokens {
            let hash = if tail.is_empty() && objects.is_empty() {
                block_hash(tokens, seed)
            } else {
                tail.extend_from_slice(tokens);
                block_hash_with_objects(&tail, &objects, seed)
            };
            let block = Some(sequence_hash(cursor.block, hash));
            let inner = cursor.inner;
            let counted = self.enter(key, inner);
            return Page { copies: 1, seed, block, inner, open: None, counted };
        }
        // The second part of the last pair belongs to the next page as well.
        tail.extend(tokens.iter().take(event.page_size as usize));
        let open = Some(Box::new(Open { tail, objects, completed_by: Vec::new() }));
        let (block, inner) = (cursor.block, cursor.inner);
        Page { copies: 1, seed, block, inner, open, counted: false }
    }

    /// Enters a page that completes a block into the other pages of the block.
    /// Returns whether all of them are there and have room.
    fn enter(&mut self, key: Key, mut inner: Option<Key>) -> bool {
        while let Some(at) = inner {
            let Some(page) = self.pages.get_mut(&at) else { return false };
            let Some(open) = page.open.as_mut() else { return false };
            if !open.completed_by.contains(&key) {
                if open.completed_by.len() >= PAGE_COMPLETED_BY_MAX {
                    self.counts.note(Notice::PagesFull, 1);
                    return false;
                }
                open.completed_by.push(key);
            }
            inner = page.inner;
        }
        true
    }

    /// Takes a page that went out of the other pages of its block.
    fn leave(&mut self, key: Key, mut inner: Option<Key>) {
        while let Some(page) = inner.and_then(|at| self.pages.get_mut(&at)) {
            if let Some(open) = page.open.as_mut() {
                open.completed_by.retain(|other| *other != key);
            }
            inner = page.inner;
        }
    }

    fn pass_over(&mut self, pages: &[EngineHash], group: u32) {
        for engine in pages {
            let key = (*engine, group);
            if let Some(copies) = self.passed_over.get_mut(&key) {
                *copies = copies.saturating_add(1);
            } else if self.passed_over.len() < RANK_PASSED_OVER_MAX {
                self.passed_over.insert(key, 1);
            } else {
                self.counts.note(Notice::PassedOverFull, 1);
            }
        }
    }

    fn remove(&mut self, removed: &Removed, slot: WorkerSlot, outbox: &mut Outbox) {
        if !self.is_ours(removed.medium, removed.group) {
            return;
        }
        let group = removed.group.index.unwrap_or(0);
        for engine in &removed.pages {
            let key = (*engine, group);
            if let Some(copies) = self.passed_over.get_mut(&key) {
                *copies -= 1;
                if *copies == 0 {
                    self.passed_over.remove(&key);
                }
                continue;
            }
            self.remove_page(key, slot, outbox);
        }
    }

    fn remove_page(&mut self, key: Key, slot: WorkerSlot, outbox: &mut Outbox) {
        let Entry::Occupied(mut entry) = self.pages.entry(key) else {
            self.counts.note(Notice::RemovedUnknown, 1);
            return;
        };
        if entry.get().copies > 1 {
            entry.get_mut().copies -= 1;
            return;
        }
        let page = entry.remove();
        if page.counted {
            self.release(page.block, slot, outbox);
        }
        if page.open.is_none() {
            self.leave(key, page.inner);
        }
        for completing in page.open.map(|open| open.completed_by).unwrap_or_default() {
            if let Some(last) = self.pages.get_mut(&completing)
                && core::mem::take(&mut last.counted)
            {
                let block = last.block;
                self.release(block, slot, outbox);
            }
        }
    }

    /// One more page completes a block.
    fn hold(&mut self, block: Option<SequenceHash>, slot: WorkerSlot, outbox: &mut Outbox) {
        let Some(block) = block else { return };
        let pages = Arc::make_mut(&mut self.held).entry(block).or_insert(0);
        *pages += 1;
        if *pages == 1 {
            self.counts.stored += 1;
            outbox.stored(slot, block);
        }
    }

    /// One page less completes a block.
    fn release(&mut self, block: Option<SequenceHash>, slot: WorkerSlot, outbox: &mut Outbox) {
        let Some(block) = block else { return };
        let held = Arc::make_mut(&mut self.held);
        let Entry::Occupied(mut pages) = held.entry(block) else { return };
        *pages.get_mut() -= 1;
        if *pages.get() == 0 {
            pages.remove();
            self.counts.removed += 1;
            outbox.removed(slot, block);
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

impl Page {
    /// Where the next page begins if it follows this one, called `key`.
    fn end(&self, key: Key) -> Cursor {
        match &self.open {
            None => Cursor { block: self.block, ..Cursor::default() },
            Some(open) => Cursor {
                block: self.block,
                inner: Some(key),
                tail: open.tail.clone(),
                objects: open.objects.clone(),
            },
        }
    }
}
