//! Source: bytes in, from the engines' own publishers.
//!
//! First stage of the feed path. `zmtp` speaks the transport, `sequence` puts
//! messages into order, `zmq` drives both for one rank and hands decoded events
//! on. `plane` does the same for Dynamo's event plane, and `load` takes in how
//! busy ranks are, from wherever they say it.

pub mod load;
mod outlet;
pub mod plane;
pub mod pull;
pub mod sequence;
pub mod start;
pub mod zmq;
pub mod zmtp;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use warmpath_core::event::KvEvent;
use warmpath_core::ids::{Worker, WorkerSlot};

use crate::config::discovery::EventPlane;
use crate::fleet::RankLoad;
use crate::metrics::Metrics;
use plane::hub::Hub;
use plane::recovery::Recovery;
use pull::Pulls;
use sequence::{Loss, Sequencer, Standing};

/// What a stream tells the state.
#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    /// The events of one message to apply, in order, and the message's number.
    Events(WorkerSlot, u64, Vec<KvEvent>),
    /// What is known of the rank is to be forgotten.
    Clear(WorkerSlot, Loss),
    /// A whole account of what the rank holds, and the number of the last event
    /// that it shows: it takes the place of what was known.
    Replace(WorkerSlot, u64, Vec<KvEvent>),
    /// The rank's publisher is connected.
    Connected(WorkerSlot),
    /// Nobody listens where the rank's publisher should be.
    Refused(WorkerSlot),
    /// A first replay, or what takes its place, is over.
    Synced(WorkerSlot),
    /// How busy a rank is.
    Load(Worker, RankLoad),
}

/// What the state page shows of a stream.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// How things stand.
    pub standing: Standing,
    /// Messages received live.
    pub messages: u64,
    /// Gaps seen.
    pub gaps: u64,
    /// Messages that came twice.
    pub duplicates: u64,
    /// Last failure to connect or to stay connected.
    pub failure: Option<&'static str>,
}

/// What streams of several ranks share.
#[derive(Clone, Debug)]
pub struct Transports {
    /// Gives out subscriptions.
    pub hub: Arc<Hub>,
    /// Asks workers for their ranks' history.
    pub recovery: Arc<Recovery>,
    /// Empties the servers' buffers of events.
    pub pulls: Arc<Pulls>,
}

impl Transports {
    /// Starts to listen for workers that call back; connects to nothing yet.
    ///
    /// - `plane`: what carries subjects.
    /// - `listen` and `advertised`: as in [`Recovery::bind`].
    ///
    /// # Errors
    ///
    /// If the address cannot be bound.
    pub async fn start(
        plane: EventPlane,
        listen: SocketAddr,
        advertised: Option<String>,
        metrics: &Arc<Metrics>,
    ) -> io::Result<Self> {
        let recovery = Recovery::bind(listen, advertised, Arc::clone(metrics)).await?;
        let hub = Hub::new(plane, Arc::clone(metrics));
        let pulls = Pulls::new(Arc::clone(metrics));
        Ok(Self { hub: Arc::new(hub), recovery: Arc::new(recovery), pulls: Arc::new(pulls) })
    }
}

/// A view that its stream keeps up to date.
pub type SharedView = Arc<Mutex<View>>;

/// A view of a stream that has not started.
#[must_use]
pub fn new_view() -> SharedView {
    let standing = Sequencer::new(true).standing();
    Arc::new(Mutex::new(View { standing, messages: 0, gaps: 0, duplicates: 0, failure: None }))
}
