//! The parts of a `tokenizer.json` that decide on ids.
//!
//! Unknown fields are passed over, as HF's reader does; fields whose value
//! changes ids are either taken in here or refused by whoever reads them.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// The whole file. Post-processor, decoder, truncation and padding are not
/// read: without special tokens they change no id.
#[derive(Deserialize)]
pub(super) struct TokenizerJson {
    #[serde(default)]
    pub(super) version: Option<String>,
    #[serde(default)]
    pub(super) added_tokens: Vec<AddedToken>,
    #[serde(default)]
    pub(super) normalizer: Value,
    #[serde(default)]
    pub(super) pre_tokenizer: Value,
    pub(super) model: Model,
}

/// A string that becomes one token wherever it occurs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct AddedToken {
    /// The string.
    pub content: String,
    /// Matches whole words only. Refused.
    pub single_word: bool,
    /// Takes the white space before it. Refused.
    pub lstrip: bool,
    /// Takes the white space after it. Refused.
    pub rstrip: bool,
    /// Matched on the normal form of the text, not on the text.
    pub normalized: bool,
}

/// The model. Fields of other kinds of model than BPE are left out.
#[derive(Deserialize)]
pub(super) struct Model {
    #[serde(rename = "type", default)]
    pub(super) kind: Option<String>,
    #[serde(default)]
    pub(super) dropout: Option<f64>,
    #[serde(default)]
    pub(super) continuing_subword_prefix: Option<String>,
    #[serde(default)]
    pub(super) end_of_word_suffix: Option<String>,
    #[serde(default)]
    pub(super) byte_fallback: Option<bool>,
    #[serde(default)]
    pub(super) ignore_merges: Option<bool>,
    #[serde(default)]
    pub(super) vocab: Vocab,
    #[serde(default)]
    pub(super) merges: Option<Vec<Merge>>,
}

/// Token strings and their ids, in the order of the file.
#[derive(Default)]
pub(super) struct Vocab(pub(super) Vec<(String, u32)>);

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(VocabVisitor)
    }
}

struct VocabVisitor;

impl<'de> Visitor<'de> for VocabVisitor {
    type Value = Vocab;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of token strings to ids")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocab, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Vocab(entries))
    }

    /// The vocabulary of a Unigram model: refused later, by the model's type.
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vocab, A::Error> {
        while seq.next_element::<serde::de::IgnoredAny>()?.is_some() {}
        Ok(Vocab::default())
    }
}

/// One merge: the two strings that become one.
pub(super) struct Merge(pub(super) String, pub(super) String);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MergeVisitor)
    }
}

struct MergeVisitor;

impl<'de> Visitor<'de> for MergeVisitor {
    type Value = Merge;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a pair of strings, or two strings with one space between them")
    }

    fn visit_str<E: serde::de::Error>(self, both: &str) -> Result<Merge, E> {
        let mut parts = both.split(' ');
        match (parts.next(), parts.next(), parts.next()) {
            (Some(left), Some(right), None) => Ok(Merge(left.to_owned(), right.to_owned())),
            _ => Err(E::custom("a merge is not two strings with one space between them")),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Merge, A::Error> {
        let missing = || serde::de::Error::custom("a merge has fewer than two strings");
        let left = seq.next_element()?.ok_or_else(missing)?;
        let right = seq.next_element()?.ok_or_else(missing)?;
        match seq.next_element::<serde::de::IgnoredAny>()? {
            None => Ok(Merge(left, right)),
            Some(_) => Err(serde::de::Error::custom("a merge has more than two strings")),
        }
    }
}
