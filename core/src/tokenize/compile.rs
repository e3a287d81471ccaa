//! Compiles a `tokenizer.json` into a tokenizer file, natively.
//!
//! Parsing the JSON and building hash tables from it takes HF's own crate up to
//! two seconds in every VM; here it is done once, by the sidecar.
//!
//! # Invariants
//!
//! 1. What is compiled encodes exactly as HF's `tokenizers` 0.23 does with
//!    Oniguruma. Every component is either known to be reproduced or refused by
//!    name; nothing is passed over because it looks harmless.
//! 2. Equal inputs give equal files, byte by byte: a file is named by its hash.

mod dfa;
mod json;
mod map;
mod pattern;
mod perfect_hash;
mod trie;
mod vocab;
mod write;

pub use json::AddedToken;

use serde_json::Value;

use super::file::{FLAG_NFC, Kind, Section};
use super::words::LOW_LINE;
use crate::limits::TOKENIZER_FILE_BYTES_MAX;
use json::{Model, TokenizerJson};
use write::Writer;

/// Why a `tokenizer.json` was not compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CompileError {
    /// Not a `tokenizer.json`: the message of the parser.
    Json(String),
    /// A component that is not reproduced exactly; the message names it. The
    /// `hf-tokenizers` build can take the file through [`wrap_json`].
    Unsupported(String),
    /// HF's crate would refuse the file as well; the message says why.
    Inconsistent(String),
    /// A table is larger than the format allows; the message names it.
    TooLarge(&'static str),
}

impl CompileError {
    /// A fixed word for metrics and logs.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Json(_) => "tokenizer_json",
            Self::Unsupported(_) => "tokenizer_unsupported",
            Self::Inconsistent(_) => "tokenizer_inconsistent",
            Self::TooLarge(_) => "tokenizer_too_large",
        }
    }
}

impl std::fmt::Display for CompileError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Json(message) => write!(f, "tokenizer.json cannot be read: {message}"),
            Self::Unsupported(what) => write!(f, "tokenizer.json is not supported: {what}"),
            Self::Inconsistent(what) => write!(f, "tokenizer.json is inconsistent: {what}"),
            Self::TooLarge(what) => write!(f, "tokenizer.json is too large: {what}"),
        }
    }
}

impl std::error::Error for CompileError {}

fn unsupported<T>(what: impl Into<String>) -> Result<T, CompileError> {
    Err(CompileError::Unsupported(what.into()))
}

fn inconsistent<T>(what: impl Into<String>) -> Result<T, CompileError> {
    Err(CompileError::Inconsistent(what.into()))
}

/// Compiles a `tokenizer.json`.
///
/// Returns the bytes of a tokenizer file for [`super::Tokenizer::load`].
///
/// # Errors
///
/// [`CompileError`], naming the component. Nothing is compiled approximately.
///
/// # Cost
///
/// Seconds and some hundred megabytes for the largest public tokenizers.
pub fn compile(tokenizer_json: &[u8]) -> Result<Vec<u8>, CompileError> {
    compile_with_added(tokenizer_json, &[])
}

/// Compiles a `tokenizer.json` with further added tokens, such as those that
/// only `tokenizer_config.json` names. They get ids as HF's `add_tokens` gives
/// them: their id in the vocabulary, else the next free one in order.
///
/// # Errors
///
/// As [`compile`].
pub fn compile_with_added(
    tokenizer_json: &[u8],
    extra: &[AddedToken],
) -> Result<Vec<u8>, CompileError> {
    let json: TokenizerJson = serde_json::from_slice(tokenizer_json)
        .map_err(|error| CompileError::Json(error.to_string()))?;
    if json.version.as_deref().is_some_and(|version| version != "1.0") {
        return unsupported("version other than 1.0");
    }
    check_model(&json.model)?;
    let normalizer = read_normalizer(&json.normalizer)?;
    let pre_tokenizer = pattern::read(&json.pre_tokenizer)?;
    let kind = kind_of(&json.model, normalizer, &pre_tokenizer)?;

    let flags = if normalizer == Normalizer::Nfc { FLAG_NFC } else { 0 };
    let mut writer = Writer::new(kind, flags);
    if kind == Kind::ByteLevel {
        dfa::write(&pattern::merge_stages(&pre_tokenizer.stages)?, &mut writer)?;
    }
    let vocab = vocab::Vocabulary::read(kind, &json.model)?;
    trie::write(&vocab, &json.added_tokens, extra, normalizer, &mut writer)?;
    vocab.write(&mut writer)?;
    match writer.finish() {
        Some(file) if file.len() <= TOKENIZER_FILE_BYTES_MAX => Ok(file),
        _ => Err(CompileError::TooLarge("file")),
    }
}

/// Wraps a `tokenizer.json` as it is, for builds with `hf-tokenizers`.
///
/// Not checked here: such a build refuses what HF's crate refuses when it loads
/// the file. Empty if the text is longer than a tokenizer file may be.
#[must_use]
pub fn wrap_json(tokenizer_json: &[u8]) -> Vec<u8> {
    let mut writer = Writer::new(Kind::Json, 0);
    if tokenizer_json.len() < TOKENIZER_FILE_BYTES_MAX {
        writer.bytes(Section::Json, tokenizer_json.to_vec());
        return writer.finish().unwrap_or_default();
    }
    Vec::new()
}

/// What is done to the text before it is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Normalizer {
    None,
    Nfc,
    /// U+2581 for every space.
    LowLines,
}

fn read_normalizer(value: &Value) -> Result<Normalizer, CompileError> {
    if value.is_null() {
        return Ok(Normalizer::None);
    }
    match type_of(value) {
        "Sequence" => {
            let parts = value.get("normalizers").and_then(Value::as_array);
            match parts.map(Vec::as_slice) {
                Some([]) => Ok(Normalizer::None),
                Some([only]) => read_normalizer(only),
                _ => unsupported("normalizer Sequence of several"),
            }
        }
        "NFC" => Ok(Normalizer::Nfc),
        "Replace" => {
            let from = value.pointer("/pattern/String").and_then(Value::as_str);
            let to = value.get("content").and_then(Value::as_str);
            if from == Some(" ") && to.is_some_and(|to| to.chars().eq([LOW_LINE])) {
                return Ok(Normalizer::LowLines);
            }
            unsupported("normalizer Replace of anything but a space by U+2581")
        }
        other => unsupported(format!("normalizer {other}")),
    }
}

/// The `type` of a component.
fn type_of(value: &Value) -> &str {
    value.get("type").and_then(Value::as_str).unwrap_or("without a type")
}

fn check_model(model: &Model) -> Result<(), CompileError> {
    match model.kind.as_deref() {
        Some("BPE") => {}
        None if model.merges.is_some() => {}
        other => return unsupported(format!("model {}", other.unwrap_or("without a type"))),
    }
    if model.merges.is_none() {
        return inconsistent("BPE model without merges");
    }
    if model.dropout.is_some_and(|dropout| dropout != 0.0) {
        return unsupported("dropout");
    }
    let set = |text: &Option<String>| text.as_deref().is_some_and(|text| !text.is_empty());
    if set(&model.continuing_subword_prefix) {
        return unsupported("continuing_subword_prefix");
    }
    if set(&model.end_of_word_suffix) {
        return unsupported("end_of_word_suffix");
    }
    Ok(())
}

fn kind_of(
    model: &Model,
    normalizer: Normalizer,
    pre_tokenizer: &pattern::PreTokenizer,
) -> Result<Kind, CompileError> {
    let byte_fallback = model.byte_fallback == Some(true);
    if pre_tokenizer.byte_level {
        if byte_fallback {
            return unsupported("byte_fallback together with ByteLevel");
        }
        if normalizer == Normalizer::LowLines || !pre_tokenizer.literals.is_empty() {
            return unsupported("ByteLevel behind a replacement of spaces or a literal Split");
        }
        return Ok(Kind::ByteLevel);
    }
    if normalizer != Normalizer::LowLines || !byte_fallback {
        return unsupported("BPE neither ByteLevel nor with spaces as U+2581 and byte_fallback");
    }
    if model.ignore_merges == Some(true) {
        return unsupported("ignore_merges without ByteLevel");
    }
    if !pre_tokenizer.stages.is_empty() {
        return unsupported("pre_tokenizer Split by Regex without ByteLevel");
    }
    // A literal with a space never occurs once all spaces are replaced.
    if pre_tokenizer.literals.iter().any(|literal| !literal.contains(' ')) {
        return unsupported("pre_tokenizer Split by a String that occurs");
    }
    Ok(Kind::SentencePiece)
}
