//! Gateway: Envoy, the sidecar and the workers of one scenario.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::time::sleep;

use super::reader::Reader;
use super::workers::Workers;
use crate::stack::child::Child;
use crate::stack::client::{Chat, get};
use crate::stack::envoy;
use crate::stack::gateway::{Mode, start_sidecar};
use crate::stack::launch::{StackError, fill, local};
use crate::stack::limits::{POLL, POLL_START, READY_WITHIN};
use crate::stack::options::Options;
use crate::stack::ports::free_port;

const TEMPLATE: &str = include_str!("envoy.yaml");

/// The model whose workers do everything.
pub const MODEL: &str = "whole";

/// The model that has prefill and decode workers.
pub const DIVIDED_MODEL: &str = "divided";

/// The model that has no workers.
pub const EMPTY_MODEL: &str = "empty";

/// Consecutive requests that must have found a worker before the gateway counts
/// as ready, on connections that are dealt to the worker threads in turn.
const READY_REQUESTS: u32 = 16;

/// One scenario's gateway.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// Name of its folder.
    pub name: &'a str,
    /// Envoy's worker threads.
    pub concurrency: u32,
    /// How the worker is named.
    pub mode: Mode,
    /// Whether the module is the one that can be crashed.
    pub can_crash: bool,
    /// Further members of the plugin's configuration, each behind a comma.
    pub settings: &'a str,
    /// Workers that do everything.
    pub workers: usize,
    /// Workers that compute prompts only, and those that decode only.
    pub divided: (usize, usize),
}

/// The running parts.
pub struct Gateway {
    /// Port for clients.
    pub port: u16,
    admin: u16,
    reader: u16,
    /// The workers: first those that do everything.
    pub workers: Workers,
    sidecar: Child,
    envoy: Child,
}

/// The module with hooks, which is built beside the other.
#[must_use]
pub fn hooks_module(options: &Options) -> PathBuf {
    options.wasm.with_file_name("warmpath-hooks.wasm")
}

impl Gateway {
    /// Starts everything and waits until requests find workers.
    ///
    /// - `runtime`: where the workers run.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn start(
        options: &Options,
        plan: &Plan<'_>,
        runtime: &Handle,
        folder: &Path,
    ) -> Result<Self, StackError> {
        let folder = folder.join(plan.name);
        std::fs::create_dir(&folder)?;
        let (prefill, decode) = plan.divided;
        let workers = Workers::start(plan.workers + prefill + decode, runtime)?;
        let (feed, status) = (free_port()?, free_port()?);
        std::fs::write(
            folder.join("sidecar.yaml"),
            sidecar_file(options, plan, &workers, feed, status),
        )?;
        let program = options.program("warmpath-sidecar");
        let sidecar = start_sidecar(&program, status, &folder).await?;
        let (port, admin, reader) = (free_port()?, free_port()?, free_port()?);
        let mode = match plan.mode {
            Mode::Endpoint => "endpoint",
            Mode::Body => "body",
        };
        let wasm = if plan.can_crash { hooks_module(options) } else { options.wasm.clone() };
        let endpoints: Vec<String> = workers
            .ports
            .iter()
            .map(|port| {
                format!(
                    "{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: \
                     {port}}}}}}}}}"
                )
            })
            .collect();
        let values = [
            ("ADMIN_PORT", admin.to_string()),
            ("GATEWAY_PORT", port.to_string()),
            ("READER_PORT", reader.to_string()),
            ("FEED_PORT", feed.to_string()),
            ("HOLDS_HEADERS", (plan.mode == Mode::Endpoint).to_string()),
            ("WASM_FILE", wasm.display().to_string()),
            ("READER_FILE", hooks_module(options).display().to_string()),
            (
                "CONFIGURATION",
                format!("{{\"mode\":\"{mode}\",\"debug_headers\":true{}}}", plan.settings),
            ),
            ("ENDPOINTS", endpoints.join(", ")),
        ];
        let text = fill(TEMPLATE, &values)?;
        let envoy =
            envoy::start_filled(options, "envoy", &text, plan.concurrency, admin, &folder).await?;
        let gateway = Self { port, admin, reader, workers, sidecar, envoy };
        gateway.wait_until_ready().await?;
        Ok(gateway)
    }

    async fn wait_until_ready(&self) -> Result<(), StackError> {
        let deadline = Instant::now() + READY_WITHIN;
        let (mut ready, mut sent, mut last) = (0, 0_u32, String::new());
        while ready < READY_REQUESTS {
            if Instant::now() > deadline {
                let log = format!("{}\nlast: {last}", self.envoy.log_tail());
                return Err(StackError::NotReady("requests find workers", log));
            }
            sent += 1;
            let chat = Chat {
                messages: vec![("user", format!("ready {sent}"))],
                max_tokens: 1,
                stream: false,
            };
            let answer = chat.post(&self.address(), MODEL, &[]).await;
            let header = |name| answer.as_ref().ok().and_then(|it| it.header(name));
            // Without its tokenizer a VM books an estimate, which is another load.
            let is_warm = header("x-warmpath-reason").is_some_and(|it| !it.starts_with("warming"));
            if is_warm && header("x-warmpath-worker").is_some() {
                ready += 1;
            } else {
                ready = 0;
                last = format!("{answer:?}");
                sleep(POLL_START).await;
            }
        }
        Ok(())
    }

    /// Address for clients.
    #[must_use]
    pub fn address(&self) -> String {
        local(self.port)
    }

    /// A follower of the ring log.
    #[must_use]
    pub fn reader(&self) -> Reader {
        Reader::new(local(self.reader))
    }

    /// Envoy's stats whose names contain what this regular expression finds,
    /// summed.
    pub async fn stat(&self, name: &str) -> Option<u64> {
        let page = get(&local(self.admin), &format!("/stats?filter={name}")).await.ok()?;
        let text = String::from_utf8_lossy(&page.body).into_owned();
        let values = text.lines().filter_map(|line| line.rsplit_once(": ")?.1.parse::<u64>().ok());
        values.reduce(|sum, value| sum + value)
    }

    /// Waits until a stat has a value; returns the time that took, and what it
    /// was last.
    pub async fn until_stat(
        &self,
        name: &str,
        value: u64,
        within: Duration,
    ) -> (Duration, Option<u64>) {
        let started = Instant::now();
        loop {
            let seen = self.stat(name).await;
            if seen == Some(value) || started.elapsed() > within {
                return (started.elapsed(), seen);
            }
            sleep(POLL).await;
        }
    }

    /// Name and end of the log of a process that ended by itself.
    pub fn ended(&mut self) -> Option<(String, String)> {
        [&mut self.sidecar, &mut self.envoy]
            .into_iter()
            .find_map(|child| child.ended().map(|_| (child.name().into(), child.log_tail())))
    }

    /// Stops Envoy and the sidecar.
    pub async fn stop(self) {
        self.envoy.stop().await;
        self.sidecar.stop().await;
    }
}

fn sidecar_file(
    options: &Options,
    plan: &Plan<'_>,
    workers: &Workers,
    feed: u16,
    status: u16,
) -> String {
    let model = |name: &str| {
        let directory = options.root.join("tests/models/tiny");
        format!("  - {{name: {name}, directory: {directory:?}, block_size: 16}}\n")
    };
    let mut list = String::new();
    for ((port, id), place) in workers.ports.iter().zip(1..).zip(0_usize..) {
        let (name, role) = if place < plan.workers {
            (MODEL, "aggregated")
        } else if place < plan.workers + plan.divided.0 {
            (DIVIDED_MODEL, "prefill")
        } else {
            (DIVIDED_MODEL, "decode")
        };
        list.push_str(&format!(
            "  - {{id: {id}, model: {name}, role: {role}, endpoint: \"127.0.0.1:{port}\"}}\n"
        ));
    }
    format!(
        "feed: {{listen: {:?}}}\nstatus: {{listen: {:?}}}\nmodels:\n{}{}{}workers:\n{list}",
        local(feed),
        local(status),
        model(MODEL),
        model(DIVIDED_MODEL),
        model(EMPTY_MODEL),
    )
}
