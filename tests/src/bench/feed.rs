//! Feed: how soon events of engines count, and what feeding costs the gateway.
//!
//! Simulated engines publish as vLLM does, a sidecar follows them, and Envoy, as it
//! is shipped, has one worker thread and a steady flow of small requests. Hooks in
//! the module tell what happens in the VM of that thread.
//!
//! # Terms
//!
//! - *event*: one block stored or removed.
//! - *marker*: a block that nobody else stores. Its lag is the time from its
//!   engine's sending it until a request on the worker thread would be routed by
//!   it.
//! - *pause*: time for which the feed's callbacks kept the worker thread from
//!   serving anybody. It is measured with Envoy at a real-time priority: on a small
//!   machine it would else show how long its threads waited for a processor.

mod engines;
mod flow;
mod gateway;
mod probe;
mod snapshot;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use minijinja::Value;
use tokio::runtime::{Handle, Runtime};
use tokio::time::sleep;

use self::engines::{BLOCK_SIZE, Engine, Traffic};
use self::flow::Flow;
use self::gateway::{Gateway, Listed, MODEL, Sidecar};
use self::probe::{Seen, catch_up_ms, lags_ms, percentile};
use super::rows::{Better, Goal, Row, write_part};
use crate::bookings::workers::Workers;
use crate::engine::model::{ChatContext, Model};
use crate::stack::client::Chat;
use crate::stack::options::Options;
use crate::stack::report::line;

/// What `bench-feed --help` prints.
pub const USAGE: &str = "\
bench-feed: how soon engines' events count, and what feeding costs the gateway

  --quick      less of everything: half a minute
  --only PART  traffic or snapshot
";

/// Engines under traffic.
const ENGINES: usize = 4;

/// Rates of the traffic, in events a second, with their names.
const RATES: [(u64, &str); 3] = [(1_000, "1k"), (100_000, "100k"), (400_000, "400k")];

/// The rate that the goals are about.
const GOAL_RATE: u64 = 100_000;

/// How long the sidecar stands still.
const STANDSTILL: Duration = Duration::from_secs(2);

/// Lag from which a marker counts as late after the standstill, in milliseconds.
const ON_TIME_MS: f64 = 20.0;

/// Blocks that the index of a VM may hold under traffic.
const BLOCKS_MAX: u64 = 2_000_000;

/// Time between two batches of nothing, until the sidecar has heard one.
const CALL_EVERY: Duration = Duration::from_millis(20);

/// Anything that ends the benchmark; for people.
type Failure = Box<dyn std::error::Error>;

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    is_quick: bool,
    parts: Vec<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Traffic,
    Snapshot,
}

impl Plan {
    /// Parses command line arguments; `None` if they are not understood, or help
    /// is wanted.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Option<Self> {
        let mut plan = Self { is_quick: false, parts: vec![Part::Traffic, Part::Snapshot] };
        let mut arguments = arguments.into_iter();
        while let Some(word) = arguments.next() {
            match word.as_str() {
                "--quick" => plan.is_quick = true,
                "--only" => match arguments.next()?.as_str() {
                    "traffic" => plan.parts = vec![Part::Traffic],
                    "snapshot" => plan.parts = vec![Part::Snapshot],
                    _ => return None,
                },
                _ => return None,
            }
        }
        Some(plan)
    }

    /// How long one rate is measured.
    fn phase(&self) -> Duration {
        Duration::from_millis(if self.is_quick { 2_000 } else { 8_000 })
    }
}

/// Runs it all, prints the rows and writes them; a wrong answer is a failure.
pub async fn run(plan: &Plan, options: &Options) -> ExitCode {
    // Engines and workers, beside the thread of the children.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let outcome = match &runtime {
        Ok(runtime) => run_parts(plan, options, runtime).await,
        Err(error) => Err(error.to_string().into()),
    };
    if let Ok(runtime) = runtime {
        runtime.shutdown_background();
    }
    match outcome {
        Ok(rows) => finish(plan, &rows),
        Err(error) => {
            line(format_args!("FAILED: {error}"));
            ExitCode::FAILURE
        }
    }
}

async fn run_parts(plan: &Plan, options: &Options, runtime: &Runtime) -> Result<Vec<Row>, Failure> {
    let folder = tempfile::Builder::new().prefix("warmpath-feed-").tempdir()?;
    let mut rows = Vec::new();
    for part in &plan.parts {
        let name = match part {
            Part::Traffic => "traffic",
            Part::Snapshot => "snapshot",
        };
        let folder = folder.path().join(name);
        std::fs::create_dir(&folder)?;
        let handle = runtime.handle();
        rows.extend(match part {
            Part::Traffic => under_traffic(plan, options, handle, &folder).await?,
            Part::Snapshot => snapshot::run(plan.is_quick, options, handle, &folder).await?,
        });
    }
    Ok(rows)
}

fn finish(plan: &Plan, rows: &[Row]) -> ExitCode {
    for row in rows {
        let baseline = row.baseline.map_or(String::new(), |it| format!("  beside {it:.3}"));
        let Row { name, unit, value, note, .. } = row;
        line(format_args!("{name:<32} {value:>12.3} {unit:<8}{baseline}  {note}"));
    }
    if plan.parts.len() < 2 {
        return ExitCode::SUCCESS;
    }
    match write_part("feed", rows) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            line(format_args!("cannot write the rows: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// A scenario: engines, their sidecar, Envoy, requests.
struct Scene {
    sidecar: Sidecar,
    gateway: Gateway,
    traffic: Traffic,
    flow: Flow,
    /// Prompt and worker of what each engine holds besides its traffic.
    known: Vec<(String, u64)>,
}

impl Scene {
    async fn start(options: &Options, runtime: &Handle, folder: &Path) -> Result<Self, Failure> {
        let model = Model::load(&options.model_dir)?;
        let mut engines = start_engines(runtime).await?;
        let workers = Workers::start(engines.len() + 1, runtime)?;
        let marker = runtime.spawn(Engine::start()).await??;
        let listed = list([&marker].into_iter().chain(&engines), &workers);
        let sidecar = Sidecar::start(options, &listed, folder).await?;
        call([&marker].into_iter().chain(&engines), &sidecar).await?;
        let mut known = Vec::new();
        for (engine, listed) in engines.iter_mut().zip(listed.iter().skip(1)) {
            let prompt = format!("what worker {} holds {}", listed.id, "and keeps ".repeat(40));
            engine.store_prompt(&tokens(&model, &prompt)?, listed.id);
            known.push((prompt, listed.id));
        }
        let gateway = Gateway::start(options, &sidecar, &listed, BLOCKS_MAX, folder).await?;
        gateway.until("a live index", |seen| seen.is_live).await?;
        let traffic = Traffic::start(marker, engines, runtime.clone());
        let flow = Flow::start(gateway.address(), &chat("a short question").body(MODEL));
        Ok(Self { sidecar, gateway, traffic, flow, known })
    }

    /// Measures for a while what happens at a rate.
    async fn measure(
        &self,
        rate: u64,
        has_markers: bool,
        time: Duration,
    ) -> Result<Phase, Failure> {
        self.traffic.set(rate, has_markers);
        // What the change of rate itself does is not measured.
        sleep(time / 10).await;
        let from = self.traffic.markers().len();
        let before = self.gateway.seen(true).await.ok_or("the hooks do not answer")?;
        self.flow.take();
        self.traffic.late_ms();
        let (cpu, sidecar_cpu) = (self.gateway.cpu(), self.sidecar.cpu());
        let (events, started) = (self.traffic.sent_events(), Instant::now());
        sleep(time).await;
        let took = started.elapsed();
        let events = self.traffic.sent_events() - events;
        let cpu = [self.gateway.cpu() - cpu, self.sidecar.cpu() - sidecar_cpu];
        let requests_ms = self.flow.take();
        let late_ms = self.traffic.late_ms();
        let sent = self.traffic.markers();
        let wanted = sent.len() as u64;
        // Those that are still on their way count, too.
        let arrived = |seen: &Seen| !has_markers || seen.markers.len() as u64 >= wanted;
        let seen = self.gateway.until("the last markers", arrived).await?;
        let lags_ms = lags_ms(&sent, &seen.markers, from);
        let operations = seen.operations - before.operations;
        let phase =
            Phase { rate, took, events, operations, cpu, requests_ms, late_ms, lags_ms, seen };
        line(phase.describe());
        Ok(phase)
    }

    /// Milliseconds from the end of a standstill of the sidecar until markers are
    /// on time again.
    async fn stand_still(&self) -> Result<Option<f64>, Failure> {
        self.traffic.set(GOAL_RATE, true);
        sleep(STANDSTILL / 2).await;
        let from = self.traffic.markers().len();
        self.sidecar.freeze(true);
        sleep(STANDSTILL).await;
        self.sidecar.freeze(false);
        let resumed_ns = clock_ns();
        self.gateway.seen(true).await.ok_or("the hooks do not answer")?;
        sleep(STANDSTILL).await;
        let sent = self.traffic.markers();
        let arrived = |seen: &Seen| seen.markers.len() >= sent.len();
        let seen = self.gateway.until("the markers after a standstill", arrived).await?;
        let (sent, visible) = (sent.get(from..), seen.markers.get(from..));
        let (sent, visible) = (sent.unwrap_or_default(), visible.unwrap_or_default());
        line(format_args!(
            "after a standstill: longest tick {:.2} ms, message {:.2} ms, pause {:.2} ms",
            seen.ticks.max_ms(),
            seen.messages.max_ms(),
            seen.pauses.max_ms()
        ));
        Ok(catch_up_ms(sent, visible, resumed_ns, ON_TIME_MS))
    }

    /// Whether the index holds what the engines hold, and prompts go to whoever
    /// holds them.
    async fn check_and_stop(self) -> Result<(), Failure> {
        let Self { sidecar, gateway, traffic, flow, known } = self;
        flow.stop()?;
        let (marker, engines) = traffic.stop().ok_or("the thread of the engines died")?;
        let all: Vec<&Engine> = [&marker].into_iter().chain(&engines).collect();
        let batches: Vec<u64> = all.iter().map(|engine| engine.batches()).collect();
        sidecar.until_applied(&batches).await?;
        let holds = |seen: &Seen| {
            let ids = 1_u64..;
            ids.zip(&all).all(|(id, engine)| seen.blocks_of(id) == engine.blocks)
        };
        gateway.until("an index that holds what the engines hold", holds).await?;
        for (prompt, id) in known {
            let answer = chat(&prompt).post(&gateway.address(), MODEL, &[]).await?;
            let worker = answer.number("x-warmpath-worker");
            let predicted = answer.number("x-warmpath-predicted-cached-tokens");
            if worker != Some(id) || predicted.is_none_or(|tokens| tokens == 0) {
                let log = gateway.log_tail();
                return Err(format!("{prompt:.30}: {worker:?}, {predicted:?}\n{log}").into());
            }
        }
        gateway.stop().await;
        sidecar.stop().await;
        Ok(())
    }
}

async fn start_engines(runtime: &Handle) -> Result<Vec<Engine>, Failure> {
    let mut engines = Vec::new();
    for number in 1..=ENGINES as u64 {
        engines.push(runtime.spawn(Engine::with_traffic(number)).await??);
    }
    Ok(engines)
}

/// Engines and the workers that answer for them, numbered from 1 on.
fn list<'a>(engines: impl Iterator<Item = &'a Engine>, workers: &Workers) -> Vec<Listed> {
    let listed = |((id, engine), http): ((u64, &Engine), &u16)| {
        let (events, replay) = engine.ports();
        Listed { id, http: *http, events, replay, blocks: 1 << 20 }
    };
    (1..).zip(engines).zip(&workers.ports).map(listed).collect()
}

/// Lets engines publish nothing until the sidecar has heard each: what is said
/// before somebody listens is lost.
async fn call<'a>(
    engines: impl Iterator<Item = &'a Engine> + Clone,
    sidecar: &Sidecar,
) -> Result<(), Failure> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        engines.clone().for_each(Engine::say_nothing);
        sleep(CALL_EVERY).await;
        let applied = sidecar.applied().await.unwrap_or_default();
        if !applied.is_empty() && applied.iter().all(|(last, _)| last.is_some()) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!("the sidecar hears nothing: {applied:?}").into());
        }
    }
}

fn chat(text: &str) -> Chat {
    Chat { messages: vec![("user", text.to_owned())], max_tokens: 1, stream: false }
}

fn tokens(model: &Model, prompt: &str) -> Result<Vec<u32>, Failure> {
    let messages = vec![Value::from_pairs([("role", "user"), ("content", prompt)])];
    let context = ChatContext { messages, add_generation_prompt: true, ..ChatContext::default() };
    let tokens = model.chat_tokens(&context).map_err(|error| format!("no tokens: {error:?}"))?;
    if tokens.len() < 2 * BLOCK_SIZE as usize {
        return Err("a prompt without blocks".into());
    }
    Ok(tokens)
}

/// What was measured at one rate.
struct Phase {
    rate: u64,
    took: Duration,
    events: u64,
    operations: u64,
    /// Of Envoy and the sidecar.
    cpu: [Duration; 2],
    requests_ms: Vec<f64>,
    late_ms: f64,
    lags_ms: Vec<f64>,
    seen: Seen,
}

impl Phase {
    fn describe(&self) -> String {
        let Self { rate, events, operations, requests_ms, lags_ms, late_ms, seen, .. } = self;
        let of = percentile;
        format!(
            "{rate:>6}/s: {events} events, {operations} applied; lag p50 {:.2} p99 {:.2} max {:.2} ms \
             (sent late {late_ms:.2}); requests p50 {:.2} p99 {:.2} max {:.2} ms; ticks {} longest \
             {:.2} ms, messages {} longest {:.2} ms, pause {:.2} ms",
            of(lags_ms, 0.5),
            of(lags_ms, 0.99),
            of(lags_ms, 1.0),
            of(requests_ms, 0.5),
            of(requests_ms, 0.99),
            of(requests_ms, 1.0),
            seen.ticks.count,
            seen.ticks.max_ms(),
            seen.messages.count,
            seen.messages.max_ms(),
            seen.pauses.max_ms(),
        )
    }

    /// Processor time for 100 000 events beyond what an idle gateway takes, in
    /// milliseconds.
    fn cpu_ms(&self, place: usize, idle: &Self) -> f64 {
        let share = |phase: &Self| {
            let cpu = phase.cpu.get(place).copied().unwrap_or_default();
            cpu.as_secs_f64() / phase.took.as_secs_f64()
        };
        let per_event = (share(self) - share(idle)) * self.took.as_secs_f64() / self.events as f64;
        per_event * 1e5 * 1e3
    }
}

async fn under_traffic(
    plan: &Plan,
    options: &Options,
    runtime: &Handle,
    folder: &Path,
) -> Result<Vec<Row>, Failure> {
    let scene = Scene::start(options, runtime, folder).await?;
    let time = plan.phase();
    let mut rows = Vec::new();
    let idle = scene.measure(0, false, time).await?;
    for (rate, name) in RATES {
        let phase = scene.measure(rate, true, time).await?;
        let p99 = percentile(&phase.lags_ms, 0.99);
        let row = Row::alone(
            format!("event_to_routable_p50_{name}"),
            "ms",
            percentile(&phase.lags_ms, 0.5),
        );
        rows.push(row);
        let row = Row::alone(format!("event_to_routable_p99_{name}"), "ms", p99)
            .note(format!("{} markers", phase.lags_ms.len()));
        rows.push(if rate == GOAL_RATE { row.goal(at_most(10.0)) } else { row });
        if rate == GOAL_RATE {
            rows.extend(costs(&phase, &idle));
        }
        if Some(&(rate, name)) == RATES.last() {
            let rate = phase.operations as f64 / phase.took.as_secs_f64();
            rows.push(
                Row::alone("feed_apply_rate_400k", "ops/s", rate).note("operations seen applied"),
            );
        }
    }
    rows.extend(pauses(&scene, time).await?);
    if !plan.is_quick {
        let caught_up = scene.stand_still().await?.unwrap_or(0.0);
        let note = "until markers are on time again, after 2 s in which the sidecar stood still";
        rows.push(Row::alone("feed_catch_up_2s", "ms", caught_up).note(note));
    }
    scene.traffic.set(0, false);
    scene.check_and_stop().await?;
    Ok(rows)
}

fn costs(phase: &Phase, idle: &Phase) -> Vec<Row> {
    let beside = |name: &str, share: f64| {
        let (value, baseline) =
            (percentile(&phase.requests_ms, share), percentile(&idle.requests_ms, share));
        Row::beside(name, "ms", Better::Lower, value.max(1e-3), baseline.max(1e-3))
            .note("small requests, beside the same without feed")
    };
    vec![
        Row::alone("feed_cpu_envoy_100k", "ms", phase.cpu_ms(0, idle))
            .note("per 100 000 events, two VMs"),
        Row::alone("feed_cpu_sidecar_100k", "ms", phase.cpu_ms(1, idle)).note("per 100 000 events"),
        beside("feed_neighbour_p50_100k", 0.5),
        beside("feed_neighbour_p99_100k", 0.99),
    ]
}

/// The longest pause, with Envoy ahead of everything else: first while
/// another VM follows the sidecar, then while its own does.
async fn pauses(scene: &Scene, time: Duration) -> Result<Vec<Row>, Failure> {
    let is_real_time = scene.gateway.set_real_time(true);
    let follower = scene.measure(GOAL_RATE, true, time).await?;
    scene.gateway.lead().await?;
    let leader = scene.measure(GOAL_RATE, true, time).await?;
    scene.gateway.set_real_time(false);
    let pauses_ms = [&follower, &leader].map(|phase| phase.seen.pauses.max_ms());
    let slowest = |phase: &Phase| percentile(&phase.requests_ms, 1.0);
    Ok(vec![
        Row::alone("feed_pause_max", "ms", pauses_ms.into_iter().fold(0.0, f64::max))
            .goal(at_most(2.0))
            .note(pause_note(is_real_time)),
        Row::alone("feed_neighbour_max_100k", "ms", slowest(&follower).max(slowest(&leader)))
            .note("slowest small request meanwhile"),
        Row::alone("event_to_routable_p99_100k_leader", "ms", percentile(&leader.lags_ms, 0.99))
            .note("while the worker thread itself follows the sidecar"),
    ])
}

fn pause_note(is_real_time: bool) -> &'static str {
    if is_real_time {
        "Envoy at real-time priority"
    } else {
        "without real-time priority: includes waiting for a processor"
    }
}

fn at_most(value_max: f64) -> Goal {
    Goal { value_max: Some(value_max), ..Goal::default() }
}

/// The machine's monotonic clock, in nanoseconds: the one that the host gives to
/// the module.
fn clock_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    // It is never negative, and there is always one.
    now.map_or(0, |now| Duration::from(now).as_nanos().try_into().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_read() {
        let parse = |words: &[&str]| Plan::parse(words.iter().map(ToString::to_string));
        assert_eq!(parse(&[]).unwrap().parts.len(), 2);
        let plan = parse(&["--quick", "--only", "snapshot"]).unwrap();
        assert_eq!((plan.is_quick, plan.parts), (true, vec![Part::Snapshot]));
        assert_eq!(parse(&["--only", "else"]), None);
        assert_eq!(parse(&["--help"]), None);
    }
}
