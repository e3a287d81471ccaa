//! Run: puts the parts together, starts them and stops them.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tracing::{debug, error, info, warn};
use tracing_subscriber::EnvFilter;

use crate::config::discovery::{Backend, DiscoveryEnv, EventPlane};
use crate::config::feed::{FeedConfig, Listen};
use crate::config::picker::PickerEnv;
use crate::config::replicas::ReplicasEnv;
use crate::config::router::RouterEnv;
use crate::config::workers::WorkerList;
use crate::config::{Config, LogFormat, Overrides, RecoveryConfig, WorkerSource};
use crate::credentials::Reloaded;
use crate::credentials::token::Tokens;
use crate::discovery::{self, read_bounded};
use crate::keeper::{Inputs, Keeper};
use crate::limits::{ATTEMPTS_QUEUED, UPDATES_QUEUED_MAX};
use crate::metrics::Metrics;
use crate::model::{cache::Cache, loader::Loader};
use crate::picker::Picker;
use crate::publish::log::FeedLog;
use crate::publish::service::{FeedServer, Shared};
use crate::publish::socket;
use crate::replicas::{Replicas, announce};
use crate::source::Transports;
use crate::status;
use crate::tls::{self, accept};

/// Questions that wait for the keeper.
const QUESTIONS_QUEUED: usize = 64;

/// How long the parts may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a silent gateway is asked for a sign of life, and how long it has.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(10));

/// The address of a server that is not reached over TCP.
const NOWHERE: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));

/// Feeds Warmpath's filters with what the workers' caches hold.
#[derive(Debug, Parser)]
#[command(name = "warmpath-sidecar", version)]
pub struct Arguments {
    /// Configuration file (YAML).
    #[arg(long, env = "WARMPATH_CONFIG", value_name = "FILE")]
    pub config: PathBuf,
    /// Where filters attach: IP:PORT or unix:PATH; wins over the file.
    #[arg(long, env = "WARMPATH_FEED_LISTEN", value_name = "ADDRESS")]
    pub feed_listen: Option<String>,
    /// Where the status page is served; wins over the file.
    #[arg(long, env = "WARMPATH_STATUS_LISTEN", value_name = "ADDRESS")]
    pub status_listen: Option<String>,
    /// Where gateways ask the endpoint picker, which this switches on; wins over the
    /// file.
    #[arg(long, env = "WARMPATH_PICKER_LISTEN", value_name = "ADDRESS")]
    pub picker_listen: Option<String>,
    /// Form of the log; wins over the file.
    #[arg(long, value_parser = log_format, value_name = "text|json")]
    pub log_format: Option<LogFormat>,
    /// Block size of models that give none.
    #[arg(long, env = "DYN_KV_CACHE_BLOCK_SIZE", value_name = "TOKENS")]
    pub block_size: Option<String>,
    /// Check configuration and worker list, and exit.
    #[arg(long)]
    pub check_config: bool,
}

fn log_format(word: &str) -> Result<LogFormat, &'static str> {
    match word {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("must be text or json"),
    }
}

/// Anything that ends the sidecar; for people.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Does what the arguments say, until a signal.
///
/// # Errors
///
/// Why the sidecar could not start.
pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(main(arguments))
}

async fn main(arguments: &Arguments) -> Result<(), Failure> {
    let config = read_config(arguments).await?;
    if arguments.check_config {
        check_workers(&config).await?;
        return Ok(());
    }
    start_log(config.log);
    for warning in &config.router.warnings {
        warn!("{warning}");
    }
    let sidecar = Sidecar::start(config).await?;
    stop_signal().await?;
    info!("stopping");
    sidecar.stop().await;
    Ok(())
}

/// Reads and parses the configuration.
///
/// # Errors
///
/// What is wrong with it, all mistakes together, one a line.
async fn read_config(arguments: &Arguments) -> Result<Config, Failure> {
    let path = &arguments.config;
    let text = read_bounded(path).await.map_err(|error| format!("{}: {error}", path.display()))?;
    let directory = path.parent().unwrap_or(path);
    let variables = std::env::vars_os().filter_map(|(name, value)| {
        // One that is not text is read as one that is wrong.
        Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
    });
    let mut router = RouterEnv::of(variables);
    if let Some(policy) = router.policy_path(&text, directory) {
        let read = read_bounded(&policy).await;
        router.set_policy(policy, read);
    }
    let overrides = Overrides {
        feed_listen: arguments.feed_listen.clone(),
        status_listen: arguments.status_listen.clone(),
        log: arguments.log_format,
        block_size: arguments.block_size.clone(),
        cache_directory: default_cache(),
        discovery: DiscoveryEnv::from_env(|name| std::env::var(name).ok()),
        router,
        replicas: ReplicasEnv::from_env(|name| std::env::var(name).ok()),
        picker: PickerEnv {
            listen: arguments.picker_listen.clone(),
            secure: std::env::var("DYN_SECURE_SERVING").ok(),
        },
    };
    Config::parse(&text, directory, &overrides).map_err(|mistakes| {
        let lines: Vec<String> =
            mistakes.0.iter().map(|mistake| format!("\n  {mistake}")).collect();
        format!("{}:{}", path.display(), lines.concat()).into()
    })
}

/// The user's folder for caches, as the XDG specification has it; `None` for a
/// user without a home. Never a folder that others can write to: what is kept
/// there decides how prompts become tokens.
fn default_cache() -> Option<PathBuf> {
    let folder = |name| std::env::var_os(name).map(PathBuf::from).filter(|it| it.is_absolute());
    let base = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
    Some(base.join("warmpath"))
}

async fn check_workers(config: &Config) -> Result<(), Failure> {
    if let WorkerSource::File(path) = &config.workers {
        let text =
            read_bounded(path).await.map_err(|error| format!("{}: {error}", path.display()))?;
        WorkerList::parse(&text, &config.models)
            .map_err(|mistakes| format!("{}: {mistakes}", path.display()))?;
    }
    Ok(())
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second one in the same process, as in tests, is not an error.
    let _ = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

async fn stop_signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        outcome = tokio::signal::ctrl_c() => outcome,
        _ = terminate.recv() => Ok(()),
    }
}

/// A running sidecar.
#[derive(Debug)]
pub struct Sidecar {
    /// Where filters attach over TCP; port 0 if they do over a Unix socket.
    pub feed: SocketAddr,
    /// Where the status page is.
    pub status: SocketAddr,
    /// The endpoint picker, if it is on.
    pub picker: Option<Picker>,
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

impl Sidecar {
    /// Binds, and starts every part.
    ///
    /// # Errors
    ///
    /// If an address cannot be bound, or there is no randomness for the epoch.
    pub async fn start(config: Config) -> Result<Self, Failure> {
        let stop = CancellationToken::new();
        let metrics = Arc::new(Metrics::new());
        let (feed_listener, feed) = listen(&config.feed, &metrics, &stop).await?;
        let tokens = tokens(&config.feed, &metrics, &stop).await?;
        let status_listener = bind(config.status_listen).await?;
        let status = status_listener.local_addr()?;

        let (questions, question_queue) = mpsc::channel(QUESTIONS_QUEUED);
        let log = FeedLog::new(new_epoch()?, config.retained_bytes);
        let shared = Arc::new(Shared::new(log, questions, metrics, stop.clone()));
        let mut tasks = JoinSet::new();

        let (attempts, attempt_queue) = mpsc::channel(ATTEMPTS_QUEUED);
        let loader = Loader::new(Cache::new(config.cache_directory), attempts);

        let (lists, list_queue) = mpsc::channel(1);
        let brokers = matches!(config.event_plane, EventPlane::Broker(_));
        let (backend, plane) = (backend(&config.workers), config.event_plane.clone());
        tasks.spawn(discovery::watch(config.workers, config.models, brokers, lists));

        let RecoveryConfig { listen, advertise } = config.recovery;
        let transports =
            Transports::start(config.event_plane, listen, advertise, &shared.metrics).await?;
        let hub = Arc::clone(&transports.hub);
        let (replicas, records) =
            Replicas::new(config.replicas, plane, backend.as_ref(), Arc::clone(&shared), hub)
                .ok_or("no randomness for the router's name")?;
        tasks.spawn(announce::keep(backend, records, replicas.problem()));
        tasks.spawn(replicas.run());
        let keeper = Keeper::new(
            Arc::clone(&shared),
            transports,
            loader,
            config.sync_deadline,
            UPDATES_QUEUED_MAX,
        )
        .with_router(config.router);
        tasks.spawn(keeper.run(Inputs {
            lists: list_queue,
            attempts: attempt_queue,
            questions: question_queue,
        }));

        let picker = match config.picker {
            Some(config) => Some(Picker::start(config, &shared, &mut tasks).await?),
            None => None,
        };

        tasks.spawn(serve_feed(Arc::clone(&shared), feed_listener, tokens));
        let pages = axum::serve(status_listener, status::router(Arc::clone(&shared)))
            .with_graceful_shutdown(stop.clone().cancelled_owned());
        tasks.spawn(async move {
            if let Err(error) = pages.await {
                error!(%error, "the status page's server has ended");
            }
        });
        info!(feed = %bound(&config.feed, feed), %status, epoch = shared.log.epoch(), "started");
        Ok(Self { feed, status, picker, shared, tasks })
    }

    /// Stops every part, in at most a few seconds.
    pub async fn stop(mut self) {
        self.shared.stop.cancel();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if timeout(STOP_TIMEOUT, all).await.is_err() {
            self.tasks.abort_all();
        }
    }
}

/// Serves the feed until everything stops, or nothing can be served any more.
async fn serve_feed(
    shared: Arc<Shared>,
    listener: accept::Listener,
    tokens: Option<Reloaded<Tokens>>,
) {
    let stop = shared.stop.clone();
    let counted = Arc::clone(&shared.metrics);
    let refused = move |reason| {
        counted.feed_refused(reason);
        debug!(reason, "a connection to the feed was refused");
    };
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1))
        .add_service(FeedServer { shared, tokens })
        .serve_with_incoming_shutdown(
            accept::incoming(listener, refused, stop.clone()),
            stop.clone().cancelled_owned(),
        );
    if let Err(error) = server.await {
        error!(%error, "the feed's server has ended");
        stop.cancel();
    }
}

/// Where Dynamo's records are, if workers are found by them.
fn backend(workers: &WorkerSource) -> Option<Backend> {
    match workers {
        WorkerSource::Discovery(discovery) => Some(discovery.backend.clone()),
        WorkerSource::File(_) | WorkerSource::Inline(_) => None,
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address).await.map_err(|error| format!("{address}: {error}"))
}

/// Binds the feed's server; where it is reached over TCP beside it.
async fn listen(
    config: &FeedConfig,
    metrics: &Arc<Metrics>,
    stop: &CancellationToken,
) -> Result<(accept::Listener, SocketAddr), Failure> {
    if let Some(warning) = config.warning {
        warn!("{warning}");
    }
    let address = match &config.listen {
        Listen::Tcp(address) => *address,
        Listen::Unix { path, mode } => {
            let bound = socket::bind(path, *mode).await;
            let listener = bound.map_err(|error| format!("{}: {error}", path.display()))?;
            return Ok((accept::Listener::Unix(listener), NOWHERE));
        }
    };
    let listener = bind(address).await?;
    let address = listener.local_addr()?;
    let listener = match &config.tls {
        Some(files) => {
            let (metrics, stop) = (Arc::clone(metrics), stop.clone());
            let settings = tls::serve_from("feed", files, &[b"h2"], metrics, stop).await;
            let settings = settings.map_err(|error| format!("feed.tls: {error}"))?;
            accept::Listener::Tls(listener, settings)
        }
        None => accept::Listener::Tcp(listener),
    };
    Ok((listener, address))
}

/// The tokens that filters must send.
async fn tokens(
    config: &FeedConfig,
    metrics: &Arc<Metrics>,
    stop: &CancellationToken,
) -> Result<Option<Reloaded<Tokens>>, Failure> {
    let Some(file) = &config.token_file else { return Ok(None) };
    let read = |contents: &[Vec<u8>]| {
        let tokens = contents.first().map_or(&[][..], Vec::as_slice);
        Tokens::parse(tokens)
    };
    let (metrics, stop) = (Arc::clone(metrics), stop.clone());
    let tokens = Reloaded::start("feed tokens", vec![file.clone()], read, metrics, stop).await;
    Ok(Some(tokens.map_err(|error| format!("feed.token_file: {error}"))?))
}

/// Where the feed is, with the port that it got.
fn bound(config: &FeedConfig, address: SocketAddr) -> Listen {
    match &config.listen {
        Listen::Tcp(_) => Listen::Tcp(address),
        unix @ Listen::Unix { .. } => unix.clone(),
    }
}

/// A number that no other life of a sidecar has had; not zero.
fn new_epoch() -> Result<u64, Failure> {
    let random = getrandom::u64().map_err(|error| error.to_string())?;
    Ok(random.max(1))
}
