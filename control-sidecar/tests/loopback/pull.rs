//! TensorRT-LLM's events over HTTP: one server whose buffer two ranks share.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use warmpath_core::event::KvEvent;
use warmpath_core::ids::{DpRank, Worker, WorkerId, WorkerSlot};
use warmpath_sidecar::metrics::Metrics;
use warmpath_sidecar::source::pull::{PullSpec, Pulls, follow_pull};
use warmpath_sidecar::source::sequence::Loss;
use warmpath_sidecar::source::{Update, new_view};

use crate::support::PATIENCE;

/// A server that gives out what is put into its buffer, once.
struct Server {
    url: String,
    buffer: Arc<Mutex<VecDeque<Value>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let buffer: Arc<Mutex<VecDeque<Value>>> = Arc::default();
        let shared = Arc::clone(&buffer);
        let task = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 2048];
                while let Ok(len) = stream.read(&mut request).await
                    && len > 0
                {
                    assert!(request.starts_with(b"POST /kv_cache_events HTTP/1.1\r\n"));
                    let events: Vec<Value> = shared.lock().unwrap().drain(..).collect();
                    let body = Value::from(events).to_string();
                    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
                    stream.write_all(head.as_bytes()).await.unwrap();
                    stream.write_all(body.as_bytes()).await.unwrap();
                }
            }
        });
        Self { url, buffer, task }
    }

    fn say(&self, rank: u32, id: u64) {
        let removed = json!({"type": "removed", "block_hashes": [id]});
        let event = json!({"event_id": id, "attention_dp_rank": rank, "data": removed});
        self.buffer.lock().unwrap().push_back(event);
    }
}

async fn next(updates: &mut mpsc::Receiver<Update>) -> Update {
    timeout(PATIENCE, updates.recv()).await.unwrap().unwrap()
}

/// Goal: what is asked for by one is shared by all, and each rank's events are
/// in order by themselves.
#[tokio::test]
async fn ranks_share_their_servers_buffer() {
    let server = Server::start().await;
    for rank in [0, 1] {
        for id in [0, 1] {
            server.say(rank, id);
        }
    }
    let metrics = Arc::new(Metrics::new());
    let pulls = Arc::new(Pulls::new(Arc::clone(&metrics)));
    let mut ranks = [0_u16, 1].map(|rank| {
        let (updates, queue) = mpsc::channel(16);
        let spec = PullSpec {
            worker: Worker { id: WorkerId(1), rank: DpRank(rank.into()) },
            slot: WorkerSlot(rank),
            url: server.url.clone(),
            block_size: 4,
        };
        let work = follow_pull(spec, Arc::clone(&pulls), updates, new_view(), Arc::clone(&metrics));
        (WorkerSlot(rank), queue, tokio::spawn(work))
    });
    for (slot, queue, _) in &mut ranks {
        let Update::Events(of, 1, events) = next(queue).await else { panic!("no events") };
        assert_eq!((of, events.len()), (*slot, 2));
        assert_eq!(next(queue).await, Update::Synced(*slot));
    }
    // One rank's events are lost.
    server.say(0, 3);
    server.say(1, 2);
    let (slot, queue, _) = &mut ranks[0];
    assert_eq!(next(queue).await, Update::Clear(*slot, Loss::NoReplay));
    let Update::Events(_, 3, events) = next(queue).await else { panic!("no events") };
    assert!(matches!(&events[..], [KvEvent::Removed(_)]));
    let (_, queue, _) = &mut ranks[1];
    assert!(matches!(next(queue).await, Update::Events(_, 2, _)));
    // The server is gone, and with it what it held.
    server.task.abort();
    for (slot, queue, task) in &mut ranks {
        assert_eq!(next(queue).await, Update::Clear(*slot, Loss::PublisherGone));
        task.abort();
    }
}
