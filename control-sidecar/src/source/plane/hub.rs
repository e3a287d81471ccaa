//! Hub: messages of Dynamo's event plane, whatever carries them.
//!
//! A publisher's own ZMQ socket has a connection of its own, which makes its
//! publisher wait, and in the end drop, when we are slow. A subject on NATS or
//! on the ZMQ brokers is subscribed to once and shared by everybody who listens
//! there: each has a bounded queue, and what does not fit is dropped for that
//! listener alone.
//!
//! # Terms
//!
//! - *channel*: where messages come from; see [`Channel`].
//! - *link*: whether a channel's subscription stands.
//!
//! # Invariants
//!
//! 1. A listener gets the messages of its publisher only, in the order in which
//!    they came, without those that the queue had no room for; of those it is
//!    told.
//! 2. A listener that is slow, or gone, holds up nobody else.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::sleep;

use super::subjects::{Registration, Subjects};
use crate::adapter::plane::envelope::{Message, Topic, decode_frames};
use crate::config::discovery::EventPlane;
use crate::fleet::Channel;
use crate::limits::{RECONNECT_PAUSE, STREAM_FRAMES_QUEUED};
use crate::metrics::Metrics;
use crate::source::zmtp::{Connection, ZmtpError};

/// Whether a channel's subscription stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Whether it stands now.
    pub connected: bool,
    /// How often it has come to stand; messages in between may be missing.
    pub connections: u64,
    /// Whether nobody listened at the publisher's address the last time.
    pub gone: bool,
    /// Last failure to connect or to stay connected.
    pub failure: Option<&'static str>,
}

impl Link {
    pub(super) fn up(&mut self) {
        *self =
            Self { connected: true, connections: self.connections + 1, gone: false, failure: None };
    }

    pub(super) fn down(&mut self, failure: &'static str, gone: bool) {
        self.connected = false;
        self.failure = Some(failure);
        self.gone = gone;
    }
}

/// Gives out subscriptions; one for the whole sidecar.
#[derive(Debug)]
pub struct Hub {
    subjects: Arc<Subjects>,
    metrics: Arc<Metrics>,
}

impl Hub {
    /// Connects to nothing yet.
    #[must_use]
    pub fn new(plane: EventPlane, metrics: Arc<Metrics>) -> Self {
        Self { subjects: Arc::new(Subjects::new(plane, Arc::clone(&metrics))), metrics }
    }

    /// Starts to listen to a channel, and keeps trying until the subscription is
    /// dropped.
    ///
    /// - `topic`: what is said there.
    /// - `publisher`: whose messages are wanted; `None` for everybody's.
    #[must_use]
    pub fn subscribe(
        &self,
        channel: &Channel,
        topic: Topic,
        publisher: Option<u64>,
    ) -> Subscription {
        match channel {
            Channel::Subject(subject) => self.subjects.subscribe(subject, topic, publisher),
            Channel::Direct(address) => {
                let (sender, messages) = mpsc::channel(STREAM_FRAMES_QUEUED);
                let (link, seen) = watch::channel(Link::default());
                let socket = Socket {
                    address: address.clone(),
                    topic,
                    publisher,
                    messages: sender,
                    metrics: Arc::clone(&self.metrics),
                };
                let task = Task(tokio::spawn(socket.follow(link)).abort_handle());
                Subscription::new(messages, seen, Queue::default(), Source::Socket(task))
            }
        }
    }
}

impl Hub {
    /// Publishes on NATS. Returns whether the client took it.
    ///
    /// - `subject`: where.
    /// - `envelope`: the message.
    pub async fn publish(&self, subject: String, envelope: Bytes) -> bool {
        self.subjects.publish(subject, envelope).await
    }
}

/// What a listener and its source share beside the queue.
#[derive(Clone, Debug, Default)]
pub(super) struct Queue {
    pub(super) bytes: Arc<AtomicUsize>,
    pub(super) lost: Arc<Notify>,
}

/// A task that ends with its owner.
#[derive(Debug)]
pub(crate) struct Task(pub(crate) AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What keeps a subscription going; dropping it ends it.
#[derive(Debug)]
#[expect(dead_code, reason = "held for their drops")]
pub(super) enum Source {
    Socket(Task),
    Subject(Registration),
}

/// What a listener hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// The subscription stands, or does not any more.
    Link(Link),
    /// Messages were dropped because the queue was full.
    Lost,
    /// A message.
    Message(Message),
}

/// One listener's end of a channel.
#[derive(Debug)]
pub struct Subscription {
    messages: mpsc::Receiver<Message>,
    link: watch::Receiver<Link>,
    queue: Queue,
    _source: Source,
}

impl Subscription {
    pub(super) fn new(
        messages: mpsc::Receiver<Message>,
        mut link: watch::Receiver<Link>,
        queue: Queue,
        source: Source,
    ) -> Self {
        // Others may have made the subscription stand long ago.
        link.mark_changed();
        Self { messages, link, queue, _source: source }
    }

    /// The next thing there is to hear; waits for ever if nothing comes. May be
    /// dropped and called again.
    pub async fn next(&mut self) -> Heard {
        tokio::select! {
            biased;
            Ok(()) = self.link.changed() => Heard::Link(*self.link.borrow_and_update()),
            () = self.queue.lost.notified() => Heard::Lost,
            Some(message) = self.messages.recv() => {
                self.queue.bytes.fetch_sub(message.payload.len(), Ordering::AcqRel);
                Heard::Message(message)
            }
            else => std::future::pending().await,
        }
    }
}

/// A publisher's own socket.
#[derive(Debug)]
struct Socket {
    address: String,
    topic: Topic,
    publisher: Option<u64>,
    messages: mpsc::Sender<Message>,
    metrics: Arc<Metrics>,
}

impl Socket {
    /// Follows the socket until nobody listens.
    async fn follow(self, link: watch::Sender<Link>) {
        let mut pause = RECONNECT_PAUSE.0;
        loop {
            let Err(error) = self.session(&link, &mut pause).await else { return };
            self.metrics.connection_failed(error.reason());
            let gone = matches!(error, ZmtpError::Refused);
            link.send_modify(|link| link.down(error.reason(), gone));
            sleep(pause).await;
            pause = (pause * 2).min(RECONNECT_PAUSE.1);
        }
    }

    /// One connection from its beginning to its end. `Ok` if nobody listens any
    /// more.
    async fn session(
        &self,
        link: &watch::Sender<Link>,
        pause: &mut Duration,
    ) -> Result<(), ZmtpError> {
        let name = self.topic.name();
        let mut connection = Connection::subscribe(&self.address, name).await?;
        *pause = RECONNECT_PAUSE.0;
        link.send_modify(Link::up);
        loop {
            let frames = connection.receive().await?;
            let message = match decode_frames(&frames, name, self.topic) {
                Ok(message) => message,
                Err(error) => {
                    self.metrics.plane_dropped(error.reason());
                    continue;
                }
            };
            if self.publisher.is_some_and(|publisher| publisher != message.publisher) {
                self.metrics.plane_dropped("other_publisher");
                continue;
            }
            if self.messages.send(message).await.is_err() {
                return Ok(());
            }
        }
    }
}
