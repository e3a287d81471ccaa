//! Outbox: changes on their way into delta frames.

use std::collections::VecDeque;

use warmpath_core::delta::{DeltaBuilder, Operation};
use warmpath_core::ids::{SequenceHash, WorkerSlot};

/// Collects operations into bodies of delta frames.
#[derive(Clone, Debug, Default)]
pub struct Outbox {
    open: DeltaBuilder,
    full: VecDeque<Vec<u8>>,
}

impl Outbox {
    /// A worker now holds a block.
    pub fn stored(&mut self, slot: WorkerSlot, hash: SequenceHash) {
        self.open.push(Operation::Stored, slot, hash);
        self.close_if_full();
    }

    /// A worker no longer holds a block.
    pub fn removed(&mut self, slot: WorkerSlot, hash: SequenceHash) {
        self.open.push(Operation::Removed, slot, hash);
        self.close_if_full();
    }

    /// A worker no longer holds anything.
    pub fn clear(&mut self, slot: WorkerSlot) {
        self.open.clear(slot);
        self.close_if_full();
    }

    fn close_if_full(&mut self) {
        if self.open.is_full() {
            self.full.push_back(self.open.take());
        }
    }

    /// Drops what has been collected.
    pub(super) fn discard(&mut self) {
        *self = Self::default();
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.open.is_empty() && self.full.is_empty()
    }

    /// Bodies that are full.
    pub fn full(&mut self) -> Vec<Vec<u8>> {
        self.full.drain(..).collect()
    }

    /// All bodies, the last one full or not.
    pub fn all(&mut self) -> Vec<Vec<u8>> {
        if !self.open.is_empty() {
            self.full.push_back(self.open.take());
        }
        self.full()
    }
}
