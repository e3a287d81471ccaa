//! The rows that all benchmarks share: `target/bench/summary.json`.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

/// One figure.
pub(crate) struct Row {
    name: String,
    unit: &'static str,
    value: f64,
    baseline: f64,
}

impl Row {
    pub(crate) fn new(name: &str, unit: &'static str, value: f64, baseline: f64) -> Self {
        Self { name: name.to_owned(), unit, value, baseline }
    }
}

/// Puts `rows` in place of those of the same names; others stay.
pub(crate) fn write(rows: &[Row]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    std::fs::create_dir_all(&folder).expect("a folder");
    let path = folder.join("summary.json");
    let old = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let mut all: Vec<Value> = old.unwrap_or_default();
    all.retain(|old| rows.iter().all(|row| old["name"] != row.name));
    let commit = commit();
    all.extend(rows.iter().map(|row| {
        json!({
            "name": row.name,
            "unit": row.unit,
            "value": rounded(row.value),
            "baseline": rounded(row.baseline),
            "ratio": rounded(row.value / row.baseline),
            "commit": commit,
        })
    }));
    let text = serde_json::to_string_pretty(&all).expect("JSON");
    std::fs::write(&path, text + "\n").expect("written");
    println!("{} rows in target/bench/summary.json", rows.len());
}

/// To three places, or none above a thousand.
fn rounded(value: f64) -> f64 {
    if value >= 1_000.0 { value.round() } else { (value * 1_000.0).round() / 1_000.0 }
}

fn commit() -> String {
    let output =
        Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12"]).output();
    let text = output.ok().filter(|it| it.status.success()).map(|it| it.stdout);
    text.map_or_else(|| "unknown".to_owned(), |it| String::from_utf8_lossy(&it).trim().to_owned())
}
