//! Select: weighs the workers of a prepared request and takes one, or one to
//! compute the prompt and one to answer.
//!
//! # Terms
//!
//! - *set*: the workers of one model in one namespace (Dynamo: worker set).
//!   Prefill and decode workers work together only within one.

use super::Prepared;
use crate::choose::{Random, lowest};
use crate::entry::Entry;
use crate::handover::Handover;
use crate::headers::{
    DESTINATION, DP_RANK, PREFILL_DP_RANK, PREFILL_WORKER, PREFILLER, ROUTING_MODE, WORKER,
};
use crate::ids::{Worker, WorkerSlot};
use crate::limits::BOOKING_BLOCKS_MAX;
use crate::load::{Booking, BookingId};
use crate::overlap::{Overlap, overlaps};
use crate::reason::Reason;
use crate::replica::Replica;
use crate::roster::{Parity, Role, Roster, RosterWorker};
use crate::score::{Candidate, Knobs, PromptSize, cost};

/// How workers are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Policy {
    /// Settings of the cost.
    pub knobs: Knobs,
    /// Whether a decode worker never serves without a prefill worker.
    pub enforce_disagg: bool,
}

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
    pub overlap_blocks: u32,
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
    /// Why it was chosen so.
    pub reason: Reason,
}

/// Why a request has no worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unplaced {
    /// None is there.
    NoWorkers,
    /// There are decode workers, and they may not serve without prefill workers.
    PrefillUnavailable,
}

impl Unplaced {
    /// The reason as it is counted.
    #[must_use]
    pub fn reason(self) -> Reason {
        match self {
            Self::NoWorkers => Reason::NoWorkers,
            Self::PrefillUnavailable => Reason::PrefillUnavailable,
        }
    }
}

impl Choice {
    /// The leg that computes the prompt.
    #[must_use]
    pub fn computing(&self) -> &Leg {
        self.prefill.as_ref().unwrap_or(&self.serving)
    }

    /// Prompt tokens that must be computed, as the cost counts them.
    #[must_use]
    pub fn prefill_tokens(&self, prepared: &Prepared) -> u32 {
        let cached = self.computing().overlap_blocks.saturating_mul(prepared.block_size);
        prepared.prompt_tokens.saturating_sub(cached)
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
        let bare = |id, leg: &Leg| Booking::new(id, leg.slot, at_ms);
        let prefill_tokens = self.prefill_tokens(prepared);
        match &self.prefill {
            Some(leg) => Entry::BookedPair {
                serving: Booking {
                    unshared_blocks: prepared.blocks(),
                    ..bare(serving, &self.serving)
                },
                prefill: Booking { prefill_tokens, ..bare(prefill, leg) },
            },
            None => {
                let hashes = &prepared.hashes;
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

    /// What names it in the body's `nvext`.
    #[must_use]
    pub fn handover(&self) -> Handover<'static> {
        let prefill = self.prefill.as_ref().map(|leg| leg.worker);
        Handover {
            token_data: None,
            backend_instance_id: Some(self.serving.worker.id.0),
            decode_worker_id: Some(self.serving.worker.id.0),
            prefill_worker_id: prefill.map(|worker| worker.id.0),
            dp_rank: Some(self.serving.worker.rank.0),
            prefill_dp_rank: prefill.map(|worker| worker.rank.0),
        }
    }
}

/// Chooses the workers of a prepared request.
///
/// Where a model has prefill workers, one computes the prompt, by overlap and
/// load, and a decode worker of the same set answers, by load alone, as in
/// Dynamo. Workers that do both are weighed against decode workers by the whole
/// cost first. Without prefill workers a decode worker serves like any other.
///
/// # Errors
///
/// [`Unplaced`].
pub fn select(
    replica: &mut Replica,
    prepared: &Prepared,
    policy: &Policy,
    random: &mut Random,
) -> Result<Choice, Unplaced> {
    let mut held = Vec::new();
    if replica.has_index() {
        overlaps(replica.index_mut(), &prepared.hashes, &mut held);
    }
    let scale = Scale { replica, prepared, held, knobs: policy.knobs };
    let mut pools = Pools::of(scale.replica.roster(), prepared.model, policy.enforce_disagg)?;
    let unheld = narrow(&mut pools.serving, prepared.holders.as_deref());
    let does_both = |entry: &&RosterWorker| entry.role == Role::Aggregated;
    if pools.prefill.is_empty() || pools.serving.iter().any(does_both) {
        let first = scale.cheapest(&pools.serving, random).ok_or(Unplaced::NoWorkers)?;
        if pools.prefill.is_empty() || first.0.role == Role::Aggregated {
            return Ok(scale.whole(first, &pools.serving, unheld));
        }
        pools.serving.retain(|entry| set_of(entry) == set_of(first.0));
    }
    scale.divided(pools, unheld, random).ok_or(Unplaced::NoWorkers)
}

/// Model and namespace.
type Set = (u16, u32);

fn set_of(entry: &RosterWorker) -> Set {
    (entry.model, entry.namespace)
}

/// The sets of those entries that have a role, ascending.
fn sets(entries: &[&RosterWorker], role: Role) -> Vec<Set> {
    let mut sets: Vec<Set> =
        entries.iter().filter(|entry| entry.role == role).map(|entry| set_of(entry)).collect();
    sets.sort_unstable();
    sets.dedup();
    sets
}

/// Workers that can take a request.
struct Pools<'r> {
    /// Those that can answer. If there are prefill workers, decode workers of
    /// sets without any are left out.
    serving: Vec<&'r RosterWorker>,
    /// Prefill workers of sets with decode workers.
    prefill: Vec<&'r RosterWorker>,
}

impl<'r> Pools<'r> {
    /// - `model`: one that no card names may be meant for any worker, since the
    ///   engines know their own aliases.
    fn of(roster: &'r Roster, model: Option<u16>, enforce_disagg: bool) -> Result<Self, Unplaced> {
        let of_model = |entry: &&RosterWorker| model.is_none_or(|model| entry.model == model);
        let (mut prefill, mut serving): (Vec<_>, Vec<_>) =
            roster.workers.iter().filter(of_model).partition(|entry| entry.role == Role::Prefill);
        let with_decode = sets(&serving, Role::Decode);
        prefill.retain(|entry| with_decode.binary_search(&set_of(entry)).is_ok());
        if enforce_disagg || !prefill.is_empty() {
            let with_prefill = sets(&prefill, Role::Prefill);
            serving.retain(|entry| {
                entry.role == Role::Aggregated || with_prefill.binary_search(&set_of(entry)).is_ok()
            });
        }
        match (serving.is_empty(), with_decode.is_empty()) {
            (false, _) => Ok(Self { serving, prefill }),
            (true, false) => Err(Unplaced::PrefillUnavailable),
            (true, true) => Err(Unplaced::NoWorkers),
        }
    }
}

/// Leaves those that hold the adapter asked for; all of them if none does, since
/// engines load adapters by need. Returns whether that is so.
fn narrow(entries: &mut Vec<&RosterWorker>, holders: Option<&[WorkerSlot]>) -> bool {
    let Some(holders) = holders else { return false };
    let holds = |entry: &&RosterWorker| holders.binary_search(&entry.slot).is_ok();
    let is_held = entries.iter().any(holds);
    if is_held {
        entries.retain(holds);
    }
    !is_held
}

/// Weighs workers against each other.
struct Scale<'a> {
    replica: &'a Replica,
    prepared: &'a Prepared,
    held: Vec<Overlap>,
    knobs: Knobs,
}

/// A worker, and the leading blocks of the prompt that it holds.
type Weighed<'r> = (&'r RosterWorker, u32);

impl Scale<'_> {
    /// The worker with the lowest cost.
    fn cheapest<'r>(
        &self,
        entries: &[&'r RosterWorker],
        random: &mut Random,
    ) -> Option<Weighed<'r>> {
        let Prepared { prompt_tokens, block_size, hashes, .. } = self.prepared;
        let prompt = PromptSize { tokens: *prompt_tokens, block_size: *block_size };
        let loads = self.replica.loads();
        let costs = entries.iter().map(|entry| {
            let load = loads.of(entry.slot);
            let candidate = Candidate {
                slot: entry.slot,
                overlap_blocks: self.overlap(entry),
                prefill_tokens: load.prefill_tokens,
                active_blocks: load.active_blocks,
                additional_blocks: loads.additional_blocks(entry.slot, hashes),
                requests: load.requests,
            };
            cost(prompt, &candidate, &self.knobs)
        });
        let entry = *entries.get(lowest(costs, random)?)?;
        Some((entry, self.overlap(entry)))
    }

    /// The worker with the lowest cost for a prompt that comes computed: neither
    /// overlap nor prefill count.
    fn least_loaded<'r>(
        &self,
        entries: &[&'r RosterWorker],
        random: &mut Random,
    ) -> Option<&'r RosterWorker> {
        let computed = PromptSize { tokens: 0, block_size: self.prepared.block_size };
        let costs = entries.iter().map(|entry| {
            let load = self.replica.loads().of(entry.slot);
            let candidate = Candidate {
                slot: entry.slot,
                overlap_blocks: 0,
                prefill_tokens: 0,
                active_blocks: load.active_blocks,
                additional_blocks: u64::from(self.prepared.blocks()),
                requests: load.requests,
            };
            cost(computed, &candidate, &self.knobs)
        });
        entries.get(lowest(costs, random)?).copied()
    }

    fn overlap(&self, entry: &RosterWorker) -> u32 {
        let found = self.held.binary_search_by_key(&entry.slot, |overlap| overlap.slot);
        found.ok().and_then(|at| self.held.get(at)).map_or(0, |overlap| overlap.blocks)
    }

    /// One worker for all of the request.
    fn whole(
        &self,
        (entry, overlap): Weighed<'_>,
        pool: &[&RosterWorker],
        adapter_unheld: bool,
    ) -> Choice {
        let lost_prefill = entry.role == Role::Decode && self.replica.had_prefill(entry.model);
        Choice {
            serving: leg(entry, overlap),
            prefill: None,
            predicted_cached_tokens: self.predicted(overlap),
            adapter_unheld,
            reason: if lost_prefill { Reason::PrefillUnavailable } else { self.reason(pool) },
        }
    }

    /// A prefill worker, and a decode worker of the same set.
    fn divided(
        &self,
        pools: Pools<'_>,
        adapter_unheld: bool,
        random: &mut Random,
    ) -> Option<Choice> {
        let Pools { serving, mut prefill } = pools;
        let with_decode = sets(&serving, Role::Decode);
        prefill.retain(|entry| with_decode.binary_search(&set_of(entry)).is_ok());
        let prefill_unheld = narrow(&mut prefill, self.prepared.holders.as_deref());
        let (computes, overlap) = self.cheapest(&prefill, random)?;
        let fits =
            |entry: &&RosterWorker| entry.role == Role::Decode && set_of(entry) == set_of(computes);
        let decode: Vec<&RosterWorker> = serving.into_iter().filter(fits).collect();
        let answers = self.least_loaded(&decode, random)?;
        Some(Choice {
            serving: leg(answers, 0),
            prefill: Some(leg(computes, overlap)),
            predicted_cached_tokens: self.predicted(overlap),
            adapter_unheld: adapter_unheld || prefill_unheld,
            reason: self.reason(&prefill),
        })
    }

    /// - `pool`: the workers among which overlap decided.
    fn reason(&self, pool: &[&RosterWorker]) -> Reason {
        let reason = self.prepared.reason;
        if !matches!(reason, Reason::Kv | Reason::Batch) {
            return reason;
        }
        if !self.replica.has_index() {
            return Reason::Warming;
        }
        if pool.iter().all(|entry| entry.parity == Parity::Blind) {
            return Reason::BlindWorkers;
        }
        if self.replica.is_live() { reason } else { Reason::Resyncing }
    }

    fn predicted(&self, overlap_blocks: u32) -> u32 {
        let before_last = self.prepared.prompt_tokens.saturating_sub(1);
        let most = before_last.checked_div(self.prepared.block_size).unwrap_or(0);
        overlap_blocks.min(most).saturating_mul(self.prepared.block_size)
    }
}

fn leg(entry: &RosterWorker, overlap_blocks: u32) -> Leg {
    Leg { slot: entry.slot, worker: entry.worker, endpoint: entry.endpoint.clone(), overlap_blocks }
}
