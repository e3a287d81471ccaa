//! Follow: the feed to the picker's own replica.
//!
//! The picker is a gateway like any other, but in the same process: it takes the
//! frames that filters get, out of the log, and asks the keeper for snapshots.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{broadcast, oneshot};
use tokio::time::{Instant, sleep_until};
use warmpath_core::bookings::Bookings;
use warmpath_core::delta::{DeltaBuilder, Operation, SnapshotStart};
use warmpath_core::frame::{Frame, Kind};
use warmpath_core::replica::SnapshotProgress;

use super::desk::Desk;
use crate::keeper::{Question, Snapshot};
use crate::limits::{BOOKINGS_LOOK_EVERY, PICKER_TICK, PICKER_TICK_BUSY};
use crate::publish::service::Shared;
use crate::replicas::remote::FromGateway;

/// Follows until the stop.
///
/// - `gateway`: our name among gateways.
pub(super) async fn follow(desk: Arc<Desk>, shared: Arc<Shared>, gateway: u64) {
    let stop = shared.stop.clone();
    let mut progress = shared.log.watch();
    let mut follower = Follower {
        desk: &desk,
        shared: &shared,
        gateway,
        is_attached: false,
        position: None,
        latest: Vec::new(),
        usage: 0,
        asked: None,
    };
    let mut changes = follower.take_list();
    let (mut tick_at, mut expire_at) = (Instant::now(), Instant::now());
    loop {
        follower.advance();
        follower.ask_for_snapshot();
        tokio::select! {
            () = stop.cancelled() => return,
            // It ends with the process.
            Ok(()) = progress.changed() => {}
            change = changes.recv() => match change {
                Ok(body) => follower.feed(Kind::Remote, &body),
                Err(_) => changes = follower.take_list(),
            },
            snapshot = answered(&mut follower.asked) => follower.take(snapshot).await,
            () = desk.has_booked.notified() => follower.tell(),
            () = sleep_until(tick_at) => {
                let now = Instant::now();
                let expires = now >= expire_at;
                if expires {
                    expire_at = now + BOOKINGS_LOOK_EVERY;
                }
                let is_busy = desk.tick(expires);
                follower.take_usage();
                follower.tell();
                tick_at = now + if is_busy { PICKER_TICK_BUSY } else { PICKER_TICK };
            }
        }
    }
}

/// The snapshot that was asked for; `None` if it will not come.
async fn answered(asked: &mut Option<oneshot::Receiver<Snapshot>>) -> Option<Snapshot> {
    let Some(answer) = asked else { return std::future::pending().await };
    let snapshot = answer.await.ok();
    *asked = None;
    snapshot
}

struct Follower<'a> {
    desk: &'a Desk,
    shared: &'a Shared,
    gateway: u64,
    is_attached: bool,
    /// The last log frame taken; `None` before the index is whole.
    position: Option<u64>,
    /// Card, settings and roster frames as last taken while there is no position.
    latest: Vec<Bytes>,
    /// Number of the cache usage taken last.
    usage: u64,
    asked: Option<oneshot::Receiver<Snapshot>>,
}

impl Follower<'_> {
    /// Takes a frame that has no place in the log.
    fn feed(&self, kind: Kind, body: &[u8]) {
        let epoch = self.shared.log.epoch();
        self.desk.feed(&Frame { kind, epoch, sequence: 0, body }.encode());
    }

    /// Takes the list of what other routers have booked; gives what changes behind
    /// it.
    fn take_list(&self) -> broadcast::Receiver<Bytes> {
        let (list, changes) = self.shared.exchange.remote.follow();
        let wanted = list
            .iter()
            .any(|body| Bookings::decode(body).is_ok_and(|bookings| bookings.flags.wanted));
        self.desk.tell_others(wanted);
        list.iter().for_each(|body| self.feed(Kind::Remote, body));
        changes
    }

    /// Takes what is behind the position.
    fn advance(&mut self) {
        let log = &self.shared.log;
        loop {
            let Some(position) = self.position else {
                self.take_latest();
                if log.progress().open {
                    self.resync();
                    continue;
                }
                return;
            };
            match log.behind(position) {
                Ok(frames) if frames.is_empty() => return,
                Ok(frames) => {
                    self.position = Some(position + frames.len() as u64);
                    frames.iter().for_each(|frame| self.desk.feed(frame));
                }
                Err(_) => self.resync(),
            }
        }
    }

    fn take_latest(&mut self) {
        let latest = self.shared.log.latest();
        for frame in latest.iter().filter(|frame| !self.latest.contains(frame)) {
            self.desk.feed(frame);
        }
        self.latest = latest;
    }

    /// Goes on behind the log's last frame, with an index that is taken anew.
    fn resync(&mut self) {
        let (epoch, last) = (self.shared.log.epoch(), self.shared.log.progress().last);
        let (kind, body) = (Kind::Resync, &[][..]);
        self.desk.feed(&Frame { kind, epoch, sequence: last, body }.encode());
        self.take_latest();
        self.position = Some(last);
    }

    fn ask_for_snapshot(&mut self) {
        let is_due = self.position.is_some() && self.asked.is_none();
        if !is_due || !self.desk.with(|replica| replica.wants_snapshot()) {
            return;
        }
        let (answer, asked) = oneshot::channel();
        // If there is no room, the next round asks.
        if self.shared.questions.try_send(Question::Snapshot(answer)).is_ok() {
            self.desk.with(warmpath_core::replica::Replica::begin_snapshot);
            self.asked = Some(asked);
        }
    }

    /// Takes a snapshot, part by part, so that nobody waits long for the lock.
    async fn take(&mut self, snapshot: Option<Snapshot>) {
        let Some(Snapshot { sequence, ranks }) = snapshot else {
            return self.desk.with(warmpath_core::replica::Replica::abandon_snapshot);
        };
        let epoch = self.shared.log.epoch();
        let send = |kind, body: &[u8]| {
            let frame = Frame { kind, epoch, sequence, body }.encode();
            self.desk.with(|replica| replica.apply_snapshot_frame(&frame))
        };
        let blocks = ranks.iter().map(|(_, held)| held.len() as u64).sum();
        send(Kind::SnapshotStart, &SnapshotStart { blocks }.encode());
        let has_room = || {
            let is_under_way = |replica: &mut warmpath_core::replica::Replica| {
                !replica.prepare_snapshot() && replica.snapshot_progress().is_some()
            };
            !self.desk.with(is_under_way)
        };
        while !has_room() {
            tokio::task::yield_now().await;
        }
        let mut part = DeltaBuilder::new();
        for (slot, held) in ranks {
            for hash in held.keys() {
                part.push(Operation::Stored, slot, *hash);
                if part.is_full() {
                    if send(Kind::SnapshotPart, &part.take()) == SnapshotProgress::Failed {
                        return;
                    }
                    tokio::task::yield_now().await;
                }
            }
        }
        if !part.is_empty() {
            send(Kind::SnapshotPart, &part.take());
        }
        send(Kind::SnapshotEnd, &[]);
    }

    /// Takes how full caches are, unless it was taken already.
    fn take_usage(&mut self) {
        let latest = self.shared.usage.latest();
        if latest.number != self.usage {
            self.usage = latest.number;
            self.feed(Kind::CacheUsage, &latest.body);
        }
    }

    /// Tells other routers what is booked here.
    fn tell(&mut self) {
        let remote = &self.shared.exchange.remote;
        loop {
            let bodies = self.desk.to_tell();
            if bodies.is_empty() {
                return;
            }
            if !self.is_attached {
                self.is_attached = remote.say(FromGateway::Attached(self.gateway));
            }
            let is_said = |body: Vec<u8>| remote.say(FromGateway::Said(self.gateway, body.into()));
            if !self.is_attached || !bodies.into_iter().all(is_said) {
                self.shared.metrics.replica_dropped("uplink_full");
                self.desk.tell_again();
                // The next tick tries again.
                return;
            }
        }
    }
}
