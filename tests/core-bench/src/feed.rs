//! How fast a replica follows the feed, and what its index takes.

use std::collections::VecDeque;

use foldhash::fast::FixedState;
use hashbrown::{HashMap, HashSet};
use warmpath_core::choose::Random;
use warmpath_core::delta::Operation;
use warmpath_core::ids::WorkerSlot;

use crate::Run;
use crate::figures::{Figure, mix};
use crate::fleet::{Fleet, hash};
use crate::lookup::fill;

/// Blocks that an engine stores or drops at a time: 256 tokens of a prefill.
const RUN: u64 = 16;

/// A run that a worker was told to store.
#[derive(Clone, Copy)]
struct Stored {
    worker: u16,
    from: u64,
}

/// A fleet whose index has come to its size, and goes on with it: for each run that
/// is stored, of which every fourth is one that another worker has stored before,
/// the one that was stored longest ago is removed.
pub(crate) struct Churn {
    pub(crate) fleet: Fleet,
    stored: VecDeque<Stored>,
    /// What workers hold, known in another way.
    held: HashSet<(u16, u64), FixedState>,
    next: u64,
    random: Random,
    workers: u16,
}

impl Churn {
    pub(crate) fn new(run: &Run<'_>, workers: u16, blocks: usize) -> Self {
        let mut churn = Self {
            fleet: Fleet::new(workers, 2 * blocks),
            stored: VecDeque::new(),
            held: HashSet::default(),
            next: 0,
            random: Random::seeded(5),
            workers,
        };
        while churn.next < blocks as u64 {
            churn.next += RUN;
            churn.store(run, churn.next);
        }
        churn.fleet.apply(run.clock);
        churn
    }

    fn store(&mut self, run: &Run<'_>, from: u64) {
        let worker = self.random.below(u32::from(self.workers)) as u16;
        self.stored.push_back(Stored { worker, from });
        self.held.insert((worker, from));
        self.fleet.push(Operation::Stored, worker, from..from + RUN, run.clock);
    }

    /// Goes on for `operations`.
    pub(crate) fn go_on(&mut self, run: &Run<'_>, operations: usize) {
        for step in 0..operations as u64 / RUN / 2 {
            let from = if step % 4 == 0 {
                self.stored[self.random.below(self.stored.len() as u32) as usize].from
            } else {
                self.next += RUN;
                self.next
            };
            self.store(run, from);
            let Stored { worker, from } = self.stored.pop_front().unwrap();
            self.held.remove(&(worker, from));
            self.fleet.push(Operation::Removed, worker, from..from + RUN, run.clock);
        }
        self.fleet.apply(run.clock);
    }

    /// The index counts for each worker what it holds. Returns what stands for it.
    pub(crate) fn check(&self) -> u64 {
        let mut counts = vec![0; usize::from(self.workers)];
        for (worker, _) in &self.held {
            counts[usize::from(*worker)] += RUN;
        }
        let index = self.fleet.replica.index();
        let of = |slot| index.blocks_of(WorkerSlot(slot));
        let found: Vec<u64> = (0..self.workers).map(of).collect();
        assert_eq!(found, counts);
        counts.into_iter().fold(0, mix)
    }
}

/// Operations per second through the door of the ring's entries, in an index that
/// keeps its size.
pub(crate) fn apply(run: &Run<'_>) -> Vec<Figure> {
    let rounds = if run.quick { 40 } else { 100 };
    let sizes: &[(&str, usize)] = &[("10k", 10_000), ("1m", 1_000_000), ("10m", 10_000_000)];
    let mut figures = Vec::new();
    for (label, blocks) in sizes {
        let mut churn = Churn::new(run, 64, *blocks);
        figures.push(Figure::once(
            format!("fill_{label}"),
            churn.fleet.applied_ns / churn.fleet.applied as f64,
        ));
        figures.push(Figure::once(format!("fill_longest_{label}"), churn.fleet.longest_ns));
        let mut samples = Vec::new();
        for _ in 0..rounds {
            churn.fleet.reset();
            churn.go_on(run, 20_000);
            samples.push(churn.fleet.applied_ns / churn.fleet.applied as f64);
        }
        figures.push(Figure::of(format!("apply_{label}"), samples, churn.check()));
    }
    figures
}

/// Bytes that the index takes for a block: of the whole memory that the machine
/// had to get for it, where that is known.
pub(crate) fn memory(run: &Run<'_>) -> Vec<Figure> {
    let mut figures = Vec::new();
    let before = run.clock.memory_bytes();
    let mut fleet = Fleet::new(64, 20_000_000);
    for (label, blocks) in [("1m", 1_000_000_usize), ("10m", 10_000_000)] {
        fill(&mut fleet, 64, blocks, run.clock);
        let index = fleet.replica.index();
        assert_eq!(index.blocks(), blocks);
        let whole = run.clock.memory_bytes() - before;
        figures.push(Figure::once(
            format!("index_bytes_{label}"),
            index.bytes() as f64 / blocks as f64,
        ));
        if whole > 0.0 {
            figures.push(Figure::once(format!("vm_bytes_{label}"), whole / blocks as f64));
        }
    }
    figures
}

/// The same of a map from block to its workers, as anybody would write it first.
pub(crate) fn memory_naive(run: &Run<'_>) -> Vec<Figure> {
    let before = run.clock.memory_bytes();
    let blocks = 10_000_000_u64;
    let mut map: HashMap<u64, Vec<u16>, FixedState> = HashMap::default();
    for at in 0..blocks {
        map.insert(hash(at).0, vec![(at % 64) as u16]);
    }
    assert_eq!(map.len() as u64, blocks);
    let whole = run.clock.memory_bytes() - before;
    vec![Figure::once("vm_bytes_10m_naive", whole / blocks as f64)]
}
