//! Crash: a VM dies under load. Its streams are cut and nobody frees their
//! bookings, so these stay until they expire; everything else goes on.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::gateway::{Gateway, MODEL, Plan};
use super::ledger::Ledger;
use super::reader::Reader;
use super::streams::Keep;
use super::workers::{BEHAVIOUR, Behaviour, WAVE};
use crate::stack::gateway::Mode;
use crate::stack::limits::POLL;
use crate::stack::options::Options;
use crate::stack::report::Report;

/// Requests that are under way when the VM crashes.
const STREAMS: usize = 32;

/// Crashes, one after the other; the second may meet either thread.
const ROUNDS: u64 = 2;

/// After how long bookings expire, in milliseconds.
const EXPIRY_MS: u64 = 2_000;

/// Longest from the crash until the bookings of cut streams are gone: the
/// expiry, the second between two looks for it, and a busy machine.
const GONE_WITHIN: Duration = Duration::from_millis(EXPIRY_MS + 3_000);

/// How long the other thread's bookings must outlive the expiry.
const OUTLIVES: Duration = Duration::from_millis(EXPIRY_MS + 1_000);

/// Longest between two streams that a crash cuts: each sends a piece every 20 ms.
const CUT_WITHIN: Duration = Duration::from_millis(500);

/// Time in which every thread must route again.
const ROUTES_WITHIN: Duration = Duration::from_secs(5);

/// Consecutive requests, dealt to the threads in turn, that must be routed.
const ROUTED: u32 = 16;

/// Longest for what follows at once.
const SOON: Duration = Duration::from_secs(10);

/// Makes the checks, in both modes.
pub async fn check(options: &Options, runtime: &Handle, folder: &Path, report: &mut Report) {
    for (mode, name) in [(Mode::Endpoint, "crash"), (Mode::Body, "crash, mode body")] {
        let plan = Plan {
            name: if mode == Mode::Endpoint { "crash" } else { "crash-body" },
            concurrency: 2,
            mode,
            can_crash: true,
            settings: &format!(",\"booking_expiry_ms\":{EXPIRY_MS}"),
            workers: 3,
            divided: (0, 0),
        };
        match Gateway::start(options, &plan, runtime, folder).await {
            Ok(gateway) => {
                let gateway = Arc::new(gateway);
                let shared = Arc::clone(&gateway);
                match runtime.spawn(async move { rounds(&shared).await }).await {
                    Ok(Ok(shown)) => judge(&gateway, name, &shown, report).await,
                    Ok(Err(late)) => report.failure(name, format_args!("not in time: {late}")),
                    Err(error) => report.failure(name, error),
                }
                if let Some(mut gateway) = Arc::into_inner(gateway) {
                    if let Some((name, log)) = gateway.ended() {
                        report.failure("every process is alive", format_args!("{name}:\n{log}"));
                    }
                    gateway.stop().await;
                }
            }
            Err(error) => report.failure("the gateway that is crashed starts", error),
        }
    }
}

/// What one crash did.
#[derive(Clone, Copy, Debug)]
struct Round {
    /// Streams that it cut.
    cut: usize,
    /// Status of the request that did it.
    status: Option<u16>,
    /// Bookings in the log right after it.
    booked_after: usize,
    /// From the crash until the cut ones' bookings were gone from every VM.
    gone: Duration,
    /// Fewest bookings that any VM had in the time after that.
    kept: u64,
    /// From the crash until requests were routed again on every thread.
    routed: Duration,
    /// Streams that were not cut, and answered.
    answered: usize,
    /// Bookings in any VM when all was over.
    at_end: Option<u64>,
}

async fn judge(
    gateway: &Gateway,
    name: &str,
    (rounds, ledger): &(Vec<Round>, Ledger),
    report: &mut Report,
) {
    let all = |holds: fn(&Round) -> bool| rounds.len() as u64 == ROUNDS && rounds.iter().all(holds);
    report.check(
        &format!("{name}: one thread's streams are cut, the other's are not"),
        all(|it| it.cut > 0 && it.cut < STREAMS && it.answered + it.cut == STREAMS),
        format_args!(
            "cut {:?}, answered {:?} of {STREAMS}",
            rounds.iter().map(|it| it.cut).collect::<Vec<_>>(),
            rounds.iter().map(|it| it.answered).collect::<Vec<_>>(),
        ),
    );
    report.check(
        &format!("{name}: bookings of cut streams stay until they expire"),
        all(|it| it.booked_after == STREAMS && it.gone <= GONE_WITHIN),
        format_args!(
            "{:?} booked right after, gone after {:?}, expiry {EXPIRY_MS} ms",
            rounds.iter().map(|it| it.booked_after).collect::<Vec<_>>(),
            rounds.iter().map(|it| it.gone).collect::<Vec<_>>(),
        ),
    );
    report.check(
        &format!("{name}: bookings of running streams outlive the expiry"),
        all(|it| it.kept == (STREAMS - it.cut) as u64),
        format_args!("{:?} kept", rounds.iter().map(|it| it.kept).collect::<Vec<_>>()),
    );
    let reloads = gateway.stat("vm_reload_success").await;
    report.check(
        &format!("{name}: the VM comes back and requests are routed"),
        all(|it| it.routed <= ROUTES_WITHIN && it.status != Some(200)) && reloads >= Some(ROUNDS),
        format_args!(
            "after {:?}; the crashing request got {:?}; {reloads:?} reloads",
            rounds.iter().map(|it| it.routed).collect::<Vec<_>>(),
            rounds.iter().map(|it| it.status).collect::<Vec<_>>(),
        ),
    );
    report.check(
        &format!("{name}: no booking is left in any VM"),
        all(|it| it.at_end == Some(0)),
        format_args!("{:?}", rounds.iter().map(|it| it.at_end).collect::<Vec<_>>()),
    );
    let cut: usize = rounds.iter().map(|it| it.cut).sum();
    report.check(
        &format!("{name}: in the log only cut streams are not freed"),
        ledger.open() == cut && (ledger.freed_wrongly, ledger.booked_twice) == (0, 0),
        format_args!(
            "{} booked, {} freed, {} open, {} freed twice, {} booked twice",
            ledger.booked,
            ledger.freed,
            ledger.open(),
            ledger.freed_wrongly,
            ledger.booked_twice
        ),
    );
}

/// What did not come in time.
type Late = &'static str;

async fn rounds(gateway: &Gateway) -> Result<(Vec<Round>, Ledger), Late> {
    let (mut ledger, mut reader) = (Ledger::default(), gateway.reader());
    let mut rounds = Vec::new();
    for wave in 1..=ROUNDS {
        rounds.push(round(gateway, wave, &mut reader, &mut ledger).await?);
    }
    if reader.missed > 0 { Err("the reader of the log") } else { Ok((rounds, ledger)) }
}

async fn round(
    gateway: &Gateway,
    wave: u64,
    reader: &mut Reader,
    ledger: &mut Ledger,
) -> Result<Round, Late> {
    read_patiently(reader, ledger).await?;
    let left_before = ledger.open();
    let mut asking = JoinSet::new();
    for number in 0..STREAMS {
        let mut client = Keep::connect(&gateway.address()).await.ok_or("a connection")?;
        asking.spawn(async move {
            let prompt = format!("round {wave} request {number}");
            let headers = [(WAVE, &*wave.to_string()), (BEHAVIOUR, Behaviour::Drip.word())];
            client.ask(MODEL, &prompt, &headers).await
        });
    }
    until("all requests at workers", || busy(gateway) == STREAMS).await?;
    let crashed = Instant::now();
    let mut client = Keep::connect(&gateway.address()).await.ok_or("a connection")?;
    let status = client.ask(MODEL, "crash", &[("x-test-crash-vm", "1")]).await;
    let routed = routed_again(gateway, wave).await?.duration_since(crashed);
    let cut = streams_cut(&mut asking).await?;
    read_patiently(reader, ledger).await?;
    let booked_after = ledger.open() - left_before;
    let running = (STREAMS - cut) as u64;
    let (_, seen) = gateway.until_stat("warmpath_bookings$", running, SOON).await;
    let gone = crashed.elapsed();
    if seen != Some(running) {
        return Err("the expiry of bookings");
    }
    // From the first VM's word to the last one's.
    gateway.until_stat("warmpath_bookings_expired_total", 3 * cut as u64, SOON).await;
    let (least, most) = bookings(gateway, OUTLIVES).await?;
    let kept = if most == running { least } else { most };
    gateway.workers.release(wave);
    let mut answered = 0;
    while let Some(ended) = asking.join_next().await {
        answered += usize::from(ended.is_ok_and(|status| status == Some(200)));
    }
    gateway.until_stat("warmpath_bookings$", 0, SOON).await;
    let (_, most) = bookings(gateway, Duration::from_secs(1)).await?;
    let at_end = Some(most);
    read_patiently(reader, ledger).await?;
    Ok(Round { cut, status, booked_after, gone, kept, routed, answered, at_end })
}

/// Waits until streams have been cut and no more are for a while. Each is when
/// its next piece comes.
async fn streams_cut(asking: &mut JoinSet<Option<u16>>) -> Result<usize, Late> {
    let started = Instant::now();
    let (mut cut, mut since) = (0, Instant::now());
    while cut == 0 || since.elapsed() < CUT_WITHIN {
        if started.elapsed() > SOON {
            return Err("a stream that is cut");
        }
        while let Some(ended) = asking.try_join_next() {
            cut += usize::from(ended.is_ok_and(|status| status != Some(200)));
            since = Instant::now();
        }
        sleep(POLL).await;
    }
    Ok(cut)
}

fn busy(gateway: &Gateway) -> usize {
    gateway.workers.busy().iter().sum()
}

async fn until(what: Late, holds: impl Fn() -> bool) -> Result<(), Late> {
    let deadline = Instant::now() + SOON;
    while !holds() {
        if Instant::now() > deadline {
            return Err(what);
        }
        sleep(POLL).await;
    }
    Ok(())
}

/// Reads the log. Right after a crash its reader's stream may have been cut as
/// well.
async fn read_patiently(reader: &mut Reader, ledger: &mut Ledger) -> Result<(), Late> {
    let deadline = Instant::now() + SOON;
    while reader.read_all(ledger).await.is_none() {
        if Instant::now() > deadline {
            return Err("the ring log");
        }
        sleep(POLL).await;
    }
    Ok(())
}

/// Asks until a row of requests has been routed; returns when the first of it
/// was sent.
async fn routed_again(gateway: &Gateway, wave: u64) -> Result<Instant, Late> {
    let deadline = Instant::now() + SOON;
    let (mut row, mut since) = (0, Instant::now());
    while row < ROUTED {
        if Instant::now() > deadline {
            return Err("routing again");
        }
        if row == 0 {
            since = Instant::now();
        }
        let mut client = Keep::connect(&gateway.address()).await.ok_or("a connection")?;
        let status = client.ask(MODEL, &format!("again {wave}"), &[]).await;
        row = if status == Some(200) { row + 1 } else { 0 };
        if row == 0 {
            sleep(POLL).await;
        }
    }
    Ok(since)
}

/// Fewest and most bookings that any VM said to have over some time.
async fn bookings(gateway: &Gateway, time: Duration) -> Result<(u64, u64), Late> {
    let started = Instant::now();
    let (mut least, mut most) = (u64::MAX, 0);
    while started.elapsed() < time {
        let now = gateway.stat("warmpath_bookings$").await.ok_or("Envoy's stats")?;
        (least, most) = (least.min(now), most.max(now));
        sleep(POLL).await;
    }
    Ok((least, most))
}
