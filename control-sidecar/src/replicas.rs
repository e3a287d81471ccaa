//! Replicas: several routers of the same workers agree on what is booked.
//!
//! ```text
//! gateway ──uplink──► tracker ──► publisher ──► other routers
//! filters ◄──remote──    ▲  ◄──subscriptions── other routers, workers
//! ```
//!
//! In Dynamo's own format, so that its frontends take part. What that lacks, an
//! account of all that is booked, sidecars give each other on a topic of their
//! own: to newcomers at once, to all now and then.
//!
//! # Terms
//!
//! - *router*: whoever places requests on workers: a Dynamo frontend, or the
//!   gateways of a sidecar.
//! - *path*: the endpoint that workers serve; their requests are spoken of there.

mod account;
pub mod announce;
mod follow;
pub mod publisher;
pub mod remote;
pub mod tracker;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tracing::{info, warn};
use warmpath_core::bookings::Bookings;

use crate::adapter::plane::envelope::Topic;
use crate::adapter::plane::sequences::{Account, SequenceEvent};
use crate::config::discovery::{Backend, EventPlane};
use crate::config::replicas::ReplicasConfig;
use crate::discovery::join::subject;
use crate::discovery::record::EndpointPath;
use crate::fleet::{Channel, PlanePublisher, SequenceStream};
use crate::limits::{
    ACCOUNT_AFTER, ACCOUNT_EVERY, BOOKINGS_LOOK_EVERY, GATEWAY_GRACE, PEERS_LOOK_EVERY, PEERS_MAX,
    SEQUENCES_BATCH, SEQUENCES_HEARD_QUEUED, SEQUENCES_QUEUED_MAX,
};
use crate::metrics::Metrics;
use crate::publish::service::Shared;
use crate::source::plane::hub::{Hub, Task};
use account::{accounts, say_events};
use announce::{Announcement, SharedProblem};
use follow::{Said, follow};
use publisher::Publisher;
use remote::{FromGateway, RemoteFeed};
use tracker::{Directory, Levels, Out, Source, Tracker};

/// What the keeper knows and this part needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Which slots stand for whom.
    pub directory: Directory,
    /// Where others speak of requests.
    pub streams: Vec<SequenceStream>,
}

/// How things stand, for the state page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Whether bookings are exchanged.
    pub syncs: bool,
    /// Our name among routers.
    pub router: u64,
    /// How many bookings there are.
    pub levels: Levels,
    /// Bookings of our gateways, by slot.
    pub own_by_slot: BTreeMap<u16, u64>,
    /// Our publishers: of which path, under which id, at which address.
    pub publishers: Vec<(String, u64, Option<String>)>,
    /// Streams of others that are listened to.
    pub streams: usize,
    /// What keeps others from finding us.
    pub problem: Option<String>,
}

/// What this part and the others share.
#[derive(Debug)]
pub struct Exchange {
    /// What other routers have booked, and the way back up.
    pub remote: RemoteFeed,
    /// What the keeper knows.
    pub known: watch::Sender<Known>,
    report: Mutex<Report>,
}

impl Default for Exchange {
    fn default() -> Self {
        Self {
            remote: RemoteFeed::default(),
            known: watch::Sender::new(Known::default()),
            report: Mutex::default(),
        }
    }
}

impl Exchange {
    /// How things stand.
    #[must_use]
    pub fn report(&self) -> Report {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The path of workers that are not Dynamo's.
#[must_use]
pub fn own_path() -> EndpointPath {
    EndpointPath {
        namespace: "warmpath".to_owned(),
        component: "workers".to_owned(),
        endpoint: "generate".to_owned(),
    }
}

/// The part that keeps routers in agreement.
pub struct Replicas {
    config: ReplicasConfig,
    plane: EventPlane,
    /// Where records of publishers are; `None` if nowhere.
    records: bool,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    hub: Arc<Hub>,
    tracker: Tracker,
    report: Report,
    publishers: HashMap<Arc<EndpointPath>, Publisher>,
    /// For other sidecars that the configuration names: all paths together.
    to_peers: Option<Publisher>,
    announcements: watch::Sender<Vec<Announcement>>,
    problem: SharedProblem,
    subscriptions: HashMap<SequenceStream, Task>,
    peers: BTreeSet<SocketAddr>,
    /// Publishers of requests' steps that are on record.
    on_record: BTreeSet<u64>,
    known: Known,
    said_in: mpsc::Sender<Said>,
    said: mpsc::Receiver<Said>,
    /// Steps to be said, in order.
    pending: VecDeque<(Arc<EndpointPath>, SequenceEvent)>,
    flush_at: Option<Instant>,
    arrived: Arc<Notify>,
    account_at: Instant,
}

impl Replicas {
    /// Starts nothing yet. `None` if there is no randomness for our name among
    /// routers.
    ///
    /// - `backend`: where Dynamo's records are, if workers are found by them.
    #[must_use]
    pub fn new(
        config: ReplicasConfig,
        plane: EventPlane,
        backend: Option<&Backend>,
        shared: Arc<Shared>,
        hub: Arc<Hub>,
    ) -> Option<(Self, watch::Receiver<Vec<Announcement>>)> {
        let router = random_id()?;
        let (said_in, said) = mpsc::channel(SEQUENCES_HEARD_QUEUED);
        let (announcements, records) = watch::channel(Vec::new());
        shared.exchange.remote.want(config.sync);
        let replicas = Self {
            tracker: Tracker::new(router, shared.log.epoch()),
            report: Report { syncs: config.sync, router, ..Report::default() },
            records: matches!(backend, Some(Backend::File(_) | Backend::Etcd { .. })),
            metrics: Arc::clone(&shared.metrics),
            config,
            plane,
            shared,
            hub,
            publishers: HashMap::new(),
            to_peers: None,
            announcements,
            problem: SharedProblem::default(),
            subscriptions: HashMap::new(),
            peers: BTreeSet::new(),
            on_record: BTreeSet::new(),
            known: Known::default(),
            said_in,
            said,
            pending: VecDeque::new(),
            flush_at: None,
            arrived: Arc::default(),
            account_at: Instant::now() + ACCOUNT_EVERY,
        };
        Some((replicas, records))
    }

    /// What keeps our records from being there.
    #[must_use]
    pub fn problem(&self) -> SharedProblem {
        Arc::clone(&self.problem)
    }

    /// Works until the stop.
    pub async fn run(mut self) {
        let stop = self.shared.stop.clone();
        let Some(mut up) = self.shared.exchange.remote.listen() else { return };
        let mut known = self.shared.exchange.known.subscribe();
        let mut look = interval(BOOKINGS_LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut look_up = interval(PEERS_LOOK_EVERY);
        look_up.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let arrived = Arc::clone(&self.arrived);
        self.listen_to_peers().await;
        loop {
            let mut out = Out::default();
            let (flush_at, account_at) = (self.flush_at, self.account_at);
            tokio::select! {
                () = stop.cancelled() => return,
                Some(said) = up.recv() => self.hear_gateway(&said, &mut out),
                Some(said) = self.said.recv() => self.hear_plane(said, &mut out),
                Ok(()) = known.changed() => {
                    let now = known.borrow_and_update().clone();
                    self.take_known(now, &mut out).await;
                }
                () = sleep_until(flush_at.unwrap_or_else(Instant::now)), if flush_at.is_some() => {
                    self.flush();
                }
                () = sleep_until(account_at) => self.give_account(),
                () = arrived.notified() => self.account_soon(),
                _ = look.tick() => self.look(&mut out),
                _ = look_up.tick(), if !self.config.peers.is_empty() => self.look_up_peers().await,
            }
            self.take(out);
        }
    }

    fn hear_gateway(&mut self, said: &FromGateway, out: &mut Out) {
        let now_ms = self.shared.exchange.remote.now_ms();
        match said {
            FromGateway::Attached(gateway) => self.tracker.attached(*gateway),
            FromGateway::Detached(gateway) => self.tracker.detached(*gateway, now_ms),
            FromGateway::Said(gateway, body) => match Bookings::decode(body) {
                Ok(bookings) => self.tracker.heard(*gateway, &bookings, now_ms, out),
                Err(_) => out.dropped.push("bad_frame"),
            },
        }
    }

    fn hear_plane(&mut self, said: Said, out: &mut Out) {
        let now_ms = self.shared.exchange.remote.now_ms();
        match said {
            Said::Events(publisher, events) => {
                for event in events {
                    self.metrics.sequence_event(event.step.name());
                    self.tracker.received(event, publisher, self.config.sync, now_ms, out);
                }
            }
            Said::Account(_, router, Account::Hello) => {
                if router != self.report.router {
                    self.account_soon();
                }
            }
            Said::Account(publisher, router, Account::List { begins, ends, events }) => {
                let source = Source { router, publisher };
                self.tracker.listed(source, (begins, ends), events, now_ms, out);
            }
            Said::Listening => self.say_all(&Account::Hello),
            Said::Gone(publishers) => {
                publishers.iter().for_each(|publisher| self.tracker.gone(*publisher, out));
            }
        }
    }

    /// Does with what came of something what is to be done.
    fn take(&mut self, out: Out) {
        self.shared.exchange.remote.apply(&out.entries);
        out.dropped.iter().for_each(|reason| self.metrics.replica_dropped(reason));
        if !self.config.sync {
            return;
        }
        for event in out.events {
            if self.pending.len() >= SEQUENCES_QUEUED_MAX {
                self.metrics.replica_dropped("too_many_events");
            } else {
                self.pending.push_back(event);
            }
        }
        if self.pending.len() >= SEQUENCES_BATCH.0 {
            self.flush();
        } else if !self.pending.is_empty() {
            self.flush_at.get_or_insert(Instant::now() + SEQUENCES_BATCH.1);
        }
    }

    /// Says what waits to be said.
    fn flush(&mut self) {
        self.flush_at = None;
        let at_ms = time_of_day_ms();
        let mut by_path: HashMap<Arc<EndpointPath>, Vec<SequenceEvent>> = HashMap::new();
        for (path, event) in self.pending.drain(..) {
            self.metrics.replica_event(event.step.name());
            by_path.entry(path).or_default().push(event);
        }
        for (path, events) in by_path {
            let own = self.publishers.get_mut(&path);
            for publisher in own.into_iter().chain(&mut self.to_peers) {
                say_events(publisher, &events, at_ms);
            }
        }
    }

    fn account_soon(&mut self) {
        self.account_at = self.account_at.min(Instant::now() + ACCOUNT_AFTER);
    }

    /// Says all that our gateways have booked.
    fn give_account(&mut self) {
        self.account_at = Instant::now() + ACCOUNT_EVERY;
        if !self.config.sync {
            return;
        }
        // What it shows has been said.
        self.flush();
        let (router, at_ms) = (self.report.router, time_of_day_ms());
        let paths = self.known.directory.paths();
        for path in &paths {
            if let Some(publisher) = self.publishers.get_mut(path) {
                let accounts = accounts(self.tracker.account(path));
                for account in &accounts {
                    publisher.publish(Topic::Accounts, account.encode(router), at_ms);
                }
            }
        }
        if let Some(publisher) = &mut self.to_peers {
            let all = paths.iter().flat_map(|path| self.tracker.account(path)).collect();
            for account in &accounts(all) {
                publisher.publish(Topic::Accounts, account.encode(router), at_ms);
            }
        }
    }

    fn say_all(&mut self, account: &Account) {
        let (router, at_ms) = (self.report.router, time_of_day_ms());
        for publisher in self.publishers.values_mut().chain(&mut self.to_peers) {
            publisher.publish(Topic::Accounts, account.encode(router), at_ms);
        }
    }

    /// Looks for what is over, and says how things stand.
    fn look(&mut self, out: &mut Out) {
        let now_ms = self.shared.exchange.remote.now_ms();
        let grace_ms = u64::try_from(GATEWAY_GRACE.as_millis()).unwrap_or(u64::MAX);
        self.tracker.expire(now_ms, self.config.expiry_ms, grace_ms, out);
        let levels = self.tracker.levels();
        self.metrics.set_bookings(levels.own as u64, levels.remote as u64);
        let publishers = self.publishers.iter().map(|(path, publisher)| {
            let EndpointPath { namespace, component, endpoint } = &**path;
            (format!("{namespace}/{component}/{endpoint}"), publisher)
        });
        let publishers = publishers.chain(self.to_peers.iter().map(|it| ("peers".to_owned(), it)));
        self.report.levels = levels;
        self.report.own_by_slot = self.tracker.own_by_slot();
        self.report.publishers = publishers
            .map(|(of, it)| (of, it.id(), it.address().map(|address| address.to_string())))
            .collect();
        self.report.streams = self.subscriptions.len();
        self.report.problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut report = self.shared.exchange.report.lock().unwrap_or_else(PoisonError::into_inner);
        report.clone_from(&self.report);
    }

    async fn take_known(&mut self, known: Known, out: &mut Out) {
        self.tracker.set_directory(known.directory.clone(), out);
        self.known = known;
        if self.config.sync {
            self.open_publishers().await;
        }
        self.subscribe(out);
    }

    /// One publisher for each path that there are workers of.
    async fn open_publishers(&mut self) {
        let paths = self.known.directory.paths();
        let before = self.publishers.len();
        self.publishers.retain(|path, _| paths.contains(path));
        let mut changed = self.publishers.len() != before;
        for path in paths {
            if self.publishers.contains_key(&path) {
                continue;
            }
            if let Some(publisher) = self.open(&path).await {
                self.publishers.insert(path, publisher);
                changed = true;
            }
        }
        if changed {
            self.announce();
        }
    }

    async fn open(&mut self, path: &EndpointPath) -> Option<Publisher> {
        let id = random_id()?;
        let metrics = Arc::clone(&self.metrics);
        let subjects = [Topic::ActiveSequences, Topic::Accounts]
            .map(|topic| (topic, subject(path, topic.name())))
            .into();
        match &self.plane {
            EventPlane::Zmq if self.records => {
                let listen = SocketAddr::new(self.config.host, 0);
                let arrived = Arc::clone(&self.arrived);
                match Publisher::bind(id, listen, arrived, metrics).await {
                    Ok(publisher) => Some(publisher),
                    Err(error) => {
                        warn!(%listen, %error, "bookings cannot be published");
                        self.trouble(format!("{listen}: {error}"));
                        None
                    }
                }
            }
            EventPlane::Zmq => {
                if self.config.listen.is_none() {
                    self.trouble(
                        "other gateways cannot find this one: give replicas.listen and replicas.peers"
                            .to_owned(),
                    );
                }
                None
            }
            EventPlane::Broker(_) if self.config.brokers.is_empty() => {
                self.trouble("no broker to publish at: DYN_ZMQ_BROKER_URL has no xsub".to_owned());
                None
            }
            EventPlane::Broker(_) => {
                Some(Publisher::brokers(id, &self.config.brokers, subjects, metrics))
            }
            EventPlane::Nats(_) => {
                Some(Publisher::nats(id, Arc::clone(&self.hub), subjects, metrics))
            }
        }
    }

    fn trouble(&self, text: String) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
    }

    fn announce(&self) {
        let mut records = Vec::new();
        for (path, publisher) in &self.publishers {
            let heard = match (&self.plane, publisher.address()) {
                (_, Some(address)) => announce::Heard::Socket(address.to_string()),
                (EventPlane::Nats(_), None) => announce::Heard::Nats,
                _ => continue,
            };
            for topic in [Topic::ActiveSequences, Topic::Accounts] {
                records.push(Announcement::new(path, topic, publisher.id(), &heard));
            }
        }
        self.announcements.send_replace(records);
    }

    /// Listens to everybody but ourselves.
    fn subscribe(&mut self, out: &mut Out) {
        let on_record: BTreeSet<u64> = self
            .known
            .streams
            .iter()
            .filter(|it| it.topic == Topic::ActiveSequences)
            .filter_map(|it| it.source.publisher)
            .collect();
        // A router whose record has gone is gone.
        for publisher in self.on_record.difference(&on_record) {
            self.tracker.gone(*publisher, out);
        }
        self.on_record = on_record;
        let mut before = core::mem::take(&mut self.subscriptions);
        for stream in self.wanted_streams() {
            let task = before.remove(&stream).unwrap_or_else(|| {
                let (hub, metrics) = (Arc::clone(&self.hub), Arc::clone(&self.metrics));
                let work = follow(stream.clone(), hub, self.said_in.clone(), metrics);
                Task(tokio::spawn(work).abort_handle())
            });
            self.subscriptions.insert(stream, task);
        }
    }

    fn wanted_streams(&self) -> Vec<SequenceStream> {
        let topics: &[Topic] = if self.config.sync {
            &[Topic::ActiveSequences, Topic::Accounts]
        } else {
            &[Topic::ActiveSequences]
        };
        let on = |channel: Channel| {
            let source = PlanePublisher { publisher: None, channel };
            topics.iter().map(move |topic| SequenceStream { topic: *topic, source: source.clone() })
        };
        let peers = self.peers.iter().flat_map(|it| on(Channel::Direct(it.to_string())));
        if let EventPlane::Nats(_) = self.plane {
            // All that is said of an endpoint comes on one subject, whoever says
            // it, on record or not.
            let paths = self.known.directory.paths();
            let subjects = paths.iter().flat_map(|path| {
                topics.iter().map(|topic| {
                    let channel = Channel::Subject(subject(path, topic.name()));
                    let source = PlanePublisher { publisher: None, channel };
                    SequenceStream { topic: *topic, source }
                })
            });
            return subjects.chain(peers).collect();
        }
        let own: BTreeSet<u64> = self.publishers.values().map(Publisher::id).collect();
        let is_own = |it: &SequenceStream| it.source.publisher.is_some_and(|id| own.contains(&id));
        let listed = self.known.streams.iter();
        let listed = listed.filter(|it| topics.contains(&it.topic) && !is_own(it)).cloned();
        listed.chain(peers).collect()
    }

    async fn listen_to_peers(&mut self) {
        let Some(listen) = self.config.listen.filter(|_| self.config.sync) else { return };
        let Some(id) = random_id() else { return };
        let (arrived, metrics) = (Arc::clone(&self.arrived), Arc::clone(&self.metrics));
        match Publisher::bind(id, listen, arrived, metrics).await {
            Ok(publisher) => {
                info!(%listen, "other sidecars are told what is booked");
                self.to_peers = Some(publisher);
            }
            Err(error) => {
                warn!(%listen, %error, "other sidecars cannot be told what is booked");
                self.trouble(format!("{listen}: {error}"));
            }
        }
    }

    /// Looks up where the sidecars are that the configuration names. A name that
    /// is not found leaves what was known.
    async fn look_up_peers(&mut self) {
        if !self.config.sync {
            return;
        }
        let mut found = BTreeSet::new();
        for peer in &self.config.peers {
            match tokio::net::lookup_host(peer).await {
                Ok(addresses) => found.extend(addresses),
                Err(_) => return self.metrics.replica_dropped("peer_not_found"),
            }
        }
        // Our own events are known by our name.
        let found: BTreeSet<SocketAddr> = found.into_iter().take(PEERS_MAX).collect();
        if found != self.peers {
            self.peers = found;
            let mut out = Out::default();
            self.subscribe(&mut out);
            self.take(out);
        }
    }
}

fn time_of_day_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A random number of 53 bits, as Dynamo's publishers are named; not 0.
fn random_id() -> Option<u64> {
    getrandom::u64().ok().map(|random| (random & 0x1f_ffff_ffff_ffff).max(1))
}

/// The address that a sidecar's own sockets have unless something says so.
pub(crate) const HOST_DEFAULT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
