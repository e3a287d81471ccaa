//! One pre-token to its ids: a word of the vocabulary, or remembered, or merged.
//!
//! The order is that of cost: most words are one token, which takes one cache
//! line to find out; a remembered word takes one more, and merging one or two
//! for every pair.

use super::cache::{LongWords, ShortWords};
use super::file::{Kind, NO_TOKEN, Tables};
use super::key::WordKey;
use super::merge::{AsciiPairs, Merger};
use super::perfect_hash;
use crate::ids::TokenId;
use crate::limits::{PRETOKEN_BYTES_MAX, WORD_CACHE_LONG_ENTRIES, WORD_CACHE_SHORT_ENTRIES};

/// What SentencePiece vocabularies write for a space.
pub(crate) const LOW_LINE: char = '\u{2581}';

/// Bytes from which on a SentencePiece word is also cut elsewhere than at a
/// space, wherever no merge can reach across.
const SEAM_BYTES_MIN: usize = 32;

/// Words that are looked up together.
pub(crate) const BATCH: usize = 16;

/// Numbers of one slot of the table of whole words: the first bytes of the word
/// in two or three, the rest of a long word's place in the third, and id and
/// length in the last.
pub(crate) const WORD_SLOT: usize = 4;
/// Bytes that a slot holds of a word that is no longer than that; of a longer
/// one it holds the first eight, and where the others are.
pub(crate) const WORD_SLOT_BYTES: usize = 12;
/// Where the length starts in the last number of a slot; below is the id.
pub(crate) const WORD_LEN_SHIFT: u32 = 20;
/// Longest word that the table of whole words holds, in bytes.
#[cfg(any(test, feature = "compile"))]
pub(crate) const WORD_BYTES_MAX: usize = (1 << (32 - WORD_LEN_SHIFT)) - 2;

/// The state that turns words into ids.
pub(crate) struct Words {
    short: ShortWords,
    long: LongWords,
    pairs: AsciiPairs,
    merger: Merger,
}

impl Words {
    /// Empty caches for a tokenizer.
    pub(crate) fn new(tables: &Tables<'_>, kind: Kind) -> Self {
        Self {
            short: ShortWords::new(WORD_CACHE_SHORT_ENTRIES),
            long: LongWords::new(WORD_CACHE_LONG_ENTRIES),
            pairs: AsciiPairs::new(tables, |byte| ascii_symbol(tables, kind, byte)),
            merger: Merger::new(tables),
        }
    }

    /// Bytes of memory held.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.short.memory_bytes()
            + self.long.memory_bytes()
            + self.pairs.memory_bytes()
            + self.merger.memory_bytes()
    }

    /// Appends the ids of the words that lie side by side in `text` from `start`
    /// on and end at `ends`, of which the first [`BATCH`] count. `None` if one is
    /// not within `text`, or not between characters.
    ///
    /// The words are pre-tokens; for [`Kind::SentencePiece`] with a space for
    /// every [`LOW_LINE`].
    #[inline]
    pub(crate) fn encode(
        &mut self,
        tables: &Tables<'_>,
        kind: Kind,
        text: &str,
        start: usize,
        ends: &[usize],
        out: &mut Vec<TokenId>,
    ) -> Option<()> {
        // Each loop does one thing for all words, so that the processor waits
        // for the tables of several at the same time.
        let mut keys = [WordKey::default(); BATCH];
        let mut places = [0; BATCH];
        let mut whole = [NO_TOKEN; BATCH];
        let bytes = text.as_bytes();
        let slots = tables.word_slots.len() / WORD_SLOT;
        let mut at = start;
        for ((&end, key), place) in ends.iter().zip(&mut keys).zip(&mut places) {
            *key = WordKey::of(bytes, at, bytes.get(at..end)?);
            *place = perfect_hash::locate(key.hash, tables.word_pilots, slots);
            at = end;
        }
        at = start;
        for (((&end, key), &place), id) in ends.iter().zip(&keys).zip(&places).zip(&mut whole) {
            *id = whole_word(tables, place, bytes.get(at..end)?, key);
            at = end;
        }
        at = start;
        for ((&end, key), &id) in ends.iter().zip(&keys).zip(&whole) {
            if id == NO_TOKEN {
                self.encode_several(tables, kind, text.get(at..end)?, key, out);
            } else {
                out.push(id);
            }
            at = end;
        }
        Some(())
    }

    /// Appends the ids of a word that is no token.
    fn encode_several(
        &mut self,
        tables: &Tables<'_>,
        kind: Kind,
        word: &str,
        key: &WordKey,
        out: &mut Vec<TokenId>,
    ) {
        let known = match word.len() {
            ..=WordKey::BYTES => self.short.find(word.len(), key),
            _ => self.long.find(word.as_bytes(), key),
        };
        match known {
            Some(ids) => out.extend_from_slice(ids),
            None => self.merge(tables, kind, word, key, out),
        }
    }

    /// Merges a word that is not known, and remembers it.
    fn merge(
        &mut self,
        tables: &Tables<'_>,
        kind: Kind,
        word: &str,
        key: &WordKey,
        out: &mut Vec<TokenId>,
    ) {
        self.merger.clear();
        if word.is_ascii() {
            for &byte in word.as_bytes() {
                let symbol = ascii_symbol(tables, kind, byte);
                self.merger.push_ascii(&self.pairs, symbol, byte);
            }
        } else {
            first_symbols(tables, kind, word, &mut self.merger);
        }
        let ids = self.merger.merge(tables);
        out.extend_from_slice(ids);
        if word.len() <= WordKey::BYTES {
            self.short.remember(word.len(), key, ids);
        } else {
            self.long.remember(word.as_bytes(), key, ids);
        }
    }
}

/// The id of `word`, whose slot is at `place`, if it is a word that encodes to
/// one token; else [`NO_TOKEN`].
#[inline]
fn whole_word(tables: &Tables<'_>, place: usize, word: &[u8], key: &WordKey) -> TokenId {
    let slot = tables.word_slots.get(place * WORD_SLOT..);
    let Some(&[first, second, third, last]) = slot.and_then(<[u32]>::first_chunk) else {
        return NO_TOKEN;
    };
    let begins = u64::from(first) | (u64::from(second) << 32);
    if begins != key.first || (last >> WORD_LEN_SHIFT) as usize != word.len() {
        return NO_TOKEN;
    }
    let same = if word.len() <= WORD_SLOT_BYTES {
        u64::from(third) == key.second
    } else {
        let rest = word.get(size_of::<u64>()..).unwrap_or_default();
        let bytes = tables.word_bytes.get(third as usize..).unwrap_or_default();
        bytes.starts_with(rest)
    };
    if same { last & ((1 << WORD_LEN_SHIFT) - 1) } else { NO_TOKEN }
}

/// The symbol that an ASCII character is merged from.
#[inline]
fn ascii_symbol(tables: &Tables<'_>, kind: Kind, byte: u8) -> TokenId {
    if kind == Kind::SentencePiece {
        let id = char_token(tables, char::from(byte));
        if id != NO_TOKEN {
            return id;
        }
    }
    byte_token(tables, byte)
}

#[inline]
fn byte_token(tables: &Tables<'_>, byte: u8) -> TokenId {
    tables.byte_tokens.get(usize::from(byte)).copied().unwrap_or_default()
}

/// Hands over the symbols that merging starts from.
fn first_symbols(tables: &Tables<'_>, kind: Kind, word: &str, merger: &mut Merger) {
    for character in word.chars() {
        if let Ok(byte @ 0..=0x7F) = u8::try_from(character) {
            merger.push(tables, ascii_symbol(tables, kind, byte));
            continue;
        }
        let id = char_token(tables, character);
        if id == NO_TOKEN {
            let mut buffer = [0; 4];
            for byte in character.encode_utf8(&mut buffer).bytes() {
                merger.push(tables, byte_token(tables, byte));
            }
        } else {
            merger.push(tables, id);
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
