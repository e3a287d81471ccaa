//! Place: choosing a worker and booking it, as one step.
//!
//! A VM decides on the state it has and appends its booking right behind that
//! state in the ring log. If another VM was faster, the state has moved on: it
//! is applied, and the decision made again. So two worker threads never pick on
//! the same stale load.

use warmpath_core::entry::Entry;
use warmpath_core::load::{Answer, BookingId};
use warmpath_core::reason::Reason;
use warmpath_core::ring::Append;
use warmpath_core::route::{Choice, Prepared, Unplaced, select};
use warmpath_core::settings::Settings;

use crate::config::BookingOrder;
use crate::host;
use crate::limits::{BOOKING_ATTEMPTS_MAX, REQUEST_FEED_BYTES_MAX};
use crate::metrics::Counter;
use crate::vm::Vm;

/// A request that has its workers.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    /// To be freed when the request ends.
    pub(crate) serving: BookingId,
    /// To be freed when the response begins, if there is a prefill leg.
    pub(crate) prefill: Option<BookingId>,
    pub(crate) choice: Choice,
    /// What the answer fills, if that is booked.
    answer: Option<Answer>,
}

impl Vm {
    /// Chooses the request's workers and books them.
    ///
    /// # Errors
    ///
    /// [`Unplaced`].
    pub(crate) fn place(&mut self, prepared: &Prepared) -> Result<Placed, Unplaced> {
        let (serving, prefill) = (self.next_booking(), self.next_booking());
        let now_ms = host::monotonic_ns() / 1_000_000;
        let settings = self.settings(prepared.model);
        // Counted in bytes: a decision's place in the order must not depend on
        // whether the thread was interrupted meanwhile.
        let mut feed_bytes = REQUEST_FEED_BYTES_MAX;
        let mut may_apply = |entry: &[u8]| {
            let left = feed_bytes.checked_sub(if Entry::is_feed(entry) { entry.len() } else { 0 });
            feed_bytes = left.unwrap_or(0);
            left.is_some()
        };
        let attempts = match self.config.booking_order {
            BookingOrder::Strict => BOOKING_ATTEMPTS_MAX,
            BookingOrder::None => {
                self.catch_up(&mut may_apply);
                0
            }
        };
        for _ in 0..attempts {
            if !self.catch_up(&mut may_apply) {
                break;
            }
            let choice = select(&mut self.replica, prepared, &settings, now_ms, &mut self.random)?;
            let entry = choice.entry(prepared, &settings, [serving, prefill], now_ms);
            match self.append_here(&entry) {
                Ok(Append::Done) => {
                    self.position += 1;
                    self.apply(&entry, None);
                    let answer = answer(prepared, &settings);
                    return Ok(self.placed([serving, prefill], choice, answer, now_ms));
                }
                Ok(Append::Moved) => self.metrics.add(Counter::BookingConflicts, 1),
                Err(_) => {
                    self.metrics.add(Counter::HostRefused, 1);
                    break;
                }
            }
        }
        // Others are busier than the attempts allow for: a booking on a state
        // that is a few entries old is better than a request that waits.
        let choice = select(&mut self.replica, prepared, &settings, now_ms, &mut self.random)?;
        let entry = choice.entry(prepared, &settings, [serving, prefill], now_ms);
        self.append(&entry);
        self.metrics.add(Counter::BookingUnordered, 1);
        Ok(self.placed([serving, prefill], choice, answer(prepared, &settings), now_ms))
    }

    fn placed(
        &mut self,
        [serving, prefill]: [BookingId; 2],
        mut choice: Choice,
        answer: Option<Answer>,
        now_ms: u64,
    ) -> Placed {
        let prefill = choice.prefill.is_some().then_some(prefill);
        self.own_booking(serving, now_ms);
        self.metrics.add(Counter::BookingsMade, 1 + u64::from(prefill.is_some()));
        if let Some(prefill) = prefill {
            self.own_booking(prefill, now_ms);
        }
        self.metrics.add(Counter::AdapterUnheld, u64::from(choice.adapter_unheld));
        let is_stale =
            self.feed_age_ms(now_ms).is_none_or(|age_ms| age_ms > self.config.feed_stale_ms);
        if is_stale && matches!(choice.reason, Reason::Kv | Reason::Batch | Reason::Resyncing) {
            choice.reason = Reason::StaleFeed;
        }
        Placed { serving, prefill, choice, answer }
    }

    /// More tokens of the answer have come.
    pub(crate) fn answered(&mut self, placed: &mut Placed, tokens: u64) {
        let grown = placed.answer.as_mut().and_then(|answer| answer.grow(tokens));
        if let Some((blocks, tokens)) = grown {
            let id = placed.serving;
            self.append(&Entry::OutputBlocks { id, blocks, tokens }.encode());
        }
    }

    /// The response has begun: the prompt is computed.
    pub(crate) fn response_began(&mut self, placed: &Placed) {
        match placed.prefill {
            Some(prefill) => self.free(prefill),
            None => self.prefill_done(placed.serving),
        }
    }

    /// The request has ended, however. Does nothing the second time.
    pub(crate) fn request_ended(&mut self, placed: &Placed) {
        for booking in placed.prefill.into_iter().chain([placed.serving]) {
            self.free(booking);
        }
    }
}

/// What is kept of the answer if its blocks are booked.
fn answer(prepared: &Prepared, settings: &Settings) -> Option<Answer> {
    let tracks = settings.router_track_active_blocks && settings.router_track_output_blocks;
    tracks.then(|| Answer::new(prepared.prompt_tokens, prepared.block_size))
}
