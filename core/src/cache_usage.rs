//! Cache usage: how full workers' caches are, as they say themselves.
//!
//! The sidecar hears it from load streams and metrics pages, and sends all that
//! it knows in one frame beside the log; the next frame replaces it. Nothing is
//! weighed with it: it only says which workers are too full for more requests
//! (Dynamo: `active_decode_blocks_threshold`).
//!
//! Body: `count u32`, then for each worker that has said something
//! `slot u16 | used u16 | active u16`.
//!
//! # Terms
//!
//! - *share*: a part of the blocks that a worker's cache holds, in steps of
//!   1/65534; rounded down, so that no threshold is passed too early.

use crate::ids::WorkerSlot;
use crate::limits::{FRAME_BODY_BYTES_MAX, ROSTER_WORKERS_MAX};
use crate::wire::{Reader, WireError, Writer};

/// A share of a worker's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Share(u16);

/// Stands for a share that is not known.
const UNKNOWN: u16 = u16::MAX;

/// Steps of a whole.
const STEPS: u16 = u16::MAX - 1;

impl Share {
    /// `part` of `whole` blocks, at most all of them; `None` of nothing.
    #[must_use]
    pub fn of(part: u64, whole: u64) -> Option<Self> {
        let steps = u128::from(part.min(whole)) * u128::from(STEPS);
        let steps = steps.checked_div(u128::from(whole))?;
        Some(Self(u16::try_from(steps).unwrap_or(STEPS)))
    }

    /// A share from 0 to 1; `None` for any other number.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "from 0 to the number of steps"
    )]
    pub fn of_one(share: f64) -> Option<Self> {
        (0.0..=1.0).contains(&share).then(|| Self((share * f64::from(STEPS)) as u16))
    }

    /// The share, from 0 to 1.
    #[must_use]
    pub fn value(self) -> f64 {
        f64::from(self.0) / f64::from(STEPS)
    }

    /// Whether it differs by a hundredth of the whole or more.
    #[must_use]
    pub fn has_moved(self, from: Self) -> bool {
        self.0.abs_diff(from.0) >= STEPS / 100
    }

    fn write(share: Option<Self>) -> u16 {
        share.map_or(UNKNOWN, |share| share.0)
    }

    fn read(value: u16) -> Option<Self> {
        (value != UNKNOWN).then_some(Self(value))
    }
}

/// How full one worker's cache is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheUsage {
    /// Blocks in use; `None` if not known.
    pub used: Option<Share>,
    /// Blocks of requests that decode; `None` if not known.
    pub active: Option<Share>,
}

impl CacheUsage {
    /// The larger of both shares, from 0 to 1; `None` if neither is known.
    #[must_use]
    pub fn share(&self) -> Option<f64> {
        self.used.max(self.active).map(Share::value)
    }

    /// Whether anything is known.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.used.is_some() || self.active.is_some()
    }

    /// Whether a share has moved by a hundredth, has become known or has ceased
    /// to be.
    #[must_use]
    pub fn has_moved(&self, from: &Self) -> bool {
        let moved = |now: Option<Share>, from: Option<Share>| match (now, from) {
            (Some(now), Some(from)) => now.has_moved(from),
            (now, from) => now != from,
        };
        moved(self.used, from.used) || moved(self.active, from.active)
    }
}

/// What all workers have said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheUsages {
    /// In ascending order of slots, each once.
    workers: Vec<(WorkerSlot, CacheUsage)>,
}

/// Bytes of one worker's entry.
const ENTRY_BYTES: usize = 6;

const _: () = assert!(4 + ROSTER_WORKERS_MAX * ENTRY_BYTES <= FRAME_BODY_BYTES_MAX);

impl CacheUsages {
    /// Takes what workers have said, in any order; those that have said nothing
    /// are left out, and of one slot all but the first.
    #[must_use]
    pub fn of(workers: impl IntoIterator<Item = (WorkerSlot, CacheUsage)>) -> Self {
        let known = workers.into_iter().filter(|(_, usage)| usage.is_known());
        let mut workers: Vec<_> = known.collect();
        workers.sort_by_key(|(slot, _)| *slot);
        workers.dedup_by_key(|(slot, _)| *slot);
        workers.truncate(ROSTER_WORKERS_MAX);
        Self { workers }
    }

    /// What one worker has said; `None` for nothing.
    #[must_use]
    pub fn of_slot(&self, slot: WorkerSlot) -> Option<CacheUsage> {
        let at = self.workers.binary_search_by_key(&slot, |(slot, _)| *slot).ok()?;
        self.workers.get(at).map(|(_, usage)| *usage)
    }

    /// Forgets what one worker has said.
    pub fn forget(&mut self, slot: WorkerSlot) {
        if let Ok(at) = self.workers.binary_search_by_key(&slot, |(slot, _)| *slot) {
            self.workers.remove(at);
        }
    }

    /// Whether nobody has said anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.workers.is_empty()
    }

    /// Whether a worker's share has moved by a hundredth, or whether other
    /// workers have said something.
    #[must_use]
    pub fn has_moved(&self, from: &Self) -> bool {
        self.workers.len() != from.workers.len()
            || self.workers.iter().zip(&from.workers).any(|((slot, usage), (from_slot, from))| {
                slot != from_slot || usage.has_moved(from)
            })
    }

    /// Encodes the body of a frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.count(self.workers.len());
        for (slot, usage) in &self.workers {
            writer.u16(slot.0);
            writer.u16(Share::write(usage.used));
            writer.u16(Share::write(usage.active));
        }
        writer.into_bytes()
    }

    /// Decodes the body of a frame.
    ///
    /// # Errors
    ///
    /// A [`WireError`]; the caller keeps what it has.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let count = reader.count(ROSTER_WORKERS_MAX, ENTRY_BYTES)?;
        let mut workers = Vec::with_capacity(count);
        for _ in 0..count {
            let slot = WorkerSlot(reader.u16()?);
            let (used, active) = (Share::read(reader.u16()?), Share::read(reader.u16()?));
            workers.push((slot, CacheUsage { used, active }));
        }
        reader.finish()?;
        Ok(Self::of(workers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn usage(used: Option<u64>, active: Option<u64>) -> CacheUsage {
        let share = |blocks: Option<u64>| blocks.and_then(|blocks| Share::of(blocks, 1_000));
        CacheUsage { used: share(used), active: share(active) }
    }

    fn example() -> CacheUsages {
        CacheUsages::of([
            (WorkerSlot(9), usage(Some(1_000), None)),
            (WorkerSlot(2), usage(Some(0), Some(500))),
            (WorkerSlot(4), usage(None, None)),
        ])
    }

    /// Goal: the format does not change unnoticed.
    #[test]
    fn the_bytes_are_known() {
        let hex: String = example().encode().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "02000000 0200 0000 ff7f 0900 feff ffff".replace(' ', ""));
    }

    #[test]
    fn what_workers_say_survives_the_wire() {
        for usages in [example(), CacheUsages::default()] {
            let bytes = usages.encode();
            assert_eq!(CacheUsages::decode(&bytes), Ok(usages));
            for len in 0..bytes.len() {
                assert!(CacheUsages::decode(&bytes[..len]).is_err(), "{len} bytes");
            }
        }
        let mut many = vec![0; 4 + (ROSTER_WORKERS_MAX + 1) * ENTRY_BYTES];
        many[..4].copy_from_slice(&u32::try_from(ROSTER_WORKERS_MAX + 1).unwrap().to_le_bytes());
        assert_eq!(CacheUsages::decode(&many), Err(WireError::OverLimit));
    }

    /// Goal: a share is never above what was said, and at most a step below.
    #[test]
    fn shares_are_rounded_down() {
        for (part, whole, expected) in [
            (0, 7, Some(0.0)),
            (7, 7, Some(1.0)),
            (9, 7, Some(1.0)),
            (850, 1_000, Some(0.85)),
            (u64::MAX, u64::MAX, Some(1.0)),
            (1, 0, None),
        ] {
            let value = Share::of(part, whole).map(Share::value);
            assert_eq!(value.is_some(), expected.is_some(), "{part} of {whole}");
            let below = expected.unwrap_or(0.0) - value.unwrap_or(0.0);
            assert!((0.0..2e-5).contains(&below), "{part} of {whole}: {value:?}");
        }
        for (share, is_one) in [(0.0, true), (0.5, true), (1.0, true), (1.01, false), (-0.1, false)]
        {
            let value = Share::of_one(share).map(Share::value);
            assert_eq!(value.is_some(), is_one, "{share}");
            assert!(value.is_none_or(|value| (share - value).abs() < 2e-5), "{share}");
        }
        assert_eq!(Share::of_one(f64::NAN), None);
    }

    #[test]
    fn the_larger_share_counts() {
        for (used, active, expected) in [
            (None, None, None),
            (Some(0), None, Some(0.0)),
            (None, Some(1_000), Some(1.0)),
            (Some(1_000), Some(0), Some(1.0)),
            (Some(0), Some(1_000), Some(1.0)),
        ] {
            assert_eq!(usage(used, active).share(), expected, "{used:?} {active:?}");
        }
    }

    #[test]
    fn a_hundredth_is_a_move() {
        let from = usage(Some(500), None);
        for (to, moved) in [
            (usage(Some(509), None), false),
            (usage(Some(511), None), true),
            (usage(Some(489), None), true),
            (usage(Some(500), Some(0)), true),
            (usage(None, None), true),
        ] {
            assert_eq!(to.has_moved(&from), moved, "{to:?}");
            let of = |usage| CacheUsages::of([(WorkerSlot(1), usage), (WorkerSlot(2), from)]);
            assert_eq!(of(to).has_moved(&of(from)), moved, "{to:?}");
        }
        let of = |slot| CacheUsages::of([(WorkerSlot(slot), from)]);
        assert!(of(1).has_moved(&of(2)));
    }

    #[test]
    fn a_worker_is_found_until_it_is_forgotten() {
        let mut usages = example();
        assert_eq!(usages.of_slot(WorkerSlot(9)), Some(usage(Some(1_000), None)));
        assert_eq!(usages.of_slot(WorkerSlot(4)), None);
        usages.forget(WorkerSlot(4));
        usages.forget(WorkerSlot(9));
        assert_eq!(usages.of_slot(WorkerSlot(9)), None);
        assert!(!usages.is_empty());
    }
}
