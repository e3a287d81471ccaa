//! Several sidecars, and routers that are none, that tell each other what they
//! have booked.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::{Duration, sleep, timeout};
use warmpath_core::bookings::{Bookings, Flags};
use warmpath_core::entry::Entry;
use warmpath_core::frame::Kind;
use warmpath_core::ids::{DpRank, SequenceHash, Worker, WorkerId, WorkerSlot};
use warmpath_core::load::{Booking, BookingId, Loads};
use warmpath_sidecar::adapter::plane::envelope::{
    Message, Topic, decode_frames, encode_envelope, encode_frames,
};
use warmpath_sidecar::adapter::plane::sequences::{
    Added, SequenceEvent, Step, decode_sequences, encode_events,
};
use warmpath_sidecar::config::Config;
use warmpath_sidecar::run::Sidecar;
use zeromq::{PubSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqMessage};

use crate::ports::free_port;
use crate::support::{Filter, PATIENCE, config, eventually, state};

pub(crate) const LIST: Flags = Flags { begins: true, ends: true, wanted: false };
const CHANGE: Flags = Flags { begins: false, ends: false, wanted: false };

/// A gateway's follower, and what it knows of other routers.
pub(crate) struct Gateway {
    filter: Filter,
    remote: Loads,
    ids: Vec<BookingId>,
}

impl Gateway {
    /// Attaches, and waits for the list that comes first.
    pub(crate) async fn attach(sidecar: &Sidecar, name: u64) -> Self {
        let filter = Filter::attach_gateway(sidecar.feed, name).await;
        let mut gateway = Self { filter, remote: Loads::new(), ids: Vec::new() };
        let first = gateway.next().await;
        assert!(first.begins && first.wanted, "{first:?}");
        gateway
    }

    pub(crate) async fn say(&self, flags: Flags, entries: &[Entry<'_>]) {
        let encoded: Vec<Vec<u8>> = entries.iter().map(Entry::encode).collect();
        let entries = encoded.iter().map(Vec::as_slice).collect();
        let body = Bookings { flags, now_ms: 0, entries }.encode();
        self.filter.say(Kind::Bookings, &body).await;
    }

    /// Takes in the next frame of other routers' bookings.
    async fn next(&mut self) -> Flags {
        let got = self.filter.next_of(&[Kind::Remote]).await;
        let frame = Bookings::decode(&got.body).unwrap();
        for entry in frame.read() {
            match entry.unwrap() {
                Entry::Booked(booking) => {
                    self.ids.push(booking.id);
                    self.remote.add(booking);
                }
                Entry::PrefillDone(id) => self.remote.prefill_done(id),
                Entry::Freed(id) => self.remote.free(id),
                Entry::Refreshed(..) => {}
                other => panic!("{other:?}"),
            }
        }
        frame.flags
    }

    /// Waits until so many requests, prompt tokens and blocks are booked by others.
    pub(crate) async fn sees(&mut self, slot: u16, expected: (u64, u64, u64)) {
        let waited = timeout(PATIENCE, async {
            loop {
                let load = self.remote.of(WorkerSlot(slot));
                if (load.requests, load.prefill_tokens, load.active_blocks) == expected {
                    return;
                }
                self.next().await;
            }
        });
        if waited.await.is_err() {
            panic!("never {expected:?}, but {:?}", self.remote.of(WorkerSlot(slot)));
        }
    }
}

fn booking(id: u64, slot: u16) -> Entry<'static> {
    Entry::Booked(Booking {
        prefill_tokens: 40,
        blocks: vec![SequenceHash(1), SequenceHash(2)],
        ..Booking::new(BookingId(id), WorkerSlot(slot), 0)
    })
}

/// A sidecar with the workers 1 and 2, that knows others by their addresses.
async fn with_peers(own: u16, peers: &[u16]) -> Sidecar {
    let peers: Vec<String> = peers.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    let workers = "workers: [{id: 1, model: tiny, endpoint: \"127.0.0.1:9\"}, \
                   {id: 2, model: tiny, endpoint: \"127.0.0.1:10\"}]";
    let rest = format!(
        "{workers}\nrouter: {{router_replica_sync: true}}\n\
         replicas: {{listen: \"127.0.0.1:{own}\", peers: {peers:?}}}"
    );
    let sidecar = Sidecar::start(config(0, &rest)).await.unwrap();
    eventually("the workers are known", || async {
        state(&sidecar).await["workers"].as_array().is_some_and(|workers| workers.len() == 2)
    })
    .await;
    sidecar
}

pub(crate) async fn slot_of(sidecar: &Sidecar, worker: u64) -> u16 {
    let state = state(sidecar).await;
    let found = state["workers"].as_array().unwrap().iter().find(|it| it["id"] == worker).unwrap();
    found["slot"].as_u64().unwrap().try_into().unwrap()
}

/// Goal: what one gateway books counts for the others until it ends; a newcomer
/// knows of it at once, and a sidecar that dies takes it along.
#[tokio::test]
async fn sidecars_tell_each_other() {
    let ports = [0; 3].map(|_| free_port().unwrap());
    let one = with_peers(ports[0], &ports).await;
    let two = with_peers(ports[1], &ports).await;
    let (a, mut b) = (Gateway::attach(&one, 5).await, Gateway::attach(&two, 6).await);
    let (here, there) = (slot_of(&one, 2).await, slot_of(&two, 2).await);
    // Until both listen to each other nothing is heard; then the account is.
    a.say(LIST, &[booking(1, here)]).await;
    b.sees(there, (1, 40, 2)).await;
    a.say(CHANGE, &[booking(2, here), Entry::PrefillDone(BookingId(1))]).await;
    b.sees(there, (2, 40, 2)).await;
    // A newcomer.
    let three = with_peers(ports[2], &ports).await;
    let mut c = Gateway::attach(&three, 7).await;
    c.sees(slot_of(&three, 2).await, (2, 40, 2)).await;
    eventually("the state page says so", || async {
        let state = state(&three).await;
        let workers = state["workers"].as_array().unwrap();
        let sum = workers.iter().map(|it| it["remote_bookings"].as_u64().unwrap()).sum::<u64>();
        (sum, state["replicas"]["bookings"]["remote"].as_u64()) == (2, Some(2))
    })
    .await;
    a.say(CHANGE, &[Entry::Freed(BookingId(1))]).await;
    b.sees(there, (1, 40, 2)).await;
    // A filter that starts late, and one that takes a snapshot, know it, too.
    let mut late = Gateway::attach(&two, 8).await;
    late.sees(there, (1, 40, 2)).await;
    // Another leader of the same gateway begins with a list.
    drop(a);
    let a = Gateway::attach(&one, 5).await;
    a.say(LIST, &[booking(3, here)]).await;
    b.sees(there, (1, 40, 2)).await;
    eventually("the first list is over", || async {
        state(&one).await["replicas"]["bookings"]["own"] == 1
    })
    .await;
    drop(a);
    one.stop().await;
    b.sees(there, (0, 0, 0)).await;
    // Another life of it, to which the same gateway says the same.
    let one = with_peers(ports[0], &ports).await;
    let a = Gateway::attach(&one, 5).await;
    a.say(LIST, &[booking(3, slot_of(&one, 2).await)]).await;
    b.sees(there, (1, 40, 2)).await;
    // Another life of the gateway, which knows nothing of the first.
    drop(a);
    let a = Gateway::attach(&one, 9).await;
    a.say(LIST, &[]).await;
    b.sees(there, (0, 0, 0)).await;
    assert!(b.ids.iter().all(|id| id.is_remote()));
}

/// Goal: a snapshot reader gets what there is.
#[tokio::test]
async fn a_snapshot_has_the_bookings_of_others() {
    let ports = [0; 2].map(|_| free_port().unwrap());
    let one = with_peers(ports[0], &ports).await;
    let two = with_peers(ports[1], &ports).await;
    let (a, mut b) = (Gateway::attach(&one, 5).await, Gateway::attach(&two, 6).await);
    a.say(LIST, &[booking(1, slot_of(&one, 1).await)]).await;
    b.sees(slot_of(&two, 1).await, (1, 40, 2)).await;
    let mut reader = Filter::attach_silently(two.feed).await;
    let hello = warmpath_core::uplink::Hello {
        purpose: warmpath_core::uplink::Purpose::Snapshot,
        vm: 2,
        epoch: 0,
        sequence: 0,
        gateway: 6,
    };
    reader.say(Kind::Hello, &hello.encode()).await;
    reader.more(4).await;
    let got = reader.next_of(&[Kind::Remote, Kind::SnapshotEnd]).await;
    assert_eq!(got.kind, Kind::Remote);
    assert_eq!(Bookings::decode(&got.body).unwrap().entries.len(), 1);
}

/// Dynamo's file store with the records of two workers of two ranks.
struct Store {
    folder: tempfile::TempDir,
    touching: JoinHandle<()>,
}

impl Drop for Store {
    fn drop(&mut self) {
        self.touching.abort();
    }
}

impl Store {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let fixture = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/fixtures/dynamo-1.6.1-discovery-file-agg-dp2.json"
        );
        let fixture: Value =
            serde_json::from_str(&std::fs::read_to_string(fixture).unwrap()).unwrap();
        let files: BTreeMap<String, Value> =
            serde_json::from_value(fixture["files"].clone()).unwrap();
        let mut kept = Vec::new();
        for (name, value) in files {
            // The workers of the capture publish no more.
            if name.contains("event") {
                continue;
            }
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, value.to_string()).unwrap();
            kept.push(path);
        }
        assert!(!kept.is_empty());
        // As the workers' processes would: what nobody touches counts as gone.
        let touching = tokio::spawn(async move {
            loop {
                for path in &kept {
                    let file = std::fs::File::open(path).unwrap();
                    file.set_modified(SystemTime::now()).unwrap();
                }
                sleep(Duration::from_secs(1)).await;
            }
        });
        Self { folder, touching }
    }

    fn channels(&self) -> PathBuf {
        self.folder.path().join("v1/event_channels")
    }

    /// The records of publishers on a topic.
    fn records(&self, topic: Topic) -> Vec<Value> {
        let Ok(entries) = std::fs::read_dir(self.channels()) else { return Vec::new() };
        entries
            .map(|entry| entry.unwrap().path())
            .filter(|path| !path.file_name().unwrap().to_string_lossy().starts_with(".tmp_"))
            .filter_map(|path| {
                serde_json::from_str::<Value>(&std::fs::read_to_string(path).ok()?).ok()
            })
            .filter(|value| value["topic"] == topic.name())
            .collect()
    }

    async fn sidecar(&self) -> Sidecar {
        let text = format!(
            "feed: {{listen: \"127.0.0.1:0\"}}\nstatus: {{listen: \"127.0.0.1:0\"}}\n\
             sync: {{deadline_ms: 0}}\nrouter: {{router_replica_sync: true}}\n\
             discovery: {{backend: file, directory: {:?}, namespace: dynamo, frontend: {{none: true}}}}\n",
            self.folder.path()
        );
        let config = Config::parse(&text, Path::new("."), &Default::default()).unwrap();
        let sidecar = Sidecar::start(config).await.unwrap();
        eventually("the workers are known", || async {
            state(&sidecar).await["workers"].as_array().is_some_and(|workers| workers.len() == 2)
        })
        .await;
        sidecar
    }
}

/// A router that is none of ours: what it says, over another implementation of
/// ZeroMQ.
struct Router {
    socket: PubSocket,
    record: PathBuf,
    sequence: u64,
}

const ROUTER: u64 = 4_242;

impl Router {
    async fn start(store: &Store) -> Self {
        let mut socket = PubSocket::new();
        let endpoint = socket.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
        std::fs::create_dir_all(store.channels()).unwrap();
        let name = format!(
            "namespace%2Fdynamo%2Fcomponent%2Fbackend%2Fendpoint%2Fgenerate%2Ftopic%2F\
             active%5Fsequences%5Fevents%2F{ROUTER:x}"
        );
        let record = store.channels().join(name);
        let value = json!({
            "type": "EventChannel",
            "scope": {"kind": "endpoint", "endpoint": {"namespace": "dynamo", "component": "backend", "name": "generate"}},
            "topic": "active_sequences_events",
            "instance_id": ROUTER,
            "transport": {"kind": "Zmq", "config": {"endpoint": endpoint}},
        });
        std::fs::write(&record, value.to_string()).unwrap();
        Self { socket, record, sequence: 0 }
    }

    async fn say(&mut self, request: &str, worker: Worker, step: Step) {
        let event =
            SequenceEvent { request: request.to_owned(), worker, router: 99, lora: None, step };
        // What nobody touches counts as gone.
        let record = std::fs::File::open(&self.record).unwrap();
        record.set_modified(SystemTime::now()).unwrap();
        let topic = Topic::ActiveSequences;
        let payload = encode_events(&[event]).into();
        let message = Message { publisher: ROUTER, sequence: self.sequence, payload };
        self.sequence += 1;
        let envelope = encode_envelope(&message, topic, 0);
        let [first, rest @ ..] = encode_frames(&message, topic.name(), &envelope);
        let mut message = ZmqMessage::from(first);
        rest.into_iter().for_each(|frame| message.push_back(frame));
        self.socket.send(message).await.unwrap();
    }
}

/// Goal: in Dynamo's own discovery and on its own event plane we are one router
/// among others: found by our record, read by whoever reads Dynamo's routers, and
/// we read theirs, until their record goes.
#[tokio::test]
async fn we_are_one_router_among_others() {
    let store = Store::new();
    let sidecar = store.sidecar().await;
    eventually("we are on record", || async {
        store.records(Topic::ActiveSequences).len() == 1
            && store.records(Topic::Accounts).len() == 1
    })
    .await;
    let record = store.records(Topic::ActiveSequences).remove(0);
    let mut theirs = SubSocket::new();
    theirs.connect(record["transport"]["config"]["endpoint"].as_str().unwrap()).await.unwrap();
    theirs.subscribe("active_sequences_events").await.unwrap();

    let mut gateway = Gateway::attach(&sidecar, 5).await;
    let workers = state(&sidecar).await["workers"].clone();
    let number = |name: &str| workers[0][name].as_u64().unwrap();
    let slot = u16::try_from(number("slot")).unwrap();
    let rank = DpRank(u32::try_from(number("rank")).unwrap());
    let worker = Worker { id: WorkerId(number("id")), rank };
    // Until the subscription has arrived nothing is heard.
    let mut next = 0;
    let first: Vec<Bytes> = timeout(PATIENCE, async {
        loop {
            next += 1;
            gateway.say(CHANGE, &[booking(next, slot)]).await;
            let heard = timeout(Duration::from_millis(50), theirs.recv()).await;
            if let Ok(message) = heard {
                return message.unwrap().into_vec();
            }
        }
    })
    .await
    .unwrap();
    let topic = Topic::ActiveSequences;
    let message = decode_frames(&first, topic.name(), topic).unwrap();
    assert_eq!(Some(message.publisher), record["instance_id"].as_u64());
    let events = decode_sequences(&message.payload).unwrap();
    assert_eq!(
        (events[0].worker, events[0].router),
        (worker, state(&sidecar).await["replicas"]["router"].as_u64().unwrap())
    );
    assert!(matches!(&events[0].step, Step::Added(added) if added.prefill_tokens == Some(40)));

    let mut router = Router::start(&store).await;
    let added = || {
        Step::Added(Added {
            blocks: Some(vec![SequenceHash(7); 1]),
            tracks_prefill: true,
            expected_output_tokens: None,
            prefill_tokens: Some(12),
        })
    };
    let mut said = 0;
    timeout(PATIENCE, async {
        while gateway.remote.bookings() == 0 {
            said += 1;
            router.say(&format!("r{said}"), worker, added()).await;
            let _ = timeout(Duration::from_millis(50), gateway.next()).await;
        }
    })
    .await
    .unwrap();
    // All that it says from here on is heard, in order.
    for request in 1..=said {
        router.say(&format!("r{request}"), worker, Step::Freed).await;
    }
    gateway.sees(slot, (0, 0, 0)).await;
    router.say("marked", worker, added()).await;
    router.say("marked", worker, Step::PrefillCompleted).await;
    router.say("other", worker, added()).await;
    gateway.sees(slot, (2, 12, 1)).await;
    // Its record goes, and it with it.
    std::fs::remove_file(&router.record).unwrap();
    gateway.sees(slot, (0, 0, 0)).await;
    sidecar.stop().await;
    assert!(store.records(Topic::ActiveSequences).is_empty(), "we take our record away");
}
