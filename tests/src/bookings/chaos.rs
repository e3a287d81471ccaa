//! Chaos: many streams that end in every way there is; afterwards nothing is
//! booked any more, and the log shows each booking freed exactly once.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::gateway::{Gateway, Plan};
use super::ledger::Ledger;
use super::streams::{Case, End, LOOKED_AT_BYTES};
use crate::stack::conversations::Numbers;
use crate::stack::gateway::Mode;
use crate::stack::limits::POLL;
use crate::stack::options::Options;
use crate::stack::report::{Report, line};

/// Clients.
const CLIENTS: u64 = 96;

/// Entries that the log's reader may be behind before clients wait for it: the
/// log keeps 4096.
const BEHIND_MAX: u64 = 1_000;

/// Time in which everything must be over after the last request.
const OVER_WITHIN: Duration = Duration::from_secs(20);

/// How long the gauge of bookings is looked at: every VM sets it four times a
/// second.
const WATCHED: Duration = Duration::from_secs(2);

/// Share of the streams after which memory is measured first: by then every
/// buffer and pool has its size.
const WARM_PERCENT: u64 = 25;

/// Most that Envoy's memory may grow from there to the end, in bytes.
const GROWTH_BYTES_MAX: u64 = 24 << 20;

/// One request in so many, or fewer, ends before Envoy sees a stream; that many
/// more are sent.
const NEVER_BEGIN: u64 = 50;

/// What every run must have met, by a part of Envoy's name for it.
const MUST_MEET: [(&str, &str); 13] = [
    ("retries", "cluster.workers.upstream_rq_retry$"),
    ("upstream resets", "cluster.workers.upstream_cx_destroy_remote_with_active_rq$"),
    ("upstream timeouts", "cluster.workers.upstream_rq_timeout$"),
    ("clients that left", "http.gateway.downstream_rq_rx_reset$"),
    ("HTTP/1.1 requests", "http.gateway.downstream_cx_http1_total$"),
    ("HTTP/2 requests", "http.gateway.downstream_rq_http2_total$"),
    ("faults behind the filter", "http.gateway.fault.aborts_injected$"),
    ("bodies too large for Envoy", "http.gateway.downstream_rq_too_large$"),
    ("no workers", "warmpath_decisions_total.reason.no_workers$"),
    ("bad requests", "warmpath_decisions_total.reason.bad_request$"),
    ("bodies too large to look at", "warmpath_decisions_total.reason.body_too_large$"),
    ("requests without a prompt", "warmpath_decisions_total.reason.by_load_api$"),
    ("requests for nobody", "warmpath_decisions_total.reason.not_our_path$"),
];

struct Shown {
    ledger: Ledger,
    missed: u64,
    ends: BTreeMap<End, u64>,
    took: Duration,
    /// Memory when warm.
    memory: Option<u64>,
}

/// Makes the checks, in both modes.
pub async fn check(options: &Options, runtime: &Handle, folder: &Path, report: &mut Report) {
    // What depends on the mode is little: a tenth shows it.
    for (mode, name, streams) in [
        (Mode::Endpoint, "chaos", options.streams),
        (Mode::Body, "chaos, mode body", options.streams / 10),
    ] {
        let plan = Plan {
            name: if mode == Mode::Endpoint { "chaos" } else { "chaos-body" },
            concurrency: 2,
            mode,
            can_crash: false,
            settings: &format!(",\"body_bytes_max\":{LOOKED_AT_BYTES}"),
            workers: 3,
            divided: (1, 2),
        };
        match Gateway::start(options, &plan, runtime, folder).await {
            Ok(gateway) => {
                let gateway = Arc::new(gateway);
                let shared = Arc::clone(&gateway);
                let seed = options.seed;
                let run = runtime.spawn(async move { all(&shared, streams, seed).await });
                match run.await {
                    Ok(Some(shown)) => judge(&gateway, name, mode, streams, &shown, report).await,
                    Ok(None) => report.failure(name, "the log could not be read"),
                    Err(error) => report.failure(name, error),
                }
                if let Some(mut gateway) = Arc::into_inner(gateway) {
                    if let Some((name, log)) = gateway.ended() {
                        report.failure("every process is alive", format_args!("{name}:\n{log}"));
                    }
                    gateway.stop().await;
                }
            }
            Err(error) => report.failure("the gateway for chaos starts", error),
        }
    }
}

/// What the clients share.
struct Clients {
    address: String,
    left: AtomicU64,
    behind: AtomicU64,
    is_over: AtomicBool,
}

/// Runs all streams while it follows the log.
async fn all(gateway: &Gateway, streams: u64, seed: u64) -> Option<Shown> {
    let started = Instant::now();
    let (mut ledger, mut reader) = (Ledger::default(), gateway.reader());
    let clients = Arc::new(Clients {
        address: gateway.address(),
        left: AtomicU64::new(streams + streams / NEVER_BEGIN),
        behind: AtomicU64::new(0),
        is_over: AtomicBool::new(false),
    });
    let shared = Arc::clone(&clients);
    let running = tokio::spawn(async move {
        let mut set = JoinSet::new();
        for number in 0..CLIENTS {
            let numbers = Numbers::new(seed ^ (number << 32));
            set.spawn(client(Arc::clone(&shared), numbers));
        }
        let mut ends: BTreeMap<End, u64> = BTreeMap::new();
        while let Some(joined) = set.join_next().await {
            for (end, count) in joined.unwrap_or_default() {
                *ends.entry(end).or_default() += count;
            }
        }
        shared.is_over.store(true, Ordering::Release);
        ends
    });
    let mut memory = None;
    while !clients.is_over.load(Ordering::Acquire) {
        reader.read(&mut ledger).await?;
        clients.behind.store(reader.behind(), Ordering::Release);
        let is_warm = clients.left.load(Ordering::Acquire) * 100 < streams * (100 - WARM_PERCENT);
        if is_warm && memory.is_none() {
            memory = gateway.stat("server.memory_allocated").await;
        }
        sleep(POLL).await;
    }
    let ends = running.await.ok()?;
    let took = started.elapsed();
    let deadline = Instant::now() + OVER_WITHIN;
    loop {
        reader.read_all(&mut ledger).await?;
        let active = gateway.stat("http.gateway.downstream_rq_active$").await;
        if (ledger.open() == 0 && active == Some(0)) || Instant::now() > deadline {
            break;
        }
        sleep(POLL).await;
    }
    Some(Shown { ledger, missed: reader.missed, ends, took, memory })
}

async fn client(shared: Arc<Clients>, mut numbers: Numbers) -> BTreeMap<End, u64> {
    let mut ends: BTreeMap<End, u64> = BTreeMap::new();
    let mut connection = None;
    let take = |left: u64| left.checked_sub(1);
    while shared.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).is_ok() {
        while shared.behind.load(Ordering::Acquire) > BEHIND_MAX {
            sleep(POLL).await;
        }
        let case = Case::draw(&mut numbers);
        let end = case.run(&shared.address, &mut connection).await;
        *ends.entry(end).or_default() += 1;
    }
    ends
}

async fn judge(
    gateway: &Gateway,
    name: &str,
    mode: Mode,
    streams: u64,
    shown: &Shown,
    report: &mut Report,
) {
    let Shown { ledger, ends, .. } = shown;
    let requests: u64 = ends.values().sum();
    line(format_args!(
        "{name}: {requests} requests in {:.1} s: {ends:?}",
        shown.took.as_secs_f64()
    ));
    let begun = gateway.stat("http.gateway.downstream_rq_total$").await.unwrap_or(0);
    let nothing = ends.get(&End::Nothing).copied().unwrap_or(0);
    report.check(
        &format!("{name}: every request ends in time"),
        nothing == 0 && begun >= streams,
        format_args!("{begun} streams, at least {streams}; {nothing} without an end"),
    );
    let mut met = Vec::new();
    for (what, stat) in MUST_MEET {
        met.push((what, gateway.stat(stat).await.unwrap_or(0)));
    }
    // In mode `body` the headers are gone before Envoy could say 413, and the
    // filter says it.
    let is_met = |it: &(&str, u64)| it.1 > 0 || (mode == Mode::Body && it.0.starts_with("bodies"));
    report.check(
        &format!("{name}: every fault was met"),
        met.iter().all(is_met),
        format_args!("{met:?}"),
    );
    report.check(
        &format!("{name}: the log was read whole"),
        shown.missed == 0 && ledger.unreadable == 0,
        format_args!("{} entries missed, {} unreadable", shown.missed, ledger.unreadable),
    );
    report.check(
        &format!("{name}: every booking is freed, exactly once"),
        ledger.open() == 0
            && ledger.booked == ledger.freed
            && (ledger.freed_wrongly, ledger.booked_twice) == (0, 0)
            && ledger.booked * 2 > streams
            && ledger.pairs > 0,
        format_args!(
            "{} booked ({} pairs), {} freed, {} open, {} freed twice, {} booked twice",
            ledger.booked,
            ledger.pairs,
            ledger.freed,
            ledger.open(),
            ledger.freed_wrongly,
            ledger.booked_twice
        ),
    );
    // Counts are told on ticks.
    let (_, made) =
        gateway.until_stat("warmpath_bookings_made_total", ledger.booked, WATCHED).await;
    let (_, freed) =
        gateway.until_stat("warmpath_bookings_freed_total", ledger.freed, WATCHED).await;
    report.check(
        &format!("{name}: the filter counts the same"),
        made == Some(ledger.booked) && freed == Some(ledger.freed),
        format_args!("made {made:?}, freed {freed:?}"),
    );
    let most = most_booked(gateway).await;
    report.check(
        &format!("{name}: no booking is left in any VM"),
        most == Some(0),
        format_args!("{most:?} at most, watched for {WATCHED:?}"),
    );
    leftovers(gateway, name, shown.memory, report).await;
}

/// The most that any VM said to have booked, over some time.
async fn most_booked(gateway: &Gateway) -> Option<u64> {
    let started = Instant::now();
    let mut most = gateway.stat("warmpath_bookings$").await;
    while started.elapsed() < WATCHED {
        most = most.max(gateway.stat("warmpath_bookings$").await);
        sleep(POLL).await;
    }
    most
}

async fn leftovers(gateway: &Gateway, name: &str, memory: Option<u64>, report: &mut Report) {
    let stats = [
        "vm_reload",
        "http.gateway.downstream_rq_active$",
        "cluster.workers.upstream_rq_active$",
        "warmpath_bookings_expired_total",
        "warmpath_ring_overruns_total",
        "warmpath_reentered_total",
    ];
    let mut left = Vec::new();
    for stat in stats {
        left.push((stat.trim_end_matches('$'), gateway.stat(stat).await));
    }
    report.check(
        &format!("{name}: no crash, no stream and no loss is left"),
        left.iter().all(|(_, value)| *value == Some(0)),
        format_args!("{left:?}"),
    );
    let after = gateway.stat("server.memory_allocated").await;
    let grown = after.zip(memory).map(|(after, before)| after.saturating_sub(before));
    report.check(
        &format!("{name}: memory does not grow"),
        grown.is_some_and(|grown| grown <= GROWTH_BYTES_MAX),
        format_args!("{grown:?} bytes on {memory:?}, at most {GROWTH_BYTES_MAX}"),
    );
}
