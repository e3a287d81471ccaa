//! Neighbour: what small requests pay for long prompts on the same worker thread.
//!
//! One Envoy with one worker thread; a steady flow of small chat requests through
//! it, at first alone and then beside twenty prompts of a megabyte at once. The
//! rise of the small ones' p99 is the figure, for our filter and for Envoy alone,
//! which has the megabytes to carry as well. The workers answer at once, so that
//! nothing but the gateway is in the way; the flow, the long requests and the
//! workers have a thread each.

use std::net::TcpListener as StdListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use futures_util::future::join_all;
use http_body_util::{BodyExt, Limited};
use hyper::body::Bytes;
use hyper::http::Request;
use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use tokio::time::{sleep, sleep_until};

use super::load::{Answer, Connection, Fault, Outgoing, Times};
use super::rows::{Better, Goal, Row, write_part};
use crate::stack::child::Child;
use crate::stack::client::{Chat, get};
use crate::stack::envoy;
use crate::stack::gateway::start_sidecar;
use crate::stack::launch::{BLOCK_SIZE, EngineShape, MODEL, Stack, StackError, fill, local};
use crate::stack::limits::{ENGINES, POLL_START, READY_WITHIN};
use crate::stack::options::Options;
use crate::stack::ports::free_port;
use crate::stack::report::line;

/// Long prompts at once.
const LONG: usize = 20;

/// Bytes of each.
const LONG_BYTES: usize = 1_000_000;

/// Rounds of twenty, through each gateway.
const ROUNDS: usize = 6;

/// Time of a round in which the flow is alone.
const ALONE: Duration = Duration::from_millis(1_500);

/// Connections of the flow: so many that one is free again when its next request
/// is due.
const FLOW_CONNECTIONS: u32 = 60;

/// Time between two requests of one of them: 400 a second over all.
const FLOW_EVERY: Duration = Duration::from_millis(150);

/// Bytes of a small prompt.
const SMALL_BYTES: usize = 1_000;

/// Different small prompts.
const SMALL: usize = 32;

/// Longest body that a worker takes, in bytes.
const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The header in which a worker says who it is.
const SERVED_BY: &str = "x-served-by";

/// What the row has to reach, in milliseconds.
const RISE_MS_MAX: f64 = 10.0;

/// Rises are not told apart below this, in milliseconds.
const RISE_MS_LEAST: f64 = 0.01;

/// The engines only announce blocks; requests go to other workers.
const SHAPE: EngineShape =
    EngineShape { blocks: 4_000, prefill_us_per_token: 0, decode_us_per_token: 0 };

/// What is measured of one gateway.
#[derive(Debug, Default)]
struct Figures {
    alone: Times,
    beside: Times,
    long: Times,
    faults: Vec<Fault>,
}

impl Figures {
    /// Rise of the small requests' p99, in milliseconds; `None` if there are none.
    fn rise_ms(&mut self) -> Option<f64> {
        Some((self.beside.percentile(0.99)? - self.alone.percentile(0.99)?).max(0.0))
    }
}

/// One gateway under measurement.
struct Gateway {
    name: &'static str,
    address: String,
    /// Whether answers say what was decided.
    decides: bool,
    figures: Figures,
}

/// Measures, prints and writes the part `neighbour`.
///
/// # Errors
///
/// In words: what does not start, or which answers were wrong.
pub async fn run(options: Options) -> Result<(), String> {
    let workers = workers().map_err(|error| error.to_string())?;
    let stack =
        Stack::engines(options.clone(), SHAPE, None).await.map_err(|error| error.to_string())?;
    let mut bench = Bench::start(&options, &stack, &workers).await.map_err(|e| e.to_string())?;
    for round in 0..ROUNDS {
        bench.round(round).await?;
    }
    let result = bench.report().await;
    bench.stop().await;
    stack.stop().await;
    result
}

/// Starts workers that answer at once, on a thread that ends with the process;
/// their ports.
fn workers() -> std::io::Result<[u16; ENGINES]> {
    let mut ports = [0; ENGINES];
    let mut listeners = Vec::new();
    for port in &mut ports {
        let listener = StdListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        *port = listener.local_addr()?.port();
        listeners.push((listener, *port));
    }
    let runtime = runtime()?;
    thread::spawn(move || {
        runtime.block_on(join_all(listeners.into_iter().map(async |(listener, port)| {
            let name = local(port);
            let answer = async move |request: Request<Body>| {
                // Whoever sends too much gets no answer that passes for one.
                let body = Limited::new(request.into_body(), BODY_BYTES_MAX).collect().await;
                let len = body.map_or(0, |body| body.to_bytes().len());
                ([(SERVED_BY, name.clone())], len.to_string())
            };
            let app = Router::new().fallback(answer);
            if let Ok(listener) = tokio::net::TcpListener::from_std(listener) {
                // A worker that fails shows as a wrong answer.
                drop(axum::serve(listener, app).await);
            }
        })))
    });
    Ok(ports)
}

fn runtime() -> std::io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

struct Bench {
    gateways: [Gateway; 2],
    admin: u16,
    small: Arc<Vec<Outgoing>>,
    children: Vec<Child>,
    _folder: TempDir,
}

impl Bench {
    async fn start(
        options: &Options,
        stack: &Stack,
        workers: &[u16; ENGINES],
    ) -> Result<Self, StackError> {
        let folder = tempfile::Builder::new().prefix("warmpath-").tempdir()?;
        let (feed, status) = (free_port()?, free_port()?);
        write_sidecar_files(folder.path(), options, stack, workers, feed, status)?;
        let program = options.program("warmpath-sidecar");
        let mut children = vec![start_sidecar(&program, status, folder.path()).await?];
        let (port, admin) = (free_port()?, free_port()?);
        let (plain, plain_admin) = (free_port()?, free_port()?);
        for (name, template, port, admin) in [
            ("envoy", "envoy.yaml", port, admin),
            ("envoy-plain", "envoy-round-robin.yaml", plain, plain_admin),
        ] {
            let template = std::fs::read_to_string(options.envoy_config(template))?;
            let values = [
                ("GATEWAY_ADDRESS", "127.0.0.1".to_owned()),
                ("GATEWAY_PORT", port.to_string()),
                ("ADMIN_PORT", admin.to_string()),
                ("FEED_PORT", feed.to_string()),
                ("WASM_FILE", options.wasm.display().to_string()),
                ("DEBUG_HEADERS", "true".to_owned()),
                ("WORKER_1_PORT", workers[0].to_string()),
                ("WORKER_2_PORT", workers[1].to_string()),
                ("WORKER_3_PORT", workers[2].to_string()),
            ];
            let bootstrap = fill(&template, &values)?;
            let started = envoy::start_filled(options, name, &bootstrap, 1, admin, folder.path());
            children.push(started.await?);
        }
        let gateway = |name, port, decides| Gateway {
            name,
            address: local(port),
            decides,
            figures: Figures::default(),
        };
        let small = (0..SMALL).map(|number| chat(SMALL_BYTES, number)).collect();
        let bench = Self {
            gateways: [gateway("warmpath", port, true), gateway("envoy", plain, false)],
            admin,
            small: Arc::new(small),
            children,
            _folder: folder,
        };
        bench.warm_up(stack).await?;
        Ok(bench)
    }

    /// Waits until requests are routed by cache.
    async fn warm_up(&self, stack: &Stack) -> Result<(), StackError> {
        for address in stack.engine_addresses() {
            let text = "hello again and ".repeat(32);
            let chat = Chat { messages: vec![("user", text)], max_tokens: 1, stream: false };
            // A failure shows below, where the gateway stays cold.
            let _answer = chat.send(&address, MODEL, &[]).await;
        }
        let deadline = Instant::now() + READY_WITHIN;
        while Instant::now() < deadline {
            let gateway = &self.gateways[0];
            if let (Ok(mut connection), Some(request)) =
                (Connection::open(&gateway.address).await, self.small.first())
                && let Ok(answer) = connection.send(request).await
                && answer.header("x-warmpath-reason") == Some("kv")
            {
                return Ok(());
            }
            sleep(POLL_START).await;
        }
        Err(StackError::NotReady("routing by cache", String::new()))
    }

    /// The flow alone, then beside the long prompts, through each gateway.
    async fn round(&mut self, round: usize) -> Result<(), String> {
        // The same for both, and never seen before.
        let long: Vec<Outgoing> =
            (0..LONG).map(|number| chat(LONG_BYTES, 1_000 + round * LONG + number)).collect();
        for gateway in &mut self.gateways {
            let mut connections = Vec::new();
            for _ in 0..LONG {
                let opened = Connection::open(&gateway.address).await;
                connections.push(opened.map_err(|fault| fault.to_string())?);
            }
            let flow = Flow::start(gateway, &self.small).map_err(|error| error.to_string())?;
            sleep(ALONE).await;
            let began = Instant::now();
            let requests = connections.iter_mut().zip(&long);
            let answers =
                join_all(requests.map(|(connection, request)| connection.send(request))).await;
            let ended = Instant::now();
            let figures = &mut gateway.figures;
            for (answer, request) in answers.into_iter().zip(&long) {
                let checked = answer
                    .and_then(|answer| check(&answer, request, gateway.decides).map(|()| answer));
                match checked {
                    Ok(answer) => figures.long.push(answer.took),
                    Err(fault) => figures.faults.push(fault),
                }
            }
            for (due, result) in flow.stop() {
                match result {
                    Ok(took) if due < began => figures.alone.push(took),
                    Ok(took) if due < ended => figures.beside.push(took),
                    // The last ones were sent when the long ones were done.
                    Ok(_) => {}
                    Err(fault) => figures.faults.push(fault),
                }
            }
        }
        Ok(())
    }

    async fn report(&mut self) -> Result<(), String> {
        let mut rows = Vec::new();
        // Carrying the megabytes costs the others something as well.
        let carried = self.gateways[1].figures.rise_ms().unwrap_or_default();
        for gateway in &mut self.gateways {
            let Gateway { name, figures, decides, .. } = gateway;
            if let Some(fault) = figures.faults.first() {
                return Err(format!("{name}: {} faults, first: {fault}", figures.faults.len()));
            }
            let rise = figures.rise_ms().ok_or("nothing was measured")?;
            let counts = [figures.alone.count(), figures.beside.count()];
            let [alone, beside] = [&mut figures.alone, &mut figures.beside]
                .map(|times| [0.5, 0.99].map(|share| times.percentile(share).unwrap_or_default()));
            let note = format!(
                "p50 and p99 of 1 KB chats {:.2} and {:.2} ms alone ({}), {:.2} and {:.2} ms \
                 beside {LONG} prompts of 1 MB at once ({}), one worker thread",
                alone[0], alone[1], counts[0], beside[0], beside[1], counts[1]
            );
            let suffix = if *decides { "" } else { "_envoy" };
            let row = if *decides {
                let goal = Goal { value_max: Some(RISE_MS_MAX), ..Goal::default() };
                let rise = rise.max(RISE_MS_LEAST);
                Row::beside("neighbour_p99_rise_1m", "ms", Better::Lower, rise, carried).goal(goal)
            } else {
                Row::alone("neighbour_p99_rise_1m_envoy", "ms", rise)
            };
            rows.push(row.note(note));
            for (share, word) in [(0.5, "p50"), (0.99, "p99")] {
                let took = figures.long.percentile(share).unwrap_or_default();
                let name = format!("neighbour_long_{word}_1m{suffix}");
                rows.push(Row::alone(name, "ms", took).note("the prompts of 1 MB themselves"));
            }
        }
        for row in &rows {
            line(format_args!("{:32} {:9.2} {}  {}", row.name, row.value, row.unit, row.note));
        }
        let address = local(self.admin);
        for name in ["warmpath_reading_slice_us", "warmpath_reading_elapsed_us"] {
            let page = get(&address, &format!("/stats?filter={name}")).await;
            if let Ok(page) = page {
                line(format_args!("{}", String::from_utf8_lossy(&page.body).trim()));
            }
        }
        write_part("neighbour", &rows).map(drop).map_err(|error| error.to_string())
    }

    async fn stop(self) {
        for child in self.children.into_iter().rev() {
            child.stop().await;
        }
    }
}

/// The engines announce blocks; the workers that serve are others.
fn write_sidecar_files(
    folder: &Path,
    options: &Options,
    stack: &Stack,
    workers: &[u16; ENGINES],
    feed: u16,
    status: u16,
) -> std::io::Result<()> {
    let sidecar = format!(
        "feed: {{listen: {:?}}}\nstatus: {{listen: {:?}}}\n\
         models:\n  - {{name: {MODEL}, directory: {:?}, block_size: {BLOCK_SIZE}}}\n\
         workers_file: workers.yaml\n",
        local(feed),
        local(status),
        options.model_dir,
    );
    std::fs::write(folder.join("sidecar.yaml"), sidecar)?;
    let mut list = String::from("workers:\n");
    for ((number, worker), ports) in (1..).zip(workers).zip(&stack.ports.engines) {
        list.push_str(&format!(
            "  - {{id: {number}, model: {MODEL}, engine: vllm, role: aggregated, \
             endpoint: \"127.0.0.1:{worker}\", kv_events: \"tcp://127.0.0.1:{}\", \
             replay: \"tcp://127.0.0.1:{}\", total_kv_blocks: {}}}\n",
            ports.events, ports.replay, SHAPE.blocks,
        ));
    }
    std::fs::write(folder.join("workers.yaml"), list)
}

/// A chat of many different words, the same for the same number.
fn chat(bytes: usize, number: usize) -> Outgoing {
    const SYLLABLES: [&str; 16] = [
        "ka", "ren", "to", "mi", "sol", "va", "ing", "per", "du", "est", "lo", "qua", "fi", "tion",
        "um", "ra",
    ];
    let mut text = format!("{number}:");
    let mut state = number as u64 + 1;
    while text.len() < bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        let mut rest = state >> 24;
        text.push(' ');
        for _ in 0..1 + rest % 3 {
            rest /= 3;
            let syllable = usize::try_from(rest % 16).ok().and_then(|at| SYLLABLES.get(at));
            text.push_str(syllable.copied().unwrap_or_default());
            rest /= 16;
        }
    }
    let body = json!({
        "model": MODEL, "max_tokens": 1, "messages": [{ "role": "user", "content": text }]
    });
    Outgoing::chat(Bytes::from(body.to_string()))
}

/// Whether the body came whole to the worker that the decision names, and the
/// decision was exact.
fn check(answer: &Answer, request: &Outgoing, decides: bool) -> Result<(), Fault> {
    if answer.body != request.body.len().to_string() {
        return Err(Fault::Wrong("another length"));
    }
    // On a machine that is busy the feed may be late; the decision is as exact.
    let by_cache = ["kv", "stale_feed"].map(Some);
    if decides && !by_cache.contains(&answer.header("x-warmpath-reason")) {
        return Err(Fault::Wrong("not routed by cache"));
    }
    if decides && answer.header("x-warmpath-endpoint") != answer.header(SERVED_BY) {
        return Err(Fault::Wrong("another worker"));
    }
    Ok(())
}

/// A small request: when it was due, and how long after that it was answered.
type Small = (Instant, Result<Duration, Fault>);

/// The steady flow, on a thread of its own.
struct Flow {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Small>>,
}

impl Flow {
    fn start(gateway: &Gateway, requests: &Arc<Vec<Outgoing>>) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (address, decides) = (gateway.address.clone(), gateway.decides);
        let (stopped, requests) = (stop.clone(), requests.clone());
        let runtime = runtime()?;
        let thread = thread::spawn(move || {
            let lines = (0..FLOW_CONNECTIONS)
                .map(|number| send_steadily(&address, &requests, decides, number, &stopped));
            runtime.block_on(join_all(lines)).concat()
        });
        Ok(Self { stop, thread })
    }

    fn stop(self) -> Vec<Small> {
        self.stop.store(true, Ordering::Relaxed);
        let gone = || vec![(Instant::now(), Err(Fault::Wrong("the flow ended")))];
        self.thread.join().unwrap_or_else(|_| gone())
    }
}

/// Sends requests when they are due, whatever becomes of those before: one that
/// has to wait for the connection has waited from then on.
async fn send_steadily(
    address: &str,
    requests: &[Outgoing],
    decides: bool,
    number: u32,
    stop: &AtomicBool,
) -> Vec<Small> {
    let mut answered = Vec::new();
    let mut connection = match Connection::open(address).await {
        Ok(connection) => connection,
        Err(fault) => return vec![(Instant::now(), Err(fault))],
    };
    let mut due = Instant::now() + FLOW_EVERY * number / FLOW_CONNECTIONS;
    for request in requests.iter().cycle().skip(number as usize) {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        sleep_until(due.into()).await;
        // The timer has a grain of a millisecond, which is not the gateway's.
        let from = Instant::now();
        let late = from.saturating_duration_since(due);
        let late = if late < Duration::from_millis(2) { Duration::ZERO } else { late };
        let answer = connection.send(request).await;
        let result =
            answer.and_then(|answer| check(&answer, request, decides).map(|()| late + answer.took));
        answered.push((due, result));
        due += FLOW_EVERY;
    }
    answered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_as_long_as_is_said_and_all_different() {
        let bodies: Vec<Bytes> = (0..8).map(|number| chat(SMALL_BYTES, number).body).collect();
        for (at, body) in bodies.iter().enumerate() {
            assert!((SMALL_BYTES..SMALL_BYTES + 200).contains(&body.len()), "{}", body.len());
            let text = &body[body.len() - SMALL_BYTES / 2..];
            assert!(!bodies[..at].iter().any(|other| other.ends_with(text)));
        }
        assert_eq!(chat(SMALL_BYTES, 3).body, bodies[3]);
    }

    #[test]
    fn the_rise_is_of_p99() {
        let mut figures = Figures::default();
        assert_eq!(figures.rise_ms(), None);
        for ms in 0..=100 {
            figures.alone.push(Duration::from_millis(ms));
            figures.beside.push(Duration::from_millis(ms * 2));
        }
        assert_eq!(figures.rise_ms(), Some(99.0));
        std::mem::swap(&mut figures.alone, &mut figures.beside);
        assert_eq!(figures.rise_ms(), Some(0.0));
    }
}
