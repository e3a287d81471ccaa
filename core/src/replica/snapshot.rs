//! Snapshot: how the index is taken when its place in the log is lost.

use super::{Position, Replica};
use crate::delta::{Delta, SnapshotStart};
use crate::frame::{Frame, Kind};
use crate::index::Index;

/// A snapshot on its way in.
#[derive(Debug)]
pub(super) struct Incoming {
    /// Known from the snapshot's first frame on.
    pub(super) at: Option<Position>,
    pub(super) index: Index,
    pub(super) blocks_expected: u64,
    /// Log frames that came through the ring meanwhile: where they stand, and
    /// the bodies of those that are deltas.
    pub(super) pending: Vec<(Position, Option<Vec<u8>>)>,
    pub(super) pending_bytes: usize,
}

/// How far a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotProgress {
    /// More parts are wanted.
    More,
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
            index: Index::new(self.index_blocks_max),
            blocks_expected: 0,
            pending: Vec::new(),
            pending_bytes: 0,
        });
    }

    /// The snapshot's stream ended early.
    pub fn abandon_snapshot(&mut self) {
        self.incoming = None;
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
            Kind::SnapshotStart => {
                incoming.blocks_expected = SnapshotStart::decode(frame.body).ok()?.blocks;
                incoming.at = Some(at);
            }
            Kind::SnapshotPart if incoming.at.is_some() => {
                incoming.index.apply(&Delta::decode(frame.body).ok()?);
            }
            Kind::SnapshotEnd => {
                let at = incoming.at?;
                return Some(self.finish_snapshot(at));
            }
            Kind::Heartbeat => {}
            _ => return None,
        }
        Some(SnapshotProgress::More)
    }

    fn finish_snapshot(&mut self, at: Position) -> SnapshotProgress {
        let Some(incoming) = self.incoming.take() else { return SnapshotProgress::Failed };
        self.index = incoming.index;
        self.live_at = Some(at);
        self.was_live = true;
        self.counters.snapshots += 1;
        for (at, delta) in &incoming.pending {
            let is_of_log = self.live_at.is_some_and(|live| live.epoch == at.epoch);
            if is_of_log {
                self.advance_index(*at, delta.as_deref());
            }
        }
        if self.live_at.is_some() { SnapshotProgress::Done } else { SnapshotProgress::Failed }
    }

    /// Share of an incoming snapshot that has arrived, in blocks.
    #[must_use]
    pub fn snapshot_progress(&self) -> Option<(u64, u64)> {
        let incoming = self.incoming.as_ref()?;
        Some((incoming.index.blocks() as u64, incoming.blocks_expected))
    }
}
