//! Figures: what is measured, and how.

use serde::{Deserialize, Serialize};

/// Tells the time.
pub trait Clock {
    /// Nanoseconds since any moment.
    fn now_ns(&self) -> f64;

    /// Bytes of memory that the virtual machine has; 0 if that is not known.
    fn memory_bytes(&self) -> f64 {
        0.0
    }
}

/// One figure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// The least of all repeats: nanoseconds for one, unless the name says else.
    pub least: f64,
    /// The median of all repeats.
    pub median: f64,
    /// Stands for the answer: natively and in V8 it is the same.
    pub answer: u64,
    /// A word on it.
    pub note: String,
}

impl Figure {
    /// A figure that was not repeated.
    pub(crate) fn once(name: impl Into<String>, value: f64) -> Self {
        Self { name: name.into(), least: value, median: value, answer: 0, note: String::new() }
    }

    /// The least and the median of samples.
    pub(crate) fn of(name: impl Into<String>, mut samples: Vec<f64>, answer: u64) -> Self {
        samples.sort_unstable_by(f64::total_cmp);
        let median = samples[samples.len() / 2];
        Self { name: name.into(), least: samples[0], median, answer, note: String::new() }
    }

    /// The same with a word on it.
    #[must_use]
    pub(crate) fn note(self, note: impl Into<String>) -> Self {
        Self { note: note.into(), ..self }
    }
}

/// Something that is measured again and again.
pub(crate) struct Case<'c> {
    name: String,
    /// How many of what is told are in one run.
    count: f64,
    run: Box<dyn FnMut() -> u64 + 'c>,
}

impl<'c> Case<'c> {
    /// - `count`: how many of what the figure tells one run does.
    /// - `run`: does it and returns what stands for the answer, always the same.
    pub(crate) fn new(
        name: impl Into<String>,
        count: usize,
        run: impl FnMut() -> u64 + 'c,
    ) -> Self {
        Self { name: name.into(), count: count as f64, run: Box::new(run) }
    }
}

/// Runs the cases in turn, `rounds` times.
pub(crate) fn interleave(
    clock: &dyn Clock,
    rounds: usize,
    mut cases: Vec<Case<'_>>,
) -> Vec<Figure> {
    // Once unmeasured, for caches and for the answer.
    let answers: Vec<u64> = cases.iter_mut().map(|case| (case.run)()).collect();
    let mut samples = vec![Vec::with_capacity(rounds); cases.len()];
    for _ in 0..rounds {
        for (at, case) in cases.iter_mut().enumerate() {
            let from = clock.now_ns();
            let answer = (case.run)();
            samples[at].push((clock.now_ns() - from) / case.count);
            assert_eq!(answer, answers[at], "{} answers differently", case.name);
        }
    }
    let names = cases.into_iter().map(|case| case.name);
    names
        .zip(samples)
        .zip(answers)
        .map(|((name, it), answer)| Figure::of(name, it, answer))
        .collect()
}

/// Adds to what stands for an answer.
pub(crate) fn mix(answer: u64, part: u64) -> u64 {
    (answer.rotate_left(5) ^ part).wrapping_mul(0x517c_c1b7_2722_0a95)
}
