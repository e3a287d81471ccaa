//! What the loopback tests share: a publisher that speaks ZeroMQ through an
//! independent implementation, a filter that speaks gRPC, and an index by the
//! book.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;
use warmpath_core::delta::{Delta, Operation};
use warmpath_core::frame::{Frame, Kind};
use warmpath_core::hash::{BlockShape, Salt, sequence_hashes};
use warmpath_core::uplink::{FetchBlob, Hello, More, Purpose};
use warmpath_sidecar::config::{Config, Overrides};
use warmpath_sidecar::publish::service::{ATTACH, Down, Up};
use warmpath_sidecar::run::Sidecar;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

/// Longest wait for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Silence that shows that nothing is on its way. It cannot make a right sidecar
/// fail, only let a wrong one pass on a very slow machine.
const QUIET: Duration = Duration::from_millis(150);

/// Tokens of a block in these tests.
pub(crate) const BLOCK: u32 = 4;

/// Waits until something holds.
pub(crate) async fn eventually<F>(what: &str, mut holds: impl FnMut() -> F)
where
    F: Future<Output = bool>,
{
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < deadline, "never: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// How a publisher answers replays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReplayForm {
    /// As newer vLLM does: the topic before the number.
    WithTopic,
    /// As SGLang and older vLLM do.
    WithoutTopic,
    /// Not at all.
    Silent,
}

#[derive(Debug)]
struct History {
    messages: Vec<Bytes>,
    /// The oldest messages that a replay does not have any more.
    forgotten: usize,
}

/// An engine's publisher with its replay socket.
pub(crate) struct Publisher {
    socket: PubSocket,
    history: Arc<Mutex<History>>,
    pub(crate) events: u16,
    pub(crate) replay: u16,
    replays: JoinHandle<()>,
}

impl Publisher {
    pub(crate) async fn start(form: ReplayForm) -> Self {
        Self::start_at(form, 0, 0).await
    }

    /// Binds the given ports, or free ones for 0.
    pub(crate) async fn start_at(form: ReplayForm, events: u16, replay: u16) -> Self {
        let mut socket = PubSocket::new();
        let events = port(&bind(&mut socket, events).await);
        let mut router = RouterSocket::new();
        let replay = port(&bind(&mut router, replay).await);
        let history = Arc::new(Mutex::new(History { messages: Vec::new(), forgotten: 0 }));
        let replays = tokio::spawn(answer(router, Arc::clone(&history), form));
        Self { socket, history, events, replay, replays }
    }

    /// Keeps a message for replays without sending it.
    pub(crate) fn lose(&mut self, payload: &Bytes) -> u64 {
        let mut history = self.history.lock().unwrap();
        history.messages.push(payload.clone());
        history.messages.len() as u64 - 1
    }

    /// Publishes a message.
    pub(crate) async fn publish(&mut self, payload: Bytes) {
        let number = self.lose(&payload);
        let mut message = ZmqMessage::from(Bytes::from_static(b"kv-events"));
        message.push_back(Bytes::copy_from_slice(&number.to_be_bytes()));
        message.push_back(payload);
        self.socket.send(message).await.unwrap();
    }

    /// Forgets all messages so far, as a full ring does.
    pub(crate) fn forget(&self) {
        let mut history = self.history.lock().unwrap();
        history.forgotten = history.messages.len();
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.replays.abort();
    }
}

async fn bind<S: Socket>(socket: &mut S, port: u16) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match socket.bind(&format!("tcp://127.0.0.1:{port}")).await {
            Ok(endpoint) => return endpoint.to_string(),
            // The port's last user may not have let go of it yet.
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        sleep(Duration::from_millis(20)).await;
    }
}

fn port(endpoint: &str) -> u16 {
    endpoint.rsplit_once(':').unwrap().1.parse().unwrap()
}

async fn answer(mut router: RouterSocket, history: Arc<Mutex<History>>, form: ReplayForm) {
    while let Ok(request) = router.recv().await {
        let frames = request.into_vec();
        // Anything but `[client, "", start]` is ignored, as vLLM does.
        let [client, empty, start] = &frames[..] else { continue };
        if !empty.is_empty() || form == ReplayForm::Silent {
            continue;
        }
        let start = u64::from_be_bytes(start.as_ref().try_into().unwrap());
        let mut replies: Vec<(u64, Bytes)> = {
            let history = history.lock().unwrap();
            let numbered = (0_u64..).zip(history.messages.iter().cloned());
            let first = start.max(history.forgotten as u64);
            numbered.filter(|(number, _)| *number >= first).collect()
        };
        replies.push((u64::MAX, Bytes::new()));
        for (number, payload) in replies {
            let mut reply = ZmqMessage::from(client.clone());
            reply.push_back(Bytes::new());
            if form == ReplayForm::WithTopic {
                reply.push_back(Bytes::from_static(b"kv-events"));
            }
            reply.push_back(Bytes::copy_from_slice(&number.to_be_bytes()));
            reply.push_back(payload);
            if router.send(reply).await.is_err() {
                break;
            }
        }
    }
}

/// One batch as vLLM sends it, of events already encoded.
pub(crate) fn batch(events: &[Vec<u8>]) -> Bytes {
    let mut bytes = Vec::new();
    rmp::encode::write_array_len(&mut bytes, 3).unwrap();
    rmp::encode::write_f64(&mut bytes, 1.0).unwrap();
    rmp::encode::write_array_len(&mut bytes, events.len().try_into().unwrap()).unwrap();
    for event in events {
        bytes.extend_from_slice(event);
    }
    rmp::encode::write_sint(&mut bytes, 0).unwrap();
    bytes.into()
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    rmp::encode::write_str(bytes, text).unwrap();
}

fn numbers(bytes: &mut Vec<u8>, values: &[u64]) {
    rmp::encode::write_array_len(bytes, values.len().try_into().unwrap()).unwrap();
    for value in values {
        rmp::encode::write_uint(bytes, *value).unwrap();
    }
}

/// A stored event: blocks, parent, tokens.
pub(crate) fn stored(blocks: &[u64], parent: Option<u64>, tokens: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmp::encode::write_map_len(&mut bytes, 6).unwrap();
    text(&mut bytes, "type");
    text(&mut bytes, "BlockStored");
    text(&mut bytes, "block_hashes");
    numbers(&mut bytes, blocks);
    text(&mut bytes, "parent_block_hash");
    match parent {
        Some(parent) => {
            rmp::encode::write_uint(&mut bytes, parent).unwrap();
        }
        None => rmp::encode::write_nil(&mut bytes).unwrap(),
    }
    text(&mut bytes, "token_ids");
    numbers(&mut bytes, &tokens.iter().map(|token| u64::from(*token)).collect::<Vec<_>>());
    text(&mut bytes, "block_size");
    rmp::encode::write_uint(&mut bytes, u64::from(BLOCK)).unwrap();
    text(&mut bytes, "medium");
    text(&mut bytes, "GPU");
    bytes
}

/// A removed event.
pub(crate) fn removed(blocks: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmp::encode::write_map_len(&mut bytes, 2).unwrap();
    text(&mut bytes, "type");
    text(&mut bytes, "BlockRemoved");
    text(&mut bytes, "block_hashes");
    numbers(&mut bytes, blocks);
    bytes
}

/// A batch that stores one block of its own, a prompt's first.
pub(crate) fn one_block(number: u64) -> Bytes {
    batch(&[stored(&[number], None, &tokens_of(number))])
}

/// The tokens of that block.
pub(crate) fn tokens_of(number: u64) -> Vec<u32> {
    vec![u32::try_from(number).unwrap(); BLOCK as usize]
}

/// The sequence hashes of a prompt's blocks.
pub(crate) fn hashes(tokens: &[u32]) -> Vec<u64> {
    let mut out = Vec::new();
    let shape = BlockShape { block_size: BLOCK, eagle: false };
    sequence_hashes(tokens, shape, Salt::default(), &mut out);
    out.into_iter().map(|hash| hash.0).collect()
}

/// The hash of [`one_block`].
pub(crate) fn hash_of(number: u64) -> u64 {
    hashes(&tokens_of(number))[0]
}

/// Blocks by slot.
pub(crate) type Blocks = BTreeMap<u16, BTreeSet<u64>>;

/// Applies the body of a delta or snapshot part.
pub(crate) fn apply(blocks: &mut Blocks, body: &[u8]) {
    for group in Delta::decode(body).unwrap().groups() {
        let held = blocks.entry(group.slot.0).or_default();
        match group.operation {
            Operation::Stored => held.extend(group.hashes().map(|hash| hash.0)),
            Operation::Removed => {
                for hash in group.hashes() {
                    assert!(held.remove(&hash.0), "removed but not held");
                }
            }
            Operation::Cleared => held.clear(),
        }
    }
    blocks.retain(|_, held| !held.is_empty());
}

/// A frame that came down, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Got {
    pub(crate) kind: Kind,
    pub(crate) epoch: u64,
    pub(crate) sequence: u64,
    pub(crate) body: Vec<u8>,
}

/// One stream of a filter.
pub(crate) struct Filter {
    up: mpsc::Sender<Up>,
    down: Streaming<Down>,
}

impl Filter {
    pub(crate) async fn attach(
        feed: SocketAddr,
        purpose: Purpose,
        epoch: u64,
        sequence: u64,
    ) -> Self {
        let filter = Self::attach_silently(feed).await;
        let hello = Hello { purpose, vm: 1, epoch, sequence, gateway: 0 };
        filter.say(Kind::Hello, &hello.encode()).await;
        filter
    }

    /// Follows the log as a gateway that has a name.
    pub(crate) async fn attach_gateway(feed: SocketAddr, gateway: u64) -> Self {
        let filter = Self::attach_silently(feed).await;
        let hello = Hello { purpose: Purpose::Follow, vm: 1, epoch: 0, sequence: 0, gateway };
        filter.say(Kind::Hello, &hello.encode()).await;
        filter
    }

    /// Opens a stream and says nothing.
    pub(crate) async fn attach_silently(feed: SocketAddr) -> Self {
        let channel =
            Channel::from_shared(format!("http://{feed}")).unwrap().connect().await.unwrap();
        Self::over(channel, &[]).await.unwrap()
    }

    /// Opens a stream over a connection, with values of `authorization`.
    pub(crate) async fn over(channel: Channel, authorization: &[&str]) -> Result<Self, Status> {
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let (up, frames) = mpsc::channel(64);
        let codec = ProstCodec::<Up, Down>::default();
        let path = PathAndQuery::from_static(ATTACH);
        let mut request = Request::new(ReceiverStream::new(frames));
        for value in authorization {
            request.metadata_mut().append("authorization", value.parse().unwrap());
        }
        let down = client.streaming(request, path, codec).await?.into_inner();
        Ok(Self { up, down })
    }

    pub(crate) async fn say(&self, kind: Kind, body: &[u8]) {
        assert!(self.try_say(kind, body).await, "the stream goes on");
    }

    pub(crate) async fn try_say(&self, kind: Kind, body: &[u8]) -> bool {
        let frame = Frame { kind, epoch: 0, sequence: 0, body }.encode().into();
        self.up.send(Up { frame }).await.is_ok()
    }

    pub(crate) async fn more(&self, parts: u32) {
        self.say(Kind::More, &More { parts }.encode()).await;
    }

    pub(crate) async fn fetch(&self, wanted: FetchBlob) {
        self.say(Kind::FetchBlob, &wanted.encode()).await;
    }

    /// The next frame; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Result<Option<Got>, Status> {
        let down = timeout(PATIENCE, self.down.message()).await.expect("a frame in time")?;
        Ok(down.map(|down| {
            let frame = Frame::decode(&down.frame).unwrap();
            Got {
                kind: frame.kind,
                epoch: frame.epoch,
                sequence: frame.sequence,
                body: frame.body.to_vec(),
            }
        }))
    }

    /// The next frame that is of one of these kinds.
    pub(crate) async fn next_of(&mut self, kinds: &[Kind]) -> Got {
        loop {
            let got = self.next().await.unwrap().expect("the stream goes on");
            if kinds.contains(&got.kind) {
                return got;
            }
        }
    }

    /// Whether nothing comes for long enough that something on its way would.
    pub(crate) async fn is_silent(&mut self) -> bool {
        timeout(QUIET, self.down.message()).await.is_err()
    }

    /// Whether no frame of one kind comes for that long.
    pub(crate) async fn has_no(&mut self, kind: Kind) -> bool {
        let until = Instant::now() + QUIET;
        while let Ok(down) = tokio::time::timeout_at(until, self.down.message()).await {
            let frame = down.unwrap().unwrap().frame;
            if Frame::decode(&frame).unwrap().kind == kind {
                return false;
            }
        }
        true
    }

    /// Takes a whole snapshot; returns its position and blocks.
    pub(crate) async fn snapshot(feed: SocketAddr) -> (u64, Blocks) {
        let mut filter = Self::attach(feed, Purpose::Snapshot, 0, 0).await;
        filter.more(2).await;
        let start = filter.next().await.unwrap().unwrap();
        assert_eq!(start.kind, Kind::SnapshotStart);
        let mut blocks = Blocks::new();
        loop {
            let got = filter.next().await.unwrap().unwrap();
            assert_eq!((got.epoch, got.sequence), (start.epoch, start.sequence));
            match got.kind {
                Kind::SnapshotPart => {
                    apply(&mut blocks, &got.body);
                    // After the last part the stream may have ended.
                    let _ = filter.try_say(Kind::More, &More { parts: 1 }.encode()).await;
                }
                Kind::SnapshotEnd => break,
                other => panic!("{other:?}"),
            }
        }
        let announced = warmpath_core::delta::SnapshotStart::decode(&start.body).unwrap().blocks;
        assert_eq!(blocks.values().map(|held| held.len() as u64).sum::<u64>(), announced);
        assert_eq!(filter.next().await.unwrap(), None, "the stream ends");
        (start.sequence, blocks)
    }
}

/// What the one rank of a sidecar holds, as a snapshot shows it.
pub(crate) async fn held(sidecar: &Sidecar) -> BTreeSet<u64> {
    let (_, blocks) = Filter::snapshot(sidecar.feed).await;
    blocks.into_values().flatten().collect()
}

/// Path of the tiny model that the repository carries.
pub(crate) const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/tiny");

/// A sidecar's configuration; `rest` says where the workers are.
pub(crate) fn config(deadline_ms: u64, rest: &str) -> Config {
    let text = format!(
        "feed: {{listen: \"127.0.0.1:0\"}}\n\
         status: {{listen: \"127.0.0.1:0\"}}\n\
         sync: {{deadline_ms: {deadline_ms}}}\n\
         models: [{{name: tiny, directory: {MODEL:?}, block_size: {BLOCK}}}]\n\
         {rest}\n"
    );
    Config::parse(&text, std::path::Path::new("."), &Overrides::default()).unwrap()
}

/// One worker that publishes there.
pub(crate) fn worker(publisher: &Publisher, with_replay: bool) -> String {
    let replay = if with_replay {
        format!(", replay: \"tcp://127.0.0.1:{}\"", publisher.replay)
    } else {
        String::new()
    };
    format!(
        "workers: [{{id: 7, model: tiny, endpoint: \"127.0.0.1:9\", \
         kv_events: \"tcp://127.0.0.1:{}\"{replay}}}]",
        publisher.events
    )
}

/// Serves one page for Prometheus until the task is aborted; its address first.
pub(crate) async fn metrics_page(page: &'static str) -> (String, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/metrics", listener.local_addr().unwrap());
    let pages = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", page.len());
            let mut request = [0; 512];
            // The connection is kept for the next look, or ends with the test.
            while stream.read(&mut request).await.is_ok_and(|len| len > 0) {
                stream.write_all(head.as_bytes()).await.unwrap();
                stream.write_all(page.as_bytes()).await.unwrap();
            }
        }
    });
    (url, pages)
}

/// Gets a page of the status server: status and body.
pub(crate) async fn page(sidecar: &Sidecar, path: &str) -> (u16, String) {
    let mut stream = tokio::net::TcpStream::connect(sidecar.status).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// The state page.
pub(crate) async fn state(sidecar: &Sidecar) -> serde_json::Value {
    let (status, body) = page(sidecar, "/v1/state").await;
    assert_eq!(status, 200);
    serde_json::from_str(&body).unwrap()
}

/// Waits until the sidecar says it is ready.
pub(crate) async fn ready(sidecar: &Sidecar) {
    eventually("ready", || async { page(sidecar, "/readyz").await.0 == 200 }).await;
}

/// Waits until the one rank's source is connected and has nothing to ask.
pub(crate) async fn settled(sidecar: &Sidecar, engine_sequence: u64) {
    eventually("the message is applied", || async {
        let worker = &state(sidecar).await["workers"][0];
        worker["last_engine_sequence"].as_u64() == Some(engine_sequence)
            && worker["source"]["repairing"] == false
    })
    .await;
}
