//! Log: numbered frames, the last of which are kept.
//!
//! Written by the keeper, read by one task a follower. Reading copies
//! references to frames; the lock is never held for longer than that takes.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::watch;
use warmpath_core::frame::{Frame, Kind};

use crate::limits::{LOG_FRAMES_MAX, LOG_FRAMES_TAKEN};

/// The wanted position is not held any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost;

/// What readers wait for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Sequence of the last log frame; 0 before the first.
    pub last: u64,
    /// Whether the index behind the log is whole: filters may take it over.
    pub open: bool,
}

/// The log of one life of the sidecar.
#[derive(Debug)]
pub struct FeedLog {
    epoch: u64,
    bytes_max: usize,
    frames: Mutex<Frames>,
    progress: watch::Sender<Progress>,
}

#[derive(Debug, Default)]
struct Frames {
    /// Consecutive; the last one is the log's last.
    kept: VecDeque<Bytes>,
    bytes: usize,
    last: u64,
    card: Option<Bytes>,
    settings: Option<Bytes>,
    roster: Option<Bytes>,
}

impl FeedLog {
    /// An empty log.
    ///
    /// - `epoch`: this life of the sidecar; not zero.
    /// - `bytes_max`: bytes of frames to keep.
    #[must_use]
    pub fn new(epoch: u64, bytes_max: usize) -> Self {
        let (progress, _) = watch::channel(Progress::default());
        Self { epoch, bytes_max, frames: Mutex::default(), progress }
    }

    /// This life of the sidecar.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Appends a frame and returns its sequence and length.
    pub fn append(&self, kind: Kind, body: &[u8]) -> (u64, usize) {
        let mut frames = self.lock();
        frames.last += 1;
        let frame = Frame { kind, epoch: self.epoch, sequence: frames.last, body };
        let bytes = Bytes::from(frame.encode());
        match kind {
            Kind::Card => frames.card = Some(bytes.clone()),
            Kind::Settings => frames.settings = Some(bytes.clone()),
            Kind::Roster => frames.roster = Some(bytes.clone()),
            _ => {}
        }
        let (last, len) = (frames.last, bytes.len());
        frames.bytes += len;
        frames.kept.push_back(bytes);
        while frames.bytes > self.bytes_max || frames.kept.len() > LOG_FRAMES_MAX {
            let Some(oldest) = frames.kept.pop_front() else { break };
            frames.bytes -= oldest.len();
        }
        drop(frames);
        self.progress.send_modify(|progress| progress.last = last);
        (last, len)
    }

    /// The index is whole from now on.
    pub fn open(&self) {
        self.progress.send_modify(|progress| progress.open = true);
    }

    /// How far the log is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        *self.progress.borrow()
    }

    /// Tells of progress.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// The latest card, settings and roster frame, with the numbers they had.
    #[must_use]
    pub fn latest(&self) -> Vec<Bytes> {
        let frames = self.lock();
        [&frames.card, &frames.settings, &frames.roster].into_iter().flatten().cloned().collect()
    }

    /// The frames behind a position, oldest first, at most
    /// [`LOG_FRAMES_TAKEN`] of them; none if it is the last one's.
    ///
    /// # Errors
    ///
    /// [`Lost`] if the next frame is not kept any more, or the position is not
    /// of this log.
    pub fn behind(&self, sequence: u64) -> Result<Vec<Bytes>, Lost> {
        let frames = self.lock();
        let missing = frames.last.checked_sub(sequence).ok_or(Lost)?;
        let kept = frames.kept.len() as u64;
        let skipped = kept.checked_sub(missing).ok_or(Lost)?;
        let skipped = usize::try_from(skipped).map_err(|_| Lost)?;
        Ok(frames.kept.iter().skip(skipped).take(LOG_FRAMES_TAKEN).cloned().collect())
    }

    fn lock(&self) -> MutexGuard<'_, Frames> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequences(frames: &[Bytes]) -> Vec<u64> {
        frames.iter().map(|frame| Frame::decode(frame).unwrap().sequence).collect()
    }

    #[test]
    fn frames_are_numbered_from_one_and_read_from_any_position() {
        let log = FeedLog::new(7, 1 << 20);
        assert_eq!(log.behind(0), Ok(vec![]));
        for _ in 0..3 {
            log.append(Kind::Delta, b"x");
        }
        assert_eq!(sequences(&log.behind(0).unwrap()), [1, 2, 3]);
        assert_eq!(sequences(&log.behind(2).unwrap()), [3]);
        assert_eq!(log.behind(3), Ok(vec![]));
        assert_eq!(log.behind(4), Err(Lost));
        assert_eq!(log.progress(), Progress { last: 3, open: false });
        let frame = log.behind(2).unwrap().remove(0);
        assert_eq!(Frame::decode(&frame).unwrap().epoch, 7);
    }

    #[test]
    fn the_oldest_frames_go_when_there_are_too_many_bytes() {
        let log = FeedLog::new(7, 500);
        for _ in 0..10 {
            log.append(Kind::Delta, &[0; 60]);
        }
        assert_eq!(sequences(&log.behind(5).unwrap()), [6, 7, 8, 9, 10]);
        assert_eq!(log.behind(4), Err(Lost));
    }

    #[test]
    fn the_state_is_kept_even_if_its_frames_are_not() {
        let log = FeedLog::new(7, 200);
        log.append(Kind::Card, b"card");
        log.append(Kind::Roster, b"roster");
        log.append(Kind::Settings, b"settings");
        log.append(Kind::Roster, b"other");
        for _ in 0..10 {
            log.append(Kind::Delta, &[0; 60]);
        }
        assert_eq!(sequences(&log.latest()), [1, 3, 4]);
        assert_eq!(log.behind(1), Err(Lost));
    }

    #[test]
    fn a_reader_takes_a_bounded_number_at_a_time() {
        let log = FeedLog::new(7, 1 << 20);
        for _ in 0..LOG_FRAMES_TAKEN + 5 {
            log.append(Kind::Delta, b"");
        }
        assert_eq!(log.behind(0).unwrap().len(), LOG_FRAMES_TAKEN);
        assert_eq!(log.behind(LOG_FRAMES_TAKEN as u64).unwrap().len(), 5);
    }
}
