//! The sequencer against publishers by the book, with every fault there is.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

fn payload(life: u64, sequence: u64) -> Bytes {
    Bytes::from(format!("{life}/{sequence}"))
}

fn apply(life: u64, sequence: u64) -> Action {
    Action::Apply(sequence, payload(life, sequence))
}

/// A sequencer that has applied messages 0 to `last` of life 1 and is live.
fn live_at(last: u64, has_replay: bool) -> Sequencer {
    let mut sequencer = Sequencer::new(has_replay);
    sequencer.connected();
    if has_replay {
        sequencer.replay_ended();
    }
    for sequence in 0..=last {
        sequencer.live(sequence, payload(1, sequence));
    }
    sequencer.actions();
    assert_eq!(sequencer.standing().applied, Some(last));
    assert_eq!(sequencer.standing().partial, None);
    sequencer
}

#[test]
fn a_first_connection_replays_and_goes_on_with_what_was_held() {
    let mut sequencer = Sequencer::new(true);
    sequencer.connected();
    assert_eq!(sequencer.actions(), [Action::Replay(0)]);
    assert!(!sequencer.standing().synced);
    sequencer.live(2, payload(1, 2));
    sequencer.replayed(0, payload(1, 0));
    assert_eq!(sequencer.actions(), [apply(1, 0)]);
    sequencer.replayed(1, payload(1, 1));
    assert_eq!(sequencer.actions(), [apply(1, 1), Action::StopReplay, apply(1, 2)]);
    let standing = sequencer.standing();
    assert!(standing.synced && !standing.repairing);
    assert_eq!((standing.partial, standing.applied), (None, Some(2)));
}

#[test]
fn a_gap_is_closed_before_anything_behind_it_is_applied() {
    let mut sequencer = live_at(3, true);
    sequencer.live(6, payload(1, 6));
    sequencer.live(7, payload(1, 7));
    assert_eq!(sequencer.actions(), [Action::Replay(4)]);
    assert!(sequencer.standing().repairing);
    sequencer.replayed(4, payload(1, 4));
    sequencer.replayed(5, payload(1, 5));
    assert_eq!(
        sequencer.actions(),
        [apply(1, 4), apply(1, 5), Action::StopReplay, apply(1, 6), apply(1, 7)]
    );
    // What the replay still had under way is not applied again.
    sequencer.replayed(6, payload(1, 6));
    sequencer.live(8, payload(1, 8));
    assert_eq!(sequencer.actions(), [apply(1, 8)]);
    assert_eq!(sequencer.gaps(), 1);
}

#[test]
fn messages_seen_twice_are_applied_once() {
    let mut sequencer = live_at(3, true);
    sequencer.live(3, payload(1, 3));
    assert_eq!(sequencer.actions(), []);
    assert_eq!(sequencer.duplicates(), 1);
}

#[test]
fn numbers_that_go_back_are_a_restart() {
    let mut sequencer = live_at(3, true);
    sequencer.live(0, payload(2, 0));
    assert_eq!(sequencer.actions(), [Action::Clear(Loss::Restart), apply(2, 0)]);
    assert_eq!(sequencer.standing().partial, None);
    let mut sequencer = live_at(3, true);
    sequencer.live(1, payload(2, 1));
    assert_eq!(sequencer.actions(), [Action::Clear(Loss::Restart), Action::Replay(0)]);
    sequencer.replayed(0, payload(2, 0));
    assert_eq!(sequencer.actions(), [apply(2, 0), Action::StopReplay, apply(2, 1)]);
}

/// Goal: a new connection to the same publisher keeps the index, one to another
/// never adds to it, however its numbers look.
#[test]
fn a_new_connection_is_verified() {
    let mut same = live_at(3, true);
    same.disconnected();
    same.connected();
    assert_eq!(same.actions(), [Action::Replay(3)]);
    same.replayed(3, payload(1, 3));
    same.replayed(4, payload(1, 4));
    same.replay_ended();
    assert_eq!(same.actions(), [apply(1, 4)]);

    // The same number, other bytes.
    let mut other = live_at(3, true);
    other.disconnected();
    other.connected();
    other.live(4, payload(2, 4));
    other.actions();
    other.replayed(3, payload(2, 3));
    assert_eq!(other.actions(), [Action::Clear(Loss::Restart), Action::Replay(0)]);
    // A late reply of the first replay cannot be told apart here; the source
    // ends a replay before it starts another.
    for sequence in 0..4 {
        other.replayed(sequence, payload(2, sequence));
    }
    let mut expected: Vec<Action> = (0..4).map(|sequence| apply(2, sequence)).collect();
    expected.extend([Action::StopReplay, apply(2, 4)]);
    assert_eq!(other.actions(), expected);

    // It has not come so far yet.
    let mut young = live_at(3, true);
    young.disconnected();
    young.connected();
    young.actions();
    young.replay_ended();
    assert_eq!(young.actions(), [Action::Clear(Loss::Restart), Action::Replay(0)]);
    young.replay_ended();
    assert_eq!(young.standing().partial, None);
}

#[test]
fn history_that_is_gone_clears_and_goes_on() {
    let mut sequencer = live_at(3, true);
    sequencer.live(20, payload(1, 20));
    sequencer.actions();
    sequencer.replayed(18, payload(1, 18));
    sequencer.replayed(19, payload(1, 19));
    assert_eq!(
        sequencer.actions(),
        [
            Action::Clear(Loss::HistoryLost),
            apply(1, 18),
            apply(1, 19),
            Action::StopReplay,
            apply(1, 20)
        ]
    );
    assert_eq!(sequencer.standing().partial, Some(Loss::HistoryLost));
}

#[test]
fn a_replay_that_fails_clears_and_goes_on() {
    let mut sequencer = live_at(3, true);
    sequencer.live(5, payload(1, 5));
    sequencer.actions();
    sequencer.replay_failed();
    assert_eq!(
        sequencer.actions(),
        [Action::StopReplay, Action::Clear(Loss::ReplayFailed), apply(1, 5)]
    );
    assert_eq!(sequencer.standing().partial, Some(Loss::ReplayFailed));
    // Learns on from live traffic, without asking for what is lost.
    sequencer.live(6, payload(1, 6));
    assert_eq!(sequencer.actions(), [apply(1, 6)]);
}

#[test]
fn a_hole_that_replays_never_fill_is_given_up() {
    let mut sequencer = live_at(3, true);
    sequencer.live(5, payload(1, 5));
    assert_eq!(sequencer.actions(), [Action::Replay(4)]);
    for _ in 1..REPLAY_ATTEMPTS_MAX {
        sequencer.replay_ended();
        assert_eq!(sequencer.actions(), [Action::Replay(4)]);
    }
    sequencer.replay_ended();
    assert_eq!(
        sequencer.actions(),
        [Action::StopReplay, Action::Clear(Loss::Unrepairable), apply(1, 5)]
    );
}

#[test]
fn the_tail_is_checked_without_consequence_if_the_replay_is_silent() {
    let mut sequencer = live_at(3, true);
    sequencer.check_tail();
    assert_eq!(sequencer.actions(), [Action::Replay(4)]);
    sequencer.replay_failed();
    assert_eq!(sequencer.actions(), []);
    assert_eq!(sequencer.standing().partial, None);
    sequencer.check_tail();
    sequencer.replayed(4, payload(1, 4));
    sequencer.replay_ended();
    assert_eq!(sequencer.actions(), [Action::Replay(4), apply(1, 4)]);
    // A live message does not wait for the check.
    sequencer.check_tail();
    sequencer.live(5, payload(1, 5));
    assert_eq!(sequencer.actions(), [Action::Replay(5), Action::StopReplay, apply(1, 5)]);
}

#[test]
fn without_replay_any_doubt_clears() {
    let mut sequencer = live_at(3, false);
    sequencer.live(5, payload(1, 5));
    assert_eq!(sequencer.actions(), [Action::Clear(Loss::NoReplay), apply(1, 5)]);
    assert_eq!(sequencer.standing().partial, Some(Loss::NoReplay));
    sequencer.disconnected();
    assert_eq!(sequencer.actions(), [Action::Clear(Loss::ConnectionLost)]);
    sequencer.connected();
    sequencer.live(0, payload(2, 0));
    assert_eq!(sequencer.actions(), [apply(2, 0)]);
    assert_eq!(sequencer.standing().partial, None);
}

#[test]
fn more_than_can_be_held_gives_the_gap_up() {
    let mut sequencer = live_at(0, true);
    let big = Bytes::from(vec![0; HELD_BYTES_MAX / 4 + 1]);
    for sequence in 2..5 {
        sequencer.live(sequence, big.clone());
    }
    assert_eq!(sequencer.actions(), [Action::Replay(1)]);
    sequencer.live(5, big.clone());
    let actions = sequencer.actions();
    assert_eq!(actions[..2], [Action::StopReplay, Action::Clear(Loss::HeldOverflow)]);
    assert_eq!(actions.len(), 6);
    assert_eq!(sequencer.standing().applied, Some(5));

    let mut sequencer = live_at(0, true);
    for sequence in 0..=HELD_MESSAGES_MAX as u64 {
        sequencer.live(2 + sequence, Bytes::new());
    }
    assert_eq!(sequencer.actions()[2], Action::Clear(Loss::HeldOverflow));
}

#[test]
fn a_publisher_that_is_gone_leaves_nothing_behind() {
    let mut sequencer = live_at(3, true);
    sequencer.disconnected();
    sequencer.gone();
    sequencer.gone();
    assert_eq!(sequencer.actions(), [Action::Clear(Loss::PublisherGone)]);
    sequencer.connected();
    sequencer.replay_ended();
    assert_eq!(sequencer.standing().partial, None, "a new publisher that is empty");
}

/// A publisher, its connection and its replay socket, by the book.
struct World {
    sequencer: Sequencer,
    life: u64,
    /// Messages of this life.
    published: u64,
    /// How many of the last messages a replay can have.
    buffer: u64,
    /// Live messages under way, by number.
    wire: VecDeque<u64>,
    connected: bool,
    /// A replay under way: where it starts, and its replies once it has been
    /// taken; `None` at the end is the marker.
    replay: Option<(u64, Option<VecDeque<Option<u64>>>)>,
    /// What has been applied since the last clear.
    applied: Vec<Bytes>,
}

#[derive(Clone, Debug)]
enum Fault {
    Publish(u64),
    Deliver(usize),
    DropOnWire,
    Replay(usize),
    DropReply,
    FailReplay,
    Blip,
    Restart(u64),
    CheckTail,
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        8 => (1_u64..5).prop_map(Fault::Publish),
        8 => (1_usize..6).prop_map(Fault::Deliver),
        2 => Just(Fault::DropOnWire),
        6 => (1_usize..8).prop_map(Fault::Replay),
        1 => Just(Fault::DropReply),
        1 => Just(Fault::FailReplay),
        1 => Just(Fault::Blip),
        1 => (0_u64..6).prop_map(Fault::Restart),
        1 => Just(Fault::CheckTail),
    ]
}

impl World {
    fn new(has_replay: bool, buffer: u64) -> Self {
        Self {
            sequencer: Sequencer::new(has_replay),
            life: 1,
            published: 0,
            buffer,
            wire: VecDeque::new(),
            connected: false,
            replay: None,
            applied: Vec::new(),
        }
    }

    fn connect(&mut self) {
        self.connected = true;
        self.sequencer.connected();
    }

    fn disconnect(&mut self) {
        self.connected = false;
        self.wire.clear();
        self.sequencer.disconnected();
    }

    fn publish(&mut self) {
        if self.connected {
            self.wire.push_back(self.published);
        }
        self.published += 1;
    }

    /// Takes the next reply of the replay, if one is under way.
    fn reply(&mut self) -> Option<Option<u64>> {
        let (start, replies) = self.replay.as_mut()?;
        let first = self.published.saturating_sub(self.buffer).max(*start);
        let replies = replies
            .get_or_insert_with(|| (first..self.published).map(Some).chain([None]).collect());
        replies.pop_front()
    }

    fn perform(&mut self, fault: &Fault) {
        match fault {
            Fault::Publish(count) => (0..*count).for_each(|_| self.publish()),
            Fault::Deliver(count) => {
                for _ in 0..*count {
                    if let Some(sequence) = self.wire.pop_front() {
                        self.sequencer.live(sequence, payload(self.life, sequence));
                        self.act();
                    }
                }
            }
            Fault::DropOnWire => {
                self.wire.pop_front();
            }
            Fault::Replay(count) => {
                for _ in 0..*count {
                    let reply = self.reply();
                    if reply.is_none() {
                        break;
                    }
                    match reply {
                        Some(Some(sequence)) => {
                            self.sequencer.replayed(sequence, payload(self.life, sequence));
                        }
                        Some(None) => {
                            self.replay = None;
                            self.sequencer.replay_ended();
                        }
                        None => {}
                    }
                    self.act();
                }
            }
            Fault::DropReply => {
                self.reply();
            }
            Fault::FailReplay => {
                if self.replay.take().is_some() {
                    self.sequencer.replay_failed();
                }
            }
            Fault::Blip => {
                self.disconnect();
                self.act();
                self.connect();
            }
            Fault::Restart(published) => {
                self.disconnect();
                self.act();
                self.life += 1;
                self.published = 0;
                (0..*published).for_each(|_| self.publish());
                self.connect();
            }
            Fault::CheckTail => self.sequencer.check_tail(),
        }
        self.act();
    }

    /// Does what the sequencer wants, and holds it to its invariants.
    fn act(&mut self) {
        for action in self.sequencer.actions() {
            match action {
                Action::Apply(sequence, payload) => {
                    let text = String::from_utf8(payload.to_vec()).unwrap();
                    assert!(text.ends_with(&format!("/{sequence}")));
                    self.applied.push(payload);
                }
                Action::Clear(_) => self.applied.clear(),
                Action::Replay(start) => self.replay = Some((start, None)),
                Action::StopReplay => self.replay = None,
            }
        }
        let Some((first, rest)) = self.applied.split_first() else { return };
        let text = String::from_utf8(first.to_vec()).unwrap();
        let (life, start) = text.split_once('/').unwrap();
        let (life, start): (u64, u64) = (life.parse().unwrap(), start.parse().unwrap());
        for (at, message) in rest.iter().enumerate() {
            assert_eq!(*message, payload(life, start + 1 + at as u64), "one life, no hole");
        }
        if self.sequencer.standing().partial.is_none() {
            assert_eq!(start, 0, "known whole, so known from the start");
        }
    }

    /// Lets everything arrive, and a replay that lost its end run out of time.
    fn settle(&mut self) {
        for round in 0..20 {
            while !self.wire.is_empty() {
                self.perform(&Fault::Deliver(1));
            }
            while let Some((_, replies)) = &self.replay {
                let silent = replies.as_ref().is_some_and(VecDeque::is_empty);
                self.perform(if silent { &Fault::FailReplay } else { &Fault::Replay(1) });
            }
            if round == 10 {
                self.perform(&Fault::CheckTail);
            }
        }
        assert!(self.replay.is_none() && self.wire.is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Goal: whatever is lost, repeated, reordered with a replay or restarted,
    /// what is applied is at every moment an unbroken run of one publisher's
    /// messages, from its first one on unless the loss is shown; and once
    /// everything has arrived, it ends with the last one.
    #[test]
    fn what_is_applied_is_unbroken_and_ends_at_the_truth(
        faults in prop::collection::vec(fault(), 0..60),
        buffer in prop_oneof![Just(1000_u64), 1_u64..12],
    ) {
        let mut world = World::new(true, buffer);
        world.connect();
        world.act();
        for fault in &faults {
            world.perform(fault);
        }
        world.settle();
        prop_assert!(world.sequencer.standing().synced);
        prop_assert!(!world.sequencer.standing().repairing);
        if world.published > 0 {
            let last = payload(world.life, world.published - 1);
            prop_assert_eq!(world.applied.last(), Some(&last));
        } else {
            prop_assert!(world.applied.is_empty());
        }
    }

    /// Goal: with a buffer that holds everything and replays that work, nothing
    /// is ever known in part only.
    #[test]
    fn whatever_can_be_repaired_is(faults in prop::collection::vec(fault(), 0..60)) {
        let mut world = World::new(true, 1000);
        world.connect();
        world.act();
        for fault in &faults {
            if !matches!(fault, Fault::FailReplay | Fault::DropReply) {
                world.perform(fault);
            }
        }
        world.settle();
        prop_assert_eq!(world.sequencer.standing().partial, None);
        prop_assert_eq!(world.applied.len() as u64, world.published);
    }

    /// Goal: the same without a replay socket, as far as that can be: nothing
    /// wrong, and the loss shown.
    #[test]
    fn without_replay_nothing_wrong_is_known(faults in prop::collection::vec(fault(), 0..60)) {
        let mut world = World::new(false, 0);
        world.connect();
        for fault in &faults {
            world.perform(fault);
        }
        world.settle();
        if let Some(last) = world.applied.last() {
            let text = String::from_utf8(last.to_vec()).unwrap();
            let start = format!("{}/", world.life);
            prop_assert!(text.starts_with(&start));
        }
    }
}
