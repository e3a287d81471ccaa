//! Publisher: event batches to subscribers, live and on request.
//!
//! As vLLM's: a PUB socket sends `[topic, sequence number, payload]`, the number
//! as eight bytes big endian, counting from 0 per process; a ROUTER socket
//! answers `["", start]` with every kept batch from `start` on and then an end
//! marker. SGLang's replay messages have no topic frame.
//!
//! One task owns both sockets, so replay and live delivery never overtake each
//! other. Fault switches let a test drop, withhold or restart the stream.
//!
//! # Invariants
//!
//! 1. A number is given to a batch when it is handed in, in order, so that the
//!    state of the cache and the position of its stream are known together.
//! 2. Every numbered batch is either sent live, withheld, dropped by a switch,
//!    or counted as overflowed. Whatever was not overflowed can be replayed
//!    while it is among the last `buffer_steps`.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqError, ZmqMessage};

use super::limits::{EVENT_QUEUE_BATCHES, HELD_BATCHES_MAX, REPLAY_SEND_MS_MAX};

/// Payload of the message that ends a replay: none. Its number is all ones.
const END_SEQUENCE: [u8; 8] = [0xff; 8];

/// Where and how to publish.
#[derive(Clone, Debug)]
pub struct PublisherConfig {
    /// PUB port on 127.0.0.1; 0 for any.
    pub events_port: u16,
    /// ROUTER port on 127.0.0.1; 0 for any.
    pub replay_port: u16,
    /// First frame of live messages.
    pub topic: String,
    /// Batches kept for replay.
    pub buffer_steps: usize,
    /// Whether replay messages carry the topic (vLLM) or not (SGLang).
    pub replay_has_topic: bool,
}

/// A change to how batches are delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Do not send every `n`th batch live; 0 sends all.
    DropEvery(u64),
    /// Withhold batches (`true`), or send what was withheld and go on.
    Pause(bool),
}

enum Command {
    Batch { sequence: u64, payload: Vec<u8> },
    Fault(Fault),
    Restart { done: oneshot::Sender<Result<(), ZmqError>> },
}

/// What happened to batches since the start.
#[derive(Debug, Default)]
pub struct PublisherCounters {
    /// Sent live.
    pub sent: AtomicU64,
    /// Not sent live because of a switch.
    pub dropped: AtomicU64,
    /// Lost because the queue to the socket was full.
    pub overflowed: AtomicU64,
    /// Sent again on request.
    pub replayed: AtomicU64,
}

/// Handle to the publishing task.
#[derive(Debug)]
pub struct Publisher {
    /// Number of the next batch, and the way to the socket: one lock, so that
    /// numbers enter the queue in order.
    state: Mutex<(u64, mpsc::Sender<Command>)>,
    counters: Arc<PublisherCounters>,
    /// PUB port in use.
    pub events_port: u16,
    /// ROUTER port in use.
    pub replay_port: u16,
}

impl Publisher {
    /// Binds both sockets and starts the task.
    ///
    /// # Errors
    ///
    /// [`ZmqError`] if a port cannot be bound.
    pub async fn start(mut config: PublisherConfig) -> Result<Self, ZmqError> {
        let sockets = Sockets::bind(&mut config).await?;
        let (events_port, replay_port) = (config.events_port, config.replay_port);
        let counters = Arc::new(PublisherCounters::default());
        let (sender, receiver) = mpsc::channel(EVENT_QUEUE_BATCHES);
        let task = Task {
            config,
            counters: Arc::clone(&counters),
            kept: VecDeque::new(),
            held: VecDeque::new(),
            paused: false,
            drop_every: 0,
        };
        tokio::spawn(task.run(sockets, receiver));
        Ok(Self { state: Mutex::new((0, sender)), counters, events_port, replay_port })
    }

    /// Hands in a batch. Never waits.
    pub fn publish(&self, payload: Vec<u8>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let sequence = state.0;
        state.0 += 1;
        if state.1.try_send(Command::Batch { sequence, payload }).is_err() {
            self.counters.overflowed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Number that the next batch will have; also, how many there have been
    /// since the stream was started.
    #[must_use]
    pub fn next_sequence(&self) -> u64 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// What happened to batches.
    #[must_use]
    pub fn counters(&self) -> &PublisherCounters {
        &self.counters
    }

    /// Changes delivery, for batches handed in from now on.
    pub async fn set(&self, fault: Fault) {
        let sender = self.sender();
        // The task lives as long as the handle, so this cannot fail.
        let _sent = sender.send(Command::Fault(fault)).await;
    }

    /// Restarts the stream on the same ports: connections are cut, numbers
    /// begin at 0 again, nothing older can be replayed.
    ///
    /// # Errors
    ///
    /// [`ZmqError`] if a port could not be bound again.
    pub async fn restart(&self) -> Result<(), ZmqError> {
        let (done, finished) = oneshot::channel();
        let permit = self.sender().reserve_owned().await;
        {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if let Ok(permit) = permit {
                permit.send(Command::Restart { done });
            }
            state.0 = 0;
        }
        finished.await.unwrap_or(Err(ZmqError::Other("the publisher has ended")))
    }

    fn sender(&self) -> mpsc::Sender<Command> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }
}

/// The two sockets.
struct Sockets {
    events: PubSocket,
    replay: RouterSocket,
}

impl Sockets {
    /// Binds, and writes the ports found into `config`.
    async fn bind(config: &mut PublisherConfig) -> Result<Self, ZmqError> {
        let mut events = PubSocket::new();
        config.events_port = bind(&mut events, config.events_port).await?;
        let mut replay = RouterSocket::new();
        config.replay_port = bind(&mut replay, config.replay_port).await?;
        Ok(Self { events, replay })
    }
}

async fn bind(socket: &mut impl Socket, port: u16) -> Result<u16, ZmqError> {
    match socket.bind(&format!("tcp://127.0.0.1:{port}")).await? {
        zeromq::Endpoint::Tcp(_, port) => Ok(port),
        _ => Err(ZmqError::Other("not a TCP endpoint")),
    }
}

/// The task behind a [`Publisher`].
struct Task {
    config: PublisherConfig,
    counters: Arc<PublisherCounters>,
    /// Last `buffer_steps` batches.
    kept: VecDeque<(u64, Vec<u8>)>,
    /// Batches withheld by [`Fault::Pause`].
    held: VecDeque<(u64, Vec<u8>)>,
    paused: bool,
    drop_every: u64,
}

impl Task {
    async fn run(mut self, mut sockets: Sockets, mut commands: mpsc::Receiver<Command>) {
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Batch { sequence, payload }) => {
                        self.batch(&mut sockets, sequence, payload).await;
                    }
                    Some(Command::Fault(Fault::DropEvery(n))) => self.drop_every = n,
                    Some(Command::Fault(Fault::Pause(paused))) => {
                        self.paused = paused;
                        while !self.paused && let Some((sequence, payload)) = self.held.pop_front() {
                            self.send(&mut sockets, sequence, payload).await;
                        }
                    }
                    Some(Command::Restart { done }) => {
                        self.kept.clear();
                        self.held.clear();
                        drop(sockets.events.close().await);
                        drop(sockets.replay.close().await);
                        match Sockets::bind(&mut self.config).await {
                            Ok(bound) => {
                                sockets = bound;
                                let _waiting = done.send(Ok(()));
                            }
                            Err(error) => {
                                let _waiting = done.send(Err(error));
                                return;
                            }
                        }
                    }
                    None => return,
                },
                request = sockets.replay.recv() => {
                    if let Ok(request) = request {
                        self.replay(&mut sockets.replay, &request).await;
                    }
                }
            }
        }
    }

    async fn batch(&mut self, sockets: &mut Sockets, sequence: u64, payload: Vec<u8>) {
        self.kept.push_back((sequence, payload.clone()));
        while self.kept.len() > self.config.buffer_steps {
            self.kept.pop_front();
        }
        let dropped = self.drop_every > 0 && (sequence + 1).is_multiple_of(self.drop_every);
        if dropped || (self.paused && self.held.len() >= HELD_BATCHES_MAX) {
            self.counters.dropped.fetch_add(1, Ordering::Relaxed);
        } else if self.paused {
            self.held.push_back((sequence, payload));
        } else {
            self.send(sockets, sequence, payload).await;
        }
    }

    async fn send(&mut self, sockets: &mut Sockets, sequence: u64, payload: Vec<u8>) {
        let message = frames(vec![
            self.config.topic.clone().into_bytes(),
            sequence.to_be_bytes().to_vec(),
            payload,
        ]);
        if sockets.events.send(message).await.is_ok() {
            self.counters.sent.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Answers one request. A request in any other shape gets no answer, as
    /// with vLLM.
    async fn replay(&mut self, socket: &mut RouterSocket, request: &ZmqMessage) {
        let parts: Vec<&[u8]> = request.iter().map(AsRef::as_ref).collect();
        let [client, [], start] = parts.as_slice() else {
            return;
        };
        let Ok(start) = <[u8; 8]>::try_from(*start).map(u64::from_be_bytes) else {
            return;
        };
        let topic = self.config.replay_has_topic.then(|| self.config.topic.clone().into_bytes());
        let end_topic = self.config.replay_has_topic.then(Vec::new);
        let reply = |topic: Option<Vec<u8>>, sequence: [u8; 8], payload: Vec<u8>| {
            let head = [client.to_vec(), Vec::new()];
            let tail = [sequence.to_vec(), payload];
            frames(head.into_iter().chain(topic).chain(tail).collect())
        };
        for (sequence, payload) in self.kept.iter().filter(|(sequence, _)| *sequence >= start) {
            let message = reply(topic.clone(), sequence.to_be_bytes(), payload.clone());
            if !send_in_time(socket, message).await {
                return;
            }
            self.counters.replayed.fetch_add(1, Ordering::Relaxed);
        }
        send_in_time(socket, reply(end_topic, END_SEQUENCE, Vec::new())).await;
    }
}

/// Whether the peer took the message before its time was up.
async fn send_in_time(socket: &mut RouterSocket, message: ZmqMessage) -> bool {
    let limit = Duration::from_millis(REPLAY_SEND_MS_MAX);
    matches!(tokio::time::timeout(limit, socket.send(message)).await, Ok(Ok(())))
}

fn frames(frames: Vec<Vec<u8>>) -> ZmqMessage {
    let mut frames = frames.into_iter();
    let mut message = ZmqMessage::from(frames.next().unwrap_or_default());
    for frame in frames {
        message.push_back(frame.into());
    }
    message
}

#[cfg(test)]
mod tests;
