//! Keeper: the one task that owns the state.
//!
//! Takes the sources' updates and new worker lists, writes deltas, rosters and
//! cards into the log, and answers what streams and the status page ask.
//!
//! # Terms
//!
//! - *open*: the index is whole, as far as it can be: every source has finished
//!   its first replay, or the deadline has passed. Before that no filter is told
//!   to take the index over, so a restart of the sidecar costs no hits.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};
use warmpath_core::card::Cards;
use warmpath_core::frame::Kind;
use warmpath_core::ids::{SequenceHash, Worker, WorkerSlot};
use warmpath_core::limits::FRAME_BODY_BYTES_MAX;
use warmpath_core::roster::Parity;

use crate::discovery::ListEvent;
use crate::fleet::{Fleet, ListedRank, LoadStream, RankLoad, RankStream};
use crate::limits::{FLUSH_AFTER, LOAD_STREAMS_MAX, ROSTER_AFTER};
use crate::metrics::Metrics;
use crate::publish::service::Shared;
use crate::source::load::follow_load;
use crate::source::plane::{PlaneSpec, follow_plane};
use crate::source::sequence::Loss;
use crate::source::zmq::{StreamSpec, follow};
use crate::source::{SharedView, Transports, Update, View, new_view};
use crate::state::State;
use crate::state::counts::Counts;
use crate::state::rank::Held;

/// The index as it was after one log frame.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Sequence of that frame.
    pub sequence: u64,
    /// What every rank held.
    pub ranks: Vec<(WorkerSlot, Arc<Held>)>,
}

impl Snapshot {
    /// All blocks, for comparisons.
    #[must_use]
    pub fn blocks(&self) -> BTreeSet<(WorkerSlot, SequenceHash)> {
        let ranks = self.ranks.iter();
        ranks.flat_map(|(slot, held)| held.keys().map(|hash| (*slot, *hash))).collect()
    }
}

/// What is asked of the state.
#[derive(Debug)]
pub enum Question {
    /// The index as it is now.
    Snapshot(oneshot::Sender<Snapshot>),
    /// How things stand.
    Report(oneshot::Sender<Report>),
}

/// One rank, for the status page.
#[derive(Clone, Debug)]
pub struct RankReport {
    /// Stands for it in the feed.
    pub slot: WorkerSlot,
    /// What the worker list says.
    pub listed: ListedRank,
    /// How well its blocks are known.
    pub parity: Parity,
    /// Blocks held.
    pub blocks: usize,
    /// Pages remembered.
    pub pages: usize,
    /// Number of the last message applied.
    pub applied: Option<u64>,
    /// Why its blocks were last forgotten.
    pub last_loss: Option<Loss>,
    /// What was noticed.
    pub counts: Counts,
    /// Its stream, if it publishes.
    pub view: Option<View>,
    /// How busy it is, as far as it has said.
    pub load: RankLoad,
}

/// How things stand.
#[derive(Clone, Debug)]
pub struct Report {
    /// Every rank, in the order of slots.
    pub ranks: Vec<RankReport>,
    /// The models, if they have been loaded.
    pub cards: Option<Arc<Cards>>,
    /// What keeps the sidecar from being ready.
    pub unready: Vec<String>,
    /// What was wrong with the last worker list.
    pub list_error: Option<String>,
    /// Updates of sources that wait.
    pub updates_waiting: usize,
}

/// Where the keeper hears from.
#[derive(Debug)]
pub struct Inputs {
    /// New worker lists.
    pub lists: mpsc::Receiver<ListEvent>,
    /// The models, once.
    pub cards: oneshot::Receiver<Cards>,
    /// What is asked.
    pub questions: mpsc::Receiver<Question>,
}

/// A rank's stream and what has come of it.
#[derive(Debug)]
struct Followed {
    listed: ListedRank,
    view: Option<SharedView>,
    task: Option<AbortHandle>,
    synced: bool,
    applied: Option<u64>,
    last_loss: Option<Loss>,
}

impl Drop for Followed {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// A load stream's task, which ends when the stream leaves the list.
#[derive(Debug)]
struct LoadTask(AbortHandle);

impl Drop for LoadTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Owns the state.
#[derive(Debug)]
pub struct Keeper {
    state: State,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    updates_in: mpsc::Sender<Update>,
    updates: mpsc::Receiver<Update>,
    transports: Transports,
    followed: BTreeMap<u16, Followed>,
    /// How busy each listed rank is.
    loads: BTreeMap<Worker, RankLoad>,
    load_tasks: HashMap<LoadStream, LoadTask>,
    cards: Option<Arc<Cards>>,
    has_list: bool,
    list_error: Option<String>,
    counted: Counts,
    deadline: Instant,
    flush_at: Option<Instant>,
    roster_at: Option<Instant>,
}

impl Keeper {
    /// Knows nothing yet.
    ///
    /// - `transports`: what streams of the event plane share.
    /// - `sync_deadline`: how long the first synchronisation may take.
    #[must_use]
    pub fn new(
        shared: Arc<Shared>,
        transports: Transports,
        sync_deadline: Duration,
        updates_max: usize,
    ) -> Self {
        let (updates_in, updates) = mpsc::channel(updates_max);
        Self {
            state: State::new(),
            metrics: Arc::clone(&shared.metrics),
            shared,
            updates_in,
            updates,
            transports,
            followed: BTreeMap::new(),
            loads: BTreeMap::new(),
            load_tasks: HashMap::new(),
            cards: None,
            has_list: false,
            list_error: None,
            counted: Counts::default(),
            deadline: Instant::now() + sync_deadline,
            flush_at: None,
            roster_at: None,
        }
    }

    /// Where updates go in; for sources, and for tests in their place.
    #[must_use]
    pub fn updates(&self) -> mpsc::Sender<Update> {
        self.updates_in.clone()
    }

    /// Works until the stop.
    pub async fn run(mut self, mut inputs: Inputs) {
        let stop = self.shared.stop.clone();
        loop {
            // Roster and gate wait for list and cards, however late it is: a time
            // that has passed would be waited for in a loop without rest.
            let can_publish = self.has_list && self.cards.is_some();
            let roster_at = self.roster_at.filter(|_| can_publish);
            let gate_at = (!self.is_open() && can_publish).then_some(self.deadline);
            let next = [self.flush_at, roster_at, gate_at].into_iter().flatten().min();
            tokio::select! {
                () = stop.cancelled() => return,
                update = self.updates.recv() => {
                    if let Some(update) = update {
                        self.update(update);
                    }
                }
                question = inputs.questions.recv() => {
                    if let Some(question) = question {
                        self.answer(question);
                    }
                }
                event = inputs.lists.recv() => {
                    if let Some(event) = event {
                        self.list(event);
                    } else {
                        return;
                    }
                }
                cards = &mut inputs.cards, if self.cards.is_none() => {
                    match cards {
                        Ok(cards) => self.take_cards(cards),
                        // Whoever loads the models has gone: we are stopping.
                        Err(_) => return,
                    }
                }
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            }
            self.on_time();
        }
    }

    fn is_open(&self) -> bool {
        self.shared.log.progress().open
    }

    /// Does what is due.
    fn on_time(&mut self) {
        let now = Instant::now();
        for body in self.state.full_deltas() {
            self.append(Kind::Delta, &body);
        }
        if self.state.has_deltas() {
            let at = *self.flush_at.get_or_insert(now + FLUSH_AFTER);
            if at <= now {
                self.flush();
            }
        }
        if self.state.take_roster_changed() {
            self.roster_at.get_or_insert(now + ROSTER_AFTER);
        }
        if self.roster_at.is_some_and(|at| at <= now) && self.cards.is_some() && self.has_list {
            self.publish_roster();
        }
        self.try_open(now);
    }

    /// Lets filters take the index over as soon as it is whole.
    fn try_open(&mut self, now: Instant) {
        if self.is_open() || !self.has_list || self.cards.is_none() {
            return;
        }
        let waiting = self.followed.values().filter(|it| it.task.is_some() && !it.synced).count();
        if waiting > 0 && now < self.deadline {
            return;
        }
        if waiting > 0 {
            warn!(waiting, "the first synchronisation is over its deadline");
        }
        self.flush();
        self.publish_roster();
        self.shared.log.open();
        info!(sequence = self.shared.log.progress().last, "the index is open to filters");
    }

    fn flush(&mut self) {
        for body in self.state.all_deltas() {
            self.append(Kind::Delta, &body);
        }
        self.flush_at = None;
        let counts = self.state.counts();
        self.metrics.counted(&self.counted, &counts);
        self.counted = counts;
    }

    fn publish_roster(&mut self) {
        self.roster_at = None;
        self.state.take_roster_changed();
        let body = self.state.roster().encode();
        self.append(Kind::Roster, &body);
    }

    fn append(&self, kind: Kind, body: &[u8]) {
        if body.len() > FRAME_BODY_BYTES_MAX {
            // Limits of what is put in make this impossible; a filter would
            // refuse the frame, so it must not enter the log.
            warn!(?kind, bytes = body.len(), "a frame is too long and is left out");
            return;
        }
        let (sequence, bytes) = self.shared.log.append(kind, body);
        let name = match kind {
            Kind::Delta => "delta",
            Kind::Roster => "roster",
            _ => "card",
        };
        self.metrics.frame_written(name, bytes, sequence);
    }

    fn update(&mut self, update: Update) {
        match update {
            Update::Events(slot, sequence, events) => {
                if let Some(followed) = self.followed.get_mut(&slot.0) {
                    followed.applied = Some(sequence);
                    self.state.apply(slot, &events);
                }
            }
            Update::Replace(slot, sequence, events) => {
                if let Some(followed) = self.followed.get_mut(&slot.0) {
                    followed.applied = Some(sequence);
                    self.state.replace(slot, &events);
                }
            }
            Update::Load(worker, load) => {
                if let Some(known) = self.loads.get_mut(&worker) {
                    known.merge(&load);
                } else {
                    self.metrics.load_dropped("not_listed");
                }
            }
            Update::Clear(slot, loss) => {
                if let Some(followed) = self.followed.get_mut(&slot.0) {
                    followed.last_loss = Some(loss);
                    followed.applied = None;
                    // Another incarnation may have another block size.
                    let is_another = matches!(loss, Loss::Restart | Loss::PublisherGone);
                    self.state.clear(slot, is_another);
                }
            }
            Update::Synced(slot) => {
                if let Some(followed) = self.followed.get_mut(&slot.0) {
                    followed.synced = true;
                }
            }
        }
    }

    fn answer(&mut self, question: Question) {
        // Whoever asked may have gone.
        match question {
            Question::Snapshot(answer) => {
                self.flush();
                let sequence = self.shared.log.progress().last;
                let _ = answer.send(Snapshot { sequence, ranks: self.state.held() });
            }
            Question::Report(answer) => {
                let _ = answer.send(self.report());
            }
        }
    }

    fn take_cards(&mut self, cards: Cards) {
        self.append(Kind::Card, &cards.encode());
        self.cards = Some(Arc::new(cards));
        if self.has_list {
            self.roster_at = Some(Instant::now());
        }
    }

    fn list(&mut self, event: ListEvent) {
        match event {
            ListEvent::Taken(list) => {
                self.list_error = None;
                self.metrics.workers_list_taken();
                self.take_list(list);
            }
            ListEvent::Refused(message) => {
                warn!(error = %message, "the worker list is refused; the old one stays");
                self.metrics.workers_list_refused();
                self.list_error = Some(message);
            }
        }
    }

    fn take_list(&mut self, list: Fleet) {
        let specs: Vec<_> = list.ranks.iter().map(|rank| rank.spec.clone()).collect();
        let changes = self.state.set_workers(&specs);
        for (worker, slot) in &changes.removed {
            self.followed.remove(&slot.0);
            self.loads.remove(worker);
        }
        for (worker, _) in &changes.added {
            self.loads.insert(*worker, RankLoad::default());
        }
        self.follow_loads(list.load_streams);
        let mut slots: BTreeMap<Worker, WorkerSlot> = changes.added.iter().copied().collect();
        let known: BTreeMap<Worker, WorkerSlot> =
            self.state.tracked().map(|tracked| (tracked.spec.worker, tracked.slot)).collect();
        for listed in list.ranks {
            let worker = listed.spec.worker;
            let Some(slot) = slots.remove(&worker).or_else(|| known.get(&worker).copied()) else {
                continue;
            };
            let same_stream =
                self.followed.get(&slot.0).is_some_and(|it| it.listed.stream == listed.stream);
            if same_stream {
                if let Some(followed) = self.followed.get_mut(&slot.0) {
                    followed.listed = listed;
                }
                continue;
            }
            if self.followed.contains_key(&slot.0) {
                // Its events come from elsewhere now: learnt anew.
                self.state.clear(slot, true);
            }
            let followed = self.follow(slot, listed);
            self.followed.insert(slot.0, followed);
        }
        info!(
            ranks = self.followed.len(),
            added = changes.added.len(),
            removed = changes.removed.len(),
            "worker list taken over"
        );
        self.has_list = true;
        // Before anything that names a new slot.
        self.flush();
        self.roster_at = Some(Instant::now());
    }

    /// Follows the load streams of a new list, and no others any more.
    fn follow_loads(&mut self, streams: Vec<LoadStream>) {
        let mut before = core::mem::take(&mut self.load_tasks);
        for stream in streams {
            if self.load_tasks.len() >= LOAD_STREAMS_MAX {
                warn!("there are too many load streams; the last are left out");
                self.metrics.load_dropped("too_many_streams");
                break;
            }
            let task = before.remove(&stream).unwrap_or_else(|| {
                let work = follow_load(
                    stream.clone(),
                    Arc::clone(&self.transports.hub),
                    self.updates_in.clone(),
                    Arc::clone(&self.metrics),
                );
                LoadTask(tokio::spawn(work).abort_handle())
            });
            self.load_tasks.insert(stream, task);
        }
    }

    fn follow(&self, slot: WorkerSlot, listed: ListedRank) -> Followed {
        let mut followed = Followed {
            view: None,
            task: None,
            synced: false,
            applied: None,
            last_loss: None,
            listed,
        };
        if let Some(RankStream::Engine(stream)) = &followed.listed.stream {
            let view = new_view();
            let spec = StreamSpec {
                worker: followed.listed.spec.worker,
                slot,
                engine: stream.engine,
                events: stream.events.clone(),
                replay: stream.replay.clone(),
                strict_rank: stream.one_of_many,
            };
            let work =
                follow(spec, self.updates_in.clone(), Arc::clone(&view), Arc::clone(&self.metrics));
            followed.task = Some(tokio::spawn(work).abort_handle());
            followed.view = Some(view);
        }
        if let Some(RankStream::Plane(stream)) = &followed.listed.stream {
            let view = new_view();
            let worker = followed.listed.spec.worker;
            let work = follow_plane(
                PlaneSpec { worker, slot, stream: stream.clone() },
                self.transports.clone(),
                self.updates_in.clone(),
                Arc::clone(&view),
                Arc::clone(&self.metrics),
            );
            followed.task = Some(tokio::spawn(work).abort_handle());
            followed.view = Some(view);
        }
        followed
    }

    fn report(&self) -> Report {
        let ranks: Vec<RankReport> = self
            .state
            .tracked()
            .filter_map(|tracked| {
                let followed = self.followed.get(&tracked.slot.0)?;
                let has_events = tracked.spec.has_events;
                Some(RankReport {
                    slot: tracked.slot,
                    listed: followed.listed.clone(),
                    parity: if has_events { tracked.rank.parity() } else { Parity::Blind },
                    blocks: tracked.rank.blocks(),
                    pages: tracked.rank.pages(),
                    applied: followed.applied,
                    last_loss: followed.last_loss,
                    counts: *tracked.rank.counts(),
                    view: followed
                        .view
                        .as_ref()
                        .map(|view| *view.lock().unwrap_or_else(PoisonError::into_inner)),
                    load: self.loads.get(&tracked.spec.worker).copied().unwrap_or_default(),
                })
            })
            .collect();
        let unready = self.unready(&ranks);
        let of = |parity| ranks.iter().filter(|rank| rank.parity == parity).count() as u64;
        self.metrics.set_levels(
            ranks.iter().map(|rank| rank.blocks as u64).sum(),
            [
                ("exact", of(Parity::Exact)),
                ("unproven", of(Parity::Unproven)),
                ("blind", of(Parity::Blind)),
            ],
            unready.is_empty(),
        );
        Report {
            ranks,
            cards: self.cards.clone(),
            unready,
            list_error: self.list_error.clone(),
            updates_waiting: self.updates.len(),
        }
    }

    fn unready(&self, ranks: &[RankReport]) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.cards.is_none() {
            reasons.push("models_loading".to_owned());
        }
        if !self.has_list {
            reasons.push("no_worker_list".to_owned());
        } else if ranks.is_empty() {
            reasons.push("no_workers".to_owned());
        }
        if !self.is_open() {
            reasons.push("synchronising".to_owned());
        }
        for rank in ranks {
            if rank.view.is_some_and(|view| view.standing.repairing) {
                let worker = rank.listed.spec.worker;
                reasons.push(format!("gap: worker {} rank {}", worker.id.0, worker.rank.0));
            }
        }
        reasons
    }
}
