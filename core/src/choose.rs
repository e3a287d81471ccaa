//! Choose: costs to one worker.
//!
//! Seventh stage of the request path.
//!
//! # Invariants
//!
//! 1. The lowest cost wins; exact ties are resolved uniformly at random
//!    (Dynamo's picker at temperature 0), so that equal workers share.
//! 2. Randomness is an argument: the same seed gives the same choice, and the
//!    order of candidates comes from the roster, never from a hash map.

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

    /// A number below `bound`; 0 for a bound of 0. Its bias is below 2⁻³² for
    /// any bound that a fleet could have.
    pub fn below(&mut self, bound: u32) -> u32 {
        let wide = (self.next_u64() >> 32) * u64::from(bound);
        u32::try_from(wide >> 32).unwrap_or(0)
    }
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
