//! Config: file, environment and flags, parsed once into types that cannot be
//! wrong.
//!
//! # Invariants
//!
//! 1. All mistakes of a file are reported together, each with the path of its
//!    field; a field that is not known is a mistake.
//! 2. A [`Config`] can be acted on: addresses are addresses, numbers are in
//!    range, names are unique.
//!
//! Reading files is left to the caller.

pub mod discovery;
pub mod feed;
pub mod fields;
pub mod picker;
pub mod replicas;
pub mod router;
pub mod workers;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use warmpath_core::limits::{CARD_ALIASES_MAX, CARD_MODELS_MAX, CARD_NAME_BYTES_MAX};

use discovery::{DiscoveryConfig, DiscoveryEnv, EventPlane};
use feed::FeedConfig;
use fields::{Mistakes, Report, Section};
use picker::{PickerConfig, PickerEnv};
use replicas::{ReplicasConfig, ReplicasEnv};
use router::{RouterConfig, RouterEnv};
use workers::WorkerList;

use crate::limits::{LOG_BYTES_DEFAULT, SYNC_DEADLINE_DEFAULT};

/// Largest block size, in tokens.
pub const BLOCK_SIZE_MAX: u64 = 4_096;

/// What decides how `/v1/completions` prompts become tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompletionEngine {
    /// Plain vLLM: adds the tokenizer's special tokens.
    Vllm,
    /// Plain SGLang: adds the tokenizer's special tokens.
    Sglang,
    /// A Dynamo frontend: adds nothing.
    Dynamo,
}

/// One model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelConfig {
    /// Name that requests use.
    pub name: String,
    /// Further names.
    pub aliases: Vec<String>,
    /// Where its tokenizer and templates are.
    pub directory: PathBuf,
    /// Tokens of one block of the engines' caches.
    pub block_size: u32,
    /// Whether the engines draft eagle-style.
    pub eagle: bool,
    /// How completion prompts become tokens.
    pub engine: CompletionEngine,
    /// Whether the filters carry HF's own tokenizer engine, for tokenizers that
    /// are not compiled.
    pub hf_tokenizers: bool,
}

/// Where the workers are listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkerSource {
    /// In a file of their own, which may change.
    File(PathBuf),
    /// In the configuration.
    Inline(WorkerList),
    /// With Dynamo, or with Kubernetes.
    Discovery(DiscoveryConfig),
}

/// Form of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The sidecar's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where filters attach, and which.
    pub feed: FeedConfig,
    /// Bytes of log frames kept for followers that reconnect or lag.
    pub retained_bytes: usize,
    /// Where the status page is served.
    pub status_listen: SocketAddr,
    /// Models, in the order that the feed refers to. With discovery, what is
    /// known here of models that it finds; often none.
    pub models: Vec<ModelConfig>,
    /// Where the workers are listed.
    pub workers: WorkerSource,
    /// How long the first synchronisation may take.
    pub sync_deadline: Duration,
    /// Form of the log.
    pub log: LogFormat,
    /// Where compiled tokenizers are kept; `None` for nowhere.
    pub cache_directory: Option<PathBuf>,
    /// What carries the events of Dynamo's workers.
    pub event_plane: EventPlane,
    /// Where Dynamo's workers answer when they are asked for their history.
    pub recovery: RecoveryConfig,
    /// How workers are chosen and booked, in every gateway.
    pub router: RouterConfig,
    /// How bookings are exchanged with other routers.
    pub replicas: ReplicasConfig,
    /// The endpoint picker, for gateways that cannot load the module; `None` if it
    /// is off.
    pub picker: Option<PickerConfig>,
}

/// Where Dynamo's workers answer when they are asked for their history: they
/// call back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoveryConfig {
    /// Where their calls are taken; port 0 for any.
    pub listen: SocketAddr,
    /// `host:port` that they are told to call; `None` for the address by which
    /// each is reached from here.
    pub advertise: Option<String>,
}

/// What environment and flags say; they win over the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Where filters attach.
    pub feed_listen: Option<String>,
    /// Where the status page is served.
    pub status_listen: Option<String>,
    /// Form of the log.
    pub log: Option<LogFormat>,
    /// Where compiled tokenizers are kept if the file does not say.
    pub cache_directory: Option<PathBuf>,
    /// Block size of models that give none (`DYN_KV_CACHE_BLOCK_SIZE`).
    pub block_size: Option<String>,
    /// What the environment says of discovery if the file does not.
    pub discovery: DiscoveryEnv,
    /// What the environment says of routing if the file does not.
    pub router: RouterEnv,
    /// What the environment says of other routers if the file does not.
    pub replicas: ReplicasEnv,
    /// What environment and flags say of the endpoint picker.
    pub picker: PickerEnv,
}

impl Config {
    /// Parses a configuration file.
    ///
    /// - `text`: YAML.
    /// - `directory`: where relative paths start, the file's own directory.
    /// - `overrides`: what wins over the file.
    ///
    /// # Errors
    ///
    /// All mistakes together.
    pub fn parse(text: &str, directory: &Path, overrides: &Overrides) -> Result<Self, Mistakes> {
        let report = Report::default();
        let mut root = Section::new("", yaml(text)?, &report);

        let mut feed = root.section("feed");
        let retained_bytes = feed.number("retained_bytes", 1 << 20, 1 << 32);
        let feed = FeedConfig::read(feed, overrides.feed_listen.as_deref(), directory);

        let mut status = root.section("status");
        let status_listen =
            listen(&mut status, overrides.status_listen.as_deref(), "127.0.0.1:9011");
        status.end();

        let mut log = root.section("log");
        let format = log.word("format", &[("text", LogFormat::Text), ("json", LogFormat::Json)]);
        log.end();

        let mut cache = root.section("cache");
        let cache_directory = cache.text("directory").map(|path| directory.join(path));
        cache.end();

        let mut sync = root.section("sync");
        let deadline = sync.number("deadline_ms", 0, 600_000);
        sync.end();

        let default_size = default_block_size(overrides, &report);
        let models: Vec<ModelConfig> = root
            .sections("models")
            .into_iter()
            .filter_map(|section| model(section, directory, default_size))
            .collect();
        check_models(&models, &report);

        let event_plane =
            EventPlane::read(root.section("event_plane"), &overrides.discovery, &report);
        let workers = worker_source(&mut root, directory, &models, overrides, &report);
        // Workers of a cluster are on other hosts.
        let default = match &workers {
            WorkerSource::Discovery(config) if config.is_cluster() => "0.0.0.0:0",
            _ => "127.0.0.1:0",
        };
        let mut section = root.section("recovery");
        let recovery_listen = listen(&mut section, None, default);
        let recovery_advertise = section.text("advertise");
        section.end();
        let router = RouterConfig::read(root.section("router"), &overrides.router, &report);
        let replicas =
            ReplicasConfig::read(root.section("replicas"), &overrides.replicas, &router.settings);
        let picks = root.has("picker") || overrides.picker.listen.is_some();
        let section = root.section("picker");
        let picker = picks.then(|| PickerConfig::read(section, directory, &overrides.picker));
        if models.is_empty() && !matches!(workers, WorkerSource::Discovery(_)) {
            report.add("models", "is missing: at least one model");
        }
        root.end();
        let addresses = feed.zip(status_listen).zip(recovery_listen);
        let config = addresses.map(|((feed, status_listen), recovery_listen)| Self {
            feed,
            retained_bytes: retained_bytes
                .and_then(|bytes| usize::try_from(bytes).ok())
                .unwrap_or(LOG_BYTES_DEFAULT),
            status_listen,
            models,
            workers,
            sync_deadline: deadline.map_or(SYNC_DEADLINE_DEFAULT, Duration::from_millis),
            log: overrides.log.or(format).unwrap_or_default(),
            cache_directory: cache_directory.or_else(|| overrides.cache_directory.clone()),
            event_plane,
            recovery: RecoveryConfig { listen: recovery_listen, advertise: recovery_advertise },
            router,
            replicas,
            picker,
        });
        report.finish(config)?.ok_or_else(|| Mistakes::one("", "no address to listen on"))
    }
}

/// Parses YAML into a tree.
///
/// # Errors
///
/// One mistake, with the place in the text.
pub fn yaml(text: &str) -> Result<Value, Mistakes> {
    if text.trim().is_empty() {
        return Ok(Value::Null);
    }
    serde_saphyr::from_str(text).map_err(|error| {
        // The first line says what and where; the rest quotes the file.
        let message = error.to_string();
        let line = message.lines().next().unwrap_or("not valid YAML");
        Mistakes::one("", format!("not valid YAML: {line}"))
    })
}

fn listen(section: &mut Section<'_>, wins: Option<&str>, default: &str) -> Option<SocketAddr> {
    let from_file = section.text("listen");
    let text = wins.map(str::to_owned).or(from_file).unwrap_or_else(|| default.to_owned());
    let address = text.parse().ok();
    if address.is_none() {
        section.mistake(
            "listen",
            format!("must be an address and a port such as {default}, is {text:?}"),
        );
    }
    address
}

fn default_block_size(overrides: &Overrides, report: &Report) -> Option<u64> {
    let text = overrides.block_size.as_deref()?;
    let size = text.parse().ok().filter(|size| (1..=BLOCK_SIZE_MAX).contains(size));
    if size.is_none() {
        report.add(
            "DYN_KV_CACHE_BLOCK_SIZE",
            format!("must be a whole number from 1 to {BLOCK_SIZE_MAX}, is {text:?}"),
        );
    }
    size
}

fn model(
    mut section: Section<'_>,
    directory: &Path,
    default_size: Option<u64>,
) -> Option<ModelConfig> {
    let name = section.text("name");
    match &name {
        None => section.mistake("name", "is missing"),
        Some(name) if name.is_empty() || name.len() > CARD_NAME_BYTES_MAX => {
            section.mistake("name", format!("must have 1 to {CARD_NAME_BYTES_MAX} bytes"));
        }
        Some(_) => {}
    }
    let aliases = section.texts("aliases");
    if aliases.len() > CARD_ALIASES_MAX || aliases.iter().any(|it| it.len() > CARD_NAME_BYTES_MAX) {
        section.mistake(
            "aliases",
            format!("at most {CARD_ALIASES_MAX} of at most {CARD_NAME_BYTES_MAX} bytes"),
        );
    }
    let model_directory = section.text("directory");
    if model_directory.is_none() {
        section.mistake("directory", "is missing: the directory with tokenizer.json");
    }
    let has_size = section.has("block_size");
    let given = section.number("block_size", 1, BLOCK_SIZE_MAX);
    if !has_size && default_size.is_none() {
        section.mistake("block_size", "is missing, and DYN_KV_CACHE_BLOCK_SIZE is not set");
    }
    let block_size = given.or(default_size).and_then(|size| u32::try_from(size).ok()).unwrap_or(1);
    let eagle = section.flag("eagle").unwrap_or(false);
    let hf_tokenizers = section.flag("hf_tokenizers").unwrap_or(false);
    let engine = section
        .word(
            "engine",
            &[
                ("vllm", CompletionEngine::Vllm),
                ("sglang", CompletionEngine::Sglang),
                ("dynamo", CompletionEngine::Dynamo),
            ],
        )
        .unwrap_or(CompletionEngine::Vllm);
    section.end();
    Some(ModelConfig {
        name: name?,
        aliases,
        directory: directory.join(model_directory?),
        block_size,
        eagle,
        engine,
        hf_tokenizers,
    })
}

fn check_models(models: &[ModelConfig], report: &Report) {
    if models.len() > CARD_MODELS_MAX {
        report.add("models", format!("at most {CARD_MODELS_MAX}, are {}", models.len()));
    }
    let mut names = HashSet::new();
    for (at, model) in models.iter().enumerate() {
        for name in std::iter::once(&model.name).chain(&model.aliases) {
            if !names.insert(name.as_str()) {
                report.add(&format!("models[{at}]"), format!("the name {name:?} is used twice"));
            }
        }
    }
}

fn worker_source(
    root: &mut Section<'_>,
    directory: &Path,
    models: &[ModelConfig],
    overrides: &Overrides,
    report: &Report,
) -> WorkerSource {
    const WAYS: [&str; 3] = ["workers", "workers_file", "discovery"];
    let none = WorkerSource::Inline(WorkerList::default());
    let env = &overrides.discovery;
    let given: Vec<&str> = WAYS.into_iter().filter(|way| root.has(way)).collect();
    match given.as_slice() {
        ["workers_file"] => match root.text("workers_file") {
            Some(file) => WorkerSource::File(directory.join(file)),
            None => none,
        },
        ["workers"] => WorkerSource::Inline(WorkerList::read(root, models, report)),
        [] if env.backend.is_none() => {
            root.mistake("workers_file", "is missing: give workers_file, workers or discovery");
            none
        }
        ["discovery"] | [] => {
            let section = root.section("discovery");
            DiscoveryConfig::read(section, directory, env).map_or(none, WorkerSource::Discovery)
        }
        several => {
            root.mistake("workers", format!("give one of them: {}", several.join(", ")));
            for way in WAYS {
                root.take(way);
            }
            none
        }
    }
}

#[cfg(test)]
mod tests;
