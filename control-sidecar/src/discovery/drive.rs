//! Drive: runs a backend and hands on the fleets that come of it.

use std::time::SystemTime;

use tokio::sync::mpsc;
use tokio::time::sleep;

use super::join::{Rules, join};
use super::listing::Listing;
use super::{ListEvent, etcd, file, kubernetes, pods};
use crate::config::ModelConfig;
use crate::config::discovery::{Backend, DiscoveryConfig};
use crate::fleet::Fleet;
use crate::limits::{SIGHT_SETTLES_AFTER, SIGHTS_QUEUED_MAX};

/// What a backend sees at a time, the whole of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sight {
    /// Dynamo's records.
    Records(Listing),
    /// A fleet, from backends without records.
    Fleet(Box<Fleet>),
    /// It cannot be asked, and why; what was seen before stays.
    Failed(String),
}

/// Runs the configured backend until nobody listens.
///
/// - `models`: what is known here of models, by name.
/// - `brokers`: whether events come over ZMQ brokers.
pub async fn run(
    config: DiscoveryConfig,
    models: Vec<ModelConfig>,
    brokers: bool,
    lists: mpsc::Sender<ListEvent>,
) {
    let (sights, queue) = mpsc::channel(SIGHTS_QUEUED_MAX);
    let rules = Rules { namespaces: config.namespaces, frontend: config.frontend, models, brokers };
    let backend = async {
        match config.backend {
            Backend::File(directory) => file::watch(directory, SystemTime::now, sights).await,
            Backend::Etcd { endpoints, user } => etcd::watch(endpoints, user, sights).await,
            Backend::Kubernetes(config) => kubernetes::watch(config, sights).await,
            Backend::Pods(config) => {
                pods::watch(config, rules.models.clone(), sights).await;
            }
        }
    };
    // A backend may wait for hours, so it is not left to notice by itself that
    // nobody listens any more.
    tokio::select! {
        () = backend => {}
        () = settle(queue, &rules, &lists) => {}
        () = lists.closed() => {}
    }
}

/// Turns sights into events for the keeper: those that come close together are
/// one, and what changes nothing is not told.
pub async fn settle(
    mut sights: mpsc::Receiver<Sight>,
    rules: &Rules,
    lists: &mpsc::Sender<ListEvent>,
) {
    let mut told = None;
    while let Some(first) = sights.recv().await {
        for event in settled(first, &mut sights).await.into_events(rules) {
            if told.as_ref() == Some(&event) {
                continue;
            }
            if lists.send(event.clone()).await.is_err() {
                return;
            }
            told = Some(event);
        }
    }
}

/// What came of a moment's sights.
#[derive(Debug, Default)]
struct Settled {
    seen: Option<Sight>,
    failed: Option<String>,
}

impl Settled {
    fn add(&mut self, sight: Sight) {
        match sight {
            Sight::Failed(message) => self.failed = Some(message),
            seen => *self = Self { seen: Some(seen), failed: None },
        }
    }

    /// What was seen, and then the failure that followed it.
    fn into_events(self, rules: &Rules) -> impl Iterator<Item = ListEvent> {
        let seen = self.seen.map(|sight| match sight {
            Sight::Records(listing) => ListEvent::Taken(join(&listing, rules)),
            Sight::Fleet(fleet) => ListEvent::Taken(*fleet),
            Sight::Failed(message) => ListEvent::Refused(message),
        });
        seen.into_iter().chain(self.failed.map(ListEvent::Refused))
    }
}

/// The sights that come within a moment of the first.
async fn settled(first: Sight, sights: &mut mpsc::Receiver<Sight>) -> Settled {
    sleep(SIGHT_SETTLES_AFTER).await;
    let mut settled = Settled::default();
    settled.add(first);
    while let Ok(next) = sights.try_recv() {
        settled.add(next);
    }
    settled
}
