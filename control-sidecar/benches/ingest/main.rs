//! What the path from an engine's bytes to the feed can take, in block events a
//! second: `make bench-ingest`.
//!
//! # Terms
//!
//! - *block event*: one block stored or removed.
//! - *form*: how an engine packs them: eight blocks a batch (a prompt's prefill),
//!   or one block a batch (decoding).
//!
//! Every answer is checked: the operations that come out, the blocks that are held
//! at the end, and nothing refused on the way.

#![allow(
    clippy::cast_precision_loss,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    missing_docs,
    reason = "a benchmark: it panics to fail and prints figures"
)]

mod direct;
mod end_to_end;
mod payloads;
mod summary;

use payloads::{Form, Traffic};
use summary::Row;

/// Block events of each form on the direct path, and end to end, unless
/// `BENCH_BLOCK_EVENTS` names another number.
const BLOCK_EVENTS: u64 = 10_000_000;

/// End to end one in so many of those.
const END_TO_END_SHARE: u64 = 4;

/// Most memory of the whole process, publisher and its messages included, in
/// MiB. The messages take 45, an index of 49 152 blocks 20, the feed's log 64.
const PEAK_RSS_MIB_MAX: u64 = 256;

/// Most that memory may grow after the first fifth of the direct path's work, in
/// MiB: whatever grows with the number of events is a leak.
const GROWTH_MIB_MAX: u64 = 8;

fn main() {
    // `cargo test --benches` and `cargo bench -- --list` only ask whether it starts.
    if std::env::args().any(|argument| argument == "--list" || argument == "--test") {
        return;
    }
    let wanted = std::env::var("BENCH_BLOCK_EVENTS").ok();
    let block_events = wanted.map_or(BLOCK_EVENTS, |text| text.parse().expect("a number"));
    let traffic = [Form::Prefill, Form::Decode].map(Traffic::new);
    let mut rows = Vec::new();
    direct::checked_by_the_book(&traffic);

    // Once before anything is measured: the memory that a level of events takes.
    for traffic in &traffic {
        direct::run(traffic, block_events / 5);
    }
    let settled = peak_rss_mib();
    for traffic in &traffic {
        let baseline = direct::generic_decoding(traffic);
        let measured = direct::run(traffic, block_events);
        println!(
            "{:<14} {:>9.0} block events a second of processor time, {:>9.0} by the clock; \
             rmpv decoding alone {:>9.0}, {:>9.0}",
            traffic.form.name(),
            measured.cpu,
            measured.wall,
            baseline.cpu,
            baseline.wall
        );
        let name = format!("ingest_{}", traffic.form.name());
        rows.push(Row::rate(&name, "block_events/cpu_s", measured.cpu, baseline.cpu));
        rows.push(Row::rate(&(name + "_wall"), "block_events/s", measured.wall, baseline.wall));
    }
    // The kernel sums its counters up now and then: a peak can seem to shrink.
    let grown = peak_rss_mib().saturating_sub(settled);
    assert!(grown <= GROWTH_MIB_MAX, "memory grows with the events: {grown} MiB");

    for traffic in &traffic {
        let baseline = direct::generic_decoding(traffic);
        let rate = end_to_end::run(traffic, block_events / END_TO_END_SHARE);
        println!(
            "{:<14} {rate:>9.0} block events a second end to end over loopback, by the clock",
            traffic.form.name()
        );
        let name = format!("ingest_{}_end_to_end", traffic.form.name());
        rows.push(Row::rate(&name, "block_events/s", rate, baseline.wall));
    }
    let peak = peak_rss_mib();
    println!("peak memory {peak} MiB of at most {PEAK_RSS_MIB_MAX}");
    assert!(peak <= PEAK_RSS_MIB_MAX, "memory is bounded");
    rows.push(Row::bounded("ingest_peak_rss", "MiB", peak as f64, PEAK_RSS_MIB_MAX as f64));
    summary::write(&rows);
}

/// The most memory that this process has held, in MiB.
fn peak_rss_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib / 1024
}
