//! Pull: follows ranks of TensorRT-LLM servers that give events out when asked.
//!
//! Asking empties the server's buffer, so there is one task a server, whose
//! answers all of its ranks share, and one task a rank, which puts that rank's
//! events into order. What is missing cannot be had again: it clears the rank.

mod order;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use reqwest::Client;
use reqwest::redirect::Policy;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use warmpath_core::ids::{Worker, WorkerSlot};

use super::outlet::{Outlet, Stopped};
use super::{SharedView, Update};
use crate::adapter::trtllm::{PulledEvent, decode_pulled};
use crate::limits::{PULL_ANSWERS_QUEUED, PULL_BYTES_MAX, PULL_EVERY, PULL_TIMEOUT};
use crate::metrics::Metrics;
use order::{Action, Order};

/// Where one rank's events are had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PullSpec {
    /// Who it is.
    pub worker: Worker,
    /// Stands for its incarnation.
    pub slot: WorkerSlot,
    /// Base URL of its server.
    pub url: String,
    /// Tokens of one block.
    pub block_size: u32,
}

/// What a look at a server's buffer brought.
#[derive(Clone, Debug)]
enum Pulled {
    /// The buffer's contents, as they came.
    Body(Arc<Vec<u8>>),
    /// Nothing, for this reason.
    Failed(Why),
}

/// Why a look brought nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// Nobody listens at the address: the process is gone.
    Gone,
    /// Any other reason; whether the buffer was emptied is not known.
    Failed(&'static str),
}

impl Why {
    fn reason(self) -> &'static str {
        match self {
            Self::Gone => "connect",
            Self::Failed(reason) => reason,
        }
    }

    fn of(error: &reqwest::Error) -> Self {
        if error.is_connect() {
            Self::Gone
        } else if error.is_timeout() {
            Self::Failed("timeout")
        } else {
            Self::Failed("network")
        }
    }
}

/// The servers whose buffers are emptied; one for the whole sidecar.
#[derive(Debug)]
pub struct Pulls {
    servers: Arc<Mutex<HashMap<String, broadcast::Sender<Pulled>>>>,
    metrics: Arc<Metrics>,
}

impl Pulls {
    /// Asks nobody yet.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { servers: Arc::default(), metrics }
    }

    /// Shares a server's answers, and starts to ask it if nobody does.
    fn listen(&self, url: &str) -> broadcast::Receiver<Pulled> {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answers) = servers.get(url) {
            return answers.subscribe();
        }
        let (sender, answers) = broadcast::channel(PULL_ANSWERS_QUEUED);
        servers.insert(url.to_owned(), sender.clone());
        let server = Server {
            url: url.to_owned(),
            answers: sender,
            servers: Arc::clone(&self.servers),
            metrics: Arc::clone(&self.metrics),
        };
        tokio::spawn(server.ask());
        answers
    }
}

/// One server that is asked.
struct Server {
    url: String,
    answers: broadcast::Sender<Pulled>,
    servers: Arc<Mutex<HashMap<String, broadcast::Sender<Pulled>>>>,
    metrics: Arc<Metrics>,
}

impl Server {
    /// Asks until no rank listens.
    async fn ask(self) {
        let address = format!("{}/kv_cache_events", self.url.trim_end_matches('/'));
        let client =
            Client::builder().timeout(PULL_TIMEOUT).no_proxy().redirect(Policy::none()).build();
        // Not at once: all ranks of a server are to share its first answer.
        let mut ticks = interval_at(Instant::now() + PULL_EVERY, PULL_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if self.is_left() {
                return;
            }
            let outcome = match &client {
                Ok(client) => look(client, &address).await,
                Err(_) => Err(Why::Failed("client")),
            };
            let pulled = match outcome {
                Ok(body) => Pulled::Body(Arc::new(body)),
                Err(why) => {
                    self.metrics.connection_failed(why.reason());
                    Pulled::Failed(why)
                }
            };
            // Nobody may listen any more, which is seen before the next look.
            let _ = self.answers.send(pulled);
        }
    }

    /// Whether no rank listens; the server is forgotten then.
    fn is_left(&self) -> bool {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        let left = self.answers.receiver_count() == 0;
        if left {
            servers.remove(&self.url);
        }
        left
    }
}

async fn look(client: &Client, address: &str) -> Result<Vec<u8>, Why> {
    let mut response = client.post(address).send().await.map_err(|error| Why::of(&error))?;
    if !response.status().is_success() {
        return Err(Why::Failed("status"));
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| Why::of(&error))? {
        if bytes.len() + chunk.len() > PULL_BYTES_MAX {
            return Err(Why::Failed("over_limit"));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// Follows a rank until the task is aborted or nobody takes updates.
pub async fn follow_pull(
    spec: PullSpec,
    pulls: Arc<Pulls>,
    updates: mpsc::Sender<Update>,
    view: SharedView,
    metrics: Arc<Metrics>,
) {
    let mut answers = pulls.listen(&spec.url);
    let outlet = Outlet::new(spec.worker, spec.slot, updates, view, Arc::clone(&metrics));
    let mut follower = Follower { order: Order::new(), spec, outlet, metrics };
    loop {
        match answers.recv().await {
            Ok(Pulled::Body(body)) => follower.answered(&body),
            Ok(Pulled::Failed(why)) => follower.failed(why),
            // What was dropped shows as a gap.
            Err(RecvError::Lagged(_)) => follower.metrics.plane_dropped("overflow"),
            Err(RecvError::Closed) => return,
        }
        if follower.act().await.is_err() {
            return;
        }
    }
}

struct Follower {
    spec: PullSpec,
    order: Order,
    outlet: Outlet,
    metrics: Arc<Metrics>,
}

impl Follower {
    fn answered(&mut self, body: &[u8]) {
        self.outlet.look(|view| view.failure = None);
        self.order.answered();
        match decode_pulled(body, self.spec.block_size) {
            Ok(events) => {
                if !events.is_empty() {
                    self.outlet.look(|view| view.messages += 1);
                }
                for event in events {
                    self.take(event);
                }
            }
            Err(error) => {
                // The buffer is empty now, and what was in it is lost.
                self.metrics.batch_undecodable(error.reason());
                self.order.undecodable();
            }
        }
    }

    fn take(&mut self, event: PulledEvent) {
        // A server of one rank may not number it.
        if event.rank.is_some_and(|rank| rank != self.spec.worker.rank.0) {
            return;
        }
        if let Some(skip) = event.skipped {
            self.metrics.event_skipped(skip);
        }
        self.order.take(event);
    }

    fn failed(&mut self, why: Why) {
        self.outlet.look(|view| view.failure = Some(why.reason()));
        self.order.failed();
        if why == Why::Gone {
            self.order.gone();
        }
    }

    async fn act(&mut self) -> Result<(), Stopped> {
        let slot = self.spec.slot;
        for action in self.order.actions() {
            match action {
                Action::Apply(id, events) => {
                    self.outlet.send(Update::Events(slot, id, events)).await?
                }
                Action::Clear(loss) => self.outlet.clear(loss).await?,
            }
        }
        let (standing, gaps) = (self.order.standing(), self.order.gaps());
        // What is fetched cannot come twice.
        self.outlet.stand(standing, gaps, 0).await
    }
}
