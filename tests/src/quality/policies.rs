//! Policies: routers as functions of overlap and load, for the offline run.

use std::collections::HashMap;

use super::engines::BLOCK_SIZE;
use crate::engine::cache::EngineHash;
use crate::stack::conversations::Numbers;

/// What a router knows of an engine when a request comes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outlook {
    /// Leading blocks of the prompt that it is known to hold.
    pub overlap_blocks: u32,
    /// Leading blocks of the prompt that requests placed on it have.
    pub booked_overlap_blocks: u32,
    /// Uncached prompt tokens of requests without a first token.
    pub prefill_tokens: u64,
    /// Unique prompt blocks of its requests.
    pub active_blocks: u64,
    /// Requests.
    pub requests: u64,
    /// Prompt tokens of its requests, shared ones as often as they are shared.
    pub context_tokens: u64,
    /// Blocks of its cache.
    pub total_blocks: u64,
}

/// How an engine is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Policy {
    /// One after the other.
    RoundRobin,
    /// The one with the fewest requests.
    LeastRequests,
    /// Dynamo's cost.
    Dynamo {
        /// Weight of prefill against active blocks.
        prefill_scale: f64,
    },
    /// As SGLang's router: by what was sent where, unless requests are far apart.
    Text {
        /// Share of the prompt that must match.
        threshold: f64,
        /// Requests that the most and the least busy engine must be apart.
        apart: u64,
        /// Times that they must be apart.
        times: f64,
    },
    /// Experiment.
    Time(Weights),
}

/// Weights of the experiment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weights {
    /// Own prefill.
    pub prefill: f64,
    /// Delay of others by own prefill.
    pub delay: f64,
    /// Own decode, slowed down by others.
    pub decode: f64,
    /// Others' decode, slowed down by own.
    pub others: f64,
    /// Tokens of the answer, as expected.
    pub output: f64,
    /// Constant weight of work.
    pub work: f64,
    pub queue: f64,
    pub crowd: f64,
    pub same: f64,
}

/// A policy and what it remembers.
pub struct Router {
    policy: Policy,
    turn: usize,
    numbers: Numbers,
    /// Which engines each block was sent to.
    sent: HashMap<EngineHash, u64>,
    /// Blocks sent to each engine for the first time.
    sizes: Vec<u64>,
}

impl Router {
    /// A router that knows nothing yet.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        let numbers = Numbers::new(7);
        Self { policy, turn: 0, numbers, sent: HashMap::new(), sizes: Vec::new() }
    }

    /// The engine for a prompt.
    pub fn choose(
        &mut self,
        tokens: usize,
        hashes: &[EngineHash],
        outlooks: &[Outlook],
    ) -> usize {
        match self.policy {
            Policy::RoundRobin => {
                self.turn += 1;
                (self.turn - 1) % outlooks.len().max(1)
            }
            Policy::LeastRequests => {
                self.lowest(outlooks.iter().map(|outlook| float(outlook.requests)))
            }
            Policy::Dynamo { prefill_scale } => {
                self.lowest(outlooks.iter().map(|o| dynamo(tokens, hashes.len(), o, prefill_scale)))
            }
            Policy::Text { threshold, apart, times } => {
                self.text(hashes, outlooks, threshold, apart, times)
            }
            Policy::Time(weights) => {
                let mean = outlooks.iter().map(|o| float(o.prefill_tokens)).sum::<f64>() / outlooks.len() as f64;
                self.lowest(outlooks.iter().map(|o| time(tokens, o, &weights, mean)))
            }
        }
    }

    fn lowest(&mut self, costs: impl Iterator<Item = f64>) -> usize {
        let mut best = (0, f64::INFINITY);
        let mut ties = 0;
        for (at, cost) in costs.enumerate() {
            if cost < best.1 {
                best = (at, cost);
                ties = 1;
            } else if cost <= best.1 {
                ties += 1;
                if self.numbers.below(ties) == 0 {
                    best.0 = at;
                }
            }
        }
        best.0
    }

    fn text(
        &mut self,
        hashes: &[EngineHash],
        outlooks: &[Outlook],
        threshold: f64,
        apart: u64,
        times: f64,
    ) -> usize {
        self.sizes.resize(outlooks.len(), 0);
        let requests = || outlooks.iter().map(|outlook| outlook.requests);
        let (most, least) = (requests().max().unwrap_or(0), requests().min().unwrap_or(0));
        let chosen = if most - least > apart && float(most) > times * float(least) {
            self.lowest(outlooks.iter().map(|outlook| float(outlook.requests)))
        } else {
            let mut engines = u64::MAX;
            let mut matched = 0_u64;
            for hash in hashes {
                let here = self.sent.get(hash).copied().unwrap_or(0) & engines;
                if here == 0 {
                    break;
                }
                engines = here;
                matched += 1;
            }
            if float(matched) > threshold * float(hashes.len() as u64) {
                usize::try_from(engines.trailing_zeros()).unwrap_or(0)
            } else {
                self.lowest(self.sizes.clone().into_iter().map(float))
            }
        };
        for hash in hashes {
            let engines = self.sent.entry(*hash).or_default();
            if *engines & (1 << chosen) == 0 {
                *engines |= 1 << chosen;
                if let Some(size) = self.sizes.get_mut(chosen) {
                    *size += 1;
                }
            }
        }
        chosen
    }
}

fn dynamo(tokens: usize, blocks: usize, outlook: &Outlook, prefill_scale: f64) -> f64 {
    let overlap = float(u64::from(outlook.overlap_blocks));
    let raw = float(outlook.prefill_tokens + tokens as u64) / BLOCK_SIZE as f64;
    let additional = blocks as u64 - u64::from(outlook.booked_overlap_blocks);
    prefill_scale * (raw - overlap).max(0.0) + float(outlook.active_blocks + additional)
}

fn time(tokens: usize, o: &Outlook, w: &Weights, mean: f64) -> f64 {
    let held = o.overlap_blocks.max(o.booked_overlap_blocks) as usize * BLOCK_SIZE;
    let uncached = float(tokens.saturating_sub(held).max(1) as u64);
    let isl = float(tokens as u64);
    let (tau, kappa, sigma) = (70.0, 0.035, 30.0);
    let r = float(o.requests);
    let c = if w.same > 0.0 { r * isl } else { float(o.context_tokens) + r * w.output / 2.0 };
    w.prefill * (w.queue * float(o.prefill_tokens) + uncached) * tau
        + (w.work + w.crowd * mean / isl) * uncached * tau
        + w.delay * r * uncached * tau
        + w.decode * w.output * (sigma * r + kappa * c)
        + w.others * r * w.output / 2.0 * (sigma + kappa * isl)
}

fn float(number: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2⁵³")]
    let number = number as f64;
    number
}
