//! Segments: tokens of texts that come again.
//!
//! A conversation's messages come again with every turn. A special token parts
//! the text before anything else looks at it, so what stands between two of them
//! has the same tokens wherever it stands, and is tokenized once. That keeps an
//! engine's own tokenizing, which no real engine's users wait for either, from
//! being what a measurement measures.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use tokenizers::Tokenizer;

use super::limits::SEGMENTS_MAX;
use super::model::PromptError;

/// Texts between special tokens, and what they were found to be.
pub struct Segments {
    /// Text and number of every token that parts the text, longest first.
    parting: Vec<(String, u32)>,
    /// What they begin with.
    firsts: BTreeSet<char>,
    known: Mutex<HashMap<String, Arc<[u32]>>>,
}

impl Segments {
    /// `None` if this tokenizer's tokens depend on more than the segment.
    #[must_use]
    pub fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let added = tokenizer.get_added_tokens_decoder();
        let plain = added
            .values()
            .all(|token| !token.lstrip && !token.rstrip && !token.single_word && !token.normalized);
        if !plain || added.is_empty() {
            return None;
        }
        let mut parting: Vec<(String, u32)> =
            added.into_iter().map(|(id, token)| (token.content, id)).collect();
        parting.sort_by(|left, right| right.0.len().cmp(&left.0.len()).then(left.cmp(right)));
        let firsts = parting.iter().filter_map(|(text, _)| text.chars().next()).collect();
        let segments = Self { parting, firsts, known: Mutex::default() };
        // Not for those that treat a text's beginning in a way of its own.
        let probe: String =
            segments.parting.iter().flat_map(|(text, _)| [text, "two words \u{e9}\n"]).collect();
        let whole = tokenizer.encode_fast(probe.as_str(), false).ok()?;
        let same = segments.encode(tokenizer, &probe).ok()? == whole.get_ids();
        same.then_some(segments)
    }

    /// Tokens of a text.
    ///
    /// # Errors
    ///
    /// [`PromptError::Tokenizer`].
    pub fn encode(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, PromptError> {
        let mut tokens = Vec::with_capacity(text.len() / 3);
        let mut rest = text;
        loop {
            let next = self.next(rest);
            let segment = next.and_then(|(at, ..)| rest.get(..at)).unwrap_or(rest);
            if !segment.is_empty() {
                tokens.extend_from_slice(&self.segment(tokenizer, segment)?);
            }
            let Some((at, length, token)) = next else { return Ok(tokens) };
            tokens.push(token);
            rest = rest.get(at + length..).unwrap_or_default();
        }
    }

    /// The first token that parts the text: where, how long, which. The longest
    /// of those at one place.
    fn next(&self, text: &str) -> Option<(usize, usize, u32)> {
        let places = text.char_indices().filter(|(_, first)| self.firsts.contains(first));
        places.into_iter().find_map(|(at, _)| {
            let here = text.get(at..)?;
            let found = self.parting.iter().find(|(content, _)| here.starts_with(content));
            found.map(|(content, token)| (at, content.len(), *token))
        })
    }

    fn segment(&self, tokenizer: &Tokenizer, text: &str) -> Result<Arc<[u32]>, PromptError> {
        if let Some(tokens) = self.lock().get(text) {
            return Ok(Arc::clone(tokens));
        }
        let encoding = tokenizer.encode_fast(text, false).map_err(|_| PromptError::Tokenizer)?;
        let tokens: Arc<[u32]> = encoding.get_ids().into();
        let mut known = self.lock();
        if known.len() >= SEGMENTS_MAX {
            known.clear();
        }
        known.insert(text.to_owned(), Arc::clone(&tokens));
        Ok(tokens)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<[u32]>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Goal: remembered tokens are the tokenizer's own, wherever special tokens
    /// stand, and the second time as the first.
    #[test]
    fn remembered_tokens_are_the_tokenizers_own() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny/tokenizer.json");
        let tokenizer = Tokenizer::from_file(path).unwrap();
        let segments = Segments::of(&tokenizer).unwrap();
        let texts = [
            "",
            "plain",
            "<|im_start|>",
            "<|im_start|>user\nhello  there <|im_end|>\n<|im_start|>assistant\n",
            " <|im_end|><|im_end|> \u{e9}\u{301} <|im_start",
        ];
        for text in texts.iter().chain(&texts) {
            let whole = tokenizer.encode_fast(*text, false).unwrap();
            assert_eq!(segments.encode(&tokenizer, text).unwrap(), whole.get_ids(), "{text:?}");
        }
    }
}
