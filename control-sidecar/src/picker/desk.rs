//! Desk: what the picker knows of the workers, and where it books.
//!
//! The same replica that each VM of a gateway has, here once for all threads:
//! whoever holds the lock chooses and books in one step, so no two requests are
//! placed on the same stale load.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};
use warmpath_core::bookings::{Outbox, told};
use warmpath_core::card::Cards;
use warmpath_core::choose::Random;
use warmpath_core::entry::Entry;
use warmpath_core::load::{Answer, BookingId};
use warmpath_core::replica::Replica;
use warmpath_core::roster::Roster;
use warmpath_core::route::{Choice, Prepared, Unplaced, select};
use warmpath_core::settings::Settings;

use crate::limits::PICKER_REFRESHES;
use crate::metrics::Metrics;
use crate::publish::service::Shared;

/// What threads need to read prompts.
#[derive(Clone, Debug, Default)]
pub(super) struct View {
    /// Grows with each change of the cards.
    pub(super) cards_number: u64,
    pub(super) cards: Arc<Cards>,
    pub(super) roster: Arc<Roster>,
}

/// One for all requests.
#[derive(Debug)]
pub(super) struct Desk {
    inner: Mutex<Inner>,
    shared: Arc<Shared>,
    /// Whether a roster has come.
    knows_workers: watch::Sender<bool>,
    /// There is something to tell other routers.
    pub(super) has_booked: Notify,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) replica: Replica,
    random: Random,
    bookings: u32,
    /// Bookings of requests that are here, and when each was last refreshed.
    own: HashMap<BookingId, u64>,
    /// What other routers are told, if they want to be.
    outbox: Option<Outbox>,
    view: View,
}

impl Inner {
    /// A name for a booking. There is one desk, so a number is enough.
    fn next_booking(&mut self) -> BookingId {
        self.bookings = self.bookings.wrapping_add(1);
        BookingId(1 << 32 | u64::from(self.bookings))
    }

    fn apply(&mut self, entry: &[u8], now_ms: u64) {
        self.replica.set_now(now_ms);
        let changed = self.replica.apply_entry(entry);
        if changed.cards {
            self.view.cards_number += 1;
            self.view.cards = Arc::new(self.replica.cards().clone());
        }
        if changed.roster {
            self.view.roster = Arc::new(self.replica.roster().clone());
        }
    }
}

impl Desk {
    /// Knows nothing yet.
    ///
    /// - `seed`: of the choice between equals.
    pub(super) fn new(shared: Arc<Shared>, index_blocks_max: usize, seed: u64) -> Self {
        let inner = Inner {
            replica: Replica::new(index_blocks_max),
            random: Random::seeded(seed),
            bookings: 0,
            own: HashMap::new(),
            outbox: None,
            view: View::default(),
        };
        Self {
            inner: Mutex::new(inner),
            shared,
            knows_workers: watch::Sender::new(false),
            has_booked: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    fn now_ms(&self) -> u64 {
        self.shared.exchange.remote.now_ms()
    }

    /// Tells whether a roster has come.
    pub(super) fn knows_workers(&self) -> watch::Receiver<bool> {
        self.knows_workers.subscribe()
    }

    /// What threads need to read prompts.
    pub(super) fn view(&self) -> View {
        self.lock().view.clone()
    }

    /// What the settings say of the gateway as a whole.
    pub(super) fn settings(&self) -> Settings {
        *self.lock().replica.settings_of(None)
    }

    /// Does something with the replica.
    pub(super) fn with<T>(&self, f: impl FnOnce(&mut Replica) -> T) -> T {
        f(&mut self.lock().replica)
    }

    /// Applies a frame, of the log or beside it.
    pub(super) fn feed(&self, frame: &[u8]) {
        let now_ms = self.now_ms();
        let mut inner = self.lock();
        inner.apply(&Entry::Feed(frame).encode(), now_ms);
        let knows = inner.replica.has_roster();
        drop(inner);
        self.knows_workers.send_if_modified(|before| core::mem::replace(before, knows) != knows);
    }

    /// Whether other routers want to be told what is booked.
    pub(super) fn tell_others(&self, wanted: bool) {
        let mut inner = self.lock();
        if wanted {
            inner.outbox.get_or_insert_default();
        } else {
            inner.outbox = None;
        }
        drop(inner);
        self.has_booked.notify_one();
    }

    /// What other routers are to be told now: bodies of frames.
    pub(super) fn to_tell(&self) -> Vec<Vec<u8>> {
        let now_ms = self.now_ms();
        let mut inner = self.lock();
        let Inner { outbox, replica, .. } = &mut *inner;
        outbox.as_mut().map(|outbox| outbox.frames(replica.loads(), now_ms)).unwrap_or_default()
    }

    /// What was to be told has got lost: all of it is told again.
    pub(super) fn tell_again(&self) {
        let mut inner = self.lock();
        if let Some(outbox) = &mut inner.outbox {
            *outbox = Outbox::default();
        }
    }

    fn apply_own(&self, inner: &mut Inner, entry: &[u8], now_ms: u64) {
        inner.apply(entry, now_ms);
        if let Some(outbox) = &mut inner.outbox
            && let Some(entry) = told(entry)
        {
            self.metrics().picker.uplink_dropped.inc_by(outbox.note(&entry));
            self.has_booked.notify_one();
        }
    }

    /// Chooses the request's workers and books them.
    ///
    /// # Errors
    ///
    /// [`Unplaced`].
    pub(super) fn place(self: &Arc<Self>, prepared: &Prepared) -> Result<Ticket, Unplaced> {
        let now_ms = self.now_ms();
        let mut inner = self.lock();
        let Inner { replica, random, .. } = &mut *inner;
        let settings = *replica.settings_of(prepared.model);
        let choice = select(replica, prepared, &settings, now_ms, random)?;
        let (serving, prefill) = (inner.next_booking(), inner.next_booking());
        let entry = choice.entry(prepared, &settings, [serving, prefill], now_ms);
        self.apply_own(&mut inner, &entry, now_ms);
        let prefill = choice.prefill.is_some().then_some(prefill);
        for booking in prefill.into_iter().chain([serving]) {
            inner.own.insert(booking, now_ms);
            self.metrics().picker.bookings_made.inc();
        }
        drop(inner);
        self.metrics().picker.adapter_unheld.inc_by(choice.adapter_unheld.into());
        let tracks = settings.router_track_active_blocks && settings.router_track_output_blocks;
        let answer = tracks.then(|| Answer::new(prepared.prompt_tokens, prepared.block_size));
        Ok(Ticket { desk: Arc::clone(self), serving, prefill, choice, answer, has_begun: false })
    }

    /// Frees a booking. Does nothing the second time.
    fn free(&self, id: BookingId) {
        let now_ms = self.now_ms();
        let mut inner = self.lock();
        if inner.own.remove(&id).is_some() {
            self.metrics().picker.bookings_freed.inc();
            self.apply_own(&mut inner, &Entry::Freed(id).encode(), now_ms);
        }
    }

    fn note(&self, entry: &Entry<'_>) {
        let now_ms = self.now_ms();
        self.apply_own(&mut self.lock(), &entry.encode(), now_ms);
    }

    /// What is done now and then. Returns whether some of it is left.
    ///
    /// - `expires`: whether to look for what has lasted its time.
    pub(super) fn tick(&self, expires: bool) -> bool {
        let now_ms = self.now_ms();
        let mut inner = self.lock();
        let is_busy = inner.replica.step();
        self.metrics().picker.index_live.set(inner.replica.is_live().into());
        if expires {
            let settings = *inner.replica.settings_of(None);
            let due_ms = settings.active_request_expiry_ms / 2;
            let is_due = |(id, at_ms): (&BookingId, &u64)| {
                (now_ms.saturating_sub(*at_ms) >= due_ms).then_some(*id)
            };
            let due: Vec<BookingId> =
                inner.own.iter().filter_map(is_due).take(PICKER_REFRESHES).collect();
            for id in due {
                inner.own.insert(id, now_ms);
                self.apply_own(&mut inner, &Entry::Refreshed(id, now_ms).encode(), now_ms);
            }
            let expired = inner.replica.expire(now_ms, &settings);
            self.metrics().picker.bookings_expired.inc_by(expired as u64);
        }
        is_busy
    }
}

/// A request that has its workers. Whatever ends it frees its bookings.
#[derive(Debug)]
pub(super) struct Ticket {
    desk: Arc<Desk>,
    serving: BookingId,
    /// To be freed when the response begins, if there is a prefill leg.
    prefill: Option<BookingId>,
    /// Its workers.
    pub(super) choice: Choice,
    /// What the answer fills, if that is booked.
    answer: Option<Answer>,
    has_begun: bool,
}

impl Ticket {
    /// The response has begun: the prompt is computed. Does nothing the second
    /// time.
    pub(super) fn began(&mut self) {
        if core::mem::replace(&mut self.has_begun, true) {
            return;
        }
        match self.prefill {
            Some(prefill) => self.desk.free(prefill),
            None => self.desk.note(&Entry::PrefillDone(self.serving)),
        }
    }

    /// More tokens of the answer have come.
    pub(super) fn answered(&mut self, tokens: u64) {
        let grown = self.answer.as_mut().and_then(|answer| answer.grow(tokens));
        if let Some((blocks, tokens)) = grown {
            self.desk.note(&Entry::OutputBlocks { id: self.serving, blocks, tokens });
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        for booking in self.prefill.into_iter().chain([self.serving]) {
            self.desk.free(booking);
        }
    }
}

#[cfg(test)]
mod tests;
