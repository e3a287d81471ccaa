//! Pace: when changes that were collected are written as a frame.
//!
//! The first change after a quiet time is written at once; those that follow
//! share a frame for as long as a frame must wait for the one before. So an event
//! of an idle engine waits for nothing, and a flood makes no flood of frames.

use std::time::Duration;

use tokio::time::Instant;

/// When the next frame is due.
#[derive(Debug)]
pub struct Pace {
    every: Duration,
    free_at: Option<Instant>,
    due_at: Option<Instant>,
}

impl Pace {
    /// Nothing is collected.
    ///
    /// - `every`: shortest time between two frames.
    #[must_use]
    pub fn new(every: Duration) -> Self {
        Self { every, free_at: None, due_at: None }
    }

    /// Something is collected. Returns whether it is due.
    pub fn is_due(&mut self, now: Instant) -> bool {
        let free_at = self.free_at.unwrap_or(now);
        *self.due_at.get_or_insert(free_at.max(now)) <= now
    }

    /// When what is collected is due; `None` if there is nothing.
    #[must_use]
    pub fn due_at(&self) -> Option<Instant> {
        self.due_at
    }

    /// All that was collected is written.
    pub fn written(&mut self, now: Instant) {
        self.due_at = None;
        self.free_at = Some(now + self.every);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_in_quiet_times_waits_for_nothing() {
        let (mut pace, now) = (Pace::new(Duration::from_millis(1)), Instant::now());
        assert!(pace.is_due(now));
        pace.written(now);
        assert_eq!(pace.due_at(), None);
        let later = now + Duration::from_millis(5);
        assert!(pace.is_due(later));
    }

    #[test]
    fn changes_of_a_flood_share_frames() {
        let (mut pace, start) = (Pace::new(Duration::from_millis(1)), Instant::now());
        let mut written = 0;
        for micros in 0..10_000 {
            let now = start + Duration::from_micros(micros);
            if pace.is_due(now) {
                written += 1;
                pace.written(now);
            } else {
                assert!(pace.due_at().is_some_and(|at| at <= now + Duration::from_millis(1)));
            }
        }
        assert_eq!(written, 10);
    }
}
