//! Maps and sets with a fixed hasher: fast, and the same on every run.

use std::hash::{BuildHasherDefault, Hasher};

use crate::tokenize::perfect_hash::mix;

pub(super) type HashMap<K, V> = hashbrown::HashMap<K, V, BuildHasherDefault<Fixed>>;
pub(super) type HashSet<K> = hashbrown::HashSet<K, BuildHasherDefault<Fixed>>;

/// Mixes whole words. Its keys come from the operator's own files, so that it
/// need not withstand an attacker.
#[derive(Default)]
pub(super) struct Fixed(u64);

impl Hasher for Fixed {
    fn write(&mut self, bytes: &[u8]) {
        let mut words = bytes.chunks_exact(8);
        for word in &mut words {
            self.write_u64(u64::from_le_bytes(word.try_into().unwrap_or_default()));
        }
        let mut tail = [0; 8];
        for (to, from) in tail.iter_mut().zip(words.remainder()) {
            *to = *from;
        }
        self.write_u64(u64::from_le_bytes(tail) ^ ((bytes.len() as u64) << 56));
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = mix(self.0.rotate_left(5) ^ word);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
