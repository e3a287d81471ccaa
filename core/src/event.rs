//! Event: what an engine says about its KV cache, whatever the engine.
//!
//! An adapter of the sidecar turns an engine's wire format into these; the
//! sidecar's state turns these into deltas. Nothing here is believed yet: block
//! counts, tokens and parents are checked where they are applied.
//!
//! # Terms
//!
//! - *page*: the unit in which an engine names cached tokens; `page_size`
//!   tokens, one engine hash. For most engines it is the block of the model;
//!   smaller pages are put together into blocks.
//! - *medium*: where the engine holds a page.
//! - *group*: engines with several kinds of attention keep several caches and
//!   number them; only the main attention's says what can be reused.

use crate::ids::{BlockHash, EngineHash, TokenId};

/// Where an engine holds a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Medium {
    /// The accelerator's memory: usable at once.
    Device,
    /// Memory of the host.
    HostPinned,
    /// A disk of the host.
    Disk,
    /// Shared or remote storage.
    External,
}

impl Medium {
    /// Reads an engine's word; `None` for a word that is not known, which must
    /// never count as [`Medium::Device`].
    ///
    /// The words are those of vLLM, SGLang, TensorRT-LLM and their connectors.
    /// An absent or empty word means the device.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        const WORDS: [(&str, Medium); 16] = [
            ("", Medium::Device),
            ("GPU", Medium::Device),
            ("DEVICE", Medium::Device),
            ("CPU", Medium::HostPinned),
            ("CPU_PINNED", Medium::HostPinned),
            ("CPU_TIER1", Medium::HostPinned),
            ("CPU_TIER2", Medium::Disk),
            ("DISK", Medium::Disk),
            ("NVME", Medium::Disk),
            ("STORAGE", Medium::Disk),
            ("FS", Medium::Disk),
            ("OBJ", Medium::External),
            ("EXTERNAL", Medium::External),
            ("NETWORK", Medium::External),
            ("REMOTE", Medium::External),
            ("SHARED", Medium::External),
        ];
        if word.eq_ignore_ascii_case("SHARED_STORAGE") {
            return Some(Self::External);
        }
        WORDS.iter().find(|(known, _)| known.eq_ignore_ascii_case(word)).map(|(_, medium)| *medium)
    }
}

/// What kind of attention a group of caches serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupKind {
    /// Full, multi-head-latent or sink-full attention: what it holds can be
    /// reused from the first token on.
    Main,
    /// Any other: windows, state-space layers, cross attention, ….
    Other,
}

impl GroupKind {
    /// Reads vLLM's word for the kind of a cache. Unknown words are `Other`.
    #[must_use]
    pub fn parse(word: &str) -> Self {
        match word {
            "full_attention" | "mla_attention" | "sink_full_attention" => Self::Main,
            _ => Self::Other,
        }
    }
}

/// Which of an engine's caches an event is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Group {
    /// Number of the group; absent if the engine has only one.
    pub index: Option<u32>,
    /// Its kind. Stored events may carry it, removed events never do.
    pub kind: Option<GroupKind>,
}

/// A hash of an object (image, audio, …) inside one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ObjectHash {
    /// Which page of the event, from 0.
    pub page: usize,
    /// The object's hash.
    pub hash: u64,
}

/// An engine now holds pages, chained to each other in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// One engine hash a page.
    pub pages: Vec<EngineHash>,
    /// The page before the first of `pages`; `None` at the start of a prompt.
    pub parent: Option<EngineHash>,
    /// `page_size` tokens a page, and one more if `pairs`. Empty in
    /// placeholders, which name pages without saying what is in them.
    pub tokens: Vec<TokenId>,
    /// Tokens of one page.
    pub page_size: u32,
    /// Whether the engine sent pairs of neighbouring tokens (eagle-style
    /// drafts); `tokens` are then their first parts and the last second part.
    pub pairs: bool,
    /// Name of the LoRA adapter.
    pub lora: Option<String>,
    /// Cache salt. Engines name it at a prompt's start only.
    pub cache_salt: Option<String>,
    /// Objects inside the pages, in order of pages.
    pub objects: Vec<ObjectHash>,
    /// How many of the first pages carry no key that we cannot hash.
    pub understood: usize,
    /// Where the pages are.
    pub medium: Medium,
    /// Which cache they are in.
    pub group: Group,
}

/// An engine now holds blocks, as a relay says it that has hashed them already
/// (Dynamo's event plane): without tokens, and always of the model's block size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hashed {
    /// The engine's own name of each block, and the hash of its tokens and salt.
    /// Chained to each other in the order given.
    pub blocks: Vec<(EngineHash, BlockHash)>,
    /// The block before the first of `blocks`; `None` at the start of a prompt.
    pub parent: Option<EngineHash>,
    /// Where the blocks are.
    pub medium: Medium,
}

/// An engine no longer holds pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removed {
    /// The pages.
    pub pages: Vec<EngineHash>,
    /// Where they were.
    pub medium: Medium,
    /// Which cache they were in.
    pub group: Group,
}

/// One event of an engine's cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvEvent {
    /// Pages appeared.
    Stored(Stored),
    /// Blocks appeared, hashed already.
    Hashed(Hashed),
    /// Pages went.
    Removed(Removed),
    /// Everything went.
    Cleared,
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn media_are_read_and_unknown_ones_are_not_the_device() {
        for (word, expected) in [
            ("GPU", Some(Medium::Device)),
            ("", Some(Medium::Device)),
            ("cpu", Some(Medium::HostPinned)),
            ("CPU_PINNED", Some(Medium::HostPinned)),
            ("CPU_TIER2", Some(Medium::Disk)),
            ("STORAGE", Some(Medium::Disk)),
            ("SHARED_STORAGE", Some(Medium::External)),
            ("HBM4", None),
            ("GPU ", None),
        ] {
            assert_eq!(Medium::parse(word), expected, "{word:?}");
        }
    }

    #[test]
    fn only_main_attention_kinds_are_main() {
        for word in ["full_attention", "mla_attention", "sink_full_attention"] {
            assert_eq!(GroupKind::parse(word), GroupKind::Main);
        }
        for word in ["sliding_window", "mamba", "unknown", "", "sliding_window_mla"] {
            assert_eq!(GroupKind::parse(word), GroupKind::Other);
        }
    }
}
