//! Overlap: how much of a prompt each worker already has in its KV cache.
//!
//! Fifth stage of the request path: `hash` gives the prompt's sequence hashes,
//! this module counts how many of them each worker holds, `score` weighs the
//! count.
//!
//! # Terms
//!
//! - *overlap*: number of **leading** blocks a worker holds, in blocks.
//!
//! # Invariants
//!
//! 1. Overlap stops at the first missing block. A block held after a hole is
//!    worth nothing: the engine can only resume from an unbroken prefix.
//! 2. `1 <= overlap <= prompt.len()` for every worker in the answer; workers
//!    that miss the first block are not in it.

use crate::ids::{SequenceHash, WorkerSlot};
use crate::index::Index;

/// Overlap of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// The worker.
    pub slot: WorkerSlot,
    /// Leading blocks it holds.
    pub blocks: u32,
}

/// Counts the leading blocks of a prompt that each worker holds.
///
/// - `prompt`: one sequence hash per complete block, in prompt order.
/// - `out`: is cleared first; then holds each worker with at least one block,
///   in ascending order of slots.
///
/// # Cost
///
/// One look-up a block up to the longest overlap; where neighbouring blocks
/// are held by the same workers nothing else.
pub fn overlaps(index: &mut Index, prompt: &[SequenceHash], out: &mut Vec<Overlap>) {
    out.clear();
    let mut blocks = 0_u32;
    let mut hashes = prompt.iter();
    let Some(mut set) = hashes.next().and_then(|first| index.holders(*first)) else {
        return;
    };
    let mut alive = index.set_members(set).to_vec();
    let mut settled = Vec::with_capacity(alive.len());
    blocks += 1;
    for hash in hashes {
        let Some(next) = index.holders(*hash) else { break };
        if next != set {
            let holders = index.set_members(next);
            alive.retain(|member| {
                let stays = holders.binary_search(member).is_ok();
                if !stays {
                    settled.push((*member, blocks));
                }
                stays
            });
            if alive.is_empty() {
                break;
            }
            set = next;
        }
        blocks += 1;
    }
    settled.extend(alive.iter().map(|member| (*member, blocks)));
    for (member, blocks) in settled {
        if let Some(slot) = index.slot_of(member) {
            out.push(Overlap { slot, blocks });
        }
    }
    out.sort_unstable_by_key(|overlap| overlap.slot);
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    /// Spreads small numbers over the tables as real hashes are.
    fn hash(n: u64) -> SequenceHash {
        SequenceHash(xxhash_rust::xxh3::xxh3_64(&n.to_le_bytes()))
    }

    fn answer(index: &mut Index, prompt: &[u64]) -> Vec<(u16, u32)> {
        let prompt: Vec<SequenceHash> = prompt.iter().map(|n| hash(*n)).collect();
        let mut out = Vec::new();
        overlaps(index, &prompt, &mut out);
        out.iter().map(|overlap| (overlap.slot.0, overlap.blocks)).collect()
    }

    /// The reference walk that Dynamo's radix tree answers: two workers share
    /// a prefix and part ways.
    #[test]
    fn shared_prefix_then_parting() {
        let mut index = Index::new(100);
        for n in [1, 2, 3] {
            index.store(WorkerSlot(1), hash(n));
        }
        for n in [1, 2, 24] {
            index.store(WorkerSlot(2), hash(n));
        }
        assert_eq!(answer(&mut index, &[1, 2, 3, 34]), [(1, 3), (2, 2)]);
        assert_eq!(answer(&mut index, &[1, 2, 24]), [(1, 2), (2, 3)]);
        assert_eq!(answer(&mut index, &[7, 2, 3]), []);
        assert_eq!(answer(&mut index, &[]), []);
    }

    /// Goal: a hole ends the overlap, wherever it is, for every worker at once.
    /// Method: every way in which two workers hold or miss 6 blocks (4096
    /// cases) against a count too simple to be wrong.
    #[test]
    fn overlap_ends_at_the_first_hole() {
        for case in 0..4096_u64 {
            let held = [case & 63, case >> 6];
            let mut index = Index::new(100);
            for (slot, held) in (0_u16..).zip(held) {
                for n in (0..6).filter(|n| held >> n & 1 == 1) {
                    index.store(WorkerSlot(slot), hash(n));
                }
            }
            let expected: Vec<(u16, u32)> = (0_u16..)
                .zip(held.map(u64::trailing_ones))
                .filter(|(_, overlap)| *overlap > 0)
                .collect();
            assert_eq!(answer(&mut index, &[0, 1, 2, 3, 4, 5]), expected, "case {case:#o}");
        }
    }

    #[test]
    fn a_cleared_worker_is_not_credited_before_it_is_swept() {
        let mut index = Index::new(100);
        for n in [1, 2] {
            index.store(WorkerSlot(1), hash(n));
            index.store(WorkerSlot(2), hash(n));
        }
        index.clear(WorkerSlot(1));
        assert_eq!(answer(&mut index, &[1, 2]), [(2, 2)]);
        // The same slot again, another incarnation with only one block.
        index.store(WorkerSlot(1), hash(1));
        assert_eq!(answer(&mut index, &[1, 2]), [(1, 1), (2, 2)]);
        while index.sweep(64) {}
        assert_eq!(answer(&mut index, &[1, 2]), [(1, 1), (2, 2)]);
    }
}
