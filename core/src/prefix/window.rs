//! Windows: hashing a few bytes of a chunk, comparing all of them.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::limits::PREFIX_CHUNK_BYTES;

/// Bytes that are hashed, and the stretches that they are taken from: enough to
/// tell the chunks of one place apart, which start and end differently.
const SAMPLE_BYTES: usize = 8;
const STRETCH_BYTES: usize = 64;
const SAMPLES: usize = PREFIX_CHUNK_BYTES / STRETCH_BYTES;

const _: () = assert!(PREFIX_CHUNK_BYTES.is_multiple_of(STRETCH_BYTES));

/// A hash of some bytes of a window, the last ones among them.
pub(super) fn hash(window: &[u8; PREFIX_CHUNK_BYTES], seed: u64) -> u64 {
    let mut sample = [0; SAMPLES * SAMPLE_BYTES];
    let stretches = window.as_chunks::<STRETCH_BYTES>().0;
    for (part, stretch) in sample.as_chunks_mut::<SAMPLE_BYTES>().0.iter_mut().zip(stretches) {
        if let Some(end) = stretch.last_chunk() {
            *part = *end;
        }
    }
    xxh3_64_with_seed(&sample, seed)
}

/// Whether `text` starts with `start`: as `slice::starts_with`, which compares
/// byte by byte in WebAssembly.
pub(super) fn starts_with(text: &[u8], start: &[u8]) -> bool {
    const STEP: usize = 32;
    let Some(text) = text.get(..start.len()) else { return false };
    let ((text, text_rest), (start, start_rest)) =
        (text.as_chunks::<STEP>(), start.as_chunks::<STEP>());
    text.iter().zip(start).all(|(a, b)| is_same(a, b)) && text_rest == start_rest
}

#[inline]
fn is_same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    let words = |bytes: &[u8; 32]| {
        let parts = bytes.as_chunks::<8>().0;
        let mut words = [0; 4];
        for (word, part) in words.iter_mut().zip(parts) {
            *word = u64::from_le_bytes(*part);
        }
        words
    };
    let ([a0, a1, a2, a3], [b0, b1, b2, b3]) = (words(a), words(b));
    ((a0 ^ b0) | (a1 ^ b1) | (a2 ^ b2) | (a3 ^ b3)) == 0
}
