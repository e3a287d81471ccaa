//! Table: the figures as rows of the part `core`.

use std::io::Write as _;

use warmpath_core_bench::Figure;

use super::{BenchError, Figures, root};
use crate::rows::{Better, Goal, Row, write_part_below};

const MAX: fn(f64) -> Goal = |value| Goal { value_max: Some(value), ..Goal::default() };

/// Builds, prints and writes the rows.
pub(super) fn write(figures: &Figures) -> Result<(), BenchError> {
    let mut rows = goals(figures)?;
    rows.extend(others(figures));
    let mut out = std::io::stdout();
    for row in &rows {
        let baseline = row.baseline.map_or(String::new(), |it| format!("{it:.3}"));
        let ratio = row.ratio.map_or(String::new(), |it| format!("{it:.1}x"));
        // Nobody to tell if standard output is closed.
        let _shown = writeln!(
            out,
            "{:44} {:>14.3} {:6} {baseline:>14} {ratio:>9}  {}",
            row.name, row.value, row.unit, row.note
        );
    }
    let path = write_part_below(&root(), "core", &rows)
        .map_err(|error| BenchError::Io(error.to_string()))?;
    let _shown = writeln!(out, "{} rows in {}", rows.len(), path.display());
    Ok(())
}

/// The rows that have something to reach.
fn goals(figures: &Figures) -> Result<Vec<Row>, BenchError> {
    let of = |name: &str| figures.v8.get(name).ok_or_else(|| BenchError::Stage(name.to_owned()));
    let turn = {
        let (seen, first) = (of("turn_seen_qwen3")?, of("turn_first_qwen3")?);
        let goal = Goal { ratio_min: Some(5.0), ..Goal::default() };
        Row::beside("turn_seen_prefix", "ms", Better::Lower, seen.median / 1e6, first.median / 1e6)
            .goal(goal)
            .note("V8, Qwen3, 128 KB, body to hashes; baseline: the same first seen")
    };
    let bytes = of("vm_bytes_10m")?;
    let naive_bytes = of("vm_bytes_10m_naive")?;
    let lookup = of("overlap_64w_64s_10m")?;
    let near = of("overlap_64w_64s_1m")?;
    let naive = of("overlap_64w_64s_1m_naive")?;
    let apply = of("apply_10m")?;
    let (whole, found) = (of("select_1000")?, of("select_1000_overlap")?);
    let naive_choose = of("select_1000_naive")?;
    let mut rows = vec![turn];
    rows.extend(adversarial(figures)?);
    rows.extend([
        Row::beside(
            "index_bytes_per_block_10m",
            "B",
            Better::Lower,
            bytes.least,
            naive_bytes.least,
        )
        .goal(MAX(16.0))
        .note("memory that V8 had to get; baseline: map from hash to list of workers"),
        Row::beside(
            "overlap_1000_blocks_64_workers",
            "us",
            Better::Lower,
            near.median / 1e3,
            naive.median / 1e3,
        )
        .goal(MAX(25.0))
        .note(format!(
            "V8, 1 M blocks, each worker another overlap, least {:.1}; 10 M blocks: {:.1}, least {:.1}; baseline: map",
            near.least / 1e3,
            lookup.median / 1e3,
            lookup.least / 1e3
        )),
        Row::alone("apply_ops", "ops/s", 1e9 / apply.median)
            .goal(Goal { value_min: Some(5e6), ..Goal::default() })
            .note(format!(
                "V8, ring entries of 2 000 operations, 10 M blocks; best {:.1} M/s",
                1e3 / apply.least
            )),
        Row::beside(
            "choose_1000_candidates",
            "us",
            Better::Lower,
            (whole.median - found.median) / 1e3,
            naive_choose.median / 1e3,
        )
        .goal(MAX(30.0))
        .note(format!(
            "V8, eligibility, costs of workers with 8 requests each and the choice: the whole selection, {:.1} us, less its look-up, {:.1} us (least {:.1} and {:.1}); baseline: maps and sets, without look-up",
            whole.median / 1e3,
            found.median / 1e3,
            whole.least / 1e3,
            found.least / 1e3
        )),
    ]);
    Ok(rows)
}

/// The worst of the texts that somebody would send to keep a thread busy.
fn adversarial(figures: &Figures) -> Result<[Row; 2], BenchError> {
    let worst = |slices: bool| {
        let of =
            |name: &str| name.starts_with("adversarial_") && name.contains("_slice_") == slices;
        let odd = figures.v8.iter().filter(|(name, _)| of(name));
        let worst = odd.max_by(|(_, a), (_, b)| a.median.total_cmp(&b.median));
        worst.ok_or_else(|| BenchError::Stage("adversarial".to_owned()))
    };
    let ((total_name, total), (slice_name, longest)) = (worst(false)?, worst(true)?);
    Ok([
        Row::alone("adversarial_128k", "ms", total.median / 1e6)
            .goal(MAX(25.0))
            .note(format!("V8, worst of all families: {total_name} {}", total.note)),
        Row::alone("adversarial_128k_longest_slice", "ms", longest.median / 1e6)
            .note(format!("V8: {slice_name}")),
    ])
}

/// Unit, factor from the figure, and whether it is a rate.
fn unit(name: &str) -> (&'static str, fn(f64) -> f64) {
    if name.contains("_bytes_") {
        ("B", |it| it)
    } else if name.contains("apply_") || name.starts_with("fill_1") {
        ("ops/s", |ns| 1e9 / ns)
    } else if name.starts_with("turn_") || name.starts_with("adversarial") {
        ("ms", |ns| ns / 1e6)
    } else {
        ("us", |ns| ns / 1e3)
    }
}

/// The rows that only inform: medians of both targets, the least in the note.
fn others(figures: &Figures) -> Vec<Row> {
    let row = |target: &str, name: &str, figure: &Figure| {
        let (unit, scale) = unit(name);
        let note = format!("least {:.3} {}", scale(figure.least), figure.note);
        Row::alone(format!("core_{target}_{name}"), unit, scale(figure.median)).note(note)
    };
    let v8 = figures.v8.iter().map(|(name, it)| row("v8", name, it));
    let native = figures.native.iter().map(|(name, it)| row("native", name, it));
    v8.chain(native).collect()
}
