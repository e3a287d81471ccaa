//! Join: the records of Dynamo's discovery to a fleet.
//!
//! Pure. A *unit* is one instance with a model card; it is *live* when the
//! endpoint that its card names is being served. Who is ready and who is not
//! is decided here, from the whole of the records each time.
//!
//! # Which workers are listed
//!
//! A live unit whose card's `needs` are met by live units of the same model
//! name in the same namespace, with one exception: to a decode unit `prefill`
//! counts as met. Dynamo's frontend waits for the prefill workers before it
//! serves, but passes requests straight to the decode workers once they have
//! gone; the gateway does so from the start, and so must know the decode
//! workers. Prefill units without a decode unit are not listed: nothing could
//! go on with what they compute.
//!
//! Cards of older releases give no type. Theirs is prefill if the model type
//! says so, with a need of decode or aggregated workers; else aggregated.

mod models;
mod streams;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use warmpath_core::hash::BlockShape;
use warmpath_core::ids::{DpRank, Worker, WorkerId};
use warmpath_core::limits::ROSTER_WORKERS_MAX;
use warmpath_core::roster::Role;

use super::card::{Card, WorkerType};
use super::listing::{Author, Listing, Problems};
use super::record::{EndpointPath, Record, Transport, split_address};
use crate::config::ModelConfig;
use crate::config::discovery::{FrontendRule, NamespaceRule};
use crate::fleet::{Fleet, ListedRank, PlaneStream, RankStream};
use crate::limits::INSTANCE_RANKS_MAX;
use crate::state::RankSpec;

use models::Models;
use streams::Publishers;
pub(crate) use streams::subject;

/// What the configuration wants of the records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Which namespaces are taken.
    pub namespaces: NamespaceRule,
    /// Where requests go.
    pub frontend: FrontendRule,
    /// Models with a directory of their own, which wins over the cards' files.
    pub models: Vec<ModelConfig>,
    /// Whether events come over brokers, whose publishers are not recorded.
    pub brokers: bool,
}

/// One instance with a model card whose endpoint is served.
#[derive(Clone, Copy, Debug)]
struct Unit<'a> {
    path: &'a EndpointPath,
    instance: u64,
    card: &'a Card,
    transport: &'a Transport,
    author: &'a Author,
}

impl Unit<'_> {
    /// What it does, in the words of cards.
    fn worker_type(&self) -> WorkerType {
        match self.card.worker_type {
            Some(worker_type) => worker_type,
            None if self.card.legacy_prefill => WorkerType::Prefill,
            None => WorkerType::Aggregated,
        }
    }

    /// What it is called in problems.
    fn label(&self) -> String {
        let EndpointPath { namespace, component, endpoint } = self.path;
        format!("{namespace}/{component}/{endpoint}/{:x}", self.instance)
    }
}

/// Live units' types by namespace and model name.
type Live<'a> = HashSet<(&'a str, &'a str, WorkerType)>;

/// Joins records to a fleet.
///
/// Never fails: what cannot be used is a problem of the fleet. The same records
/// in another order give the same fleet.
#[must_use]
pub fn join(listing: &Listing, rules: &Rules) -> Fleet {
    let mut problems = listing.problems.clone();
    let units = live_units(listing, rules);
    let live: Live<'_> = units
        .iter()
        .filter(|unit| unit.card.lora.is_none())
        .map(|unit| (unit.path.namespace.as_str(), unit.card.name.as_str(), unit.worker_type()))
        .collect();
    let publishers = Publishers::of(listing, rules);
    let mut models = Models::new(&rules.models);
    let mut fleet = Fleet::default();
    let mut listed: HashMap<WorkerId, Listed<'_>> = HashMap::new();
    for unit in units.iter().filter(|unit| unit.card.lora.is_none()) {
        let mut job = Job { unit, rules, publishers: &publishers, problems: &mut problems };
        let Some(role) = job.role(&live) else { continue };
        let Some(ranks) = job.ranks() else { continue };
        if listed.contains_key(&WorkerId(unit.instance)) {
            job.problem("worker_twice");
            continue;
        }
        if fleet.ranks.len() + ranks.len() > ROSTER_WORKERS_MAX {
            job.problem("too_many_workers");
            continue;
        }
        if unit.card.taints_left_out > 0 {
            job.problem("taints_left_out");
        }
        let Some(model) = models.of(unit, job.problems) else { continue };
        fleet.ranks.extend(ranks.iter().map(|rank| job.listed_rank(*rank, role, &model)));
        listed.insert(WorkerId(unit.instance), Listed { path: unit.path, ranks, model: model.at });
    }
    fleet.adapters = models::adapters(&units, &listed, &mut problems);
    fleet.load_streams = publishers.load_streams(&listed, rules, &mut problems);
    (fleet.models, fleet.settings) = models.into_parts();
    fleet.sequence_streams = publishers.sequence_streams(&listed, rules, &mut problems);
    fleet.paths = listed.iter().map(|(worker, unit)| (*worker, unit.path.clone())).collect();
    fleet.problems = problems.into_vec();
    fleet
}

/// A unit that made it into the fleet.
#[derive(Debug)]
struct Listed<'a> {
    path: &'a EndpointPath,
    ranks: Vec<u32>,
    model: u16,
}

/// Cards whose endpoint the same instance serves, in the order of their names:
/// base models before their adapters.
fn live_units<'a>(listing: &'a Listing, rules: &Rules) -> Vec<Unit<'a>> {
    let mut served: HashMap<(&EndpointPath, u64), &Transport> = HashMap::new();
    for entry in &listing.entries {
        if let Record::Endpoint(endpoint) = &*entry.record {
            served.insert((&endpoint.path, endpoint.instance), &endpoint.transport);
        }
    }
    let mut units: Vec<Unit<'a>> = listing
        .entries
        .iter()
        .filter_map(|entry| {
            let Record::Model(model) = &*entry.record else { return None };
            if !rules.namespaces.admits(&model.path.namespace) {
                return None;
            }
            let transport = served.get(&(&model.path, model.instance))?;
            Some(Unit {
                path: &model.path,
                instance: model.instance,
                card: &model.card,
                transport,
                author: &entry.author,
            })
        })
        .collect();
    units.sort_by(|a, b| {
        let order = |unit: &Unit<'a>| (unit.path, unit.instance, &unit.card.lora, &unit.card.name);
        order(a).cmp(&order(b))
    });
    units
}

/// Whether what a unit needs is there.
fn is_met(unit: &Unit<'_>, worker_type: WorkerType, live: &Live<'_>) -> bool {
    const LEGACY: [[WorkerType; 1]; 2] = [[WorkerType::Decode], [WorkerType::Aggregated]];
    let (namespace, name) = (unit.path.namespace.as_str(), unit.card.name.as_str());
    let there = |needed: &WorkerType| match needed {
        WorkerType::Unknown => false,
        WorkerType::Prefill if worker_type == WorkerType::Decode => true,
        needed => live.contains(&(namespace, name, *needed)),
    };
    let needs = &unit.card.needs;
    if unit.card.worker_type.is_none() {
        return worker_type != WorkerType::Prefill
            || LEGACY.iter().any(|all| all.iter().all(there));
    }
    needs.is_empty() || needs.iter().any(|all| all.iter().all(there))
}

/// What a rank takes from its model.
#[derive(Clone, Copy, Debug)]
struct ModelAt {
    at: u16,
    shape: BlockShape,
    /// Whether blocks can be matched: the size is known.
    blocks: bool,
}

/// One unit on its way into the fleet.
struct Job<'a, 'p> {
    unit: &'a Unit<'a>,
    rules: &'a Rules,
    publishers: &'a Publishers<'a>,
    problems: &'p mut Problems,
}

impl Job<'_, '_> {
    fn problem(&mut self, reason: &'static str) {
        self.problems.add(&self.unit.label(), reason);
    }

    /// What the unit does in the fleet; `None` if it is left out.
    fn role(&mut self, live: &Live<'_>) -> Option<Role> {
        let worker_type = self.unit.worker_type();
        let role = match worker_type {
            WorkerType::Prefill => Role::Prefill,
            WorkerType::Decode => Role::Decode,
            WorkerType::Aggregated => Role::Aggregated,
            WorkerType::Encode => {
                self.problem("encode_worker");
                return None;
            }
            WorkerType::Unknown => {
                self.problem("unknown_worker_type");
                return None;
            }
        };
        if is_met(self.unit, worker_type, live) {
            Some(role)
        } else {
            self.problem("needs_unmet");
            None
        }
    }

    /// Its data-parallel ranks, ascending; `None` if there are too many.
    fn ranks(&mut self) -> Option<Vec<u32>> {
        let card = self.unit.card;
        let end = card.rank_start.checked_add(card.rank_count);
        let ends = (u32::try_from(card.rank_start).ok(), end.and_then(|it| u32::try_from(it).ok()));
        match ends {
            (Some(start), Some(end)) if end - start <= INSTANCE_RANKS_MAX => {
                Some((start..end).collect())
            }
            _ => {
                self.problem("too_many_ranks");
                None
            }
        }
    }

    fn listed_rank(&mut self, rank: u32, role: Role, model: &ModelAt) -> ListedRank {
        let unit = self.unit;
        let stream = self.stream(rank, model);
        let publisher = stream.as_ref().map_or(0, |stream| stream.publisher);
        ListedRank {
            spec: RankSpec {
                worker: Worker { id: WorkerId(unit.instance), rank: DpRank(rank) },
                model: model.at,
                shape: model.shape,
                role,
                endpoint: self.endpoint(),
                total_kv_blocks: unit.card.total_kv_blocks,
                max_num_batched_tokens: unit.card.max_num_batched_tokens,
                taints: unit.card.taints.clone(),
                // Dynamo's relays drop blocks of any other size.
                small_pages: false,
                has_events: stream.is_some(),
                incarnation: incarnation(unit, publisher),
                namespace: 0,
            },
            stream: stream.map(RankStream::Plane),
            name: unit.author.pod.clone(),
            namespace: Some(unit.path.namespace.clone()),
        }
    }

    fn stream(&mut self, rank: u32, model: &ModelAt) -> Option<PlaneStream> {
        let card = self.unit.card;
        if !card.publishes_events || !model.blocks {
            return None;
        }
        if !card.known_event_mode {
            self.problem("unknown_event_mode");
            return None;
        }
        match self.publishers.stream(self.unit.path, self.unit.instance, rank) {
            Ok(stream) => Some(stream),
            Err(reason) => {
                let label = format!("{} rank {rank}", self.unit.label());
                self.problems.add(&label, reason);
                None
            }
        }
    }

    /// Where requests go, as the roster has it; empty if only the id says.
    fn endpoint(&mut self) -> String {
        let port = match self.rules.frontend {
            FrontendRule::None => return String::new(),
            FrontendRule::Fixed(address) => return address.to_string(),
            FrontendRule::PodPort(port) => self.unit.author.http_port.unwrap_or(port),
        };
        let of_transport = || match self.unit.transport {
            Transport::Tcp(target) => split_address(&target.address).and_then(|(host, _)| {
                host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok()
            }),
            Transport::Other => None,
        };
        let Some(ip) = self.unit.author.ip.or_else(of_transport) else {
            self.problem("no_address");
            return String::new();
        };
        SocketAddr::new(ip, port).to_string()
    }
}

/// Tells lives of a rank apart: the hash of its instance, its publisher and its
/// pod; never 0.
fn incarnation(unit: &Unit<'_>, publisher: u64) -> u64 {
    let mut bytes = Vec::with_capacity(64);
    bytes.extend(unit.instance.to_le_bytes());
    bytes.extend(publisher.to_le_bytes());
    bytes.extend(unit.author.uid.as_deref().unwrap_or_default().as_bytes());
    xxhash_rust::xxh3::xxh3_64(&bytes).max(1)
}

#[cfg(test)]
mod tests;
