//! Sequence: one publisher's messages, each once and in order, or a clear.
//!
//! A publisher numbers its messages from 0 for as long as it lives, drops what
//! a subscriber is too slow for, and offers its last messages again on a replay
//! socket. Pure: the connection's events in, actions out; `source::zmq` does
//! them.
//!
//! # Terms
//!
//! - *incarnation*: one life of the publisher. Sequence numbers of different
//!   incarnations cannot be compared.
//! - *applied*: the last message whose effect the state shows.
//! - *held*: live messages that wait until a replay has closed the gap before
//!   them.
//!
//! # Invariants
//!
//! 1. Messages are applied in the order of their sequence numbers, each at most
//!    once, without a hole since the last clear: a replay never brings back what
//!    a later message removed.
//! 2. After a new connection nothing is applied on top of what was known before
//!    it is proven that the publisher is the same: it still has the last message
//!    that was applied, byte for byte.
//! 3. Whatever is lost for good clears the rank: it may then lack blocks, but
//!    never shows one that is gone.

use std::collections::VecDeque;

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::limits::{HELD_BYTES_MAX, HELD_MESSAGES_MAX, REPLAY_ATTEMPTS_MAX};

/// Why a rank's blocks are forgotten, or known in part only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Loss {
    /// The publisher is another incarnation. Nothing is wrong with that.
    Restart,
    /// Nobody listens where the publisher was.
    PublisherGone,
    /// The connection broke, and without a replay socket it cannot be told
    /// what was missed.
    ConnectionLost,
    /// There was a gap, and there is no replay socket.
    NoReplay,
    /// The publisher does not have the missing messages any more.
    HistoryLost,
    /// The replay socket did not answer, or not to the end.
    ReplayFailed,
    /// Replays leave a hole again and again.
    Unrepairable,
    /// More live messages came during a replay than can be held.
    HeldOverflow,
    /// A message could not be decoded.
    Undecodable,
    /// The worker did not answer queries for its history: it is followed live
    /// only from here on.
    Degraded,
}

impl Loss {
    /// All of them, for metrics.
    pub const ALL: [Self; 10] = [
        Self::Restart,
        Self::PublisherGone,
        Self::ConnectionLost,
        Self::NoReplay,
        Self::HistoryLost,
        Self::ReplayFailed,
        Self::Unrepairable,
        Self::HeldOverflow,
        Self::Undecodable,
        Self::Degraded,
    ];

    /// Fixed word for metrics and the state page.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::PublisherGone => "publisher_gone",
            Self::ConnectionLost => "connection_lost",
            Self::NoReplay => "no_replay",
            Self::HistoryLost => "history_lost",
            Self::ReplayFailed => "replay_failed",
            Self::Unrepairable => "unrepairable",
            Self::HeldOverflow => "held_overflow",
            Self::Undecodable => "undecodable",
            Self::Degraded => "degraded",
        }
    }
}

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Decode and apply a message.
    Apply(u64, Bytes),
    /// Forget the rank's blocks.
    Clear(Loss),
    /// Ask for a replay from a sequence number on; ends any other replay.
    Replay(u64),
    /// Stop the replay that is under way.
    StopReplay,
}

/// What a replay is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// To see whether the publisher is the one we knew.
    Verify,
    /// To take in all that an incarnation has said.
    Rebuild,
    /// To close a gap.
    Fill,
    /// To see whether anything is missing at the end.
    Tail,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Disconnected,
    Live,
    Replaying(Purpose),
}

/// What the last applied message was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Applied {
    sequence: u64,
    digest: u64,
}

/// How things stand, for the state page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Whether the publisher is connected.
    pub connected: bool,
    /// Whether a gap is open: messages are missing and asked for.
    pub repairing: bool,
    /// Why the rank is known in part only; `None` if it is known whole.
    pub partial: Option<Loss>,
    /// The last message applied.
    pub applied: Option<u64>,
    /// Whether a first replay, or what takes its place, is over.
    pub synced: bool,
}

/// Puts one publisher's messages into order.
#[derive(Clone, Debug)]
pub struct Sequencer {
    has_replay: bool,
    phase: Phase,
    applied: Option<Applied>,
    /// Last sequence number on the present connection.
    live_last: Option<u64>,
    held: VecDeque<(u64, Bytes)>,
    held_bytes: usize,
    attempts: u32,
    partial: Option<Loss>,
    synced: bool,
    gaps: u64,
    duplicates: u64,
    actions: Vec<Action>,
}

impl Sequencer {
    /// Nothing is connected yet.
    ///
    /// - `has_replay`: whether there is a replay socket to ask.
    #[must_use]
    pub fn new(has_replay: bool) -> Self {
        Self {
            has_replay,
            phase: Phase::Disconnected,
            applied: None,
            live_last: None,
            held: VecDeque::new(),
            held_bytes: 0,
            attempts: 0,
            partial: None,
            synced: false,
            gaps: 0,
            duplicates: 0,
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
            connected: self.phase != Phase::Disconnected,
            repairing: matches!(
                self.phase,
                Phase::Replaying(Purpose::Verify | Purpose::Rebuild | Purpose::Fill)
            ),
            partial: self.partial,
            applied: self.applied.map(|applied| applied.sequence),
            synced: self.synced,
        }
    }

    /// Gaps seen so far.
    #[must_use]
    pub fn gaps(&self) -> u64 {
        self.gaps
    }

    /// Messages dropped so far because they had been applied already.
    #[must_use]
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// A connection stands and the subscription is made.
    pub fn connected(&mut self) {
        self.live_last = None;
        self.drop_held();
        self.attempts = 0;
        match self.applied {
            Some(applied) if self.has_replay => self.ask(Purpose::Verify, applied.sequence),
            None if self.has_replay => self.ask(Purpose::Rebuild, 0),
            _ => {
                self.phase = Phase::Live;
                self.synced = true;
                // Until the publisher's first message says otherwise.
                self.partial = self.partial.or(Some(Loss::NoReplay));
            }
        }
    }

    /// The connection broke.
    pub fn disconnected(&mut self) {
        if matches!(self.phase, Phase::Replaying(_)) {
            self.actions.push(Action::StopReplay);
        }
        self.phase = Phase::Disconnected;
        self.live_last = None;
        self.drop_held();
        if !self.has_replay {
            self.lose(Loss::ConnectionLost);
        }
    }

    /// Nobody listens at the publisher's address: its process is gone, and with
    /// it the cache.
    pub fn gone(&mut self) {
        self.lose(Loss::PublisherGone);
    }

    /// The engine said that it holds nothing: what is known is the whole again.
    pub fn engine_cleared(&mut self) {
        self.partial = None;
    }

    /// A message could not be decoded: what it changed is unknown.
    pub fn undecodable(&mut self) {
        // The messages behind it are in order, so the position stays.
        self.partial = Some(Loss::Undecodable);
        self.actions.push(Action::Clear(Loss::Undecodable));
    }

    /// A live message came.
    pub fn live(&mut self, sequence: u64, payload: Bytes) {
        if self.phase == Phase::Disconnected {
            return;
        }
        if let Some(last) = self.live_last {
            if sequence == last {
                self.duplicates += 1;
                return;
            }
            if sequence < last {
                self.restarted(sequence, payload);
                return;
            }
        }
        self.live_last = Some(sequence);
        if self.phase == Phase::Replaying(Purpose::Tail) {
            // The message itself shows whether anything is missing.
            self.actions.push(Action::StopReplay);
            self.phase = Phase::Live;
        }
        if matches!(self.phase, Phase::Replaying(_)) {
            self.hold(sequence, payload);
            return;
        }
        match self.applied {
            Some(applied) if sequence <= applied.sequence => self.duplicates += 1,
            Some(applied) if applied.sequence.checked_add(1) == Some(sequence) => {
                self.apply(sequence, payload);
            }
            None if sequence == 0 => {
                self.partial = None;
                self.apply(sequence, payload);
            }
            Some(applied) => {
                self.gaps += 1;
                if self.has_replay {
                    self.hold(sequence, payload);
                    self.attempts = 0;
                    self.ask(Purpose::Fill, applied.sequence.saturating_add(1));
                } else {
                    self.lose(Loss::NoReplay);
                    self.apply(sequence, payload);
                }
            }
            // Its beginning was missed: whether it is the first message after a
            // tail check that found nothing, or after a loss.
            None if self.has_replay && self.partial.is_none() => {
                self.gaps += 1;
                self.hold(sequence, payload);
                self.attempts = 0;
                self.ask(Purpose::Rebuild, 0);
            }
            None => {
                self.partial = self.partial.or(Some(Loss::NoReplay));
                self.apply(sequence, payload);
            }
        }
    }

    /// The numbers went back on one connection: something in between has
    /// connected to a new publisher.
    fn restarted(&mut self, sequence: u64, payload: Bytes) {
        self.drop_held();
        self.lose(Loss::Restart);
        self.partial = None;
        self.live_last = Some(sequence);
        if sequence == 0 || !self.has_replay {
            if matches!(self.phase, Phase::Replaying(_)) {
                self.actions.push(Action::StopReplay);
            }
            self.phase = Phase::Live;
            if sequence > 0 {
                self.partial = Some(Loss::NoReplay);
            }
            self.apply(sequence, payload);
        } else {
            self.hold(sequence, payload);
            self.attempts = 0;
            self.ask(Purpose::Rebuild, 0);
        }
    }

    /// A message of the replay came.
    pub fn replayed(&mut self, sequence: u64, payload: Bytes) {
        let Phase::Replaying(purpose) = self.phase else {
            return;
        };
        if purpose == Purpose::Verify {
            self.verify(sequence, &payload);
            return;
        }
        let expected = match self.applied {
            None => 0,
            Some(applied) if sequence <= applied.sequence => {
                self.duplicates += 1;
                return;
            }
            Some(applied) => applied.sequence.saturating_add(1),
        };
        if sequence == expected {
            if self.applied.is_none() {
                self.partial = None;
            }
        } else {
            // What lay between is not to be had any more, or was dropped on the
            // way. What follows can be learnt from all the same.
            self.lose(Loss::HistoryLost);
            self.partial = Some(Loss::HistoryLost);
        }
        self.apply(sequence, payload);
        self.catch_up();
    }

    /// The first message of a replay after a new connection: the last applied
    /// one, if the publisher is the same.
    fn verify(&mut self, sequence: u64, payload: &Bytes) {
        let found = Applied { sequence, digest: xxh3_64(payload) };
        if self.applied == Some(found) {
            self.phase = Phase::Replaying(Purpose::Fill);
            self.catch_up();
        } else {
            self.start_over();
        }
    }

    /// The publisher is not the one we knew.
    fn start_over(&mut self) {
        self.lose(Loss::Restart);
        self.partial = None;
        self.ask(Purpose::Rebuild, 0);
    }

    /// The replay is over, with its end marker.
    pub fn replay_ended(&mut self) {
        let Phase::Replaying(purpose) = self.phase else {
            return;
        };
        if purpose == Purpose::Verify {
            self.start_over();
            return;
        }
        self.drop_covered();
        let next = self.applied.map_or(0, |applied| applied.sequence.saturating_add(1));
        match self.held.front() {
            Some((first, _)) if *first > next => {
                // Something was published after the replay was taken and
                // dropped before the held messages.
                self.attempts += 1;
                if self.attempts < REPLAY_ATTEMPTS_MAX {
                    let purpose =
                        if self.applied.is_some() { Purpose::Fill } else { Purpose::Rebuild };
                    self.ask(purpose, next);
                } else {
                    self.give_up(Loss::Unrepairable);
                }
            }
            held => {
                if held.is_none() && self.applied.is_none() && purpose == Purpose::Rebuild {
                    // The publisher has said nothing yet.
                    self.partial = None;
                }
                self.go_live();
            }
        }
    }

    /// The replay failed, or fell silent before its end.
    pub fn replay_failed(&mut self) {
        let Phase::Replaying(purpose) = self.phase else {
            return;
        };
        if purpose == Purpose::Tail {
            // Nothing says that anything is missing.
            self.go_live();
        } else {
            self.give_up(Loss::ReplayFailed);
        }
    }

    /// Nothing has come for a while: makes sure that nothing is missing at the
    /// end. Asks nothing while something else is under way.
    pub fn check_tail(&mut self) {
        if self.phase == Phase::Live && self.has_replay {
            let next = self.applied.map_or(0, |applied| applied.sequence.saturating_add(1));
            self.attempts = 0;
            self.ask(Purpose::Tail, next);
        }
    }

    fn ask(&mut self, purpose: Purpose, start: u64) {
        self.phase = Phase::Replaying(purpose);
        self.actions.push(Action::Replay(start));
    }

    fn apply(&mut self, sequence: u64, payload: Bytes) {
        self.applied = Some(Applied { sequence, digest: xxh3_64(&payload) });
        self.actions.push(Action::Apply(sequence, payload));
    }

    /// Forgets what is known. Says so only if there is something to forget.
    fn lose(&mut self, loss: Loss) {
        if self.applied.take().is_some() {
            self.actions.push(Action::Clear(loss));
            self.partial = Some(loss);
        }
    }

    /// Gives up what is known and goes on with what is held.
    fn give_up(&mut self, loss: Loss) {
        self.actions.push(Action::StopReplay);
        self.lose(loss);
        self.partial = Some(loss);
        self.go_live();
    }

    fn hold(&mut self, sequence: u64, payload: Bytes) {
        self.held_bytes += payload.len();
        self.held.push_back((sequence, payload));
        if self.held.len() > HELD_MESSAGES_MAX || self.held_bytes > HELD_BYTES_MAX {
            self.give_up(Loss::HeldOverflow);
        }
    }

    fn drop_held(&mut self) {
        self.held.clear();
        self.held_bytes = 0;
    }

    fn pop_held(&mut self) -> Option<(u64, Bytes)> {
        let (sequence, payload) = self.held.pop_front()?;
        self.held_bytes -= payload.len();
        Some((sequence, payload))
    }

    /// Drops held messages that the replay has brought already.
    fn drop_covered(&mut self) {
        let Some(applied) = self.applied else { return };
        while self.held.front().is_some_and(|(sequence, _)| *sequence <= applied.sequence) {
            self.pop_held();
            self.duplicates += 1;
        }
    }

    /// Ends the replay as soon as it has reached the held messages.
    fn catch_up(&mut self) {
        self.drop_covered();
        let next = self.applied.map_or(0, |applied| applied.sequence.saturating_add(1));
        if self.held.front().is_some_and(|(sequence, _)| *sequence == next) {
            self.actions.push(Action::StopReplay);
            self.go_live();
        }
    }

    /// Applies what is held and goes on with what comes; a hole among the held
    /// messages starts a replay of its own.
    fn go_live(&mut self) {
        self.phase = Phase::Live;
        self.synced = true;
        while let Some((sequence, payload)) = self.pop_held() {
            let next = self.applied.map(|applied| applied.sequence.saturating_add(1));
            match next {
                Some(next) if sequence < next => self.duplicates += 1,
                Some(next) if sequence > next => {
                    self.gaps += 1;
                    self.held_bytes += payload.len();
                    self.held.push_front((sequence, payload));
                    self.attempts = 0;
                    self.ask(Purpose::Fill, next);
                    return;
                }
                None if sequence == 0 => {
                    self.partial = None;
                    self.apply(sequence, payload);
                }
                None => {
                    self.partial = self.partial.or(Some(Loss::HistoryLost));
                    self.apply(sequence, payload);
                }
                Some(_) => self.apply(sequence, payload),
            }
        }
    }
}

#[cfg(test)]
mod tests;
