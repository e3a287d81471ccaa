//! Remembers the ids of recent words, in fixed memory.
//!
//! Direct-mapped: a word has one place, and a newer word takes it. A hit
//! compares the whole word, not its hash: a client can construct two words of
//! equal hash, and a false hit would yield wrong ids.

use crate::ids::TokenId;

/// One remembered word of at most `BYTES` bytes and `IDS` ids.
#[derive(Clone, Copy)]
struct Entry<const BYTES: usize, const IDS: usize> {
    /// Bytes of the word; 0 in an entry never used.
    len: u8,
    /// Ids of the word.
    count: u8,
    word: [u8; BYTES],
    ids: [TokenId; IDS],
}

/// A cache of words up to `BYTES` bytes that encode to up to `IDS` ids.
pub(crate) struct WordCache<const BYTES: usize, const IDS: usize> {
    entries: Box<[Entry<BYTES, IDS>]>,
}

impl<const BYTES: usize, const IDS: usize> WordCache<BYTES, IDS> {
    /// An empty cache of `entries` places.
    pub(crate) fn new(entries: usize) -> Self {
        let empty = Entry { len: 0, count: 0, word: [0; BYTES], ids: [0; IDS] };
        Self { entries: vec![empty; entries].into_boxed_slice() }
    }

    /// Bytes of memory held.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.entries.len() * size_of::<Entry<BYTES, IDS>>()
    }

    /// The ids of `word`, if it is remembered. `hash` is the word's hash.
    #[inline]
    pub(crate) fn find(&self, word: &[u8], hash: u64) -> Option<&[TokenId]> {
        let entry = self.entries.get(self.place(hash))?;
        if usize::from(entry.len) != word.len() || entry.word.get(..word.len())? != word {
            return None;
        }
        entry.ids.get(..usize::from(entry.count))
    }

    /// Remembers `word`, unless it or its ids are too long.
    #[inline]
    pub(crate) fn remember(&mut self, word: &[u8], hash: u64, ids: &[TokenId]) {
        let place = self.place(hash);
        let Some(entry) = self.entries.get_mut(place) else { return };
        let (Ok(len), Ok(count)) = (u8::try_from(word.len()), u8::try_from(ids.len())) else {
            return;
        };
        let (Some(word_to), true) = (entry.word.get_mut(..word.len()), ids.len() <= IDS) else {
            return;
        };
        word_to.copy_from_slice(word);
        entry.ids.iter_mut().zip(ids).for_each(|(to, &from)| *to = from);
        entry.len = len;
        entry.count = count;
    }

    #[inline]
    fn place(&self, hash: u64) -> usize {
        let product = (hash >> 32) * (self.entries.len() as u64 & 0xFFFF_FFFF);
        usize::try_from(product >> 32).unwrap_or(0)
    }
}
