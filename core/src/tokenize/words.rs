//! One pre-token to its ids: remembered, or a word of the vocabulary, or merged.
//!
//! The order is that of cost: a remembered word takes one cache line, a whole
//! word of the vocabulary four, merging one or two for every pair.

use super::cache::WordCache;
use super::file::{Kind, NO_TOKEN, Tables};
use super::merge::Merger;
use super::perfect_hash;
use crate::ids::TokenId;
use crate::limits::{PRETOKEN_BYTES_MAX, WORD_CACHE_LONG_ENTRIES, WORD_CACHE_SHORT_ENTRIES};

/// Bytes and ids of a short remembered word.
const SHORT: (usize, usize) = (22, 6);
/// Bytes and ids of a long remembered word.
const LONG: (usize, usize) = (94, 24);

/// What SentencePiece vocabularies write for a space.
pub(crate) const LOW_LINE: char = '\u{2581}';

/// Bytes from which on a SentencePiece word is also cut elsewhere than at a
/// space, wherever no merge can reach across.
const SEAM_BYTES_MIN: usize = 32;

/// The state that turns words into ids.
pub(crate) struct Words {
    short: WordCache<{ SHORT.0 }, { SHORT.1 }>,
    long: WordCache<{ LONG.0 }, { LONG.1 }>,
    merger: Merger,
}

impl Words {
    /// Empty caches.
    pub(crate) fn new() -> Self {
        Self {
            short: WordCache::new(WORD_CACHE_SHORT_ENTRIES),
            long: WordCache::new(WORD_CACHE_LONG_ENTRIES),
            merger: Merger::default(),
        }
    }

    /// Bytes of memory held.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.short.memory_bytes() + self.long.memory_bytes() + self.merger.memory_bytes()
    }

    /// Appends the ids of one word to `out`.
    ///
    /// `word`: a pre-token; for [`Kind::SentencePiece`] with a space for every
    /// [`LOW_LINE`].
    #[inline]
    pub(crate) fn encode(
        &mut self,
        tables: &Tables<'_>,
        kind: Kind,
        word: &str,
        out: &mut Vec<TokenId>,
    ) {
        let bytes = word.as_bytes();
        let hash = word_hash(bytes);
        let mut known = None;
        if bytes.len() <= SHORT.0 {
            known = self.short.find(bytes, hash);
        }
        if known.is_none() && bytes.len() <= LONG.0 {
            known = self.long.find(bytes, hash);
        }
        if let Some(ids) = known {
            out.extend_from_slice(ids);
            return;
        }
        let whole = whole_word(tables, bytes, hash);
        let ids = match &whole {
            Some(id) => std::slice::from_ref(id),
            None => {
                first_symbols(tables, kind, word, self.merger.symbols());
                self.merger.merge(tables)
            }
        };
        out.extend_from_slice(ids);
        if bytes.len() <= SHORT.0 && ids.len() <= SHORT.1 {
            self.short.remember(bytes, hash, ids);
        } else if bytes.len() <= LONG.0 && ids.len() <= LONG.1 {
            self.long.remember(bytes, hash, ids);
        }
    }
}

/// The hash of a word, for the caches and the table of whole words.
#[inline]
pub(crate) fn word_hash(word: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(word)
}

/// The id of `word` if it is a word that encodes to one token.
#[inline]
fn whole_word(tables: &Tables<'_>, word: &[u8], hash: u64) -> Option<TokenId> {
    let place = perfect_hash::locate(hash, tables.word_pilots, tables.word_slots.len());
    let id = *tables.word_slots.get(place)?;
    let [start, end] = *tables.word_offsets.get(id as usize..)?.first_chunk()?;
    (tables.word_bytes.get(start as usize..end as usize)? == word).then_some(id)
}

/// Appends the symbols that merging starts from.
fn first_symbols(tables: &Tables<'_>, kind: Kind, word: &str, symbols: &mut Vec<TokenId>) {
    let byte_token =
        |byte: u8| tables.byte_tokens.get(usize::from(byte)).copied().unwrap_or_default();
    for character in word.chars() {
        if kind == Kind::ByteLevel
            && let Ok(byte @ 0..=0x7F) = u8::try_from(character)
        {
            symbols.push(byte_token(byte));
            continue;
        }
        let id = char_token(tables, character);
        if id == NO_TOKEN {
            let mut buffer = [0; 4];
            symbols.extend(character.encode_utf8(&mut buffer).bytes().map(byte_token));
        } else {
            symbols.push(id);
        }
    }
}

/// The token of a character, or [`NO_TOKEN`].
#[inline]
fn char_token(tables: &Tables<'_>, character: char) -> TokenId {
    let code = character as usize;
    let page = tables.char_pages.get(code >> 8).copied().unwrap_or(0);
    let Some(page) = usize::from(page).checked_sub(1) else { return NO_TOKEN };
    tables.char_tokens.get(page * 256 + (code & 0xFF)).copied().unwrap_or(NO_TOKEN)
}

/// The next word of a SentencePiece text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SeamWord {
    /// Where it ends.
    pub(crate) end: usize,
    /// Whether it holds a [`LOW_LINE`], to be written as a space first.
    pub(crate) low_line: bool,
}

/// Cuts a word off the start of `text`, where no merge can reach across.
///
/// HF merges the whole text as one word. A merge across a border makes a token
/// that holds the two characters at the border next to each other, so a border
/// between characters that stand together in no product of a merge is exact.
///
/// `None` if the word would be longer than [`PRETOKEN_BYTES_MAX`].
#[inline]
pub(crate) fn seam_word(tables: &Tables<'_>, text: &str) -> Option<SeamWord> {
    let mut low_line = false;
    let mut left = None;
    for (at, character) in text.char_indices() {
        let right = if character == LOW_LINE { ' ' } else { character };
        if let Some(left) = left
            && (right == ' ' || at >= SEAM_BYTES_MIN)
            && !mergeable(tables, left, right)
        {
            return Some(SeamWord { end: at, low_line });
        }
        if at > PRETOKEN_BYTES_MAX {
            return None;
        }
        low_line |= character == LOW_LINE;
        left = Some(right);
    }
    (text.len() <= PRETOKEN_BYTES_MAX).then_some(SeamWord { end: text.len(), low_line })
}

/// Whether the bit of a pair of characters is set: with no false negatives.
#[inline]
fn mergeable(tables: &Tables<'_>, left: char, right: char) -> bool {
    let (word, bit) = seam_bit(left, right, tables.seams.len());
    tables.seams.get(word).is_some_and(|bits| (bits >> bit) & 1 == 1)
}

/// Where the bit of a pair is, in a set of `words` words: word and bit.
#[inline]
pub(crate) fn seam_bit(left: char, right: char, words: usize) -> (usize, u32) {
    let hash = perfect_hash::mix((u64::from(left as u32) << 21) | u64::from(right as u32));
    let word = (hash >> 6) & (words as u64).wrapping_sub(1);
    let [bit, ..] = hash.to_le_bytes();
    (usize::try_from(word).unwrap_or(0), u32::from(bit & 63))
}
