//! Draws: how often each worker is taken above temperature 0, and out of several
//! that tie, on both sides.

use std::collections::HashMap;

use dynamo_kv_router::protocols::WorkerWithDpRank;
use fastrand::Rng;
use warmpath_core::choose::{Random, drawn};
use warmpath_core::score::Formula;

use crate::Outcome;
use crate::dynamo::{Instance, Seeds, Selector};
use crate::states::{State, config};

const SEED: u64 = 0xd3a7_0000_0000_0003;
const STATES: u64 = 60;
const DRAWS: u32 = 20_000;
/// Most candidates: with more of them parts become too small to be counted.
const CANDIDATES_MAX: usize = 12;
/// Most instances: the map of more of them is never in order.
const INSTANCES_MAX: usize = 5;
/// Standard deviations that a chi-square may be off, by Wilson and Hilferty's
/// approximation: a probability of 1e-4.
const DEVIATIONS_MAX: f64 = 3.719;
/// Workers that should be taken less often than this are counted together.
const EXPECTED_MIN: f64 = 8.0;

/// Compares the shares of all candidates with each other and with the exact ones.
pub(crate) fn compare() -> Outcome {
    let mut rng = Rng::with_seed(SEED);
    let seeds = Seeds::new();
    let (mut tests, mut tied, mut most) = (0, 0, f64::NEG_INFINITY);
    for at in 0..STATES {
        let is_tie = at % 4 == 0;
        let (state, shares) = loop {
            let mut state = State::random(&mut rng);
            state.settings.router_temperature = if is_tie { 0.0 } else { 0.05 + rng.f64() * 1.5 };
            if state.ranks.len() > CANDIDATES_MAX || state.instances.len() > INSTANCES_MAX {
                continue;
            }
            state.instances = in_order(&state.instances);
            let shares = shares(&state, &seeds)?;
            let chances = shares.iter().filter(|share| **share * f64::from(DRAWS) > EXPECTED_MIN);
            if chances.count() > 1 {
                break (state, shares);
            }
        };
        tied += u32::from(is_tie);
        let ours = our_counts(&state, at);
        let theirs = their_counts(&state, at)?;
        let expected: Vec<f64> = shares.iter().map(|share| share * f64::from(DRAWS)).collect();
        for (whose, deviations) in [
            ("ours, exact", deviations(&ours, &expected, 1.0)),
            ("Dynamo's, exact", deviations(&theirs, &expected, 1.0)),
            ("ours, Dynamo's", deviations_of_two(&ours, &theirs)),
        ] {
            if deviations > DEVIATIONS_MAX || deviations.is_nan() {
                return Err(format!(
                    "state {at}, {whose}: {deviations:.2} deviations; ours {ours:?}, Dynamo's \
                     {theirs:?}, exact {expected:?}"
                ));
            }
            tests += 1;
            most = most.max(deviations);
        }
    }
    Ok(format!(
        "{STATES} states, {tied} of them at temperature 0 with several that tie, {DRAWS} draws on \
         either side; {tests} chi-square tests with p > 1e-4 (most {most:.2} deviations of \
         {DEVIATIONS_MAX})"
    ))
}

/// A map whose iteration is in ascending order: Dynamo's picker gives each worker
/// the part of the random numbers that its place in the map says, and a place by
/// chance would make the counts others in every run.
fn in_order(instances: &HashMap<u64, Instance>) -> HashMap<u64, Instance> {
    loop {
        // Every map has a hash function of its own.
        let map: HashMap<u64, Instance> = instances.clone().into_iter().collect();
        if map.keys().is_sorted() {
            return map;
        }
    }
}

/// What the picker's formula says, of Dynamo's costs.
fn shares(state: &State, seeds: &Seeds) -> Result<Vec<f64>, String> {
    let selector = Selector::new(&config(&state.settings), state.role())?;
    let all = selector
        .all(
            &state.instances,
            &state.request(),
            None,
            state.prompt.block_size,
            state.ranks.len(),
            seeds,
        )
        .map_err(|error| error.to_string())?;
    let cost = |worker| all.iter().find(|it| it.worker == worker).map_or(f64::NAN, |it| it.cost);
    let costs: Vec<f64> = state.ranks.iter().map(|rank| cost(rank.worker)).collect();
    let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
    let most = costs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let temperature = state.settings.router_temperature;
    let weight = |cost: f64| match (temperature > 0.0, most > least) {
        (false, _) => f64::from(u8::from(cost == least)),
        (true, false) => 1.0,
        (true, true) => (-(cost - least) / ((most - least) * temperature)).exp(),
    };
    let sum: f64 = costs.iter().map(|cost| weight(*cost)).sum();
    Ok(costs.iter().map(|cost| weight(*cost) / sum).collect())
}

fn our_counts(state: &State, seed: u64) -> Vec<f64> {
    let formula = Formula::new(&state.settings, state.phase, state.tracks_prefill, state.prompt);
    let costs: Vec<f64> = formula.costs(&state.candidates()).collect();
    let mut random = Random::seeded(seed);
    let mut counts = vec![0.0; costs.len()];
    for _ in 0..DRAWS {
        if let Some(at) = drawn(&costs, state.settings.router_temperature, &mut random) {
            counts[at] += 1.0;
        }
    }
    counts
}

fn their_counts(state: &State, seed: u64) -> Result<Vec<f64>, String> {
    let selector = Selector::new(&config(&state.settings), state.role())?;
    let request = state.request();
    fastrand::seed(seed);
    let mut counts = HashMap::<WorkerWithDpRank, f64>::new();
    for _ in 0..DRAWS {
        let taken = selector
            .take(&state.instances, &request, None, state.prompt.block_size)
            .map_err(|error| error.to_string())?;
        *counts.entry(taken.worker).or_default() += 1.0;
    }
    let of = |worker| counts.get(&worker).copied().unwrap_or(0.0);
    Ok(state.ranks.iter().map(|rank| of(rank.worker)).collect())
}

/// By how many standard deviations a chi-square is above what it should be.
///
/// - `variance`: of a count, as a share of what is expected.
fn deviations(counts: &[f64], expected: &[f64], variance: f64) -> f64 {
    let (mut rest_counted, mut rest_expected) = (0.0, 0.0);
    let (mut chi, mut parts) = (0.0, 0);
    let term = |counted: f64, expected: f64| (counted - expected).powi(2) / (variance * expected);
    for (counted, expected) in counts.iter().zip(expected) {
        if *expected < EXPECTED_MIN {
            rest_counted += counted;
            rest_expected += expected;
        } else {
            chi += term(*counted, *expected);
            parts += 1;
        }
    }
    if rest_expected >= EXPECTED_MIN {
        chi += term(rest_counted, rest_expected);
        parts += 1;
    } else if rest_expected == 0.0 && rest_counted > 0.0 {
        // What cannot be has happened.
        return f64::INFINITY;
    }
    let freedom = f64::from((parts - 1).max(1));
    let part = 2.0 / (9.0 * freedom);
    ((chi / freedom).cbrt() - (1.0 - part)) / part.sqrt()
}

/// The same for two rows of as many draws: what is expected is their mean.
fn deviations_of_two(left: &[f64], right: &[f64]) -> f64 {
    let mean: Vec<f64> = left.iter().zip(right).map(|(left, right)| (left + right) / 2.0).collect();
    // Against the mean, either row varies by half of what it would by itself.
    deviations(left, &mean, 0.5)
}
