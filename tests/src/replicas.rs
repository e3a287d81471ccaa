//! Replicas: two gateways in front of the same engines, each with a sidecar of
//! its own. Whether they decide alike, and how well each knows the other's load,
//! with replica sync on, and, so that the figures mean something, off.
//!
//! In each round clients send long requests to either gateway, as they like.
//! While these run, the same new prompt is sent to both gateways at once, some
//! times over; caches know none of it, so that load alone decides. Then the
//! clients hang up.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::stack::child::Child;
use crate::stack::client::{Chat, get};
use crate::stack::conversations::Numbers;
use crate::stack::gateway::{Gateway, Mode};
use crate::stack::launch::{StackError, local, wait_until_ok};
use crate::stack::limits::{POLL, POLL_START, READY_WITHIN};
use crate::stack::options::Options;
use crate::stack::ports::free_port;
use crate::stack::report::{Report, line};

/// The model.
const MODEL: &str = "qwen3";

/// Engines.
const ENGINES: u64 = 3;

/// Gateways.
const GATEWAYS: usize = 2;

/// Rounds, clients of one, and prompts sent to both gateways in it.
const ROUNDS: usize = 16;
const CLIENTS: usize = 9;
const PROBES: usize = 8;

/// Words of such a prompt: two or three blocks.
const PROBE_WORDS: usize = 30;

/// Time in which the gateways must know how many requests run. Gauges are set
/// four times a second.
const KNOWN_WITHIN: Duration = Duration::from_secs(5);

/// Consecutive requests routed by cache at each gateway before it counts as warm.
const WARM_REQUESTS: u32 = 8;

/// What the two gateways must come to: share of equal decisions, at least, and
/// error of the load that each knows, at most.
const AGREEMENT_MIN: f64 = 0.95;
const ERROR_MAX: f64 = 0.20;

/// How far below that the same must be without sync, for the figures to mean
/// something.
const BASELINE_BELOW: f64 = 0.10;

/// Runs both. Prints each check and, last, `N passed, N failed`.
pub async fn run(options: Options) -> ExitCode {
    let mut report = Report::default();
    let mut figures = Vec::new();
    for sync in [true, false] {
        match measure(&options, sync, &mut report).await {
            Ok(figure) => {
                let word = if sync { "on" } else { "off" };
                line(format_args!(
                    "sync {word:3} decisions that agree: {:.1} % of {}, load error: {:.1} %, \
                     by worker: {:.1} %",
                    100.0 * figure.agreement(),
                    figure.probes,
                    100.0 * figure.error(),
                    100.0 * figure.worker_error(),
                ));
                figures.push(figure);
            }
            Err(error) => report.failure("the parts start", error),
        }
    }
    if let [on, off] = &figures[..] {
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        report.check(
            "with sync the gateways decide alike",
            on.probes > 0 && on.agreement() >= AGREEMENT_MIN,
            percent(on.agreement()),
        );
        report.check(
            "with sync each knows the load of both",
            on.looks > 0 && on.error() <= ERROR_MAX && on.worker_error() <= ERROR_MAX,
            format_args!(
                "{} in all, {} by worker",
                percent(on.error()),
                percent(on.worker_error())
            ),
        );
        report.check(
            "without it they do not decide alike",
            off.probes > 0 && off.agreement() <= AGREEMENT_MIN - BASELINE_BELOW,
            percent(off.agreement()),
        );
        report.check(
            "without it they do not know",
            off.looks > 0 && off.error() >= ERROR_MAX + BASELINE_BELOW,
            percent(off.error()),
        );
    }
    report.finish()
}

/// What was seen.
#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    probes: u32,
    equal: u32,
    /// Looks at a gateway's load, the requests that ran, and by how many each
    /// was off.
    looks: u32,
    running: u64,
    off: u64,
    /// The same, worker by worker, as the sidecars know it.
    worker_running: u64,
    worker_off: u64,
}

impl Figures {
    fn agreement(&self) -> f64 {
        f64::from(self.equal) / f64::from(self.probes.max(1))
    }

    fn error(&self) -> f64 {
        share(self.off, self.running)
    }

    fn worker_error(&self) -> f64 {
        share(self.worker_off, self.worker_running)
    }
}

#[expect(clippy::cast_precision_loss, reason = "small numbers")]
fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

async fn measure(
    options: &Options,
    sync: bool,
    report: &mut Report,
) -> Result<Figures, StackError> {
    let folder = tempfile::Builder::new().prefix("warmpath-replicas-").tempdir()?;
    let mut stack = Stack::start(options, sync, folder.path()).await?;
    let failed = report.failed();
    let outcome = stack.rounds(options.seed, sync, report).await;
    if let Some((name, log)) = stack.ended() {
        report.failure("every process is alive", format_args!("{name} ended:\n{log}"));
    }
    stack.stop().await;
    if outcome.is_err() || report.failed() > failed {
        line(format_args!("logs and configuration: {}", folder.keep().display()));
    }
    outcome
}

struct Stack {
    engines: Vec<(u16, Child)>,
    gateways: Vec<Gateway>,
}

impl Stack {
    async fn start(options: &Options, sync: bool, folder: &Path) -> Result<Self, StackError> {
        let (mut engines, mut list) = (Vec::new(), String::from("workers:\n"));
        for id in 1..=ENGINES {
            let (http, events, replay) = (free_port()?, free_port()?, free_port()?);
            let child = start_engine(options, id, [http, events, replay], folder).await?;
            engines.push((http, child));
            list.push_str(&format!(
                "  - {{id: {id}, model: {MODEL}, endpoint: \"127.0.0.1:{http}\", \
                 kv_events: \"tcp://127.0.0.1:{events}\", replay: \"tcp://127.0.0.1:{replay}\"}}\n"
            ));
        }
        let mut ports = Vec::new();
        for _ in 0..GATEWAYS {
            ports.push(free_port()?);
        }
        let peers: Vec<String> = ports.iter().map(|port| local(*port)).collect();
        let workers: Vec<u16> = engines.iter().map(|(port, _)| *port).collect();
        let mut gateways = Vec::new();
        for (number, port) in ports.iter().enumerate() {
            let sources = format!(
                "models: [{{name: {MODEL}, directory: {:?}, block_size: 16}}]\n{list}\
                 router: {{router_replica_sync: {sync}}}\n\
                 replicas: {{listen: {:?}, peers: {peers:?}}}\n",
                options.model_dir,
                local(*port),
            );
            let own: PathBuf = folder.join(format!("gateway-{number}"));
            std::fs::create_dir_all(&own)?;
            let gateway = Gateway::start(options, Mode::Endpoint, &sources, &workers, &own);
            gateways.push(gateway.await?);
        }
        Ok(Self { engines, gateways })
    }

    fn ended(&mut self) -> Option<(String, String)> {
        let engines = self.engines.iter_mut();
        let of_engine = engines
            .filter_map(|(_, it)| it.ended().map(|_| (it.name().to_owned(), it.log_tail())))
            .next();
        of_engine.or_else(|| self.gateways.iter_mut().find_map(Gateway::ended))
    }

    async fn stop(self) {
        for gateway in self.gateways {
            gateway.stop().await;
        }
        for (_, engine) in self.engines {
            engine.stop().await;
        }
    }

    async fn rounds(
        &mut self,
        seed: u64,
        sync: bool,
        report: &mut Report,
    ) -> Result<Figures, StackError> {
        let mut numbers = Numbers::new(seed);
        self.warm_up(&mut numbers).await?;
        let mut figures = Figures::default();
        for _ in 0..ROUNDS {
            self.round(&mut numbers, sync, &mut figures, report).await?;
        }
        Ok(figures)
    }

    async fn round(
        &self,
        numbers: &mut Numbers,
        sync: bool,
        figures: &mut Figures,
        report: &mut Report,
    ) -> Result<(), StackError> {
        let mut clients = JoinSet::new();
        let mut sent = [0_u64; GATEWAYS];
        for _ in 0..CLIENTS {
            let to = numbers.below(GATEWAYS);
            let Some(gateway) = self.gateways.get(to) else { continue };
            if let Some(count) = sent.get_mut(to) {
                *count += 1;
            }
            let (address, words) = (gateway.address(), 40 + numbers.below(1_200));
            let chat = chat(numbers.text(words), 4_000);
            clients.spawn(async move { chat.send(&address, MODEL, &[]).await.is_ok() });
        }
        let all: u64 = sent.iter().sum();
        self.running(all).await?;
        // What each gateway should know: with sync all, without it its own.
        let wanted = if sync { [all; GATEWAYS] } else { sent };
        let known = self.known(wanted, KNOWN_WITHIN).await;
        for known in known {
            figures.looks += 1;
            figures.running += all;
            figures.off += known.abs_diff(all);
        }
        if sync {
            self.settled(all).await;
            self.look_at_workers(figures).await;
        }
        for _ in 0..PROBES {
            // Short, so that the one that is booked first, and known to both a moment
            // later, rarely changes what the other decides.
            let chat = chat(numbers.text(PROBE_WORDS), 1);
            let [one, two] = &self.gateways[..] else { break };
            let (one, two) = (one.address(), two.address());
            let (one, two) = tokio::join!(chat.send(&one, MODEL, &[]), chat.send(&two, MODEL, &[]));
            match (one, two) {
                (Ok(one), Ok(two)) => {
                    figures.probes += 1;
                    figures.equal += u32::from(one.worker() == two.worker());
                }
                (Err(error), _) | (_, Err(error)) => {
                    report.failure("a request is answered", error);
                }
            }
            // The probes themselves must be over, everywhere.
            self.running(all).await?;
            if sync {
                self.settled(all).await;
            }
        }
        // A client that has got its answer by now has not been counted right.
        let over = std::iter::from_fn(|| clients.try_join_next()).count();
        if over > 0 {
            report
                .failure("the clients' requests outlast the round", format_args!("{over} do not"));
        }
        clients.shutdown().await;
        self.running(0).await?;
        let left = self.known([0; GATEWAYS], KNOWN_WITHIN).await;
        if left != [0; GATEWAYS] {
            report.failure("no booking is left", format_args!("{left:?}"));
        }
        Ok(())
    }

    /// Waits until so many requests run on the engines.
    async fn running(&self, wanted: u64) -> Result<(), StackError> {
        let deadline = Instant::now() + READY_WITHIN;
        while self.truth().await.iter().sum::<u64>() != wanted {
            if Instant::now() > deadline {
                return Err(StackError::NotReady("the clients' requests", String::new()));
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    /// Requests on each engine.
    async fn truth(&self) -> Vec<u64> {
        let mut all = Vec::new();
        for (port, _) in &self.engines {
            let state = get(&local(*port), "/control/state").await.ok().and_then(|it| it.json());
            let number = |key: &str| {
                state.as_ref().and_then(|state| state.get(key)).and_then(Value::as_u64).unwrap_or(0)
            };
            all.push(number("running") + number("waiting"));
        }
        all
    }

    /// How many bookings each gateway knows, once they are what they should be,
    /// or the time is over.
    async fn known(&self, wanted: [u64; GATEWAYS], within: Duration) -> [u64; GATEWAYS] {
        let deadline = Instant::now() + within;
        loop {
            let mut known = [0; GATEWAYS];
            for (known, gateway) in known.iter_mut().zip(&self.gateways) {
                *known = gateway.stat("warmpath_bookings$").await.unwrap_or(0);
            }
            if known == wanted || Instant::now() > deadline {
                return known;
            }
            sleep(POLL_START).await;
        }
    }

    /// Waits until each sidecar counts so many, by itself and others.
    async fn settled(&self, wanted: u64) {
        let deadline = Instant::now() + KNOWN_WITHIN;
        for gateway in &self.gateways {
            while Instant::now() < deadline {
                let known = bookings(gateway).await;
                if known.iter().map(|(_, own, remote)| own + remote).sum::<u64>() == wanted {
                    break;
                }
                sleep(POLL).await;
            }
        }
    }

    /// Holds what the sidecars know of each worker against what runs there.
    async fn look_at_workers(&self, figures: &mut Figures) {
        let truth = self.truth().await;
        for gateway in &self.gateways {
            let known = bookings(gateway).await;
            for (id, running) in (1..=ENGINES).zip(&truth) {
                let of_worker = known.iter().find(|(worker, ..)| *worker == id);
                let booked = of_worker.map_or(0, |(_, own, remote)| own + remote);
                figures.worker_running += running;
                figures.worker_off += booked.abs_diff(*running);
            }
        }
    }

    /// Waits until both gateways route by cache, whose index is whole then.
    async fn warm_up(&self, numbers: &mut Numbers) -> Result<(), StackError> {
        for (port, _) in &self.engines {
            // A failure shows below, where the gateway stays cold.
            let _answer = chat(numbers.text(60), 1).send(&local(*port), MODEL, &[]).await;
        }
        let deadline = Instant::now() + READY_WITHIN;
        for gateway in &self.gateways {
            let mut warm = 0;
            while warm < WARM_REQUESTS {
                match chat(numbers.text(60), 1).send(&gateway.address(), MODEL, &[]).await {
                    Ok(answer) if answer.reason() == Some("kv") => warm += 1,
                    _ if Instant::now() > deadline => {
                        return Err(StackError::NotReady("routing by cache", String::new()));
                    }
                    _ => {
                        warm = 0;
                        sleep(POLL_START).await;
                    }
                }
            }
        }
        Ok(())
    }
}

/// What a sidecar knows of each worker: its own gateway's bookings and others'.
async fn bookings(gateway: &Gateway) -> Vec<(u64, u64, u64)> {
    let state = gateway.state().await.unwrap_or_default();
    let workers = state.get("workers").and_then(Value::as_array).cloned().unwrap_or_default();
    let read = |worker: &Value| {
        let number = |key: &str| worker.get(key).and_then(Value::as_u64);
        Some((number("id")?, number("own_bookings")?, number("remote_bookings")?))
    };
    workers.iter().filter_map(read).collect()
}

fn chat(text: String, max_tokens: u32) -> Chat {
    Chat { messages: vec![("user", text)], max_tokens, stream: true }
}

async fn start_engine(
    options: &Options,
    id: u64,
    [http, events, replay]: [u16; 3],
    folder: &Path,
) -> Result<Child, StackError> {
    let name = format!("engine-{id}");
    let pairs = [
        ("--model-dir", options.model_dir.display().to_string()),
        ("--name", name.clone()),
        ("--model-name", MODEL.to_owned()),
        ("--port", http.to_string()),
        ("--events-port", events.to_string()),
        ("--replay-port", replay.to_string()),
        ("--blocks", "20000".to_owned()),
        // So that a prompt is soon computed and an answer outlasts the round.
        ("--prefill-us-per-token", "5".to_owned()),
        ("--decode-us-per-token", "5000".to_owned()),
        ("--sequence-us", "0".to_owned()),
    ];
    let arguments: Vec<String> =
        pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect();
    let mut child = Child::start(&name, &options.program("engine-sim"), &arguments, folder)?;
    wait_until_ok("an engine's /health", &mut child, http, "/health").await?;
    Ok(child)
}
