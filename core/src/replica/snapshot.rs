//! Snapshot: how the index is taken when its place in the log is lost.

use std::collections::VecDeque;

use super::{Position, Replica};
use crate::delta::{Delta, SnapshotStart};
use crate::frame::{Frame, Kind};
use crate::index::Index;
use crate::limits::{PENDING_BYTES_PER_STEP, SNAPSHOT_PLACES_PER_STEP};

/// A snapshot on its way in.
#[derive(Debug)]
pub(super) struct Incoming {
    /// Where the index stands: known from the snapshot's first frame on.
    pub(super) at: Option<Position>,
    /// Whether the index has room for all that was announced.
    is_prepared: bool,
    /// Whether all parts have come.
    is_whole: bool,
    pub(super) index: Index,
    pub(super) blocks_expected: u64,
    /// Log frames that came through the ring meanwhile: where they stand, and
    /// the bodies of those that are deltas.
    pub(super) pending: VecDeque<(Position, Option<Vec<u8>>)>,
    pub(super) pending_bytes: usize,
}

/// What became of a log frame that is applied to an incoming index.
enum Advance {
    /// The index shows it, or is none of its log or newer.
    Done,
    /// One before it is missing.
    Gap,
    /// It cannot be read.
    Damaged,
}

impl Incoming {
    /// Applies a log frame, unless the snapshot shows it already.
    fn advance(&mut self, at: Position, delta: Option<&[u8]>) -> Advance {
        let Some(reached) = self.at else { return Advance::Gap };
        if at.epoch != reached.epoch || at.sequence <= reached.sequence {
            return Advance::Done;
        }
        if at.sequence > reached.sequence + 1 {
            return Advance::Gap;
        }
        if let Some(body) = delta {
            let Ok(delta) = Delta::decode(body) else { return Advance::Damaged };
            self.index.apply(&delta);
        }
        self.at = Some(at);
        Advance::Done
    }

    /// Whether all parts have come, but not all of what came meanwhile is applied.
    pub(super) fn is_settling(&self) -> bool {
        self.is_whole
    }
}

/// How far a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotProgress {
    /// More parts are wanted, once [`Replica::prepare_snapshot`] has made room.
    More,
    /// All has come, and what the ring has brought meanwhile is being applied, a
    /// little in each [`Replica::step`].
    Settling,
    /// The index is live.
    Done,
    /// The snapshot is of no use; another must be asked for.
    Failed,
}

impl Replica {
    /// Whether a snapshot must be asked for. Then call
    /// [`Replica::begin_snapshot`] and ask.
    #[must_use]
    pub fn wants_snapshot(&self) -> bool {
        self.live_at.is_none() && self.incoming.is_none()
    }

    /// A snapshot is about to be asked for: from now on deltas are kept for it.
    pub fn begin_snapshot(&mut self) {
        self.incoming = Some(Incoming {
            at: None,
            is_prepared: false,
            is_whole: false,
            index: Index::new(self.index_blocks_max),
            blocks_expected: 0,
            pending: VecDeque::new(),
            pending_bytes: 0,
        });
    }

    /// The snapshot's stream ended early.
    pub fn abandon_snapshot(&mut self) {
        self.incoming = None;
    }

    /// Makes room for the blocks that were announced, a bounded piece of it at a
    /// time. Returns whether there is room for all, so that parts may come.
    ///
    /// # Cost
    ///
    /// Zeroing [`SNAPSHOT_PLACES_PER_STEP`] places of 8 bytes: below 1 ms.
    pub fn prepare_snapshot(&mut self) -> bool {
        let Some(incoming) = &mut self.incoming else { return false };
        if incoming.at.is_none() {
            return false;
        }
        if !incoming.is_prepared {
            let blocks = usize::try_from(incoming.blocks_expected).unwrap_or(usize::MAX);
            incoming.is_prepared = incoming.index.reserve(blocks, SNAPSHOT_PLACES_PER_STEP);
        }
        incoming.is_prepared
    }

    /// Takes in one frame of the snapshot's stream.
    pub fn apply_snapshot_frame(&mut self, bytes: &[u8]) -> SnapshotProgress {
        let progress = self.try_snapshot_frame(bytes);
        if progress.is_none() {
            self.counters.bad_frames += 1;
            self.incoming = None;
        }
        progress.unwrap_or(SnapshotProgress::Failed)
    }

    fn try_snapshot_frame(&mut self, bytes: &[u8]) -> Option<SnapshotProgress> {
        let frame = Frame::decode(bytes).ok()?;
        let at = Position { epoch: frame.epoch, sequence: frame.sequence };
        if frame.kind == Kind::Remote {
            self.apply_remote(frame.body, true);
            return Some(SnapshotProgress::More);
        }
        // Begun again meanwhile: the stream is of no use, but not wrong.
        let Some(incoming) = &mut self.incoming else { return Some(SnapshotProgress::Failed) };
        match frame.kind {
            Kind::SnapshotStart if incoming.at.is_none_or(|start| start == at) => {
                incoming.blocks_expected = SnapshotStart::decode(frame.body).ok()?.blocks;
                incoming.at = Some(at);
            }
            // Parts of another snapshot are not what was announced.
            Kind::SnapshotPart if incoming.at == Some(at) => {
                incoming.index.apply(&Delta::decode(frame.body).ok()?);
            }
            Kind::SnapshotEnd if incoming.at == Some(at) => {
                incoming.is_whole = true;
                return Some(self.settle());
            }
            Kind::Heartbeat => {}
            _ => return None,
        }
        Some(SnapshotProgress::More)
    }

    /// Applies some of what the ring has brought while the snapshot came in. The
    /// index is live when nothing is left of it.
    pub(super) fn settle(&mut self) -> SnapshotProgress {
        let Some(incoming) = self.incoming.as_mut().filter(|incoming| incoming.is_whole) else {
            return SnapshotProgress::Failed;
        };
        let mut bytes = 0;
        while let Some((at, delta)) = incoming.pending.pop_front() {
            let len = size_of::<Position>() + delta.as_ref().map_or(0, Vec::len);
            incoming.pending_bytes = incoming.pending_bytes.saturating_sub(len);
            match incoming.advance(at, delta.as_deref()) {
                Advance::Done => {}
                Advance::Gap => {
                    self.counters.gaps += 1;
                    self.incoming = None;
                    return SnapshotProgress::Failed;
                }
                Advance::Damaged => {
                    self.counters.bad_frames += 1;
                    self.incoming = None;
                    return SnapshotProgress::Failed;
                }
            }
            bytes += len;
            if bytes >= PENDING_BYTES_PER_STEP && !incoming.pending.is_empty() {
                return SnapshotProgress::Settling;
            }
        }
        let Some(Incoming { index, at, .. }) = self.incoming.take() else {
            return SnapshotProgress::Failed;
        };
        self.index = index;
        self.live_at = at;
        self.was_live = true;
        self.counters.snapshots += 1;
        SnapshotProgress::Done
    }

    /// Share of an incoming snapshot that has arrived, in blocks.
    #[must_use]
    pub fn snapshot_progress(&self) -> Option<(u64, u64)> {
        let incoming = self.incoming.as_ref()?;
        Some((incoming.index.blocks() as u64, incoming.blocks_expected))
    }
}
