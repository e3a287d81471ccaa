//! Prefix: beginnings of texts that were tokenized before, with their tokens and
//! hashes, so that the next turn of a conversation costs only that turn.
//!
//! Between `render` and `tokenize`: a rendered prompt is looked up here first,
//! tokenized from where the known beginning ends, and remembered for the next.
//!
//! # Terms
//!
//! - *chunk*: a stretch of text between two borders of the tokenizer
//!   ([`Border`]), at least [`PREFIX_CHUNK_BYTES`] long, and the few bytes behind
//!   it that the second border depends on.
//! - *node*: a chunk, its tokens, and the node of the text before it: beginnings
//!   that several texts share are held once.
//! - *leaf*: a node that no other one continues.
//! - *window*: the first [`PREFIX_CHUNK_BYTES`] of a chunk, by which it is found.
//! - *scope*: the tokenizer and the salt of a prompt. Scopes share nothing: tokens
//!   depend on the one, hashes on both, and how fast an answer comes must not
//!   tell one tenant what another one has sent.
//!
//! # Invariants
//!
//! 1. A hit is a comparison of the whole text, chunk by chunk. Hashes only say
//!    where to look: who makes two windows collide gets a miss, no foreign
//!    tokens.
//! 2. Memory is bounded by what the configuration says.
//! 3. Remembering a chunk forgets at most [`PREFIX_EVICTIONS_MAX`] others; each
//!    takes constant time. What was used last is kept longest, and a node at least
//!    as long as those that continue it.
//!
//! What tokens mean, and when a text is worth looking up, is not known here.

use hashbrown::HashTable;

use crate::hash::BlockShape;
use crate::ids::{SequenceHash, TokenId};
use crate::limits::{
    PREFIX_CHUNK_BYTES, PREFIX_COLLISIONS_MAX, PREFIX_EVICTIONS_MAX, PREFIX_LOOK_AHEAD_MAX,
    PREFIX_NODE_BYTES_MAX,
};
use crate::tokenize::Border;

mod leaves;
mod window;

use leaves::{Leaves, Links};

/// What separates texts from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scope {
    /// A number that no other tokenizer of the VM has or had.
    pub tokenizer: u32,
    /// [`Salt::seed`](crate::hash::Salt::seed) of the prompt.
    pub seed: u64,
}

/// Sums since the cache was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixCounters {
    /// Texts that were looked up.
    pub lookups: u64,
    /// Of those, texts whose beginning was known.
    pub hits: u64,
    /// Bytes of text that were not tokenized again.
    pub bytes_saved: u64,
    /// Chunks forgotten for want of room.
    pub evicted: u64,
    /// Chunks not remembered: too large, or too many with the same window.
    pub refused: u64,
}

/// How far a text is known here. Stays of use while others are added and
/// forgotten.
#[derive(Clone, Copy, Debug)]
pub struct Trail {
    scope: Scope,
    /// The last node of the text; `None` before the first.
    node: Option<Place>,
    border: Border,
    /// Whether nothing can be added any more.
    is_closed: bool,
}

impl Trail {
    /// Where the text is known to.
    #[must_use]
    pub fn border(&self) -> Border {
        self.border
    }

    /// Whether more of the text can be remembered.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.is_closed
    }
}

/// A node, as long as nothing else is in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    index: u32,
    generation: u32,
}

/// Sequence hashes of the blocks that end in one chunk.
#[derive(Debug)]
struct Chain {
    shape: BlockShape,
    hashes: Box<[SequenceHash]>,
}

#[derive(Debug)]
struct Node {
    scope: Scope,
    parent: Option<u32>,
    /// No other use of any place has the same; 0 while nothing is in the place.
    generation: u32,
    /// Nodes that continue this one.
    children: u32,
    links: Links,
    /// The look-up that used it last.
    used_at: u64,
    key: u64,
    /// Bytes of `text` that its tokens stand for; the others lie behind.
    chunk_bytes: usize,
    text: Box<[u8]>,
    tokens: Box<[TokenId]>,
    chain: Option<Chain>,
}

impl Node {
    /// Bytes of memory, about: allocations round up, and the table has an entry.
    fn bytes(&self) -> usize {
        const ALLOCATION_BYTES: usize = 16;
        let hashes = self.chain.as_ref().map_or(0, |chain| chain.hashes.len());
        size_of::<Self>()
            + 4 * ALLOCATION_BYTES
            + self.text.len()
            + self.tokens.len() * size_of::<TokenId>()
            + hashes * size_of::<SequenceHash>()
    }

    fn continues(&self, scope: Scope, parent: Option<u32>, rest: &[u8]) -> bool {
        self.parent == parent && self.scope == scope && window::starts_with(rest, &self.text)
    }
}

/// The beginnings of texts of one VM.
#[derive(Debug, Default)]
pub struct PrefixCache {
    bytes_max: usize,
    /// Makes windows collide in ways that no client can work out.
    seed: u64,
    bytes: usize,
    nodes: Vec<Node>,
    /// Places of nodes that were forgotten.
    free: Vec<u32>,
    by_window: HashTable<u32>,
    leaves: Leaves,
    /// Uses of places so far; goes on when everything is forgotten, so that no trail
    /// of before fits a node of later.
    generations: u32,
    lookups: u64,
    counters: PrefixCounters,
}

impl PrefixCache {
    /// An empty cache.
    ///
    /// - `bytes_max`: most bytes of memory, about; 0 remembers nothing.
    /// - `seed`: of hashes, drawn at random.
    #[must_use]
    pub fn new(bytes_max: usize, seed: u64) -> Self {
        Self { bytes_max, seed, ..Self::default() }
    }

    /// Changes how much is kept. What is too much by then is forgotten bit by bit.
    pub fn set_bytes_max(&mut self, bytes_max: usize) {
        if bytes_max == 0 {
            let Self { counters, generations, lookups, .. } = *self;
            *self = Self { counters, generations, lookups, ..Self::new(0, self.seed) };
        }
        self.bytes_max = bytes_max;
    }

    /// Bytes of memory held, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Sums since the cache was made.
    #[must_use]
    pub fn counters(&self) -> PrefixCounters {
        self.counters
    }

    /// Finds how much of the beginning of `text` is known, and appends its tokens
    /// and the hashes of their blocks.
    ///
    /// - `shape`: how blocks are cut.
    /// - `tokens`: the tokens before the text. Hashes are appended only if there
    ///   are none, since they depend on those.
    /// - `hashes`: gets hashes of leading blocks of `tokens`; perhaps of fewer
    ///   than there are tokens for.
    ///
    /// # Cost
    ///
    /// About 0.1 µs per kilobyte that is known, and copying its tokens.
    pub fn find(
        &mut self,
        scope: Scope,
        text: &str,
        shape: BlockShape,
        tokens: &mut Vec<TokenId>,
        hashes: &mut Vec<SequenceHash>,
    ) -> Trail {
        let mut border = Border { at: 0, seen_to: 0, tokens: 0 };
        let mut last = None;
        let mut takes_hashes = tokens.is_empty() && hashes.is_empty();
        self.lookups += 1;
        while let Some(index) = self.child(scope, last, text, border.at) {
            let Some(node) = self.nodes.get_mut(index as usize) else { break };
            node.used_at = self.lookups;
            border.at += node.chunk_bytes;
            border.seen_to = border.seen_to.max(border.at - node.chunk_bytes + node.text.len());
            border.tokens += node.tokens.len();
            tokens.extend_from_slice(&node.tokens);
            match &node.chain {
                Some(chain) if takes_hashes && chain.shape == shape => {
                    hashes.extend_from_slice(&chain.hashes);
                }
                _ => takes_hashes = false,
            }
            last = Some(index);
        }
        let node = last.and_then(|index| self.place(index));
        if let Some(index) = last {
            self.leaves.touch(&mut self.nodes, index);
        }
        let is_on = self.bytes_max > 0;
        self.counters.lookups += u64::from(is_on);
        self.counters.hits += u64::from(last.is_some());
        self.counters.bytes_saved += border.at as u64;
        Trail { scope, node, border, is_closed: !is_on }
    }

    /// Remembers the text between the trail's border and a further one, and moves
    /// the trail there. Does nothing if there is too little text between them.
    ///
    /// - `text`: the text of the trail.
    /// - `tokens`: those of the text, up to `border` at least.
    pub fn remember(&mut self, trail: &mut Trail, text: &str, border: Border, tokens: &[TokenId]) {
        let known = trail.border;
        if trail.is_closed || border.at < known.at + PREFIX_CHUNK_BYTES {
            return;
        }
        let parent = match trail.node {
            None => None,
            Some(place) if self.place(place.index) == Some(place) => Some(place.index),
            // It was forgotten in between.
            Some(_) => {
                trail.is_closed = true;
                return;
            }
        };
        if border.seen_to > border.at + PREFIX_LOOK_AHEAD_MAX {
            return;
        }
        let (Some(part), Some(own), Some(key)) = (
            text.as_bytes().get(known.at..border.seen_to),
            tokens.get(known.tokens..border.tokens),
            self.key(trail.scope, parent, text, known.at),
        ) else {
            trail.is_closed = true;
            return;
        };
        let chunk_bytes = border.at - known.at;
        let same = |node: &&u32| {
            self.nodes.get(**node as usize).is_some_and(|node| {
                node.key == key
                    && node.chunk_bytes == chunk_bytes
                    && node.text.len() == part.len()
                    && node.continues(trail.scope, parent, part)
            })
        };
        let index = match self.by_window.iter_hash(key).find(same).copied() {
            Some(index) => Some(index),
            None => self.add(Node {
                scope: trail.scope,
                parent,
                generation: 0,
                children: 0,
                links: Links::default(),
                used_at: self.lookups,
                key,
                chunk_bytes,
                text: part.into(),
                tokens: own.into(),
                chain: None,
            }),
        };
        match index.and_then(|index| self.place(index)) {
            None => trail.is_closed = true,
            Some(place) => (trail.node, trail.border) = (Some(place), border),
        }
    }

    /// Remembers the hashes of a text's blocks for the nodes of its trail that
    /// have none of this shape.
    ///
    /// - `hashes`: of the leading blocks of the text, which has no tokens before
    ///   it.
    pub fn remember_hashes(&mut self, trail: &Trail, shape: BlockShape, hashes: &[SequenceHash]) {
        let Some(last) = trail.node.filter(|place| self.place(place.index) == Some(*place)) else {
            return;
        };
        let mut end = trail.border.tokens;
        let mut next = Some(last.index);
        while let Some(node) = next.and_then(|index| self.nodes.get(index as usize)) {
            if node.chain.as_ref().is_some_and(|chain| chain.shape == shape) {
                break;
            }
            let start = end.saturating_sub(node.tokens.len());
            let Some(own) = hashes.get(shape.blocks(start)..shape.blocks(end)) else { break };
            if !self.make_room(size_of_val(own), Some(last.index)) {
                break;
            }
            let Some(node) = next.and_then(|index| self.nodes.get_mut(index as usize)) else {
                break;
            };
            let before = node.bytes();
            node.chain = Some(Chain { shape, hashes: own.into() });
            self.bytes = self.bytes + node.bytes() - before;
            (end, next) = (start, node.parent);
        }
    }

    fn place(&self, index: u32) -> Option<Place> {
        let generation = self.nodes.get(index as usize)?.generation;
        Some(Place { index, generation })
    }

    /// By what a chunk that starts at `at` is found; `None` if there is too little
    /// text.
    fn key(&self, scope: Scope, parent: Option<u32>, text: &str, at: usize) -> Option<u64> {
        let window = text.as_bytes().get(at..)?.first_chunk()?;
        let salt = match parent {
            Some(parent) => u64::from(parent),
            None => scope.seed ^ (u64::from(scope.tokenizer) << 32) ^ u64::MAX,
        };
        Some(window::hash(window, self.seed ^ salt.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    /// The node that continues another one along `text`.
    fn child(&self, scope: Scope, parent: Option<u32>, text: &str, at: usize) -> Option<u32> {
        if self.by_window.is_empty() {
            return None;
        }
        let key = self.key(scope, parent, text, at)?;
        let rest = text.as_bytes().get(at..)?;
        let continues = |index: &&u32| {
            let node = self.nodes.get(**index as usize);
            node.is_some_and(|node| node.key == key && node.continues(scope, parent, rest))
        };
        self.by_window.iter_hash(key).find(continues).copied()
    }

    /// Adds a node; `None` if there is no room for it.
    fn add(&mut self, node: Node) -> Option<u32> {
        let (parent, key, bytes) = (node.parent, node.key, node.bytes());
        // What takes a good part of all room is not worth what it replaces.
        let is_small = bytes <= PREFIX_NODE_BYTES_MAX.min(self.bytes_max / 4);
        if !is_small || !self.make_way(key, parent) || !self.make_room(bytes, parent) {
            self.counters.refused += 1;
            return None;
        }
        self.generations = self.generations.wrapping_add(1);
        let node = Node { generation: self.generations, ..node };
        let index = match self.free.pop() {
            Some(index) => {
                *self.nodes.get_mut(index as usize)? = node;
                index
            }
            None => {
                let index = u32::try_from(self.nodes.len()).ok()?;
                self.nodes.push(node);
                index
            }
        };
        if let Some(parent) = parent {
            let is_leaf = self.nodes.get(parent as usize)?.children == 0;
            if is_leaf {
                self.leaves.remove(&mut self.nodes, parent);
            }
            self.nodes.get_mut(parent as usize)?.children += 1;
        }
        self.leaves.push_newest(&mut self.nodes, index);
        let nodes = &self.nodes;
        let rehash = |index: &u32| nodes.get(*index as usize).map_or(0, |node| node.key);
        self.by_window.insert_unique(key, index, rehash);
        self.bytes += bytes;
        Some(index)
    }

    /// Makes room by forgetting the leaves that were not used for longest; whether
    /// there is enough.
    ///
    /// - `kept`: is not forgotten.
    fn make_room(&mut self, bytes: usize, kept: Option<u32>) -> bool {
        for _ in 0..PREFIX_EVICTIONS_MAX {
            if self.bytes + bytes <= self.bytes_max {
                return true;
            }
            match self.leaves.oldest() {
                Some(oldest) if Some(oldest) != kept => self.evict(oldest),
                _ => return false,
            }
        }
        self.bytes + bytes <= self.bytes_max
    }

    /// Makes sure that few nodes have the key; whether one more may have it.
    ///
    /// - `kept`: is not forgotten.
    fn make_way(&mut self, key: u64, kept: Option<u32>) -> bool {
        let with_key = |index: u32| {
            let node = self.nodes.get(index as usize).filter(|node| node.key == key);
            node.map(|node| (index, node))
        };
        let alike = || self.by_window.iter_hash(key).filter_map(|index| with_key(*index));
        if alike().count() < PREFIX_COLLISIONS_MAX {
            return true;
        }
        let leaves = alike().filter(|(index, node)| node.children == 0 && Some(*index) != kept);
        let oldest = leaves.min_by_key(|(_, node)| node.used_at).map(|(index, _)| index);
        if let Some(oldest) = oldest {
            self.evict(oldest);
        }
        oldest.is_some()
    }

    fn evict(&mut self, leaf: u32) {
        self.forget(leaf);
        self.counters.evicted += 1;
    }

    /// Forgets a leaf. The node before it may become one.
    fn forget(&mut self, index: u32) {
        self.leaves.remove(&mut self.nodes, index);
        let Some(node) = self.nodes.get_mut(index as usize) else { return };
        let (key, parent, used_at, bytes) = (node.key, node.parent, node.used_at, node.bytes());
        node.generation = 0;
        (node.text, node.tokens, node.chain) = (Box::default(), Box::default(), None);
        self.bytes = self.bytes.saturating_sub(bytes);
        if let Ok(entry) = self.by_window.find_entry(key, |other| *other == index) {
            entry.remove();
        }
        self.free.push(index);
        let Some(parent) = parent else { return };
        let Some(node) = self.nodes.get_mut(parent as usize) else { return };
        node.children = node.children.saturating_sub(1);
        if node.children == 0 {
            // Only what was used on its own since then is younger than others.
            if node.used_at > used_at {
                self.leaves.push_newest(&mut self.nodes, parent);
            } else {
                self.leaves.push_oldest(&mut self.nodes, parent);
            }
        }
    }
}

#[cfg(test)]
mod tests;
