//! Weigh: from eligible workers to the one to take.

use super::Prepared;
use super::eligible::{batch_tokens, scaled, share};
use crate::choose::{Balance, Random, drawn, two_tier};
use crate::overlap::Overlap;
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
        let candidates: Vec<Candidate> =
            workers.iter().map(|worker| self.candidate(worker, phase)).collect();
        let at = match self.policy(phase) {
            SelectionPolicy::DynamoDefault => {
                let costs: Vec<f64> = formula.costs(&candidates).collect();
                drawn(&costs, self.settings.router_temperature, random)?
            }
            SelectionPolicy::TwoTier(thresholds) => {
                let balance: Vec<Balance> = candidates
                    .iter()
                    .map(|it| Balance { device_blocks: it.held.device, requests: it.requests })
                    .collect();
                let prompt = self.prompt();
                let blocks = prompt.tokens.div_ceil(prompt.block_size.max(1));
                two_tier(&balance, blocks, &thresholds, random)?
            }
            SelectionPolicy::ExpectedTime(parameters) => {
                let costs: Vec<f64> = self.expected_times(&parameters, phase, &candidates);
                drawn(&costs, self.settings.router_temperature, random)?
            }
        };
        let worker = *workers.get(at)?;
        let held = if formula.uses_cache() { self.held(worker) } else { Held::default() };
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

    fn candidate(&self, worker: &RosterWorker, phase: Phase) -> Candidate {
        let load = self.replica.loads().of(worker.slot);
        let preferred = &self.prepared.demands.preferred_taints;
        let weights = preferred.iter().filter(|(taint, _)| worker.taints.contains(taint));
        Candidate {
            slot: worker.slot,
            held: self.held(worker),
            shared_blocks: 0,
            prefill_tokens: load.prefill_tokens,
            active_blocks: load.active_blocks,
            additional_blocks: self.additional_blocks(worker, phase),
            requests: load.requests,
            sharers: self.sharers(worker, phase),
            taint_factor: taint_factor(weights.map(|(_, weight)| *weight)),
        }
    }

    /// Blocks of the prompt that the worker would hold for this request alone, as
    /// far as they are booked.
    fn additional_blocks(&self, worker: &RosterWorker, phase: Phase) -> u64 {
        let Settings { router_track_active_blocks, router_assume_kv_reuse, .. } = self.settings;
        match phase {
            // A prefill worker keeps no blocks for it.
            Phase::Prefill => 0,
            _ if !router_track_active_blocks => 0,
            Phase::Aggregated if *router_assume_kv_reuse => {
                self.replica.loads().additional_blocks(worker.slot, &self.prepared.hashes)
            }
            Phase::Aggregated | Phase::Decode | Phase::ConditionalDecode => {
                u64::from(self.prepared.blocks())
            }
        }
    }

    /// Requests that the worker computes or answers with the prompt's leading
    /// blocks; none where that does not count.
    fn sharers(&self, worker: &RosterWorker, phase: Phase) -> u64 {
        match self.policy(phase) {
            SelectionPolicy::ExpectedTime(_) if phase == Phase::Aggregated => {
                self.replica.loads().sharers(worker.slot, &self.prepared.hashes)
            }
            _ => 0,
        }
    }

    fn held(&self, worker: &RosterWorker) -> Held {
        let found = self.held.binary_search_by_key(&worker.slot, |overlap| overlap.slot);
        let Some(overlap) = found.ok().and_then(|at| self.held.get(at)) else {
            return Held::default();
        };
        Held { device: overlap.blocks, host: overlap.host_blocks, disk: overlap.disk_blocks }
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
        let additional = self.additional_blocks(worker, Phase::ConditionalDecode);
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
