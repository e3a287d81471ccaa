//! Figures: what is measured of a run.

use serde_json::{Value, json};

/// One request, as its client saw it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// From when it was to be sent to its first token, in microseconds of the
    /// engines' time.
    pub first_token_us: u64,
    /// The same, to its last.
    pub last_token_us: u64,
    /// Prompt tokens.
    pub prompt_tokens: u64,
    /// Of these, found in the engine's cache.
    pub cached_tokens: u64,
}

/// One engine over a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Worked {
    /// Requests answered.
    pub finished: u64,
    /// Time times the requests that ran or waited in it, in milliseconds.
    pub request_ms: u64,
    /// Prompt tokens computed and tokens generated.
    pub computed_tokens: u64,
    /// Time in steps, in milliseconds.
    pub busy_ms: u64,
    /// Longest time by which a step ended late, in milliseconds.
    pub late_ms: u64,
}

impl Worked {
    /// What was done since `before`, in the engines' time.
    #[must_use]
    pub fn since(&self, before: &Self, speedup: u64) -> Self {
        Self {
            finished: self.finished - before.finished,
            request_ms: (self.request_ms - before.request_ms) * speedup,
            computed_tokens: self.computed_tokens - before.computed_tokens,
            busy_ms: (self.busy_ms - before.busy_ms) * speedup,
            late_ms: self.late_ms,
        }
    }
}

/// A run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    /// Requests sent.
    pub sent: usize,
    /// Requests without a right answer.
    pub failed: usize,
    /// Share of prompt tokens that were cached.
    pub hit_ratio: f64,
    /// Time to the first token, in milliseconds: median, 90th, 99th percentile.
    pub first_token_ms: [f64; 3],
    /// Mean time to the last token, in milliseconds.
    pub mean_ms: f64,
    /// Most loaded engine over the mean, by requests in it over time.
    pub load_requests: f64,
    /// The same, by tokens computed.
    pub load_tokens: f64,
    /// Share of the time that the busiest engine was in steps.
    pub busiest: f64,
    /// Requests answered by each engine.
    pub answered: Vec<u64>,
    /// Longest time by which any engine was late, in milliseconds of real time.
    pub late_ms: u64,
}

impl Figures {
    /// Sums a run up.
    ///
    /// - `span_us`: how long it took, in the engines' time.
    #[must_use]
    pub fn of(sent: usize, seen: &[Seen], worked: &[Worked], span_us: u64) -> Self {
        let prompt: u64 = seen.iter().map(|request| request.prompt_tokens).sum();
        let cached: u64 = seen.iter().map(|request| request.cached_tokens).sum();
        let mut first: Vec<u64> = seen.iter().map(|request| request.first_token_us).collect();
        first.sort_unstable();
        let last: u64 = seen.iter().map(|request| request.last_token_us).sum();
        let each = |of: fn(&Worked) -> u64| worked.iter().map(of).collect::<Vec<_>>();
        Self {
            sent,
            failed: sent.saturating_sub(seen.len()),
            hit_ratio: ratio(cached, prompt),
            first_token_ms: [50, 90, 99].map(|percent| percentile(&first, percent) / 1000.0),
            mean_ms: ratio(last, seen.len() as u64) / 1000.0,
            load_requests: most_over_mean(&each(|engine| engine.request_ms)),
            load_tokens: most_over_mean(&each(|engine| engine.computed_tokens)),
            busiest: ratio(
                each(|engine| engine.busy_ms).into_iter().max().unwrap_or(0) * 1000,
                span_us,
            ),
            answered: each(|engine| engine.finished),
            late_ms: each(|engine| engine.late_ms).into_iter().max().unwrap_or(0),
        }
    }

    /// For the file of results.
    #[must_use]
    pub fn json(&self) -> Value {
        let [p50, p90, p99] = self.first_token_ms.map(rounded);
        json!({
            "requests": self.sent, "failed": self.failed, "hit_ratio": rounded(self.hit_ratio),
            "ttft_p50_ms": p50, "ttft_p90_ms": p90, "ttft_p99_ms": p99,
            "mean_latency_ms": rounded(self.mean_ms),
            "max_over_mean_requests": rounded(self.load_requests),
            "max_over_mean_tokens": rounded(self.load_tokens),
            "busiest_engine": rounded(self.busiest), "answered": self.answered,
            "late_ms_max": self.late_ms,
        })
    }

    /// Heading of [`Self::row`].
    pub const HEADING: &str = "hit ratio   TTFT p50    p90    p99   mean latency   \
        max/mean requests  tokens   busiest  failed  answered";

    /// One line of a table; times in milliseconds.
    #[must_use]
    pub fn row(&self) -> String {
        let [p50, p90, p99] = self.first_token_ms;
        let answered: Vec<String> = self.answered.iter().map(ToString::to_string).collect();
        format!(
            "{:>9.3} {p50:>10.0} {p90:>6.0} {p99:>6.0} {:>14.0} {:>19.2} {:>7.2} {:>9.2} {:>7}  {}",
            self.hit_ratio,
            self.mean_ms,
            self.load_requests,
            self.load_tokens,
            self.busiest,
            self.failed,
            answered.join("/"),
        )
    }
}

fn rounded(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

/// One number over another; 0 over nothing.
fn ratio(part: u64, whole: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2⁵³")]
    let (part, whole) = (part as f64, whole.max(1) as f64);
    part / whole
}

/// The smallest number that so many percent do not exceed.
fn percentile(sorted: &[u64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    ratio(sorted.get(rank - 1).copied().unwrap_or(0), 1)
}

fn most_over_mean(numbers: &[u64]) -> f64 {
    let sum: u64 = numbers.iter().sum();
    ratio(numbers.iter().max().copied().unwrap_or(0) * numbers.len() as u64, sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: percentiles and ratios as counted by hand.
    #[test]
    fn a_run_is_summed_up() {
        let seen: Vec<Seen> = (1..=200)
            .map(|n| Seen {
                first_token_us: n * 1000,
                last_token_us: n * 2000,
                prompt_tokens: 10,
                cached_tokens: n % 2 * 5,
            })
            .collect();
        let engine = |load| Worked {
            request_ms: load,
            computed_tokens: 10 - load,
            busy_ms: load,
            finished: load,
            late_ms: load,
        };
        let figures = Figures::of(201, &seen, &[engine(6), engine(2)], 12_000);
        assert_eq!(figures.first_token_ms, [100.0, 180.0, 198.0]);
        assert_eq!((figures.hit_ratio, figures.failed), (0.25, 1));
        assert_eq!((figures.load_requests, figures.busiest), (1.5, 0.5));
        assert_eq!(figures.load_tokens, 8.0 / 6.0);
        assert_eq!((figures.mean_ms, figures.late_ms), (201.0, 6));
        assert_eq!(Figures::of(0, &[], &[], 0).failed, 0);
    }
}
