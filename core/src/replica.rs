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

mod had_prefill;
mod remote;

use crate::affinity::Affinity;
use crate::approximate::Approximate;
use crate::bookings::Bookings;
use crate::cache_usage::{CacheUsage, CacheUsages};
use crate::card::Cards;
use crate::delta::{Delta, SnapshotStart};
use crate::demands::SessionKey;
use crate::entry::{Entry, Note};
use crate::frame::{Frame, Kind};
use crate::ids::{SequenceHash, WorkerSlot};
use crate::index::Index;
use crate::limits::{PENDING_BYTES_MAX, SWEEP_TABLES_PER_STEP};
use crate::load::Loads;
use crate::overlap::{LowerTiers, Overlap, tiered_overlaps};
use crate::roster::Roster;
use crate::settings::{RouterSettings, Settings};

use had_prefill::HadPrefill;
use remote::Remote;

/// A position in the sidecar's log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The sidecar's incarnation; 0 for none.
    pub epoch: u64,
    /// Sequence of a log frame; 0 for none.
    pub sequence: u64,
}

/// A snapshot on its way in.
#[derive(Debug)]
struct Incoming {
    /// Known from the snapshot's first frame on.
    at: Option<Position>,
    index: Index,
    blocks_expected: u64,
    /// Log frames that came through the ring meanwhile: where they stand, and
    /// those that are deltas, encoded.
    pending: Vec<(Position, Option<Vec<u8>>)>,
    pending_bytes: usize,
}

/// What happened so far; each grows only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames or entries that could not be read.
    pub bad_frames: u64,
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

/// How far a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotProgress {
    /// More parts are wanted.
    More,
    /// The index is live.
    Done,
    /// The snapshot is of no use; another must be asked for.
    Failed,
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
            Kind::Delta => self.advance(at, Some(bytes)),
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

    /// A log frame came through the ring. `delta`: its bytes, if it is one.
    fn advance(&mut self, at: Position, delta: Option<&[u8]>) {
        let is_known = at.epoch == self.seen.epoch && at.sequence <= self.seen.sequence;
        if is_known {
            return;
        }
        let is_next = at.epoch == self.seen.epoch && at.sequence == self.seen.sequence + 1;
        if !is_next && delta.is_none() {
            // Cards, settings and rosters are sent first on every stream, with
            // the numbers that they had: no gap.
            return;
        }
        self.seen = at;
        if let Some(incoming) = &mut self.incoming {
            // Frames that are no deltas count, too: what follows them is no gap.
            incoming.pending_bytes += size_of::<Position>() + delta.map_or(0, <[u8]>::len);
            incoming.pending.push((at, delta.map(<[u8]>::to_vec)));
            if incoming.pending_bytes > PENDING_BYTES_MAX {
                self.counters.snapshots_restarted += 1;
                self.incoming = None;
            }
        }
        self.advance_index(at, delta);
    }

    fn advance_index(&mut self, at: Position, delta: Option<&[u8]>) {
        let Some(live_at) = self.live_at else { return };
        if at.epoch != live_at.epoch || at.sequence > live_at.sequence + 1 {
            self.counters.gaps += 1;
            self.lose_index();
            return;
        }
        if at.sequence <= live_at.sequence {
            return;
        }
        if let Some(bytes) = delta {
            let applied = Frame::decode(bytes)
                .and_then(|frame| Delta::decode(frame.body))
                .map(|delta| self.index.apply(&delta));
            if applied.is_err() {
                self.counters.bad_frames += 1;
                self.lose_index();
                return;
            }
        }
        self.live_at = Some(at);
    }

    /// The stream goes on behind `at`.
    fn resync(&mut self, at: Position) {
        self.seen = at;
        let reaches = |live: Position| live.epoch == at.epoch && live.sequence >= at.sequence;
        if !self.live_at.is_some_and(reaches) {
            self.lose_index();
        }
    }

    /// The stream has come as far as `at`. A VM that has not seen that much has
    /// missed frames, or has started when they had left the ring already.
    fn heartbeat(&mut self, at: Position) {
        let is_behind = at.epoch != self.seen.epoch || at.sequence > self.seen.sequence;
        if is_behind {
            self.resync(at);
        }
    }

    /// The ring had moved on: entries are missing, and with them bookings that
    /// were placed or freed. Those that are left expire.
    pub fn overrun(&mut self) {
        self.counters.overruns += 1;
        self.lose_index();
        // What follows in the ring must not be taken for the next frame.
        self.seen = Position::default();
    }

    fn lose_index(&mut self) {
        self.live_at = None;
        // A snapshot under way was asked for before: what is missing now may
        // be missing from it, too.
        if self.incoming.take().is_some() {
            self.counters.snapshots_restarted += 1;
        }
    }

    /// Whether a snapshot must be asked for. Then call
    /// [`Replica::begin_snapshot`] and ask.
    #[must_use]
    pub fn wants_snapshot(&self) -> bool {
        self.live_at.is_none() && self.incoming.is_none()
    }

    /// A snapshot is about to be asked for: from now on deltas are kept for it.
    pub fn begin_snapshot(&mut self) {
        self.incoming = Some(Incoming {
            at: None,
            index: Index::new(self.index_blocks_max),
            blocks_expected: 0,
            pending: Vec::new(),
            pending_bytes: 0,
        });
    }

    /// The snapshot's stream ended early.
    pub fn abandon_snapshot(&mut self) {
        self.incoming = None;
    }

    /// Takes in one frame of the snapshot's stream.
    pub fn apply_snapshot_frame(&mut self, bytes: &[u8]) -> SnapshotProgress {
        let progress = self.try_snapshot_frame(bytes);
        if progress.is_none() {
            self.counters.bad_frames += 1;
            self.incoming = None;
        }
        progress.unwrap_or(SnapshotProgress::Failed)
    }

    fn try_snapshot_frame(&mut self, bytes: &[u8]) -> Option<SnapshotProgress> {
        let frame = Frame::decode(bytes).ok()?;
        let at = Position { epoch: frame.epoch, sequence: frame.sequence };
        if frame.kind == Kind::Remote {
            self.apply_remote(frame.body, true);
            return Some(SnapshotProgress::More);
        }
        // Begun again meanwhile: the stream is of no use, but not wrong.
        let Some(incoming) = &mut self.incoming else { return Some(SnapshotProgress::Failed) };
        match frame.kind {
            Kind::SnapshotStart => {
                incoming.blocks_expected = SnapshotStart::decode(frame.body).ok()?.blocks;
                incoming.at = Some(at);
            }
            Kind::SnapshotPart if incoming.at.is_some() => {
                incoming.index.apply(&Delta::decode(frame.body).ok()?);
            }
            Kind::SnapshotEnd => {
                let at = incoming.at?;
                return Some(self.finish_snapshot(at));
            }
            Kind::Heartbeat => {}
            _ => return None,
        }
        Some(SnapshotProgress::More)
    }

    fn finish_snapshot(&mut self, at: Position) -> SnapshotProgress {
        let Some(incoming) = self.incoming.take() else { return SnapshotProgress::Failed };
        self.index = incoming.index;
        self.live_at = Some(at);
        self.was_live = true;
        self.counters.snapshots += 1;
        for (at, delta) in &incoming.pending {
            let is_of_log = self.live_at.is_some_and(|live| live.epoch == at.epoch);
            if is_of_log {
                self.advance_index(*at, delta.as_deref());
            }
        }
        if self.live_at.is_some() { SnapshotProgress::Done } else { SnapshotProgress::Failed }
    }

    /// Does a bounded piece of background work; call it on every tick.
    pub fn step(&mut self) {
        self.index.sweep(SWEEP_TABLES_PER_STEP);
        self.approximate.step(SWEEP_TABLES_PER_STEP);
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

    /// Share of an incoming snapshot that has arrived, in blocks.
    #[must_use]
    pub fn snapshot_progress(&self) -> Option<(u64, u64)> {
        let incoming = self.incoming.as_ref()?;
        Some((incoming.index.blocks() as u64, incoming.blocks_expected))
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

    /// Counts the leading blocks of a prompt that each worker holds, as it says or
    /// as own decisions let expect.
    ///
    /// - `out`: is cleared first; then in ascending order of slots.
    pub fn held(
        &mut self,
        prompt: &[SequenceHash],
        settings: &Settings,
        now_ms: u64,
        out: &mut Vec<Overlap>,
    ) {
        out.clear();
        if !settings.use_kv_events {
            self.approximate.overlaps(prompt, now_ms, out);
            return;
        }
        if self.was_live {
            self.overlaps(prompt, out);
        }
        if settings.router_predicted_ttl_ms.is_some() {
            let mut predicted = Vec::new();
            self.approximate.overlaps(prompt, now_ms, &mut predicted);
            take_longer(out, &predicted);
        }
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

    /// The prefix index; looking something up marks it as used.
    pub fn index_mut(&mut self) -> &mut Index {
        &mut self.index
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

    /// Counts the leading blocks of a prompt that each worker holds in all its
    /// tiers; see [`tiered_overlaps`].
    pub fn overlaps(&mut self, prompt: &[SequenceHash], out: &mut Vec<Overlap>) {
        tiered_overlaps(&mut self.index, &self.tiers, prompt, out);
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }
}

/// Takes the longer of two overlaps of each worker; both ascend by slots.
fn take_longer(out: &mut Vec<Overlap>, others: &[Overlap]) {
    for other in others {
        match out.binary_search_by_key(&other.slot, |overlap| overlap.slot) {
            Ok(at) => {
                if let Some(overlap) = out.get_mut(at) {
                    overlap.blocks = overlap.blocks.max(other.blocks);
                }
            }
            Err(at) => out.insert(at, *other),
        }
    }
}

#[cfg(test)]
mod tests;
