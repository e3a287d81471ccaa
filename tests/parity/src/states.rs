//! States: random fleets, loads, caches and settings, told to both sides.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use dynamo_kv_router::config::{ConditionalDisaggPolicyKind, KvRouterConfig};
use dynamo_kv_router::indexer::{LowerTierMatchDetails, TieredMatchDetails};
use dynamo_kv_router::protocols::{SharedCacheHits, StorageTier, WorkerWithDpRank};
use dynamo_kv_router::scheduling::OverlapAnalysis;
use dynamo_kv_router::{SchedulingRequest, WorkerLoadProjection, WorkerType};
use fastrand::Rng;
use warmpath_core::ids::WorkerSlot;
use warmpath_core::score::{Candidate, Held, Phase, PromptSize, taint_factor};
use warmpath_core::settings::{ConditionalDisagg, ConditionalDisaggPolicy, Settings};

use crate::dynamo::{Instance, request};

/// Taints that there are.
pub(crate) const TAINTS: &[&str] = &["gpu/h100", "zone/a", "zone/b", "tier/gold"];

/// One rank with its load and what it holds.
#[derive(Clone, Debug)]
pub(crate) struct Rank {
    pub(crate) worker: WorkerWithDpRank,
    pub(crate) held: Held,
    /// Of `held.disk`, what is external storage.
    pub(crate) external: u32,
    pub(crate) prefill_tokens: u64,
    pub(crate) active_blocks: u64,
    pub(crate) additional_blocks: u64,
    pub(crate) requests: u64,
}

/// One state.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) settings: Settings,
    pub(crate) phase: Phase,
    pub(crate) tracks_prefill: bool,
    pub(crate) prompt: PromptSize,
    pub(crate) instances: HashMap<u64, Instance>,
    pub(crate) ranks: Vec<Rank>,
    pub(crate) shared: Vec<Range<u32>>,
    pub(crate) preferred: Vec<(String, f32)>,
}

/// A number between 0 and `most`; now and then exactly 0 or 1.
pub(crate) fn knob(rng: &mut Rng, most: f64) -> f64 {
    match rng.u32(0..6) {
        0 => 0.0,
        1 => 1.0_f64.min(most),
        // Such that sums come out even, so that there are ties.
        2 => f64::from(rng.u32(0..5)) * 0.25 * most,
        _ => rng.f64() * most,
    }
}

/// Settings of the cost, at random.
pub(crate) fn settings(rng: &mut Rng) -> Settings {
    let is_default = rng.u32(0..4) == 0;
    let defaults = Settings::default();
    if is_default {
        return defaults;
    }
    Settings {
        overlap_score_credit: knob(rng, 2.0),
        overlap_score_credit_decay: knob(rng, 4.0),
        prefill_load_scale: knob(rng, 3.0),
        decode_active_request_weight: knob(rng, 8.0),
        host_cache_hit_weight: knob(rng, 1.0),
        disk_cache_hit_weight: knob(rng, 1.0),
        shared_cache_multiplier: knob(rng, 1.0),
        ..defaults
    }
}

/// The same settings for Dynamo.
pub(crate) fn config(settings: &Settings) -> KvRouterConfig {
    let conditional = settings.conditional_disagg.unwrap_or_default();
    KvRouterConfig {
        overlap_score_credit: settings.overlap_score_credit,
        overlap_score_credit_decay: settings.overlap_score_credit_decay,
        prefill_load_scale: settings.prefill_load_scale,
        decode_active_request_weight: settings.decode_active_request_weight,
        host_cache_hit_weight: settings.host_cache_hit_weight,
        disk_cache_hit_weight: settings.disk_cache_hit_weight,
        shared_cache_multiplier: Some(settings.shared_cache_multiplier),
        router_temperature: settings.router_temperature,
        conditional_disagg_enabled: settings.conditional_disagg.is_some(),
        conditional_disagg_policy: match conditional.policy {
            ConditionalDisaggPolicy::IslBounding => ConditionalDisaggPolicyKind::IslBounding,
            ConditionalDisaggPolicy::PrefillLoad => ConditionalDisaggPolicyKind::PrefillLoad,
            ConditionalDisaggPolicy::IslOrLoad => ConditionalDisaggPolicyKind::IslOrLoad,
        },
        conditional_disagg_eff_isl_threshold: conditional.eff_isl_threshold as usize,
        conditional_disagg_eff_isl_ratio_threshold: conditional.eff_isl_ratio_threshold,
        ..KvRouterConfig::default()
    }
}

/// What a rank holds of a prompt of so many complete blocks.
pub(crate) fn held(rng: &mut Rng, blocks: u32) -> (Held, u32) {
    let mut left = blocks;
    let mut part = |rng: &mut Rng, chance: u32| {
        let taken = if rng.u32(0..chance) == 0 { rng.u32(0..=left) } else { 0 };
        left -= taken;
        taken
    };
    let device = if rng.bool() { part(rng, 1) } else { 0 };
    let host = part(rng, 3);
    let disk = part(rng, 4);
    let external = part(rng, 5);
    (Held { device, host, disk: disk + external }, external)
}

/// A fleet: 1 to 16 instances of 1 to 4 ranks.
pub(crate) fn fleet(rng: &mut Rng) -> HashMap<u64, Instance> {
    let count = if rng.bool() { rng.u64(1..5) } else { rng.u64(1..17) };
    (0..count)
        .map(|at| {
            let taints: HashSet<String> = TAINTS
                .iter()
                .filter(|_| rng.u32(0..3) == 0)
                .map(|taint| (*taint).to_owned())
                .collect();
            let instance = Instance {
                ranks: if rng.bool() { 1 } else { rng.u32(1..5) },
                taints,
                ..Instance::default()
            };
            (1_000 + at * 7, instance)
        })
        .collect()
}

/// The instances in an order that is always the same.
pub(crate) fn ascending(instances: &HashMap<u64, Instance>) -> Vec<u64> {
    let mut ids: Vec<u64> = instances.keys().copied().collect();
    ids.sort_unstable();
    ids
}

impl State {
    /// A state for the cost alone.
    pub(crate) fn random(rng: &mut Rng) -> Self {
        let phases = [Phase::Aggregated, Phase::Prefill, Phase::Decode, Phase::ConditionalDecode];
        let phase = phases[rng.usize(0..4)];
        let mut settings = settings(rng);
        if phase == Phase::ConditionalDecode {
            settings.conditional_disagg = Some(ConditionalDisagg::default());
        }
        let block_size = [1, 7, 16, 16, 32, 48, 64, 128][rng.usize(0..8)];
        // Most are no multiple of the block size, and some have no block.
        let tokens = match rng.u32(0..10) {
            0 => rng.u32(0..block_size + 1),
            1 => block_size * rng.u32(0..64),
            _ => rng.u32(0..6_000),
        };
        let prompt = PromptSize { tokens, block_size };
        let blocks = tokens / block_size;
        let instances = fleet(rng);
        // Few different numbers, so that candidates tie.
        let few = rng.u32(0..3) == 0;
        let mut ranks = Vec::new();
        for id in ascending(&instances) {
            for rank in 0..instances[&id].ranks {
                let (held, external) = if few && rng.bool() {
                    (Held { device: blocks / 2, ..Held::default() }, 0)
                } else {
                    held(rng, blocks)
                };
                let number = |rng: &mut Rng, most: u64| {
                    if few { rng.u64(0..2) * most / 4 } else { rng.u64(0..most) }
                };
                ranks.push(Rank {
                    worker: WorkerWithDpRank::new(id, rank),
                    held,
                    external,
                    prefill_tokens: number(rng, 20_000),
                    active_blocks: number(rng, 2_000),
                    additional_blocks: u64::from(blocks - rng.u32(0..=blocks) * u32::from(!few)),
                    requests: number(rng, 100),
                });
            }
        }
        let shared = if rng.bool() { ranges(rng, blocks) } else { Vec::new() };
        let mut preferred = Vec::new();
        if rng.bool() {
            for taint in TAINTS {
                if rng.bool() {
                    preferred.push(((*taint).to_owned(), rng.f32() * 4.0 - 2.0));
                }
            }
        }
        let tracks_prefill = rng.u32(0..3) > 0;
        Self { settings, phase, tracks_prefill, prompt, instances, ranks, shared, preferred }
    }

    pub(crate) fn role(&self) -> WorkerType {
        match self.phase {
            Phase::Aggregated => WorkerType::Aggregated,
            Phase::Prefill => WorkerType::Prefill,
            Phase::Decode | Phase::ConditionalDecode => WorkerType::Decode,
        }
    }

    /// The state as Dynamo's host tells it to its selector.
    pub(crate) fn request(&self) -> SchedulingRequest {
        let mut request = request(self.prompt.tokens as usize, self.tracks_prefill);
        let mut found = TieredMatchDetails::default();
        for rank in &self.ranks {
            let Held { device, host, disk } = rank.held;
            if device > 0 {
                found.device.overlap_scores.scores.insert(rank.worker, device);
            }
            let mut lower = |tier, blocks: u32| {
                if blocks > 0 {
                    let hits = &mut found
                        .lower_tier
                        .entry(tier)
                        .or_insert_with(LowerTierMatchDetails::default)
                        .hits;
                    hits.insert(rank.worker, blocks as usize);
                }
            };
            lower(StorageTier::HostPinned, host);
            lower(StorageTier::Disk, disk - rank.external);
            lower(StorageTier::External, rank.external);
            request.worker_loads.insert(
                rank.worker,
                WorkerLoadProjection {
                    active_prefill_tokens: rank.prefill_tokens as usize,
                    active_decode_blocks: rank.active_blocks as usize,
                    active_requests: rank.requests as usize,
                    additional_active_blocks: rank.additional_blocks as usize,
                },
            );
        }
        let config = config(&self.settings);
        request.overlap = OverlapAnalysis::new(&config, self.prompt.block_size, &found).signals();
        if !self.shared.is_empty() {
            request.shared_cache_hits = Some(SharedCacheHits::from_ranges(self.shared.clone()));
        }
        request.routing_constraints.preferred_taints = self.preferred.iter().cloned().collect();
        request
    }

    /// The state as our cost wants it.
    pub(crate) fn candidates(&self) -> Vec<Candidate> {
        self.ranks
            .iter()
            .zip(0..)
            .map(|(rank, slot)| Candidate {
                slot: WorkerSlot(slot),
                held: rank.held,
                shared_blocks: self
                    .shared
                    .iter()
                    .flat_map(Clone::clone)
                    .filter(|at| *at >= rank.held.device)
                    .count() as u32,
                prefill_tokens: rank.prefill_tokens,
                active_blocks: rank.active_blocks,
                additional_blocks: rank.additional_blocks,
                requests: rank.requests,
                sharers: 0,
                taint_factor: self.factor(&self.instances[&rank.worker.worker_id].taints),
            })
            .collect()
    }

    fn factor(&self, taints: &HashSet<String>) -> f64 {
        let matched = self.preferred.iter().filter(|(taint, _)| taints.contains(taint));
        taint_factor(matched.map(|(_, weight)| f64::from(*weight)))
    }
}

/// Parts of a prompt that all workers share.
fn ranges(rng: &mut Rng, blocks: u32) -> Vec<Range<u32>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < blocks && ranges.len() < 4 {
        let start = at + rng.u32(0..=(blocks - at) / 2);
        let end = start + rng.u32(1..=(blocks - start).max(1));
        if end > blocks {
            break;
        }
        ranges.push(start..end);
        at = end + 1;
    }
    ranges
}
