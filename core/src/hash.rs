//! Hash: tokens to block hashes to sequence hashes.
//!
//! Fourth stage of the request path; the sidecar runs the same code over the
//! tokens inside stored events, so this is the only definition of a sequence
//! hash in the project. The scheme is Dynamo's router's (1.6.1), so that an
//! index filled from Dynamo's own `tokens_hash` values agrees as well.
//!
//! # Terms
//!
//! - *block*: `block_size` consecutive tokens. A shorter tail is not a block.
//! - *salt*: what must separate caches: the LoRA adapter and the cache salt.
//! - *block hash*: XXH3-64 of the block's tokens, each as u32 little endian,
//!   seeded by the salt.
//! - *sequence hash*: the first block's hash; from then on XXH3-64 of the
//!   previous sequence hash and the block's hash, both as u64 little endian,
//!   under a fixed seed.
//!
//! # Invariants
//!
//! 1. Same tokens, same salt, same hashes on every target: nothing hashed here
//!    depends on the width of a pointer or the order of bytes in memory.
//! 2. The chain's seed does not depend on the salt, which entered through the
//!    first block's hash.
//!
//! Where tokens come from is not known here.

use core::ops::Range;
use std::borrow::Cow;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::ids::{BlockHash, SequenceHash, TokenId};
use crate::limits::PROMPT_BLOCKS_MAX;

/// Seed of unsalted block hashes and of every chained hash.
const BASE_SEED: u64 = 1337;

/// What separates the caches of otherwise equal prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Salt<'a> {
    /// Name of the LoRA adapter. Absent and empty mean the same.
    pub lora: Option<&'a str>,
    /// Cache salt (cache namespace). Absent and empty mean the same.
    pub cache_salt: Option<&'a str>,
}

impl Salt<'_> {
    /// The seed of block hashes under this salt.
    ///
    /// Adapter and cache salt use different inner seeds, so that an adapter
    /// and a cache salt of the same name do not share a cache.
    #[must_use]
    pub fn seed(&self) -> u64 {
        let part = |text: Option<&str>, inner_seed| match text {
            Some(text) if !text.is_empty() => xxh3_64_with_seed(text.as_bytes(), inner_seed),
            _ => 0,
        };
        BASE_SEED.wrapping_add(part(self.lora, 0)).wrapping_add(part(self.cache_salt, 1))
    }
}

/// How tokens are cut into blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockShape {
    /// Tokens from one block's start to the next one's.
    pub block_size: u32,
    /// Whether each block also covers the token after it, as the draft models
    /// of eagle-style speculative decoding see it.
    pub eagle: bool,
}

impl BlockShape {
    /// Tokens that one block's hash covers.
    fn window(self) -> usize {
        self.block_size as usize + usize::from(self.eagle)
    }

    /// Number of complete blocks in a prompt of `tokens` tokens. Zero for a
    /// block size of zero.
    #[must_use]
    pub fn blocks(self, tokens: usize) -> usize {
        let tokens = if self.eagle { tokens.saturating_sub(1) } else { tokens };
        tokens.checked_div(self.block_size as usize).unwrap_or(0)
    }
}

/// Hashes one block.
///
/// - `tokens`: the tokens that the block's hash covers.
/// - `seed`: [`Salt::seed`] of the prompt.
#[must_use]
pub fn block_hash(tokens: &[TokenId], seed: u64) -> BlockHash {
    BlockHash(xxh3_64_with_seed(&le_bytes(tokens), seed))
}

/// Tokens as they are hashed: where memory is little endian, they lie there so.
fn le_bytes(tokens: &[TokenId]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        Cow::Borrowed(bytemuck::cast_slice(tokens))
    } else {
        tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
    }
}

/// Hashes one block that carries multimodal objects: the tokens are followed
/// by the objects' hashes in ascending order. Without objects it equals
/// [`block_hash`].
#[must_use]
pub fn block_hash_with_objects(tokens: &[TokenId], object_hashes: &[u64], seed: u64) -> BlockHash {
    let mut sorted = object_hashes.to_vec();
    sorted.sort_unstable();
    let mut bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    bytes.extend(sorted.iter().flat_map(|hash| hash.to_le_bytes()));
    BlockHash(xxh3_64_with_seed(&bytes, seed))
}

/// Chains a block's hash to what precedes it.
///
/// - `parent`: sequence hash of the block before; `None` for a prompt's first.
#[must_use]
pub fn sequence_hash(parent: Option<SequenceHash>, block: BlockHash) -> SequenceHash {
    let Some(parent) = parent else {
        return SequenceHash(block.0);
    };
    let mut bytes = [0_u8; 16];
    let (first, second) = bytes.split_at_mut(8);
    first.copy_from_slice(&parent.0.to_le_bytes());
    second.copy_from_slice(&block.0.to_le_bytes());
    SequenceHash(xxh3_64_with_seed(&bytes, BASE_SEED))
}

/// Appends the sequence hashes of a prompt's complete blocks to `out`.
///
/// - `tokens`: the whole prompt. The tail that fills no block is left out.
/// - `shape`: how the serving engine cuts blocks.
/// - `salt`: of the prompt.
///
/// Returns whether the prompt was cut at [`PROMPT_BLOCKS_MAX`] blocks: the
/// hashes that were appended are right, later blocks are unknown.
pub fn sequence_hashes(
    tokens: &[TokenId],
    shape: BlockShape,
    salt: Salt<'_>,
    out: &mut Vec<SequenceHash>,
) -> bool {
    let blocks = shape.blocks(tokens.len());
    let taken = blocks.min(PROMPT_BLOCKS_MAX);
    append(tokens, shape, salt.seed(), 0..taken, None, out);
    taken < blocks
}

/// Appends the next sequence hashes of a prompt whose first ones are all of
/// `out`, so that a long prompt can be hashed a part at a time.
///
/// - `seed`: [`Salt::seed`] of the prompt.
/// - `blocks_max`: most blocks that are hashed now.
///
/// Returns whether no more are to come; `out` is then what [`sequence_hashes`]
/// appends.
pub fn next_sequence_hashes(
    tokens: &[TokenId],
    shape: BlockShape,
    seed: u64,
    blocks_max: usize,
    out: &mut Vec<SequenceHash>,
) -> bool {
    let taken = shape.blocks(tokens.len()).min(PROMPT_BLOCKS_MAX);
    let done = out.len();
    let end = taken.min(done.saturating_add(blocks_max));
    append(tokens, shape, seed, done..end, out.last().copied(), out);
    end >= taken
}

/// - `parent`: the hash of the block before the range.
fn append(
    tokens: &[TokenId],
    shape: BlockShape,
    seed: u64,
    blocks: Range<usize>,
    mut parent: Option<SequenceHash>,
    out: &mut Vec<SequenceHash>,
) {
    out.reserve(blocks.len());
    for block in blocks {
        let start = block * shape.block_size as usize;
        let Some(window) = tokens.get(start..start + shape.window()) else {
            break;
        };
        let hash = sequence_hash(parent, block_hash(window, seed));
        out.push(hash);
        parent = Some(hash);
    }
}

#[cfg(test)]
mod tests;
