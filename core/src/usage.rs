//! Usage: what a response says about the prompt, read while it passes by.
//!
//! Response side of the request path. The first bytes of a response mean that
//! prefill is over; its `usage` object says how many prompt tokens the engine
//! found in its cache, which is compared with what was predicted. Of a stream it is
//! also known, more or less, how many tokens have come out.
//!
//! # Terms
//!
//! - *event*: one `data:` line of a stream of server-sent events (SSE).
//!
//! # Invariants
//!
//! 1. The response is never held back or changed, and how it is cut into chunks
//!    makes no difference to what is read.
//! 2. At most [`RESPONSE_TAIL_BYTES_MAX`] bytes are kept, and at least the last
//!    half of that: of a stream the event that is not yet complete, of a plain
//!    response its end.
//!
//! A response that is compressed or not an engine's is read as having no usage.

use crate::json::{JsonKind, Member, RawJson, Scanner};
use crate::limits::{RESPONSE_TAIL_BYTES_MAX, USAGE_KEYS_MAX};

mod output;

/// The token counts of a response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// `prompt_tokens`
    pub prompt_tokens: Option<u64>,
    /// `completion_tokens`, or `output_tokens` as other APIs have it.
    pub completion_tokens: Option<u64>,
    /// `prompt_tokens_details.cached_tokens`: prompt tokens that were in the
    /// engine's cache.
    pub cached_tokens: Option<u64>,
}

/// The two forms of a response, told apart by its first byte that is not space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Unknown,
    Plain,
    Events,
}

/// Reads one response.
#[derive(Clone, Debug)]
pub struct ResponseReader {
    form: Form,
    started: bool,
    /// Of a stream the incomplete last line, else the end of all so far.
    tail: Vec<u8>,
    /// Whether bytes were dropped from the front of `tail`.
    cut: bool,
    events: u64,
    /// Tokens that have come out, and how many of them were taken.
    output: u64,
    taken: u64,
    usage: Option<Usage>,
}

impl Default for ResponseReader {
    fn default() -> Self {
        Self::new()
    }
}

impl ResponseReader {
    /// A reader that has seen nothing. Allocates nothing.
    #[must_use]
    pub const fn new() -> Self {
        ResponseReader {
            form: Form::Unknown,
            started: false,
            tail: Vec::new(),
            cut: false,
            events: 0,
            output: 0,
            taken: 0,
            usage: None,
        }
    }

    /// Takes the next chunk of the body.
    ///
    /// Returns whether it is the first one that is not empty.
    pub fn feed(&mut self, chunk: &[u8]) -> bool {
        let first = !self.started && !chunk.is_empty();
        self.started |= first;
        let mut chunk = chunk;
        if self.form == Form::Unknown {
            // Space before the first byte belongs to neither form.
            chunk = chunk.trim_ascii_start();
            self.form = match chunk.first() {
                None => Form::Unknown,
                Some(b'{' | b'[') => Form::Plain,
                Some(_) => Form::Events,
            };
        }
        match self.form {
            Form::Unknown => {}
            Form::Plain => self.keep(chunk),
            Form::Events => self.lines(chunk),
        }
        first
    }

    /// Whether a chunk that is not empty was seen.
    #[must_use]
    pub fn started(&self) -> bool {
        self.started
    }

    /// Number of complete events so far, without the closing `[DONE]`; about
    /// one for each output token. Zero for a plain response.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.events
    }

    /// Output tokens of a stream that have come since the last call: by the
    /// engine's count where it says one as it goes, else an estimate of one for
    /// each event with text, set right when the engine counts. Zero for a plain
    /// response, whose tokens come all at once.
    pub fn take_new_tokens(&mut self) -> u64 {
        // What was taken in excess of the engine's count is not taken again.
        let new = self.output.saturating_sub(self.taken);
        self.taken += new;
        new
    }

    /// Whether the kept end reached [`RESPONSE_TAIL_BYTES_MAX`].
    #[must_use]
    pub fn cut(&self) -> bool {
        self.cut
    }

    /// What the response said, at its end; of several usages the last.
    #[must_use]
    pub fn finish(mut self) -> Option<Usage> {
        let tail = std::mem::take(&mut self.tail);
        match self.form {
            Form::Unknown => {}
            Form::Plain => self.usage = last_usage(&tail),
            Form::Events => self.line(&tail),
        }
        self.usage
    }

    fn lines(&mut self, chunk: &[u8]) {
        let mut rest = chunk;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            let (line, after) = rest.split_at(end);
            rest = after.get(1..).unwrap_or_default();
            if self.tail.is_empty() {
                self.line(line);
            } else {
                self.keep(line);
                let mut whole = std::mem::take(&mut self.tail);
                self.line(&whole);
                // The allocation is used again by the next incomplete line.
                whole.clear();
                self.tail = whole;
            }
        }
        self.keep(rest);
    }

    fn line(&mut self, line: &[u8]) {
        let Some(data) = line.strip_prefix(b"data:") else {
            // A line whose beginning was dropped may still end in the usage.
            if self.cut {
                self.usage = last_usage(line).or(self.usage);
            }
            return;
        };
        if data.trim_ascii() != b"[DONE]" {
            self.events = self.events.saturating_add(1);
            let usage = last_usage(data);
            self.output = match usage.and_then(|usage| usage.completion_tokens) {
                Some(counted) => counted,
                None => self.output.saturating_add(output::tokens_in(data)),
            };
            self.usage = usage.or(self.usage);
        }
    }

    /// Appends to the tail. When it is full its older half is dropped, so that
    /// small chunks do not move the whole tail each time.
    fn keep(&mut self, bytes: &[u8]) {
        const HALF: usize = RESPONSE_TAIL_BYTES_MAX / 2;
        if self.tail.len() + bytes.len() > RESPONSE_TAIL_BYTES_MAX {
            self.cut = true;
            self.tail.drain(..self.tail.len().saturating_sub(HALF));
            let fitting = bytes.len().saturating_sub(RESPONSE_TAIL_BYTES_MAX);
            let end = bytes.get(fitting..).unwrap_or_default();
            if end.len() > HALF {
                self.tail.clear();
            }
            self.tail.extend_from_slice(end);
        } else {
            self.tail.extend_from_slice(bytes);
        }
    }
}

/// The last `"usage": {…}` with token counts in a piece of JSON, whose
/// beginning may be missing.
///
/// Inside a JSON string every quote has a backslash before it, so `"usage"` does
/// not occur there; only a string that ends in `\"usage"` looks alike. At most
/// [`USAGE_KEYS_MAX`] keys are looked at.
fn last_usage(json: &[u8]) -> Option<Usage> {
    const KEY: &[u8] = b"\"usage\"";
    let mut end = json.len();
    for _ in 0..USAGE_KEYS_MAX {
        let at = json.get(..end)?.windows(KEY.len()).rposition(|bytes| bytes == KEY)?;
        let ends_string = at.checked_sub(1).and_then(|before| json.get(before)) == Some(&b'\\');
        if !ends_string && let Some(usage) = json.get(at + KEY.len()..).and_then(usage_after_key) {
            return Some(usage);
        }
        end = at;
    }
    None
}

fn usage_after_key(bytes: &[u8]) -> Option<Usage> {
    let bytes = bytes.trim_ascii_start().strip_prefix(b":")?;
    // What follows the object may end inside a character.
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => std::str::from_utf8(bytes.get(..error.valid_up_to())?).ok()?,
    };
    let mut scanner = Scanner::new(text);
    scanner.space();
    let object = scanner.value(0).ok()?;
    if object.kind() != JsonKind::Object {
        return None;
    }
    let mut usage = Usage::default();
    for member in object.members() {
        usage.member(&member);
    }
    (usage != Usage::default()).then_some(usage)
}

impl Usage {
    fn member(&mut self, member: &Member<'_>) {
        match member.key.name().as_deref() {
            Some("prompt_tokens") => self.prompt_tokens = member.value.unsigned(),
            Some("completion_tokens" | "output_tokens") => {
                self.completion_tokens = member.value.unsigned()
            }
            Some("prompt_tokens_details") => {
                let cached = member.value.member("cached_tokens");
                self.cached_tokens = cached.and_then(RawJson::unsigned);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
