//! Warmth: what the engines hold before anything is measured, and waiting until all
//! who listen know.

use std::time::Instant;

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::engines::{ENGINES, Engines};
use super::measure::Case;
use super::prompts::{Prompt, PromptsError, request, system, tokens};
use super::targets::Running;
use super::{GatewayError, Target, float};
use crate::bench::corpus::Corpus;
use crate::bench::load::{Connection, Outgoing, cpu_ns};
use crate::engine::model::Model;
use crate::stack::launch::{BLOCK_SIZE, StackError};
use crate::stack::limits::{POLL_START, READY_WITHIN};

/// Rounds of right choices in a row, one choice for each engine's prompt in each.
const WARM_ROUNDS: u32 = 3;

/// Text of what is held last, in bytes.
const SENTINEL_BYTES: usize = 4_000;

/// What is held first and last by each engine.
pub struct Warmth {
    /// Tokens of the system prompts.
    systems: Vec<Vec<u32>>,
    /// What each engine holds last: a conversation without a system prompt, so that only
    /// its own event leads to it.
    sentinels: Vec<(Vec<Value>, Vec<u32>)>,
}

impl Warmth {
    /// Makes the texts.
    ///
    /// # Errors
    ///
    /// [`PromptsError`].
    pub fn new(corpus: &mut Corpus, model: &Model) -> Result<Self, PromptsError> {
        let mut systems = Vec::new();
        let mut sentinels = Vec::new();
        for engine in 0..ENGINES {
            let with = |text: &str| {
                tokens(model, &[system(engine), json!({"role": "user", "content": text})])
            };
            let (one, other) = (with("a")?, with("1")?);
            let common = one.iter().zip(&other).take_while(|(one, other)| one == other);
            systems.push(common.map(|(token, _)| *token).collect());
            let text = corpus.text(SENTINEL_BYTES)?;
            let messages = vec![json!({"role": "user", "content": text})];
            let held = tokens(model, &messages)?;
            sentinels.push((messages, held));
        }
        Ok(Self { systems, sentinels })
    }

    /// Has the engines announce all that they hold, and waits until every target
    /// that decides makes the right choices. Tells the processor time that each
    /// target took for it, in nanoseconds per block.
    ///
    /// # Errors
    ///
    /// [`GatewayError::Stack`] if one does not within [`READY_WITHIN`].
    pub async fn spread(
        &self,
        engines: &Engines,
        cases: &[(Case, Vec<Prompt>)],
        targets: &mut [Running],
    ) -> Result<Vec<(Target, f64)>, GatewayError> {
        let systems = |number: u64, engine: usize| {
            let text = format!("probe {number} of engine {engine}");
            request(&[system(engine), json!({"role": "user", "content": text})])
        };
        // Whoever connects late misses what was published before.
        let again = async || {
            for (engine, held) in self.systems.iter().enumerate() {
                engines.hold(engine, held).await;
            }
        };
        until_right(engines, targets, systems, again).await?;

        let before: Vec<u64> = targets.iter().map(|it| cpu_ns(&it.processes())).collect();
        let blocks = join_all((0..ENGINES).map(async |engine| {
            let prompts = cases.iter().flat_map(|(_, prompts)| prompts);
            let held = prompts.filter(|prompt| prompt.holder == engine).map(|prompt| &prompt.held);
            let last = self.sentinels.get(engine).map(|(_, held)| held);
            let mut blocks = 0;
            for held in held.chain(last) {
                engines.hold(engine, held).await;
                blocks += held.len() / BLOCK_SIZE as usize;
            }
            blocks as u64
        }))
        .await;
        let sentinels = |number: u64, engine: usize| {
            let (messages, _) = self.sentinels.get(engine).cloned().unwrap_or_default();
            let more = [("assistant", "Yes."), ("user", &format!("probe {number}"))];
            let more = more.map(|(role, text)| json!({"role": role, "content": text}));
            request(&[messages, more.into()].concat())
        };
        until_right(engines, targets, sentinels, async || {}).await?;
        let blocks = float(blocks.iter().sum());
        let spent = targets.iter().zip(before).filter(|(running, _)| running.target.decides());
        Ok(spent
            .map(|(running, before)| {
                let ns = cpu_ns(&running.processes()).saturating_sub(before);
                (running.target, float(ns) / blocks.max(1.0))
            })
            .collect())
    }
}

/// Waits until every target answers, and those that decide choose right.
async fn until_right(
    engines: &Engines,
    targets: &mut [Running],
    probe: impl Fn(u64, usize) -> Outgoing,
    again: impl AsyncFn(),
) -> Result<(), GatewayError> {
    let ports = engines.http();
    let deadline = Instant::now() + READY_WITHIN;
    let mut number = 0;
    for running in targets {
        let mut rounds = 0;
        while rounds < WARM_ROUNDS {
            if let Some((name, log)) = running.ended() {
                return Err(StackError::Ended(name, log).into());
            }
            if Instant::now() > deadline {
                let what = "right choices of every target";
                return Err(StackError::NotReady(what, running.logs()).into());
            }
            number += 1;
            if round(running, &ports, |engine| probe(number, engine)).await {
                rounds += 1;
            } else {
                rounds = 0;
                again().await;
                sleep(POLL_START).await;
            }
        }
    }
    Ok(())
}

/// Whether a target answers the probes of all engines right.
async fn round(running: &Running, ports: &[u16], probe: impl Fn(usize) -> Outgoing) -> bool {
    let Ok(mut connection) = Connection::open(&running.address).await else { return false };
    for (engine, port) in ports.iter().enumerate() {
        let answer = connection.send(&probe(engine)).await;
        match answer.and_then(|answer| running.target.served(&answer)) {
            Ok(Some(served)) if served != *port => return false,
            Ok(_) => {}
            Err(_) => return false,
        }
    }
    true
}
