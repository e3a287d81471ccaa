//! Eligible: which workers of a pool a request may go to.
//!
//! In Dynamo's order: who was named, else whom the gateway's subset and the
//! demanded taints leave, narrowed to the holders of the adapter, to the worker
//! of the session, and to those that still take requests.

use super::unplaced::{LegKind, Unplaced};
use crate::demands::{Demands, Host, Pin};
use crate::ids::{WorkerId, WorkerSlot};
use crate::replica::Replica;
use crate::roster::RosterWorker;
use crate::settings::{AffinityMode, Settings};

/// Tokens of a batch of a worker that does not say how many it takes: Dynamo's
/// stand-in, which no load reaches.
pub(super) const BATCH_TOKENS_UNKNOWN: u64 = 10_000_000;

/// What one request demands of one pool.
#[derive(Clone, Copy)]
pub(super) struct Eligibility<'a> {
    pub(super) replica: &'a Replica,
    pub(super) settings: &'a Settings,
    pub(super) demands: &'a Demands,
    pub(super) leg: LegKind,
    /// Workers that hold the LoRA adapter that was asked for, if one was;
    /// ascending.
    pub(super) holders: Option<&'a [WorkerSlot]>,
    /// The worker that the session is bound to.
    pub(super) bound: Option<WorkerSlot>,
}

/// Workers of a pool that may be chosen.
pub(super) struct Eligible<'r> {
    /// At least one.
    pub(super) workers: Vec<&'r RosterWorker>,
    /// Whether an adapter was asked for that none of them is known to hold.
    pub(super) adapter_unheld: bool,
    /// Whether there was nothing to choose: the request named its worker.
    pub(super) is_pinned: bool,
}

impl<'a> Eligibility<'a> {
    /// The eligible workers of a pool.
    ///
    /// # Errors
    ///
    /// [`Unplaced`]: the first step that leaves none.
    pub(super) fn of<'r>(&self, pool: &[&'r RosterWorker]) -> Result<Eligible<'r>, Unplaced> {
        let pin = match self.leg {
            LegKind::Serving => self.demands.serving,
            LegKind::Prefill => self.demands.prefill,
        };
        if let Some(pin) = pin {
            let worker = self.pinned(pin, pool)?;
            let unheld = self.holders.is_some_and(|it| it.binary_search(&worker.slot).is_err());
            return Ok(Eligible { workers: vec![worker], adapter_unheld: unheld, is_pinned: true });
        }
        let mut workers = pool.to_vec();
        if workers.is_empty() {
            return Err(Unplaced::NoHosts);
        }
        if self.demands.hosts.is_some() {
            self.keep(&mut workers, |worker| self.is_allowed_host(worker), Unplaced::NoHosts)?;
        }
        if !self.demands.required_taints.is_empty() {
            self.keep(&mut workers, |worker| self.has_taints(worker), Unplaced::Unsatisfied)?;
        }
        let adapter_unheld = narrow(&mut workers, self.holders);
        let overloaded = Overloaded::among(self, &workers);
        if let Some(bound) = self.bound
            && let Some(worker) = workers.iter().copied().find(|it| it.slot == bound)
        {
            let takes_more = !overloaded.contains(worker);
            if takes_more || self.affinity_is_hard() {
                let workers = vec![worker];
                return match takes_more {
                    true => Ok(Eligible { workers, adapter_unheld, is_pinned: false }),
                    false => Err(Unplaced::PinOverloaded),
                };
            }
        }
        if !overloaded.0.is_empty() {
            self.keep(&mut workers, |worker| !overloaded.contains(worker), Unplaced::Overloaded)?;
        }
        self.prefer_idle(&mut workers);
        self.check_queue(&workers)?;
        Ok(Eligible { workers, adapter_unheld, is_pinned: false })
    }

    /// The worker that the request names.
    fn pinned<'r>(
        &self,
        pin: Pin,
        pool: &[&'r RosterWorker],
    ) -> Result<&'r RosterWorker, Unplaced> {
        let mut ranks = pool.iter().copied().filter(|it| it.worker.id == pin.worker);
        let first = ranks.next().ok_or(Unplaced::UnknownPin(self.leg))?;
        let worker = match pin.rank {
            // Without a rank the worker must have exactly one.
            None if ranks.next().is_none() => first,
            None => return Err(Unplaced::UnknownRank(self.leg)),
            Some(rank) => core::iter::once(first)
                .chain(ranks)
                .find(|it| it.worker.rank == rank)
                .ok_or(Unplaced::UnknownRank(self.leg))?,
        };
        if !self.is_allowed_host(worker) {
            return Err(Unplaced::UnknownPin(self.leg));
        }
        if !self.has_taints(worker) {
            return Err(Unplaced::Unsatisfied);
        }
        if Overloaded::among(self, pool).contains(worker) {
            return Err(Unplaced::PinOverloaded);
        }
        Ok(worker)
    }

    /// Leaves the workers that `stays` says; none left is `otherwise`.
    fn keep(
        &self,
        workers: &mut Vec<&RosterWorker>,
        stays: impl Fn(&RosterWorker) -> bool,
        otherwise: Unplaced,
    ) -> Result<(), Unplaced> {
        workers.retain(|worker| stays(worker));
        if workers.is_empty() { Err(otherwise) } else { Ok(()) }
    }

    /// A worker that is reached through a frontend has no address to compare.
    fn is_allowed_host(&self, worker: &RosterWorker) -> bool {
        let Some(hosts) = &self.demands.hosts else { return true };
        let Ok(address) = worker.endpoint.parse::<core::net::SocketAddr>() else { return true };
        hosts.iter().any(|host| match host {
            Host::Socket(socket) => *socket == address,
            Host::Address(ip) => *ip == address.ip(),
        })
    }

    fn has_taints(&self, worker: &RosterWorker) -> bool {
        self.demands.required_taints.iter().all(|taint| worker.taints.contains(taint))
    }

    fn affinity_is_hard(&self) -> bool {
        self.settings.session_affinity.is_some_and(|it| it.mode == AffinityMode::Hard)
    }

    /// Leaves out the workers above `busy_thresholds.busy`, unless all are: the
    /// next best one is taken (Dynamo's guide: `DYN_BUSY_THRESHOLD`).
    fn prefer_idle(&self, workers: &mut Vec<&RosterWorker>) {
        let Some(threshold) = self.settings.busy_thresholds.busy else { return };
        let is_idle = |worker: &&RosterWorker| self.fullness(worker) <= threshold;
        if workers.iter().any(is_idle) {
            workers.retain(is_idle);
        }
    }

    /// Share of the worker's blocks in use: as it says, or as is booked on it,
    /// whichever is more; 0 if neither is known.
    fn fullness(&self, worker: &RosterWorker) -> f64 {
        let booked = self.replica.loads().of(worker.slot).active_blocks;
        let reported = self.reported(worker).unwrap_or(0.0);
        reported.max(share(booked, worker.total_kv_blocks).unwrap_or(0.0))
    }

    /// Share of the worker's blocks in use, as it says.
    fn reported(&self, worker: &RosterWorker) -> Option<f64> {
        self.replica.cache_usage(worker.slot)?.share()
    }

    /// A queue would take in the request if every worker had more prefill booked
    /// than the threshold; there is none here, so that it goes to its worker all
    /// the same, until the limits of a queue would be reached.
    fn check_queue(&self, workers: &[&RosterWorker]) -> Result<(), Unplaced> {
        let Some(threshold) = self.settings.router_queue_threshold else { return Ok(()) };
        let limits = self.settings.queue_limits;
        let mut tokens = 0;
        for worker in workers {
            let load = self.replica.loads().of(worker.slot);
            let taken = scaled(batch_tokens(worker), threshold);
            if load.prefill_tokens <= taken {
                return Ok(());
            }
            tokens += load.prefill_tokens - taken;
        }
        let endpoints = workers.len() as u64;
        let requests = || {
            let is_one = |slot| workers.iter().any(|worker| worker.slot == slot);
            // One of each worker's is being computed.
            self.replica.loads().prefills(is_one).saturating_sub(endpoints)
        };
        let is_full =
            limits.tokens_per_worker.is_some_and(|it| tokens >= it.saturating_mul(endpoints))
                || limits
                    .requests_per_worker
                    .is_some_and(|it| requests() >= it.saturating_mul(endpoints));
        if is_full { Err(Unplaced::QueueFull) } else { Ok(()) }
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

/// Instances that take no more requests: those all of whose ranks are beyond a
/// threshold.
struct Overloaded(Vec<WorkerId>);

impl Overloaded {
    fn among(eligibility: &Eligibility<'_>, workers: &[&RosterWorker]) -> Self {
        let thresholds = eligibility.settings.busy_thresholds;
        let is_off = thresholds.active_decode_blocks.is_none()
            && thresholds.active_prefill_tokens.is_none()
            && thresholds.active_prefill_tokens_frac.is_none();
        if is_off {
            return Self(Vec::new());
        }
        let mut ranks: Vec<(WorkerId, bool)> = workers
            .iter()
            .map(|worker| (worker.worker.id, eligibility.is_beyond(worker)))
            .collect();
        // `false` first: an instance with one rank that takes more is none.
        ranks.sort_unstable();
        ranks.dedup_by_key(|(id, _)| *id);
        Self(ranks.into_iter().filter(|(_, beyond)| *beyond).map(|(id, _)| id).collect())
    }

    fn contains(&self, worker: &RosterWorker) -> bool {
        self.0.binary_search(&worker.worker.id).is_ok()
    }
}

impl Eligibility<'_> {
    /// Whether a rank is beyond one of the thresholds.
    fn is_beyond(&self, worker: &RosterWorker) -> bool {
        let thresholds = self.settings.busy_thresholds;
        let prefill = self.replica.loads().of(worker.slot).prefill_tokens;
        let by_blocks = thresholds
            .active_decode_blocks
            .is_some_and(|threshold| self.reported(worker).is_some_and(|share| share > threshold));
        let by_tokens = thresholds.active_prefill_tokens.is_some_and(|most| prefill > most);
        let by_share = thresholds.active_prefill_tokens_frac.is_some_and(|threshold| {
            share(prefill, worker.max_num_batched_tokens).is_some_and(|share| share > threshold)
        });
        by_blocks || by_tokens || by_share
    }
}

/// Tokens that a worker computes at a time.
pub(super) fn batch_tokens(worker: &RosterWorker) -> u64 {
    match worker.max_num_batched_tokens {
        0 => BATCH_TOKENS_UNKNOWN,
        tokens => tokens,
    }
}

/// `None` of nothing.
#[expect(clippy::cast_precision_loss, reason = "far below 2⁵³")]
pub(super) fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// A share of a number of tokens, rounded down; saturates.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a number of tokens, far below 2⁵³, times a threshold; saturates"
)]
pub(super) fn scaled(tokens: u64, threshold: f64) -> u64 {
    (tokens as f64 * threshold) as u64
}
