//! Start: one task for each stream of a fleet, whatever it speaks.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tracing::warn;
use warmpath_core::ids::WorkerSlot;

use super::load::follow_load;
use super::plane::{PlaneSpec, follow_plane};
use super::pull::{PullSpec, follow_pull};
use super::zmq::{StreamSpec, follow};
use super::{SharedView, Transports, Update, new_view};
use crate::fleet::{ListedRank, LoadStream, RankStream};
use crate::limits::LOAD_STREAMS_MAX;
use crate::metrics::Metrics;

/// A task that follows a stream; dropping it ends it.
#[derive(Debug)]
pub struct Following(AbortHandle);

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What every stream needs.
#[derive(Clone, Debug)]
pub struct Starter {
    /// What streams of several ranks share.
    pub transports: Transports,
    /// Where updates go in.
    pub updates: mpsc::Sender<Update>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

impl Starter {
    /// Starts to follow a rank; `None` if it does not say what its cache holds.
    ///
    /// - `slot`: stands for its incarnation.
    #[must_use]
    pub fn rank(&self, slot: WorkerSlot, listed: &ListedRank) -> Option<(Following, SharedView)> {
        let worker = listed.spec.worker;
        let view = new_view();
        let (seen, updates) = (Arc::clone(&view), self.updates.clone());
        let metrics = Arc::clone(&self.metrics);
        let task = match listed.stream.as_ref()? {
            RankStream::Engine(stream) => {
                let spec = StreamSpec {
                    worker,
                    slot,
                    engine: stream.engine,
                    events: stream.events.clone(),
                    replay: stream.replay.clone(),
                    strict_rank: stream.one_of_many,
                };
                tokio::spawn(follow(spec, updates, seen, metrics))
            }
            RankStream::Plane(stream) => {
                let spec = PlaneSpec { worker, slot, stream: stream.clone() };
                let transports = self.transports.clone();
                tokio::spawn(follow_plane(spec, transports, updates, seen, metrics))
            }
            RankStream::Pull(stream) => {
                let block_size = listed.spec.shape.block_size;
                let spec = PullSpec { worker, slot, url: stream.url.clone(), block_size };
                let pulls = Arc::clone(&self.transports.pulls);
                tokio::spawn(follow_pull(spec, pulls, updates, seen, metrics))
            }
        };
        Some((Following(task.abort_handle()), view))
    }

    fn load(&self, stream: LoadStream) -> Following {
        let hub = Arc::clone(&self.transports.hub);
        let work = follow_load(stream, hub, self.updates.clone(), Arc::clone(&self.metrics));
        Following(tokio::spawn(work).abort_handle())
    }
}

/// The load streams that are followed.
#[derive(Debug, Default)]
pub struct Loads(HashMap<LoadStream, Following>);

impl Loads {
    /// Follows the streams of a new fleet, and no others any more.
    pub fn follow(&mut self, streams: Vec<LoadStream>, starter: &Starter) {
        let mut before = core::mem::take(&mut self.0);
        for stream in streams {
            if self.0.len() >= LOAD_STREAMS_MAX {
                warn!("there are too many load streams; the last are left out");
                starter.metrics.load_dropped("too_many_streams");
                return;
            }
            let task = before.remove(&stream).unwrap_or_else(|| starter.load(stream.clone()));
            self.0.insert(stream, task);
        }
    }
}
