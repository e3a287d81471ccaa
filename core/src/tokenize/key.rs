//! What stands for a word in the tables of words: its first bytes, and a hash.
//!
//! A word of up to sixteen bytes *is* the two numbers and its length, so that
//! finding it compares no more than these.

/// Odd constants of the mixing steps: fractional parts of square roots.
const MIX_FIRST: u64 = 0x9E37_79B9_7F4A_7C15;
const MIX_SECOND: u64 = 0x6A09_E667_F3BC_C909;
const MIX_LAST: u64 = 0xBB67_AE85_84CA_A73B;

/// Bytes of a number.
const NUMBER: usize = size_of::<u64>();

/// The key of a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct WordKey {
    /// The first eight bytes, little endian, with zeros for those it lacks.
    pub(crate) first: u64,
    /// The eight bytes after them.
    pub(crate) second: u64,
    /// A hash of all bytes.
    pub(crate) hash: u64,
}

impl WordKey {
    /// Bytes of a word that its key holds whole.
    pub(crate) const BYTES: usize = 2 * NUMBER;

    /// The key of `word`, which stands at `start` in `text`.
    #[inline]
    pub(crate) fn of(text: &[u8], start: usize, word: &[u8]) -> Self {
        let window = text.get(start..).and_then(<[u8]>::first_chunk::<{ Self::BYTES }>);
        let (first, second) = match window {
            // What follows the word is read along, and cut off.
            Some(window) => {
                let both = u128::from_le_bytes(*window);
                let (first, second) = halves(both);
                (keep(first, word.len()), keep(second, word.len().saturating_sub(NUMBER)))
            }
            None => halves(padded(word)),
        };
        // The length goes in by a multiplication of its own: within the first
        // number, short words that end in zeros would be others.
        let len = (word.len() as u64).wrapping_mul(MIX_LAST);
        let mut hash = step(step(len, first, MIX_FIRST), second, MIX_SECOND);
        if let Some(rest) = word.get(Self::BYTES..)
            && !rest.is_empty()
        {
            for part in rest.chunks(Self::BYTES) {
                let (first, second) = halves(padded(part));
                hash = step(step(hash, first, MIX_FIRST), second, MIX_SECOND);
            }
        }
        Self { first, second, hash }
    }
}

/// Takes a number into a hash.
#[inline]
fn step(hash: u64, number: u64, constant: u64) -> u64 {
    let mixed = (hash ^ number).wrapping_mul(constant);
    mixed ^ (mixed >> 32)
}

/// The lowest `bytes` bytes of a number.
#[inline]
fn keep(number: u64, bytes: usize) -> u64 {
    match bytes {
        0 => 0,
        1..NUMBER => number & ((1 << (8 * bytes)) - 1),
        _ => number,
    }
}

/// The first sixteen bytes, with zeros for those that are not there.
#[inline]
fn padded(bytes: &[u8]) -> u128 {
    let mut window = [0; WordKey::BYTES];
    window.iter_mut().zip(bytes).for_each(|(to, &from)| *to = from);
    u128::from_le_bytes(window)
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the halves of a number are taken apart")]
fn halves(both: u128) -> (u64, u64) {
    (both as u64, (both >> 64) as u64)
}
