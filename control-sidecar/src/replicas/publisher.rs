//! Publisher: our own messages on Dynamo's event plane, whatever carries them.
//!
//! Best effort, as everybody's there: nothing waits for a subscriber. What a
//! slow one has no room for is dropped for it alone, and counted; lists make up
//! for it later.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::adapter::plane::envelope::{Message, Topic, encode_envelope, encode_frames};
use crate::limits::{PUBLISHED_QUEUED, RECONNECT_PAUSE, SUBSCRIBERS_MAX};
use crate::metrics::Metrics;
use crate::source::plane::hub::{Hub, Task};
use crate::source::zmtp::{Connection, SocketKind, ZmtpError};

/// Publishes on one endpoint's topics.
#[derive(Debug)]
pub struct Publisher {
    id: u64,
    sequences: HashMap<Topic, u64>,
    way: Way,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
enum Way {
    /// Our own socket; frame 0 is the bare topic.
    Socket(Socket),
    /// Brokers; frame 0 is the subject.
    Brokers { peers: Arc<Peers>, subjects: HashMap<Topic, String>, _tasks: Vec<Task> },
    /// NATS; without frames.
    Nats { messages: mpsc::Sender<(String, Bytes)>, subjects: HashMap<Topic, String>, _task: Task },
}

/// Our own socket.
#[derive(Debug)]
struct Socket {
    address: SocketAddr,
    peers: Arc<Peers>,
    _task: Task,
}

/// Those who listen.
#[derive(Debug, Default)]
struct Peers {
    all: Mutex<HashMap<u64, mpsc::Sender<[Bytes; 4]>>>,
    /// Somebody has subscribed.
    arrived: Arc<Notify>,
}

impl Publisher {
    /// Binds a socket of our own.
    ///
    /// - `id`: the publisher's id, on record.
    /// - `arrived`: notified when somebody subscribes to our own topic.
    ///
    /// # Errors
    ///
    /// If the address cannot be bound.
    pub async fn bind(
        id: u64,
        listen: SocketAddr,
        arrived: Arc<Notify>,
        metrics: Arc<Metrics>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        let address = listener.local_addr()?;
        let peers = Arc::new(Peers { all: Mutex::default(), arrived });
        let work = accept(listener, Arc::clone(&peers), Arc::clone(&metrics));
        let task = Task(tokio::spawn(work).abort_handle());
        let way = Way::Socket(Socket { address, peers, _task: task });
        Ok(Self { id, sequences: HashMap::new(), way, metrics })
    }

    /// Connects to brokers, and keeps trying.
    #[must_use]
    pub fn brokers(
        id: u64,
        addresses: &[String],
        subjects: HashMap<Topic, String>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let peers = Arc::new(Peers::default());
        let start = |(number, address): (u64, &String)| {
            let (messages, queue) = mpsc::channel(PUBLISHED_QUEUED);
            peers.insert(number, messages);
            let work = follow_broker(address.clone(), queue, Arc::clone(&metrics));
            Task(tokio::spawn(work).abort_handle())
        };
        let tasks = (0..).zip(addresses).map(start).collect();
        let way = Way::Brokers { peers, subjects, _tasks: tasks };
        Self { id, sequences: HashMap::new(), way, metrics }
    }

    /// Publishes through the hub's connection to NATS.
    #[must_use]
    pub fn nats(
        id: u64,
        hub: Arc<Hub>,
        subjects: HashMap<Topic, String>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (messages, mut queue) = mpsc::channel::<(String, Bytes)>(PUBLISHED_QUEUED);
        let counted = Arc::clone(&metrics);
        let task = tokio::spawn(async move {
            while let Some((subject, envelope)) = queue.recv().await {
                if !hub.publish(subject, envelope).await {
                    counted.replica_dropped("not_published");
                }
            }
        });
        let way = Way::Nats { messages, subjects, _task: Task(task.abort_handle()) };
        Self { id, sequences: HashMap::new(), way, metrics }
    }

    /// The publisher's id.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Where our own socket is.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        match &self.way {
            Way::Socket(socket) => Some(socket.address),
            Way::Brokers { .. } | Way::Nats { .. } => None,
        }
    }

    /// Whether several events go into one message.
    #[must_use]
    pub fn batches(&self) -> bool {
        !matches!(self.way, Way::Nats { .. })
    }

    /// Publishes a payload.
    ///
    /// - `at_ms`: the time of day, in milliseconds since 1970.
    pub fn publish(&mut self, topic: Topic, payload: Vec<u8>, at_ms: u64) {
        let next = self.sequences.entry(topic).or_default();
        let message = Message { publisher: self.id, sequence: *next, payload: payload.into() };
        *next += 1;
        let envelope = encode_envelope(&message, topic, at_ms);
        let has_room = match &self.way {
            Way::Socket(socket) => {
                socket.peers.offer(&encode_frames(&message, topic.name(), &envelope))
            }
            Way::Brokers { peers, subjects, .. } => {
                let Some(subject) = subjects.get(&topic) else { return };
                peers.offer(&encode_frames(&message, subject, &envelope))
            }
            Way::Nats { messages, subjects, .. } => {
                let Some(subject) = subjects.get(&topic) else { return };
                messages.try_send((subject.clone(), envelope.into())).is_ok()
            }
        };
        if !has_room {
            self.metrics.replica_dropped("slow_subscriber");
        }
    }
}

impl Peers {
    fn insert(&self, number: u64, messages: mpsc::Sender<[Bytes; 4]>) -> bool {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let has_room = all.len() < SUBSCRIBERS_MAX;
        if has_room {
            all.insert(number, messages);
        }
        has_room
    }

    fn remove(&self, number: u64) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
    }

    /// Gives a message to everybody. Returns whether all had room.
    fn offer(&self, frames: &[Bytes; 4]) -> bool {
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.values().fold(true, |had, messages| {
            let full = matches!(
                messages.try_send(frames.clone()),
                Err(mpsc::error::TrySendError::Full(_))
            );
            had && !full
        })
    }
}

/// Takes subscribers until it is dropped.
async fn accept(listener: TcpListener, peers: Arc<Peers>, metrics: Arc<Metrics>) {
    let mut tasks = JoinSet::new();
    for number in 0.. {
        let Ok((stream, _)) = listener.accept().await else {
            sleep(RECONNECT_PAUSE.0).await;
            continue;
        };
        while tasks.try_join_next().is_some() {}
        let (messages, queue) = mpsc::channel(PUBLISHED_QUEUED);
        if !peers.insert(number, messages) {
            metrics.replica_dropped("too_many_subscribers");
            continue;
        }
        let peers = Arc::clone(&peers);
        tasks.spawn(async move {
            // A subscriber that leaves is nothing to count.
            let _ = serve(stream, queue, &peers).await;
            peers.remove(number);
        });
    }
}

/// What one subscriber wants to hear.
#[derive(Debug, Default)]
struct Wanted(Vec<Bytes>);

impl Wanted {
    /// Takes a message of a subscriber: 1 or 0, and the beginning of a topic.
    /// Returns whether our own topic has become wanted.
    fn hear(&mut self, frames: &[Bytes]) -> bool {
        let Some((kind, prefix)) = frames.first().and_then(|frame| frame.split_first()) else {
            return false;
        };
        let is_ours = Topic::Accounts.name().as_bytes().starts_with(prefix);
        let known = self.0.iter().position(|known| known.as_ref() == prefix);
        match (kind, known) {
            (1, None) if self.0.len() < SUBSCRIBERS_MAX => {
                self.0.push(Bytes::copy_from_slice(prefix));
                is_ours
            }
            (0, Some(at)) => {
                self.0.swap_remove(at);
                false
            }
            _ => false,
        }
    }

    fn has(&self, topic: &[u8]) -> bool {
        self.0.iter().any(|prefix| topic.starts_with(prefix))
    }
}

async fn serve(
    stream: TcpStream,
    mut queue: mpsc::Receiver<[Bytes; 4]>,
    peers: &Peers,
) -> Result<(), ZmtpError> {
    let mut connection = Connection::accept(stream, SocketKind::Pub).await?;
    let mut wanted = Wanted::default();
    loop {
        tokio::select! {
            frames = connection.receive() => {
                if wanted.hear(&frames?) {
                    peers.arrived.notify_one();
                }
            }
            message = queue.recv() => {
                let Some(message) = message else { return Ok(()) };
                if message.first().is_some_and(|topic| wanted.has(topic)) {
                    connection.send(&message).await?;
                }
            }
        }
    }
}

/// Publishes at a broker, over as many connections as it takes.
async fn follow_broker(
    address: String,
    mut queue: mpsc::Receiver<[Bytes; 4]>,
    metrics: Arc<Metrics>,
) {
    let mut pause = RECONNECT_PAUSE.0;
    loop {
        match Connection::open(&address, SocketKind::Pub).await {
            Ok(mut connection) => {
                pause = RECONNECT_PAUSE.0;
                match broker_session(&mut connection, &mut queue).await {
                    Ok(()) => return,
                    Err(error) => metrics.connection_failed(error.reason()),
                }
            }
            Err(error) => metrics.connection_failed(error.reason()),
        }
        sleep(pause).await;
        pause = (pause * 2).min(RECONNECT_PAUSE.1);
    }
}

/// One connection from its beginning to its end. `Ok` if there will be nothing
/// more to publish.
async fn broker_session(
    connection: &mut Connection,
    queue: &mut mpsc::Receiver<[Bytes; 4]>,
) -> Result<(), ZmtpError> {
    loop {
        tokio::select! {
            // What its subscribers want; it sorts that out itself.
            frames = connection.receive() => drop(frames?),
            message = queue.recv() => {
                let Some(message) = message else { return Ok(()) };
                connection.send(&message).await?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subscriptions_are_prefixes() {
        let mut wanted = Wanted::default();
        let said = |bytes: &'static [u8]| vec![Bytes::from_static(bytes)];
        assert!(!wanted.has(b"active_sequences_events"));
        assert!(!wanted.hear(&said(b"\x01active")));
        assert!(wanted.hear(&said(b"\x01warmpath_sequences")));
        assert!(!wanted.hear(&said(b"\x01warmpath_sequences")), "once");
        assert!(wanted.has(b"active_sequences_events") && wanted.has(b"warmpath_sequences"));
        assert!(!wanted.hear(&said(b"\x00active")));
        assert!(!wanted.has(b"active_sequences_events"));
        assert!(!wanted.hear(&[]) && !wanted.hear(&said(b"")) && !wanted.hear(&said(b"\x07x")));
        assert!(Wanted::default().hear(&said(b"\x01")), "everything is ours, too");
    }
}
