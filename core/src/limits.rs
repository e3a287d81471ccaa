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
