//! Live: one router before fresh engines, one trace, real processes.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::client::{self, Fault};
use super::engines::ENGINES;
use super::figures::{Figures, Worked};
use super::fleet::Fleet;
use super::rivals::{Rival, Running, dynamo_is_whole};
use super::trace::Trace;
use super::usage::{Usage, processors};
use crate::stack::client::Chat;
use crate::stack::launch::{MODEL, StackError};
use crate::stack::limits::{POLL_START, READY_WITHIN};
use crate::stack::options::Options;

/// Right answers in a row, each over a connection of its own, after which a
/// router counts as ready: enough to meet both of Envoy's worker threads.
const WARM_REQUESTS: u32 = 12;

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Run {
    /// The figures.
    pub figures: Figures,
    /// Why answers were wrong, with how often.
    pub faults: Vec<(Fault, usize)>,
    /// Processor time of the router, in milliseconds per request.
    pub router_ms: f64,
    /// Share of the machine's processor time that router, engines and client took.
    /// Well below 1, or the machine was measured.
    pub ours: f64,
    /// Share of it that was taken at all.
    pub machine: f64,
    /// Real time from the first start to the last stop.
    pub took: Duration,
}

/// Runs a trace through a router.
///
/// # Errors
///
/// [`StackError`].
pub async fn run(
    rival: Rival,
    trace: &Trace,
    options: &Options,
    speedup: u64,
) -> Result<Run, StackError> {
    let started = Instant::now();
    let folder = tempfile::Builder::new().prefix("warmpath-quality-").tempdir()?;
    let path = folder.path();
    let fleet = Fleet::start(options, trace.engine_blocks, speedup, path).await?;
    let mut running = Running::start(rival, options, &fleet, path).await?;
    let measured = match ready(rival, &fleet, &mut running).await {
        Ok(()) => measure(trace, &fleet, &running, speedup).await,
        Err(error) => Err(error),
    };
    running.stop().await;
    fleet.stop().await;
    Ok(Run { took: started.elapsed(), ..measured? })
}

async fn measure(
    trace: &Trace,
    fleet: &Fleet,
    running: &Running,
    speedup: u64,
) -> Result<Run, StackError> {
    let unreadable = || StackError::NotReady("an engine's /control/state", String::new());
    let before = fleet.worked().await.ok_or_else(unreadable)?;
    let usage = Usage::begin(&running.processes());
    let others = [fleet.processes(), vec![std::process::id()]].concat();
    let all = Usage::begin(&others);
    let outcome = client::send(trace, &running.address, speedup).await;
    let (router_ms, machine) = usage.end();
    let ours = (router_ms + all.end().0) / 1000.0 / outcome.took.as_secs_f64().max(0.001);
    let ours = ours / f64::from(processors());
    let after = fleet.worked().await.ok_or_else(unreadable)?;
    let worked: Vec<Worked> =
        after.iter().zip(&before).map(|(after, before)| after.since(before, speedup)).collect();
    let span = u64::try_from(outcome.took.as_micros()).unwrap_or(u64::MAX);
    let sent = trace.requests.len();
    let figures = Figures::of(sent, &outcome.seen, &worked, span.saturating_mul(speedup));
    let router_ms = router_ms / f64::from(u32::try_from(sent.max(1)).unwrap_or(u32::MAX));
    let took = Duration::ZERO;
    Ok(Run { figures, faults: outcome.faults, router_ms, ours, machine, took })
}

/// Waits until requests are answered, and, where that can be told, routed by
/// cache. First gives every engine something to announce: a worker whose events
/// were never seen is not yet known to count tokens as a router does.
async fn ready(rival: Rival, fleet: &Fleet, running: &mut Running) -> Result<(), StackError> {
    let chat = |text: String| Chat { messages: vec![("user", text)], max_tokens: 1, stream: false };
    let deadline = Instant::now() + READY_WITHIN;
    if rival == Rival::Dynamo {
        while !dynamo_is_whole(&running.address).await {
            check(running, deadline, "Dynamo's workers")?;
            sleep(POLL_START).await;
        }
    }
    for (index, address) in fleet.addresses().enumerate().take(ENGINES) {
        let text = format!("engine {index} says hello {}", "and hello again ".repeat(32));
        // A failure shows below, where the router stays cold.
        let _answer = chat(text).send(&address, MODEL, &[]).await;
    }
    let (mut warm, mut sent) = (0, 0_u64);
    while warm < WARM_REQUESTS {
        check(running, deadline, "right answers")?;
        sent += 1;
        let text = format!("probe {sent} {}", "of the gateway ".repeat(16));
        match chat(text).send(&running.address, MODEL, &[]).await {
            Ok(answer) if !rival.is_ours() || answer.reason() == Some("kv") => warm += 1,
            _ => {
                warm = 0;
                sleep(POLL_START).await;
            }
        }
    }
    Ok(())
}

fn check(running: &mut Running, deadline: Instant, what: &'static str) -> Result<(), StackError> {
    if let Some((name, log)) = running.ended() {
        return Err(StackError::Ended(name, log));
    }
    if Instant::now() > deadline {
        return Err(StackError::NotReady(what, running.logs()));
    }
    Ok(())
}
