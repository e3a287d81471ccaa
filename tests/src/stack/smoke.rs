//! Smoke: the bounded, asserting run.
//!
//! Checks, in this order: every response, prediction against report, hit ratio
//! against round robin, routing headers of clients, the sidecar's death under
//! load, bad input, the APIs that are routed by load, named workers and allowed
//! hosts, prefill and decode workers, modes `body` and `buffer`, that nothing is left
//! behind, and long prompts.

use std::process::ExitCode;

use super::conversations::Shape;
use super::launch::{EngineShape, Stack, StackError};
use super::limits::CATCH_UP_WITHIN;
use super::options::Options;
use super::position::{caught_up, gauge, stats};
use super::report::{Report, line};

mod apis;
mod bad_input;
mod body_mode;
mod buffer_mode;
mod long;
mod pins;
mod restart;
mod roles;
mod routing;
mod spoof;
mod variant;

pub(crate) use spoof::NAMES as ROUTING_HEADERS;

/// Engines of the smoke run: together they hold all sessions once, none holds
/// them alone.
pub const ENGINE_SHAPE: EngineShape =
    EngineShape { blocks: 1000, prefill_us_per_token: 20, decode_us_per_token: 500 };

/// Traffic of the smoke run: 40 sessions of 6 turns, 240 requests; two sessions
/// share a system prompt.
pub const SHAPE: Shape = Shape {
    groups: 20,
    sessions_per_group: 2,
    turns: 6,
    system_words: 100,
    user_words: 120,
    answer_tokens: 16,
};

/// Least share of requests whose prediction equals the engine's report.
const EXACT_SHARE_MIN: f64 = 0.99;

/// Least advantage of the hit ratio over round robin.
const ADVANTAGE_MIN: f64 = 0.2;

/// Runs everything. Prints each check and, last, `N passed, N failed`.
pub async fn run(options: Options) -> ExitCode {
    let mut report = Report::default();
    let seed = options.seed;
    match Stack::start(options.clone(), ENGINE_SHAPE, None).await {
        Ok(mut stack) => {
            checks(&mut stack, seed, &mut report).await;
            if let Some((name, log)) = stack.ended() {
                report.failure("every process is alive", format_args!("{name} ended:\n{log}"));
            }
            if report.has_failures() {
                line(format_args!("logs and configuration: {}", stack.keep_folder().display()));
            }
            stack.stop().await;
        }
        Err(error) => report.failure("the stack starts", error),
    }
    long::check(options, &mut report).await;
    report.finish()
}

async fn checks(stack: &mut Stack, seed: u64, report: &mut Report) {
    let model =
        if stack.options.model_is_tiny { "the small committed model" } else { "the real model" };
    line(format_args!("model: {model}, {}", stack.options.model_dir.display()));
    if let Some(ready) = stack.envoy_ready {
        line(format_args!("Envoy ready after {:.2} s", ready.as_secs_f64()));
    }
    let warm = routing_checks(stack, seed, report).await;
    if let Err(error) = baseline_checks(stack, seed, warm.hit_ratio(), report).await {
        report.failure("the gateway without the module starts", error);
    }
    let case = spoof::prepare(stack, seed).await;
    spoof::check(stack, case, "feed alive", report).await;
    restart::check(stack, seed, report).await;
    let case = spoof::prepare(stack, seed + 1).await;
    stack.kill_sidecar().await;
    spoof::check(stack, case, "sidecar dead", report).await;
    if let Err(error) = stack.start_sidecar().await {
        report.failure("the sidecar starts again", error);
    }
    bad_input::check(stack, report).await;
    apis::check(stack, report).await;
    pins::check(stack, report).await;
    roles::check(stack, seed, report).await;
    body_mode::check(stack, report).await;
    buffer_mode::check(stack, seed, report).await;
    leftovers(stack, report).await;
}

async fn routing_checks(stack: &Stack, seed: u64, report: &mut Report) -> routing::Outcome {
    let cleared = stack.clear_caches().await;
    report.check("caches empty at the start", cleared, format_args!("cleared: {cleared}"));
    let outcome = routing::through_module(stack, &SHAPE, seed).await;
    outcome.print();
    report.check(
        "every response is 200 and complete",
        outcome.failures.is_empty() && outcome.requests >= 200,
        format_args!(
            "{} requests, {} failed {:?}",
            outcome.requests,
            outcome.failures.len(),
            outcome.failures.first()
        ),
    );
    report.check(
        "the feed catches up before every request",
        outcome.late.is_empty(),
        format_args!("{} late {:?}", outcome.late.len(), outcome.late.first()),
    );
    let share = outcome.exact as f64 / outcome.requests.max(1) as f64;
    report.check(
        "predicted cached tokens equal the engine's",
        share >= EXACT_SHARE_MIN,
        format_args!(
            "{} of {} ({:.1} %, at least 99 %)",
            outcome.exact,
            outcome.requests,
            share * 100.0
        ),
    );
    report.check(
        "prefixes are found at all",
        outcome.cached_tokens > 0,
        format_args!("{} of {} prompt tokens", outcome.cached_tokens, outcome.prompt_tokens),
    );
    report.check(
        "every engine is used",
        outcome.engines.len() == super::limits::ENGINES,
        format_args!("{:?}", outcome.engines),
    );
    outcome
}

/// Compares with round robin over the same sequence, caches emptied first.
async fn baseline_checks(
    stack: &mut Stack,
    seed: u64,
    warm: f64,
    report: &mut Report,
) -> Result<(), StackError> {
    stack.start_plain().await?;
    let cleared = stack.clear_caches().await;
    let cold = routing::through_plain(stack, &SHAPE, seed).await;
    report.check(
        "round robin answers the same sequence",
        cleared && cold.failures.is_empty(),
        format_args!("{} requests, {} failed", cold.requests, cold.failures.len()),
    );
    let advantage = warm - cold.hit_ratio();
    report.check(
        "hit ratio above round robin's",
        advantage >= ADVANTAGE_MIN,
        format_args!("{warm:.3} against {:.3}: +{advantage:.3}, at least +0.2", cold.hit_ratio()),
    );
    // Emptied caches must be known as empty: the next predictions depend on it.
    let cleared = stack.clear_caches().await;
    let known = caught_up(stack, CATCH_UP_WITHIN).await;
    report.check(
        "a cleared cache is known to the gateway",
        cleared && known.is_ok(),
        format_args!("cleared: {cleared}, feed: {known:?}"),
    );
    Ok(())
}

/// Measures the sequence without the module: `warmpath-run baseline`.
pub async fn baseline(options: Options) -> ExitCode {
    let mut report = Report::default();
    let seed = options.seed;
    match Stack::engines(options, ENGINE_SHAPE, None).await {
        Ok(mut stack) => {
            match stack.start_plain().await {
                Ok(()) => {
                    let cold = routing::through_plain(&stack, &SHAPE, seed).await;
                    cold.print();
                    report.check(
                        "every response is 200 and complete",
                        cold.failures.is_empty(),
                        format_args!(
                            "{} requests, hit ratio {:.3}",
                            cold.requests,
                            cold.hit_ratio()
                        ),
                    );
                }
                Err(error) => report.failure("the gateway without the module starts", error),
            }
            stack.stop().await;
        }
        Err(error) => report.failure("the engines start", error),
    }
    report.finish()
}

/// Nothing may be left when all requests have ended.
async fn leftovers(stack: &Stack, report: &mut Report) {
    let deadline = std::time::Instant::now() + CATCH_UP_WITHIN;
    let mut bookings = gauge(stack, "warmpath_bookings$").await;
    while bookings != Some(0) && std::time::Instant::now() < deadline {
        tokio::time::sleep(super::limits::POLL).await;
        bookings = gauge(stack, "warmpath_bookings$").await;
    }
    report.check("no booking is left", bookings == Some(0), format_args!("{bookings:?}"));
    let reloads = stats(stack, "vm_reload").await.unwrap_or_default();
    let crashed: u64 = reloads.iter().map(|(_, value)| value).sum();
    report.check(
        "the module never crashed",
        !reloads.is_empty() && crashed == 0,
        format_args!("{crashed} reloads, {} counters", reloads.len()),
    );
}
