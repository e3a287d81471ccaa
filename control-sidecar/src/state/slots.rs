//! Slots: numbers for incarnations, used again as late as possible.
//!
//! A booking or a frame of an old incarnation may still be on its way when a
//! new one appears. Fresh numbers are used up first, then the one that has been
//! free for longest.

use std::collections::VecDeque;

use warmpath_core::ids::WorkerSlot;

/// Hands out slots.
#[derive(Clone, Debug, Default)]
pub struct Slots {
    /// First number never used, and none if all have been.
    fresh: Option<u16>,
    started: bool,
    freed: VecDeque<WorkerSlot>,
}

impl Slots {
    /// A slot that is not in use; `None` if all are.
    pub fn take(&mut self) -> Option<WorkerSlot> {
        if !self.started {
            self.started = true;
            self.fresh = Some(0);
        }
        if let Some(fresh) = self.fresh {
            self.fresh = fresh.checked_add(1);
            return Some(WorkerSlot(fresh));
        }
        self.freed.pop_front()
    }

    /// Gives a slot back.
    pub fn free(&mut self, slot: WorkerSlot) {
        self.freed.push_back(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_used_once_before_any_is_used_again() {
        let mut slots = Slots::default();
        let mut seen = vec![false; 1 << 16];
        for _ in 0..1 << 16 {
            let slot = slots.take().unwrap();
            assert!(!std::mem::replace(&mut seen[usize::from(slot.0)], true));
            slots.free(slot);
        }
        // Now the one that has been free for longest.
        assert_eq!(slots.take(), Some(WorkerSlot(0)));
        assert_eq!(slots.take(), Some(WorkerSlot(1)));
        slots.free(WorkerSlot(0));
        assert_eq!(slots.take(), Some(WorkerSlot(2)));
        let in_use = (3..=u16::MAX).filter(|_| slots.take().is_some()).count();
        assert_eq!(in_use, (1 << 16) - 3);
        assert_eq!(slots.take(), Some(WorkerSlot(0)));
        assert_eq!(slots.take(), None);
    }
}
