//! Peers: etcd, NATS, mocked workers and direct-mode frontends, all Dynamo's
//! own or Debian's.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};
use tokio::time::sleep;

use super::cases::{Case, Discovery, Plane, Pools};
use crate::stack::child::Child;
use crate::stack::client::get;
use crate::stack::launch::{StackError, local, wait_until_ok};
use crate::stack::limits::{POLL_START, READY_WITHIN};
use crate::stack::ports::free_port;

/// A ZMQ broker: what is published at its first port is heard at its second.
const BROKER: &str = "\
import sys, zmq
context = zmq.Context()
sockets = []
for kind, port in ((zmq.XSUB, sys.argv[1]), (zmq.XPUB, sys.argv[2])):
    socket = context.socket(kind)
    socket.bind('tcp://127.0.0.1:' + port)
    sockets.append(socket)
zmq.proxy(*sockets)
";

/// Model name in every request.
pub const MODEL: &str = "tiny";

/// Tokens of a block.
pub const BLOCK_SIZE: u32 = 16;

/// Blocks of one rank's cache: small enough that the traffic overflows it.
const BLOCKS: u32 = 256;

/// Times that the mocked engines are faster than real ones.
const SPEEDUP: u32 = 50;

/// The same where requests must last.
const SPEEDUP_REPLICAS: u32 = 1;

/// Where the workers of the next generation serve: the namespace has the hash of
/// another specification behind it.
const NEXT_GENERATION: &str = "dyn://dynamo-0a1b2c3d.backend.generate";

/// Port of the first worker's system server; the others follow.
const SYSTEM_PORTS_FROM: usize = 18_100;

/// Frontends: more than one, so that it shows if a request needs a particular
/// one.
pub const FRONTENDS: usize = 2;

/// Dynamo's side of a case.
pub struct Peers {
    case: Case,
    python: PathBuf,
    folder: PathBuf,
    model: PathBuf,
    etcd: u16,
    nats: u16,
    /// Ports of the broker: where publishers connect, and subscribers.
    broker: [u16; 2],
    /// Ports of the frontends.
    pub frontends: Vec<u16>,
    /// Ports of the frontends that route by KV themselves: one that syncs with
    /// others, and one that does not.
    pub routers: Vec<u16>,
    stores: Vec<Child>,
    workers: Vec<Child>,
    servers: Vec<Child>,
}

impl Peers {
    /// Starts everything and waits until every frontend offers the model.
    ///
    /// - `python`: of an environment that has Dynamo.
    /// - `tokenizer`: directory of the small model.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn start(
        case: Case,
        python: &Path,
        tokenizer: &Path,
        folder: &Path,
    ) -> Result<Self, StackError> {
        let mut peers = Self {
            case,
            python: python.to_path_buf(),
            folder: folder.to_path_buf(),
            model: write_model(tokenizer, folder, 32_768)?,
            etcd: free_port()?,
            nats: free_port()?,
            broker: [free_port()?, free_port()?],
            frontends: Vec::new(),
            routers: Vec::new(),
            stores: Vec::new(),
            workers: Vec::new(),
            servers: Vec::new(),
        };
        peers.start_etcd().await?;
        peers.start_nats().await?;
        peers.start_broker().await?;
        match case.pools {
            Pools::Aggregated => {
                for at in 0..2 {
                    peers.start_worker(&format!("worker-{at}"), &["--data-parallel-size", "2"])?;
                }
            }
            Pools::Disaggregated => {
                for at in 0..2 {
                    peers.start_disaggregated("prefill", at)?;
                    peers.start_disaggregated("decode", at)?;
                }
            }
        }
        for at in 0..FRONTENDS {
            peers.start_frontend(at)?;
        }
        if case.replicas {
            peers.start_router("router-syncs", &["--router-replica-sync"])?;
            peers.start_router("router-aside", &[])?;
        }
        peers.ready().await?;
        Ok(peers)
    }

    /// Where the workers have registered: words for `tree_dump.py`.
    #[must_use]
    pub fn registry(&self) -> [String; 2] {
        match self.case.discovery {
            Discovery::File => ["file".into(), self.store_directory()],
            Discovery::Etcd => ["etcd".into(), format!("http://{}", local(self.etcd))],
        }
    }

    /// What the sidecar's configuration says of discovery and event plane.
    #[must_use]
    pub fn sidecar_config(&self) -> String {
        let discovery = match self.case.discovery {
            Discovery::File => format!("backend: file, directory: {:?}", self.store_directory()),
            Discovery::Etcd => {
                format!("backend: etcd, endpoints: [\"http://{}\"]", local(self.etcd))
            }
        };
        let plane = match self.case.plane {
            Plane::Zmq => "kind: zmq".to_owned(),
            Plane::Broker => {
                let [_, subscribers] = self.broker;
                format!("kind: broker, url: \"tcp://{}\"", local(subscribers))
            }
            Plane::Nats => format!("kind: nats, url: \"nats://{}\"", local(self.nats)),
        };
        let mut config =
            format!("discovery: {{{discovery}, namespace: dynamo}}\nevent_plane: {{{plane}}}\n");
        if self.case.replicas {
            config.push_str("router: {router_replica_sync: true}\n");
            let [publishers, _] = self.broker;
            if self.case.plane == Plane::Broker {
                let url = format!("tcp://{}", local(publishers));
                config.push_str(&format!("replicas: {{brokers: [{url:?}]}}\n"));
            }
        }
        config
    }

    /// Name and end of the log of a process that ended by itself.
    pub fn ended(&mut self) -> Option<(String, String)> {
        let children = self.stores.iter_mut().chain(&mut self.workers).chain(&mut self.servers);
        children
            .filter_map(|child| child.ended().map(|_| (child.name().into(), child.log_tail())))
            .next()
    }

    /// Stops everything, stores last.
    pub async fn stop(mut self) {
        let children = self.servers.drain(..).chain(self.workers.drain(..));
        for child in children.chain(self.stores.drain(..)) {
            child.stop().await;
        }
    }

    fn store_directory(&self) -> String {
        self.folder.join("kv").display().to_string()
    }

    async fn start_etcd(&mut self) -> Result<(), StackError> {
        if self.case.discovery != Discovery::Etcd {
            return Ok(());
        }
        let (client, peer) = (format!("http://{}", local(self.etcd)), free_port()?);
        let peer = format!("http://{}", local(peer));
        let arguments = [
            format!("--data-dir={}", self.folder.join("etcd").display()),
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster=default={peer}"),
        ];
        let mut etcd = Child::start("etcd", Path::new("etcd"), &arguments, &self.folder)?;
        wait_until_ok("etcd's /health", &mut etcd, self.etcd, "/health").await?;
        self.stores.push(etcd);
        Ok(())
    }

    async fn start_nats(&mut self) -> Result<(), StackError> {
        if self.case.plane != Plane::Nats {
            return Ok(());
        }
        let monitor = free_port()?;
        let arguments = ["-a", "127.0.0.1", "-p", &self.nats.to_string(), "-m"];
        let mut arguments: Vec<String> = arguments.map(str::to_owned).into();
        arguments.push(monitor.to_string());
        let mut nats = Child::start("nats", Path::new("nats-server"), &arguments, &self.folder)?;
        wait_until_ok("NATS's /healthz", &mut nats, monitor, "/healthz").await?;
        self.stores.push(nats);
        Ok(())
    }

    async fn start_broker(&mut self) -> Result<(), StackError> {
        if self.case.plane != Plane::Broker {
            return Ok(());
        }
        let ports = self.broker;
        let arguments = ["-c".into(), BROKER.into(), ports[0].to_string(), ports[1].to_string()];
        let mut broker = Child::start("broker", &self.python, &arguments, &self.folder)?;
        let deadline = Instant::now() + READY_WITHIN;
        // It answers nothing but ZMQ; that it listens must do.
        while tokio::net::TcpStream::connect(local(ports[1])).await.is_err() {
            if broker.ended().is_some() || Instant::now() > deadline {
                return Err(StackError::NotReady("the broker's socket", broker.log_tail()));
            }
            sleep(POLL_START).await;
        }
        self.servers.push(broker);
        Ok(())
    }

    /// Starts another generation of aggregated workers beside those that are
    /// there, in a namespace of its own, as a rollout does.
    ///
    /// # Errors
    ///
    /// If a process cannot be started.
    pub fn start_next_generation(&mut self) -> Result<(), StackError> {
        for at in 0..2 {
            let more = ["--data-parallel-size", "2", "--endpoint", NEXT_GENERATION];
            self.start_worker(&format!("next-{at}"), &more)?;
        }
        Ok(())
    }

    /// Stops the workers that were there first, one after the other, as a rollout
    /// does.
    pub async fn stop_first_generation(&mut self) {
        let (next, first): (Vec<Child>, Vec<Child>) =
            self.workers.drain(..).partition(|worker| worker.name().starts_with("next-"));
        self.workers = next;
        for worker in first {
            worker.stop().await;
        }
    }

    /// Kills a worker without warning.
    pub async fn kill_worker(&mut self) {
        if let Some(mut worker) = self.workers.pop() {
            worker.kill_now().await;
        }
    }

    /// Kills etcd and NATS without warning. Returns what they were.
    pub async fn kill_stores(&mut self) -> Vec<String> {
        let mut killed = Vec::new();
        for mut store in self.stores.drain(..) {
            store.kill_now().await;
            killed.push(store.name().to_owned());
        }
        killed
    }

    /// Starts them again, with what they had on disk.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn revive_stores(&mut self) -> Result<(), StackError> {
        self.start_etcd().await?;
        self.start_nats().await
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        let mut environment = vec![
            ("DYN_FILE_KV", self.store_directory()),
            ("ETCD_ENDPOINTS", format!("http://{}", local(self.etcd))),
            ("NATS_SERVER", format!("nats://{}", local(self.nats))),
            ("HF_HUB_OFFLINE", "1".into()),
        ];
        if self.case.plane == Plane::Broker {
            let [publishers, subscribers] =
                self.broker.map(|port| format!("tcp://{}", local(port)));
            let broker = format!("xsub={publishers} , xpub={subscribers}");
            environment.push(("DYN_ZMQ_BROKER_URL", broker));
        }
        environment
    }

    fn planes(&self) -> Vec<String> {
        let discovery = match self.case.discovery {
            Discovery::File => "file",
            Discovery::Etcd => "etcd",
        };
        let plane = match self.case.plane {
            Plane::Zmq | Plane::Broker => "zmq",
            Plane::Nats => "nats",
        };
        let words =
            ["--discovery-backend", discovery, "--request-plane", "tcp", "--event-plane", plane];
        words.map(str::to_owned).into()
    }

    fn start_disaggregated(&mut self, role: &str, at: usize) -> Result<(), StackError> {
        let port = free_port()?.to_string();
        let mut more = vec!["--disaggregation-mode", role];
        if role == "prefill" {
            more.extend(["--bootstrap-ports", &port]);
        }
        self.start_worker(&format!("{role}-{at}"), &more)
    }

    fn start_worker(&mut self, name: &str, more: &[&str]) -> Result<(), StackError> {
        let mut arguments: Vec<String> = ["-m", "dynamo.mocker"].map(str::to_owned).into();
        arguments.extend(self.planes());
        let speedup = if self.case.replicas { SPEEDUP_REPLICAS } else { SPEEDUP };
        let pairs = [
            ("--model-path", self.model.display().to_string()),
            ("--model-name", MODEL.to_owned()),
            ("--engine-type", self.case.engine.to_owned()),
            ("--num-gpu-blocks-override", BLOCKS.to_string()),
            ("--block-size", BLOCK_SIZE.to_string()),
            ("--speedup-ratio", speedup.to_string()),
        ];
        arguments.extend(pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
        arguments.extend(more.iter().map(|word| (*word).to_owned()));
        let mut environment = self.environment();
        // Dynamo takes it for a signed number of 16 bits. In a namespace of its
        // own every port is free.
        let system = SYSTEM_PORTS_FROM + self.workers.len();
        environment.push(("DYN_SYSTEM_PORT", system.to_string()));
        let child = Child::start_with(name, &self.python, &arguments, &environment, &self.folder)?;
        self.workers.push(child);
        Ok(())
    }

    fn start_frontend(&mut self, at: usize) -> Result<(), StackError> {
        let port = self.start_server(&format!("frontend-{at}"), "direct", &[])?;
        self.frontends.push(port);
        Ok(())
    }

    fn start_router(&mut self, name: &str, more: &[&str]) -> Result<(), StackError> {
        let port = self.start_server(name, "kv", more)?;
        self.routers.push(port);
        Ok(())
    }

    fn start_server(&mut self, name: &str, mode: &str, more: &[&str]) -> Result<u16, StackError> {
        let port = free_port()?;
        let mut arguments: Vec<String> = ["-m", "dynamo.frontend"].map(str::to_owned).into();
        arguments.extend(self.planes());
        let words = ["--router-mode", mode, "--http-host", "127.0.0.1", "--http-port"];
        arguments.extend(words.map(str::to_owned));
        arguments.push(port.to_string());
        arguments.extend(more.iter().map(|word| (*word).to_owned()));
        let environment = self.environment();
        let child = Child::start_with(name, &self.python, &arguments, &environment, &self.folder)?;
        self.servers.push(child);
        Ok(port)
    }

    async fn ready(&mut self) -> Result<(), StackError> {
        let deadline = Instant::now() + READY_WITHIN;
        for port in self.frontends.iter().chain(&self.routers).copied().collect::<Vec<_>>() {
            while !offers_model(port).await {
                if let Some((name, log)) = self.ended() {
                    return Err(StackError::Ended(name, log));
                }
                if Instant::now() > deadline {
                    let log = self.servers.first().map(Child::log_tail).unwrap_or_default();
                    return Err(StackError::NotReady("the frontend's /v1/models", log));
                }
                sleep(POLL_START).await;
            }
        }
        Ok(())
    }
}

async fn offers_model(port: u16) -> bool {
    let page = get(&local(port), "/v1/models").await.ok().and_then(|answer| answer.json());
    let models = page.and_then(|page| page.get("data")?.as_array().cloned());
    models.into_iter().flatten().any(|model| model.get("id") == Some(&Value::from(MODEL)))
}

/// The small model as Dynamo wants it: with the two files that it reads beside
/// the tokenizer's. No weights.
///
/// - `positions_max`: longest prompt with its answer, in tokens.
pub(crate) fn write_model(
    tokenizer: &Path,
    folder: &Path,
    positions_max: u32,
) -> std::io::Result<PathBuf> {
    let model = folder.join("model");
    std::fs::create_dir_all(&model)?;
    for entry in std::fs::read_dir(tokenizer)? {
        let path = entry?.path();
        if let Some(name) = path.file_name().filter(|_| path.is_file()) {
            std::fs::copy(&path, model.join(name))?;
        }
    }
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 2048,
        "max_position_embeddings": positions_max, "bos_token_id": 2001, "eos_token_id": 2002,
    });
    std::fs::write(model.join("config.json"), config.to_string())?;
    let generation = json!({ "eos_token_id": 2002 });
    std::fs::write(model.join("generation_config.json"), generation.to_string())?;
    Ok(model)
}
