//! Follow: the replica's place in the sidecar's log, and what a gap means.

use super::{Position, Replica};
use crate::delta::Delta;
use crate::limits::PENDING_BYTES_MAX;

impl Replica {
    /// A log frame came through the ring. `delta`: its body, if it is one.
    pub(super) fn advance(&mut self, at: Position, delta: Option<&[u8]>) {
        let is_known = at.epoch == self.seen.epoch && at.sequence <= self.seen.sequence;
        // Another log begins by a resync, which is never missing in front of its
        // deltas unless all before them is.
        let is_foreign = self.seen.epoch != 0 && at.epoch != self.seen.epoch;
        if delta.is_some() && (is_known || is_foreign) {
            self.counters.replayed += 1;
            return;
        }
        if is_known {
            return;
        }
        let is_next = at.epoch == self.seen.epoch && at.sequence == self.seen.sequence + 1;
        if !is_next && delta.is_none() {
            // Cards, settings and rosters are sent first on every stream, with
            // the numbers that they had: no gap.
            return;
        }
        self.seen = at;
        if let Some(incoming) = &mut self.incoming {
            // Frames that are no deltas count, too: what follows them is no gap.
            incoming.pending_bytes += size_of::<Position>() + delta.map_or(0, <[u8]>::len);
            incoming.pending.push_back((at, delta.map(<[u8]>::to_vec)));
            if incoming.pending_bytes > PENDING_BYTES_MAX {
                self.counters.snapshots_restarted += 1;
                self.incoming = None;
            }
        }
        self.advance_index(at, delta);
    }

    pub(super) fn advance_index(&mut self, at: Position, delta: Option<&[u8]>) {
        let Some(live_at) = self.live_at else { return };
        if at.epoch != live_at.epoch || at.sequence > live_at.sequence + 1 {
            self.counters.gaps += 1;
            self.lose_index();
            return;
        }
        if at.sequence <= live_at.sequence {
            return;
        }
        if let Some(body) = delta {
            let Ok(delta) = Delta::decode(body) else {
                self.counters.bad_frames += 1;
                self.lose_index();
                return;
            };
            self.index.apply(&delta);
        }
        self.live_at = Some(at);
    }

    /// The stream goes on behind `at`.
    pub(super) fn resync(&mut self, at: Position) {
        self.seen = at;
        let reaches = |live: Position| live.epoch == at.epoch && live.sequence >= at.sequence;
        if !self.live_at.is_some_and(reaches) {
            self.lose_index();
        }
    }

    /// The stream has come as far as `at`. A VM that has not seen that much has
    /// missed frames, or has started when they had left the ring already.
    pub(super) fn heartbeat(&mut self, at: Position) {
        let is_behind = at.epoch != self.seen.epoch || at.sequence > self.seen.sequence;
        if is_behind {
            self.resync(at);
        }
    }

    /// The ring had moved on: entries are missing, and with them bookings that
    /// were placed or freed. Those that are left expire.
    pub fn overrun(&mut self) {
        self.counters.overruns += 1;
        self.lose_index();
        // What follows in the ring must not be taken for the next frame.
        self.seen = Position::default();
    }

    pub(super) fn lose_index(&mut self) {
        self.live_at = None;
        // A snapshot under way was asked for before: what is missing now may
        // be missing from it, too.
        if self.incoming.take().is_some() {
            self.counters.snapshots_restarted += 1;
        }
    }
}
