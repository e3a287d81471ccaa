//! Every upper bound of the core, with its unit and its reason.
//!
//! A bound is reached in production some day; whoever enforces one counts it
//! under a reason (see `reason`), so that reaching it is seen.

// --- request ---------------------------------------------------------------

/// Longest body that is parsed, in bytes. Above it the request is routed by
/// load. 16 MiB is Envoy's default HTTP/2 stream window, beyond which a body
/// could not be buffered anyway.
pub const BODY_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Deepest nesting of arrays and objects that is scanned, in levels.
pub const JSON_DEPTH_MAX: usize = 128;

// --- hash ------------------------------------------------------------------

/// Most blocks of one prompt that are hashed and looked up, in blocks. At 16
/// tokens a block this is a prompt of 2 M tokens.
pub const PROMPT_BLOCKS_MAX: usize = 131_072;

// --- tokenize --------------------------------------------------------------

/// Longest text of one prompt that is encoded, in bytes. A rendered prompt is
/// a body plus what the template adds.
pub const TOKENIZE_TEXT_BYTES_MAX: usize = BODY_BYTES_MAX + 1024 * 1024;

/// Most tokens of one prompt: what [`PROMPT_BLOCKS_MAX`] blocks of 16 hold.
pub const TOKENIZE_TOKENS_MAX: usize = PROMPT_BLOCKS_MAX * 16;

/// Longest single pre-token that is merged, in bytes. Merging one cannot be
/// interrupted and costs 0.1 to 0.4 us a byte, so this is about 3 ms.
pub const PRETOKEN_BYTES_MAX: usize = 16 * 1024;

/// Most work for one prompt, in steps per byte of text: a step is one byte
/// looked at by the pre-tokenizer or the added-token matcher. Ordinary text
/// takes 1 to 2; only a pattern that looks far ahead again and again reaches
/// this, and without the bound it would be quadratic.
pub const TOKENIZE_STEPS_PER_BYTE_MAX: u64 = 64;

/// Longest tokenizer file that is loaded, in bytes. The largest public ones
/// compile to 13 MB; the JSON form of the same is 34 MB.
pub const TOKENIZER_FILE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Token ids and merge ranks are below this: a merge is one `u64` of a left
/// id, a right id and a rank of 20 bits each.
pub const TOKEN_IDS_MAX: u32 = 1 << 20;

/// Longest added token, in bytes: the most that one look of the matcher reads.
pub const ADDED_TOKEN_BYTES_MAX: usize = 1024;

/// Words that are short (at most 22 bytes and 6 ids) and remembered, in
/// entries of 48 bytes: 768 KiB.
pub const WORD_CACHE_SHORT_ENTRIES: usize = 16 * 1024;

/// Words that are longer (at most 94 bytes and 24 ids) and remembered, in
/// entries of 192 bytes: 768 KiB.
pub const WORD_CACHE_LONG_ENTRIES: usize = 4 * 1024;

/// Longest text that the `hf-tokenizers` engine encodes, in bytes. It cannot
/// stop half way, and takes about 0.3 us a byte.
pub const HF_TEXT_BYTES_MAX: usize = 256 * 1024;

const _: () = assert!(PRETOKEN_BYTES_MAX < TOKENIZE_TEXT_BYTES_MAX);
const _: () = assert!(TOKENIZER_FILE_BYTES_MAX < u32::MAX as usize);
