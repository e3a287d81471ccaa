//! Workers: the list of workers, in the configuration or in a file of its own.

use std::collections::HashMap;
use std::hash::Hasher;
use std::net::SocketAddr;
use std::ops::RangeInclusive;

use siphasher::sip::SipHasher13;
use warmpath_core::hash::BlockShape;
use warmpath_core::ids::{DpRank, Worker, WorkerId};
use warmpath_core::limits::{
    ADAPTER_NAME_BYTES_MAX, ADAPTERS_MAX, ENDPOINT_BYTES_MAX, ROSTER_WORKERS_MAX, TAINT_BYTES_MAX,
    WORKER_TAINTS_MAX,
};
use warmpath_core::roster::Role;

use super::fields::{Mistakes, Report, Section};
use super::{ModelConfig, yaml};
use crate::adapter::Engine;
use crate::fleet::{
    AdapterSpec, EngineStream, ListedRank, LoadKind, LoadStream, PullStream, RankStream,
};
use crate::state::RankSpec;

/// Instance ids have 53 bits, so that they survive as numbers of JSON.
const ID_MASK: u64 = (1 << 53) - 1;

/// Most ranks of one instance.
const DP_SIZE_MAX: u64 = 1_024;

/// The instance id that Dynamo gives a pod, from the pod's name.
///
/// SipHash-1-3 with zero keys over the name as Rust hashes a text (its bytes
/// and 0xff), the low 53 bits.
#[must_use]
pub fn id_of_name(name: &str) -> WorkerId {
    WorkerId(raw_id_of_name(name) & ID_MASK)
}

/// All 64 bits of [`id_of_name`], which were the id in older releases.
#[must_use]
pub fn raw_id_of_name(name: &str) -> u64 {
    let mut hasher = SipHasher13::new();
    hasher.write(name.as_bytes());
    hasher.write_u8(0xff);
    hasher.finish()
}

/// All workers, a rank each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkerList {
    /// In the order of the list.
    pub ranks: Vec<ListedRank>,
    /// LoRA adapters that workers are listed with, by name.
    pub adapters: Vec<AdapterSpec>,
    /// Where workers say how busy they are.
    pub load_streams: Vec<LoadStream>,
}

/// One entry of the list.
struct Entry {
    ranks: Vec<ListedRank>,
    adapters: Vec<String>,
    load_streams: Vec<LoadStream>,
}

impl WorkerList {
    /// Parses a file that holds nothing but `workers`.
    ///
    /// # Errors
    ///
    /// All mistakes together; the caller keeps the list it has.
    pub fn parse(text: &str, models: &[ModelConfig]) -> Result<Self, Mistakes> {
        let report = Report::default();
        let mut root = Section::new("", yaml(text)?, &report);
        if !root.has("workers") {
            root.mistake("workers", "is missing; a list, empty if there is no worker");
        }
        let list = Self::read(&mut root, models, &report);
        root.end();
        report.finish(list)
    }

    /// Takes `workers` out of a section.
    pub(super) fn read(root: &mut Section<'_>, models: &[ModelConfig], report: &Report) -> Self {
        let mut list = Self::default();
        let mut seen: HashMap<Worker, usize> = HashMap::new();
        let mut endpoints: HashMap<(String, u32), usize> = HashMap::new();
        for (at, section) in root.sections("workers").into_iter().enumerate() {
            let path = format!("workers[{at}]");
            let Some(entry) = read_worker(section, models) else { continue };
            if let Some(rank) = entry.ranks.first() {
                list.add_adapters(entry.adapters, &rank.spec, &path, models, report);
            }
            list.load_streams.extend(entry.load_streams);
            for rank in entry.ranks {
                if let Some(first) = seen.insert(rank.spec.worker, at) {
                    report.add(&path, format!("is the same worker as workers[{first}]"));
                }
                let place = (rank.spec.endpoint.clone(), rank.spec.worker.rank.0);
                if let Some(first) = endpoints.insert(place, at).filter(|first| *first != at) {
                    report.add(
                        &format!("{path}.endpoint"),
                        format!("is the endpoint of workers[{first}] too"),
                    );
                }
                list.ranks.push(rank);
            }
        }
        if list.ranks.len() > ROSTER_WORKERS_MAX {
            report.add(
                "workers",
                format!("at most {ROSTER_WORKERS_MAX} ranks, are {}", list.ranks.len()),
            );
        }
        list
    }
}

impl WorkerList {
    /// Notes that a worker holds adapters of its model.
    fn add_adapters(
        &mut self,
        names: Vec<String>,
        spec: &RankSpec,
        path: &str,
        models: &[ModelConfig],
        report: &Report,
    ) {
        for name in names {
            let mistake = |text: String| report.add(&format!("{path}.adapters"), text);
            if name.is_empty() || name.len() > ADAPTER_NAME_BYTES_MAX {
                mistake(format!("names have 1 to {ADAPTER_NAME_BYTES_MAX} bytes"));
                continue;
            }
            if models.iter().any(|model| model.name == name || model.aliases.contains(&name)) {
                mistake(format!("{name:?} is a model"));
                continue;
            }
            let is_full = self.adapters.len() >= ADAPTERS_MAX;
            let known = self.adapters.iter_mut().find(|it| it.name == name);
            match known {
                Some(adapter) if adapter.model == spec.model => {
                    if !adapter.holders.contains(&spec.worker.id) {
                        adapter.holders.push(spec.worker.id);
                    }
                }
                Some(_) => mistake(format!("{name:?} is another model's adapter, too")),
                None if is_full => {
                    mistake(format!("at most {ADAPTERS_MAX} adapters together"));
                }
                None => self.adapters.push(AdapterSpec {
                    lora: name.clone(),
                    name,
                    model: spec.model,
                    holders: vec![spec.worker.id],
                }),
            }
        }
    }
}

fn read_worker(mut section: Section<'_>, models: &[ModelConfig]) -> Option<Entry> {
    let (id, name) = read_identity(&mut section);
    let model = read_model(&mut section, models);
    let endpoint = read_endpoint(&mut section);
    let engine = section
        .word("engine", &[("vllm", Engine::Vllm), ("sglang", Engine::Sglang)])
        .unwrap_or(Engine::Vllm);
    let role = section
        .word(
            "role",
            &[
                ("aggregated", Role::Aggregated),
                ("prefill", Role::Prefill),
                ("decode", Role::Decode),
            ],
        )
        .unwrap_or(Role::Aggregated);
    let start = section.number("dp_start_rank", 0, u64::from(u16::MAX)).unwrap_or(0);
    let size = section.number("dp_size", 1, DP_SIZE_MAX).unwrap_or(1);
    let total_kv_blocks = section.number("total_kv_blocks", 0, 1 << 40).unwrap_or(0);
    let max_num_batched_tokens = section.number("max_num_batched_tokens", 0, 1 << 40).unwrap_or(0);
    let taints = read_taints(&mut section);
    let adapters = section.texts("adapters");
    let last_rank = start + size - 1;
    let events = read_tcp(&mut section, "kv_events", last_rank);
    let replay = read_tcp(&mut section, "replay", last_rank);
    if replay.is_some() && events.is_none() {
        section.mistake("replay", "needs kv_events");
    }
    let pulled = read_url(&mut section, "pull_events");
    if pulled.is_some() && events.is_some() {
        section.mistake("pull_events", "either kv_events or pull_events, not both");
    }
    let metrics = read_url(&mut section, "metrics");
    let load = read_tcp(&mut section, "load", last_rank);
    section.end();
    let (id, (model, shape), endpoint) = (id?, model?, endpoint?);
    let load_streams = read_loads(id, start..=last_rank, metrics, load.as_ref());
    let stream = |rank| match (&events, &pulled) {
        (Some(events), _) => Some(RankStream::Engine(EngineStream {
            engine,
            events: events.of_rank(rank),
            replay: replay.as_ref().map(|replay| replay.of_rank(rank)),
            one_of_many: size > 1,
        })),
        (None, Some(url)) => Some(RankStream::Pull(PullStream { url: url.clone() })),
        (None, None) => None,
    };
    let ranks = (start..=last_rank)
        .filter_map(|rank| u32::try_from(rank).ok())
        .map(|rank| ListedRank {
            spec: RankSpec {
                worker: Worker { id, rank: DpRank(rank) },
                model,
                shape,
                role,
                endpoint: endpoint.clone(),
                total_kv_blocks,
                max_num_batched_tokens,
                taints: taints.clone(),
                small_pages: engine == Engine::Sglang,
                has_events: events.is_some() || pulled.is_some(),
                incarnation: 0,
                namespace: 0,
            },
            stream: stream(rank),
            name: name.clone(),
            namespace: None,
        })
        .collect();
    Some(Entry { ranks, adapters, load_streams })
}

/// Where a worker says how busy its ranks are: on one page for all, or on a
/// publisher a rank.
fn read_loads(
    id: WorkerId,
    ranks: RangeInclusive<u64>,
    metrics: Option<String>,
    load: Option<&Tcp>,
) -> Vec<LoadStream> {
    let ranks: Vec<u32> = ranks.filter_map(|rank| u32::try_from(rank).ok()).collect();
    let of_ranks = |kind, ranks| LoadStream { kind, worker: Some(id), ranks };
    let page = metrics.map(|url| of_ranks(LoadKind::Scrape(url), ranks.clone()));
    let published = load.into_iter().flat_map(|load| {
        let of_rank = |rank| of_ranks(LoadKind::SglangLoad(load.of_rank(rank)), vec![rank]);
        ranks.iter().copied().map(of_rank)
    });
    page.into_iter().chain(published).collect()
}

/// Taints, ascending, each once.
fn read_taints(section: &mut Section<'_>) -> Vec<String> {
    let mut taints = section.texts("taints");
    taints.sort_unstable();
    taints.dedup();
    if taints.iter().any(|taint| !(1..=TAINT_BYTES_MAX).contains(&taint.len())) {
        section.mistake("taints", format!("taints have 1 to {TAINT_BYTES_MAX} bytes"));
    }
    if taints.len() > WORKER_TAINTS_MAX {
        section
            .mistake("taints", format!("at most {WORKER_TAINTS_MAX} taints, are {}", taints.len()));
    }
    taints
}

fn read_url(section: &mut Section<'_>, name: &str) -> Option<String> {
    let text = section.text(name)?;
    if reqwest::Url::parse(&text).is_ok_and(|url| url.scheme() == "http" && url.has_host()) {
        return Some(text);
    }
    section.mistake(name, format!("must be http://host:port, is {text:?}"));
    None
}

fn read_identity(section: &mut Section<'_>) -> (Option<WorkerId>, Option<String>) {
    let has_id = section.has("id");
    let id = section.number("id", 0, u64::MAX).map(WorkerId);
    let name = section.text("name");
    match (has_id, &name) {
        (true, _) => (id, name),
        (false, Some(name)) if name.is_empty() => {
            section.mistake("name", "is empty");
            (None, None)
        }
        (false, Some(text)) => (Some(id_of_name(text)), name),
        (false, None) => {
            section.mistake("id", "is missing: give id or name");
            (None, None)
        }
    }
}

fn read_model(section: &mut Section<'_>, models: &[ModelConfig]) -> Option<(u16, BlockShape)> {
    let Some(name) = section.text("model") else {
        section.mistake("model", "is missing");
        return None;
    };
    let found = models
        .iter()
        .enumerate()
        .find(|(_, model)| model.name == name || model.aliases.contains(&name));
    let Some((at, model)) = found else {
        section.mistake("model", format!("{name:?} is not among the models"));
        return None;
    };
    let shape = BlockShape { block_size: model.block_size, eagle: model.eagle };
    Some((u16::try_from(at).ok()?, shape))
}

fn read_endpoint(section: &mut Section<'_>) -> Option<String> {
    let Some(text) = section.text("endpoint") else {
        section.mistake("endpoint", "is missing");
        return None;
    };
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 && text.len() <= ENDPOINT_BYTES_MAX => {
            Some(address.to_string())
        }
        _ => {
            section.mistake(
                "endpoint",
                format!("must be an IP address and a port such as 10.0.0.1:8000, is {text:?}"),
            );
            None
        }
    }
}

/// A `tcp://host:port` whose port grows with the rank.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Tcp {
    host: String,
    port: u16,
}

impl Tcp {
    fn of_rank(&self, rank: u32) -> String {
        // In range: checked against the last rank when it was read.
        format!("{}:{}", self.host, u32::from(self.port).saturating_add(rank))
    }
}

fn read_tcp(section: &mut Section<'_>, name: &str, last_rank: u64) -> Option<Tcp> {
    let text = section.text(name)?;
    let parsed = text.strip_prefix("tcp://").and_then(|rest| rest.rsplit_once(':'));
    let Some((host, port)) = parsed else {
        section.mistake(name, format!("must be tcp://host:port, is {text:?}"));
        return None;
    };
    if matches!(host, "" | "*" | "0.0.0.0" | "[::]" | "::") {
        section.mistake(
            name,
            format!("{text:?} is where the engine binds; give the address to connect to"),
        );
        return None;
    }
    let port = port.parse::<u16>().ok().filter(|port| *port > 0);
    let Some(port) = port.filter(|port| u64::from(*port) + last_rank <= u64::from(u16::MAX)) else {
        section.mistake(
            name,
            format!("must have a port from 1 to {}, is {text:?}", u64::from(u16::MAX) - last_rank),
        );
        return None;
    };
    Some(Tcp { host: host.to_owned(), port })
}
