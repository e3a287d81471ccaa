//! Costs: our formula and choice against Dynamo's production selector.

use std::collections::{BTreeSet, HashMap};

use dynamo_kv_router::protocols::WorkerWithDpRank;
use fastrand::Rng;
use warmpath_core::choose::{Random, drawn};
use warmpath_core::score::Formula;

use crate::Outcome;
use crate::dynamo::{Seeds, Selector};
use crate::states::{State, config};

const SEED: u64 = 0x51a7_e000_0000_0002;
const STATES: u64 = 100_000;
/// Largest difference of two costs that are equal, as a share of them.
const TOLERANCE: f64 = 1e-9;

/// Compares the costs of all candidates, and the choice at temperature 0.
pub(crate) fn compare() -> Outcome {
    let mut rng = Rng::with_seed(SEED);
    let seeds = Seeds::new();
    let (mut costs, mut to_the_bit, mut tied) = (0_u64, 0_u64, 0_u64);
    let mut phases = HashMap::<String, u64>::new();
    for at in 0..STATES {
        let state = State::random(&mut rng);
        let told = |difference: String| format!("state {at}: {difference}; {state:?}");
        let theirs = theirs(&state, &seeds).map_err(told)?;
        let candidates = state.candidates();
        let formula =
            Formula::new(&state.settings, state.phase, state.tracks_prefill, state.prompt);
        let ours: Vec<f64> = formula.costs(&candidates).collect();
        for (rank, our) in state.ranks.iter().zip(&ours) {
            let their = theirs.costs[&rank.worker];
            let scale = their.abs().max(1.0);
            if (our - their).abs() > TOLERANCE * scale || our.is_nan() {
                return Err(told(format!("{:?}: ours {our}, Dynamo's {their}", rank.worker)));
            }
            costs += 1;
            to_the_bit += u64::from(our.to_bits() == their.to_bits());
        }
        let lowest = |costs: &mut dyn Iterator<Item = (WorkerWithDpRank, f64)>| {
            let costs: Vec<_> = costs.collect();
            let least = costs.iter().map(|it| it.1).fold(f64::INFINITY, f64::min);
            costs.iter().filter(|it| it.1 == least).map(|it| it.0).collect::<BTreeSet<_>>()
        };
        let our_lowest =
            lowest(&mut state.ranks.iter().zip(&ours).map(|(rank, cost)| (rank.worker, *cost)));
        let their_lowest = lowest(&mut theirs.costs.iter().map(|(worker, cost)| (*worker, *cost)));
        if our_lowest != their_lowest {
            return Err(told(format!("lowest: ours {our_lowest:?}, Dynamo's {their_lowest:?}")));
        }
        tied += u64::from(our_lowest.len() > 1);
        for seed in 0..3 {
            let mut random = Random::seeded(at * 3 + seed);
            let pick = drawn(&ours, 0.0, &mut random).map(|at| state.ranks[at].worker);
            if pick.is_none_or(|pick| !their_lowest.contains(&pick)) {
                return Err(told(format!("we take {pick:?} of {their_lowest:?}")));
            }
        }
        if !our_lowest.contains(&theirs.taken) {
            return Err(told(format!("Dynamo takes {:?} of {our_lowest:?}", theirs.taken)));
        }
        *phases.entry(format!("{:?}", state.phase)).or_default() += 1;
    }
    let mut phases: Vec<String> = phases.iter().map(|(phase, n)| format!("{phase} {n}")).collect();
    phases.sort_unstable();
    Ok(format!(
        "{STATES} states ({}), {costs} costs equal to {TOLERANCE}, {to_the_bit} of them to the \
         last bit; the same choice in all, {tied} of them out of several that tie",
        phases.join(", ")
    ))
}

struct Theirs {
    costs: HashMap<WorkerWithDpRank, f64>,
    taken: WorkerWithDpRank,
}

fn theirs(state: &State, seeds: &Seeds) -> Result<Theirs, String> {
    let selector = Selector::new(&config(&state.settings), state.role())?;
    let request = state.request();
    let block_size = state.prompt.block_size;
    let all = selector
        .all(&state.instances, &request, None, block_size, state.ranks.len(), seeds)
        .map_err(|error| error.to_string())?;
    let taken = selector
        .take(&state.instances, &request, None, block_size)
        .map_err(|error| error.to_string())?;
    let costs = all.iter().map(|it| (it.worker, it.cost)).collect();
    Ok(Theirs { costs, taken: taken.worker })
}
