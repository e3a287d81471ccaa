//! The index against a map of sets that is too simple to be wrong.

use super::*;
use std::collections::{BTreeMap, BTreeSet};

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

fn hash(n: u64) -> SequenceHash {
    SequenceHash(xxhash_rust::xxh3::xxh3_64(&n.to_le_bytes()))
}

#[derive(Default)]
struct Naive(BTreeMap<u64, BTreeSet<u16>>);

impl Naive {
    fn clear(&mut self, slot: u16) {
        for holders in self.0.values_mut() {
            holders.remove(&slot);
        }
        self.0.retain(|_, holders| !holders.is_empty());
    }
}

fn holders(index: &mut Index, n: u64) -> BTreeSet<u16> {
    let Some(set) = index.holders(hash(n)) else { return BTreeSet::new() };
    index
        .set_members(set)
        .iter()
        .filter_map(|member| index.slot_of(*member))
        .map(|slot| slot.0)
        .collect()
}

fn agree(index: &mut Index, naive: &Naive, blocks: u64) {
    for n in 0..blocks {
        let expected = naive.0.get(&n).cloned().unwrap_or_default();
        assert_eq!(holders(index, n), expected, "block {n}");
    }
}

/// A fixed stream of numbers, so that the same case runs on every target.
struct Lcg(u64);

impl Lcg {
    fn next(&mut self, below: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

/// Goal: room that was made beforehand changes no answer, is made in bounded
/// pieces, and is enough: few tables grow while what was announced comes.
#[test]
fn room_made_beforehand_changes_no_answer() {
    const BLOCKS: u64 = 200_000;
    let (mut plain, mut roomy) = (Index::new(1_000_000), Index::new(1_000_000));
    let mut calls = 1;
    while !roomy.reserve(usize::try_from(BLOCKS).unwrap(), 20_000) {
        calls += 1;
    }
    assert!((10..=20).contains(&calls), "made in {calls} pieces");
    assert!(roomy.reserve(usize::try_from(BLOCKS).unwrap(), 20_000), "nothing is left to do");
    let bytes = roomy.bytes();
    for n in 0..BLOCKS {
        for index in [&mut plain, &mut roomy] {
            index.store(WorkerSlot((n % 7) as u16), hash(n));
        }
    }
    // Tables of 200 blocks are uneven, and a few grow; all would be a quarter.
    assert!(roomy.bytes() < bytes + bytes / 20, "{bytes} bytes became {}", roomy.bytes());
    for n in 0..BLOCKS + 1_000 {
        assert_eq!(holders(&mut plain, n), holders(&mut roomy, n), "block {n}");
    }
}

/// Goal: any mix of events leaves the index as the truth is.
/// Method: 200 000 random operations of 12 workers over 3 000 blocks, compared
/// block by block now and then; sweeps run in between in small steps.
#[test]
fn random_operations_agree_with_the_naive_index() {
    let mut random = Lcg(1);
    let (mut index, mut naive) = (Index::new(1_000_000), Naive::default());
    for step in 0..200_000_u32 {
        let slot = u16::try_from(random.next(12)).unwrap();
        let block = random.next(3_000);
        match random.next(1_000) {
            0 => {
                index.clear(WorkerSlot(slot));
                naive.clear(slot);
            }
            1..600 => {
                index.store(WorkerSlot(slot), hash(block));
                naive.0.entry(block).or_default().insert(slot);
            }
            _ => {
                index.remove(WorkerSlot(slot), hash(block));
                if let Some(holders) = naive.0.get_mut(&block) {
                    holders.remove(&slot);
                }
                naive.0.retain(|_, holders| !holders.is_empty());
            }
        }
        index.sweep(3);
        if step % 20_000 == 0 {
            agree(&mut index, &naive, 3_000);
        }
    }
    while index.sweep(SHARDS) {}
    agree(&mut index, &naive, 3_000);
    assert_eq!(index.blocks(), naive.0.len());
    for slot in 0..12 {
        let expected = naive.0.values().filter(|holders| holders.contains(&slot)).count();
        assert_eq!(index.blocks_of(WorkerSlot(slot)), expected as u64, "slot {slot}");
    }
    assert_eq!(index.counters().refused, 0);
}

#[test]
fn storing_twice_and_removing_the_absent_change_nothing() {
    let mut index = Index::new(10);
    index.remove(WorkerSlot(0), hash(1));
    index.store(WorkerSlot(0), hash(1));
    index.store(WorkerSlot(0), hash(1));
    assert_eq!((index.blocks(), index.blocks_of(WorkerSlot(0))), (1, 1));
    index.remove(WorkerSlot(1), hash(1));
    assert_eq!(index.blocks(), 1);
    index.remove(WorkerSlot(0), hash(1));
    assert_eq!((index.blocks(), index.blocks_of(WorkerSlot(0))), (0, 0));
}

/// Goal: the cap holds, blocks in use survive, and what is dropped is counted.
#[test]
fn the_cap_evicts_what_is_not_used() {
    const BLOCKS_MAX: usize = 20_000;
    let mut index = Index::new(BLOCKS_MAX);
    let kept = 0..1_000_u64;
    for n in kept.clone() {
        index.store(WorkerSlot(0), hash(n));
    }
    for n in 1_000..200_000 {
        index.store(WorkerSlot(1), hash(n));
        if n % 200 == 0 {
            for n in kept.clone() {
                index.holders(hash(n));
            }
        }
    }
    assert!(index.blocks() <= BLOCKS_MAX, "{} blocks", index.blocks());
    let evicted = index.counters().evicted;
    assert_eq!(evicted + index.blocks() as u64 + index.counters().refused, 200_000);
    let survived = kept.filter(|n| index.holders(hash(*n)).is_some()).count();
    assert!(survived > 990, "{survived} of 1000 used blocks survived");
    assert_eq!(
        index.blocks_of(WorkerSlot(0)) + index.blocks_of(WorkerSlot(1)),
        index.blocks() as u64
    );
}

/// Goal: memory per block stays what the design promises.
#[test]
fn a_block_costs_at_most_16_bytes() {
    let mut index = Index::new(usize::MAX);
    for blocks in [200_000_u64, 300_000, 400_000] {
        for n in (index.blocks() as u64)..blocks {
            index.store(WorkerSlot(u16::try_from(n / 10_000).unwrap()), hash(n));
        }
        let per_block = index.bytes() as f64 / index.blocks() as f64;
        assert!(per_block <= 16.0, "{per_block:.1} bytes a block at {blocks}");
    }
}

/// Goal: slots can come and go for ever.
/// Method: more incarnations than members have numbers.
#[test]
fn members_are_used_again() {
    let mut index = Index::new(1_000);
    for round in 0..70_000_u64 {
        let slot = WorkerSlot(u16::try_from(round % 3).unwrap());
        index.store(slot, hash(round % 7));
        index.clear(slot);
        index.sweep(SHARDS);
    }
    while index.sweep(SHARDS) {}
    assert_eq!(index.blocks(), 0);
    assert_eq!(index.counters().refused, 0);
}
