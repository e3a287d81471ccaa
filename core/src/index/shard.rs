//! Shard: one open-addressing table of the index.
//!
//! An entry is one `u64`: fingerprint in the upper 40 bits, two clock bits,
//! the set's number in the lower 22. Zero is a free place: no set has number
//! zero.
//!
//! A fingerprint's home is `fingerprint × capacity / 2⁴⁰`, so that the table
//! can grow by any factor without knowing the whole hash; from there entries
//! are probed linearly, and a removal shifts its followers back, so there are
//! no tombstones.

use super::sets::{SET_BITS, SetId};

/// Stored bits of a block's fingerprint.
pub(super) const FINGERPRINT_BITS: u32 = 40;

const CLOCK_BITS: u32 = 2;
const CLOCK_ONE: u64 = 1 << SET_BITS;
const CLOCK_MASK: u64 = ((1 << CLOCK_BITS) - 1) << SET_BITS;
const SET_MASK: u64 = (1 << SET_BITS) - 1;
const FINGERPRINT_SHIFT: u32 = SET_BITS + CLOCK_BITS;
const CAPACITY_MIN: usize = 16;
/// How full a table may be, in tenths: a look-up of an absent block then probes 6
/// places on average, and a block takes 11 to 14 bytes.
const FULL_TENTHS: usize = 7;

/// Bits of a fingerprint that are multiplied at a time when its home is computed.
const HALF_BITS: u32 = FINGERPRINT_BITS / 2;

const _: () = assert!(FINGERPRINT_SHIFT + FINGERPRINT_BITS == 64);

#[derive(Debug, Default)]
pub(super) struct Shard {
    entries: Vec<u64>,
    len: usize,
    /// Where the clock that looks for something to evict stands.
    hand: usize,
}

impl Shard {
    /// `fingerprint × capacity / 2⁴⁰`, exactly, in two halves: a product of 128
    /// bits is a function call in WebAssembly.
    fn home(&self, fingerprint: u64) -> usize {
        let capacity = self.entries.len() as u64;
        let low = (fingerprint & ((1 << HALF_BITS) - 1)) * capacity;
        let high = (fingerprint >> HALF_BITS) * capacity;
        // Below the capacity, which is a usize.
        ((high + (low >> HALF_BITS)) >> HALF_BITS) as usize
    }

    fn after(&self, at: usize) -> usize {
        if at + 1 == self.entries.len() { 0 } else { at + 1 }
    }

    fn get(&self, at: usize) -> u64 {
        self.entries.get(at).copied().unwrap_or(0)
    }

    fn put(&mut self, at: usize, entry: u64) {
        if let Some(place) = self.entries.get_mut(at) {
            *place = entry;
        }
    }

    /// What stands where a block would be looked for first. Asking for several
    /// blocks before looking for each lets the memory answer them at once.
    pub(super) fn first(&self, fingerprint: u64) -> u64 {
        self.get(self.home(fingerprint))
    }

    /// Place and set of a block; if it is not there, the place that is free for it.
    pub(super) fn find(&self, fingerprint: u64) -> Result<(usize, SetId), usize> {
        let mut at = self.home(fingerprint);
        for _ in 0..self.entries.len() {
            let entry = match self.entries.get(at) {
                Some(entry) => *entry,
                // Behind the last place comes the first.
                None => {
                    at = 0;
                    self.get(at)
                }
            };
            if entry == 0 {
                return Err(at);
            }
            if entry >> FINGERPRINT_SHIFT == fingerprint {
                return Ok((at, set_of(entry)));
            }
            at += 1;
        }
        Err(at)
    }

    /// What stands at a place: `None` beyond the table, `Some(None)` nothing.
    #[expect(clippy::option_option, reason = "the end of the table is not an empty place")]
    pub(super) fn entry(&self, at: usize) -> Option<Option<SetId>> {
        let entry = *self.entries.get(at)?;
        Some((entry != 0).then(|| set_of(entry)))
    }

    /// Inserts a block that is not there, at the place that [`Self::find`] gave.
    pub(super) fn insert(&mut self, at: usize, fingerprint: u64, set: SetId) {
        let entry = fingerprint << FINGERPRINT_SHIFT | CLOCK_ONE | u64::from(set.0);
        self.len += 1;
        if self.len * 10 > self.entries.len() * FULL_TENTHS {
            self.grow();
            self.place(entry);
        } else {
            self.put(at, entry);
        }
    }

    fn place(&mut self, entry: u64) {
        let mut at = self.home(entry >> FINGERPRINT_SHIFT);
        for _ in 0..self.entries.len() {
            if self.get(at) == 0 {
                self.put(at, entry);
                return;
            }
            at = self.after(at);
        }
    }

    /// Makes room for so many blocks, if the table is empty. Returns how many
    /// places were made.
    pub(super) fn reserve(&mut self, blocks: usize) -> usize {
        if self.len > 0 || blocks < CAPACITY_MIN {
            return 0;
        }
        self.entries = vec![0; blocks / FULL_TENTHS * 10 + CAPACITY_MIN];
        self.entries.len()
    }

    fn grow(&mut self) {
        let capacity = (self.entries.len() + self.entries.len() / 4).max(CAPACITY_MIN);
        let old = core::mem::replace(&mut self.entries, vec![0; capacity]);
        for entry in old {
            if entry != 0 {
                self.place(entry);
            }
        }
        self.hand = 0;
    }

    /// Gives the block at a place another set.
    pub(super) fn set(&mut self, at: usize, set: SetId) {
        let entry = self.get(at);
        self.put(at, entry & !SET_MASK | u64::from(set.0));
    }

    /// Marks the block at a place as used.
    pub(super) fn touch(&mut self, at: usize) {
        if let Some(entry) = self.entries.get_mut(at)
            && *entry & CLOCK_MASK != CLOCK_MASK
        {
            *entry |= CLOCK_MASK;
        }
    }

    /// Removes the block at a place; followers shift back.
    pub(super) fn remove(&mut self, at: usize) {
        let mut hole = at;
        let mut next = self.after(at);
        for _ in 0..self.entries.len() {
            let entry = self.get(next);
            if entry == 0 {
                break;
            }
            let home = self.home(entry >> FINGERPRINT_SHIFT);
            // May `entry` move into the hole? Only if its home does not lie
            // cyclically behind the hole and up to where it stands now.
            let stays = if hole <= next {
                hole < home && home <= next
            } else {
                hole < home || home <= next
            };
            if !stays {
                self.put(hole, entry);
                hole = next;
            }
            next = self.after(next);
        }
        self.put(hole, 0);
        self.len -= 1;
    }

    /// Removes a block that was not used for long and returns its set; `None`
    /// from an empty table.
    pub(super) fn evict(&mut self) -> Option<SetId> {
        if self.len == 0 {
            return None;
        }
        // Each round takes one off every clock, so that the highest clock
        // falls to zero within CLOCK_ROUNDS rounds.
        const CLOCK_ROUNDS: usize = 1 << CLOCK_BITS;
        for _ in 0..self.entries.len() * CLOCK_ROUNDS {
            let at = self.hand;
            self.hand = self.after(at);
            let entry = self.get(at);
            if entry == 0 {
                continue;
            }
            if entry & CLOCK_MASK == 0 {
                self.remove(at);
                return Some(set_of(entry));
            }
            self.put(at, entry - CLOCK_ONE);
        }
        None
    }

    pub(super) fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<u64>()
    }
}

fn set_of(entry: u64) -> SetId {
    let set = (entry & SET_MASK) as u32;
    SetId(set)
}
