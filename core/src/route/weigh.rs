//! Weigh: from eligible workers to the one to take.

use super::Prepared;
use super::eligible::{batch_tokens, scaled, share};
use crate::choose::{Balance, Random, drawn, two_tier};
use crate::ids::WorkerSlot;
use crate::load::ActiveBlocks;
use crate::overlap::{Overlap, find_next};
use crate::replica::Replica;
use crate::roster::RosterWorker;
use crate::score::expected_time::ExpectedTime;
use crate::score::{Candidate, Formula, Held, Phase, PromptSize, taint_factor};
use crate::settings::{ConditionalDisagg, ConditionalDisaggPolicy, SelectionPolicy, Settings};

/// Weighs workers against each other.
pub(super) struct Scale<'a> {
    pub(super) replica: &'a Replica,
    pub(super) prepared: &'a Prepared,
    pub(super) settings: &'a Settings,
    /// In ascending order of slots.
    pub(super) held: Vec<Overlap>,
}

/// A worker that was taken.
#[derive(Clone, Copy)]
pub(super) struct Weighed<'r> {
    pub(super) worker: &'r RosterWorker,
    /// What it holds of the prompt and is to use.
    pub(super) held: Held,
    /// Prompt tokens that it must compute, as the cost counts them.
    pub(super) prefill_tokens: u32,
}

impl Scale<'_> {
    fn prompt(&self) -> PromptSize {
        let Prepared { prompt_tokens, block_size, .. } = self.prepared;
        PromptSize { tokens: *prompt_tokens, block_size: *block_size }
    }

    /// The formula of a phase. A prompt that comes computed does not count.
    fn formula(&self, phase: Phase) -> Formula {
        let tracks = match phase {
            Phase::Aggregated | Phase::Prefill => self.settings.router_track_prefill_tokens,
            Phase::Decode | Phase::ConditionalDecode => false,
        };
        Formula::new(self.settings, phase, tracks, self.prompt())
    }

    fn policy(&self, phase: Phase) -> SelectionPolicy {
        let of_stage = match phase {
            Phase::Aggregated => None,
            Phase::Prefill => self.settings.prefill_policy,
            Phase::Decode | Phase::ConditionalDecode => self.settings.decode_policy,
        };
        of_stage.unwrap_or(self.settings.selection_policy)
    }

    /// The worker to take for a phase; `None` without workers.
    pub(super) fn take<'r>(
        &self,
        workers: &[&'r RosterWorker],
        phase: Phase,
        random: &mut Random,
    ) -> Option<Weighed<'r>> {
        let formula = self.formula(phase);
        let policy = self.policy(phase);
        let candidates = workers.iter().map(self.candidates(phase, policy));
        let at = match policy {
            SelectionPolicy::DynamoDefault => {
                let least = if formula.decays() { self.least_prefill(workers) } else { 0 };
                let costs: Vec<f64> = candidates.map(|it| formula.cost(&it, least)).collect();
                drawn(&costs, self.settings.router_temperature, random)?
            }
            SelectionPolicy::TwoTier(thresholds) => {
                let balance: Vec<Balance> = candidates
                    .map(|it| Balance { device_blocks: it.held.device, requests: it.requests })
                    .collect();
                let prompt = self.prompt();
                let blocks = prompt.tokens.div_ceil(prompt.block_size.max(1));
                two_tier(&balance, blocks, &thresholds, random)?
            }
            SelectionPolicy::ExpectedTime(parameters) => {
                let candidates: Vec<Candidate> = candidates.collect();
                let costs: Vec<f64> = self.expected_times(&parameters, phase, &candidates);
                drawn(&costs, self.settings.router_temperature, random)?
            }
        };
        let worker = *workers.get(at)?;
        let held =
            if formula.uses_cache() { self.held(worker.slot, &mut 0) } else { Held::default() };
        Some(Weighed { worker, held, prefill_tokens: formula.effective_tokens(held) })
    }

    fn expected_times(
        &self,
        parameters: &ExpectedTime,
        phase: Phase,
        candidates: &[Candidate],
    ) -> Vec<f64> {
        let said = self.prepared.demands.expected_output_tokens;
        let output_tokens = said.map_or(parameters.output_tokens, f64::from);
        let formula = self.formula(phase);
        ExpectedTime { output_tokens, ..*parameters }.costs(self.prompt(), candidates, |it| {
            match phase {
                Phase::Decode => 0,
                _ => formula.effective_tokens(it.held),
            }
        })
    }

    /// The least that any of the workers has to compute, in tokens.
    fn least_prefill(&self, workers: &[&RosterWorker]) -> u64 {
        let loads = self.replica.loads();
        workers.iter().map(|it| loads.of(it.slot).prefill_tokens).min().unwrap_or(0)
    }

    /// What makes a worker a candidate; they are to be asked for in the pool's order.
    fn candidates(
        &self,
        phase: Phase,
        policy: SelectionPolicy,
    ) -> impl FnMut(&&RosterWorker) -> Candidate {
        let Self { replica, prepared, .. } = self;
        let counts_sharers =
            matches!(policy, SelectionPolicy::ExpectedTime(_)) && phase == Phase::Aggregated;
        let blocks = self.blocks_alone(phase);
        let active = if blocks.is_none() || counts_sharers {
            replica.loads().active_blocks(&prepared.hashes)
        } else {
            ActiveBlocks::default()
        };
        let preferred = &prepared.demands.preferred_taints;
        let (mut at_held, mut at_active) = (0, 0);
        move |worker: &&RosterWorker| {
            let slot = worker.slot;
            let load = replica.loads().of(slot);
            let active = active.of(slot, &mut at_active);
            let left = || (prepared.hashes.len() as u64).saturating_sub(u64::from(active));
            let sharers = || replica.loads().sharers(slot, &prepared.hashes, active);
            let weights = preferred.iter().filter(|(taint, _)| worker.taints.contains(taint));
            Candidate {
                slot,
                held: self.held(slot, &mut at_held),
                shared_blocks: 0,
                prefill_tokens: load.prefill_tokens,
                active_blocks: load.active_blocks,
                additional_blocks: blocks.unwrap_or_else(left),
                requests: load.requests,
                sharers: if counts_sharers { sharers() } else { 0 },
                taint_factor: match preferred.is_empty() {
                    true => 1.0,
                    false => taint_factor(weights.map(|(_, weight)| *weight)),
                },
            }
        }
    }

    /// Blocks of the prompt that a worker would hold for this request alone, as far
    /// as they are booked; `None` if those count that are not active on it yet.
    fn blocks_alone(&self, phase: Phase) -> Option<u64> {
        let Settings { router_track_active_blocks, router_assume_kv_reuse, .. } = self.settings;
        match phase {
            // A prefill worker keeps no blocks for it.
            Phase::Prefill => Some(0),
            _ if !router_track_active_blocks => Some(0),
            Phase::Aggregated if *router_assume_kv_reuse => None,
            Phase::Aggregated | Phase::Decode | Phase::ConditionalDecode => {
                Some(u64::from(self.prepared.blocks()))
            }
        }
    }

    /// - `at`: see [`find_next`].
    fn held(&self, slot: WorkerSlot, at: &mut usize) -> Held {
        let found = find_next(&self.held, slot, at, |overlap| overlap.slot);
        found.map_or(Held::default(), |it| Held {
            device: it.blocks,
            host: it.host_blocks,
            disk: it.disk_blocks,
        })
    }

    /// Whether a decode worker is to compute the prompt itself although there are
    /// prefill workers (Dynamo: conditional disaggregation).
    ///
    /// - `decode`: the decode worker that would be taken.
    /// - `prefill`: the prefill worker that would be taken.
    pub(super) fn bypasses_prefill(
        &self,
        conditional: &ConditionalDisagg,
        decode: &Weighed<'_>,
        prefill: &RosterWorker,
    ) -> bool {
        if conditional.decode_busy_threshold.is_some_and(|it| self.is_decode_busy(decode, it)) {
            return false;
        }
        let little_is_left = || {
            let left = decode.prefill_tokens;
            let share = f64::from(left) / f64::from(self.prepared.prompt_tokens.max(1));
            left < conditional.eff_isl_threshold && share < conditional.eff_isl_ratio_threshold
        };
        let prefill_is_busy = || {
            let threshold =
                conditional.prefill_busy_threshold.or(self.settings.router_queue_threshold);
            let booked = self.replica.loads().of(prefill.slot).prefill_tokens;
            threshold.is_some_and(|it| booked > scaled(batch_tokens(prefill), it))
        };
        match conditional.policy {
            ConditionalDisaggPolicy::IslBounding => little_is_left(),
            ConditionalDisaggPolicy::PrefillLoad => prefill_is_busy(),
            ConditionalDisaggPolicy::IslOrLoad => little_is_left() || prefill_is_busy(),
        }
    }

    /// A decode worker that does not say how much it holds counts as busy.
    fn is_decode_busy(&self, decode: &Weighed<'_>, threshold: f64) -> bool {
        let worker = decode.worker;
        let active = self.replica.loads().of(worker.slot).active_blocks;
        let additional = self.blocks_alone(Phase::ConditionalDecode).unwrap_or(0);
        // A partial last block counts, and so do blocks that are not booked.
        let prompt = self.prompt();
        let blocks = u64::from(prompt.tokens.div_ceil(prompt.block_size.max(1)));
        let booked = if self.settings.router_track_active_blocks {
            u64::from(self.prepared.blocks())
        } else {
            0
        };
        let potential = active + additional + blocks.saturating_sub(booked);
        share(potential, worker.total_kv_blocks).is_none_or(|share| share > threshold)
    }
}
