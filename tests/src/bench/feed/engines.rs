//! Engines: simulated caches that store and remove blocks at a given rate.
//!
//! Events are made beforehand, so that sending one costs next to nothing, and
//! are sent by a thread of their own at times of their own: an engine waits for
//! nobody.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use zeromq::ZmqError;

use super::clock_ns;
use crate::engine::cache::{CacheEvent, CacheKeys, EngineHash};
use crate::engine::events::{EventForm, EventFormat, HashForm, encode_batch};
use crate::engine::publisher::{Publisher, PublisherConfig};

/// Tokens of a block.
pub(super) const BLOCK_SIZE: u32 = 16;

/// Tokens in the vocabulary: most take five bytes in a message, as Qwen's do.
const VOCABULARY: u64 = 151_936;

/// Blocks of one prompt: they are stored by one event.
const PROMPT_BLOCKS: usize = 16;

/// Block events in one batch: a prompt is stored and another removed.
const BATCH_EVENTS: u64 = 2 * PROMPT_BLOCKS as u64;

/// Prompts that one engine stores in turn.
const PROMPTS: usize = 4_096;

/// Prompts that it holds at a time.
const PROMPTS_HELD: usize = 3_072;

/// Batches kept for replays: two seconds at the highest rate.
const KEPT_BATCHES: usize = 8_192;

/// Time between two markers. No multiple of any timer of those who listen.
const MARKER_EVERY: Duration = Duration::from_micros(2_300);

/// Longest sleep of the thread that sends.
const PACE: Duration = Duration::from_micros(250);

/// A cache's events, as vLLM 0.31 writes them.
const FORMAT: EventFormat = EventFormat {
    form: EventForm::VllmMap,
    hash: HashForm::Integer,
    block_size: BLOCK_SIZE,
    dp_rank: 0,
    kind: Some("full_attention"),
};

/// An engine that only announces.
pub(super) struct Engine {
    publisher: Publisher,
    first: Vec<Vec<u8>>,
    cycle: Vec<Vec<u8>>,
    next: usize,
    /// Blocks that it holds.
    pub(super) blocks: u64,
}

impl Engine {
    /// One without any block.
    pub(super) async fn start() -> Result<Self, ZmqError> {
        let config = PublisherConfig {
            events_port: 0,
            replay_port: 0,
            topic: String::new(),
            buffer_steps: KEPT_BATCHES,
            replay_has_topic: true,
        };
        let publisher = Publisher::start(config).await?;
        Ok(Self { publisher, first: Vec::new(), cycle: Vec::new(), next: 0, blocks: 0 })
    }

    /// One with events for ever.
    pub(super) async fn with_traffic(number: u64) -> Result<Self, ZmqError> {
        let mut engine = Self::start().await?;
        let prompt = |place: usize| Prompt::new(number << 32 | place as u64);
        engine.first = (PROMPTS - PROMPTS_HELD..PROMPTS)
            .map(|place| batch(&[prompt(place).stored()]))
            .collect();
        engine.cycle = (0..PROMPTS)
            .map(|place| {
                let mut events = vec![prompt(place).stored()];
                events.extend(prompt((place + PROMPTS - PROMPTS_HELD) % PROMPTS).removed());
                batch(&events)
            })
            .collect();
        Ok(engine)
    }

    /// Where it publishes and replays.
    pub(super) fn ports(&self) -> (u16, u16) {
        (self.publisher.events_port, self.publisher.replay_port)
    }

    /// Batches so far.
    pub(super) fn batches(&self) -> u64 {
        self.publisher.next_sequence()
    }

    /// A batch of nothing: whoever hears it is subscribed.
    pub(super) fn say_nothing(&self) {
        self.publisher.publish(batch(&[]));
    }

    /// Stores the blocks of a prompt that requests will bring.
    pub(super) fn store_prompt(&mut self, tokens: &[u32], seed: u64) {
        let blocks = tokens.len() / BLOCK_SIZE as usize;
        let tokens = tokens.get(..blocks * BLOCK_SIZE as usize).unwrap_or_default().to_vec();
        let hashes = (0..blocks).map(|place| name(spread(seed << 16 | place as u64))).collect();
        self.store(None, hashes, tokens);
    }

    /// Stores a chain of blocks behind the last one. Their tokens are all the
    /// same, since the hash of a block covers those before it.
    ///
    /// - `chain`: tells chains apart.
    pub(super) fn store_chain(&mut self, chain: u32, from: u64, count: u64) {
        let name_of = |place: u64| name(spread(u64::from(chain) << 32 | place));
        let hashes: Vec<EngineHash> = (from..from + count).map(name_of).collect();
        let mut tokens = vec![9; hashes.len() * BLOCK_SIZE as usize];
        if let (0, Some(first)) = (from, tokens.first_mut()) {
            *first = 1_000 + chain;
        }
        self.store((from > 0).then(|| name_of(from - 1)), hashes, tokens);
    }

    fn store(&mut self, parent: Option<EngineHash>, hashes: Vec<EngineHash>, tokens: Vec<u32>) {
        self.blocks += hashes.len() as u64;
        let keys = CacheKeys::default();
        self.publisher.publish(batch(&[CacheEvent::Stored { parent, hashes, tokens, keys }]));
    }

    /// Fills the cache.
    fn fill(&mut self) {
        for payload in core::mem::take(&mut self.first) {
            self.publisher.publish(payload);
            self.blocks += PROMPT_BLOCKS as u64;
        }
    }

    /// Sends the next batch of the traffic.
    fn go_on(&mut self) {
        if let Some(payload) = self.cycle.get(self.next) {
            self.publisher.publish(payload.clone());
        }
        self.next = (self.next + 1) % self.cycle.len().max(1);
    }
}

/// What one prompt's blocks are called and made of.
struct Prompt {
    hashes: Vec<EngineHash>,
    tokens: Vec<u32>,
}

impl Prompt {
    fn new(number: u64) -> Self {
        let seed = |place: usize| number * 65_536 + place as u64;
        let hashes = (0..PROMPT_BLOCKS).map(|place| name(spread(seed(place)))).collect();
        let tokens = (0..PROMPT_BLOCKS * BLOCK_SIZE as usize)
            .map(|place| token(spread(seed(place) ^ 1 << 63)))
            .collect();
        Self { hashes, tokens }
    }

    fn stored(self) -> CacheEvent {
        let Self { hashes, tokens } = self;
        CacheEvent::Stored { parent: None, hashes, tokens, keys: CacheKeys::default() }
    }

    fn removed(self) -> impl Iterator<Item = CacheEvent> {
        // The last block of a prompt is the first to go.
        self.hashes.into_iter().rev().map(|hash| CacheEvent::Removed { hash })
    }
}

fn token(number: u64) -> u32 {
    u32::try_from(number % VOCABULARY).unwrap_or(0)
}

fn name(number: u64) -> EngineHash {
    let mut bytes = [0; 32];
    if let Some(last) = bytes.last_chunk_mut::<8>() {
        *last = number.to_be_bytes();
    }
    EngineHash(bytes)
}

fn batch(events: &[CacheEvent]) -> Vec<u8> {
    encode_batch(1.790e9, events, &FORMAT)
}

/// Numbers that look random (SplitMix64).
fn spread(seed: u64) -> u64 {
    let mut value = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// What the thread that sends is told, and tells.
#[derive(Debug, Default)]
struct Orders {
    /// Block events a second, over all engines.
    rate: AtomicU64,
    has_markers: AtomicBool,
    stop: AtomicBool,
    /// When each marker was sent.
    markers: Mutex<Vec<u64>>,
    sent_events: AtomicU64,
    /// Most that a batch was sent too late, in nanoseconds.
    late_ns: AtomicU64,
}

/// Engines under traffic.
pub(super) struct Traffic {
    orders: Arc<Orders>,
    thread: JoinHandle<(Engine, Vec<Engine>)>,
}

impl Traffic {
    /// Fills the caches and then sends what it is told to.
    ///
    /// - `marker`: the engine whose blocks are markers.
    pub(super) fn start(marker: Engine, engines: Vec<Engine>, runtime: Handle) -> Self {
        let orders = Arc::new(Orders::default());
        let own = Arc::clone(&orders);
        let thread = std::thread::spawn(move || {
            let _inside = runtime.enter();
            send(marker, engines, &own)
        });
        Self { orders, thread }
    }

    /// From now on so many block events a second, and markers or not.
    pub(super) fn set(&self, rate: u64, has_markers: bool) {
        self.orders.rate.store(rate, Ordering::Release);
        self.orders.has_markers.store(has_markers, Ordering::Release);
    }

    /// When each marker was sent, so far.
    pub(super) fn markers(&self) -> Vec<u64> {
        self.orders.markers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Block events sent so far.
    pub(super) fn sent_events(&self) -> u64 {
        self.orders.sent_events.load(Ordering::Acquire)
    }

    /// Most that a batch was sent too late since this was last asked, in
    /// milliseconds.
    pub(super) fn late_ms(&self) -> f64 {
        self.orders.late_ns.swap(0, Ordering::AcqRel) as f64 / 1e6
    }

    /// Ends the traffic; gives the engines back.
    pub(super) fn stop(self) -> Option<(Engine, Vec<Engine>)> {
        self.orders.stop.store(true, Ordering::Release);
        self.thread.join().ok()
    }
}

fn send(mut marker: Engine, mut engines: Vec<Engine>, orders: &Orders) -> (Engine, Vec<Engine>) {
    engines.iter_mut().for_each(Engine::fill);
    let mut since = Instant::now();
    let (mut rate, mut sent, mut turn) = (0, 0, 0);
    let mut marker_at = Instant::now();
    while !orders.stop.load(Ordering::Acquire) {
        let wanted = orders.rate.load(Ordering::Acquire);
        if wanted != rate {
            (rate, since, sent) = (wanted, Instant::now(), 0);
        }
        let elapsed = since.elapsed();
        let due = elapsed.as_secs_f64() * rate as f64;
        while ((sent + BATCH_EVENTS) as f64) <= due {
            let count = engines.len().max(1);
            if let Some(engine) = engines.get_mut(turn % count) {
                engine.go_on();
            }
            turn += 1;
            sent += BATCH_EVENTS;
            orders.sent_events.fetch_add(BATCH_EVENTS, Ordering::AcqRel);
        }
        let now = Instant::now();
        if orders.has_markers.load(Ordering::Acquire) && now >= marker_at {
            if now > marker_at + Duration::from_secs(1) {
                marker_at = now;
            }
            let mut markers = orders.markers.lock().unwrap_or_else(PoisonError::into_inner);
            let late = u64::try_from((now - marker_at).as_nanos()).unwrap_or(u64::MAX);
            orders.late_ns.fetch_max(late, Ordering::AcqRel);
            markers.push(clock_ns());
            let chain = u32::try_from(markers.len()).unwrap_or(0);
            marker.store_chain(chain, 0, 1);
            marker_at += MARKER_EVERY;
        }
        std::thread::sleep(PACE);
    }
    (marker, engines)
}
