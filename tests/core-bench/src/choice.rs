//! How long it takes to choose among many workers.

use std::cell::RefCell;

use foldhash::fast::FixedState;
use hashbrown::{HashMap, HashSet};
use warmpath_core::choose::{Random, lowest};
use warmpath_core::delta::Operation;
use warmpath_core::entry::Entry;
use warmpath_core::ids::{SequenceHash, WorkerSlot};
use warmpath_core::load::{Booking, BookingId};
use warmpath_core::reason::Reason;
use warmpath_core::route::{Prepared, select};
use warmpath_core::score::{Candidate, Formula, Held, Phase, PromptSize};
use warmpath_core::settings::Settings;

use crate::figures::{Case, Figure, interleave, mix};
use crate::fleet::{Fleet, hash};
use crate::{Clock, Run};

const BLOCK_SIZE: u32 = 16;
/// Blocks of a prompt: 8 KB of English.
const PROMPT_BLOCKS: u64 = 128;
/// Leading blocks that all prompts have.
const SYSTEM_BLOCKS: u64 = 32;
const PROMPT_TOKENS: u32 = PROMPT_BLOCKS as u32 * BLOCK_SIZE + 5;
pub(crate) const PROMPTS: u64 = 32;
/// Running requests of a worker.
const REQUESTS: u64 = 8;
/// First number of the blocks here.
const FIRST: u64 = 1 << 50;

/// The number of a prompt's block.
fn block(prompt: u64, at: u64) -> u64 {
    if at < SYSTEM_BLOCKS { FIRST + at } else { FIRST + (prompt + 1) * PROMPT_BLOCKS + at }
}

fn hashes(prompt: u64, blocks: u64) -> Vec<SequenceHash> {
    (0..blocks).map(|at| hash(block(prompt, at))).collect()
}

/// Workers with running requests and caches, and prompts to place.
pub(crate) struct Scene {
    pub(crate) fleet: Fleet,
    workers: u16,
    prepared: Vec<Prepared>,
}

impl Scene {
    /// Of the prompts each worker holds the common part, and an eighth of the
    /// workers more. An eighth of what runs is of these prompts.
    pub(crate) fn new(mut fleet: Fleet, workers: u16, clock: &dyn Clock) -> Self {
        for worker in 0..workers {
            fleet.push(Operation::Stored, worker, FIRST..FIRST + SYSTEM_BLOCKS, clock);
            for prompt in (0..PROMPTS).filter(|prompt| Self::knows(worker, *prompt)) {
                let held = Self::held(worker, prompt);
                let blocks = (SYSTEM_BLOCKS..held).map(|at| block(prompt, at));
                fleet.push(Operation::Stored, worker, blocks, clock);
            }
            for request in 0..REQUESTS {
                let booking = Self::booking(worker, request);
                fleet.replica.apply_entry(&Entry::Booked(booking).encode());
            }
        }
        fleet.apply(clock);
        let prepared = |prompt| Prepared {
            hashes: hashes(prompt, PROMPT_BLOCKS),
            block_size: BLOCK_SIZE,
            prompt_tokens: PROMPT_TOKENS,
            ..Prepared::by_load(Reason::Kv, Some(0), 0)
        };
        Self { fleet, workers, prepared: (0..PROMPTS).map(prepared).collect() }
    }

    fn knows(worker: u16, prompt: u64) -> bool {
        hash(FIRST + (prompt << 16 | u64::from(worker))).0.is_multiple_of(8)
    }

    /// How many blocks a worker holds.
    fn held(worker: u16, prompt: u64) -> u64 {
        if !Self::knows(worker, prompt) {
            return SYSTEM_BLOCKS;
        }
        // A conversation is left after one of its turns.
        SYSTEM_BLOCKS + 12 * (1 + hash(u64::from(worker) * PROMPTS + prompt).0 % 8)
    }

    fn booking(worker: u16, request: u64) -> Booking {
        let number = u64::from(worker) * REQUESTS + request;
        let drawn = hash(FIRST + number).0;
        let prompt =
            if drawn.is_multiple_of(8) { (drawn >> 8) % PROMPTS } else { PROMPTS + number };
        Booking {
            prefill_tokens: (drawn >> 20) as u32 % 2000,
            blocks: hashes(prompt, PROMPT_BLOCKS - (drawn >> 40) % 64),
            ..Booking::new(BookingId(number), WorkerSlot(worker), 0)
        }
    }

    /// The costs, from what was booked and stored, by counting.
    fn naive(&self, prompt: u64) -> Vec<f64> {
        let of = hashes(prompt, PROMPT_BLOCKS);
        let cost = |worker| {
            let bookings: Vec<Booking> =
                (0..REQUESTS).map(|request| Self::booking(worker, request)).collect();
            let active: HashSet<SequenceHash, FixedState> =
                bookings.iter().flat_map(|it| it.blocks.iter().copied()).collect();
            let additional = of.iter().filter(|hash| !active.contains(*hash)).count();
            let booked: u32 = bookings.iter().map(|it| it.prefill_tokens).sum();
            let prefill = f64::from(booked + PROMPT_TOKENS) / f64::from(BLOCK_SIZE);
            (prefill - Self::held(worker, prompt) as f64).max(0.0)
                + (active.len() + additional) as f64
        };
        (0..self.workers).map(cost).collect()
    }

    /// Every choice has the least cost.
    pub(crate) fn check(&mut self) {
        for prompt in 0..PROMPTS {
            let costs = self.naive(prompt);
            let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
            let slot = self.choose(prompt, 1);
            let chosen = costs[usize::from(slot)];
            assert!((chosen - least).abs() < 1e-9, "{prompt}: {slot} costs {chosen}, not {least}");
        }
    }

    fn choose(&mut self, prompt: u64, seed: u64) -> u16 {
        let random = &mut Random::seeded(seed);
        let prepared = &self.prepared[prompt as usize];
        let choice =
            select(&mut self.fleet.replica, prepared, &Settings::default(), 0, random).unwrap();
        choice.serving.slot.0
    }

    /// What is done for one request: places each prompt in turn.
    pub(crate) fn select_all(&mut self) -> u64 {
        (0..PROMPTS).fold(0, |all, prompt| mix(all, u64::from(self.choose(prompt, prompt))))
    }

    fn overlaps_all(&mut self) -> u64 {
        let mut out = Vec::new();
        self.prepared.iter().fold(0, |all, prepared| {
            self.fleet.replica.overlaps(&prepared.hashes, &mut out);
            mix(all, out.len() as u64)
        })
    }

    /// Books and frees a request on some of the workers.
    fn book_all(&mut self) -> u64 {
        for prompt in 0..PROMPTS {
            let id = BookingId(1 << 40 | prompt);
            let slot = WorkerSlot((prompt % u64::from(self.workers)) as u16);
            let booking = Booking {
                prefill_tokens: PROMPT_TOKENS,
                blocks: self.prepared[prompt as usize].hashes.clone(),
                ..Booking::new(id, slot, 0)
            };
            for entry in [Entry::Booked(booking), Entry::PrefillDone(id), Entry::Freed(id)] {
                self.fleet.replica.apply_entry(&entry.encode());
            }
        }
        self.fleet.replica.loads().bookings() as u64
    }
}

fn candidates(workers: u16) -> Vec<Candidate> {
    let candidate = |worker: u16| {
        let drawn = hash(u64::from(worker)).0;
        Candidate {
            held: Held { device: drawn as u32 % 128, host: 0, disk: 0 },
            prefill_tokens: (drawn >> 16) % 9000,
            active_blocks: (drawn >> 32) % 1000,
            additional_blocks: (drawn >> 48) % 128,
            ..Candidate::idle(WorkerSlot(worker))
        }
    };
    (0..workers).map(candidate).collect()
}

/// As anybody would write the formula first: a map of loads, one of overlaps, and
/// a set of active blocks for each worker.
struct Naive {
    active: HashMap<u16, (HashSet<SequenceHash, FixedState>, u32), FixedState>,
}

impl Naive {
    fn new(scene: &Scene) -> Self {
        let of = |worker| {
            let bookings: Vec<Booking> =
                (0..REQUESTS).map(|request| Scene::booking(worker, request)).collect();
            let blocks = bookings.iter().flat_map(|it| it.blocks.iter().copied()).collect();
            (worker, (blocks, bookings.iter().map(|it| it.prefill_tokens).sum()))
        };
        Self { active: (0..scene.workers).map(of).collect() }
    }

    fn choose(&self, prepared: &Prepared, held: &HashMap<u16, u32, FixedState>) -> u16 {
        let mut best = (f64::INFINITY, 0);
        for (worker, (active, booked)) in &self.active {
            let is_new = |hash: &&SequenceHash| !active.contains(*hash);
            let additional = prepared.hashes.iter().filter(is_new).count();
            let prefill = f64::from(booked + prepared.prompt_tokens) / f64::from(BLOCK_SIZE);
            let credit = f64::from(held.get(worker).copied().unwrap_or(0));
            let cost = (prefill - credit).max(0.0) + (active.len() + additional) as f64;
            if cost < best.0 {
                best = (cost, *worker);
            }
        }
        best.1
    }
}

/// Choosing among 8, 64 and 1000 workers.
pub(crate) fn run(run: &Run<'_>) -> Vec<Figure> {
    let rounds = if run.quick { 15 } else { 61 };
    let mut figures = Vec::new();
    for workers in [8, 64, 1000] {
        let mut scene = Scene::new(Fleet::new(workers, 1_000_000), workers, run.clock);
        scene.check();
        let naive = Naive::new(&scene);
        let prepared = scene.prepared.clone();
        let scene = RefCell::new(scene);
        let held: Vec<HashMap<u16, u32, FixedState>> = (0..PROMPTS)
            .map(|prompt| (0..workers).map(|it| (it, Scene::held(it, prompt) as u32)).collect())
            .collect();
        let all = candidates(workers);
        let prompt = PromptSize { tokens: PROMPT_TOKENS, block_size: BLOCK_SIZE };
        let count = PROMPTS as usize;
        let cases = vec![
            Case::new(format!("select_{workers}"), count, || scene.borrow_mut().select_all()),
            Case::new(format!("select_{workers}_naive"), count, || {
                let chosen = |(it, held)| u64::from(naive.choose(it, held));
                prepared.iter().zip(&held).map(chosen).fold(0, mix) | 1
            }),
            Case::new(format!("select_{workers}_overlap"), count, || {
                scene.borrow_mut().overlaps_all()
            }),
            Case::new(format!("formula_{workers}"), count, || {
                let mut random = Random::seeded(1);
                (0..PROMPTS).fold(0, |answer, _| {
                    let settings = Settings::default();
                    let formula = Formula::new(&settings, Phase::Aggregated, true, prompt);
                    let at = lowest(formula.costs(std::hint::black_box(&all)), &mut random);
                    mix(answer, at.unwrap() as u64)
                })
            }),
            Case::new(format!("book_{workers}"), count, || scene.borrow_mut().book_all()),
        ];
        figures.extend(interleave(run.clock, rounds, cases));
    }
    figures
}
