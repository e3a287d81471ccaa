//! Rows: the figures of one part of the benchmarks, in a form that all share.
//!
//! A part is a file `target/bench/parts/<part>.json`, a list of rows. One that is
//! measured again replaces the whole file, so that no old row stays among new ones.

use std::path::{Path, PathBuf};

use serde::Serialize;

/// What a figure has to reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Goal {
    /// The value may not be higher.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value_max: Option<f64>,
    /// The value may not be lower.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value_min: Option<f64>,
    /// The ratio may not be lower.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio_min: Option<f64>,
}

/// Which way a figure is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// Times, memory.
    Lower,
    /// Rates.
    Higher,
}

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Unique over all parts: `snake_case`.
    pub name: String,
    /// Of value and baseline: `ms`, `us`, `B`, `ops/s`.
    pub unit: &'static str,
    /// What was measured.
    pub value: f64,
    /// The same of what it is compared with, measured in the same run; `None` if
    /// there is nothing to compare with.
    pub baseline: Option<f64>,
    /// How many times better than the baseline the value is.
    pub ratio: Option<f64>,
    /// What it has to reach; `None` for figures that only inform.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goal: Option<Goal>,
    /// How it was measured, in a few words.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub note: String,
}

impl Row {
    /// A figure with nothing to compare it with.
    pub fn alone(name: impl Into<String>, unit: &'static str, value: f64) -> Self {
        let name = name.into();
        Self { name, unit, value, baseline: None, ratio: None, goal: None, note: String::new() }
    }

    /// A figure beside a baseline of the same unit.
    pub fn beside(
        name: impl Into<String>,
        unit: &'static str,
        better: Better,
        value: f64,
        baseline: f64,
    ) -> Self {
        let ratio = match better {
            Better::Lower => baseline / value,
            Better::Higher => value / baseline,
        };
        Self { baseline: Some(baseline), ratio: Some(ratio), ..Self::alone(name, unit, value) }
    }

    /// The same with what it has to reach.
    #[must_use]
    pub fn goal(self, goal: Goal) -> Self {
        Self { goal: Some(goal), ..self }
    }

    /// The same with a word on how it was measured.
    #[must_use]
    pub fn note(self, note: impl Into<String>) -> Self {
        Self { note: note.into(), ..self }
    }
}

/// Writes the rows of a part, in place of those of its last run.
///
/// # Errors
///
/// Whatever the file system says; also if a row is no number that JSON can tell.
pub fn write_part(part: &str, rows: &[Row]) -> std::io::Result<PathBuf> {
    write_part_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), part, rows)
}

/// The same for a program of another package.
///
/// - `root`: the folder of the workspace.
///
/// # Errors
///
/// As [`write_part`].
pub fn write_part_below(root: &Path, part: &str, rows: &[Row]) -> std::io::Result<PathBuf> {
    let folder = root.join("target/bench/parts");
    std::fs::create_dir_all(&folder)?;
    let path = folder.join(format!("{part}.json"));
    std::fs::write(&path, encode(rows)?)?;
    Ok(path)
}

fn encode(rows: &[Row]) -> std::io::Result<String> {
    for row in rows {
        let figures = [Some(row.value), row.baseline, row.ratio];
        if figures.into_iter().flatten().any(|figure| !figure.is_finite()) {
            return Err(std::io::Error::other(format!("{} is not a number", row.name)));
        }
    }
    Ok(serde_json::to_string_pretty(rows)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_say_how_many_times_better() {
        let latency = Row::beside("a", "ms", Better::Lower, 0.25, 1.0);
        let rate = Row::beside("b", "ops/s", Better::Higher, 10.0, 5.0);
        assert_eq!((latency.ratio, rate.ratio), (Some(4.0), Some(2.0)));
    }

    #[test]
    fn rows_are_what_the_table_reads() {
        let goal = Goal { ratio_min: Some(2.0), ..Goal::default() };
        let rows = [Row::beside("a", "ms", Better::Lower, 1.0, 2.0).goal(goal).note("x")];
        let read: serde_json::Value = serde_json::from_str(&encode(&rows).unwrap()).unwrap();
        let expected = serde_json::json!([{
            "name": "a", "unit": "ms", "value": 1.0, "baseline": 2.0, "ratio": 2.0,
            "goal": {"ratio_min": 2.0}, "note": "x"
        }]);
        assert_eq!(read, expected);
    }

    #[test]
    fn what_was_not_measured_is_no_row() {
        assert!(encode(&[Row::alone("a", "ms", f64::NAN)]).is_err());
        assert!(encode(&[Row::beside("a", "ms", Better::Lower, 0.0, 1.0)]).is_err());
    }
}
