//! Deltas into the prefix index, against one too simple to be wrong.
//!
//! Input: operations of three bytes each: what, whose, which block. Few workers
//! and blocks, so that they meet.

use std::collections::{BTreeMap, BTreeSet};

use warmpath_core::delta::{Delta, DeltaBuilder, Operation};
use warmpath_core::ids::{SequenceHash, WorkerSlot};
use warmpath_core::index::Index;
use warmpath_core::overlap::overlaps;

/// Most operations of one input.
const OPERATIONS_MAX: usize = 512;

/// Blocks that there are; the index may hold them all.
const BLOCKS: u8 = 64;
const BLOCKS_MAX: usize = 1_000;

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let store = [0, 1, 1, 0, 2, 1, 0, 1, 2, 0, 2, 3];
    let rest = [1, 1, 1, 2, 2, 0, 3, 0, 0, 0, 2, 1, 1, 2, 9];
    vec![store.to_vec(), rest.to_vec(), [&store[..], &rest].concat()]
}

pub(super) fn check(data: &[u8]) {
    let mut index = Index::new(BLOCKS_MAX);
    let mut book: BTreeMap<u16, BTreeSet<u8>> = BTreeMap::new();
    let mut builder = DeltaBuilder::new();
    for operation in data.as_chunks::<3>().0.iter().take(OPERATIONS_MAX) {
        let [what, whose, block] = *operation;
        let (slot, block) = (WorkerSlot(u16::from(whose % 12)), block % BLOCKS);
        let held = book.entry(slot.0).or_default();
        match what % 8 {
            0..=3 => {
                builder.push(Operation::Stored, slot, hash(block));
                held.insert(block);
            }
            4 | 5 => {
                builder.push(Operation::Removed, slot, hash(block));
                held.remove(&block);
            }
            6 => {
                builder.clear(slot);
                held.clear();
            }
            _ => {
                apply(&mut builder, &mut index);
                index.sweep(usize::from(block));
            }
        }
    }
    apply(&mut builder, &mut index);
    compare(&mut index, &book);
    while index.sweep(64) {}
    compare(&mut index, &book);
    let blocks: BTreeSet<u8> = book.values().flatten().copied().collect();
    assert_eq!(index.blocks(), blocks.len(), "nothing of cleared workers is left");
}

/// Spread, as hashes are: the index keeps 50 bits of them.
fn hash(block: u8) -> SequenceHash {
    SequenceHash(u64::from(block).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

fn apply(builder: &mut DeltaBuilder, index: &mut Index) {
    let operations = builder.operations();
    let body = builder.take();
    let delta = Delta::decode(&body).expect("our own delta");
    assert_eq!(delta.operations(), operations);
    index.apply(&delta);
}

fn compare(index: &mut Index, book: &BTreeMap<u16, BTreeSet<u8>>) {
    let mut found = Vec::new();
    for block in 0..BLOCKS {
        overlaps(index, &[hash(block)], &mut found);
        let holders: Vec<u16> = found.iter().map(|overlap| overlap.slot.0).collect();
        let expected: Vec<u16> =
            book.iter().filter(|(_, held)| held.contains(&block)).map(|(slot, _)| *slot).collect();
        assert_eq!(holders, expected, "who holds block {block}");
    }
    for (slot, held) in book {
        assert_eq!(index.blocks_of(WorkerSlot(*slot)), held.len() as u64);
    }
}
