//! Policies: routers as functions of overlap and load, for the offline run.
//!
//! Ours are the very functions of the core. The others' are our reading of what
//! those routers do, in a few lines: good for seeing why, not for comparing.

use std::collections::HashMap;

use warmpath_core::choose::{Random, lowest};
use warmpath_core::ids::WorkerSlot;
use warmpath_core::score::expected_time::ExpectedTime;
use warmpath_core::score::{Candidate, Formula, Held, Phase, PromptSize};
use warmpath_core::settings::Settings;

use super::engines::BLOCK_SIZE;
use crate::engine::cache::EngineHash;

/// What a router knows of an engine when a request comes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outlook {
    /// Leading blocks of the prompt that it is known to hold.
    pub overlap_blocks: u32,
    /// Leading blocks of the prompt that requests placed on it have.
    pub booked_overlap_blocks: u32,
    /// How many of them have the last of those.
    pub sharers: u64,
    /// Uncached prompt tokens of requests without a first token.
    pub prefill_tokens: u64,
    /// Unique prompt blocks of its requests.
    pub active_blocks: u64,
    /// Requests.
    pub requests: u64,
}

/// How an engine is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Policy {
    /// One after the other.
    RoundRobin,
    /// The one with the fewest requests.
    LeastRequests,
    /// Dynamo's formula, with its `prefill_load_scale`.
    Dynamo(f64),
    /// Our own formula.
    ExpectedTime(ExpectedTime),
    /// As SGLang's router: where most of the prompt was sent before, if that is
    /// 30 %, else where least was sent; where fewest requests are, if those are
    /// 64 and half as many again apart.
    Text,
    /// As Shepherd's: the same, but to the fewest requests if little matches, or if
    /// the match has 8 and half as many again more than the mean.
    Spill,
}

impl Policy {
    /// Those of the offline tables, with their names.
    #[must_use]
    pub fn all() -> [(&'static str, Self); 8] {
        [
            ("round robin", Self::RoundRobin),
            ("least requests", Self::LeastRequests),
            ("Dynamo", Self::Dynamo(1.0)),
            ("Dynamo, scale 4", Self::Dynamo(4.0)),
            ("Dynamo, scale 16", Self::Dynamo(16.0)),
            ("as SGLang's", Self::Text),
            ("as Shepherd's", Self::Spill),
            ("expected time", Self::ExpectedTime(ExpectedTime::default())),
        ]
    }
}

/// A policy and what it remembers.
pub struct Router {
    policy: Policy,
    turn: usize,
    random: Random,
    /// Which engines each block was sent to, a bit each.
    sent: HashMap<EngineHash, u64>,
    /// Blocks that were sent to each engine for the first time.
    sizes: Vec<u64>,
}

impl Router {
    /// A router that knows nothing yet.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        let random = Random::seeded(7);
        Self { policy, turn: 0, random, sent: HashMap::new(), sizes: Vec::new() }
    }

    /// The engine for a prompt.
    ///
    /// - `tokens`: of the prompt.
    /// - `hashes`: names of its complete blocks.
    pub fn choose(&mut self, tokens: usize, hashes: &[EngineHash], outlooks: &[Outlook]) -> usize {
        let size = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let prompt = PromptSize { tokens: size(tokens), block_size: size(BLOCK_SIZE) };
        let candidates: Vec<Candidate> =
            outlooks.iter().map(|outlook| outlook.candidate(hashes.len())).collect();
        match self.policy {
            Policy::RoundRobin => {
                self.turn += 1;
                (self.turn - 1) % outlooks.len().max(1)
            }
            Policy::LeastRequests => self.fewest(outlooks),
            Policy::Dynamo(prefill_load_scale) => {
                let settings = Settings { prefill_load_scale, ..Settings::default() };
                let formula = Formula::new(&settings, Phase::Aggregated, true, prompt);
                self.lowest(formula.costs(&candidates).collect())
            }
            Policy::ExpectedTime(parameters) => {
                let block_size = prompt.block_size;
                let costs = parameters.costs(prompt, &candidates, |it| {
                    prompt.tokens.saturating_sub(it.held.device.saturating_mul(block_size))
                });
                self.lowest(costs)
            }
            Policy::Text => self.text(hashes, outlooks),
            Policy::Spill => self.spill(hashes, outlooks),
        }
    }

    fn lowest(&mut self, costs: Vec<f64>) -> usize {
        lowest(costs.into_iter(), &mut self.random).unwrap_or(0)
    }

    fn fewest(&mut self, outlooks: &[Outlook]) -> usize {
        self.lowest(outlooks.iter().map(|outlook| float(outlook.requests)).collect())
    }

    fn text(&mut self, hashes: &[EngineHash], outlooks: &[Outlook]) -> usize {
        let requests = || outlooks.iter().map(|outlook| outlook.requests);
        let (most, least) = (requests().max().unwrap_or(0), requests().min().unwrap_or(0));
        self.sizes.resize(outlooks.len(), 0);
        let chosen = match self.matching(hashes) {
            _ if most - least > 64 && most * 2 > least * 3 => self.fewest(outlooks),
            Some(engines) => usize::try_from(engines.trailing_zeros()).unwrap_or(0),
            None => self.lowest(self.sizes.iter().map(|size| float(*size)).collect()),
        };
        self.note(hashes, chosen);
        chosen
    }

    fn spill(&mut self, hashes: &[EngineHash], outlooks: &[Outlook]) -> usize {
        let all: u64 = outlooks.iter().map(|outlook| outlook.requests).sum();
        let mean = float(all) / float(outlooks.len() as u64).max(1.0);
        let matching = self.matching(hashes).unwrap_or(0);
        let ours = outlooks.iter().enumerate().filter(|(at, _)| matching & (1 << at) != 0);
        let chosen = match ours.min_by_key(|(_, outlook)| outlook.requests) {
            Some((at, outlook)) if float(outlook.requests) <= (mean + 8.0).max(1.5 * mean) => at,
            _ => self.fewest(outlooks),
        };
        self.note(hashes, chosen);
        chosen
    }

    /// The engines to which most of the prompt was sent; `None` if that is less
    /// than 30 %.
    fn matching(&self, hashes: &[EngineHash]) -> Option<u64> {
        let mut engines = u64::MAX;
        let mut matched = 0;
        for hash in hashes {
            let here = self.sent.get(hash).copied().unwrap_or(0) & engines;
            if here == 0 {
                break;
            }
            engines = here;
            matched += 1;
        }
        (matched * 10 > hashes.len() * 3).then_some(engines)
    }

    fn note(&mut self, hashes: &[EngineHash], chosen: usize) {
        for hash in hashes {
            let engines = self.sent.entry(*hash).or_default();
            let new = *engines & (1 << chosen) == 0;
            *engines |= 1 << chosen;
            if let Some(size) = self.sizes.get_mut(chosen).filter(|_| new) {
                *size += 1;
            }
        }
    }
}

impl Outlook {
    fn candidate(&self, blocks: usize) -> Candidate {
        Candidate {
            held: Held { device: self.overlap_blocks, ..Held::default() },
            prefill_tokens: self.prefill_tokens,
            active_blocks: self.active_blocks,
            additional_blocks: blocks as u64 - u64::from(self.booked_overlap_blocks),
            requests: self.requests,
            sharers: self.sharers,
            ..Candidate::idle(WorkerSlot(0))
        }
    }
}

fn float(number: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2⁵³")]
    let number = number as f64;
    number
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(from: u8, count: u8) -> Vec<EngineHash> {
        (from..from + count).map(|byte| EngineHash([byte; 32])).collect()
    }

    /// Goal: what was sent somewhere draws what begins alike there, unless it is
    /// too little, or too much is there already.
    #[test]
    fn text_draws_alike_prompts() {
        for policy in [Policy::Text, Policy::Spill] {
            let mut router = Router::new(policy);
            let idle = [Outlook::default(); 3];
            let first = router.choose(160, &hashes(1, 10), &idle);
            let alike = [hashes(1, 4), hashes(50, 6)].concat();
            assert_eq!(router.choose(160, &alike, &idle), first);
            let mut busy = idle;
            busy[first].requests = 100;
            assert_ne!(router.choose(160, &hashes(1, 10), &busy), first);
        }
    }

    #[test]
    fn ours_follow_overlap_and_load() {
        for policy in [Policy::Dynamo(1.0), Policy::all()[7].1] {
            let mut router = Router::new(policy);
            let warm = Outlook { overlap_blocks: 9, ..Outlook::default() };
            let outlooks = [Outlook::default(), warm, Outlook::default()];
            assert_eq!(router.choose(165, &hashes(1, 10), &outlooks), 1);
            let queued = Outlook { prefill_tokens: 100_000, requests: 9, ..warm };
            let outlooks = [Outlook::default(), queued];
            assert_eq!(router.choose(165, &hashes(1, 10), &outlooks), 0);
        }
    }
}
