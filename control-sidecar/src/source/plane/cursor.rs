//! Cursor: one rank's events of Dynamo's event plane, each once and in order.
//!
//! A relay in the worker numbers a rank's events from 1 on, without holes, for
//! as long as its publisher lives, and answers queries for its history: with the
//! last events, or with all that the rank holds. Pure: what comes in, actions
//! out; `source::plane` does them. It plays the part that `sequence` plays for
//! an engine's own publisher.
//!
//! # Terms
//!
//! - *cursor*: the number of the last event whose effect the state shows.
//! - *held*: live events that wait for the answer to a query.
//! - *degraded*: followed live only, because the worker does not answer.
//!
//! # Invariants
//!
//! 1. Events are applied in the order of their numbers, each at most once, and
//!    without a hole since the last clear or replacement. So no late answer
//!    brings back what a later event removed.
//! 2. A clear of everything holds whatever is missing before it: it is applied
//!    at once, and ends a query.
//! 3. Whatever is lost for good clears the rank: it may then lack blocks, but
//!    never shows one that is gone.

use std::collections::VecDeque;
use std::time::Duration;

use warmpath_core::event::KvEvent;

use crate::adapter::plane::answer::{Answer, Refusal};
use crate::adapter::plane::router_event::{Change, RouterEvent};
use crate::limits::{PLANE_EVENTS_HELD_MAX, RECOVERY_PAUSE, RECOVERY_RETRIES_MAX};
use crate::source::sequence::{Loss, Standing};

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Apply events; the number is the last one's.
    Apply(u64, Vec<KvEvent>),
    /// Put a whole account in the place of what was known; the number is that of
    /// the last event that it shows.
    Replace(u64, Vec<KvEvent>),
    /// Forget the rank's blocks.
    Clear(Loss),
    /// Ask for the rank's history; ends any other query.
    Query(Query),
    /// Stop the query that is under way.
    StopQuery,
}

/// A query for a rank's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// Names the query; its answer must name it too.
    pub number: u64,
    /// First event wanted; `None` for all that the rank holds.
    pub start: Option<u64>,
    /// How long to wait before it is sent.
    pub after: Duration,
}

/// What a query is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// To take in all that the rank holds.
    Rebuild,
    /// To close a gap.
    Fill,
    /// To see whether anything is missing at the end, or, when degraded, whether
    /// the worker answers again. Without an answer things stay as they are.
    Check,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No connection has stood yet, or the publisher is gone.
    Idle,
    Live,
    Asking(Purpose),
}

/// Puts one rank's events into order.
#[derive(Clone, Debug)]
pub struct Cursor {
    has_recovery: bool,
    phase: Phase,
    connected: bool,
    applied: Option<u64>,
    held: VecDeque<RouterEvent>,
    query: u64,
    start: Option<u64>,
    /// Queries that failed without the cursor having moved.
    failures: u32,
    partial: Option<Loss>,
    synced: bool,
    gaps: u64,
    duplicates: u64,
    evicted: u64,
    actions: Vec<Action>,
}

impl Cursor {
    /// Nothing is connected yet.
    ///
    /// - `has_recovery`: whether the history can be asked for.
    #[must_use]
    pub fn new(has_recovery: bool) -> Self {
        Self {
            has_recovery,
            phase: Phase::Idle,
            connected: false,
            applied: None,
            held: VecDeque::new(),
            query: 0,
            start: None,
            failures: 0,
            partial: None,
            synced: false,
            gaps: 0,
            duplicates: 0,
            evicted: 0,
            actions: Vec::new(),
        }
    }

    /// What is to be done now, in order.
    pub fn actions(&mut self) -> Vec<Action> {
        core::mem::take(&mut self.actions)
    }

    /// How things stand.
    #[must_use]
    pub fn standing(&self) -> Standing {
        Standing {
            connected: self.connected,
            repairing: matches!(self.phase, Phase::Asking(Purpose::Rebuild | Purpose::Fill)),
            partial: self.partial,
            applied: self.applied,
            synced: self.synced,
        }
    }

    /// Gaps seen so far.
    #[must_use]
    pub fn gaps(&self) -> u64 {
        self.gaps
    }

    /// Events dropped so far because they had been applied already.
    #[must_use]
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Held events given up so far because there were too many.
    #[must_use]
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// The subscription stands, for the first time or again.
    ///
    /// - `jitter`: how long to wait before a first query.
    pub fn connected(&mut self, jitter: Duration) {
        self.connected = true;
        match self.phase {
            Phase::Idle if self.has_recovery => {
                self.failures = 0;
                self.ask(Purpose::Rebuild, None, jitter);
            }
            Phase::Idle => {
                self.phase = Phase::Live;
                self.synced = true;
                // Until the first event says otherwise.
                self.partial = Some(Loss::NoReplay);
            }
            Phase::Live => self.check(),
            Phase::Asking(_) => {}
        }
    }

    /// The connection broke. What was missed meanwhile will show as a gap.
    pub fn disconnected(&mut self) {
        self.connected = false;
    }

    /// Nobody listens at the publisher's address: its process is gone, and with
    /// it the cache.
    pub fn gone(&mut self) {
        if self.phase == Phase::Idle {
            return;
        }
        self.stop_query();
        self.held.clear();
        self.phase = Phase::Idle;
        self.lose(Loss::PublisherGone);
    }

    /// Makes sure that nothing is missing at the end, or that a degraded rank
    /// stays so no longer than it must. Asks nothing while a query is under way.
    pub fn check(&mut self) {
        if self.phase == Phase::Live && self.has_recovery {
            self.failures = 0;
            let start = if self.partial.is_some() { None } else { self.applied.map(after) };
            self.ask(Purpose::Check, start, Duration::ZERO);
        }
    }

    /// A live event came.
    pub fn live(&mut self, event: RouterEvent) {
        if self.applied.is_some_and(|applied| event.id <= applied) {
            self.duplicates += 1;
            return;
        }
        match self.phase {
            Phase::Idle => {}
            _ if event.change == Change::ClearedAll => self.clear_all(event.id),
            Phase::Asking(_) => self.hold(event),
            Phase::Live => self.take(event),
        }
    }

    /// An answer came. One of another query than the last is passed over.
    pub fn answered(&mut self, number: u64, answer: Answer) {
        let Some(purpose) = self.asked(number) else { return };
        let outcome = match answer {
            Answer::Dump { events, last } => self.replace(events, last),
            Answer::Events { events, last } if self.start.is_none() => self.rebuild(events, last),
            Answer::Events { events, last } => self.extend(events, last),
            // The start was the number behind the cursor: nothing is missing.
            Answer::TooNew { newest } if self.applied == Some(newest) => Ok(()),
            // The worker knows less than we do: only the whole can be believed.
            Answer::TooNew { .. } | Answer::Refused(Refusal::InvalidRange) => {
                self.start = None;
                Err(())
            }
            Answer::Refused(_) => Err(()),
        };
        self.drop_covered();
        match outcome {
            Ok(()) if self.gap_remains() => {
                // Published after the answer was written and lost on its way
                // here, or held and given up.
                self.start = self.applied.map(after);
                self.again(Purpose::Fill);
            }
            Ok(()) => self.go_live(),
            Err(()) => self.again(purpose),
        }
    }

    /// A query failed, or took too long.
    pub fn failed(&mut self, number: u64) {
        if let Some(purpose) = self.asked(number) {
            self.again(purpose);
        }
    }

    /// What the query was for, if it is the one under way.
    fn asked(&self, number: u64) -> Option<Purpose> {
        match self.phase {
            Phase::Asking(purpose) if number == self.query => Some(purpose),
            _ => None,
        }
    }

    fn ask(&mut self, purpose: Purpose, start: Option<u64>, after: Duration) {
        self.phase = Phase::Asking(purpose);
        self.query += 1;
        self.start = start;
        self.actions.push(Action::Query(Query { number: self.query, start, after }));
    }

    fn stop_query(&mut self) {
        if matches!(self.phase, Phase::Asking(_)) {
            self.actions.push(Action::StopQuery);
            self.phase = Phase::Live;
        }
    }

    /// Asks again after a pause, or gives up.
    fn again(&mut self, purpose: Purpose) {
        if purpose == Purpose::Check {
            // Nothing says that anything is missing.
            self.go_live();
            return;
        }
        self.failures += 1;
        if self.failures > RECOVERY_RETRIES_MAX {
            self.lose(Loss::Degraded);
            self.partial = Some(Loss::Degraded);
            self.go_live();
            return;
        }
        let pause = RECOVERY_PAUSE.saturating_mul(1 << (self.failures - 1));
        // What an incomplete answer brought need not be asked for again.
        let start = if self.start.is_some() { self.applied.map(after) } else { None };
        self.ask(purpose, start, pause);
    }

    /// Takes over a whole account.
    fn replace(&mut self, events: Vec<RouterEvent>, last: u64) -> Result<(), ()> {
        if self.applied.is_some_and(|applied| last < applied) {
            // It was written down before something that we know of.
            return Err(());
        }
        let events = events.into_iter().filter_map(|event| kv_event(event.change)).collect();
        self.actions.push(Action::Replace(last, events));
        self.move_to(last);
        self.partial = None;
        Ok(())
    }

    /// Takes over events from the first one on, or from a clear of everything
    /// on: they are a whole account too.
    fn rebuild(&mut self, events: Vec<RouterEvent>, last: u64) -> Result<(), ()> {
        let begins = |event: &RouterEvent| event.id == 1 || event.change == Change::ClearedAll;
        let is_whole = match events.first() {
            Some(first) => begins(first),
            None => last == 0,
        };
        let follow = |(one, next): (&RouterEvent, &RouterEvent)| {
            next.id == after(one.id) || next.change == Change::ClearedAll
        };
        let in_order = events.iter().zip(events.iter().skip(1)).all(follow);
        let complete = events.last().is_none_or(|event| event.id == last);
        if is_whole && in_order && complete { self.replace(events, last) } else { Err(()) }
    }

    /// Takes over events behind the cursor, as far as there is no hole.
    fn extend(&mut self, events: Vec<RouterEvent>, last: u64) -> Result<(), ()> {
        for event in events {
            if self.applied.is_some_and(|applied| event.id <= applied) {
                continue;
            }
            if event.change == Change::ClearedAll || self.applied.map(after) == Some(event.id) {
                self.apply(event);
            } else {
                return Err(());
            }
        }
        if self.applied.is_some_and(|applied| applied >= last) { Ok(()) } else { Err(()) }
    }

    fn hold(&mut self, event: RouterEvent) {
        if self.held.len() >= PLANE_EVENTS_HELD_MAX {
            // What it said shows as a gap when the others are applied.
            self.held.pop_front();
            self.evicted += 1;
        }
        self.held.push_back(event);
    }

    fn drop_covered(&mut self) {
        let Some(applied) = self.applied else { return };
        let before = self.held.len();
        self.held.retain(|event| event.id > applied);
        self.duplicates += (before - self.held.len()) as u64;
    }

    /// Whether events are missing before the first that is held.
    fn gap_remains(&self) -> bool {
        match (self.applied, self.held.front()) {
            (Some(applied), Some(event)) => event.id > after(applied),
            _ => false,
        }
    }

    /// Applies what was held and goes on with what comes.
    fn go_live(&mut self) {
        self.phase = Phase::Live;
        self.synced = true;
        while self.phase == Phase::Live {
            let Some(event) = self.held.pop_front() else { return };
            self.take(event);
        }
    }

    /// Takes an event that nothing under way may hold up.
    fn take(&mut self, event: RouterEvent) {
        match self.applied {
            Some(applied) if event.id <= applied => self.duplicates += 1,
            Some(applied) if event.id == after(applied) => self.apply(event),
            None if event.id == 1 => {
                self.partial = None;
                self.apply(event);
            }
            None => self.apply(event),
            Some(applied) => {
                self.gaps += 1;
                if self.has_recovery {
                    // In front of those that came after it.
                    self.held.push_front(event);
                    self.failures = 0;
                    self.ask(Purpose::Fill, Some(after(applied)), Duration::ZERO);
                } else {
                    self.lose(Loss::NoReplay);
                    self.apply(event);
                }
            }
        }
    }

    /// Everything went, whatever is missing before.
    fn clear_all(&mut self, id: u64) {
        self.stop_query();
        self.act(id, Some(KvEvent::Cleared));
        self.partial = None;
        self.drop_covered();
        self.go_live();
    }

    fn apply(&mut self, event: RouterEvent) {
        match event.change {
            // A removal that cannot be read became a clear.
            Change::Event(KvEvent::Cleared) if event.skipped.is_some() => {
                self.partial = Some(Loss::Undecodable);
            }
            Change::Event(KvEvent::Cleared) | Change::ClearedAll => self.partial = None,
            Change::Event(_) | Change::Nothing => {}
        }
        self.act(event.id, kv_event(event.change));
    }

    /// Moves the cursor and has an event applied, together with those before it.
    fn act(&mut self, id: u64, event: Option<KvEvent>) {
        self.move_to(id);
        if let Some(Action::Apply(last, events)) = self.actions.last_mut() {
            *last = id;
            events.extend(event);
        } else {
            self.actions.push(Action::Apply(id, event.into_iter().collect()));
        }
    }

    fn move_to(&mut self, id: u64) {
        if self.applied != Some(id) {
            self.failures = 0;
        }
        self.applied = Some(id);
    }

    /// Forgets the rank's blocks.
    fn lose(&mut self, loss: Loss) {
        self.actions.push(Action::Clear(loss));
        self.applied = None;
        self.partial = Some(loss);
    }
}

/// The number of the event behind this one.
fn after(id: u64) -> u64 {
    id.saturating_add(1)
}

fn kv_event(change: Change) -> Option<KvEvent> {
    match change {
        Change::Nothing => None,
        Change::Event(event) => Some(event),
        Change::ClearedAll => Some(KvEvent::Cleared),
    }
}

#[cfg(test)]
mod tests;
