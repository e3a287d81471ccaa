//! Pods: engines without Dynamo, found by their pods' labels.
//!
//! Readiness says who is there; what each serves, and where it publishes, the
//! engines are asked themselves, again and again, because adapters come and go.
//! A pod is listed once its engine has answered. An engine that no longer
//! answers keeps what it said: whether it is there, readiness decides.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::Api;
use tokio::sync::mpsc;
use tokio::time::{Interval, MissedTickBehavior, interval};
use warmpath_core::hash::BlockShape;
use warmpath_core::ids::{DpRank, Worker, WorkerId};
use warmpath_core::limits::ROSTER_WORKERS_MAX;
use warmpath_core::roster::Role;

use super::cluster::PodFacts;
use super::drive::Sight;
use super::kubernetes::connect;
use super::listing::Problems;
use super::probe::{ProbeError, RankSockets, Served, Sockets};
use super::spec;
use super::watching::{Table, Told, Watching};
use crate::adapter::Engine;
use crate::config::ModelConfig;
use crate::config::discovery::PodsConfig;
use crate::config::workers::id_of_name;
use crate::fleet::{
    AdapterSpec, EngineStream, Fleet, ListedRank, LoadKind, LoadStream, RankStream,
};
use crate::limits::{FLEET_ADAPTERS_MAX, KUBERNETES_CHANGES_QUEUED_MAX, PROBE_EVERY, PROBES_MAX};
use crate::state::RankSpec;

mod ask;

use ask::Asker;

/// What an engine said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// Its sockets; empty if it does not tell.
    pub sockets: Sockets,
    /// Its model and adapters.
    pub served: Vec<Served>,
}

/// One life of a pod's engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Life {
    /// The pod's uid.
    pub uid: String,
    /// Restarts of its containers.
    pub restarts: u64,
}

impl Life {
    fn of(pod: &PodFacts) -> Self {
        Self { uid: pod.uid.clone(), restarts: pod.restarts }
    }
}

/// What is known of one pod's engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Which life of it answered.
    pub life: Life,
    /// The last answers; `None` if there never were any.
    pub answers: Option<Answers>,
    /// Why the last question was not answered.
    pub failed: Option<ProbeError>,
}

/// Tells of the pods and of their changes until nobody listens.
///
/// - `models`: the models that the engines may serve.
pub async fn watch(config: PodsConfig, models: Vec<ModelConfig>, sights: mpsc::Sender<Sight>) {
    if let Some(client) = connect(&sights).await {
        watch_with(client, config, models, sights).await;
    }
}

/// As [`watch`], with a client.
pub async fn watch_with(
    client: Client,
    config: PodsConfig,
    models: Vec<ModelConfig>,
    sights: mpsc::Sender<Sight>,
) {
    let namespace =
        config.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    let pods = Watching {
        api: Api::<Pod>::namespaced(client, &namespace),
        selector: config.selector.clone(),
        keep: PodFacts::of,
    };
    let asker = match Asker::new(config.engine) {
        Ok(asker) => asker,
        Err(message) => {
            // Nothing can be asked, ever; say so for as long as anybody listens.
            let _ = sights.send(Sight::Failed(message)).await;
            return sights.closed().await;
        }
    };
    let (out, queue) = mpsc::channel(KUBERNETES_CHANGES_QUEUED_MAX);
    let mut ticks = interval(PROBE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let round = Round { config, models, asker, table: Table::default(), known: BTreeMap::new() };
    tokio::select! {
        () = pods.run(out) => {}
        () = round.run(queue, ticks, &sights) => {}
    }
}

/// Pods, and what their engines said.
struct Round {
    config: PodsConfig,
    models: Vec<ModelConfig>,
    asker: Asker,
    table: Table<PodFacts>,
    known: BTreeMap<String, Known>,
}

impl Round {
    async fn run(
        mut self,
        mut queue: mpsc::Receiver<Told<PodFacts>>,
        mut ticks: Interval,
        sights: &mpsc::Sender<Sight>,
    ) {
        let mut waiting: VecDeque<String> = VecDeque::new();
        let mut asking = FuturesUnordered::new();
        let mut changed = false;
        loop {
            tokio::select! {
                // Only when there is room: a burst of changes is one sight.
                room = sights.reserve(), if changed => {
                    let Ok(room) = room else { return };
                    if let Some(sight) = self.sight() {
                        room.send(sight);
                    }
                    changed = false;
                    continue;
                }
                told = queue.recv() => match told {
                    None => return,
                    Some(told) => {
                        self.table.take(told);
                        self.forget();
                        self.enqueue(&mut waiting, false);
                    }
                },
                _ = ticks.tick() => self.enqueue(&mut waiting, true),
                Some((name, life, answers)) = asking.next() => self.learn(name, life, answers),
            }
            while asking.len() < PROBES_MAX
                && let Some(name) = waiting.pop_front()
            {
                let Some(pod) = self.table.rows.get(&name).filter(|pod| pod.ready) else {
                    continue;
                };
                let Some(address) = address(pod, &self.config) else { continue };
                let (life, asker) = (Life::of(pod), self.asker.clone());
                asking.push(async move { (name, life, asker.ask(address).await) });
            }
            changed = true;
        }
    }

    /// Forgets engines whose pods went or are others now.
    fn forget(&mut self) {
        let rows = &self.table.rows;
        self.known
            .retain(|name, known| rows.get(name).is_some_and(|pod| Life::of(pod) == known.life));
    }

    /// Puts ready pods into the queue, each once.
    ///
    /// - `all`: those that have answered too.
    fn enqueue(&self, waiting: &mut VecDeque<String>, all: bool) {
        for (name, _) in self.table.rows.iter().filter(|(_, pod)| pod.ready) {
            let wanted = all || !self.known.contains_key(name);
            if wanted && !waiting.contains(name) {
                waiting.push_back(name.clone());
            }
        }
    }

    fn learn(&mut self, name: String, life: Life, answers: Result<Answers, ProbeError>) {
        let current = self.table.rows.get(&name).is_some_and(|pod| Life::of(pod) == life);
        if !current {
            return;
        }
        let known = self.known.entry(name).or_insert(Known { life, answers: None, failed: None });
        match answers {
            Ok(answers) => (known.answers, known.failed) = (Some(answers), None),
            Err(error) => known.failed = Some(error),
        }
    }

    fn sight(&self) -> Option<Sight> {
        if let Some(error) = &self.table.failed {
            return Some(Sight::Failed(format!("kubernetes: pods: {error}")));
        }
        if !self.table.whole {
            return None;
        }
        let mut fleet = fleet(&self.table.rows, &self.known, &self.config, &self.models);
        if self.table.too_many {
            let of = "kubernetes".to_owned();
            fleet.problems.push(crate::fleet::Problem { of, reason: "too_many_objects" });
        }
        Some(Sight::Fleet(Box::new(fleet)))
    }
}

/// Where a pod's engine takes requests.
fn address(pod: &PodFacts, config: &PodsConfig) -> Option<SocketAddr> {
    Some(SocketAddr::new(pod.ip?, pod.http_port.unwrap_or(config.port)))
}

/// What a pod's label says that it does; nothing said is all of it.
fn role(pod: &PodFacts) -> Result<Role, &'static str> {
    match pod.role.as_deref() {
        None | Some("both" | "prefill-decode" | "encode-prefill-decode") => Ok(Role::Aggregated),
        Some("prefill" | "encode-prefill") => Ok(Role::Prefill),
        Some("decode") => Ok(Role::Decode),
        Some("encode") => Err("encode_worker"),
        Some(_) => Err("unknown_worker_type"),
    }
}

/// The fleet of pods and of what their engines said. Pure.
#[must_use]
pub fn fleet(
    pods: &BTreeMap<String, PodFacts>,
    known: &BTreeMap<String, Known>,
    config: &PodsConfig,
    models: &[ModelConfig],
) -> Fleet {
    let mut problems = Problems::default();
    let mut adapters: BTreeMap<(String, u16), Vec<WorkerId>> = BTreeMap::new();
    let mut fleet = Fleet { models: models.iter().map(spec).collect(), ..Fleet::default() };
    for (name, pod) in pods.iter().filter(|(_, pod)| pod.ready) {
        let Some(known) = known.get(name) else { continue };
        if let Some(error) = known.failed {
            problems.add(name, error.reason());
        }
        let Some(answers) = &known.answers else { continue };
        let role = match role(pod) {
            Ok(role) => role,
            Err(reason) => {
                problems.add(name, reason);
                continue;
            }
        };
        let Some((model, base)) = model_of(answers, models) else {
            problems.add(name, "unknown_model");
            continue;
        };
        let Some(address) = address(pod, config) else {
            problems.add(name, "no_address");
            continue;
        };
        let listed = Listed { name, pod, role, model, base, address };
        let ranks = listed.ranks(&answers.sockets, config);
        if fleet.ranks.len() + ranks.len() > ROSTER_WORKERS_MAX {
            problems.add(name, "too_many_workers");
            continue;
        }
        if ranks.iter().any(|rank| rank.stream.is_none()) {
            problems.add(name, "no_event_source");
        }
        fleet.load_streams.extend(listed.load_streams(&answers.sockets));
        fleet.ranks.extend(ranks);
        for adapter in adapters_of(answers, base) {
            let key = (adapter.to_owned(), model);
            if adapters.len() < FLEET_ADAPTERS_MAX || adapters.contains_key(&key) {
                adapters.entry(key).or_default().push(id_of_name(name));
            } else {
                problems.add("adapters", "too_many_adapters");
            }
        }
    }
    let adapter = |((name, model), holders): ((String, u16), Vec<WorkerId>)| AdapterSpec {
        // Engines without Dynamo hash by the name that they serve.
        lora: name.clone(),
        name,
        model,
        holders,
    };
    fleet.adapters = adapters.into_iter().map(adapter).collect();
    fleet.problems = problems.into_vec();
    fleet
}

/// The configured model that an engine serves, and its number.
fn model_of<'m>(answers: &Answers, models: &'m [ModelConfig]) -> Option<(u16, &'m ModelConfig)> {
    let mut bases = answers.served.iter().filter(|served| served.parent.is_none());
    bases.find_map(|served| {
        let at = models.iter().position(|model| is_named(model, &served.name))?;
        Some((u16::try_from(at).ok()?, models.get(at)?))
    })
}

fn is_named(model: &ModelConfig, name: &str) -> bool {
    model.name == name || model.aliases.iter().any(|alias| alias == name)
}

/// Names of the adapters of an engine's base model. vLLM names the base's path
/// as the parent where it was not given a name, so any parent will do.
fn adapters_of<'a>(answers: &'a Answers, base: &ModelConfig) -> impl Iterator<Item = &'a str> {
    let adapters = answers.served.iter().filter(|served| served.parent.is_some());
    let own = base.clone();
    adapters.map(|served| served.name.as_str()).filter(move |name| !is_named(&own, name))
}

/// A pod on its way into the fleet.
struct Listed<'a> {
    name: &'a str,
    pod: &'a PodFacts,
    role: Role,
    model: u16,
    base: &'a ModelConfig,
    address: SocketAddr,
}

impl Listed<'_> {
    fn ranks(&self, sockets: &Sockets, config: &PodsConfig) -> Vec<ListedRank> {
        let fallback;
        let sockets = if sockets.is_empty() {
            fallback = self.configured(config);
            &fallback
        } else {
            sockets
        };
        let many = sockets.len() > 1;
        sockets.iter().map(|(rank, sockets)| self.rank(*rank, sockets, many, config)).collect()
    }

    /// Sockets of an engine that does not tell of any: those that the
    /// configuration names, of one rank.
    fn configured(&self, config: &PodsConfig) -> Sockets {
        let at = |port: u16| SocketAddr::new(self.address.ip(), port).to_string();
        let events = config.kv_events_port.map(at);
        Sockets::from([(0, RankSockets { events, ..RankSockets::default() })])
    }

    fn rank(
        &self,
        rank: u32,
        sockets: &RankSockets,
        many: bool,
        config: &PodsConfig,
    ) -> ListedRank {
        let configured = || {
            // As the engines count: the port of rank 0 and the rank.
            let port = u32::from(config.replay_port?).checked_add(rank)?;
            let port = u16::try_from(port).ok()?;
            Some(SocketAddr::new(self.address.ip(), port).to_string())
        };
        let stream = sockets.events.clone().map(|events| EngineStream {
            engine: config.engine,
            events,
            replay: sockets.replay.clone().or_else(configured),
            one_of_many: many,
        });
        ListedRank {
            spec: RankSpec {
                worker: Worker { id: id_of_name(self.name), rank: DpRank(rank) },
                model: self.model,
                shape: BlockShape { block_size: self.base.block_size, eagle: self.base.eagle },
                role: self.role,
                endpoint: self.address.to_string(),
                total_kv_blocks: 0,
                max_num_batched_tokens: 0,
                taints: Vec::new(),
                small_pages: config.engine == Engine::Sglang,
                has_events: stream.is_some(),
                incarnation: incarnation(self.pod),
                namespace: 0,
            },
            stream: stream.map(RankStream::Engine),
            name: Some(self.name.to_owned()),
            namespace: None,
        }
    }

    /// SGLang's load publishers where there are any, else its metrics.
    fn load_streams(&self, sockets: &Sockets) -> Vec<LoadStream> {
        let worker = Some(id_of_name(self.name));
        let published: Vec<LoadStream> = sockets
            .iter()
            .filter_map(|(rank, sockets)| Some((*rank, sockets.load.clone()?)))
            .map(|(rank, load)| LoadStream {
                kind: LoadKind::SglangLoad(load),
                worker,
                ranks: vec![rank],
            })
            .collect();
        if !published.is_empty() {
            return published;
        }
        let ranks = if sockets.is_empty() { vec![0] } else { sockets.keys().copied().collect() };
        let kind = LoadKind::Scrape(format!("http://{}/metrics", self.address));
        vec![LoadStream { kind, worker, ranks }]
    }
}

/// Tells lives of a pod's engine apart; never 0.
fn incarnation(pod: &PodFacts) -> u64 {
    let mut bytes = pod.uid.clone().into_bytes();
    bytes.extend(pod.restarts.to_le_bytes());
    xxhash_rust::xxh3::xxh3_64(&bytes).max(1)
}

#[cfg(test)]
mod tests;
