//! The cursor against a relay by the book, with every fault there is.

#![expect(clippy::cast_possible_truncation, reason = "the tests' own small numbers")]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use warmpath_core::event::{Group, Hashed, Medium, Removed};
use warmpath_core::ids::{BlockHash, DpRank, EngineHash, Worker, WorkerId};

use super::*;

const WORKER: Worker = Worker { id: WorkerId(7), rank: DpRank(0) };

fn event(id: u64, change: Change) -> RouterEvent {
    RouterEvent { worker: WORKER, id, change, skipped: None }
}

fn store(block: u64) -> KvEvent {
    let blocks = vec![(EngineHash(block), BlockHash(block))];
    KvEvent::Hashed(Hashed { blocks, parent: None, medium: Medium::Device })
}

fn remove(block: u64) -> KvEvent {
    let pages = vec![EngineHash(block)];
    KvEvent::Removed(Removed { pages, medium: Medium::Device, group: Group::default() })
}

fn stored(id: u64) -> RouterEvent {
    event(id, Change::Event(store(id)))
}

fn query(number: u64, start: Option<u64>, millis: u64) -> Action {
    Action::Query(Query { number, start, after: Duration::from_millis(millis) })
}

/// A cursor that has taken in events 1 to `last` and is live.
fn live_at(last: u64, has_recovery: bool) -> Cursor {
    let mut cursor = Cursor::new(has_recovery);
    cursor.connected(Duration::ZERO);
    if has_recovery {
        let events = (1..=last).map(stored).collect();
        cursor.answered(1, Answer::Dump { events, last });
    } else {
        (1..=last).for_each(|id| cursor.live(stored(id)));
    }
    cursor.actions();
    assert_eq!(cursor.standing().applied, Some(last));
    assert_eq!(cursor.standing().partial, None);
    cursor
}

#[test]
fn a_first_connection_asks_for_everything_and_goes_on_with_what_was_held() {
    let mut cursor = Cursor::new(true);
    cursor.connected(Duration::from_millis(2));
    assert_eq!(cursor.actions(), [query(1, None, 2)]);
    cursor.live(stored(4));
    cursor.live(stored(5));
    assert!(cursor.standing().repairing && !cursor.standing().synced);
    cursor.answered(1, Answer::Dump { events: vec![event(0, Change::Event(store(9)))], last: 4 });
    assert_eq!(
        cursor.actions(),
        [Action::Replace(4, vec![store(9)]), Action::Apply(5, vec![store(5)])]
    );
    let standing = cursor.standing();
    assert!(standing.synced && !standing.repairing);
    assert_eq!((standing.partial, standing.applied), (None, Some(5)));
}

#[test]
fn a_gap_is_asked_for_and_nothing_behind_it_is_applied_before() {
    let mut cursor = live_at(3, true);
    cursor.live(stored(6));
    cursor.live(stored(7));
    assert_eq!(cursor.actions(), [query(2, Some(4), 0)]);
    let events = vec![stored(4), stored(5), stored(6)];
    cursor.answered(2, Answer::Events { events, last: 6 });
    let applied = [4, 5, 6, 7].map(store).to_vec();
    assert_eq!(cursor.actions(), [Action::Apply(7, applied)]);
    assert_eq!(cursor.gaps(), 1);
    cursor.live(stored(7));
    assert_eq!(cursor.actions(), []);
    assert_eq!(cursor.duplicates(), 2);
}

#[test]
fn a_hole_in_an_answer_is_asked_for_after_a_pause() {
    let mut cursor = live_at(3, true);
    cursor.live(stored(8));
    cursor.actions();
    let events = vec![stored(4), stored(6)];
    cursor.answered(2, Answer::Events { events, last: 6 });
    assert_eq!(cursor.actions(), [Action::Apply(4, vec![store(4)]), query(3, Some(5), 200)]);
    // Not to the end either.
    cursor.answered(3, Answer::Events { events: vec![stored(5)], last: 7 });
    assert_eq!(cursor.actions(), [Action::Apply(5, vec![store(5)]), query(4, Some(6), 200)]);
    cursor.failed(4);
    assert_eq!(cursor.actions(), [query(5, Some(6), 400)]);
    // An answer of a query before is passed over.
    cursor.answered(4, Answer::Dump { events: Vec::new(), last: 9 });
    assert_eq!(cursor.actions(), []);
}

#[test]
fn a_worker_that_does_not_answer_leaves_the_rank_degraded() {
    let mut cursor = live_at(3, true);
    cursor.live(stored(5));
    cursor.actions();
    let mut pauses = Vec::new();
    for _ in 0..RECOVERY_RETRIES_MAX {
        cursor.failed(cursor.query);
        let [Action::Query(query)] = cursor.actions()[..] else { panic!("not asked again") };
        pauses.push(query.after.as_millis() as u64);
    }
    assert_eq!(pauses, [200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600]);
    cursor.failed(cursor.query);
    assert_eq!(cursor.actions(), [Action::Clear(Loss::Degraded), Action::Apply(5, vec![store(5)])]);
    assert_eq!(cursor.standing().partial, Some(Loss::Degraded));
    // It is asked for everything again later, and stays as it is without answer.
    cursor.check();
    assert_eq!(cursor.actions(), [query(11, None, 0)]);
    cursor.live(stored(6));
    cursor.failed(11);
    assert_eq!(cursor.actions(), [Action::Apply(6, vec![store(6)])]);
    cursor.check();
    let events = vec![event(0, Change::Event(store(1)))];
    cursor.answered(12, Answer::Dump { events, last: 6 });
    assert_eq!(cursor.standing().partial, None);
}

/// Goal: a worker that says that nothing is missing while something is does not
/// keep us asking for ever.
#[test]
fn an_answer_that_closes_nothing_is_a_failure() {
    let mut cursor = live_at(3, true);
    cursor.live(stored(5));
    let mut queries = 0;
    loop {
        match &cursor.actions()[..] {
            [Action::Query(query)] => {
                queries += 1;
                cursor.answered(query.number, Answer::TooNew { newest: 3 });
            }
            actions => {
                assert_eq!(actions.first(), Some(&Action::Clear(Loss::Degraded)));
                break;
            }
        }
    }
    assert_eq!(queries, 1 + RECOVERY_RETRIES_MAX);
}

#[test]
fn a_worker_that_knows_less_is_asked_for_everything() {
    for answer in [Answer::TooNew { newest: 1 }, Answer::Refused(Refusal::InvalidRange)] {
        let mut cursor = live_at(3, true);
        cursor.live(stored(5));
        cursor.answered(2, answer);
        assert_eq!(cursor.actions().last(), Some(&query(3, None, 200)));
        // An account older than what we know is not taken.
        cursor.answered(3, Answer::Dump { events: Vec::new(), last: 2 });
        assert_eq!(cursor.actions(), [query(4, None, 400)]);
    }
}

#[test]
fn a_clear_of_everything_ends_a_query_and_needs_nothing_before_it() {
    let mut cursor = live_at(3, true);
    cursor.live(stored(6));
    cursor.actions();
    cursor.live(stored(9));
    cursor.live(event(8, Change::ClearedAll));
    assert_eq!(
        cursor.actions(),
        [Action::StopQuery, Action::Apply(9, vec![KvEvent::Cleared, store(9)])]
    );
    cursor.answered(2, Answer::Events { events: vec![stored(4)], last: 4 });
    assert_eq!(cursor.actions(), []);
    // The worker's own blocks only: in its place.
    let mut cursor = live_at(3, true);
    cursor.live(event(5, Change::Event(KvEvent::Cleared)));
    assert_eq!(cursor.actions(), [query(2, Some(4), 0)]);
}

#[test]
fn without_a_recovery_target_a_gap_clears_the_rank() {
    let mut cursor = live_at(3, false);
    cursor.live(stored(5));
    assert_eq!(cursor.actions(), [Action::Clear(Loss::NoReplay), Action::Apply(5, vec![store(5)])]);
    assert_eq!(cursor.standing().partial, Some(Loss::NoReplay));
    cursor.live(event(6, Change::Event(KvEvent::Cleared)));
    assert_eq!(cursor.standing().partial, None);
}

#[test]
fn a_new_connection_asks_for_what_was_missed() {
    let mut cursor = live_at(3, true);
    cursor.disconnected();
    assert!(!cursor.standing().connected);
    cursor.connected(Duration::ZERO);
    assert_eq!(cursor.actions(), [query(2, Some(4), 0)]);
    assert!(!cursor.standing().repairing);
    cursor.answered(2, Answer::TooNew { newest: 3 });
    assert_eq!(cursor.actions(), []);
    cursor.gone();
    cursor.gone();
    assert_eq!(cursor.actions(), [Action::Clear(Loss::PublisherGone)]);
}

#[test]
fn more_than_can_be_held_is_asked_for_again() {
    let mut cursor = live_at(3, true);
    let held = PLANE_EVENTS_HELD_MAX as u64;
    (5..5 + held + 10).for_each(|id| cursor.live(stored(id)));
    assert_eq!(cursor.evicted(), 10);
    cursor.actions();
    cursor.answered(2, Answer::Events { events: vec![stored(4), stored(5)], last: 5 });
    assert_eq!(
        cursor.actions(),
        [Action::Apply(5, [4, 5].map(store).to_vec()), query(3, Some(6), 200)]
    );
}

#[test]
fn events_from_the_beginning_are_a_whole_account() {
    let mut cursor = Cursor::new(true);
    cursor.connected(Duration::ZERO);
    cursor.answered(1, Answer::Events { events: vec![stored(2)], last: 2 });
    assert_eq!(cursor.actions().last(), Some(&query(2, None, 200)));
    let events = vec![event(5, Change::ClearedAll), stored(6)];
    cursor.answered(2, Answer::Events { events, last: 6 });
    assert_eq!(cursor.actions(), [Action::Replace(6, vec![KvEvent::Cleared, store(6)])]);
}

/// A relay by the book.
#[derive(Debug)]
struct Relay {
    ring: VecDeque<RouterEvent>,
    ring_max: usize,
    /// What the rank held after each event; the last is now.
    truth: Vec<BTreeSet<u64>>,
}

impl Relay {
    fn new(ring_max: usize) -> Self {
        Self { ring: VecDeque::new(), ring_max, truth: vec![BTreeSet::new()] }
    }

    fn last(&self) -> u64 {
        self.truth.len() as u64 - 1
    }

    fn publish(&mut self, change: Change) -> RouterEvent {
        let mut now = self.truth.last().unwrap().clone();
        match &change {
            Change::Nothing => {}
            Change::Event(event) => act(&mut now, event),
            Change::ClearedAll => now.clear(),
        }
        self.truth.push(now);
        let event = event(self.last(), change);
        self.ring.push_back(event.clone());
        if self.ring.len() > self.ring_max {
            self.ring.pop_front();
        }
        event
    }

    fn answer(&self, start: Option<u64>) -> Answer {
        let last = self.last();
        let oldest = self.ring.front().map(|event| event.id);
        match (start, oldest) {
            (Some(start), _) if start > last => Answer::TooNew { newest: last },
            (Some(start), Some(oldest)) if start >= oldest => {
                let wanted: Vec<_> =
                    self.ring.iter().filter(|event| event.id >= start).cloned().collect();
                let clear = wanted.iter().rposition(|event| event.change == Change::ClearedAll);
                Answer::Events { events: wanted[clear.unwrap_or(0)..].to_vec(), last }
            }
            _ => {
                let held = self.truth.last().unwrap().iter();
                let events = held.map(|block| event(0, Change::Event(store(*block)))).collect();
                Answer::Dump { events, last }
            }
        }
    }
}

fn act(held: &mut BTreeSet<u64>, event: &KvEvent) {
    match event {
        KvEvent::Hashed(hashed) => held.extend(hashed.blocks.iter().map(|block| block.0.0)),
        KvEvent::Removed(removed) => removed.pages.iter().for_each(|page| {
            held.remove(&page.0);
        }),
        KvEvent::Cleared => held.clear(),
        KvEvent::Stored(_) => panic!("no relay says tokens"),
    }
}

/// What the state would show, and the queries under way.
#[derive(Debug, Default)]
struct Sink {
    held: BTreeSet<u64>,
    shown: Option<u64>,
    /// Answers that were written, or will be, by number of their queries.
    queries: BTreeMap<u64, Option<u64>>,
    stopped: BTreeMap<u64, Answer>,
}

impl Sink {
    /// Does the actions. What is shown is, after each, a part of what the rank
    /// held when the last event shown had happened.
    fn act(&mut self, cursor: &mut Cursor, relay: &Relay) -> Result<(), TestCaseError> {
        for action in cursor.actions() {
            match action {
                Action::Apply(id, events) => {
                    prop_assert!(self.shown.is_none_or(|shown| shown < id));
                    self.shown = Some(id);
                    events.iter().for_each(|event| act(&mut self.held, event));
                }
                Action::Replace(id, events) => {
                    prop_assert!(self.shown.is_none_or(|shown| shown <= id));
                    self.shown = Some(id);
                    self.held.clear();
                    events.iter().for_each(|event| act(&mut self.held, event));
                }
                Action::Clear(_) => {
                    self.shown = None;
                    self.held.clear();
                }
                Action::Query(query) => {
                    self.stop(relay);
                    self.queries.insert(query.number, query.start);
                }
                Action::StopQuery => self.stop(relay),
            }
            let truth = &relay.truth[self.shown.unwrap_or(0) as usize];
            prop_assert!(self.held.is_subset(truth), "{:?} of {truth:?}", self.held);
        }
        if cursor.standing().partial.is_none() {
            prop_assert_eq!(&self.held, &relay.truth[self.shown.unwrap_or(0) as usize]);
        }
        Ok(())
    }

    /// Ends the query under way; its answer may come all the same, late.
    fn stop(&mut self, relay: &Relay) {
        for (number, start) in core::mem::take(&mut self.queries) {
            self.stopped.insert(number, relay.answer(start));
        }
    }
}

#[derive(Clone, Debug)]
enum Fate {
    Delivered,
    Lost,
    Twice,
    /// Delivered when the next is.
    Late,
}

#[derive(Clone, Debug)]
enum Step {
    Publish(u8, u64, Fate),
    Answer,
    Fail,
    LateAnswer,
    Reconnect,
    Gone,
    Check,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let fate = prop_oneof![
        6 => Just(Fate::Delivered),
        2 => Just(Fate::Lost),
        1 => Just(Fate::Twice),
        1 => Just(Fate::Late),
    ];
    let step = prop_oneof![
        12 => (0_u8..40, 0_u64..8, fate).prop_map(|(kind, block, fate)| Step::Publish(kind, block, fate)),
        5 => Just(Step::Answer),
        2 => Just(Step::Fail),
        1 => Just(Step::LateAnswer),
        1 => Just(Step::Reconnect),
        1 => Just(Step::Check),
        1 => Just(Step::Gone),
    ];
    proptest::collection::vec(step, 0..120)
}

fn change(kind: u8, block: u64) -> Change {
    match kind {
        0 => Change::ClearedAll,
        1 => Change::Event(KvEvent::Cleared),
        2 | 3 => Change::Nothing,
        4..=17 => Change::Event(remove(block)),
        _ => Change::Event(store(block)),
    }
}

fn run(steps: Vec<Step>, ring_max: usize, has_recovery: bool) -> Result<(), TestCaseError> {
    let mut relay = Relay::new(ring_max);
    let mut cursor = Cursor::new(has_recovery);
    let mut sink = Sink::default();
    let mut late = Vec::new();
    cursor.connected(Duration::ZERO);
    sink.act(&mut cursor, &relay)?;
    for step in steps {
        match step {
            Step::Publish(kind, block, fate) => {
                let event = relay.publish(change(kind, block));
                match fate {
                    Fate::Lost => continue,
                    Fate::Late => {
                        late.push(event);
                        continue;
                    }
                    Fate::Twice => cursor.live(event.clone()),
                    Fate::Delivered => {}
                }
                cursor.live(event);
                late.drain(..).for_each(|event| cursor.live(event));
            }
            Step::Answer => {
                if let Some((number, start)) = sink.queries.pop_first() {
                    cursor.answered(number, relay.answer(start));
                }
            }
            Step::Fail => {
                if let Some((number, _)) = sink.queries.pop_first() {
                    cursor.failed(number);
                }
            }
            Step::LateAnswer => {
                if let Some((number, answer)) = sink.stopped.pop_first() {
                    cursor.answered(number, answer);
                }
            }
            Step::Reconnect => {
                cursor.disconnected();
                cursor.connected(Duration::ZERO);
            }
            Step::Gone => {
                cursor.gone();
                cursor.connected(Duration::ZERO);
            }
            Step::Check => cursor.check(),
        }
        sink.act(&mut cursor, &relay)?;
    }
    if !has_recovery {
        return Ok(());
    }
    // Quiescence: the worker answers, and the tail is looked at.
    for _ in 0..2 {
        while let Some((number, start)) = sink.queries.pop_first() {
            cursor.answered(number, relay.answer(start));
            sink.act(&mut cursor, &relay)?;
        }
        cursor.check();
        sink.act(&mut cursor, &relay)?;
    }
    while let Some((number, start)) = sink.queries.pop_first() {
        cursor.answered(number, relay.answer(start));
        sink.act(&mut cursor, &relay)?;
    }
    prop_assert_eq!(cursor.standing().partial, None);
    prop_assert_eq!(&sink.held, relay.truth.last().unwrap());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Goal: whatever is lost, comes twice or late, and whether the worker
    /// answers with events or with a dump, nothing is shown that the rank did not
    /// hold; and in the end exactly what it holds is.
    #[test]
    fn a_cursor_shows_what_the_rank_holds(steps in steps(), ring_max in 1_usize..12) {
        run(steps, ring_max, true)?;
    }

    /// Goal: without a worker to ask too much is never shown.
    #[test]
    fn a_cursor_without_recovery_shows_no_more_than_the_rank_holds(steps in steps()) {
        run(steps, 4, false)?;
    }
}
