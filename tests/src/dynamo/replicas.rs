//! Replicas: our gateway and Dynamo's own KV-routing frontends in front of the
//! same workers, each of which must know what the other has placed.
//!
//! A frontend that does not sync stands beside for comparison: what it shows of
//! load is what it would show without us.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::peers::MODEL;
use crate::stack::client::{Chat, get};
use crate::stack::conversations::Numbers;
use crate::stack::gateway::Gateway;
use crate::stack::launch::local;
use crate::stack::limits::POLL_START;
use crate::stack::report::Report;

/// Requests that run at the same time.
const REQUESTS: u64 = 8;

/// Tokens of an answer: it outlasts every look at it.
const ANSWER_TOKENS: u32 = 8_000;

/// Time in which each side must know of the other.
const KNOWN_WITHIN: Duration = Duration::from_secs(20);

/// Blocks, or requests, by worker and rank.
type ByWorker = BTreeMap<(u64, u64), u64>;

/// Checks both directions.
///
/// - `routers`: ports of the frontends that route by KV: one that syncs, and one
///   that does not.
pub async fn check(
    name: &str,
    gateway: &Gateway,
    routers: [u16; 2],
    seed: u64,
    report: &mut Report,
) {
    let mut check = |what: &str, holds: bool, figures: &str| {
        report.check(&format!("{name}: {what}"), holds, figures);
    };
    let [syncs, stands_aside] = routers;
    let mut numbers = Numbers::new(seed);

    // Ours, seen by theirs.
    let mut clients = start(&gateway.address(), &mut numbers);
    let is_there = async || {
        let (ours, theirs) = (bookings(gateway, "own_bookings").await, blocks(syncs).await);
        let booked = ours.values().sum::<u64>() == REQUESTS;
        // The same workers, and none that has nothing.
        (booked && workers(&ours) == workers(&theirs), format!("{ours:?}, its blocks {theirs:?}"))
    };
    let (seen, figures) = eventually(is_there).await;
    check("the frontend sees the load of our bookings", seen, &figures);
    let aside = blocks(stands_aside).await;
    check(
        "one that does not sync sees none",
        aside.values().sum::<u64>() == 0,
        &format!("{aside:?}"),
    );
    clients.shutdown().await;
    let is_over = async || {
        let (ours, theirs) = (bookings(gateway, "own_bookings").await, blocks(syncs).await);
        let left = ours.values().sum::<u64>() + theirs.values().sum::<u64>();
        (left == 0, format!("{ours:?}, its blocks {theirs:?}"))
    };
    let (over, figures) = eventually(is_over).await;
    check("and its end", over, &figures);

    // Theirs, seen by ours.
    let mut clients = start(&local(syncs), &mut numbers);
    let is_there = async || {
        let (remote, theirs) = (bookings(gateway, "remote_bookings").await, blocks(syncs).await);
        let in_filters = gateway.stat("warmpath_bookings$").await;
        let booked = remote.values().sum::<u64>() == REQUESTS && in_filters == Some(REQUESTS);
        let same = workers(&remote) == workers(&theirs);
        (
            booked && same,
            format!("{remote:?}, in the filters {in_filters:?}, its blocks {theirs:?}"),
        )
    };
    let (seen, figures) = eventually(is_there).await;
    check("we see the bookings of the frontend, in sidecar and filters", seen, &figures);
    clients.shutdown().await;
    let is_over = async || {
        let remote = bookings(gateway, "remote_bookings").await;
        let in_filters = gateway.stat("warmpath_bookings$").await;
        let over = remote.values().sum::<u64>() == 0 && in_filters == Some(0);
        (over, format!("{remote:?}, in the filters {in_filters:?}"))
    };
    let (over, figures) = eventually(is_over).await;
    check("and their end", over, &figures);
}

fn start(address: &str, numbers: &mut Numbers) -> JoinSet<bool> {
    let mut clients = JoinSet::new();
    for _ in 0..REQUESTS {
        let messages = vec![("user", numbers.text(300))];
        let chat = Chat { messages, max_tokens: ANSWER_TOKENS, stream: true };
        let address = address.to_owned();
        clients.spawn(async move { chat.send(&address, MODEL, &[]).await.is_ok() });
    }
    clients
}

fn workers(of: &ByWorker) -> Vec<(u64, u64)> {
    of.iter().filter(|(_, count)| **count > 0).map(|(worker, _)| *worker).collect()
}

/// Looks until something holds, or the time is over: whether it did, and the last
/// figures.
async fn eventually(look: impl AsyncFn() -> (bool, String)) -> (bool, String) {
    let deadline = Instant::now() + KNOWN_WITHIN;
    loop {
        let (holds, figures) = look().await;
        if holds || Instant::now() > deadline {
            return (holds, figures);
        }
        sleep(POLL_START).await;
    }
}

/// What our state page says of each rank.
async fn bookings(gateway: &Gateway, which: &str) -> ByWorker {
    let state = gateway.state().await.unwrap_or_default();
    let workers = state.get("workers").and_then(Value::as_array).cloned().unwrap_or_default();
    let read = |worker: &Value| {
        let number = |key: &str| worker.get(key).and_then(Value::as_u64);
        Some(((number("id")?, number("rank")?), number(which)?))
    };
    workers.iter().filter_map(read).collect()
}

/// Blocks that a Dynamo frontend counts as active on each rank.
async fn blocks(port: u16) -> ByWorker {
    let Ok(page) = get(&local(port), "/metrics").await else { return ByWorker::new() };
    let text = String::from_utf8_lossy(&page.body).into_owned();
    let mut all = ByWorker::new();
    for line in text.lines() {
        let Some(rest) = line.strip_prefix("dynamo_frontend_worker_active_decode_blocks{") else {
            continue;
        };
        let Some((labels, value)) = rest.split_once("} ") else { continue };
        let label = |name: &str| {
            let (_, rest) = labels.split_once(&format!("{name}=\""))?;
            rest.split('"').next()?.parse::<u64>().ok()
        };
        if let (Some(worker), Some(rank), Ok(value)) =
            (label("worker_id"), label("dp_rank"), value.trim().parse())
        {
            all.insert((worker, rank), value);
        }
    }
    all
}
