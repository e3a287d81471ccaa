//! Launch: configuration files, start, readiness, stop.
//!
//! Every wait is for a condition that is looked at, within a named bound; what
//! was not reached, and the end of the log concerned, is in the error.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper::body::Bytes;
use tempfile::TempDir;
use tokio::time::sleep;

use super::child::Child;
use super::client::{Chat, get, post};
use super::envoy::{self, Bootstrap};
use super::limits::{ENGINES, POLL_START, READY_WITHIN, REQUEST_WITHIN};
use super::options::Options;
use super::ports::free_port;

/// Model name in every request.
pub const MODEL: &str = "qwen3";

/// Consecutive requests, each on a connection of its own, that must have been
/// routed by cache before the gateway counts as warm: enough to meet both of
/// Envoy's worker threads (one is missed once in 2000 starts).
const WARM_REQUESTS: u32 = 12;

/// Why the stack is not up.
#[derive(Debug)]
pub enum StackError {
    /// A file or process could not be made.
    Io(std::io::Error),
    /// A variable of a template has no value.
    Unfilled(String),
    /// A process ended by itself; its name and the end of its log.
    Ended(String, String),
    /// Something did not come in time; what, and the end of the log concerned.
    NotReady(&'static str, String),
}

impl fmt::Display for StackError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => write!(formatter, "cannot start: {error}"),
            Self::Unfilled(name) => write!(formatter, "no value for {name} in the bootstrap"),
            Self::Ended(name, log) => write!(formatter, "{name} ended; its log:\n{log}"),
            Self::NotReady(what, log) => {
                write!(formatter, "{what}: not within {READY_WITHIN:?}; log:\n{log}")
            }
        }
    }
}

impl std::error::Error for StackError {}

impl From<std::io::Error> for StackError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

/// How large the engines are and how long their work takes.
#[derive(Clone, Copy, Debug)]
pub struct EngineShape {
    /// Blocks of the cache.
    pub blocks: usize,
    /// Prefill, per uncached token.
    pub prefill_us_per_token: u64,
    /// Decode, per token.
    pub decode_us_per_token: u64,
}

/// Longest prompt and answer of the engines, in tokens, unless they are larger.
const MODEL_TOKENS: usize = 131_072;

/// Tokens per block, everywhere.
pub const BLOCK_SIZE: u32 = 16;

/// The ports of one engine.
#[derive(Clone, Copy, Debug)]
pub struct EnginePorts {
    /// HTTP.
    pub http: u16,
    /// KV events.
    pub events: u16,
    /// Replay.
    pub replay: u16,
}

/// All ports, on 127.0.0.1.
#[derive(Clone, Debug)]
pub struct Ports {
    /// Gateway with the module.
    pub gateway: u16,
    /// Its admin port.
    pub admin: u16,
    /// Gateway without the module.
    pub plain: u16,
    /// Its admin port.
    pub plain_admin: u16,
    /// Gateway with the module in mode `body`.
    pub body: u16,
    /// Its admin port.
    pub body_admin: u16,
    /// Sidecar's feed.
    pub feed: u16,
    /// Sidecar's status.
    pub status: u16,
    /// Engines.
    pub engines: [EnginePorts; ENGINES],
}

impl Ports {
    /// Picks ports that are free now.
    fn pick(gateway: Option<u16>) -> std::io::Result<Self> {
        let engine = || -> std::io::Result<EnginePorts> {
            Ok(EnginePorts { http: free_port()?, events: free_port()?, replay: free_port()? })
        };
        let engines = [engine()?, engine()?, engine()?];
        Ok(Self {
            engines,
            gateway: match gateway {
                Some(port) => port,
                None => free_port()?,
            },
            admin: free_port()?,
            plain: free_port()?,
            plain_admin: free_port()?,
            body: free_port()?,
            body_admin: free_port()?,
            feed: free_port()?,
            status: free_port()?,
        })
    }
}

/// `127.0.0.1:port`.
#[must_use]
pub fn local(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

/// One Envoy to be started.
struct Gateway {
    name: &'static str,
    template: &'static str,
    port: u16,
    admin: u16,
    workers: [u16; ENGINES],
}

/// The running parts.
pub struct Stack {
    /// Options it was started with.
    pub options: Options,
    /// Ports in use.
    pub ports: Ports,
    folder: Option<TempDir>,
    path: PathBuf,
    engines: Vec<Child>,
    sidecar: Option<Child>,
    envoys: Vec<Child>,
    /// From Envoy's start to its readiness.
    pub envoy_ready: Option<Duration>,
}

impl Stack {
    /// Starts the engines alone.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn engines(
        options: Options,
        shape: EngineShape,
        gateway: Option<u16>,
    ) -> Result<Self, StackError> {
        let folder = tempfile::Builder::new().prefix("warmpath-").tempdir()?;
        let mut stack = Self {
            ports: Ports::pick(gateway)?,
            path: folder.path().to_path_buf(),
            folder: Some(folder),
            engines: Vec::new(),
            sidecar: None,
            envoys: Vec::new(),
            envoy_ready: None,
            options,
        };
        for (index, ports) in stack.ports.engines.iter().enumerate() {
            let name = engine_name(index);
            let arguments = engine_arguments(&stack.options.model_dir, &name, ports, shape);
            let program = stack.options.program("engine-sim");
            stack.engines.push(Child::start(&name, &program, &arguments, &stack.path)?);
        }
        for (child, ports) in stack.engines.iter_mut().zip(&stack.ports.engines) {
            wait_until_ok("an engine's /health", child, ports.http, "/health").await?;
        }
        Ok(stack)
    }

    /// Starts engines, sidecar and Envoy, and waits until requests are routed
    /// by cache on every worker thread.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn start(
        options: Options,
        shape: EngineShape,
        gateway: Option<u16>,
    ) -> Result<Self, StackError> {
        let mut stack = Self::engines(options, shape, gateway).await?;
        stack.write_sidecar_files(shape)?;
        stack.start_sidecar().await?;
        let started = Instant::now();
        stack.start_envoy(stack.module_gateway()).await?;
        stack.envoy_ready = Some(started.elapsed());
        stack.warm_up().await?;
        Ok(stack)
    }

    /// Starts the gateway without the module.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn start_plain(&mut self) -> Result<(), StackError> {
        let gateway = Gateway {
            name: "envoy-plain",
            template: "envoy-round-robin.yaml",
            port: self.ports.plain,
            admin: self.ports.plain_admin,
            workers: self.ports.engines.map(|ports| ports.http),
        };
        self.start_envoy(gateway).await
    }

    /// Starts the gateway in mode `body`, in front of these frontends.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn start_body_gateway(
        &mut self,
        frontends: [u16; ENGINES],
    ) -> Result<(), StackError> {
        let gateway = Gateway {
            name: "envoy-body",
            template: "envoy-body.yaml",
            port: self.ports.body,
            admin: self.ports.body_admin,
            workers: frontends,
        };
        self.start_envoy(gateway).await
    }

    fn module_gateway(&self) -> Gateway {
        Gateway {
            name: "envoy",
            template: "envoy.yaml",
            port: self.ports.gateway,
            admin: self.ports.admin,
            workers: self.ports.engines.map(|ports| ports.http),
        }
    }

    /// Starts the sidecar and waits until it is ready.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn start_sidecar(&mut self) -> Result<(), StackError> {
        self.spawn_sidecar()?;
        if let Some(sidecar) = &mut self.sidecar {
            wait_until_ok("the sidecar's /readyz", sidecar, self.ports.status, "/readyz").await?;
        }
        Ok(())
    }

    /// Starts the sidecar without waiting.
    ///
    /// # Errors
    ///
    /// [`StackError::Io`].
    pub fn spawn_sidecar(&mut self) -> Result<(), StackError> {
        let arguments = ["--config".to_owned(), "sidecar.yaml".to_owned()];
        let program = self.options.program("warmpath-sidecar");
        self.sidecar = Some(Child::start("sidecar", &program, &arguments, &self.path)?);
        Ok(())
    }

    /// Kills the sidecar without warning.
    pub async fn kill_sidecar(&mut self) {
        if let Some(mut sidecar) = self.sidecar.take() {
            sidecar.kill_now().await;
        }
    }

    /// Kills an engine without warning.
    pub async fn kill_engine(&mut self, index: usize) {
        if index < self.engines.len() {
            self.engines.remove(index).kill_now().await;
        }
    }

    /// Address of the gateway with the module.
    #[must_use]
    pub fn gateway(&self) -> String {
        local(self.ports.gateway)
    }

    /// Address of the gateway without it.
    #[must_use]
    pub fn plain(&self) -> String {
        local(self.ports.plain)
    }

    /// Addresses of the engines.
    pub fn engine_addresses(&self) -> impl Iterator<Item = String> + '_ {
        self.ports.engines.iter().map(|ports| local(ports.http))
    }

    /// Name of a process that ended by itself, with the end of its log.
    pub fn ended(&mut self) -> Option<(String, String)> {
        let children = self.engines.iter_mut().chain(&mut self.sidecar).chain(&mut self.envoys);
        children
            .filter_map(|child| {
                child
                    .ended()
                    .map(|status| (format!("{} ({status})", child.name()), child.log_tail()))
            })
            .next()
    }

    /// Clears every engine's cache, announced. `false` if one refused.
    pub async fn clear_caches(&self) -> bool {
        for address in self.engine_addresses() {
            let path = "/control/clear";
            let cleared = post(&address, path, &[], Bytes::new(), REQUEST_WITHIN).await;
            if !cleared.is_ok_and(|response| response.status.is_success()) {
                return false;
            }
        }
        true
    }

    /// Keeps the folder of logs and configuration, and tells where it is.
    pub fn keep_folder(&mut self) -> PathBuf {
        if let Some(folder) = self.folder.take() {
            return folder.keep();
        }
        self.path.clone()
    }

    /// Stops everything: the gateways first, so that nothing is asked of what
    /// is gone.
    pub async fn stop(mut self) {
        let sidecar = self.sidecar.take();
        let children = self.envoys.drain(..).chain(sidecar).chain(self.engines.drain(..));
        for child in children {
            child.stop().await;
        }
    }

    async fn start_envoy(&mut self, gateway: Gateway) -> Result<(), StackError> {
        let Gateway { name, template, port, admin, workers } = gateway;
        let feed = self.ports.feed;
        let bootstrap =
            Bootstrap { name, template, port, admin, feed, workers: &workers, router: "" };
        self.envoys.push(envoy::start(&self.options, &bootstrap, &self.path).await?);
        Ok(())
    }

    fn write_sidecar_files(&self, shape: EngineShape) -> std::io::Result<()> {
        let sidecar = format!(
            "feed: {{listen: \"127.0.0.1:{}\"}}\n\
             status: {{listen: \"127.0.0.1:{}\"}}\n\
             models:\n  - {{name: {MODEL}, directory: {:?}, block_size: {BLOCK_SIZE}}}\n\
             workers_file: workers.yaml\n",
            self.ports.feed, self.ports.status, self.options.model_dir,
        );
        std::fs::write(self.path.join("sidecar.yaml"), sidecar)?;
        self.set_roles(shape, ["aggregated"; ENGINES])
    }

    /// Tells the sidecar what each engine does; a running one soon reads it.
    ///
    /// # Errors
    ///
    /// If the list cannot be written.
    pub fn set_roles(&self, shape: EngineShape, roles: [&str; ENGINES]) -> std::io::Result<()> {
        let mut workers = String::from("workers:\n");
        for (index, (ports, role)) in self.ports.engines.iter().zip(roles).enumerate() {
            workers.push_str(&format!(
                "  - {{id: {}, model: {MODEL}, engine: vllm, role: {role}, \
                 endpoint: \"127.0.0.1:{}\", kv_events: \"tcp://127.0.0.1:{}\", \
                 replay: \"tcp://127.0.0.1:{}\", total_kv_blocks: {}}}\n",
                index + 1,
                ports.http,
                ports.events,
                ports.replay,
                shape.blocks,
            ));
        }
        // Beside and renamed: the sidecar must never read half of it.
        std::fs::write(self.path.join("workers.new"), workers)?;
        std::fs::rename(self.path.join("workers.new"), self.path.join("workers.yaml"))
    }

    /// Waits until the gateway routes by cache. First gives every engine
    /// something to announce: a worker whose events were never seen is not
    /// yet known to count tokens as the gateway does.
    async fn warm_up(&mut self) -> Result<(), StackError> {
        let chat =
            |text: String| Chat { messages: vec![("user", text)], max_tokens: 1, stream: false };
        for (index, address) in self.engine_addresses().enumerate() {
            let text = format!("engine {index} says hello {}", "and hello again ".repeat(32));
            // A failure shows below, where the gateway stays cold.
            let _answer = chat(text).send(&address, MODEL, &[]).await;
        }
        let deadline = Instant::now() + READY_WITHIN;
        let gateway = self.gateway();
        let (mut warm, mut sent) = (0, 0_u64);
        let mut last = String::from("no answer yet");
        while warm < WARM_REQUESTS {
            if let Some((name, log)) = self.ended() {
                return Err(StackError::Ended(name, log));
            }
            if Instant::now() > deadline {
                let log = self.envoys.first().map(Child::log_tail).unwrap_or_default();
                let log = format!("{log}\nlast answer: {last}");
                return Err(StackError::NotReady("routing by cache", log));
            }
            sent += 1;
            let text = format!("probe {sent} {}", "of the gateway ".repeat(16));
            match chat(text).send(&gateway, MODEL, &[]).await {
                Ok(answer) if answer.reason() == Some("kv") => warm += 1,
                Ok(answer) => {
                    warm = 0;
                    last = format!("200, reason {:?}", answer.reason());
                    sleep(POLL_START).await;
                }
                Err(error) => {
                    warm = 0;
                    last = error.to_string();
                    sleep(POLL_START).await;
                }
            }
        }
        Ok(())
    }
}

/// Name of an engine, as in `x-engine-id`.
#[must_use]
pub fn engine_name(index: usize) -> String {
    format!("engine-{}", index + 1)
}

fn engine_arguments(
    model_dir: &Path,
    name: &str,
    ports: &EnginePorts,
    shape: EngineShape,
) -> Vec<String> {
    // A cache that holds more than the usual longest prompt may have longer ones.
    let model_tokens_max = MODEL_TOKENS.max(shape.blocks * BLOCK_SIZE as usize);
    let pairs = [
        ("--model-dir", model_dir.display().to_string()),
        ("--name", name.to_owned()),
        ("--model-name", MODEL.to_owned()),
        ("--port", ports.http.to_string()),
        ("--events-port", ports.events.to_string()),
        ("--replay-port", ports.replay.to_string()),
        ("--block-size", BLOCK_SIZE.to_string()),
        ("--blocks", shape.blocks.to_string()),
        ("--max-model-len", model_tokens_max.to_string()),
        ("--prefill-us-per-token", shape.prefill_us_per_token.to_string()),
        ("--decode-us-per-token", shape.decode_us_per_token.to_string()),
    ];
    pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
}

/// Waits for a 200 from a process, or for its end.
///
/// # Errors
///
/// [`StackError::Ended`] or [`StackError::NotReady`].
pub async fn wait_until_ok(
    what: &'static str,
    child: &mut Child,
    port: u16,
    path: &str,
) -> Result<(), StackError> {
    let deadline = Instant::now() + READY_WITHIN;
    loop {
        if get(&local(port), path).await.is_ok_and(|response| response.status.is_success()) {
            return Ok(());
        }
        if let Some(status) = child.ended() {
            let name = format!("{} ({status})", child.name());
            return Err(StackError::Ended(name, child.log_tail()));
        }
        if Instant::now() > deadline {
            return Err(StackError::NotReady(what, child.log_tail()));
        }
        sleep(POLL_START).await;
    }
}

/// Fills a bootstrap template as `fill.sh` does: comment lines go, every
/// `${NAME}` is replaced.
///
/// # Errors
///
/// [`StackError::Unfilled`] with the first name that has no value.
pub fn fill(template: &str, values: &[(&str, String)]) -> Result<String, StackError> {
    let lines = template.lines().filter(|line| !line.trim_start().starts_with('#'));
    let mut text: String = lines.flat_map(|line| [line, "\n"]).collect();
    for (name, value) in values {
        text = text.replace(&format!("${{{name}}}"), value);
    }
    match text.split_once("${") {
        Some((_, rest)) => {
            let name = rest.split('}').next().unwrap_or_default();
            Err(StackError::Unfilled(name.to_owned()))
        }
        None => Ok(text),
    }
}

#[cfg(test)]
mod tests;
