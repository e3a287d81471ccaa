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

const _: () = assert!(FINGERPRINT_SHIFT + FINGERPRINT_BITS == 64);

#[derive(Debug, Default)]
pub(super) struct Shard {
    entries: Vec<u64>,
    len: usize,
    /// Where the clock that looks for something to evict stands.
    hand: usize,
}

impl Shard {
    fn home(&self, fingerprint: u64) -> usize {
        // Below the capacity, which is a usize.
        ((u128::from(fingerprint) * self.entries.len() as u128) >> FINGERPRINT_BITS) as usize
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

    /// Place and set of a block.
    pub(super) fn find(&self, fingerprint: u64) -> Option<(usize, SetId)> {
        let mut at = self.home(fingerprint);
        for _ in 0..self.entries.len() {
            let entry = self.get(at);
            if entry == 0 {
                return None;
            }
            if entry >> FINGERPRINT_SHIFT == fingerprint {
                return Some((at, set_of(entry)));
            }
            at = self.after(at);
        }
        None
    }

    /// What stands at a place: `None` beyond the table, `Some(None)` nothing.
    #[expect(clippy::option_option, reason = "the end of the table is not an empty place")]
    pub(super) fn entry(&self, at: usize) -> Option<Option<SetId>> {
        let entry = *self.entries.get(at)?;
        Some((entry != 0).then(|| set_of(entry)))
    }

    /// Inserts a block that is not there.
    pub(super) fn insert(&mut self, fingerprint: u64, set: SetId) {
        // At most four fifths full: a look-up of an absent block then probes
        // 13 places on average.
        if (self.len + 1) * 5 > self.entries.len() * 4 {
            self.grow();
        }
        self.place(fingerprint << FINGERPRINT_SHIFT | CLOCK_ONE | u64::from(set.0));
        self.len += 1;
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
        self.entries = vec![0; blocks / 4 * 5 + CAPACITY_MIN];
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
        let entry = self.get(at);
        self.put(at, entry | CLOCK_MASK);
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
