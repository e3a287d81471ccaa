//! Outlet: what a rank's stream tells, to the state and to the state page,
//! whatever the stream speaks.

use std::sync::{Arc, PoisonError};

use tokio::sync::mpsc;
use tracing::info;
use warmpath_core::ids::{Worker, WorkerSlot};

use super::sequence::{Loss, Standing};
use super::{SharedView, Update, View};
use crate::metrics::Metrics;

/// Nobody takes updates any more.
#[derive(Debug)]
pub(super) struct Stopped;

/// One rank's way out.
#[derive(Debug)]
pub(super) struct Outlet {
    pub(super) worker: Worker,
    pub(super) slot: WorkerSlot,
    updates: mpsc::Sender<Update>,
    view: SharedView,
    metrics: Arc<Metrics>,
    /// Whether the end of the first replay has been told.
    synced: bool,
}

impl Outlet {
    pub(super) fn new(
        worker: Worker,
        slot: WorkerSlot,
        updates: mpsc::Sender<Update>,
        view: SharedView,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { worker, slot, updates, view, metrics, synced: false }
    }

    pub(super) async fn send(&self, update: Update) -> Result<(), Stopped> {
        self.updates.send(update).await.map_err(|_| Stopped)
    }

    /// Tells that what is known of the rank is to be forgotten.
    pub(super) async fn clear(&self, loss: Loss) -> Result<(), Stopped> {
        info!(
            worker = self.worker.id.0,
            rank = self.worker.rank.0,
            reason = loss.reason(),
            "rank cleared"
        );
        self.metrics.rank_cleared(loss);
        self.send(Update::Clear(self.slot, loss)).await
    }

    /// Shows how things stand, and tells once that they are in sync.
    pub(super) async fn stand(
        &mut self,
        standing: Standing,
        gaps: u64,
        duplicates: u64,
    ) -> Result<(), Stopped> {
        self.look(|view| {
            view.standing = standing;
            view.gaps = gaps;
            view.duplicates = duplicates;
        });
        if standing.synced && !self.synced {
            self.synced = true;
            self.send(Update::Synced(self.slot)).await?;
        }
        Ok(())
    }

    /// Changes what the state page shows.
    pub(super) fn look(&self, change: impl FnOnce(&mut View)) {
        change(&mut self.view.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
