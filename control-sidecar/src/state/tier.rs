//! Tier: the pages that one tier of a rank holds, and the blocks they complete.
//!
//! # Invariants
//!
//! 1. A block is held while at least one page of the tier that completes it is,
//!    and no page inside it has been removed from the tier.
//! 2. `held` changes only together with what is put into the outbox.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use foldhash::fast::RandomState;
use warmpath_core::event::{Medium, Stored};
use warmpath_core::hash::{block_hash, block_hash_with_objects, sequence_hash};
use warmpath_core::ids::{EngineHash, SequenceHash, TokenId, WorkerSlot};
use warmpath_core::roster::TierSlots;

use super::counts::{Counts, Notice};
use super::outbox::Outbox;
use super::slots::Slots;
use crate::limits::{PAGE_COMPLETED_BY_MAX, PAGE_COPIES_MAX, RANK_PASSED_OVER_MAX};

/// The blocks that a tier holds, each with the number of pages that complete it.
pub type Held = HashMap<SequenceHash, u32, RandomState>;

/// A page's name within its rank.
pub(super) type Key = (EngineHash, u32);

/// By page. Seeded at random, so that an engine cannot choose what collides.
pub(super) type ByPage<T> = HashMap<Key, T, RandomState>;

/// Where a rank's changes go.
#[derive(Debug)]
pub struct Sink<'a> {
    /// Stands for the rank's device.
    pub slot: WorkerSlot,
    /// Stand for its lower tiers.
    pub tiers: &'a mut TierSlots,
    /// Where slots for tiers come from.
    pub slots: &'a mut Slots,
    /// Takes the changes.
    pub outbox: &'a mut Outbox,
}

impl Sink<'_> {
    /// The slot of a tier; `None` if the tier has none yet.
    pub(super) fn slot_of(&self, medium: Medium) -> Option<WorkerSlot> {
        match medium {
            Medium::Device => Some(self.slot),
            Medium::HostPinned => self.tiers.host,
            Medium::Disk => self.tiers.disk,
            Medium::External => self.tiers.external,
        }
    }

    /// The slot of a tier, a new one if it has none; `None` if all are in use.
    pub(super) fn slot_for(&mut self, medium: Medium) -> Option<WorkerSlot> {
        let slot = match medium {
            Medium::Device => return Some(self.slot),
            Medium::HostPinned => &mut self.tiers.host,
            Medium::Disk => &mut self.tiers.disk,
            Medium::External => &mut self.tiers.external,
        };
        if slot.is_none() {
            *slot = self.slots.take();
        }
        *slot
    }
}

/// Where one tier's changes go.
pub(super) struct Out<'a> {
    pub(super) slot: WorkerSlot,
    pub(super) outbox: &'a mut Outbox,
    pub(super) counts: &'a mut Counts,
}

#[derive(Clone, Debug)]
pub(super) struct Page {
    pub(super) copies: u32,
    pub(super) seed: u64,
    /// The last block complete at this page's end; `None` inside the first.
    pub(super) block: Option<SequenceHash>,
    /// The page before, if it lies inside the same block.
    pub(super) inner: Option<Key>,
    /// What the page leaves open; `None` if it completes a block.
    pub(super) open: Option<Box<Open>>,
    /// Whether the page completes a block and is counted for it.
    pub(super) counted: bool,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Open {
    tail: Vec<TokenId>,
    objects: Vec<u64>,
    /// Pages that complete a block of which this page is a part.
    completed_by: Vec<Key>,
}

/// Where the next page of a chain begins.
#[derive(Clone, Debug, Default)]
pub(super) struct Cursor {
    pub(super) block: Option<SequenceHash>,
    inner: Option<Key>,
    tail: Vec<TokenId>,
    pub(super) objects: Vec<u64>,
}

impl Page {
    /// Where the next page begins if it follows this one, called `key`.
    pub(super) fn end(&self, key: Key) -> Cursor {
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

    /// The same page as it is at first in another tier.
    fn in_another_tier(&self) -> Self {
        let open = self.open.as_ref().map(|open| {
            let (tail, objects) = (open.tail.clone(), open.objects.clone());
            Box::new(Open { tail, objects, completed_by: Vec::new() })
        });
        Self { copies: 1, open, counted: false, ..*self }
    }
}

/// One tier of a rank.
#[derive(Clone, Debug, Default)]
pub(super) struct Tier {
    pages: ByPage<Page>,
    passed_over: ByPage<u32>,
    held: Arc<Held>,
}

impl Tier {
    pub(super) fn page(&self, key: Key) -> Option<&Page> {
        self.pages.get(&key)
    }

    pub(super) fn pages(&self) -> usize {
        self.pages.len()
    }

    pub(super) fn held(&self) -> &Arc<Held> {
        &self.held
    }

    /// Forgets all pages, and puts nothing into an outbox. Returns what was held.
    pub(super) fn take(&mut self) -> Arc<Held> {
        core::mem::take(self).held
    }

    /// Counts a page that is there once more.
    ///
    /// - `is_copy`: whether this one is another copy of it.
    ///
    /// Returns where the chain goes on; `None` if the page is not there.
    pub(super) fn repeat(&mut self, key: Key, is_copy: bool, out: &mut Out<'_>) -> Option<Cursor> {
        let page = self.pages.get_mut(&key)?;
        if is_copy {
            page.copies = page.copies.saturating_add(1).min(PAGE_COPIES_MAX);
        }
        out.counts.note(Notice::Repeated, 1);
        let cursor = page.end(key);
        let (block, inner) = (page.block, page.inner);
        // It lost a page inside its block, which may have come back.
        if page.open.is_none() && !page.counted && self.enter(key, inner, out) {
            if let Some(page) = self.pages.get_mut(&key) {
                page.counted = true;
            }
            self.hold(block, out);
        }
        Some(cursor)
    }

    /// Stores a page that is not there yet at the cursor, and moves the cursor
    /// behind it. Returns whether it completes a block.
    pub(super) fn store(
        &mut self,
        key: Key,
        tokens: &[TokenId],
        event: &Stored,
        (seed, block_tokens): (u64, usize),
        cursor: &mut Cursor,
        out: &mut Out<'_>,
    ) -> bool {
        let page = new_page(tokens, event, seed, block_tokens, cursor);
        *cursor = page.end(key);
        self.insert(key, page, out)
    }

    /// Stores a page that is in another tier, too, and not in this one yet.
    pub(super) fn store_known(&mut self, key: Key, page: &Page, out: &mut Out<'_>) {
        self.insert(key, page.in_another_tier(), out);
    }

    /// Stores a block that is a page of its own and not there yet.
    pub(super) fn store_block(&mut self, key: Key, block: SequenceHash, out: &mut Out<'_>) {
        let page = Page {
            copies: 1,
            seed: 0,
            block: Some(block),
            inner: None,
            open: None,
            counted: false,
        };
        self.insert(key, page, out);
    }

    /// Puts a new page in its place, and enters it into the pages before it if
    /// it completes their block. Returns whether it does.
    fn insert(&mut self, key: Key, mut page: Page, out: &mut Out<'_>) -> bool {
        let completes = page.open.is_none();
        page.counted = completes && self.enter(key, page.inner, out);
        let (block, counted) = (page.block, page.counted);
        self.pages.insert(key, page);
        if counted {
            self.hold(block, out);
        }
        counted
    }

    /// Enters a page that completes a block into the other pages of the block.
    /// Returns whether all of them are there and have room.
    fn enter(&mut self, key: Key, mut inner: Option<Key>, out: &mut Out<'_>) -> bool {
        while let Some(at) = inner {
            let Some(page) = self.pages.get_mut(&at) else { return false };
            let Some(open) = page.open.as_mut() else { return false };
            if !open.completed_by.contains(&key) {
                if open.completed_by.len() >= PAGE_COMPLETED_BY_MAX {
                    out.counts.note(Notice::PagesFull, 1);
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

    /// Remembers pages that are not indexed but whose removal will come.
    pub(super) fn pass_over(&mut self, pages: &[EngineHash], group: u32, counts: &mut Counts) {
        for engine in pages {
            let key = (*engine, group);
            if let Some(copies) = self.passed_over.get_mut(&key) {
                *copies = copies.saturating_add(1);
            } else if self.passed_over.len() < RANK_PASSED_OVER_MAX {
                self.passed_over.insert(key, 1);
            } else {
                counts.note(Notice::PassedOverFull, 1);
            }
        }
    }

    /// Takes back one copy of a page. Returns whether it was known.
    pub(super) fn remove(&mut self, key: Key, out: &mut Out<'_>) -> bool {
        if let Some(copies) = self.passed_over.get_mut(&key) {
            *copies -= 1;
            if *copies == 0 {
                self.passed_over.remove(&key);
            }
            return true;
        }
        let Entry::Occupied(mut entry) = self.pages.entry(key) else { return false };
        if entry.get().copies > 1 {
            entry.get_mut().copies -= 1;
            return true;
        }
        let page = entry.remove();
        if page.counted {
            self.release(page.block, out);
        }
        if page.open.is_none() {
            self.leave(key, page.inner);
        }
        for completing in page.open.map(|open| open.completed_by).unwrap_or_default() {
            if let Some(last) = self.pages.get_mut(&completing)
                && core::mem::take(&mut last.counted)
            {
                let block = last.block;
                self.release(block, out);
            }
        }
        true
    }

    /// One more page completes a block.
    fn hold(&mut self, block: Option<SequenceHash>, out: &mut Out<'_>) {
        let Some(block) = block else { return };
        let pages = Arc::make_mut(&mut self.held).entry(block).or_insert(0);
        *pages += 1;
        if *pages == 1 {
            out.counts.stored += 1;
            out.outbox.stored(out.slot, block);
        }
    }

    /// One page less completes a block.
    fn release(&mut self, block: Option<SequenceHash>, out: &mut Out<'_>) {
        let Some(block) = block else { return };
        let held = Arc::make_mut(&mut self.held);
        let Entry::Occupied(mut pages) = held.entry(block) else { return };
        *pages.get_mut() -= 1;
        if *pages.get() == 0 {
            pages.remove();
            out.counts.removed += 1;
            out.outbox.removed(out.slot, block);
        }
    }
}

/// Builds the page at the cursor.
fn new_page(
    tokens: &[TokenId],
    event: &Stored,
    seed: u64,
    block_tokens: usize,
    cursor: &mut Cursor,
) -> Page {
    let mut tail = core::mem::take(&mut cursor.tail);
    let objects = core::mem::take(&mut cursor.objects);
    let (mut block, inner) = (cursor.block, cursor.inner);
    if tail.len() + event.page_size as usize >= block_tokens {
        let hash = if tail.is_empty() && objects.is_empty() {
            block_hash(tokens, seed)
        } else {
            tail.extend_from_slice(tokens);
            block_hash_with_objects(&tail, &objects, seed)
        };
        block = Some(sequence_hash(block, hash));
        return Page { copies: 1, seed, block, inner, open: None, counted: false };
    }
    // The second part of the last pair belongs to the next page as well.
    tail.extend(tokens.iter().take(event.page_size as usize));
    let open = Some(Box::new(Open { tail, objects, completed_by: Vec::new() }));
    Page { copies: 1, seed, block, inner, open, counted: false }
}
