//! Output: about how many tokens one event of a stream brings.
//!
//! Engines send an event for each token, or for the few of one step, and say how
//! many there were only at the end, if at all. So an event counts as one token
//! for each choice that it adds text to: what a reader shows, or arguments of a
//! tool.

/// Members whose text is output: of OpenAI's chats (also reasoning and tools) and
/// completions, and of Anthropic's messages. An event has several of them when it
/// says the same thing twice.
const TEXTS: [&[u8]; 8] = [
    b"content",
    b"text",
    b"reasoning_content",
    b"reasoning",
    b"refusal",
    b"arguments",
    b"thinking",
    b"partial_json",
];

/// The one that counts in events of OpenAI's responses, which repeat all of the
/// text at the end under other names.
const RESPONSES_TEXT: &[u8] = b"delta";

/// Longest key that is looked for, in bytes.
const KEY_BYTES_MAX: usize = 17;

/// How many tokens an event's data stands for. Looks for keys by their quotes and
/// colons, without regard to where they are; linear in the data.
pub(super) fn tokens_in(data: &[u8]) -> u64 {
    let mut counts = [0_u64; TEXTS.len()];
    let (mut deltas, mut is_responses) = (0, false);
    let mut rest = data;
    while let Some(colon) = rest.iter().position(|&byte| byte == b':') {
        let (before, after) = rest.split_at(colon);
        let value = after.get(1..).unwrap_or_default();
        // A key may have begun before `rest`, but not one without a colon in it.
        if let Some(key) = key_at_end(before) {
            let text = text_at_start(value);
            if key == b"type" {
                is_responses |= text.is_some_and(|text| text.starts_with(b"response."));
            } else if text.is_some_and(|text| !text.starts_with(b"\"")) {
                deltas += u64::from(key == RESPONSES_TEXT);
                let known = TEXTS.iter().position(|text| *text == key);
                if let Some(count) = known.and_then(|known| counts.get_mut(known)) {
                    *count += 1;
                }
            }
        }
        rest = value;
    }
    if is_responses { deltas } else { counts.into_iter().max().unwrap_or(0) }
}

/// The key that ends right here. Inside a string every quote has a backslash
/// before it.
fn key_at_end(before: &[u8]) -> Option<&[u8]> {
    let name = before.trim_ascii_end().strip_suffix(b"\"")?;
    let from = name.len().saturating_sub(KEY_BYTES_MAX + 1);
    let tail = name.get(from..)?;
    let quote = tail.iter().rposition(|&byte| byte == b'"')?;
    let key = tail.get(quote + 1..)?;
    (!key.ends_with(b"\\")).then_some(key)
}

/// What follows the quote of a string value.
fn text_at_start(value: &[u8]) -> Option<&[u8]> {
    value.trim_ascii_start().strip_prefix(b"\"")
}
