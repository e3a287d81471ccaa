//! Mooncake: the beginning of the public conversation trace of the Mooncake
//! paper (`tests/traces/README.md`), at a quarter of its lengths.
//!
//! The trace names blocks of 512 tokens, equal names for equal prefixes. Each
//! becomes a message of 128 tokens whose text follows from the name.

use std::sync::Arc;

use serde::Deserialize;

use super::{Message, Request, TraceError, Writer, whole};

/// Lengths are divided by it.
const SCALE: usize = 4;

/// Tokens of a named block.
const BLOCK_TOKENS: usize = 512;

/// Tokens that the template writes around a message.
const AROUND: usize = 5;

/// Blocks of an engine's cache: as many of the trace's as a worker of the paper's
/// kind has room for, with as many workers.
const ENGINE_BLOCKS: usize = 16_000;

/// Times that it is played faster than it was recorded.
const FASTER: u64 = 4;

/// The recorder's clock ticks so slowly, in milliseconds; requests of a tick are
/// spread over it.
const TICK_MS: u32 = 3_000;

/// One line.
#[derive(Deserialize)]
struct Line {
    /// In milliseconds.
    timestamp: u64,
    input_length: usize,
    output_length: usize,
    hash_ids: Vec<u64>,
}

const FILE: &str = include_str!("../../../traces/mooncake-conversation.jsonl");

pub(super) fn requests(writer: &mut Writer<'_>) -> Result<(usize, Vec<Request>), TraceError> {
    let lines: Result<Vec<Line>, _> = FILE.lines().map(serde_json::from_str).collect();
    let lines = lines.map_err(|_| TraceError::Unreadable)?;
    let mut requests = Vec::new();
    for line in &lines {
        let mut left = line.input_length;
        let mut messages: Vec<Message> = Vec::new();
        for (place, id) in line.hash_ids.iter().enumerate() {
            let tokens = left.min(BLOCK_TOKENS) / SCALE;
            left = left.saturating_sub(BLOCK_TOKENS);
            let role = if place % 2 == 0 { "user" } else { "assistant" };
            let text: Arc<str> = writer.words(*id, tokens.saturating_sub(AROUND));
            messages.push((role, text));
        }
        let output_tokens = (line.output_length / SCALE).max(1);
        let within_tick = f64::from(TICK_MS) * 1000.0 * writer.share();
        let at_us = (line.timestamp * 1000 + whole(within_tick)) / FASTER;
        requests.push(writer.request(at_us, messages, output_tokens)?);
    }
    Ok((ENGINE_BLOCKS, requests))
}
