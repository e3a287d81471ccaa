//! Models: what a filter VM has loaded of each model to read its prompts.
//!
//! Cards name a model's tokenizer by content; the file arrives later and part
//! by part. Until then the model's requests are routed by load.
//!
//! Several models may have one name: generations of it during a rollout. One
//! without a name stands for a number that is free; nothing finds it.

use std::rc::Rc;

use crate::card::{Blind, BlobId, Cards, ModelCard, NamedTemplate};
use crate::prefix::PrefixCache;
use crate::reason::Reason;
use crate::render::{ChatTemplate, RenderOptions, TemplateForm, TemplateSource};
use crate::tokenize::{AlignedBytes, Tokenizer};

/// One model.
pub struct Model {
    card: ModelCard,
    template: Option<Rc<ChatTemplate>>,
}

impl Model {
    /// What the sidecar said of it.
    #[must_use]
    pub fn card(&self) -> &ModelCard {
        &self.card
    }

    /// Whether it only stands for a number that is free.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.card.name.is_empty()
    }

    /// Its chat template.
    ///
    /// # Errors
    ///
    /// The reason for which chats are routed by load: it has none, or none that
    /// compiles, or its files are still on their way.
    pub fn template(&self) -> Result<&ChatTemplate, Reason> {
        self.template.as_deref().ok_or(match self.card.tokenizer {
            Err(Blind::Loading) => Reason::WarmingModel,
            _ => Reason::BlindTemplate,
        })
    }
}

enum Loaded {
    /// It, and a number that no other one has or had.
    Ready(Box<Tokenizer>, u32),
    /// The bytes are no tokenizer that this build can load.
    Refused,
}

/// All models.
#[derive(Default)]
pub struct Models {
    models: Vec<Model>,
    tokenizers: Vec<(BlobId, Loaded)>,
    /// Tokenizers loaded so far.
    loads: u32,
    prefixes: PrefixCache,
}

/// What a prompt is tokenized with.
pub(crate) struct Reader<'a> {
    /// The model's tokenizer, perhaps shared with others.
    pub(crate) tokenizer: &'a mut Tokenizer,
    /// A number that no other tokenizer has or had.
    pub(crate) number: u32,
    /// The beginnings that any tokenizer has read before.
    pub(crate) prefixes: &'a mut PrefixCache,
}

impl Models {
    /// Takes over other cards. Tokenizers that are still named stay loaded, and
    /// templates that are the same stay compiled.
    ///
    /// # Cost
    ///
    /// Compiles the templates that are new, about 0.1 ms each.
    pub fn take_cards(&mut self, cards: &Cards) {
        let old = core::mem::take(&mut self.models);
        for card in &cards.models {
            let known = old.iter().chain(&self.models).find(|m| has_same_templates(&m.card, card));
            let template = match known {
                Some(model) => model.template.clone(),
                None => compile(card).map(Rc::new),
            };
            self.models.push(Model { card: card.clone(), template });
        }
        let named = self.named_blobs();
        self.tokenizers.retain(|(blob, _)| named.contains(blob));
    }

    /// Tokenizer files that cards name.
    #[must_use]
    pub fn named_blobs(&self) -> Vec<BlobId> {
        let mut blobs: Vec<BlobId> = Vec::new();
        for blob in self.present().filter_map(|(_, model)| model.card.tokenizer.ok()) {
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
            Ok(tokenizer) => Loaded::Ready(Box::new(tokenizer), self.loads),
            Err(_) => Loaded::Refused,
        };
        self.loads = self.loads.wrapping_add(1);
        let is_ready = matches!(loaded, Loaded::Ready(..));
        self.tokenizers.retain(|(id, _)| *id != blob);
        self.tokenizers.push((blob, loaded));
        is_ready
    }

    /// Models with their numbers in rosters; free numbers are left out.
    fn present(&self) -> impl Iterator<Item = (u16, &Model)> {
        (0_u16..).zip(&self.models).filter(|(_, model)| !model.is_free())
    }

    /// Numbers of the models of a name or alias: its generations.
    #[must_use]
    pub fn find(&self, name: &str) -> Vec<u16> {
        let is_named =
            |card: &ModelCard| card.name == name || card.aliases.iter().any(|a| a == name);
        self.present()
            .filter(|(_, model)| is_named(&model.card))
            .map(|(number, _)| number)
            .collect()
    }

    /// Numbers of the generations of the only model; none if there are several
    /// models.
    #[must_use]
    pub fn only(&self) -> Vec<u16> {
        match self.present().next() {
            Some((_, first)) if self.present().all(|(_, m)| m.card.name == first.card.name) => {
                self.present().map(|(number, _)| number).collect()
            }
            _ => Vec::new(),
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
        self.reader(number).map(|reader| reader.tokenizer)
    }

    /// The tokenizer of a model, and what is known of texts that it has read.
    ///
    /// # Errors
    ///
    /// As [`Self::tokenizer`].
    pub(crate) fn reader(&mut self, number: u16) -> Result<Reader<'_>, Reason> {
        let model = self.models.get(usize::from(number)).ok_or(Reason::UnknownModel)?;
        let blob = model.card.tokenizer.map_err(|blind| match blind {
            Blind::Tokenizer | Blind::TokenizerKind => Reason::BlindTokenizer,
            Blind::Loading => Reason::WarmingModel,
        })?;
        match self.tokenizers.iter_mut().find(|(id, _)| *id == blob) {
            None => Err(Reason::WarmingModel),
            Some((_, Loaded::Refused)) => Err(Reason::BlindTokenizer),
            Some((_, Loaded::Ready(tokenizer, number))) => {
                Ok(Reader { tokenizer, number: *number, prefixes: &mut self.prefixes })
            }
        }
    }

    /// What is known of texts that were read before. It is off until a cache with
    /// room takes the place of the first one.
    #[must_use]
    pub fn prefixes(&self) -> &PrefixCache {
        &self.prefixes
    }

    /// The same, to be set up.
    pub fn prefixes_mut(&mut self) -> &mut PrefixCache {
        &mut self.prefixes
    }

    /// Bytes of memory that the tokenizers hold.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.tokenizers
            .iter()
            .map(|(_, loaded)| match loaded {
                Loaded::Ready(tokenizer, _) => tokenizer.memory_bytes(),
                Loaded::Refused => 0,
            })
            .sum()
    }
}

/// Whether [`compile`] makes the same of both.
fn has_same_templates(a: &ModelCard, b: &ModelCard) -> bool {
    a.templates == b.templates && a.special_tokens == b.special_tokens && a.flavour == b.flavour
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::Flavour;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn card(name: &str, template: &str) -> ModelCard {
        ModelCard {
            name: name.to_owned(),
            aliases: Vec::new(),
            block_size: 16,
            context_length: 0,
            eagle: false,
            flavour: Flavour::Vllm,
            tokenizer: Ok(BlobId::of(template.as_bytes())),
            templates: vec![NamedTemplate { name: "default".into(), source: template.into() }],
            special_tokens: Vec::new(),
            completion_prefix: Vec::new(),
        }
    }

    fn take(models: &mut Models, cards: &[ModelCard]) {
        models.take_cards(&Cards { models: cards.to_vec() });
    }

    #[test]
    fn generations_share_a_name() {
        let mut models = Models::default();
        let alias = ModelCard { aliases: vec!["a".into()], ..card("other", "z") };
        take(&mut models, &[card("a", "x"), card("b", "x"), card("a", "y"), alias]);
        assert_eq!(models.find("a"), [0, 2, 3]);
        assert_eq!(models.find("b"), [1]);
        assert!(models.find("c").is_empty() && models.only().is_empty());
        take(&mut models, &[card("a", "x"), card("a", "y")]);
        assert_eq!(models.only(), [0, 1]);
    }

    #[test]
    fn nothing_finds_a_number_that_is_free() {
        let mut models = Models::default();
        let free = ModelCard { aliases: vec!["a".into(), String::new()], ..card("", "x") };
        take(&mut models, &[free, card("b", "y")]);
        assert!(models.find("a").is_empty() && models.find("").is_empty());
        assert_eq!((models.find("b"), models.only()), (vec![1], vec![1]));
        assert_eq!(models.named_blobs(), [BlobId::of(b"y")]);
    }

    /// Goal: a card frame costs nothing for models that stay as they are.
    #[test]
    fn what_stays_the_same_stays_loaded() {
        let mut models = Models::default();
        take(&mut models, &[card("a", "x"), card("b", "y")]);
        models.load(BlobId::of(b"x"), AlignedBytes::zeroed(0));
        let compiled = |models: &Models, number| {
            let template = models.models.get(usize::from(number)).unwrap().template.clone();
            Rc::as_ptr(&template.unwrap())
        };
        let (x, y) = (compiled(&models, 0_u16), compiled(&models, 1));
        take(&mut models, &[card("", "w"), card("a", "x"), card("b", "z"), card("a", "x")]);
        assert_eq!((compiled(&models, 1), compiled(&models, 3)), (x, x));
        assert_ne!(compiled(&models, 2), y);
        assert_eq!(models.wanted_blob(), Some(BlobId::of(b"z")), "x is not wanted again");
    }

    #[test]
    fn files_on_their_way_are_no_blindness() {
        let mut models = Models::default();
        let loading =
            ModelCard { tokenizer: Err(Blind::Loading), templates: Vec::new(), ..card("a", "") };
        take(&mut models, &[loading]);
        assert_eq!(models.tokenizer(0).err(), Some(Reason::WarmingModel));
        assert_eq!(models.model(0).unwrap().template().err(), Some(Reason::WarmingModel));
    }
}
