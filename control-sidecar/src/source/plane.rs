//! Plane: follows one rank on Dynamo's event plane and hands its events on.
//!
//! One task a rank. `hub` brings the messages, whatever carries them; `cursor`
//! puts events into order and says when something is missing; `recovery` asks
//! the worker for it.

pub mod cursor;
pub mod hub;
pub mod recovery;
pub mod request;
mod subjects;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::debug;
use warmpath_core::ids::{Worker, WorkerSlot};

use super::outlet::{Outlet, Stopped};
use super::{SharedView, Transports, Update};
use crate::adapter::plane::answer::Answer;
use crate::adapter::plane::envelope::{Message, Topic};
use crate::adapter::plane::router_event::{RouterEvent, decode_events};
use crate::fleet::{PlaneStream, RecoveryTarget};
use crate::limits::{RECOVERY_AGAIN_AFTER, RECOVERY_JITTER, TAIL_CHECK_AFTER};
use crate::metrics::Metrics;
use cursor::{Action, Cursor, Query};
use hub::{Heard, Link};
use recovery::{Recovery, RecoveryError};

/// Where one rank publishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaneSpec {
    /// Who it is; the only rank that the publisher may speak of.
    pub worker: Worker,
    /// Stands for its incarnation.
    pub slot: WorkerSlot,
    /// Its publisher.
    pub stream: PlaneStream,
}

/// Follows a rank until the task is aborted or nobody takes updates.
pub async fn follow_plane(
    spec: PlaneSpec,
    transports: Transports,
    updates: mpsc::Sender<Update>,
    view: SharedView,
    metrics: Arc<Metrics>,
) {
    let channel = &spec.stream.channel;
    let Transports { hub, recovery, .. } = transports;
    let mut subscription = hub.subscribe(channel, Topic::KvEvents, Some(spec.stream.publisher));
    let outlet = Outlet::new(spec.worker, spec.slot, updates, view, Arc::clone(&metrics));
    let mut follower = Follower {
        cursor: Cursor::new(spec.stream.recovery.is_some()),
        spec,
        recovery,
        outlet,
        metrics,
        query: None,
        connections: 0,
        alive: None,
        evicted: 0,
        check_at: None,
    };
    loop {
        if follower.act().await.is_err() {
            return;
        }
        let check_at = follower.check_at;
        tokio::select! {
            heard = subscription.next() => follower.heard(heard),
            answer = next_answer(&mut follower.query) => follower.answered(answer),
            () = sleep_until(check_at.unwrap_or_else(Instant::now)), if check_at.is_some() => {
                follower.check();
            }
        }
    }
}

struct Follower {
    spec: PlaneSpec,
    cursor: Cursor,
    recovery: Arc<Recovery>,
    outlet: Outlet,
    metrics: Arc<Metrics>,
    query: Option<Asked>,
    /// Connections of the channel that the cursor knows of.
    connections: u64,
    /// Whether the publisher is there, if that has changed and is to be told.
    alive: Option<bool>,
    /// Evictions that have been counted.
    evicted: u64,
    /// When to see whether anything is missing at the end.
    check_at: Option<Instant>,
}

impl Follower {
    fn heard(&mut self, heard: Heard) {
        match heard {
            Heard::Link(link) => self.linked(link),
            // What was dropped may have been the last for long.
            Heard::Lost => self.check_soon(),
            Heard::Message(message) => self.live(&message),
        }
    }

    fn linked(&mut self, link: Link) {
        self.outlet.look(|view| view.failure = link.failure);
        if link.connected && link.connections != self.connections {
            self.connections = link.connections;
            self.alive = Some(true);
            self.cursor.connected(jitter());
            // Publishers take up a subscription when they get to it.
            self.check_soon();
        }
        if !link.connected {
            self.cursor.disconnected();
            if link.gone {
                self.cursor.gone();
                self.alive = Some(false);
            }
        }
    }

    fn live(&mut self, message: &Message) {
        self.outlet.look(|view| view.messages += 1);
        let events = match decode_events(&message.payload) {
            Ok(events) => events,
            Err(error) => {
                // What it said is missing now.
                self.metrics.batch_undecodable(error.reason());
                self.check_soon();
                return;
            }
        };
        if events.iter().any(|event| event.worker != self.spec.worker) {
            // A publisher may change its own rank only.
            self.metrics.plane_dropped("other_worker");
            return;
        }
        self.count_skipped(&events);
        for event in events {
            self.cursor.live(event);
        }
    }

    fn answered(&mut self, (number, outcome): (u64, Result<Answer, RecoveryError>)) {
        self.query = None;
        match outcome {
            Ok(answer) => {
                match &answer {
                    Answer::Events { events, .. } | Answer::Dump { events, .. } => {
                        self.count_skipped(events);
                    }
                    Answer::Refused(refusal) => self.metrics.replay_failed(refusal.reason()),
                    Answer::TooNew { .. } => {}
                }
                self.cursor.answered(number, answer);
            }
            Err(error) => {
                debug!(
                    worker = self.spec.worker.id.0,
                    rank = self.spec.worker.rank.0,
                    %error,
                    "no history"
                );
                self.metrics.replay_failed(error.reason());
                self.cursor.failed(number);
            }
        }
    }

    fn count_skipped(&self, events: &[RouterEvent]) {
        for skip in events.iter().filter_map(|event| event.skipped) {
            self.metrics.event_skipped(skip);
        }
    }

    fn check_soon(&mut self) {
        let soon = Instant::now() + TAIL_CHECK_AFTER;
        self.check_at = Some(self.check_at.map_or(soon, |at| at.min(soon)));
    }

    fn check(&mut self) {
        self.check_at = None;
        if self.cursor.standing().repairing {
            // Not while something is missing anyway.
            self.check_soon();
        } else {
            self.cursor.check();
        }
    }

    /// Does what the cursor wants, and says how things stand afterwards.
    async fn act(&mut self) -> Result<(), Stopped> {
        let slot = self.spec.slot;
        match self.alive.take() {
            Some(true) => self.outlet.send(Update::Connected(slot)).await?,
            Some(false) => self.outlet.send(Update::Refused(slot)).await?,
            None => {}
        }
        for action in self.cursor.actions() {
            match action {
                Action::Apply(id, events) => {
                    self.outlet.send(Update::Events(slot, id, events)).await?;
                }
                Action::Replace(id, events) => {
                    self.outlet.send(Update::Replace(slot, id, events)).await?;
                }
                Action::Clear(loss) => self.outlet.clear(loss).await?,
                Action::StopQuery => self.query = None,
                Action::Query(query) => self.ask(query),
            }
        }
        let standing = self.cursor.standing();
        let (gaps, duplicates) = (self.cursor.gaps(), self.cursor.duplicates());
        self.metrics.plane_evicted(self.cursor.evicted() - self.evicted);
        self.evicted = self.cursor.evicted();
        if standing.partial.is_some() && self.spec.stream.recovery.is_some() {
            self.check_at.get_or_insert_with(|| Instant::now() + RECOVERY_AGAIN_AFTER);
        }
        self.outlet.stand(standing, gaps, duplicates).await
    }

    fn ask(&mut self, query: Query) {
        let Some(target) = self.spec.stream.recovery.clone() else {
            return self.cursor.failed(query.number);
        };
        self.metrics.replay_started();
        let recovery = Arc::clone(&self.recovery);
        self.query = Some(Asked::start(query, target, self.spec.worker, recovery));
    }
}

/// A query under way; dropping it ends it.
#[derive(Debug)]
struct Asked {
    number: u64,
    task: JoinHandle<Result<Answer, RecoveryError>>,
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Asked {
    fn start(
        query: Query,
        target: RecoveryTarget,
        worker: Worker,
        recovery: Arc<Recovery>,
    ) -> Self {
        let task = tokio::spawn(async move {
            sleep(query.after).await;
            recovery.query(&target, worker, query.start).await
        });
        Self { number: query.number, task }
    }
}

/// What becomes of the query under way; waits for ever without one.
async fn next_answer(query: &mut Option<Asked>) -> (u64, Result<Answer, RecoveryError>) {
    match query {
        Some(asked) => {
            let outcome = (&mut asked.task).await;
            (asked.number, outcome.unwrap_or(Err(RecoveryError::Refused)))
        }
        None => std::future::pending().await,
    }
}

/// A wait of random length, so that ranks that appear at once do not ask at
/// once.
fn jitter() -> Duration {
    let random = getrandom::u32().unwrap_or(0);
    RECOVERY_JITTER.mul_f64(f64::from(random) / f64::from(u32::MAX))
}
