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

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};
use warmpath_core::card::Cards;
use warmpath_core::event::Medium;
use warmpath_core::frame::Kind;
use warmpath_core::ids::{SequenceHash, Worker, WorkerId, WorkerSlot};
use warmpath_core::limits::FRAME_BODY_BYTES_MAX;
use warmpath_core::roster::{Parity, TierSlots};
use warmpath_core::settings::{RouterSettings, Settings};
use xxhash_rust::xxh3::xxh3_64;

use crate::config::router::RouterConfig;
use crate::discovery::ListEvent;
use crate::discovery::record::EndpointPath;
use crate::fleet::{Fleet, ListedRank, Problem, RankLoad, SequenceStream};
use crate::limits::{FLUSH_AFTER, ROSTER_AFTER};
use crate::metrics::Metrics;
use crate::model::LoadedModel;
use crate::model::catalog::{Catalog, Progress};
use crate::model::loader::{Attempt, Loader};
use crate::publish::service::Shared;
use crate::replicas::tracker::{Directory, Rank};
use crate::replicas::{self, Known};
use crate::source::sequence::Loss;
use crate::source::start::{Following, Loads, Starter};
use crate::source::{SharedView, Transports, Update, View};
use crate::state::State;
use crate::state::counts::Counts;
use crate::state::rank::Held;
use crate::usage::Usages;

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
    /// Whether it was seen to be dead.
    pub is_fenced: bool,
    /// How well its blocks are known.
    pub parity: Parity,
    /// Stand for its lower tiers.
    pub tiers: TierSlots,
    /// Blocks held on the device.
    pub blocks: usize,
    /// Blocks held in the host's memory, on disks and in external storage.
    pub lower_blocks: [usize; 3],
    /// Blocks of lower tiers that wait for their parents.
    pub orphans: usize,
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
    /// The models, by number.
    pub cards: Arc<Cards>,
    /// The settings, of all models.
    pub settings: RouterSettings,
    /// The router's own, and where they come from.
    pub router: Arc<RouterConfig>,
    /// Models that are not ready, each with a word that says why.
    pub models_unready: Vec<(String, &'static str)>,
    /// What discovery could not use.
    pub problems: Vec<Problem>,
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
    flush_at: Option<Instant>,
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
            flush_at: None,
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
            let times = [self.flush_at, roster_at, gate_at, usage_at];
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
        if self.state.has_deltas() {
            let at = *self.flush_at.get_or_insert(now + FLUSH_AFTER);
            if at <= now {
                self.flush();
            }
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
        self.flush_at = None;
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

    fn take_fleet(&mut self, mut fleet: Fleet) {
        self.take_models(&mut fleet);
        self.state.set_adapters(fleet.adapters);
        self.problems = fleet.problems;
        let specs: Vec<_> = fleet.ranks.iter().map(|rank| rank.spec.clone()).collect();
        let changes = self.state.set_workers(&specs);
        for (worker, slot) in &changes.removed {
            self.followed.remove(&slot.0);
            self.usages.remove(worker, Instant::now());
        }
        for (worker, _) in &changes.added {
            self.usages.add(*worker);
        }
        self.load_streams.follow(fleet.load_streams, &self.starter);
        let (paths, streams) = (fleet.paths, fleet.sequence_streams);
        let mut slots: BTreeMap<Worker, WorkerSlot> = changes.added.iter().copied().collect();
        let known: BTreeMap<Worker, WorkerSlot> =
            self.state.tracked().map(|tracked| (tracked.spec.worker, tracked.slot)).collect();
        for listed in fleet.ranks {
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
                // Its events come from elsewhere now: learnt anew, and that
                // nobody listened at the old place says nothing any more.
                self.state.clear(slot, true);
                self.state.fence(slot, false);
            }
            let followed = self.follow(slot, listed);
            self.followed.insert(slot.0, followed);
        }
        self.tell_replicas(&paths, streams);
        info!(
            ranks = self.followed.len(),
            added = changes.added.len(),
            removed = changes.removed.len(),
            models = fleet.models.len(),
            problems = self.problems.len(),
            "fleet taken over"
        );
        self.has_list = true;
        // Before anything that names a new slot.
        self.flush();
        self.roster_at = Some(Instant::now());
    }

    /// Numbers the fleet's models, loads the new ones, and turns the ranks'
    /// indices into numbers. Ranks of models beyond the limit are left out.
    fn take_models(&mut self, fleet: &mut Fleet) {
        let assignment = self.catalog.take(&fleet.models);
        for number in &assignment.removed {
            if let Some(task) = self.loading.remove(number) {
                task.abort();
            }
        }
        for number in &assignment.to_load {
            if let Some(spec) = self.catalog.spec(*number) {
                let task = self.loader.start(*number, spec.clone());
                if let Some(before) = self.loading.insert(*number, task) {
                    before.abort();
                }
            }
        }
        if assignment.changes_cards {
            self.cards_have_changed();
        }
        let number_of = |model: u16| assignment.numbers.get(usize::from(model)).copied().flatten();
        for (model, _) in
            fleet.models.iter().zip(&assignment.numbers).filter(|(_, it)| it.is_none())
        {
            fleet.problems.push(Problem { of: model.name.clone(), reason: "too_many_models" });
        }
        self.own_settings.clear();
        for (model, card) in &fleet.settings {
            let Some(number) = number_of(*model) else { continue };
            if let Ok(settings) = self.router.of_card(card) {
                self.own_settings.insert(number, settings);
            } else {
                let name = self.catalog.spec(number).map(|spec| spec.name.clone());
                let of = name.unwrap_or_default();
                fleet.problems.push(Problem { of, reason: "router_config" });
            }
        }
        fleet.ranks.retain_mut(|rank| {
            let number = number_of(rank.spec.model);
            rank.spec.model = number.unwrap_or(rank.spec.model);
            rank.spec.namespace = rank.namespace.as_deref().map_or(0, namespace_number);
            number.is_some()
        });
        fleet.adapters.retain_mut(|adapter| {
            let number = number_of(adapter.model);
            adapter.model = number.unwrap_or(adapter.model);
            number.is_some()
        });
    }

    /// Says which slots stand for whom, and where others speak of requests.
    fn tell_replicas(
        &self,
        paths: &BTreeMap<WorkerId, EndpointPath>,
        streams: Vec<SequenceStream>,
    ) {
        let mut shared: BTreeMap<Option<&EndpointPath>, Arc<EndpointPath>> = BTreeMap::new();
        let ranks: Vec<(WorkerSlot, Rank)> = self
            .state
            .tracked()
            .map(|tracked| {
                let worker = tracked.spec.worker;
                let path = paths.get(&worker.id);
                let path = shared
                    .entry(path)
                    .or_insert_with(|| Arc::new(path.cloned().unwrap_or_else(replicas::own_path)));
                (tracked.slot, Rank { worker, path: Arc::clone(path) })
            })
            .collect();
        let known = Known { directory: Directory::new(ranks), streams };
        self.shared.exchange.known.send_replace(known);
    }

    fn follow(&self, slot: WorkerSlot, listed: ListedRank) -> Followed {
        let (task, view) = self.starter.rank(slot, &listed).unzip();
        Followed {
            listed,
            view,
            task,
            synced: false,
            was_connected: false,
            applied: None,
            last_loss: None,
        }
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
                    is_fenced: tracked.is_fenced,
                    listed: followed.listed.clone(),
                    parity: if has_events { tracked.rank.parity() } else { Parity::Blind },
                    tiers: tracked.tiers,
                    blocks: tracked.rank.blocks(Medium::Device),
                    lower_blocks: [Medium::HostPinned, Medium::Disk, Medium::External]
                        .map(|medium| tracked.rank.blocks(medium)),
                    orphans: tracked.rank.orphans(),
                    pages: tracked.rank.pages(),
                    applied: followed.applied,
                    last_loss: followed.last_loss,
                    counts: *tracked.rank.counts(),
                    view: followed
                        .view
                        .as_ref()
                        .map(|view| *view.lock().unwrap_or_else(PoisonError::into_inner)),
                    load: self.usages.of(&tracked.spec.worker),
                })
            })
            .collect();
        let unready = self.unready(&ranks);
        let of = |parity| ranks.iter().filter(|rank| rank.parity == parity).count() as u64;
        self.metrics.set_levels(
            ranks.iter().map(|rank| rank.blocks as u64).sum(),
            [0, 1, 2].map(|tier| {
                ranks.iter().filter_map(|rank| rank.lower_blocks.get(tier)).sum::<usize>() as u64
            }),
            [
                ("exact", of(Parity::Exact)),
                ("unproven", of(Parity::Unproven)),
                ("blind", of(Parity::Blind)),
            ],
            unready.is_empty(),
        );
        Report {
            ranks,
            cards: Arc::clone(&self.cards),
            settings: self.router.with(&self.own_settings),
            router: Arc::clone(&self.router),
            models_unready: self
                .catalog
                .unready()
                .map(|(name, reason)| (name.to_owned(), reason))
                .collect(),
            problems: self.problems.clone(),
            unready,
            list_error: self.list_error.clone(),
            updates_waiting: self.updates.len(),
        }
    }

    fn unready(&self, ranks: &[RankReport]) -> Vec<String> {
        let mut reasons = Vec::new();
        for (model, reason) in self.catalog.unready() {
            reasons.push(format!("model {model}: {reason}"));
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

/// A number for a namespace, not 0. Only whether two are the same counts.
fn namespace_number(namespace: &str) -> u32 {
    let hash = xxh3_64(namespace.as_bytes());
    u32::try_from(hash >> 32).unwrap_or(u32::MAX).max(1)
}
