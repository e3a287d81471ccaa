//! Handover: writes the choice into the request's body.
//!
//! Last stage of the request path in the modes that change the body: Dynamo's
//! frontend reads which worker to use, and the prompt's tokens, from the body's
//! `nvext` object. The body is edited in place of being written anew, so that
//! every other byte stays the client's.
//!
//! # Terms
//!
//! - *routing member*: a member of `nvext` that names a worker or a rank.
//!
//! # Invariants
//!
//! 1. No routing member that the client sent is in the result: a client does not
//!    choose its worker.
//! 2. Everything outside `nvext`, and every other member of it, is kept byte for
//!    byte; only the space between members of `nvext` is not.
//! 3. If the body was valid JSON, so is the result.
//!
//! Whether the tokens are exact is not known here: [`Handover::token_data`]
//! replaces the prompt, so the caller sets it only if they are.

use std::fmt;
use std::ops::Range;

use crate::ids::TokenId;
use crate::json::{JsonKind, RawJson};
use crate::request::Splice;
use crate::request::nvext::ROUTING_MEMBERS;

mod decimal;

/// What is written into `nvext`. Absent members are left out, and a routing
/// member that the client sent is removed all the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Handover<'a> {
    /// The prompt's tokens, which the frontend uses in place of rendering and
    /// tokenizing. `None` keeps what the client sent.
    pub token_data: Option<&'a [TokenId]>,
    /// The same, written already; it counts before the other.
    pub token_text: Option<&'a TokenText>,
    /// The instance for an aggregated request.
    pub backend_instance_id: Option<u64>,
    /// The instance for decode.
    pub decode_worker_id: Option<u64>,
    /// The instance for prefill.
    pub prefill_worker_id: Option<u64>,
    /// The data-parallel rank for decode (or of the aggregated worker).
    pub dp_rank: Option<u32>,
    /// The data-parallel rank for prefill.
    pub prefill_dp_rank: Option<u32>,
}

/// A prompt's tokens as they go into the body, written a part at a time: half a
/// million of them take several milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenText {
    json: Vec<u8>,
    written: usize,
}

impl TokenText {
    /// Writes up to `tokens_max` more of a prompt's tokens; whether all are written.
    /// The same `tokens` have to be passed every time.
    pub fn write(&mut self, tokens: &[TokenId], tokens_max: usize) -> bool {
        if self.json.is_empty() {
            self.json.reserve(tokens.len() * TOKEN_BYTES_ESTIMATE + 2);
            self.json.push(b'[');
        } else if self.json.ends_with(b"]") {
            return true;
        }
        let rest = tokens.get(self.written..).unwrap_or_default();
        let now = rest.get(..tokens_max).unwrap_or(rest);
        if self.written > 0 && !now.is_empty() {
            self.json.push(b',');
        }
        decimal::write_list(now, &mut self.json);
        self.written += now.len();
        let is_done = now.len() == rest.len();
        if is_done {
            self.json.push(b']');
        }
        is_done
    }

    /// Whether nothing is written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.json.is_empty()
    }
}

/// Bytes that a token and its comma take.
const TOKEN_BYTES_ESTIMATE: usize = 7;

/// Why a body is left as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandoverError {
    /// The client's `nvext` is neither an object nor `null`. Its engine refuses
    /// such a request, so there is nothing to hand over.
    NvextNotAnObject,
}

impl HandoverError {
    /// The reason as it is counted.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            HandoverError::NvextNotAnObject => "nvext_not_object",
        }
    }
}

impl fmt::Display for HandoverError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("`nvext` is not an object")
    }
}

impl std::error::Error for HandoverError {}

/// Writes `handover` into the `nvext` of a body.
///
/// - `splice`: from the scan of that body. Of several members called `nvext`
///   the last is edited and the others are removed, since readers differ in
///   which one counts.
///
/// Returns the new body.
///
/// # Errors
///
/// [`HandoverError`]: the body is to be forwarded as it is; routing headers
/// still hold.
///
/// # Cost
///
/// One copy of the body and two or three nanoseconds for each token written.
pub fn hand_over(splice: &Splice<'_>, handover: &Handover<'_>) -> Result<Vec<u8>, HandoverError> {
    let body = splice.body;
    let ids = handover.token_data.map_or(0, <[TokenId]>::len);
    let written = handover.token_text.map_or(ids * TOKEN_BYTES_ESTIMATE, |text| text.json.len());
    let mut out = Vec::with_capacity(body.len() + written + 256);
    let Some((last, others)) = splice.nvext.split_last() else {
        copy(body, 0..splice.root_close, &mut out);
        out.extend_from_slice(if splice.root_empty { b"\"nvext\":" } else { b",\"nvext\":" });
        write_nvext(RawJson::EMPTY_OBJECT, handover, &mut out);
        copy(body, splice.root_close..body.len(), &mut out);
        return Ok(out);
    };
    // The spans were cut from a valid body, so the value parses.
    let value = body.get(last.value.clone()).and_then(|text| RawJson::parse(text).ok());
    let kept = match value {
        Some(value) if value.kind() == JsonKind::Object => value,
        Some(value) if value.is_null() => RawJson::EMPTY_OBJECT,
        _ => return Err(HandoverError::NvextNotAnObject),
    };
    let mut copied = 0;
    for other in others {
        copy(body, copied..other.member.start, &mut out);
        copied = after_comma(body, other.member.end);
    }
    copy(body, copied..last.value.start, &mut out);
    write_nvext(kept, handover, &mut out);
    copy(body, last.value.end..body.len(), &mut out);
    Ok(out)
}

fn copy(body: &str, range: Range<usize>, out: &mut Vec<u8>) {
    out.extend_from_slice(body.as_bytes().get(range).unwrap_or_default());
}

/// Where the member after the one that ends at `end` starts. There is one.
fn after_comma(body: &str, end: usize) -> usize {
    let rest = body.as_bytes().get(end..).unwrap_or_default();
    let skipped = rest
        .iter()
        .position(|byte| !matches!(byte, b' ' | b'\n' | b'\r' | b'\t' | b','))
        .unwrap_or(rest.len());
    end + skipped
}

/// Writes the object: our members, then those of `kept` that we do not own.
fn write_nvext(kept: RawJson<'_>, handover: &Handover<'_>, out: &mut Vec<u8>) {
    out.push(b'{');
    let mut separator = Separator(false);
    let numbers = [
        ("backend_instance_id", handover.backend_instance_id),
        ("decode_worker_id", handover.decode_worker_id),
        ("prefill_worker_id", handover.prefill_worker_id),
        ("dp_rank", handover.dp_rank.map(u64::from)),
        ("prefill_dp_rank", handover.prefill_dp_rank.map(u64::from)),
    ];
    for (name, number) in numbers {
        if let Some(number) = number {
            separator.write(out);
            write_key(name, out);
            decimal::write(number, out);
        }
    }
    if let Some(text) = handover.token_text {
        separator.write(out);
        write_key("token_data", out);
        out.extend_from_slice(&text.json);
    } else if let Some(tokens) = handover.token_data {
        separator.write(out);
        write_key("token_data", out);
        write_tokens(tokens, out);
    }
    let has_tokens = handover.token_text.is_some() || handover.token_data.is_some();
    let ours = |key: RawJson<'_>| {
        key.name().is_some_and(|name| {
            ROUTING_MEMBERS.contains(&&*name) || (has_tokens && name == "token_data")
        })
    };
    for member in kept.members().filter(|member| !ours(member.key)) {
        separator.write(out);
        copy(kept.text(), member.start..member.end, out);
    }
    out.push(b'}');
}

/// Writes a comma before every member but the first.
struct Separator(bool);

impl Separator {
    fn write(&mut self, out: &mut Vec<u8>) {
        if self.0 {
            out.push(b',');
        }
        self.0 = true;
    }
}

fn write_key(name: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
}

fn write_tokens(tokens: &[TokenId], out: &mut Vec<u8>) {
    out.push(b'[');
    decimal::write_list(tokens, out);
    out.push(b']');
}

#[cfg(test)]
mod tests;
