//! Lower tiers: against Dynamo's answers, and what Dynamo cannot be asked for.

use serde_json::Value;
use warmpath_core::index::Index as CoreIndex;
use warmpath_core::overlap::{LowerTiers, tiered_overlaps};

use super::*;

/// A filter: its index, and the tiers of its roster.
struct Filter {
    index: CoreIndex,
    tiers: LowerTiers,
}

impl Filter {
    fn new() -> Self {
        Self { index: CoreIndex::new(10_000), tiers: LowerTiers::default() }
    }

    /// Takes what the state has to say.
    fn take(&mut self, state: &mut State) {
        for body in state.all_deltas() {
            self.index.apply(&Delta::decode(&body).unwrap());
        }
        if state.take_roster_changed() {
            self.tiers = LowerTiers::of(&state.roster().0.workers);
        }
    }

    /// Slot, device, host, and disk with external storage.
    fn answer(&mut self, prompt: &[BlockHash]) -> Vec<[u64; 4]> {
        let mut before = None;
        let hashes: Vec<SequenceHash> = prompt
            .iter()
            .map(|hash| {
                let block = warmpath_core::hash::sequence_hash(before, *hash);
                before = Some(block);
                block
            })
            .collect();
        let mut out = Vec::new();
        tiered_overlaps(&mut self.index, &self.tiers, &hashes, &mut out);
        let row = |it: &warmpath_core::overlap::Overlap| {
            [it.slot.0.into(), it.blocks.into(), it.host_blocks.into(), it.disk_blocks.into()]
        };
        out.iter().map(row).collect()
    }
}

/// A block's hash; the fixture numbers them.
fn block_of(tokens: &Value) -> BlockHash {
    BlockHash(tokens.as_u64().unwrap().wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

fn names(list: &Value) -> Vec<EngineHash> {
    list.as_array().unwrap().iter().map(|it| EngineHash(it.as_u64().unwrap())).collect()
}

const MEDIA: [Medium; 4] = [Medium::Device, Medium::HostPinned, Medium::Disk, Medium::External];

fn event_of(step: &[Value]) -> KvEvent {
    let medium = |at: usize| MEDIA[step[at].as_u64().unwrap() as usize];
    match step[0].as_str().unwrap() {
        "stored" => KvEvent::Hashed(Hashed {
            blocks: step[4]
                .as_array()
                .unwrap()
                .iter()
                .map(|it| (EngineHash(it[0].as_u64().unwrap()), block_of(&it[1])))
                .collect(),
            parent: step[3].as_u64().map(EngineHash),
            medium: medium(2),
        }),
        "removed" => KvEvent::Removed(Removed {
            pages: names(&step[3]),
            medium: medium(2),
            group: Group::default(),
        }),
        _ => KvEvent::Cleared,
    }
}

fn of_dynamo() -> Vec<Value> {
    let path = format!("{}/tests/fixtures/dynamo-1.6.1-tiers.json", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).unwrap();
    let file: Value = serde_json::from_str(&text).unwrap();
    file["cases"].as_array().unwrap().clone()
}

/// Goal: the same events give every worker the overlap and extensions that they
/// give it in Dynamo.
/// Method: the fixture's steps, which Dynamo's own indexers were given and
/// asked; those of the last cases store blocks whose parents are not known.
#[test]
fn overlaps_are_those_of_dynamo() {
    let (mut asked, mut extended, mut orphans) = (0, [0; 3], 0);
    for (number, case) in of_dynamo().iter().enumerate() {
        let mut state = State::new();
        state.set_workers(&[spec(0, 4), spec(1, 4), spec(2, 4)]);
        let mut filter = Filter::new();
        for (at, step) in case["steps"].as_array().unwrap().iter().enumerate() {
            let step = step.as_array().unwrap();
            if step[0] != "asked" {
                let slot = WorkerSlot(step[1].as_u64().unwrap() as u16);
                state.apply(slot, &[event_of(step)]);
                orphans += state.tracked().map(|it| it.rank.orphans()).sum::<usize>();
                continue;
            }
            let prompt: Vec<BlockHash> = step[1].as_array().unwrap().iter().map(block_of).collect();
            let expected: Vec<[u64; 4]> = serde_json::from_value(step[2].clone()).unwrap();
            filter.take(&mut state);
            assert_eq!(filter.answer(&prompt), expected, "case {number}, step {at}");
            asked += 1;
            for row in expected {
                for (count, blocks) in extended.iter_mut().zip(&row[1..]) {
                    *count += u32::from(*blocks > 0);
                }
            }
        }
    }
    // Otherwise little would have been compared.
    assert!(asked > 100 && orphans > 50, "{asked} asked, {orphans} orphans");
    assert!(extended.iter().all(|count| *count > 50), "{extended:?}");
}

fn hashed(medium: Medium, parent: Option<u64>, blocks: &[u64]) -> KvEvent {
    let block = |name: &u64| (EngineHash(*name), BlockHash(name.wrapping_mul(0x9e37_79b9)));
    let blocks = blocks.iter().map(block).collect();
    KvEvent::Hashed(Hashed { blocks, parent: parent.map(EngineHash), medium })
}

fn removed_from(medium: Medium, pages: &[u64]) -> KvEvent {
    let pages = pages.iter().copied().map(EngineHash).collect();
    KvEvent::Removed(Removed { pages, medium, group: Group::default() })
}

fn blocks(state: &State) -> [usize; 4] {
    let tracked = state.tracked().next().unwrap();
    MEDIA.map(|medium| tracked.rank.blocks(medium))
}

/// Goal: a dump of a lower tier, which comes block by block and in any order, is
/// taken in whole; only what differs goes into the feed.
#[test]
fn a_dump_in_any_order_is_taken_in_whole() {
    let (mut state, slot) = one_worker(4);
    let run: Vec<u64> = (1..=40).collect();
    state.apply(
        slot,
        &[
            hashed(Medium::Device, None, &run[..10]),
            hashed(Medium::HostPinned, Some(10), &run[10..30]),
            hashed(Medium::Disk, Some(30), &run[30..]),
        ],
    );
    let mut index = Index::default();
    index.apply(state.all_deltas());
    assert_eq!(blocks(&state), [10, 20, 10, 0]);
    let single = |medium, n: u64| hashed(medium, (n > 1).then(|| n - 1), &[n]);
    let mut dump: Vec<KvEvent> = (31..=40).rev().map(|n| single(Medium::Disk, n)).collect();
    dump.extend((0..20).map(|n| single(Medium::HostPinned, 11 + n * 7 % 20)));
    dump.extend((1..=10).map(|n| single(Medium::Device, n)));
    state.replace(slot, &dump);
    assert_eq!(blocks(&state), [10, 20, 10, 0]);
    assert_eq!(state.tracked().next().unwrap().rank.orphans(), 0);
    assert!(!state.has_deltas(), "nothing differs");
    state.replace(slot, &dump[1..]);
    index.apply(state.all_deltas());
    let disk = state.tracked().next().unwrap().tiers.disk.unwrap();
    assert_eq!(index.of(disk).len(), 9);
}

/// Goal: an orphan that is taken back does not come in with its parent, and one
/// that found another parent is taken back like any other.
#[test]
fn orphans_come_and_go() {
    let (mut state, slot) = one_worker(4);
    state.apply(
        slot,
        &[hashed(Medium::Disk, Some(7), &[8, 9]), hashed(Medium::Disk, Some(7), &[5])],
    );
    assert_eq!(state.counts().of(Notice::LowerTierOrphan), 2);
    assert_eq!(state.tracked().next().unwrap().rank.orphans(), 3);
    state.apply(slot, &[removed_from(Medium::Disk, &[8])]);
    assert_eq!(state.counts().of(Notice::RemovedUnknown), 0);
    // Block 9 hangs on 8, which has gone; 5 finds its parent in another tier.
    state.apply(slot, &[hashed(Medium::HostPinned, None, &[7])]);
    assert_eq!(blocks(&state), [0, 1, 1, 0]);
    // Said again behind a parent that is known.
    state.apply(slot, &[hashed(Medium::Disk, Some(5), &[9]), hashed(Medium::Disk, Some(7), &[8])]);
    assert_eq!(blocks(&state), [0, 1, 3, 0]);
    assert_eq!(state.tracked().next().unwrap().rank.orphans(), 0);
    state.apply(slot, &[removed_from(Medium::Disk, &[9])]);
    assert_eq!(blocks(&state), [0, 1, 2, 0]);
    // On the device the parent must be there at once.
    state.apply(slot, &[hashed(Medium::Device, Some(7), &[8])]);
    assert_eq!(state.counts().of(Notice::ParentUnknown), 1);
    state.apply(slot, &[hashed(Medium::Disk, Some(77), &[78]), KvEvent::Cleared]);
    assert_eq!(state.tracked().next().unwrap().rank.orphans(), 0);
    assert_eq!(blocks(&state), [0; 4]);
}

/// Goal: slots of tiers are given when something is stored there, are in the
/// roster, and are cleared and given back with the worker.
#[test]
fn tiers_have_slots_of_their_own() {
    let mut state = State::new();
    let slots: Vec<WorkerSlot> =
        state.set_workers(&[spec(1, 4), spec(2, 4)]).added.iter().map(|it| it.1).collect();
    state.take_roster_changed();
    state.apply(slots[0], &[hashed(Medium::Device, None, &[1]), removed_from(Medium::Disk, &[1])]);
    state.take_roster_changed();
    assert!(state.roster().0.workers[0].tiers.is_empty());
    state.apply(slots[1], &[hashed(Medium::HostPinned, None, &[1])]);
    assert!(state.take_roster_changed());
    state
        .apply(slots[0], &[hashed(Medium::External, None, &[1]), hashed(Medium::Disk, None, &[1])]);
    let tiers: Vec<TierSlots> = state.roster().0.workers.iter().map(|it| it.tiers).collect();
    let slot = |n| Some(WorkerSlot(n));
    assert_eq!(tiers[0], TierSlots { host: None, disk: slot(4), external: slot(3) });
    assert_eq!(tiers[1], TierSlots { host: slot(2), ..TierSlots::default() });
    let mut index = Index::default();
    index.apply(state.all_deltas());
    for slot in [0, 2, 3, 4] {
        assert_eq!(index.of(WorkerSlot(slot)).len(), 1, "slot {slot}");
    }
    let snapshot: Vec<(u16, usize)> =
        state.held().iter().map(|(slot, held)| (slot.0, held.len())).collect();
    assert_eq!(snapshot, [(0, 1), (4, 1), (3, 1), (1, 0), (2, 1)]);
    state.set_workers(&[spec(2, 4)]);
    index.apply(state.all_deltas());
    for (slot, blocks) in [(0, 0), (2, 1), (3, 0), (4, 0)] {
        assert_eq!(index.of(WorkerSlot(slot)).len(), blocks, "slot {slot}");
    }
}

/// Goal: what an engine says without tokens is known from where it was said with
/// them; whole blocks and small pages; its removal leaves the device alone.
#[test]
fn offloaded_pages_are_known_by_their_names() {
    let tokens: Vec<TokenId> = (0..8).collect();
    for (pages, page_size) in [(vec![1, 2], 4), (vec![1, 2, 3, 4], 2)] {
        let (mut state, slot) = one_worker(4);
        let offloaded = |pages: &[u64]| {
            let medium = Medium::HostPinned;
            KvEvent::Stored(Stored { medium, ..stored(pages, None, &[], 0) })
        };
        state.apply(slot, &[KvEvent::Stored(stored(&pages, None, &tokens, page_size))]);
        // The last page is not known anywhere.
        let named = [&pages[..], &[99]].concat();
        state.apply(slot, &[offloaded(&named)]);
        assert_eq!(blocks(&state), [2, 2, 0, 0]);
        assert_eq!(state.counts().of(Notice::Placeholder), 1);
        let (device, host) = (held(&state, slot), state.held().remove(1).1);
        assert_eq!(device, host.keys().map(|hash| hash.0).collect());
        state.apply(slot, &[removed(&pages)]);
        assert_eq!(blocks(&state), [0, 2, 0, 0]);
        state.apply(slot, &[removed_from(Medium::HostPinned, &[pages[0], 99])]);
        assert_eq!(blocks(&state), [0, 1, 0, 0]);
        assert_eq!(state.counts().of(Notice::RemovedUnknown), 0);
        // What follows on the host continues a chain that is only there.
        let next = [20, 21];
        let child = Stored {
            medium: Medium::HostPinned,
            ..stored(&next[..4 / page_size as usize], pages.last().copied(), &[7; 4], page_size)
        };
        state.apply(slot, &[KvEvent::Stored(child)]);
        let all = [&tokens[..], &[7; 4]].concat();
        let last = *hashes(&all, PLAIN, Salt::default()).last().unwrap();
        assert!(state.held()[1].1.contains_key(&SequenceHash(last)), "page size {page_size}");
    }
}

#[test]
fn pages_of_another_size_below_the_device_say_nothing_of_it() {
    let (mut state, slot) = one_worker(4);
    let tokens: Vec<TokenId> = (0..8).collect();
    let large = Stored { medium: Medium::HostPinned, ..stored(&[1], None, &tokens, 8) };
    state.apply(slot, &[KvEvent::Stored(large)]);
    assert_eq!(state.counts().of(Notice::WrongBlockSize), 1);
    assert_eq!(state.roster().0.workers[0].parity, Parity::Unproven);
}

#[test]
fn groups_of_disks_are_numbered_otherwise() {
    let (mut state, slot) = one_worker(4);
    let event = |page, index, kind, medium| {
        let group = Group { index: Some(index), kind };
        KvEvent::Stored(Stored { group, medium, ..stored(&[page], None, &[1, 2, 3, 4], 4) })
    };
    state.apply(slot, &[event(1, 3, None, Medium::HostPinned), event(1, 3, None, Medium::Disk)]);
    assert_eq!(blocks(&state), [0, 0, 1, 0]);
    state.apply(slot, &[event(2, 3, Some(GroupKind::Other), Medium::External)]);
    assert_eq!(blocks(&state), [0, 0, 1, 0]);
    assert_eq!(state.counts().of(Notice::OtherGroup), 2);
}
