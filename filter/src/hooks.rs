//! Hooks: what tests need and no shipped module has (feature `test-hooks`).
//!
//! - A request with the header `x-test-crash-vm` crashes the VM.
//! - A plugin configured as [`RING_READER`], with the `vm_id` of the plugin that
//!   routes, answers requests with the ring log: the one place where the order of
//!   all VMs' bookings can be seen.
//! - One configured as [`FEED_READER`], with the `vm_id` and the module of the
//!   plugin that routes, and so in its VM, tells what the feed did there.

use core::cell::RefCell;

use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;
use warmpath_core::ids::WorkerId;
use warmpath_core::lease;
use warmpath_core::ring::{Read, Ring};
use warmpath_core::wire::Writer;

use crate::host::{self, Headers, HostStore};
use crate::limits::LEASE_TERM_MS;
use crate::vm;

/// Configuration of a plugin that reads the ring log.
const RING_READER: &[u8] = b"ring-reader";

/// Configuration of a plugin that tells what the feed did in its VM.
const FEED_READER: &[u8] = b"feed-reader";

/// Which plugin of the tests a root context is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reads {
    /// [`RING_READER`].
    Ring,
    /// [`FEED_READER`].
    Feed,
}

impl Reads {
    /// The one that a configuration asks for; `None` for that of the product.
    pub(crate) fn of(configuration: &[u8]) -> Option<Self> {
        match configuration {
            RING_READER => Some(Self::Ring),
            FEED_READER => Some(Self::Feed),
            _ => None,
        }
    }

    /// The context of a request to it.
    pub(crate) fn context(self) -> Box<dyn HttpContext> {
        match self {
            Self::Ring => Box::new(RingReader),
            Self::Feed => Box::new(FeedReader),
        }
    }
}

const CRASH_HEADER: &str = "x-test-crash-vm";

/// Most entries of one answer.
const ENTRIES_MAX: u64 = 2_048;

/// Crashes the VM if the request's headers say so.
pub(crate) fn crash_if_asked() {
    if host::header_pairs(Headers::Request).iter().any(|(name, _)| name == CRASH_HEADER) {
        log::warn!("warmpath: crashing on request");
        #[cfg(target_arch = "wasm32")]
        core::arch::wasm32::unreachable();
    }
}

/// Answers `GET /N` with the entries from number N on: the newest, the number of
/// the first entry (u64 each), then each entry as its length (u32) and bytes. A
/// first entry beyond N says that those before it are gone.
struct RingReader;

impl Context for RingReader {}

impl HttpContext for RingReader {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        let headers = host::header_pairs(Headers::Request);
        let path = headers.iter().find(|(name, _)| name == ":path").map(|(_, path)| path.as_str());
        let from = path.and_then(|path| path.strip_prefix('/')?.parse().ok());
        let answer = from.and_then(entries);
        let (status, body) = answer.map_or((404, Vec::new()), |body| (200, body));
        if host::respond(status, "test_ring_reader", &[], &body).is_err() {
            return Action::Continue;
        }
        Action::Pause
    }
}

fn entries(from: u64) -> Option<Vec<u8>> {
    let (ring, store) = (Ring::default(), HostStore);
    let newest = ring.newest(&store, 0).ok()?;
    let oldest = (newest + 1).saturating_sub(ring.slots());
    let mut first = from.max(oldest).max(1);
    let mut found = Vec::new();
    let mut next = first;
    while next <= newest && next < first + ENTRIES_MAX {
        match ring.read(&store, next).ok()? {
            Read::Entry(entry) => found.push(entry),
            // Used again meanwhile: what was found before has a gap behind it.
            Read::Overrun => {
                found.clear();
                first = next + 1;
            }
            Read::NotYet(_) => break,
        }
        next += 1;
    }
    let mut writer = Writer::new();
    writer.u64(newest);
    writer.u64(first);
    for entry in &found {
        writer.u32(u32::try_from(entry.len()).ok()?);
        writer.raw(entry);
    }
    Some(writer.into_bytes())
}

/// The worker whose blocks are markers: the times at which each became visible
/// are kept.
const MARKER_WORKER: WorkerId = WorkerId(1);

/// Times of markers that are kept at most.
const MARKERS_MAX: usize = 131_072;

/// Callbacks that follow each other within so many nanoseconds are taken for one
/// pause of the event loop: it had no time to serve anybody in between.
const SAME_PAUSE_NS: u64 = 30_000;

/// Which of the host's callbacks is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Callback {
    /// A tick of the root context.
    Tick,
    /// A message of one of the feed's streams.
    Message,
    /// A request's body: brings the index up to date, but is no pause that the
    /// feed causes.
    Request,
}

/// How long callbacks took.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    count: u64,
    total_ns: u64,
    max_ns: u64,
}

impl Times {
    fn add(&mut self, took_ns: u64) {
        self.count += 1;
        self.total_ns += took_ns;
        self.max_ns = self.max_ns.max(took_ns);
    }

    fn write(&self, writer: &mut Writer) {
        for value in [self.count, self.total_ns, self.max_ns] {
            writer.u64(value);
        }
    }
}

/// What the feed did in this VM.
#[derive(Debug, Default)]
struct Seen {
    ticks: Times,
    messages: Times,
    requests: Times,
    /// Of pauses: callbacks of the feed right behind each other.
    pauses: Times,
    pause_began_ns: u64,
    pause_ended_ns: u64,
    snapshot_began_ns: u64,
    live_at_ns: u64,
    markers: Vec<u64>,
}

thread_local! {
    static SEEN: RefCell<Seen> = RefCell::default();
}

/// Watches a callback until it is dropped.
pub(crate) struct Watch {
    callback: Callback,
    started_ns: u64,
}

impl Watch {
    pub(crate) fn start(callback: Callback) -> Self {
        Self { callback, started_ns: host::monotonic_ns() }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let now_ns = host::monotonic_ns();
        SEEN.with(|seen| {
            if let Ok(mut seen) = seen.try_borrow_mut() {
                seen.note(self.callback, self.started_ns, now_ns);
            }
        });
    }
}

impl Seen {
    fn note(&mut self, callback: Callback, started_ns: u64, now_ns: u64) {
        let took_ns = now_ns.saturating_sub(started_ns);
        match callback {
            Callback::Tick => self.ticks.add(took_ns),
            Callback::Message => self.messages.add(took_ns),
            Callback::Request => self.requests.add(took_ns),
        }
        if callback != Callback::Request {
            if started_ns.saturating_sub(self.pause_ended_ns) > SAME_PAUSE_NS {
                self.end_pause();
                self.pause_began_ns = started_ns;
            }
            self.pause_ended_ns = now_ns;
        }
        vm::with(|vm| {
            let replica = &vm.replica;
            if self.snapshot_began_ns == 0 && replica.snapshot_progress().is_some() {
                self.snapshot_began_ns = started_ns;
            }
            if self.live_at_ns == 0 && replica.is_live() {
                self.live_at_ns = now_ns;
            }
            let workers = &replica.roster().workers;
            let marker = workers.iter().find(|it| it.worker.id == MARKER_WORKER);
            let visible = marker.map_or(0, |it| replica.index().blocks_of(it.slot));
            while (self.markers.len() as u64) < visible && self.markers.len() < MARKERS_MAX {
                self.markers.push(now_ns);
            }
        });
    }

    fn end_pause(&mut self) {
        if self.pause_ended_ns > 0 {
            self.pauses.add(self.pause_ended_ns.saturating_sub(self.pause_began_ns));
        }
    }

    fn write(&mut self) -> Vec<u8> {
        self.end_pause();
        (self.pause_began_ns, self.pause_ended_ns) = (0, 0);
        let mut writer = Writer::new();
        for times in [self.ticks, self.messages, self.requests, self.pauses] {
            times.write(&mut writer);
        }
        writer.u64(self.snapshot_began_ns);
        writer.u64(self.live_at_ns);
        vm::with(|vm| {
            let replica = &vm.replica;
            writer.u64(u64::from(replica.is_live()));
            writer.u64(replica.index().blocks() as u64);
            writer.u64(replica.index().bytes() as u64);
            writer.u64(replica.index().counters().operations);
            let workers = &replica.roster().workers;
            writer.u64(workers.len() as u64);
            for worker in workers {
                writer.u64(worker.worker.id.0);
                writer.u64(replica.index().blocks_of(worker.slot));
            }
        });
        writer.u64(self.markers.len() as u64);
        for at_ns in &self.markers {
            writer.u64(*at_ns);
        }
        writer.into_bytes()
    }
}

/// Takes the lease from whoever holds it: at the time at which it will run out.
fn take_lease() {
    let until_ms = host::monotonic_ns() / 1_000_000 + LEASE_TERM_MS;
    let taken = vm::with(|vm| lease::hold(&HostStore, vm.number, until_ms, 0));
    if taken != Some(Ok(true)) {
        log::warn!("warmpath: the lease could not be taken");
    }
}

/// Answers `GET /` with what the feed did in this VM; `GET /reset` the same,
/// whereupon the times of callbacks begin anew; and `GET /lead` the same, whereupon
/// this VM follows the sidecar for all, whoever has done so. All numbers are u64: count, sum
/// and longest (nanoseconds) of ticks, messages, requests and pauses; when the
/// first snapshot began and the index was first live; whether it is live, its
/// blocks, bytes and operations; the number of workers and of each its id and
/// blocks; the number of markers and when each became visible.
struct FeedReader;

impl Context for FeedReader {}

impl HttpContext for FeedReader {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        let headers = host::header_pairs(Headers::Request);
        let asks =
            |path: &str| headers.iter().any(|(name, value)| name == ":path" && value == path);
        let resets = asks("/reset");
        if asks("/lead") {
            take_lease();
        }
        let body = SEEN.with(|seen| {
            let Ok(mut seen) = seen.try_borrow_mut() else { return Vec::new() };
            let body = seen.write();
            if resets {
                let none = Times::default();
                (seen.ticks, seen.messages, seen.requests, seen.pauses) = (none, none, none, none);
            }
            body
        });
        if host::respond(200, "test_feed_reader", &[], &body).is_err() {
            return Action::Continue;
        }
        Action::Pause
    }
}
