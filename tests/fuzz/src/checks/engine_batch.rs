//! A message of an engine: decoded, applied, and its deltas decoded again.
//!
//! Input: a byte that chooses engine and model, then the message. Whatever it
//! says, the index that the deltas give is what the state says is held.

use std::collections::{BTreeMap, BTreeSet};

use warmpath_core::delta::{Delta, Operation};
use warmpath_core::hash::BlockShape;
use warmpath_core::ids::{DpRank, Worker, WorkerId, WorkerSlot};
use warmpath_core::roster::Role;
use warmpath_sidecar::adapter::{Engine, decode};
use warmpath_sidecar::limits::RANK_BLOCKS_FACTOR;
use warmpath_sidecar::state::{RankSpec, State};

use super::fixtures::{behind, captured};

/// Blocks of the engine's cache: few, so that its limit is reached.
pub(super) const CACHE_BLOCKS: u64 = 64;

/// Events up to which deltas are compared after each, and not only at the end.
const EVENTS_EACH: usize = 64;

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let messages = captured("control-sidecar/tests/fixtures");
    // vLLM and SGLang, blocks of 16 made of pages of any size.
    [0b0000_0010, 0b0000_0011].iter().flat_map(|head| behind(&[*head], &messages)).collect()
}

pub(super) fn check(data: &[u8]) {
    let Some((head, message)) = data.split_first() else { return };
    let engine = if head & 1 == 0 { Engine::Vllm } else { Engine::Sglang };
    let Ok(batch) = decode(engine, message) else { return };
    let (mut state, slot) = one_worker(*head);
    let mut index = Index::default();
    if batch.events.len() <= EVENTS_EACH {
        for event in &batch.events {
            state.apply(slot, std::slice::from_ref(event));
            index.take(&mut state);
            index.agrees(&state);
        }
    }
    state.apply(slot, &batch.events);
    index.take(&mut state);
    index.agrees(&state);
    state.replace(slot, &batch.events);
    index.take(&mut state);
    index.agrees(&state);
    state.clear(slot, true);
    index.take(&mut state);
    assert!(index.0.values().all(BTreeSet::is_empty), "cleared");
    index.agrees(&state);
}

/// A state of one worker; `head` chooses its shape.
pub(super) fn one_worker(head: u8) -> (State, WorkerSlot) {
    let block_size = [16, 4, 64, 1][usize::from(head >> 3) % 4];
    let spec = RankSpec {
        worker: Worker { id: WorkerId(1), rank: DpRank(0) },
        model: 0,
        shape: BlockShape { block_size, eagle: head & 4 != 0 },
        role: Role::Aggregated,
        namespace: 0,
        endpoint: "127.0.0.1:9".to_owned(),
        total_kv_blocks: CACHE_BLOCKS,
        max_num_batched_tokens: 0,
        taints: Vec::new(),
        small_pages: head & 2 != 0,
        has_events: true,
        incarnation: 0,
    };
    let mut state = State::new();
    let slot = state.set_workers(&[spec]).added[0].1;
    (state, slot)
}

/// A filter's index, by the book.
#[derive(Default)]
pub(super) struct Index(BTreeMap<u16, BTreeSet<u64>>);

impl Index {
    /// Applies what the state has to say.
    pub(super) fn take(&mut self, state: &mut State) {
        for body in state.all_deltas() {
            for group in Delta::decode(&body).expect("our own delta").groups() {
                let blocks = self.0.entry(group.slot.0).or_default();
                match group.operation {
                    Operation::Stored => {
                        for hash in group.hashes() {
                            assert!(blocks.insert(hash.0), "stored twice");
                        }
                    }
                    Operation::Removed => {
                        for hash in group.hashes() {
                            assert!(blocks.remove(&hash.0), "removed but not stored");
                        }
                    }
                    Operation::Cleared => blocks.clear(),
                }
            }
        }
    }

    /// Compares with what the state says.
    pub(super) fn agrees(&self, state: &State) {
        for (slot, held) in state.held() {
            let held: BTreeSet<u64> = held.keys().map(|hash| hash.0).collect();
            let ours = self.0.get(&slot.0).cloned().unwrap_or_default();
            assert_eq!(ours, held, "deltas and state");
        }
        for tracked in state.tracked() {
            let block_size = u64::from(tracked.spec.shape.block_size);
            let pages_max = CACHE_BLOCKS * RANK_BLOCKS_FACTOR * block_size;
            assert!(tracked.rank.pages() as u64 <= pages_max, "pages are bounded");
        }
    }
}
