//! Affinity: which worker a session is bound to.
//!
//! A session's first request binds it to the worker that is taken; the next ones
//! go there, while that worker is there and takes requests (`route` decides). As
//! Dynamo's session affinity: the time to live is idle time, and stands still
//! while a request of the session runs.
//!
//! # Invariants
//!
//! 1. Bindings are made by entries of the ring log alone, so that all VMs of a
//!    gateway agree.
//! 2. At most [`SESSIONS_MAX`] sessions; beyond it new ones stay unbound, and are
//!    counted.

use foldhash::fast::FixedState;
use hashbrown::HashMap;

use crate::demands::SessionKey;
use crate::ids::WorkerSlot;
use crate::limits::SESSIONS_MAX;
use crate::load::BookingId;

#[derive(Debug)]
struct Binding {
    slot: WorkerSlot,
    /// Requests that run.
    running: u32,
    /// Since when none runs, as far as that was noticed.
    idle_since_ms: Option<u64>,
}

/// All sessions.
#[derive(Debug, Default)]
pub struct Affinity {
    sessions: HashMap<SessionKey, Binding, FixedState>,
    of_booking: HashMap<BookingId, SessionKey, FixedState>,
    refused: u64,
}

impl Affinity {
    /// A request of the session was placed: it is bound to that worker from now
    /// on.
    pub fn bind(&mut self, session: SessionKey, slot: WorkerSlot, id: BookingId) {
        if self.of_booking.contains_key(&id) {
            return;
        }
        if self.sessions.len() >= SESSIONS_MAX && !self.sessions.contains_key(&session) {
            self.refused += 1;
            return;
        }
        let fresh = || Binding { slot, running: 0, idle_since_ms: None };
        let binding = self.sessions.entry(session).or_insert_with(fresh);
        binding.slot = slot;
        binding.running += 1;
        binding.idle_since_ms = None;
        self.of_booking.insert(id, session);
    }

    /// A request has ended.
    pub fn ended(&mut self, id: BookingId) {
        let Some(session) = self.of_booking.remove(&id) else { return };
        if let Some(binding) = self.sessions.get_mut(&session) {
            binding.running = binding.running.saturating_sub(1);
        }
    }

    /// Forgets the sessions that were idle for long enough; call it about once a
    /// second.
    ///
    /// - `runs`: whether a request still runs, for those whose end went unseen.
    pub fn expire(&mut self, now_ms: u64, ttl_ms: u64, runs: impl Fn(BookingId) -> bool) {
        let ended: Vec<BookingId> =
            self.of_booking.keys().copied().filter(|id| !runs(*id)).collect();
        for id in ended {
            self.ended(id);
        }
        self.sessions.retain(|_, binding| {
            if binding.running > 0 {
                return true;
            }
            let since = *binding.idle_since_ms.get_or_insert(now_ms);
            now_ms.saturating_sub(since) < ttl_ms
        });
    }

    /// A worker is gone: its sessions are bound to nobody.
    pub fn drop_worker(&mut self, slot: WorkerSlot) {
        self.sessions.retain(|_, binding| binding.slot != slot);
    }

    /// The worker that a session is bound to.
    #[must_use]
    pub fn of(&self, session: SessionKey) -> Option<WorkerSlot> {
        self.sessions.get(&session).map(|binding| binding.slot)
    }

    /// Number of sessions.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Sessions that stayed unbound because there were too many, ever.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const A: SessionKey = SessionKey(1);
    const B: SessionKey = SessionKey(2);

    fn all_run(_: BookingId) -> bool {
        true
    }

    #[test]
    fn sessions_end_by_idle_time_alone() {
        let mut it = Affinity::default();
        it.bind(A, WorkerSlot(3), BookingId(1));
        it.bind(B, WorkerSlot(4), BookingId(2));
        it.expire(1_000_000, 5_000, all_run);
        assert_eq!((it.of(A), it.of(B)), (Some(WorkerSlot(3)), Some(WorkerSlot(4))));
        it.ended(BookingId(1));
        it.expire(1_001_000, 5_000, all_run);
        it.expire(1_005_999, 5_000, all_run);
        assert_eq!(it.of(A), Some(WorkerSlot(3)));
        it.bind(A, WorkerSlot(3), BookingId(3));
        it.ended(BookingId(3));
        it.expire(1_006_000, 5_000, all_run);
        assert_eq!(it.of(A), Some(WorkerSlot(3)), "a request starts the time anew");
        it.expire(1_011_000, 5_000, all_run);
        assert_eq!((it.of(A), it.sessions()), (None, 1));
    }

    #[test]
    fn another_worker_rebinds() {
        let mut it = Affinity::default();
        it.bind(A, WorkerSlot(3), BookingId(1));
        it.bind(A, WorkerSlot(5), BookingId(2));
        assert_eq!(it.of(A), Some(WorkerSlot(5)));
        it.drop_worker(WorkerSlot(3));
        assert_eq!(it.of(A), Some(WorkerSlot(5)));
        it.drop_worker(WorkerSlot(5));
        assert_eq!(it.of(A), None);
    }

    #[test]
    fn requests_whose_end_went_unseen_end_with_their_bookings() {
        let mut it = Affinity::default();
        it.bind(A, WorkerSlot(3), BookingId(1));
        it.expire(0, 10, |_| false);
        it.expire(10, 10, |_| false);
        assert_eq!(it.sessions(), 0);
        it.ended(BookingId(1));
    }

    #[test]
    fn the_number_of_sessions_is_bounded() {
        let mut it = Affinity::default();
        for n in 0..=SESSIONS_MAX as u64 {
            it.bind(SessionKey(n.into()), WorkerSlot(0), BookingId(n));
        }
        assert_eq!((it.sessions(), it.refused()), (SESSIONS_MAX, 1));
        it.bind(SessionKey(0), WorkerSlot(1), BookingId(u64::MAX));
        assert_eq!(it.of(SessionKey(0)), Some(WorkerSlot(1)));
    }
}
