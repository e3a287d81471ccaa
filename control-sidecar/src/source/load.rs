//! Load: how busy ranks are, from wherever they say it.
//!
//! One task a stream. Some streams speak with each pass of the model; the state
//! is told of a rank only so often, of its last word.

mod scrape;

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use warmpath_core::ids::{DpRank, Worker, WorkerId};

use super::Update;
use super::outlet::Stopped;
use super::plane::hub::{Heard, Hub};
use super::zmtp::{Connection, ZmtpError};
use crate::adapter::plane::PlaneError;
use crate::adapter::plane::envelope::Topic;
use crate::adapter::plane::load::{decode_forward_pass, decode_kv_metrics, decode_load_stat};
use crate::fleet::{LoadKind, LoadStream, PlanePublisher, RankLoad};
use crate::limits::{LOAD_EVERY, LOAD_RANKS_MAX, RECONNECT_PAUSE};
use crate::metrics::Metrics;

/// The topic of SGLang's load stream.
const SGLANG_TOPIC: &str = "load";

/// Follows a stream of load until the task is aborted or nobody takes updates.
pub async fn follow_load(
    stream: LoadStream,
    hub: Arc<Hub>,
    updates: mpsc::Sender<Update>,
    metrics: Arc<Metrics>,
) {
    let LoadStream { kind, worker, ranks } = stream;
    let accounts =
        Accounts { worker, ranks, pending: BTreeMap::new(), due: None, updates, metrics };
    match kind {
        LoadKind::KvMetrics(publisher) => {
            follow_topic(&publisher, Topic::KvMetrics, decode_kv_metrics, &hub, accounts).await;
        }
        LoadKind::ForwardPass(publisher) => {
            follow_topic(&publisher, Topic::ForwardPass, decode_forward_pass, &hub, accounts).await;
        }
        LoadKind::SglangLoad(address) => follow_sglang(&address, accounts).await,
        LoadKind::Scrape(url) => scrape::follow(&url, accounts).await,
    }
}

/// What has been said and not yet told.
#[derive(Debug)]
struct Accounts {
    /// The only instance that may be spoken of.
    worker: Option<WorkerId>,
    /// Its ranks; empty if any is as good.
    ranks: Vec<u32>,
    pending: BTreeMap<Worker, RankLoad>,
    due: Option<Instant>,
    updates: mpsc::Sender<Update>,
    metrics: Arc<Metrics>,
}

impl Accounts {
    /// Takes an account of one rank.
    fn take(&mut self, worker: Worker, load: &RankLoad) {
        if self.worker.is_some_and(|only| only != worker.id) {
            return self.metrics.load_dropped("other_worker");
        }
        if self.worker.is_some() && !self.has_rank(worker.rank.0) {
            return self.metrics.load_dropped("other_rank");
        }
        if self.pending.len() >= LOAD_RANKS_MAX && !self.pending.contains_key(&worker) {
            return self.metrics.load_dropped("too_many_ranks");
        }
        self.pending.entry(worker).or_default().merge(load);
        self.due.get_or_insert_with(|| Instant::now() + LOAD_EVERY);
    }

    fn has_rank(&self, rank: u32) -> bool {
        self.ranks.is_empty() || self.ranks.contains(&rank)
    }

    /// Waits until there is something to tell.
    async fn due(&self) {
        match self.due {
            Some(at) => sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    /// Tells what there is to tell.
    async fn tell(&mut self) -> Result<(), Stopped> {
        self.due = None;
        for (worker, load) in core::mem::take(&mut self.pending) {
            self.updates.send(Update::Load(worker, load)).await.map_err(|_| Stopped)?;
        }
        Ok(())
    }
}

/// Reads who is spoken of, and what is said.
type Decode = fn(&[u8]) -> Result<(Worker, RankLoad), PlaneError>;

async fn follow_topic(
    publisher: &PlanePublisher,
    topic: Topic,
    decode: Decode,
    hub: &Hub,
    mut accounts: Accounts,
) {
    let mut subscription = hub.subscribe(&publisher.channel, topic, publisher.publisher);
    loop {
        tokio::select! {
            heard = subscription.next() => {
                let Heard::Message(message) = heard else { continue };
                match decode(&message.payload) {
                    Ok((worker, load)) => accounts.take(worker, &load),
                    Err(error) => accounts.metrics.load_dropped(error.reason()),
                }
            }
            () = accounts.due() => {
                if accounts.tell().await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Follows the load stream of one rank of SGLang.
async fn follow_sglang(address: &str, mut accounts: Accounts) {
    let mut pause = RECONNECT_PAUSE.0;
    loop {
        match Connection::subscribe(address, SGLANG_TOPIC).await {
            Ok(mut connection) => {
                pause = RECONNECT_PAUSE.0;
                let Err(error) = sglang_session(&mut connection, &mut accounts).await else {
                    return;
                };
                accounts.metrics.connection_failed(error.reason());
            }
            Err(error) => accounts.metrics.connection_failed(error.reason()),
        }
        sleep(pause).await;
        pause = (pause * 2).min(RECONNECT_PAUSE.1);
    }
}

/// One connection from its beginning to its end. `Ok` if nobody takes updates
/// any more.
async fn sglang_session(
    connection: &mut Connection,
    accounts: &mut Accounts,
) -> Result<(), ZmtpError> {
    loop {
        tokio::select! {
            frames = connection.receive() => {
                let frames = frames?;
                let Some(payload) = frames.last() else { continue };
                match (decode_load_stat(payload), accounts.worker) {
                    (Ok((rank, load)), Some(id)) => accounts.take(Worker { id, rank }, &load),
                    // It does not say whose it is.
                    (Ok(_), None) => accounts.metrics.load_dropped("no_worker"),
                    (Err(error), _) => accounts.metrics.load_dropped(error.reason()),
                }
            }
            () = accounts.due() => {
                if accounts.tell().await.is_err() {
                    return Ok(());
                }
            }
        }
    }
}

/// The rank that a label of a page means: the rank of that number, or, where an
/// instance numbers its engines from 0 on whatever its first rank is, the one at
/// that place. Without a label the only rank there is.
fn labelled(label: Option<u32>, ranks: &[u32]) -> Option<DpRank> {
    let Some(label) = label else {
        return match ranks {
            [] => Some(DpRank(0)),
            [only] => Some(DpRank(*only)),
            _ => None,
        };
    };
    if ranks.is_empty() || ranks.contains(&label) {
        return Some(DpRank(label));
    }
    let at = usize::try_from(label).ok()?;
    ranks.get(at).copied().map(DpRank)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> (Accounts, mpsc::Receiver<Update>) {
        let (updates, queue) = mpsc::channel(8);
        let accounts = Accounts {
            worker: Some(WorkerId(1)),
            ranks: vec![4, 5],
            pending: BTreeMap::new(),
            due: None,
            updates,
            metrics: Arc::new(Metrics::new()),
        };
        (accounts, queue)
    }

    fn running(requests: u64) -> RankLoad {
        RankLoad { running: Some(requests), ..RankLoad::default() }
    }

    /// Goal: however often a rank speaks, the state is told of its last word,
    /// field by field, and of nobody else's.
    #[tokio::test]
    async fn a_rank_is_told_of_once_by_its_last_word() {
        let (mut accounts, mut queue) = accounts();
        let of = |id, rank| Worker { id: WorkerId(id), rank: DpRank(rank) };
        accounts.take(of(1, 4), &RankLoad { waiting: Some(9), ..running(1) });
        accounts.take(of(1, 4), &running(2));
        accounts.take(of(2, 4), &running(3));
        accounts.take(of(1, 6), &running(4));
        accounts.due().await;
        accounts.tell().await.unwrap();
        assert!(accounts.due.is_none());
        let expected = RankLoad { waiting: Some(9), ..running(2) };
        assert_eq!(queue.try_recv(), Ok(Update::Load(of(1, 4), expected)));
        assert!(queue.try_recv().is_err());
        let page = accounts.metrics.page();
        assert!(page.contains("dropped_total{reason=\"other_worker\"} 1"));
        assert!(page.contains("dropped_total{reason=\"other_rank\"} 1"));
    }

    #[test]
    fn labels_mean_ranks() {
        for (label, ranks, expected) in [
            (None, &[][..], Some(0)),
            (None, &[3], Some(3)),
            (None, &[3, 4], None),
            (Some(4), &[3, 4], Some(4)),
            (Some(1), &[4, 5], Some(5)),
            (Some(2), &[4, 5], None),
            (Some(2), &[], Some(2)),
        ] {
            assert_eq!(labelled(label, ranks), expected.map(DpRank), "{label:?} of {ranks:?}");
        }
    }
}
