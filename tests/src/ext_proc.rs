//! Ext-proc: the endpoint picker behind a real Envoy, beside the module in another.
//!
//! The same requests go through Envoy with the module, and through Envoys that ask
//! a picker: one streams bodies there and back, one holds them. Each has a sidecar of
//! its own before the same engines, whose caches do not change; so every decision is
//! made on the same state, and must be the same.
//!
//! At first nobody has any load. Where no worker is better than another, chance
//! decides in each gateway for itself, and only the worker may differ. Then
//! requests are held, the same at each gateway, until every worker has another
//! load: then nothing may differ at all.

pub mod engines;
pub mod requests;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hyper::body::Bytes;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;

use crate::engine::model::Model;
use crate::stack::child::Child;
use crate::stack::client::{CallError, Response, call, get};
use crate::stack::envoy::{start_filled, with_places};
use crate::stack::gateway::start_sidecar;
use crate::stack::launch::{BLOCK_SIZE, EnginePorts, MODEL, StackError, fill, local};
use crate::stack::limits::{POLL_START, READY_WITHIN, REQUEST_WITHIN};
use crate::stack::options::Options;
use crate::stack::ports::free_port;
use crate::stack::report::{Report, line, percentile};

use engines::{BODY, Echoes, NAMES, PORT};
use requests::{Mix, Sent};

/// Requests while nobody has any load, and with load.
const UNLOADED: usize = 250;
const LOADED: usize = 1_000;

/// Requests that are held: of which family, and how many words a question has. Each
/// family has a worker of its own, and so each worker another load.
const HELD: [(usize, usize); 4] = [(0, 30), (1, 85), (2, 160), (3, 250)];

/// Rounds of right choices for every family before a gateway counts as warm.
const WARM_ROUNDS: u32 = 2;

/// How long all bookings may take to be freed, and Envoy's gauges to be set.
const FREED_WITHIN: Duration = Duration::from_secs(10);

/// Bursts, clients of each, and the patience of every fourth.
const BURSTS: usize = 16;
const CLIENTS: usize = 32;
const PATIENCE_SHORT: Duration = Duration::from_millis(4);

/// Blocks that each engine claims to have.
const BLOCKS: u64 = 1 << 20;

/// How a gateway decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Module,
    Duplex,
    Buffered,
}

impl Way {
    const ALL: [Self; 3] = [Self::Module, Self::Duplex, Self::Buffered];

    fn name(self) -> &'static str {
        match self {
            Self::Module => "module",
            Self::Duplex => "ext_proc, streamed",
            Self::Buffered => "ext_proc, buffered",
        }
    }
}

/// A gateway and its sidecar.
struct Gateway {
    way: Way,
    address: String,
    admin: u16,
    status: u16,
    folder: TempDir,
    sidecar: Child,
    envoy: Child,
}

impl Gateway {
    async fn start(options: &Options, way: Way, echoes: &Echoes) -> Result<Self, StackError> {
        let folder = tempfile::Builder::new().prefix("warmpath-ext-proc-").tempdir()?;
        let (asked, health, status) = (free_port()?, free_port()?, free_port()?);
        let place = match way {
            Way::Module => format!("feed: {{listen: {:?}}}\n", local(asked)),
            Way::Duplex | Way::Buffered => format!(
                "feed: {{listen: {:?}}}\npicker: {{listen: {:?}, health_listen: {:?}, \
                 debug_headers: true}}\n",
                local(free_port()?),
                local(asked),
                local(health),
            ),
        };
        let mut config = format!(
            "{place}status: {{listen: {:?}}}\nrouter: {{prefill_load_scale: 0.737}}\n\
             models:\n  - {{name: {MODEL}, directory: {:?}, block_size: {BLOCK_SIZE}}}\nworkers:\n",
            local(status),
            options.model_dir,
        );
        for (number, EnginePorts { http, events, replay }) in (1..).zip(&echoes.ports) {
            config.push_str(&format!(
                "  - {{id: {number}, model: {MODEL}, endpoint: {:?}, kv_events: \
                 \"tcp://{}\", replay: \"tcp://{}\", total_kv_blocks: {BLOCKS}}}\n",
                local(*http),
                local(*events),
                local(*replay),
            ));
        }
        std::fs::write(folder.path().join("sidecar.yaml"), config)?;
        let program = options.program("warmpath-sidecar");
        let sidecar = start_sidecar(&program, status, folder.path()).await?;
        let (port, admin) = (free_port()?, free_port()?);
        let text = bootstrap(options, way, asked, [port, admin], &echoes.http())?;
        let envoy = start_filled(options, "envoy", &text, 2, admin, folder.path()).await?;
        Ok(Self { way, address: local(port), admin, status, folder, sidecar, envoy })
    }

    /// Sends a request.
    async fn send(&self, sent: &Sent) -> Result<Response, CallError> {
        let Sent { method, path, headers, body, .. } = sent;
        call(&self.address, method.clone(), path, headers, body.clone(), REQUEST_WITHIN).await
    }

    /// Bookings made and freed.
    async fn bookings(&self) -> Option<[u64; 2]> {
        let page = match self.way {
            Way::Module => get(&local(self.admin), "/stats?filter=warmpath_bookings_").await,
            Way::Duplex | Way::Buffered => get(&local(self.status), "/metrics").await,
        };
        let text = String::from_utf8_lossy(&page.ok()?.body).into_owned();
        let count = |name: &str| {
            let lines = text.lines().filter_map(|line| {
                line.split_once(name)?.1.trim_start_matches([':', ' ']).parse::<u64>().ok()
            });
            lines.reduce(|sum, value| sum + value)
        };
        Some([count("warmpath_bookings_made_total")?, count("warmpath_bookings_freed_total")?])
    }

    /// Waits until all is freed; the last figures.
    async fn all_freed(&self) -> Option<[u64; 2]> {
        let deadline = Instant::now() + FREED_WITHIN;
        loop {
            let figures = self.bookings().await;
            let is_freed = figures.is_some_and(|[made, freed]| made > 0 && made == freed);
            if is_freed || Instant::now() > deadline {
                return figures;
            }
            sleep(POLL_START).await;
        }
    }

    async fn stop(self) {
        self.envoy.stop().await;
        self.sidecar.stop().await;
    }
}

fn bootstrap(
    options: &Options,
    way: Way,
    asked: u16,
    [port, admin]: [u16; 2],
    workers: &[u16],
) -> Result<String, StackError> {
    let name = if way == Way::Module { "envoy.yaml" } else { "envoy-ext-proc.yaml" };
    let template = std::fs::read_to_string(options.envoy_config(name))?;
    let mut template = with_places(&template, workers.len());
    if way == Way::Buffered {
        template = template
            .replace("request_body_mode: FULL_DUPLEX_STREAMED", "request_body_mode: BUFFERED")
            .replace("response_body_mode: FULL_DUPLEX_STREAMED", "response_body_mode: STREAMED");
    }
    let mut values = vec![
        ("GATEWAY_ADDRESS".to_owned(), "127.0.0.1".to_owned()),
        ("GATEWAY_PORT".into(), port.to_string()),
        ("ADMIN_PORT".into(), admin.to_string()),
        ("FEED_PORT".into(), asked.to_string()),
        ("PICKER_PORT".into(), asked.to_string()),
        ("WASM_FILE".into(), options.wasm.display().to_string()),
        ("DEBUG_HEADERS".into(), "true".into()),
    ];
    for (number, worker) in (1..).zip(workers) {
        values.push((format!("WORKER_{number}_PORT"), worker.to_string()));
    }
    let values: Vec<(&str, String)> =
        values.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    fill(&template, &values)
}

/// What became of a request, as far as it is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fate {
    status: u16,
    reason: Option<String>,
    predicted: Option<u64>,
    /// Of the body that reached the engine.
    body: Option<String>,
    /// Of an answer of the gateway's own.
    answer: Option<(Bytes, Option<String>)>,
    /// The worker that was chosen, the engine that served, and the headers that it
    /// got.
    worker: [Option<String>; 4],
}

impl Fate {
    fn of(response: &Response) -> Self {
        let header = |name: &str| response.header(name).map(str::to_owned);
        let served = header(PORT);
        Self {
            status: response.status.as_u16(),
            reason: header("x-warmpath-reason"),
            predicted: response.number("x-warmpath-predicted-cached-tokens"),
            body: header(BODY),
            answer: served.is_none().then(|| (response.body.clone(), header("retry-after"))),
            worker: [
                header("x-warmpath-worker"),
                header("x-warmpath-endpoint"),
                served,
                header(NAMES),
            ],
        }
    }

    /// Whether the engine that served is the one that was chosen.
    fn is_served_as_chosen(&self) -> bool {
        let [_, endpoint, served, _] = &self.worker;
        match (endpoint, served) {
            (Some(endpoint), Some(served)) => endpoint.ends_with(&format!(":{served}")),
            (_, served) => served.is_none(),
        }
    }

    /// Without the worker.
    fn but_worker(&self) -> Self {
        Self { worker: [const { None }; 4], ..self.clone() }
    }
}

/// Runs all of it. Prints each check and, last, `N passed, N failed`.
pub async fn run(options: Options) -> ExitCode {
    let mut report = Report::default();
    if let Err(error) = compare(&options, &mut report).await {
        report.failure("the parts start", error);
    }
    report.finish()
}

async fn compare(options: &Options, report: &mut Report) -> Result<(), StackError> {
    let model = Model::load(&options.model_dir)
        .map_err(|error| std::io::Error::other(error.to_string()))?;
    let mut mix =
        Mix::new(&model, options.seed).map_err(|error| std::io::Error::other(error.to_string()))?;
    let echoes = Echoes::start().await?;
    for (engine, tokens) in mix.held(echoes.ports.len()) {
        echoes.events.hold(engine, &tokens).await;
    }
    let mut gateways = Vec::new();
    for way in Way::ALL {
        gateways.push(Gateway::start(options, way, &echoes).await?);
    }
    for gateway in &gateways {
        warm(gateway, &mut mix).await?;
    }
    let mut tally = Tally::default();
    for _ in 0..UNLOADED {
        let sent = mix.any();
        tally.compare(&gateways, &sent, !sent.has_best).await;
    }
    tally.check(report, UNLOADED, "without load");
    let mut held = Vec::new();
    for (family, words) in HELD {
        let sent = mix.holding(family, words);
        hold(&gateways, &sent, &mut held).await;
    }
    let mut loaded = Tally { times: tally.times, ..Tally::default() };
    for _ in 0..LOADED {
        loaded.compare(&gateways, &mix.any(), false).await;
    }
    loaded.check(report, LOADED, "with load");
    let same = held.chunks(gateways.len()).filter(|fates| {
        fates.iter().all(|(fate, _)| Some(fate) == fates.first().map(|(first, _)| first))
    });
    let count = same.count();
    report.check("requests that are held get the same", count == HELD.len(), count);
    echoes.release();
    for (_, task) in held {
        let _ = task.await;
    }
    for gateway in &gateways {
        let figures = gateway.all_freed().await;
        let is_freed = figures.is_some_and(|[made, freed]| made > 0 && made == freed);
        let name = format!("all is freed: {}", gateway.way.name());
        report.check(&name, is_freed, format_args!("{figures:?} made and freed"));
    }
    for gateway in &gateways {
        burst(gateway, &mut mix, report).await;
    }
    for (way, times) in &mut loaded.times {
        let [p50, p90] = [50, 90].map(|p| percentile(times, p));
        line(format_args!("{way}: chats took {p50} us (median), {p90} us (90 %)"));
    }
    if let Some(at) = gateways.iter().position(|it| it.way == Way::Duplex) {
        let mut gateway = gateways.swap_remove(at);
        without_picker(options, &mut gateway, &mut mix, report).await?;
        gateway.stop().await;
    }
    for gateway in gateways {
        gateway.stop().await;
    }
    Ok(())
}

/// Waits until every family's worker is known.
async fn warm(gateway: &Gateway, mix: &mut Mix) -> Result<(), StackError> {
    let deadline = Instant::now() + READY_WITHIN;
    let mut rounds = 0;
    while rounds < WARM_ROUNDS {
        rounds += 1;
        for sent in mix.one_of_each() {
            let response = gateway.send(&sent).await;
            let predicted =
                response.ok().and_then(|it| it.number("x-warmpath-predicted-cached-tokens"));
            if predicted.is_none_or(|tokens| tokens == 0) {
                rounds = 0;
            }
        }
        if Instant::now() > deadline {
            let name = gateway.way.name();
            return Err(StackError::NotReady(name, gateway.envoy.log_tail()));
        }
    }
    Ok(())
}

/// Sends a request to each gateway whose answer is held back.
async fn hold(gateways: &[Gateway], sent: &Sent, held: &mut Vec<(Fate, JoinHandle<()>)>) {
    for gateway in gateways {
        if let Some(held_one) = begin(&gateway.address, sent).await {
            held.push(held_one);
        }
    }
}

/// Begins a request and reads its answer's headers.
async fn begin(address: &str, sent: &Sent) -> Option<(Fate, JoinHandle<()>)> {
    let stream = TcpStream::connect(address).await.ok()?;
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.ok()?;
    tokio::spawn(async move { drop(connection.await) });
    let mut request = hyper::Request::builder()
        .method(sent.method.clone())
        .uri(sent.path)
        .header("host", address);
    for (name, value) in &sent.headers {
        request = request.header(*name, *value);
    }
    let request = request.body(http_body_util::Full::new(sent.body.clone())).ok()?;
    let (head, body) = sender.send_request(request).await.ok()?.into_parts();
    let response = Response {
        status: head.status,
        headers: head.headers,
        body: Bytes::new(),
        took: Duration::ZERO,
    };
    let task = tokio::spawn(async move {
        let _ = http_body_util::BodyExt::collect(body).await;
        drop(sender);
    });
    Some((Fate::of(&response), task))
}

/// What was compared.
#[derive(Debug, Default)]
struct Tally {
    same: usize,
    /// The same but for the worker, where chance decides.
    by_chance: usize,
    other: usize,
    as_chosen: usize,
    served_as_reported: usize,
    served: usize,
    shown: usize,
    reasons: BTreeMap<String, usize>,
    /// Microseconds of chats, by way.
    times: BTreeMap<&'static str, Vec<u64>>,
}

/// Differences that are shown.
const SHOWN_MAX: usize = 5;

impl Tally {
    async fn compare(&mut self, gateways: &[Gateway], sent: &Sent, chance: bool) {
        let mut fates = Vec::new();
        for gateway in gateways {
            let Ok(response) = gateway.send(sent).await else {
                line(format_args!("{} through {}: no response", sent.kind, gateway.way.name()));
                continue;
            };
            let fate = Fate::of(&response);
            self.as_chosen += usize::from(fate.is_served_as_chosen());
            if gateway.way != Way::Module && fate.answer.is_none() {
                self.served += 1;
                let reported = response.header("x-warmpath-served");
                self.served_as_reported += usize::from(reported == fate.worker[1].as_deref());
            }
            if sent.kind == "chat" {
                let micros = u64::try_from(response.took.as_micros()).unwrap_or(u64::MAX);
                self.times.entry(gateway.way.name()).or_default().push(micros);
            }
            fates.push(fate);
        }
        let is_complete = fates.len() == gateways.len();
        let Some(first) = fates.first().filter(|_| is_complete) else {
            self.other += 1;
            return;
        };
        *self.reasons.entry(first.reason.clone().unwrap_or_default()).or_default() += 1;
        let is_same = fates.iter().all(|fate| fate == first);
        let alike = fates.iter().all(|fate| fate.but_worker() == first.but_worker());
        if is_same {
            self.same += 1;
        } else if alike && chance {
            self.by_chance += 1;
        } else {
            self.other += 1;
            if self.shown < SHOWN_MAX {
                self.shown += 1;
                line(format_args!("differs: {}", sent.kind));
                for (gateway, fate) in gateways.iter().zip(&fates) {
                    line(format_args!("  {}: {fate:?}", gateway.way.name()));
                }
            }
        }
    }

    fn check(&self, report: &mut Report, requests: usize, when: &str) {
        let Self { same, by_chance, other, as_chosen, served, served_as_reported, .. } = self;
        line(format_args!("reasons {when}: {:?}", self.reasons));
        report.check(
            &format!("module and picker decide alike {when}"),
            *other == 0 && same + by_chance == requests,
            format_args!("{same} the same, {by_chance} where chance decides, {other} not"),
        );
        report.check(
            &format!("whoever is chosen serves {when}"),
            *as_chosen == requests * Way::ALL.len(),
            as_chosen,
        );
        report.check(
            &format!("the picker is told who has served {when}"),
            *served > 0 && served == served_as_reported,
            format_args!("{served_as_reported} of {served}"),
        );
    }
}

/// Many clients at once, some of which hang up half way: everybody else is served
/// by who was chosen, and nothing stays booked.
async fn burst(gateway: &Gateway, mix: &mut Mix, report: &mut Report) {
    let mut served = 0;
    let mut waited_for = 0;
    for _ in 0..BURSTS {
        let mut clients = JoinSet::new();
        for client in 0..CLIENTS {
            let (address, sent) = (gateway.address.clone(), mix.next_chat());
            let hangs_up = client % 4 == 0;
            waited_for += usize::from(!hangs_up);
            let patience = if hangs_up { PATIENCE_SHORT } else { REQUEST_WITHIN };
            clients.spawn(async move {
                let Sent { method, path, headers, body, .. } = sent;
                let response = call(&address, method, path, &headers, body, patience).await;
                !hangs_up && response.is_ok_and(|it| Fate::of(&it).is_served_as_chosen())
            });
        }
        while let Some(is_served) = clients.join_next().await {
            served += usize::from(is_served.unwrap_or(false));
        }
    }
    let figures = gateway.all_freed().await;
    let is_freed = figures.is_some_and(|[made, freed]| made > 0 && made == freed);
    report.check(
        &format!("clients at once, and those who hang up: {}", gateway.way.name()),
        served == waited_for && is_freed,
        format_args!("{served} of {waited_for} served, {figures:?} made and freed"),
    );
}

/// While the picker is away, requests are refused, and none goes where a client
/// says; once it is back, all is as before.
async fn without_picker(
    options: &Options,
    gateway: &mut Gateway,
    mix: &mut Mix,
    report: &mut Report,
) -> Result<(), StackError> {
    gateway.sidecar.kill_now().await;
    let mut refused = 0;
    let tries = mix.one_of_each();
    for sent in &tries {
        let mut sent = sent.clone();
        sent.headers.push(("x-gateway-destination-endpoint", "127.0.0.1:1"));
        let response = gateway.send(&sent).await;
        refused += usize::from(response.is_ok_and(|response| {
            response.status.as_u16() >= 500 && response.header(PORT).is_none()
        }));
    }
    report.check("without the picker requests are refused", refused == tries.len(), refused);
    let program = options.program("warmpath-sidecar");
    gateway.sidecar = start_sidecar(&program, gateway.status, folder(gateway)).await?;
    let is_back = warm(gateway, mix).await;
    report.check("once it is back, requests are routed by cache", is_back.is_ok(), "16 families");
    Ok(())
}

fn folder(gateway: &Gateway) -> &Path {
    gateway.folder.path()
}
