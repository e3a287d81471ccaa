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

/// "Not a merge"; above every pair, whose rank has 20 bits.
const NO_PAIR: u64 = u64::MAX;

/// "No neighbour" in the lists of the heap variant.
const NOWHERE: u32 = u32::MAX;

/// Bits of an id or a rank within a slot of the merge table.
pub(crate) const FIELD_BITS: u32 = 20;
const RANK_SHIFT: u32 = 2 * FIELD_BITS;
const RANK_MASK: u64 = (1 << FIELD_BITS) - 1;
/// All bits above the key.
const ABOVE_KEY: u64 = u64::MAX << RANK_SHIFT;

/// Numbers of one slot: left id, right id and rank in two, from the lowest bit
/// up, and the product.
pub(crate) const MERGE_SLOT: usize = 3;

/// ASCII characters.
const ASCII: usize = 128;

/// Pairs that are remembered, 16 bytes each.
const RECENT_BITS: u32 = 13;
const RECENT_PAIRS: usize = 1 << RECENT_BITS;
/// Bits per slot of the merge table, at least, that tell what is no merge.
const FILTER_BITS: usize = 4;

/// The key of a pair in the merge table.
#[inline]
pub(crate) fn pair_key(left: TokenId, right: TokenId) -> u64 {
    u64::from(left) | (u64::from(right) << FIELD_BITS)
}

/// A slot of the merge table.
#[cfg(any(test, feature = "compile"))]
pub(crate) fn merge_slot(key: u64, rank: u32, product: TokenId) -> [u32; MERGE_SLOT] {
    let (upper, lower) = parts(key | (u64::from(rank) << RANK_SHIFT));
    [lower, upper, product]
}

/// What every pair of ASCII characters merges to: the pairs that most words
/// start from, at hand without a look into the merge table.
pub(crate) struct AsciiPairs(Box<[u64]>);

impl AsciiPairs {
    /// The pairs of a tokenizer. `symbol`: the token of an ASCII character.
    pub(crate) fn new(tables: &Tables<'_>, symbol: impl Fn(u8) -> TokenId) -> Self {
        let symbols: Vec<TokenId> = (0..=0x7F).map(symbol).collect();
        let pairs = symbols.iter().flat_map(|&left| {
            symbols.iter().map(move |&right| {
                let key = pair_key(left, right);
                pair(tables, key, perfect_hash::mix(key))
            })
        });
        Self(pairs.collect())
    }

    /// Bytes of memory held.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.0.len() * size_of::<u64>()
    }

    #[inline]
    fn of(&self, left: u8, right: u8) -> u64 {
        self.0.get(usize::from(left) * ASCII + usize::from(right)).copied().unwrap_or(NO_PAIR)
    }
}

/// What keeps looks into the merge table away, in memory small enough for the
/// processor's cache: most pairs are in no merge, and others come again.
struct Pairs {
    /// Pairs that were looked up last, by their keys: direct-mapped.
    recent: Box<[[u64; 2]; RECENT_PAIRS]>,
    /// A bit for each merge, by its hash: with no false negatives.
    merges: Box<[u64]>,
}

impl Pairs {
    fn new(tables: &Tables<'_>) -> Self {
        let list = vec![[u64::MAX; 2]; RECENT_PAIRS].into_boxed_slice();
        let recent = list.try_into().unwrap_or_else(|_| Box::new([[u64::MAX; 2]; RECENT_PAIRS]));
        let (slots, _) = tables.merge_slots.as_chunks::<MERGE_SLOT>();
        let words = (slots.len() * FILTER_BITS / 64).max(1).next_power_of_two();
        let mut merges = vec![0; words].into_boxed_slice();
        for &[lower, upper, _] in slots {
            let slot = u64::from(lower) | (u64::from(upper) << 32);
            let (word, bit) = filter_bit(perfect_hash::mix(slot & !ABOVE_KEY), words);
            if let Some(bits) = merges.get_mut(word) {
                *bits |= 1 << bit;
            }
        }
        Self { recent, merges }
    }

    fn memory_bytes(&self) -> usize {
        size_of_val(&*self.recent) + size_of_val(&*self.merges)
    }

    /// The pair of two symbols, or [`NO_PAIR`].
    #[inline]
    fn of(&mut self, tables: &Tables<'_>, left: TokenId, right: TokenId) -> u64 {
        let key = pair_key(left, right);
        let hash = perfect_hash::mix(key);
        let (word, bit) = filter_bit(hash, self.merges.len());
        if self.merges.get(word).is_none_or(|bits| (bits >> bit) & 1 == 0) {
            return NO_PAIR;
        }
        let place = usize::try_from(hash >> (u64::BITS - RECENT_BITS)).unwrap_or(0);
        let Some(entry) = self.recent.get_mut(place) else { return pair(tables, key, hash) };
        let [known, found] = *entry;
        if known == key {
            return found;
        }
        let found = pair(tables, key, hash);
        *entry = [key, found];
        found
    }
}

/// Where the bit of a hash is, in `words` words, a power of two: word and bit.
#[inline]
fn filter_bit(hash: u64, words: usize) -> (usize, u32) {
    let word = (hash >> 6) & (words as u64).wrapping_sub(1);
    let [bit, ..] = hash.to_le_bytes();
    (usize::try_from(word).unwrap_or(0), u32::from(bit & 63))
}

/// Scratch space for merging; but for the pairs it remembers, nothing in it
/// outlives a call.
///
/// A *pair* is what a symbol and its right neighbour merge to: rank in the upper
/// half, product in the lower, so that the smallest is merged first.
pub(crate) struct Merger {
    known: Pairs,
    /// The symbols of the word: first its bytes or characters, then its tokens.
    symbols: Vec<TokenId>,
    /// The pair of each symbol but the last.
    pairs: Vec<u64>,
    /// The last symbol if it is an ASCII character.
    last_ascii: u8,
    before: Vec<u32>,
    after: Vec<u32>,
    /// Rank in the upper half, position in the lower: the smallest is next.
    heap: BinaryHeap<Reverse<u64>>,
}

impl Merger {
    /// For the merges of a tokenizer.
    pub(crate) fn new(tables: &Tables<'_>) -> Self {
        Self {
            known: Pairs::new(tables),
            symbols: Vec::new(),
            pairs: Vec::new(),
            last_ascii: 0,
            before: Vec::new(),
            after: Vec::new(),
            heap: BinaryHeap::new(),
        }
    }

    /// Starts a word.
    pub(crate) fn clear(&mut self) {
        self.symbols.clear();
        self.pairs.clear();
    }

    /// Appends a symbol of the word.
    #[inline]
    pub(crate) fn push(&mut self, tables: &Tables<'_>, symbol: TokenId) {
        if let Some(&left) = self.symbols.last() {
            self.pairs.push(self.known.of(tables, left, symbol));
        }
        self.symbols.push(symbol);
    }

    /// Appends the symbol of an ASCII character to a word of such.
    #[inline]
    pub(crate) fn push_ascii(&mut self, pairs: &AsciiPairs, symbol: TokenId, byte: u8) {
        if !self.symbols.is_empty() {
            self.pairs.push(pairs.of(self.last_ascii, byte));
        }
        self.symbols.push(symbol);
        self.last_ascii = byte;
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
        let lists = [&self.symbols, &self.before, &self.after];
        lists.map(|list| list.capacity() * size_of::<u32>()).iter().sum::<usize>()
            + (self.pairs.capacity() + self.heap.capacity()) * size_of::<u64>()
            + self.known.memory_bytes()
    }

    /// Merges a word of any length by looking for the minimum each time.
    pub(super) fn merge_by_scan(&mut self, tables: &Tables<'_>) {
        let (symbols, pairs, known) = (&mut self.symbols, &mut self.pairs, &mut self.known);
        while let Some((at, lowest)) = minimum(pairs) {
            let (_, product) = parts(lowest);
            // The right symbol and its pair go; its left one takes the place.
            symbols.remove(at + 1);
            pairs.remove(at);
            if let Some(symbol) = symbols.get_mut(at) {
                *symbol = product;
            }
            if let (Some(entry), Some(&right)) = (pairs.get_mut(at), symbols.get(at + 1)) {
                *entry = known.of(tables, product, right);
            }
            let left = at.checked_sub(1);
            if let Some((index, &symbol)) = left.and_then(|i| Some((i, symbols.get(i)?)))
                && let Some(entry) = pairs.get_mut(index)
            {
                *entry = known.of(tables, symbol, product);
            }
        }
    }

    /// Merges a word of any length with a heap. An entry of the heap is stale when its rank is no
    /// longer that of the pair at its position. Every merge pushes at most two
    /// entries and takes one symbol away, so this ends.
    pub(super) fn merge_by_heap(&mut self, tables: &Tables<'_>) {
        self.link();
        while let Some(Reverse(entry)) = self.heap.pop() {
            let (lowest, at) = parts(entry);
            let at = at as usize;
            let Some(&pair) = self.pairs.get(at) else { continue };
            let (rank, product) = parts(pair);
            if rank != lowest || pair == NO_PAIR {
                continue;
            }
            let Some(next) = self.neighbour(&self.after, at) else { continue };
            set(&mut self.symbols, at, product);
            set(&mut self.pairs, next, NO_PAIR);
            let behind = self.after.get(next).copied().unwrap_or(NOWHERE);
            set(&mut self.after, at, behind);
            if behind != NOWHERE {
                set(&mut self.before, behind as usize, position(at));
            }
            // The symbol that was merged away is marked by pointing nowhere.
            set(&mut self.before, next, position(next));
            self.pair_again(tables, at);
            if let Some(left) = self.neighbour(&self.before, at) {
                self.pair_again(tables, left);
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

    /// Fills the lists and the heap from the symbols and their pairs.
    fn link(&mut self) {
        let count = position(self.symbols.len());
        self.before.clear();
        self.before.extend((0..count).map(|at| at.checked_sub(1).unwrap_or(NOWHERE)));
        self.after.clear();
        self.after.extend((1..=count).map(|next| if next < count { next } else { NOWHERE }));
        // The last symbol has a pair, too, from here on: none.
        self.pairs.resize(self.symbols.len(), NO_PAIR);
        let entries = self.pairs.iter().enumerate();
        let entries = entries.filter(|&(_, &pair)| pair != NO_PAIR);
        let mut list = std::mem::take(&mut self.heap).into_vec();
        list.clear();
        list.extend(entries.map(|(at, &pair)| Reverse(heap_entry(pair, at))));
        self.heap = BinaryHeap::from(list);
    }

    fn neighbour(&self, list: &[u32], at: usize) -> Option<usize> {
        let next = *list.get(at)?;
        (next != NOWHERE).then_some(next as usize)
    }

    fn pair_again(&mut self, tables: &Tables<'_>, at: usize) {
        let next = self.neighbour(&self.after, at).and_then(|next| self.symbols.get(next));
        let found = match (self.symbols.get(at), next) {
            (Some(&left), Some(&right)) => self.known.of(tables, left, right),
            _ => NO_PAIR,
        };
        set(&mut self.pairs, at, found);
        if found != NO_PAIR {
            self.heap.push(Reverse(heap_entry(found, at)));
        }
    }
}

/// An entry of the heap for the pair at a position.
fn heap_entry(pair: u64, at: usize) -> u64 {
    (pair & !u64::from(u32::MAX)) | at as u64
}

/// A position in a word as the lists hold it.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a word has at most PRETOKEN_BYTES_MAX symbols"
)]
fn position(at: usize) -> u32 {
    at as u32
}

/// The upper and the lower half of a number.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the halves of a u64 are taken apart")]
fn parts(number: u64) -> (u32, u32) {
    ((number >> 32) as u32, number as u32)
}

fn set<T>(list: &mut [T], at: usize, value: T) {
    if let Some(entry) = list.get_mut(at) {
        *entry = value;
    }
}

/// The leftmost of the lowest pairs, if there is one. Pairs of equal rank are
/// equal.
#[inline]
fn minimum(pairs: &[u64]) -> Option<(usize, u64)> {
    let mut best = (0, NO_PAIR);
    for (at, &pair) in pairs.iter().enumerate() {
        if pair < best.1 {
            best = (at, pair);
        }
    }
    (best.1 != NO_PAIR).then_some(best)
}

/// The pair of a key and its mixed hash, or [`NO_PAIR`].
#[inline]
fn pair(tables: &Tables<'_>, key: u64, hash: u64) -> u64 {
    let slots = tables.merge_slots.len() / MERGE_SLOT;
    let place = perfect_hash::locate(hash, tables.merge_pilots, slots);
    let slot = tables.merge_slots.get(place * MERGE_SLOT..);
    let Some(&[lower, upper, product]) = slot.and_then(<[u32]>::first_chunk) else {
        return NO_PAIR;
    };
    let found = u64::from(lower) | (u64::from(upper) << 32);
    // All but the rank: the bits above it are set in a slot that is not used.
    if (found ^ key) & !(RANK_MASK << RANK_SHIFT) != 0 {
        return NO_PAIR;
    }
    (((found >> RANK_SHIFT) & RANK_MASK) << 32) | u64::from(product)
}
