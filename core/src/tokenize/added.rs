//! Added tokens: strings that become one token wherever they occur.
//!
//! First stage of tokenizing, before normalizing and splitting. The match that
//! starts first wins, and of those the longest, as in HF's added vocabulary.
//!
//! # Terms
//!
//! - *trie*: node `n` is three numbers at `3 * n`: its first edge, its number
//!   of edges, and the token that ends here or [`NO_TOKEN`]. An edge is a byte
//!   in the low 8 bits and the node it leads to above; the edges of a node are
//!   sorted by byte. Node 0 is the root.

use super::file::{NO_TOKEN, Trie};
use crate::ids::TokenId;
use crate::limits::ADDED_TOKEN_BYTES_MAX;

/// A match of an added token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Match {
    pub(crate) token: TokenId,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// Which bytes can start an added token, so that all others cost one look.
pub(crate) struct FirstBytes {
    flags: [bool; 256],
    /// Each of them eight times over, if they are few.
    few: Option<[u64; FEW]>,
}

/// First bytes that are looked for eight bytes at a time.
const FEW: usize = 4;

/// A one, and the highest bit, in each byte.
const ONES: u64 = u64::MAX / 0xFF;
const HIGHS: u64 = ONES << 7;

impl FirstBytes {
    /// Whether an added token starts with `byte`.
    #[inline]
    pub(crate) fn contains(&self, byte: u8) -> bool {
        self.flags.get(usize::from(byte)) == Some(&true)
    }

    /// Where the first of them is in `text`.
    pub(crate) fn find(&self, text: &[u8]) -> Option<usize> {
        let mut passed = 0;
        if let Some(few) = &self.few {
            let (words, _) = text.as_chunks::<8>();
            let found = words.iter().position(|word| {
                let word = u64::from_le_bytes(*word);
                // A byte of `x` is zero where the two agree.
                few.iter().any(|sought| {
                    let x = word ^ sought;
                    x.wrapping_sub(ONES) & !x & HIGHS != 0
                })
            });
            passed = found.unwrap_or(words.len()) * 8;
        }
        let rest = text.get(passed..)?;
        rest.iter().position(|&byte| self.contains(byte)).map(|at| passed + at)
    }
}

/// How far a search went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Searched {
    /// The first match, if one was found.
    pub(crate) found: Option<Match>,
    /// Everything before this was searched: where to go on if none was found.
    pub(crate) until: usize,
    /// Bytes looked at.
    pub(crate) steps: usize,
}

/// The bytes that the root of `trie` has an edge for.
pub(crate) fn first_bytes(trie: Trie<'_>) -> FirstBytes {
    let mut flags = [false; 256];
    let edges = node(trie, 0).map_or(&[][..], |node| node.edges);
    let mut few = [0; FEW];
    for (index, &edge) in edges.iter().enumerate() {
        let byte = edge & 0xFF;
        if let Some(flag) = flags.get_mut(byte as usize) {
            *flag = true;
        }
        // Those that are not needed are the same as the last.
        few.iter_mut().skip(index).for_each(|sought| *sought = u64::from(byte) * ONES);
    }
    let few = (1..=FEW).contains(&edges.len()).then_some(few);
    FirstBytes { flags, few }
}

/// Searches `text` from `from` on for the first added token that starts before
/// `stop`.
///
/// `stop` bounds the work of one call, not the length of a match. Looks at no
/// more than `stop - from` starts of at most [`ADDED_TOKEN_BYTES_MAX`] bytes.
pub(crate) fn search(
    trie: Trie<'_>,
    first: &FirstBytes,
    text: &[u8],
    from: usize,
    stop: usize,
) -> Searched {
    let stop = stop.min(text.len());
    let mut steps = 0;
    let mut start = from;
    while let Some(tail) = text.get(start..stop) {
        let next = first.find(tail);
        let Some(skipped) = next else { break };
        start += skipped;
        let rest = text.get(start..).unwrap_or_default();
        let walk = walk(trie, rest);
        steps += walk.depth;
        if let Some((token, len)) = walk.longest {
            let found = Some(Match { token, start, end: start + len });
            return Searched { found, until: start, steps: steps + start - from };
        }
        start += 1;
    }
    Searched { found: None, until: stop.max(from), steps: steps + stop.saturating_sub(from) }
}

/// How far `text` agrees with some added token.
struct Walk {
    /// The longest token that it starts with, and its bytes.
    longest: Option<(TokenId, usize)>,
    /// Bytes that agree.
    depth: usize,
    /// Whether a longer text could agree further.
    goes_on: bool,
}

/// Follows the trie along `text`.
fn walk(trie: Trie<'_>, text: &[u8]) -> Walk {
    let mut longest = None;
    let mut edges = node(trie, 0).map_or(&[][..], |node| node.edges);
    let mut depth = 0;
    for &byte in text.iter().take(ADDED_TOKEN_BYTES_MAX) {
        let found = edges.binary_search_by_key(&u32::from(byte), |edge| edge & 0xFF);
        let Some(&edge) = found.ok().and_then(|index| edges.get(index)) else { break };
        let Some(next) = node(trie, (edge >> 8) as usize) else { break };
        depth += 1;
        if let Some(token) = next.token {
            longest = Some((token, depth));
        }
        edges = next.edges;
    }
    Walk { longest, depth, goes_on: !edges.is_empty() }
}

/// Bytes of `text` that have to be known to tell which added tokens it starts
/// with: those that agree with one of them and the next one, unless nothing
/// could follow. One more than there are if the end is what counts.
pub(crate) fn agreement(trie: Trie<'_>, text: &[u8]) -> usize {
    let walk = walk(trie, text);
    walk.depth + usize::from(walk.goes_on)
}

struct Node<'a> {
    edges: &'a [u32],
    token: Option<TokenId>,
}

#[inline]
fn node(trie: Trie<'_>, index: usize) -> Option<Node<'_>> {
    let fields = trie.nodes.get(index.checked_mul(3)?..)?;
    let [first, count, token] = *fields.first_chunk()?;
    let first = first as usize;
    let edges = trie.edges.get(first..first.checked_add(count as usize)?)?;
    Some(Node { edges, token: (token != NO_TOKEN).then_some(token) })
}

/// Checks that every node and edge of a trie leads somewhere.
pub(crate) fn check(trie: Trie<'_>) -> Option<()> {
    let nodes = trie.nodes.len() / 3;
    let whole = nodes * 3 == trie.nodes.len() && nodes > 0;
    let edges_lead = trie.edges.iter().all(|&edge| ((edge >> 8) as usize) < nodes);
    let sorted = (0..nodes).all(|index| {
        node(trie, index).is_some_and(|node| node.edges.is_sorted_by(|a, b| a & 0xFF < b & 0xFF))
    });
    (whole && edges_lead && sorted).then_some(())
}
