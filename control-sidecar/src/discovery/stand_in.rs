//! Stand-in: an API server of Kubernetes, as far as lists and watches go.
//!
//! For tests. It remembers which rights its clients would have needed, and can
//! be told to fail.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnboundedReceiverStream;

/// Group, resource and verb of one right.
pub(crate) type Right = (String, String, String);

type Watch = mpsc::UnboundedSender<Result<Bytes, Infallible>>;

#[derive(Default)]
struct Inner {
    /// Counts changes of all objects.
    version: u64,
    /// Versions up to this are no longer known.
    compacted: u64,
    /// Objects by plural and name.
    objects: BTreeMap<String, BTreeMap<String, Value>>,
    /// Every change, in order: version, plural and event.
    history: Vec<(u64, String, Value)>,
    watches: Vec<(String, Watch)>,
    rights: BTreeSet<Right>,
    /// Lists are answered with 500.
    failing: bool,
    /// Lists asked for so far.
    lists: u64,
    /// Objects of one page at most.
    page: usize,
}

/// The server; it ends with its handle.
pub(crate) struct StandIn {
    inner: Arc<Mutex<Inner>>,
    pub(crate) address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl StandIn {
    pub(crate) async fn start() -> Self {
        let inner = Arc::new(Mutex::new(Inner { version: 100, page: 500, ..Inner::default() }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(Arc::clone(&inner));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { inner, address, task }
    }

    pub(crate) fn client(&self) -> kube::Client {
        let uri = format!("http://{}", self.address).parse().unwrap();
        kube::Config::new(uri).try_into().unwrap()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// Makes or changes an object.
    pub(crate) fn put(&self, plural: &str, object: Value) {
        self.inner().change(plural, "MODIFIED", object);
    }

    /// Deletes an object.
    pub(crate) fn delete(&self, plural: &str, name: &str) {
        let mut inner = self.inner();
        let object = inner.objects.get_mut(plural).unwrap().remove(name).unwrap();
        inner.change(plural, "DELETED", object);
    }

    /// Deletes an object without telling anybody, as if the event were lost.
    pub(crate) fn delete_silently(&self, plural: &str, name: &str) {
        self.inner().objects.get_mut(plural).unwrap().remove(name).unwrap();
    }

    /// Sends every watch a bookmark of the newest version.
    pub(crate) fn bookmark(&self) {
        let inner = self.inner();
        for (plural, watch) in &inner.watches {
            let metadata = json!({"resourceVersion": inner.version.to_string()});
            let (version, kind) = kind(plural);
            let object = json!({"apiVersion": version, "kind": kind, "metadata": metadata});
            let _ = watch.send(Ok(line(&json!({"type": "BOOKMARK", "object": object}))));
        }
    }

    /// Ends every watch as the server does after a while.
    pub(crate) fn disconnect(&self) {
        self.inner().watches.clear();
    }

    /// Forgets all history, and tells every watch that its place is gone.
    pub(crate) fn compact(&self) {
        let mut inner = self.inner();
        inner.version += 1;
        inner.compacted = inner.version;
        let gone = json!({"kind": "Status", "status": "Failure", "code": 410,
            "reason": "Expired", "message": "too old resource version"});
        for (_, watch) in inner.watches.drain(..) {
            let _ = watch.send(Ok(line(&json!({"type": "ERROR", "object": gone}))));
        }
    }

    /// Forgets all history without telling anybody; a watch that comes back is
    /// refused with the status 410.
    pub(crate) fn compact_silently(&self) {
        let mut inner = self.inner();
        inner.version += 1;
        inner.compacted = inner.version;
        inner.watches.clear();
    }

    /// Whether lists fail from now on.
    pub(crate) fn set_failing(&self, failing: bool) {
        self.inner().failing = failing;
    }

    /// How many objects a page has at most.
    pub(crate) fn set_page(&self, page: usize) {
        self.inner().page = page;
    }

    /// Lists asked for so far.
    pub(crate) fn lists(&self) -> u64 {
        self.inner().lists
    }

    /// Open watches.
    pub(crate) fn watches(&self) -> usize {
        let mut inner = self.inner();
        inner.watches.retain(|(_, watch)| !watch.is_closed());
        inner.watches.len()
    }

    /// What the clients so far would have needed the right to.
    pub(crate) fn rights(&self) -> BTreeSet<Right> {
        self.inner().rights.clone()
    }
}

fn kind(plural: &str) -> (&'static str, &'static str) {
    match plural {
        "pods" => ("v1", "Pod"),
        "endpointslices" => ("discovery.k8s.io/v1", "EndpointSlice"),
        _ => ("nvidia.com/v1alpha1", "DynamoWorkerMetadata"),
    }
}

fn line(value: &Value) -> Bytes {
    format!("{value}\n").into()
}

impl Inner {
    fn change(&mut self, plural: &str, what: &str, mut object: Value) {
        self.version += 1;
        let (version, kind) = kind(plural);
        object["apiVersion"] = json!(version);
        object["kind"] = json!(kind);
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        if what != "DELETED" {
            self.objects.entry(plural.to_owned()).or_default().insert(name, object.clone());
        }
        let event = json!({"type": what, "object": object});
        self.watches.retain(|(of, watch)| of != plural || watch.send(Ok(line(&event))).is_ok());
        self.history.push((self.version, plural.to_owned(), event));
    }

    fn list(&mut self, plural: &str, query: &BTreeMap<String, String>) -> Response {
        self.lists += 1;
        if self.failing {
            return status(StatusCode::INTERNAL_SERVER_ERROR, "etcd is away");
        }
        let objects = self.objects.entry(plural.to_owned()).or_default();
        let from = query.get("continue").cloned().unwrap_or_default();
        let rest = || objects.range(from.clone()..);
        let items: Vec<&Value> = rest().take(self.page).map(|(_, it)| it).collect();
        let next = rest().nth(self.page).map(|(name, _)| name.clone());
        let (version, kind) = kind(plural);
        let metadata = json!({"resourceVersion": self.version.to_string(), "continue": next});
        let list = json!({"apiVersion": version, "kind": format!("{kind}List"),
            "metadata": metadata, "items": items});
        (StatusCode::OK, list.to_string()).into_response()
    }

    fn watch(&mut self, plural: &str, query: &BTreeMap<String, String>) -> Response {
        let from: u64 = query["resourceVersion"].parse().unwrap();
        assert_eq!(query["allowWatchBookmarks"], "true");
        if from < self.compacted {
            return status(StatusCode::GONE, "too old resource version");
        }
        let (watch, events) = mpsc::unbounded_channel();
        for (version, of, event) in &self.history {
            if *version > from && of == plural {
                let _ = watch.send(Ok(line(event)));
            }
        }
        self.watches.push((plural.to_owned(), watch));
        // In pieces that are no lines, as a network cuts them.
        let pieces = UnboundedReceiverStream::new(events).flat_map(|line| {
            let Ok(line) = line;
            let cut = line.len() / 3;
            let pieces = [line.slice(..cut), line.slice(cut..)];
            futures::stream::iter(pieces.map(Ok::<_, Infallible>))
        });
        (StatusCode::OK, Body::from_stream(pieces)).into_response()
    }
}

fn status(code: StatusCode, message: &str) -> Response {
    let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
        "code": code.as_u16(), "message": message, "reason": "Failure", "metadata": {}});
    (code, body.to_string()).into_response()
}

async fn answer(State(inner): State<Arc<Mutex<Inner>>>, uri: Uri) -> Response {
    let words: Vec<&str> = uri.path().trim_start_matches('/').split('/').collect();
    let (group, plural) = match words.as_slice() {
        ["api", "v1", "namespaces", "prod", plural] => ("", *plural),
        ["apis", group, _, "namespaces", "prod", plural] => (*group, *plural),
        _ => return status(StatusCode::NOT_FOUND, "no such path"),
    };
    let query: BTreeMap<String, String> = uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let verb = if query.get("watch").is_some_and(|it| it == "true") { "watch" } else { "list" };
    let labelled = query.get("labelSelector").is_some_and(|it| it.contains('='))
        || query.get("labelSelector").is_some_and(|it| it.contains("%3D"));
    if plural != "dynamoworkermetadatas" && !labelled {
        return status(StatusCode::BAD_REQUEST, "no label selector");
    }
    let mut inner = inner.lock().unwrap();
    inner.rights.insert((group.to_owned(), plural.to_owned(), verb.to_owned()));
    if verb == "watch" { inner.watch(plural, &query) } else { inner.list(plural, &query) }
}
