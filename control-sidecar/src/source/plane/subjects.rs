//! Subjects: shared subscriptions on NATS or on the ZMQ brokers.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::{Client, ConnectOptions, Event};
use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OnceCell, mpsc, watch};
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::hub::{Link, Queue, Source, Subscription, Task};
use crate::adapter::plane::PlaneError;
use crate::adapter::plane::envelope::{Message, Topic, decode_envelope, decode_frames};
use crate::config::discovery::EventPlane;
use crate::limits::{
    BROKER_MESSAGES_REMEMBERED, CONNECT_TIMEOUT, NATS_MESSAGES_QUEUED, PLANE_BYTES_QUEUED,
    PLANE_MESSAGES_QUEUED, RECONNECT_PAUSE,
};
use crate::metrics::Metrics;
use crate::source::zmtp::{Connection, ZmtpError};

/// Every subject that somebody listens to.
#[derive(Debug)]
pub(super) struct Subjects {
    plane: EventPlane,
    metrics: Arc<Metrics>,
    nats: OnceCell<Client>,
    nats_link: watch::Sender<Link>,
    /// How often the NATS client has dropped messages.
    nats_lost: watch::Sender<u64>,
    open: Mutex<HashMap<String, Open>>,
}

/// A subject and the tasks that follow it.
#[derive(Debug)]
struct Open {
    subject: Arc<Subject>,
    _tasks: Vec<Task>,
}

/// A listener's place; dropping it gives it up.
#[derive(Debug)]
pub(super) struct Registration {
    subjects: Arc<Subjects>,
    subject: String,
    publisher: Option<u64>,
    number: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut open = lock(&self.subjects.open);
        let Some(entry) = open.get(&self.subject) else { return };
        if entry.subject.forget(self.publisher, self.number) {
            open.remove(&self.subject);
        }
    }
}

impl Subjects {
    pub(super) fn new(plane: EventPlane, metrics: Arc<Metrics>) -> Self {
        Self {
            plane,
            metrics,
            nats: OnceCell::new(),
            nats_link: watch::Sender::new(Link::default()),
            nats_lost: watch::Sender::new(0),
            open: Mutex::default(),
        }
    }

    pub(super) fn subscribe(
        self: &Arc<Self>,
        subject: &str,
        topic: Topic,
        publisher: Option<u64>,
    ) -> Subscription {
        let (messages, receiver) = mpsc::channel(PLANE_MESSAGES_QUEUED);
        let queue = Queue::default();
        let mut open = lock(&self.open);
        let entry = open.entry(subject.to_owned()).or_insert_with(|| {
            let subject = Arc::new(Subject::new(subject, topic, Arc::clone(&self.metrics)));
            Open { _tasks: self.follow(&subject), subject }
        });
        let number = entry.subject.listen(publisher, messages, queue.clone());
        let link = entry.subject.link.subscribe();
        let registration = Registration {
            subjects: Arc::clone(self),
            subject: subject.to_owned(),
            publisher,
            number,
        };
        Subscription::new(receiver, link, queue, Source::Subject(registration))
    }

    fn follow(self: &Arc<Self>, subject: &Arc<Subject>) -> Vec<Task> {
        match &self.plane {
            EventPlane::Zmq => {
                // Discovery names a subject where there can be none.
                subject.link.send_modify(|link| link.down("no_subjects", false));
                Vec::new()
            }
            EventPlane::Broker(addresses) => {
                let seen = Arc::new(Mutex::new(Seen::default()));
                let start = |address: &String| {
                    let broker = Broker {
                        address: address.clone(),
                        subject: Arc::clone(subject),
                        seen: Arc::clone(&seen),
                    };
                    Task(tokio::spawn(broker.follow()).abort_handle())
                };
                addresses.iter().map(start).collect()
            }
            EventPlane::Nats(servers) => {
                let work = Arc::clone(self).follow_nats(servers.clone(), Arc::clone(subject));
                vec![Task(tokio::spawn(work).abort_handle())]
            }
        }
    }

    /// The one client, which reconnects for ever by itself.
    async fn client(&self, servers: &[String]) -> Result<&Client, async_nats::ConnectError> {
        self.nats
            .get_or_try_init(|| {
                let (link, lost) = (self.nats_link.clone(), self.nats_lost.clone());
                let metrics = Arc::clone(&self.metrics);
                let noticed = move |event| {
                    notice(&event, &link, &lost, &metrics);
                    std::future::ready(())
                };
                ConnectOptions::new()
                    .name("warmpath-sidecar")
                    .retry_on_initial_connect()
                    .max_reconnects(None)
                    .connection_timeout(CONNECT_TIMEOUT)
                    .reconnect_delay_callback(reconnect_pause)
                    .subscription_capacity(NATS_MESSAGES_QUEUED)
                    .event_callback(noticed)
                    .connect(servers)
            })
            .await
    }

    /// Publishes on NATS. Returns whether the client took it.
    pub(super) async fn publish(&self, subject: String, envelope: Bytes) -> bool {
        let EventPlane::Nats(servers) = &self.plane else { return false };
        match self.client(servers).await {
            Ok(client) => client.publish(subject, envelope).await.is_ok(),
            Err(_) => false,
        }
    }

    async fn follow_nats(self: Arc<Self>, servers: Vec<String>, subject: Arc<Subject>) {
        loop {
            match self.client(&servers).await {
                Ok(client) => self.nats_session(client, &subject).await,
                Err(error) => {
                    warn!(%error, "the NATS client cannot be made");
                    subject.link.send_modify(|link| link.down("nats", false));
                }
            }
            sleep(RECONNECT_PAUSE.1).await;
        }
    }

    /// One subscription, over as many connections as it takes.
    async fn nats_session(&self, client: &Client, subject: &Subject) {
        let Ok(mut messages) = client.subscribe(subject.name.clone()).await else {
            subject.link.send_modify(|link| link.down("subject_refused", false));
            return;
        };
        let mut link = self.nats_link.subscribe();
        link.mark_changed();
        let mut lost = self.nats_lost.subscribe();
        loop {
            tokio::select! {
                message = messages.next() => match message {
                    Some(message) => {
                        subject.deliver(decode_envelope(&message.payload, subject.topic));
                    }
                    None => return,
                },
                Ok(()) = link.changed() => {
                    let now = *link.borrow_and_update();
                    if now.connected {
                        // What is asked for now is asked behind the subscription.
                        let _ = timeout(CONNECT_TIMEOUT, client.flush()).await;
                    }
                    subject.link.send_replace(now);
                }
                Ok(()) = lost.changed() => subject.lost(),
            }
        }
    }
}

/// Takes note of what befalls the connection to NATS.
fn notice(event: &Event, link: &watch::Sender<Link>, lost: &watch::Sender<u64>, metrics: &Metrics) {
    match event {
        Event::Connected => link.send_modify(Link::up),
        Event::Disconnected | Event::Closed => {
            metrics.connection_failed("nats");
            link.send_modify(|link| link.down("nats", false));
        }
        // Of which subject cannot be told, so all of them look.
        Event::SlowConsumer(_) => {
            metrics.plane_dropped("nats_overflow");
            lost.send_modify(|times| *times += 1);
        }
        Event::ClientError(_) | Event::ServerError(_) => metrics.connection_failed("nats_error"),
        _ => {}
    }
}

/// The pause before an attempt to reconnect, of which there were so many.
fn reconnect_pause(attempts: usize) -> Duration {
    let doublings = u32::try_from(attempts.min(8)).unwrap_or(8);
    RECONNECT_PAUSE.0.saturating_mul(1 << doublings).min(RECONNECT_PAUSE.1)
}

/// One subject and those who listen to it.
#[derive(Debug)]
struct Subject {
    name: String,
    topic: Topic,
    link: watch::Sender<Link>,
    listeners: Mutex<Listeners>,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct Listeners {
    next: u64,
    /// By the publisher that they listen to; `None` for all.
    by_publisher: HashMap<Option<u64>, Vec<Listener>>,
}

#[derive(Debug)]
struct Listener {
    number: u64,
    messages: mpsc::Sender<Message>,
    queue: Queue,
}

impl Subject {
    fn new(name: &str, topic: Topic, metrics: Arc<Metrics>) -> Self {
        let link = watch::Sender::new(Link::default());
        Self { name: name.to_owned(), topic, link, listeners: Mutex::default(), metrics }
    }

    fn listen(&self, publisher: Option<u64>, messages: mpsc::Sender<Message>, queue: Queue) -> u64 {
        let mut listeners = lock(&self.listeners);
        listeners.next += 1;
        let number = listeners.next;
        let listener = Listener { number, messages, queue };
        listeners.by_publisher.entry(publisher).or_default().push(listener);
        number
    }

    /// Gives up a listener's place. Returns whether nobody is left.
    fn forget(&self, publisher: Option<u64>, number: u64) -> bool {
        let mut listeners = lock(&self.listeners);
        if let Some(some) = listeners.by_publisher.get_mut(&publisher) {
            some.retain(|listener| listener.number != number);
            if some.is_empty() {
                listeners.by_publisher.remove(&publisher);
            }
        }
        listeners.by_publisher.is_empty()
    }

    /// Tells everybody that messages may have been dropped.
    fn lost(&self) {
        for listener in lock(&self.listeners).by_publisher.values().flatten() {
            listener.queue.lost.notify_one();
        }
    }

    /// Hands a message to everybody who listens to its publisher.
    fn deliver(&self, message: Result<Message, PlaneError>) {
        let message = match message {
            Ok(message) => message,
            Err(error) => return self.metrics.plane_dropped(error.reason()),
        };
        let listeners = lock(&self.listeners);
        let mut wanted = false;
        for publisher in [Some(message.publisher), None] {
            for listener in listeners.by_publisher.get(&publisher).into_iter().flatten() {
                wanted = true;
                if !listener.offer(&message) {
                    self.metrics.plane_dropped("overflow");
                    listener.queue.lost.notify_one();
                }
            }
        }
        if !wanted {
            self.metrics.plane_dropped("other_publisher");
        }
    }
}

impl Listener {
    /// Puts a message into the queue. Returns whether it had room.
    fn offer(&self, message: &Message) -> bool {
        let len = message.payload.len();
        let before = self.queue.bytes.fetch_add(len, Ordering::AcqRel);
        if before + len <= PLANE_BYTES_QUEUED || before == 0 {
            match self.messages.try_send(message.clone()) {
                Ok(()) => return true,
                // It is on its way out.
                Err(TrySendError::Closed(_)) => return true,
                Err(TrySendError::Full(_)) => {}
            }
        }
        self.queue.bytes.fetch_sub(len, Ordering::AcqRel);
        false
    }
}

/// One broker's copy of a subject.
struct Broker {
    address: String,
    subject: Arc<Subject>,
    seen: Arc<Mutex<Seen>>,
}

impl Broker {
    async fn follow(self) {
        let mut pause = RECONNECT_PAUSE.0;
        loop {
            let Err(error) = self.session(&mut pause).await;
            self.subject.metrics.connection_failed(error.reason());
            sleep(pause).await;
            pause = (pause * 2).min(RECONNECT_PAUSE.1);
        }
    }

    async fn session(&self, pause: &mut Duration) -> Result<std::convert::Infallible, ZmtpError> {
        let subject = &self.subject;
        let mut connection = match Connection::subscribe(&self.address, &subject.name).await {
            Ok(connection) => connection,
            Err(error) => {
                subject.link.send_if_modified(|link| {
                    link.failure = Some(error.reason());
                    !link.connected
                });
                return Err(error);
            }
        };
        *pause = RECONNECT_PAUSE.0;
        lock(&self.seen).brokers += 1;
        subject.link.send_modify(Link::up);
        let outcome = loop {
            match connection.receive().await {
                Ok(frames) => self.take(&frames),
                Err(error) => break error,
            }
        };
        let is_last = {
            let mut seen = lock(&self.seen);
            seen.brokers -= 1;
            seen.brokers == 0
        };
        if is_last {
            subject.link.send_modify(|link| link.down(outcome.reason(), false));
        }
        Err(outcome)
    }

    fn take(&self, frames: &[Bytes]) {
        let message = decode_frames(frames, &self.subject.name, self.subject.topic);
        if let Ok(message) = &message
            && !lock(&self.seen).insert((message.publisher, message.sequence))
        {
            return;
        }
        self.subject.deliver(message);
    }
}

/// Messages that have come from one broker already, the oldest first.
#[derive(Debug, Default)]
struct Seen {
    /// Brokers that are connected.
    brokers: usize,
    order: VecDeque<(u64, u64)>,
    known: HashSet<(u64, u64)>,
}

impl Seen {
    /// Returns whether the message is new.
    fn insert(&mut self, message: (u64, u64)) -> bool {
        if !self.known.insert(message) {
            return false;
        }
        self.order.push_back(message);
        if self.order.len() > BROKER_MESSAGES_REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        true
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::plane::hub::Heard;

    fn message(publisher: u64, sequence: u64, bytes: usize) -> Message {
        Message { publisher, sequence, payload: Bytes::from(vec![0; bytes]) }
    }

    fn subjects() -> (Arc<Subjects>, Arc<Metrics>) {
        let metrics = Arc::new(Metrics::new());
        (Arc::new(Subjects::new(EventPlane::Zmq, Arc::clone(&metrics))), metrics)
    }

    fn deliver(subjects: &Subjects, name: &str, message: Message) {
        let subject = Arc::clone(&lock(&subjects.open)[name].subject);
        subject.deliver(Ok(message));
    }

    #[tokio::test]
    async fn listeners_hear_their_publisher_only() {
        let (subjects, metrics) = subjects();
        let mut one = subjects.subscribe("a", Topic::KvEvents, Some(1));
        let mut two = subjects.subscribe("a", Topic::KvEvents, Some(2));
        let mut all = subjects.subscribe("a", Topic::KvEvents, None);
        for listener in [&mut one, &mut two, &mut all] {
            assert!(matches!(listener.next().await, Heard::Link(Link { connected: false, .. })));
        }
        for publisher in [1, 2, 3] {
            deliver(&subjects, "a", message(publisher, 0, 1));
        }
        assert_eq!(one.next().await, Heard::Message(message(1, 0, 1)));
        assert_eq!(two.next().await, Heard::Message(message(2, 0, 1)));
        for publisher in [1, 2, 3] {
            assert_eq!(all.next().await, Heard::Message(message(publisher, 0, 1)));
        }
        drop(all);
        deliver(&subjects, "a", message(3, 1, 1));
        assert!(metrics.page().contains("dropped_total{reason=\"other_publisher\"} 1"));
        drop((one, two));
        assert!(lock(&subjects.open).is_empty());
    }

    /// Goal: a listener that is slow is told so, and nobody else notices.
    #[tokio::test]
    async fn a_full_queue_drops_for_its_listener_alone() {
        let (subjects, metrics) = subjects();
        let mut slow = subjects.subscribe("a", Topic::KvEvents, Some(1));
        let mut other = subjects.subscribe("a", Topic::KvEvents, Some(1));
        slow.next().await;
        other.next().await;
        let many = PLANE_MESSAGES_QUEUED as u64;
        for sequence in 0..many + 3 {
            deliver(&subjects, "a", message(1, sequence, 1));
            assert_eq!(other.next().await, Heard::Message(message(1, sequence, 1)));
        }
        assert_eq!(slow.next().await, Heard::Lost);
        for sequence in 0..many {
            assert_eq!(slow.next().await, Heard::Message(message(1, sequence, 1)));
        }
        assert!(metrics.page().contains("dropped_total{reason=\"overflow\"} 3"));
        // By bytes as well; one message always fits.
        for sequence in 0..2 {
            deliver(&subjects, "a", message(1, sequence, PLANE_BYTES_QUEUED + 1));
        }
        assert_eq!(slow.next().await, Heard::Lost);
        assert!(matches!(slow.next().await, Heard::Message(Message { sequence: 0, .. })));
        deliver(&subjects, "a", message(1, 9, 1));
        assert_eq!(slow.next().await, Heard::Message(message(1, 9, 1)));
    }

    #[test]
    fn messages_are_known_until_too_many_came_after() {
        let mut seen = Seen::default();
        assert!(seen.insert((1, 0)));
        assert!(!seen.insert((1, 0)));
        assert!(seen.insert((2, 0)));
        for sequence in 0..BROKER_MESSAGES_REMEMBERED as u64 {
            assert!(seen.insert((3, sequence)));
        }
        assert!(seen.insert((1, 0)));
        assert_eq!(seen.known.len(), BROKER_MESSAGES_REMEMBERED);
    }

    #[test]
    fn pauses_grow_to_their_limit() {
        assert_eq!(reconnect_pause(0), RECONNECT_PAUSE.0);
        assert_eq!(reconnect_pause(usize::MAX), RECONNECT_PAUSE.1);
    }
}
