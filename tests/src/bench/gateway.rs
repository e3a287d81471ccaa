//! Gateway: what a gateway adds to a request, in time and processor time, ours beside
//! Envoy alone, an endpoint picker of the same job, and other routers.
//!
//! | module | what |
//! |---|---|
//! | `engines` | workers that answer at once and publish what they hold |
//! | `prompts` | the requests |
//! | `targets` | what is compared, and how it is started |
//! | `warmth` | fills the indexes and waits until they are full |
//! | `measure` | sends the requests, target by target in turn |
//! | `report` | rows and the table |
//!
//! # Method
//!
//! All targets are up at the same time and choose among the same engines (Dynamo's
//! frontend: among mocked ones of its own). Every target gets the same requests.
//!
//! - One connection: each request goes to all targets, one after the other, and who
//!   is first moves on by one with every request. What disturbs the machine disturbs
//!   all alike. What a target adds is its median less that of Envoy alone.
//! - 16 connections: each target has the machine to itself for a slice of the
//!   requests, in turn. Processor time is that of all processes of the target, from
//!   the scheduler's count, over its slices, idle work included; what it takes when
//!   nobody asks anything is a row of its own.
//! - The turn before is sent to all, unmeasured, before a conversation's next turn.
//! - The engines' events are published before anything is measured: so the indexes
//!   are full, and none changes while times are taken.
//!
//! Every answer is checked: its status, its body, that the engine that answered is the
//! one that was named, and on one connection that this is the one that holds the most
//! of the prompt.

pub mod engines;
pub mod measure;
pub mod prompts;
pub mod report;
pub mod targets;
pub mod warmth;

use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use tokio::time::sleep;

use crate::bench::corpus::{Corpus, CorpusError};
use crate::bench::load::{Connection, Fault, cpu_ns};
use crate::bench::rows::write_part;
use crate::engine::model::Model;
use crate::stack::child::Child;
use crate::stack::launch::StackError;
use crate::stack::options::Options;
use crate::stack::report::line;

use engines::{COUNT, Engines, TOKENS, digest};
use measure::Plan;
use prompts::{Kind, Prompt, PromptsError, SIZES};
use targets::{Running, Starter, Target, picker_program, sglang_program};
use warmth::Warmth;

/// Time over which the idle targets' processor time is taken.
const IDLE: Duration = Duration::from_secs(2);

/// Connections where many are asked at once.
pub const CONNECTIONS: usize = 16;

/// Why there are no figures.
#[derive(Debug)]
pub enum GatewayError {
    /// Something could not be started, or was not ready in time.
    Stack(StackError),
    /// There are no prompts.
    Prompts(PromptsError),
    /// An answer was not right; whose, and how.
    Answer(&'static str, String, Fault),
    /// Too few of some target's choices were the ones with the longest prefix; in
    /// which case, right ones of each target, all.
    Choices(String, Vec<(Target, usize)>, usize),
    /// Tokens handed over are not the engine's.
    Tokens,
}

impl std::fmt::Display for GatewayError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stack(error) => error.fmt(formatter),
            Self::Prompts(error) => error.fmt(formatter),
            Self::Answer(target, case, fault) => write!(formatter, "{target}, {case}: {fault}"),
            Self::Choices(case, right, all) => {
                write!(formatter, "{case}: of {all} choices, these had the longest prefix:")?;
                right
                    .iter()
                    .try_for_each(|(target, right)| write!(formatter, " {} {right}", target.name()))
            }
            Self::Tokens => formatter.write_str("the tokens handed over are not the engine's"),
        }
    }
}

impl std::error::Error for GatewayError {}

impl From<StackError> for GatewayError {
    fn from(error: StackError) -> Self {
        Self::Stack(error)
    }
}

impl From<std::io::Error> for GatewayError {
    fn from(error: std::io::Error) -> Self {
        Self::Stack(error.into())
    }
}

impl From<PromptsError> for GatewayError {
    fn from(error: PromptsError) -> Self {
        Self::Prompts(error)
    }
}

impl From<CorpusError> for GatewayError {
    fn from(error: CorpusError) -> Self {
        Self::Prompts(error.into())
    }
}

/// Runs it all and writes the part.
///
/// # Errors
///
/// [`GatewayError`]; slowness is none.
pub async fn run(plan: &Plan, options: &Options) -> Result<(), GatewayError> {
    let started = Instant::now();
    let targets = present(plan, options);
    let model = Model::load(&options.model_dir);
    let model = model.map_err(|error| std::io::Error::other(error.to_string()))?;
    let mut corpus = Corpus::load(&options.root, plan.seed)?;
    let mut cases = Vec::new();
    for case in plan.cases() {
        let prompts = prompts::make(&mut corpus, &model, case.kind, case.bytes(), case.count)?;
        cases.push((case, prompts));
    }
    let mut checks = Vec::new();
    for (_, bytes) in SIZES {
        checks.extend(prompts::make(&mut corpus, &model, Kind::First, bytes, 1)?);
    }
    let warmth = Warmth::new(&mut corpus, &model)?;
    line(format_args!("prompts made: {} s", started.elapsed().as_secs()));

    let folder = tempfile::Builder::new().prefix("warmpath-bench-").tempdir()?;
    let engines = Engines::start().await?;
    let starter = Starter { options, engines: &engines, folder: folder.path() };
    let mut up = Up { targets: Vec::new(), mockers: None };
    let result = async {
        up.start(&starter, &targets).await?;
        let fed = warmth.spread(&engines, &cases, &mut up.targets).await?;
        line(format_args!("targets ready: {} s", started.elapsed().as_secs()));
        check_tokens(&model, &checks, &up.targets).await?;
        let idle = idle(&up.targets).await;
        let measured = measure::all(plan, &engines.http(), &mut up.targets, &cases).await?;
        Ok(report::rows(&measured, &fed, &idle))
    }
    .await;
    up.stop().await;
    let rows = result.inspect_err(|_: &GatewayError| keep_logs(folder))?;
    write_part("gateway", &rows)?;
    line(format_args!("{} rows: {} s", rows.len(), started.elapsed().as_secs()));
    Ok(())
}

/// Keeps the folder of configurations and logs, and tells where it is.
fn keep_logs(folder: TempDir) {
    line(format_args!("logs: {}", folder.keep().display()));
}

/// The targets of a plan. The quick run leaves out what is not installed or built.
fn present(plan: &Plan, options: &Options) -> Vec<Target> {
    let there = |target: &Target| match target {
        Target::Envoy | Target::Warmpath | Target::WarmpathTokens => true,
        Target::PickerFastokens | Target::PickerHf | Target::PickerDuplex => {
            picker_program(options).exists()
        }
        Target::SglangRouter => sglang_program(options).exists(),
        Target::Dynamo | Target::DynamoFastokens => options.python.exists(),
    };
    plan.targets.iter().copied().filter(|target| !plan.quick || there(target)).collect()
}

/// What runs.
struct Up {
    targets: Vec<Running>,
    mockers: Option<Child>,
}

impl Up {
    async fn start(
        &mut self,
        starter: &Starter<'_>,
        targets: &[Target],
    ) -> Result<(), GatewayError> {
        if targets.iter().any(|target| matches!(target, Target::Dynamo | Target::DynamoFastokens)) {
            self.mockers = Some(starter.mockers()?);
        }
        for target in targets {
            self.targets.push(starter.start(*target).await?);
        }
        Ok(())
    }

    async fn stop(self) {
        for target in self.targets {
            target.stop().await;
        }
        if let Some(mockers) = self.mockers {
            mockers.stop().await;
        }
    }
}

/// Compares the tokens that are handed over with the engine's own.
async fn check_tokens(
    model: &Model,
    checks: &[Prompt],
    targets: &[Running],
) -> Result<(), GatewayError> {
    let Some(running) = targets.iter().find(|it| it.target == Target::WarmpathTokens) else {
        return Ok(());
    };
    let name = running.target.name();
    let fault = |fault| GatewayError::Answer(name, "tokens handed over".into(), fault);
    let mut connection = Connection::open(&running.address).await.map_err(fault)?;
    for check in checks {
        let mut request = check.request.clone();
        request.headers.push((COUNT, "1".into()));
        let answer = connection.send(&request).await.map_err(fault)?;
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let messages = body.get("messages").and_then(Value::as_array).cloned();
        let tokens = prompts::tokens(model, &messages.unwrap_or_default())?;
        let expected = digest(tokens.into_iter().map(u64::from));
        if answer.header(TOKENS) != Some(&expected) {
            return Err(GatewayError::Tokens);
        }
    }
    Ok(())
}

/// Processor time that each target takes when nobody asks anything, in microseconds
/// per second.
async fn idle(targets: &[Running]) -> Vec<(Target, f64)> {
    let before: Vec<u64> = targets.iter().map(|it| cpu_ns(&it.processes())).collect();
    sleep(IDLE).await;
    let spent = targets.iter().zip(before).map(|(running, before)| {
        let ns = cpu_ns(&running.processes()).saturating_sub(before);
        (running.target, float(ns) / 1000.0 / IDLE.as_secs_f64())
    });
    spent.collect()
}

fn float(number: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2⁵³")]
    let number = number as f64;
    number
}
