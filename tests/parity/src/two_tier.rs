//! Two tiers: our choice against Dynamo's port of SGLang's policy.

use std::collections::{BTreeSet, HashMap};

use dynamo_kv_router::config::KvRouterConfig;
use dynamo_kv_router::protocols::WorkerWithDpRank;
use fastrand::Rng;
use warmpath_core::choose::{Balance, Random, two_tier};
use warmpath_core::settings::TwoTier;

use crate::Outcome;
use crate::dynamo::Selector;
use crate::states::State;

const SEED: u64 = 0x2717_0000_0000_0004;
const THRESHOLDS: u64 = 40;
const STATES_EACH: u64 = 1_000;
/// Choices after which every worker that ties has been taken, or nearly so.
const PICKS: u64 = 24;
const PICKS_MORE: u64 = 2_000;

/// Compares the choice: Dynamo's must be one of ours, which are all that tie.
pub(crate) fn compare() -> Outcome {
    let mut rng = Rng::with_seed(SEED);
    let (mut by_overlap, mut tied) = (0_u64, 0_u64);
    for set in 0..THRESHOLDS {
        let thresholds = match set {
            0 => TwoTier::default(),
            _ => TwoTier {
                cache_threshold: f64::from(rng.u32(0..=20)) / 20.0,
                balance_abs_threshold: rng.u64(0..80),
                balance_rel_threshold: 1.0 + f64::from(rng.u32(0..30)) / 10.0,
            },
        };
        let mut selectors = HashMap::new();
        for at in 0..STATES_EACH {
            let state = State::random(&mut rng);
            let told =
                |difference: String| format!("{thresholds:?}, {at}: {difference}; {state:?}");
            let role = state.role();
            if !selectors.contains_key(&role) {
                selectors.insert(role, Selector::new(&config(&thresholds, set)?, role)?);
            }
            let their = selectors[&role]
                .take(&state.instances, &state.request(), None, state.prompt.block_size)
                .map_err(|error| told(error.to_string()))?
                .worker;
            let ours = picks(&state, &thresholds, PICKS);
            let ours =
                if ours.contains(&their) { ours } else { picks(&state, &thresholds, PICKS_MORE) };
            if !ours.contains(&their) {
                return Err(told(format!("ours {ours:?}, Dynamo's {their:?}")));
            }
            tied += u64::from(ours.len() > 1);
            let least = state.ranks.iter().map(|rank| rank.requests).min();
            let taken = state.ranks.iter().find(|rank| rank.worker == their);
            by_overlap += u64::from(taken.map(|rank| rank.requests) != least);
        }
    }
    Ok(format!(
        "{} states under {THRESHOLDS} sets of thresholds, the same choice in all; in {by_overlap} \
         overlap beat load, in {tied} several tied",
        THRESHOLDS * STATES_EACH
    ))
}

fn picks(state: &State, thresholds: &TwoTier, count: u64) -> BTreeSet<WorkerWithDpRank> {
    let workers: Vec<Balance> = state
        .ranks
        .iter()
        .map(|rank| Balance { device_blocks: rank.held.device, requests: rank.requests })
        .collect();
    let blocks = state.prompt.tokens.div_ceil(state.prompt.block_size);
    let mut random = Random::seeded(count);
    (0..count)
        .filter_map(|_| two_tier(&workers, blocks, thresholds, &mut random))
        .map(|at| state.ranks[at].worker)
        .collect()
}

/// Dynamo reads the thresholds from a file.
fn config(thresholds: &TwoTier, set: u64) -> Result<KvRouterConfig, String> {
    let TwoTier { cache_threshold, balance_abs_threshold, balance_rel_threshold } = thresholds;
    let path =
        std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("two-tier-{set}.yaml"));
    let name = "dynamo-two-tier-cost-fn";
    let text = format!(
        "worker_selection:\n  aggregated: {name}\n  prefill: {name}\n  decode: {name}\n  instances:\n    \
         - name: {name}\n      type: {name}\n      parameters:\n        \
         cache_threshold: {cache_threshold:?}\n        \
         balance_abs_threshold: {balance_abs_threshold}\n        \
         balance_rel_threshold: {balance_rel_threshold:?}\n"
    );
    std::fs::write(&path, text).map_err(|error| error.to_string())?;
    Ok(KvRouterConfig {
        router_policy_config: Some(path.display().to_string()),
        ..KvRouterConfig::default()
    })
}
