//! A stand-in for one Dynamo worker: its relay's publisher on the event plane,
//! over each transport, and its endpoint for queries of history.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use warmpath_sidecar::config::discovery::EventPlane;
use warmpath_sidecar::fleet::{Channel, RecoveryTarget};
use zeromq::{PubSocket, Socket, SocketSend, ZmqMessage};

/// The subject of the stand-in's events.
const SUBJECT: &str = "namespace.ns.component.backend.endpoint.generate.kv-events";

/// What carries messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carrier {
    Direct,
    Brokers,
    Nats,
}

enum Sockets {
    Direct(PubSocket),
    /// Two, which each say everything.
    Brokers(PubSocket, PubSocket),
    Nats(NatsServer),
}

/// One change of the stand-in's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// A prompt's first block, whose engine hash is its block hash.
    Stored(u64),
    Removed(u64),
    Cleared,
}

/// What the worker knows of its own cache.
#[derive(Debug, Default)]
struct Known {
    said: Vec<Said>,
    held: BTreeSet<u64>,
    /// The oldest events that are not in the ring any more.
    forgotten: usize,
    /// Queries so far, by their starts.
    queries: Vec<Option<u64>>,
}

/// The stand-in.
pub(crate) struct Relay {
    sockets: Sockets,
    known: Arc<Mutex<Known>>,
    sequence: u64,
    pub(crate) worker: u64,
    pub(crate) publisher: u64,
    pub(crate) plane: EventPlane,
    pub(crate) channel: Channel,
    pub(crate) recovery: RecoveryTarget,
    answers: JoinHandle<()>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.answers.abort();
    }
}

impl Relay {
    pub(crate) async fn start(carrier: Carrier) -> Self {
        let (worker, publisher) = (77, 5);
        let mut one = PubSocket::new();
        let address = bind(&mut one).await;
        let subject = Channel::Subject(SUBJECT.to_owned());
        let (sockets, plane, channel) = match carrier {
            Carrier::Direct => (Sockets::Direct(one), EventPlane::Zmq, Channel::Direct(address)),
            Carrier::Brokers => {
                let mut two = PubSocket::new();
                let addresses = vec![address, bind(&mut two).await];
                (Sockets::Brokers(one, two), EventPlane::Broker(addresses), subject)
            }
            Carrier::Nats => {
                let server = NatsServer::start().await;
                let url = format!("nats://{}", server.address);
                (Sockets::Nats(server), EventPlane::Nats(vec![url]), subject)
            }
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let known = Arc::new(Mutex::new(Known::default()));
        let answers = tokio::spawn(answer_all(listener, Arc::clone(&known), worker));
        let recovery = RecoveryTarget { address, path: "4d/ns/backend/query_5".to_owned() };
        Self { sockets, known, sequence: 0, worker, publisher, plane, channel, recovery, answers }
    }

    /// What the cache holds.
    pub(crate) fn held(&self) -> BTreeSet<u64> {
        self.known.lock().unwrap().held.clone()
    }

    /// The starts of the queries so far.
    pub(crate) fn queries(&self) -> Vec<Option<u64>> {
        self.known.lock().unwrap().queries.clone()
    }

    /// Forgets all events so far, as a full ring does.
    pub(crate) fn forget(&self) {
        let mut known = self.known.lock().unwrap();
        known.forgotten = known.said.len();
    }

    /// Changes the cache without a message. Returns the event.
    pub(crate) fn lose(&mut self, said: Said) -> Vec<u8> {
        let mut known = self.known.lock().unwrap();
        known.said.push(said);
        match said {
            Said::Stored(block) => {
                known.held.insert(block);
            }
            Said::Removed(block) => {
                known.held.remove(&block);
            }
            Said::Cleared => known.held.clear(),
        }
        event(self.worker, known.said.len() as u64, said)
    }

    /// Changes the cache and says so.
    pub(crate) async fn publish(&mut self, said: Said) {
        let event = self.lose(said);
        let publisher = self.publisher;
        self.send(publisher, &batch(&[event])).await;
    }

    /// Sends a payload under any publisher's name.
    pub(crate) async fn send(&mut self, publisher: u64, payload: &[u8]) {
        let envelope = envelope(publisher, self.sequence, payload);
        let sequence = self.sequence;
        self.sequence += 1;
        match &mut self.sockets {
            Sockets::Direct(socket) => {
                let message = frames("kv-events", publisher, sequence, &envelope);
                socket.send(message).await.unwrap();
            }
            Sockets::Brokers(one, two) => {
                for socket in [one, two] {
                    let message = frames(SUBJECT, publisher, sequence, &envelope);
                    socket.send(message).await.unwrap();
                }
            }
            Sockets::Nats(server) => server.publish(SUBJECT, &envelope),
        }
    }

    /// Ends all connections to the server of subjects.
    pub(crate) fn hang_up(&self) {
        if let Sockets::Nats(server) = &self.sockets {
            server.hang_up();
        }
    }
}

async fn bind(socket: &mut PubSocket) -> String {
    let endpoint = socket.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    endpoint.strip_prefix("tcp://").unwrap().to_owned()
}

fn frames(name: &str, publisher: u64, sequence: u64, envelope: &[u8]) -> ZmqMessage {
    let mut message = ZmqMessage::from(Bytes::copy_from_slice(name.as_bytes()));
    message.push_back(Bytes::copy_from_slice(&publisher.to_be_bytes()));
    message.push_back(Bytes::copy_from_slice(&sequence.to_be_bytes()));
    let mut frame = vec![1];
    frame.extend_from_slice(&u32::try_from(envelope.len()).unwrap().to_be_bytes());
    frame.extend_from_slice(envelope);
    message.push_back(frame.into());
    message
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    rmp::encode::write_str(bytes, text).unwrap();
}

fn number(bytes: &mut Vec<u8>, name: &str, value: u64) {
    text(bytes, name);
    rmp::encode::write_uint(bytes, value).unwrap();
}

fn map(bytes: &mut Vec<u8>, len: u32) {
    rmp::encode::write_map_len(bytes, len).unwrap();
}

fn list(bytes: &mut Vec<u8>, len: usize) {
    rmp::encode::write_array_len(bytes, u32::try_from(len).unwrap()).unwrap();
}

fn envelope(publisher: u64, sequence: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    map(&mut bytes, 5);
    number(&mut bytes, "publisher_id", publisher);
    number(&mut bytes, "sequence", sequence);
    number(&mut bytes, "published_at", 1_700_000_000_000);
    text(&mut bytes, "topic");
    text(&mut bytes, "kv-events");
    text(&mut bytes, "payload");
    rmp::encode::write_bin(&mut bytes, payload).unwrap();
    bytes
}

/// A message's payload: several events.
pub(crate) fn batch(events: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    list(&mut bytes, events.len());
    bytes.extend(events.iter().flatten());
    bytes
}

/// One event of rank 0 of a worker.
pub(crate) fn event(worker: u64, id: u64, said: Said) -> Vec<u8> {
    let mut bytes = Vec::new();
    map(&mut bytes, 3);
    number(&mut bytes, "worker_id", worker);
    text(&mut bytes, "storage_tier");
    text(&mut bytes, "device");
    text(&mut bytes, "event");
    map(&mut bytes, 3);
    number(&mut bytes, "event_id", id);
    text(&mut bytes, "data");
    match said {
        Said::Stored(block) => {
            map(&mut bytes, 1);
            text(&mut bytes, "stored");
            map(&mut bytes, 2);
            text(&mut bytes, "parent_hash");
            rmp::encode::write_nil(&mut bytes).unwrap();
            text(&mut bytes, "blocks");
            list(&mut bytes, 1);
            map(&mut bytes, 2);
            number(&mut bytes, "block_hash", block);
            number(&mut bytes, "tokens_hash", block);
        }
        Said::Removed(block) => {
            map(&mut bytes, 1);
            text(&mut bytes, "removed");
            map(&mut bytes, 1);
            text(&mut bytes, "block_hashes");
            list(&mut bytes, 1);
            rmp::encode::write_uint(&mut bytes, block).unwrap();
        }
        Said::Cleared => text(&mut bytes, "cleared"),
    }
    number(&mut bytes, "dp_rank", 0);
    bytes
}

async fn answer_all(listener: TcpListener, known: Arc<Mutex<Known>>, worker: u64) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let known = Arc::clone(&known);
        tokio::spawn(async move {
            // A sidecar that stops hangs up.
            let _ = answer(stream, &known, worker).await;
        });
    }
}

/// Reads a query as the request plane's server does, and calls back.
async fn answer(mut stream: TcpStream, known: &Mutex<Known>, worker: u64) -> std::io::Result<()> {
    for _ in 0..2 {
        let mut part = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut part).await?;
    }
    stream.read_u32().await?;
    let (header_len, body_len) = (stream.read_u64().await?, stream.read_u64().await?);
    stream.read_u64().await?;
    let mut header = vec![0; usize::try_from(header_len).unwrap()];
    stream.read_exact(&mut header).await?;
    let mut body = vec![0; usize::try_from(body_len).unwrap()];
    stream.read_exact(&mut body).await?;
    stream.write_all(&[0; 4]).await?;

    let header: Value = serde_json::from_slice(&header).unwrap();
    let info = header["connection_info"]["info"].as_str().unwrap();
    let info: Value = serde_json::from_str(info).unwrap();
    let mut call = TcpStream::connect(info["address"].as_str().unwrap()).await?;
    let hello = serde_json::json!({"subject": info["subject"], "stream_type": "response"});
    let data = answer_to(start_of(&body), &mut known.lock().unwrap(), worker);
    for (header, body) in [
        (hello.to_string(), Vec::new()),
        ("{\"error\":null}".to_owned(), Vec::new()),
        (String::new(), data),
        (String::new(), b"\x81\xaecomplete_final\xc3".to_vec()),
        ("\"sentinel\"".to_owned(), Vec::new()),
    ] {
        call.write_all(&(header.len() as u64).to_be_bytes()).await?;
        call.write_all(&(body.len() as u64).to_be_bytes()).await?;
        call.write_all(&[0; 8]).await?;
        call.write_all(header.as_bytes()).await?;
        call.write_all(&body).await?;
    }
    Ok(())
}

/// The query's `start_event_id`.
fn start_of(body: &[u8]) -> Option<u64> {
    let name = b"start_event_id";
    let at = body.windows(name.len()).position(|window| window == name).unwrap() + name.len();
    let mut value = &body[at..];
    rmp::decode::read_int(&mut value).ok()
}

fn answer_to(start: Option<u64>, known: &mut Known, worker: u64) -> Vec<u8> {
    known.queries.push(start);
    let last = known.said.len() as u64;
    let mut bytes = Vec::new();
    map(&mut bytes, 2);
    text(&mut bytes, "data");
    map(&mut bytes, 1);
    match start {
        Some(start) if start > last => {
            text(&mut bytes, "TooNew");
            map(&mut bytes, 1);
            number(&mut bytes, "newest_available", last);
        }
        Some(start) if start > known.forgotten as u64 => {
            text(&mut bytes, "Events");
            let numbered = (1_u64..).zip(&known.said).filter(|(id, _)| *id >= start);
            let events: Vec<_> = numbered.map(|(id, said)| event(worker, id, *said)).collect();
            account(&mut bytes, &events, last);
        }
        _ => {
            text(&mut bytes, "TreeDump");
            let stored = known.held.iter().map(|block| event(worker, 0, Said::Stored(*block)));
            account(&mut bytes, &stored.collect::<Vec<_>>(), last);
        }
    }
    text(&mut bytes, "complete_final");
    rmp::encode::write_bool(&mut bytes, false).unwrap();
    bytes
}

fn account(bytes: &mut Vec<u8>, events: &[Vec<u8>], last: u64) {
    map(bytes, 2);
    text(bytes, "events");
    bytes.extend(batch(events));
    number(bytes, "last_event_id", last);
}

/// As much of a NATS server as a subscriber needs.
struct NatsServer {
    address: String,
    messages: broadcast::Sender<Option<(String, Bytes)>>,
    task: JoinHandle<()>,
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl NatsServer {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (messages, _) = broadcast::channel(256);
        let sender = messages.clone();
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let messages = sender.subscribe();
                tokio::spawn(async move {
                    let _ = serve_nats(stream, messages).await;
                });
            }
        });
        Self { address, messages, task }
    }

    fn publish(&self, subject: &str, payload: &[u8]) {
        // Nobody may be connected.
        let _ = self.messages.send(Some((subject.to_owned(), Bytes::copy_from_slice(payload))));
    }

    fn hang_up(&self) {
        let _ = self.messages.send(None);
    }
}

async fn serve_nats(
    stream: TcpStream,
    mut messages: broadcast::Receiver<Option<(String, Bytes)>>,
) -> std::io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).lines();
    let info = "{\"server_id\":\"a\",\"server_name\":\"a\",\"version\":\"2.10.0\",\"proto\":1,\
                \"host\":\"127.0.0.1\",\"port\":4222,\"max_payload\":1048576}";
    writer.write_all(format!("INFO {info}\r\n").as_bytes()).await?;
    let mut subscriptions: Vec<(String, String)> = Vec::new();
    loop {
        tokio::select! {
            line = lines.next_line() => {
                let Some(line) = line? else { return Ok(()) };
                let words: Vec<&str> = line.split_ascii_whitespace().collect();
                match &words[..] {
                    ["PING"] => writer.write_all(b"PONG\r\n").await?,
                    ["SUB", subject, sid] => {
                        subscriptions.push(((*subject).to_owned(), (*sid).to_owned()));
                    }
                    _ => {}
                }
            }
            message = messages.recv() => {
                let Ok(Some((subject, payload))) = message else { return Ok(()) };
                for (_, sid) in subscriptions.iter().filter(|(wanted, _)| *wanted == subject) {
                    let head = format!("MSG {subject} {sid} {}\r\n", payload.len());
                    writer.write_all(head.as_bytes()).await?;
                    writer.write_all(&payload).await?;
                    writer.write_all(b"\r\n").await?;
                }
            }
        }
    }
}
