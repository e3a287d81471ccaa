//! Dynamo's side: its production selector and what it thinks of each candidate.
//!
//! The selector shows nobody its costs, but it tells the cost of the worker that
//! it takes in an event, to the last bit. At an endless temperature every
//! candidate is as likely as any other, and the picker draws one number from the
//! generator of the thread: seeded so that the number falls into each candidate's
//! part in turn, it takes them all, one after the other.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::fmt::Debug;

use dynamo_custom_policy_builtin::{default_registry, register};
use dynamo_kv_router::config::KvRouterConfig;
use dynamo_kv_router::plugins::worker_selection::{WorkerInputs, WorkerSelectionPolicy};
use dynamo_kv_router::protocols::{RoutingConstraints, WorkerConfigLike, WorkerWithDpRank};
use dynamo_kv_router::scheduling::{OverlapSignals, ScheduleMode};
use dynamo_kv_router::{
    KvSchedulerError, RoutingPartitionRef, SchedulingRequest, WorkerSelectionInput, WorkerSelector,
    WorkerType,
};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Temperature at which costs do not matter.
const ENDLESS: f64 = 1e300;

/// An instance, as its card describes it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Instance {
    pub(crate) ranks: u32,
    pub(crate) taints: HashSet<String>,
    pub(crate) total_kv_blocks: Option<u64>,
    pub(crate) max_num_batched_tokens: Option<u64>,
}

impl WorkerConfigLike for Instance {
    fn data_parallel_start_rank(&self) -> u32 {
        0
    }

    fn data_parallel_size(&self) -> u32 {
        self.ranks
    }

    fn max_num_batched_tokens(&self) -> Option<u64> {
        self.max_num_batched_tokens
    }

    fn total_kv_blocks(&self) -> Option<u64> {
        self.total_kv_blocks
    }

    fn taints(&self) -> &HashSet<String> {
        &self.taints
    }
}

/// A request that asks for nothing.
pub(crate) fn request(isl_tokens: usize, tracks_prefill: bool) -> SchedulingRequest {
    SchedulingRequest {
        mode: ScheduleMode::QueryOnly { request_id: None },
        token_seq: None,
        isl_tokens,
        lora_name: None,
        expected_output_tokens: None,
        affinity_target: None,
        pinned_worker: None,
        allowed_worker_ids: None,
        routing_constraints: RoutingConstraints::default(),
        router_config_override: None,
        track_prefill_tokens: tracks_prefill,
        priority_jump: 0.0,
        strict_priority: 0,
        policy_class: None,
        session_context: None,
        overlap: OverlapSignals::default(),
        kv_transfer_candidates: None,
        retain_kv_transfer_chain: false,
        shared_cache_hits: None,
        worker_loads: Default::default(),
        resp_tx: None,
    }
}

/// The selector of a stage as a host without any policy file builds it, once with
/// the temperature of the settings and once with an endless one.
pub(crate) struct Selector {
    policy: WorkerSelectionPolicy,
    even: WorkerSelectionPolicy,
}

impl Selector {
    pub(crate) fn new(config: &KvRouterConfig, role: WorkerType) -> Result<Self, String> {
        let even = KvRouterConfig { router_temperature: ENDLESS, ..config.clone() };
        Ok(Self { policy: policy(config, role)?, even: policy(&even, role)? })
    }

    /// Whether it asks for what workers hold. If it does not, its host does not
    /// look.
    pub(crate) fn wants_cache(&self) -> bool {
        let inputs = <WorkerSelectionPolicy as WorkerSelector<Instance>>::required_worker_inputs(
            &self.policy,
        );
        inputs.contains(WorkerInputs::CACHE)
    }

    /// What it takes.
    pub(crate) fn take(
        &self,
        workers: &HashMap<u64, Instance>,
        request: &SchedulingRequest,
        overloaded: Option<&HashSet<u64>>,
        block_size: u32,
    ) -> Result<Taken, KvSchedulerError> {
        taken(&self.policy, workers, request, overloaded, block_size)
    }

    /// Every candidate, as if it were the one that it takes.
    ///
    /// - `candidates`: how many there should be.
    /// - `seeds`: see [`Seeds`].
    pub(crate) fn all(
        &self,
        workers: &HashMap<u64, Instance>,
        request: &SchedulingRequest,
        overloaded: Option<&HashSet<u64>>,
        block_size: u32,
        candidates: usize,
        seeds: &Seeds,
    ) -> Result<Vec<Taken>, KvSchedulerError> {
        let mut all = Vec::with_capacity(candidates);
        for at in 0..candidates {
            fastrand::seed(seeds.within(at, candidates));
            let taken = taken(&self.even, workers, request, overloaded, block_size)?;
            assert!(all.iter().all(|it: &Taken| it.worker != taken.worker), "one comes twice");
            all.push(taken);
        }
        Ok(all)
    }
}

/// A worker that was taken.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    pub(crate) worker: WorkerWithDpRank,
    pub(crate) cost: f64,
    /// Tokens of the prompt that it need not compute, as bookings count them.
    pub(crate) cached_tokens: usize,
    /// Blocks that its requests would hold with this one, a partial one counted.
    pub(crate) potential_decode_blocks: usize,
}

fn policy(config: &KvRouterConfig, role: WorkerType) -> Result<WorkerSelectionPolicy, String> {
    let mut registry = default_registry();
    register(&mut registry).map_err(|error| error.to_string())?;
    let resolved = registry.resolve(config).map_err(|error| error.to_string())?;
    let factory = resolved.ok_or("no policy was resolved")?;
    Ok(factory(config, role, RoutingPartitionRef::new("model", "default")))
}

fn taken(
    policy: &WorkerSelectionPolicy,
    workers: &HashMap<u64, Instance>,
    request: &SchedulingRequest,
    overloaded: Option<&HashSet<u64>>,
    block_size: u32,
) -> Result<Taken, KvSchedulerError> {
    COST.set(f64::NAN);
    let eligibility = request.eligibility_with_overloaded(overloaded);
    let input = WorkerSelectionInput::configured(workers, request, eligibility, block_size);
    let result = policy.select_worker(input)?;
    Ok(Taken {
        worker: result.worker,
        cost: COST.get(),
        cached_tokens: result.cached_tokens,
        potential_decode_blocks: result.potential_decode_blocks,
    })
}

/// Seeds of the thread's generator, by the first number that it then gives.
pub(crate) struct Seeds(Vec<(f64, u64)>);

impl Seeds {
    pub(crate) fn new() -> Self {
        let first = |seed| {
            fastrand::seed(seed);
            (fastrand::f64(), seed)
        };
        let mut seeds: Vec<(f64, u64)> = (0..65_536).map(first).collect();
        seeds.sort_unstable_by(|left, right| left.0.total_cmp(&right.0));
        Self(seeds)
    }

    /// A seed whose first number is in the middle of one of so many equal parts.
    fn within(&self, at: usize, parts: usize) -> u64 {
        let middle = (at as f64 + 0.5) / parts as f64;
        let found = self.0.partition_point(|(number, _)| *number < middle);
        self.0[found.min(self.0.len() - 1)].1
    }
}

thread_local! {
    /// Cost in the last event.
    static COST: Cell<f64> = const { Cell::new(f64::NAN) };
}

/// Reads the cost out of Dynamo's events.
pub(crate) struct Listener;

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && metadata.fields().field("logit").is_some()
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut Logit);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Logit;

impl Visit for Logit {
    fn record_f64(&mut self, field: &Field, value: f64) {
        if field.name() == "logit" {
            COST.set(value);
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn Debug) {}
}
