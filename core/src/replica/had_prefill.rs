//! Had prefill: which models have ever had prefill workers, so that a decode
//! worker that serves alone can be told from one whose prefill workers are gone.

use std::collections::BTreeSet;

use crate::card::Cards;
use crate::limits::CARD_MODELS_MAX;
use crate::roster::{Role, Roster};

/// Numbers of models, at most [`CARD_MODELS_MAX`] of them.
#[derive(Debug, Default)]
pub(super) struct HadPrefill(BTreeSet<u16>);

impl HadPrefill {
    /// Notes the models that have prefill workers now.
    pub(super) fn note(&mut self, roster: &Roster) {
        let of_prefill = roster.workers.iter().filter(|entry| entry.role == Role::Prefill);
        let models = of_prefill.map(|entry| entry.model);
        self.0.extend(models.filter(|model| usize::from(*model) < CARD_MODELS_MAX));
    }

    /// Forgets the numbers that stand for another model in the new cards.
    pub(super) fn renumber(&mut self, old: &Cards, new: &Cards) {
        let name = |cards: &Cards, number: u16| {
            cards.models.get(usize::from(number)).map(|card| card.name.clone())
        };
        self.0.retain(|number| name(old, *number) == name(new, *number));
    }

    /// Whether a model has had any.
    pub(super) fn of(&self, model: u16) -> bool {
        self.0.contains(&model)
    }
}
