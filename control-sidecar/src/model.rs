//! Model: a model's directory, as Hugging Face lays it out, to a card.
//!
//! `catalog` numbers the models that the fleet has, `loader` gets their files and
//! loads them. What cannot be read makes that model blind, never the sidecar: its
//! workers are then routed by load.

pub mod cache;
pub mod catalog;
pub mod loader;

use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};
use tracing::{info, warn};
use warmpath_core::card::{Blind, BlobId, ModelCard, NamedTemplate};
use warmpath_core::limits::{
    CARD_ALIASES_MAX, CARD_NAME_BYTES_MAX, CARD_PREFIX_TOKENS_MAX, CARD_TEMPLATES_MAX,
    TEMPLATE_BYTES_MAX, TOKENIZER_BYTES_MAX,
};
use warmpath_core::render::Flavour;
use warmpath_core::tokenize::compile::{CompileError, compile, wrap_json};

use cache::Cache;

use crate::config::CompletionEngine;
use crate::fleet::ModelSpec;
use crate::limits::MODEL_FILE_BYTES_MAX;

/// Names by which templates know special tokens.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A model as filters need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadedModel {
    /// What cards say of it.
    pub card: ModelCard,
    /// The tokenizer that the card names by content.
    pub tokenizer: Option<Vec<u8>>,
}

/// Loads a model from its files.
///
/// - `directory`: as Hugging Face lays it out.
/// - `cache`: where compiled tokenizers are kept.
///
/// # Cost
///
/// Seconds of computing for a large tokenizer that is not in the cache; not for
/// a thread that serves.
#[must_use]
pub fn load(model: &ModelSpec, directory: &Path, cache: &Cache) -> LoadedModel {
    let config = read_json(directory, "tokenizer_config.json").unwrap_or_default();
    let json = read_bytes(directory, "tokenizer.json", TOKENIZER_BYTES_MAX);
    let tokenizer = match &json {
        Ok(bytes) => compile_tokenizer(bytes, model.hf_tokenizers, cache),
        Err(error) => {
            warn!(model = model.name, error, "tokenizer.json cannot be read: the model is blind");
            Err(Blind::Tokenizer)
        }
    };
    let adds_special = model.engine != CompletionEngine::Dynamo;
    let prefix = json.ok().filter(|_| adds_special).map(|bytes| completion_prefix(&bytes));
    let context_length = match model.context_length {
        0 => context_length(&read_json(directory, "config.json").unwrap_or_default()),
        known => known,
    };
    let card = ModelCard {
        context_length,
        tokenizer: tokenizer.as_deref().map(BlobId::of).map_err(|blind| *blind),
        templates: templates(directory, &config),
        special_tokens: special_tokens(directory, &config),
        completion_prefix: prefix.unwrap_or_default(),
        ..blind_card(model, Blind::Loading)
    };
    info!(
        model = card.name,
        tokenizer_bytes = card.tokenizer.map_or(0, |blob| blob.len),
        templates = card.templates.len(),
        "model loaded"
    );
    LoadedModel { card, tokenizer: tokenizer.ok() }
}

/// The card of a model whose files are not there.
#[must_use]
pub fn blind_card(model: &ModelSpec, blind: Blind) -> ModelCard {
    ModelCard {
        name: model.name.clone(),
        aliases: model.aliases.clone(),
        block_size: model.block_size,
        context_length: model.context_length,
        eagle: model.eagle,
        flavour: match model.engine {
            CompletionEngine::Dynamo => Flavour::Dynamo,
            CompletionEngine::Vllm | CompletionEngine::Sglang => Flavour::Vllm,
        },
        tokenizer: Err(blind),
        templates: Vec::new(),
        special_tokens: Vec::new(),
        completion_prefix: Vec::new(),
    }
}

/// Compiles a tokenizer to the form that filters load.
///
/// - `hf_tokenizers`: whether the filters carry HF's own engine, for what the
///   compiler refuses.
fn compile_tokenizer(json: &[u8], hf_tokenizers: bool, cache: &Cache) -> Result<Vec<u8>, Blind> {
    if let Some(file) = cache.find(json) {
        return Ok(file);
    }
    match compile(json) {
        Ok(file) => {
            cache.keep(json, &file);
            Ok(file)
        }
        Err(error @ CompileError::Unsupported(_)) if hf_tokenizers => {
            info!(%error, "the tokenizer is passed on as it is");
            let file = wrap_json(json);
            if file.is_empty() { Err(Blind::Tokenizer) } else { Ok(file) }
        }
        Err(error) => {
            warn!(%error, reason = error.reason(), "no tokenizer: the model is blind");
            Err(match error {
                CompileError::Unsupported(_) => Blind::TokenizerKind,
                _ => Blind::Tokenizer,
            })
        }
    }
}

/// Tokens that the tokenizer's post-processor puts before a text.
///
/// Reads `TemplateProcessing`, `BertProcessing`, `RobertaProcessing`, and
/// sequences of processors; any other adds nothing.
fn completion_prefix(tokenizer_json: &[u8]) -> Vec<u32> {
    /// The rest of the file, megabytes of vocabulary, is passed over.
    #[derive(Default, Deserialize)]
    struct Tokenizer {
        #[serde(default)]
        post_processor: Value,
    }
    let tokenizer: Tokenizer = serde_json::from_slice(tokenizer_json).unwrap_or_default();
    let mut prefix = Vec::new();
    collect_prefix(&tokenizer.post_processor, &mut prefix, 0);
    prefix.truncate(CARD_PREFIX_TOKENS_MAX);
    prefix
}

fn collect_prefix(processor: &Value, prefix: &mut Vec<u32>, depth: u32) {
    const DEPTH_MAX: u32 = 8;
    if depth > DEPTH_MAX {
        return;
    }
    match text(processor, "type") {
        Some("Sequence") => {
            let inner = processor.get("processors").and_then(Value::as_array);
            for processor in inner.into_iter().flatten() {
                collect_prefix(processor, prefix, depth + 1);
            }
        }
        Some("TemplateProcessing") => {
            let pieces = processor.get("single").and_then(Value::as_array);
            for piece in pieces.into_iter().flatten() {
                let Some(special) = piece.get("SpecialToken").and_then(|it| text(it, "id")) else {
                    return;
                };
                let ids = processor
                    .get("special_tokens")
                    .and_then(|tokens| tokens.get(special))
                    .and_then(|token| token.get("ids"))
                    .and_then(Value::as_array);
                prefix.extend(ids.into_iter().flatten().filter_map(token_id));
            }
        }
        Some("BertProcessing" | "RobertaProcessing") => {
            let cls = processor.get("cls").and_then(|pair| pair.get(1));
            prefix.extend(cls.and_then(token_id));
        }
        _ => {}
    }
}

fn token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// Chat templates: files of their own win over the tokenizer's configuration,
/// as in `transformers`.
fn templates(directory: &Path, config: &Map<String, Value>) -> Vec<NamedTemplate> {
    let mut found = Vec::new();
    let file = read_text(directory, "chat_template.jinja");
    let value = match file {
        Some(source) => Some(Value::String(source)),
        None => config.get("chat_template").cloned().filter(|it| !it.is_null()).or_else(|| {
            read_json(directory, "chat_template.json")
                .and_then(|mut map| map.remove("chat_template"))
        }),
    };
    match value {
        Some(Value::String(source)) => push_template(&mut found, "default", source),
        Some(Value::Array(named)) => {
            for template in named {
                let name = text(&template, "name").map(str::to_owned);
                let source = text(&template, "template").map(str::to_owned);
                if let (Some(name), Some(source)) = (name, source) {
                    push_template(&mut found, &name, source);
                }
            }
        }
        _ => {}
    }
    let mut more: Vec<_> = std::fs::read_dir(directory.join("additional_chat_templates"))
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "jinja"))
        .collect();
    more.sort();
    for path in more {
        let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let source = path
            .parent()
            .zip(path.file_name())
            .and_then(|(directory, name)| read_text(directory, &name.to_string_lossy()));
        if let (Some(name), Some(source)) = (name, source) {
            push_template(&mut found, &name, source);
        }
    }
    found
}

fn push_template(found: &mut Vec<NamedTemplate>, name: &str, source: String) {
    let fits = source.len() <= TEMPLATE_BYTES_MAX
        && name.len() <= CARD_NAME_BYTES_MAX
        && found.len() < CARD_TEMPLATES_MAX;
    if !fits {
        warn!(template = name, "a chat template is above its limits and is left out");
    } else if found.iter().all(|template| template.name != name) {
        found.push(NamedTemplate { name: name.to_owned(), source });
    }
}

/// Special tokens by the names that templates know them by. The tokenizer's
/// configuration wins over the older file for them.
fn special_tokens(directory: &Path, config: &Map<String, Value>) -> Vec<(String, String)> {
    let older = read_json(directory, "special_tokens_map.json").unwrap_or_default();
    let mut tokens = Vec::new();
    for name in SPECIAL_TOKENS {
        // Named and nil is known to be absent.
        let value = config.get(name).or_else(|| older.get(name));
        if let Some(content) = value.and_then(token_text) {
            tokens.push((name.to_owned(), content.to_owned()));
        }
    }
    let extra = config.get("extra_special_tokens").and_then(Value::as_object);
    for (name, value) in extra.into_iter().flatten() {
        if let Some(content) = token_text(value) {
            tokens.push((name.clone(), content.to_owned()));
        }
    }
    tokens.retain(|(name, content)| {
        name.len() <= CARD_NAME_BYTES_MAX && content.len() <= CARD_NAME_BYTES_MAX
    });
    tokens.truncate(CARD_ALIASES_MAX);
    tokens
}

/// A token is a text, or a map with its `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| text(value, "content"))
}

fn context_length(config: &Map<String, Value>) -> u32 {
    let own = config.get("max_position_embeddings");
    let of_text = config.get("text_config").and_then(|text| text.get("max_position_embeddings"));
    own.or(of_text).and_then(token_id).unwrap_or(0)
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key).and_then(Value::as_str)
}

fn read_json(directory: &Path, name: &str) -> Option<Map<String, Value>> {
    let bytes = read_bytes(directory, name, MODEL_FILE_BYTES_MAX).ok()?;
    let parsed = serde_json::from_slice(&bytes);
    if parsed.is_err() {
        warn!(file = name, "not a JSON object; ignored");
    }
    parsed.ok()
}

fn read_text(directory: &Path, name: &str) -> Option<String> {
    String::from_utf8(read_bytes(directory, name, MODEL_FILE_BYTES_MAX).ok()?).ok()
}

fn read_bytes(directory: &Path, name: &str, bytes_max: u64) -> Result<Vec<u8>, String> {
    let file = std::fs::File::open(directory.join(name)).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    let read = file.take(bytes_max + 1).read_to_end(&mut bytes);
    read.map_err(|error| error.to_string())?;
    if bytes.len() as u64 > bytes_max {
        return Err(format!("longer than {bytes_max} bytes"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
