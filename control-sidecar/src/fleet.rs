//! Fleet: what discovery knows of models and workers, whatever the backend.
//!
//! Every backend ends in this one form: a fleet is always the whole of it, and
//! the next one replaces it. What a backend cannot use is a [`Problem`] of the
//! fleet, shown on the state page, and never ends anything.
//!
//! # Terms
//!
//! - *listed rank*: one data-parallel rank of one instance, a worker of the
//!   roster.
//! - *incarnation*: one life of a rank. What was learnt of one says nothing of
//!   the next, even at the same address under the same id.

use std::collections::BTreeMap;
use std::path::PathBuf;

use warmpath_core::ids::WorkerId;

use crate::adapter::Engine;
use crate::adapter::plane::envelope::Topic;
use crate::config::CompletionEngine;
use crate::config::router::card::CardRouter;
use crate::discovery::record::EndpointPath;
use crate::state::RankSpec;

/// All models and workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fleet {
    /// Models, each once. Two generations of a model with the same name and
    /// other files are two models.
    pub models: Vec<ModelSpec>,
    /// Workers, a rank each; `spec.model` is an index into `models`.
    pub ranks: Vec<ListedRank>,
    /// LoRA adapters that requests can name as their model.
    pub adapters: Vec<AdapterSpec>,
    /// Where workers say how busy they are.
    pub load_streams: Vec<LoadStream>,
    /// Settings that the workers of a model bring, by its index in `models`.
    pub settings: BTreeMap<u16, CardRouter>,
    /// Where routers and workers say what becomes of requests.
    pub sequence_streams: Vec<SequenceStream>,
    /// The endpoints that Dynamo's workers serve.
    pub paths: BTreeMap<WorkerId, EndpointPath>,
    /// What could not be used.
    pub problems: Vec<Problem>,
}

/// One model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSpec {
    /// Name that requests use.
    pub name: String,
    /// Further names.
    pub aliases: Vec<String>,
    /// Where its tokenizer and templates are.
    pub files: ModelFiles,
    /// Tokens of one block of the engines' caches; at least 1.
    pub block_size: u32,
    /// Longest prompt and answer together, in tokens; 0 if only the files say.
    pub context_length: u32,
    /// Whether the engines draft eagle-style.
    pub eagle: bool,
    /// How messages and completion prompts become tokens.
    pub engine: CompletionEngine,
    /// Whether the filters carry HF's own tokenizer engine, for tokenizers that
    /// are not compiled.
    pub hf_tokenizers: bool,
}

impl ModelSpec {
    /// Whether `other` is the same model: prompts become the same blocks. Where
    /// the files lie is no part of it, if their checksums are known, since every
    /// worker serves its own copy; nor are further names.
    #[must_use]
    pub fn is_same_model(&self, other: &Self) -> bool {
        let Self {
            name,
            aliases: _,
            files,
            block_size,
            context_length,
            eagle,
            engine,
            hf_tokenizers,
        } = self;
        *name == other.name
            && files.are_same(&other.files)
            && *block_size == other.block_size
            && *context_length == other.context_length
            && *eagle == other.eagle
            && *engine == other.engine
            && *hf_tokenizers == other.hf_tokenizers
    }
}

/// Where the files of a model are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelFiles {
    /// A directory as Hugging Face lays it out.
    Directory(PathBuf),
    /// Files that a model card names, one by one.
    Artifacts(Vec<Artifact>),
}

impl ModelFiles {
    fn are_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Artifacts(ours), Self::Artifacts(theirs)) => {
                let is_same = |(our, their): (&Artifact, &Artifact)| {
                    let is_known = our.blake3.is_some() && our.blake3 == their.blake3;
                    our.file_name == their.file_name && (is_known || our == their)
                };
                ours.len() == theirs.len() && ours.iter().zip(theirs).all(is_same)
            }
            _ => self == other,
        }
    }
}

/// One file that a model card names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artifact {
    /// Its name in Hugging Face's layout, such as `tokenizer.json`.
    pub file_name: &'static str,
    /// A path of this host, or an `http://` address.
    pub location: String,
    /// BLAKE3 of its bytes, in lower-case hex; `None` if the card does not say.
    pub blake3: Option<String>,
}

/// One rank of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedRank {
    /// What the state must know.
    pub spec: RankSpec,
    /// Where it says what its cache holds; `None` if it does not.
    pub stream: Option<RankStream>,
    /// The name of its instance, for the state page.
    pub name: Option<String>,
    /// Dynamo's namespace, a generation of workers; `None` without Dynamo.
    /// Prefill and decode workers of different ones never serve together.
    pub namespace: Option<String>,
}

/// Where one rank says what its cache holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RankStream {
    /// The engine's own ZMQ publisher.
    Engine(EngineStream),
    /// Dynamo's event plane.
    Plane(PlaneStream),
    /// TensorRT-LLM's events, fetched over HTTP, which empties its buffer: one
    /// consumer only, so never unless the configuration asks for it.
    Pull(PullStream),
}

/// An engine's own publisher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineStream {
    /// Whose conventions apply.
    pub engine: Engine,
    /// `host:port` of the publisher.
    pub events: String,
    /// `host:port` of the replay socket.
    pub replay: Option<String>,
    /// Whether the instance has several ranks.
    pub one_of_many: bool,
}

/// One rank's publisher on Dynamo's event plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaneStream {
    /// The only publisher whose events count for the rank.
    pub publisher: u64,
    /// Where its messages come from.
    pub channel: Channel,
    /// Where its history can be asked for.
    pub recovery: Option<RecoveryTarget>,
}

/// Where messages of Dynamo's event plane come from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Channel {
    /// A publisher's own ZMQ socket, `host:port`; frame 0 is the bare topic.
    Direct(String),
    /// A subject, on NATS or the ZMQ brokers, whichever the event plane is.
    Subject(String),
}

/// An endpoint of Dynamo's TCP request plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoveryTarget {
    /// `host:port`
    pub address: String,
    /// What follows the first `/` of the instance's transport.
    pub path: String,
}

/// TensorRT-LLM's pull interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PullStream {
    /// Base URL of the server, `http://host:port`.
    pub url: String,
}

/// A LoRA adapter that requests can name as their model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterSpec {
    /// Name that requests use.
    pub name: String,
    /// Index of its base model in [`Fleet::models`].
    pub model: u16,
    /// Name that enters the blocks' hashes, as the engine knows it.
    pub lora: String,
    /// Instances that hold it; empty if that is not known.
    pub holders: Vec<WorkerId>,
}

/// Where workers say how busy they are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LoadStream {
    /// What is said there.
    pub kind: LoadKind,
    /// The only instance that it may speak of; `None` if discovery does not tie
    /// the publisher to one.
    pub worker: Option<WorkerId>,
    /// Ranks of that instance, ascending; the first is the number of the first.
    pub ranks: Vec<u32>,
}

/// The ways in which workers say how busy they are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LoadKind {
    /// Dynamo's topic `kv_metrics`.
    KvMetrics(PlanePublisher),
    /// Dynamo's topic `forward-pass-metrics`.
    ForwardPass(PlanePublisher),
    /// SGLang's load stream: `host:port` of one rank's publisher.
    SglangLoad(String),
    /// Prometheus text at this URL.
    Scrape(String),
}

/// Where routers and workers say what becomes of requests.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SequenceStream {
    /// What is said there: steps of requests, or sidecars' accounts of them.
    pub topic: Topic,
    /// Who says it.
    pub source: PlanePublisher,
}

/// A publisher on Dynamo's event plane.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PlanePublisher {
    /// The publisher's id; messages of others on the channel are not its.
    pub publisher: Option<u64>,
    /// Where its messages come from.
    pub channel: Channel,
}

/// Something that discovery could not use.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Which record or worker, for people; bounded in length.
    pub of: String,
    /// Fixed word for metrics and the state page.
    pub reason: &'static str,
}

/// How busy one rank is, as it says itself. Absent is "not said", which leaves
/// what was said before.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RankLoad {
    /// Blocks of its cache in use.
    pub kv_used_blocks: Option<u64>,
    /// Blocks of requests that decode.
    pub active_decode_blocks: Option<u64>,
    /// Prompt tokens that wait or are being computed.
    pub active_prefill_tokens: Option<u64>,
    /// Requests that run.
    pub running: Option<u64>,
    /// Requests that wait.
    pub waiting: Option<u64>,
    /// Share of the cache in use, 0 to 1.
    pub cache_usage: Option<f64>,
    /// Blocks that the cache holds.
    pub total_kv_blocks: Option<u64>,
}

impl RankLoad {
    /// Takes over what `newer` says, and leaves what it does not.
    pub fn merge(&mut self, newer: &Self) {
        fn take<T: Copy>(old: &mut Option<T>, newer: Option<T>) {
            *old = newer.or(*old);
        }
        take(&mut self.kv_used_blocks, newer.kv_used_blocks);
        take(&mut self.active_decode_blocks, newer.active_decode_blocks);
        take(&mut self.active_prefill_tokens, newer.active_prefill_tokens);
        take(&mut self.running, newer.running);
        take(&mut self.waiting, newer.waiting);
        take(&mut self.cache_usage, newer.cache_usage);
        take(&mut self.total_kv_blocks, newer.total_kv_blocks);
    }
}
