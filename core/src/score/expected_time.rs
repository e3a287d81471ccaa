//! Expected time: what placing a prompt on a worker costs in time, the request's
//! own and that of others.
//!
//! A formula of our own beside Dynamo's, in microseconds; lower is better:
//!
//! ```text
//! work   = (uncached − again) · prefill
//! wait   = P · prefill + work
//! behind = followers · work
//! stall  = R · work
//! slow   = 1.5 · R · output · (request + context · isl)
//! cost   = (wait + behind + weight · (stall + slow)) · taints
//! ```
//!
//! - `wait`: until the first token. Prompts that are booked come first.
//! - `behind`: whoever comes later and waits for this prompt, too.
//! - `stall`: the answers that run there get no token while this prompt is
//!   computed.
//! - `slow`: every step of an answer takes longer by what each other request adds
//!   to it. Ours is slowed down for all of its steps by each of them, and each of
//!   them by ours for half of theirs, as they have begun already. They are taken to
//!   be as long as ours.
//!
//! What is the same on every worker is left out, such as the time of an empty step.
//!
//! # Terms
//!
//! - `isl`, `P`, `taints`: as in `score`; `R`: running requests.
//! - `uncached`: prompt tokens that the worker neither holds nor computes for a
//!   request that was placed there before: by the time this one is scheduled,
//!   those are cached, although no event has said so yet.
//! - `again`: a prefix that `k` running requests share will be wanted `k` times
//!   more within an answer's time. Whoever computes it on a further worker does so
//!   for them, too, and bears a share of `1 / (1 + k)`.
//! - `followers`: requests that come before the worker's queue is empty again: some
//!   always, and more for each that waits on the mean worker now: `P` over `isl`, at
//!   most `R`.
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
//! 2. More of the prompt on a worker never makes that worker dearer, more load
//!    never cheaper.
//! 3. Two looks at each candidate, none at its blocks.

use super::{Candidate, PromptSize, float};

/// What the formula knows of the engines. Of times only ratios count: all may be
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
    /// Requests that a placed one delays where nobody waits.
    pub followers: f64,
    /// How many more for each request that waits on the mean worker.
    pub followers_per_waiting: f64,
}

/// Times are those of a model of 70 billion parameters in 16 bits on four
/// accelerators of 989 TFLOP/s and 3.35 TB/s: 140 GFLOP a prompt token at half of
/// that rate, 328 kB of keys and values a context token at 70 % of that one. Smaller
/// and larger models have nearly the same ratios. The other figures are the best on
/// simulated engines (`make bench-quality`), and flat there: half and double are as
/// good within a few percent.
impl Default for ExpectedTime {
    fn default() -> Self {
        Self {
            prefill_us: 70.0,
            request_us: 30.0,
            context_us: 0.035,
            output_tokens: 128.0,
            answer_weight: 0.1,
            followers: 0.5,
            followers_per_waiting: 8.0,
        }
    }
}

/// What all candidates have in common for one prompt.
#[derive(Clone, Copy, Debug, Default)]
struct Fleet {
    /// Leading tokens that running requests share with the prompt, on the worker
    /// where that saves most.
    popular_tokens: f64,
    /// What part of computing them others bear.
    borne: f64,
    followers: f64,
}

impl ExpectedTime {
    /// Costs of the candidates, in their order, in microseconds.
    ///
    /// - `uncached`: tokens of the prompt that a candidate is not known to hold; 0
    ///   for a prompt that comes computed.
    #[must_use]
    pub fn costs(
        &self,
        prompt: PromptSize,
        candidates: &[Candidate],
        uncached: impl Fn(&Candidate) -> u32,
    ) -> Vec<f64> {
        let fleet = self.fleet(prompt, candidates);
        let cost = |it: &Candidate| self.cost(prompt, it, uncached(it), &fleet);
        candidates.iter().map(cost).collect()
    }

    fn fleet(&self, prompt: PromptSize, candidates: &[Candidate]) -> Fleet {
        let mut fleet = Fleet::default();
        let (mut booked, mut requests) = (0.0, 0.0);
        for candidate in candidates {
            booked += float(candidate.prefill_tokens);
            requests += float(candidate.requests);
            let tokens = in_common(prompt, candidate);
            let sharers = float(candidate.sharers);
            let borne = sharers / (1.0 + sharers);
            if tokens * borne > fleet.popular_tokens * fleet.borne {
                fleet = Fleet { popular_tokens: tokens, borne, ..fleet };
            }
        }
        // Before a short prompt there wait long ones, but no more than there are.
        let waiting = (booked / f64::from(prompt.tokens).max(1.0)).min(requests);
        let waiting = waiting / float(candidates.len() as u64).max(1.0);
        fleet.followers = self.followers + self.followers_per_waiting * waiting;
        fleet
    }

    fn cost(
        &self,
        prompt: PromptSize,
        candidate: &Candidate,
        uncached_tokens: u32,
        fleet: &Fleet,
    ) -> f64 {
        let isl = f64::from(prompt.tokens);
        let uncached = f64::from(uncached_tokens).min(isl - in_common(prompt, candidate)).max(0.0);
        let popular = (fleet.popular_tokens - (isl - uncached)).max(0.0);
        let work = (uncached - popular.min(uncached) * fleet.borne) * self.prefill_us;
        let requests = float(candidate.requests);
        let wait = float(candidate.prefill_tokens) * self.prefill_us + work;
        let behind = fleet.followers * work;
        let stall = requests * work;
        let share_of_step = self.request_us + self.context_us * isl;
        let slow = 1.5 * requests * self.output_tokens * share_of_step;
        (wait + behind + self.answer_weight * (stall + slow)) * candidate.taint_factor
    }

    /// The parameters by the names that operators write.
    pub fn parameters_mut(&mut self) -> [(&'static str, &mut f64); 7] {
        [
            ("prefill_us", &mut self.prefill_us),
            ("request_us", &mut self.request_us),
            ("context_us", &mut self.context_us),
            ("output_tokens", &mut self.output_tokens),
            ("answer_weight", &mut self.answer_weight),
            ("followers", &mut self.followers),
            ("followers_per_waiting", &mut self.followers_per_waiting),
        ]
    }

    /// Whether the parameters are in their ranges.
    ///
    /// # Errors
    ///
    /// What would be right.
    pub fn check(&self) -> Result<(), &'static str> {
        let amounts = [
            self.prefill_us,
            self.request_us,
            self.context_us,
            self.output_tokens,
            self.followers,
            self.followers_per_waiting,
        ];
        if !amounts.iter().all(|amount| (0.0..=AMOUNT_MAX).contains(amount)) {
            Err("must have times and numbers from 0 to 1,000,000")
        } else if (0.0..=1.0).contains(&self.answer_weight) {
            Ok(())
        } else {
            Err("must have an `answer_weight` from 0 to 1")
        }
    }
}

/// Leading tokens of the prompt that requests on the candidate share with it.
/// Blocks that are not tracked are none in common.
fn in_common(prompt: PromptSize, candidate: &Candidate) -> f64 {
    let block_size = prompt.block_size.max(1);
    let blocks = u64::from(prompt.tokens / block_size);
    let common = blocks.saturating_sub(candidate.additional_blocks).min(candidate.active_blocks);
    float(common) * f64::from(block_size)
}

/// Largest parameter: no cost that is made of such comes near the largest number.
const AMOUNT_MAX: f64 = 1e6;

#[cfg(test)]
mod tests {
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
        followers: 0.0,
        followers_per_waiting: 0.0,
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

    fn one(parameters: &ExpectedTime, prompt: PromptSize, it: Candidate, uncached: u32) -> f64 {
        parameters.costs(prompt, &[it], |_| uncached)[0]
    }

    /// Worked out by hand: an idle worker, a queue, running answers.
    #[test]
    fn terms_add_up() {
        let cost = |it, uncached| one(&ROUND, PROMPT, it, uncached);
        assert_eq!(cost(candidate(0, 0, 62, 0), 1000), 10_000.0);
        assert_eq!(cost(candidate(500, 0, 62, 0), 360), 8_600.0);
        // wait 3600, stall 2 · 3600, slow 1.5 · 2 · 100 · (20 + 10).
        let two = candidate(0, 0, 62, 2);
        assert_eq!(cost(two, 360), 3_600.0 + 0.5 * (7_200.0 + 9_000.0));
        assert_eq!(cost(Candidate { taint_factor: 0.5, ..two }, 360), 0.5 * cost(two, 360));
        // A prompt that comes computed.
        assert_eq!(cost(two, 0), 4_500.0);
    }

    /// Those who come later count once without a queue, and more with one: 500 and
    /// 1500 booked tokens are one prompt of 1000 on the mean of two workers.
    #[test]
    fn followers_wait_as_well() {
        let parameters = ExpectedTime { followers: 0.5, followers_per_waiting: 2.0, ..ROUND };
        let silent = ExpectedTime { answer_weight: 0.0, ..parameters };
        let both = [candidate(500, 0, 62, 1), candidate(1500, 0, 62, 1)];
        let costs = silent.costs(PROMPT, &both, |_| 100);
        assert_eq!(costs, [6_000.0 + 2_500.0, 16_000.0 + 2_500.0]);
        // No more can wait than there are.
        let few = [candidate(500, 0, 62, 0), candidate(1500, 0, 62, 1)];
        let costs = silent.costs(PROMPT, &few, |_| 100);
        assert_eq!(costs, [6_000.0 + 1_500.0, 16_000.0 + 1_500.0]);
        assert_eq!(one(&parameters, PROMPT, candidate(0, 0, 62, 0), 100), 1_500.0);
    }

    /// What a request ahead of it computes need not be computed again, whether or
    /// not an event has said so; the wait for it counts.
    #[test]
    fn booked_blocks_are_as_good_as_held_ones() {
        let behind = candidate(800, 50, 12, 0);
        assert_eq!(one(&ROUND, PROMPT, behind, 1000), (800.0 + 200.0) * 10.0);
        assert_eq!(one(&ROUND, PROMPT, behind, 100), (800.0 + 100.0) * 10.0);
        // Not tracked: no active block, none additional.
        assert_eq!(one(&ROUND, PROMPT, candidate(0, 0, 0, 0), 1000), 10_000.0);
        let odd = PromptSize { tokens: 10, block_size: 0 };
        assert!(one(&ROUND, odd, candidate(0, 9, 0, 1), 10).is_finite());
        assert!(ROUND.costs(PROMPT, &[], |_| 0).is_empty());
    }

    /// A prefix of 800 tokens that three requests share elsewhere: a further worker
    /// bears a quarter of it, and the 200 tokens behind it.
    #[test]
    fn others_bear_their_share_of_a_popular_prefix() {
        let warm = Candidate { sharers: 3, ..candidate(0, 90, 12, 0) };
        let costs = ROUND.costs(PROMPT, &[warm, candidate(0, 0, 62, 0)], |it| {
            if it.sharers > 0 { 200 } else { 1000 }
        });
        assert_eq!(costs, [2_000.0, (200.0 + 200.0) * 10.0]);
    }

    /// A popular prefix moves to an idle worker when enough answers share it, not
    /// before: stickiness is a matter of cost.
    #[test]
    fn a_hot_prefix_spreads_when_it_pays() {
        let parameters = ExpectedTime::default();
        let prompt = PromptSize { tokens: 8400, block_size: 16 };
        let costs = |requests| {
            let warm = Candidate { sharers: requests, ..candidate(0, 600, 13, requests) };
            parameters.costs(prompt, &[warm, candidate(0, 0, 525, 0)], |it| {
                if it.sharers > 0 { 208 } else { 8400 }
            })
        };
        let (few, many) = (costs(2), costs(16));
        assert!(few[0] < few[1], "{few:?}");
        assert!(many[0] > many[1], "{many:?}");
    }

    #[test]
    fn parameters_have_ranges() {
        assert_eq!(ExpectedTime::default().check(), Ok(()));
        let wrong = [
            ExpectedTime { prefill_us: -1.0, ..ROUND },
            ExpectedTime { output_tokens: f64::INFINITY, ..ROUND },
            ExpectedTime { followers: f64::NAN, ..ROUND },
            ExpectedTime { answer_weight: 1.1, ..ROUND },
            ExpectedTime { answer_weight: f64::NAN, ..ROUND },
        ];
        for parameters in wrong {
            assert!(parameters.check().is_err(), "{parameters:?}");
        }
    }

    #[cfg(not(target_arch = "wasm32"))]
    proptest::proptest! {
        /// Goal: to hold more of the prompt only ever helps, load only ever hurts.
        #[test]
        fn overlap_helps_and_load_hurts(
            tokens in 1_u32..100_000, prefill in 0_u64..1_000_000, active in 0_u64..100_000,
            additional in 0_u64..6_000, requests in 0_u64..1000, sharers in 0_u64..1000,
            uncached in 0_u32..100_000,
        ) {
            let prompt = PromptSize { tokens, block_size: 16 };
            let parameters = ExpectedTime::default();
            let other = Candidate { sharers, ..candidate(70, 3_000, 100, 9) };
            let of = |it: Candidate, uncached: u32| {
                let costs = parameters.costs(prompt, &[it, other], |_| uncached.min(tokens));
                costs.first().copied().unwrap_or(f64::NAN)
            };
            let base = candidate(prefill, active, additional, requests);
            let cost = of(base, uncached);
            proptest::prop_assert!(cost >= 0.0 && cost.is_finite());
            proptest::prop_assert!(of(base, uncached / 2) <= cost);
            let busier = Candidate { requests: requests + 1, ..base };
            proptest::prop_assert!(of(busier, uncached) >= cost);
            let queued = Candidate { prefill_tokens: prefill + 9, ..base };
            proptest::prop_assert!(of(queued, uncached) >= cost);
        }
    }
}
