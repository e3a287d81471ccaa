//! Tokenize: the rendered prompt to the token ids the engine will see.
//!
//! Third stage of the request path: `render` gives the prompt's text, `hash`
//! takes its tokens. The ids have to be those of the engine's own tokenizer,
//! one by one, or no block matches.
//!
//! # Terms
//!
//! - *tokenizer file*: what the sidecar compiles from a `tokenizer.json`
//!   (`compile`, native only) and every VM loads in a few milliseconds.
//! - *pre-token*, *piece*: a part of the text that is merged on its own.
//! - *added token*: a string that becomes one token wherever it occurs.
//!
//! # Invariants
//!
//! 1. The ids are those of HF's `tokenizers` 0.23 with `add_special_tokens`
//!    off and without truncation or padding. What cannot be reproduced exactly
//!    is refused when the file is compiled, not guessed here.
//! 2. Loading is total: any bytes give an error or a tokenizer. Encoding with
//!    any tokenizer that loads is bounded in time and memory.
//! 3. Slices give what encoding at once gives.
//! 4. No error carries text of the prompt.
//!
//! Which tokenizer belongs to which model, and whether its ids agree with a
//! worker's, is not known here.

mod added;
mod aligned;
mod ascii;
mod border;
mod cache;
mod encode;
mod file;
mod key;
mod merge;
mod normal_form;
mod normalize;
mod perfect_hash;
mod split;
mod words;

#[cfg(feature = "hf-tokenizers")]
mod hf;

#[cfg(feature = "compile")]
pub mod compile;

#[cfg(test)]
mod tests;

pub use aligned::AlignedBytes;
pub use border::Border;
pub use encode::Progress;
pub use file::LoadError;

use crate::ids::TokenId;
use file::{Kind, Layout};

/// Why a text could not be encoded. The request is routed by load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncodeError {
    /// Longer than [`TOKENIZE_TEXT_BYTES_MAX`](crate::limits::TOKENIZE_TEXT_BYTES_MAX).
    TextTooLong,
    /// More tokens than [`TOKENIZE_TOKENS_MAX`](crate::limits::TOKENIZE_TOKENS_MAX).
    TooManyTokens,
    /// A stretch without a border is longer than
    /// [`PRETOKEN_BYTES_MAX`](crate::limits::PRETOKEN_BYTES_MAX).
    PretokenTooLong,
    /// The pattern looks ahead too often; see
    /// [`TOKENIZE_STEPS_PER_BYTE_MAX`](crate::limits::TOKENIZE_STEPS_PER_BYTE_MAX).
    TooMuchWork,
    /// The [`Progress`] belongs to another text: a mistake of the caller.
    OtherText,
    /// The tokenizer file is not what a compiler writes.
    Broken,
}

impl EncodeError {
    /// A fixed word for metrics and logs.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::TextTooLong => "text_too_long",
            Self::TooManyTokens => "too_many_tokens",
            Self::PretokenTooLong => "pretoken_too_long",
            Self::TooMuchWork => "tokenize_work",
            Self::OtherText => "tokenize_other_text",
            Self::Broken => "tokenizer_broken",
        }
    }
}

impl std::fmt::Display for EncodeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::TextTooLong => "text is too long to be encoded",
            Self::TooManyTokens => "text has too many tokens",
            Self::PretokenTooLong => "a stretch of text without a border is too long",
            Self::TooMuchWork => "splitting the text takes too much work",
            Self::OtherText => "progress belongs to another text",
            Self::Broken => "tokenizer file is inconsistent",
        })
    }
}

impl std::error::Error for EncodeError {}

/// A loaded tokenizer: the file, where it lies, and caches of fixed size.
pub struct Tokenizer(Variant);

enum Variant {
    Compiled(Box<encode::Engine>),
    #[cfg(feature = "hf-tokenizers")]
    Hf(Box<hf::HfEngine>),
}

impl Tokenizer {
    /// Loads a tokenizer file.
    ///
    /// # Errors
    ///
    /// [`LoadError`] for any bytes that are not a well-formed file, and for a
    /// `tokenizer.json` in a build without `hf-tokenizers`. The model is then
    /// routed without token ids.
    ///
    /// # Cost
    ///
    /// One pass over the file for the checksum, some megabytes a millisecond.
    /// A file of kind JSON is parsed instead: up to two seconds.
    pub fn load(file: AlignedBytes) -> Result<Self, LoadError> {
        let layout = Layout::read(&file)?;
        if layout.kind == Kind::Json {
            return Self::load_json(&file, &layout);
        }
        let engine = encode::Engine::new(file, layout).ok_or(LoadError::Malformed)?;
        Ok(Self(Variant::Compiled(Box::new(engine))))
    }

    #[cfg(feature = "hf-tokenizers")]
    fn load_json(file: &AlignedBytes, layout: &Layout) -> Result<Self, LoadError> {
        let json = layout.json(file.as_bytes()).ok_or(LoadError::Malformed)?;
        Ok(Self(Variant::Hf(Box::new(hf::HfEngine::load(json)?))))
    }

    #[cfg(not(feature = "hf-tokenizers"))]
    fn load_json(_: &AlignedBytes, _: &Layout) -> Result<Self, LoadError> {
        Err(LoadError::NeedsHfTokenizers)
    }

    /// Appends the ids of `text` to `out`, without special tokens that a post
    /// processor would add.
    ///
    /// # Errors
    ///
    /// [`EncodeError`]; `out` may have grown by then.
    pub fn encode(&mut self, text: &str, out: &mut Vec<TokenId>) -> Result<(), EncodeError> {
        let mut progress = Progress::default();
        while !self.encode_slice(text, &mut progress, usize::MAX, out)? {}
        Ok(())
    }

    /// Encodes from `progress` on until about `bytes_budget` bytes of text
    /// were encoded or the text ends; whether it ended.
    ///
    /// The same `text` has to be passed every time. The appended slices are
    /// together what [`Self::encode`] appends. One call goes beyond its budget
    /// by at most one pre-token or one step of another stage.
    ///
    /// # Errors
    ///
    /// [`EncodeError`]; the progress is of no use then.
    pub fn encode_slice(
        &mut self,
        text: &str,
        progress: &mut Progress,
        bytes_budget: usize,
        out: &mut Vec<TokenId>,
    ) -> Result<bool, EncodeError> {
        match &mut self.0 {
            Variant::Compiled(engine) => engine.encode_slice(text, progress, bytes_budget, out),
            #[cfg(feature = "hf-tokenizers")]
            Variant::Hf(engine) => engine.encode(text, out).map(|()| true),
        }
    }

    /// The border that the encoding of `text` has come to: a place from which
    /// this text, and any other that is the same up to [`Border::seen_to`], can
    /// be encoded on by [`Progress::resume`].
    ///
    /// `progress` is where [`Self::encode_slice`] stopped. A budget of 1 makes
    /// it stop behind each piece. `None` where there is no border: in a stretch
    /// between two added tokens that Normalization Form C changes, where the end
    /// of the text had a part in the tokens, and with a file of kind JSON.
    #[must_use]
    pub fn border(&self, text: &str, progress: &Progress) -> Option<Border> {
        match &self.0 {
            Variant::Compiled(engine) => engine.border(text, progress),
            #[cfg(feature = "hf-tokenizers")]
            Variant::Hf(_) => None,
        }
    }

    /// Memory held, in bytes. An estimate for a file of kind JSON.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        match &self.0 {
            Variant::Compiled(engine) => engine.memory_bytes(),
            #[cfg(feature = "hf-tokenizers")]
            Variant::Hf(engine) => engine.memory_bytes(),
        }
    }
}
