//! Restart: the sidecar is killed and started again under load.
//!
//! No request may fail, and routing must be exact again in time. Exactness is
//! shown on prompts that did not exist before the kill: an index that merely
//! survived in the module cannot know them. Each is sent twice; the second must
//! be predicted exactly as the engine reports it, and find something.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::sleep;

use super::super::client::Chat;
use super::super::conversations::Numbers;
use super::super::launch::{MODEL, Stack, engine_name};
use super::super::limits::{ENGINES, EXACT_AGAIN_WAIT, EXACT_AGAIN_WITHIN, POLL, READY_WITHIN};
use super::super::position::known;
use super::super::report::{Report, line};

/// Clients that ask all the time.
const CLIENTS: u64 = 4;

/// Answers that must have come before the kill.
const BEFORE_KILL: u64 = 40;

/// Prompts in a row that must be exact.
const EXACT_IN_A_ROW: u32 = 5;

/// Words of a prompt; about that many tokens. Long, so that the cached prefix
/// outweighs what the clients keep running.
const PROMPT_WORDS: usize = 800;

/// Longest wait for one prompt's blocks to become known; with the sidecar
/// gone, they do not.
const KNOWN_WITHIN: Duration = Duration::from_millis(300);

/// What the clients have seen.
#[derive(Default)]
struct Load {
    stop: AtomicBool,
    answered: AtomicU64,
    failed: AtomicU64,
}

/// Makes the checks.
pub(super) async fn check(stack: &mut Stack, seed: u64, report: &mut Report) {
    let load = Arc::new(Load::default());
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        clients.spawn(ask(Arc::clone(&load), stack.gateway(), seed ^ (client << 32)));
    }
    let deadline = Instant::now() + READY_WITHIN;
    while load.answered.load(Ordering::Relaxed) < BEFORE_KILL && Instant::now() < deadline {
        sleep(POLL).await;
    }
    let before = load.answered.load(Ordering::Relaxed);
    stack.kill_sidecar().await;
    let killed = Instant::now();
    let exact = match stack.spawn_sidecar() {
        Ok(()) => exact_again(stack, killed, seed).await,
        Err(error) => Err(error.to_string()),
    };
    load.stop.store(true, Ordering::Relaxed);
    while let Some(client) = clients.join_next().await {
        if client.is_err() {
            load.failed.fetch_add(1, Ordering::Relaxed);
        }
    }
    let (answered, failed) =
        (load.answered.load(Ordering::Relaxed), load.failed.load(Ordering::Relaxed));
    report.check(
        "no request fails while the sidecar is killed and restarted",
        failed == 0 && before >= BEFORE_KILL && answered > before,
        format_args!("{before} answers before, {} after, {failed} failed", answered - before),
    );
    match exact {
        Ok(took) => report.check(
            "routing is exact again",
            took <= EXACT_AGAIN_WITHIN,
            format_args!("{:.2} s after the kill, at most 5 s", took.as_secs_f64()),
        ),
        Err(error) => report.failure("routing is exact again", error),
    }
}

/// One client: a session that grows, then another.
async fn ask(load: Arc<Load>, gateway: String, seed: u64) {
    let mut numbers = Numbers::new(seed);
    while !load.stop.load(Ordering::Relaxed) {
        let mut messages = vec![("system", numbers.text(60))];
        for turn in 0..4 {
            messages.push(("user", numbers.text(30)));
            let chat = Chat { messages: messages.clone(), max_tokens: 8, stream: turn % 2 == 0 };
            match chat.send(&gateway, MODEL, &[]).await {
                Ok(answer) => {
                    load.answered.fetch_add(1, Ordering::Relaxed);
                    messages.push(("assistant", answer.text));
                }
                Err(error) => {
                    load.failed.fetch_add(1, Ordering::Relaxed);
                    line(format_args!("under load: {error}"));
                }
            }
        }
    }
}

/// From the kill to the first of several exact prompts in a row.
async fn exact_again(stack: &Stack, killed: Instant, seed: u64) -> Result<Duration, String> {
    let mut numbers = Numbers::new(seed ^ 0xdead);
    let (mut in_a_row, mut since, mut last) = (0, Duration::ZERO, String::new());
    while in_a_row < EXACT_IN_A_ROW {
        if killed.elapsed() > EXACT_AGAIN_WAIT {
            return Err(format!("not within {EXACT_AGAIN_WAIT:?}; last: {last}"));
        }
        let started = killed.elapsed();
        let text = numbers.text(PROMPT_WORDS);
        let chat = Chat { messages: vec![("user", text)], max_tokens: 1, stream: false };
        let gateway = stack.gateway();
        let first = chat.send(&gateway, MODEL, &[]).await.map_err(|error| error.to_string())?;
        let engine = (0..ENGINES).find(|&index| first.engine() == Some(&engine_name(index)));
        // Not known in time is no error here: then the prediction is wrong.
        let _known = known(stack, engine.unwrap_or(0), KNOWN_WITHIN).await;
        let second = chat.send(&gateway, MODEL, &[]).await.map_err(|error| error.to_string())?;
        let exact =
            second.predicted_tokens() == Some(second.cached_tokens) && second.cached_tokens > 0;
        last = format!(
            "predicted {:?}, reported {}, reason {:?}",
            second.predicted_tokens(),
            second.cached_tokens,
            second.reason()
        );
        if exact {
            since = if in_a_row == 0 { started } else { since };
            in_a_row += 1;
        } else {
            in_a_row = 0;
        }
    }
    Ok(since)
}
