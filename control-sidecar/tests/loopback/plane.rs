//! Dynamo's event plane: a stand-in worker on one side, over each transport,
//! what the keeper's snapshot shows on the other.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use warmpath_core::hash::BlockShape;
use warmpath_core::ids::{DpRank, Worker, WorkerId};
use warmpath_core::roster::Role;
use warmpath_sidecar::config::CompletionEngine;
use warmpath_sidecar::discovery::ListEvent;
use warmpath_sidecar::fleet::{
    Fleet, ListedRank, LoadKind, LoadStream, ModelFiles, ModelSpec, PlaneStream, RankLoad,
    RankStream,
};
use warmpath_sidecar::keeper::{Inputs, Keeper, Question, RankReport};
use warmpath_sidecar::metrics::Metrics;
use warmpath_sidecar::model::cache::Cache;
use warmpath_sidecar::model::loader::Loader;
use warmpath_sidecar::publish::log::FeedLog;
use warmpath_sidecar::publish::service::Shared;
use warmpath_sidecar::source::Transports;
use warmpath_sidecar::state::RankSpec;
use zeromq::{PubSocket, Socket, SocketSend, ZmqMessage};

use crate::dynamo::{Carrier, Relay, Said, batch, event};
use crate::support::{MODEL, PATIENCE, eventually, metrics_page};

/// A keeper that follows one worker.
struct Sidecar {
    shared: Arc<Shared>,
    lists: mpsc::Sender<ListEvent>,
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

/// The model that all ranks serve.
fn model() -> ModelSpec {
    ModelSpec {
        name: "tiny".to_owned(),
        aliases: Vec::new(),
        files: ModelFiles::Directory(MODEL.into()),
        block_size: 4,
        context_length: 0,
        eagle: false,
        engine: CompletionEngine::Dynamo,
        hf_tokenizers: false,
    }
}

fn rank_of(relay: &Relay, with_recovery: bool) -> ListedRank {
    let stream = PlaneStream {
        publisher: relay.publisher,
        channel: relay.channel.clone(),
        recovery: with_recovery.then(|| relay.recovery.clone()),
    };
    let spec = RankSpec {
        worker: Worker { id: WorkerId(relay.worker), rank: DpRank(0) },
        model: 0,
        shape: BlockShape { block_size: 4, eagle: false },
        role: Role::Aggregated,
        endpoint: "127.0.0.1:1".to_owned(),
        total_kv_blocks: 1_000,
        max_num_batched_tokens: 0,
        taints: Vec::new(),
        small_pages: false,
        has_events: true,
        incarnation: 1,
        namespace: 0,
    };
    ListedRank { spec, stream: Some(RankStream::Plane(stream)), name: None, namespace: None }
}

impl Sidecar {
    async fn start(relay: &Relay, with_recovery: bool) -> Self {
        let ranks = vec![rank_of(relay, with_recovery)];
        Self::start_with(relay, Fleet { models: vec![model()], ranks, ..Fleet::default() }).await
    }

    async fn start_with(relay: &Relay, fleet: Fleet) -> Self {
        let metrics = Arc::new(Metrics::new());
        let (questions, queue) = mpsc::channel(8);
        let shared =
            Shared::new(FeedLog::new(1, 1 << 20), questions, metrics, CancellationToken::new());
        let shared = Arc::new(shared);
        let listen = "127.0.0.1:0".parse().unwrap();
        let plane = relay.plane.clone();
        let transports = Transports::start(plane, listen, None, &shared.metrics).await.unwrap();
        let (attempts, attempt_queue) = mpsc::channel(8);
        let loader = Loader::new(Cache::default(), attempts);
        let keeper = Keeper::new(Arc::clone(&shared), transports, loader, PATIENCE, 64);
        let (lists, list_queue) = mpsc::channel(1);
        let inputs = Inputs { lists: list_queue, attempts: attempt_queue, questions: queue };
        tokio::spawn(keeper.run(inputs));
        lists.send(ListEvent::Taken(fleet)).await.unwrap();
        let sidecar = Self { shared, lists };
        eventually("the list is taken", || async { !sidecar.ranks().await.is_empty() }).await;
        sidecar
    }

    async fn held(&self) -> BTreeSet<u64> {
        let (answer, snapshot) = oneshot::channel();
        self.shared.questions.send(Question::Snapshot(answer)).await.unwrap();
        snapshot.await.unwrap().blocks().into_iter().map(|(_, hash)| hash.0).collect()
    }

    async fn ranks(&self) -> Vec<RankReport> {
        let (answer, report) = oneshot::channel();
        self.shared.questions.send(Question::Report(answer)).await.unwrap();
        report.await.unwrap().ranks
    }

    async fn rank(&self) -> RankReport {
        self.ranks().await.remove(0)
    }

    /// Waits until an event, and everything before it, has been applied.
    async fn applied(&self, id: u64) {
        let what = format!("event {id} is applied");
        eventually(&what, || async { self.rank().await.applied == Some(id) }).await;
    }

    async fn synced(&self) {
        eventually("the history is there", || async {
            self.rank().await.view.unwrap().standing.synced
        })
        .await;
    }

    fn counts(&self, line: &str) -> bool {
        self.shared.metrics.page().contains(line)
    }
}

const CARRIERS: [Carrier; 3] = [Carrier::Direct, Carrier::Brokers, Carrier::Nats];

/// Goal: over every transport, what happened before we came is asked for, what
/// happens then is heard, and what is lost in between is asked for before
/// anything behind it is applied.
#[tokio::test]
async fn history_live_events_and_gaps_give_the_ranks_cache() {
    for carrier in CARRIERS {
        let mut relay = Relay::start(carrier).await;
        for block in 1..=5 {
            relay.lose(Said::Stored(block));
        }
        relay.lose(Said::Removed(2));
        let sidecar = Sidecar::start(&relay, true).await;
        sidecar.synced().await;
        assert_eq!(sidecar.held().await, relay.held(), "{carrier:?}");
        relay.publish(Said::Stored(7)).await;
        sidecar.applied(7).await;
        relay.lose(Said::Removed(1));
        relay.lose(Said::Stored(8));
        relay.publish(Said::Stored(9)).await;
        sidecar.applied(10).await;
        assert_eq!(sidecar.held().await, [3, 4, 5, 7, 8, 9].into(), "{carrier:?}");
        assert_eq!(relay.held(), sidecar.held().await);
        let view = sidecar.rank().await.view.unwrap();
        assert_eq!((view.gaps, view.standing.partial), (1, None));
        assert!(relay.queries().contains(&Some(8)), "{carrier:?}: {:?}", relay.queries());
        // Too old for the ring: the whole takes the place of what was known.
        relay.lose(Said::Removed(3));
        relay.lose(Said::Stored(10));
        relay.forget();
        relay.publish(Said::Stored(11)).await;
        sidecar.applied(13).await;
        assert_eq!(sidecar.held().await, relay.held());
        relay.publish(Said::Cleared).await;
        relay.publish(Said::Stored(12)).await;
        sidecar.applied(15).await;
        assert_eq!(sidecar.held().await, [12].into());
    }
}

/// Goal: what was lost last, with nothing behind it, is had after a new
/// connection.
#[tokio::test]
async fn a_new_connection_asks_for_the_tail() {
    let mut relay = Relay::start(Carrier::Nats).await;
    let sidecar = Sidecar::start(&relay, true).await;
    sidecar.synced().await;
    relay.publish(Said::Stored(1)).await;
    sidecar.applied(1).await;
    relay.hang_up();
    relay.lose(Said::Removed(1));
    sidecar.applied(2).await;
    assert_eq!(sidecar.held().await, BTreeSet::new());
    let connected = || async { sidecar.rank().await.view.unwrap().standing.connected };
    eventually("it is connected again", connected).await;
    relay.publish(Said::Stored(3)).await;
    sidecar.applied(3).await;
    assert_eq!(sidecar.held().await, [3].into());
}

/// Goal: a publisher may speak of its own rank only, and nobody else may speak
/// for it.
#[tokio::test]
async fn others_events_are_dropped_whole() {
    for carrier in CARRIERS {
        let mut relay = Relay::start(carrier).await;
        let sidecar = Sidecar::start(&relay, true).await;
        sidecar.synced().await;
        relay.publish(Said::Stored(1)).await;
        sidecar.applied(1).await;
        let (own, publisher) = (relay.worker, relay.publisher);
        let mixed = batch(&[event(own, 2, Said::Removed(1)), event(own + 1, 1, Said::Stored(6))]);
        relay.send(publisher, &mixed).await;
        relay.send(publisher + 1, &batch(&[event(own, 2, Said::Removed(1))])).await;
        relay.publish(Said::Stored(2)).await;
        sidecar.applied(2).await;
        assert_eq!(sidecar.held().await, [1, 2].into(), "{carrier:?}");
        assert!(sidecar.counts("plane_messages_dropped_total{reason=\"other_worker\"} 1"));
        assert!(sidecar.counts("plane_messages_dropped_total{reason=\"other_publisher\"} 1"));
        assert_eq!(sidecar.rank().await.view.unwrap().gaps, 0);
    }
}

#[tokio::test]
async fn without_a_recovery_target_a_gap_clears() {
    let mut relay = Relay::start(Carrier::Direct).await;
    let sidecar = Sidecar::start(&relay, false).await;
    sidecar.synced().await;
    let mut next = 0;
    // Until the subscription has reached the publisher nothing is heard.
    timeout(PATIENCE, async {
        while sidecar.rank().await.applied.is_none() {
            next += 1;
            relay.publish(Said::Stored(next)).await;
        }
    })
    .await
    .unwrap();
    relay.lose(Said::Removed(1));
    relay.publish(Said::Stored(100)).await;
    sidecar.applied(next + 2).await;
    assert_eq!(sidecar.held().await, [100].into());
    assert!(sidecar.counts("rank_clears_total{reason=\"no_replay\"}"));
    assert!(relay.queries().is_empty());
}

/// Goal: load is taken in from SGLang's stream and from a page for Prometheus,
/// shown with its rank, and forgotten with it.
#[tokio::test]
async fn loads_are_shown_and_forgotten_with_their_rank() {
    let relay = Relay::start(Carrier::Direct).await;
    let mut socket = PubSocket::new();
    let endpoint = socket.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    let sglang = endpoint.strip_prefix("tcp://").unwrap().to_owned();
    let page = "vllm:kv_cache_usage_perc{engine=\"0\"} 0.5\nvllm:cache_config_info{num_gpu_blocks=\"64\"} 1\n";
    let (url, pages) = metrics_page(page).await;
    let stream = |kind| LoadStream { kind, worker: Some(WorkerId(relay.worker)), ranks: vec![0] };
    let load_streams = vec![stream(LoadKind::SglangLoad(sglang)), stream(LoadKind::Scrape(url))];
    let ranks = vec![rank_of(&relay, true)];
    let fleet = Fleet { models: vec![model()], ranks, load_streams, ..Fleet::default() };
    let sidecar = Sidecar::start_with(&relay, fleet.clone()).await;
    let mut expected = RankLoad {
        running: Some(4),
        waiting: Some(2),
        total_kv_blocks: Some(64),
        ..RankLoad::default()
    };
    let stat = Bytes::from_static(b"\x96\xa8LoadStat\x04\x02\x00\x00\x00");
    timeout(PATIENCE, async {
        // Until the subscription has reached the publisher nothing is heard.
        loop {
            let load = sidecar.rank().await.load;
            if load.running.is_some() && load.cache_usage.is_some() {
                return;
            }
            let mut message = ZmqMessage::from(Bytes::from_static(b"load"));
            message.push_back(Bytes::from_static(&[0; 8]));
            message.push_back(stat.clone());
            socket.send(message).await.unwrap();
        }
    })
    .await
    .unwrap();
    expected.cache_usage = Some(0.5);
    assert_eq!(sidecar.rank().await.load, expected);
    // Another life of the rank has said nothing yet.
    let mut next = fleet;
    next.load_streams.clear();
    next.ranks[0].spec.incarnation = 2;
    sidecar.lists.send(ListEvent::Taken(next)).await.unwrap();
    let forgotten = || async { sidecar.rank().await.load == RankLoad::default() };
    eventually("the load is forgotten", forgotten).await;
    pages.abort();
}
