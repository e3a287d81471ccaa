//! Ring: one ordered log in the gateway's shared data, read by every filter VM.
//!
//! It carries the feed (appended by the VM that holds the lease) and the
//! bookings (appended by whoever places a request). Slots are used round and
//! round; a reader that falls a whole ring behind is told so.
//!
//! # How an entry is appended
//!
//! The slot behind the head is claimed by a conditional write of the *slot*,
//! whose value begins with its sequence number; only then is the head advanced.
//! So a loser can never overwrite a winner's entry, and if the winner dies
//! between the two writes, whoever comes next advances the head for it.
//!
//! # Invariants
//!
//! 1. Every sequence number up to the head has exactly one entry, the same for
//!    every reader.
//! 2. [`Ring::append_at`] succeeds for at most one caller per position: a VM
//!    that decided on a stale state learns it before its decision counts.
//! 3. Every loop is bounded; giving up is an error that the caller counts.

use crate::limits::{RING_APPEND_ATTEMPTS_MAX, RING_SLOTS};
use crate::shared::{KEY_PREFIX, SharedData, Unavailable, Versioned, Write};

/// The ring log of a gateway process.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    slots: u64,
}

/// What a read found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    /// The entry.
    Entry(Vec<u8>),
    /// The slot has been used again: the reader has lost its place.
    Overrun,
    /// Nothing has this number yet.
    NotYet,
}

/// The head as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Number of the newest entry; 0 if there is none.
    pub sequence: u64,
    /// What a write of the head must name.
    version: u32,
}

/// What became of a conditional append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Append {
    /// The entry has the position.
    Done,
    /// Another entry has it.
    Moved,
}

/// Why an append was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppendError {
    /// Others were faster [`RING_APPEND_ATTEMPTS_MAX`] times.
    Contended,
    /// The store refused, or holds something else than a ring.
    Unavailable,
}

impl AppendError {
    /// Fixed word for metrics.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Contended => "contended",
            Self::Unavailable => "unavailable",
        }
    }
}

impl From<Unavailable> for AppendError {
    fn from(_: Unavailable) -> Self {
        Self::Unavailable
    }
}

impl Default for Ring {
    fn default() -> Self {
        Self { slots: RING_SLOTS }
    }
}

impl Ring {
    /// A ring of another size, for tests.
    #[must_use]
    pub fn with_slots(slots: u64) -> Self {
        Self { slots: slots.max(2) }
    }

    /// Number of slots: how far behind a reader may be.
    #[must_use]
    pub fn slots(&self) -> u64 {
        self.slots
    }

    fn head_key(&self) -> String {
        let mut key = self.key();
        key.push_str("head");
        key
    }

    fn slot_key(&self, sequence: u64) -> String {
        let mut key = self.key();
        push_number(&mut key, sequence % self.slots);
        key
    }

    /// What all keys begin with. Put together without `format!`: a request needs
    /// a dozen keys.
    fn key(&self) -> String {
        let mut key = String::with_capacity(KEY_BYTES);
        key.push_str(KEY_PREFIX);
        key.push_str("/ring-");
        push_number(&mut key, self.slots);
        key.push('/');
        key
    }

    /// Creates the ring if it is not there. Must have returned in one VM before
    /// others append; a host configures one VM of a module before it starts the
    /// rest.
    ///
    /// # Errors
    ///
    /// [`Unavailable`].
    pub fn prepare(&self, store: &impl SharedData) -> Result<(), Unavailable> {
        if store.get(&self.head_key())?.is_some() {
            return Ok(());
        }
        for slot in 0..self.slots {
            store.set(&self.slot_key(slot), &0_u64.to_le_bytes(), None)?;
        }
        // Last, so that whoever sees a head sees slots.
        store.set(&self.head_key(), &0_u64.to_le_bytes(), None)?;
        Ok(())
    }

    /// Number of the newest entry; 0 if there is none.
    ///
    /// # Errors
    ///
    /// [`Unavailable`], also before [`Ring::prepare`].
    pub fn head(&self, store: &impl SharedData) -> Result<u64, Unavailable> {
        self.read_head(store).map(|head| head.sequence)
    }

    /// The head, to append behind.
    ///
    /// # Errors
    ///
    /// [`Unavailable`], also before [`Ring::prepare`].
    pub fn read_head(&self, store: &impl SharedData) -> Result<Head, Unavailable> {
        let Versioned { value, version } = store.get(&self.head_key())?.ok_or(Unavailable)?;
        Ok(Head { sequence: numbered(&value).ok_or(Unavailable)?.0, version })
    }

    /// The entry of a sequence number.
    ///
    /// # Errors
    ///
    /// [`Unavailable`].
    pub fn read(&self, store: &impl SharedData, sequence: u64) -> Result<Read, Unavailable> {
        let Versioned { value, .. } = store.get(&self.slot_key(sequence))?.ok_or(Unavailable)?;
        let (found, _) = numbered(&value).ok_or(Unavailable)?;
        if found != sequence {
            return Ok(if found > sequence { Read::Overrun } else { Read::NotYet });
        }
        let mut entry = value;
        entry.drain(..8);
        Ok(Read::Entry(entry))
    }

    /// Appends right behind `position`, if nothing else stands there yet.
    ///
    /// # Errors
    ///
    /// [`Unavailable`].
    pub fn append_at(
        &self,
        store: &impl SharedData,
        position: u64,
        entry: &[u8],
    ) -> Result<Append, Unavailable> {
        let head = self.read_head(store)?;
        if head.sequence != position {
            return Ok(Append::Moved);
        }
        self.append_behind(store, head, entry)
    }

    /// Appends right behind a head that was read before, if it is still the
    /// head. The claim of the slot decides, so an old one does no harm.
    ///
    /// # Errors
    ///
    /// [`Unavailable`].
    pub fn append_behind(
        &self,
        store: &impl SharedData,
        head: Head,
        entry: &[u8],
    ) -> Result<Append, Unavailable> {
        let next = head.sequence + 1;
        let key = self.slot_key(next);
        let slot = store.get(&key)?.ok_or(Unavailable)?;
        let (used_by, _) = numbered(&slot.value).ok_or(Unavailable)?;
        if used_by >= next {
            // Claimed, but the head has not followed yet: its owner is about
            // to move it, or is gone. Moving it twice is harmless.
            store.set(&self.head_key(), &next.to_le_bytes(), Some(head.version))?;
            return Ok(Append::Moved);
        }
        let mut value = Vec::with_capacity(8 + entry.len());
        value.extend_from_slice(&next.to_le_bytes());
        value.extend_from_slice(entry);
        if store.set(&key, &value, Some(slot.version))? == Write::Lost {
            return Ok(Append::Moved);
        }
        // Lost here means that somebody has moved the head for us.
        store.set(&self.head_key(), &next.to_le_bytes(), Some(head.version))?;
        Ok(Append::Done)
    }

    /// Appends wherever the head is. Returns the entry's number.
    ///
    /// # Errors
    ///
    /// [`AppendError::Contended`] if others were faster every time.
    pub fn append(&self, store: &impl SharedData, entry: &[u8]) -> Result<u64, AppendError> {
        for _ in 0..RING_APPEND_ATTEMPTS_MAX {
            let head = self.read_head(store)?;
            if self.append_behind(store, head, entry)? == Append::Done {
                return Ok(head.sequence + 1);
            }
        }
        Err(AppendError::Contended)
    }
}

/// Room for a key of the ring.
const KEY_BYTES: usize = 48;

/// Appends a number in decimal digits.
fn push_number(key: &mut String, number: u64) {
    if number >= 10 {
        push_number(key, number / 10);
    }
    key.extend(char::from_digit((number % 10) as u32, 10));
}

fn numbered(value: &[u8]) -> Option<(u64, &[u8])> {
    let (number, rest) = value.split_first_chunk::<8>()?;
    Some((u64::from_le_bytes(*number), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::memory::MemoryStore;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn ring(slots: u64) -> (Ring, MemoryStore) {
        let (ring, store) = (Ring::with_slots(slots), MemoryStore::default());
        ring.prepare(&store).unwrap();
        (ring, store)
    }

    #[test]
    fn entries_come_back_in_order() {
        let (ring, store) = ring(8);
        for n in 1..=5_u8 {
            assert_eq!(ring.append(&store, &[n]), Ok(u64::from(n)));
        }
        for n in 1..=5_u8 {
            assert_eq!(ring.read(&store, n.into()), Ok(Read::Entry(vec![n])));
        }
        assert_eq!(ring.read(&store, 6), Ok(Read::NotYet));
        assert_eq!(ring.head(&store), Ok(5));
    }

    #[test]
    fn keys_are_as_older_modules_have_them() {
        let ring = Ring::default();
        assert_eq!(ring.head_key(), format!("{KEY_PREFIX}/ring-{RING_SLOTS}/head"));
        for sequence in [0, 9, 10, 99, 4_095, 4_096, 1_000_007] {
            let slot = sequence % RING_SLOTS;
            assert_eq!(ring.slot_key(sequence), format!("{KEY_PREFIX}/ring-{RING_SLOTS}/{slot}"));
        }
    }

    /// Goal: who appends behind a head of before, when the ring has gone round
    /// meanwhile, gets no position and moves no head.
    #[test]
    fn an_old_head_gets_no_position() {
        for others in 1..=9 {
            let (ring, store) = ring(4);
            ring.append(&store, b"first").unwrap();
            let old = ring.read_head(&store).unwrap();
            for _ in 0..others {
                ring.append(&store, b"other").unwrap();
            }
            assert_eq!(ring.append_behind(&store, old, b"late"), Ok(Append::Moved));
            assert_eq!(ring.head(&store), Ok(1 + others));
            assert_eq!(ring.read(&store, 1 + others), Ok(Read::Entry(b"other".to_vec())));
        }
    }

    #[test]
    fn a_reader_that_is_a_ring_behind_is_told() {
        let (ring, store) = ring(4);
        for n in 1..=6_u8 {
            ring.append(&store, &[n]).unwrap();
        }
        assert_eq!(ring.read(&store, 2), Ok(Read::Overrun));
        assert_eq!(ring.read(&store, 3), Ok(Read::Entry(vec![3])));
    }

    #[test]
    fn only_one_append_gets_a_position() {
        let (ring, store) = ring(4);
        assert_eq!(ring.append_at(&store, 0, b"first"), Ok(Append::Done));
        assert_eq!(ring.append_at(&store, 0, b"second"), Ok(Append::Moved));
        assert_eq!(ring.read(&store, 1), Ok(Read::Entry(b"first".to_vec())));
    }

    #[test]
    fn preparing_again_keeps_the_entries() {
        let (ring, store) = ring(4);
        ring.append(&store, b"entry").unwrap();
        ring.prepare(&store).unwrap();
        assert_eq!(ring.read(&store, 1), Ok(Read::Entry(b"entry".to_vec())));
    }

    #[test]
    fn an_unprepared_ring_is_unavailable() {
        let (ring, store) = (Ring::with_slots(4), MemoryStore::default());
        assert_eq!(ring.head(&store), Err(Unavailable));
        assert_eq!(ring.append(&store, b"entry"), Err(AppendError::Unavailable));
    }

    /// Goal: a VM that dies between claiming a slot and moving the head blocks
    /// nobody, and its entry stays.
    #[test]
    fn a_claim_whose_owner_died_is_completed_by_the_next() {
        let (ring, store) = ring(4);
        let mut claimed = 1_u64.to_le_bytes().to_vec();
        claimed.extend_from_slice(b"dead");
        store.set(&ring.slot_key(1), &claimed, None).unwrap();
        assert_eq!(ring.append(&store, b"alive"), Ok(2));
        assert_eq!(ring.read(&store, 1), Ok(Read::Entry(b"dead".to_vec())));
        assert_eq!(ring.read(&store, 2), Ok(Read::Entry(b"alive".to_vec())));
    }

    /// A store in which somebody else acts right before the n-th call.
    struct Meddled<'a, F: Fn()> {
        store: &'a MemoryStore,
        calls: core::cell::Cell<u32>,
        at: u32,
        act: F,
    }

    impl<F: Fn()> Meddled<'_, F> {
        fn step(&self) {
            self.calls.set(self.calls.get() + 1);
            if self.calls.get() == self.at {
                (self.act)();
            }
        }
    }

    impl<F: Fn()> SharedData for Meddled<'_, F> {
        fn get(&self, key: &str) -> Result<Option<Versioned>, Unavailable> {
            self.step();
            self.store.get(key)
        }
        fn set(&self, key: &str, value: &[u8], version: Option<u32>) -> Result<Write, Unavailable> {
            self.step();
            self.store.set(key, value, version)
        }
    }

    /// Goal: no interleaving of two appends loses or doubles an entry.
    /// Method: one append of ours with one or several appends of another VM
    /// placed before each of its calls, on a ring just large enough, so that
    /// slots are being used again.
    #[test]
    fn no_interleaving_loses_an_entry() {
        for before in 0..5_u64 {
            for others in 1..=3_u64 {
                for at in 1..=8 {
                    let (ring, store) = ring(8);
                    for _ in 0..before + 6 {
                        ring.append(&store, b"old").unwrap();
                    }
                    let meddled = Meddled {
                        store: &store,
                        calls: core::cell::Cell::new(0),
                        at,
                        act: || {
                            for _ in 0..others {
                                ring.append(&store, b"other").unwrap();
                            }
                        },
                    };
                    let ours = ring.append(&meddled, b"ours").unwrap();
                    let head = ring.head(&store).unwrap();
                    let acted = meddled.calls.get() >= at;
                    let expected = before + 7 + if acted { others } else { 0 };
                    assert_eq!(head, expected, "before {before} others {others} at {at}");
                    assert_eq!(ring.read(&store, ours), Ok(Read::Entry(b"ours".to_vec())));
                    let seen = (before + 7..=head)
                        .filter(|n| ring.read(&store, *n) == Ok(Read::Entry(b"other".to_vec())))
                        .count() as u64;
                    assert_eq!(seen, head - before - 7, "before {before} others {others} at {at}");
                }
            }
        }
    }

    /// Goal: the same under real threads: every entry exactly once, in the
    /// order of its writer.
    #[cfg(not(target_arch = "wasm32"))]
    #[test]
    fn threads_lose_nothing() {
        const EACH: u32 = 2_000;
        let (ring, store) = ring(16_384);
        std::thread::scope(|scope| {
            for writer in 0..4_u32 {
                let (ring, store) = (&ring, &store);
                scope.spawn(move || {
                    for n in 0..EACH {
                        let entry = [writer.to_le_bytes(), n.to_le_bytes()].concat();
                        while ring.append(store, &entry) == Err(AppendError::Contended) {}
                    }
                });
            }
        });
        let mut next = [0_u32; 4];
        for sequence in 1..=u64::from(4 * EACH) {
            let Ok(Read::Entry(entry)) = ring.read(&store, sequence) else {
                panic!("entry {sequence} is missing");
            };
            let writer = u32::from_le_bytes(entry[..4].try_into().unwrap()) as usize;
            assert_eq!(u32::from_le_bytes(entry[4..].try_into().unwrap()), next[writer]);
            next[writer] += 1;
        }
        assert_eq!(next, [EACH; 4]);
    }
}
