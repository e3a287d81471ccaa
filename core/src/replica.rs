//! Replica: one filter VM's copy of what the sidecar knows and of what its
//! gateway has placed.
//!
//! It follows the ring log entry by entry, and takes the index from a snapshot
//! when it starts or has lost its place. Pure: whoever owns it does the reading
//! and asks [`Replica::wants_snapshot`] what to do next.
//!
//! # Terms
//!
//! - *seen*: the last log frame that came through the ring, applied or not;
//!   from there a stream is resumed.
//! - *live*: the index shows the log's state, so that its answers count.
//!
//! # Invariants
//!
//! 1. A delta is applied to the index exactly once and in order, or the index
//!    stops being live.
//! 2. While a snapshot comes in, the index that was live keeps its content and
//!    goes on answering: an old index may cost speed, never correctness.
//! 3. A frame that cannot be read changes nothing but a counter, and the index
//!    is taken anew.

mod follow;
mod had_prefill;
mod held;
mod remote;
mod snapshot;

use crate::affinity::Affinity;
use crate::approximate::Approximate;
use crate::bookings::Bookings;
use crate::cache_usage::{CacheUsage, CacheUsages};
use crate::card::Cards;
use crate::demands::SessionKey;
use crate::entry::{Entry, Note};
use crate::frame::{Frame, Kind};
use crate::ids::WorkerSlot;
use crate::index::Index;
use crate::limits::SWEEP_TABLES_PER_STEP;
use crate::load::Loads;
use crate::overlap::LowerTiers;
use crate::roster::Roster;
use crate::settings::{RouterSettings, Settings};

use had_prefill::HadPrefill;
use remote::Remote;
use snapshot::Incoming;

pub use snapshot::SnapshotProgress;

/// A position in the sidecar's log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The sidecar's incarnation; 0 for none.
    pub epoch: u64,
    /// Sequence of a log frame; 0 for none.
    pub sequence: u64,
}

/// What happened so far; each grows only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames or entries that could not be read.
    pub bad_frames: u64,
    /// Frames of the log, or entries with such, that had come before or are older
    /// than what has: passed over.
    pub replayed: u64,
    /// Times that the index stopped being live because a frame was missing.
    pub gaps: u64,
    /// Snapshots completed.
    pub snapshots: u64,
    /// Snapshots begun again because too much happened meanwhile.
    pub snapshots_restarted: u64,
    /// Times that the ring had moved on before this VM read it.
    pub overruns: u64,
    /// Bookings of other routers that there was no room for.
    pub remote_refused: u64,
}

/// What there was no room for so far; each grows only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    /// Bookings beyond [`crate::limits::BOOKINGS_MAX`], or made twice.
    pub bookings: u64,
    /// Bookings whose blocks are not shared: [`crate::limits::BOOKED_BLOCKS_MAX`].
    pub crowded: u64,
    /// Sessions left unbound: [`crate::limits::SESSIONS_MAX`].
    pub sessions: u64,
    /// Own decisions cut short: [`crate::limits::APPROXIMATE_RECORDS_MAX`].
    pub decisions: u64,
}

/// What an entry changed, for whoever keeps something per model or worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// The cards are other ones.
    pub cards: bool,
    /// The roster is another one.
    pub roster: bool,
    /// The settings are other ones.
    pub settings: bool,
    /// The sidecar was heard of.
    pub feed: bool,
}

/// One VM's copy.
#[derive(Debug)]
pub struct Replica {
    roster: Roster,
    roster_from: Position,
    /// Of the roster's workers.
    tiers: LowerTiers,
    had_prefill: HadPrefill,
    cards: Cards,
    cards_from: Position,
    settings: RouterSettings,
    settings_from: Position,
    cache_usages: CacheUsages,
    loads: Loads,
    affinity: Affinity,
    approximate: Approximate,
    remote: Remote,
    /// The time that applied frames are taken to have come at.
    now_ms: u64,
    index: Index,
    index_blocks_max: usize,
    /// Where the index stands, while it is live.
    live_at: Option<Position>,
    /// Whether the index has ever been live.
    was_live: bool,
    incoming: Option<Incoming>,
    seen: Position,
    counters: Counters,
}

impl Replica {
    /// An empty replica.
    ///
    /// - `index_blocks_max`: most blocks of the index.
    #[must_use]
    pub fn new(index_blocks_max: usize) -> Self {
        Self {
            roster: Roster::default(),
            roster_from: Position::default(),
            tiers: LowerTiers::default(),
            had_prefill: HadPrefill::default(),
            cards: Cards::default(),
            cards_from: Position::default(),
            settings: RouterSettings::default(),
            settings_from: Position::default(),
            cache_usages: CacheUsages::default(),
            loads: Loads::new(),
            affinity: Affinity::default(),
            approximate: Approximate::default(),
            remote: Remote::default(),
            now_ms: 0,
            index: Index::new(index_blocks_max),
            index_blocks_max,
            live_at: None,
            was_live: false,
            incoming: None,
            seen: Position::default(),
            counters: Counters::default(),
        }
    }

    /// Says what time it is, in milliseconds of the host's monotonic clock, to
    /// what is applied from now on: remote bookings come with an age.
    pub fn set_now(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
    }

    /// Applies one entry of the ring log.
    pub fn apply_entry(&mut self, bytes: &[u8]) -> Changed {
        match Entry::decode(bytes) {
            Ok(Entry::Feed(frame)) => return self.apply_frame(frame),
            Ok(Entry::Booked(booking)) => self.loads.add(booking),
            Ok(Entry::BookedPair { serving, prefill }) => {
                self.loads.add(serving);
                self.loads.add(prefill);
            }
            Ok(Entry::Noted { booked, note }) => self.apply_noted(&booked, note),
            Ok(Entry::PrefillDone(id)) => self.loads.prefill_done(id),
            Ok(Entry::OutputBlocks { id, blocks, tokens }) => {
                self.loads.output_blocks(id, blocks, tokens);
            }
            Ok(Entry::Refreshed(id, at_ms)) => self.loads.refresh(id, at_ms),
            Ok(Entry::Freed(id)) => {
                self.loads.free(id);
                self.affinity.ended(id);
                self.approximate.ended(id);
            }
            Err(_) => self.counters.bad_frames += 1,
        }
        Changed::default()
    }

    fn apply_noted(&mut self, booked: &[u8], note: Note) {
        let serving = match Entry::decode(booked) {
            Ok(Entry::Booked(serving)) => {
                self.loads.add(serving.clone());
                serving
            }
            Ok(Entry::BookedPair { serving, prefill }) => {
                self.loads.add(serving.clone());
                self.loads.add(prefill);
                serving
            }
            _ => {
                self.counters.bad_frames += 1;
                return;
            }
        };
        if let Some(session) = note.session {
            self.affinity.bind(session, serving.slot, serving.id);
        }
        if let Some(decision) = note.decision {
            self.approximate.record(decision);
        }
    }

    fn apply_frame(&mut self, bytes: &[u8]) -> Changed {
        let Ok(frame) = Frame::decode(bytes) else {
            self.counters.bad_frames += 1;
            self.lose_index();
            return Changed::default();
        };
        let mut changed = Changed { feed: true, ..Changed::default() };
        let at = Position { epoch: frame.epoch, sequence: frame.sequence };
        match frame.kind {
            Kind::Roster | Kind::Card | Kind::Settings => {
                changed = self.apply_state(&frame);
                self.advance(at, None);
            }
            Kind::Delta => self.advance(at, Some(frame.body)),
            Kind::Resync => self.resync(at),
            Kind::Heartbeat => self.heartbeat(at),
            Kind::CacheUsage => match CacheUsages::decode(frame.body) {
                Ok(usages) => self.cache_usages = usages,
                Err(_) => self.counters.bad_frames += 1,
            },
            Kind::Remote => self.apply_remote(frame.body, false),
            // Those of snapshots, blobs and the uplink never enter the ring.
            _ => self.counters.bad_frames += 1,
        }
        changed
    }

    /// Applies what other routers have booked.
    ///
    /// - `beside`: it did not come through the ring, and so may be older than
    ///   what has.
    fn apply_remote(&mut self, body: &[u8], beside: bool) {
        match Bookings::decode(body) {
            Ok(bookings) => {
                let passed = self.remote.apply(&bookings, beside, self.now_ms, &mut self.loads);
                self.counters.bad_frames += passed.bad;
                self.counters.remote_refused += passed.over_limit;
            }
            Err(_) => self.counters.bad_frames += 1,
        }
    }

    /// Takes over a roster, card or settings frame, wherever it came from: the
    /// ring, or the copy in shared data that a late VM starts with. Its place in the
    /// log is not considered.
    pub fn apply_state_bytes(&mut self, bytes: &[u8]) -> Changed {
        match Frame::decode(bytes) {
            Ok(frame) => self.apply_state(&frame),
            Err(_) => {
                self.counters.bad_frames += 1;
                Changed::default()
            }
        }
    }

    fn apply_state(&mut self, frame: &Frame<'_>) -> Changed {
        let at = Position { epoch: frame.epoch, sequence: frame.sequence };
        let mut changed = Changed { feed: true, ..Changed::default() };
        let had = match frame.kind {
            Kind::Roster => self.roster_from,
            Kind::Card => self.cards_from,
            _ => self.settings_from,
        };
        if at.epoch == had.epoch && at.sequence < had.sequence {
            // Workers that have gone must not come back.
            self.counters.replayed += 1;
            return changed;
        }
        match frame.kind {
            Kind::Roster if at != self.roster_from => match Roster::decode(frame.body) {
                Ok(roster) => {
                    if at.epoch != self.roster_from.epoch {
                        // Models may have other numbers.
                        self.had_prefill = HadPrefill::default();
                    }
                    self.take_roster(roster);
                    self.roster_from = at;
                    changed.roster = true;
                }
                Err(_) => self.counters.bad_frames += 1,
            },
            Kind::Card if at != self.cards_from => match Cards::decode(frame.body) {
                Ok(cards) => {
                    self.had_prefill.renumber(&self.cards, &cards);
                    self.had_prefill.note(&self.roster);
                    self.cards = cards;
                    self.cards_from = at;
                    changed.cards = true;
                }
                Err(_) => self.counters.bad_frames += 1,
            },
            Kind::Settings if at != self.settings_from => {
                match RouterSettings::decode(frame.body) {
                    Ok(settings) => {
                        self.settings = settings;
                        self.settings_from = at;
                        changed.settings = true;
                    }
                    Err(_) => self.counters.bad_frames += 1,
                }
            }
            _ => {}
        }
        changed
    }

    fn take_roster(&mut self, roster: Roster) {
        self.tiers = LowerTiers::of(&roster.workers);
        let old = core::mem::replace(&mut self.roster, roster);
        for entry in &old.workers {
            if self.worker(entry.slot).is_none_or(|now| now.worker != entry.worker) {
                self.loads.drop_worker(entry.slot);
                self.cache_usages.forget(entry.slot);
                self.affinity.drop_worker(entry.slot);
                self.approximate.drop_worker(entry.slot);
            }
        }
        self.had_prefill.note(&self.roster);
    }

    /// Does a bounded piece of background work; call it on every tick. Returns
    /// whether any is left.
    pub fn step(&mut self) -> bool {
        if self.incoming.as_ref().is_some_and(Incoming::is_settling) {
            self.settle();
        }
        let settling = self.incoming.as_ref().is_some_and(Incoming::is_settling);
        let index = self.index.sweep(SWEEP_TABLES_PER_STEP);
        let approximate = self.approximate.step(SWEEP_TABLES_PER_STEP);
        settling || index || approximate
    }

    /// Whether the index shows the log's state.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.live_at.is_some()
    }

    /// Whether the index has answers at all, if perhaps old ones.
    #[must_use]
    pub fn has_index(&self) -> bool {
        self.was_live
    }

    /// The last log frame that came through the ring.
    #[must_use]
    pub fn seen(&self) -> Position {
        self.seen
    }

    /// Where the index stands, while it is live.
    #[must_use]
    pub fn live_at(&self) -> Option<Position> {
        self.live_at
    }

    /// The workers.
    #[must_use]
    pub fn roster(&self) -> &Roster {
        &self.roster
    }

    /// Whether a roster has ever come.
    #[must_use]
    pub fn has_roster(&self) -> bool {
        self.roster_from != Position::default()
    }

    /// Whether a model has had prefill workers since the sidecar started.
    #[must_use]
    pub fn had_prefill(&self, model: u16) -> bool {
        self.had_prefill.of(model)
    }

    /// The worker that a slot stands for.
    #[must_use]
    pub fn worker(&self, slot: WorkerSlot) -> Option<&crate::roster::RosterWorker> {
        let workers = &self.roster.workers;
        // Rosters come in ascending order of slots; one that does not is found
        // by looking at all.
        match workers.binary_search_by_key(&slot, |entry| entry.slot) {
            Ok(at) => workers.get(at),
            Err(_) => workers.iter().find(|entry| entry.slot == slot),
        }
    }

    /// The models.
    #[must_use]
    pub fn cards(&self) -> &Cards {
        &self.cards
    }

    /// The settings as the feed has them; all defaults before any came.
    #[must_use]
    pub fn settings(&self) -> &RouterSettings {
        &self.settings
    }

    /// The settings of a model; `None` for one that no card names.
    #[must_use]
    pub fn settings_of(&self, model: Option<u16>) -> &Settings {
        self.settings.of(model)
    }

    /// The bookings.
    #[must_use]
    pub fn loads(&self) -> &Loads {
        &self.loads
    }

    /// Ends what has lasted its time: bookings that nobody frees or refreshes,
    /// sessions, records of own decisions. Returns how many bookings ended.
    ///
    /// # Cost
    ///
    /// Looks at every booking and session; call it about once a second.
    pub fn expire(&mut self, now_ms: u64, settings: &Settings) -> usize {
        let expired = self.loads.expire(now_ms, settings.active_request_expiry_ms);
        let ttl_ms = settings.session_affinity.map_or(0, |affinity| affinity.ttl_ms);
        let runs = |id| self.loads.contains(id);
        self.affinity.expire(now_ms, ttl_ms, runs);
        self.approximate.end_others(runs);
        self.approximate.expire(now_ms);
        expired
    }

    /// The worker that a session is bound to.
    #[must_use]
    pub fn bound(&self, session: SessionKey) -> Option<WorkerSlot> {
        self.affinity.of(session)
    }

    /// The sessions that are bound.
    #[must_use]
    pub fn affinity(&self) -> &Affinity {
        &self.affinity
    }

    /// The records of own decisions.
    #[must_use]
    pub fn approximate(&self) -> &Approximate {
        &self.approximate
    }

    /// The prefix index.
    #[must_use]
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// How full a worker's cache is, as it says; `None` if it says nothing, or
    /// if the sidecar has been silent for long.
    #[must_use]
    pub fn cache_usage(&self, slot: WorkerSlot) -> Option<CacheUsage> {
        self.cache_usages.of_slot(slot)
    }

    /// Forgets how full caches are: the sidecar has been silent for
    /// [`crate::limits::CACHE_USAGE_STALE_MS`].
    pub fn forget_cache_usages(&mut self) {
        self.cache_usages = CacheUsages::default();
    }

    /// What there was no room for so far.
    #[must_use]
    pub fn refused(&self) -> Refused {
        Refused {
            bookings: self.loads.refused(),
            crowded: self.loads.crowded(),
            sessions: self.affinity.refused(),
            decisions: self.approximate.refused(),
        }
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }
}

#[cfg(test)]
mod tests;
