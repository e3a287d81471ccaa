//! The desk, fed by a log as the keeper writes it.

use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use warmpath_core::bookings::Bookings;
use warmpath_core::delta::{Operation, encode_operations};
use warmpath_core::frame::Kind;
use warmpath_core::ids::{DpRank, SequenceHash, Worker, WorkerId, WorkerSlot};
use warmpath_core::load::WorkerLoad;
use warmpath_core::reason::Reason;
use warmpath_core::roster::{Parity, Role, RosterWorker, TierSlots};
use warmpath_core::settings::RouterSettings;

use super::super::follow::follow;
use super::*;
use crate::keeper::{Question, Snapshot};
use crate::publish::log::FeedLog;
use crate::state::rank::Held;

const PATIENCE: Duration = Duration::from_secs(20);

/// A desk, its log, and a stand-in for the keeper.
struct Bench {
    desk: Arc<Desk>,
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Bench {
    /// - `held`: what a snapshot says of slot 1.
    fn start(log_bytes: usize, held: &'static [u64]) -> Self {
        let (questions, mut asked) = mpsc::channel(8);
        let log = FeedLog::new(7, log_bytes);
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared::new(log, questions, Arc::default(), stop));
        let desk = Arc::new(Desk::new(Arc::clone(&shared), 1_000, 1));
        let keeper = Arc::clone(&shared);
        let answering = tokio::spawn(async move {
            while let Some(question) = asked.recv().await {
                let Question::Snapshot(answer) = question else { continue };
                let held: Held = held.iter().map(|number| (hash(*number), 1)).collect();
                let sequence = keeper.log.progress().last;
                let ranks = vec![(WorkerSlot(1), Arc::new(held))];
                let _ = answer.send(Snapshot { sequence, ranks });
            }
        });
        let following = tokio::spawn(follow(Arc::clone(&desk), Arc::clone(&shared), 5));
        Self { desk, shared, tasks: vec![answering, following] }
    }

    fn roster(&self, roles: &[Role]) {
        let worker = |(slot, role): (u16, &Role)| RosterWorker {
            slot: WorkerSlot(slot),
            worker: Worker { id: WorkerId(slot.into()), rank: DpRank(0) },
            model: 0,
            role: *role,
            parity: Parity::Exact,
            namespace: 0,
            endpoint: format!("127.0.0.1:{slot}"),
            total_kv_blocks: 0,
            max_num_batched_tokens: 0,
            taints: Vec::new(),
            tiers: TierSlots::default(),
        };
        let workers = (1..).zip(roles).map(worker).collect();
        let roster = Roster { workers, adapters: Vec::new() };
        self.shared.log.append(Kind::Roster, &roster.encode());
    }

    fn settings(&self, settings: Settings) {
        let all = RouterSettings { default: settings, of_models: Vec::new() };
        self.shared.log.append(Kind::Settings, &all.encode());
    }

    fn stored(&self, hashes: &[u64]) {
        let hashes: Vec<SequenceHash> = hashes.iter().map(|number| hash(*number)).collect();
        let body = encode_operations(&[(Operation::Stored, WorkerSlot(1), &hashes)]);
        self.shared.log.append(Kind::Delta, &body);
    }

    async fn until(&self, what: &str, holds: impl Fn(&mut Replica) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !self.desk.with(&holds) {
            assert!(Instant::now() < deadline, "never: {what}");
            // Looks again; whoever is waited for tells nobody.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn load(&self, slot: u16) -> WorkerLoad {
        self.desk.with(|replica| replica.loads().of(WorkerSlot(slot)))
    }
}

/// A hash as spread as real ones.
fn hash(number: u64) -> SequenceHash {
    SequenceHash(xxhash_rust::xxh3::xxh3_64(&number.to_le_bytes()))
}

/// A prompt of so many blocks.
fn prompt(blocks: u64) -> Prepared {
    Prepared {
        reason: Reason::Kv,
        prompt_tokens: u32::try_from(blocks * 16).unwrap(),
        tokens: vec![1; usize::try_from(blocks * 16).unwrap()],
        hashes: (1..=blocks).map(hash).collect(),
        block_size: 16,
        is_whole: true,
        ..Prepared::by_load(Reason::Kv, Some(0), 0)
    }
}

/// Goal: the index is that of the log, whatever of it was missed; the state comes
/// before the index is whole.
#[tokio::test]
async fn the_replica_is_that_of_the_log() {
    let bench = Bench::start(1 << 20, &[1, 2, 3]);
    assert!(!*bench.desk.knows_workers().borrow());
    bench.roster(&[Role::Aggregated]);
    bench.desk.knows_workers().wait_for(|knows| *knows).await.unwrap();
    bench.stored(&[1, 2, 3]);
    assert!(!bench.desk.with(|replica| replica.is_live()), "not before it is whole");
    bench.shared.log.open();
    bench.until("live", |replica| replica.is_live()).await;
    bench.stored(&[4]);
    bench.until("the delta", |replica| replica.index().blocks() == 4).await;
    assert_eq!(bench.desk.with(|replica| replica.counters().gaps), 0);
    assert_eq!(bench.desk.view().roster.workers.len(), 1);
    let choice = bench.desk.place(&prompt(6)).unwrap().choice.clone();
    assert_eq!(choice.predicted_cached_tokens, 64);
}

/// Goal: whoever falls out of the log takes the index anew, and goes on answering
/// meanwhile.
#[tokio::test]
async fn a_hole_in_the_log_is_made_up_for() {
    let bench = Bench::start(4_000, &[1, 2]);
    bench.roster(&[Role::Aggregated]);
    bench.shared.log.open();
    bench.until("live", |replica| replica.is_live()).await;
    // No turn for the follower before more has come than the log keeps.
    for block in 10..500 {
        bench.stored(&[block]);
    }
    bench
        .until("taken anew", |replica| replica.counters().snapshots == 2 && replica.is_live())
        .await;
    assert_eq!(bench.desk.with(|replica| replica.index().blocks()), 2, "the snapshot's");
    assert!(bench.desk.with(|replica| replica.has_index()));
}

/// Goal: the prompt counts until the response begins, the request until its ticket
/// goes, and nothing of it afterwards.
#[tokio::test]
async fn a_ticket_is_the_booking() {
    let bench = Bench::start(1 << 20, &[]);
    let tracks = Settings { router_track_output_blocks: true, ..Settings::default() };
    bench.settings(tracks);
    bench.roster(&[Role::Aggregated]);
    bench.until("settings", |replica| replica.has_roster()).await;
    let mut ticket = bench.desk.place(&prompt(6)).unwrap();
    let load = bench.load(1);
    assert_eq!((load.requests, load.prefill_tokens, load.active_blocks), (1, 96, 6));
    ticket.began();
    ticket.began();
    assert_eq!(bench.load(1).prefill_tokens, 0);
    ticket.answered(40);
    assert_eq!(bench.load(1).active_blocks, 9, "its answer fills blocks, too");
    drop(ticket);
    assert_eq!(bench.load(1), WorkerLoad::default());
    let metrics = &bench.shared.metrics.picker;
    assert_eq!((metrics.bookings_made.get(), metrics.bookings_freed.get()), (1, 1));
}

/// Goal: of two legs, the one that computes the prompt ends with the first piece
/// of the response, and counts no second time at the end.
#[tokio::test]
async fn the_prefill_leg_ends_first() {
    let bench = Bench::start(1 << 20, &[]);
    bench.roster(&[Role::Prefill, Role::Decode]);
    bench.until("roster", |replica| replica.has_roster()).await;
    let mut ticket = bench.desk.place(&prompt(6)).unwrap();
    assert_eq!((bench.load(1).requests, bench.load(2).requests), (1, 1));
    assert_eq!((bench.load(1).prefill_tokens, bench.load(2).prefill_tokens), (96, 0));
    ticket.began();
    assert_eq!((bench.load(1).requests, bench.load(2).requests), (0, 1));
    drop(ticket);
    assert_eq!((bench.load(1).requests, bench.load(2).requests), (0, 0));
    let metrics = &bench.shared.metrics.picker;
    assert_eq!((metrics.bookings_made.get(), metrics.bookings_freed.get()), (2, 2));
}

/// Goal: a request that runs for longer than bookings last stays booked, since it
/// is here.
#[tokio::test]
async fn long_requests_are_refreshed() {
    let bench = Bench::start(1 << 20, &[]);
    let short = Settings { active_request_expiry_ms: 1_000, ..Settings::default() };
    bench.settings(short);
    bench.roster(&[Role::Aggregated]);
    bench.until("settings", |replica| replica.has_roster()).await;
    let ticket = bench.desk.place(&prompt(2)).unwrap();
    let since = Instant::now();
    while since.elapsed() < Duration::from_millis(1_500) {
        bench.desk.tick(true);
        assert_eq!(bench.load(1).requests, 1);
        // Time itself is what is tested: more than an expiry has to pass.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // Nobody speaks for it any more, as after a fault of ours.
    bench.desk.lock().own.clear();
    bench.until("it runs out", |replica| replica.loads().bookings() == 0).await;
    assert_eq!(bench.shared.metrics.picker.bookings_expired.get(), 1);
    drop(ticket);
    assert_eq!(bench.shared.metrics.picker.bookings_freed.get(), 0, "it was over already");
}

/// Goal: other routers hear of every booking, if they want to.
#[tokio::test]
async fn others_are_told_what_is_booked() {
    let bench = Bench::start(1 << 20, &[]);
    bench.roster(&[Role::Aggregated]);
    bench.until("roster", |replica| replica.has_roster()).await;
    drop(bench.desk.place(&prompt(2)).unwrap());
    assert!(bench.desk.to_tell().is_empty(), "nobody wants to know");
    // Here nobody takes what is said but the test.
    bench.tasks.iter().for_each(JoinHandle::abort);
    let running = bench.desk.place(&prompt(2)).unwrap();
    bench.desk.tell_others(true);
    let said = |bodies: Vec<Vec<u8>>| {
        let mut said = Vec::new();
        for body in bodies {
            let frame = Bookings::decode(&body).unwrap();
            said.extend(frame.read().map(|entry| match entry.unwrap() {
                Entry::Booked(_) => "booked",
                Entry::PrefillDone(_) => "done",
                Entry::Freed(_) => "freed",
                other => panic!("{other:?}"),
            }));
        }
        said
    };
    assert_eq!(said(bench.desk.to_tell()), ["booked"], "what runs already");
    drop(running);
    let mut next = bench.desk.place(&prompt(2)).unwrap();
    next.began();
    assert_eq!(said(bench.desk.to_tell()), ["freed", "booked", "done"]);
    bench.desk.tell_again();
    assert_eq!(said(bench.desk.to_tell()), ["booked", "done"], "all of it once more");
}

/// Goal: threads that place at the same time share the workers evenly, request by
/// request.
#[tokio::test]
async fn placing_is_one_step() {
    let bench = Bench::start(1 << 20, &[]);
    bench.roster(&[Role::Aggregated, Role::Aggregated]);
    bench.until("roster", |replica| replica.has_roster()).await;
    let tickets = std::thread::scope(|scope| {
        let place = |thread: u64| {
            let desk = &bench.desk;
            move || {
                let hashes =
                    |at: u64| (0..4).map(|block| hash(thread << 32 | at << 8 | block)).collect();
                let placed = (0..50)
                    .map(|at| desk.place(&Prepared { hashes: hashes(at), ..prompt(4) }).unwrap());
                placed.collect::<Vec<_>>()
            }
        };
        let threads: Vec<_> = (1..=4).map(|thread| scope.spawn(place(thread))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(tickets.len(), 200);
    assert_eq!((bench.load(1).requests, bench.load(2).requests), (100, 100));
    drop(tickets);
    assert_eq!(bench.desk.with(|replica| replica.loads().bookings()), 0);
}
