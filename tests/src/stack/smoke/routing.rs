//! Routing: the sequence of conversations, with and without the module.

use std::collections::BTreeMap;

use super::super::client::Answer;
use super::super::conversations::{Conversations, Shape};
use super::super::launch::{MODEL, Stack};
use super::super::limits::CATCH_UP_WITHIN;
use super::super::position::caught_up;
use super::super::report::{line, percentile};

/// Mismatches that are printed one by one.
const MISMATCHES_SHOWN: usize = 5;

/// What the sequence gave.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Requests sent.
    pub(super) requests: usize,
    /// Those without a complete 200.
    pub(super) failures: Vec<String>,
    /// Requests before which the feed did not catch up.
    pub(super) late: Vec<String>,
    /// Requests whose prediction equals the engine's report.
    pub(super) exact: usize,
    /// Prompt tokens, by the engines' count.
    pub(super) prompt_tokens: u64,
    /// Of these, cached.
    pub(super) cached_tokens: u64,
    /// Requests per engine.
    pub(super) engines: BTreeMap<String, usize>,
    /// Whether a prediction was to be expected at all.
    followed: bool,
    reasons: BTreeMap<String, usize>,
    decision_us: Vec<u64>,
    mismatches: Vec<String>,
}

impl Outcome {
    /// Share of prompt tokens that were cached.
    pub(super) fn hit_ratio(&self) -> f64 {
        self.cached_tokens as f64 / self.prompt_tokens.max(1) as f64
    }

    /// Prints what is no check.
    pub(super) fn print(&self) {
        line(format_args!("requests per engine: {:?}, reasons: {:?}", self.engines, self.reasons));
        if self.followed {
            let mut times = self.decision_us.clone();
            let (half, most) = (percentile(&mut times, 50), percentile(&mut times, 99));
            line(format_args!("decision: p50 {half} us, p99 {most} us, {} measured", times.len()));
        }
        for mismatch in self.mismatches.iter().take(MISMATCHES_SHOWN) {
            line(format_args!("mismatch: {mismatch}"));
        }
    }

    fn note(&mut self, number: usize, answer: &Answer) {
        self.prompt_tokens += answer.prompt_tokens;
        self.cached_tokens += answer.cached_tokens;
        let engine = answer.engine().unwrap_or("unknown").to_owned();
        *self.engines.entry(engine).or_default() += 1;
        *self.reasons.entry(answer.reason().unwrap_or("none").to_owned()).or_default() += 1;
        self.decision_us.extend(answer.decision_us());
        if answer.predicted_tokens() == Some(answer.cached_tokens) {
            self.exact += 1;
        } else if self.followed {
            self.mismatches.push(format!(
                "request {number}: predicted {:?}, engine {:?} reported {} of {} tokens, reason {:?}",
                answer.predicted_tokens(),
                answer.engine(),
                answer.cached_tokens,
                answer.prompt_tokens,
                answer.reason(),
            ));
        }
    }
}

/// Sends the sequence through the module, each request once the feed has
/// caught up with the one before.
pub(super) async fn through_module(stack: &Stack, shape: &Shape, seed: u64) -> Outcome {
    send(stack, &stack.gateway(), shape, seed, true).await
}

/// Sends the sequence through the gateway without the module.
pub(super) async fn through_plain(stack: &Stack, shape: &Shape, seed: u64) -> Outcome {
    send(stack, &stack.plain(), shape, seed, false).await
}

async fn send(stack: &Stack, address: &str, shape: &Shape, seed: u64, follow: bool) -> Outcome {
    let Conversations { mut sessions, order } = Conversations::new(shape, seed);
    let mut outcome = Outcome { followed: follow, ..Outcome::default() };
    for (number, index) in order.into_iter().enumerate() {
        let Some(session) = sessions.get_mut(index) else {
            continue;
        };
        if follow && let Err(behind) = caught_up(stack, CATCH_UP_WITHIN).await {
            outcome.late.push(format!("request {number}: {behind:?}"));
            if outcome.late.len() >= MISMATCHES_SHOWN {
                // The feed is broken; waiting for it 240 times shows no more.
                outcome.failures.push(format!("given up at request {number}"));
                return outcome;
            }
        }
        outcome.requests += 1;
        match session.ask().send(address, MODEL, &[]).await {
            Ok(answer) => {
                outcome.note(number, &answer);
                session.answered(answer.text);
            }
            Err(error) => outcome.failures.push(format!("request {number}: {error}")),
        }
    }
    outcome
}
