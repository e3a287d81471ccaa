//! The tokenizer file: what the compiler writes and [`load`](super::Tokenizer::load) reads.
//!
//! Little endian, every section at a multiple of 8:
//!
//! | offset | type | meaning |
//! | --- | --- | --- |
//! | 0 | `[u8; 8]` | magic `WARMTOK\n` |
//! | 8 | u32 | format version |
//! | 12 | u32 | kind: byte-level BPE, SentencePiece-style BPE, or JSON |
//! | 16 | u64 | length of the file, bytes |
//! | 24 | u64 | `XXH3_64` of everything from offset 32 on |
//! | 32 | u32 | flags |
//! | 36 | u32 | sections that follow in the table |
//! | 40 | (u32, u32) each | section: offset from the start, length; bytes |
//!
//! # Invariants
//!
//! 1. Reading is total: [`Layout::read`] accepts or refuses any bytes, and
//!    every later access goes through a checked slice.
//! 2. The checksum is against accidents. Whoever forges one can have wrong ids,
//!    but no panic, no access out of bounds and no unbounded work.
//! 3. No section depends on the width of a pointer.
//!
//! Which tables mean what to the engine is known by the modules that use them.

use std::ops::Range;

use super::AlignedBytes;
use super::merge::MERGE_SLOT;
use super::words::WORD_SLOT;
use crate::limits::TOKENIZER_FILE_BYTES_MAX;

#[cfg(target_endian = "big")]
compile_error!("tokenizer files are used where they lie, which needs a little-endian machine");

/// First bytes of every tokenizer file.
pub(crate) const MAGIC: [u8; 8] = *b"WARMTOK\n";
/// Version of the layout; a reader accepts its own only.
pub(crate) const VERSION: u32 = 2;
/// Where the section table starts, in bytes.
pub(crate) const TABLE_AT: usize = 40;
/// Where the checksummed part starts, in bytes.
pub(crate) const CHECKED_AT: usize = 32;
/// Bytes of one entry of the section table.
pub(crate) const TABLE_ENTRY: usize = 8;

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Kind {
    /// BPE over bytes, behind a pre-tokenizer: Llama 3, Qwen, gpt-oss, DeepSeek.
    ByteLevel = 1,
    /// BPE over characters with byte fallback, spaces as U+2581: Gemma.
    SentencePiece = 2,
    /// A `tokenizer.json` as it is, for the `hf-tokenizers` engine.
    Json = 3,
}

impl Kind {
    fn from_u32(kind: u32) -> Option<Self> {
        match kind {
            1 => Some(Self::ByteLevel),
            2 => Some(Self::SentencePiece),
            3 => Some(Self::Json),
            _ => None,
        }
    }
}

/// Flag: text is brought to Normalization Form C before it is split.
pub(crate) const FLAG_NFC: u32 = 1;
const FLAGS_ALL: u32 = FLAG_NFC;

/// The sections, in the order of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Section {
    /// u16 per byte value: its class in the pre-tokenizer's automaton.
    DfaClasses,
    /// u16 per (state, class): next state. State 0 is dead, 1 is the start...
    DfaTransitions,
    /// u8 per state from 2 on: ... and these report a match; see `split`.
    DfaMatches,
    /// u32 per byte value: its token.
    ByteTokens,
    /// u16 per 256 code points: page number plus 1, or 0 for none.
    CharPages,
    /// u32 per code point of a page: its token, or [`NO_TOKEN`].
    CharTokens,
    /// u16 pilots of the merge table.
    MergePilots,
    /// Three u32 per slot: left id, right id and rank, 20 bits each from the
    /// lowest bit up, in two; and the id that the merge yields.
    MergeSlots,
    /// u16 pilots of the table of whole words.
    WordPilots,
    /// Four u32 per slot: a word and its id; see `words`.
    WordSlots,
    /// The bytes of long words but the first eight.
    WordBytes,
    /// u64 words of a bit set: which pairs of characters can be merged across.
    Seams,
    /// u32 triples: trie of the added tokens matched on raw text; see `added`.
    AddedNodes,
    /// u32 per edge of that trie.
    AddedEdges,
    /// The same, matched on normalized text.
    NormalAddedNodes,
    /// u32 per edge of that trie.
    NormalAddedEdges,
    /// A `tokenizer.json`, as it is.
    Json,
}

/// Number of sections.
pub(crate) const SECTIONS: usize = Section::Json as usize + 1;

/// "No token" in tables of ids.
pub(crate) const NO_TOKEN: u32 = u32::MAX;

/// Why a file was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// Not a tokenizer file, or cut short.
    NotATokenizer,
    /// A tokenizer file of another format version: the sidecar and the module
    /// are of different releases.
    OtherVersion,
    /// Longer than [`TOKENIZER_FILE_BYTES_MAX`].
    TooLong,
    /// The checksum does not match: damaged on the way.
    Checksum,
    /// The checksum matches but a table is malformed.
    Malformed,
    /// Holds a `tokenizer.json`, and this build has no engine for it.
    NeedsHfTokenizers,
    /// The `hf-tokenizers` engine refuses the `tokenizer.json`.
    HfRefused,
}

impl LoadError {
    /// A fixed word for metrics and logs.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotATokenizer => "tokenizer_not_a_file",
            Self::OtherVersion => "tokenizer_other_version",
            Self::TooLong => "tokenizer_too_long",
            Self::Checksum => "tokenizer_checksum",
            Self::Malformed => "tokenizer_malformed",
            Self::NeedsHfTokenizers => "tokenizer_needs_hf",
            Self::HfRefused => "tokenizer_hf_refused",
        }
    }
}

impl std::fmt::Display for LoadError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotATokenizer => "not a tokenizer file, or cut short",
            Self::OtherVersion => "tokenizer file of another format version",
            Self::TooLong => "tokenizer file is too long",
            Self::Checksum => "tokenizer file is damaged: checksum differs",
            Self::Malformed => "tokenizer file has a malformed table",
            Self::NeedsHfTokenizers => "tokenizer needs the hf-tokenizers build of the module",
            Self::HfRefused => "tokenizer.json refused by the hf-tokenizers engine",
        })
    }
}

impl std::error::Error for LoadError {}

/// Where the sections of a checked file lie.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) kind: Kind,
    pub(crate) flags: u32,
    /// States of the automaton times classes is the number of transitions;
    /// `stride` is the number of classes, the last one being the end of text.
    pub(crate) stride: usize,
    sections: [Range<usize>; SECTIONS],
}

impl Layout {
    /// Checks a whole file.
    ///
    /// # Errors
    ///
    /// [`LoadError`] by what is wrong first: magic, version, length, checksum,
    /// tables. Takes one pass over the file and one over the automaton.
    pub(crate) fn read(file: &AlignedBytes) -> Result<Self, LoadError> {
        let bytes = file.as_bytes();
        if bytes.len() > TOKENIZER_FILE_BYTES_MAX {
            return Err(LoadError::TooLong);
        }
        if bytes.get(..MAGIC.len()) != Some(MAGIC.as_slice()) {
            return Err(LoadError::NotATokenizer);
        }
        let version = u32_at(bytes, 8).ok_or(LoadError::NotATokenizer)?;
        if version != VERSION {
            return Err(LoadError::OtherVersion);
        }
        if u64_at(bytes, 16) != Some(bytes.len() as u64) {
            return Err(LoadError::NotATokenizer);
        }
        let checked = bytes.get(CHECKED_AT..).ok_or(LoadError::NotATokenizer)?;
        if u64_at(bytes, 24) != Some(xxhash_rust::xxh3::xxh3_64(checked)) {
            return Err(LoadError::Checksum);
        }
        Self::read_checked(bytes).ok_or(LoadError::Malformed)
    }

    fn read_checked(bytes: &[u8]) -> Option<Self> {
        let kind = Kind::from_u32(u32_at(bytes, 12)?)?;
        let flags = u32_at(bytes, 32)?;
        if flags & !FLAGS_ALL != 0 || u32_at(bytes, 36)? as usize != SECTIONS {
            return None;
        }
        let mut sections = [const { 0..0 }; SECTIONS];
        for (index, section) in sections.iter_mut().enumerate() {
            let entry = TABLE_AT + index * TABLE_ENTRY;
            let start = u32_at(bytes, entry)? as usize;
            let end = start.checked_add(u32_at(bytes, entry + 4)? as usize)?;
            if !start.is_multiple_of(8) || end > bytes.len() {
                return None;
            }
            *section = start..end;
        }
        let mut layout = Self { kind, flags, stride: 0, sections };
        layout.check_tables(bytes)?;
        Some(layout)
    }

    /// Checks what the engine relies on to be correct rather than merely safe.
    fn check_tables(&mut self, bytes: &[u8]) -> Option<()> {
        if self.kind == Kind::Json {
            return Some(());
        }
        let tables = self.tables_with_stride(bytes, 1)?;
        check_sizes(self.kind, &tables)?;
        if self.kind == Kind::ByteLevel {
            self.stride = usize::from(tables.dfa_classes.iter().copied().max()?) + 2;
            let states = tables.dfa_transitions.len() / self.stride;
            let whole = states * self.stride == tables.dfa_transitions.len();
            let known = tables.dfa_matches.len().checked_add(2)? <= states;
            let inside = tables.dfa_transitions.iter().all(|&next| usize::from(next) < states);
            (whole && known && inside).then_some(())?;
        }
        super::added::check(tables.added)?;
        super::added::check(tables.normal_added)
    }

    /// The tables of `bytes`, which are those that were read.
    ///
    /// `None` cannot happen for the bytes the layout was read from, whose
    /// sections were all sliced once by then.
    #[inline]
    pub(crate) fn tables<'a>(&self, bytes: &'a [u8]) -> Option<Tables<'a>> {
        self.tables_with_stride(bytes, self.stride)
    }

    fn tables_with_stride<'a>(&self, bytes: &'a [u8], stride: usize) -> Option<Tables<'a>> {
        Some(Tables {
            dfa_classes: self.typed(bytes, Section::DfaClasses)?,
            dfa_transitions: self.typed(bytes, Section::DfaTransitions)?,
            dfa_matches: self.typed(bytes, Section::DfaMatches)?,
            dfa_stride: stride,
            byte_tokens: self.typed(bytes, Section::ByteTokens)?,
            char_pages: self.typed(bytes, Section::CharPages)?,
            char_tokens: self.typed(bytes, Section::CharTokens)?,
            merge_pilots: self.typed(bytes, Section::MergePilots)?,
            merge_slots: self.typed(bytes, Section::MergeSlots)?,
            word_pilots: self.typed(bytes, Section::WordPilots)?,
            word_slots: self.typed(bytes, Section::WordSlots)?,
            word_bytes: self.typed(bytes, Section::WordBytes)?,
            seams: self.typed(bytes, Section::Seams)?,
            added: Trie {
                nodes: self.typed(bytes, Section::AddedNodes)?,
                edges: self.typed(bytes, Section::AddedEdges)?,
            },
            normal_added: Trie {
                nodes: self.typed(bytes, Section::NormalAddedNodes)?,
                edges: self.typed(bytes, Section::NormalAddedEdges)?,
            },
        })
    }

    /// The JSON text of a [`Kind::Json`] file.
    #[cfg(feature = "hf-tokenizers")]
    pub(crate) fn json<'a>(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        self.typed(bytes, Section::Json)
    }

    fn typed<'a, T: bytemuck::AnyBitPattern>(
        &self,
        bytes: &'a [u8],
        section: Section,
    ) -> Option<&'a [T]> {
        let range = self.sections.get(section as usize)?;
        bytemuck::try_cast_slice(bytes.get(range.clone())?).ok()
    }
}

/// The tables of a file, as slices of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tables<'a> {
    pub(crate) dfa_classes: &'a [u16],
    pub(crate) dfa_transitions: &'a [u16],
    pub(crate) dfa_matches: &'a [u8],
    pub(crate) dfa_stride: usize,
    pub(crate) byte_tokens: &'a [u32],
    pub(crate) char_pages: &'a [u16],
    pub(crate) char_tokens: &'a [u32],
    pub(crate) merge_pilots: &'a [u16],
    pub(crate) merge_slots: &'a [u32],
    pub(crate) word_pilots: &'a [u16],
    pub(crate) word_slots: &'a [u32],
    pub(crate) word_bytes: &'a [u8],
    pub(crate) seams: &'a [u64],
    pub(crate) added: Trie<'a>,
    pub(crate) normal_added: Trie<'a>,
}

/// The two tables of a trie of added tokens; see `added`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trie<'a> {
    pub(crate) nodes: &'a [u32],
    pub(crate) edges: &'a [u32],
}

fn check_sizes(kind: Kind, tables: &Tables<'_>) -> Option<()> {
    let sizes_fit = tables.byte_tokens.len() == 256
        && tables.merge_slots.len().is_multiple_of(MERGE_SLOT)
        && tables.word_slots.len().is_multiple_of(WORD_SLOT)
        && tables.char_tokens.len().is_multiple_of(256)
        && tables
            .char_pages
            .iter()
            .all(|&page| usize::from(page) * 256 <= tables.char_tokens.len());
    let kind_fits = match kind {
        Kind::ByteLevel => tables.dfa_classes.len() == 256,
        Kind::SentencePiece => tables.seams.len().is_power_of_two(),
        Kind::Json => false,
    };
    (sizes_fit && kind_fits).then_some(())
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}
