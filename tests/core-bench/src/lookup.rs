//! How long a prompt's overlaps take.

use foldhash::fast::FixedState;
use hashbrown::HashMap;
use warmpath_core::delta::Operation;
use warmpath_core::ids::SequenceHash;
use warmpath_core::overlap::Overlap;

use crate::figures::{Case, Figure, interleave, mix};
use crate::fleet::{Fleet, hash};
use crate::{Clock, Run};

/// Blocks of a prompt: 16 000 tokens at 16 a block.
pub(crate) const PROMPT_BLOCKS: u64 = 1000;

/// First block of what fills the index, beyond those of prompts.
const FILLER: u64 = 1 << 40;

/// Prompts that workers hold in part.
pub(crate) struct Held {
    pub(crate) workers: u16,
    /// Different overlaps in one prompt; at most that many sets are on its way.
    pub(crate) steps: u16,
    pub(crate) prompts: u64,
}

impl Held {
    /// All workers hold a 64th; the others end at one of `steps` blocks.
    fn blocks(&self, prompt: u64, worker: u16) -> u64 {
        let step = hash(prompt << 16 | u64::from(worker)).0 % u64::from(self.steps);
        PROMPT_BLOCKS / 64 + (PROMPT_BLOCKS - PROMPT_BLOCKS / 64) * step / u64::from(self.steps)
    }

    /// A prompt's blocks, of which the last are new to everybody.
    pub(crate) fn prompt(prompt: u64) -> Vec<SequenceHash> {
        (0..PROMPT_BLOCKS).map(|at| hash(prompt * PROMPT_BLOCKS + at)).collect()
    }

    /// Stores them.
    pub(crate) fn store(&self, fleet: &mut Fleet, clock: &dyn Clock) {
        for prompt in 0..self.prompts {
            for worker in 0..self.workers {
                let from = prompt * PROMPT_BLOCKS;
                let blocks = from..from + self.blocks(prompt, worker);
                fleet.push(Operation::Stored, worker, blocks, clock);
            }
        }
        fleet.apply(clock);
    }

    /// What the answer has to be.
    fn check(&self, prompt: u64, answer: &[Overlap]) {
        assert_eq!(answer.len(), usize::from(self.workers));
        for (worker, overlap) in (0_u16..).zip(answer) {
            let expected = (worker, self.blocks(prompt, worker));
            assert_eq!((overlap.slot.0, u64::from(overlap.blocks)), expected);
        }
    }
}

/// Fills the index up to `blocks`, each held by one worker.
pub(crate) fn fill(fleet: &mut Fleet, workers: u16, blocks: usize, clock: &dyn Clock) {
    let mut at = FILLER;
    while fleet.replica.index().blocks() < blocks {
        let worker = (hash(at).0 % u64::from(workers)) as u16;
        let missing = (blocks - fleet.replica.index().blocks()) as u64;
        for _ in 0..(missing / 64).clamp(1, 512) {
            fleet.push(Operation::Stored, worker, at..at + 64.min(missing), clock);
            at += 64;
        }
        fleet.apply(clock);
    }
}

fn answer(all: &[Overlap]) -> u64 {
    all.iter().fold(0, |answer, it| mix(answer, u64::from(it.slot.0) << 32 | u64::from(it.blocks)))
}

/// Look-ups in the replica.
pub(crate) fn case<'c>(name: String, fleet: &'c mut Fleet, held: &Held) -> Case<'c> {
    let prompts: Vec<_> = (0..held.prompts).map(Held::prompt).collect();
    let mut out = Vec::new();
    for (number, prompt) in (0..).zip(&prompts) {
        fleet.replica.overlaps(prompt, &mut out);
        held.check(number, &out);
    }
    Case::new(name, prompts.len(), move || {
        prompts.iter().fold(0, |all, prompt| {
            fleet.replica.overlaps(prompt, &mut out);
            mix(all, answer(&out))
        })
    })
}

/// A map from block to workers, and what anybody would write with it first.
type Naive = HashMap<SequenceHash, Vec<u16>, FixedState>;

fn naive(held: &Held, filler: usize) -> Naive {
    let mut map = Naive::default();
    for prompt in 0..held.prompts {
        for worker in 0..held.workers {
            for at in 0..held.blocks(prompt, worker) {
                map.entry(hash(prompt * PROMPT_BLOCKS + at)).or_default().push(worker);
            }
        }
    }
    for at in 0..filler as u64 {
        map.insert(hash(FILLER + at), vec![(at % u64::from(held.workers)) as u16]);
    }
    map
}

fn naive_overlaps(map: &Naive, prompt: &[SequenceHash], out: &mut Vec<(u16, u32)>) {
    out.clear();
    let mut alive: Vec<u16> = Vec::new();
    for (at, hash) in (0_u32..).zip(prompt) {
        let holders = map.get(hash).map_or(&[][..], Vec::as_slice);
        if at == 0 {
            alive = holders.to_vec();
        }
        alive.retain(|worker| {
            let stays = holders.binary_search(worker).is_ok();
            if !stays {
                out.push((*worker, at));
            }
            stays
        });
        if alive.is_empty() {
            break;
        }
    }
    out.extend(alive.iter().map(|worker| (*worker, prompt.len() as u32)));
    out.sort_unstable();
}

fn naive_case<'c>(name: String, map: &'c Naive, held: &Held) -> Case<'c> {
    let prompts: Vec<_> = (0..held.prompts).map(Held::prompt).collect();
    let mut out = Vec::new();
    Case::new(name, prompts.len(), move || {
        prompts.iter().fold(0, |all, prompt| {
            naive_overlaps(map, prompt, &mut out);
            let part = out.iter().fold(0, |answer, (worker, blocks)| {
                mix(answer, u64::from(*worker) << 32 | u64::from(*blocks))
            });
            mix(all, part)
        })
    })
}

fn together(run: &Run<'_>, label: &str, held: &Held, blocks: usize, rounds: usize) -> Vec<Figure> {
    let mut fleet = Fleet::new(held.workers, 2 * blocks);
    held.store(&mut fleet, run.clock);
    let filler = blocks.saturating_sub(fleet.replica.index().blocks());
    fill(&mut fleet, held.workers, blocks, run.clock);
    let map = naive(held, filler);
    let cases = vec![
        case(format!("overlap_{label}"), &mut fleet, held),
        naive_case(format!("overlap_{label}_naive"), &map, held),
    ];
    let figures = interleave(run.clock, rounds, cases);
    assert_eq!(figures[0].answer, figures[1].answer, "{label}");
    figures
}

/// Look-ups of 1000 blocks in an index of a million, beside a naive map.
pub(crate) fn small(run: &Run<'_>) -> Vec<Figure> {
    let rounds = if run.quick { 7 } else { 31 };
    let mut figures = Vec::new();
    for (workers, steps, prompts) in [(8, 8, 64), (64, 64, 64), (1000, 20, 16), (1000, 1000, 2)] {
        let held = Held { workers, steps, prompts };
        figures.extend(together(run, &format!("{workers}w_{steps}s_1m"), &held, 1_000_000, rounds));
    }
    figures
}

/// The same in an index of ten million.
pub(crate) fn large(run: &Run<'_>) -> Vec<Figure> {
    let held = Held { workers: 64, steps: 64, prompts: 64 };
    let mut fleet = Fleet::new(64, 20_000_000);
    held.store(&mut fleet, run.clock);
    fill(&mut fleet, 64, 10_000_000, run.clock);
    let cases = vec![case("overlap_64w_64s_10m".to_owned(), &mut fleet, &held)];
    interleave(run.clock, if run.quick { 7 } else { 31 }, cases)
}
