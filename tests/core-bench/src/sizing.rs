//! Sizing: how cost grows with the fleet, as a table for the documentation.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use warmpath_core_bench::Figure;

use super::{BenchError, at, root};

const WORKERS: [u32; 4] = [2, 16, 128, 1000];
const BLOCKS: [(&str, &str); 3] = [("10k", "10 k"), ("1m", "1 M"), ("10m", "10 M")];

/// Writes `target/bench/sizing.md`.
pub(super) fn write(figures: &BTreeMap<String, Figure>) -> Result<(), BenchError> {
    let mut text = String::from(
        "| workers | blocks | index | look-up of 1000 blocks | choice | feed |\n\
         |---|---|---|---|---|---|\n",
    );
    for workers in WORKERS {
        for (label, blocks) in BLOCKS {
            let of = |what: &str| {
                figures.get(&format!("grow_{what}_{workers}w_{label}")).map(|it| it.median)
            };
            let all = (of("bytes"), of("overlap"), of("choose"), of("apply"));
            let (Some(bytes), Some(overlap), Some(choose), Some(apply)) = all else { continue };
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "| {workers} | {blocks} | {bytes:.1} B a block | {:.1} µs | {:.1} µs | {:.1} M/s |",
                overlap / 1e3,
                choose / 1e3,
                1e3 / apply
            );
        }
    }
    let path = root().join("target/bench/sizing.md");
    std::fs::write(&path, &text).map_err(at(&path))
}
