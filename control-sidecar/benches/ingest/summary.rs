//! The rows of this benchmark, as all benchmarks write them: a part file, from which
//! `scripts/bench.py merge` makes `target/bench/summary.json`.

use std::path::Path;

use serde_json::{Value, json};

/// One figure.
pub(crate) struct Row {
    name: String,
    unit: &'static str,
    value: f64,
    baseline: f64,
    is_rate: bool,
}

impl Row {
    /// A rate beside another one.
    pub(crate) fn rate(name: &str, unit: &'static str, value: f64, baseline: f64) -> Self {
        Self { name: name.to_owned(), unit, value, baseline, is_rate: true }
    }

    /// A size and what it may be at most.
    pub(crate) fn bounded(name: &str, unit: &'static str, value: f64, most: f64) -> Self {
        Self { name: name.to_owned(), unit, value, baseline: most, is_rate: false }
    }

    fn json(&self) -> Value {
        let (value, baseline) = (rounded(self.value), rounded(self.baseline));
        let (name, unit) = (&self.name, self.unit);
        if self.is_rate {
            let ratio = rounded(self.value / self.baseline);
            json!({"name": name, "unit": unit, "value": value, "baseline": baseline, "ratio": ratio})
        } else {
            json!({"name": name, "unit": unit, "value": value, "goal": {"value_max": baseline}})
        }
    }
}

/// Writes `rows` in place of those of the last run.
pub(crate) fn write(rows: &[Row]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench/parts");
    std::fs::create_dir_all(&folder).expect("a folder");
    let all: Vec<Value> = rows.iter().map(Row::json).collect();
    let text = serde_json::to_string_pretty(&all).expect("JSON");
    std::fs::write(folder.join("ingest.json"), text + "\n").expect("written");
}

/// To three places, or none above a thousand.
fn rounded(value: f64) -> f64 {
    if value >= 1_000.0 { value.round() } else { (value * 1_000.0).round() / 1_000.0 }
}
