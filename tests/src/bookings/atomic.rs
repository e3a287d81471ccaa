//! Atomic: 64 clients at once, on four worker threads, in front of workers that
//! cost the same.
//!
//! # What is claimed
//!
//! 1. *Waves*: answers are held back until all requests of a wave are placed, so
//!    nothing is freed in between. Then at every position of the log the most
//!    bookings of a worker exceed the fewest by at most 1.
//! 2. *Closed loop*: requests end when they end, and which ends first is not the
//!    gateway's to decide; after two frees on one worker even the best order
//!    leaves a spread of 2. What the gateway decides is where a request goes: the
//!    chosen worker had the lowest cost of all, given every entry before the
//!    booking.
//!
//! The same load with `booking_order: none` shows what the order is worth.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::gateway::{Gateway, MODEL, Plan};
use super::ledger::{Judgement, Ledger};
use super::reader::Reader;
use super::streams::Keep;
use super::workers::WAVE;
use crate::stack::gateway::Mode;
use crate::stack::launch::StackError;
use crate::stack::limits::POLL;
use crate::stack::options::Options;
use crate::stack::report::{Report, line};

/// Clients, and requests of a wave.
const CLIENTS: usize = 64;

/// Waves of each run.
const WAVES: u64 = 80;

/// Requests of each closed loop.
const CLOSED_LOOP: u64 = 10_000;

/// Number of the first prompt of a closed loop: beyond those of the waves.
const FIRST_IN_LOOP: u64 = 500_000;

/// Longest that a wave takes to be placed, or to be over.
const WAVE_WITHIN: Duration = Duration::from_secs(10);

/// What one gateway showed.
struct Shown {
    waves: Judgement,
    closed_loop: Judgement,
    /// Waves in which the workers had other requests under way than were booked.
    disagreed: u64,
    failed: u64,
    missed: u64,
    conflicts: u64,
    unordered: u64,
    took: Duration,
}

/// Makes the checks.
pub async fn check(options: &Options, runtime: &Handle, folder: &Path, report: &mut Report) {
    let (mut decisions, mut spreads) = (0, Vec::new());
    for workers in [4, 8] {
        let mut of = Vec::new();
        for (order, name) in [("strict", "order strict"), ("none", "order none  ")] {
            let settings = format!(",\"booking_order\":\"{order}\"");
            let plan = Plan {
                name: &format!("atomic-{workers}-{order}"),
                concurrency: 4,
                mode: Mode::Endpoint,
                can_crash: false,
                settings: &settings,
                workers,
                divided: (0, 0),
            };
            match shown(options, &plan, runtime, folder).await {
                Ok(shown) => {
                    tell(workers, name, &shown);
                    of.push(shown);
                }
                Err(error) => report.failure("the gateway of a race starts and serves", error),
            }
        }
        let [strict, none] = of.as_slice() else { continue };
        judge(workers, strict, none, report);
        decisions += strict.waves.decisions + strict.closed_loop.decisions;
        spreads.push((strict.waves.spread_booking, none.waves.spread_booking));
    }
    report.check(
        "atomic: enough decisions were judged",
        decisions >= 20_000,
        format_args!("{decisions} in order, at least 20000"),
    );
    report.check(
        "atomic: without the order the spread is larger",
        spreads.iter().any(|(strict, none)| none > strict),
        format_args!("with and without, for 4 and 8 workers: {spreads:?}"),
    );
}

fn tell(workers: usize, order: &str, shown: &Shown) {
    let Shown { waves, closed_loop, .. } = shown;
    line(format_args!(
        "{workers} workers, {order}: waves: spread {}, {} of {} decisions for a busier worker; \
         closed loop: spread {} behind bookings, {} ever, {} of {} decisions for a dearer worker \
         ({} for a busier one, by up to {}); {} conflicts, {} unordered; {:.1} s",
        waves.spread_booking,
        waves.more_bookings,
        waves.decisions,
        closed_loop.spread_booking,
        closed_loop.spread_ever,
        closed_loop.more_cost,
        closed_loop.decisions,
        closed_loop.more_bookings,
        closed_loop.excess_bookings,
        shown.conflicts,
        shown.unordered,
        shown.took.as_secs_f64(),
    ));
}

fn judge(workers: usize, strict: &Shown, none: &Shown, report: &mut Report) {
    let waves = &strict.waves;
    report.check(
        &format!("atomic, {workers} workers: most and fewest bookings differ by at most 1"),
        waves.spread_booking <= 1 && waves.more_bookings == 0 && waves.workers == workers,
        format_args!(
            "spread {} over {} placements of {CLIENTS} at once; without the order {}",
            waves.spread_booking, waves.decisions, none.waves.spread_booking
        ),
    );
    let closed = &strict.closed_loop;
    report.check(
        &format!("atomic, {workers} workers: every decision is on the newest state"),
        closed.more_cost == 0 && closed.workers == workers,
        format_args!(
            "{} of {} for a worker that cost more; without the order {}",
            closed.more_cost, closed.decisions, none.closed_loop.more_cost
        ),
    );
    report.check(
        &format!("atomic, {workers} workers: without the order it is worse"),
        none.waves.more_bookings + none.closed_loop.more_cost > 0,
        format_args!(
            "spread {} against {}, {} stale decisions against {}",
            none.waves.spread_booking,
            waves.spread_booking,
            none.waves.more_bookings + none.closed_loop.more_cost,
            waves.more_bookings + closed.more_cost,
        ),
    );
    let sound = |shown: &Shown| shown.missed == 0 && shown.failed == 0 && shown.disagreed == 0;
    report.check(
        &format!("atomic, {workers} workers: log and workers agree, nothing failed"),
        sound(strict) && sound(none),
        format_args!(
            "{} waves disagreed, {} requests failed, {} entries missed",
            strict.disagreed + none.disagreed,
            strict.failed + none.failed,
            strict.missed + none.missed,
        ),
    );
}

async fn shown(
    options: &Options,
    plan: &Plan<'_>,
    runtime: &Handle,
    folder: &Path,
) -> Result<Shown, StackError> {
    let started = Instant::now();
    let gateway = Arc::new(Gateway::start(options, plan, runtime, folder).await?);
    let shared = Arc::clone(&gateway);
    let workers = plan.workers;
    let run = runtime.spawn(async move { both(&shared, workers).await });
    let outcome = run.await.unwrap_or(None);
    let conflicts = gateway.stat("warmpath_booking_conflicts_total").await.unwrap_or(0);
    let unordered = gateway.stat("warmpath_booking_unordered_total").await.unwrap_or(0);
    let gateway = Arc::into_inner(gateway);
    if let Some(gateway) = gateway {
        gateway.stop().await;
    }
    let Some((waves, closed_loop, counts)) = outcome else {
        return Err(StackError::NotReady("a wave is placed", String::new()));
    };
    Ok(Shown {
        waves,
        closed_loop,
        disagreed: counts.disagreed,
        failed: counts.failed,
        missed: counts.missed,
        conflicts,
        unordered,
        took: started.elapsed(),
    })
}

#[derive(Debug, Default)]
struct Counts {
    disagreed: u64,
    failed: u64,
    missed: u64,
}

/// Waves, then a closed loop. `None` if a wave is not placed or not over in time.
async fn both(gateway: &Gateway, workers: usize) -> Option<(Judgement, Judgement, Counts)> {
    let (mut ledger, mut reader) = (Ledger::default(), gateway.reader());
    let mut counts = Counts::default();
    empty(&mut reader, &mut ledger).await?;
    let slots: Vec<u16> = (0..u16::try_from(workers).ok()?).collect();
    ledger.judge(&slots);
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(Keep::connect(&gateway.address()).await?);
    }
    for wave in 1..=WAVES {
        clients = one_wave(gateway, clients, wave, &mut reader, &mut ledger, &mut counts).await?;
    }
    let waves = ledger.judge(&slots);
    closed_loop(clients, &mut reader, &mut ledger, &mut counts).await?;
    let closed_loop = ledger.judge(&slots);
    counts.missed = reader.missed;
    Some((waves, closed_loop, counts))
}

/// Reads the log until no booking is left in it.
async fn empty(reader: &mut Reader, ledger: &mut Ledger) -> Option<()> {
    let deadline = Instant::now() + WAVE_WITHIN;
    loop {
        reader.read_all(ledger).await?;
        if ledger.open() == 0 {
            return Some(());
        }
        if Instant::now() > deadline {
            return None;
        }
        sleep(POLL).await;
    }
}

async fn one_wave(
    gateway: &Gateway,
    clients: Vec<Keep>,
    wave: u64,
    reader: &mut Reader,
    ledger: &mut Ledger,
    counts: &mut Counts,
) -> Option<Vec<Keep>> {
    let mut asking = JoinSet::new();
    for (number, mut client) in (0_u64..).zip(clients) {
        asking.spawn(async move {
            let prompt = prompt(wave * CLIENTS as u64 + number);
            let status = client.ask(MODEL, &prompt, &[(WAVE, &wave.to_string())]).await;
            (client, status)
        });
    }
    let deadline = Instant::now() + WAVE_WITHIN;
    while gateway.workers.busy().iter().sum::<usize>() < CLIENTS {
        if Instant::now() > deadline {
            return None;
        }
        sleep(POLL).await;
    }
    reader.read_all(ledger).await?;
    let mut booked: Vec<usize> = ledger.open_by_worker().into_values().collect();
    let mut busy = gateway.workers.busy();
    booked.sort_unstable();
    busy.sort_unstable();
    counts.disagreed += u64::from(booked != busy);
    gateway.workers.release(wave);
    let mut clients = Vec::new();
    while let Some(joined) = asking.join_next().await {
        let (client, status) = joined.ok()?;
        counts.failed += u64::from(status != Some(200));
        clients.push(client);
    }
    empty(reader, ledger).await?;
    Some(clients)
}

/// Every client asks again as soon as it has an answer.
async fn closed_loop(
    clients: Vec<Keep>,
    reader: &mut Reader,
    ledger: &mut Ledger,
    counts: &mut Counts,
) -> Option<()> {
    let each = CLOSED_LOOP.div_ceil(CLIENTS as u64);
    let (done, mut failures) = mpsc::channel::<u64>(CLIENTS);
    for (number, mut client) in (0_u64..).zip(clients) {
        let done = done.clone();
        tokio::spawn(async move {
            let mut failed = 0;
            for turn in 0..each {
                let prompt = prompt(FIRST_IN_LOOP + number * each + turn);
                let status = client.ask(MODEL, &prompt, &[]).await;
                failed += u64::from(status != Some(200));
            }
            // Nobody waits for it any more if this fails.
            let _told = done.send(failed).await;
        });
    }
    drop(done);
    loop {
        // The log holds a few thousand entries; it is read all the time.
        tokio::select! {
            failed = failures.recv() => match failed {
                Some(failed) => counts.failed += failed,
                None => break,
            },
            () = sleep(POLL) => { reader.read_all(ledger).await?; }
        }
    }
    empty(reader, ledger).await
}

/// A prompt that shares no block with any other and is as long as every other:
/// its number comes first, digit by digit.
fn prompt(number: u64) -> String {
    let digits: String = format!("{number:07}").chars().flat_map(|digit| [digit, ' ']).collect();
    format!("{digits}{}", "a prompt like any other of its kind ".repeat(8))
}
