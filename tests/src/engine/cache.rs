//! Cache: the paged prefix cache of one engine.
//!
//! Follows vLLM's block pool (0.31) closely enough that a router's prediction
//! can be compared with what this cache reports:
//!
//! - A block of `block_size` tokens is shared once it is full. Its hash covers
//!   everything before it, so equal hashes mean equal prefixes.
//! - At least the last prompt token is always computed. A prompt that is held
//!   completely and fills exactly `n` blocks therefore reports `n - 1` blocks:
//!   hits are sought among the first `(prompt_tokens - 1) / block_size` blocks
//!   only. Whoever predicts must apply the same rule.
//! - The block that is computed again is *not* merged with the one that is
//!   already held: two physical blocks then carry one hash, two `Stored` are
//!   announced, and the content is gone only after two `Removed`.
//! - Generated tokens fill blocks too. The last generated token is never fed
//!   back, so it has no entry: `prompt + output - 1` tokens are computed.
//! - Blocks without a user keep their content and wait in one queue, least
//!   recently used first. A finished request returns its blocks tail first, so
//!   tails are evicted before the prefixes they extend.
//!
//! Differences to vLLM, on purpose: no null block (a budget of `n` is `n` usable
//! blocks), and no preemption: a request is admitted only if its longest
//! possible answer fits, and waits otherwise.
//!
//! Time, sockets and tokens' meaning are not known here.

#![expect(clippy::indexing_slicing, reason = "a block id is made here and never outlives the list")]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::mem;

use sha2::{Digest, Sha256};

/// The engine's own name of a block's content, prefix included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EngineHash(pub [u8; 32]);

/// What separates the caches of otherwise equal prompts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheKeys {
    /// Name of the LoRA adapter; part of every block's hash.
    pub lora_name: Option<String>,
    /// Salt sent by the client; part of the first block's hash, and so of all.
    pub cache_salt: Option<String>,
}

/// A change of the cache, in the order it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheEvent {
    /// Full blocks of one request became findable.
    Stored {
        /// Hash of the block before the first one; `None` at a prompt's start.
        parent: Option<EngineHash>,
        /// One hash per block.
        hashes: Vec<EngineHash>,
        /// The blocks' tokens, `hashes.len() * block_size` of them.
        tokens: Vec<u32>,
        /// What was hashed beside the tokens.
        keys: CacheKeys,
    },
    /// A block was taken for other content.
    Removed {
        /// Its hash.
        hash: EngineHash,
    },
    /// All content was dropped.
    Cleared,
}

/// Why a request cannot enter the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdmitError {
    /// It would not fit an empty cache. It never will.
    TooLong,
    /// Running requests hold too many blocks. Worth another try once one of
    /// them has finished.
    Full,
}

/// Place of a block in the pool.
type BlockId = usize;

/// One physical block.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    /// Content, once full.
    hash: Option<EngineHash>,
    /// Running requests that use it.
    references: u32,
    /// Its place in the queue of unused blocks; meaningless while used.
    stamp: u64,
}

/// The blocks and tokens of one running request.
///
/// Must be handed back with [`PrefixCache::finish`]; there is no way for the
/// cache to notice that it was dropped.
#[derive(Debug)]
pub struct Sequence {
    tokens: Vec<u32>,
    blocks: Vec<BlockId>,
    hashes: Vec<EngineHash>,
    keys: CacheKeys,
    /// Blocks that this request may still take.
    reserved: usize,
    cached_tokens: usize,
}

impl Sequence {
    /// Prompt tokens that were found in the cache, in tokens.
    #[must_use]
    pub fn cached_tokens(&self) -> usize {
        self.cached_tokens
    }

    /// Blocks in use, in blocks.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }
}

/// All blocks of one engine.
#[derive(Debug)]
pub struct PrefixCache {
    block_size: usize,
    blocks: Vec<Block>,
    /// Unused blocks, the next victim first.
    unused: BTreeMap<u64, BlockId>,
    by_hash: HashMap<EngineHash, BTreeSet<BlockId>>,
    stamp: u64,
    /// Unused blocks promised to running requests.
    reserved: usize,
    /// Admitted and not finished.
    running: usize,
    events: Vec<CacheEvent>,
}

impl PrefixCache {
    /// An empty cache of `blocks` blocks of `block_size` tokens (at least 1).
    #[must_use]
    pub fn new(block_size: usize, blocks: usize) -> Self {
        Self {
            block_size: block_size.max(1),
            blocks: vec![Block::default(); blocks],
            unused: (0_u64..).zip(0..blocks).collect(),
            by_hash: HashMap::new(),
            stamp: blocks as u64,
            reserved: 0,
            running: 0,
            events: Vec::new(),
        }
    }

    /// Tokens per block.
    #[must_use]
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// All blocks, used or not.
    #[must_use]
    pub fn blocks_total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that running requests use.
    #[must_use]
    pub fn blocks_used(&self) -> usize {
        self.blocks.len() - self.unused.len()
    }

    /// Blocks with content that can be found, used or not. Duplicates count.
    #[must_use]
    pub fn blocks_cached(&self) -> usize {
        self.by_hash.values().map(BTreeSet::len).sum()
    }

    /// Prompt tokens that [`Self::admit`] would find cached now.
    #[must_use]
    pub fn cached_tokens(&self, prompt: &[u32], keys: &CacheKeys) -> usize {
        self.find_prefix(prompt, keys).0.len() * self.block_size
    }

    /// Lets a request in: finds its cached prefix, takes blocks for the rest of
    /// its prompt and announces them.
    ///
    /// - `prompt`: all prompt tokens.
    /// - `output_tokens_max`: the most tokens that will be generated. Room for
    ///   them is promised now and taken as they come.
    ///
    /// # Errors
    ///
    /// [`AdmitError`]; the cache is unchanged then.
    pub fn admit(
        &mut self,
        prompt: &[u32],
        output_tokens_max: usize,
        keys: CacheKeys,
    ) -> Result<Sequence, AdmitError> {
        let computed_tokens_max = prompt.len() + output_tokens_max.saturating_sub(1);
        let blocks_max = computed_tokens_max.div_ceil(self.block_size);
        if blocks_max > self.blocks.len() {
            return Err(AdmitError::TooLong);
        }
        let (hits, hashes) = self.find_prefix(prompt, &keys);
        let unused_hits = hits.iter().filter(|&&block| self.blocks[block].references == 0).count();
        let new_blocks_max = blocks_max - hits.len();
        if new_blocks_max + unused_hits > self.unused.len().saturating_sub(self.reserved) {
            return Err(AdmitError::Full);
        }

        for &block in &hits {
            self.reference(block);
        }
        let prompt_blocks = prompt.len().div_ceil(self.block_size);
        let mut sequence = Sequence {
            tokens: prompt.to_vec(),
            cached_tokens: hits.len() * self.block_size,
            reserved: blocks_max - hits.len(),
            blocks: hits,
            hashes,
            keys,
        };
        self.reserved += sequence.reserved;
        self.running += 1;
        while sequence.blocks.len() < prompt_blocks {
            self.take_block(&mut sequence);
        }
        self.store_full_blocks(&mut sequence);
        Ok(sequence)
    }

    /// Adds a generated token that the engine has fed back, so that its entry
    /// exists. A token beyond what [`Self::admit`] promised is ignored and
    /// `false` is returned.
    pub fn extend(&mut self, sequence: &mut Sequence, token: u32) -> bool {
        if sequence.tokens.len() == sequence.blocks.len() * self.block_size {
            if sequence.reserved == 0 {
                return false;
            }
            self.take_block(sequence);
        }
        sequence.tokens.push(token);
        self.store_full_blocks(sequence);
        true
    }

    /// Takes a request's blocks back. Their content stays until evicted.
    pub fn finish(&mut self, sequence: Sequence) {
        self.reserved -= sequence.reserved;
        self.running -= 1;
        for &block in sequence.blocks.iter().rev() {
            let entry = &mut self.blocks[block];
            entry.references -= 1;
            if entry.references == 0 {
                entry.stamp = self.stamp;
                self.unused.insert(self.stamp, block);
                self.stamp += 1;
            }
        }
    }

    /// Drops all content and announces it. Refused, with `false`, while a
    /// request runs, as vLLM refuses to reset its prefix cache then.
    pub fn clear(&mut self) -> bool {
        if self.running > 0 {
            return false;
        }
        self.forget();
        self.events.push(CacheEvent::Cleared);
        true
    }

    /// Drops all content without a word, as a process that dies does. Running
    /// requests keep their blocks.
    pub fn forget(&mut self) {
        self.by_hash.clear();
        for block in &mut self.blocks {
            block.hash = None;
        }
        self.events.clear();
    }

    /// Everything that happened since the last call, in order.
    pub fn take_events(&mut self) -> Vec<CacheEvent> {
        mem::take(&mut self.events)
    }

    /// The longest cached prefix: its blocks and their hashes.
    fn find_prefix(&self, prompt: &[u32], keys: &CacheKeys) -> (Vec<BlockId>, Vec<EngineHash>) {
        // The last token is always computed, hence the minus one.
        let findable = prompt.len().saturating_sub(1) / self.block_size;
        let mut blocks = Vec::new();
        let mut hashes = Vec::new();
        for tokens in prompt.chunks_exact(self.block_size).take(findable) {
            let hash = block_hash(hashes.last(), tokens, keys);
            let Some(&block) = self.by_hash.get(&hash).and_then(BTreeSet::first) else {
                break;
            };
            blocks.push(block);
            hashes.push(hash);
        }
        (blocks, hashes)
    }

    /// Marks a block as used by one more request.
    fn reference(&mut self, block: BlockId) {
        let entry = &mut self.blocks[block];
        if entry.references == 0 {
            self.unused.remove(&entry.stamp);
        }
        entry.references += 1;
    }

    /// Gives `sequence` the least recently used block, whose content goes.
    /// One must be reserved for it.
    fn take_block(&mut self, sequence: &mut Sequence) {
        let Some((_, block)) = self.unused.pop_first() else {
            debug_assert!(false, "a reserved block was not there");
            return;
        };
        sequence.reserved -= 1;
        self.reserved -= 1;
        if let Some(hash) = self.blocks[block].hash.take() {
            if let Some(holders) = self.by_hash.get_mut(&hash) {
                holders.remove(&block);
                if holders.is_empty() {
                    self.by_hash.remove(&hash);
                }
            }
            self.events.push(CacheEvent::Removed { hash });
        }
        self.blocks[block].references = 1;
        sequence.blocks.push(block);
    }

    /// Makes the blocks that have become full findable and announces them.
    fn store_full_blocks(&mut self, sequence: &mut Sequence) {
        let full = sequence.tokens.len() / self.block_size;
        let stored = sequence.hashes.len();
        if full <= stored {
            return;
        }
        let parent = sequence.hashes.last().copied();
        for index in stored..full {
            let tokens = &sequence.tokens[index * self.block_size..(index + 1) * self.block_size];
            let hash = block_hash(sequence.hashes.last(), tokens, &sequence.keys);
            let block = sequence.blocks[index];
            self.blocks[block].hash = Some(hash);
            self.by_hash.entry(hash).or_default().insert(block);
            sequence.hashes.push(hash);
        }
        self.events.push(CacheEvent::Stored {
            parent,
            hashes: sequence.hashes[stored..].to_vec(),
            tokens: sequence.tokens[stored * self.block_size..full * self.block_size].to_vec(),
            keys: sequence.keys.clone(),
        });
    }
}

/// Names of a prompt's complete blocks, in order.
#[must_use]
pub fn block_hashes(prompt: &[u32], block_size: usize, keys: &CacheKeys) -> Vec<EngineHash> {
    let mut hashes = Vec::with_capacity(prompt.len() / block_size.max(1));
    for tokens in prompt.chunks_exact(block_size.max(1)) {
        hashes.push(block_hash(hashes.last(), tokens, keys));
    }
    hashes
}

/// Names a block: SHA-256 over its parent's name, its tokens as u32 little
/// endian, the adapter, and, in a first block, the salt. Lengths are hashed
/// too, so that no two inputs run into each other.
fn block_hash(parent: Option<&EngineHash>, tokens: &[u32], keys: &CacheKeys) -> EngineHash {
    let mut state = Sha256::new();
    state.update(parent.map_or([0; 32], |hash| hash.0));
    state.update((tokens.len() as u64).to_le_bytes());
    for token in tokens {
        state.update(token.to_le_bytes());
    }
    let salt = keys.cache_salt.as_deref().filter(|_| parent.is_none());
    for text in [keys.lora_name.as_deref(), salt] {
        let text = text.unwrap_or_default();
        state.update((text.len() as u64).to_le_bytes());
        state.update(text.as_bytes());
    }
    EngineHash(state.finalize().into())
}

#[cfg(test)]
mod tests;
