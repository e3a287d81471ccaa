//! Checks: what must hold for any bytes from outside, one file per target.
//!
//! The same code runs under libFuzzer (`make fuzz`) and, over the seeds and every
//! input that once failed, in `cargo test` (`tests/fuzz/replay.rs`). A new target
//! is a file here and a line in [`TARGETS`].
//!
//! A check panics if something does not hold. Its input is the bytes as they come
//! from outside, after the few bytes that choose a variant, so that a captured
//! message is a seed as it stands.

use crate::ROOT;

mod chat_template;
mod discovery_record;
mod engine_batch;
mod feed_frame;
mod fixtures;
mod index_delta;
mod plane_message;
mod pulled_events;
mod replica;
mod request_body;
mod request_demands;
mod response_usage;
mod ring_entry;
mod state_events;
mod tokenizer_encode;
mod tokenizer_file;
mod tokenizer_json;
mod uplink;

/// One target.
pub(crate) struct Target {
    /// Its name, and that of its folders.
    pub(crate) name: &'static str,
    /// Inputs to start from.
    pub(crate) seeds: fn() -> Vec<Vec<u8>>,
    /// Panics if something does not hold for an input.
    pub(crate) check: fn(&[u8]),
}

macro_rules! targets {
    ($($name:ident),* $(,)?) => {
        /// All of them.
        pub(crate) const TARGETS: &[Target] = &[
            $(Target { name: stringify!($name), seeds: $name::seeds, check: $name::check }),*
        ];
    };
}

targets![
    chat_template,
    discovery_record,
    engine_batch,
    feed_frame,
    index_delta,
    plane_message,
    pulled_events,
    replica,
    request_body,
    request_demands,
    response_usage,
    ring_entry,
    state_events,
    tokenizer_encode,
    tokenizer_file,
    tokenizer_json,
    uplink,
];
