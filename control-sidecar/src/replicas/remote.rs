//! Remote: what other routers have booked, on its way to the filters.
//!
//! Beside the log, which is for what the index and the roster are made of: these
//! changes are many, and nobody needs the old ones. A follower gets the list
//! first, and then every change; one that is slow gets the list again.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::{broadcast, mpsc};
use warmpath_core::bookings::{Bookings, Flags, fits_frame};
use warmpath_core::entry::Entry;
use warmpath_core::load::{Booking, BookingId};

use crate::limits::{REMOTE_FRAMES_QUEUED, UPLINKS_QUEUED};

/// What a gateway's follower has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromGateway {
    /// It is there.
    Attached(u64),
    /// The body of a frame of bookings.
    Said(u64, Bytes),
    /// It has gone.
    Detached(u64),
}

/// What other routers have booked, and the way back up.
#[derive(Debug)]
pub struct RemoteFeed {
    started: Instant,
    inner: Mutex<Inner>,
    changes: broadcast::Sender<Bytes>,
    up: mpsc::Sender<FromGateway>,
    /// Until somebody listens.
    up_queue: Mutex<Option<mpsc::Receiver<FromGateway>>>,
}

#[derive(Debug, Default)]
struct Inner {
    live: BTreeMap<u64, (Booking, bool)>,
    wanted: bool,
}

impl Default for RemoteFeed {
    fn default() -> Self {
        let (up, up_queue) = mpsc::channel(UPLINKS_QUEUED);
        Self {
            started: Instant::now(),
            inner: Mutex::default(),
            changes: broadcast::Sender::new(REMOTE_FRAMES_QUEUED),
            up,
            up_queue: Mutex::new(Some(up_queue)),
        }
    }
}

impl RemoteFeed {
    /// The time that everything here is in, in milliseconds.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether gateways are to say what they have booked. To be said before they
    /// attach.
    pub fn want(&self, wanted: bool) {
        self.lock().wanted = wanted;
    }

    /// Where what gateways say comes out; once.
    pub fn listen(&self) -> Option<mpsc::Receiver<FromGateway>> {
        self.up_queue.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Hands on what a gateway says. Returns whether there was room: nothing that
    /// serves a gateway may wait here.
    #[must_use]
    pub fn say(&self, said: FromGateway) -> bool {
        self.up.try_send(said).is_ok()
    }

    /// Applies entries and tells every follower.
    pub fn apply(&self, entries: &[Entry<'_>]) {
        if entries.is_empty() {
            return;
        }
        let mut inner = self.lock();
        for entry in entries {
            match entry {
                Entry::Booked(booking) => {
                    inner.live.insert(booking.id.0, (booking.clone(), false));
                }
                Entry::PrefillDone(id) => {
                    if let Some((_, done)) = inner.live.get_mut(&id.0) {
                        *done = true;
                    }
                }
                Entry::Refreshed(id, at_ms) => {
                    if let Some((booking, _)) = inner.live.get_mut(&id.0) {
                        booking.at_ms = *at_ms;
                    }
                }
                Entry::Freed(id) => {
                    inner.live.remove(&id.0);
                }
                _ => {}
            }
        }
        let flags = Flags { begins: false, ends: false, wanted: inner.wanted };
        let encoded = entries.iter().map(Entry::encode);
        for frame in frames(encoded, flags, self.now_ms()) {
            // Nobody may listen.
            let _ = self.changes.send(frame);
        }
    }

    /// The list, and every change behind it.
    #[must_use]
    pub fn follow(&self) -> (Vec<Bytes>, broadcast::Receiver<Bytes>) {
        let inner = self.lock();
        (self.list(&inner), self.changes.subscribe())
    }

    fn list(&self, inner: &Inner) -> Vec<Bytes> {
        let encoded = inner.live.values().flat_map(|(booking, done)| {
            let id = booking.id;
            let done = done.then(|| Entry::PrefillDone(id).encode());
            std::iter::once(Entry::Booked(booking.clone()).encode()).chain(done)
        });
        let flags = Flags { begins: true, ends: true, wanted: inner.wanted };
        frames(encoded, flags, self.now_ms())
    }

    /// What is booked on workers, for the state page: by slot, how many.
    #[must_use]
    pub fn by_slot(&self) -> BTreeMap<u16, u64> {
        let mut counts = BTreeMap::new();
        for (booking, _) in self.lock().live.values() {
            *counts.entry(booking.slot.0).or_default() += 1;
        }
        counts
    }

    /// A booking, for tests.
    #[must_use]
    pub fn get(&self, id: BookingId) -> Option<(Booking, bool)> {
        self.lock().live.get(&id.0).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bodies of frames for all entries, at least one if a list begins.
fn frames(entries: impl Iterator<Item = Vec<u8>>, flags: Flags, now_ms: u64) -> Vec<Bytes> {
    let mut groups: Vec<Vec<Vec<u8>>> = vec![Vec::new()];
    let mut bytes = 0;
    for entry in entries {
        let held = groups.last().map_or(0, Vec::len);
        if !fits_frame(held, bytes, entry.len()) {
            groups.push(Vec::new());
            bytes = 0;
        }
        bytes += entry.len();
        if let Some(group) = groups.last_mut() {
            group.push(entry);
        }
    }
    let last = groups.len() - 1;
    let encode = |(at, group): (usize, &Vec<Vec<u8>>)| {
        let flags = Flags {
            begins: flags.begins && at == 0,
            ends: flags.ends && at == last,
            wanted: flags.wanted,
        };
        let entries = group.iter().map(Vec::as_slice).collect();
        Bytes::from(Bookings { flags, now_ms, entries }.encode())
    };
    groups.iter().enumerate().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use warmpath_core::bookings::REMOTE_BIT;
    use warmpath_core::ids::{SequenceHash, WorkerSlot};
    use warmpath_core::limits::BOOKINGS_FRAME_ENTRIES_MAX;

    fn booked(id: u64, blocks: usize) -> Entry<'static> {
        Entry::Booked(Booking {
            prefill_tokens: 1,
            blocks: (0..blocks as u64).map(|at| SequenceHash(id << 20 | at)).collect(),
            ..Booking::new(BookingId(REMOTE_BIT | id), WorkerSlot(1), 0)
        })
    }

    /// Goal: whoever follows from the beginning, and whoever comes later, knows
    /// the same in the end.
    #[tokio::test]
    async fn list_and_changes_agree() {
        let feed = RemoteFeed::default();
        feed.want(true);
        let (list, mut changes) = feed.follow();
        assert_eq!(list.len(), 1, "an empty list is a list");
        let mut replica = warmpath_core::replica::Replica::new(16);
        let mut apply = |body: &[u8]| {
            let kind = warmpath_core::frame::Kind::Remote;
            let frame = warmpath_core::frame::Frame { kind, epoch: 1, sequence: 0, body };
            replica.apply_entry(&Entry::Feed(&frame.encode()).encode());
            replica.loads().of(WorkerSlot(1))
        };
        apply(&list[0]);
        let many = BOOKINGS_FRAME_ENTRIES_MAX as u64 + 10;
        let entries: Vec<Entry<'_>> = (0..many).map(|id| booked(id, 1)).collect();
        feed.apply(&entries);
        feed.apply(&[Entry::PrefillDone(BookingId(REMOTE_BIT | 3))]);
        feed.apply(&[Entry::Freed(BookingId(REMOTE_BIT | 4)), booked(many, 9_000)]);
        let mut seen = Default::default();
        while let Ok(body) = changes.try_recv() {
            seen = apply(&body);
        }
        assert_eq!((seen.requests, seen.prefill_tokens), (many, many - 1));
        let (list, _) = feed.follow();
        assert!(list.len() > 1);
        for body in &list {
            assert_eq!(apply(body), seen);
        }
        assert_eq!(feed.by_slot(), [(1, many)].into());
    }
}
