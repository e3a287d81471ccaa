//! What an engine sends: batches as vLLM 0.31 packs them, in a cycle that can be
//! repeated for ever while the cache stays at one size.
//!
//! Prompts are stored one after another, and the oldest is removed for each new
//! one. After a cycle the cache holds what it held before.

use std::collections::BTreeSet;

use bytes::Bytes;
use warmpath_core::hash::{BlockShape, Salt, sequence_hashes};
use warmpath_core::ids::SequenceHash;

/// Tokens of a block.
pub(crate) const BLOCK_SIZE: u32 = 16;

/// Blocks of a prompt.
pub(crate) const PROMPT_BLOCKS: usize = 8;

/// Prompts of a cycle.
const PROMPTS: usize = 8_192;

/// Prompts that are cached at a time.
const PROMPTS_HELD: usize = 6_144;

/// Blocks that the cache has room for, as the worker list says.
pub(crate) const CACHE_BLOCKS: u64 = 65_536;

/// Tokens in the vocabulary: most take five bytes in a message, as Qwen's do.
const VOCABULARY: u64 = 151_936;

/// How an engine packs its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// A prompt's eight blocks in one batch, and as many removals.
    Prefill,
    /// One block a batch.
    Decode,
}

impl Form {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Prefill => "batches_of_8",
            Self::Decode => "single_blocks",
        }
    }
}

/// The messages of one engine.
pub(crate) struct Traffic {
    pub(crate) form: Form,
    /// Fills the cache.
    pub(crate) first: Vec<Bytes>,
    /// Stores and removals, as many of each; can be repeated.
    pub(crate) cycle: Vec<Bytes>,
    /// Block events in `first`, and in `cycle`.
    pub(crate) first_events: u64,
    pub(crate) cycle_events: u64,
    /// What is held after `first`, and after each cycle.
    pub(crate) held: BTreeSet<SequenceHash>,
}

impl Traffic {
    pub(crate) fn new(form: Form) -> Self {
        let mut first = Vec::new();
        for prompt in PROMPTS - PROMPTS_HELD..PROMPTS {
            store(form, prompt, &mut first);
        }
        let mut cycle = Vec::new();
        for prompt in 0..PROMPTS {
            store(form, prompt, &mut cycle);
            remove(form, (prompt + PROMPTS - PROMPTS_HELD) % PROMPTS, &mut cycle);
        }
        let shape = BlockShape { block_size: BLOCK_SIZE, eagle: false };
        let mut held = Vec::new();
        for prompt in PROMPTS - PROMPTS_HELD..PROMPTS {
            sequence_hashes(&tokens(prompt), shape, Salt::default(), &mut held);
        }
        Self {
            form,
            first,
            cycle,
            first_events: (PROMPTS_HELD * PROMPT_BLOCKS) as u64,
            cycle_events: (2 * PROMPTS * PROMPT_BLOCKS) as u64,
            held: held.into_iter().collect(),
        }
    }
}

fn store(form: Form, prompt: usize, out: &mut Vec<Bytes>) {
    let (blocks, tokens) = (names(prompt), tokens(prompt));
    match form {
        Form::Prefill => out.push(batch(&stored(&blocks, None, &tokens))),
        Form::Decode => {
            let mut parent = None;
            for (block, tokens) in blocks.iter().zip(tokens.chunks(BLOCK_SIZE as usize)) {
                out.push(batch(&stored(&[*block], parent, tokens)));
                parent = Some(*block);
            }
        }
    }
}

fn remove(form: Form, prompt: usize, out: &mut Vec<Bytes>) {
    // The last block of a prompt is the first to go.
    let mut blocks = names(prompt);
    blocks.reverse();
    match form {
        Form::Prefill => out.push(batch(&removed(&blocks))),
        Form::Decode => out.extend(blocks.iter().map(|block| batch(&removed(&[*block])))),
    }
}

/// The engine's names of a prompt's blocks.
fn names(prompt: usize) -> Vec<u64> {
    (0..PROMPT_BLOCKS).map(|block| spread((prompt * PROMPT_BLOCKS + block) as u64)).collect()
}

fn tokens(prompt: usize) -> Vec<u32> {
    let first = prompt * PROMPT_BLOCKS * BLOCK_SIZE as usize;
    (first..first + PROMPT_BLOCKS * BLOCK_SIZE as usize)
        .map(|at| u32::try_from(spread(at as u64 + (1 << 40)) % VOCABULARY).expect("a token"))
        .collect()
}

/// Numbers that look random (SplitMix64).
fn spread(seed: u64) -> u64 {
    let mut value = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// `[time, [event], rank]`
fn batch(event: &[u8]) -> Bytes {
    let mut bytes = Vec::with_capacity(event.len() + 12);
    rmp::encode::write_array_len(&mut bytes, 3).expect("memory");
    rmp::encode::write_f64(&mut bytes, 1.790e9).expect("memory");
    rmp::encode::write_array_len(&mut bytes, 1).expect("memory");
    bytes.extend_from_slice(event);
    rmp::encode::write_uint(&mut bytes, 0).expect("memory");
    bytes.into()
}

/// Every member that vLLM 0.31 writes, in its order.
fn stored(blocks: &[u64], parent: Option<u64>, tokens: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmp::encode::write_map_len(&mut bytes, 11).expect("memory");
    word(&mut bytes, "type", "BlockStored");
    key(&mut bytes, "block_hashes");
    numbers(&mut bytes, blocks.iter().copied());
    key(&mut bytes, "parent_block_hash");
    match parent {
        Some(parent) => {
            rmp::encode::write_uint(&mut bytes, parent).expect("memory");
        }
        None => rmp::encode::write_nil(&mut bytes).expect("memory"),
    }
    key(&mut bytes, "token_ids");
    numbers(&mut bytes, tokens.iter().copied().map(u64::from));
    key(&mut bytes, "block_size");
    rmp::encode::write_uint(&mut bytes, u64::from(BLOCK_SIZE)).expect("memory");
    nothing(&mut bytes, "lora_id");
    word(&mut bytes, "medium", "GPU");
    nothing(&mut bytes, "lora_name");
    key(&mut bytes, "extra_keys");
    rmp::encode::write_array_len(&mut bytes, length(blocks.len())).expect("memory");
    for _ in blocks {
        rmp::encode::write_nil(&mut bytes).expect("memory");
    }
    key(&mut bytes, "group_idx");
    rmp::encode::write_uint(&mut bytes, 0).expect("memory");
    word(&mut bytes, "kv_cache_spec_kind", "full_attention");
    bytes
}

fn removed(blocks: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmp::encode::write_map_len(&mut bytes, 4).expect("memory");
    word(&mut bytes, "type", "BlockRemoved");
    key(&mut bytes, "block_hashes");
    numbers(&mut bytes, blocks.iter().copied());
    word(&mut bytes, "medium", "GPU");
    key(&mut bytes, "group_idx");
    rmp::encode::write_uint(&mut bytes, 0).expect("memory");
    bytes
}

fn key(bytes: &mut Vec<u8>, name: &str) {
    rmp::encode::write_str(bytes, name).expect("memory");
}

fn word(bytes: &mut Vec<u8>, name: &str, value: &str) {
    key(bytes, name);
    key(bytes, value);
}

fn nothing(bytes: &mut Vec<u8>, name: &str) {
    key(bytes, name);
    rmp::encode::write_nil(bytes).expect("memory");
}

fn numbers(bytes: &mut Vec<u8>, values: impl ExactSizeIterator<Item = u64>) {
    rmp::encode::write_array_len(bytes, length(values.len())).expect("memory");
    for value in values {
        rmp::encode::write_uint(bytes, value).expect("memory");
    }
}

fn length(len: usize) -> u32 {
    u32::try_from(len).expect("a short list")
}
