//! Models: cards to models and adapters.
//!
//! Two cards are one model if all that decides how a prompt becomes blocks is
//! equal: name, files' checksums, block size, drafting and longest context.
//! Where the files lie is not part of it: every worker serves its own copy.

use std::collections::{BTreeMap, HashMap};

use warmpath_core::hash::BlockShape;
use warmpath_core::ids::WorkerId;
use warmpath_core::limits::{CARD_ALIASES_MAX, CARD_MODELS_MAX};

use super::super::card::{Card, CardTokenizer, WorkerType};
use super::super::listing::Problems;
use super::{Listed, ModelAt, Unit};
use crate::config::router::card::CardRouter;
use crate::config::{BLOCK_SIZE_MAX, CompletionEngine, ModelConfig};
use crate::fleet::{AdapterSpec, Artifact, ModelFiles, ModelSpec};
use crate::limits::FLEET_ADAPTERS_MAX;

/// What tells models apart.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Identity {
    name: String,
    files: Files,
    block_size: u32,
    eagle: bool,
    context_length: u32,
}

#[derive(Debug, PartialEq, Eq, Hash)]
enum Files {
    /// The configuration's.
    Own,
    /// Name and checksum of each; the place where there is no checksum.
    Sums(Vec<(&'static str, String)>),
}

/// The models found so far.
#[derive(Debug)]
pub(super) struct Models<'a> {
    configured: &'a [ModelConfig],
    by_identity: HashMap<Identity, (u16, bool)>,
    specs: Vec<ModelSpec>,
    settings: BTreeMap<u16, Brought>,
}

/// The settings that a model's workers bring.
#[derive(Clone, Copy, Debug)]
struct Brought {
    /// Whether only prefill workers have been seen.
    by_prefill: bool,
    settings: Option<CardRouter>,
}

impl<'a> Models<'a> {
    /// None yet.
    pub(super) fn new(configured: &'a [ModelConfig]) -> Self {
        Self {
            configured,
            by_identity: HashMap::new(),
            specs: Vec::new(),
            settings: BTreeMap::new(),
        }
    }

    /// The model of a unit's card; `None` if there are too many models.
    pub(super) fn of(&mut self, unit: &Unit<'_>, problems: &mut Problems) -> Option<ModelAt> {
        let model = self.find(unit, problems)?;
        self.take_settings(model.at, unit, problems);
        Some(model)
    }

    /// One model has one set of settings here: that of the workers that answer.
    /// Dynamo lets prefill workers have another.
    fn take_settings(&mut self, at: u16, unit: &Unit<'_>, problems: &mut Problems) {
        let settings = match unit.card.router {
            Some(Err(reason)) => {
                problems.add(&unit.label(), reason);
                None
            }
            Some(Ok(settings)) => Some(settings),
            None => None,
        };
        let by_prefill = unit.worker_type() == WorkerType::Prefill;
        let brought = Brought { by_prefill, settings };
        let known = *self.settings.entry(at).or_insert(brought);
        if known.by_prefill && !by_prefill {
            self.settings.insert(at, brought);
        }
        // A prefill worker without settings follows those of the others.
        let has_other = known.settings != settings;
        let follows = |it: &Brought| it.by_prefill && it.settings.is_none();
        if has_other && !follows(&known) && !follows(&brought) {
            problems.add(&unit.label(), "router_config_differs");
        }
    }

    fn find(&mut self, unit: &Unit<'_>, problems: &mut Problems) -> Option<ModelAt> {
        let card = unit.card;
        let own = self
            .configured
            .iter()
            .find(|model| model.name == card.name || model.aliases.contains(&card.name));
        let size = block_size(card, own);
        if size.is_none() {
            problems.add(&unit.label(), "block_size_unknown");
        }
        if let Some(reason) = unreadable(card).filter(|_| own.is_none()) {
            problems.add(&unit.label(), reason);
        }
        let files = match own {
            Some(own) => ModelFiles::Directory(own.directory.clone()),
            // Without files the model is blind, and costs nothing.
            None if size.is_none() || card.text_input => ModelFiles::Artifacts(Vec::new()),
            None => ModelFiles::Artifacts(card.artifacts.clone()),
        };
        let context_length = u32::try_from(card.context_length).unwrap_or(u32::MAX);
        let identity = Identity {
            name: card.name.clone(),
            files: sums(&files),
            block_size: size.unwrap_or(0),
            eagle: card.eagle,
            context_length,
        };
        let shape = BlockShape { block_size: size.unwrap_or(1), eagle: card.eagle };
        if let Some((at, blocks)) = self.by_identity.get(&identity) {
            let found = ModelAt { at: *at, shape, blocks: *blocks };
            if let Some(spec) = self.specs.get_mut(usize::from(found.at)) {
                add_aliases(spec, &card.aliases);
            }
            return Some(found);
        }
        let at = u16::try_from(self.specs.len()).ok();
        let Some(at) = at.filter(|at| usize::from(*at) < CARD_MODELS_MAX) else {
            problems.add(&unit.label(), "too_many_models");
            return None;
        };
        let mut spec = ModelSpec {
            name: card.name.clone(),
            aliases: own.map(|own| own.aliases.clone()).unwrap_or_default(),
            files,
            block_size: shape.block_size,
            context_length,
            eagle: card.eagle,
            engine: CompletionEngine::Dynamo,
            hf_tokenizers: own.is_some_and(|own| own.hf_tokenizers),
        };
        add_aliases(&mut spec, &card.aliases);
        self.specs.push(spec);
        self.by_identity.insert(identity, (at, size.is_some()));
        Some(ModelAt { at, shape, blocks: size.is_some() })
    }

    /// All models, in the order of their numbers, and the settings that their
    /// workers bring.
    pub(super) fn into_parts(self) -> (Vec<ModelSpec>, BTreeMap<u16, CardRouter>) {
        let settings = self.settings.into_iter();
        let settings = settings.filter_map(|(at, brought)| Some((at, brought.settings?)));
        (self.specs, settings.collect())
    }
}

/// The card's block size, else the configuration's; `None` if neither has one.
fn block_size(card: &Card, own: Option<&ModelConfig>) -> Option<u32> {
    match card.block_size {
        0 => own.map(|own| own.block_size),
        size if size <= BLOCK_SIZE_MAX => u32::try_from(size).ok(),
        _ => None,
    }
}

/// Why prompts cannot become tokens by the card's own files.
fn unreadable(card: &Card) -> Option<&'static str> {
    match card.tokenizer {
        _ if card.text_input => Some("text_input"),
        CardTokenizer::Json => None,
        CardTokenizer::OtherKind => Some("tokenizer_kind"),
        CardTokenizer::OtherPlace => Some("artifact_location"),
        CardTokenizer::Missing => Some("no_tokenizer"),
    }
}

fn sums(files: &ModelFiles) -> Files {
    match files {
        ModelFiles::Directory(_) => Files::Own,
        ModelFiles::Artifacts(artifacts) => {
            let sum = |it: &Artifact| it.blake3.clone().unwrap_or_else(|| it.location.clone());
            Files::Sums(artifacts.iter().map(|it| (it.file_name, sum(it))).collect())
        }
    }
}

fn add_aliases(spec: &mut ModelSpec, aliases: &[String]) {
    for alias in aliases {
        let known = *alias == spec.name || spec.aliases.contains(alias);
        if !known && spec.aliases.len() < CARD_ALIASES_MAX {
            spec.aliases.push(alias.clone());
        }
    }
}

/// The adapters that listed workers hold.
pub(super) fn adapters(
    units: &[Unit<'_>],
    listed: &HashMap<WorkerId, Listed<'_>>,
    problems: &mut Problems,
) -> Vec<AdapterSpec> {
    let mut holders: BTreeMap<(&str, u16, &str), Vec<WorkerId>> = BTreeMap::new();
    for unit in units {
        let Some(lora) = &unit.card.lora else { continue };
        let id = WorkerId(unit.instance);
        let Some(base) = listed.get(&id).filter(|base| base.path == unit.path) else {
            problems.add(&format!("{} {}", unit.label(), unit.card.name), "adapter_without_base");
            continue;
        };
        let key = (unit.card.name.as_str(), base.model, lora.as_str());
        if !holders.contains_key(&key) && holders.len() >= FLEET_ADAPTERS_MAX {
            problems.add("adapters", "too_many_adapters");
            continue;
        }
        let ids = holders.entry(key).or_default();
        // Units are in order, so an instance's repeat is its last.
        if ids.last() != Some(&id) {
            ids.push(id);
        }
    }
    let adapter = |((name, model, lora), holders): ((&str, u16, &str), Vec<WorkerId>)| {
        AdapterSpec { name: name.to_owned(), model, lora: lora.to_owned(), holders }
    };
    holders.into_iter().map(adapter).collect()
}
