//! Conversations: sessions of several turns under shared system prompts.

use super::{Message, Request, TraceError, Writer, micros};

/// Blocks of an engine's cache: a third of what all sessions say is held by four
/// engines together, so that both duplicates and losses cost.
const ENGINE_BLOCKS: usize = 4_000;

/// System prompts; the most popular one is twelve times as frequent as the last.
const SYSTEM_PROMPTS: u32 = 12;

/// Sessions that begin, per second.
const SESSIONS_PER_SECOND: f64 = 3.2;

/// Time in which sessions begin, and after which nobody says anything, in seconds.
const BEGIN_WITHIN: f64 = 80.0;
const END_AT: f64 = 110.0;

pub(super) fn requests(writer: &mut Writer<'_>) -> Result<(usize, Vec<Request>), TraceError> {
    let mut systems: Vec<Message> = Vec::new();
    for _ in 0..SYSTEM_PROMPTS {
        let tokens = writer.length(200, 1600);
        systems.push(("system", writer.text(tokens)));
    }
    let mut requests = Vec::new();
    let mut begin = 0.0;
    while begin < BEGIN_WITHIN {
        let system = writer.zipf(SYSTEM_PROMPTS);
        let mut messages: Vec<Message> = systems.get(system).cloned().into_iter().collect();
        let turns = 2 + writer.numbers.below(6);
        let mut at = begin;
        for _ in 0..turns {
            let (question, answer) = (writer.length(30, 600), writer.length(60, 300));
            messages.push(("user", writer.text(question)));
            let request = writer.request(micros(at), messages.clone(), answer)?;
            messages.push(writer.answer(&request));
            if at < END_AT {
                requests.push(request);
            }
            // Reading and typing, beside the time that the answer takes.
            at += 8.0 + writer.gap(5.0);
        }
        begin += writer.gap(1.0 / SESSIONS_PER_SECOND);
    }
    Ok((ENGINE_BLOCKS, requests))
}
