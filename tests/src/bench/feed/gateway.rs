//! Gateway: a sidecar that follows the engines, and Envoy as it is shipped, with
//! one worker thread, the module with hooks and a listener that reads them.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::time::sleep;

use super::engines::BLOCK_SIZE;
use super::probe::Seen;
use crate::bookings::gateway::hooks_module;
use crate::stack::child::Child;
use crate::stack::client::get;
use crate::stack::envoy;
use crate::stack::gateway::start_sidecar;
use crate::stack::launch::{StackError, fill, local};
use crate::stack::limits::{POLL, POLL_START};
use crate::stack::options::Options;
use crate::stack::ports::free_port;

/// The model of all workers.
pub(super) const MODEL: &str = "tiny";

/// Longest time for the gateway to come to a state that is waited for.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);

/// The listener that tells what the hooks saw, put before the clusters.
const READER: &str = r#"
  - name: reader
    address: {socket_address: {address: 127.0.0.1, port_value: ${READER_PORT}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: reader
          http_filters:
          - name: reader
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm
              config:
                name: reader
                root_id: reader
                # The same code under the same id with the same restrictions: the same VM.
                vm_config:
                  vm_id: warmpath
                  runtime: envoy.wasm.runtime.v8
                  code: {local: {filename: "${WASM_FILE}"}}
                configuration:
                  "@type": type.googleapis.com/google.protobuf.StringValue
                  value: feed-reader
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
          route_config:
            virtual_hosts:
            - {name: none, domains: ["*"], routes: [{match: {prefix: /}, direct_response: {status: 404}}]}

  clusters:
"#;

/// [`READER`] with the restrictions of the plugin that routes.
fn reader_for(template: &str) -> String {
    const VM: &str = "                vm_config:\n";
    let restrictions = template
        .find("                capability_restriction_config:\n")
        .and_then(|from| template.get(from..)?.split(VM).next())
        .unwrap_or_default();
    READER.replacen(VM, &format!("{restrictions}{VM}"), 1)
}

/// A worker as the sidecar is told of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Listed {
    pub(super) id: u64,
    pub(super) http: u16,
    pub(super) events: u16,
    pub(super) replay: u16,
    pub(super) blocks: u64,
}

/// The sidecar of one scenario.
pub(super) struct Sidecar {
    child: Child,
    feed: u16,
    status: u16,
}

impl Sidecar {
    /// Starts it.
    pub(super) async fn start(
        options: &Options,
        workers: &[Listed],
        folder: &Path,
    ) -> Result<Self, StackError> {
        let (feed, status) = (free_port()?, free_port()?);
        let mut config = format!(
            "feed: {{listen: {:?}}}\nstatus: {{listen: {:?}}}\n\
             models:\n  - {{name: {MODEL}, directory: {:?}, block_size: {BLOCK_SIZE}}}\nworkers:\n",
            local(feed),
            local(status),
            options.model_dir,
        );
        for Listed { id, http, events, replay, blocks } in workers {
            // Writing to a string cannot fail.
            let _written = writeln!(
                config,
                "  - {{id: {id}, model: {MODEL}, engine: vllm, endpoint: \"127.0.0.1:{http}\", \
                 kv_events: \"tcp://127.0.0.1:{events}\", replay: \"tcp://127.0.0.1:{replay}\", \
                 total_kv_blocks: {blocks}}}"
            );
        }
        std::fs::write(folder.join("sidecar.yaml"), config)?;
        let program = options.program("warmpath-sidecar");
        let child = start_sidecar(&program, status, folder).await?;
        Ok(Self { child, feed, status })
    }

    /// The number of the last batch that was applied of each worker, and its blocks.
    pub(super) async fn applied(&self) -> Option<Vec<(Option<u64>, u64)>> {
        let page = get(&local(self.status), "/v1/state").await.ok()?.json()?;
        let workers = page.get("workers")?.as_array()?;
        let number = |worker: &Value, key: &str| worker.get(key).and_then(Value::as_u64);
        Some(
            workers
                .iter()
                .map(|worker| {
                    let applied = number(worker, "last_engine_sequence");
                    (applied, number(worker, "blocks").unwrap_or(0))
                })
                .collect(),
        )
    }

    /// Waits until it has applied so many batches of each worker.
    pub(super) async fn until_applied(&self, batches: &[u64]) -> Result<(), StackError> {
        let deadline = Instant::now() + SETTLED_WITHIN;
        loop {
            let applied = self.applied().await.unwrap_or_default();
            let all = applied.iter().zip(batches);
            let is_done = applied.len() == batches.len()
                && all
                    .into_iter()
                    .all(|((last, _), count)| last.is_some_and(|it| it + 1 >= *count));
            if is_done {
                return Ok(());
            }
            if Instant::now() > deadline {
                let log = format!("{}\n{applied:?} {batches:?}", self.child.log_tail());
                return Err(StackError::NotReady("the engines' events", log));
            }
            sleep(POLL_START).await;
        }
    }

    /// Time on a processor so far.
    pub(super) fn cpu(&self) -> Duration {
        cpu(&self.child)
    }

    /// Stops it in its tracks, or lets it go on.
    pub(super) fn freeze(&self, is_frozen: bool) {
        let signal = if is_frozen { Signal::SIGSTOP } else { Signal::SIGCONT };
        if let Some(id) = self.child.id().and_then(|id| i32::try_from(id).ok()) {
            // An error means that it has ended, which shows.
            let _ended = kill(Pid::from_raw(id), signal);
        }
    }

    pub(super) async fn stop(self) {
        self.child.stop().await;
    }
}

/// Envoy.
pub(super) struct Gateway {
    child: Child,
    port: u16,
    reader: u16,
}

impl Gateway {
    /// Starts it and waits until it is ready, which is before its index is.
    pub(super) async fn start(
        options: &Options,
        sidecar: &Sidecar,
        workers: &[Listed],
        blocks_max: u64,
        folder: &Path,
    ) -> Result<Self, StackError> {
        let (port, admin, reader) = (free_port()?, free_port()?, free_port()?);
        let template = std::fs::read_to_string(options.envoy_config("envoy.yaml"))?;
        let template = template.replacen("\n  clusters:\n", &reader_for(&template), 1);
        let mut values = vec![
            ("GATEWAY_ADDRESS", "127.0.0.1".to_owned()),
            ("GATEWAY_PORT", port.to_string()),
            ("ADMIN_PORT", admin.to_string()),
            ("READER_PORT", reader.to_string()),
            ("FEED_PORT", sidecar.feed.to_string()),
            ("WASM_FILE", hooks_module(options).display().to_string()),
            ("DEBUG_HEADERS", format!("true, \"index_blocks_max\": {blocks_max}")),
        ];
        let places = ["WORKER_1_PORT", "WORKER_2_PORT", "WORKER_3_PORT"];
        for (place, worker) in places.iter().zip(workers) {
            values.push((place, worker.http.to_string()));
        }
        let text = fill(&template, &values)?;
        let child = envoy::start_filled(options, "envoy", &text, 1, admin, folder).await?;
        Ok(Self { child, port, reader })
    }

    /// Address for clients.
    pub(super) fn address(&self) -> String {
        local(self.port)
    }

    /// What the hooks saw.
    ///
    /// - `resets`: times of callbacks begin anew.
    pub(super) async fn seen(&self, resets: bool) -> Option<Seen> {
        self.ask(if resets { "/reset" } else { "/" }).await
    }

    /// Lets the VM of the worker thread follow the sidecar for all, and waits
    /// until it does.
    pub(super) async fn lead(&self) -> Result<(), StackError> {
        let messages = self.ask("/lead").await.map_or(0, |seen| seen.messages.count);
        self.until("the worker thread leads", |seen| seen.messages.count > messages).await?;
        Ok(())
    }

    async fn ask(&self, path: &str) -> Option<Seen> {
        let answer = get(&local(self.reader), path).await.ok()?;
        Seen::decode(&answer.body).ok()
    }

    /// Waits until the hooks see something.
    pub(super) async fn until(
        &self,
        what: &'static str,
        holds: impl Fn(&Seen) -> bool,
    ) -> Result<Seen, StackError> {
        let deadline = Instant::now() + SETTLED_WITHIN;
        loop {
            let seen = self.seen(false).await;
            if let Some(seen) = seen.as_ref().filter(|seen| holds(seen)) {
                return Ok(seen.clone());
            }
            if Instant::now() > deadline {
                let seen = seen.map(|seen| Seen { markers: Vec::new(), ..seen });
                let log = format!("{}\n{seen:?}", self.child.log_tail());
                return Err(StackError::NotReady(what, log));
            }
            sleep(POLL).await;
        }
    }

    /// Time on a processor so far.
    pub(super) fn cpu(&self) -> Duration {
        cpu(&self.child)
    }

    /// Gives Envoy's threads a real-time priority, so that callbacks take the time
    /// that their work does, not that of waiting for a processor. All of them: one
    /// that holds the lock of the shared data and has to wait holds up the rest.
    /// Returns whether that was allowed.
    pub(super) fn set_real_time(&self, is_real_time: bool) -> bool {
        let policy = if is_real_time { ["--rr", "--pid", "1"] } else { ["--other", "--pid", "0"] };
        let mut command = Command::new("chrt");
        command.arg("--all-tasks").args(policy).arg(self.child.id().unwrap_or(0).to_string());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    }

    /// End of its log.
    pub(super) fn log_tail(&self) -> String {
        self.child.log_tail()
    }

    pub(super) async fn stop(self) {
        self.child.stop().await;
    }
}

/// Time that all threads of a process spent on a processor.
fn cpu(child: &Child) -> Duration {
    let id = child.id().unwrap_or(0);
    let threads = std::fs::read_dir(format!("/proc/{id}/task"));
    let nanoseconds = threads
        .into_iter()
        .flatten()
        .filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok());
    Duration::from_nanos(nanoseconds.sum())
}
