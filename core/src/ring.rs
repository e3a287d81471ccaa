//! Ring: one ordered log in the gateway's shared data, read by every filter VM.
//!
//! It carries the feed (appended by the VM that holds the lease) and the
//! bookings (appended by whoever places a request). Slots are used round and
//! round; a reader that falls a whole ring behind is told so.
//!
//! # How an entry is appended
//!
//! A slot's value begins with the sequence number of its entry. Number `n` goes
//! into slot `n` modulo the slots, by a write on condition that the slot is as it
//! was when its number was still smaller than `n`. So whoever loses cannot
//! overwrite a winner's entry, and one that dies leaves nothing half done.
//!
//! Nothing says what the newest number is: the slot behind it says that there is
//! nothing newer, and it has to be read anyway to write to it. Who has lost its
//! place finds the newest by bisection, because a slot's number is at least `n`
//! for every `n` that was appended, and smaller for every other.
//!
//! # Invariants
//!
//! 1. Every sequence number up to the newest has exactly one entry, the same for
//!    every reader.
//! 2. [`Ring::append_in`] succeeds for at most one caller per position: a VM
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
    /// Nothing has this number yet: it may be appended here.
    NotYet(Free),
}

/// A place that was free when it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Free {
    sequence: u64,
    version: u32,
}

impl Free {
    /// The number that an entry there will have.
    #[must_use]
    pub fn sequence(self) -> u64 {
        self.sequence
    }
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

    /// There once all slots are.
    fn ready_key(&self) -> String {
        let mut key = self.key();
        key.push_str("ready");
        key
    }

    fn slot_key(&self, sequence: u64) -> String {
        let mut key = self.key();
        push_number(&mut key, sequence % self.slots);
        key
    }

    /// What all keys begin with. Put together without `format!`: every request
    /// needs some.
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
        if store.get(&self.ready_key())?.is_some() {
            return Ok(());
        }
        for slot in 0..self.slots {
            store.set(&self.slot_key(slot), &0_u64.to_le_bytes(), None)?;
        }
        match store.set(&self.ready_key(), &[], None)? {
            Write::Done | Write::Lost => Ok(()),
        }
    }

    /// Number of the newest entry; 0 if there is none.
    ///
    /// - `from`: an entry that was appended, or 0. The nearer, the fewer slots are
    ///   looked at: about twice the binary logarithm of the distance.
    ///
    /// # Errors
    ///
    /// [`Unavailable`], also before [`Ring::prepare`].
    pub fn newest(&self, store: &impl SharedData, from: u64) -> Result<u64, Unavailable> {
        let (mut low, mut step) = (from, 1_u64);
        let mut high = loop {
            let probe = low.saturating_add(step);
            if !self.has(store, probe)? {
                break probe;
            }
            (low, step) = (probe, step.saturating_mul(2));
        };
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.has(store, middle)? { low = middle } else { high = middle }
        }
        Ok(low)
    }

    /// Whether an entry has, or had, the number.
    fn has(&self, store: &impl SharedData, sequence: u64) -> Result<bool, Unavailable> {
        let slot = store.get(&self.slot_key(sequence))?.ok_or(Unavailable)?;
        Ok(numbered(&slot.value).ok_or(Unavailable)?.0 >= sequence)
    }

    /// The entry of a sequence number.
    ///
    /// # Errors
    ///
    /// [`Unavailable`], also before [`Ring::prepare`].
    pub fn read(&self, store: &impl SharedData, sequence: u64) -> Result<Read, Unavailable> {
        let Versioned { value, version } =
            store.get(&self.slot_key(sequence))?.ok_or(Unavailable)?;
        let (found, _) = numbered(&value).ok_or(Unavailable)?;
        if found < sequence {
            return Ok(Read::NotYet(Free { sequence, version }));
        }
        if found > sequence {
            return Ok(Read::Overrun);
        }
        let mut entry = value;
        entry.drain(..8);
        Ok(Read::Entry(entry))
    }

    /// Appends in a place that was read as free, if it still is.
    ///
    /// # Errors
    ///
    /// [`Unavailable`].
    pub fn append_in(
        &self,
        store: &impl SharedData,
        free: Free,
        entry: &[u8],
    ) -> Result<Append, Unavailable> {
        let mut value = Vec::with_capacity(8 + entry.len());
        value.extend_from_slice(&free.sequence.to_le_bytes());
        value.extend_from_slice(entry);
        match store.set(&self.slot_key(free.sequence), &value, Some(free.version))? {
            Write::Done => Ok(Append::Done),
            Write::Lost => Ok(Append::Moved),
        }
    }

    /// Appends behind the newest entry. Returns the entry's number.
    ///
    /// - `after`: an entry that was appended, or 0; nearly the newest, or it takes
    ///   longer.
    ///
    /// # Errors
    ///
    /// [`AppendError::Contended`] if others were faster every time.
    pub fn append(
        &self,
        store: &impl SharedData,
        after: u64,
        entry: &[u8],
    ) -> Result<u64, AppendError> {
        let mut next = after + 1;
        for _ in 0..RING_APPEND_ATTEMPTS_MAX {
            match self.read(store, next)? {
                Read::NotYet(free) => {
                    if self.append_in(store, free, entry)? == Append::Done {
                        return Ok(next);
                    }
                }
                Read::Entry(_) | Read::Overrun => next = self.newest(store, next)? + 1,
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

    /// Appends without knowing where.
    fn append(ring: &Ring, store: &MemoryStore, entry: &[u8]) -> u64 {
        ring.append(store, 0, entry).unwrap()
    }

    fn free(ring: &Ring, store: &MemoryStore, sequence: u64) -> Free {
        match ring.read(store, sequence) {
            Ok(Read::NotYet(free)) => free,
            other => panic!("{sequence}: {other:?}"),
        }
    }

    #[test]
    fn entries_come_back_in_order() {
        let (ring, store) = ring(8);
        for n in 1..=5_u8 {
            assert_eq!(append(&ring, &store, &[n]), u64::from(n));
        }
        for n in 1..=5_u8 {
            assert_eq!(ring.read(&store, n.into()), Ok(Read::Entry(vec![n])));
        }
        assert_eq!(free(&ring, &store, 6).sequence(), 6);
    }

    #[test]
    fn keys_are_as_other_modules_of_this_prefix_have_them() {
        let ring = Ring::default();
        assert_eq!(ring.ready_key(), format!("{KEY_PREFIX}/ring-{RING_SLOTS}/ready"));
        for sequence in [0, 9, 10, 99, 4_095, 4_096, 1_000_007] {
            let slot = sequence % RING_SLOTS;
            assert_eq!(ring.slot_key(sequence), format!("{KEY_PREFIX}/ring-{RING_SLOTS}/{slot}"));
        }
    }

    /// Goal: the newest entry is found from wherever a reader was, also from a
    /// place that has been used again.
    #[test]
    fn the_newest_is_found_from_anywhere() {
        for slots in [2, 3, 8] {
            let (ring, store) = ring(slots);
            for newest in 0..40 {
                for from in 0..=newest {
                    assert_eq!(ring.newest(&store, from), Ok(newest), "{slots} slots from {from}");
                }
                append(&ring, &store, b"entry");
            }
        }
    }

    /// Goal: who appends in a place of before, when the ring has gone round
    /// meanwhile, gets none and overwrites nothing.
    #[test]
    fn an_old_place_is_no_place() {
        for others in 1..=9 {
            let (ring, store) = ring(4);
            append(&ring, &store, b"first");
            let old = free(&ring, &store, 2);
            for _ in 0..others {
                append(&ring, &store, b"other");
            }
            assert_eq!(ring.append_in(&store, old, b"late"), Ok(Append::Moved));
            assert_eq!(ring.newest(&store, 0), Ok(1 + others));
            assert_eq!(ring.read(&store, 1 + others), Ok(Read::Entry(b"other".to_vec())));
        }
    }

    #[test]
    fn a_reader_that_is_a_ring_behind_is_told() {
        let (ring, store) = ring(4);
        for n in 1..=6_u8 {
            append(&ring, &store, &[n]);
        }
        assert_eq!(ring.read(&store, 2), Ok(Read::Overrun));
        assert_eq!(ring.read(&store, 3), Ok(Read::Entry(vec![3])));
    }

    #[test]
    fn only_one_append_gets_a_place() {
        let (ring, store) = ring(4);
        let place = free(&ring, &store, 1);
        assert_eq!(ring.append_in(&store, place, b"first"), Ok(Append::Done));
        assert_eq!(ring.append_in(&store, place, b"second"), Ok(Append::Moved));
        assert_eq!(ring.read(&store, 1), Ok(Read::Entry(b"first".to_vec())));
    }

    #[test]
    fn preparing_again_keeps_the_entries() {
        let (ring, store) = ring(4);
        append(&ring, &store, b"entry");
        ring.prepare(&store).unwrap();
        assert_eq!(ring.read(&store, 1), Ok(Read::Entry(b"entry".to_vec())));
    }

    #[test]
    fn an_unprepared_ring_is_unavailable() {
        let (ring, store) = (Ring::with_slots(4), MemoryStore::default());
        assert_eq!(ring.newest(&store, 0), Err(Unavailable));
        assert_eq!(ring.append(&store, 0, b"entry"), Err(AppendError::Unavailable));
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
    /// slots are being used again; ours knows the newest entry, or an older one.
    #[test]
    fn no_interleaving_loses_an_entry() {
        for (before, others, at, behind) in (0..5_u64)
            .flat_map(|before| (1..=3_u64).map(move |others| (before, others)))
            .flat_map(|(before, others)| (1..=8).map(move |at| (before, others, at)))
            .flat_map(|(before, others, at)| [0, 1, 5].map(move |it| (before, others, at, it)))
        {
            let (ring, store) = ring(8);
            for _ in 0..before + 6 {
                append(&ring, &store, b"old");
            }
            let meddled = Meddled {
                store: &store,
                calls: core::cell::Cell::new(0),
                at,
                act: || {
                    for _ in 0..others {
                        append(&ring, &store, b"other");
                    }
                },
            };
            let case = format!("before {before} others {others} at {at} behind {behind}");
            let ours = ring.append(&meddled, before + 6 - behind, b"ours").unwrap();
            let newest = ring.newest(&store, 0).unwrap();
            let acted = meddled.calls.get() >= at;
            assert_eq!(newest, before + 7 + if acted { others } else { 0 }, "{case}");
            assert_eq!(ring.read(&store, ours), Ok(Read::Entry(b"ours".to_vec())), "{case}");
            let seen = (before + 7..=newest)
                .filter(|n| ring.read(&store, *n) == Ok(Read::Entry(b"other".to_vec())))
                .count() as u64;
            assert_eq!(seen, newest - before - 7, "{case}");
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
                    let mut last = 0;
                    for n in 0..EACH {
                        let entry = [writer.to_le_bytes(), n.to_le_bytes()].concat();
                        last = loop {
                            match ring.append(store, last, &entry) {
                                Ok(sequence) => break sequence,
                                Err(error) => assert_eq!(error, AppendError::Contended),
                            }
                        };
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
