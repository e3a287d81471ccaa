//! Spoof: no client reaches a host of its choosing, in any mode, whatever has failed.
//!
//! The client's host is a trap. In the modes whose headers name the worker it is a
//! member of Envoy's cluster, so that a header that got through would be obeyed, but
//! no worker that the sidecar knows of. Requests name it in every header there is
//! and in the body, at first with everything alive, then without the sidecar, and
//! after crashes of the VMs. It must get none of them, and no worker may be shown
//! what the client wrote. A gateway without any of our filters is spoofed the same
//! way, or the rest would show nothing.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::Router;
use axum::extract::State;
use hyper::HeaderMap;
use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::sleep;

use crate::bookings::gateway::hooks_module;
use crate::stack::child::Child;
use crate::stack::client::{Response, post};
use crate::stack::envoy::{self, Bootstrap};
use crate::stack::gateway::start_sidecar;
use crate::stack::launch::{BLOCK_SIZE, MODEL, StackError, local};
use crate::stack::limits::{POLL_START, READY_WITHIN, REQUEST_WITHIN};
use crate::stack::options::Options;
use crate::stack::ports::free_port;
use crate::stack::report::Report;
use crate::stack::smoke::ROUTING_HEADERS;

/// Workers that the sidecar knows.
const WORKERS: usize = 3;

/// The worker that the client names by its id: there is none.
const FOREIGN_ID: &str = "4242424242";

/// The header by which the module of the tests is crashed.
const CRASH: &str = "x-test-crash-vm";

/// Crashes in a row: more than Envoy has worker threads, which connections are
/// dealt to.
const CRASHES: usize = 6;

/// Consecutive requests that must find a worker before a gateway counts as ready.
const READY_REQUESTS: usize = 12;

const PATH: &str = "/v1/chat/completions";

/// How a gateway hands the choice over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Endpoint,
    Buffer,
    Body,
}

impl Mode {
    const ALL: [Self; 3] = [Self::Endpoint, Self::Buffer, Self::Body];

    fn name(self) -> &'static str {
        match self {
            Self::Endpoint => "endpoint",
            Self::Buffer => "buffer",
            Self::Body => "body",
        }
    }

    fn bootstrap(self) -> &'static str {
        match self {
            Self::Endpoint => "envoy.yaml",
            Self::Buffer => "envoy-buffer.yaml",
            Self::Body => "envoy-body.yaml",
        }
    }
}

/// What came to hosts, over all of them.
#[derive(Debug, Default)]
struct Seen {
    /// What no client may get through: the trap's address.
    foreign: String,
    /// Requests that came to the trap.
    trapped: AtomicU64,
    /// Requests that came to a worker and said what only the client can have said.
    leaked: AtomicU64,
}

/// One host.
#[derive(Clone)]
struct Host {
    seen: Arc<Seen>,
    is_trap: bool,
}

async fn serve(State(host): State<Host>, headers: HeaderMap, body: Bytes) -> &'static str {
    // Envoy looks after their health; that is no request.
    if !headers.contains_key("x-forwarded-proto") {
        return "";
    }
    let Host { seen, is_trap } = host;
    let says = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        text.contains(&seen.foreign) || text.contains(FOREIGN_ID)
    };
    if is_trap {
        seen.trapped.fetch_add(1, Ordering::Relaxed);
    }
    if headers.values().any(|value| says(value.as_bytes())) || says(&body) {
        seen.leaked.fetch_add(1, Ordering::Relaxed);
    }
    "{}"
}

/// The hosts: workers, and the trap last.
struct Hosts {
    seen: Arc<Seen>,
    workers: Vec<u16>,
    trap: u16,
}

impl Hosts {
    async fn start() -> std::io::Result<Self> {
        let mut listeners = Vec::new();
        let mut ports = Vec::new();
        for _ in 0..=WORKERS {
            let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
            ports.push(listener.local_addr()?.port());
            listeners.push(listener);
        }
        let trap = ports.pop().unwrap_or_default();
        let seen = Arc::new(Seen { foreign: local(trap), ..Seen::default() });
        for (number, listener) in listeners.into_iter().enumerate() {
            let host = Host { seen: Arc::clone(&seen), is_trap: number == WORKERS };
            let app = Router::new().fallback(serve).with_state(host);
            // Ends with the process; one that fails shows as a request without answer.
            tokio::spawn(async move { axum::serve(listener, app).await });
        }
        Ok(Self { seen, workers: ports, trap })
    }

    fn counts(&self) -> [u64; 2] {
        [&self.seen.trapped, &self.seen.leaked].map(|count| count.load(Ordering::Relaxed))
    }
}

/// Runs everything. Prints each check and, last, `N passed, N failed`.
pub async fn run(options: Options) -> ExitCode {
    let mut report = Report::default();
    if let Err(error) = unguarded(&options, &mut report).await {
        report.failure("a gateway without any filter of ours starts", error);
    }
    for mode in Mode::ALL {
        if let Err(error) = guarded(&options, mode, &mut report).await {
            report.failure("the gateway starts", format_args!("{}: {error}", mode.name()));
        }
    }
    report.finish()
}

/// Without our filters a header is obeyed.
async fn unguarded(options: &Options, report: &mut Report) -> Result<(), StackError> {
    let hosts = Hosts::start().await?;
    let folder = tempfile::Builder::new().prefix("warmpath-spoof-").tempdir()?;
    let template = std::fs::read_to_string(options.envoy_config(Mode::Endpoint.bootstrap()))?;
    let bare = without_filters(&template)
        .ok_or_else(|| StackError::Unfilled("place of the filters".into()))?;
    let path = folder.path().join("template.yaml");
    std::fs::write(&path, bare)?;
    let gateway = start_envoy(options, &path.to_string_lossy(), 1, &hosts, folder.path()).await?;
    let tried = Tried::make(&gateway.address, &hosts).await;
    report.check(
        "a gateway without filters is spoofed",
        tried.trapped > 0 && tried.leaked > 0,
        format_args!("{tried:?}"),
    );
    gateway.envoy.stop().await;
    Ok(())
}

/// The bootstrap without the filters before the router.
fn without_filters(template: &str) -> Option<String> {
    const FILTERS: &str = "          http_filters:\n";
    const ROUTER: &str = "          - name: envoy.filters.http.router\n";
    let (before, rest) = template.split_once(FILTERS)?;
    let (_, after) = rest.split_once(ROUTER)?;
    Some(format!("{before}{FILTERS}{ROUTER}{after}"))
}

async fn guarded(options: &Options, mode: Mode, report: &mut Report) -> Result<(), StackError> {
    let hosts = Hosts::start().await?;
    let folder = tempfile::Builder::new().prefix("warmpath-spoof-").tempdir()?;
    let (feed, status) = (free_port()?, free_port()?);
    std::fs::write(
        folder.path().join("sidecar.yaml"),
        sidecar_file(options, &hosts, feed, status),
    )?;
    let program = options.program("warmpath-sidecar");
    let mut sidecar = start_sidecar(&program, status, folder.path()).await?;
    let options = Options { wasm: hooks_module(options), ..options.clone() };
    let gateway = start_envoy(&options, mode.bootstrap(), feed, &hosts, folder.path()).await?;
    ready(&gateway).await?;

    let mut state = async |what: &str, must_answer: bool| {
        let tried = Tried::make(&gateway.address, &hosts).await;
        let answered = if must_answer { tried.answered == tried.sent } else { tried.answered > 0 };
        report.check(
            &format!("mode `{}`, {what}: a client reaches no host of its choosing", mode.name()),
            tried.trapped == 0 && tried.leaked == 0 && answered,
            format_args!("{tried:?}"),
        );
    };
    state("all alive", true).await;
    crash(&gateway).await;
    state("after crashes of the VMs", false).await;
    sidecar.kill_now().await;
    state("without the sidecar", false).await;
    crash(&gateway).await;
    state("after crashes, without the sidecar", false).await;
    gateway.envoy.stop().await;
    sidecar.stop().await;
    Ok(())
}

struct Gateway {
    address: String,
    envoy: Child,
}

async fn start_envoy(
    options: &Options,
    template: &str,
    feed: u16,
    hosts: &Hosts,
    folder: &Path,
) -> Result<Gateway, StackError> {
    let (port, admin) = (free_port()?, free_port()?);
    let mut workers = hosts.workers.clone();
    // Any member of mode `body`'s cluster may be taken; which worker it forwards
    // to, the body says.
    if template != Mode::Body.bootstrap() {
        workers.push(hosts.trap);
    }
    let bootstrap =
        Bootstrap { name: "envoy", template, port, admin, feed, workers: &workers, router: "" };
    let envoy = envoy::start(options, &bootstrap, folder).await?;
    Ok(Gateway { address: local(port), envoy })
}

fn sidecar_file(options: &Options, hosts: &Hosts, feed: u16, status: u16) -> String {
    let workers = hosts.workers.iter().zip(1..).map(|(port, id)| {
        format!(
            "  - {{id: {id}, model: {MODEL}, role: aggregated, endpoint: \"127.0.0.1:{port}\"}}\n"
        )
    });
    format!(
        "feed: {{listen: {:?}}}\nstatus: {{listen: {:?}}}\nmodels:\n  - {{name: {MODEL}, \
         directory: {:?}, block_size: {BLOCK_SIZE}}}\nworkers:\n{}",
        local(feed),
        local(status),
        options.model_dir,
        workers.collect::<String>(),
    )
}

/// Waits until every worker thread names workers.
async fn ready(gateway: &Gateway) -> Result<(), StackError> {
    let deadline = Instant::now() + READY_WITHIN;
    let mut row = 0;
    while row < READY_REQUESTS {
        if Instant::now() > deadline {
            return Err(StackError::NotReady("requests find workers", gateway.envoy.log_tail()));
        }
        let answer = send(&gateway.address, &[], &chat(&json!({}))).await;
        let names = answer.is_some_and(|answer| answer.header("x-warmpath-worker").is_some());
        row = if names { row + 1 } else { 0 };
        if !names {
            sleep(POLL_START).await;
        }
    }
    Ok(())
}

/// Crashes the VMs. A request that meets a VM which is not back yet crashes none.
async fn crash(gateway: &Gateway) {
    for _ in 0..CRASHES {
        let _gone = send(&gateway.address, &[(CRASH, "1")], &chat(&json!({}))).await;
    }
}

/// What the attempts gave.
#[derive(Debug)]
struct Tried {
    sent: u64,
    /// Requests with an answer of a worker.
    answered: u64,
    /// Requests that reached the client's host.
    trapped: u64,
    /// Requests of which a worker was shown what the client wrote.
    leaked: u64,
}

impl Tried {
    /// Names the trap in every way.
    async fn make(gateway: &str, hosts: &Hosts) -> Self {
        let before = hosts.counts();
        let (mut sent, mut answered) = (0, 0);
        let nvext = json!({"nvext": {
            "backend_instance_id": id(), "decode_worker_id": id(), "prefill_worker_id": id(),
            "dp_rank": id(), "prefill_dp_rank": id(),
        }});
        for name in ROUTING_HEADERS {
            for value in [hosts.seen.foreign.as_str(), FOREIGN_ID] {
                // Once, and twice with the value in the second place; beside a body
                // that says nothing, and one that says the same.
                for headers in [&[(name, value)] as &[(&str, &str)], &[(name, "x"), (name, value)]]
                {
                    for body in [chat(&json!({})), chat(&nvext)] {
                        sent += 1;
                        let answer = send(gateway, headers, &body).await;
                        let is_ok = answer.is_some_and(|answer| answer.status.is_success());
                        answered += u64::from(is_ok);
                    }
                }
            }
        }
        let [trapped, leaked] = hosts.counts();
        Self { sent, answered, trapped: trapped - before[0], leaked: leaked - before[1] }
    }
}

fn id() -> Value {
    FOREIGN_ID.parse::<u64>().map_or(Value::Null, Value::from)
}

fn chat(extra: &Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "who?"}]});
    if let (Some(body), Some(extra)) = (body.as_object_mut(), extra.as_object()) {
        body.extend(extra.clone());
    }
    body
}

async fn send(gateway: &str, headers: &[(&str, &str)], body: &Value) -> Option<Response> {
    post(gateway, PATH, headers, Bytes::from(body.to_string()), REQUEST_WITHIN).await.ok()
}
