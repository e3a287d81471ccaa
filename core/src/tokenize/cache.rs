//! Remembers the ids of recent words, in fixed memory.
//!
//! Direct-mapped: a word has one place, and a newer word takes it. A hit
//! compares the whole word, not its hash: a client can construct two words of
//! equal hash, and a false hit would yield wrong ids.

use super::key::WordKey;
use crate::ids::TokenId;

/// Ids of a short word that is remembered.
pub(crate) const SHORT_IDS: usize = 7;
/// Bytes and ids of a long word that is remembered.
const LONG_BYTES: usize = 94;
const LONG_IDS: usize = 24;

/// A remembered word that is no longer than its key.
#[derive(Clone, Copy)]
struct Short {
    first: u64,
    second: u64,
    /// Bytes of the word; 0 in an entry never used.
    len: u8,
    /// Ids of the word.
    count: u8,
    ids: [TokenId; SHORT_IDS],
}

/// A cache of words of up to [`WordKey::BYTES`] bytes.
pub(crate) struct ShortWords {
    entries: Box<[Short]>,
}

impl ShortWords {
    /// An empty cache of `entries` places.
    pub(crate) fn new(entries: usize) -> Self {
        let empty = Short { first: 0, second: 0, len: 0, count: 0, ids: [0; SHORT_IDS] };
        Self { entries: vec![empty; entries].into_boxed_slice() }
    }

    /// Bytes of memory held.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.entries.len() * size_of::<Short>()
    }

    /// The ids of the word of `len` bytes and that key, if it is remembered.
    #[inline]
    pub(crate) fn find(&self, len: usize, key: &WordKey) -> Option<&[TokenId]> {
        let entry = self.entries.get(place(key.hash, self.entries.len()))?;
        if entry.first != key.first || entry.second != key.second || usize::from(entry.len) != len {
            return None;
        }
        entry.ids.get(..usize::from(entry.count))
    }

    /// Remembers a word, unless it or its ids are too long.
    pub(crate) fn remember(&mut self, len: usize, key: &WordKey, ids: &[TokenId]) {
        let place = place(key.hash, self.entries.len());
        let Some(entry) = self.entries.get_mut(place) else { return };
        let (Ok(len), Ok(count)) = (u8::try_from(len), u8::try_from(ids.len())) else { return };
        if usize::from(len) > WordKey::BYTES || ids.len() > SHORT_IDS {
            return;
        }
        entry.ids.iter_mut().zip(ids).for_each(|(to, &from)| *to = from);
        (entry.first, entry.second, entry.len, entry.count) = (key.first, key.second, len, count);
    }
}

/// A remembered long word.
#[derive(Clone, Copy)]
struct Long {
    /// Bytes of the word; 0 in an entry never used.
    len: u8,
    /// Ids of the word.
    count: u8,
    word: [u8; LONG_BYTES],
    ids: [TokenId; LONG_IDS],
}

/// A cache of longer words.
pub(crate) struct LongWords {
    entries: Box<[Long]>,
}

impl LongWords {
    /// An empty cache of `entries` places.
    pub(crate) fn new(entries: usize) -> Self {
        let empty = Long { len: 0, count: 0, word: [0; LONG_BYTES], ids: [0; LONG_IDS] };
        Self { entries: vec![empty; entries].into_boxed_slice() }
    }

    /// Bytes of memory held.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.entries.len() * size_of::<Long>()
    }

    /// The ids of `word`, if it is remembered.
    #[inline]
    pub(crate) fn find(&self, word: &[u8], key: &WordKey) -> Option<&[TokenId]> {
        let entry = self.entries.get(place(key.hash, self.entries.len()))?;
        if usize::from(entry.len) != word.len() || entry.word.get(..word.len())? != word {
            return None;
        }
        entry.ids.get(..usize::from(entry.count))
    }

    /// Remembers `word`, unless it or its ids are too long.
    pub(crate) fn remember(&mut self, word: &[u8], key: &WordKey, ids: &[TokenId]) {
        let place = place(key.hash, self.entries.len());
        let Some(entry) = self.entries.get_mut(place) else { return };
        let (Ok(len), Ok(count)) = (u8::try_from(word.len()), u8::try_from(ids.len())) else {
            return;
        };
        let (Some(word_to), true) = (entry.word.get_mut(..word.len()), ids.len() <= LONG_IDS)
        else {
            return;
        };
        word_to.copy_from_slice(word);
        entry.ids.iter_mut().zip(ids).for_each(|(to, &from)| *to = from);
        entry.len = len;
        entry.count = count;
    }
}

/// The place of a hash among `places`.
#[inline]
fn place(hash: u64, places: usize) -> usize {
    // The upper half chooses the bucket of the table of whole words.
    let product = (hash & 0xFFFF_FFFF) * (places as u64 & 0xFFFF_FFFF);
    usize::try_from(product >> 32).unwrap_or(0)
}
