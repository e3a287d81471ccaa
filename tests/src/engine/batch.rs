//! Batch: continuous batching, step by step, without a clock.
//!
//! A step computes one token of every running answer and, with what is left of
//! the step's token budget, parts of prompts, first come first served: as vLLM
//! schedules with chunked prefill. Who drives it decides what time is: the
//! engine waits for each step's end, an offline run jumps to it.
//!
//! # Time of a step
//!
//! ```text
//! step + prefill · prompt tokens + sequence · requests + context · tokens attended to
//! ```
//!
//! So a prompt slows down the answers beside it, a long answer's step costs more
//! than a short one's, and an idle engine answers in little more than `step`.
//!
//! # Invariants
//!
//! 1. A request's blocks are given back exactly once, whether it ends or its
//!    client goes away.
//! 2. Blocks are announced when the prompt is first scheduled; nobody behind it
//!    is scheduled before its last part, so nobody uses what is not there yet.
//! 3. Requests enter in the order in which they came.

use std::collections::VecDeque;

use super::cache::{AdmitError, CacheKeys, PrefixCache, Sequence};
use super::model::answer_seed;

/// How long work takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// A step with next to nothing in it, in microseconds.
    pub step_us: u64,
    /// Per prompt token that is computed, in microseconds.
    pub prefill_us_per_token: u64,
    /// Per request in the step, in microseconds.
    pub sequence_us: u64,
    /// Per token of context that the step's requests attend to, in nanoseconds.
    pub context_ns_per_token: u64,
    /// All of these are divided by it; at least 1.
    pub speedup: u64,
}

impl Timing {
    /// Nothing takes any time.
    pub const NONE: Self = Self {
        step_us: 0,
        prefill_us_per_token: 0,
        sequence_us: 0,
        context_ns_per_token: 0,
        speedup: 1,
    };
}

/// Bounds of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Tokens computed in one step, at least 1.
    pub step_tokens_max: usize,
    /// Requests at once.
    pub running_max: usize,
    /// Tokens of an answer that go out together, but for its first, at least 1.
    pub stream_interval: usize,
}

/// One prompt to answer.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Prompt tokens, at least one.
    pub prompt: Vec<u32>,
    /// Tokens to generate, at least one.
    pub output_tokens: usize,
    /// What separates its cache.
    pub keys: CacheKeys,
}

/// What a request's client is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// It reads.
    Reads,
    /// It does not keep up: no token for it now.
    Lags,
    /// It has gone.
    Gone,
}

/// What the next step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Nothing to do.
    Idle,
    /// There is something, but nobody reads.
    Stalled,
    /// It takes so long, in nanoseconds.
    Step(u64),
}

/// Tokens of an answer that go out at a step's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Emission<T> {
    /// Whose.
    pub tag: T,
    /// Seed of its words.
    pub seed: u64,
    /// Place of the first one in the answer; 0 means that the prompt is done.
    pub first: usize,
    /// How many.
    pub count: usize,
    /// Prompt tokens that were cached.
    pub cached_tokens: usize,
    /// Whether the answer is complete.
    pub last: bool,
}

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Prompt tokens of scheduled requests.
    pub prompt_tokens: u64,
    /// Of these, found in the cache.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Answers that reached their end.
    pub finished: u64,
    /// Answers that did not: the client went away.
    pub aborted: u64,
    /// Steps.
    pub steps: u64,
    /// Time in steps, in nanoseconds.
    pub busy_ns: u64,
    /// The same, times the requests that ran or waited.
    pub request_ns: u64,
}

#[derive(Debug)]
struct Waiting<T> {
    tag: T,
    generation: Generation,
}

/// What a running request does in the planned step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Share {
    Nothing,
    Prompt(usize),
    Token,
}

#[derive(Debug)]
struct Running<T> {
    tag: T,
    sequence: Sequence,
    prompt_tokens: usize,
    /// Prompt tokens that are cached or computed.
    computed: usize,
    output_tokens: usize,
    seed: u64,
    generated: usize,
    /// Generated and gone out.
    emitted: usize,
    /// The last generated token; enters the cache when the next is computed.
    last_token: Option<u32>,
    share: Share,
}

/// The requests of one engine.
#[derive(Debug)]
pub struct Batch<T> {
    timing: Timing,
    bounds: Bounds,
    running: Vec<Running<T>>,
    waiting: VecDeque<Waiting<T>>,
    /// The first waiting request did not fit, and nothing was freed since.
    full: bool,
    counts: Counts,
    planned_ns: u64,
}

impl<T: Clone> Batch<T> {
    /// No requests.
    #[must_use]
    pub fn new(timing: Timing, bounds: Bounds) -> Self {
        Self {
            timing,
            bounds,
            running: Vec::new(),
            waiting: VecDeque::new(),
            full: false,
            counts: Counts::default(),
            planned_ns: 0,
        }
    }

    /// Adds a request. It must fit an empty cache.
    pub fn add(&mut self, tag: T, generation: Generation) {
        self.waiting.push_back(Waiting { tag, generation });
    }

    /// Requests that were scheduled and have not ended.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Requests that were not scheduled yet.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Counters.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Decides what the next step computes.
    ///
    /// - `client`: what becomes of a request's tokens.
    pub fn plan(&mut self, cache: &mut PrefixCache, client: impl Fn(&T) -> Client) -> Plan {
        self.drop_gone(cache, &client);
        let mut budget = self.bounds.step_tokens_max.max(1);
        let (mut prompt_tokens, mut context, mut requests) = (0, 0, 0_u64);
        for running in &mut self.running {
            running.share = Share::Nothing;
            if running.generated == 0 {
                let part = budget.min(running.prompt_tokens - running.computed);
                if part > 0 {
                    running.share = Share::Prompt(part);
                    prompt_tokens += part;
                }
                budget -= part;
            } else if budget > 0 && client(&running.tag) == Client::Reads {
                if let Some(token) = running.last_token.take() {
                    cache.extend(&mut running.sequence, token);
                }
                running.share = Share::Token;
                budget -= 1;
            }
            if running.share != Share::Nothing {
                requests += 1;
                context += running.context();
            }
        }
        while budget > 0 && !self.full && self.running.len() < self.bounds.running_max {
            let Some(running) = self.admit(cache, budget) else { break };
            if let Share::Prompt(part) = running.share {
                prompt_tokens += part;
                budget -= part;
            }
            requests += 1;
            context += running.context();
            self.running.push(running);
        }
        if requests == 0 {
            let idle = self.running.is_empty() && self.waiting.is_empty();
            return if idle { Plan::Idle } else { Plan::Stalled };
        }
        let timing = self.timing;
        let microseconds = timing
            .step_us
            .saturating_add(timing.prefill_us_per_token.saturating_mul(prompt_tokens as u64))
            .saturating_add(timing.sequence_us.saturating_mul(requests));
        let nanoseconds = microseconds
            .saturating_mul(1000)
            .saturating_add(timing.context_ns_per_token.saturating_mul(context as u64));
        self.planned_ns = nanoseconds / timing.speedup.max(1);
        Plan::Step(self.planned_ns)
    }

    /// Ends the step that was planned. Returns what goes out; requests that end
    /// have given their blocks back.
    ///
    /// - `token`: the token at a place of the answer with a seed.
    pub fn complete(
        &mut self,
        cache: &mut PrefixCache,
        token: impl Fn(u64, usize) -> u32,
    ) -> Vec<Emission<T>> {
        let present = (self.running.len() + self.waiting.len()) as u64;
        self.counts.steps += 1;
        self.counts.busy_ns += self.planned_ns;
        self.counts.request_ns += self.planned_ns.saturating_mul(present);
        let mut out = Vec::new();
        let mut left = Vec::with_capacity(self.running.len());
        for mut running in self.running.drain(..) {
            match std::mem::replace(&mut running.share, Share::Nothing) {
                Share::Nothing => {
                    left.push(running);
                    continue;
                }
                Share::Prompt(part) => {
                    running.computed += part;
                    if running.computed < running.prompt_tokens {
                        left.push(running);
                        continue;
                    }
                }
                Share::Token => {}
            }
            running.last_token = Some(token(running.seed, running.generated));
            running.generated += 1;
            self.counts.generated_tokens += 1;
            out.extend(running.emit(self.bounds.stream_interval));
            if running.generated < running.output_tokens {
                left.push(running);
            } else {
                cache.finish(running.sequence);
                self.counts.finished += 1;
                self.full = false;
            }
        }
        self.running = left;
        out
    }

    /// Lets the first waiting request in, if it fits.
    fn admit(&mut self, cache: &mut PrefixCache, budget: usize) -> Option<Running<T>> {
        let Waiting { generation, .. } = self.waiting.front()?;
        let keys = generation.keys.clone();
        match cache.admit(&generation.prompt, generation.output_tokens, keys) {
            Ok(sequence) => {
                let Waiting { tag, generation } = self.waiting.pop_front()?;
                let prompt_tokens = generation.prompt.len();
                let computed = sequence.cached_tokens();
                self.counts.prompt_tokens += prompt_tokens as u64;
                self.counts.cached_tokens += computed as u64;
                Some(Running {
                    tag,
                    sequence,
                    prompt_tokens,
                    computed,
                    output_tokens: generation.output_tokens.max(1),
                    seed: answer_seed(&generation.prompt),
                    generated: 0,
                    emitted: 0,
                    last_token: None,
                    share: Share::Prompt(budget.min(prompt_tokens - computed)),
                })
            }
            Err(AdmitError::Full) => {
                self.full = true;
                None
            }
            // Ruled out by the caller; it must not stand in others' way.
            Err(AdmitError::TooLong) => {
                self.waiting.pop_front();
                None
            }
        }
    }

    fn drop_gone(&mut self, cache: &mut PrefixCache, client: &impl Fn(&T) -> Client) {
        self.waiting.retain(|waiting| client(&waiting.tag) != Client::Gone);
        if !self.running.iter().any(|running| client(&running.tag) == Client::Gone) {
            return;
        }
        let (gone, left): (Vec<_>, Vec<_>) = self
            .running
            .drain(..)
            .partition(|running: &Running<T>| client(&running.tag) == Client::Gone);
        self.running = left;
        for running in gone {
            cache.finish(running.sequence);
            self.counts.aborted += 1;
            self.full = false;
        }
    }
}

impl<T: Clone> Running<T> {
    /// Tokens whose keys and values the step reads.
    fn context(&self) -> usize {
        self.computed + self.generated
    }

    /// What goes out now that one more token is there.
    fn emit(&mut self, interval: usize) -> Option<Emission<T>> {
        let last = self.generated >= self.output_tokens;
        let due = self.generated == 1 || self.generated - self.emitted >= interval;
        if !last && !due {
            return None;
        }
        let first = std::mem::replace(&mut self.emitted, self.generated);
        Some(Emission {
            tag: self.tag.clone(),
            seed: self.seed,
            first,
            count: self.generated - first,
            cached_tokens: self.sequence.cached_tokens(),
            last,
        })
    }
}

#[cfg(test)]
mod tests;
