//! Directory: which slots stand for whom.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use warmpath_core::ids::{Worker, WorkerSlot};

use crate::discovery::record::EndpointPath;

/// Where one slot's worker is, and what its events are about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rank {
    /// Who it is.
    pub worker: Worker,
    /// The endpoint that it serves.
    pub path: Arc<EndpointPath>,
}

/// The workers that bookings can be of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    ranks: BTreeMap<u16, Rank>,
    slots: HashMap<Worker, WorkerSlot>,
}

impl Directory {
    /// From slots and who they stand for.
    #[must_use]
    pub fn new(ranks: impl IntoIterator<Item = (WorkerSlot, Rank)>) -> Self {
        let ranks: BTreeMap<u16, Rank> =
            ranks.into_iter().map(|(slot, rank)| (slot.0, rank)).collect();
        let slots = ranks.iter().map(|(slot, rank)| (rank.worker, WorkerSlot(*slot))).collect();
        Self { ranks, slots }
    }

    /// The endpoints that there are workers of.
    #[must_use]
    pub fn paths(&self) -> HashSet<Arc<EndpointPath>> {
        self.ranks.values().map(|rank| Arc::clone(&rank.path)).collect()
    }

    /// Whom a slot stands for.
    #[must_use]
    pub fn at(&self, slot: WorkerSlot) -> Option<&Rank> {
        self.ranks.get(&slot.0)
    }

    /// What stands for a worker.
    #[must_use]
    pub fn slot(&self, worker: Worker) -> Option<WorkerSlot> {
        self.slots.get(&worker).copied()
    }
}
