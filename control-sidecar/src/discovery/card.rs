//! Card: what a Dynamo model card says that routing needs.

use serde_json::Value;
use warmpath_core::limits::{
    CARD_ALIASES_MAX, CARD_NAME_BYTES_MAX, TAINT_BYTES_MAX, WORKER_TAINTS_MAX,
};

use super::record::{name, number, text};
use crate::config::router::card::{CardRouter, Refused};
use crate::fleet::Artifact;
use crate::limits::{CARD_EXTRA_FILES_MAX, CARD_NEEDS_MAX};

/// What begins a taint that says where in the topology a worker is, followed by
/// `<domain>=<value>`.
const TOPOLOGY_TAINT: &str = "dynamo.topology/";

/// What a worker does, in the words of cards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WorkerType {
    /// Prefill only.
    Prefill,
    /// Decode only.
    Decode,
    /// Encodes images and the like for others.
    Encode,
    /// Prefill and decode.
    Aggregated,
    /// A word that is not known here.
    Unknown,
}

impl WorkerType {
    fn of(word: &str) -> Self {
        match word {
            "prefill" => Self::Prefill,
            "decode" => Self::Decode,
            "encode" => Self::Encode,
            "aggregated" => Self::Aggregated,
            _ => Self::Unknown,
        }
    }
}

/// What a card names as the model's tokenizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CardTokenizer {
    /// A `tokenizer.json` that can be fetched.
    Json,
    /// A file of another kind.
    OtherKind,
    /// A file at a place that is not read from here.
    OtherPlace,
    /// None.
    Missing,
}

/// A model card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// Name that requests use.
    pub name: String,
    /// Further names, each once.
    pub aliases: Vec<String>,
    /// What the worker does; `None` in cards of older releases.
    pub worker_type: Option<WorkerType>,
    /// What else must be there before the worker can serve: one of the inner
    /// lists as a whole. Empty for nothing.
    pub needs: Vec<Vec<WorkerType>>,
    /// Whether an older card calls itself a prefill worker's.
    pub legacy_prefill: bool,
    /// Whether the engine takes text and not tokens.
    pub text_input: bool,
    /// Tokens of a block; 0 if not known.
    pub block_size: u64,
    /// Longest prompt and answer together, in tokens; 0 if not known.
    pub context_length: u64,
    /// Whether the engine drafts eagle-style.
    pub eagle: bool,
    /// Blocks of one rank's cache; 0 if not known.
    pub total_kv_blocks: u64,
    /// Tokens that the engine takes into one step; 0 if not known.
    pub max_num_batched_tokens: u64,
    /// Taints, those of its topology included: ascending, each once, as many and
    /// as long as a roster has room for.
    pub taints: Vec<String>,
    /// Taints of the card that are not among them.
    pub taints_left_out: usize,
    /// Number of the first data-parallel rank.
    pub rank_start: u64,
    /// Data-parallel ranks; at least 1.
    pub rank_count: u64,
    /// Whether the worker publishes KV events; cards that do not say count as
    /// publishing.
    pub publishes_events: bool,
    /// Whether its events follow a way that is known here.
    pub known_event_mode: bool,
    /// Name of the LoRA adapter that the card is for, as the engine knows it.
    pub lora: Option<String>,
    /// The kind of its tokenizer.
    pub tokenizer: CardTokenizer,
    /// Its files, in the order of their names.
    pub artifacts: Vec<Artifact>,
    /// Settings of its own, or why they do not count; `None` without any.
    pub router: Option<Result<CardRouter, Refused>>,
}

impl Card {
    /// Reads a card; `None` if it has no name that requests could use.
    #[must_use]
    pub fn read(card: &Value) -> Option<Self> {
        let runtime = |field: &str| number(card, &format!("/runtime_config/{field}"));
        let lengths = [
            runtime("context_length"),
            number(card, "/architectural_max_context_length"),
            number(card, "/context_length"),
        ];
        let mode = text(card, "/runtime_config/kv_event_source_mode");
        let artifacts = artifacts(card);
        let (taints, taints_left_out) = taints(card);
        Some(Self {
            name: name(card, "/display_name")?,
            aliases: aliases(card),
            worker_type: text(card, "/worker_type").map(WorkerType::of),
            needs: needs(card),
            legacy_prefill: text(card, "/model_type").is_some_and(|it| it.contains("Prefill")),
            text_input: text(card, "/model_input") == Some("Text"),
            block_size: number(card, "/kv_cache_block_size").unwrap_or(0),
            context_length: lengths.into_iter().flatten().find(|it| *it > 0).unwrap_or(0),
            eagle: flag(card, "/runtime_config/enable_eagle").unwrap_or(false),
            total_kv_blocks: runtime("total_kv_blocks").unwrap_or(0),
            max_num_batched_tokens: runtime("max_num_batched_tokens").unwrap_or(0),
            taints,
            taints_left_out,
            rank_start: runtime("data_parallel_start_rank").unwrap_or(0),
            rank_count: runtime("data_parallel_size").unwrap_or(1).max(1),
            publishes_events: flag(card, "/runtime_config/kv_event_publishing_enabled")
                .unwrap_or(true),
            known_event_mode: mode.is_none_or(|mode| mode == "framework_v1"),
            lora: name(card, "/lora/name"),
            tokenizer: tokenizer(card, &artifacts),
            artifacts,
            router: CardRouter::read(card),
        })
    }
}

fn flag(card: &Value, pointer: &str) -> Option<bool> {
    card.pointer(pointer)?.as_bool()
}

/// The card's taints, and its place in each domain of the topology as one more
/// taint; then how many could not be taken.
fn taints(card: &Value) -> (Vec<String>, usize) {
    let listed = card.pointer("/runtime_config/taints").and_then(Value::as_array);
    let listed = listed.into_iter().flatten().map(|it| it.as_str().map(str::to_owned));
    let domains = card.pointer("/runtime_config/topology_domains").and_then(Value::as_object);
    let domains = domains.into_iter().flatten().map(|(domain, place)| {
        let place = place.as_str().filter(|place| !place.is_empty() && !domain.is_empty())?;
        Some(format!("{TOPOLOGY_TAINT}{domain}={place}"))
    });
    let mut given: Vec<Option<String>> = listed.chain(domains).collect();
    given.sort_unstable();
    given.dedup_by(|next, one| one.is_some() && next == one);
    let count = given.len();
    let taken: Vec<String> = given
        .into_iter()
        .flatten()
        .filter(|taint| (1..=TAINT_BYTES_MAX).contains(&taint.len()))
        .take(WORKER_TAINTS_MAX)
        .collect();
    let left_out = count - taken.len();
    (taken, left_out)
}

fn aliases(card: &Value) -> Vec<String> {
    let given = card.get("aliases").and_then(Value::as_array).into_iter().flatten();
    let mut aliases: Vec<String> = given
        .filter_map(Value::as_str)
        .filter(|alias| !alias.is_empty() && alias.len() <= CARD_NAME_BYTES_MAX)
        .take(CARD_ALIASES_MAX)
        .map(str::to_owned)
        .collect();
    aliases.sort();
    aliases.dedup();
    aliases
}

/// What cannot be read as a list of lists of words is an alternative that is
/// never met: a need that is not understood must not count as met.
fn needs(card: &Value) -> Vec<Vec<WorkerType>> {
    let alternatives = match card.get("needs") {
        None | Some(Value::Null) => return Vec::new(),
        Some(Value::Array(alternatives)) => alternatives,
        Some(_) => return vec![vec![WorkerType::Unknown]],
    };
    let word = |it: &Value| it.as_str().map_or(WorkerType::Unknown, WorkerType::of);
    let read = |it: &Value| match it.as_array() {
        Some(parts) if parts.len() <= CARD_NEEDS_MAX => parts.iter().map(word).collect(),
        _ => vec![WorkerType::Unknown],
    };
    alternatives.iter().take(CARD_NEEDS_MAX).map(read).collect()
}

/// Where cards name the files that are used, by pointer.
const FILES: [(&str, &str); 5] = [
    ("chat_template.jinja", "/chat_template_file/hf_chat_template"),
    ("chat_template.json", "/chat_template_file/hf_chat_template_json"),
    ("config.json", "/model_info/hf_config_json"),
    ("tokenizer.json", "/tokenizer/hf_tokenizer_json"),
    ("tokenizer_config.json", "/prompt_formatter/hf_tokenizer_config_json"),
];

fn artifacts(card: &Value) -> Vec<Artifact> {
    let extra = card.get("extra_files").and_then(Value::as_array);
    let extra: Vec<&Value> = extra.into_iter().flatten().take(CARD_EXTRA_FILES_MAX).collect();
    let find = |(file_name, pointer): (&'static str, &str)| {
        let named = card.pointer(pointer).and_then(|file| artifact(file_name, file));
        named.or_else(|| {
            let mut extra = extra.iter().filter_map(|file| artifact(file_name, file));
            extra.find(|artifact| artifact.location.rsplit('/').next() == Some(file_name))
        })
    };
    FILES.into_iter().filter_map(find).collect()
}

/// A file of a card: a path or an address, bare, or with a checksum, or within
/// a member `file`.
fn artifact(file_name: &'static str, file: &Value) -> Option<Artifact> {
    let file = file.get("file").unwrap_or(file);
    let location = file.as_str().or_else(|| text(file, "/path"))?;
    let readable = location.starts_with('/') || location.starts_with("http://");
    if !readable || location.len() > CARD_NAME_BYTES_MAX {
        return None;
    }
    let sum = text(file, "/checksum").and_then(|sum| sum.strip_prefix("blake3:"));
    let whole = |sum: &&str| sum.len() == 64 && sum.bytes().all(|byte| byte.is_ascii_hexdigit());
    Some(Artifact {
        file_name,
        location: location.to_owned(),
        blake3: sum.filter(whole).map(str::to_ascii_lowercase),
    })
}

fn tokenizer(card: &Value, artifacts: &[Artifact]) -> CardTokenizer {
    let named = card.get("tokenizer").filter(|it| !it.is_null());
    if artifacts.iter().any(|artifact| artifact.file_name == "tokenizer.json") {
        CardTokenizer::Json
    } else if named.is_some_and(|it| it.get("hf_tokenizer_json").is_some()) {
        CardTokenizer::OtherPlace
    } else if named.is_some() {
        CardTokenizer::OtherKind
    } else {
        CardTokenizer::Missing
    }
}
