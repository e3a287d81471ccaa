//! What requests and settings demand of the workers that are chosen.

use super::*;
use crate::cache_usage::{CacheUsage, CacheUsages, Share};
use crate::demands::{Demands, Host, Pin, SessionKey};
use crate::ids::SequenceHash;
use crate::settings::{
    AffinityMode, ApproximateCachePolicy, BusyThresholds, ConditionalDisagg,
    ConditionalDisaggPolicy, QueueLimits, SelectionPolicy, SessionAffinity, TwoTier,
};

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const A: SessionKey = SessionKey(77);

/// Ranks 0 and 1 of an instance.
fn ranks(slot: u16) -> [RosterWorker; 2] {
    let first = worker(slot, 0, Role::Aggregated, Parity::Exact);
    let second = RosterWorker {
        slot: WorkerSlot(slot + 1),
        worker: Worker { rank: DpRank(1), ..first.worker },
        ..first.clone()
    };
    [first, second]
}

fn aggregated(slot: u16) -> RosterWorker {
    worker(slot, 0, Role::Aggregated, Parity::Exact)
}

fn live(workers: Vec<RosterWorker>) -> Replica {
    let mut replica = replica(workers);
    hold(&mut replica, &[]);
    replica
}

fn pin(slot: u16, rank: Option<u32>) -> Option<Pin> {
    Some(Pin { worker: WorkerId(100 + u64::from(slot)), rank: rank.map(DpRank) })
}

fn with(replica: &mut Replica, settings: &Settings, demands: Demands) -> Result<u16, Unplaced> {
    let choice = select(replica, &prompt_with(demands), settings, 0, &mut Random::seeded(5))?;
    Ok(choice.serving.slot.0)
}

fn plain(replica: &mut Replica, demands: Demands) -> Result<u16, Unplaced> {
    with(replica, &Settings::default(), demands)
}

/// Books prompt tokens on a worker.
fn book(replica: &mut Replica, id: u64, slot: u16, prefill_tokens: u32) {
    let booking = Booking { prefill_tokens, ..bare(id, slot) };
    replica.apply_entry(&Entry::Booked(booking).encode());
}

fn bare(id: u64, slot: u16) -> Booking {
    Booking::new(BookingId(id), WorkerSlot(slot), 0)
}

#[test]
fn a_worker_that_is_named_is_taken_whatever_it_costs() {
    let [first, second] = ranks(1);
    let mut replica = live(vec![first, second, aggregated(3)]);
    book(&mut replica, 1, 2, 100_000);
    book(&mut replica, 2, 3, 100_000);
    let serving = |serving| Demands { serving, ..Demands::default() };
    assert_eq!(plain(&mut replica, serving(pin(3, None))), Ok(3));
    assert_eq!(plain(&mut replica, serving(pin(1, Some(1)))), Ok(2));
    let unknown_rank = Err(Unplaced::UnknownRank(LegKind::Serving));
    assert_eq!(plain(&mut replica, serving(pin(1, None))), unknown_rank, "it has two");
    assert_eq!(plain(&mut replica, serving(pin(1, Some(2)))), unknown_rank);
    let unknown = Err(Unplaced::UnknownPin(LegKind::Serving));
    assert_eq!(plain(&mut replica, serving(pin(9, None))), unknown);
    let elsewhere = Demands { hosts: Some(vec![]), ..serving(pin(3, None)) };
    assert_eq!(plain(&mut replica, elsewhere), unknown, "not among the gateway's hosts");
}

#[test]
fn both_legs_can_be_named() {
    let prefill = |slot| worker(slot, 0, Role::Prefill, Parity::Exact);
    let decode = |slot| worker(slot, 0, Role::Decode, Parity::Exact);
    let mut replica = live(vec![prefill(1), prefill(2), decode(3), decode(4)]);
    book(&mut replica, 1, 2, 100_000);
    let demands = Demands { prefill: pin(2, Some(0)), serving: pin(4, None), ..Demands::default() };
    let mut random = Random::seeded(5);
    let choose = |replica: &mut Replica, demands, random: &mut Random| {
        select(replica, &prompt_with(demands), &Settings::default(), 0, random)
    };
    let choice = choose(&mut replica, demands, &mut random).unwrap();
    assert_eq!((choice.serving.slot.0, choice.computing().slot.0), (4, 2));
    // A prefill worker cannot answer, nor a decode worker compute.
    let demands = Demands { serving: pin(1, None), ..Demands::default() };
    let unknown = Unplaced::UnknownPin(LegKind::Serving);
    assert_eq!(choose(&mut replica, demands, &mut random), Err(unknown));
    let demands = Demands { prefill: pin(3, None), ..Demands::default() };
    let unknown = Unplaced::UnknownPin(LegKind::Prefill);
    assert_eq!(choose(&mut replica, demands, &mut random), Err(unknown));
}

#[test]
fn the_gateway_s_hosts_bound_the_choice() {
    let mut replica = live(vec![aggregated(1), aggregated(2), aggregated(3)]);
    book(&mut replica, 1, 2, 100);
    book(&mut replica, 2, 3, 500);
    let hosts = |hosts| Demands { hosts: Some(hosts), ..Demands::default() };
    let socket = |text: &str| Host::Socket(text.parse().unwrap());
    let two = vec![socket("10.0.0.2:8000"), socket("10.0.0.3:8000")];
    assert_eq!(plain(&mut replica, hosts(two)), Ok(2));
    assert_eq!(plain(&mut replica, hosts(vec![socket("10.0.0.1:80")])), Err(Unplaced::NoHosts));
    let address = Host::Address("10.0.0.3".parse().unwrap());
    assert_eq!(plain(&mut replica, hosts(vec![address])), Ok(3), "any port");
    assert_eq!(plain(&mut replica, hosts(vec![])), Err(Unplaced::NoHosts));
}

#[test]
fn taints_are_required_or_preferred() {
    let tainted = |slot, taints: &[&str]| RosterWorker {
        taints: taints.iter().map(|taint| (*taint).to_owned()).collect(),
        ..aggregated(slot)
    };
    let mut replica =
        live(vec![tainted(1, &[]), tainted(2, &["gold"]), tainted(3, &["gold", "west"])]);
    book(&mut replica, 1, 2, 64);
    book(&mut replica, 2, 3, 100);
    let required = |taints: &[&str]| Demands {
        required_taints: taints.iter().map(|taint| (*taint).to_owned()).collect(),
        ..Demands::default()
    };
    assert_eq!(plain(&mut replica, required(&["gold"])), Ok(2));
    assert_eq!(plain(&mut replica, required(&["gold", "west"])), Ok(3));
    assert_eq!(plain(&mut replica, required(&["east"])), Err(Unplaced::Unsatisfied));
    let preferred = |taint: &str, weight| Demands {
        preferred_taints: vec![(taint.to_owned(), weight)],
        ..Demands::default()
    };
    assert_eq!(plain(&mut replica, preferred("west", 9.0)), Ok(3), "41.5 / e is the least");
    assert_eq!(plain(&mut replica, preferred("west", 0.01)), Ok(1));
}

#[test]
fn an_instance_is_overloaded_when_all_its_ranks_are() {
    let [first, second] = ranks(1);
    let mut replica = live(vec![first, second, aggregated(3)]);
    let busy_thresholds =
        BusyThresholds { active_prefill_tokens: Some(100), ..BusyThresholds::default() };
    let settings = Settings { busy_thresholds, ..Settings::default() };
    let choose = |replica: &mut Replica, demands| with(replica, &settings, demands);
    book(&mut replica, 1, 1, 101);
    book(&mut replica, 2, 3, 90);
    assert_eq!(choose(&mut replica, Demands::default()), Ok(2), "100 is not beyond 100");
    book(&mut replica, 3, 2, 101);
    assert_eq!(choose(&mut replica, Demands::default()), Ok(3));
    let named = Demands { serving: pin(1, Some(0)), ..Demands::default() };
    assert_eq!(choose(&mut replica, named), Err(Unplaced::PinOverloaded));
    book(&mut replica, 4, 3, 11);
    assert_eq!(choose(&mut replica, Demands::default()), Err(Unplaced::Overloaded));
    replica.apply_entry(&Entry::PrefillDone(BookingId(3)).encode());
    assert_eq!(choose(&mut replica, Demands::default()), Ok(2));
}

#[test]
fn a_share_of_the_batch_overloads_where_it_is_known() {
    let sized =
        |slot, max_num_batched_tokens| RosterWorker { max_num_batched_tokens, ..aggregated(slot) };
    let mut replica = live(vec![sized(1, 1_000), sized(2, 0)]);
    let busy_thresholds =
        BusyThresholds { active_prefill_tokens_frac: Some(0.5), ..BusyThresholds::default() };
    let settings = Settings { busy_thresholds, ..Settings::default() };
    book(&mut replica, 1, 1, 501);
    book(&mut replica, 2, 2, 100_000);
    assert_eq!(with(&mut replica, &settings, Demands::default()), Ok(2));
}

/// The busy threshold passes over the best worker for the next best, and does
/// not count if all are beyond it.
#[test]
fn a_busy_worker_is_passed_over_for_the_next_best() {
    let sized = |slot| RosterWorker { total_kv_blocks: 100, ..aggregated(slot) };
    let mut replica = live(vec![sized(1), sized(2)]);
    let blocks = |n: u64| (0..n).map(|n| SequenceHash(n * 7 + 1_000)).collect::<Vec<_>>();
    let of = |id, slot, n| Entry::Booked(Booking { blocks: blocks(n), ..bare(id, slot) }).encode();
    replica.apply_entry(&of(1, 1, 81));
    book(&mut replica, 2, 2, 100_000);
    let busy = |threshold| Settings {
        busy_thresholds: BusyThresholds { busy: Some(threshold), ..BusyThresholds::default() },
        ..Settings::default()
    };
    assert_eq!(with(&mut replica, &busy(0.9), Demands::default()), Ok(1));
    assert_eq!(with(&mut replica, &busy(0.8), Demands::default()), Ok(2));
    replica.apply_entry(&of(3, 2, 82));
    assert_eq!(with(&mut replica, &busy(0.8), Demands::default()), Ok(1));
}

#[test]
fn a_full_queue_refuses() {
    let sized = |slot| RosterWorker { max_num_batched_tokens: 100, ..aggregated(slot) };
    let mut replica = live(vec![sized(1), sized(2)]);
    let limits = |requests_per_worker, tokens_per_worker| Settings {
        router_queue_threshold: Some(2.0),
        queue_limits: QueueLimits { requests_per_worker, tokens_per_worker },
        ..Settings::default()
    };
    book(&mut replica, 1, 1, 500);
    let none = limits(Some(0), None);
    assert_eq!(with(&mut replica, &none, Demands::default()), Ok(2), "one takes more");
    book(&mut replica, 2, 2, 201);
    assert_eq!(with(&mut replica, &limits(None, None), Demands::default()), Ok(2), "no limit");
    assert_eq!(with(&mut replica, &none, Demands::default()), Err(Unplaced::QueueFull));
    // Nothing waits yet: each worker computes one.
    assert_eq!(with(&mut replica, &limits(Some(1), None), Demands::default()), Ok(2));
    book(&mut replica, 3, 1, 1);
    book(&mut replica, 4, 1, 1);
    let full = Err(Unplaced::QueueFull);
    assert_eq!(with(&mut replica, &limits(Some(1), None), Demands::default()), full);
    // 302 and 1 tokens beyond the threshold.
    assert_eq!(with(&mut replica, &limits(None, Some(151)), Demands::default()), full);
    assert_eq!(with(&mut replica, &limits(None, Some(152)), Demands::default()), Ok(2));
}

fn place(replica: &mut Replica, settings: &Settings, demands: Demands, id: u64, at_ms: u64) -> u16 {
    let prepared = prompt_with(demands);
    let choice = select(replica, &prepared, settings, at_ms, &mut Random::seeded(id)).unwrap();
    let ids = [BookingId(id), BookingId(id + 1)];
    replica.apply_entry(&choice.entry(&prepared, settings, ids, at_ms));
    choice.serving.slot.0
}

#[test]
fn a_session_stays_with_its_worker() {
    let affinity = |mode| Settings {
        session_affinity: Some(SessionAffinity { ttl_ms: 5_000, mode }),
        busy_thresholds: BusyThresholds {
            active_prefill_tokens: Some(1_000),
            ..BusyThresholds::default()
        },
        ..Settings::default()
    };
    let hard = affinity(AffinityMode::Hard);
    let of_a = || Demands { session: Some(A), ..Demands::default() };
    let mut replica = live(vec![aggregated(1), aggregated(2)]);
    let bound = place(&mut replica, &hard, of_a(), 10, 0);
    let other = 3 - bound;
    book(&mut replica, 1, bound, 900);
    assert_eq!(place(&mut replica, &hard, of_a(), 20, 0), bound);
    assert_eq!(place(&mut replica, &hard, Demands::default(), 30, 0), other);
    book(&mut replica, 2, bound, 200);
    assert_eq!(with(&mut replica, &hard, of_a()), Err(Unplaced::PinOverloaded));
    let soft = affinity(AffinityMode::Soft);
    assert_eq!(place(&mut replica, &soft, of_a(), 40, 0), other, "and is bound anew");
    replica.apply_entry(&Entry::Freed(BookingId(1)).encode());
    replica.apply_entry(&Entry::Freed(BookingId(2)).encode());
    assert_eq!(with(&mut replica, &hard, of_a()), Ok(other));
    // A worker that is gone binds nobody.
    let left = Roster { workers: vec![aggregated(bound)], adapters: Vec::new() }.encode();
    let next = Frame { kind: Kind::Roster, epoch: 1, sequence: 2, body: &left }.encode();
    replica.apply_state_bytes(&next);
    assert_eq!(with(&mut replica, &hard, of_a()), Ok(bound));
}

#[test]
fn sessions_do_not_bind_unless_configured() {
    let mut replica = live(vec![aggregated(1), aggregated(2)]);
    let of_a = || Demands { session: Some(A), ..Demands::default() };
    place(&mut replica, &Settings::default(), of_a(), 10, 0);
    assert_eq!(replica.affinity().sessions(), 0);
}

/// Without events the own decisions stand for the caches.
#[test]
fn approximate_mode_follows_own_decisions() {
    let settings = Settings { use_kv_events: false, router_ttl_ms: 1_000, ..Settings::default() };
    let mut replica = live(vec![aggregated(1), aggregated(2)]);
    // What the workers say does not count.
    let hashes = prompt_with(Demands::default()).hashes;
    let first = place(&mut replica, &settings, Demands::default(), 10, 0);
    hold(&mut replica, &[(3 - first, &hashes)]);
    replica.apply_entry(&Entry::Freed(BookingId(10)).encode());
    let at = |replica: &mut Replica, now_ms| {
        select(replica, &prompt_with(Demands::default()), &settings, now_ms, &mut Random::seeded(1))
            .unwrap()
    };
    let choice = at(&mut replica, 900);
    assert_eq!((choice.serving.slot.0, choice.serving.held.device), (first, 8));
    assert_eq!(choice.reason, Reason::Approximate);
    assert_eq!(at(&mut replica, 1_000).serving.held.device, 0);
}

#[test]
fn least_recently_used_needs_the_worker_s_capacity() {
    let settings = Settings {
        use_kv_events: false,
        router_approximate_cache_policy: ApproximateCachePolicy::Lru,
        router_ttl_ms: 1_000,
        ..Settings::default()
    };
    let sized = |total_kv_blocks| RosterWorker { total_kv_blocks, ..aggregated(1) };
    for (total, held_at_the_end) in [(5, 5), (0, 0)] {
        let mut replica = live(vec![sized(total)]);
        place(&mut replica, &settings, Demands::default(), 10, 0);
        replica.apply_entry(&Entry::Freed(BookingId(10)).encode());
        let prepared = prompt_with(Demands::default());
        let choice = select(&mut replica, &prepared, &settings, 9_999, &mut Random::seeded(1));
        assert_eq!(choice.unwrap().serving.held.device, held_at_the_end);
    }
}

/// A decision counts as cached until the worker says so itself.
#[test]
fn a_decision_is_predicted_to_be_cached() {
    let settings = Settings { router_predicted_ttl_ms: Some(500), ..Settings::default() };
    let mut replica = live(vec![aggregated(1), aggregated(2)]);
    let first = place(&mut replica, &settings, Demands::default(), 10, 0);
    let hashes = prompt_with(Demands::default()).hashes;
    hold(&mut replica, &[(3 - first, &hashes[..2])]);
    replica.apply_entry(&Entry::Freed(BookingId(10)).encode());
    let prepared = prompt_with(Demands::default());
    let mut held = Vec::new();
    let mut all = |replica: &mut Replica, now_ms| {
        replica.held(&prepared.hashes, &settings, now_ms, &mut held);
        held.iter().map(|it| (it.slot.0, it.blocks)).collect::<Vec<_>>()
    };
    let mut expected = [(first, 8), (3 - first, 2)];
    expected.sort_unstable();
    assert_eq!(all(&mut replica, 499), expected);
    assert_eq!(all(&mut replica, 500), [(3 - first, 2)]);
}

#[test]
fn what_is_tracked_is_booked() {
    let booked = |settings: Settings| {
        let mut replica = live(vec![aggregated(1)]);
        place(&mut replica, &settings, Demands::default(), 10, 0);
        let load = replica.loads().of(WorkerSlot(1));
        let again = replica
            .loads()
            .additional_blocks(WorkerSlot(1), &prompt_with(Demands::default()).hashes);
        (load.prefill_tokens, load.active_blocks, again)
    };
    let all = Settings::default();
    assert_eq!(booked(all), (34, 8, 0));
    assert_eq!(booked(Settings { router_track_prefill_tokens: false, ..all }), (0, 8, 0));
    assert_eq!(booked(Settings { router_track_active_blocks: false, ..all }), (34, 0, 8));
    assert_eq!(booked(Settings { router_assume_kv_reuse: false, ..all }), (34, 8, 8));
}

#[test]
fn two_tiers_choose_where_configured() {
    let two_tier = SelectionPolicy::TwoTier(TwoTier::default());
    let settings = Settings { selection_policy: two_tier, ..Settings::default() };
    let mut replica = live(vec![aggregated(1), aggregated(2)]);
    let hashes = prompt_with(Demands::default()).hashes;
    hold(&mut replica, &[(2, &hashes)]);
    for id in 0..3 {
        book(&mut replica, id, 2, 100_000);
    }
    assert_eq!(plain(&mut replica, Demands::default()), Ok(1));
    assert_eq!(with(&mut replica, &settings, Demands::default()), Ok(2));
}

/// Conditional disaggregation: a decode worker that has most of the prompt
/// computes the rest itself.
#[test]
fn a_decode_worker_may_compute_the_rest() {
    let prefill = |slot| RosterWorker {
        max_num_batched_tokens: 100,
        ..worker(slot, 0, Role::Prefill, Parity::Exact)
    };
    let decode =
        |slot| RosterWorker { total_kv_blocks: 10, ..worker(slot, 0, Role::Decode, Parity::Exact) };
    let mut replica = live(vec![prefill(1), decode(3), decode(4)]);
    let hashes = prompt_with(Demands::default()).hashes;
    hold(&mut replica, &[(4, &hashes[..6])]);
    book(&mut replica, 1, 1, 100);
    let with = |conditional: ConditionalDisagg| Settings {
        conditional_disagg: Some(conditional),
        ..Settings::default()
    };
    let mut legs = |settings: &Settings| {
        let prepared = prompt_with(Demands::default());
        let choice = select(&mut replica, &prepared, settings, 0, &mut Random::seeded(1)).unwrap();
        (choice.serving.slot.0, choice.prefill.map(|leg| leg.slot.0), choice.serving.held.device)
    };
    let off = legs(&Settings::default());
    assert_eq!((off.1, off.2), (Some(1), 0));
    let base = ConditionalDisagg::default();
    // 10 of 34 tokens are left.
    assert_eq!(legs(&with(base)), (4, None, 6));
    let small = ConditionalDisagg { eff_isl_threshold: 10, ..base };
    assert_eq!(legs(&with(small)), (4, Some(1), 0), "the cache still chooses the decode worker");
    let share = ConditionalDisagg { eff_isl_ratio_threshold: 0.29, ..base };
    assert_eq!(legs(&with(share)).1, Some(1));
    let load = |prefill_busy_threshold, decode_busy_threshold| {
        with(ConditionalDisagg {
            policy: ConditionalDisaggPolicy::PrefillLoad,
            prefill_busy_threshold,
            decode_busy_threshold,
            ..base
        })
    };
    assert_eq!(legs(&load(Some(0.9), None)).1, None);
    assert_eq!(legs(&load(Some(1.0), None)).1, Some(1), "100 is not above 100");
    let by_queue = Settings { router_queue_threshold: Some(0.9), ..load(None, None) };
    assert_eq!(legs(&by_queue).1, None, "the queue's threshold stands in");
    // The prompt's 9 blocks would fill 0.9 of the decode worker.
    assert_eq!(legs(&load(Some(0.9), Some(0.9))).1, None);
    assert_eq!(legs(&load(Some(0.9), Some(0.89))).1, Some(1));
    let either = ConditionalDisagg { policy: ConditionalDisaggPolicy::IslOrLoad, ..small };
    assert_eq!(legs(&with(either)).1, Some(1));
    let either = ConditionalDisagg { prefill_busy_threshold: Some(0.5), ..either };
    assert_eq!(legs(&with(either)).1, None);
}

/// What a worker says of its cache overloads it, until it says otherwise.
#[test]
fn a_full_cache_overloads() {
    let mut replica = live(vec![aggregated(1), aggregated(2)]);
    book(&mut replica, 1, 2, 100_000);
    let busy_thresholds =
        BusyThresholds { active_decode_blocks: Some(0.8), ..BusyThresholds::default() };
    let settings = Settings { busy_thresholds, ..Settings::default() };
    let mut says = |used, active| {
        let usage = CacheUsage { used: Share::of(used, 100), active: Share::of(active, 100) };
        let body = CacheUsages::of([(WorkerSlot(1), usage)]).encode();
        replica.apply_entry(&Entry::Feed(&frame(Kind::CacheUsage, &body)).encode());
        with(&mut replica, &settings, Demands::default())
    };
    assert_eq!(says(80, 10), Ok(1), "80 is not beyond 80");
    assert_eq!(says(81, 10), Ok(2));
    assert_eq!(says(10, 81), Ok(2), "either counts");
    assert_eq!(says(10, 10), Ok(1));
}
