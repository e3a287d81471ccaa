//! Choose: costs to one worker.
//!
//! Seventh stage of the request path. As Dynamo's picker (1.6.1): the lowest
//! cost, or one drawn with weights that fall with the cost; or, by its two-tier
//! policy, the least busy of those with the longest overlap.
//!
//! # Invariants
//!
//! 1. At temperature 0 the lowest cost wins; exact ties are resolved uniformly at
//!    random, so that equal workers share.
//! 2. Randomness is an argument: the same seed gives the same choice, and the
//!    order of candidates comes from the roster, never from a hash map.

use crate::settings::TwoTier;

/// A small generator of random numbers (SplitMix64, Steele et al. 2014): good
/// enough to spread ties, cheap, and the same on every target.
#[derive(Clone, Copy, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator whose numbers depend on nothing but the seed.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0.0..1.0`, one of 2⁵³.
    pub fn unit(&mut self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
        let bits = (self.next_u64() >> 11) as f64;
        bits / 9_007_199_254_740_992.0
    }

    /// A number below `bound`; 0 for a bound of 0. Its bias is below 2⁻³² for
    /// any bound that a fleet could have.
    pub fn below(&mut self, bound: u32) -> u32 {
        let wide = (self.next_u64() >> 32) * u64::from(bound);
        u32::try_from(wide >> 32).unwrap_or(0)
    }
}

/// Position of a cost drawn with the weights `exp(−(cost − least) / ((most −
/// least) · temperature))`; `None` without candidates. Costs that are not finite
/// are passed over.
///
/// - `temperature`: 0 takes the lowest cost; below 0 (which no configuration lets
///   through) counts as 0.
pub fn drawn(costs: &[f64], temperature: f64, random: &mut Random) -> Option<usize> {
    if temperature == 0.0 {
        return lowest(costs.iter().copied(), random);
    }
    let finite = || costs.iter().copied().enumerate().filter(|(_, cost)| cost.is_finite());
    let least = finite().map(|(_, cost)| cost).fold(f64::INFINITY, f64::min);
    let most = finite().map(|(_, cost)| cost).fold(f64::NEG_INFINITY, f64::max);
    // Quarters, so that no difference overflows.
    let spread = (most / 4.0 - least / 4.0) * temperature;
    if !(temperature > 0.0 && spread > 0.0) {
        return lowest(costs.iter().copied(), random);
    }
    let weight = |cost: f64| (-(cost / 4.0 - least / 4.0) / spread).exp();
    let sum: f64 = finite().map(|(_, cost)| weight(cost)).sum();
    let mut left = random.unit() * sum;
    let mut last = None;
    for (at, cost) in finite() {
        left -= weight(cost);
        last = Some(at);
        if left <= 0.0 {
            break;
        }
    }
    last
}

/// What the two-tier policy looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Balance {
    /// Leading blocks of the prompt on the worker's accelerator.
    pub device_blocks: u32,
    /// Running requests.
    pub requests: u64,
}

/// Position of the worker that the two-tier policy takes: where the numbers of
/// running requests are far apart, or no worker holds enough of the prompt, the
/// least busy one, else the least busy of those that hold most. Ties are resolved
/// uniformly at random.
///
/// - `prompt_blocks`: blocks of the prompt, a partial one counted.
pub fn two_tier(
    workers: &[Balance],
    prompt_blocks: u32,
    thresholds: &TwoTier,
    random: &mut Random,
) -> Option<usize> {
    let fewest = workers.iter().map(|it| it.requests).min()?;
    let most = workers.iter().map(|it| it.requests).max()?;
    #[expect(clippy::cast_precision_loss, reason = "far below 2⁵³")]
    let is_uneven = most - fewest > thresholds.balance_abs_threshold
        && most as f64 > thresholds.balance_rel_threshold * fewest as f64;
    let longest = workers.iter().map(|it| it.device_blocks).max()?;
    let share =
        if prompt_blocks == 0 { 0.0 } else { f64::from(longest) / f64::from(prompt_blocks) };
    let by_overlap = !is_uneven && share > thresholds.cache_threshold;
    let costs = workers.iter().map(|it| {
        #[expect(clippy::cast_precision_loss, reason = "far below 2⁵³")]
        let requests = it.requests as f64;
        if by_overlap && it.device_blocks != longest { f64::INFINITY } else { requests }
    });
    lowest(costs, random)
}

/// Position of the lowest cost; `None` without candidates. Costs that are not
/// finite are passed over: a formula that went wrong for one worker must not
/// decide for all.
pub fn lowest(costs: impl Iterator<Item = f64>, random: &mut Random) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    let mut ties = 0_u32;
    for (at, cost) in costs.enumerate() {
        if !cost.is_finite() {
            continue;
        }
        match best {
            Some((_, lowest)) if cost > lowest => {}
            Some((_, lowest)) if cost == lowest => {
                // The k-th tie replaces the choice with probability 1/k.
                ties += 1;
                if random.below(ties) == 0 {
                    best = Some((at, cost));
                }
            }
            _ => {
                best = Some((at, cost));
                ties = 1;
            }
        }
    }
    best.map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn the_lowest_cost_wins() {
        let mut random = Random::seeded(1);
        assert_eq!(lowest([65.5, 142.5, 125.5].into_iter(), &mut random), Some(0));
        assert_eq!(lowest([3.0, f64::NAN, 1.0].into_iter(), &mut random), Some(2));
        assert_eq!(lowest([f64::NAN].into_iter(), &mut random), None);
        assert_eq!(lowest([].into_iter(), &mut random), None);
    }

    /// Goal: ties are shared evenly, whatever stands around them.
    /// Method: 30 000 draws among three equal costs; each share within 5 % of
    /// a third (about 6 standard deviations).
    #[test]
    fn ties_are_shared_evenly() {
        let mut random = Random::seeded(7);
        let mut counts = [0_u32; 5];
        for _ in 0..30_000 {
            counts[lowest([9.0, 1.0, 1.0, 5.0, 1.0].into_iter(), &mut random).unwrap()] += 1;
        }
        assert_eq!((counts[0], counts[3]), (0, 0));
        for at in [1, 2, 4] {
            assert!(counts[at].abs_diff(10_000) < 500, "{counts:?}");
        }
    }

    /// Goal: the worked example's shares at temperature 0.5.
    /// Method: 200 000 draws against the weights; chi-square with two degrees of
    /// freedom below 18.4 (p = 1e-4).
    #[test]
    fn drawing_follows_the_weights() {
        let costs = [65.5, 142.5, 125.5];
        let weights = costs.map(|cost| (-(cost - 65.5) / (77.0 * 0.5_f64)).exp());
        let sum: f64 = weights.iter().sum();
        let mut random = Random::seeded(11);
        let mut counts = [0_u32; 3];
        for _ in 0..200_000 {
            counts[drawn(&costs, 0.5, &mut random).unwrap()] += 1;
        }
        let chi: f64 = (0..3)
            .map(|at| {
                let expected = weights[at] / sum * 200_000.0;
                (f64::from(counts[at]) - expected).powi(2) / expected
            })
            .sum();
        assert!(chi < 18.4, "{counts:?}: {chi}");
    }

    #[test]
    fn temperatures_at_their_ends() {
        let mut random = Random::seeded(2);
        for temperature in [0.0, -1.0, f64::NAN, 1e-300] {
            assert_eq!(drawn(&[3.0, 1.0, 2.0], temperature, &mut random), Some(1));
        }
        assert_eq!(drawn(&[], 1.0, &mut random), None);
        assert_eq!(drawn(&[f64::NAN, f64::INFINITY], 1.0, &mut random), None);
        assert_eq!(drawn(&[f64::NAN, 4.0], 1.0, &mut random), Some(1));
        let mut counts = [0_u32; 2];
        for _ in 0..10_000 {
            counts[drawn(&[1.0, 9.0], 1e300, &mut random).unwrap()] += 1;
        }
        assert!(counts[0].abs_diff(5_000) < 300, "{counts:?}");
        for at in (0..100).map(|_| drawn(&[5.0, 5.0], 1.0, &mut random).unwrap()) {
            counts[at] = 0;
        }
        assert_eq!(counts, [0, 0], "equal costs are shared");
    }

    #[test]
    fn two_tiers() {
        let mut random = Random::seeded(3);
        let mut pick = |workers: &[(u32, u64)]| {
            let workers: Vec<Balance> = workers
                .iter()
                .map(|&(device_blocks, requests)| Balance { device_blocks, requests })
                .collect();
            two_tier(&workers, 10, &TwoTier::default(), &mut random)
        };
        assert_eq!(pick(&[(6, 9), (2, 0)]), Some(0), "enough is held");
        assert_eq!(pick(&[(5, 9), (2, 0)]), Some(1), "half is not enough");
        assert_eq!(pick(&[(9, 40), (2, 7)]), Some(1), "loads are far apart");
        assert_eq!(pick(&[(9, 330), (2, 300)]), Some(0), "but not by the ratio");
        assert_eq!(pick(&[(8, 5), (8, 4), (7, 0)]), Some(1));
        assert_eq!(pick(&[]), None);
    }

    #[test]
    fn equal_seeds_give_equal_choices() {
        let draw = |seed| {
            let mut random = Random::seeded(seed);
            (0..50).map(|_| lowest([1.0; 9].into_iter(), &mut random).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }
}
