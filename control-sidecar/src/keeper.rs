//! Keeper: the one task that owns the state.
//!
//! Takes the sources' updates, new fleets and loaded models, writes deltas,
//! rosters and cards into the log, and answers what streams and the status page
//! ask.
//!
//! # Terms
//!
//! - *open*: the index is whole, as far as it can be: every source has finished
//!   its first replay, or the deadline has passed. Before that no filter is told
//!   to take the index over, so a restart of the sidecar costs no hits.
//! - *settled*: every model of the fleet has been loaded, or tried. Before that,
//!   or the deadline, neither cards nor rosters are written: filters keep what an
//!   earlier life of the sidecar has told them.

mod report;
mod takeover;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};
use warmpath_core::card::Cards;
use warmpath_core::frame::Kind;
use warmpath_core::ids::{SequenceHash, WorkerSlot};
use warmpath_core::limits::FRAME_BODY_BYTES_MAX;
use warmpath_core::settings::{RouterSettings, Settings};

use crate::config::router::RouterConfig;
use crate::discovery::ListEvent;
use crate::fleet::{ListedRank, Problem};
use crate::limits::{FLUSH_EVERY, ROSTER_AFTER};
use crate::metrics::Metrics;
use crate::model::LoadedModel;
use crate::model::catalog::{Catalog, Progress};
use crate::model::loader::{Attempt, Loader};
use crate::publish::pace::Pace;
use crate::publish::service::Shared;
use crate::source::sequence::Loss;
use crate::source::start::{Following, Loads, Starter};
use crate::source::{SharedView, Transports, Update};
use crate::state::State;
use crate::state::counts::Counts;
use crate::state::rank::Held;
use crate::usage::Usages;

pub use report::{RankReport, Report};

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

/// Where the keeper hears from.
#[derive(Debug)]
pub struct Inputs {
    /// New fleets.
    pub lists: mpsc::Receiver<ListEvent>,
    /// Attempts to load models.
    pub attempts: mpsc::Receiver<Attempt>,
    /// What is asked.
    pub questions: mpsc::Receiver<Question>,
}

/// A rank's stream and what has come of it.
#[derive(Debug)]
struct Followed {
    listed: ListedRank,
    view: Option<SharedView>,
    task: Option<Following>,
    synced: bool,
    was_connected: bool,
    applied: Option<u64>,
    last_loss: Option<Loss>,
}

/// Owns the state.
#[derive(Debug)]
pub struct Keeper {
    state: State,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    starter: Starter,
    updates: mpsc::Receiver<Update>,
    followed: BTreeMap<u16, Followed>,
    loader: Loader,
    catalog: Catalog,
    /// Loading tasks, by the model's number.
    loading: BTreeMap<u16, AbortHandle>,
    cards: Arc<Cards>,
    cards_changed: bool,
    router: Arc<RouterConfig>,
    /// Settings that workers bring, by their model's number.
    own_settings: BTreeMap<u16, Settings>,
    /// What filters were told last.
    settings_told: Option<RouterSettings>,
    problems: Vec<Problem>,
    /// What each listed rank has said of its load.
    usages: Usages,
    load_streams: Loads,
    has_list: bool,
    has_published: bool,
    list_error: Option<String>,
    counted: Counts,
    deadline: Instant,
    pace: Pace,
    roster_at: Option<Instant>,
}

impl Keeper {
    /// Knows nothing yet.
    ///
    /// - `transports`: what streams of several ranks share.
    /// - `sync_deadline`: how long the first synchronisation may take.
    #[must_use]
    pub fn new(
        shared: Arc<Shared>,
        transports: Transports,
        loader: Loader,
        sync_deadline: Duration,
        updates_max: usize,
    ) -> Self {
        let (updates_in, updates) = mpsc::channel(updates_max);
        let metrics = Arc::clone(&shared.metrics);
        let starter = Starter { transports, updates: updates_in, metrics };
        Self {
            state: State::new(),
            metrics: Arc::clone(&shared.metrics),
            shared,
            starter,
            updates,
            followed: BTreeMap::new(),
            loader,
            catalog: Catalog::default(),
            loading: BTreeMap::new(),
            cards: Arc::default(),
            cards_changed: false,
            router: Arc::default(),
            own_settings: BTreeMap::new(),
            settings_told: None,
            problems: Vec::new(),
            usages: Usages::default(),
            load_streams: Loads::default(),
            has_list: false,
            has_published: false,
            list_error: None,
            counted: Counts::default(),
            deadline: Instant::now() + sync_deadline,
            pace: Pace::new(FLUSH_EVERY),
            roster_at: None,
        }
    }

    /// With settings other than the default.
    #[must_use]
    pub fn with_router(self, router: RouterConfig) -> Self {
        Self { router: Arc::new(router), ..self }
    }

    /// Where updates go in; for sources, and for tests in their place.
    #[must_use]
    pub fn updates(&self) -> mpsc::Sender<Update> {
        self.starter.updates.clone()
    }

    /// Works until the stop.
    pub async fn run(mut self, mut inputs: Inputs) {
        let stop = self.shared.stop.clone();
        loop {
            // Roster and gate wait for the fleet, however late it is: a time that
            // has passed would be waited for in a loop without rest.
            let roster_at = self.roster_at.filter(|_| self.may_publish(Instant::now()));
            let gate_at = (!self.is_open() && self.has_list).then_some(self.deadline);
            let usage_at = self.usages.due_at().filter(|_| self.has_published);
            let times = [self.pace.due_at(), roster_at, gate_at, usage_at];
            let next = times.into_iter().flatten().min();
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
                attempt = inputs.attempts.recv() => {
                    if let Some(attempt) = attempt {
                        self.loaded(attempt);
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
        if self.state.has_deltas() && self.pace.is_due(now) {
            self.flush();
        }
        if self.state.take_roster_changed() {
            self.roster_at.get_or_insert(now + ROSTER_AFTER);
        }
        if self.roster_at.is_some_and(|at| at <= now) && self.may_publish(now) {
            self.publish_roster();
        }
        if self.has_published && self.usages.due_at().is_some_and(|at| at <= now) {
            self.publish_usage(now);
        }
        self.try_open(now);
    }

    /// Whether cards and rosters may be written.
    fn may_publish(&self, now: Instant) -> bool {
        self.has_list && (self.has_published || self.catalog.is_settled() || now >= self.deadline)
    }

    /// Lets filters take the index over as soon as it is whole.
    fn try_open(&mut self, now: Instant) {
        if self.is_open() || !self.may_publish(now) {
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
        self.pace.written(Instant::now());
        let counts = self.state.counts();
        self.metrics.counted(&self.counted, &counts);
        self.counted = counts;
    }

    /// Writes the roster, behind the cards that it refers to and the settings by
    /// which its workers are chosen.
    fn publish_roster(&mut self) {
        self.roster_at = None;
        self.has_published = true;
        if core::mem::take(&mut self.cards_changed) {
            self.append(Kind::Card, &self.cards.encode());
        }
        let settings = self.router.with(&self.own_settings);
        if self.settings_told.as_ref() != Some(&settings) {
            self.append(Kind::Settings, &settings.encode());
            self.settings_told = Some(settings);
        }
        self.state.take_roster_changed();
        let (roster, left_out) = self.state.roster();
        self.metrics.set_left_out(left_out);
        self.append(Kind::Roster, &roster.encode());
    }

    /// Tells how full caches are, if there is something to tell. Before a roster
    /// is written nobody knows whose slots are meant.
    fn publish_usage(&mut self, now: Instant) {
        if let Some(body) = self.usages.look(self.state.tracked(), now) {
            self.shared.usage.put(body);
        }
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
            Kind::Settings => "settings",
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
                if !self.usages.take(&worker, &load, Instant::now()) {
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
            Update::Connected(slot) => {
                if let Some(followed) = self.followed.get_mut(&slot.0) {
                    followed.was_connected = true;
                    self.state.fence(slot, false);
                }
            }
            Update::Refused(slot) => {
                // One that was never reached may be listed with the wrong port;
                // one that was is dead.
                if self.followed.get(&slot.0).is_some_and(|it| it.was_connected) {
                    self.state.fence(slot, true);
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

    /// Takes in what came of loading a model.
    fn loaded(&mut self, attempt: Attempt) {
        let Attempt { number, spec, outcome } = attempt;
        let changed = match outcome {
            Ok(LoadedModel { card, tokenizer }) => {
                let blob = card.tokenizer.ok().zip(tokenizer);
                let card = Box::new(card);
                let changed = self.catalog.progress(number, &spec, Progress::Ready(card));
                if changed && let Some((id, bytes)) = blob {
                    self.shared.blobs.add(id, bytes);
                }
                changed
            }
            Err(error) => {
                self.metrics.model_not_loaded(error.reason());
                self.catalog.progress(number, &spec, Progress::Failed(error.reason()))
            }
        };
        if changed {
            self.cards_have_changed();
        }
    }

    fn cards_have_changed(&mut self) {
        let cards = Arc::new(self.catalog.cards());
        self.shared.blobs.retain(|id| cards.models.iter().any(|card| card.tokenizer == Ok(id)));
        self.cards = cards;
        self.cards_changed = true;
        self.roster_at.get_or_insert(Instant::now());
    }

    fn list(&mut self, event: ListEvent) {
        match event {
            ListEvent::Taken(list) => {
                self.list_error = None;
                self.metrics.workers_list_taken();
                self.take_fleet(list);
            }
            ListEvent::Refused(message) => {
                warn!(error = %message, "the worker list is refused; the old one stays");
                self.metrics.workers_list_refused();
                self.list_error = Some(message);
            }
        }
    }
}
