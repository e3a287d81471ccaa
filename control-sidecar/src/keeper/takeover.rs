//! Takeover: from a new fleet to the ranks that are followed.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::time::Instant;
use tracing::info;
use warmpath_core::ids::{Worker, WorkerId, WorkerSlot};
use xxhash_rust::xxh3::xxh3_64;

use super::{Followed, Keeper};
use crate::discovery::record::EndpointPath;
use crate::fleet::{Fleet, ListedRank, Problem, SequenceStream};
use crate::replicas::tracker::{Directory, Rank};
use crate::replicas::{self, Known};

impl Keeper {
    pub(super) fn take_fleet(&mut self, mut fleet: Fleet) {
        self.take_models(&mut fleet);
        self.state.set_adapters(fleet.adapters);
        self.problems = fleet.problems;
        let specs: Vec<_> = fleet.ranks.iter().map(|rank| rank.spec.clone()).collect();
        let changes = self.state.set_workers(&specs);
        for (worker, slot) in &changes.removed {
            self.followed.remove(&slot.0);
            self.usages.remove(worker, Instant::now());
        }
        for (worker, _) in &changes.added {
            self.usages.add(*worker);
        }
        self.load_streams.follow(fleet.load_streams, &self.starter);
        let (paths, streams) = (fleet.paths, fleet.sequence_streams);
        let mut slots: BTreeMap<Worker, WorkerSlot> = changes.added.iter().copied().collect();
        let known: BTreeMap<Worker, WorkerSlot> =
            self.state.tracked().map(|tracked| (tracked.spec.worker, tracked.slot)).collect();
        for listed in fleet.ranks {
            let worker = listed.spec.worker;
            let Some(slot) = slots.remove(&worker).or_else(|| known.get(&worker).copied()) else {
                continue;
            };
            let same_stream =
                self.followed.get(&slot.0).is_some_and(|it| it.listed.stream == listed.stream);
            if same_stream {
                if let Some(followed) = self.followed.get_mut(&slot.0) {
                    followed.listed = listed;
                }
                continue;
            }
            if self.followed.contains_key(&slot.0) {
                // Its events come from elsewhere now: learnt anew, and that
                // nobody listened at the old place says nothing any more.
                self.state.clear(slot, true);
                self.state.fence(slot, false);
            }
            let followed = self.follow(slot, listed);
            self.followed.insert(slot.0, followed);
        }
        self.tell_replicas(&paths, streams);
        info!(
            ranks = self.followed.len(),
            added = changes.added.len(),
            removed = changes.removed.len(),
            models = fleet.models.len(),
            problems = self.problems.len(),
            "fleet taken over"
        );
        self.has_list = true;
        // Before anything that names a new slot.
        self.flush();
        self.roster_at = Some(Instant::now());
    }

    /// Numbers the fleet's models, loads the new ones, and turns the ranks'
    /// indices into numbers. Ranks of models beyond the limit are left out.
    fn take_models(&mut self, fleet: &mut Fleet) {
        let assignment = self.catalog.take(&fleet.models);
        for number in &assignment.removed {
            if let Some(task) = self.loading.remove(number) {
                task.abort();
            }
        }
        for number in &assignment.to_load {
            if let Some(spec) = self.catalog.spec(*number) {
                let task = self.loader.start(*number, spec.clone());
                if let Some(before) = self.loading.insert(*number, task) {
                    before.abort();
                }
            }
        }
        if assignment.changes_cards {
            self.cards_have_changed();
        }
        let number_of = |model: u16| assignment.numbers.get(usize::from(model)).copied().flatten();
        for (model, _) in
            fleet.models.iter().zip(&assignment.numbers).filter(|(_, it)| it.is_none())
        {
            fleet.problems.push(Problem { of: model.name.clone(), reason: "too_many_models" });
        }
        self.own_settings.clear();
        for (model, card) in &fleet.settings {
            let Some(number) = number_of(*model) else { continue };
            if let Ok(settings) = self.router.of_card(card) {
                self.own_settings.insert(number, settings);
            } else {
                let name = self.catalog.spec(number).map(|spec| spec.name.clone());
                let of = name.unwrap_or_default();
                fleet.problems.push(Problem { of, reason: "router_config" });
            }
        }
        fleet.ranks.retain_mut(|rank| {
            let number = number_of(rank.spec.model);
            rank.spec.model = number.unwrap_or(rank.spec.model);
            rank.spec.namespace = rank.namespace.as_deref().map_or(0, namespace_number);
            number.is_some()
        });
        fleet.adapters.retain_mut(|adapter| {
            let number = number_of(adapter.model);
            adapter.model = number.unwrap_or(adapter.model);
            number.is_some()
        });
    }

    /// Says which slots stand for whom, and where others speak of requests.
    fn tell_replicas(
        &self,
        paths: &BTreeMap<WorkerId, EndpointPath>,
        streams: Vec<SequenceStream>,
    ) {
        let mut shared: BTreeMap<Option<&EndpointPath>, Arc<EndpointPath>> = BTreeMap::new();
        let ranks: Vec<(WorkerSlot, Rank)> = self
            .state
            .tracked()
            .map(|tracked| {
                let worker = tracked.spec.worker;
                let path = paths.get(&worker.id);
                let path = shared
                    .entry(path)
                    .or_insert_with(|| Arc::new(path.cloned().unwrap_or_else(replicas::own_path)));
                (tracked.slot, Rank { worker, path: Arc::clone(path) })
            })
            .collect();
        let known = Known { directory: Directory::new(ranks), streams };
        self.shared.exchange.known.send_replace(known);
    }

    fn follow(&self, slot: WorkerSlot, listed: ListedRank) -> Followed {
        let (task, view) = self.starter.rank(slot, &listed).unzip();
        Followed {
            listed,
            view,
            task,
            synced: false,
            was_connected: false,
            applied: None,
            last_loss: None,
        }
    }
}

/// A number for a namespace, not 0. Only whether two are the same counts.
fn namespace_number(namespace: &str) -> u32 {
    let hash = xxh3_64(namespace.as_bytes());
    u32::try_from(hash >> 32).unwrap_or(u32::MAX).max(1)
}
