//! Hot prefix: nine of ten requests begin with the same 8,192 tokens.

use super::{Message, Request, TraceError, Writer, micros};

/// Blocks of an engine's cache.
const ENGINE_BLOCKS: usize = 8_000;

/// Tokens of the shared prefix.
const PREFIX_TOKENS: usize = 8_192;

/// Of ten requests, those that do not share it.
const OTHERS_OF_TEN: usize = 1;

/// Requests, and how many there are per second.
const REQUESTS: usize = 800;
const PER_SECOND: f64 = 12.0;

pub(super) fn requests(writer: &mut Writer<'_>) -> Result<(usize, Vec<Request>), TraceError> {
    let prefix: Message = ("system", writer.text(PREFIX_TOKENS));
    let mut requests = Vec::new();
    let mut at = 0.0;
    for _ in 0..REQUESTS {
        let other = writer.numbers.below(10) < OTHERS_OF_TEN;
        let (question, answer) = (writer.length(50, 500), writer.length(60, 300));
        let mut messages: Vec<Message> = Vec::new();
        if other {
            let tokens = writer.length(500, 4000);
            messages.push(("system", writer.text(tokens)));
        } else {
            messages.push(prefix.clone());
        }
        messages.push(("user", writer.text(question)));
        requests.push(writer.request(micros(at), messages, answer)?);
        at += writer.gap(1.0 / PER_SECOND);
    }
    Ok((ENGINE_BLOCKS, requests))
}
