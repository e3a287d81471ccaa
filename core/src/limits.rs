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

/// Longest name of a field that is looked for, in bytes. A longer key is read
/// over without resolving its escapes.
pub const NAME_BYTES_MAX: usize = 64;

/// Most members called `nvext` in one body. The last one counts; the others are
/// noted because `handover` removes them.
pub const NVEXT_MEMBERS_MAX: usize = 8;

/// Most prompts in one completion request. Engines take each as a request of
/// its own, so thousands in one body are no real client's.
pub const PROMPT_BATCH_MAX: usize = 4_096;

// --- render ----------------------------------------------------------------

/// Longest chat template that is compiled, in bytes. The longest in use take
/// about 30 KB.
pub const TEMPLATE_BYTES_MAX: usize = 512 * 1024;

/// Most named templates of one model.
pub const TEMPLATES_MAX: usize = 16;

/// Most special tokens of one model that a template sees by name.
pub const SPECIAL_TOKENS_MAX: usize = 64;

/// What one rendering may cost, in the template engine's fuel: an instruction
/// is one, and so are 64 bytes that are produced or copied. A thousand messages
/// take about half a million; all of it takes some 0.1 s.
pub const TEMPLATE_FUEL_MAX: u64 = 4_000_000;

/// Most JSON values of one request that are made into values of a template. Each
/// takes about a hundred bytes of memory and as little as two of the body, and a
/// VM that runs out of memory takes every stream of its thread with it. A
/// thousand messages and a hundred tools take about thirty thousand.
pub const TEMPLATE_VALUES_MAX: usize = 262_144;

/// Longest rendered prompt, in bytes. A template repeats little of a body, so
/// this is the longest body twice.
pub const RENDERED_BYTES_MAX: usize = 2 * BODY_BYTES_MAX;

// --- usage -----------------------------------------------------------------

/// Longest end of a response, or of one event in it, that is kept to find
/// `usage` in, in bytes. The object itself takes a few hundred.
pub const RESPONSE_TAIL_BYTES_MAX: usize = 64 * 1024;

/// Most keys `usage` that are tried in one event or response, from its end. An
/// engine writes one.
pub const USAGE_KEYS_MAX: usize = 8;

// --- hash ------------------------------------------------------------------

/// Most blocks of one prompt that are hashed and looked up, in blocks. At 16
/// tokens a block this is a prompt of 2 M tokens.
pub const PROMPT_BLOCKS_MAX: usize = 131_072;
