//! Scheduler: admission, prefill, decode, and the figures an engine reports.
//!
//! Requests are served first come, first served. One prefill runs at a time and
//! takes time in proportion to the tokens that were not cached; decodes run
//! together and slow each other down. Cache changes are published the moment a
//! request is scheduled, as vLLM does, that is before its prefill's time is
//! over.
//!
//! # Invariants
//!
//! 1. The position of the event stream and the cache change under one lock, so
//!    a reader of both never sees one without the other.
//! 2. A request's blocks are given back exactly once, also when its client goes
//!    away or the answer fails.
//! 3. Before an answer's end is visible to the client, all its events are
//!    numbered and its blocks are free.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{Mutex as AsyncMutex, Notify, mpsc};
use tokio::time::{Instant, sleep, sleep_until};

use super::cache::{AdmitError, CacheKeys, PrefixCache, Sequence};
use super::config::{EngineConfig, Timing};
use super::events::{EventFormat, encode_batch};
use super::limits::{OUTPUT_QUEUE_PIECES, WAITING_REQUESTS_MAX};
use super::model::{Model, Word, answer_seed};
use super::publisher::Publisher;

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

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// The prompt was scheduled.
    Started {
        /// Its tokens that were cached.
        cached_tokens: usize,
    },
    /// A token.
    Word(Word),
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
    figures: Figures,
}

/// One engine.
pub struct Engine {
    /// Tokenizer, template, words.
    pub model: Model,
    /// The stream of events.
    pub publisher: Publisher,
    state: Mutex<State>,
    /// Held from admission to the end of prefill; hands over in order.
    turn: AsyncMutex<()>,
    /// Told whenever a request has finished.
    freed: Notify,
    timing: Timing,
    running_max: usize,
    model_tokens_max: usize,
    format: EventFormat,
}

impl Engine {
    /// An engine with an empty cache.
    #[must_use]
    pub fn new(model: Model, publisher: Publisher, config: &EngineConfig) -> Self {
        let block_size = usize::try_from(config.block_size).unwrap_or(usize::MAX);
        Self {
            model,
            publisher,
            state: Mutex::new(State {
                cache: PrefixCache::new(block_size, config.blocks),
                figures: Figures::default(),
            }),
            turn: AsyncMutex::new(()),
            freed: Notify::new(),
            timing: config.timing,
            running_max: config.running_max,
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
        {
            let mut state = self.lock();
            let cache_tokens = state.cache.blocks_total() * state.cache.block_size();
            if tokens > self.model_tokens_max || tokens - 1 > cache_tokens {
                return Err(RejectError::TooLong);
            }
            if state.figures.waiting >= WAITING_REQUESTS_MAX {
                state.figures.rejected += 1;
                return Err(RejectError::Busy);
            }
            state.figures.waiting += 1;
        }
        let (sender, receiver) = mpsc::channel(OUTPUT_QUEUE_PIECES);
        let waiting = Waiting { engine: Arc::clone(self) };
        tokio::spawn(answer(waiting, generation, sender));
        Ok(receiver)
    }

    /// Counters and gauges.
    #[must_use]
    pub fn figures(&self) -> Figures {
        self.lock().figures
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
        let figures = &mut self.lock().figures;
        if equal {
            figures.token_data_equal += 1;
        } else {
            figures.token_data_different += 1;
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

    /// Admits a prompt or says why not yet.
    fn admit(&self, generation: &Generation) -> Result<Sequence, AdmitError> {
        let mut state = self.lock();
        if state.figures.running >= self.running_max {
            return Err(AdmitError::Full);
        }
        let keys = generation.keys.clone();
        let sequence = state.cache.admit(&generation.prompt, generation.output_tokens, keys)?;
        self.publish(&mut state);
        let figures = &mut state.figures;
        figures.running += 1;
        figures.prefix_queries += generation.prompt.len() as u64;
        figures.prompt_tokens += generation.prompt.len() as u64;
        figures.prefix_hits += sequence.cached_tokens() as u64;
        Ok(sequence)
    }

    /// Enters a generated token into the cache.
    fn feed_back(&self, sequence: Option<&mut Sequence>, token: u32) {
        let mut state = self.lock();
        if let Some(sequence) = sequence {
            state.cache.extend(sequence, token);
        }
        self.publish(&mut state);
    }

    /// Time from one token of an answer to the next.
    fn decode_step(&self) -> Duration {
        let others = self.lock().figures.running.saturating_sub(1) as u64;
        let percent = 100 + self.timing.decode_contention_percent.saturating_mul(others);
        Duration::from_micros(self.timing.decode_us_per_token.saturating_mul(percent) / 100)
    }
}

/// A request that counts as waiting until dropped.
struct Waiting {
    engine: Arc<Engine>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.engine.lock().figures.waiting -= 1;
    }
}

/// A request that holds blocks until dropped.
struct Running {
    engine: Arc<Engine>,
    sequence: Option<Sequence>,
    complete: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut state = self.engine.lock();
        if let Some(sequence) = self.sequence.take() {
            state.cache.finish(sequence);
        }
        state.figures.running -= 1;
        if self.complete {
            state.figures.finished += 1;
        } else {
            state.figures.aborted += 1;
        }
        drop(state);
        self.engine.freed.notify_waiters();
    }
}

/// One request's life.
async fn answer(waiting: Waiting, generation: Generation, sender: mpsc::Sender<Piece>) {
    let engine = Arc::clone(&waiting.engine);
    let turn = tokio::select! {
        turn = engine.turn.lock() => turn,
        () = sender.closed() => return,
    };
    let Some(mut running) = wait_for_room(&engine, &generation, &sender).await else {
        return;
    };
    drop(waiting);
    let cached_tokens = running.sequence.as_ref().map_or(0, Sequence::cached_tokens);
    let uncached = generation.prompt.len().saturating_sub(cached_tokens) as u64;
    sleep(Duration::from_micros(uncached.saturating_mul(engine.timing.prefill_us_per_token))).await;
    drop(turn);

    if sender.send(Piece::Started { cached_tokens }).await.is_err() {
        return;
    }
    let seed = answer_seed(&generation.prompt);
    let mut due = Instant::now();
    let mut fed_back = None;
    for place in 0..generation.output_tokens {
        if let Some(token) = fed_back {
            engine.feed_back(running.sequence.as_mut(), token);
            due += engine.decode_step();
            sleep_until(due).await;
        }
        let word = engine.model.word(seed, place);
        fed_back = Some(word.token);
        engine.lock().figures.generation_tokens += 1;
        if sender.send(Piece::Word(word)).await.is_err() {
            return;
        }
    }
    running.complete = true;
    drop(running);
    // Nobody to tell is no failure: the answer was complete.
    let _told = sender.send(Piece::Finished).await;
}

/// Waits at the head of the line until the prompt fits. `None` if the client
/// went away, or if the prompt can never fit (which `start` has ruled out).
async fn wait_for_room(
    engine: &Arc<Engine>,
    generation: &Generation,
    sender: &mpsc::Sender<Piece>,
) -> Option<Running> {
    loop {
        // Registered before looking, so that no finish in between is missed.
        let freed = engine.freed.notified();
        tokio::pin!(freed);
        freed.as_mut().enable();
        match engine.admit(generation) {
            Ok(sequence) => {
                let engine = Arc::clone(engine);
                return Some(Running { engine, sequence: Some(sequence), complete: false });
            }
            Err(AdmitError::TooLong) => return None,
            Err(AdmitError::Full) => tokio::select! {
                () = freed => {}
                () = sender.closed() => return None,
            },
        }
    }
}

#[cfg(test)]
mod tests;
