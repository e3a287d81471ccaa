//! Ledger: what the ring log says was booked and freed, in its order.
//!
//! The log is the one order in which all VMs of a gateway see bookings, so what
//! stood before an entry is what its writer should have known. Recounted here
//! from the entries alone, with none of the filter's own bookkeeping.
//!
//! # Terms
//!
//! - *spread*: most minus fewest bookings of a worker, at one position.
//! - *excess* of a decision: bookings (or cost) of the chosen worker beyond those
//!   of the worker that had the least, right before the booking.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use warmpath_core::entry::Entry;
use warmpath_core::load::Booking;

/// Tokens of a block, as the models of this run have it.
const BLOCK_SIZE: u64 = 16;

/// One change of a worker's load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// So many tokens and blocks were booked.
    Booked { slot: u16, prefill_tokens: u32, blocks: u64 },
    /// The prompt is computed.
    PrefillDone { slot: u16, prefill_tokens: u32 },
    /// The request has ended.
    Freed { slot: u16, blocks: u64 },
}

#[derive(Clone, Copy, Debug)]
struct Open {
    slot: u16,
    /// Of a prefill that is not done.
    prefill_tokens: u32,
    blocks: u64,
}

/// All that the log has said so far.
#[derive(Debug, Default)]
pub struct Ledger {
    open: HashMap<u64, Open>,
    steps: Vec<Step>,
    /// Names that were ever booked.
    names: BTreeSet<u64>,
    /// Bookings made.
    pub booked: u64,
    /// Bookings freed, each counted once.
    pub freed: u64,
    /// Entries that freed a booking that was freed before, or never made.
    pub freed_wrongly: u64,
    /// Bookings under a name that was used before.
    pub booked_twice: u64,
    /// Bookings of a prefill leg and a decode leg together.
    pub pairs: u64,
    /// Entries that could not be read.
    pub unreadable: u64,
}

impl Ledger {
    /// Takes the log's next entry.
    pub fn apply(&mut self, entry: &[u8]) {
        match Entry::decode(entry) {
            Ok(Entry::Booked(booking)) => self.book(&booking),
            Ok(Entry::BookedPair { serving, prefill }) => {
                self.pairs += 1;
                self.book(&serving);
                self.book(&prefill);
            }
            Ok(Entry::Noted { booked, .. }) => self.apply(&booked),
            Ok(Entry::PrefillDone(id)) => self.prefill_done(id.0),
            Ok(Entry::Freed(id)) => self.free(id.0),
            Ok(_) => {}
            Err(_) => self.unreadable += 1,
        }
    }

    fn book(&mut self, booking: &Booking) {
        let Booking { id, slot, prefill_tokens, .. } = *booking;
        let blocks = booking.blocks.len() as u64 + u64::from(booking.unshared_blocks);
        if !self.names.insert(id.0) {
            self.booked_twice += 1;
            return;
        }
        self.booked += 1;
        self.open.insert(id.0, Open { slot: slot.0, prefill_tokens, blocks });
        self.steps.push(Step::Booked { slot: slot.0, prefill_tokens, blocks });
    }

    fn prefill_done(&mut self, id: u64) {
        if let Some(open) = self.open.get_mut(&id) {
            let prefill_tokens = core::mem::take(&mut open.prefill_tokens);
            self.steps.push(Step::PrefillDone { slot: open.slot, prefill_tokens });
        }
    }

    fn free(&mut self, id: u64) {
        self.prefill_done(id);
        match self.open.remove(&id) {
            Some(Open { slot, blocks, .. }) => {
                self.freed += 1;
                self.steps.push(Step::Freed { slot, blocks });
            }
            None => self.freed_wrongly += 1,
        }
    }

    /// Bookings that are not freed.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open.len()
    }

    /// Bookings that are not freed, by worker.
    #[must_use]
    pub fn open_by_worker(&self) -> BTreeMap<u16, usize> {
        let mut counts = BTreeMap::new();
        for open in self.open.values() {
            *counts.entry(open.slot).or_default() += 1;
        }
        counts
    }

    /// Judges all decisions so far, and forgets them.
    ///
    /// - `slots`: the workers that could be chosen.
    pub fn judge(&mut self, slots: &[u16]) -> Judgement {
        let mut judgement = Judgement::default();
        let mut loads: BTreeMap<u16, Load> =
            slots.iter().map(|slot| (*slot, Load::default())).collect();
        for step in self.steps.drain(..) {
            if let Step::Booked { slot, .. } = step {
                judgement.decision(&loads, slot);
            }
            let (Step::Booked { slot, .. }
            | Step::PrefillDone { slot, .. }
            | Step::Freed { slot, .. }) = step;
            loads.entry(slot).or_default().apply(step);
            judgement.position(&loads, matches!(step, Step::Booked { .. }));
        }
        judgement.workers = loads.len();
        judgement
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Load {
    requests: u64,
    prefill_tokens: u64,
    blocks: u64,
}

impl Load {
    fn apply(&mut self, step: Step) {
        match step {
            Step::Booked { prefill_tokens, blocks, .. } => {
                self.requests += 1;
                self.prefill_tokens += u64::from(prefill_tokens);
                self.blocks += blocks;
            }
            Step::PrefillDone { prefill_tokens, .. } => {
                self.prefill_tokens -= u64::from(prefill_tokens);
            }
            Step::Freed { blocks, .. } => {
                self.requests -= 1;
                self.blocks -= blocks;
            }
        }
    }

    /// Cost of a prompt that nobody has cached, without what is the same for
    /// every worker; in sixteenths of a block, so that it is exact.
    fn cost(self) -> u64 {
        self.prefill_tokens + BLOCK_SIZE * self.blocks
    }
}

/// What the log shows of the decisions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// Workers.
    pub workers: usize,
    /// Bookings.
    pub decisions: u64,
    /// Largest spread right behind a booking.
    pub spread_booking: u64,
    /// Largest spread at any position, those right behind a free included: which
    /// request ends first is not the gateway's to decide.
    pub spread_ever: u64,
    /// Decisions for a worker that had more bookings than another.
    pub more_bookings: u64,
    /// Decisions for a worker that cost more than another.
    pub more_cost: u64,
    /// Most by which a chosen worker's bookings exceeded the least.
    pub excess_bookings: u64,
}

impl Judgement {
    fn decision(&mut self, loads: &BTreeMap<u16, Load>, chosen: u16) {
        self.decisions += 1;
        let Some(chosen) = loads.get(&chosen) else { return };
        let least = loads.values().map(|load| load.requests).min().unwrap_or(0);
        let cheapest = loads.values().map(|load| load.cost()).min().unwrap_or(0);
        let excess = chosen.requests.saturating_sub(least);
        self.more_bookings += u64::from(excess > 0);
        self.more_cost += u64::from(chosen.cost() > cheapest);
        self.excess_bookings = self.excess_bookings.max(excess);
    }

    fn position(&mut self, loads: &BTreeMap<u16, Load>, is_booking: bool) {
        let counts = || loads.values().map(|load| load.requests);
        let spread = counts().max().unwrap_or(0) - counts().min().unwrap_or(0);
        self.spread_ever = self.spread_ever.max(spread);
        if is_booking {
            self.spread_booking = self.spread_booking.max(spread);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use warmpath_core::ids::{SequenceHash, WorkerSlot};
    use warmpath_core::load::BookingId;

    fn booked(id: u64, slot: u16) -> Vec<u8> {
        let booking = Booking {
            prefill_tokens: 20,
            blocks: vec![SequenceHash(id)],
            ..Booking::new(BookingId(id), WorkerSlot(slot), 0)
        };
        Entry::Booked(booking).encode()
    }

    fn ledger(entries: &[Vec<u8>]) -> Ledger {
        let mut ledger = Ledger::default();
        for entry in entries {
            ledger.apply(entry);
        }
        ledger
    }

    #[test]
    fn two_on_one_worker_while_another_is_idle_is_seen() {
        let even = ledger(&[booked(1, 0), booked(2, 1), booked(3, 1)]).judge(&[0, 1]);
        assert_eq!((even.spread_booking, even.more_bookings, even.more_cost), (1, 0, 0));
        let uneven = ledger(&[booked(1, 0), booked(2, 0)]).judge(&[0, 1]);
        assert_eq!((uneven.spread_booking, uneven.more_bookings, uneven.more_cost), (2, 1, 1));
        assert_eq!((uneven.excess_bookings, uneven.decisions), (1, 2));
    }

    #[test]
    fn a_spread_that_frees_make_is_no_decision_s() {
        let freed = |id| Entry::Freed(BookingId(id)).encode();
        let entries = [booked(1, 0), booked(2, 1), booked(3, 0), booked(4, 1), freed(1), freed(3)];
        let mut ledger = ledger(&entries);
        assert_eq!((ledger.open(), ledger.freed), (2, 2));
        let judgement = ledger.judge(&[0, 1]);
        assert_eq!((judgement.spread_booking, judgement.spread_ever), (1, 2));
        assert_eq!(judgement.more_bookings, 0);
    }

    #[test]
    fn what_is_freed_or_booked_twice_is_counted() {
        let freed = Entry::Freed(BookingId(1)).encode();
        let ledger = ledger(&[booked(1, 0), freed.clone(), freed, booked(1, 0), b"?".to_vec()]);
        assert_eq!((ledger.booked, ledger.freed, ledger.open()), (1, 1, 0));
        assert_eq!((ledger.freed_wrongly, ledger.booked_twice, ledger.unreadable), (1, 1, 1));
    }

    #[test]
    fn a_prefill_that_is_done_costs_no_more() {
        let done = Entry::PrefillDone(BookingId(1)).encode();
        // Both have one booking, but the first's prompt is computed.
        let judgement = ledger(&[booked(1, 0), booked(2, 1), done, booked(3, 1)]).judge(&[0, 1]);
        assert_eq!((judgement.more_bookings, judgement.more_cost), (0, 1));
    }
}
