//! Traffic: requests through the gateway, and who has served them, as Dynamo's
//! frontend says.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::peers::MODEL;
use crate::stack::client::{Response, post};
use crate::stack::conversations::{Conversations, Numbers, Shape};
use crate::stack::limits::REQUEST_WITHIN;

/// Clients that ask all the time during a rollout.
const CLIENTS: u64 = 4;

/// Turns of one of their conversations.
const TURNS: usize = 4;

/// Requests that are in flight at the same time in the concurrent part.
const CONCURRENT: usize = 8;

/// What one request gave.
#[derive(Clone, Debug, Default)]
pub struct Served {
    /// Worker and rank that the gateway chose, for the whole or for decode.
    pub chosen: Option<(u64, u64)>,
    /// Those that served.
    pub served: Option<(u64, u64)>,
    /// Worker and rank that the gateway chose for prefill.
    pub prefill_chosen: Option<(u64, u64)>,
    /// Those that served.
    pub prefill_served: Option<(u64, u64)>,
    /// Cached tokens that the gateway predicted.
    pub predicted: Option<u64>,
    /// Cached tokens that the engine reported.
    pub cached: Option<u64>,
    /// Why the gateway chose so.
    pub reason: String,
    text: String,
}

/// Sends one chat request.
///
/// # Errors
///
/// What came instead of a 200, in words.
pub async fn send(
    gateway: &str,
    messages: &[(&'static str, String)],
    tokens: u32,
) -> Result<Served, String> {
    let messages: Vec<Value> =
        messages.iter().map(|(role, text)| json!({"role": role, "content": text})).collect();
    let body = json!({
        "model": MODEL,
        "messages": messages,
        "max_tokens": tokens,
        "nvext": {"extra_fields": ["worker_id"]},
    });
    let path = "/v1/chat/completions";
    let response = post(gateway, path, &[], body.to_string().into(), REQUEST_WITHIN)
        .await
        .map_err(|error| error.to_string())?;
    if !response.status.is_success() {
        let text = String::from_utf8_lossy(&response.body).into_owned();
        return Err(format!("{}: {text}", response.status));
    }
    read(&response).ok_or_else(|| "an incomplete answer".to_owned())
}

fn read(response: &Response) -> Option<Served> {
    let body = response.json()?;
    let number = |pointer: &str| body.pointer(pointer).and_then(Value::as_u64);
    let named = |worker: &str, rank: &str| Some((response.number(worker)?, response.number(rank)?));
    let of = |leg: &str| {
        let worker = number(&format!("/nvext/worker_id/{leg}_worker_id"))?;
        Some((worker, number(&format!("/nvext/worker_id/{leg}_dp_rank")).unwrap_or(0)))
    };
    Some(Served {
        chosen: named("x-warmpath-worker", "x-warmpath-dp-rank"),
        served: of("decode"),
        prefill_chosen: named("x-warmpath-prefill-worker", "x-warmpath-prefill-dp-rank"),
        prefill_served: of("prefill"),
        predicted: response.number("x-warmpath-predicted-cached-tokens"),
        cached: number("/usage/prompt_tokens_details/cached_tokens"),
        reason: response.header("x-warmpath-reason").unwrap_or("none").to_owned(),
        text: body.pointer("/choices/0/message/content")?.as_str()?.to_owned(),
    })
}

/// Conversations, first one request at a time, then several at once.
pub async fn conversations(gateway: &str, shape: &Shape, seed: u64) -> Vec<Result<Served, String>> {
    let mut outcomes = Vec::new();
    let Conversations { mut sessions, order } = Conversations::new(shape, seed);
    let half = order.len() / 2;
    for index in order.iter().take(half) {
        let Some(session) = sessions.get_mut(*index) else { continue };
        let chat = session.ask();
        let outcome = send(gateway, &chat.messages, chat.max_tokens).await;
        if let Ok(served) = &outcome {
            session.answered(served.text.clone());
        }
        outcomes.push(outcome);
    }
    let rest: Vec<usize> = order.iter().skip(half).copied().collect();
    for group in rest.chunks(CONCURRENT) {
        let mut chats = Vec::new();
        for index in group {
            if let Some(session) = sessions.get_mut(*index) {
                chats.push((*index, session.ask()));
            }
        }
        let sent = chats.iter().map(|(_, chat)| send(gateway, &chat.messages, chat.max_tokens));
        let answers = futures_util::future::join_all(sent).await;
        for ((index, _), outcome) in chats.iter().zip(answers) {
            if let (Ok(served), Some(session)) = (&outcome, sessions.get_mut(*index)) {
                session.answered(served.text.clone());
            }
            outcomes.push(outcome);
        }
    }
    outcomes
}

/// Clients that ask all the time, until they are stopped.
pub struct Clients {
    stop: CancellationToken,
    tasks: JoinSet<Vec<Result<Served, String>>>,
    asked: Arc<AtomicUsize>,
}

impl Clients {
    /// Starts them.
    #[must_use]
    pub fn start(gateway: &str, seed: u64) -> Self {
        let (stop, asked) = (CancellationToken::new(), Arc::new(AtomicUsize::new(0)));
        let mut tasks = JoinSet::new();
        for client in 0..CLIENTS {
            let numbers = Numbers::new(seed ^ (client << 32));
            tasks.spawn(ask(gateway.to_owned(), numbers, stop.clone(), Arc::clone(&asked)));
        }
        Self { stop, tasks, asked }
    }

    /// Requests answered so far, in whatever way.
    #[must_use]
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }

    /// Stops them, each after its present request.
    pub async fn stop(mut self) -> Vec<Result<Served, String>> {
        self.stop.cancel();
        let mut outcomes = Vec::new();
        while let Some(client) = self.tasks.join_next().await {
            outcomes.extend(client.unwrap_or_else(|error| vec![Err(error.to_string())]));
        }
        outcomes
    }
}

async fn ask(
    gateway: String,
    mut numbers: Numbers,
    stop: CancellationToken,
    asked: Arc<AtomicUsize>,
) -> Vec<Result<Served, String>> {
    let mut outcomes = Vec::new();
    while !stop.is_cancelled() {
        let mut messages = vec![("system", numbers.text(60))];
        for _ in 0..TURNS {
            messages.push(("user", numbers.text(40)));
            let outcome = send(&gateway, &messages, 8).await;
            if let Ok(served) = &outcome {
                messages.push(("assistant", served.text.clone()));
            }
            outcomes.push(outcome);
            asked.fetch_add(1, Ordering::Relaxed);
            if stop.is_cancelled() {
                break;
            }
        }
    }
    outcomes
}
