//! Etcd: Dynamo's records in etcd.
//!
//! A session lists everything and then watches from that revision on. When the
//! watch ends, for whatever reason, another session starts from a new list;
//! until it has one, what was seen stays.

use std::collections::BTreeMap;
use std::sync::Arc;

use etcd_client::{
    Client, ConnectOptions, Event, EventType, GetOptions, KeyValue, WatchOptions, WatchStream,
};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::drive::Sight;
use super::listing::{Author, Listing, Parsed};
use super::record::{Key, parse};
use crate::config::discovery::Secret;
use crate::limits::{
    BACKEND_PAUSE, BACKEND_TIMEOUT, CONNECT_TIMEOUT, ETCD_ANSWER_BYTES_MAX, ETCD_KEEPALIVE,
    ETCD_PAGE_KEYS, RECORDS_MAX,
};

/// Prefix of all of Dynamo's records.
const PREFIX: &str = "v1/";

/// First key behind all that start with [`PREFIX`].
const PREFIX_END: &str = "v10";

/// Tells of the records and of their changes until nobody listens.
///
/// - `endpoints`: addresses of etcd's members.
/// - `user`: name and password, if etcd asks for them.
pub async fn watch(
    endpoints: Vec<String>,
    user: Option<(String, Secret)>,
    sights: mpsc::Sender<Sight>,
) {
    let mut pause = BACKEND_PAUSE.0;
    while !sights.is_closed() {
        match Session::open(&endpoints, user.as_ref()).await {
            Ok(session) => {
                pause = BACKEND_PAUSE.0;
                if session.run(&sights).await.is_none() {
                    return;
                }
                info!("the watch has ended; the records are listed again");
            }
            Err(error) => {
                warn!(error, "etcd cannot be asked");
                if sights.send(Sight::Failed(format!("etcd: {error}"))).await.is_err() {
                    return;
                }
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(BACKEND_PAUSE.1);
    }
}

/// What etcd holds of discovery, and who wrote it.
type Records = BTreeMap<Key, (Parsed, Arc<Author>)>;

/// A list of everything, and a watch that continues it.
struct Session {
    /// Held for the watch, whose connection it is.
    _client: Client,
    records: Records,
    stream: WatchStream,
}

impl Session {
    async fn open(endpoints: &[String], user: Option<&(String, Secret)>) -> Result<Self, String> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_keep_alive(ETCD_KEEPALIVE.0, ETCD_KEEPALIVE.1)
            .with_keep_alive_while_idle(true);
        if let Some((name, password)) = user {
            options = options.with_user(name, &password.0);
        }
        let client = within(Client::connect(endpoints, Some(options))).await?;
        let mut records = Records::new();
        let revision = list(&client, &mut records).await?;
        Self::follow(client, records, revision).await
    }

    /// Watches what comes after a revision.
    async fn follow(client: Client, records: Records, revision: i64) -> Result<Self, String> {
        let from = revision.checked_add(1).ok_or("no revision")?;
        let options = WatchOptions::new().with_prefix().with_start_revision(from);
        let mut watches = client.watch_client().max_decoding_message_size(ETCD_ANSWER_BYTES_MAX);
        let stream = within(watches.watch(PREFIX, Some(options))).await?;
        Ok(Self { _client: client, records, stream })
    }

    /// Tells of every change until the watch ends; `None` if nobody listens.
    async fn run(mut self, sights: &mpsc::Sender<Sight>) -> Option<()> {
        sights.send(Sight::Records(self.listing())).await.ok()?;
        let mut changed = false;
        loop {
            let answer = tokio::select! {
                answer = self.stream.message() => answer,
                // Only when there is room: a burst of changes is one sight.
                room = sights.reserve(), if changed => {
                    room.ok()?.send(Sight::Records(self.listing()));
                    changed = false;
                    continue;
                }
            };
            let answer = match answer {
                // Cancelled: compacted behind us, or the member gives up.
                Ok(Some(answer)) if answer.canceled() => return Some(()),
                Ok(Some(answer)) => answer,
                Ok(None) | Err(_) => return Some(()),
            };
            for event in answer.events() {
                changed |= self.apply(event);
            }
        }
    }

    /// Takes over an event; whether it is one of discovery's.
    fn apply(&mut self, event: &Event) -> bool {
        let Some((key, pair)) = event.kv().and_then(|pair| Some((key(pair)?, pair))) else {
            return false;
        };
        match event.event_type() {
            EventType::Delete => self.records.remove(&key).is_some(),
            EventType::Put => {
                keep(&mut self.records, key, pair);
                true
            }
        }
    }

    fn listing(&self) -> Listing {
        let mut listing = Listing::default();
        for (key, (parsed, author)) in &self.records {
            listing.add(key, parsed, author);
        }
        listing
    }
}

/// Lists everything at one revision, a page at a time; gives the revision.
async fn list(client: &Client, records: &mut Records) -> Result<i64, String> {
    let mut store = client.kv_client().max_decoding_message_size(ETCD_ANSWER_BYTES_MAX);
    let mut revision = 0;
    let mut from = PREFIX.as_bytes().to_vec();
    loop {
        let options = GetOptions::new()
            .with_range(PREFIX_END)
            .with_limit(ETCD_PAGE_KEYS)
            .with_revision(revision);
        let page = within(store.get(from, Some(options))).await?;
        if revision == 0 {
            revision = page.header().ok_or("an answer without a revision")?.revision();
        }
        for pair in page.kvs() {
            if let Some(key) = key(pair) {
                keep(records, key, pair);
            }
        }
        match page.kvs().last() {
            Some(last) if page.more() => {
                // The key that follows directly.
                from = last.key().to_vec();
                from.push(0);
            }
            _ => return Ok(revision),
        }
    }
}

fn key(pair: &KeyValue) -> Option<Key> {
    Key::of_etcd(pair.key_str().ok()?)
}

/// Keeps a record. Beyond [`RECORDS_MAX`] new ones are left out; the listing
/// notes it.
fn keep(records: &mut Records, key: Key, pair: &KeyValue) {
    if records.len() > RECORDS_MAX && !records.contains_key(&key) {
        return;
    }
    let parsed = parse(&key, pair.value()).map(Arc::new);
    // A process's keys are on its lease, whose id is its instance's.
    let lease = u64::try_from(pair.lease()).ok().filter(|lease| *lease != 0);
    let author = Arc::new(Author { instance: lease, ..Author::default() });
    records.insert(key, (parsed, author));
}

/// An answer in time, or why there is none.
pub(crate) async fn within<T>(
    answer: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, String> {
    match timeout(BACKEND_TIMEOUT, answer).await {
        Err(_) => Err("no answer in time".to_owned()),
        Ok(Err(error)) => Err(error.to_string()),
        Ok(Ok(value)) => Ok(value),
    }
}

#[cfg(test)]
mod tests;
