//! Models: what a filter VM has loaded of each model to read its prompts.
//!
//! Cards name a model's tokenizer by content; the file arrives later and part
//! by part. Until then the model's requests are routed by load.

use crate::card::{BlobId, Cards, ModelCard, NamedTemplate};
use crate::reason::Reason;
use crate::render::{ChatTemplate, RenderOptions, TemplateForm, TemplateSource};
use crate::tokenize::{AlignedBytes, Tokenizer};

/// One model.
pub struct Model {
    card: ModelCard,
    template: Option<ChatTemplate>,
}

impl Model {
    /// What the sidecar said of it.
    #[must_use]
    pub fn card(&self) -> &ModelCard {
        &self.card
    }

    /// Its chat template; `None` if it has none, or none that compiles.
    #[must_use]
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }
}

enum Loaded {
    Ready(Box<Tokenizer>),
    /// The bytes are no tokenizer that this build can load.
    Refused,
}

/// All models.
#[derive(Default)]
pub struct Models {
    models: Vec<Model>,
    tokenizers: Vec<(BlobId, Loaded)>,
}

impl Models {
    /// Takes over other cards. Tokenizers that are still named stay loaded.
    ///
    /// # Cost
    ///
    /// Compiles the templates, about 0.1 ms each.
    pub fn take_cards(&mut self, cards: &Cards) {
        self.models = cards
            .models
            .iter()
            .map(|card| Model { card: card.clone(), template: compile(card) })
            .collect();
        let named = |blob: &BlobId| cards.models.iter().any(|card| card.tokenizer == Ok(*blob));
        self.tokenizers.retain(|(blob, _)| named(blob));
    }

    /// Tokenizer files that cards name.
    #[must_use]
    pub fn named_blobs(&self) -> Vec<BlobId> {
        let mut blobs: Vec<BlobId> = Vec::new();
        for blob in self.models.iter().filter_map(|model| model.card.tokenizer.ok()) {
            if !blobs.contains(&blob) {
                blobs.push(blob);
            }
        }
        blobs
    }

    /// A tokenizer file that is named and not loaded yet.
    #[must_use]
    pub fn wanted_blob(&self) -> Option<BlobId> {
        self.named_blobs().into_iter().find(|blob| self.loaded(*blob).is_none())
    }

    fn loaded(&self, blob: BlobId) -> Option<&Loaded> {
        self.tokenizers.iter().find(|(id, _)| *id == blob).map(|(_, loaded)| loaded)
    }

    /// Loads a tokenizer file whose content address has been checked. Returns
    /// whether it is one.
    pub fn load(&mut self, blob: BlobId, file: AlignedBytes) -> bool {
        let loaded = match Tokenizer::load(file) {
            Ok(tokenizer) => Loaded::Ready(Box::new(tokenizer)),
            Err(_) => Loaded::Refused,
        };
        let is_ready = matches!(loaded, Loaded::Ready(_));
        self.tokenizers.retain(|(id, _)| *id != blob);
        self.tokenizers.push((blob, loaded));
        is_ready
    }

    /// The model of a name or alias, with its number in rosters.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<(u16, &Model)> {
        (0_u16..).zip(&self.models).find(|(_, model)| {
            model.card.name == name || model.card.aliases.iter().any(|alias| alias == name)
        })
    }

    /// Number of models.
    #[must_use]
    pub fn len(&self) -> usize {
        self.models.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.models.is_empty()
    }

    /// The only model, if there is exactly one.
    #[must_use]
    pub fn only(&self) -> Option<(u16, &Model)> {
        match self.models.as_slice() {
            [model] => Some((0, model)),
            _ => None,
        }
    }

    /// The model of a number in rosters.
    #[must_use]
    pub fn model(&self, number: u16) -> Option<&Model> {
        self.models.get(usize::from(number))
    }

    /// The tokenizer of a model.
    ///
    /// # Errors
    ///
    /// The reason for which its requests are routed by load.
    pub fn tokenizer(&mut self, number: u16) -> Result<&mut Tokenizer, Reason> {
        let model = self.models.get(usize::from(number)).ok_or(Reason::UnknownModel)?;
        let blob = model.card.tokenizer.map_err(|_| Reason::BlindTokenizer)?;
        match self.tokenizers.iter_mut().find(|(id, _)| *id == blob) {
            None => Err(Reason::WarmingModel),
            Some((_, Loaded::Refused)) => Err(Reason::BlindTokenizer),
            Some((_, Loaded::Ready(tokenizer))) => Ok(tokenizer),
        }
    }

    /// Bytes of memory that the tokenizers hold.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.tokenizers
            .iter()
            .map(|(_, loaded)| match loaded {
                Loaded::Ready(tokenizer) => tokenizer.memory_bytes(),
                Loaded::Refused => 0,
            })
            .sum()
    }
}

fn compile(card: &ModelCard) -> Option<ChatTemplate> {
    if card.templates.is_empty() {
        return None;
    }
    let named = |NamedTemplate { name, source }: &NamedTemplate| (name.clone(), source.clone());
    let source = TemplateSource {
        chat_template: TemplateForm::Named(card.templates.iter().map(named).collect()),
        special_tokens: card.special_tokens.clone(),
    };
    let options = RenderOptions { flavour: card.flavour, ..RenderOptions::default() };
    ChatTemplate::compile_with(&source, options).ok()
}
