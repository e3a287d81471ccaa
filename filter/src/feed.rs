//! Feed: the streams between a filter VM and the sidecar.
//!
//! The VM that holds the lease follows the log and appends it to the ring for
//! all; any VM that has lost its place takes a snapshot over a stream of its
//! own. Both are driven by ticks and by the messages themselves, and every
//! message is a bounded piece of work.

use warmpath_core::bookings::{Bookings, Outbox, told};
use warmpath_core::card::BlobId;
use warmpath_core::entry::Entry;
use warmpath_core::frame::{Frame, Kind};
use warmpath_core::lease;
use warmpath_core::replica::SnapshotProgress;
use warmpath_core::shared::SharedData;
use warmpath_core::stream::StreamOrder;
use warmpath_core::uplink::{BlobPart, Hello, More, Purpose};

use crate::host;
use crate::limits::{
    LEASE_RENEW_MS, LEASE_TERM_MS, SAME_TURN_NS, SNAPSHOT_CREDIT, STREAM_RETRY_MS,
    STREAM_SILENCE_MS, TURN_FEED_NS,
};
use crate::metrics::Counter;
use crate::vm::{Vm, cards_key, roster_key, settings_key};

mod blobs;
mod message;

use blobs::{Fetch, Loading};
use message::{send, unwrap_message};

const SERVICE: &str = "warmpath.feed.v1.Feed";
const METHOD: &str = "Attach";

/// The log's stream.
#[derive(Debug)]
struct Follow {
    stream: u32,
    /// When something last came, or it was opened, in milliseconds.
    heard_at_ms: u64,
    /// Whether anything has come at all.
    is_heard: bool,
    /// What may come next.
    order: StreamOrder,
    /// The blob that is being fetched for the shelf.
    fetch: Option<Fetch>,
    /// What this gateway books, once the sidecar has said that it wants to hear
    /// of it.
    uplink: Option<Outbox>,
}

/// The stream of a snapshot.
#[derive(Clone, Copy, Debug)]
struct Taking {
    stream: u32,
    /// Whether parts were asked for: there is room for them.
    is_asked: bool,
}

/// Messages that come right behind each other, in one turn of the event loop.
#[derive(Clone, Copy, Debug, Default)]
struct Turn {
    began_ns: u64,
    ended_ns: u64,
}

impl Turn {
    /// A message is at hand. Returns the time that applying it may take, in
    /// nanoseconds; 0 if the turn has taken long enough.
    fn left_ns(&mut self, now_ns: u64) -> u64 {
        if now_ns.saturating_sub(self.ended_ns) > SAME_TURN_NS {
            self.began_ns = now_ns;
        }
        TURN_FEED_NS.saturating_sub(now_ns.saturating_sub(self.began_ns))
    }
}

/// The streams of one VM.
#[derive(Debug, Default)]
pub(crate) struct Feed {
    follow: Option<Follow>,
    snapshot: Option<Taking>,
    turn: Turn,
    follow_retry_at_ms: u64,
    snapshot_retry_at_ms: u64,
    lease_at_ms: u64,
    leads: bool,
    loading: Option<Loading>,
    look_at_ms: u64,
}

impl Feed {
    /// Other models are known: what is being copied may not be wanted any more,
    /// and something else be.
    pub(crate) fn keep_loading(&mut self, named: &[BlobId]) {
        self.loading.take_if(|loading| !named.contains(&loading.blob));
        self.look_at_ms = 0;
    }

    fn is_snapshot(&self, stream: u32) -> bool {
        self.snapshot.is_some_and(|taking| taking.stream == stream)
    }
}

impl Vm {
    /// Drives the streams; called on every tick of the root context that opened
    /// them.
    pub(crate) fn drive_feed(&mut self, now_ms: u64) {
        self.drive_lease(now_ms);
        self.drive_follow(now_ms);
        self.drive_snapshot(now_ms);
        self.drive_fetch();
        self.drive_loading(now_ms);
        self.drive_uplink(now_ms);
    }

    /// Whether a stream or a file is under way that ticks bring on.
    pub(crate) fn feed_is_busy(&self) -> bool {
        let Feed { follow, snapshot, loading, .. } = &self.feed;
        let is_fetching = follow.as_ref().is_some_and(|follow| follow.fetch.is_some());
        snapshot.is_some()
            || loading.is_some()
            || is_fetching
            || self.models.wanted_blob().is_some()
    }

    /// Sends what this gateway has booked since the last tick.
    fn drive_uplink(&mut self, now_ms: u64) {
        let Some(Follow { stream, uplink: Some(uplink), .. }) = &mut self.feed.follow else {
            return;
        };
        let stream = *stream;
        for body in uplink.frames(self.replica.loads(), now_ms) {
            if !send(stream, Kind::Bookings, &body) {
                // Whether the other side has it cannot be told.
                *uplink = Outbox::default();
                self.metrics.add(Counter::HostRefused, 1);
                return;
            }
        }
    }

    /// Passes on what an entry says of a booking, if this VM does that for its
    /// gateway.
    pub(crate) fn pass_on(&mut self, entry: &[u8]) {
        if let Some(Follow { uplink: Some(uplink), .. }) = &mut self.feed.follow
            && let Some(entry) = told(entry)
        {
            let dropped = uplink.note(&entry);
            self.metrics.add(Counter::UplinkDropped, dropped);
            // Other routers are to hear of it soon.
            self.pace.speed_up();
        }
    }

    fn drive_lease(&mut self, now_ms: u64) {
        if now_ms < self.feed.lease_at_ms {
            return;
        }
        self.feed.lease_at_ms = now_ms + LEASE_RENEW_MS;
        let leads = lease::hold(&self.store, self.number, now_ms, LEASE_TERM_MS) == Ok(true);
        if leads && !self.feed.leads {
            log::info!("warmpath: vm {} follows the feed for this gateway", self.number);
        }
        self.feed.leads = leads;
    }

    fn drive_follow(&mut self, now_ms: u64) {
        if let Some(follow) = &self.feed.follow {
            let is_silent = now_ms.saturating_sub(follow.heard_at_ms) > STREAM_SILENCE_MS;
            if !self.feed.leads || is_silent {
                host::reset_stream(follow.stream);
                self.feed.follow = None;
                self.feed.follow_retry_at_ms = now_ms + STREAM_RETRY_MS;
                if is_silent {
                    self.metrics.add(Counter::FeedStreamsEnded, 1);
                    log::warn!("warmpath: the sidecar's stream was silent and is opened again");
                }
            }
            return;
        }
        // A follower resumes behind what it has seen in the ring, so it must
        // have seen all of it.
        if !self.feed.leads || !self.caught_up || now_ms < self.feed.follow_retry_at_ms {
            return;
        }
        self.feed.follow_retry_at_ms = now_ms + STREAM_RETRY_MS;
        let seen = self.replica.seen();
        let hello = Hello {
            purpose: Purpose::Follow,
            vm: self.number,
            epoch: seen.epoch,
            sequence: seen.sequence,
            gateway: self.gateway,
        };
        if let Some(stream) = self.open(&hello) {
            self.feed.follow = Some(Follow {
                stream,
                heard_at_ms: now_ms,
                is_heard: false,
                order: StreamOrder::new(seen),
                fetch: None,
                uplink: None,
            });
        }
    }

    fn drive_snapshot(&mut self, now_ms: u64) {
        if let Some(taking) = self.feed.snapshot {
            if self.replica.wants_snapshot() {
                // What was asked for is of no use any more.
                host::reset_stream(taking.stream);
                self.feed.snapshot = None;
            } else {
                self.ask_for_parts();
            }
            return;
        }
        // Before the first frame of a log has been seen there is nothing that
        // a snapshot would have to fit to.
        let is_due = self.replica.wants_snapshot()
            && self.caught_up
            && self.replica.seen().epoch != 0
            && now_ms >= self.feed.snapshot_retry_at_ms;
        if !is_due {
            return;
        }
        self.feed.snapshot_retry_at_ms = now_ms + STREAM_RETRY_MS;
        self.replica.begin_snapshot();
        let (vm, gateway) = (self.number, self.gateway);
        let hello = Hello { purpose: Purpose::Snapshot, vm, epoch: 0, sequence: 0, gateway };
        match self.open(&hello) {
            Some(stream) => self.feed.snapshot = Some(Taking { stream, is_asked: false }),
            None => self.replica.abandon_snapshot(),
        }
    }

    /// Asks for the first parts of a snapshot, as soon as there is room for all.
    fn ask_for_parts(&mut self) {
        let Some(taking) = &mut self.feed.snapshot else { return };
        if !taking.is_asked && self.replica.prepare_snapshot() {
            taking.is_asked = true;
            send(taking.stream, Kind::More, &More { parts: SNAPSHOT_CREDIT }.encode());
        }
    }

    fn open(&mut self, hello: &Hello) -> Option<u32> {
        let opened = host::open_stream(&self.config.feed_cluster, SERVICE, METHOD);
        let Ok(stream) = opened else {
            self.metrics.add(Counter::HostRefused, 1);
            return None;
        };
        if send(stream, Kind::Hello, &hello.encode()) {
            return Some(stream);
        }
        host::reset_stream(stream);
        None
    }

    /// A message came on one of the streams.
    pub(crate) fn on_message(&mut self, stream: u32, len: usize, now_ms: u64) {
        let message = host::buffer(host::Buffer::GrpcMessage, 0, len).unwrap_or_default();
        let Some(frame) = unwrap_message(&message) else {
            self.metrics.add(Counter::BadFrames, 1);
            return;
        };
        if self.feed.is_snapshot(stream) {
            self.on_snapshot_frame(stream, frame);
        } else if let Some(follow) = &mut self.feed.follow
            && follow.stream == stream
        {
            follow.heard_at_ms = now_ms;
            follow.is_heard = true;
            self.on_log_frame(frame);
        }
    }

    fn on_snapshot_frame(&mut self, stream: u32, frame: &[u8]) {
        match self.replica.apply_snapshot_frame(frame) {
            SnapshotProgress::More if self.feed.snapshot.is_some_and(|it| it.is_asked) => {
                send(stream, Kind::More, &More { parts: 1 }.encode());
            }
            SnapshotProgress::More => self.ask_for_parts(),
            SnapshotProgress::Settling | SnapshotProgress::Done | SnapshotProgress::Failed => {
                host::reset_stream(stream);
                self.feed.snapshot = None;
            }
        }
    }

    fn on_log_frame(&mut self, bytes: &[u8]) {
        let Ok(frame) = Frame::decode(bytes) else {
            self.metrics.add(Counter::BadFrames, 1);
            self.end_follow();
            return;
        };
        if let Some(follow) = &mut self.feed.follow
            && follow.order.take(&frame).is_err()
        {
            self.metrics.add(Counter::FramesReplayed, 1);
            return;
        }
        match frame.kind {
            Kind::BlobPart => {
                if let Ok(part) = BlobPart::decode(frame.body) {
                    self.on_blob_part(&part);
                }
                return;
            }
            Kind::Card => self.keep(&cards_key(), bytes),
            Kind::Roster => self.keep(&roster_key(), bytes),
            Kind::Settings => self.keep(&settings_key(), bytes),
            Kind::Remote => self.note_wanted(frame.body),
            _ => {}
        }
        if !self.append_frame(bytes) {
            // The log must not have holes: ask for this frame again.
            self.metrics.add(Counter::RingAppendsDelayed, 1);
            self.end_follow();
        }
    }

    /// Appends a frame for all, and applies it if this turn of the event loop has
    /// not taken too long already.
    fn append_frame(&mut self, bytes: &[u8]) -> bool {
        let started_ns = host::monotonic_ns();
        let left_ns = self.feed.turn.left_ns(started_ns);
        let entry = Entry::Feed(bytes).encode();
        let Ok(sequence) = self.append_anywhere(&entry) else { return false };
        if left_ns > 0 && sequence == self.position + 1 {
            self.position = sequence;
            self.apply(&entry, Some(host::monotonic_ns() / 1_000_000));
        } else if left_ns > 0 {
            self.catch_up(|_| host::monotonic_ns().saturating_sub(started_ns) <= left_ns);
        }
        if left_ns == 0 {
            // Ticks see to what is left.
            self.pace.speed_up();
        }
        self.feed.turn.ended_ns = host::monotonic_ns();
        true
    }

    /// The sidecar says whether it wants to hear what this gateway books.
    fn note_wanted(&mut self, body: &[u8]) {
        let wanted = Bookings::decode(body).is_ok_and(|bookings| bookings.flags.wanted);
        if let Some(follow) = &mut self.feed.follow {
            if wanted {
                follow.uplink.get_or_insert_default();
            } else {
                follow.uplink = None;
            }
        }
    }

    /// Keeps a frame for VMs that start while the sidecar is away.
    fn keep(&mut self, key: &str, bytes: &[u8]) {
        if self.store.set(key, bytes, None).is_err() {
            self.metrics.add(Counter::HostRefused, 1);
        }
    }

    fn end_follow(&mut self) {
        if let Some(follow) = self.feed.follow.take() {
            host::reset_stream(follow.stream);
            self.metrics.add(Counter::FeedStreamsEnded, 1);
        }
    }

    /// A stream was ended by the other side.
    pub(crate) fn on_stream_end(&mut self, stream: u32, status: u32) {
        host::close_stream(stream);
        if self.feed.is_snapshot(stream) {
            self.feed.snapshot = None;
            self.replica.abandon_snapshot();
        }
        if let Some(follow) = self.feed.follow.take_if(|follow| follow.stream == stream)
            && follow.is_heard
        {
            // Of attempts that never got through only the counter tells: there
            // are four a second while the sidecar is away.
            log::warn!("warmpath: the sidecar's stream ended with status {status}");
        }
        self.metrics.add(Counter::FeedStreamsEnded, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: whatever comes in one turn of the event loop, applying it takes a
    /// bounded time; the next turn has as much again.
    #[test]
    fn a_turn_takes_a_bounded_time() {
        const FRAME_NS: u64 = 90_000;
        let (mut turn, mut now_ns) = (Turn::default(), 1_000_000_000);
        for _ in 0..3 {
            let mut applied = 0;
            for _ in 0..100 {
                if turn.left_ns(now_ns) > 0 {
                    applied += 1;
                    now_ns += FRAME_NS;
                }
                // What is only appended takes little, but not nothing.
                now_ns += 10_000;
                turn.ended_ns = now_ns;
            }
            assert_eq!(applied, 5, "half a millisecond's worth");
            now_ns += SAME_TURN_NS + 1;
        }
    }
}
