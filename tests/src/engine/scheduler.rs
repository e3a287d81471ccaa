//! Scheduler: drives the batch in real time, and the figures an engine reports.
//!
//! What a step computes and how long it takes is `batch`'s; this waits for its end
//! and sends what came of it. Cache changes are published the moment a request is
//! scheduled, as vLLM does, that is before its prefill's time is over.
//!
//! # Invariants
//!
//! 1. The position of the event stream and the cache change under one lock, so
//!    a reader of both never sees one without the other.
//! 2. Before an answer's end is visible to the client, all its events are
//!    numbered and its blocks are free.
//! 3. A step begins when the one before should have ended: a late timer makes no
//!    engine slower, unless the machine is so late that it shows in `late_ms`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, sleep_until};

pub use super::batch::Generation;
use super::batch::{Batch, Bounds, Client, Emission, Plan};
use super::cache::PrefixCache;
use super::config::EngineConfig;
use super::events::{EventFormat, encode_batch};
use super::limits::{BEHIND_MAX, LAG_PIECES, LAG_POLL, OUTPUT_QUEUE_PIECES, WAITING_REQUESTS_MAX};
use super::model::{Model, Word};
use super::publisher::Publisher;

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// The prompt was scheduled.
    Started {
        /// Its tokens that were cached.
        cached_tokens: usize,
    },
    /// The next tokens, at least one.
    Words(Vec<Word>),
    /// The end; nothing follows.
    Finished,
}

/// Why a prompt is not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RejectError {
    /// Prompt and answer exceed the model's length or the whole cache.
    TooLong,
    /// Too many requests wait already.
    Busy,
}

/// Counters since the start, and gauges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Requests being decoded or prefilled.
    pub running: usize,
    /// Requests not yet scheduled.
    pub waiting: usize,
    /// Prompt tokens looked up.
    pub prefix_queries: u64,
    /// Prompt tokens found.
    pub prefix_hits: u64,
    /// Prompt tokens of finished admissions.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generation_tokens: u64,
    /// Answers that reached their end.
    pub finished: u64,
    /// Answers that did not: the client went away.
    pub aborted: u64,
    /// Requests turned away because too many waited.
    pub rejected: u64,
    /// Prompts whose tokens, as sent by a gateway, equal the engine's.
    pub token_data_equal: u64,
    /// Prompts whose tokens, as sent by a gateway, differ from the engine's.
    pub token_data_different: u64,
    /// Steps.
    pub steps: u64,
    /// Time in steps, in milliseconds.
    pub busy_ms: u64,
    /// The same, times the requests that ran or waited.
    pub request_ms: u64,
    /// Longest time by which a step ended late, in milliseconds.
    pub late_ms: u64,
}

/// State of the cache and of its stream at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Number that the next event batch will have.
    pub next_sequence: u64,
    /// Blocks with content.
    pub blocks_cached: usize,
    /// Blocks in use by running requests.
    pub blocks_used: usize,
    /// All blocks.
    pub blocks_total: usize,
}

struct State {
    cache: PrefixCache,
    batch: Batch<mpsc::Sender<Piece>>,
    /// Whether a task drives the batch.
    driven: bool,
    rejected: u64,
    token_data_equal: u64,
    token_data_different: u64,
    /// Longest time by which a step ended late.
    late: Duration,
}

/// One engine.
pub struct Engine {
    /// Tokenizer, template, words.
    pub model: Model,
    /// The stream of events.
    pub publisher: Publisher,
    state: Mutex<State>,
    model_tokens_max: usize,
    format: EventFormat,
}

impl Engine {
    /// An engine with an empty cache.
    #[must_use]
    pub fn new(model: Model, publisher: Publisher, config: &EngineConfig) -> Self {
        let block_size = usize::try_from(config.block_size).unwrap_or(usize::MAX);
        let bounds = Bounds {
            step_tokens_max: config.step_tokens_max,
            running_max: config.running_max,
            stream_interval: config.stream_interval,
        };
        Self {
            model,
            publisher,
            state: Mutex::new(State {
                cache: PrefixCache::new(block_size, config.blocks),
                batch: Batch::new(config.timing, bounds),
                driven: false,
                rejected: 0,
                token_data_equal: 0,
                token_data_different: 0,
                late: Duration::ZERO,
            }),
            model_tokens_max: config.model_tokens_max,
            format: EventFormat {
                form: config.events_form,
                hash: config.events_hash,
                block_size: config.block_size,
                dp_rank: config.dp_rank,
                kind: Some("full_attention"),
            },
        }
    }

    /// Starts answering a prompt. Dropping the receiver aborts it.
    ///
    /// # Errors
    ///
    /// [`RejectError`]; nothing was started.
    pub fn start(
        self: &Arc<Self>,
        generation: Generation,
    ) -> Result<mpsc::Receiver<Piece>, RejectError> {
        let tokens = generation.prompt.len().saturating_add(generation.output_tokens);
        let mut state = self.lock();
        let cache_tokens = state.cache.blocks_total() * state.cache.block_size();
        if tokens > self.model_tokens_max || tokens - 1 > cache_tokens {
            return Err(RejectError::TooLong);
        }
        if state.batch.waiting() >= WAITING_REQUESTS_MAX {
            state.rejected += 1;
            return Err(RejectError::Busy);
        }
        let (sender, receiver) = mpsc::channel(OUTPUT_QUEUE_PIECES);
        state.batch.add(sender, generation);
        if !std::mem::replace(&mut state.driven, true) {
            tokio::spawn(drive(Arc::clone(self)));
        }
        Ok(receiver)
    }

    /// Counters and gauges.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let state = self.lock();
        let counts = state.batch.counts();
        Figures {
            running: state.batch.running(),
            waiting: state.batch.waiting(),
            prefix_queries: counts.prompt_tokens,
            prefix_hits: counts.cached_tokens,
            prompt_tokens: counts.prompt_tokens,
            generation_tokens: counts.generated_tokens,
            finished: counts.finished,
            aborted: counts.aborted,
            rejected: state.rejected,
            token_data_equal: state.token_data_equal,
            token_data_different: state.token_data_different,
            steps: counts.steps,
            busy_ms: counts.busy_ns / 1_000_000,
            request_ms: counts.request_ns / 1_000_000,
            late_ms: u64::try_from(state.late.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// Cache and stream at one moment.
    #[must_use]
    pub fn position(&self) -> Position {
        let state = self.lock();
        Position {
            next_sequence: self.publisher.next_sequence(),
            blocks_cached: state.cache.blocks_cached(),
            blocks_used: state.cache.blocks_used(),
            blocks_total: state.cache.blocks_total(),
        }
    }

    /// Tokens per block.
    #[must_use]
    pub fn block_size(&self) -> usize {
        self.lock().cache.block_size()
    }

    /// Notes whether tokens that a gateway sent equal the engine's own.
    pub fn note_token_data(&self, equal: bool) {
        let mut state = self.lock();
        if equal {
            state.token_data_equal += 1;
        } else {
            state.token_data_different += 1;
        }
    }

    /// Clears the cache and announces it; `false` while a request runs.
    pub fn clear_cache(&self) -> bool {
        let mut state = self.lock();
        let cleared = state.cache.clear();
        self.publish(&mut state);
        cleared
    }

    /// Loses the cache without announcing it, as a process that dies does.
    pub fn forget_cache(&self) {
        self.lock().cache.forget();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Numbers and queues what the cache has to announce. With the state's lock
    /// held, so that order and position agree.
    fn publish(&self, state: &mut State) {
        let events = state.cache.take_events();
        if events.is_empty() {
            return;
        }
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.publisher.publish(encode_batch(since_epoch.as_secs_f64(), &events, &self.format));
    }

    /// Plans a step. `Idle` ends the task that drives the batch.
    fn plan(&self) -> Plan {
        let mut state = self.lock();
        let State { cache, batch, .. } = &mut *state;
        let plan = batch.plan(cache, |client| match client {
            client if client.is_closed() => Client::Gone,
            client if client.capacity() < LAG_PIECES => Client::Lags,
            _ => Client::Reads,
        });
        self.publish(&mut state);
        if plan == Plan::Idle {
            state.driven = false;
        }
        plan
    }

    /// Ends a step: publishes, then tells the clients.
    fn complete(&self, late: Duration) {
        let mut state = self.lock();
        state.late = state.late.max(late);
        let State { cache, batch, .. } = &mut *state;
        let out = batch.complete(cache, |seed, place| self.model.token(seed, place));
        self.publish(&mut state);
        drop(state);
        for emission in out {
            self.send(&emission);
        }
    }

    /// A client that went away is noticed by the next plan.
    fn send(&self, emission: &Emission<mpsc::Sender<Piece>>) {
        let Emission { tag, seed, first, count, cached_tokens, last } = emission;
        if *first == 0 {
            let _sent = tag.try_send(Piece::Started { cached_tokens: *cached_tokens });
        }
        let places = *first..first + count;
        let words = places.map(|place| self.model.word(*seed, place)).collect();
        let _sent = tag.try_send(Piece::Words(words));
        if *last {
            let _sent = tag.try_send(Piece::Finished);
        }
    }
}

/// Steps until there is nothing left to do.
async fn drive(engine: Arc<Engine>) {
    let mut due = Instant::now();
    loop {
        match engine.plan() {
            Plan::Idle => return,
            Plan::Stalled => {
                sleep(LAG_POLL).await;
                due = Instant::now();
            }
            Plan::Step(nanoseconds) => {
                due += Duration::from_nanos(nanoseconds);
                // Even if it is over: readers must get their turn.
                yield_now().await;
                if Instant::now() < due {
                    sleep_until(due).await;
                }
                let late = Instant::now().saturating_duration_since(due);
                engine.complete(late);
                if late > BEHIND_MAX {
                    due = Instant::now();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
