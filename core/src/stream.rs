//! Stream: the order of what comes down one stream of the log.
//!
//! A frame says of itself where it stands. Whoever follows the log keeps to that:
//! what comes a second time, goes back behind what has come, or is of another log
//! than the stream's is refused, so that a peer that sends old frames again can
//! bring back neither blocks that were removed nor workers that have gone.
//!
//! # Terms
//!
//! - *reached*: the last frame of the log that has come, or where the stream was
//!   said to go on from.
//!
//! # Invariants
//!
//! 1. A delta passes once, and only if it is behind all that have passed.
//! 2. Cards, settings and rosters pass in the order in which they were made. The
//!    newest may come again: every stream begins with them.
//! 3. All frames of a stream are of one epoch, but for heartbeats that repeat what
//!    the follower has said of itself.

use crate::frame::{Frame, Kind};
use crate::replica::Position;

/// A frame that must not be applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutOfOrder {
    /// It is of another log than the stream's.
    OtherEpoch,
    /// It has come before, or is older than what has.
    Replayed,
}

/// How far a stream is.
#[derive(Clone, Copy, Debug)]
pub struct StreamOrder {
    /// What the follower has said of itself.
    asked: Position,
    epoch: Option<u64>,
    reached: Option<u64>,
    /// Numbers of the newest cards, settings and roster.
    newest: [u64; 3],
}

impl StreamOrder {
    /// A stream that was just opened.
    ///
    /// - `asked`: where it is to go on from, as the follower has said.
    #[must_use]
    pub fn new(asked: Position) -> Self {
        Self { asked, epoch: None, reached: None, newest: [0; 3] }
    }

    /// A frame has come.
    ///
    /// # Errors
    ///
    /// [`OutOfOrder`]; the frame must be dropped. What follows may be right.
    pub fn take(&mut self, frame: &Frame<'_>) -> Result<(), OutOfOrder> {
        let at = Position { epoch: frame.epoch, sequence: frame.sequence };
        if frame.kind == Kind::Heartbeat && at == self.asked && self.reached.is_none() {
            return Ok(());
        }
        if *self.epoch.get_or_insert(frame.epoch) != frame.epoch {
            return Err(OutOfOrder::OtherEpoch);
        }
        if self.reached.is_none() && self.asked.epoch == frame.epoch && frame.epoch != 0 {
            self.reached = Some(self.asked.sequence);
        }
        match frame.kind {
            Kind::Card => self.take_state(0, at.sequence),
            Kind::Settings => self.take_state(1, at.sequence),
            Kind::Roster => self.take_state(2, at.sequence),
            Kind::Delta => match self.reached {
                Some(reached) if at.sequence > reached => {
                    self.reached = Some(at.sequence);
                    Ok(())
                }
                // Before the stream has said where it goes on from, no delta can fit.
                _ => Err(OutOfOrder::Replayed),
            },
            Kind::Resync if self.reached.is_some_and(|reached| at.sequence < reached) => {
                Err(OutOfOrder::Replayed)
            }
            Kind::Resync => {
                self.reached = Some(at.sequence);
                Ok(())
            }
            Kind::Heartbeat if self.reached.is_some_and(|reached| at.sequence < reached) => {
                Err(OutOfOrder::Replayed)
            }
            // Not of the log, and without a number.
            _ => Ok(()),
        }
    }

    fn take_state(&mut self, kind: usize, sequence: u64) -> Result<(), OutOfOrder> {
        let Some(newest) = self.newest.get_mut(kind) else { return Ok(()) };
        if sequence < *newest {
            return Err(OutOfOrder::Replayed);
        }
        *newest = sequence;
        // One that comes ahead of its place comes again at its place.
        if self.reached.is_some_and(|reached| sequence == reached + 1) {
            self.reached = Some(sequence);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const EPOCH: u64 = 7;

    fn frame(kind: Kind, epoch: u64, sequence: u64) -> Frame<'static> {
        Frame { kind, epoch, sequence, body: &[] }
    }

    /// What a stream of a new follower begins with, as the sidecar has it: cards,
    /// settings and roster, the place, and the log behind it.
    fn beginning() -> Vec<Frame<'static>> {
        let mut frames = vec![frame(Kind::Heartbeat, 0, 0)];
        frames.extend([(Kind::Card, 1), (Kind::Settings, 2), (Kind::Roster, 9)].map(of_log));
        frames.extend([frame(Kind::Remote, EPOCH, 0), frame(Kind::Resync, EPOCH, 12)]);
        frames.push(of_log((Kind::Roster, 13)));
        frames.extend([13, 14].map(|sequence| {
            of_log((if sequence == 13 { Kind::Roster } else { Kind::Delta }, sequence))
        }));
        frames.extend([frame(Kind::Heartbeat, EPOCH, 14), of_log((Kind::Delta, 15))]);
        frames
    }

    fn of_log((kind, sequence): (Kind, u64)) -> Frame<'static> {
        frame(kind, EPOCH, sequence)
    }

    #[test]
    fn what_a_sidecar_sends_passes() {
        let mut order = StreamOrder::new(Position::default());
        for frame in beginning() {
            assert_eq!(order.take(&frame), Ok(()), "{frame:?}");
        }
        // A slow follower is told of a later place, and a roster overtakes deltas.
        for frame in [
            frame(Kind::Resync, EPOCH, 40),
            of_log((Kind::Roster, 42)),
            of_log((Kind::Delta, 41)),
            of_log((Kind::Roster, 42)),
            of_log((Kind::Delta, 43)),
            frame(Kind::CacheUsage, EPOCH, 0),
            frame(Kind::BlobPart, EPOCH, 0),
        ] {
            assert_eq!(order.take(&frame), Ok(()), "{frame:?}");
        }
    }

    #[test]
    fn a_follower_resumes_without_being_told_where() {
        let mut order = StreamOrder::new(Position { epoch: EPOCH, sequence: 20 });
        assert_eq!(order.take(&of_log((Kind::Roster, 9))), Ok(()));
        assert_eq!(order.take(&of_log((Kind::Delta, 20))), Err(OutOfOrder::Replayed));
        assert_eq!(order.take(&of_log((Kind::Delta, 21))), Ok(()));
        // A restarted sidecar repeats the follower's place until it knows its own.
        let mut order = StreamOrder::new(Position { epoch: 5, sequence: 20 });
        for frame in [of_log((Kind::Card, 1)), frame(Kind::Heartbeat, 5, 20)] {
            assert_eq!(order.take(&frame), Ok(()));
        }
        assert_eq!(order.take(&frame(Kind::Resync, EPOCH, 3)), Ok(()));
        assert_eq!(order.take(&frame(Kind::Heartbeat, 5, 20)), Err(OutOfOrder::OtherEpoch));
    }

    /// Goal: whatever of the past is sent again, at whatever place, is refused or
    /// changes nothing.
    /// Method: every frame of a stream again behind every later one, as it was and
    /// under another epoch.
    #[test]
    fn frames_that_come_again_are_refused() {
        let frames = beginning();
        for end in 1..=frames.len() {
            let mut order = StreamOrder::new(Position::default());
            for frame in &frames[..end] {
                order.take(frame).unwrap();
            }
            for old in &frames[..end] {
                let mut again = order;
                let passed = again.take(old).is_ok();
                let newer = frames[..end].iter().rev().find(|it| it.kind == old.kind).unwrap();
                let harmless = match old.kind {
                    Kind::Delta => false,
                    Kind::Resync => again.reached == order.reached,
                    _ => old.sequence == newer.sequence,
                };
                assert!(!passed || harmless, "{old:?} behind {end} frames");
                let foreign = Frame { epoch: EPOCH + 1, ..*old };
                let refused = order.take(&foreign);
                assert!(refused.is_err() || order.epoch == Some(EPOCH + 1), "{foreign:?}");
                if order.epoch != Some(EPOCH) {
                    break;
                }
            }
        }
    }
}
