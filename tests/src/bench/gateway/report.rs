//! Report: rows of what was measured.

use super::CONNECTIONS;
use super::measure::{Case, Measured};
use super::prompts::Kind;
use super::targets::Target;
use crate::bench::rows::{Better, Goal, Row};

/// Least time that a target counts as adding, in milliseconds, and processor time, in
/// microseconds: less is noise, and nothing can be divided by it.
const ADDED_MS_MIN: f64 = 0.001;
const ADDED_US_MIN: f64 = 0.1;

/// All rows: first those that have goals.
///
/// - `fed`: processor time of the index for a block, in nanoseconds.
/// - `idle`: processor time when nothing is asked, in microseconds per second.
#[must_use]
pub fn rows(measured: &[Measured], fed: &[(Target, f64)], idle: &[(Target, f64)]) -> Vec<Row> {
    let table = Table { measured };
    let mut rows = table.goals();
    rows.extend(table.figures());
    let named = |prefix: &str, target: &Target| format!("{prefix}_{}", target.name());
    rows.extend(fed.iter().map(|(target, ns)| {
        Row::alone(named("feed_cpu_per_block", target), "ns", *ns).note("engine's event to index")
    }));
    rows.extend(idle.iter().map(|(target, us)| {
        Row::alone(named("idle_cpu", target), "us/s", *us).note("nobody asks anything")
    }));
    rows
}

/// The least of those that were measured.
fn least(figures: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    figures.flatten().min_by(f64::total_cmp)
}

struct Table<'a> {
    measured: &'a [Measured],
}

impl Table<'_> {
    fn find(&self, size: &str, kind: Kind, connections: usize, of: Target) -> Option<&Measured> {
        self.measured.iter().find(|it| {
            let Case { size: name, kind: its, connections: many, .. } = it.case;
            (name, its, many, it.target) == (size, kind, connections, of)
        })
    }

    fn p50(&self, size: &str, kind: Kind, of: Target) -> Option<f64> {
        self.find(size, kind, 1, of)?.times.clone().percentile(0.5)
    }

    /// What a target adds to Envoy's median, in milliseconds.
    fn added(&self, size: &str, kind: Kind, of: Target) -> Option<f64> {
        let floor = self.p50(size, kind, Target::Envoy)?;
        Some((self.p50(size, kind, of)? - floor).max(ADDED_MS_MIN))
    }

    /// What a target adds to Envoy's processor time, in microseconds per request.
    fn added_cpu(&self, size: &str, kind: Kind, of: Target) -> Option<f64> {
        let cpu = |of| self.find(size, kind, CONNECTIONS, of)?.cpu_us;
        Some((cpu(of)? - cpu(Target::Envoy)?).max(ADDED_US_MIN))
    }

    /// Rows with goals; a row whose baseline was not measured stands alone.
    fn goals(&self) -> Vec<Row> {
        let beside = |name: &str, unit, value: Option<f64>, baseline: Option<f64>, note: &str| {
            let row = match (value?, baseline) {
                (value, Some(baseline)) => Row::beside(name, unit, Better::Lower, value, baseline),
                (value, None) => Row::alone(name, unit, value),
            };
            Some(row.note(note))
        };
        let ratio = |ratio| Goal { ratio_min: Some(ratio), ..Goal::default() };
        let both = |least, most| Goal { value_max: Some(most), ..ratio(least) };
        let ours = Target::Warmpath;
        // The picker at its best: whichever way its body takes.
        let picker: &[Target] = &[Target::PickerFastokens, Target::PickerDuplex];
        let added = |name, size, kind, baseline: &[Target], note, goal| {
            let baseline = least(baseline.iter().map(|of| self.added(size, kind, *of)));
            let value = self.added(size, kind, ours);
            beside(name, "ms", value, baseline, note).map(|row| row.goal(goal))
        };
        let fast = "first seen, over Envoy alone; picker with fastokens";
        let rows = [
            added("added_p50_8k", "8k", Kind::First, picker, fast, both(4.0, 0.25)),
            added(
                "added_p50_8k_vs_hf",
                "8k",
                Kind::First,
                &[Target::PickerHf],
                "first seen, over Envoy alone; picker with HF's tokenizers",
                ratio(15.0),
            ),
            added("added_p50_128k", "128k", Kind::First, picker, fast, both(1.2, 2.5)),
            added(
                "added_p50_128k_turn",
                "128k",
                Kind::Turn,
                picker,
                "next turn, over Envoy alone; picker with fastokens",
                ratio(5.0),
            ),
            beside(
                "cpu_per_request_8k",
                "us",
                self.added_cpu("8k", Kind::First, ours),
                least(picker.iter().map(|of| self.added_cpu("8k", Kind::First, *of))),
                "first seen, over Envoy alone, 16 connections; picker with fastokens",
            )
            .map(|row| row.goal(ratio(3.0))),
            beside(
                "added_p50_8k_vs_sglang_router",
                "ms",
                self.p50("8k", Kind::Turn, ours),
                self.p50("8k", Kind::Turn, Target::SglangRouter),
                "next turn, whole proxy; sglang-router cache_aware",
            )
            .map(|row| row.goal(ratio(1.0))),
        ];
        rows.into_iter().flatten().collect()
    }

    /// Every figure that was taken.
    fn figures(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for measured in self.measured {
            let end = format!("{}_{}", measured.case.name(), measured.target.name());
            let mut times = measured.times.clone();
            for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
                if let Some(ms) = times.percentile(share) {
                    rows.push(Row::alone(format!("{name}_{end}"), "ms", ms));
                }
            }
            if let Some(us) = measured.cpu_us {
                rows.push(Row::alone(format!("cpu_{end}"), "us", us));
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::bench::load::Times;

    fn measured(kind: Kind, connections: usize, target: Target, us: u64) -> Measured {
        let case = Case { size: "8k", kind, connections, count: 3 };
        let mut times = Times::default();
        for off in [0, 40, 10] {
            times.push(Duration::from_micros(us + off));
        }
        #[expect(clippy::cast_precision_loss, reason = "small")]
        let cpu_us = (connections > 1).then_some(us as f64);
        Measured { case, target, times, cpu_us }
    }

    #[test]
    fn what_is_added_is_over_envoy_and_beside_the_picker() {
        let all = [
            measured(Kind::First, 1, Target::Envoy, 100),
            measured(Kind::First, 1, Target::Warmpath, 300),
            measured(Kind::First, 1, Target::PickerFastokens, 1100),
            measured(Kind::First, 1, Target::PickerDuplex, 1200),
            measured(Kind::First, 16, Target::Envoy, 40),
            measured(Kind::First, 16, Target::Warmpath, 90),
            measured(Kind::First, 16, Target::PickerFastokens, 290),
            measured(Kind::Turn, 1, Target::Warmpath, 200),
            measured(Kind::Turn, 1, Target::SglangRouter, 300),
        ];
        let rows = rows(&all, &[(Target::Warmpath, 5.0)], &[(Target::Envoy, 7.0)]);
        let row = |name: &str| rows.iter().find(|row| row.name == name).unwrap();
        let close = |value: f64, other: f64| (value - other).abs() < 1e-9;
        let added = row("added_p50_8k");
        assert!(close(added.value, 0.2) && close(added.ratio.unwrap(), 5.0));
        let cpu = row("cpu_per_request_8k");
        assert!(close(cpu.value, 50.0) && close(cpu.ratio.unwrap(), 5.0));
        let whole = row("added_p50_8k_vs_sglang_router");
        assert!(close(whole.value, 0.21) && close(whole.baseline.unwrap(), 0.31));
        // No picker with HF's tokenizers was there.
        assert_eq!(row("added_p50_8k_vs_hf").ratio, None);
        assert!(close(row("p99_8k_first_c1_envoy").value, 0.14));
        assert!(close(row("feed_cpu_per_block_warmpath").value, 5.0));
        assert!(rows.iter().all(|row| row.name != "added_p50_128k"));
    }
}
