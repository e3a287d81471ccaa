//! Vm: the state of one filter VM, shared by its root and HTTP contexts.
//!
//! Envoy runs one VM per worker thread and one on its main thread; each has a
//! replica of its own and follows the ring log in the process's shared data.

use std::cell::RefCell;
use std::rc::Rc;

use foldhash::fast::FixedState;
use hashbrown::HashMap;
use warmpath_core::card::BlobId;
use warmpath_core::choose::Random;
use warmpath_core::entry::Entry;
use warmpath_core::limits::{CACHE_USAGE_STALE_MS, RING_APPEND_ATTEMPTS_MAX};
use warmpath_core::load::BookingId;
use warmpath_core::models::Models;
use warmpath_core::prefix::{PrefixCache, PrefixCounters};
use warmpath_core::replica::{Changed, Counters, Position, Refused, Replica};
use warmpath_core::ring::{Append, AppendError, Free, Read, Ring};
use warmpath_core::settings::{RouterSettings, Settings};
use warmpath_core::shared::{KEY_PREFIX, SharedData, Unavailable, Write};

use crate::config::Config;
use crate::feed::Feed;
use crate::host::{self, HostStore};
use crate::limits::{
    DELAYED_ENTRIES_MAX, EXPIRE_EVERY_MS, GAUGES_EVERY_MS, NUMBER_ATTEMPTS_MAX, REFRESHES_PER_TICK,
    TICK_RING_NS,
};
use crate::metrics::{Counter, Gauge, Metrics};
use crate::pace::Pace;
use crate::pairing::Pairing;
use crate::reading::Readings;
use crate::wake::Wake;

thread_local! {
    /// A VM has one thread; contexts of one module share it.
    static VM: Rc<RefCell<Option<Vm>>> = Rc::new(RefCell::new(None));
}

/// Runs `f` on the VM's state; `None` if it is not configured yet, or in use
/// already (which cannot happen while the host defers nested callbacks, and is
/// no reason to panic if it does).
pub(crate) fn with<T>(f: impl FnOnce(&mut Vm) -> T) -> Option<T> {
    VM.with(|vm| match vm.try_borrow_mut() {
        Ok(mut vm) => vm.as_mut().map(f),
        Err(_) => None,
    })
}

/// Creates the state, or gives it another configuration.
///
/// # Errors
///
/// [`Unavailable`]: the shared data cannot be used.
pub(crate) fn configure(config: &Config, root: u32) -> Result<(), Unavailable> {
    VM.with(|vm| {
        let mut vm = vm.try_borrow_mut().map_err(|_| Unavailable)?;
        match vm.as_mut() {
            Some(vm) => vm.reconfigure(config, root),
            None => *vm = Some(Vm::new(config, root)?),
        }
        Ok(())
    })
}

/// What a VM knows.
pub(crate) struct Vm {
    /// Unique within the process.
    pub(crate) number: u64,
    /// Names the gateway process, the same in all its VMs.
    pub(crate) gateway: u64,
    /// The root context that drives the feed: the one configured last.
    pub(crate) root: u32,
    pub(crate) config: Config,
    pub(crate) store: HostStore,
    pub(crate) ring: Ring,
    /// The place behind the last entry, if it was free when it was last looked at.
    free: Option<Free>,
    /// The last entry of the ring log that was applied.
    pub(crate) position: u64,
    /// Whether everything in the ring log has been applied once.
    pub(crate) caught_up: bool,
    pub(crate) replica: Replica,
    pub(crate) models: Models,
    /// The feed's settings with the plugin's laid over them.
    settings: RouterSettings,
    pub(crate) metrics: Metrics,
    pub(crate) random: Random,
    pub(crate) feed: Feed,
    /// When the sidecar was last heard of, in milliseconds.
    pub(crate) heard_at_ms: Option<u64>,
    pub(crate) pairing: Pairing,
    pub(crate) pace: Pace,
    /// Long prompts that wait to be read.
    pub(crate) readings: Readings,
    pub(crate) wake: Wake,
    bookings: u32,
    /// Bookings of this VM's own streams, and when each was last refreshed.
    own: HashMap<BookingId, u64, FixedState>,
    delayed: Vec<Vec<u8>>,
    reported: Counters,
    refused_reported: Refused,
    evicted_reported: u64,
    prefixes_reported: PrefixCounters,
    live_at_reported: Option<Position>,
    expire_at_ms: u64,
    gauges_at_ms: u64,
}

impl Vm {
    fn new(config: &Config, root: u32) -> Result<Self, Unavailable> {
        let (store, ring) = (HostStore, Ring::default());
        ring.prepare(&store)?;
        let number = next_number(&store)?;
        let gateway = gateway_name(&store, number)?;
        let newest = ring.newest(&store, 0)?;
        let mut vm = Self {
            number,
            gateway,
            root,
            config: config.clone(),
            store,
            ring,
            free: None,
            // From the oldest entry on: bookings that still run are among them.
            position: newest.saturating_sub(ring.slots() / 2),
            caught_up: false,
            replica: Replica::new(config.index_blocks_max),
            models: Models::default(),
            settings: RouterSettings::default(),
            metrics: Metrics::define(),
            random: Random::seeded(host::wall_clock_ns() ^ number.rotate_left(32)),
            feed: Feed::default(),
            heard_at_ms: None,
            pairing: Pairing::default(),
            pace: Pace::default(),
            readings: Readings::default(),
            wake: Wake::default(),
            bookings: 0,
            own: HashMap::default(),
            delayed: Vec::new(),
            reported: Counters::default(),
            refused_reported: Refused::default(),
            evicted_reported: 0,
            prefixes_reported: PrefixCounters::default(),
            live_at_reported: None,
            expire_at_ms: 0,
            gauges_at_ms: 0,
        };
        let seed = vm.random.next_u64();
        *vm.models.prefixes_mut() = PrefixCache::new(config.prefix_cache_bytes_max, seed);
        vm.wake.register(number);
        vm.take_settings();
        vm.take_kept_state();
        Ok(vm)
    }

    fn reconfigure(&mut self, config: &Config, root: u32) {
        if config.index_blocks_max != self.config.index_blocks_max {
            log::warn!("warmpath: `index_blocks_max` takes effect when the VM is created anew");
        }
        self.models.prefixes_mut().set_bytes_max(config.prefix_cache_bytes_max);
        self.config = config.clone();
        self.root = root;
        self.wake.register(self.number);
        self.pace = Pace::default();
        self.take_settings();
        // Streams belong to the root context that opened them, which ends.
        self.feed = Feed::default();
        self.replica.abandon_snapshot();
    }

    /// Takes the cards, settings and roster that a leader left in shared data.
    fn take_kept_state(&mut self) {
        for key in [cards_key(), settings_key(), roster_key()] {
            if let Ok(Some(kept)) = self.store.get(&key) {
                let changed = self.replica.apply_state_bytes(&kept.value);
                self.note(changed, None);
            }
        }
    }

    /// Follows up on what an entry changed.
    pub(crate) fn note(&mut self, changed: Changed, now_ms: Option<u64>) {
        if changed.cards {
            self.models.take_cards(self.replica.cards());
            self.feed.keep_loading(&self.models.named_blobs());
        }
        if changed.settings {
            self.take_settings();
        }
        if changed.feed && now_ms.is_some() {
            self.heard_at_ms = now_ms;
        }
    }

    /// Lays the plugin's settings over the feed's, when either has changed.
    fn take_settings(&mut self) {
        let (settings, wrong) = self.config.overrides.over(self.replica.settings());
        for wrong in wrong {
            // Once a change, not once a request.
            log::error!(
                "warmpath: the plugin's `router` does not fit the feed's settings: {wrong}"
            );
        }
        self.settings = settings;
    }

    /// The settings in force for a model; `None` for one that no card names, and
    /// for what concerns the gateway as a whole.
    pub(crate) fn settings(&self, model: Option<u16>) -> Settings {
        *self.settings.of(model)
    }

    /// Applies entries of the ring log, until there are no more or one may not
    /// be applied now. Returns whether it caught up. Bounded by the ring's slots
    /// in any case: what comes meanwhile is left.
    pub(crate) fn catch_up(&mut self, mut may_apply: impl FnMut(&[u8]) -> bool) -> bool {
        let now_ms = host::monotonic_ns() / 1_000_000;
        self.free = None;
        let mut applied = 0;
        while applied < self.ring.slots() {
            match self.ring.read(&self.store, self.position + 1) {
                Ok(Read::NotYet(free)) => {
                    self.free = Some(free);
                    break;
                }
                Ok(Read::Entry(entry)) if !may_apply(&entry) => break,
                Ok(Read::Entry(entry)) => {
                    self.position += 1;
                    self.apply(&entry, Some(now_ms));
                }
                Ok(Read::Overrun) => {
                    let Ok(newest) = self.ring.newest(&self.store, self.position) else {
                        self.metrics.add(Counter::HostRefused, 1);
                        break;
                    };
                    self.replica.overrun();
                    self.position = newest.saturating_sub(self.ring.slots() / 2);
                }
                Err(Unavailable) => {
                    self.metrics.add(Counter::HostRefused, 1);
                    break;
                }
            }
            applied += 1;
        }
        self.metrics.add(Counter::RingEntries, applied);
        let is_at_end = self.free.is_some();
        self.caught_up |= is_at_end;
        is_at_end
    }

    /// Whether a roster has ever come. Before that nothing is known of workers,
    /// which is not the same as knowing that there are none.
    pub(crate) fn knows_workers(&self) -> bool {
        self.replica.has_roster()
    }

    /// A name for a booking, unique within the process.
    pub(crate) fn next_booking(&mut self) -> BookingId {
        self.bookings = self.bookings.wrapping_add(1);
        BookingId(self.number << 32 | u64::from(self.bookings))
    }

    /// A booking of one of this VM's own streams runs.
    pub(crate) fn own_booking(&mut self, id: BookingId, now_ms: u64) {
        self.own.insert(id, now_ms);
    }

    /// Its prefill is done.
    pub(crate) fn prefill_done(&mut self, id: BookingId) {
        self.append(&Entry::PrefillDone(id).encode());
    }

    /// Its stream has ended. Does nothing the second time.
    pub(crate) fn free(&mut self, id: BookingId) {
        if self.own.remove(&id).is_some() {
            self.metrics.add(Counter::BookingsFreed, 1);
            self.append(&Entry::Freed(id).encode());
        }
    }

    /// Appends to the ring log; keeps the entry for the next tick if others
    /// are too busy there.
    pub(crate) fn append(&mut self, entry: &[u8]) {
        if self.delayed.is_empty() && self.try_append(entry) {
            return;
        }
        if self.delayed.len() < DELAYED_ENTRIES_MAX {
            self.delayed.push(entry.to_vec());
        }
        self.pace.speed_up();
        self.metrics.add(Counter::RingAppendsDelayed, 1);
    }

    /// Appends right behind what has been applied, if that was the end of the ring
    /// log when it was last looked at, and still is.
    ///
    /// # Errors
    ///
    /// [`Unavailable`].
    pub(crate) fn append_here(&mut self, entry: &[u8]) -> Result<Append, Unavailable> {
        match self.free.take() {
            Some(free) => self.ring.append_in(&self.store, free, entry),
            None => Ok(Append::Moved),
        }
    }

    /// Appends now. If nothing else came in between, the entry is applied at
    /// once and need not be read back.
    pub(crate) fn try_append(&mut self, entry: &[u8]) -> bool {
        let Ok(sequence) = self.append_anywhere(entry) else { return false };
        if sequence == self.position + 1 {
            self.position = sequence;
            self.apply(entry, Some(host::monotonic_ns() / 1_000_000));
        }
        true
    }

    /// Appends behind whatever has come. Returns the entry's number.
    ///
    /// # Errors
    ///
    /// [`AppendError`].
    pub(crate) fn append_anywhere(&mut self, entry: &[u8]) -> Result<u64, AppendError> {
        if self.append_here(entry)? == Append::Done {
            return Ok(self.position + 1);
        }
        self.ring.append(&self.store, self.position, entry)
    }

    /// Applies an entry of the ring log, which every one is once.
    ///
    /// - `now_ms`: the time, if it is at hand.
    pub(crate) fn apply(&mut self, entry: &[u8], now_ms: Option<u64>) {
        if let Some(now_ms) = now_ms {
            self.replica.set_now(now_ms);
        }
        let changed = self.replica.apply_entry(entry);
        self.pace.applied(entry.len());
        self.note(changed, now_ms);
        self.pass_on(entry);
    }

    /// What a tick does besides the feed's streams. Returns whether some of it is
    /// left to be done.
    pub(crate) fn tick(&mut self, now_ms: u64) -> bool {
        let started = host::monotonic_ns();
        let caught_up =
            self.catch_up(|_| host::monotonic_ns().saturating_sub(started) <= TICK_RING_NS);
        let is_sweeping = self.replica.step();
        if self.feed_age_ms(now_ms).is_some_and(|age_ms| age_ms > CACHE_USAGE_STALE_MS) {
            self.replica.forget_cache_usages();
        }
        let live_at = self.replica.live_at();
        if live_at != self.live_at_reported {
            if let (None, Some(at)) = (self.live_at_reported, live_at) {
                log::info!(
                    "warmpath: vm {} has {} blocks as of log frame {}",
                    self.number,
                    self.replica.index().blocks(),
                    at.sequence
                );
            }
            self.live_at_reported = live_at;
            self.metrics.set(Gauge::FeedSequence, live_at.map_or(0, |at| at.sequence));
        }
        let delayed = core::mem::take(&mut self.delayed);
        let mut rest = delayed.into_iter();
        for entry in rest.by_ref().take(RING_APPEND_ATTEMPTS_MAX as usize) {
            if !self.try_append(&entry) {
                self.delayed.push(entry);
                break;
            }
        }
        self.delayed.extend(rest);
        self.refresh_own(now_ms);
        if now_ms >= self.expire_at_ms {
            self.expire_at_ms = now_ms + EXPIRE_EVERY_MS;
            let settings = self.settings(None);
            let expired = self.replica.expire(now_ms, &settings);
            self.metrics.add(Counter::BookingsExpired, expired as u64);
        }
        if now_ms >= self.gauges_at_ms {
            self.gauges_at_ms = now_ms + GAUGES_EVERY_MS;
            self.report(now_ms);
        }
        !caught_up || is_sweeping || !self.delayed.is_empty()
    }

    /// Says of long requests that they still run, before they expire.
    fn refresh_own(&mut self, now_ms: u64) {
        let due_ms = self.settings(None).active_request_expiry_ms / 2;
        let due: Vec<BookingId> = self
            .own
            .iter()
            .filter(|(_, at_ms)| now_ms.saturating_sub(**at_ms) >= due_ms)
            .map(|(id, _)| *id)
            .take(REFRESHES_PER_TICK)
            .collect();
        for id in due {
            self.own.insert(id, now_ms);
            self.append(&Entry::Refreshed(id, now_ms).encode());
        }
    }

    fn report(&mut self, now_ms: u64) {
        let counters = self.replica.counters();
        let seen = core::mem::replace(&mut self.reported, counters);
        self.metrics.add(Counter::BadFrames, counters.bad_frames - seen.bad_frames);
        self.metrics.add(Counter::FramesReplayed, counters.replayed - seen.replayed);
        self.metrics.add(Counter::FeedGaps, counters.gaps - seen.gaps);
        self.metrics.add(Counter::RingOverruns, counters.overruns - seen.overruns);
        self.metrics.add(Counter::Snapshots, counters.snapshots - seen.snapshots);
        let refused = counters.remote_refused - seen.remote_refused;
        self.metrics.add(Counter::RemoteRefused, refused);
        self.report_refused();
        let index = self.replica.index();
        self.metrics.set(Gauge::IndexBlocks, index.blocks() as u64);
        self.metrics.set(Gauge::IndexBytes, index.bytes() as u64);
        let evicted = index.counters().evicted;
        if evicted != self.evicted_reported {
            self.evicted_reported = evicted;
            self.metrics.set(Gauge::IndexEvicted, evicted);
        }
        self.metrics.set(Gauge::TokenizerBytes, self.models.bytes() as u64);
        self.report_prefixes();
        self.metrics.set(Gauge::Bookings, self.replica.loads().bookings() as u64);
        self.metrics.set(Gauge::Workers, self.replica.roster().workers.len() as u64);
        self.metrics.set(Gauge::IndexLive, u64::from(self.replica.is_live()));
        self.report_readings();
        if let Some(age_ms) = self.feed_age_ms(now_ms) {
            self.metrics.set(Gauge::FeedAgeMs, age_ms);
        }
    }

    fn report_prefixes(&mut self) {
        let prefixes = self.models.prefixes();
        let (counters, bytes) = (prefixes.counters(), prefixes.bytes());
        let seen = core::mem::replace(&mut self.prefixes_reported, counters);
        self.metrics.set(Gauge::PrefixBytes, bytes as u64);
        self.metrics.add(Counter::PrefixLookups, counters.lookups - seen.lookups);
        self.metrics.add(Counter::PrefixHits, counters.hits - seen.hits);
        self.metrics.add(Counter::PrefixBytesSaved, counters.bytes_saved - seen.bytes_saved);
        self.metrics.add(Counter::PrefixEvicted, counters.evicted - seen.evicted);
        self.metrics.add(Counter::PrefixRefused, counters.refused - seen.refused);
    }

    /// Each VM counts for itself, although all have read the same.
    fn report_refused(&mut self) {
        let refused = self.replica.refused();
        let seen = core::mem::replace(&mut self.refused_reported, refused);
        self.metrics.add(Counter::BookingsRefused, refused.bookings - seen.bookings);
        self.metrics.add(Counter::BookingsCrowded, refused.crowded - seen.crowded);
        self.metrics.add(Counter::SessionsRefused, refused.sessions - seen.sessions);
        self.metrics.add(Counter::DecisionsRefused, refused.decisions - seen.decisions);
    }

    /// Milliseconds since the sidecar was heard of; `None` if it never was.
    pub(crate) fn feed_age_ms(&self, now_ms: u64) -> Option<u64> {
        self.heard_at_ms.map(|heard_at_ms| now_ms.saturating_sub(heard_at_ms))
    }
}

/// Key of the last card frame, for VMs that start later.
pub(crate) fn cards_key() -> String {
    format!("{KEY_PREFIX}/cards")
}

/// Key of the last roster frame, for VMs that start later.
pub(crate) fn roster_key() -> String {
    format!("{KEY_PREFIX}/roster")
}

/// Key of the last settings frame, for VMs that start later.
pub(crate) fn settings_key() -> String {
    format!("{KEY_PREFIX}/settings")
}

/// The name of the gateway process: a number that no other one has.
fn gateway_name(store: &impl SharedData, number: u64) -> Result<u64, Unavailable> {
    let key = format!("{KEY_PREFIX}/gateway");
    if let Some(found) = store.get(&key)? {
        let name = found.value.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        return Ok(name.max(1));
    }
    // As with the first number: the host configures one VM before it starts the
    // others.
    let seed = [host::wall_clock_ns(), host::monotonic_ns(), number].map(u64::to_le_bytes);
    let name = BlobId::of(&seed.concat()).hash.max(1);
    store.set(&key, &name.to_le_bytes(), None)?;
    Ok(name)
}

/// A number that no other VM of this process has.
fn next_number(store: &impl SharedData) -> Result<u64, Unavailable> {
    let key = format!("{KEY_PREFIX}/vms");
    for _ in 0..NUMBER_ATTEMPTS_MAX {
        let Some(found) = store.get(&key)? else {
            // Nobody but the first VM of the process finds it absent: the host
            // configures one before it starts the others.
            store.set(&key, &1_u64.to_le_bytes(), None)?;
            return Ok(1);
        };
        let last = found.value.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        // The number is the upper half of its bookings' names.
        let next = (last + 1) & u64::from(u32::MAX);
        if store.set(&key, &next.to_le_bytes(), Some(found.version))? == Write::Done {
            return Ok(next);
        }
    }
    Err(Unavailable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use warmpath_core::shared::memory::MemoryStore;

    #[test]
    fn every_vm_has_a_number_of_its_own() {
        let store = MemoryStore::default();
        let numbers: Vec<u64> = (0..5).map(|_| next_number(&store).unwrap()).collect();
        assert_eq!(numbers, [1, 2, 3, 4, 5]);
    }
}
