//! Zmq: follows one rank's publisher and hands its events on.
//!
//! One task a rank. Connects, listens, asks the replay socket when `sequence`
//! wants it, decodes, and waits when the state is slower than the engine: then
//! the publisher drops, which shows as a gap and is repaired.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};
use warmpath_core::event::KvEvent;
use warmpath_core::ids::{Worker, WorkerSlot};

use super::outlet::{Outlet, Stopped};
use super::sequence::{Action, Sequencer};
use super::zmtp::{Connection, SocketKind, ZmtpError};
use super::{SharedView, Update};
use crate::adapter::{Engine, Skip, decode};
use crate::limits::{
    RECONNECT_PAUSE, REPLAY_SILENCE, REPLAY_TIMEOUT, STREAM_FRAMES_QUEUED, TAIL_CHECK_AFTER,
};
use crate::metrics::Metrics;

/// Where and how one rank publishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamSpec {
    /// Who it is, for logs.
    pub worker: Worker,
    /// Stands for its incarnation.
    pub slot: WorkerSlot,
    /// Whose conventions apply.
    pub engine: Engine,
    /// `host:port` of the publisher.
    pub events: String,
    /// `host:port` of the replay socket.
    pub replay: Option<String>,
    /// Whether batches that name another rank are refused: they are with
    /// several ranks, since those could be mixed up.
    pub strict_rank: bool,
}

/// Follows a publisher until the task is aborted or nobody takes updates.
pub async fn follow(
    spec: StreamSpec,
    updates: mpsc::Sender<Update>,
    view: SharedView,
    metrics: Arc<Metrics>,
) {
    let outlet = Outlet::new(spec.worker, spec.slot, updates, view, Arc::clone(&metrics));
    let mut stream = Stream {
        sequencer: Sequencer::new(spec.replay.is_some()),
        spec,
        outlet,
        metrics,
        replay: None,
    };
    let mut pause = RECONNECT_PAUSE.0;
    loop {
        let outcome = stream.session(&mut pause).await;
        let Err(error) = outcome else { return };
        stream.failed(&error);
        if stream.act().await.is_err() {
            return;
        }
        let is_refused = matches!(error, ZmtpError::Refused);
        if is_refused && stream.outlet.send(Update::Refused(stream.spec.slot)).await.is_err() {
            return;
        }
        sleep(pause).await;
        pause = (pause * 2).min(RECONNECT_PAUSE.1);
    }
}

struct Stream {
    spec: StreamSpec,
    sequencer: Sequencer,
    outlet: Outlet,
    metrics: Arc<Metrics>,
    replay: Option<Replay>,
}

impl Stream {
    /// One connection from its beginning to its end. `Ok` if nobody takes
    /// updates any more.
    async fn session(&mut self, pause: &mut Duration) -> Result<(), ZmtpError> {
        let mut connection = Connection::open(&self.spec.events, SocketKind::Sub).await?;
        info!(
            worker = self.spec.worker.id.0,
            rank = self.spec.worker.rank.0,
            "publisher connected"
        );
        *pause = RECONNECT_PAUSE.0;
        self.sequencer.connected();
        self.outlet.look(|view| view.failure = None);
        if self.outlet.send(Update::Connected(self.spec.slot)).await.is_err() {
            return Ok(());
        }
        // One check of the tail after each time of activity.
        let mut tail_at = Some(Instant::now() + TAIL_CHECK_AFTER);
        loop {
            if self.act().await.is_err() {
                return Ok(());
            }
            let quiet_until = tail_at.unwrap_or_else(Instant::now);
            tokio::select! {
                message = connection.receive() => {
                    self.live(&message?);
                    tail_at = Some(Instant::now() + TAIL_CHECK_AFTER);
                }
                reply = next_reply(&mut self.replay) => self.replayed(reply),
                () = sleep_until(quiet_until), if tail_at.is_some() => {
                    tail_at = None;
                    self.sequencer.check_tail();
                }
            }
        }
    }

    /// Takes note of a connection that failed.
    fn failed(&mut self, error: &ZmtpError) {
        let connected = self.sequencer.standing().connected;
        self.metrics.connection_failed(error.reason());
        self.outlet.look(|view| view.failure = Some(error.reason()));
        if connected {
            warn!(
                worker = self.spec.worker.id.0,
                rank = self.spec.worker.rank.0,
                %error,
                "publisher lost"
            );
            self.sequencer.disconnected();
        } else {
            debug!(
                worker = self.spec.worker.id.0,
                rank = self.spec.worker.rank.0,
                %error,
                "publisher not reached"
            );
        }
        if matches!(error, ZmtpError::Refused) {
            self.sequencer.gone();
        }
    }

    fn live(&mut self, frames: &[Bytes]) {
        self.outlet.look(|view| view.messages += 1);
        match numbered(frames) {
            Some((sequence, payload)) => self.sequencer.live(sequence, payload),
            // It has no number; if it should have had one, a gap will show.
            None => self.metrics.message_malformed(),
        }
    }

    fn replayed(&mut self, reply: Reply) {
        match reply {
            Reply::Message(sequence, payload) => self.sequencer.replayed(sequence, payload),
            Reply::End => {
                self.replay = None;
                self.sequencer.replay_ended();
            }
            Reply::Failed(reason) => {
                self.replay = None;
                self.metrics.replay_failed(reason);
                self.sequencer.replay_failed();
            }
        }
    }

    /// Does what the sequencer wants, and says how things stand afterwards.
    async fn act(&mut self) -> Result<(), Stopped> {
        for action in self.sequencer.actions() {
            match action {
                Action::Apply(sequence, payload) => self.apply(sequence, &payload).await?,
                Action::Clear(loss) => self.outlet.clear(loss).await?,
                Action::StopReplay => self.replay = None,
                Action::Replay(start) => {
                    self.metrics.replay_started();
                    self.replay =
                        self.spec.replay.clone().map(|address| Replay::start(address, start));
                    if self.replay.is_none() {
                        self.sequencer.replay_failed();
                    }
                }
            }
        }
        let (standing, gaps) = (self.sequencer.standing(), self.sequencer.gaps());
        let duplicates = self.sequencer.duplicates();
        self.outlet.stand(standing, gaps, duplicates).await
    }

    async fn apply(&mut self, sequence: u64, payload: &[u8]) -> Result<(), Stopped> {
        let batch = match decode(self.spec.engine, payload) {
            Ok(batch) => batch,
            Err(error) => {
                self.metrics.batch_undecodable(error.reason());
                // The clear must come before the messages behind this one.
                self.sequencer.undecodable();
                for action in self.sequencer.actions() {
                    if let Action::Clear(loss) = action {
                        self.outlet.clear(loss).await?;
                    }
                }
                return Ok(());
            }
        };
        for skip in &batch.skipped {
            self.metrics.event_skipped(*skip);
        }
        if self.spec.strict_rank && batch.rank.is_some_and(|rank| rank != self.spec.worker.rank.0) {
            self.metrics.batch_of_other_rank();
            return self.outlet.send(Update::Events(self.spec.slot, sequence, Vec::new())).await;
        }
        let is_whole = !batch.skipped.contains(&Skip::Malformed);
        if is_whole && batch.events.contains(&KvEvent::Cleared) {
            self.sequencer.engine_cleared();
        }
        self.outlet.send(Update::Events(self.spec.slot, sequence, batch.events)).await
    }
}

/// The number and payload of a message: its last two frames. The number is
/// eight bytes, the most significant one first.
fn numbered(frames: &[Bytes]) -> Option<(u64, Bytes)> {
    let [.., number, payload] = frames else { return None };
    let number: [u8; 8] = number.as_ref().try_into().ok()?;
    Some((u64::from_be_bytes(number), payload.clone()))
}

/// What a replay brought.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Reply {
    Message(u64, Bytes),
    End,
    Failed(&'static str),
}

/// A replay under way; dropping it ends it.
#[derive(Debug)]
struct Replay {
    replies: mpsc::Receiver<Reply>,
    task: AbortHandle,
}

impl Drop for Replay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Replay {
    fn start(address: String, start: u64) -> Self {
        let (sender, replies) = mpsc::channel(STREAM_FRAMES_QUEUED);
        let task = tokio::spawn(async move {
            let outcome = timeout(REPLAY_TIMEOUT, replay(&address, start, &sender)).await;
            let last = match outcome {
                Ok(Ok(())) => Reply::End,
                Ok(Err(error)) => Reply::Failed(error.reason()),
                Err(_) => Reply::Failed("timeout"),
            };
            // Nobody listens any more: nobody wants to know.
            let _ = sender.send(last).await;
        });
        Self { replies, task: task.abort_handle() }
    }
}

/// The next reply of the replay under way; waits for ever without one.
async fn next_reply(replay: &mut Option<Replay>) -> Reply {
    match replay {
        Some(replay) => replay.replies.recv().await.unwrap_or(Reply::Failed("closed")),
        None => std::future::pending().await,
    }
}

/// Asks a replay socket for everything from `start` on.
async fn replay(address: &str, start: u64, replies: &mpsc::Sender<Reply>) -> Result<(), ZmtpError> {
    let mut connection = Connection::open(address, SocketKind::Dealer).await?;
    connection.send(&[&b""[..], &start.to_be_bytes()]).await?;
    loop {
        let frames = timeout(REPLAY_SILENCE, connection.receive())
            .await
            .map_err(|_| ZmtpError::Timeout)??;
        // Newer publishers put the topic before the number, older ones do not;
        // either ends with a message without payload.
        let (sequence, payload) = numbered(&frames).ok_or(ZmtpError::Protocol)?;
        if payload.is_empty() {
            return Ok(());
        }
        if replies.send(Reply::Message(sequence, payload)).await.is_err() {
            return Ok(());
        }
    }
}
