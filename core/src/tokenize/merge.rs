//! Byte-pair merging of one word, in the order of merge ranks.
//!
//! The pair of the lowest rank is merged first, the leftmost of equals, until
//! no pair is in the merge table. Short words scan for the minimum; long ones
//! keep a heap, so that a word of `n` symbols takes `O(n log n)`.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::file::Tables;
use super::perfect_hash;
use crate::ids::TokenId;

/// Symbols up to which scanning beats the heap.
const SCAN_SYMBOLS_MAX: usize = 96;

/// "Not a merge"; above every rank, which has 20 bits.
const NO_RANK: u32 = u32::MAX;

/// "No neighbour" in the lists of the heap variant.
const NOWHERE: u32 = u32::MAX;

/// Bits of an id or a rank within a slot of the merge table.
pub(crate) const FIELD_BITS: u32 = 20;
const RANK_MASK: u64 = (1 << FIELD_BITS) - 1;

/// The key of a pair in the merge table.
#[inline]
pub(crate) fn pair_key(left: TokenId, right: TokenId) -> u64 {
    (u64::from(left) << FIELD_BITS) | u64::from(right)
}

/// Scratch space for merging; nothing in it outlives a call.
#[derive(Debug, Default)]
pub(crate) struct Merger {
    /// The symbols of the word: first its bytes or characters, then its tokens.
    symbols: Vec<TokenId>,
    /// Rank of the pair of a symbol and its right neighbour.
    ranks: Vec<u32>,
    before: Vec<u32>,
    after: Vec<u32>,
    /// Rank in the upper half, position in the lower: the smallest is next.
    heap: BinaryHeap<Reverse<u64>>,
}

impl Merger {
    /// An empty list of symbols, to be filled before [`Self::merge`].
    pub(crate) fn symbols(&mut self) -> &mut Vec<TokenId> {
        self.symbols.clear();
        &mut self.symbols
    }

    /// Merges the symbols and returns what is left of them.
    pub(crate) fn merge(&mut self, tables: &Tables<'_>) -> &[TokenId] {
        if self.symbols.len() <= SCAN_SYMBOLS_MAX {
            self.merge_by_scan(tables);
        } else {
            self.merge_by_heap(tables);
        }
        &self.symbols
    }

    /// What is left of the symbols after merging.
    #[cfg(test)]
    pub(super) fn merged(&self) -> &[TokenId] {
        &self.symbols
    }

    /// Bytes of memory held.
    pub(crate) fn memory_bytes(&self) -> usize {
        let lists = [&self.symbols, &self.ranks, &self.before, &self.after];
        lists.map(|list| list.capacity() * size_of::<u32>()).iter().sum::<usize>()
            + self.heap.capacity() * size_of::<u64>()
    }

    /// Merges a word of any length by looking for the minimum each time.
    pub(super) fn merge_by_scan(&mut self, tables: &Tables<'_>) {
        let (symbols, ranks) = (&mut self.symbols, &mut self.ranks);
        ranks.clear();
        ranks.extend(symbols.windows(2).map(|pair| match pair {
            [left, right] => rank(tables, *left, *right),
            _ => NO_RANK,
        }));
        while let Some((at, lowest)) = minimum(ranks) {
            let product = product(tables, lowest);
            symbols.remove(at + 1);
            ranks.remove(at);
            if let Some(symbol) = symbols.get_mut(at) {
                *symbol = product;
            }
            if let (Some(&right), Some(entry)) = (symbols.get(at + 1), ranks.get_mut(at)) {
                *entry = rank(tables, product, right);
            }
            let left = at.checked_sub(1);
            if let Some((index, &symbol)) = left.and_then(|i| Some((i, symbols.get(i)?)))
                && let Some(entry) = ranks.get_mut(index)
            {
                *entry = rank(tables, symbol, product);
            }
        }
    }

    /// Merges a word of any length with a heap. An entry of the heap is stale when its rank is no
    /// longer that of the pair at its position. Every merge pushes at most two
    /// entries and takes one symbol away, so this ends.
    pub(super) fn merge_by_heap(&mut self, tables: &Tables<'_>) {
        self.link(tables);
        while let Some(Reverse(entry)) = self.heap.pop() {
            let (lowest, at) = heap_fields(entry);
            if self.ranks.get(at) != Some(&lowest) {
                continue;
            }
            let Some(next) = self.neighbour(&self.after, at) else { continue };
            set(&mut self.symbols, at, product(tables, lowest));
            set(&mut self.ranks, next, NO_RANK);
            let behind = self.after.get(next).copied().unwrap_or(NOWHERE);
            set(&mut self.after, at, behind);
            if behind != NOWHERE {
                set(&mut self.before, behind as usize, position(at));
            }
            // The symbol that was merged away is marked by pointing nowhere.
            set(&mut self.before, next, position(next));
            self.rank_again(tables, at);
            if let Some(left) = self.neighbour(&self.before, at) {
                self.rank_again(tables, left);
            }
        }
        let before = &self.before;
        let mut index = 0;
        self.symbols.retain(|_| {
            let merged_away = before.get(index) == Some(&position(index));
            index += 1;
            !merged_away
        });
    }

    /// Fills the lists and the heap from the symbols.
    fn link(&mut self, tables: &Tables<'_>) {
        let count = position(self.symbols.len());
        self.before.clear();
        self.before.extend((0..count).map(|at| at.checked_sub(1).unwrap_or(NOWHERE)));
        self.after.clear();
        self.after.extend((1..=count).map(|next| if next < count { next } else { NOWHERE }));
        self.ranks.clear();
        self.ranks.resize(self.symbols.len(), NO_RANK);
        self.heap.clear();
        for at in 0..self.symbols.len() {
            self.rank_again(tables, at);
        }
    }

    fn neighbour(&self, list: &[u32], at: usize) -> Option<usize> {
        let next = *list.get(at)?;
        (next != NOWHERE).then_some(next as usize)
    }

    fn rank_again(&mut self, tables: &Tables<'_>, at: usize) {
        let next = self.neighbour(&self.after, at).and_then(|next| self.symbols.get(next));
        let found = match (self.symbols.get(at), next) {
            (Some(&left), Some(&right)) => rank(tables, left, right),
            _ => NO_RANK,
        };
        set(&mut self.ranks, at, found);
        if found != NO_RANK {
            self.heap.push(Reverse((u64::from(found) << 32) | at as u64));
        }
    }
}

/// A position in a word as the lists hold it.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a word has at most PRETOKEN_BYTES_MAX symbols"
)]
fn position(at: usize) -> u32 {
    at as u32
}

/// Rank and position of an entry of the heap.
#[expect(clippy::cast_possible_truncation, reason = "the halves of a u64 are taken apart")]
fn heap_fields(entry: u64) -> (u32, usize) {
    ((entry >> 32) as u32, entry as u32 as usize)
}

fn set(list: &mut [u32], at: usize, value: u32) {
    if let Some(entry) = list.get_mut(at) {
        *entry = value;
    }
}

/// The leftmost of the lowest ranks, if any pair has one.
#[inline]
fn minimum(ranks: &[u32]) -> Option<(usize, u32)> {
    let mut best = (0, NO_RANK);
    for (at, &rank) in ranks.iter().enumerate() {
        if rank < best.1 {
            best = (at, rank);
        }
    }
    (best.1 != NO_RANK).then_some(best)
}

/// The rank of a pair, or [`NO_RANK`].
#[inline]
fn rank(tables: &Tables<'_>, left: TokenId, right: TokenId) -> u32 {
    let key = pair_key(left, right);
    let hash = perfect_hash::mix(key);
    let place = perfect_hash::locate(hash, tables.merge_pilots, tables.merge_slots.len());
    match tables.merge_slots.get(place) {
        Some(&slot) if slot >> FIELD_BITS == key => (slot & RANK_MASK) as u32,
        _ => NO_RANK,
    }
}

#[inline]
fn product(tables: &Tables<'_>, rank: u32) -> TokenId {
    tables.merge_products.get(rank as usize).copied().unwrap_or_default()
}
