//! Rivals: the routers that are compared, and how each is started.
//!
//! All with their default settings but for what a policy's name asks for.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::engines::{BLOCK_SIZE, BOUNDS, ENGINES};
use super::fleet::Fleet;
use crate::dynamo::peers::write_model;
use crate::stack::child::Child;
use crate::stack::client::get;
use crate::stack::envoy::{self, Bootstrap};
use crate::stack::gateway::{Gateway, Mode};
use crate::stack::launch::{MODEL, StackError, local};
use crate::stack::options::Options;
use crate::stack::ports::free_port;

/// A router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rival {
    /// Envoy alone, one engine after the other.
    RoundRobin,
    /// Envoy with Warmpath, Dynamo's formula.
    Warmpath,
    /// Envoy with Warmpath, expected time.
    WarmpathTime,
    /// Dynamo's frontend.
    Dynamo,
    /// SGLang's router, `cache_aware`.
    Sglang,
    /// Shepherd model gateway, `cache_aware`.
    Smg,
    /// vLLM's router, `kv_aware`.
    VllmKv,
    /// vLLM's router, `cache_aware`.
    VllmText,
}

impl Rival {
    /// All, in the order of the tables.
    pub const ALL: [Self; 8] = [
        Self::RoundRobin,
        Self::Warmpath,
        Self::WarmpathTime,
        Self::Dynamo,
        Self::Sglang,
        Self::Smg,
        Self::VllmKv,
        Self::VllmText,
    ];

    /// Name in tables and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "round-robin",
            Self::Warmpath => "warmpath",
            Self::WarmpathTime => "warmpath-time",
            Self::Dynamo => "dynamo",
            Self::Sglang => "sglang",
            Self::Smg => "smg",
            Self::VllmKv => "vllm-kv",
            Self::VllmText => "vllm-text",
        }
    }

    /// Whether it is ours.
    #[must_use]
    pub fn is_ours(self) -> bool {
        matches!(self, Self::Warmpath | Self::WarmpathTime)
    }
}

/// A running router.
pub struct Running {
    /// Where it listens.
    pub address: String,
    /// Its processes, with those it needs before the engines.
    children: Vec<Child>,
    gateway: Option<Gateway>,
}

impl Running {
    /// Starts a router before a fleet. It may not be ready yet.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn start(
        rival: Rival,
        options: &Options,
        fleet: &Fleet,
        folder: &Path,
    ) -> Result<Self, StackError> {
        match rival {
            Rival::RoundRobin => round_robin(options, fleet, folder).await,
            Rival::Warmpath => warmpath(options, fleet, folder, "").await,
            Rival::WarmpathTime => warmpath(options, fleet, folder, TIME_SETTINGS).await,
            Rival::Dynamo => dynamo(options, fleet, folder).await,
            Rival::Sglang => text("sglang-router", "sglang-router", options, fleet, folder),
            Rival::Smg => text("smg", "smg", options, fleet, folder),
            Rival::VllmKv => vllm(true, options, fleet, folder),
            Rival::VllmText => vllm(false, options, fleet, folder),
        }
    }

    /// Name and end of the log of a process that ended by itself.
    pub fn ended(&mut self) -> Option<(String, String)> {
        let own = self.children.iter_mut();
        let ended = own.filter_map(|child| child.ended().map(|_| child));
        let ended = ended.map(|child| (child.name().to_owned(), child.log_tail())).next();
        ended.or_else(|| self.gateway.as_mut()?.ended())
    }

    /// Ends of the logs of all processes.
    #[must_use]
    pub fn logs(&self) -> String {
        let logs =
            self.children.iter().map(|child| format!("{}: {}", child.name(), child.log_tail()));
        logs.collect::<Vec<_>>().join("\n")
    }

    /// Its processes.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        let gateway = self.gateway.iter().flat_map(Gateway::processes);
        self.children.iter().filter_map(Child::id).chain(gateway).collect()
    }

    /// Stops it.
    pub async fn stop(self) {
        if let Some(gateway) = self.gateway {
            gateway.stop().await;
        }
        // The last one first: frontends before workers.
        for child in self.children.into_iter().rev() {
            child.stop().await;
        }
    }
}

/// Longest prompt with its answer that Dynamo lets through, in tokens: those of the
/// traces are shorter.
const POSITIONS_MAX: u32 = 131_072;

/// What the plugin's configuration says to choose by expected time.
const TIME_SETTINGS: &str = "{\"worker_selection_policy\": \"expected-time\"}";

async fn round_robin(
    options: &Options,
    fleet: &Fleet,
    folder: &Path,
) -> Result<Running, StackError> {
    let (port, admin) = (free_port()?, free_port()?);
    let workers: Vec<u16> = fleet.ports.iter().map(|ports| ports.http).collect();
    let bootstrap = Bootstrap {
        name: "envoy-plain",
        template: "envoy-round-robin.yaml",
        port,
        admin,
        feed: 0,
        workers: &workers,
        router: "",
    };
    let envoy = envoy::start(options, &bootstrap, folder).await?;
    Ok(Running { address: local(port), children: vec![envoy], gateway: None })
}

async fn warmpath(
    options: &Options,
    fleet: &Fleet,
    folder: &Path,
    settings: &str,
) -> Result<Running, StackError> {
    let mut list = String::from("workers:\n");
    for (at, ports) in fleet.ports.iter().enumerate() {
        list.push_str(&format!(
            "  - {{id: {}, model: {MODEL}, engine: vllm, role: aggregated, endpoint: {:?}, \
             kv_events: \"tcp://{}\", replay: \"tcp://{}\", total_kv_blocks: {}}}\n",
            at + 1,
            local(ports.http),
            local(ports.events),
            local(ports.replay),
            fleet.blocks,
        ));
    }
    std::fs::write(folder.join("workers.yaml"), list)?;
    let sources = format!(
        "models:\n  - {{name: {MODEL}, directory: {:?}, block_size: {BLOCK_SIZE}}}\n\
         workers_file: workers.yaml\n",
        options.model_dir,
    );
    let workers: Vec<u16> = fleet.ports.iter().map(|ports| ports.http).collect();
    let gateway =
        Gateway::start_with(options, Mode::Endpoint, &sources, &workers, settings, folder).await?;
    Ok(Running { address: gateway.address(), children: Vec::new(), gateway: Some(gateway) })
}

/// A program of one of the environments that `scripts/bench-quality.sh` makes.
fn program(options: &Options, environment: &str, name: &str) -> PathBuf {
    options.root.join(".cache/peers").join(environment).join("bin").join(name)
}

fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).into()
}

/// A router that knows what it has sent where, and HTTP.
fn text(
    name: &'static str,
    environment: &str,
    options: &Options,
    fleet: &Fleet,
    folder: &Path,
) -> Result<Running, StackError> {
    let (port, metrics) = (free_port()?, free_port()?);
    let mut arguments = words(["launch", "--host", "127.0.0.1", "--policy", "cache_aware"]);
    arguments.extend(words(["--prometheus-host", "127.0.0.1", "--log-level", "warn", "--port"]));
    arguments.extend([port.to_string(), "--prometheus-port".into(), metrics.to_string()]);
    if name == "smg" {
        arguments.extend(words(["--disable-tokenizer-autoload", "--health-check-port"]));
        arguments.push(free_port()?.to_string());
    }
    arguments.push("--worker-urls".into());
    arguments.extend(fleet.addresses().map(|address| format!("http://{address}")));
    let child = Child::start(name, &program(options, environment, name), &arguments, folder)?;
    Ok(Running { address: local(port), children: vec![child], gateway: None })
}

fn vllm(
    by_events: bool,
    options: &Options,
    fleet: &Fleet,
    folder: &Path,
) -> Result<Running, StackError> {
    let (port, metrics) = (free_port()?, free_port()?);
    let mut arguments = words(["--host", "127.0.0.1", "--prometheus-host", "127.0.0.1"]);
    arguments.extend(words(["--log-level", "warning", "--port"]));
    arguments.extend([port.to_string(), "--prometheus-port".into(), metrics.to_string()]);
    arguments.push("--worker-urls".into());
    arguments.extend(fleet.addresses().map(|address| format!("http://{address}")));
    if by_events {
        arguments.extend(words(["--policy", "kv_aware", "--kv-event-model", MODEL]));
        arguments.extend(["--kv-event-block-size".into(), BLOCK_SIZE.to_string()]);
        for ports in &fleet.ports {
            arguments.push("--kv-event-source".into());
            arguments.push(format!("http://{}=tcp://{}", local(ports.http), local(ports.events)));
        }
    } else {
        arguments.extend(words(["--policy", "cache_aware"]));
    }
    let program = program(options, "vllm-router", "vllm-router");
    let child = Child::start("vllm-router", &program, &arguments, folder)?;
    Ok(Running { address: local(port), children: vec![child], gateway: None })
}

/// What Dynamo's programs are told: file discovery, everything on the loopback interface.
pub fn dynamo_environment(folder: &Path) -> [(&'static str, String); 9] {
    [
        ("DYN_DISCOVERY_BACKEND", "file".to_owned()),
        ("DYN_FILE_KV", folder.join("discovery").display().to_string()),
        ("DYN_REQUEST_PLANE", "tcp".to_owned()),
        ("DYN_EVENT_PLANE", "zmq".to_owned()),
        ("DYN_EVENT_PLANE_HOST", "127.0.0.1".to_owned()),
        ("DYN_TCP_RPC_HOST", "127.0.0.1".to_owned()),
        ("DYN_TCP_RESPONSE_STREAM_HOST", "127.0.0.1".to_owned()),
        ("DYN_LOG", "warn".to_owned()),
        ("HF_HUB_OFFLINE", "1".to_owned()),
    ]
}

/// Dynamo's frontend, and a worker of its kind before each engine.
async fn dynamo(options: &Options, fleet: &Fleet, folder: &Path) -> Result<Running, StackError> {
    let model = write_model(&options.model_dir, folder, POSITIONS_MAX)?;
    let environment = dynamo_environment(folder);
    let script = options.root.join("tests/quality/dynamo_worker.py").display().to_string();
    let mut children = Vec::new();
    for (at, ports) in fleet.ports.iter().enumerate() {
        let arguments = [
            script.clone(),
            model.display().to_string(),
            MODEL.to_owned(),
            ports.http.to_string(),
            ports.events.to_string(),
            BLOCK_SIZE.to_string(),
            fleet.blocks.to_string(),
            BOUNDS.step_tokens_max.to_string(),
        ];
        let name = format!("dynamo-worker-{}", at + 1);
        let python = &options.python;
        children.push(Child::start_with(&name, python, &arguments, &environment, folder)?);
    }
    let port = free_port()?;
    let mut arguments = words(["-m", "dynamo.frontend", "--router-mode", "kv"]);
    arguments.extend(words(["--tokenizer", "fastokens", "--http-host", "127.0.0.1"]));
    arguments.extend(["--http-port".into(), port.to_string()]);
    let python = &options.python;
    children.push(Child::start_with("dynamo", python, &arguments, &environment, folder)?);
    Ok(Running { address: local(port), children, gateway: None })
}

/// Whether Dynamo's frontend has found all workers.
pub async fn dynamo_is_whole(address: &str) -> bool {
    let page = get(address, "/health").await.ok().and_then(|answer| answer.json());
    let instances = page.and_then(|page| page.get("instances")?.as_array().cloned());
    let generate = |instance: &&Value| instance.get("endpoint") == Some(&Value::from("generate"));
    instances.into_iter().flatten().collect::<Vec<_>>().iter().filter(generate).count() >= ENGINES
}
