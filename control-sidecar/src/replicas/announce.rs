//! Announce: our publishers on record, so that others find them.
//!
//! The record is an `EventChannel` of Dynamo's discovery. Where there is nowhere
//! to write one, others must be told of us by their configuration.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use etcd_client::{Client, ConnectOptions, PutOptions};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tracing::warn;

use crate::adapter::plane::envelope::Topic;
use crate::config::discovery::{Backend, Secret};
use crate::discovery::etcd::within;
use crate::discovery::record::{Bucket, EndpointPath};
use crate::limits::{BACKEND_PAUSE, CONNECT_TIMEOUT, ETCD_LEASE_TTL_S, FILE_STORE_TOUCHED_EVERY};

/// What is percent-encoded in a segment of a channel's key.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_');

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    rest: String,
    value: Value,
}

/// Where a publisher is heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// At its own socket, `host:port`.
    Socket(String),
    /// On a NATS subject.
    Nats,
}

impl Announcement {
    /// Of one publisher on one topic of an endpoint.
    #[must_use]
    pub fn new(path: &EndpointPath, topic: Topic, publisher: u64, heard: &Heard) -> Self {
        let segment = |text| utf8_percent_encode(text, SEGMENT);
        let rest = format!(
            "namespace/{}/component/{}/endpoint/{}/topic/{}/{publisher:x}",
            segment(&path.namespace),
            segment(&path.component),
            segment(&path.endpoint),
            segment(topic.name()),
        );
        let transport = match heard {
            Heard::Socket(address) => {
                json!({"kind": "Zmq", "config": {"endpoint": format!("tcp://{address}")}})
            }
            Heard::Nats => {
                let prefix = format!(
                    "namespace.{}.component.{}.endpoint.{}",
                    segment(&path.namespace),
                    segment(&path.component),
                    segment(&path.endpoint),
                );
                json!({"kind": "Nats", "config": {"subject_prefix": prefix}})
            }
        };
        let value = json!({
            "type": "EventChannel",
            "scope": {"kind": "endpoint", "endpoint": {
                "namespace": path.namespace, "component": path.component, "name": path.endpoint,
            }},
            "topic": topic.name(),
            "instance_id": publisher,
            "transport": transport,
        });
        Self { rest, value }
    }

    /// Key of the record in etcd.
    #[must_use]
    pub fn key(&self) -> String {
        format!("{}/{}", Bucket::Channels.path(), self.rest)
    }

    /// Its file in the file store.
    #[must_use]
    pub fn file(&self, root: &Path) -> PathBuf {
        let name = utf8_percent_encode(&self.rest, NON_ALPHANUMERIC).to_string();
        root.join(Bucket::Channels.path()).join(name)
    }

    /// The record.
    #[must_use]
    pub fn value(&self) -> String {
        self.value.to_string()
    }
}

/// What keeps our records from being there; `None` if nothing does.
pub type SharedProblem = Arc<Mutex<Option<String>>>;

fn set(problem: &SharedProblem, text: Option<String>) {
    *problem.lock().unwrap_or_else(PoisonError::into_inner) = text;
}

/// Keeps the records there until nobody gives any more; then takes them away.
///
/// - `backend`: where; `None` if discovery has no records.
pub async fn keep(
    backend: Option<Backend>,
    records: watch::Receiver<Vec<Announcement>>,
    problem: SharedProblem,
) {
    match backend {
        Some(Backend::File(root)) => keep_files(&root, records, &problem).await,
        Some(Backend::Etcd { endpoints, user }) => {
            keep_keys(&endpoints, user.as_ref(), records, &problem).await;
        }
        Some(Backend::Kubernetes(_) | Backend::Pods(_)) | None => {}
    }
}

async fn keep_files(
    root: &Path,
    mut records: watch::Receiver<Vec<Announcement>>,
    problem: &SharedProblem,
) {
    let mut written: HashSet<PathBuf> = HashSet::new();
    let mut touch = interval(FILE_STORE_TOUCHED_EVERY);
    touch.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            changed = records.changed() => if changed.is_err() { break },
            _ = touch.tick() => {}
        }
        let wanted = records.borrow_and_update().clone();
        // A few small files; the work is over in less than a change of threads.
        let now: HashSet<PathBuf> = wanted.iter().map(|it| it.file(root)).collect();
        for gone in written.difference(&now) {
            let _ = fs::remove_file(gone);
        }
        // Written anew each time, which touches them: anybody may have removed
        // one that seemed left behind.
        let outcome = wanted.iter().try_for_each(|it| write(&it.file(root), &it.value()));
        set(problem, outcome.err().map(|error| format!("file store: {error}")));
        written = now;
    }
    for gone in &written {
        let _ = fs::remove_file(gone);
    }
}

/// Writes beside and renames: nobody must read half of it.
fn write(file: &Path, value: &str) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(file);
    fs::create_dir_all(folder)?;
    let name = file.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let unfinished = folder.join(format!(".tmp_{}_{name}", std::process::id()));
    fs::write(&unfinished, value)?;
    fs::rename(&unfinished, file)
}

async fn keep_keys(
    endpoints: &[String],
    user: Option<&(String, Secret)>,
    mut records: watch::Receiver<Vec<Announcement>>,
    problem: &SharedProblem,
) {
    let mut pause = BACKEND_PAUSE.0;
    loop {
        let error = match Keys::open(endpoints, user).await {
            Ok(mut keys) => {
                pause = BACKEND_PAUSE.0;
                match keys.run(&mut records, problem).await {
                    Ok(()) => return keys.revoke().await,
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        warn!(error, "our publishers cannot be put on record in etcd");
        set(problem, Some(format!("etcd: {error}")));
        tokio::select! {
            () = sleep(pause) => {}
            // Nobody gives records any more.
            () = closed(&mut records) => return,
        }
        pause = (pause * 2).min(BACKEND_PAUSE.1);
    }
}

async fn closed(records: &mut watch::Receiver<Vec<Announcement>>) {
    while records.changed().await.is_ok() {}
}

/// Records under a lease.
struct Keys {
    client: Client,
    lease: i64,
    written: HashSet<String>,
}

impl Keys {
    async fn open(endpoints: &[String], user: Option<&(String, Secret)>) -> Result<Self, String> {
        let mut options = ConnectOptions::new().with_connect_timeout(CONNECT_TIMEOUT);
        if let Some((name, password)) = user {
            options = options.with_user(name, &password.0);
        }
        let mut client = within(Client::connect(endpoints, Some(options))).await?;
        let lease = within(client.lease_grant(ETCD_LEASE_TTL_S, None)).await?.id();
        Ok(Self { client, lease, written: HashSet::new() })
    }

    /// `Ok` when nobody gives records any more.
    async fn run(
        &mut self,
        records: &mut watch::Receiver<Vec<Announcement>>,
        problem: &SharedProblem,
    ) -> Result<(), String> {
        let (mut keeper, mut answers) = within(self.client.lease_keep_alive(self.lease)).await?;
        let third = u64::try_from(ETCD_LEASE_TTL_S / 3).unwrap_or(1);
        let mut renew = interval(std::time::Duration::from_secs(third));
        renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
        records.mark_changed();
        loop {
            tokio::select! {
                changed = records.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    let wanted = records.borrow_and_update().clone();
                    self.put(&wanted).await?;
                    set(problem, None);
                }
                _ = renew.tick() => {
                    within(keeper.keep_alive()).await?;
                    let answer = within(answers.message()).await?;
                    if answer.is_none_or(|answer| answer.ttl() <= 0) {
                        return Err("the lease has run out".to_owned());
                    }
                }
            }
        }
    }

    async fn put(&mut self, wanted: &[Announcement]) -> Result<(), String> {
        let now: HashSet<String> = wanted.iter().map(Announcement::key).collect();
        for gone in self.written.difference(&now) {
            within(self.client.delete(gone.as_str(), None)).await?;
        }
        for record in wanted {
            let options = PutOptions::new().with_lease(self.lease);
            within(self.client.put(record.key(), record.value(), Some(options))).await?;
        }
        self.written = now;
        Ok(())
    }

    async fn revoke(mut self) {
        // If that fails, the lease runs out.
        let _ = within(self.client.lease_revoke(self.lease)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    use crate::discovery::captures;
    use crate::discovery::record::{ChannelTransport, Key, Record, Scope, parse};

    fn path() -> EndpointPath {
        EndpointPath {
            namespace: "dynamo".to_owned(),
            component: "backend".to_owned(),
            endpoint: "generate".to_owned(),
        }
    }

    /// Goal: our record is Dynamo's own, but for the numbers.
    #[test]
    fn records_are_those_of_dynamo() {
        let (key, value) = captures::file()
            .into_iter()
            .find(|(key, _)| key.rest.contains("active_sequences_events"))
            .unwrap();
        let publisher = value["instance_id"].as_u64().unwrap();
        let endpoint = value["transport"]["config"]["endpoint"].as_str().unwrap();
        let heard = Heard::Socket(endpoint.strip_prefix("tcp://").unwrap().to_owned());
        let ours = Announcement::new(&path(), Topic::ActiveSequences, publisher, &heard);
        assert_eq!(ours.value, value);
        assert_eq!(Key::of_etcd(&ours.key()), Some(key));
    }

    #[test]
    fn others_can_read_our_records() {
        for (heard, transport) in [
            (Heard::Socket("127.0.0.1:9".into()), ChannelTransport::Zmq("127.0.0.1:9".into())),
            (Heard::Nats, ChannelTransport::Subject),
        ] {
            let path = EndpointPath { namespace: "a.b/c".to_owned(), ..path() };
            let ours = Announcement::new(&path, Topic::Accounts, 0xabc, &heard);
            let key = Key::of_etcd(&ours.key()).unwrap();
            let Record::Channel(channel) = parse(&key, ours.value().as_bytes()).unwrap() else {
                panic!("no channel")
            };
            assert_eq!((channel.publisher, channel.scope), (0xabc, Scope::Endpoint(path)));
            assert_eq!(
                (channel.topic.as_str(), channel.transport),
                ("warmpath_sequences", transport)
            );
        }
    }

    #[tokio::test]
    async fn files_come_and_go_with_their_records() {
        let directory = tempfile::tempdir().unwrap();
        let one = Announcement::new(&path(), Topic::Accounts, 1, &Heard::Nats);
        let two = Announcement::new(&path(), Topic::Accounts, 2, &Heard::Nats);
        let (give, records) = watch::channel(vec![one.clone()]);
        let problem = SharedProblem::default();
        let backend = Some(Backend::File(directory.path().to_path_buf()));
        let task = tokio::spawn(keep(backend, records, Arc::clone(&problem)));
        let holds = async |there: &Announcement, gone: &Announcement| {
            while !there.file(directory.path()).exists() || gone.file(directory.path()).exists() {
                // Looks again; a file that is written or removed tells nobody.
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
        };
        let patience = std::time::Duration::from_secs(20);
        timeout(patience, holds(&one, &two)).await.unwrap();
        give.send(vec![two.clone()]).unwrap();
        timeout(patience, holds(&two, &one)).await.unwrap();
        drop(give);
        task.await.unwrap();
        assert!(!two.file(directory.path()).exists());
        assert_eq!(*problem.lock().unwrap(), None);
    }
}
