//! Load: clients that ask all the time, and what they saw.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::members::MODEL;
use crate::stack::client::{Answer, Chat};
use crate::stack::conversations::Numbers;
use crate::stack::limits::{POLL, READY_WITHIN};

/// Clients that ask all the time.
const CLIENTS: u64 = 4;

/// Turns of one conversation.
const TURNS: usize = 4;

/// One request.
#[derive(Clone, Debug)]
pub struct Asked {
    /// When it was sent.
    pub at: Instant,
    /// What was seen, or what came instead.
    pub outcome: Result<Seen, String>,
}

/// What a client sees of an answer.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The engine that served.
    pub engine: String,
    /// The engine that was chosen; another one if the gateway had to try again.
    pub chosen: String,
    /// Cached tokens predicted.
    pub predicted: u64,
    /// Cached tokens reported.
    pub cached: u64,
}

impl Asked {
    /// Whether the engine was believed to hold more than it did.
    #[must_use]
    pub fn is_overrated(&self) -> bool {
        let seen = self.outcome.as_ref().ok().filter(|seen| seen.engine == seen.chosen);
        seen.is_some_and(|seen| seen.predicted > seen.cached)
    }

    /// Whether the engine was believed to hold something.
    #[must_use]
    pub fn is_credited(&self) -> bool {
        self.outcome.as_ref().is_ok_and(|seen| seen.predicted > 0)
    }
}

/// Running clients.
pub struct Load {
    asked: Arc<Mutex<Vec<Asked>>>,
    stop: CancellationToken,
    clients: JoinSet<()>,
}

impl Load {
    /// Starts the clients.
    #[must_use]
    pub fn start(gateway: &str, seed: u64) -> Self {
        let (asked, stop) = (Arc::default(), CancellationToken::new());
        let mut clients = JoinSet::new();
        for client in 0..CLIENTS {
            let numbers = Numbers::new(seed ^ (client << 32));
            clients.spawn(ask(Arc::clone(&asked), stop.clone(), gateway.to_owned(), numbers));
        }
        Self { asked, stop, clients }
    }

    /// Waits for so many more requests to be answered.
    pub async fn answered(&self, more: usize) {
        let wanted = self.lock().len() + more;
        let started = Instant::now();
        while self.lock().len() < wanted && started.elapsed() < READY_WITHIN {
            sleep(POLL).await;
        }
    }

    /// Ends the clients, each after its present request, and returns all
    /// requests in the order in which they ended.
    pub async fn stop(mut self) -> Vec<Asked> {
        self.stop.cancel();
        while self.clients.join_next().await.is_some() {}
        core::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Asked>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One client: a conversation that grows, then another.
async fn ask(
    asked: Arc<Mutex<Vec<Asked>>>,
    stop: CancellationToken,
    gateway: String,
    mut numbers: Numbers,
) {
    while !stop.is_cancelled() {
        let mut messages = vec![("system", numbers.text(60))];
        for turn in 0..TURNS {
            messages.push(("user", numbers.text(30)));
            let chat = Chat { messages: messages.clone(), max_tokens: 8, stream: turn % 2 == 0 };
            let at = Instant::now();
            let outcome = chat.send(&gateway, MODEL, &[]).await;
            let outcome = outcome.map_err(|error| error.to_string());
            if let Ok(answer) = &outcome {
                messages.push(("assistant", answer.text.clone()));
            }
            let outcome = outcome.map(|answer| seen(&answer));
            asked.lock().unwrap_or_else(PoisonError::into_inner).push(Asked { at, outcome });
            if stop.is_cancelled() {
                return;
            }
        }
    }
}

fn seen(answer: &Answer) -> Seen {
    Seen {
        engine: answer.engine().unwrap_or_default().to_owned(),
        chosen: answer.worker().map(|id| format!("engine-{id}")).unwrap_or_default(),
        predicted: answer.predicted_tokens().unwrap_or(0),
        cached: answer.cached_tokens,
    }
}

/// Requests of a list that failed, and were sent at `since` or later.
#[must_use]
pub fn failed_since(asked: &[Asked], since: Instant) -> Vec<&Asked> {
    asked.iter().filter(|it| it.at >= since && it.outcome.is_err()).collect()
}

/// Shown with a figure that is a time.
#[must_use]
pub fn milliseconds(time: Duration) -> String {
    format!("{} ms", time.as_millis())
}
