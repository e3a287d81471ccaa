//! Prefill and decode legs: which workers they take, what is booked, and how
//! they are named.

use super::*;
use crate::load::WorkerLoad;
use crate::ring::{Append, Read, Ring};
use crate::shared::memory::MemoryStore;

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

fn prompt() -> Prepared {
    prompt_with(Demands::default())
}

fn of_namespace(namespace: u32, entry: RosterWorker) -> RosterWorker {
    RosterWorker { namespace, ..entry }
}

fn prefill(slot: u16) -> RosterWorker {
    worker(slot, 0, Role::Prefill, Parity::Exact)
}

fn decode(slot: u16) -> RosterWorker {
    worker(slot, 0, Role::Decode, Parity::Exact)
}

fn aggregated(slot: u16) -> RosterWorker {
    worker(slot, 0, Role::Aggregated, Parity::Exact)
}

fn live(workers: Vec<RosterWorker>) -> Replica {
    let mut replica = replica(workers);
    hold(&mut replica, &[]);
    replica
}

fn book(replica: &mut Replica, id: u64, slot: u16, unshared_blocks: u32) {
    let booking = Booking { unshared_blocks, ..Booking::new(BookingId(id), WorkerSlot(slot), 0) };
    replica.apply_entry(&Entry::Booked(booking).encode());
}

/// Slots of the serving and the prefill leg.
fn slots(choice: &Choice) -> (u16, Option<u16>) {
    (choice.serving.slot.0, choice.prefill.as_ref().map(|leg| leg.slot.0))
}

fn try_choose(replica: &mut Replica, enforce_disagg: bool) -> Result<Choice, Unplaced> {
    let settings = Settings { enforce_disagg, ..Settings::default() };
    select(replica, &prompt(), &settings, 0, &mut Random::seeded(3))
}

#[test]
fn prefill_follows_overlap_and_decode_follows_load() {
    let hashes = prompt().hashes;
    let mut replica = replica(vec![prefill(1), prefill(2), decode(3), decode(4)]);
    // The decode worker that has it all is no better for that.
    hold(&mut replica, &[(2, &hashes[..6]), (3, &hashes)]);
    book(&mut replica, 1, 3, 1);
    let choice = choose(&mut replica, &prompt());
    assert_eq!(slots(&choice), (4, Some(2)));
    assert_eq!(choice.computing().held.device, 6);
    assert_eq!(choice.predicted_cached_tokens, 6 * BLOCK_SIZE);
    assert_eq!(choice.computing().prefill_tokens, 34 - 6 * BLOCK_SIZE);
    assert_eq!(choice.reason, Reason::Kv);
    book(&mut replica, 2, 4, 2);
    assert_eq!(slots(&choose(&mut replica, &prompt())), (3, Some(2)));
}

#[test]
fn equal_legs_share() {
    let mut replica = live(vec![prefill(1), prefill(2), decode(3), decode(4)]);
    let mut random = Random::seeded(2);
    let mut counts = std::collections::BTreeMap::new();
    for _ in 0..4_000 {
        let choice = select(&mut replica, &prompt(), &Settings::default(), 0, &mut random).unwrap();
        *counts.entry(slots(&choice)).or_insert(0) += 1;
    }
    assert_eq!(counts.len(), 4);
    assert!(counts.values().all(|count| (850..1150).contains(count)), "{counts:?}");
}

#[test]
fn legs_are_of_one_namespace() {
    let hashes = prompt().hashes;
    let workers = vec![
        of_namespace(1, prefill(1)),
        of_namespace(1, decode(2)),
        of_namespace(2, prefill(3)),
        of_namespace(2, decode(4)),
        // Without a decode worker, and without a prefill worker, of their own.
        of_namespace(3, prefill(5)),
        of_namespace(4, decode(6)),
    ];
    let mut replica = replica(workers);
    hold(&mut replica, &[(1, &hashes[..1]), (3, &hashes[..5]), (5, &hashes)]);
    book(&mut replica, 1, 4, 100);
    assert_eq!(slots(&choose(&mut replica, &prompt())), (4, Some(3)));
}

/// Goal: a decode worker serves the whole request where there is no prefill
/// worker, and that this is a loss is said only if there ever was one.
#[test]
fn without_prefill_workers_decode_workers_serve() {
    let both = vec![prefill(1), decode(2)];
    let mut replica = live(vec![decode(2)]);
    let choice = try_choose(&mut replica, false).unwrap();
    assert_eq!((slots(&choice), choice.reason), ((2, None), Reason::Kv));
    assert_eq!(try_choose(&mut replica, true), Err(Unplaced::PrefillUnavailable));

    let roster = |sequence, workers: &[RosterWorker]| {
        let body = Roster { workers: workers.to_vec(), adapters: Vec::new() }.encode();
        Frame { kind: Kind::Roster, epoch: 1, sequence, body: &body }.encode()
    };
    replica.apply_state_bytes(&roster(2, &both));
    assert_eq!(slots(&try_choose(&mut replica, true).unwrap()), (2, Some(1)));
    replica.apply_state_bytes(&roster(3, &both[1..]));
    let choice = try_choose(&mut replica, false).unwrap();
    assert_eq!((slots(&choice), choice.reason), ((2, None), Reason::PrefillUnavailable));
    assert_eq!(Unplaced::PrefillUnavailable.reason(), Reason::PrefillUnavailable);
    replica.apply_state_bytes(&roster(4, &[aggregated(7)]));
    assert_eq!(try_choose(&mut replica, true).unwrap().reason, Reason::Kv, "it needs none");
    replica.apply_state_bytes(&roster(5, &both[..1]));
    assert_eq!(try_choose(&mut replica, true), Err(Unplaced::NoWorkers));
}

/// Goal: the next sidecar numbers models as it likes.
#[test]
fn another_epoch_forgets_who_had_prefill_workers() {
    let mut replica = live(vec![prefill(1), decode(2)]);
    assert!(replica.had_prefill(0) && !replica.had_prefill(1));
    let body = Roster { workers: vec![decode(2)], adapters: Vec::new() }.encode();
    let frame = Frame { kind: Kind::Roster, epoch: 2, sequence: 1, body: &body }.encode();
    replica.apply_state_bytes(&frame);
    assert!(!replica.had_prefill(0));
}

/// Goal: a number that another model has taken over tells nothing of that one.
#[test]
fn another_model_of_the_same_number_had_no_prefill_workers() {
    let mut replica = live(vec![prefill(1), decode(2)]);
    let cards = |sequence, names: &[&str]| {
        let models = names.iter().map(|name| card(name, Err(Blind::Loading))).collect();
        let body = Cards { models }.encode();
        Frame { kind: Kind::Card, epoch: 1, sequence, body: &body }.encode()
    };
    replica.apply_state_bytes(&cards(2, &["a"]));
    assert!(replica.had_prefill(0), "the roster came first");
    let body = Roster { workers: vec![decode(2)], adapters: Vec::new() }.encode();
    let roster = Frame { kind: Kind::Roster, epoch: 1, sequence: 3, body: &body }.encode();
    replica.apply_state_bytes(&roster);
    replica.apply_state_bytes(&cards(4, &["a", "b"]));
    assert!(replica.had_prefill(0));
    replica.apply_state_bytes(&cards(5, &["c", "b"]));
    assert!(!replica.had_prefill(0));
}

#[test]
fn workers_that_do_both_compete_with_decode_workers() {
    let hashes = prompt().hashes;
    let mut replica = replica(vec![aggregated(1), prefill(2), decode(3), decode(4)]);
    hold(&mut replica, &[(1, &hashes[..2]), (4, &hashes[..6])]);
    // By cost the warm decode worker wins; its prompt is then computed by the
    // prefill worker, and the decode leg goes to whoever has least to do.
    book(&mut replica, 1, 4, 1);
    assert_eq!(slots(&choose(&mut replica, &prompt())), (3, Some(2)));
    book(&mut replica, 2, 3, 50);
    book(&mut replica, 3, 4, 50);
    let choice = choose(&mut replica, &prompt());
    assert_eq!((slots(&choice), choice.serving.held.device), ((1, None), 2));
}

#[test]
fn blindness_is_that_of_the_workers_that_compute() {
    let blind = |entry: RosterWorker| RosterWorker { parity: Parity::Blind, ..entry };
    let mut replica = live(vec![blind(prefill(1)), decode(2)]);
    assert_eq!(choose(&mut replica, &prompt()).reason, Reason::BlindWorkers);
    let mut replica = live(vec![prefill(1), blind(decode(2))]);
    assert_eq!(choose(&mut replica, &prompt()).reason, Reason::Kv);
}

#[test]
fn a_request_that_cannot_be_read_has_both_legs() {
    let mut replica = live(vec![prefill(1), decode(2), decode(3)]);
    book(&mut replica, 1, 2, 1);
    let unread = Prepared::by_load(Reason::Unparsed, None, 6_400);
    let choice = choose(&mut replica, &unread);
    assert_eq!((slots(&choice), choice.reason), ((3, Some(1)), Reason::Unparsed));
    assert_eq!(unread.blocks(), 100, "of 16 tokens of 4 bytes");
}

/// Goal: all VMs of a gateway agree on both legs' loads from one entry of the
/// ring log, and nothing is left when the request has ended.
#[test]
fn both_bookings_are_replayed_and_freed() {
    let store = MemoryStore::default();
    let ring = Ring::default();
    ring.prepare(&store).unwrap();
    let workers = || vec![prefill(1), decode(2)];
    let (mut here, mut there) = (live(workers()), live(workers()));
    let choice = choose(&mut here, &prompt());
    let (serving, computing) = (BookingId(10), BookingId(11));
    let Ok(Read::NotYet(free)) = ring.read(&store, 1) else { panic!("the ring is not empty") };
    let entry = choice.booked(&prompt(), serving, computing, 5).encode();
    assert_eq!(ring.append_in(&store, free, &entry), Ok(Append::Done));
    assert_eq!(ring.append_in(&store, free, &entry), Ok(Append::Moved), "one step for both");
    for entry in [Entry::Freed(computing), Entry::Freed(serving), Entry::Freed(serving)] {
        ring.append(&store, 1, &entry.encode()).unwrap();
    }
    let idle = WorkerLoad::default();
    let prefilling = WorkerLoad { prefill_tokens: 34, active_blocks: 0, requests: 1 };
    let decoding = WorkerLoad { prefill_tokens: 0, active_blocks: 8, requests: 1 };
    let expected = [(prefilling, decoding), (idle, decoding), (idle, idle), (idle, idle)];
    for (sequence, (prefill, decode)) in (1..).zip(expected) {
        let Ok(Read::Entry(entry)) = ring.read(&store, sequence) else {
            panic!("entry {sequence}")
        };
        for replica in [&mut here, &mut there] {
            replica.apply_entry(&entry);
            assert_eq!(replica.loads().of(WorkerSlot(1)), prefill, "entry {sequence}");
            assert_eq!(replica.loads().of(WorkerSlot(2)), decode, "entry {sequence}");
        }
    }
    assert_eq!(there.loads().bookings(), 0);
}

#[test]
fn a_booking_of_one_leg_is_as_ever() {
    let mut replica = live(vec![aggregated(1)]);
    let choice = choose(&mut replica, &prompt());
    let entry = choice.booked(&prompt(), BookingId(1), BookingId(2), 5);
    let expected = Booking {
        prefill_tokens: 34,
        blocks: prompt().hashes,
        ..Booking::new(BookingId(1), WorkerSlot(1), 5)
    };
    assert_eq!(entry, Entry::Booked(expected));
}

fn ranked(entry: RosterWorker, rank: u32) -> RosterWorker {
    let id = entry.worker.id;
    RosterWorker { worker: Worker { id, rank: DpRank(rank) }, ..entry }
}

#[test]
fn headers_and_body_name_both_legs_and_their_ranks() {
    let mut replica = live(vec![ranked(prefill(1), 3), ranked(decode(2), 5)]);
    let choice = choose(&mut replica, &prompt());
    let mut expected = vec![
        ("x-gateway-destination-endpoint", "10.0.0.2:8000".to_owned()),
        ("x-dynamo-worker-instance-id", "102".to_owned()),
        ("x-dynamo-dp-rank", "5".to_owned()),
        ("x-dynamo-routing-mode", "disaggregated".to_owned()),
        ("x-dynamo-prefill-instance-id", "101".to_owned()),
        ("x-dynamo-prefill-dp-rank", "3".to_owned()),
    ];
    assert_eq!(choice.headers(false), expected);
    expected.push(("x-prefiller-host-port", "10.0.0.1:8000".to_owned()));
    assert_eq!(choice.headers(true), expected);
    let handover = choice.handover();
    assert_eq!((handover.prefill_worker_id, handover.prefill_dp_rank), (Some(101), Some(3)));
    assert_eq!((handover.decode_worker_id, handover.dp_rank), (Some(102), Some(5)));
    assert_eq!((handover.backend_instance_id, handover.token_data), (Some(102), None));
}

#[test]
fn a_worker_behind_a_frontend_has_no_destination() {
    let hidden = |entry: RosterWorker| RosterWorker { endpoint: String::new(), ..entry };
    let mut replica = live(vec![prefill(1), hidden(decode(2))]);
    let names = |choice: &Choice| -> Vec<&str> {
        choice.headers(true).into_iter().map(|(name, _)| name).collect()
    };
    let ids = ["x-dynamo-worker-instance-id", "x-dynamo-dp-rank", "x-dynamo-routing-mode"];
    let prefill_ids = ["x-dynamo-prefill-instance-id", "x-dynamo-prefill-dp-rank"];
    assert_eq!(names(&choose(&mut replica, &prompt())), [&ids[..], &prefill_ids].concat());
    let mut replica = live(vec![hidden(prefill(1)), decode(2)]);
    let destination = ["x-gateway-destination-endpoint"];
    let all = [&destination[..], &ids, &prefill_ids].concat();
    assert_eq!(names(&choose(&mut replica, &prompt())), all);
    let mut replica = live(vec![hidden(aggregated(1))]);
    let choice = choose(&mut replica, &prompt());
    assert_eq!(names(&choice), ids);
    assert_eq!(choice.headers(true)[2].1, "aggregated");
    assert_eq!(choice.handover().prefill_worker_id, None);
}

#[cfg(not(target_arch = "wasm32"))]
proptest::proptest! {
    /// Goal: whatever the fleet, the legs fit together, nobody is turned away
    /// who need not be, and holders of an adapter come first.
    #[test]
    fn legs_fit_together(
        fleet in proptest::collection::vec((0_u8..3, 0_u16..2, 0_u32..3), 0..12),
        enforce in proptest::bool::ANY,
        model in proptest::option::of(0_u16..2),
        holders in proptest::option::of(proptest::collection::btree_set(0_u16..12, 0..4)),
        seed in proptest::num::u64::ANY,
    ) {
        let roles = [Role::Aggregated, Role::Prefill, Role::Decode];
        let workers: Vec<RosterWorker> = (0..).zip(&fleet).map(|(slot, (role, model, namespace))| {
            of_namespace(*namespace, worker(slot, *model, roles[usize::from(*role)], Parity::Exact))
        }).collect();
        let holders: Option<Vec<WorkerSlot>> =
            holders.map(|slots| slots.into_iter().map(WorkerSlot).collect());
        let prepared = Prepared { model, holders: holders.clone(), ..prompt() };
        let settings = Settings { enforce_disagg: enforce, ..Settings::default() };
        let mut replica = live(workers.clone());
        let choice = select(&mut replica, &prepared, &settings, 0, &mut Random::seeded(seed));

        let usable: Vec<&RosterWorker> =
            workers.iter().filter(|it| model.is_none_or(|model| it.model == model)).collect();
        let set = |it: &RosterWorker| (it.model, it.namespace);
        let has = |role: Role, of: Option<(u16, u32)>| {
            usable.iter().any(|it| it.role == role && of.is_none_or(|of| set(it) == of))
        };
        let paired = |it: &RosterWorker| {
            it.role == Role::Decode && has(Role::Prefill, Some(set(it)))
        };
        let is_servable = has(Role::Aggregated, None)
            || usable.iter().any(|it| paired(it))
            || !enforce && has(Role::Decode, None);
        proptest::prop_assert_eq!(choice.is_ok(), is_servable);
        let Ok(choice) = choice else { return Ok(()) };
        let find = |slot: WorkerSlot| usable.iter().find(|it| it.slot == slot).copied();
        let serving = find(choice.serving.slot).expect("of the model");
        match &choice.prefill {
            Some(leg) => {
                let prefill = find(leg.slot).expect("of the model");
                proptest::prop_assert_eq!(prefill.role, Role::Prefill);
                proptest::prop_assert_eq!(serving.role, Role::Decode);
                proptest::prop_assert_eq!(set(prefill), set(serving));
            }
            None => {
                let alone = serving.role == Role::Aggregated || !paired(serving);
                proptest::prop_assert!(alone && serving.role != Role::Prefill);
                proptest::prop_assert!(!enforce || serving.role == Role::Aggregated);
            }
        }
        if let Some(holders) = holders {
            let holds = |slot: WorkerSlot| holders.contains(&slot);
            let is_held = holds(choice.serving.slot)
                && choice.prefill.as_ref().is_none_or(|leg| holds(leg.slot));
            proptest::prop_assert!(is_held || choice.adapter_unheld);
        } else {
            proptest::prop_assert!(!choice.adapter_unheld);
        }
    }
}
