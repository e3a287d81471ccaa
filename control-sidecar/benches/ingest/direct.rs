//! The direct path, on one thread: message, events, state, bodies of deltas.

use std::collections::BTreeSet;
use std::hint::black_box;
use std::time::{Duration, Instant};

use warmpath_core::delta::{Delta, Operation};
use warmpath_core::hash::BlockShape;
use warmpath_core::ids::{DpRank, SequenceHash, Worker, WorkerId, WorkerSlot};
use warmpath_core::roster::Role;
use warmpath_sidecar::adapter::{Engine, decode};
use warmpath_sidecar::state::counts::Notice;
use warmpath_sidecar::state::{RankSpec, State};

use crate::payloads::{BLOCK_SIZE, CACHE_BLOCKS, Traffic};

/// Cycles that generic decoding is measured over.
const BASELINE_CYCLES: u64 = 4;

/// Block events a second.
pub(crate) struct Measured {
    /// By the clock.
    pub(crate) wall: f64,
    /// Of the thread's own time on a processor: what the machine's other work
    /// does not change.
    pub(crate) cpu: f64,
}

/// Both clocks of this thread.
struct Watch {
    wall: Instant,
    cpu: Duration,
}

impl Watch {
    fn start() -> Self {
        Self { wall: Instant::now(), cpu: cpu_time() }
    }

    fn measure(&self, block_events: u64) -> Measured {
        let (wall, cpu) = (self.wall.elapsed(), cpu_time() - self.cpu);
        let rate = |time: Duration| block_events as f64 / time.as_secs_f64();
        Measured { wall: rate(wall), cpu: rate(cpu) }
    }
}

/// This thread's time on a processor so far.
fn cpu_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux");
    let nanoseconds = text.split(' ').next().expect("a field").parse().expect("a number");
    Duration::from_nanos(nanoseconds)
}

fn one_worker() -> (State, WorkerSlot) {
    let spec = RankSpec {
        worker: Worker { id: WorkerId(7), rank: DpRank(0) },
        model: 0,
        shape: BlockShape { block_size: BLOCK_SIZE, eagle: false },
        role: Role::Aggregated,
        endpoint: "127.0.0.1:9".to_owned(),
        total_kv_blocks: CACHE_BLOCKS,
        max_num_batched_tokens: 0,
        taints: Vec::new(),
        small_pages: false,
        has_events: true,
        incarnation: 0,
        namespace: 0,
    };
    let mut state = State::new();
    let slot = state.set_workers(&[spec]).added[0].1;
    (state, slot)
}

/// One message through adapter and state.
fn take(state: &mut State, slot: WorkerSlot, payload: &[u8]) {
    let batch = decode(Engine::Vllm, payload).expect("a batch");
    assert!(batch.skipped.is_empty(), "nothing is skipped");
    state.apply(slot, &batch.events);
}

/// Operations in the bodies that are due.
fn drain(bodies: &[Vec<u8>]) -> u64 {
    let operations = |body: &Vec<u8>| Delta::decode(body).expect("our own").operations() as u64;
    bodies.iter().map(operations).sum()
}

/// Whole cycles until `block_events` have passed.
pub(crate) fn run(traffic: &Traffic, block_events: u64) -> Measured {
    let (mut state, slot) = one_worker();
    let mut operations = 0;
    for payload in &traffic.first {
        take(&mut state, slot, payload);
        operations += drain(&state.full_deltas());
    }
    let cycles = block_events.div_ceil(traffic.cycle_events);
    let watch = Watch::start();
    for _ in 0..cycles {
        for payload in &traffic.cycle {
            take(&mut state, slot, payload);
            operations += drain(&state.full_deltas());
        }
    }
    let measured = watch.measure(cycles * traffic.cycle_events);
    operations += drain(&state.all_deltas());
    assert_eq!(operations, traffic.first_events + cycles * traffic.cycle_events);
    agrees(&state, traffic);
    measured
}

fn agrees(state: &State, traffic: &Traffic) {
    let held: BTreeSet<SequenceHash> = state.held()[0].1.keys().copied().collect();
    assert_eq!(held, traffic.held, "the cache holds what it should");
    let counts = state.counts();
    for notice in Notice::ALL {
        assert_eq!(counts.of(notice), 0, "{notice:?}");
    }
}

/// The deltas of one cycle, applied block by block, give what is held.
pub(crate) fn checked_by_the_book(traffic: &[Traffic]) {
    for traffic in traffic {
        let (mut state, slot) = one_worker();
        let mut held: BTreeSet<SequenceHash> = BTreeSet::new();
        for payload in traffic.first.iter().chain(&traffic.cycle) {
            take(&mut state, slot, payload);
            for body in state.all_deltas() {
                for group in Delta::decode(&body).expect("our own").groups() {
                    for hash in group.hashes() {
                        let changed = match group.operation {
                            Operation::Stored => held.insert(hash),
                            Operation::Removed => held.remove(&hash),
                            Operation::Cleared => false,
                        };
                        assert!(changed, "each operation changes something");
                    }
                }
            }
        }
        assert_eq!(held, traffic.held);
        agrees(&state, traffic);
    }
}

/// The same messages decoded into a tree by a generic decoder, and dropped.
pub(crate) fn generic_decoding(traffic: &Traffic) -> Measured {
    let watch = Watch::start();
    for _ in 0..BASELINE_CYCLES {
        for payload in &traffic.cycle {
            let mut rest = &payload[..];
            black_box(rmpv::decode::read_value(&mut rest).expect("MessagePack"));
        }
    }
    watch.measure(BASELINE_CYCLES * traffic.cycle_events)
}
