//! The state against a model too simple to be wrong: the deltas, applied by the
//! core's own decoder, must give what the engine's cache holds.

#![expect(clippy::cast_possible_truncation, reason = "the tests' own small numbers")]

mod tiers;

use std::collections::{BTreeMap, BTreeSet, HashSet};

use proptest::prelude::*;
use warmpath_core::delta::{Delta, Operation};
use warmpath_core::event::{Group, GroupKind, Hashed, Medium, Removed, Stored};
use warmpath_core::hash::{Salt, sequence_hashes};
use warmpath_core::ids::{BlockHash, DpRank, EngineHash, SequenceHash, TokenId, WorkerId};

use super::counts::Notice;
use super::rank::Evidence;
use super::*;
use crate::limits::PAGE_COMPLETED_BY_MAX;

/// A filter's index, by the book.
#[derive(Default)]
struct Index(BTreeMap<u16, BTreeSet<u64>>);

impl Index {
    fn apply(&mut self, bodies: Vec<Vec<u8>>) {
        for body in bodies {
            for group in Delta::decode(&body).unwrap().groups() {
                let blocks = self.0.entry(group.slot.0).or_default();
                match group.operation {
                    Operation::Stored => blocks.extend(group.hashes().map(|hash| hash.0)),
                    Operation::Removed => {
                        for hash in group.hashes() {
                            blocks.remove(&hash.0);
                        }
                    }
                    Operation::Cleared => blocks.clear(),
                }
            }
        }
    }

    fn of(&self, slot: WorkerSlot) -> BTreeSet<u64> {
        self.0.get(&slot.0).cloned().unwrap_or_default()
    }
}

fn held(state: &State, slot: WorkerSlot) -> BTreeSet<u64> {
    let (_, held) = state.held().into_iter().find(|(it, _)| *it == slot).unwrap();
    held.keys().map(|hash| hash.0).collect()
}

fn spec(id: u64, block_size: u32) -> RankSpec {
    RankSpec {
        worker: Worker { id: WorkerId(id), rank: DpRank(0) },
        model: 0,
        shape: BlockShape { block_size, eagle: false },
        role: Role::Aggregated,
        endpoint: format!("127.0.0.1:{}", 19_000 + id),
        total_kv_blocks: 100,
        max_num_batched_tokens: 0,
        taints: Vec::new(),
        small_pages: true,
        has_events: true,
        incarnation: 0,
        namespace: 0,
    }
}

fn one_worker(block_size: u32) -> (State, WorkerSlot) {
    let mut state = State::new();
    let changes = state.set_workers(&[spec(1, block_size)]);
    (state, changes.added[0].1)
}

fn stored(pages: &[u64], parent: Option<u64>, tokens: &[TokenId], page_size: u32) -> Stored {
    Stored {
        pages: pages.iter().copied().map(EngineHash).collect(),
        parent: parent.map(EngineHash),
        tokens: tokens.to_vec(),
        page_size,
        pairs: false,
        lora: None,
        cache_salt: None,
        objects: Vec::new(),
        understood: pages.len(),
        medium: Medium::Device,
        group: Group::default(),
    }
}

fn removed(pages: &[u64]) -> KvEvent {
    let pages = pages.iter().copied().map(EngineHash).collect();
    KvEvent::Removed(Removed { pages, medium: Medium::Device, group: Group::default() })
}

fn hashes(tokens: &[TokenId], shape: BlockShape, salt: Salt<'_>) -> Vec<u64> {
    let mut out = Vec::new();
    sequence_hashes(tokens, shape, salt, &mut out);
    out.into_iter().map(|hash| hash.0).collect()
}

const PLAIN: BlockShape = BlockShape { block_size: 4, eagle: false };

#[test]
fn stored_blocks_have_the_prompts_hashes_and_removals_take_them_back() {
    let (mut state, slot) = one_worker(4);
    let mut index = Index::default();
    let tokens: Vec<TokenId> = (0..12).collect();
    let expected = hashes(&tokens, PLAIN, Salt::default());
    state.apply(slot, &[KvEvent::Stored(stored(&[11, 12], None, &tokens[..8], 4))]);
    state.apply(slot, &[KvEvent::Stored(stored(&[13], Some(12), &tokens[8..], 4))]);
    index.apply(state.all_deltas());
    assert_eq!(index.of(slot), expected.iter().copied().collect());
    state.apply(slot, &[removed(&[12, 99])]);
    index.apply(state.all_deltas());
    assert_eq!(index.of(slot), [expected[0], expected[2]].into());
    assert_eq!(state.counts().of(Notice::RemovedUnknown), 1);
    // The page that was removed is no parent any more.
    state.apply(slot, &[KvEvent::Stored(stored(&[14], Some(12), &[7, 7, 7, 7], 4))]);
    assert!(!state.has_deltas());
    assert_eq!(state.counts().of(Notice::ParentUnknown), 1);
    state.apply(slot, &[KvEvent::Cleared]);
    index.apply(state.all_deltas());
    assert_eq!(index.of(slot), BTreeSet::new());
}

#[test]
fn salts_adapters_and_objects_enter_the_hash_and_are_inherited() {
    let (mut state, slot) = one_worker(4);
    let tokens: Vec<TokenId> = (0..8).collect();
    let salt = Salt { lora: Some("adapter"), cache_salt: Some("tenant") };
    let root = Stored {
        lora: Some("adapter".into()),
        cache_salt: Some("tenant".into()),
        ..stored(&[1], None, &tokens[..4], 4)
    };
    // As vLLM sends it: the adapter again, the salt not.
    let child = Stored { lora: Some("adapter".into()), ..stored(&[2], Some(1), &tokens[4..], 4) };
    state.apply(slot, &[KvEvent::Stored(root), KvEvent::Stored(child)]);
    assert_eq!(held(&state, slot), hashes(&tokens, PLAIN, salt).into_iter().collect());

    let (mut state, slot) = one_worker(4);
    let objects = vec![warmpath_core::event::ObjectHash { page: 1, hash: 5 }];
    let event = Stored { objects, ..stored(&[1, 2], None, &tokens, 4) };
    state.apply(slot, &[KvEvent::Stored(event)]);
    let first = hashes(&tokens, PLAIN, Salt::default())[0];
    let second = sequence_hash_of(first, &tokens[4..], &[5]);
    assert_eq!(held(&state, slot), [first, second].into());
}

fn sequence_hash_of(parent: u64, tokens: &[TokenId], objects: &[u64]) -> u64 {
    let block = warmpath_core::hash::block_hash_with_objects(tokens, objects, 1337);
    warmpath_core::hash::sequence_hash(Some(SequenceHash(parent)), block).0
}

/// Goal: pairs of tokens give the hashes that the filter computes for
/// eagle-style drafts, for whole pages and for small ones.
#[test]
fn pairs_give_eagle_hashes() {
    let tokens: Vec<TokenId> = (0..9).collect();
    let shape = BlockShape { block_size: 4, eagle: true };
    let expected: BTreeSet<u64> = hashes(&tokens, shape, Salt::default()).into_iter().collect();
    for (pages, page_size) in [(vec![1, 2], 4), (vec![1, 2, 3, 4], 2), ((1..9).collect(), 1)] {
        let mut state = State::new();
        let slot = state.set_workers(&[RankSpec { shape, ..spec(1, 4) }]).added[0].1;
        let event = Stored { pairs: true, ..stored(&pages, None, &tokens, page_size) };
        state.apply(slot, &[KvEvent::Stored(event)]);
        assert_eq!(held(&state, slot), expected, "page size {page_size}");
    }
}

#[test]
fn a_block_of_small_pages_goes_with_any_of_its_pages() {
    let (mut state, slot) = one_worker(4);
    let tokens: Vec<TokenId> = (0..8).collect();
    let expected = hashes(&tokens, PLAIN, Salt::default());
    // Three events; the second block's pages are split over two.
    state.apply(slot, &[KvEvent::Stored(stored(&[1, 2, 3], None, &tokens[..6], 2))]);
    assert_eq!(held(&state, slot), [expected[0]].into());
    state.apply(slot, &[KvEvent::Stored(stored(&[4], Some(3), &tokens[6..], 2))]);
    assert_eq!(held(&state, slot), expected.iter().copied().collect());
    // A branch that shares the second block's first page.
    state.apply(slot, &[KvEvent::Stored(stored(&[5], Some(3), &[9, 9], 2))]);
    assert_eq!(held(&state, slot).len(), 3);
    state.apply(slot, &[removed(&[3])]);
    assert_eq!(held(&state, slot), [expected[0]].into());
    // Back again, and the last page repeated: the block is whole again, and
    // goes again with the same page.
    state.apply(slot, &[KvEvent::Stored(stored(&[3, 4], Some(2), &tokens[4..], 2))]);
    assert_eq!(held(&state, slot), expected.iter().copied().collect());
    state.apply(slot, &[removed(&[3])]);
    assert_eq!(held(&state, slot), [expected[0]].into());
    state.apply(slot, &[removed(&[4, 4, 5, 2])]);
    assert_eq!(held(&state, slot), [].into());
    assert_eq!(state.counts().of(Notice::RemovedUnknown), 0);
}

/// Goal: what came and went under a page leaves no trace in it.
#[test]
fn continuations_that_went_make_room() {
    let (mut state, slot) = one_worker(4);
    state.apply(slot, &[KvEvent::Stored(stored(&[1], None, &[1, 2], 2))]);
    for page in 2..PAGE_COMPLETED_BY_MAX as u64 + 10 {
        let child = KvEvent::Stored(stored(&[page], Some(1), &[page as u32, 4], 2));
        state.apply(slot, &[child]);
        assert_eq!(held(&state, slot).len(), 1, "page {page}");
        state.apply(slot, &[removed(&[page])]);
    }
    // More at a time than the limit: the surplus is not indexed, and counted.
    let pages = 10_000..10_003 + PAGE_COMPLETED_BY_MAX as u64;
    let mut state = State::new();
    let slot = state.set_workers(&[RankSpec { total_kv_blocks: 0, ..spec(1, 4) }]).added[0].1;
    state.apply(slot, &[KvEvent::Stored(stored(&[1], None, &[1, 2], 2))]);
    for page in pages {
        let child = KvEvent::Stored(stored(&[page], Some(1), &[page as u32, 4], 2));
        state.apply(slot, &[child]);
    }
    assert_eq!(held(&state, slot).len(), PAGE_COMPLETED_BY_MAX);
    assert_eq!(state.counts().of(Notice::PagesFull), 3);
}

#[test]
fn copies_are_counted_and_repetitions_are_not() {
    let (mut state, slot) = one_worker(4);
    let tokens: Vec<TokenId> = (0..8).collect();
    let both = KvEvent::Stored(stored(&[1, 2], None, &tokens, 4));
    let copy = KvEvent::Stored(stored(&[2], Some(1), &tokens[4..], 4));
    // Announced three times from the start, and one further copy of page 2.
    state.apply(slot, &[both.clone(), both.clone(), both, copy]);
    assert_eq!(state.counts().of(Notice::Repeated), 5);
    state.apply(slot, &[removed(&[2])]);
    assert_eq!(held(&state, slot).len(), 2, "one copy is left");
    state.apply(slot, &[removed(&[2]), removed(&[1])]);
    assert_eq!(held(&state, slot).len(), 0);
}

/// Two engine hashes of the same tokens, as after a change of hash seed.
#[test]
fn a_block_is_held_while_one_of_its_names_is() {
    let (mut state, slot) = one_worker(4);
    let event = |page| KvEvent::Stored(stored(&[page], None, &[1, 2, 3, 4], 4));
    state.apply(slot, &[event(1), event(2), removed(&[1])]);
    assert_eq!(held(&state, slot).len(), 1);
    state.apply(slot, &[removed(&[2])]);
    assert_eq!(held(&state, slot).len(), 0);
}

#[test]
fn only_the_main_attention_on_the_device_is_indexed() {
    let (mut state, slot) = one_worker(4);
    let event = |page, group, medium| {
        KvEvent::Stored(Stored { group, medium, ..stored(&[page], None, &[1, 2, 3, 4], 4) })
    };
    let group = |index, kind| Group { index: Some(index), kind };
    let main = Some(GroupKind::Main);
    state.apply(
        slot,
        &[
            event(1, group(0, Some(GroupKind::Other)), Medium::Device),
            event(2, group(0, None), Medium::Device),
            event(3, group(1, None), Medium::Device),
            event(4, group(2, main), Medium::HostPinned),
        ],
    );
    assert_eq!(held(&state, slot).len(), 0);
    assert_eq!(state.counts().of(Notice::OtherGroup), 3);
    assert_eq!(state.tracked().next().unwrap().rank.blocks(Medium::HostPinned), 1);
    state.apply(slot, &[event(5, group(2, main), Medium::Device)]);
    assert_eq!(held(&state, slot).len(), 1);
    let take_back = |index| {
        KvEvent::Removed(Removed {
            pages: vec![EngineHash(5)],
            medium: Medium::Device,
            group: group(index, None),
        })
    };
    // The same name in another group is another page.
    state.apply(slot, &[take_back(1)]);
    assert_eq!(held(&state, slot).len(), 1);
    state.apply(slot, &[take_back(2)]);
    assert_eq!(held(&state, slot).len(), 0);
}

/// Goal: what cannot be indexed leaves no trace but a count, and its removal is
/// swallowed; parity shows what the blocks were like.
#[test]
fn what_does_not_fit_is_passed_over() {
    let tokens: Vec<TokenId> = (0..8).collect();
    let cases = [
        (stored(&[1], None, &tokens, 8), Notice::WrongBlockSize, Evidence::Mismatched),
        (stored(&[1], None, &tokens[..3], 3), Notice::WrongBlockSize, Evidence::Mismatched),
        (
            Stored { pairs: true, ..stored(&[1], None, &tokens[..5], 4) },
            Notice::WrongBlockSize,
            Evidence::Mismatched,
        ),
        (stored(&[1], None, &[], 0), Notice::Placeholder, Evidence::None),
        (stored(&[1], None, &tokens, 4), Notice::TokenCount, Evidence::None),
        (stored(&[1, 1], None, &tokens, 4), Notice::SelfReference, Evidence::None),
        (stored(&[1], Some(1), &tokens[..4], 4), Notice::SelfReference, Evidence::None),
        (
            Stored { understood: 0, ..stored(&[1], None, &tokens[..4], 4) },
            Notice::UnknownKeys,
            Evidence::None,
        ),
    ];
    for (event, notice, evidence) in cases {
        let (mut state, slot) = one_worker(4);
        let copies = event.pages.len();
        state.apply(slot, &[KvEvent::Stored(event)]);
        assert!(!state.has_deltas(), "{notice:?}");
        assert_eq!(state.counts().of(notice), 1);
        assert_eq!(state.tracked().next().unwrap().rank.evidence(), evidence, "{notice:?}");
        state.apply(slot, &[removed(&vec![1; copies])]);
        assert_eq!(state.counts().of(Notice::RemovedUnknown), 0, "{notice:?}");
        state.apply(slot, &[removed(&[1])]);
        assert_eq!(state.counts().of(Notice::RemovedUnknown), 1, "{notice:?}");
        // A right block afterwards settles it.
        state.apply(slot, &[KvEvent::Stored(stored(&[2], None, &tokens[..4], 4))]);
        assert_eq!(state.roster().0.workers[0].parity, Parity::Exact);
    }
}

#[test]
fn small_pages_are_partial_blocks_where_they_are_not_expected() {
    let mut state = State::new();
    let slot = state.set_workers(&[RankSpec { small_pages: false, ..spec(1, 4) }]).added[0].1;
    state.apply(slot, &[KvEvent::Stored(stored(&[1, 2], None, &[1, 2, 3, 4], 2))]);
    assert_eq!(held(&state, slot).len(), 0);
    assert_eq!(state.counts().of(Notice::WrongBlockSize), 1);
}

#[test]
fn a_rank_remembers_no_more_pages_than_it_may() {
    let mut state = State::new();
    let slot = state.set_workers(&[RankSpec { total_kv_blocks: 2, ..spec(1, 4) }]).added[0].1;
    for page in 0..12_u32 {
        let event = stored(&[u64::from(page)], None, &[page; 4], 4);
        state.apply(slot, &[KvEvent::Stored(event)]);
    }
    assert_eq!(held(&state, slot).len(), 8);
    assert_eq!(state.counts().of(Notice::PagesFull), 4);
}

#[test]
fn the_roster_follows_the_list_and_the_evidence() {
    let mut state = State::new();
    let blind = RankSpec { has_events: false, ..spec(2, 4) };
    let changes = state.set_workers(&[spec(3, 4), blind.clone(), spec(1, 4)]);
    // Slots in the order of the list.
    let slots: Vec<(u64, u16)> =
        changes.added.iter().map(|(worker, slot)| (worker.id.0, slot.0)).collect();
    assert_eq!(slots, [(3, 0), (2, 1), (1, 2)]);
    assert!(state.take_roster_changed());
    assert!(!state.take_roster_changed());
    let parity: Vec<Parity> = state.roster().0.workers.iter().map(|it| it.parity).collect();
    assert_eq!(parity, [Parity::Unproven, Parity::Blind, Parity::Unproven]);
    state.apply(WorkerSlot(0), &[KvEvent::Stored(stored(&[1], None, &[1, 2, 3, 4], 4))]);
    assert!(state.take_roster_changed());
    assert_eq!(state.roster().0.workers[0].parity, Parity::Exact);

    // One goes, one moves to another address, one changes its role only.
    let mut index = Index::default();
    index.apply(state.all_deltas());
    assert_eq!(index.of(WorkerSlot(0)).len(), 1);
    let moved = RankSpec { endpoint: "127.0.0.1:1".into(), ..spec(3, 4) };
    let decode = RankSpec { role: Role::Decode, ..spec(1, 4) };
    let changes = state.set_workers(&[moved, decode]);
    assert_eq!(changes.removed.len(), 2);
    assert_eq!(changes.added, [(Worker { id: WorkerId(3), rank: DpRank(0) }, WorkerSlot(3))]);
    index.apply(state.all_deltas());
    assert_eq!(index.of(WorkerSlot(0)).len(), 0, "cleared in the feed");
    let (roster, _) = state.roster();
    assert_eq!(roster.workers.iter().map(|it| it.slot.0).collect::<Vec<_>>(), [2, 3]);
    assert_eq!(roster.workers[0].role, Role::Decode);
    // What comes for an old incarnation is dropped.
    state.apply(WorkerSlot(0), &[KvEvent::Stored(stored(&[2], None, &[5, 6, 7, 8], 4))]);
    assert!(!state.has_deltas());
}

#[test]
fn a_copy_of_what_is_held_does_not_change_afterwards() {
    let (mut state, slot) = one_worker(4);
    state.apply(slot, &[KvEvent::Stored(stored(&[1], None, &[1, 2, 3, 4], 4))]);
    let before = state.held();
    state.apply(slot, &[removed(&[1])]);
    assert_eq!(before[0].1.len(), 1);
    assert_eq!(held(&state, slot).len(), 0);
}

/// An engine's cache by the book: which pages it has cached, and what is in them.
#[derive(Default, Clone)]
struct Cache {
    /// Page to its copies.
    copies: BTreeMap<u64, u32>,
}

/// The tokens of page `page` of prompt `prompt`: prompts share their beginnings.
fn page_tokens(page: u64, page_size: u32) -> Vec<TokenId> {
    (0..page_size).map(|at| (page as u32) * 64 + at).collect()
}

/// Pages form a binary tree: page `n` follows page `n / 2`; page 1 is a root.
fn chain(page: u64) -> Vec<u64> {
    let mut chain: Vec<u64> =
        std::iter::successors(Some(page), |page| (*page > 1).then_some(page / 2)).collect();
    chain.reverse();
    chain
}

fn truth(cache: &Cache, page_size: u32) -> BTreeSet<u64> {
    let pages_of_block = (4 / page_size) as usize;
    let mut truth = BTreeSet::new();
    for page in cache.copies.keys() {
        let chain = chain(*page);
        if !chain.len().is_multiple_of(pages_of_block) {
            continue;
        }
        let block = &chain[chain.len() - pages_of_block..];
        if block.iter().all(|page| cache.copies.contains_key(page)) {
            let tokens: Vec<TokenId> =
                chain.iter().flat_map(|page| page_tokens(*page, page_size)).collect();
            truth.insert(*hashes(&tokens, PLAIN, Salt::default()).last().unwrap());
        }
    }
    truth
}

#[derive(Clone, Debug)]
enum Step {
    /// Caches the chain down to a page, one event for what is missing.
    Compute(u64),
    /// Caches one more copy of a page that is cached.
    Copy(u64),
    /// Announces the chain down to a page again, as far as it is cached.
    Repeat(u64),
    /// Evicts one copy of a page that has no cached child.
    Evict(u64),
    Clear,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1_u64..32).prop_map(Step::Compute),
        1 => (1_u64..32).prop_map(Step::Copy),
        1 => (1_u64..32).prop_map(Step::Repeat),
        6 => (1_u64..32).prop_map(Step::Evict),
        1 => Just(Step::Clear),
    ]
}

fn event(pages: &[u64], page_size: u32) -> KvEvent {
    let tokens: Vec<TokenId> =
        pages.iter().flat_map(|page| page_tokens(*page, page_size)).collect();
    let parent = (pages[0] > 1).then_some(pages[0] / 2);
    KvEvent::Stored(stored(pages, parent, &tokens, page_size))
}

/// Does a step to the cache; returns what the engine says.
fn perform(cache: &mut Cache, step: &Step, page_size: u32) -> Vec<KvEvent> {
    match step {
        Step::Compute(page) => {
            let missing: Vec<u64> =
                chain(*page).into_iter().filter(|it| !cache.copies.contains_key(it)).collect();
            if missing.is_empty() {
                return vec![];
            }
            for page in &missing {
                cache.copies.insert(*page, 1);
            }
            vec![event(&missing, page_size)]
        }
        Step::Copy(page) if *page > 1 && cache.copies.contains_key(page) => {
            *cache.copies.get_mut(page).unwrap() += 1;
            vec![event(&[*page], page_size)]
        }
        Step::Repeat(page) => {
            let cached: Vec<u64> =
                chain(*page).into_iter().take_while(|it| cache.copies.contains_key(it)).collect();
            if cached.is_empty() { vec![] } else { vec![event(&cached, page_size)] }
        }
        Step::Evict(page) => {
            let has_child = [page * 2, page * 2 + 1].iter().any(|it| cache.copies.contains_key(it));
            match cache.copies.get_mut(page) {
                Some(copies) if *copies > 1 => *copies -= 1,
                Some(_) if !has_child => {
                    cache.copies.remove(page);
                }
                _ => return vec![],
            }
            vec![removed(&[*page])]
        }
        Step::Clear => {
            cache.copies.clear();
            vec![KvEvent::Cleared]
        }
        Step::Copy(_) => vec![],
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Goal: whatever an engine does, the index that the deltas give is what
    /// the engine's cache holds, block by block, at every moment.
    /// Method: random steps of a cache that is a tree of pages, on two workers,
    /// with pages of a block, half a block and a quarter.
    #[test]
    fn the_index_is_what_the_caches_hold(
        steps in prop::collection::vec((0_usize..2, step()), 0..120),
        page_size in prop_oneof![Just(4_u32), Just(2), Just(1)],
        flush_every in 1_usize..9,
    ) {
        let mut state = State::new();
        let added = state.set_workers(&[spec(1, 4), spec(2, 4)]).added;
        let mut caches = [Cache::default(), Cache::default()];
        let mut index = Index::default();
        for (at, (who, step)) in steps.iter().enumerate() {
            let events = perform(&mut caches[*who], step, page_size);
            state.apply(added[*who].1, &events);
            if at % flush_every == 0 {
                index.apply(state.all_deltas());
                for (cache, (_, slot)) in caches.iter().zip(&added) {
                    prop_assert_eq!(index.of(*slot), truth(cache, page_size));
                    prop_assert_eq!(index.of(*slot), held(&state, *slot));
                }
            }
        }
        prop_assert_eq!(state.counts().of(Notice::RemovedUnknown), 0);
        prop_assert_eq!(state.counts().of(Notice::ParentUnknown), 0);
    }

    /// Goal: no event, however odd, makes deltas and state disagree, and nothing
    /// grows beyond its limit.
    #[test]
    fn odd_events_keep_deltas_and_state_equal(
        events in prop::collection::vec(odd_event(), 0..60),
        small_pages: bool,
    ) {
        let mut state = State::new();
        let only = RankSpec { small_pages, total_kv_blocks: 3, ..spec(1, 4) };
        let slot = state.set_workers(&[only]).added[0].1;
        let mut index = Index::default();
        for event in events {
            state.apply(slot, &[event]);
            index.apply(state.all_deltas());
            for (slot, blocks) in state.held() {
                prop_assert_eq!(index.of(slot), blocks.keys().map(|hash| hash.0).collect());
            }
            let rank = &state.tracked().next().unwrap().rank;
            // Names are few: eight, in three groups and four tiers.
            prop_assert!(rank.pages() <= 8 * 3 * 4 && rank.orphans() <= 8 * 3);
        }
    }
}

fn odd_event() -> impl Strategy<Value = KvEvent> {
    let group =
        (prop::option::of(0_u32..3), prop::option::of(any::<bool>())).prop_map(|(index, main)| {
            Group {
                index,
                kind: main.map(|main| if main { GroupKind::Main } else { GroupKind::Other }),
            }
        });
    let pages = prop::collection::vec(0_u64..8, 0..5);
    let stored_event = (
        pages.clone(),
        prop::option::of(0_u64..8),
        0_u32..9,
        0_usize..30,
        group.clone(),
        any::<bool>(),
        0_usize..6,
        medium(),
    )
        .prop_map(|(pages, parent, page_size, tokens, group, exact, understood, medium)| {
            let count = if exact { pages.len() * page_size as usize } else { tokens };
            let tokens: Vec<TokenId> = (0..count as u32).collect();
            let event = stored(&pages, parent, &tokens, page_size);
            let understood = understood.min(pages.len());
            KvEvent::Stored(Stored { group, understood, medium, ..event })
        });
    let hashed_event = (pages.clone(), prop::option::of(0_u64..8), medium()).prop_map(
        |(pages, parent, medium)| {
            let block = |page: u64| (EngineHash(page), BlockHash(page % 4));
            let blocks = pages.into_iter().map(block).collect();
            KvEvent::Hashed(Hashed { blocks, parent: parent.map(EngineHash), medium })
        },
    );
    let removed_event = (pages, group, medium()).prop_map(|(pages, group, medium)| {
        let pages = pages.into_iter().map(EngineHash).collect();
        KvEvent::Removed(Removed { pages, medium, group })
    });
    prop_oneof![
        6 => stored_event, 4 => hashed_event, 4 => removed_event, 1 => Just(KvEvent::Cleared),
    ]
}

fn medium() -> impl Strategy<Value = Medium> {
    prop_oneof![
        3 => Just(Medium::Device), 2 => Just(Medium::HostPinned), 1 => Just(Medium::Disk),
        1 => Just(Medium::External),
    ]
}

#[test]
fn notices_are_numbered_in_order() {
    let mut seen = HashSet::new();
    for (at, notice) in Notice::ALL.into_iter().enumerate() {
        assert_eq!(notice as usize, at);
        assert!(seen.insert(notice.reason()));
    }
}

/// Goal: a worker that died is not chosen until it is back, and a model's last
/// worker is not given up on such a sign alone.
#[test]
fn fenced_ranks_are_out_of_the_roster_while_others_are_in() {
    let mut state = State::new();
    let prefill = RankSpec { role: Role::Prefill, ..spec(3, 4) };
    let changes = state.set_workers(&[spec(1, 4), spec(2, 4), prefill]);
    let slots: Vec<WorkerSlot> = changes.added.iter().map(|(_, slot)| *slot).collect();
    let listed = |state: &State| -> Vec<u16> {
        state.roster().0.workers.iter().map(|entry| entry.slot.0).collect()
    };
    state.take_roster_changed();
    state.fence(slots[0], true);
    assert!(state.take_roster_changed());
    assert_eq!(listed(&state), [1, 2]);
    state.fence(slots[1], true);
    state.fence(slots[2], true);
    assert_eq!(listed(&state), [0, 1, 2], "nobody is left to take their places");
    state.fence(slots[0], false);
    assert_eq!(listed(&state), [0, 2]);
    state.take_roster_changed();
    state.fence(slots[0], false);
    assert!(!state.take_roster_changed());
}
