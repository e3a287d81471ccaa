//! Score: what it would cost to place a prompt on a worker.
//!
//! Sixth stage of the request path: `overlap` and `load` give the inputs,
//! `choose` takes the lowest cost.
//!
//! The formula is that of Dynamo's router (1.6.1, `dynamo-default-cost-fn`), in
//! blocks; lower is better:
//!
//! ```text
//! credit  = C · decay · device + Wh · host + Wd · disk + Ms · shared
//! decay   = 1 / (1 + r · ((P − P_min) / bs) / ⌈isl / bs⌉)
//! prefill = S · max((P + max(isl, cached)) / bs − credit, 0)
//! cost    = (prefill + active + additional + A · requests) · taints
//! ```
//!
//! # Terms
//!
//! - `isl`: prompt tokens; `bs`: tokens of a block.
//! - `device`, `host`, `disk`: leading blocks of the prompt that the worker holds,
//!   each tier continuing where the one before it ends; `shared`: blocks behind
//!   `device` that a cache of all workers holds.
//! - `cached`: tokens that they save, each tier by its weight, rounded.
//! - `P`: prompt tokens booked on the worker whose prefill is not done; `P_min`:
//!   the least of all candidates.
//! - `active`: unique prompt blocks of the worker's running requests;
//!   `additional`: blocks of this prompt that are not among them.
//! - `C`, `r`, `Wh`, `Wd`, `Ms`, `S`, `A`: [`Settings`], in its order.
//! - `taints`: `exp(−tanh(sum of the weights of preferred taints that the worker
//!   has))`.
//!
//! # Invariants
//!
//! 1. Every term is Dynamo's to the last bit, in its order of operations: `make
//!    test-parity` compares.
//! 2. The trailing partial block is invisible to overlap and blocks, but its
//!    tokens count in `isl`.

pub mod expected_time;

use crate::ids::WorkerSlot;
use crate::settings::Settings;

/// Whole numbers below this are exact as floating point: 2⁵³.
const EXACT_MAX: u64 = 1 << 53;

/// What is to be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptSize {
    /// Tokens of the prompt.
    pub tokens: u32,
    /// Tokens of a block; 0 counts as 1.
    pub block_size: u32,
}

/// What the worker is to do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Compute the prompt and answer.
    Aggregated,
    /// Compute the prompt.
    Prefill,
    /// Answer; the prompt comes computed.
    Decode,
    /// Answer, and perhaps compute the prompt, too: the look ahead of conditional
    /// disaggregation.
    ConditionalDecode,
}

/// Leading blocks of a prompt that a worker holds, by where it holds them. Each
/// tier continues where the one before it ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// In the accelerator's memory.
    pub device: u32,
    /// In the host's memory.
    pub host: u32,
    /// On disk or in an external store.
    pub disk: u32,
}

/// A worker that may be chosen, with what the cost needs to know of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The worker.
    pub slot: WorkerSlot,
    /// What it holds of the prompt.
    pub held: Held,
    /// Blocks behind `held.device` that a cache of all workers holds.
    pub shared_blocks: u32,
    /// `P`, in tokens.
    pub prefill_tokens: u64,
    /// In blocks.
    pub active_blocks: u64,
    /// In blocks.
    pub additional_blocks: u64,
    /// Running requests.
    pub requests: u64,
    /// Of these, at least so many that share all of the blocks that any of them
    /// shares with the prompt.
    pub sharers: u64,
    /// Factor of the taints that the request prefers; 1 without.
    pub taint_factor: f64,
}

impl Candidate {
    /// A worker without load that holds nothing.
    #[must_use]
    pub fn idle(slot: WorkerSlot) -> Self {
        Self {
            slot,
            held: Held::default(),
            shared_blocks: 0,
            prefill_tokens: 0,
            active_blocks: 0,
            additional_blocks: 0,
            requests: 0,
            sharers: 0,
            taint_factor: 1.0,
        }
    }
}

/// Factor by which preferred taints change a worker's cost: below 1 for a
/// positive sum of their weights, above it for a negative one, between 1/e and e.
#[must_use]
pub fn taint_factor(weights: impl Iterator<Item = f64>) -> f64 {
    (-weights.sum::<f64>().tanh()).exp()
}

/// The formula for one request.
#[derive(Clone, Copy, Debug)]
pub struct Formula {
    prompt: PromptSize,
    /// `C`, 0 where overlap does not count.
    credit: f64,
    decay: f64,
    host_weight: f64,
    disk_weight: f64,
    /// Of host and disk: nothing times it is nothing.
    has_finite_weights: bool,
    shared_multiplier: f64,
    prefill_scale: f64,
    request_weight: f64,
    tracks_prefill: bool,
    uses_cache: bool,
    /// Whether the credit is taken from the decode blocks: prompts are not
    /// tracked, but overlap counts.
    credits_decode: bool,
}

impl Formula {
    /// The formula of a phase.
    ///
    /// - `tracks_prefill`: whether prompt tokens count: the setting, and not for
    ///   a prompt that comes computed.
    #[must_use]
    pub fn new(
        settings: &Settings,
        phase: Phase,
        tracks_prefill: bool,
        prompt: PromptSize,
    ) -> Self {
        let is_plain_decode = phase == Phase::Decode;
        let credit =
            if is_plain_decode && !tracks_prefill { 0.0 } else { settings.overlap_score_credit };
        Self {
            prompt,
            credit,
            decay: settings.overlap_score_credit_decay,
            host_weight: settings.host_cache_hit_weight,
            disk_weight: settings.disk_cache_hit_weight,
            has_finite_weights: settings.host_cache_hit_weight.is_finite()
                && settings.disk_cache_hit_weight.is_finite(),
            shared_multiplier: settings.shared_cache_multiplier,
            prefill_scale: settings.prefill_load_scale,
            request_weight: settings.decode_active_request_weight,
            tracks_prefill,
            uses_cache: !is_plain_decode && settings.overlap_score_credit != 0.0,
            credits_decode: phase != Phase::Prefill && !tracks_prefill && credit > 0.0,
        }
    }

    /// Whether what workers hold counts at all.
    #[must_use]
    pub fn uses_cache(&self) -> bool {
        self.uses_cache
    }

    /// Tokens of the prompt that a worker need not compute, as bookings count
    /// them; may exceed the prompt.
    #[must_use]
    pub fn cached_tokens(&self, held: Held) -> u64 {
        if !self.uses_cache {
            return 0;
        }
        // Mostly nothing is held below the device: a whole number without rounding.
        let tokens = u64::from(held.device) * u64::from(self.prompt.block_size);
        if held.host == 0 && held.disk == 0 && self.has_finite_weights && tokens < EXACT_MAX {
            return tokens;
        }
        let blocks = f64::from(held.device)
            + f64::from(held.host) * self.host_weight
            + f64::from(held.disk) * self.disk_weight;
        let tokens = (blocks * f64::from(self.prompt.block_size)).round().max(0.0);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rounded number, not negative; saturates"
        )]
        let tokens = tokens as u64;
        tokens
    }

    /// Prompt tokens that the worker has to compute, as bookings count them.
    #[must_use]
    pub fn effective_tokens(&self, held: Held) -> u32 {
        let cached = u32::try_from(self.cached_tokens(held)).unwrap_or(u32::MAX);
        self.prompt.tokens.saturating_sub(cached)
    }

    /// Whether the credit of overlap falls with the prompt tokens that a worker has to
    /// compute, so that [`Self::cost`] needs the least of all.
    #[must_use]
    pub fn decays(&self) -> bool {
        self.uses_cache && self.tracks_prefill && self.decay > 0.0
    }

    /// Costs of the candidates, in their order.
    pub fn costs<'c>(&self, candidates: &'c [Candidate]) -> impl Iterator<Item = f64> + use<'c> {
        let least = candidates.iter().map(|it| it.prefill_tokens).min().unwrap_or(0);
        let formula = *self;
        candidates.iter().map(move |candidate| formula.cost(candidate, least))
    }

    /// Cost of placing the prompt on the candidate, in blocks.
    ///
    /// - `least_prefill_tokens`: `P_min`; of no matter unless it [decays](Self::decays).
    #[inline]
    #[must_use]
    pub fn cost(&self, candidate: &Candidate, least_prefill_tokens: u64) -> f64 {
        let credit =
            if self.uses_cache { self.credit_of(candidate, least_prefill_tokens) } else { 0.0 };
        let decode = float(candidate.active_blocks + candidate.additional_blocks);
        let requests = self.request_weight * float(candidate.requests);
        let cost = if self.credits_decode {
            positive(decode - credit) + requests
        } else {
            let cached = self.cached_tokens(candidate.held);
            let raw_tokens = if self.tracks_prefill {
                candidate.prefill_tokens + u64::from(self.prompt.tokens).max(cached)
            } else {
                0
            };
            let prefill = positive(float(raw_tokens) / self.block_size() - credit);
            self.prefill_scale * prefill + decode + requests
        };
        cost * candidate.taint_factor
    }

    fn credit_of(&self, candidate: &Candidate, least_prefill_tokens: u64) -> f64 {
        let Held { device, host, disk } = candidate.held;
        let decay = if self.tracks_prefill && self.decay > 0.0 {
            let more = candidate.prefill_tokens.saturating_sub(least_prefill_tokens);
            let prompt_blocks = self.prompt.tokens.div_ceil(self.prompt.block_size.max(1)).max(1);
            1.0 / (1.0 + self.decay * (float(more) / self.block_size() / f64::from(prompt_blocks)))
        } else {
            1.0
        };
        self.credit * decay * f64::from(device)
            + self.host_weight * f64::from(host)
            + self.disk_weight * f64::from(disk)
            + self.shared_multiplier * f64::from(candidate.shared_blocks)
    }

    fn block_size(&self) -> f64 {
        f64::from(self.prompt.block_size.max(1))
    }
}

/// As `max(0.0)`, which is a call of a function in WebAssembly.
#[inline]
fn positive(number: f64) -> f64 {
    if number > 0.0 { number } else { 0.0 }
}

/// Exact below 2⁵³ tokens or blocks. As a signed number, since processors convert
/// those in one step.
#[expect(clippy::cast_precision_loss, reason = "far below 2⁵³")]
fn float(count: u64) -> f64 {
    count.cast_signed() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const PROMPT: PromptSize = PromptSize { tokens: 1000, block_size: 16 };

    fn candidate(overlap: u32, prefill: u64, active: u64, additional: u64) -> Candidate {
        Candidate {
            held: Held { device: overlap, ..Held::default() },
            prefill_tokens: prefill,
            active_blocks: active,
            additional_blocks: additional,
            ..Candidate::idle(WorkerSlot(0))
        }
    }

    fn of(settings: &Settings, phase: Phase, tracks: bool, candidates: &[Candidate]) -> Vec<f64> {
        Formula::new(settings, phase, tracks, PROMPT).costs(candidates).collect()
    }

    fn aggregated(settings: &Settings, candidates: &[Candidate]) -> Vec<f64> {
        of(settings, Phase::Aggregated, true, candidates)
    }

    /// The worked example of Dynamo's router, verified against its crate.
    #[test]
    fn worked_example() {
        let all = [candidate(40, 0, 20, 23), candidate(10, 512, 5, 53), candidate(0, 0, 0, 63)];
        assert_eq!(aggregated(&Settings::default(), &all), [65.5, 142.5, 125.5]);
    }

    #[test]
    fn knobs_weigh_their_terms() {
        let base = candidate(40, 0, 20, 23);
        let with =
            |settings: Settings, requests| aggregated(&settings, &[Candidate { requests, ..base }]);
        let half = Settings { overlap_score_credit: 0.5, ..Settings::default() };
        assert_eq!(with(half, 0), [42.5 + 43.0]);
        let scaled = Settings { prefill_load_scale: 2.0, ..Settings::default() };
        assert_eq!(with(scaled, 0), [45.0 + 43.0]);
        let weighed = Settings { decode_active_request_weight: 3.0, ..Settings::default() };
        assert_eq!(with(weighed, 2), [65.5 + 6.0]);
    }

    #[test]
    fn lower_tiers_count_by_their_weights() {
        let held = Held { device: 10, host: 8, disk: 4 };
        let one = Candidate { held, ..candidate(0, 0, 0, 63) };
        // 62.5 − (10 + 8 · 0.75 + 4 · 0.25) + 63
        assert_eq!(aggregated(&Settings::default(), &[one]), [108.5]);
        let formula = Formula::new(&Settings::default(), Phase::Prefill, true, PROMPT);
        assert_eq!(formula.cached_tokens(held), 17 * 16);
        assert_eq!(formula.effective_tokens(held), 1000 - 272);
        let shared = Candidate { shared_blocks: 6, ..one };
        let settings = Settings { shared_cache_multiplier: 0.5, ..Settings::default() };
        assert_eq!(aggregated(&settings, &[shared]), [105.5]);
    }

    /// Credit falls with the prefill that is booked beyond the least busy
    /// candidate's: 630 tokens more are 39.375 blocks, 0.625 of the prompt's 63.
    #[test]
    fn credit_decays_with_booked_prefill() {
        let settings = Settings { overlap_score_credit_decay: 2.0, ..Settings::default() };
        let costs = aggregated(&settings, &[candidate(40, 100, 0, 0), candidate(40, 730, 0, 0)]);
        assert_eq!(costs[0], 1100.0 / 16.0 - 40.0);
        let decay = 1.0 / (1.0 + 2.0 * (39.375 / 63.0));
        assert!((costs[1] - (1730.0 / 16.0 - 40.0 * decay)).abs() < 1e-12);
    }

    /// Without prefill tracking the credit is taken from the decode blocks, but
    /// not for a prompt that comes computed.
    #[test]
    fn phases_differ() {
        let settings = Settings::default();
        let one = [candidate(40, 512, 20, 43)];
        assert_eq!(of(&settings, Phase::Aggregated, false, &one), [23.0]);
        assert_eq!(of(&settings, Phase::ConditionalDecode, false, &one), [23.0]);
        assert_eq!(of(&settings, Phase::Prefill, false, &one), [63.0]);
        assert_eq!(of(&settings, Phase::Decode, false, &one), [63.0]);
        // A decode worker that is not asked for its cache is not credited.
        assert_eq!(of(&settings, Phase::Decode, true, &one), [94.5 + 63.0]);
    }

    #[test]
    fn no_credit_means_no_cache_at_all() {
        let settings = Settings { overlap_score_credit: 0.0, ..Settings::default() };
        let held = Held { device: 10, host: 10, disk: 10 };
        let one = Candidate { held, ..candidate(0, 0, 0, 63) };
        assert_eq!(aggregated(&settings, &[one]), [125.5]);
        let formula = Formula::new(&settings, Phase::Aggregated, true, PROMPT);
        assert_eq!(formula.cached_tokens(held), 0);
    }

    #[test]
    fn preferred_taints_scale_the_cost() {
        assert_eq!(taint_factor([].into_iter()), 1.0);
        let factor = taint_factor([0.5, 0.25].into_iter());
        assert!((factor - (-(0.75_f64.tanh())).exp()).abs() < 1e-15);
        let one = Candidate { taint_factor: 0.5, ..candidate(0, 0, 0, 63) };
        assert_eq!(aggregated(&Settings::default(), &[one]), [62.75]);
    }

    #[test]
    fn credit_never_makes_prefill_negative() {
        assert_eq!(aggregated(&Settings::default(), &[candidate(80, 0, 0, 0)]), [0.0]);
    }

    #[test]
    fn a_block_size_of_zero_is_no_division_by_zero() {
        let odd = PromptSize { tokens: 10, block_size: 0 };
        let formula = Formula::new(&Settings::default(), Phase::Aggregated, true, odd);
        assert!(formula.costs(&[candidate(0, 0, 0, 0)]).all(f64::is_finite));
    }
}
