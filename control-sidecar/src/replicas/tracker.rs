//! Tracker: which requests run where, booked by our gateways and by others.
//!
//! Pure: what is heard goes in with a time, what is to be said comes out.
//!
//! # Terms
//!
//! - *own*: booked by a gateway that attaches to this sidecar. Named by the
//!   gateway and its booking, which make the request's name for others.
//! - *remote*: booked by another router. Named by the request; the filters know
//!   it by a number that is given here once and never again.
//!
//! # Invariants
//!
//! 1. Every booking ends: freed, expired, or gone with its worker, its gateway or
//!    its router.
//! 2. A list, which comes over another connection than the events, does not bring
//!    back what an event has ended: ends are remembered for a while.
//! 3. What names nothing known, or another worker than the booking's, changes
//!    nothing and is counted.

mod directory;
mod name;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use warmpath_core::bookings::{Bookings, REMOTE_BIT};
use warmpath_core::entry::Entry;
use warmpath_core::ids::{SequenceHash, Worker, WorkerSlot};
use warmpath_core::limits::{BOOKING_BLOCKS_MAX, BOOKINGS_MAX, REMOTE_BOOKINGS_MAX};
use warmpath_core::load::{Booking, BookingId};

use crate::adapter::plane::sequences::{Added, SequenceEvent, Step};
use crate::discovery::record::EndpointPath;
use crate::limits::{ENDED_REMEMBERED, GATEWAYS_MAX, LIST_RACE_MS, REMOTE_BLOCKS_MAX};

pub use directory::{Directory, Rank};
use name::{named, request_name};

/// What is to be said, in this order.
#[derive(Debug, Default)]
pub struct Out {
    /// To other routers, and about which endpoint's workers.
    pub events: Vec<(Arc<EndpointPath>, SequenceEvent)>,
    /// To the filters.
    pub entries: Vec<Entry<'static>>,
    /// What was passed over, by reason.
    pub dropped: Vec<&'static str>,
}

#[derive(Debug)]
struct Own {
    rank: Rank,
    slot: WorkerSlot,
    added: Added,
    done: bool,
    /// The list in which it was last named.
    list: u64,
    at_ms: u64,
}

#[derive(Debug, Default)]
struct Gateway {
    own: HashMap<u64, Own>,
    /// Lists begun so far.
    list: u64,
    /// Streams of it that are attached.
    attached: usize,
    /// Since when there is none.
    alone_since_ms: Option<u64>,
}

/// Who a remote booking is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// The router.
    pub router: u64,
    /// The publisher that brought it; it goes with its record.
    pub publisher: u64,
}

#[derive(Debug)]
struct Remote {
    id: BookingId,
    worker: Worker,
    slot: WorkerSlot,
    source: Source,
    at_ms: u64,
    blocks: usize,
    /// The router's list in which it was last named.
    list: u64,
}

/// How many there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Levels {
    /// Bookings of our gateways.
    pub own: usize,
    /// Bookings of other routers.
    pub remote: usize,
}

/// Which requests run where.
#[derive(Debug)]
pub struct Tracker {
    router: u64,
    /// What a request's random blocks are drawn from.
    random: u64,
    directory: Directory,
    gateways: HashMap<u64, Gateway>,
    own: usize,
    remote: HashMap<String, Remote>,
    remote_blocks: usize,
    /// Lists of other routers: how many each has begun, and when the last began.
    lists: HashMap<u64, (u64, u64)>,
    ended: VecDeque<String>,
    ended_set: HashSet<String>,
    next: u64,
}

impl Tracker {
    /// Knows nothing yet.
    ///
    /// - `router`: our own name among routers.
    /// - `epoch`: this life of the sidecar; it is in the numbers that filters
    ///   get, so that those of an earlier life are not met again.
    #[must_use]
    pub fn new(router: u64, epoch: u64) -> Self {
        Self {
            router,
            random: epoch,
            directory: Directory::default(),
            gateways: HashMap::new(),
            own: 0,
            remote: HashMap::new(),
            remote_blocks: 0,
            lists: HashMap::new(),
            ended: VecDeque::new(),
            ended_set: HashSet::new(),
            next: (epoch & 0x7fff_ffff) << 32,
        }
    }

    /// How many there are.
    #[must_use]
    pub fn levels(&self) -> Levels {
        Levels { own: self.own, remote: self.remote.len() }
    }

    /// Bookings of our gateways, by slot.
    #[must_use]
    pub fn own_by_slot(&self) -> BTreeMap<u16, u64> {
        let mut counts = BTreeMap::new();
        for own in self.gateways.values().flat_map(|entry| entry.own.values()) {
            *counts.entry(own.slot.0).or_default() += 1;
        }
        counts
    }

    /// Takes over other workers. What was booked on those that are gone is gone.
    pub fn set_directory(&mut self, directory: Directory, out: &mut Out) {
        self.directory = directory;
        let directory = &self.directory;
        let is_there = |slot: WorkerSlot, worker: Worker| {
            directory.at(slot).is_some_and(|rank| rank.worker == worker)
        };
        for (gateway, entry) in &mut self.gateways {
            entry.own.retain(|id, own| {
                let stays = is_there(own.slot, own.rank.worker);
                if !stays {
                    self.own -= 1;
                    let event = freed(self.router, *gateway, BookingId(*id), own.rank.worker);
                    out.events.push((Arc::clone(&own.rank.path), event));
                }
                stays
            });
        }
        let gone: Vec<String> = self
            .remote
            .iter()
            .filter(|(_, remote)| !is_there(remote.slot, remote.worker))
            .map(|(request, _)| request.clone())
            .collect();
        gone.iter().for_each(|request| self.end_remote(request, out));
    }

    /// A gateway's stream has begun.
    pub fn attached(&mut self, gateway: u64) {
        if self.gateways.len() < GATEWAYS_MAX || self.gateways.contains_key(&gateway) {
            let entry = self.gateways.entry(gateway).or_default();
            entry.attached += 1;
            entry.alone_since_ms = None;
        }
    }

    /// A gateway's stream has ended.
    pub fn detached(&mut self, gateway: u64, now_ms: u64) {
        if let Some(entry) = self.gateways.get_mut(&gateway) {
            entry.attached = entry.attached.saturating_sub(1);
            if entry.attached == 0 {
                entry.alone_since_ms = Some(now_ms);
            }
        }
    }

    /// A gateway says what it has booked.
    pub fn heard(&mut self, gateway: u64, said: &Bookings<'_>, now_ms: u64, out: &mut Out) {
        let Some(entry) = self.gateways.get_mut(&gateway) else {
            return out.dropped.push("too_many_gateways");
        };
        entry.list += u64::from(said.flags.begins);
        let list = entry.list;
        for entry in said.read() {
            let age = |at_ms: u64| now_ms.saturating_sub(said.now_ms.saturating_sub(at_ms));
            match entry {
                Ok(Entry::Booked(booking)) => {
                    let at_ms = age(booking.at_ms);
                    self.book(gateway, booking, list, at_ms, out);
                }
                Ok(Entry::BookedPair { serving, prefill }) => {
                    let at_ms = age(serving.at_ms);
                    self.book(gateway, serving, list, at_ms, out);
                    self.book(gateway, prefill, list, at_ms, out);
                }
                Ok(Entry::PrefillDone(id)) => self.mark_own(gateway, id, out),
                Ok(Entry::Refreshed(id, at_ms)) => {
                    if let Some(own) = self.own_mut(gateway, id) {
                        own.at_ms = own.at_ms.max(age(at_ms));
                    }
                }
                Ok(Entry::Freed(id)) => self.free_own(gateway, id, out),
                // Of a later release: nothing that others are told.
                Ok(_) | Err(_) => out.dropped.push("bad_entry"),
            }
        }
        if said.flags.ends {
            let gone: Vec<BookingId> = self
                .gateways
                .get(&gateway)
                .into_iter()
                .flat_map(|entry| &entry.own)
                .filter(|(_, own)| own.list != list)
                .map(|(id, _)| BookingId(*id))
                .collect();
            gone.into_iter().for_each(|id| self.free_own(gateway, id, out));
        }
    }

    fn own_mut(&mut self, gateway: u64, id: BookingId) -> Option<&mut Own> {
        self.gateways.get_mut(&gateway)?.own.get_mut(&id.0)
    }

    fn book(&mut self, gateway: u64, booking: Booking, list: u64, at_ms: u64, out: &mut Out) {
        let id = booking.id;
        if let Some(own) = self.own_mut(gateway, id) {
            own.list = list;
            own.at_ms = own.at_ms.max(at_ms);
            return;
        }
        let Some(rank) = self.directory.at(booking.slot).cloned() else {
            return out.dropped.push("unknown_worker");
        };
        if self.own >= BOOKINGS_MAX {
            return out.dropped.push("too_many_bookings");
        }
        let slot = booking.slot;
        let added = self.added(booking);
        let own = Own { rank, slot, added, done: false, list, at_ms };
        out.events.push((Arc::clone(&own.rank.path), added_event(self.router, gateway, id, &own)));
        if let Some(entry) = self.gateways.get_mut(&gateway) {
            entry.own.insert(id.0, own);
            self.own += 1;
        }
    }

    /// A booking in Dynamo's words. Blocks that are the request's alone have
    /// random names there.
    fn added(&mut self, booking: Booking) -> Added {
        let tracked = !booking.blocks.is_empty() || booking.unshared_blocks > 0;
        let mut blocks = booking.blocks;
        for _ in 0..booking.unshared_blocks {
            if blocks.len() >= BOOKING_BLOCKS_MAX {
                break;
            }
            self.random = self.random.wrapping_add(1);
            let hash = xxhash_rust::xxh3::xxh3_64(&self.random.to_le_bytes());
            blocks.push(SequenceHash(hash));
        }
        let prefill_tokens = Some(u64::from(booking.prefill_tokens)).filter(|it| *it > 0);
        Added {
            blocks: tracked.then_some(blocks),
            tracks_prefill: prefill_tokens.is_some(),
            expected_output_tokens: Some(u64::from(booking.expected_output_tokens))
                .filter(|tokens| *tokens > 0),
            prefill_tokens,
        }
    }

    fn mark_own(&mut self, gateway: u64, id: BookingId, out: &mut Out) {
        let router = self.router;
        let Some(own) = self.own_mut(gateway, id) else { return };
        if core::mem::replace(&mut own.done, true) {
            return;
        }
        let step = Step::PrefillCompleted;
        let event = event(router, request_name(gateway, id), own.rank.worker, step);
        out.events.push((Arc::clone(&own.rank.path), event));
    }

    fn free_own(&mut self, gateway: u64, id: BookingId, out: &mut Out) {
        let Some(entry) = self.gateways.get_mut(&gateway) else { return };
        let Some(own) = entry.own.remove(&id.0) else { return };
        self.own -= 1;
        out.events
            .push((Arc::clone(&own.rank.path), freed(self.router, gateway, id, own.rank.worker)));
    }

    /// Another router, or a worker, says what became of a request.
    ///
    /// - `syncs`: whether other routers' bookings count; if not, only what
    ///   workers say of prompts does.
    pub fn received(
        &mut self,
        event: SequenceEvent,
        publisher: u64,
        syncs: bool,
        now_ms: u64,
        out: &mut Out,
    ) {
        if event.router == self.router {
            return;
        }
        let source = Source { router: event.router, publisher };
        match event.step {
            Step::Added(added) if syncs => {
                // Placed anew, under the same name: routers try again.
                self.ended_set.remove(&event.request);
                self.add_remote(event.request, event.worker, added, source, now_ms, out);
            }
            Step::Freed if syncs => match self.remote.get(&event.request) {
                Some(remote) if remote.worker == event.worker => {
                    self.end_remote(&event.request, out);
                    self.remember_end(&event.request);
                }
                Some(_) => out.dropped.push("other_worker"),
                None => {
                    // Its beginning may still be on its way, in a list.
                    self.remember_end(&event.request);
                    out.dropped.push("unknown_request");
                }
            },
            Step::PrefillCompleted => self.mark(&event, out),
            Step::Added(_) | Step::Freed => {}
        }
    }

    fn mark(&mut self, event: &SequenceEvent, out: &mut Out) {
        if let Some(remote) = self.remote.get(&event.request) {
            if remote.worker == event.worker {
                out.entries.push(Entry::PrefillDone(remote.id));
            } else {
                out.dropped.push("other_worker");
            }
            return;
        }
        // A request of ours, of which its worker says so before we see it.
        let own = named(&event.request)
            .and_then(|(gateway, id)| Some((id, self.own_mut(gateway, id)?.rank.worker)));
        match own {
            // All filters hear the same, and gateways name their bookings alike.
            Some(_) if self.gateways.len() > 1 => out.dropped.push("several_gateways"),
            Some((id, worker)) if worker == event.worker => {
                out.entries.push(Entry::PrefillDone(id));
            }
            Some(_) => out.dropped.push("other_worker"),
            None => out.dropped.push("unknown_request"),
        }
    }

    fn add_remote(
        &mut self,
        request: String,
        worker: Worker,
        added: Added,
        source: Source,
        now_ms: u64,
        out: &mut Out,
    ) {
        let list = self.lists.get(&source.router).map_or(0, |(list, _)| *list);
        if let Some(remote) = self.remote.get_mut(&request) {
            if remote.worker != worker {
                return out.dropped.push("other_worker");
            }
            // Said again: its router lives, perhaps a new life.
            (remote.source, remote.at_ms, remote.list) = (source, now_ms, list);
            out.entries.push(Entry::Refreshed(remote.id, now_ms));
            return;
        }
        if named(&request).is_some_and(|(gateway, id)| self.own_mut(gateway, id).is_some()) {
            return out.dropped.push("own_request");
        }
        let Some(slot) = self.directory.slot(worker) else {
            return out.dropped.push("unknown_worker");
        };
        let mut blocks = added.blocks.unwrap_or_default();
        if blocks.len() > BOOKING_BLOCKS_MAX {
            blocks.truncate(BOOKING_BLOCKS_MAX);
            out.dropped.push("long_prompt");
        }
        if self.remote.len() >= REMOTE_BOOKINGS_MAX
            || self.remote_blocks + blocks.len() > REMOTE_BLOCKS_MAX
        {
            return out.dropped.push("too_many_bookings");
        }
        self.next += 1;
        let id = BookingId(self.next | REMOTE_BIT);
        self.remote_blocks += blocks.len();
        let prefill_tokens = added.prefill_tokens.filter(|_| added.tracks_prefill).unwrap_or(0);
        let remote = Remote { id, worker, slot, source, at_ms: now_ms, blocks: blocks.len(), list };
        self.remote.insert(request, remote);
        let expected = added.expected_output_tokens.unwrap_or(0);
        out.entries.push(Entry::Booked(Booking {
            prefill_tokens: u32::try_from(prefill_tokens).unwrap_or(u32::MAX),
            blocks,
            expected_output_tokens: u32::try_from(expected).unwrap_or(u32::MAX),
            ..Booking::new(id, slot, now_ms)
        }));
    }

    fn end_remote(&mut self, request: &str, out: &mut Out) {
        if let Some(remote) = self.remote.remove(request) {
            self.remote_blocks -= remote.blocks;
            out.entries.push(Entry::Freed(remote.id));
        }
    }

    fn remember_end(&mut self, request: &str) {
        if !self.ended_set.insert(request.to_owned()) {
            return;
        }
        self.ended.push_back(request.to_owned());
        if self.ended.len() > ENDED_REMEMBERED
            && let Some(oldest) = self.ended.pop_front()
        {
            self.ended_set.remove(&oldest);
        }
    }

    /// Another sidecar says all that it has booked.
    pub fn listed(
        &mut self,
        source: Source,
        (begins, ends): (bool, bool),
        events: Vec<SequenceEvent>,
        now_ms: u64,
        out: &mut Out,
    ) {
        if source.router == self.router {
            return;
        }
        if begins {
            if self.lists.len() >= GATEWAYS_MAX && !self.lists.contains_key(&source.router) {
                return out.dropped.push("too_many_gateways");
            }
            let (list, begun) = self.lists.entry(source.router).or_default();
            (*list, *begun) = (*list + 1, now_ms);
        }
        for event in events {
            if event.router == source.router && self.ended_set.contains(&event.request) {
                // It ended while the list was on its way.
            } else if event.router == source.router {
                self.received(event, source.publisher, true, now_ms, out);
            } else {
                out.dropped.push("other_router");
            }
        }
        let Some((list, begun)) = self.lists.get(&source.router).copied().filter(|_| ends) else {
            return;
        };
        // What was booked while the list was made may be missing from it.
        let since_ms = begun.saturating_sub(LIST_RACE_MS);
        let is_gone = |remote: &Remote| {
            remote.source.router == source.router && remote.list != list && remote.at_ms < since_ms
        };
        self.end_remote_if(is_gone, out);
    }

    /// A publisher is not there any more, and neither is its router.
    pub fn gone(&mut self, publisher: u64, out: &mut Out) {
        self.end_remote_if(|remote| remote.source.publisher == publisher, out);
    }

    fn end_remote_if(&mut self, is_over: impl Fn(&Remote) -> bool, out: &mut Out) {
        let over: Vec<String> = self
            .remote
            .iter()
            .filter(|(_, remote)| is_over(remote))
            .map(|(request, _)| request.clone())
            .collect();
        over.iter().for_each(|request| self.end_remote(request, out));
    }

    /// Ends what nobody has spoken of for `expiry_ms`, and what gateways had
    /// booked that have been away for `grace_ms`.
    pub fn expire(&mut self, now_ms: u64, expiry_ms: u64, grace_ms: u64, out: &mut Out) {
        let is_old = |at_ms: u64| now_ms.saturating_sub(at_ms) >= expiry_ms;
        self.end_remote_if(|remote| is_old(remote.at_ms), out);
        let is_away = |entry: &Gateway| {
            entry.alone_since_ms.is_some_and(|since| now_ms.saturating_sub(since) >= grace_ms)
        };
        let over: Vec<(u64, BookingId)> = self
            .gateways
            .iter()
            .flat_map(|(gateway, entry)| {
                let away = is_away(entry);
                let over = entry.own.iter().filter(move |(_, own)| away || is_old(own.at_ms));
                over.map(|(id, _)| (*gateway, BookingId(*id)))
            })
            .collect();
        for (gateway, id) in over {
            self.free_own(gateway, id, out);
        }
        self.gateways.retain(|_, entry| !is_away(entry));
    }

    /// All that our gateways have booked on one endpoint's workers, as events: in
    /// no order but that a mark follows its request.
    #[must_use]
    pub fn account(&self, path: &EndpointPath) -> Vec<SequenceEvent> {
        let mut events = Vec::new();
        for (gateway, entry) in &self.gateways {
            let of_path = entry.own.iter().filter(|(_, own)| *own.rank.path == *path);
            for (id, own) in of_path {
                let id = BookingId(*id);
                events.push(added_event(self.router, *gateway, id, own));
                if own.done {
                    let (name, step) = (request_name(*gateway, id), Step::PrefillCompleted);
                    events.push(event(self.router, name, own.rank.worker, step));
                }
            }
        }
        events
    }
}

fn event(router: u64, request: String, worker: Worker, step: Step) -> SequenceEvent {
    SequenceEvent { request, worker, router, lora: None, step }
}

fn added_event(router: u64, gateway: u64, id: BookingId, own: &Own) -> SequenceEvent {
    event(router, request_name(gateway, id), own.rank.worker, Step::Added(own.added.clone()))
}

fn freed(router: u64, gateway: u64, id: BookingId, worker: Worker) -> SequenceEvent {
    event(router, request_name(gateway, id), worker, Step::Freed)
}

#[cfg(test)]
mod tests;
