//! Score: what it would cost to place a prompt on a worker.
//!
//! Sixth stage of the request path: `overlap` and `load` give the inputs,
//! `choose` takes the lowest cost.
//!
//! The formula is Dynamo's router's (1.6.1, default policy) in blocks:
//!
//! ```text
//! prefill = S · max((P_w + max(isl, cached_w)) / bs − C · D_w, 0)
//! cost    = prefill + active_w + additional_w + A · requests_w
//! ```
//!
//! # Terms
//!
//! - `isl`: prompt tokens; `bs`: tokens of a block.
//! - `D_w`: overlap of the worker, in blocks; `cached_w = D_w · bs`.
//! - `P_w`: prompt tokens booked on the worker whose prefill is not done.
//! - `active_w`: unique prompt blocks of the worker's running requests;
//!   `additional_w`: blocks of this prompt that are not among them.
//! - `C`, `S`, `A`: [`Knobs`].
//!
//! # Invariants
//!
//! 1. Lower is better, everywhere.
//! 2. The trailing partial block is invisible to overlap and blocks, but its
//!    tokens count in `isl`.

use crate::ids::WorkerSlot;

/// Settings of the cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Knobs {
    /// `C`: blocks of prefill saved per overlapping block, `0.0..=1.0`.
    pub overlap_score_credit: f64,
    /// `S`: weight of prefill against decode, at least 0.
    pub prefill_load_scale: f64,
    /// `A`: cost of each running request, in blocks, at least 0.
    pub decode_active_request_weight: f64,
}

impl Default for Knobs {
    fn default() -> Self {
        Self {
            overlap_score_credit: 1.0,
            prefill_load_scale: 1.0,
            decode_active_request_weight: 0.0,
        }
    }
}

/// What is to be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptSize {
    /// Tokens of the prompt.
    pub tokens: u32,
    /// Tokens of a block; 0 makes every block count 0.
    pub block_size: u32,
}

/// A worker that may be chosen, with what the cost needs to know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The worker.
    pub slot: WorkerSlot,
    /// `D_w`, in blocks.
    pub overlap_blocks: u32,
    /// `P_w`, in tokens.
    pub prefill_tokens: u64,
    /// `active_w`, in blocks.
    pub active_blocks: u64,
    /// `additional_w`, in blocks.
    pub additional_blocks: u64,
    /// `requests_w`.
    pub requests: u64,
}

/// Cost of placing the prompt on the candidate, in blocks; lower is better.
/// Finite and not negative for knobs in their ranges.
#[must_use]
pub fn cost(prompt: PromptSize, candidate: &Candidate, knobs: &Knobs) -> f64 {
    // Exact below 2⁵³ tokens or blocks.
    #[expect(clippy::cast_precision_loss, reason = "far below 2⁵³")]
    let float = |count: u64| count as f64;
    let block_size = u64::from(prompt.block_size.max(1));
    let cached_tokens = u64::from(candidate.overlap_blocks) * block_size;
    let raw_tokens = candidate.prefill_tokens + u64::from(prompt.tokens).max(cached_tokens);
    let credit = knobs.overlap_score_credit * f64::from(candidate.overlap_blocks);
    let prefill =
        knobs.prefill_load_scale * (float(raw_tokens) / float(block_size) - credit).max(0.0);
    prefill
        + float(candidate.active_blocks)
        + float(candidate.additional_blocks)
        + knobs.decode_active_request_weight * float(candidate.requests)
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const PROMPT: PromptSize = PromptSize { tokens: 1000, block_size: 16 };

    fn candidate(overlap: u32, prefill: u64, active: u64, additional: u64) -> Candidate {
        Candidate {
            slot: WorkerSlot(0),
            overlap_blocks: overlap,
            prefill_tokens: prefill,
            active_blocks: active,
            additional_blocks: additional,
            requests: 0,
        }
    }

    /// The worked example of Dynamo's router, verified against its crate.
    #[test]
    fn worked_example() {
        let knobs = Knobs::default();
        assert_eq!(cost(PROMPT, &candidate(40, 0, 20, 23), &knobs), 65.5);
        assert_eq!(cost(PROMPT, &candidate(10, 512, 5, 53), &knobs), 142.5);
        assert_eq!(cost(PROMPT, &candidate(0, 0, 0, 63), &knobs), 125.5);
    }

    #[test]
    fn knobs_weigh_their_terms() {
        let base = candidate(40, 0, 20, 23);
        let with = |knobs: Knobs, requests| cost(PROMPT, &Candidate { requests, ..base }, &knobs);
        let half = Knobs { overlap_score_credit: 0.5, ..Knobs::default() };
        assert_eq!(with(half, 0), 42.5 + 43.0);
        let scaled = Knobs { prefill_load_scale: 2.0, ..Knobs::default() };
        assert_eq!(with(scaled, 0), 45.0 + 43.0);
        let weighed = Knobs { decode_active_request_weight: 3.0, ..Knobs::default() };
        assert_eq!(with(weighed, 2), 65.5 + 6.0);
    }

    #[test]
    fn credit_never_makes_prefill_negative() {
        let all = candidate(80, 0, 0, 0);
        assert_eq!(cost(PROMPT, &all, &Knobs::default()), 0.0);
    }

    #[test]
    fn a_block_size_of_zero_is_no_division_by_zero() {
        let odd = PromptSize { tokens: 10, block_size: 0 };
        assert!(cost(odd, &candidate(0, 0, 0, 0), &Knobs::default()).is_finite());
    }
}
