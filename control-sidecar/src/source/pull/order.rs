//! Order: one rank's pulled events, each once and in order, or a clear.
//!
//! Pure. Numbers begin at 0 with the server's life. A server with several kinds
//! of attention speaks of a cache for each window; only the widest one's blocks
//! can be reused from the first token on.

use warmpath_core::event::KvEvent;

use crate::adapter::trtllm::{PulledChange, PulledEvent};
use crate::source::sequence::{Loss, Standing};

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Apply events; the number is the last one's.
    Apply(u64, Vec<KvEvent>),
    /// Forget the rank's blocks.
    Clear(Loss),
}

/// Puts one rank's events into order.
#[derive(Clone, Debug)]
pub(super) struct Order {
    connected: bool,
    applied: Option<u64>,
    window: Option<u64>,
    partial: Option<Loss>,
    synced: bool,
    gaps: u64,
    actions: Vec<Action>,
}

impl Order {
    /// Nothing has been asked for yet.
    pub(super) fn new() -> Self {
        Self {
            connected: false,
            applied: None,
            window: None,
            partial: Some(Loss::NoReplay),
            synced: false,
            gaps: 0,
            actions: Vec::new(),
        }
    }

    /// What is to be done now, in order.
    pub(super) fn actions(&mut self) -> Vec<Action> {
        core::mem::take(&mut self.actions)
    }

    /// How things stand.
    pub(super) fn standing(&self) -> Standing {
        Standing {
            connected: self.connected,
            repairing: false,
            partial: self.partial,
            applied: self.applied,
            synced: self.synced,
        }
    }

    /// Gaps seen so far.
    pub(super) fn gaps(&self) -> u64 {
        self.gaps
    }

    /// The server answered.
    pub(super) fn answered(&mut self) {
        self.connected = true;
        self.synced = true;
    }

    /// The server did not answer. What it may have given out shows as a gap.
    pub(super) fn failed(&mut self) {
        self.connected = false;
    }

    /// Nobody listens at the server's address: its process is gone, and with it
    /// the cache.
    pub(super) fn gone(&mut self) {
        if self.applied.is_some() {
            self.lose(Loss::PublisherGone);
            self.applied = None;
            self.window = None;
        }
    }

    /// An answer could not be read.
    pub(super) fn undecodable(&mut self) {
        self.lose(Loss::Undecodable);
    }

    /// An event came.
    pub(super) fn take(&mut self, event: PulledEvent) {
        match self.applied {
            Some(applied) if event.id <= applied => {
                self.lose(Loss::Restart);
                self.window = None;
                self.partial = (event.id > 0).then_some(Loss::NoReplay);
            }
            Some(applied) if event.id > applied.saturating_add(1) => {
                self.gaps += 1;
                self.lose(Loss::NoReplay);
            }
            None if event.id == 0 => self.partial = None,
            _ => {}
        }
        self.applied = Some(event.id);
        let wanted = self.is_widest(event.window);
        let change = match event.change {
            PulledChange::Event(change) if wanted => Some(change),
            _ => None,
        };
        if change == Some(KvEvent::Cleared) {
            // A removal that could not be read became a clear.
            self.partial = Some(Loss::Undecodable);
        }
        if let Some(Action::Apply(last, events)) = self.actions.last_mut() {
            *last = event.id;
            events.extend(change);
        } else {
            self.actions.push(Action::Apply(event.id, change.into_iter().collect()));
        }
    }

    /// Whether an event is about the widest window so far. A wider one than all
    /// before shows that those were not what we took them for.
    fn is_widest(&mut self, window: Option<u64>) -> bool {
        let (Some(window), known) = (window, self.window) else { return true };
        if known.is_some_and(|known| known < window) {
            self.actions.push(Action::Clear(Loss::Restart));
        }
        self.window = known.max(Some(window));
        self.window == Some(window)
    }

    fn lose(&mut self, loss: Loss) {
        self.actions.push(Action::Clear(loss));
        self.partial = Some(loss);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use warmpath_core::event::{Group, Medium, Removed};
    use warmpath_core::ids::EngineHash;

    fn removed(page: u64) -> KvEvent {
        let pages = vec![EngineHash(page)];
        KvEvent::Removed(Removed { pages, medium: Medium::Device, group: Group::default() })
    }

    fn event(id: u64, window: u64, change: PulledChange) -> PulledEvent {
        PulledEvent { id, rank: None, window: Some(window), change, skipped: None }
    }

    fn said(id: u64) -> PulledEvent {
        event(id, 100, PulledChange::Event(removed(id)))
    }

    #[test]
    fn events_in_order_are_applied_and_gaps_clear() {
        let mut order = Order::new();
        order.answered();
        assert_eq!(order.standing().partial, Some(Loss::NoReplay));
        order.take(said(0));
        order.take(said(1));
        assert_eq!(order.actions(), [Action::Apply(1, vec![removed(0), removed(1)])]);
        assert_eq!(order.standing().partial, None);
        order.take(said(3));
        assert_eq!(
            order.actions(),
            [Action::Clear(Loss::NoReplay), Action::Apply(3, vec![removed(3)])]
        );
        assert_eq!((order.gaps(), order.standing().partial), (1, Some(Loss::NoReplay)));
    }

    #[test]
    fn numbers_that_go_back_are_a_restart() {
        let mut order = Order::new();
        order.take(said(5));
        order.actions();
        order.take(said(0));
        assert_eq!(
            order.actions(),
            [Action::Clear(Loss::Restart), Action::Apply(0, vec![removed(0)])]
        );
        assert_eq!(order.standing().partial, None);
        order.gone();
        order.gone();
        assert_eq!(order.actions(), [Action::Clear(Loss::PublisherGone)]);
        order.undecodable();
        assert_eq!(order.standing().partial, Some(Loss::Undecodable));
    }

    #[test]
    fn only_the_widest_window_counts() {
        let mut order = Order::new();
        order.take(event(0, 10, PulledChange::Created));
        order.take(event(1, 100, PulledChange::Created));
        order.actions();
        order.take(event(2, 10, PulledChange::Event(removed(2))));
        order.take(said(3));
        assert_eq!(order.actions(), [Action::Apply(3, vec![removed(3)])]);
        order.take(event(4, 200, PulledChange::Event(removed(4))));
        assert_eq!(
            order.actions(),
            [Action::Clear(Loss::Restart), Action::Apply(4, vec![removed(4)])]
        );
    }
}
