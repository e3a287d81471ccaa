//! Expected time: what placing a prompt on a worker costs in time, the request's
//! own and that of the requests beside it.
//!
//! A formula of our own beside Dynamo's, in microseconds; lower is better:
//!
//! ```text
//! uncached = isl − max(cached, booked)
//! wait     = (P + uncached) · prefill
//! stall    = R · uncached · prefill
//! slow     = 1.5 · R · output · (request + context · isl)
//! cost     = (wait + weight · (stall + slow)) · taints
//! ```
//!
//! - `wait`: until the first token. Prompts that are booked come first.
//! - `stall`: the answers that run there get no token while this prompt is
//!   computed.
//! - `slow`: every step of an answer takes longer by what each other request adds
//!   to it. Ours is slowed down for all of its steps by each of them, and each of
//!   them by ours for half of theirs, as they have begun already.
//!
//! What is the same on every worker is left out, such as the time of an empty step.
//!
//! # Terms
//!
//! - `isl`, `P`, `taints`: as in `score`; `R`: running requests.
//! - `cached`: tokens that the worker holds. `booked`: tokens that requests which
//!   were placed there before share with this one: by the time it is scheduled
//!   they are cached, although no event has said so yet.
//! - `prefill`, `request`, `context`, `output`, `weight`: [`ExpectedTime`].
//!
//! # Why it differs from Dynamo's
//!
//! Dynamo adds blocks to compute and blocks that are held. The first cost time
//! once, the second a little in every step, and not by their number but by what
//! is read of them: a prefix that twenty requests share is held once and read
//! twenty times a step.
//!
//! # Invariants
//!
//! 1. Never negative, and finite for parameters in their ranges.
//! 2. More overlap never costs more, more load never less.

use super::{Candidate, PromptSize, float};

/// What the formula knows of the engines. Only ratios count: all times may be
/// off by the same factor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpectedTime {
    /// Computing one prompt token, in microseconds.
    pub prefill_us: f64,
    /// What a request adds to a step, in microseconds.
    pub request_us: f64,
    /// What a token of its context adds, in microseconds.
    pub context_us: f64,
    /// Tokens of an answer if the request does not say.
    pub output_tokens: f64,
    /// What a second counts by which a running answer is delayed, against one
    /// before a first token, `0.0..=1.0`.
    pub answer_weight: f64,
}

/// For a model of 70 billion parameters in 16 bits on four accelerators of 989
/// TFLOP/s and 3.35 TB/s: 140 GFLOP a prompt token at half of that rate, 328 kB of
/// keys and values a context token at 70 % of that one. Smaller and larger models
/// have nearly the same ratios.
impl Default for ExpectedTime {
    fn default() -> Self {
        Self {
            prefill_us: 70.0,
            request_us: 30.0,
            context_us: 0.035,
            output_tokens: 128.0,
            answer_weight: 0.3,
        }
    }
}

impl ExpectedTime {
    /// Cost of placing the prompt on the candidate, in microseconds.
    ///
    /// - `uncached_tokens`: of the prompt, by what the worker is known to hold; 0
    ///   for a prompt that comes computed.
    #[must_use]
    pub fn cost(&self, prompt: PromptSize, candidate: &Candidate, uncached_tokens: u32) -> f64 {
        let block_size = prompt.block_size.max(1);
        // Blocks that are not tracked are no blocks in common.
        let in_common = u64::from(prompt.tokens / block_size)
            .saturating_sub(candidate.additional_blocks)
            .min(candidate.active_blocks);
        let booked = float(in_common) * f64::from(block_size);
        let uncached = f64::from(uncached_tokens).min((f64::from(prompt.tokens) - booked).max(0.0));
        let requests = float(candidate.requests);
        let wait = (float(candidate.prefill_tokens) + uncached) * self.prefill_us;
        let stall = requests * uncached * self.prefill_us;
        let share_of_step = self.request_us + self.context_us * f64::from(prompt.tokens);
        let slow = 1.5 * requests * self.output_tokens * share_of_step;
        (wait + self.answer_weight * (stall + slow)) * candidate.taint_factor
    }

    /// Whether the parameters are in their ranges.
    ///
    /// # Errors
    ///
    /// What would be right.
    pub fn check(&self) -> Result<(), &'static str> {
        let Self { prefill_us, request_us, context_us, output_tokens, answer_weight } = *self;
        let amounts = [prefill_us, request_us, context_us, output_tokens];
        if !amounts.iter().all(|amount| (0.0..=AMOUNT_MAX).contains(amount)) {
            Err("must have times and tokens of at least 0")
        } else if (0.0..=1.0).contains(&answer_weight) {
            Ok(())
        } else {
            Err("must have an `answer_weight` from 0 to 1")
        }
    }
}

/// Largest time, in microseconds, and longest answer, in tokens: no cost that is
/// made of them comes near the largest number.
const AMOUNT_MAX: f64 = 1e9;

#[cfg(test)]
mod tests {
    use super::super::Held;
    use super::*;
    use crate::ids::WorkerSlot;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const PROMPT: PromptSize = PromptSize { tokens: 1000, block_size: 16 };
    const ROUND: ExpectedTime = ExpectedTime {
        prefill_us: 10.0,
        request_us: 20.0,
        context_us: 0.01,
        output_tokens: 100.0,
        answer_weight: 0.5,
    };

    fn candidate(prefill: u64, active: u64, additional: u64, requests: u64) -> Candidate {
        Candidate {
            prefill_tokens: prefill,
            active_blocks: active,
            additional_blocks: additional,
            requests,
            ..Candidate::idle(WorkerSlot(0))
        }
    }

    /// Worked out by hand: an idle worker, a queue, running answers.
    #[test]
    fn terms_add_up() {
        assert_eq!(ROUND.cost(PROMPT, &candidate(0, 0, 62, 0), 1000), 10_000.0);
        assert_eq!(ROUND.cost(PROMPT, &candidate(500, 0, 62, 0), 360), 8_600.0);
        // wait 3600, stall 2 · 3600, slow 1.5 · 2 · 100 · (20 + 10).
        let two = candidate(0, 0, 62, 2);
        assert_eq!(ROUND.cost(PROMPT, &two, 360), 3_600.0 + 0.5 * (7_200.0 + 9_000.0));
        let half = Candidate { taint_factor: 0.5, ..two };
        assert_eq!(ROUND.cost(PROMPT, &half, 360), 0.5 * ROUND.cost(PROMPT, &two, 360));
        // A prompt that comes computed.
        assert_eq!(ROUND.cost(PROMPT, &two, 0), 4_500.0);
    }

    /// What a request ahead of it computes need not be computed again, whether or
    /// not an event has said so; the wait for it counts.
    #[test]
    fn booked_blocks_are_as_good_as_held_ones() {
        let behind = candidate(800, 50, 12, 0);
        assert_eq!(ROUND.cost(PROMPT, &behind, 1000), (800.0 + 200.0) * 10.0);
        assert_eq!(ROUND.cost(PROMPT, &behind, 100), (800.0 + 100.0) * 10.0);
        // Not tracked: no active block, none additional.
        assert_eq!(ROUND.cost(PROMPT, &candidate(0, 0, 0, 0), 1000), 10_000.0);
        let odd = PromptSize { tokens: 10, block_size: 0 };
        assert!(ROUND.cost(odd, &candidate(0, 9, 0, 1), 10).is_finite());
    }

    /// A popular prefix moves to an idle worker when enough answers share the
    /// first, not before: stickiness is a matter of cost.
    #[test]
    fn a_hot_prefix_spreads_when_it_pays() {
        let parameters = ExpectedTime::default();
        let prompt = PromptSize { tokens: 8400, block_size: 16 };
        let warm = |requests| parameters.cost(prompt, &candidate(0, 512, 13, requests), 208);
        let cold = parameters.cost(prompt, &candidate(0, 0, 525, 0), 8400);
        assert!(warm(5) < cold, "{} {cold}", warm(5));
        assert!(warm(40) > cold, "{} {cold}", warm(40));
    }

    #[test]
    fn parameters_have_ranges() {
        assert_eq!(ExpectedTime::default().check(), Ok(()));
        let wrong = [
            ExpectedTime { prefill_us: -1.0, ..ROUND },
            ExpectedTime { output_tokens: f64::INFINITY, ..ROUND },
            ExpectedTime { answer_weight: 1.1, ..ROUND },
            ExpectedTime { answer_weight: f64::NAN, ..ROUND },
        ];
        for parameters in wrong {
            assert!(parameters.check().is_err(), "{parameters:?}");
        }
    }

    #[cfg(not(target_arch = "wasm32"))]
    proptest::proptest! {
        /// Goal: overlap only ever helps, load only ever hurts.
        #[test]
        fn overlap_helps_and_load_hurts(
            tokens in 1_u32..100_000, prefill in 0_u64..1_000_000, active in 0_u64..100_000,
            additional in 0_u64..6_000, requests in 0_u64..1000, uncached in 0_u32..100_000,
        ) {
            let prompt = PromptSize { tokens, block_size: 16 };
            let parameters = ExpectedTime::default();
            let of = |it: Candidate, uncached: u32| parameters.cost(prompt, &it, uncached);
            let base = candidate(prefill, active, additional, requests);
            let cost = of(base, uncached.min(tokens));
            proptest::prop_assert!(cost >= 0.0 && cost.is_finite());
            proptest::prop_assert!(of(base, uncached.min(tokens) / 2) <= cost);
            proptest::prop_assert!(of(Candidate { requests: requests + 1, ..base }, uncached.min(tokens)) >= cost);
            proptest::prop_assert!(of(Candidate { prefill_tokens: prefill + 9, ..base }, uncached.min(tokens)) >= cost);
        }
    }
}
