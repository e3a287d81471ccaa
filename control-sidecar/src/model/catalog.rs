//! Catalog: the models of the fleet, each under a number of its own.
//!
//! Rosters refer to models by number. Models come and go while the sidecar
//! runs, so a number stays with its model for as long as the fleet has it, and
//! one that has become free is used again as late as possible: a roster that
//! names the old one may still be on its way. Pure; its owner is the keeper.

use tracing::warn;
use warmpath_core::card::{Blind, Cards, ModelCard};
use warmpath_core::limits::{CARD_MODELS_MAX, FRAME_BODY_BYTES_MAX};

use super::blind_card;
use crate::fleet::ModelSpec;

/// How far a model is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Its files are being fetched or compiled.
    Loading,
    /// Its files cannot be had; tried again. The word says why.
    Failed(&'static str),
    /// Loaded.
    Ready(Box<ModelCard>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    spec: ModelSpec,
    progress: Progress,
}

impl Entry {
    /// Takes over further names, and where the files lie now. Returns whether
    /// they are to be fetched from there.
    fn take(&mut self, spec: &ModelSpec) -> bool {
        let has_moved = self.spec.files != spec.files;
        self.spec = spec.clone();
        self.name_card();
        has_moved && !matches!(self.progress, Progress::Ready(_))
    }

    fn name_card(&mut self) {
        if let Progress::Ready(card) = &mut self.progress {
            card.aliases.clone_from(&self.spec.aliases);
        }
    }
}

/// What a new list of models changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assignment {
    /// The number of each model of the list; `None` beyond
    /// [`CARD_MODELS_MAX`].
    pub numbers: Vec<Option<u16>>,
    /// Numbers of models that want loading: new ones, and those that are not
    /// loaded yet and whose files lie elsewhere now.
    pub to_load: Vec<u16>,
    /// Numbers that have become free.
    pub removed: Vec<u16>,
    /// Whether the cards have changed.
    pub changes_cards: bool,
}

/// All models that are in use.
#[derive(Debug, Default)]
pub struct Catalog {
    /// By number; `None` for a number that is free.
    entries: Vec<Option<Entry>>,
    /// Free numbers, the one that has been free for longest first.
    free: Vec<u16>,
}

impl Catalog {
    /// Takes over a new list of models, the whole of it.
    pub fn take(&mut self, models: &[ModelSpec]) -> Assignment {
        let mut assignment = Assignment::default();
        for (number, entry) in (0_u16..).zip(&mut self.entries) {
            let is_listed = |it: &Entry| models.iter().any(|model| model.is_same_model(&it.spec));
            if entry.as_ref().is_some_and(|it| !is_listed(it)) {
                *entry = None;
                self.free.push(number);
                assignment.removed.push(number);
                assignment.changes_cards = true;
            }
        }
        for spec in models {
            let number = match self.find(spec) {
                Some((number, entry)) => {
                    assignment.changes_cards |= entry.spec.aliases != spec.aliases;
                    if entry.take(spec) {
                        assignment.to_load.push(number);
                    }
                    Some(number)
                }
                None => self.add(spec).inspect(|number| {
                    assignment.to_load.push(*number);
                    assignment.changes_cards = true;
                }),
            };
            assignment.numbers.push(number);
        }
        assignment
    }

    fn find(&mut self, spec: &ModelSpec) -> Option<(u16, &mut Entry)> {
        (0_u16..)
            .zip(&mut self.entries)
            .filter_map(|(number, entry)| Some((number, entry.as_mut()?)))
            .find(|(_, entry)| entry.spec.is_same_model(spec))
    }

    fn add(&mut self, spec: &ModelSpec) -> Option<u16> {
        let entry = Some(Entry { spec: spec.clone(), progress: Progress::Loading });
        if self.entries.len() < CARD_MODELS_MAX {
            self.entries.push(entry);
            return u16::try_from(self.entries.len() - 1).ok();
        }
        if self.free.is_empty() {
            return None;
        }
        let number = self.free.remove(0);
        *self.entries.get_mut(usize::from(number))? = entry;
        Some(number)
    }

    /// What a number stands for.
    #[must_use]
    pub fn spec(&self, number: u16) -> Option<&ModelSpec> {
        self.entries.get(usize::from(number))?.as_ref().map(|entry| &entry.spec)
    }

    /// Takes note of how far a model is; nothing if the number stands for
    /// another by now. Returns whether the cards have changed.
    pub fn progress(&mut self, number: u16, spec: &ModelSpec, progress: Progress) -> bool {
        let entry = self.entries.get_mut(usize::from(number)).and_then(Option::as_mut);
        let Some(entry) = entry.filter(|it| it.spec.is_same_model(spec)) else { return false };
        let before = core::mem::replace(&mut entry.progress, progress);
        entry.name_card();
        before != entry.progress
    }

    /// Whether every model has been tried at least once.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.entries.iter().flatten().all(|entry| entry.progress != Progress::Loading)
    }

    /// Models that are not ready, with a word that says why.
    pub fn unready(&self) -> impl Iterator<Item = (&str, &'static str)> {
        self.entries.iter().flatten().filter_map(|entry| match entry.progress {
            Progress::Loading => Some((entry.spec.name.as_str(), "loading")),
            Progress::Failed(reason) => Some((entry.spec.name.as_str(), reason)),
            Progress::Ready(_) => None,
        })
    }

    /// The cards, by number. A number that is free has a card without a name.
    ///
    /// One frame carries them all: from the last one on, templates that do not
    /// fit are left out.
    #[must_use]
    pub fn cards(&self) -> Cards {
        let models = self.entries.iter().map(|entry| match entry {
            None => free_card(),
            Some(Entry { spec, progress }) => match progress {
                Progress::Ready(card) => (**card).clone(),
                Progress::Loading | Progress::Failed(_) => blind_card(spec, Blind::Loading),
            },
        });
        let mut cards = Cards { models: models.collect() };
        for at in (0..cards.models.len()).rev() {
            if cards.encode().len() <= FRAME_BODY_BYTES_MAX {
                break;
            }
            if let Some(card) = cards.models.get_mut(at).filter(|it| !it.templates.is_empty()) {
                warn!(model = card.name, "the models' templates together are too long; left out");
                card.templates.clear();
            }
        }
        cards
    }
}

fn free_card() -> ModelCard {
    ModelCard {
        name: String::new(),
        aliases: Vec::new(),
        block_size: 1,
        context_length: 0,
        eagle: false,
        flavour: warmpath_core::render::Flavour::Raw,
        tokenizer: Err(Blind::Loading),
        templates: Vec::new(),
        special_tokens: Vec::new(),
        completion_prefix: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CompletionEngine;
    use crate::fleet::{Artifact, ModelFiles};
    use warmpath_core::card::NamedTemplate;
    use warmpath_core::limits::TEMPLATE_BYTES_MAX;

    fn spec(name: &str, block_size: u32) -> ModelSpec {
        ModelSpec {
            name: name.to_owned(),
            aliases: Vec::new(),
            files: ModelFiles::Directory("models".into()),
            block_size,
            context_length: 0,
            eagle: false,
            engine: CompletionEngine::Dynamo,
            hf_tokenizers: false,
        }
    }

    #[test]
    fn a_model_keeps_its_number_while_others_come_and_go() {
        let mut catalog = Catalog::default();
        let first = catalog.take(&[spec("a", 16), spec("b", 16)]);
        assert_eq!((first.numbers, first.to_load), (vec![Some(0), Some(1)], vec![0, 1]));
        // Another generation of `a`, beside the old one and then alone.
        let both = catalog.take(&[spec("a", 32), spec("a", 16), spec("b", 16)]);
        assert_eq!((both.numbers, both.to_load), (vec![Some(2), Some(0), Some(1)], vec![2]));
        let new = catalog.take(&[spec("a", 32), spec("b", 16)]);
        assert_eq!((new.numbers, new.removed), (vec![Some(2), Some(1)], vec![0]));
        let names: Vec<String> = catalog.cards().models.into_iter().map(|it| it.name).collect();
        assert_eq!(names, ["", "b", "a"]);
        // One that comes back is loaded anew, under a number of its own.
        assert_eq!(catalog.take(&[spec("a", 16)]).to_load, [3]);
    }

    fn served_by(host: &str, aliases: &[&str]) -> ModelSpec {
        let artifact = Artifact {
            file_name: "tokenizer.json",
            location: format!("http://{host}/tokenizer.json"),
            blake3: Some("00".into()),
        };
        ModelSpec {
            files: ModelFiles::Artifacts(vec![artifact]),
            aliases: aliases.iter().map(|it| (*it).to_owned()).collect(),
            ..spec("a", 16)
        }
    }

    /// Goal: the worker whose copy of the files was used may go; nothing that is
    /// known of the others' caches is forgotten for it.
    #[test]
    fn a_model_stays_itself_wherever_its_files_lie() {
        let mut catalog = Catalog::default();
        let first = served_by("first", &["b"]);
        assert_eq!(catalog.take(std::slice::from_ref(&first)).to_load, [0]);
        // Not loaded yet: from where they lie now.
        let second = served_by("second", &["b"]);
        let moved = catalog.take(std::slice::from_ref(&second));
        assert_eq!((moved.numbers, moved.to_load), (vec![Some(0)], vec![0]));
        assert!(!moved.changes_cards && moved.removed.is_empty());
        // The late answer from the first place is as good.
        let card = blind_card(&first, Blind::Tokenizer);
        assert!(catalog.progress(0, &first, Progress::Ready(Box::new(card))));
        let third = catalog.take(&[served_by("third", &["c"])]);
        assert_eq!((third.numbers, third.to_load), (vec![Some(0)], Vec::new()));
        assert!(third.changes_cards);
        assert_eq!(catalog.cards().models[0].aliases, ["c"]);
        assert_eq!(catalog.cards().models[0].tokenizer, Err(Blind::Tokenizer));
    }

    #[test]
    fn numbers_are_used_again_only_when_all_have_been_used() {
        let mut catalog = Catalog::default();
        let max = u32::try_from(CARD_MODELS_MAX).unwrap();
        for size in 1..=max {
            let number = catalog.take(&[spec("a", size)]).numbers[0];
            assert_eq!(number.map(u32::from), Some(size - 1));
        }
        // The one that has been free for longest.
        assert_eq!(catalog.take(&[spec("a", max + 1)]).numbers, [Some(0)]);
        let many: Vec<ModelSpec> = (1..=max + 1).map(|size| spec("a", size)).collect();
        let refused = catalog.take(&many).numbers.iter().filter(|it| it.is_none()).count();
        assert_eq!(refused, 1);
    }

    #[test]
    fn what_is_late_for_another_model_is_dropped() {
        let mut catalog = Catalog::default();
        let old = spec("a", 16);
        catalog.take(std::slice::from_ref(&old));
        assert!(!catalog.is_settled());
        assert!(catalog.progress(0, &old, Progress::Failed("unreachable")));
        assert!(catalog.is_settled());
        assert_eq!(catalog.unready().collect::<Vec<_>>(), [("a", "unreachable")]);
        let card = blind_card(&old, Blind::Tokenizer);
        assert!(!catalog.progress(0, &spec("a", 32), Progress::Ready(Box::new(card.clone()))));
        assert_eq!(catalog.cards().models[0].tokenizer, Err(Blind::Loading));
        assert!(catalog.progress(0, &old, Progress::Ready(Box::new(card))));
        assert_eq!(catalog.cards().models[0].tokenizer, Err(Blind::Tokenizer));
    }

    #[test]
    fn templates_that_do_not_fit_one_frame_are_left_out() {
        let mut catalog = Catalog::default();
        let specs: Vec<ModelSpec> = (1..=3).map(|size| spec("a", size)).collect();
        catalog.take(&specs);
        for (number, spec) in (0..).zip(&specs) {
            let source = "x".repeat(TEMPLATE_BYTES_MAX);
            let card = ModelCard {
                templates: vec![NamedTemplate { name: "default".into(), source }],
                ..blind_card(spec, Blind::Tokenizer)
            };
            catalog.progress(number, spec, Progress::Ready(Box::new(card)));
        }
        let cards = catalog.cards();
        let counts: Vec<usize> = cards.models.iter().map(|card| card.templates.len()).collect();
        assert!(cards.encode().len() <= FRAME_BODY_BYTES_MAX);
        assert_eq!(counts, [1, 0, 0]);
    }
}
