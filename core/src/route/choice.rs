//! Choice: the workers that a request goes to, and how they are booked and named.

use std::borrow::Cow;

use super::Prepared;
use crate::approximate::{Decision, Retention};
use crate::entry::{Entry, Note};
use crate::handover::Handover;
use crate::headers::{
    DESTINATION, DP_RANK, PREFILL_DP_RANK, PREFILL_WORKER, PREFILLER, ROUTING_MODE, WORKER,
};
use crate::ids::{Worker, WorkerSlot};
use crate::limits::BOOKING_BLOCKS_MAX;
use crate::load::{Booking, BookingId};
use crate::reason::Reason;
use crate::score::Held;
use crate::settings::{ApproximateCachePolicy, Settings};

/// One worker's part of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leg {
    /// Stands for the worker in bookings.
    pub slot: WorkerSlot,
    /// Who it is.
    pub worker: Worker,
    /// Where it is reached; empty if a Dynamo frontend reaches it by its id.
    pub endpoint: String,
    /// Leading blocks of the prompt that it holds and is to use.
    pub held: Held,
    /// Prompt tokens that it must compute, as the cost counts them.
    pub prefill_tokens: u32,
    /// Blocks its cache holds; 0 if not known.
    pub total_kv_blocks: u64,
}

/// What of a request is booked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tracking {
    /// The prompt's blocks.
    pub blocks: bool,
    /// Those that are shared with other requests count once.
    pub shares_blocks: bool,
    /// The prompt's tokens until they are computed.
    pub prefill: bool,
}

impl Tracking {
    /// What the settings say.
    #[must_use]
    pub fn of(settings: &Settings) -> Self {
        Self {
            blocks: settings.router_track_active_blocks,
            shares_blocks: settings.router_assume_kv_reuse,
            prefill: settings.router_track_prefill_tokens,
        }
    }
}

/// The workers that a request goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The worker that answers.
    pub serving: Leg,
    /// The worker that computes the prompt for it, if that is another one.
    pub prefill: Option<Leg>,
    /// Prompt tokens that need not be computed. At least the last token is
    /// always computed, for its logits are wanted, so a prompt that is held
    /// whole counts one block less.
    pub predicted_cached_tokens: u32,
    /// Whether a LoRA adapter was asked for that no eligible worker is known to
    /// hold: whoever serves must load it first.
    pub adapter_unheld: bool,
    /// What of it is booked.
    pub tracking: Tracking,
    /// Why it was chosen so.
    pub reason: Reason,
}

impl Choice {
    /// The leg that computes the prompt.
    #[must_use]
    pub fn computing(&self) -> &Leg {
        self.prefill.as_ref().unwrap_or(&self.serving)
    }

    /// The encoded entry of the ring log that books it, with what else is
    /// remembered of it; see [`Self::booked`].
    #[must_use]
    pub fn entry(
        &self,
        prepared: &Prepared,
        settings: &Settings,
        [serving, prefill]: [BookingId; 2],
        at_ms: u64,
    ) -> Vec<u8> {
        let booked = self.booked(prepared, serving, prefill, at_ms).encode();
        let session = prepared.demands.session.filter(|_| settings.session_affinity.is_some());
        let id = if self.prefill.is_some() { prefill } else { serving };
        let decision =
            self.retention(settings).filter(|_| !prepared.hashes.is_empty()).map(|retention| {
                Decision {
                    id,
                    slot: self.computing().slot,
                    at_ms,
                    retention,
                    hashes: prepared.hashes.clone(),
                }
            });
        let note = Note { session, decision };
        if note == Note::default() {
            return booked;
        }
        Entry::Noted { booked: Cow::Owned(booked), note }.encode()
    }

    /// How long the decision stands for the worker's cache; `None` if it does not.
    fn retention(&self, settings: &Settings) -> Option<Retention> {
        if settings.overlap_score_credit == 0.0 {
            return None;
        }
        if settings.use_kv_events {
            return settings.router_predicted_ttl_ms.map(Retention::Time);
        }
        let capacity = self.computing().total_kv_blocks;
        Some(match settings.router_approximate_cache_policy {
            ApproximateCachePolicy::Lru if capacity > 0 => Retention::Room(capacity),
            ApproximateCachePolicy::Lru | ApproximateCachePolicy::Ttl => {
                Retention::Time(settings.router_ttl_ms)
            }
        })
    }

    /// The entry of the ring log that books it.
    ///
    /// - `serving`: the booking's name. With a prefill leg it has the blocks,
    ///   which are computed elsewhere and shared with nobody (Dynamo:
    ///   `assume_kv_reuse` off), and no prefill.
    /// - `prefill`: the name of a prefill leg's booking, which has the prefill
    ///   and no blocks. It is to be freed when the response begins.
    /// - `at_ms`: of the host's monotonic clock.
    #[must_use]
    pub fn booked(
        &self,
        prepared: &Prepared,
        serving: BookingId,
        prefill: BookingId,
        at_ms: u64,
    ) -> Entry<'static> {
        // An answer that is expected to be empty has one token all the same.
        let expected_output_tokens =
            prepared.demands.expected_output_tokens.map_or(0, |tokens| tokens.max(1));
        let bare =
            |id, leg: &Leg| Booking { expected_output_tokens, ..Booking::new(id, leg.slot, at_ms) };
        let Tracking { blocks: tracks_blocks, shares_blocks, prefill: tracks_prefill } =
            self.tracking;
        let prefill_tokens = if tracks_prefill { self.computing().prefill_tokens } else { 0 };
        let unshared = || if tracks_blocks { prepared.blocks() } else { 0 };
        match &self.prefill {
            Some(leg) => Entry::BookedPair {
                serving: Booking { unshared_blocks: unshared(), ..bare(serving, &self.serving) },
                prefill: Booking { prefill_tokens, ..bare(prefill, leg) },
            },
            None if !shares_blocks => Entry::Booked(Booking {
                prefill_tokens,
                unshared_blocks: unshared(),
                ..bare(serving, &self.serving)
            }),
            None => {
                let hashes = if tracks_blocks { prepared.hashes.as_slice() } else { &[] };
                let blocks = hashes.get(..BOOKING_BLOCKS_MAX).unwrap_or(hashes).to_vec();
                Entry::Booked(Booking { prefill_tokens, blocks, ..bare(serving, &self.serving) })
            }
        }
    }

    /// The request headers that name it.
    ///
    /// - `names_prefiller`: whether the engine's sidecar is told where the
    ///   prefill worker is reached, as llm-d's wants it.
    #[must_use]
    pub fn headers(&self, names_prefiller: bool) -> Vec<(&'static str, String)> {
        let Leg { worker, endpoint, .. } = &self.serving;
        let mut headers = Vec::new();
        if !endpoint.is_empty() {
            headers.push((DESTINATION, endpoint.clone()));
        }
        headers.push((WORKER, worker.id.0.to_string()));
        headers.push((DP_RANK, worker.rank.0.to_string()));
        let mode = if self.prefill.is_some() { "disaggregated" } else { "aggregated" };
        headers.push((ROUTING_MODE, mode.to_owned()));
        if let Some(prefill) = &self.prefill {
            headers.push((PREFILL_WORKER, prefill.worker.id.0.to_string()));
            headers.push((PREFILL_DP_RANK, prefill.worker.rank.0.to_string()));
            // A frontend, which stands in for workers without an endpoint,
            // finds the prefill worker by its id.
            if names_prefiller && !endpoint.is_empty() && !prefill.endpoint.is_empty() {
                headers.push((PREFILLER, prefill.endpoint.clone()));
            }
        }
        headers
    }

    /// The response headers that say what was decided, but for the reason.
    ///
    /// - `decision_us`: what the decision took, in microseconds.
    #[must_use]
    pub fn debug_headers(&self, decision_us: u64) -> Vec<(&'static str, String)> {
        let Leg { worker, endpoint, .. } = &self.serving;
        let mut headers = vec![
            ("x-warmpath-worker", worker.id.0.to_string()),
            ("x-warmpath-dp-rank", worker.rank.0.to_string()),
        ];
        if !endpoint.is_empty() {
            headers.push(("x-warmpath-endpoint", endpoint.clone()));
        }
        if let Some(prefill) = &self.prefill {
            let Worker { id, rank } = prefill.worker;
            headers.push(("x-warmpath-prefill-worker", id.0.to_string()));
            headers.push(("x-warmpath-prefill-dp-rank", rank.0.to_string()));
        }
        let cached = self.predicted_cached_tokens.to_string();
        headers.push(("x-warmpath-predicted-cached-tokens", cached));
        headers.push(("x-warmpath-decision-us", decision_us.to_string()));
        headers
    }

    /// What names it in the body's `nvext`.
    #[must_use]
    pub fn handover(&self) -> Handover<'static> {
        let prefill = self.prefill.as_ref().map(|leg| leg.worker);
        Handover {
            token_data: None,
            token_text: None,
            backend_instance_id: Some(self.serving.worker.id.0),
            decode_worker_id: Some(self.serving.worker.id.0),
            prefill_worker_id: prefill.map(|worker| worker.id.0),
            dp_rank: Some(self.serving.worker.rank.0),
            prefill_dp_rank: prefill.map(|worker| worker.rank.0),
        }
    }
}
