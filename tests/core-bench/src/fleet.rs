//! Fleets: replicas that have followed a feed.

use warmpath_core::choose::Random;
use warmpath_core::delta::{DeltaBuilder, Operation, SnapshotStart};
use warmpath_core::entry::Entry;
use warmpath_core::frame::{Frame, Kind};
use warmpath_core::ids::{DpRank, SequenceHash, Worker, WorkerId, WorkerSlot};
use warmpath_core::limits::DELTA_OPERATIONS_MAX;
use warmpath_core::replica::Replica;
use warmpath_core::roster::{Parity, Role, Roster, RosterWorker, TierSlots};

use crate::Clock;

const EPOCH: u64 = 7;

/// The hash of a numbered block.
pub(crate) fn hash(block: u64) -> SequenceHash {
    SequenceHash(Random::seeded(block.wrapping_mul(0x9e37_79b9_7f4a_7c15)).next_u64())
}

/// A replica and its place in the log.
pub(crate) struct Fleet {
    pub(crate) replica: Replica,
    builder: DeltaBuilder,
    sequence: u64,
    /// Encoded entries that wait.
    entries: Vec<Vec<u8>>,
    waiting: usize,
    /// How long applying took so far, and how many operations it were.
    pub(crate) applied_ns: f64,
    pub(crate) applied: usize,
    /// The longest application of one entry.
    pub(crate) longest_ns: f64,
}

/// Operations that are made before they are applied, so that making them is not
/// measured and needs little memory.
const WAITING_MAX: usize = 64 * DELTA_OPERATIONS_MAX;

impl Fleet {
    /// Workers 0, 1, 2 … that hold nothing; the index is live.
    pub(crate) fn new(workers: u16, blocks_max: usize) -> Self {
        let mut replica = Replica::new(blocks_max);
        let roster = Roster { workers: (0..workers).map(worker).collect(), adapters: Vec::new() };
        replica.apply_entry(&feed(Kind::Roster, 1, roster.encode()));
        replica.begin_snapshot();
        let start = SnapshotStart { blocks: 0 }.encode();
        replica.apply_snapshot_frame(&frame(Kind::SnapshotStart, 1, &start));
        replica.apply_snapshot_frame(&frame(Kind::SnapshotEnd, 1, &[]));
        assert!(replica.is_live());
        Self {
            replica,
            builder: DeltaBuilder::new(),
            sequence: 1,
            entries: Vec::new(),
            waiting: 0,
            applied_ns: 0.0,
            applied: 0,
            longest_ns: 0.0,
        }
    }

    /// What happens to blocks, in order.
    pub(crate) fn push(
        &mut self,
        operation: Operation,
        slot: u16,
        blocks: impl Iterator<Item = u64>,
        clock: &dyn Clock,
    ) {
        for block in blocks {
            self.builder.push(operation, WorkerSlot(slot), hash(block));
            self.waiting += 1;
            if self.builder.is_full() {
                self.cut();
            }
        }
        if self.waiting >= WAITING_MAX {
            self.apply(clock);
        }
    }

    fn cut(&mut self) {
        if !self.builder.is_empty() {
            self.sequence += 1;
            self.entries.push(feed(Kind::Delta, self.sequence, self.builder.take()));
        }
    }

    /// Applies what waits, through the door that entries of the ring take.
    pub(crate) fn apply(&mut self, clock: &dyn Clock) {
        self.cut();
        let before = self.replica.index().counters().operations;
        let mut from = clock.now_ns();
        for entry in self.entries.drain(..) {
            self.replica.apply_entry(&entry);
            let now = clock.now_ns();
            self.longest_ns = self.longest_ns.max(now - from);
            self.applied_ns += now - from;
            from = now;
        }
        let applied = self.replica.index().counters().operations - before;
        assert_eq!(applied, self.waiting as u64, "operations got lost");
        self.applied += self.waiting;
        self.waiting = 0;
        assert!(self.replica.is_live());
    }

    /// Forgets how long applying took.
    pub(crate) fn reset(&mut self) {
        (self.applied_ns, self.applied, self.longest_ns) = (0.0, 0, 0.0);
    }
}

fn frame(kind: Kind, sequence: u64, body: &[u8]) -> Vec<u8> {
    Frame { kind, epoch: EPOCH, sequence, body }.encode()
}

fn feed(kind: Kind, sequence: u64, body: Vec<u8>) -> Vec<u8> {
    Entry::Feed(&frame(kind, sequence, &body)).encode()
}

fn worker(slot: u16) -> RosterWorker {
    RosterWorker {
        slot: WorkerSlot(slot),
        worker: Worker { id: WorkerId(u64::from(slot) + 1000), rank: DpRank(0) },
        model: 0,
        role: Role::Aggregated,
        parity: Parity::Exact,
        namespace: 0,
        endpoint: format!("10.1.{}.{}:8000", slot >> 8, slot & 255),
        total_kv_blocks: 100_000,
        max_num_batched_tokens: 8192,
        taints: Vec::new(),
        tiers: TierSlots::default(),
    }
}
