//! Offline: a run in virtual time, seconds for minutes.
//!
//! The engines' cache and batch are the very ones of `engine-sim`; the router is a
//! function. It sees what a router sees: caches as their events have told it,
//! late by a feed's delay, and what it has placed itself.

use std::collections::{HashMap, VecDeque};

use super::engines::{BLOCK_SIZE, BOUNDS, TIMING};
use super::figures::{Figures, Seen, Worked};
use super::policies::{Outlook, Policy, Router};
use super::trace::Trace;
use crate::engine::batch::{Batch, Client, Generation, Plan};
use crate::engine::cache::{CacheEvent, CacheKeys, EngineHash, PrefixCache, block_hashes};
use crate::engine::model::Model;

/// From a change of a cache to its being known, in nanoseconds.
const FEED_DELAY_NS: u64 = 20_000_000;

/// One engine, and what is known and booked of it.
struct Place {
    cache: PrefixCache,
    batch: Batch<usize>,
    /// End of the step under way.
    step_ends_ns: Option<u64>,
    /// Changes that are not known yet.
    coming: VecDeque<(u64, CacheEvent)>,
    /// Blocks that it is known to hold, with how often.
    held: HashMap<EngineHash, u32>,
    booked: Booked,
}

/// What the router has placed on an engine.
#[derive(Default)]
struct Booked {
    prefill_tokens: u64,
    requests: u64,
    blocks: HashMap<EngineHash, u32>,
}

/// A request on its way.
struct Placed {
    engine: usize,
    hashes: Vec<EngineHash>,
    prefill_tokens: u64,
    cached_tokens: u64,
    first_token_ns: u64,
}

/// Runs a trace through a router.
#[must_use]
pub fn run(trace: &Trace, model: &Model, engines: usize, policy: Policy) -> Figures {
    let mut run = Run {
        trace,
        model,
        places: (0..engines).map(|_| Place::new(trace.engine_blocks)).collect(),
        placed: (0..trace.requests.len()).map(|_| None).collect(),
        seen: Vec::with_capacity(trace.requests.len()),
        router: Router::new(policy),
    };
    let end_ns = run.play();
    let worked: Vec<Worked> = run.places.iter().map(Place::worked).collect();
    Figures::of(trace.requests.len(), &run.seen, &worked, end_ns / 1000)
}

struct Run<'t> {
    trace: &'t Trace,
    model: &'t Model,
    places: Vec<Place>,
    placed: Vec<Option<Placed>>,
    seen: Vec<Seen>,
    router: Router,
}

impl Run<'_> {
    /// Returns when the last answer ended.
    fn play(&mut self) -> u64 {
        let mut next = 0;
        let mut now_ns = 0;
        loop {
            let arrival = self.trace.requests.get(next).map(|request| request.at_us * 1000);
            let ends = self.places.iter().enumerate();
            let step = ends.filter_map(|(at, place)| Some((place.step_ends_ns?, at))).min();
            match (arrival, step) {
                (Some(arrival), step) if step.is_none_or(|(end, _)| arrival < end) => {
                    now_ns = arrival;
                    self.arrive(next, now_ns);
                    next += 1;
                }
                (_, Some((end, at))) => {
                    now_ns = end;
                    self.end_step(at, now_ns);
                }
                (_, None) => return now_ns,
            }
        }
    }

    fn arrive(&mut self, number: usize, now_ns: u64) {
        let Some(request) = self.trace.requests.get(number) else { return };
        let hashes = block_hashes(&request.prompt, BLOCK_SIZE, &CacheKeys::default());
        let outlooks: Vec<Outlook> =
            self.places.iter_mut().map(|place| place.outlook(&hashes, now_ns)).collect();
        let engine = self.router.choose(request.prompt.len(), &hashes, &outlooks);
        let (Some(place), Some(outlook)) = (self.places.get_mut(engine), outlooks.get(engine))
        else {
            return;
        };
        let cached = u64::from(outlook.overlap_blocks) * BLOCK_SIZE as u64;
        let prefill_tokens = (request.prompt.len() as u64).saturating_sub(cached);
        place.booked.prefill_tokens += prefill_tokens;
        place.booked.requests += 1;
        for hash in &hashes {
            *place.booked.blocks.entry(*hash).or_default() += 1;
        }
        if let Some(slot) = self.placed.get_mut(number) {
            *slot = Some(Placed {
                engine,
                hashes,
                prefill_tokens,
                cached_tokens: 0,
                first_token_ns: 0,
            });
        }
        place.batch.add(
            number,
            Generation {
                prompt: request.prompt.clone(),
                output_tokens: request.output_tokens,
                keys: CacheKeys::default(),
            },
        );
        if place.step_ends_ns.is_none() {
            place.begin_step(now_ns);
        }
    }

    fn end_step(&mut self, at: usize, now_ns: u64) {
        let Some(place) = self.places.get_mut(at) else { return };
        let out = place.batch.complete(&mut place.cache, |seed, at| self.model.token(seed, at));
        let mut ended = Vec::new();
        for emission in out {
            let Some(Some(placed)) = self.placed.get_mut(emission.tag) else { continue };
            if emission.first == 0 {
                placed.first_token_ns = now_ns;
                placed.cached_tokens = emission.cached_tokens as u64;
                place.booked.prefill_tokens -= placed.prefill_tokens;
            }
            if emission.last {
                ended.push(emission.tag);
            }
        }
        place.begin_step(now_ns);
        for number in ended {
            self.finished(number, now_ns);
        }
    }

    fn finished(&mut self, number: usize, now_ns: u64) {
        let placed = self.placed.get_mut(number).and_then(Option::take);
        let (Some(placed), Some(request)) = (placed, self.trace.requests.get(number)) else {
            return;
        };
        self.seen.push(Seen {
            first_token_us: (placed.first_token_ns / 1000).saturating_sub(request.at_us),
            last_token_us: (now_ns / 1000).saturating_sub(request.at_us),
            prompt_tokens: request.prompt.len() as u64,
            cached_tokens: placed.cached_tokens,
        });
        let Some(place) = self.places.get_mut(placed.engine) else { return };
        place.booked.requests -= 1;
        for hash in &placed.hashes {
            forget(&mut place.booked.blocks, hash);
        }
    }
}

impl Place {
    fn new(blocks: usize) -> Self {
        Self {
            cache: PrefixCache::new(BLOCK_SIZE, blocks),
            batch: Batch::new(TIMING, BOUNDS),
            step_ends_ns: None,
            coming: VecDeque::new(),
            held: HashMap::new(),
            booked: Booked::default(),
        }
    }

    fn begin_step(&mut self, now_ns: u64) {
        let plan = self.batch.plan(&mut self.cache, |_| Client::Reads);
        self.step_ends_ns = match plan {
            Plan::Step(nanoseconds) => Some(now_ns + nanoseconds),
            Plan::Idle | Plan::Stalled => None,
        };
        let known_at = now_ns + FEED_DELAY_NS;
        self.coming.extend(self.cache.take_events().into_iter().map(|event| (known_at, event)));
    }

    /// What the router knows now.
    fn outlook(&mut self, hashes: &[EngineHash], now_ns: u64) -> Outlook {
        while self.coming.front().is_some_and(|(known_at, _)| *known_at <= now_ns) {
            let Some((_, event)) = self.coming.pop_front() else { break };
            match event {
                CacheEvent::Stored { hashes, .. } => {
                    for hash in hashes {
                        *self.held.entry(hash).or_default() += 1;
                    }
                }
                CacheEvent::Removed { hash } => forget(&mut self.held, &hash),
                CacheEvent::Cleared => self.held.clear(),
            }
        }
        let booked = &self.booked.blocks;
        let leading = |map: &HashMap<EngineHash, u32>| {
            let held = hashes.iter().take_while(|hash| map.contains_key(*hash)).count();
            u32::try_from(held).unwrap_or(u32::MAX)
        };
        let booked_overlap_blocks = leading(booked);
        let last = usize::try_from(booked_overlap_blocks).ok().and_then(|at| at.checked_sub(1));
        let sharers = last.and_then(|at| booked.get(hashes.get(at)?));
        Outlook {
            overlap_blocks: leading(&self.held),
            booked_overlap_blocks,
            sharers: sharers.map_or(0, |times| u64::from(*times)),
            prefill_tokens: self.booked.prefill_tokens,
            active_blocks: self.booked.blocks.len() as u64,
            requests: self.booked.requests,
        }
    }

    fn worked(&self) -> Worked {
        let counts = self.batch.counts();
        Worked {
            finished: counts.finished,
            request_ms: counts.request_ns / 1_000_000,
            computed_tokens: counts.prompt_tokens - counts.cached_tokens + counts.generated_tokens,
            busy_ms: counts.busy_ns / 1_000_000,
            late_ms: 0,
        }
    }
}

fn forget(map: &mut HashMap<EngineHash, u32>, hash: &EngineHash) {
    if let Some(times) = map.get_mut(hash) {
        *times -= 1;
        if *times == 0 {
            map.remove(hash);
        }
    }
}
