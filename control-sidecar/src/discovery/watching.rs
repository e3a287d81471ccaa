//! Watching: one kind of Kubernetes objects, listed and then watched.
//!
//! A list that fails leaves what was listed before. A watch that ends is taken
//! up where it ended; when the API server no longer knows that place, which it
//! says with the status 410, everything is listed again and replaces the old
//! list as a whole.

use core::fmt::Debug;
use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt;
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use kube::core::Resource;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use crate::limits::{
    BACKEND_PAUSE, BACKEND_TIMEOUT, KUBERNETES_OBJECTS_MAX, KUBERNETES_PAGE_OBJECTS,
    KUBERNETES_WATCH_FOR, KUBERNETES_WATCH_GRACE,
};

/// The status of a place in the watch that the API server no longer knows.
const GONE: u16 = 410;

/// What is told of one kind of objects, by their names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told<T> {
    /// All of them.
    Listed(BTreeMap<String, T>),
    /// One that is new or has changed.
    Put(String, T),
    /// One that went.
    Gone(String),
    /// The API server answers.
    Fine,
    /// It does not, or refuses; what was told before stays.
    Failed(String),
}

/// Nobody listens any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unheard;

/// Which objects are watched, and what is kept of each.
pub struct Watching<K, T> {
    /// The API of their kind.
    pub api: Api<K>,
    /// Their label selector; empty for all.
    pub selector: String,
    /// What is kept of one.
    pub keep: fn(K) -> T,
}

/// Why a watch ended.
enum End {
    /// It can be taken up.
    Closed,
    /// Everything must be listed again.
    Gone,
    /// The API server said no, or nothing.
    Failed(String),
}

impl<K, T> Watching<K, T>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    /// Tells of the objects until nobody listens.
    pub async fn run(self, out: mpsc::Sender<Told<T>>) {
        // It only ever ends for want of a listener.
        let _ = self.follow(&out).await;
    }

    async fn follow(&self, out: &mpsc::Sender<Told<T>>) -> Result<(), Unheard> {
        let mut pause = BACKEND_PAUSE.0;
        loop {
            match self.list().await {
                Ok((objects, mut version)) => {
                    pause = BACKEND_PAUSE.0;
                    tell(out, Told::Listed(objects)).await?;
                    self.watch(&mut version, out).await?;
                }
                Err(error) => tell(out, Told::Failed(error)).await?,
            }
            sleep(pause).await;
            pause = (pause * 2).min(BACKEND_PAUSE.1);
        }
    }

    /// Watches until everything must be listed again.
    async fn watch(
        &self,
        version: &mut String,
        out: &mpsc::Sender<Told<T>>,
    ) -> Result<(), Unheard> {
        let mut pause = BACKEND_PAUSE.0;
        loop {
            match self.watch_once(version, out).await? {
                End::Gone => return Ok(()),
                End::Closed => pause = BACKEND_PAUSE.0,
                End::Failed(error) => tell(out, Told::Failed(error)).await?,
            }
            sleep(pause).await;
            pause = (pause * 2).min(BACKEND_PAUSE.1);
        }
    }

    async fn watch_once(
        &self,
        version: &mut String,
        out: &mpsc::Sender<Told<T>>,
    ) -> Result<End, Unheard> {
        let seconds = u32::try_from(KUBERNETES_WATCH_FOR.as_secs()).unwrap_or(u32::MAX);
        let asked = WatchParams::default().labels(&self.selector).timeout(seconds);
        let events = match in_time(self.api.watch(&asked, version), BACKEND_TIMEOUT).await {
            Ok(events) => events,
            Err(end) => return Ok(end),
        };
        tell(out, Told::Fine).await?;
        let mut events = std::pin::pin!(events);
        let silence = KUBERNETES_WATCH_FOR + KUBERNETES_WATCH_GRACE;
        loop {
            let event = match timeout(silence, events.next()).await {
                Ok(Some(Ok(event))) => event,
                // Ended by the server, broken or silent: to be taken up.
                Ok(Some(Err(_)) | None) | Err(_) => return Ok(End::Closed),
            };
            let told = match event {
                WatchEvent::Bookmark(bookmark) => {
                    version.clone_from(&bookmark.metadata.resource_version);
                    continue;
                }
                WatchEvent::Error(status) if status.code == GONE => return Ok(End::Gone),
                WatchEvent::Error(status) => return Ok(End::Failed(status.message)),
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    remember(version, &object);
                    name(&object).map(|name| Told::Put(name, (self.keep)(object)))
                }
                WatchEvent::Deleted(object) => {
                    remember(version, &object);
                    name(&object).map(Told::Gone)
                }
            };
            if let Some(told) = told {
                tell(out, told).await?;
            }
        }
    }

    /// All objects, and the place from which the watch goes on.
    async fn list(&self) -> Result<(BTreeMap<String, T>, String), String> {
        let mut asked = ListParams::default().labels(&self.selector).limit(KUBERNETES_PAGE_OBJECTS);
        let mut objects = BTreeMap::new();
        loop {
            let page = match in_time(self.api.list(&asked), BACKEND_TIMEOUT).await {
                Ok(page) => page,
                Err(End::Failed(error)) => return Err(error),
                Err(End::Gone | End::Closed) => return Err("the list has changed".to_owned()),
            };
            for object in page.items {
                // The table's own limit notes what is left out.
                if objects.len() > KUBERNETES_OBJECTS_MAX {
                    break;
                }
                if let Some(name) = name(&object) {
                    objects.insert(name, (self.keep)(object));
                }
            }
            asked.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if asked.continue_token.is_none() {
                let version = page.metadata.resource_version.filter(|it| !it.is_empty());
                return Ok((objects, version.ok_or("a list without a version")?));
            }
        }
    }
}

async fn tell<T>(out: &mpsc::Sender<Told<T>>, told: Told<T>) -> Result<(), Unheard> {
    out.send(told).await.map_err(|_| Unheard)
}

fn name<K: Resource>(object: &K) -> Option<String> {
    object.meta().name.clone()
}

fn remember<K: Resource>(version: &mut String, object: &K) {
    if let Some(newer) = object.meta().resource_version.as_ref().filter(|it| !it.is_empty()) {
        version.clone_from(newer);
    }
}

async fn in_time<A>(
    answer: impl Future<Output = kube::Result<A>>,
    within: Duration,
) -> Result<A, End> {
    match timeout(within, answer).await {
        Err(_) => Err(End::Failed("no answer in time".to_owned())),
        Ok(Err(kube::Error::Api(status))) if status.code == GONE => Err(End::Gone),
        Ok(Err(kube::Error::Api(status))) => {
            Err(End::Failed(format!("{}: {}", status.code, status.message)))
        }
        Ok(Err(error)) => Err(End::Failed(error.to_string())),
        Ok(Ok(answer)) => Ok(answer),
    }
}

/// What is known of one kind of objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table<T> {
    /// The objects, by name.
    pub rows: BTreeMap<String, T>,
    /// Whether a whole list has come.
    pub whole: bool,
    /// Why the API server cannot be asked now.
    pub failed: Option<String>,
    /// Whether there were more than are kept.
    pub too_many: bool,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { rows: BTreeMap::new(), whole: false, failed: None, too_many: false }
    }
}

impl<T> Table<T> {
    /// Takes over what is told.
    pub fn take(&mut self, told: Told<T>) {
        match told {
            Told::Failed(error) => {
                self.failed = Some(error);
                return;
            }
            Told::Fine => {}
            Told::Listed(rows) => {
                self.too_many = rows.len() > KUBERNETES_OBJECTS_MAX;
                self.rows = rows;
                self.whole = true;
            }
            Told::Put(name, row) => {
                if self.rows.len() > KUBERNETES_OBJECTS_MAX && !self.rows.contains_key(&name) {
                    self.too_many = true;
                } else {
                    self.rows.insert(name, row);
                }
            }
            Told::Gone(name) => {
                self.rows.remove(&name);
            }
        }
        self.failed = None;
    }
}
