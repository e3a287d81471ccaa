//! Perfect hashing: one table access answers whether a key is present.
//!
//! Keys fall into buckets; each bucket has a *pilot*, chosen by the compiler so
//! that all keys of the table get slots of their own. A key that is not in the
//! table lands on some slot too, so whoever looks compares what lies there.
//!
//! Scheme: Belazzougui, Botelho, Dietzfelbinger, "Hash, Displace, and
//! Compress" (ESA 2009). The pilot goes through a second multiplication, since
//! with a plain sum or exclusive-or some buckets can never be placed.

/// Odd constants of the two mixing steps: the golden ratio and the second
/// multiplier of `SplitMix64`.
const MIX_KEY: u64 = 0x9E37_79B9_7F4A_7C15;
const MIX_PILOT: u64 = 0xBF58_476D_1CE4_E5B9;

/// Spreads the bits of an integer key over all 64 bits.
#[inline]
pub(crate) fn mix(key: u64) -> u64 {
    let spread = (key ^ (key >> 29)).wrapping_mul(MIX_KEY);
    spread ^ (spread >> 32)
}

/// Maps the upper 32 bits of `hash` to `0..range`. 0 if `range` is 0.
#[inline]
fn reduce(hash: u64, range: usize) -> usize {
    let product = (hash >> 32) * (range as u64 & 0xFFFF_FFFF);
    usize::try_from(product >> 32).unwrap_or(0)
}

/// The bucket of a key, by its mixed hash.
#[inline]
pub(crate) fn bucket(hash: u64, buckets: usize) -> usize {
    reduce(hash, buckets)
}

/// The slot of a key under a pilot, by its mixed hash.
#[inline]
pub(crate) fn slot(hash: u64, pilot: u16, slots: usize) -> usize {
    let displaced = (hash ^ u64::from(pilot).wrapping_mul(MIX_KEY)).wrapping_mul(MIX_PILOT);
    reduce(displaced ^ (displaced << 32), slots)
}

/// The slot a key would lie at; the slot itself still has to be compared.
///
/// `hash`: the mixed hash; `pilots`: one per bucket; `slots`: length of the
/// slot table. An index in `0..slots`, or 0 for an empty table.
#[inline]
pub(crate) fn locate(hash: u64, pilots: &[u16], slots: usize) -> usize {
    let pilot = pilots.get(bucket(hash, pilots.len())).copied().unwrap_or(0);
    slot(hash, pilot, slots)
}
