//! Report: how things stand, for the status page and the metrics.

use std::sync::{Arc, PoisonError};

use warmpath_core::card::Cards;
use warmpath_core::event::Medium;
use warmpath_core::ids::WorkerSlot;
use warmpath_core::roster::{Parity, TierSlots};
use warmpath_core::settings::RouterSettings;

use super::Keeper;
use crate::config::router::RouterConfig;
use crate::fleet::{ListedRank, Problem, RankLoad};
use crate::source::View;
use crate::source::sequence::Loss;
use crate::state::counts::Counts;

/// One rank, for the status page.
#[derive(Clone, Debug)]
pub struct RankReport {
    /// Stands for it in the feed.
    pub slot: WorkerSlot,
    /// What the worker list says.
    pub listed: ListedRank,
    /// Whether it was seen to be dead.
    pub is_fenced: bool,
    /// How well its blocks are known.
    pub parity: Parity,
    /// Stand for its lower tiers.
    pub tiers: TierSlots,
    /// Blocks held on the device.
    pub blocks: usize,
    /// Blocks held in the host's memory, on disks and in external storage.
    pub lower_blocks: [usize; 3],
    /// Blocks of lower tiers that wait for their parents.
    pub orphans: usize,
    /// Pages remembered.
    pub pages: usize,
    /// Number of the last message applied.
    pub applied: Option<u64>,
    /// Why its blocks were last forgotten.
    pub last_loss: Option<Loss>,
    /// What was noticed.
    pub counts: Counts,
    /// Its stream, if it publishes.
    pub view: Option<View>,
    /// How busy it is, as far as it has said.
    pub load: RankLoad,
}

/// How things stand.
#[derive(Clone, Debug)]
pub struct Report {
    /// Every rank, in the order of slots.
    pub ranks: Vec<RankReport>,
    /// The models, by number.
    pub cards: Arc<Cards>,
    /// The settings, of all models.
    pub settings: RouterSettings,
    /// The router's own, and where they come from.
    pub router: Arc<RouterConfig>,
    /// Models that are not ready, each with a word that says why.
    pub models_unready: Vec<(String, &'static str)>,
    /// What discovery could not use.
    pub problems: Vec<Problem>,
    /// What keeps the sidecar from being ready.
    pub unready: Vec<String>,
    /// What was wrong with the last worker list.
    pub list_error: Option<String>,
    /// Updates of sources that wait.
    pub updates_waiting: usize,
}

impl Keeper {
    pub(super) fn report(&self) -> Report {
        let ranks: Vec<RankReport> = self
            .state
            .tracked()
            .filter_map(|tracked| {
                let followed = self.followed.get(&tracked.slot.0)?;
                let has_events = tracked.spec.has_events;
                Some(RankReport {
                    slot: tracked.slot,
                    is_fenced: tracked.is_fenced,
                    listed: followed.listed.clone(),
                    parity: if has_events { tracked.rank.parity() } else { Parity::Blind },
                    tiers: tracked.tiers,
                    blocks: tracked.rank.blocks(Medium::Device),
                    lower_blocks: [Medium::HostPinned, Medium::Disk, Medium::External]
                        .map(|medium| tracked.rank.blocks(medium)),
                    orphans: tracked.rank.orphans(),
                    pages: tracked.rank.pages(),
                    applied: followed.applied,
                    last_loss: followed.last_loss,
                    counts: *tracked.rank.counts(),
                    view: followed
                        .view
                        .as_ref()
                        .map(|view| *view.lock().unwrap_or_else(PoisonError::into_inner)),
                    load: self.usages.of(&tracked.spec.worker),
                })
            })
            .collect();
        let unready = self.unready(&ranks);
        let of = |parity| ranks.iter().filter(|rank| rank.parity == parity).count() as u64;
        self.metrics.set_levels(
            ranks.iter().map(|rank| rank.blocks as u64).sum(),
            [0, 1, 2].map(|tier| {
                ranks.iter().filter_map(|rank| rank.lower_blocks.get(tier)).sum::<usize>() as u64
            }),
            [
                ("exact", of(Parity::Exact)),
                ("unproven", of(Parity::Unproven)),
                ("blind", of(Parity::Blind)),
            ],
            unready.is_empty(),
        );
        Report {
            ranks,
            cards: Arc::clone(&self.cards),
            settings: self.router.with(&self.own_settings),
            router: Arc::clone(&self.router),
            models_unready: self
                .catalog
                .unready()
                .map(|(name, reason)| (name.to_owned(), reason))
                .collect(),
            problems: self.problems.clone(),
            unready,
            list_error: self.list_error.clone(),
            updates_waiting: self.updates.len(),
        }
    }

    fn unready(&self, ranks: &[RankReport]) -> Vec<String> {
        let mut reasons = Vec::new();
        for (model, reason) in self.catalog.unready() {
            reasons.push(format!("model {model}: {reason}"));
        }
        if !self.has_list {
            reasons.push("no_worker_list".to_owned());
        } else if ranks.is_empty() {
            reasons.push("no_workers".to_owned());
        }
        if !self.is_open() {
            reasons.push("synchronising".to_owned());
        }
        for rank in ranks {
            if rank.view.is_some_and(|view| view.standing.repairing) {
                let worker = rank.listed.spec.worker;
                reasons.push(format!("gap: worker {} rank {}", worker.id.0, worker.rank.0));
            }
        }
        reasons
    }
}
