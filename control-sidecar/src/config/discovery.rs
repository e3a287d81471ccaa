//! Discovery: which backend tells of the workers, and what is taken from it.
//!
//! Environment variables that Dynamo reads mean the same here; the file wins
//! over them.

use core::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use warmpath_core::ids::WorkerId;

use super::fields::{Report, Section};
use super::workers::raw_id_of_name;
use crate::adapter::Engine;

/// Namespace that is looked for if nothing says otherwise.
const NAMESPACE_DEFAULT: &str = "vllm-agg";

/// Label of what takes part in Dynamo's discovery.
const SELECTOR_DEFAULT: &str = "nvidia.com/dynamo-discovery-enabled=true";

/// Port of workers whose pods name none.
const PORT_DEFAULT: u16 = 8_000;

/// Where etcd is if nothing says otherwise.
const ETCD_DEFAULT: &str = "http://localhost:2379";

/// Environment variables that matter to discovery and to the event plane.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiscoveryEnv {
    /// `DYN_DISCOVERY_BACKEND`
    pub backend: Option<String>,
    /// `DYN_FILE_KV`
    pub directory: Option<String>,
    /// `ETCD_ENDPOINTS`
    pub etcd_endpoints: Option<String>,
    /// `ETCD_AUTH_USERNAME`
    pub etcd_user: Option<String>,
    /// `ETCD_AUTH_PASSWORD`
    pub etcd_password: Option<Secret>,
    /// `DYN_NAMESPACE_PREFIX`
    pub namespace_prefix: Option<String>,
    /// `DYN_NAMESPACE`
    pub namespace: Option<String>,
    /// `POD_NAMESPACE`
    pub pod_namespace: Option<String>,
    /// `DYN_KUBE_DISCOVERY_MODE`
    pub kubernetes_mode: Option<String>,
    /// `DYN_EVENT_PLANE`
    pub event_plane: Option<String>,
    /// `NATS_SERVER`
    pub nats_server: Option<String>,
    /// `DYN_ZMQ_BROKER_URL`
    pub zmq_broker: Option<String>,
}

impl DiscoveryEnv {
    /// Reads the environment. An empty variable counts as not set.
    ///
    /// - `variable`: the value of a variable by its name.
    pub fn from_env(variable: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| variable(name).filter(|value| !value.is_empty());
        Self {
            backend: get("DYN_DISCOVERY_BACKEND"),
            directory: get("DYN_FILE_KV"),
            etcd_endpoints: get("ETCD_ENDPOINTS"),
            etcd_user: get("ETCD_AUTH_USERNAME"),
            etcd_password: get("ETCD_AUTH_PASSWORD").map(Secret),
            namespace_prefix: get("DYN_NAMESPACE_PREFIX"),
            namespace: get("DYN_NAMESPACE"),
            pod_namespace: get("POD_NAMESPACE"),
            kubernetes_mode: get("DYN_KUBE_DISCOVERY_MODE"),
            event_plane: get("DYN_EVENT_PLANE"),
            nats_server: get("NATS_SERVER"),
            zmq_broker: get("DYN_ZMQ_BROKER_URL"),
        }
    }
}

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Which of Dynamo's namespaces are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamespaceRule {
    /// A namespace and its generations, which are named like it with a hyphen
    /// and eight hexadecimal digits behind.
    Exact(String),
    /// Every namespace that starts so.
    Prefix(String),
}

impl NamespaceRule {
    /// Whether a namespace is taken.
    #[must_use]
    pub fn admits(&self, namespace: &str) -> bool {
        match self {
            Self::Prefix(prefix) => namespace.starts_with(prefix),
            Self::Exact(name) => namespace.strip_prefix(name).is_some_and(|rest| {
                rest.is_empty() || rest.strip_prefix('-').is_some_and(is_generation)
            }),
        }
    }
}

/// Whether a word is the hash by which Dynamo tells generations apart.
fn is_generation(word: &str) -> bool {
    word.len() == 8 && word.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Where requests for a worker go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontendRule {
    /// To its own host: the port that its pod names `http`, else this one.
    PodPort(u16),
    /// All to the same frontend, which obeys the worker's id.
    Fixed(SocketAddr),
    /// Wherever the gateway's own balancing sends them; the id decides.
    None,
}

/// How many bits of a pod's name's hash are its instance id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdBits {
    /// 53, which survive as numbers of JSON.
    Masked,
    /// All 64, as releases before the mask had it.
    Whole,
}

impl IdBits {
    /// The instance id of a resource of that name.
    #[must_use]
    pub fn id_of(self, name: &str) -> WorkerId {
        match self {
            Self::Masked => super::workers::id_of_name(name),
            Self::Whole => WorkerId(raw_id_of_name(name)),
        }
    }
}

/// What Dynamo's readiness on Kubernetes goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadyBy {
    /// Ready endpoints of EndpointSlices; a resource a pod.
    Pod,
    /// Ready containers of pods; a resource a container.
    Container,
}

/// Dynamo's discovery on Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubernetesConfig {
    /// Namespace of the cluster; `None` for the one that the sidecar runs in.
    pub namespace: Option<String>,
    /// Label selector of slices and pods.
    pub selector: String,
    /// What readiness goes by.
    pub ready_by: ReadyBy,
    /// How names become instance ids.
    pub id_bits: IdBits,
}

/// Pods of engines without Dynamo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodsConfig {
    /// Namespace of the cluster; `None` for the one that the sidecar runs in.
    pub namespace: Option<String>,
    /// Label selector of the pods.
    pub selector: String,
    /// Which engine they run.
    pub engine: Engine,
    /// Port of the engines whose pods do not name one `http`.
    pub port: u16,
    /// Port of rank 0's publisher, for engines that do not tell.
    pub kv_events_port: Option<u16>,
    /// Port of rank 0's replay socket, for engines that do not tell.
    pub replay_port: Option<u16>,
}

/// Where records are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// Dynamo's file store, in this directory.
    File(PathBuf),
    /// Dynamo's etcd.
    Etcd {
        /// Addresses of its members.
        endpoints: Vec<String>,
        /// User and password.
        user: Option<(String, Secret)>,
    },
    /// Dynamo's custom resources.
    Kubernetes(KubernetesConfig),
    /// Pods of engines without Dynamo.
    Pods(PodsConfig),
}

/// Which backend tells of the workers, and what is taken from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryConfig {
    /// Where records are.
    pub backend: Backend,
    /// Which of Dynamo's namespaces are taken.
    pub namespaces: NamespaceRule,
    /// Where requests go.
    pub frontend: FrontendRule,
}

impl DiscoveryConfig {
    /// Whether the workers are those of a cluster, on other hosts.
    #[must_use]
    pub fn is_cluster(&self) -> bool {
        matches!(self.backend, Backend::Kubernetes(_) | Backend::Pods(_))
    }
}

/// What carries the events of Dynamo's workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum EventPlane {
    /// A ZMQ socket a publisher, found by discovery.
    #[default]
    Zmq,
    /// ZMQ brokers: `host:port` of the socket that each publishes on.
    Broker(Vec<String>),
    /// NATS: addresses of the servers.
    Nats(Vec<String>),
}

#[derive(Clone, Copy)]
enum Kind {
    File,
    Etcd,
    Kubernetes,
    Pods,
}

const KINDS: [(&str, Kind); 4] = [
    ("file", Kind::File),
    ("etcd", Kind::Etcd),
    ("kubernetes", Kind::Kubernetes),
    ("pods", Kind::Pods),
];

impl DiscoveryConfig {
    /// Takes a section apart; `None` if it does not say which backend.
    ///
    /// - `directory`: where relative paths start.
    pub(super) fn read(
        mut section: Section<'_>,
        directory: &Path,
        env: &DiscoveryEnv,
    ) -> Option<Self> {
        let kind = if section.has("backend") {
            section.word("backend", &KINDS)
        } else {
            kind_of_env(&section, env)
        };
        let namespaces = read_namespaces(&mut section, env);
        let frontend = read_frontend(&mut section);
        let backend = kind.and_then(|kind| match kind {
            Kind::File => read_file(&mut section, directory, env).map(Backend::File),
            Kind::Etcd => Some(read_etcd(&mut section, env)),
            Kind::Kubernetes => read_kubernetes(&mut section, env).map(Backend::Kubernetes),
            Kind::Pods => read_pods(&mut section, env, frontend).map(Backend::Pods),
        });
        if kind.is_some() {
            section.end();
        }
        Some(Self { backend: backend?, namespaces, frontend })
    }
}

fn kind_of_env(section: &Section<'_>, env: &DiscoveryEnv) -> Option<Kind> {
    let Some(word) = &env.backend else {
        section.mistake("backend", "is missing, and DYN_DISCOVERY_BACKEND is not set");
        return None;
    };
    let found = KINDS.iter().find(|(known, _)| known == word).map(|(_, kind)| *kind);
    if found.is_none() {
        let known = KINDS.map(|(word, _)| word).join(", ");
        section.mistake("backend", format!("DYN_DISCOVERY_BACKEND is {word:?}; known are {known}"));
    }
    found
}

fn read_namespaces(section: &mut Section<'_>, env: &DiscoveryEnv) -> NamespaceRule {
    let (prefix, name) = (section.text("namespace_prefix"), section.text("namespace"));
    if prefix.is_some() && name.is_some() {
        section.mistake("namespace", "either namespace or namespace_prefix, not both");
    }
    // What the file says, whichever of the two, wins over the environment.
    let prefix = prefix.map(NamespaceRule::Prefix);
    prefix
        .or_else(|| name.map(NamespaceRule::Exact))
        .or_else(|| env.namespace_prefix.clone().map(NamespaceRule::Prefix))
        .or_else(|| env.namespace.clone().map(NamespaceRule::Exact))
        .unwrap_or_else(|| NamespaceRule::Exact(NAMESPACE_DEFAULT.to_owned()))
}

fn read_frontend(section: &mut Section<'_>) -> FrontendRule {
    if !section.has("frontend") {
        return FrontendRule::PodPort(PORT_DEFAULT);
    }
    let mut frontend = section.section("frontend");
    let port = read_port(&mut frontend, "port").map(FrontendRule::PodPort);
    let text = frontend.text("address");
    let address = text.as_deref().and_then(|text| text.parse::<SocketAddr>().ok());
    if text.is_some() && address.is_none_or(|address| address.port() == 0) {
        frontend.mistake("address", "must be an IP address and a port such as 10.0.0.1:8000");
    }
    let none = frontend.flag("none").unwrap_or(false).then_some(FrontendRule::None);
    let given: Vec<FrontendRule> =
        [port, address.map(FrontendRule::Fixed), none].into_iter().flatten().collect();
    if given.len() > 1 {
        frontend.mistake("port", "one of port, address and none, not several");
    }
    frontend.end();
    given.first().copied().unwrap_or(FrontendRule::PodPort(PORT_DEFAULT))
}

fn read_port(section: &mut Section<'_>, name: &str) -> Option<u16> {
    section.number(name, 1, u64::from(u16::MAX)).and_then(|port| u16::try_from(port).ok())
}

fn read_file(section: &mut Section<'_>, directory: &Path, env: &DiscoveryEnv) -> Option<PathBuf> {
    let own = section.text("directory").map(|path| directory.join(path));
    let path = own.or_else(|| env.directory.as_ref().map(PathBuf::from));
    if path.is_none() {
        section.mistake("directory", "is missing, and DYN_FILE_KV is not set");
    }
    path
}

fn read_etcd(section: &mut Section<'_>, env: &DiscoveryEnv) -> Backend {
    let mut endpoints = section.texts("endpoints");
    if endpoints.is_empty() {
        let given = env.etcd_endpoints.as_deref().unwrap_or(ETCD_DEFAULT);
        endpoints = split(given, ',');
    }
    let user = section.text("user").or_else(|| env.etcd_user.clone());
    let password = section.text("password").map(Secret).or_else(|| env.etcd_password.clone());
    if user.is_some() != password.is_some() {
        section.mistake("user", "user and password belong together");
    }
    Backend::Etcd { endpoints, user: user.zip(password) }
}

fn read_kubernetes(section: &mut Section<'_>, env: &DiscoveryEnv) -> Option<KubernetesConfig> {
    const MODES: [(&str, ReadyBy); 2] = [("pod", ReadyBy::Pod), ("container", ReadyBy::Container)];
    let ready_by = if section.has("mode") {
        section.word("mode", &MODES)
    } else if let Some(word) = &env.kubernetes_mode {
        let found = MODES.iter().find(|(known, _)| known == word).map(|(_, mode)| *mode);
        if found.is_none() {
            section.mistake("mode", format!("DYN_KUBE_DISCOVERY_MODE is {word:?}"));
        }
        found
    } else {
        Some(ReadyBy::Pod)
    };
    let id_bits = match section.number("id_bits", 53, 64) {
        None | Some(53) => IdBits::Masked,
        Some(64) => IdBits::Whole,
        Some(other) => {
            section.mistake("id_bits", format!("must be 53 or 64, is {other}"));
            IdBits::Masked
        }
    };
    Some(KubernetesConfig {
        namespace: kubernetes_namespace(section, env),
        selector: section.text("selector").unwrap_or_else(|| SELECTOR_DEFAULT.to_owned()),
        ready_by: ready_by?,
        id_bits,
    })
}

fn kubernetes_namespace(section: &mut Section<'_>, env: &DiscoveryEnv) -> Option<String> {
    section.text("kubernetes_namespace").or_else(|| env.pod_namespace.clone())
}

fn read_pods(
    section: &mut Section<'_>,
    env: &DiscoveryEnv,
    frontend: FrontendRule,
) -> Option<PodsConfig> {
    let engines = [("vllm", Engine::Vllm), ("sglang", Engine::Sglang)];
    let engine = section.word("engine", &engines).unwrap_or(Engine::Vllm);
    let selector = section.text("selector").filter(|selector| !selector.is_empty());
    if selector.is_none() {
        section.mistake("selector", "is missing: the labels of the engines' pods");
    }
    let FrontendRule::PodPort(port) = frontend else {
        section.mistake("frontend", "engines without Dynamo are reached at their own ports only");
        return None;
    };
    Some(PodsConfig {
        namespace: kubernetes_namespace(section, env),
        selector: selector?,
        engine,
        port,
        kv_events_port: read_port(section, "kv_events_port"),
        replay_port: read_port(section, "replay_port"),
    })
}

#[derive(Clone, Copy)]
enum Plane {
    Zmq,
    Broker,
    Nats,
}

impl EventPlane {
    /// Takes a section apart.
    pub(super) fn read(mut section: Section<'_>, env: &DiscoveryEnv, report: &Report) -> Self {
        let words = [("zmq", Plane::Zmq), ("broker", Plane::Broker), ("nats", Plane::Nats)];
        let word = section.word("kind", &words);
        let given: Vec<String> =
            section.text("url").into_iter().chain(section.texts("urls")).collect();
        let plane = match (word, env.event_plane.as_deref(), &env.zmq_broker) {
            (Some(plane), _, _) => plane,
            (None, Some("nats"), _) => Plane::Nats,
            (None, Some("zmq") | None, Some(_)) => Plane::Broker,
            (None, Some("zmq") | None, None) => Plane::Zmq,
            (None, Some(other), _) => {
                report.add("DYN_EVENT_PLANE", format!("must be zmq or nats, is {other:?}"));
                Plane::Zmq
            }
        };
        let plane = match plane {
            Plane::Zmq if !given.is_empty() => {
                section.mistake("urls", "publishers are found by discovery with kind zmq");
                Self::Zmq
            }
            Plane::Zmq => Self::Zmq,
            Plane::Nats => Self::Nats(nats_servers(given, env)),
            Plane::Broker => Self::Broker(brokers(given, env, &section)),
        };
        section.end();
        plane
    }
}

fn nats_servers(given: Vec<String>, env: &DiscoveryEnv) -> Vec<String> {
    if given.is_empty() {
        split(env.nats_server.as_deref().unwrap_or("nats://localhost:4222"), ',')
    } else {
        given
    }
}

fn brokers(given: Vec<String>, env: &DiscoveryEnv, section: &Section<'_>) -> Vec<String> {
    let urls = if given.is_empty() {
        env.zmq_broker.as_deref().map(broker_urls).unwrap_or_default()
    } else {
        given
    };
    if urls.is_empty() {
        section.mistake("urls", "is missing, and DYN_ZMQ_BROKER_URL has no xpub=tcp://host:port");
    }
    let address = |url: &String| {
        let address = url.strip_prefix("tcp://").filter(|it| {
            it.rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0)
            })
        });
        if address.is_none() {
            section.mistake("urls", format!("must be tcp://host:port, is {url:?}"));
        }
        address.map(str::to_owned)
    };
    urls.iter().filter_map(address).collect()
}

/// The addresses to subscribe at in
/// `xsub=tcp://a:5555;tcp://b:5555 , xpub=tcp://a:5556;tcp://b:5556`.
fn broker_urls(text: &str) -> Vec<String> {
    let sides = text.split(',').filter_map(|side| side.trim().strip_prefix("xpub="));
    sides.flat_map(|urls| split(urls, ';')).collect()
}

fn split(text: &str, separator: char) -> Vec<String> {
    let words = text.split(separator).map(str::trim).filter(|word| !word.is_empty());
    words.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests;
