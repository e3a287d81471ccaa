//! Picker: the endpoint-picker protocol, for gateways that cannot load the module.
//!
//! Speaks Envoy's `ext_proc` as the Gateway API inference extension has it. The
//! decision is the filter's, all of it in `core`: the picker is one more gateway to
//! the feed, in the sidecar's own process, with one replica for all of its threads.
//!
//! ```text
//! gateway ──ext_proc──► session ──► readers: read, choose, book ──► desk
//!                                                     log ──follow──┘
//! ```
//!
//! # Invariants
//!
//! 1. A client's routing headers are removed from every request, whatever becomes
//!    of it.
//! 2. A request that goes on has a destination; one for which there is none is
//!    answered.
//! 3. Selection and booking are one step, under one lock. A booking is freed
//!    exactly once: when its ticket is dropped, or by expiry.
//! 4. No prompt is read, and no worker chosen, on the runtime's threads.

mod desk;
mod follow;
mod message;
pub mod metrics;
pub mod proto;
mod readers;
mod reply;
mod service;
mod session;
mod tls;

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, health_reporter};
use tracing::{error, info};

use crate::config::picker::{PickerConfig, Security};
use crate::limits::PICKER_STREAMS_PER_CONNECTION_MAX;
use crate::publish::service::Shared;
use crate::run::Failure;
use crate::tls::accept::{self, Listener};
use desk::Desk;
use readers::Readers;
use service::Processor;
use session::Common;

pub use reply::{METADATA, OWN_METADATA};

/// Window of a stream and of a connection, in bytes: bodies of requests come
/// through them.
const WINDOWS: (u32, u32) = (1024 * 1024, 16 * 1024 * 1024);

/// Names of the health service that say whether there are workers to pick from.
/// The last is Dynamo's.
const READY_NAMES: [&str; 4] = ["", "readiness", proto::SERVICE, "inference-extension"];

/// Name of the health service that says that we are there.
const LIVE_NAME: &str = "liveness";

/// A running picker.
#[derive(Debug)]
pub struct Picker {
    /// Where gateways ask.
    pub address: SocketAddr,
    /// Where the health service is in plain.
    pub health: SocketAddr,
}

impl Picker {
    /// Binds, and starts every part; they end when everything stops.
    ///
    /// # Errors
    ///
    /// If an address cannot be bound, a certificate not be used, a thread not be
    /// started, or there is no randomness.
    pub async fn start(
        config: PickerConfig,
        shared: &Arc<Shared>,
        tasks: &mut JoinSet<()>,
    ) -> Result<Self, Failure> {
        let bind = async |address: SocketAddr| {
            TcpListener::bind(address).await.map_err(|error| format!("{address}: {error}"))
        };
        let listener = bind(config.listen).await?;
        let health_listener = bind(config.health_listen).await?;
        let picker =
            Self { address: listener.local_addr()?, health: health_listener.local_addr()? };
        let stop = &shared.stop;
        let listener = tls::secured(listener, &config.security, &shared.metrics, stop).await?;
        let seed = || getrandom::u64().map_err(|error| error.to_string());
        let gateway = seed()?.max(1);
        let desk = Arc::new(Desk::new(Arc::clone(shared), config.index_blocks_max, seed()?));
        let is_secure = config.security != Security::Plain;
        let config = Arc::new(config);
        let readers = Readers::start(&config, &desk, shared, seed()?)?;
        tasks.spawn(follow::follow(Arc::clone(&desk), Arc::clone(shared), gateway));

        let (reporter, health) = health_reporter();
        tasks.spawn(report(reporter, Arc::clone(&desk), stop.clone()));
        let metrics = Arc::clone(&shared.metrics);
        let common = Common {
            config,
            desk,
            readers: Arc::clone(&readers),
            metrics: Arc::clone(&metrics),
            held: 0.into(),
        };
        let refused = move |reason| metrics.picker.connection_refused(reason);
        let connections = accept::incoming(listener, refused.clone(), stop.clone());
        let server = Server::builder()
            .initial_stream_window_size(WINDOWS.0)
            .initial_connection_window_size(WINDOWS.1)
            .max_concurrent_streams(PICKER_STREAMS_PER_CONNECTION_MAX)
            .add_service(Processor::new(Arc::new(common), stop.clone()))
            .add_service(health.clone())
            // Requests that are here go on to their ends.
            .serve_with_incoming_shutdown(connections, stop.clone().cancelled_owned());
        let ends = EndsReaders(readers);
        tasks.spawn(async move {
            if let Err(error) = server.await {
                error!(%error, "the endpoint picker's server has ended");
            }
            drop(ends);
        });
        let health_listener = Listener::Tcp(health_listener);
        let connections = accept::incoming(health_listener, refused, stop.clone());
        let server = Server::builder()
            .add_service(health)
            .serve_with_incoming_shutdown(connections, stop.clone().cancelled_owned());
        tasks.spawn(async move {
            if let Err(error) = server.await {
                error!(%error, "the health service's server has ended");
            }
        });
        let Self { address, health } = picker;
        info!(%address, %health, is_secure, "the endpoint picker serves");
        Ok(picker)
    }
}

/// Ends the threads when it goes, however the server's task ends.
struct EndsReaders(Arc<Readers>);

impl Drop for EndsReaders {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Says how we are: ready while there is a roster, and until the stop.
async fn report(reporter: HealthReporter, desk: Arc<Desk>, stop: CancellationToken) {
    reporter.set_service_status(LIVE_NAME, ServingStatus::Serving).await;
    let mut knows_workers = desk.knows_workers();
    let set = async |status| {
        for name in READY_NAMES {
            reporter.set_service_status(name, status).await;
        }
    };
    set(ServingStatus::NotServing).await;
    let came = knows_workers.wait_for(|knows| *knows);
    if let Some(Ok(_)) = stop.run_until_cancelled(came).await.map(|came| came.map(|_| ())) {
        set(ServingStatus::Serving).await;
        stop.cancelled().await;
    }
    set(ServingStatus::NotServing).await;
}
