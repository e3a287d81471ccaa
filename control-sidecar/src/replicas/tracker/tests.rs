//! Two trackers that hear each other, in order and out of it, and what they say.

use proptest::prelude::*;
use warmpath_core::bookings::Flags;
use warmpath_core::ids::{DpRank, WorkerId};
use warmpath_core::load::Loads;

use super::*;

const GATEWAY: u64 = 0xabcd_ef01_2345_6789;
const CHANGE: Flags = Flags { begins: false, ends: false, wanted: false };
const LIST: Flags = Flags { begins: true, ends: true, wanted: false };

fn worker(id: u64) -> Worker {
    Worker { id: WorkerId(id), rank: DpRank(0) }
}

fn path() -> Arc<EndpointPath> {
    Arc::new(crate::replicas::own_path())
}

/// Workers 1, 2 and 3. Slots are a sidecar's own: worker n has `first + n`.
fn directory(first: u16) -> Directory {
    Directory::new(
        (1..=3_u16)
            .map(|id| (WorkerSlot(first + id), Rank { worker: worker(id.into()), path: path() })),
    )
}

fn tracker(router: u64, first: u16) -> Tracker {
    let mut tracker = Tracker::new(router, router);
    tracker.set_directory(directory(first), &mut Out::default());
    tracker.attached(GATEWAY + router);
    tracker
}

fn booking(id: u64, slot: u16) -> Booking {
    Booking {
        prefill_tokens: 30,
        blocks: vec![SequenceHash(1), SequenceHash(id)],
        ..Booking::new(BookingId(id), WorkerSlot(slot), 0)
    }
}

fn hear(tracker: &mut Tracker, flags: Flags, entries: &[Entry<'_>], now_ms: u64) -> Out {
    let encoded: Vec<Vec<u8>> = entries.iter().map(Entry::encode).collect();
    let entries = encoded.iter().map(Vec::as_slice).collect();
    let mut out = Out::default();
    let gateway = GATEWAY + tracker.router;
    tracker.heard(gateway, &Bookings { flags, now_ms: 0, entries }, now_ms, &mut out);
    out
}

fn receive(tracker: &mut Tracker, events: Vec<SequenceEvent>, now_ms: u64) -> Out {
    let mut out = Out::default();
    for event in events {
        let publisher = event.router + 100;
        tracker.received(event, publisher, true, now_ms, &mut out);
    }
    out
}

fn events(out: Out) -> Vec<SequenceEvent> {
    out.events.into_iter().map(|(_, event)| event).collect()
}

fn apply(loads: &mut Loads, out: Out) {
    for entry in out.entries {
        match entry {
            Entry::Booked(booking) => loads.add(booking),
            Entry::PrefillDone(id) => loads.prefill_done(id),
            Entry::Refreshed(id, at_ms) => loads.refresh(id, at_ms),
            Entry::Freed(id) => loads.free(id),
            other => panic!("{other:?}"),
        }
    }
}

/// Goal: what one gateway books counts for the other, under the other's own
/// number for the worker, until it ends.
#[test]
fn what_one_books_the_other_counts() {
    let (mut here, mut there) = (tracker(1, 10), tracker(2, 20));
    let mut loads = Loads::new();
    let out = hear(&mut here, CHANGE, &[Entry::Booked(booking(5, 12))], 100);
    let said = events(out);
    let Step::Added(added) = &said[0].step else { panic!("not added") };
    assert_eq!((added.tracks_prefill, added.prefill_tokens), (true, Some(30)));
    assert_eq!(added.blocks.as_ref().unwrap().len(), 2);
    assert_eq!((said[0].worker, said[0].router), (worker(2), 1));
    apply(&mut loads, receive(&mut there, said, 100));
    let load = loads.of(WorkerSlot(22));
    assert_eq!((load.prefill_tokens, load.active_blocks, load.requests), (30, 2, 1));
    for entry in [Entry::PrefillDone(BookingId(5)), Entry::Freed(BookingId(5))] {
        // Said twice, heard twice: once is enough.
        let said = events(hear(&mut here, CHANGE, &[entry.clone(), entry], 100));
        assert_eq!(said.len(), 1);
        apply(&mut loads, receive(&mut there, said.clone(), 100));
        apply(&mut loads, receive(&mut there, said, 100));
        assert_eq!(loads.of(WorkerSlot(22)).prefill_tokens, 0);
    }
    assert_eq!((here.levels(), there.levels()), (Levels::default(), Levels::default()));
    assert_eq!(loads.bookings(), 0);
}

#[test]
fn unshared_blocks_have_random_names() {
    let mut here = tracker(1, 10);
    let unshared = |id| {
        Entry::Booked(Booking {
            unshared_blocks: 3,
            ..Booking::new(BookingId(id), WorkerSlot(11), 0)
        })
    };
    let plain = Entry::Booked(Booking::new(BookingId(7), WorkerSlot(11), 0));
    let said = events(hear(&mut here, CHANGE, &[unshared(5), unshared(6), plain], 0));
    let blocks: Vec<_> = said
        .iter()
        .map(|event| match &event.step {
            Step::Added(added) => added.blocks.clone(),
            other => panic!("{other:?}"),
        })
        .collect();
    let all: HashSet<_> = blocks.iter().flatten().flatten().collect();
    assert_eq!(all.len(), 6, "no two are the same");
    assert_eq!(blocks[2], None, "not tracked");
}

/// Goal: a list frees what it does not name, and tells others.
#[test]
fn a_list_of_a_gateway_is_the_whole() {
    let mut here = tracker(1, 10);
    let two = [Entry::Booked(booking(5, 11)), Entry::Booked(booking(6, 11))];
    hear(&mut here, CHANGE, &two, 0);
    let said = events(hear(&mut here, LIST, &[Entry::Booked(booking(6, 11))], 0));
    assert_eq!(said.len(), 1);
    assert_eq!((&said[0].step, here.levels().own), (&Step::Freed, 1));
    assert_eq!(said[0].request, request_name(GATEWAY + 1, BookingId(5)));
}

/// Goal: a worker that says that a prompt is computed is believed of its own
/// requests only, ours and others'.
#[test]
fn workers_mark_their_own_requests() {
    let mut here = tracker(1, 10);
    hear(&mut here, CHANGE, &[Entry::Booked(booking(5, 12))], 0);
    let mark = |request: &str, id| SequenceEvent {
        request: request.to_owned(),
        worker: worker(id),
        router: id,
        lora: None,
        step: Step::PrefillCompleted,
    };
    let own = request_name(GATEWAY + 1, BookingId(5));
    let mut out = Out::default();
    // Also without replica sync.
    here.received(mark(&own, 2), 9, false, 0, &mut out);
    here.received(mark(&own, 3), 9, false, 0, &mut out);
    here.received(mark("other", 3), 9, false, 0, &mut out);
    assert_eq!(out.entries, [Entry::PrefillDone(BookingId(5))]);
    assert_eq!(out.dropped, ["other_worker", "unknown_request"]);
}

#[test]
fn whoever_is_gone_takes_its_bookings_along() {
    let (mut here, mut there) = (tracker(1, 10), tracker(2, 20));
    let all = [Entry::Booked(booking(5, 11)), Entry::Booked(booking(6, 12))];
    let said = events(hear(&mut here, CHANGE, &all, 0));
    let mut loads = Loads::new();
    apply(&mut loads, receive(&mut there, said.clone(), 0));
    let mut out = Out::default();
    there.set_directory(
        Directory::new([(WorkerSlot(22), Rank { worker: worker(2), path: path() })]),
        &mut out,
    );
    apply(&mut loads, out);
    assert_eq!(loads.bookings(), 1, "its worker");
    let mut out = Out::default();
    there.gone(77, &mut out);
    assert!(out.entries.is_empty());
    there.gone(101, &mut out);
    apply(&mut loads, out);
    assert_eq!(loads.bookings(), 0, "its router");
    // If it was not gone for good, it says so.
    apply(&mut loads, receive(&mut there, said, 0));
    assert_eq!(loads.bookings(), 1);
    // A gateway that stays away.
    here.detached(GATEWAY + 1, 1_000);
    let mut out = Out::default();
    here.expire(2_999, 1_000_000, 2_000, &mut out);
    assert!(out.events.is_empty());
    here.expire(3_000, 1_000_000, 2_000, &mut out);
    assert_eq!((out.events.len(), here.levels().own), (2, 0));
}

/// Goal: a list that was made before an end does not bring the booking back, but
/// a router that places the request again is heard.
#[test]
fn ends_outlive_older_lists() {
    let (mut here, mut there) = (tracker(1, 10), tracker(2, 20));
    let mut loads = Loads::new();
    let said = events(hear(&mut here, CHANGE, &[Entry::Booked(booking(5, 11))], 0));
    let account = here.account(&path());
    apply(&mut loads, receive(&mut there, said.clone(), 0));
    let freed = events(hear(&mut here, CHANGE, &[Entry::Freed(BookingId(5))], 0));
    apply(&mut loads, receive(&mut there, freed, 0));
    let mut out = Out::default();
    let source = Source { router: 1, publisher: 101 };
    there.listed(source, (true, true), account, 1, &mut out);
    apply(&mut loads, out);
    assert_eq!(loads.bookings(), 0);
    apply(&mut loads, receive(&mut there, said, 2));
    assert_eq!(loads.bookings(), 1);
}

#[test]
fn what_nobody_speaks_of_expires() {
    let (mut here, mut there) = (tracker(1, 10), tracker(2, 20));
    let said = events(hear(&mut here, CHANGE, &[Entry::Booked(booking(5, 11))], 0));
    receive(&mut there, said, 0);
    hear(&mut here, CHANGE, &[Entry::Refreshed(BookingId(5), 0)], 200);
    let mut out = Out::default();
    here.expire(300, 300, 1_000, &mut out);
    there.expire(299, 300, 1_000, &mut out);
    assert!(out.events.is_empty() && out.entries.is_empty());
    // An account says that it runs.
    let account = here.account(&path());
    there.listed(Source { router: 1, publisher: 101 }, (true, true), account, 250, &mut out);
    there.expire(400, 300, 1_000, &mut out);
    assert!(matches!(out.entries[..], [Entry::Refreshed(_, 250)]), "{:?}", out.entries);
    there.expire(550, 300, 1_000, &mut out);
    here.expire(500, 300, 1_000, &mut out);
    assert_eq!((here.levels(), there.levels()), (Levels::default(), Levels::default()));
    assert!(matches!(events(out)[..], [SequenceEvent { step: Step::Freed, .. }]));
}

#[test]
fn beyond_the_limits_nothing_is_taken_in() {
    let mut there = tracker(2, 20);
    let added = |request: usize, blocks: usize| SequenceEvent {
        request: request.to_string(),
        worker: worker(1),
        router: 1,
        lora: None,
        step: Step::Added(Added {
            blocks: Some(vec![SequenceHash(1); blocks]),
            ..Added::default()
        }),
    };
    let out = receive(&mut there, vec![added(0, BOOKING_BLOCKS_MAX + 1)], 0);
    assert_eq!(out.dropped, ["long_prompt"]);
    let Entry::Booked(booking) = &out.entries[0] else { panic!("not booked") };
    assert_eq!(booking.blocks.len(), BOOKING_BLOCKS_MAX);
    let many = REMOTE_BLOCKS_MAX / BOOKING_BLOCKS_MAX;
    let out = receive(&mut there, (1..=many).map(|it| added(it, BOOKING_BLOCKS_MAX)).collect(), 0);
    assert_eq!((out.dropped, there.levels().remote), (vec!["too_many_bookings"], many));
    let out =
        receive(&mut there, (many..=REMOTE_BOOKINGS_MAX + 1).map(|it| added(it, 0)).collect(), 0);
    assert_eq!(there.levels().remote, REMOTE_BOOKINGS_MAX);
    assert!(out.dropped.contains(&"too_many_bookings"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Goal: whatever of it is lost, doubled or late, another router's load here
    /// is never more than what it booked, and an account makes it right; with
    /// everything freed it is zero.
    #[test]
    fn accounts_make_up_for_loss(
        steps in prop::collection::vec((0_u8..3, 0_u64..8, 1_u16..4), 0..80),
        fates in prop::collection::vec(0_u8..4, 400),
    ) {
        let (mut here, mut there) = (tracker(1, 10), tracker(2, 20));
        let (mut truth, mut loads) = (Loads::new(), Loads::new());
        let mut fates = fates.into_iter().cycle();
        let mut late = Vec::new();
        let mut next = 0;
        for (what, which, slot) in steps {
            let id = BookingId((next - which.min(next)).max(1));
            let entry = match what {
                0 => {
                    next += 1;
                    Entry::Booked(booking(next, 10 + slot))
                }
                1 => Entry::PrefillDone(id),
                _ => Entry::Freed(id),
            };
            match &entry {
                Entry::Booked(booking) => truth.add(booking.clone()),
                Entry::PrefillDone(id) => truth.prefill_done(*id),
                _ => truth.free(id),
            }
            for event in events(hear(&mut here, CHANGE, &[entry], 10)) {
                let copies = match fates.next() {
                    Some(0) => 0,
                    Some(1) => 2,
                    Some(2) => {
                        late.push(event.clone());
                        0
                    }
                    _ => 1,
                };
                for _ in 0..copies {
                    apply(&mut loads, receive(&mut there, vec![event.clone()], 10));
                }
            }
            prop_assert!(there.levels().remote <= usize::try_from(next).unwrap());
        }
        late.reverse();
        apply(&mut loads, receive(&mut there, late, 10));
        let mut account = |here: &Tracker, there: &mut Tracker, now_ms| {
            let mut out = Out::default();
            let source = Source { router: 1, publisher: 101 };
            there.listed(source, (true, true), here.account(&path()), now_ms, &mut out);
            apply(&mut loads, out);
            [1, 2, 3].map(|slot| loads.of(WorkerSlot(20 + slot)))
        };
        let seen = account(&here, &mut there, 10 + LIST_RACE_MS + 1);
        // What ended early, and was said to have, is not brought back; what was
        // freed here is not there.
        prop_assert_eq!(seen, [1, 2, 3].map(|slot| truth.of(WorkerSlot(10 + slot))));
        hear(&mut here, LIST, &[], 10);
        let seen = account(&here, &mut there, 10 + 4 * LIST_RACE_MS);
        prop_assert!(seen.iter().all(|load| load.requests == 0 && load.active_blocks == 0));
        prop_assert_eq!((here.levels(), there.levels()), (Levels::default(), Levels::default()));
        prop_assert_eq!(there.remote_blocks, 0);
    }
}
