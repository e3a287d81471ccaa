//! Follow: the log to the filter VM that keeps it for its gateway.
//!
//! Cards, settings and roster first, then the log from where the filter is, blobs on
//! demand. While the sidecar's own index is not whole yet, a filter of another
//! epoch gets these only: it keeps the index it has.

use std::collections::VecDeque;

use bytes::Bytes;
use tokio::sync::{broadcast, watch};
use tokio::time::{Duration, MissedTickBehavior, interval};
use warmpath_core::frame::{Frame, Kind};
use warmpath_core::limits::HEARTBEAT_MS;
use warmpath_core::uplink::Hello;

use super::blobs::Fetch;
use super::log::Progress;
use super::service::{End, FromFilter, Said, Shared, ToFilter};
use crate::limits::{CREDIT_MAX, FETCHES_MAX};
use crate::replicas::remote::FromGateway;

/// Counts a follower while it lives.
struct Counted<'a>(&'a Shared);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.metrics.followers_changed(-1);
    }
}

/// A gateway that is attached while this lives.
struct Attached<'a> {
    shared: &'a Shared,
    gateway: u64,
}

impl<'a> Attached<'a> {
    fn new(shared: &'a Shared, gateway: u64) -> Result<Self, End> {
        let attached = Self { shared, gateway };
        attached.say(FromGateway::Attached(gateway))?;
        Ok(attached)
    }

    fn say(&self, said: FromGateway) -> Result<(), End> {
        if self.shared.exchange.remote.say(said) {
            return Ok(());
        }
        // Nothing of a list must be missing: the filter begins again with one.
        self.shared.metrics.replica_dropped("uplink_full");
        Err(End::OverLimit)
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        // If there is no room, what it has booked expires.
        let _ = self.shared.exchange.remote.say(FromGateway::Detached(self.gateway));
    }
}

/// Serves a follower until it goes.
///
/// # Errors
///
/// Why the stream ends.
pub(super) async fn serve(
    shared: &Shared,
    hello: &Hello,
    from: &mut FromFilter,
    to: &ToFilter,
) -> Result<(), End> {
    shared.metrics.followers_changed(1);
    let _counted = Counted(shared);
    let mut follower = Follower {
        shared,
        to,
        hello: *hello,
        position: None,
        latest: Vec::new(),
        usage: 0,
        credit: 0,
        fetches: VecDeque::new(),
        attached: None,
    };
    let mut progress = shared.log.watch();
    follower.send_latest().await?;
    let mut changes = None;
    if hello.gateway != 0 {
        follower.attached = Some(Attached::new(shared, hello.gateway)?);
        changes = Some(follower.send_remote().await?);
    }
    let known = hello.epoch == shared.log.epoch() && shared.log.behind(hello.sequence).is_ok();
    if known {
        follower.position = Some(hello.sequence);
    }
    let mut heartbeat = interval(Duration::from_millis(HEARTBEAT_MS));
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            said = from.said() => follower.hear(said?)?,
            change = next_change(&mut changes) => match change {
                Some(body) => follower.remote_frame(&body).await?,
                None => {
                    shared.metrics.replica_dropped("slow_follower");
                    changes = Some(follower.send_remote().await?);
                }
            },
            outcome = follower.wait(&mut progress) => {
                outcome?;
                follower.advance().await?;
            }
            () = std::future::ready(()), if follower.owes_part() => follower.send_part().await?,
            _ = heartbeat.tick() => {
                follower.heartbeat().await?;
                follower.send_usage().await?;
            }
        }
    }
}

/// The next change of other routers' bookings; `None` if some were missed.
async fn next_change(changes: &mut Option<broadcast::Receiver<Bytes>>) -> Option<Bytes> {
    match changes {
        // The sender lives as long as we do.
        Some(changes) => changes.recv().await.ok(),
        None => std::future::pending().await,
    }
}

struct Follower<'a> {
    shared: &'a Shared,
    to: &'a ToFilter,
    hello: Hello,
    /// The last log frame sent, or that the filter had; `None` while the
    /// filter's index is of another log.
    position: Option<u64>,
    /// Card, settings and roster frames as last sent while there is no position.
    latest: Vec<Bytes>,
    /// Number of the cache usage sent last.
    usage: u64,
    credit: u64,
    fetches: VecDeque<Fetch>,
    attached: Option<Attached<'a>>,
}

impl Follower<'_> {
    fn hear(&mut self, said: Said) -> Result<(), End> {
        match said {
            Said::More(parts) => {
                self.credit = self.credit.saturating_add(u64::from(parts)).min(CREDIT_MAX);
            }
            Said::Fetch(wanted) => {
                if self.fetches.len() >= FETCHES_MAX {
                    return Err(End::OverLimit);
                }
                if self.shared.blobs.find(wanted.blob).is_none() {
                    self.shared.metrics.blob_unknown();
                }
                self.fetches.push_back(Fetch::new(wanted, &self.shared.blobs));
            }
            Said::Bookings(body) => {
                let Some(attached) = &self.attached else { return Err(End::BadFrame) };
                attached.say(FromGateway::Said(attached.gateway, body))?;
            }
        }
        Ok(())
    }

    /// Sends the list of other routers' bookings; gives what changes behind it.
    async fn send_remote(&self) -> Result<broadcast::Receiver<Bytes>, End> {
        let (list, changes) = self.shared.exchange.remote.follow();
        for body in list {
            self.remote_frame(&body).await?;
        }
        Ok(changes)
    }

    async fn remote_frame(&self, body: &[u8]) -> Result<(), End> {
        let epoch = self.shared.log.epoch();
        self.to.frame(Frame { kind: Kind::Remote, epoch, sequence: 0, body }).await
    }

    /// Waits until there is something to send. May be dropped.
    async fn wait(&self, progress: &mut watch::Receiver<Progress>) -> Result<(), End> {
        let due = |progress: &Progress| match self.position {
            Some(position) => position != progress.last,
            None => progress.open,
        };
        if self.position.is_some() {
            progress.wait_for(due).await.map_err(|_| End::Stopping)?;
        } else {
            // Cards and rosters are passed on before the index is whole.
            let seen = *progress.borrow_and_update();
            if !due(&seen) && self.latest == self.shared.log.latest() {
                progress.changed().await.map_err(|_| End::Stopping)?;
            }
        }
        Ok(())
    }

    /// Sends what is behind the follower's position.
    async fn advance(&mut self) -> Result<(), End> {
        let log = &self.shared.log;
        let Some(position) = self.position else {
            self.send_latest().await?;
            if log.progress().open {
                self.resync("epoch").await?;
            }
            return Ok(());
        };
        let Ok(frames) = log.behind(position) else {
            return self.resync("slow").await;
        };
        for frame in frames {
            self.to.send(frame).await?;
            self.position = self.position.map(|position| position + 1);
        }
        Ok(())
    }

    /// Tells the filter to take the index anew; the stream goes on behind the
    /// log's last frame.
    async fn resync(&mut self, reason: &'static str) -> Result<(), End> {
        let last = self.shared.log.progress().last;
        self.shared.metrics.resync_sent(reason);
        let epoch = self.shared.log.epoch();
        self.to.frame(Frame { kind: Kind::Resync, epoch, sequence: last, body: &[] }).await?;
        // What the frames that were skipped may have changed.
        self.send_latest().await?;
        self.position = Some(last);
        Ok(())
    }

    /// Sends the latest card, settings and roster frame unless they were sent already.
    async fn send_latest(&mut self) -> Result<(), End> {
        let latest = self.shared.log.latest();
        for frame in &latest {
            if !self.latest.contains(frame) {
                self.to.send(frame.clone()).await?;
            }
        }
        self.latest = latest;
        Ok(())
    }

    fn owes_part(&self) -> bool {
        self.credit > 0 && !self.fetches.is_empty()
    }

    async fn send_part(&mut self) -> Result<(), End> {
        let Some(fetch) = self.fetches.front_mut() else { return Ok(()) };
        let (body, is_last) = fetch.next_part();
        if is_last {
            self.fetches.pop_front();
        }
        self.credit = self.credit.saturating_sub(1);
        let epoch = self.shared.log.epoch();
        self.to.frame(Frame { kind: Kind::BlobPart, epoch, sequence: 0, body: &body }).await
    }

    /// Sends how full caches are, unless it was sent already.
    async fn send_usage(&mut self) -> Result<(), End> {
        let latest = self.shared.usage.latest();
        if latest.number == self.usage {
            return Ok(());
        }
        self.usage = latest.number;
        let (kind, epoch) = (Kind::CacheUsage, self.shared.log.epoch());
        self.to.frame(Frame { kind, epoch, sequence: 0, body: &latest.body }).await
    }

    /// Says how far the stream has come. Before it has come anywhere, that is
    /// where the filter said it is: a filter that heard of another epoch would
    /// drop the index that it is to keep.
    async fn heartbeat(&self) -> Result<(), End> {
        let (epoch, sequence) = match self.position {
            Some(position) => (self.shared.log.epoch(), position),
            None => (self.hello.epoch, self.hello.sequence),
        };
        self.to.frame(Frame { kind: Kind::Heartbeat, epoch, sequence, body: &[] }).await
    }
}
