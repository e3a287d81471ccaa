//! Select: takes one worker for a prepared request, or one to compute the prompt
//! and one to answer.
//!
//! # Terms
//!
//! - *set*: the workers of one model in one namespace (Dynamo: worker set).
//!   Prefill and decode workers work together only within one.

use super::Prepared;
use super::choice::{Choice, Leg, Tracking};
use super::eligible::{Eligibility, Eligible};
use super::unplaced::{LegKind, Unplaced};
use super::weigh::{Scale, Weighed};
use crate::choose::Random;
use crate::ids::WorkerSlot;
use crate::reason::Reason;
use crate::replica::Replica;
use crate::roster::{Parity, Role, Roster, RosterWorker};
use crate::score::{Held, Phase};
use crate::settings::Settings;

/// Chooses the workers of a prepared request.
///
/// Where a model has prefill workers, one computes the prompt, by overlap and
/// load, and a decode worker of the same set answers, by load alone, as in
/// Dynamo; with conditional disaggregation that decode worker may compute the
/// prompt, too. Workers that do both are weighed against decode workers by the
/// whole cost first. Without prefill workers a decode worker serves like any
/// other.
///
/// # Errors
///
/// [`Unplaced`].
pub fn select(
    replica: &mut Replica,
    prepared: &Prepared,
    settings: &Settings,
    now_ms: u64,
    random: &mut Random,
) -> Result<Choice, Unplaced> {
    let mut held = Vec::new();
    replica.held(&prepared.hashes, settings, now_ms, &mut held);
    let bound = prepared.demands.session.and_then(|session| replica.bound(session));
    let scale = Scale { replica, prepared, settings, held };
    Selection { scale, bound }.run(random)
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
        let mut serving: Vec<&RosterWorker> = Vec::with_capacity(roster.workers.len());
        let mut prefill: Vec<&RosterWorker> = Vec::new();
        for entry in roster.workers.iter().filter(|it| model.is_none_or(|model| it.model == model))
        {
            match entry.role {
                Role::Prefill => prefill.push(entry),
                Role::Aggregated | Role::Decode => serving.push(entry),
            }
        }
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

/// One selection.
struct Selection<'a> {
    scale: Scale<'a>,
    /// The worker that the request's session is bound to.
    bound: Option<WorkerSlot>,
}

impl Selection<'_> {
    fn run(&self, random: &mut Random) -> Result<Choice, Unplaced> {
        let Scale { replica, prepared, settings, .. } = self.scale;
        let mut pools = Pools::of(replica.roster(), prepared.model, settings.enforce_disagg)?;
        let serving = self.eligible(&pools.serving, LegKind::Serving)?;
        let does_both = |entry: &&RosterWorker| entry.role == Role::Aggregated;
        let is_whole = pools.prefill.is_empty();
        if is_whole || serving.workers.iter().any(does_both) {
            let first = self
                .scale
                .take(&serving.workers, Phase::Aggregated, random)
                .ok_or(Unplaced::NoWorkers)?;
            if is_whole || first.worker.role == Role::Aggregated {
                return Ok(self.whole(&first, &serving));
            }
            pools.serving.retain(|entry| set_of(entry) == set_of(first.worker));
        }
        self.divided(pools, random)
    }

    fn eligible<'r>(
        &self,
        pool: &[&'r RosterWorker],
        leg: LegKind,
    ) -> Result<Eligible<'r>, Unplaced> {
        let Scale { replica, prepared, settings, .. } = self.scale;
        Eligibility {
            replica,
            settings,
            demands: &prepared.demands,
            leg,
            holders: prepared.holders.as_deref(),
            bound: self.bound.filter(|_| leg == LegKind::Serving),
        }
        .of(pool)
    }

    /// One worker for all of the request.
    fn whole(&self, taken: &Weighed<'_>, pool: &Eligible<'_>) -> Choice {
        let Scale { replica, settings, .. } = self.scale;
        let worker = taken.worker;
        let lost_prefill = worker.role == Role::Decode && replica.had_prefill(worker.model);
        let reason =
            if lost_prefill { Reason::PrefillUnavailable } else { self.reason(&pool.workers) };
        Choice {
            serving: leg(taken),
            prefill: None,
            predicted_cached_tokens: self.predicted(taken.held),
            adapter_unheld: pool.adapter_unheld,
            tracking: Tracking::of(settings),
            reason,
        }
    }

    /// A prefill worker, and a decode worker of the same set.
    fn divided(&self, pools: Pools<'_>, random: &mut Random) -> Result<Choice, Unplaced> {
        let Pools { serving, mut prefill } = pools;
        // Those whose decode workers cannot be chosen are of no use.
        let decode = self.eligible(&serving, LegKind::Serving)?;
        let with_decode = sets(&decode.workers, Role::Decode);
        prefill.retain(|entry| with_decode.binary_search(&set_of(entry)).is_ok());
        let prefill = self.eligible(&prefill, LegKind::Prefill)?;
        let computes =
            self.scale.take(&prefill.workers, Phase::Prefill, random).ok_or(Unplaced::NoWorkers)?;
        let fits = |entry: &&RosterWorker| {
            entry.role == Role::Decode && set_of(entry) == set_of(computes.worker)
        };
        let decode =
            Eligible { workers: decode.workers.into_iter().filter(fits).collect(), ..decode };
        let conditional = self.scale.settings.conditional_disagg.as_ref();
        let phase = if conditional.is_some() { Phase::ConditionalDecode } else { Phase::Decode };
        let answers = self.scale.take(&decode.workers, phase, random).ok_or(Unplaced::NoWorkers)?;
        if let Some(conditional) = conditional.filter(|_| !prefill.is_pinned)
            && self.scale.bypasses_prefill(conditional, &answers, computes.worker)
        {
            let alone = self
                .scale
                .take(&decode.workers, Phase::Aggregated, random)
                .ok_or(Unplaced::NoWorkers)?;
            return Ok(Choice {
                reason: self.reason(&decode.workers),
                ..self.whole(&alone, &decode)
            });
        }
        // What the decode worker holds is not used: the prompt comes computed.
        let answers = Weighed { held: Held::default(), prefill_tokens: 0, ..answers };
        Ok(Choice {
            serving: leg(&answers),
            prefill: Some(leg(&computes)),
            predicted_cached_tokens: self.predicted(computes.held),
            adapter_unheld: decode.adapter_unheld || prefill.adapter_unheld,
            tracking: Tracking::of(self.scale.settings),
            reason: self.reason(&prefill.workers),
        })
    }

    /// - `pool`: the workers among which overlap decided.
    fn reason(&self, pool: &[&RosterWorker]) -> Reason {
        let Scale { replica, prepared, settings, .. } = self.scale;
        let reason = prepared.reason;
        if !matches!(reason, Reason::Kv | Reason::Batch) {
            return reason;
        }
        if !settings.use_kv_events {
            return Reason::Approximate;
        }
        if !replica.has_index() {
            return Reason::Warming;
        }
        if pool.iter().all(|entry| entry.parity == Parity::Blind) {
            return Reason::BlindWorkers;
        }
        if replica.is_live() { reason } else { Reason::Resyncing }
    }

    fn predicted(&self, held: Held) -> u32 {
        let Prepared { prompt_tokens, block_size, .. } = self.scale.prepared;
        let before_last = prompt_tokens.saturating_sub(1);
        let most = before_last.checked_div(*block_size).unwrap_or(0);
        let blocks = held.device.saturating_add(held.host).saturating_add(held.disk);
        blocks.min(most).saturating_mul(*block_size)
    }
}

fn leg(taken: &Weighed<'_>) -> Leg {
    let Weighed { worker, held, prefill_tokens } = *taken;
    Leg {
        slot: worker.slot,
        worker: worker.worker,
        endpoint: worker.endpoint.clone(),
        held,
        prefill_tokens,
        total_kv_blocks: worker.total_kv_blocks,
    }
}
