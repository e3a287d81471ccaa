//! Settings: how workers are chosen and booked, as operators set it.
//!
//! The sidecar reads them (Dynamo's environment variables, its own file) and
//! sends them to the filters, so that one place configures all gateways.
//!
//! Names, defaults and ranges are those of Dynamo's router 1.6.1
//! (`KvRouterConfig`), so that whoever moves here keeps every setting.
//!
//! # Terms
//!
//! - *field*: one setting by the name that operators write, in [`FIELDS`].
//! - *draft*: settings that are being put together field by field.
//!
//! # Invariants
//!
//! 1. Whatever is in force has passed [`Settings::validate`], wherever it came
//!    from: no number is infinite, none is outside its range.
//! 2. Every field is in [`FIELDS`], goes over the wire, and changes the
//!    [`Settings`]: what can be written reaches the filters.

mod draft;
mod fields;
mod wire;

use crate::score::expected_time::ExpectedTime;

pub use draft::{Draft, Value, Wrong};
pub use fields::{FIELDS, Field};

/// Which formula chooses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum SelectionPolicy {
    /// Dynamo's additive cost of prefill and decode work
    /// (`dynamo-default-cost-fn`).
    #[default]
    DynamoDefault,
    /// Dynamo's port of SGLang's router (`dynamo-two-tier-cost-fn`): overlap
    /// unless the loads are far apart.
    TwoTier(TwoTier),
    /// Our own: the time that a placement costs the request and those beside it.
    ExpectedTime(ExpectedTime),
}

/// Thresholds of [`SelectionPolicy::TwoTier`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TwoTier {
    /// Share of the prompt's blocks that the best worker must hold for overlap to
    /// count; compared strictly. `0.0..=1.0`.
    pub cache_threshold: f64,
    /// Difference between most and fewest running requests beyond which load
    /// alone counts.
    pub balance_abs_threshold: u64,
    /// Ratio between them that must be exceeded, too; at least 1.
    pub balance_rel_threshold: f64,
}

impl Default for TwoTier {
    fn default() -> Self {
        Self { cache_threshold: 0.5, balance_abs_threshold: 32, balance_rel_threshold: 1.1 }
    }
}

/// How long the record of own decisions stands for a cache that is not seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ApproximateCachePolicy {
    /// Until a time has passed.
    #[default]
    Ttl,
    /// Until the worker's capacity is used up, least recently used first; as
    /// [`Self::Ttl`] for workers that do not say how much they hold.
    Lru,
}

/// When a decode worker computes a prompt itself although there are prefill
/// workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ConditionalDisaggPolicy {
    /// If little of the prompt is left to compute.
    #[default]
    IslBounding,
    /// If the prefill worker is busy.
    PrefillLoad,
    /// If either holds.
    IslOrLoad,
}

/// Conditional disaggregation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConditionalDisagg {
    /// When it applies.
    pub policy: ConditionalDisaggPolicy,
    /// Uncached tokens below which little is left.
    pub eff_isl_threshold: u32,
    /// Uncached share of the prompt below which little is left, `0.0..=1.0`.
    pub eff_isl_ratio_threshold: f64,
    /// Booked prefill tokens, as a share of `max_num_batched_tokens`, above which
    /// a prefill worker is busy. Never `None` where the policy asks for it.
    pub prefill_busy_threshold: Option<f64>,
    /// Decode blocks, as a share of `total_kv_blocks`, above which a decode
    /// worker must not compute prompts.
    pub decode_busy_threshold: Option<f64>,
}

impl Default for ConditionalDisagg {
    fn default() -> Self {
        Self {
            policy: ConditionalDisaggPolicy::IslBounding,
            eff_isl_threshold: 2048,
            eff_isl_ratio_threshold: 0.7,
            prefill_busy_threshold: None,
            decode_busy_threshold: None,
        }
    }
}

/// What a session that is bound to a worker demands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AffinityMode {
    /// Its worker, if that is there.
    #[default]
    Hard,
    /// Its worker, unless that is overloaded or not eligible.
    Soft,
}

/// Session affinity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionAffinity {
    /// Idle time after which a session is forgotten, in milliseconds, 1 s to
    /// a year.
    pub ttl_ms: u64,
    /// What a bound session demands.
    pub mode: AffinityMode,
}

/// Thresholds beyond which a worker takes no more requests while others do.
/// Each is off unless set.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BusyThresholds {
    /// Share of `total_kv_blocks` in use, as the worker says, `0.0..=1.0`
    /// (`DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD`).
    pub active_decode_blocks: Option<f64>,
    /// Booked prefill tokens (`DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD`).
    pub active_prefill_tokens: Option<u64>,
    /// Booked prefill tokens as a share of `max_num_batched_tokens`
    /// (`DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC`).
    pub active_prefill_tokens_frac: Option<f64>,
    /// Share of `total_kv_blocks` in use, by the larger of what the worker says
    /// and what is booked on it, beyond which the next best worker is taken
    /// (`DYN_BUSY_THRESHOLD`). If all are beyond it, it does not count.
    pub busy: Option<f64>,
}

/// Limits of the queue that Dynamo's router would keep, per worker that may be
/// chosen. Compared before the request is added, as there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueLimits {
    /// Requests that wait (`request_queue_limit_per_worker`).
    pub requests_per_worker: Option<u64>,
    /// Prompt tokens that wait (`raw_isl_token_queue_limit_per_worker`).
    pub tokens_per_worker: Option<u64>,
}

/// All settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Which formula chooses.
    pub selection_policy: SelectionPolicy,
    /// Formula of prefill workers, if another one.
    pub prefill_policy: Option<SelectionPolicy>,
    /// Formula of decode workers, if another one.
    pub decode_policy: Option<SelectionPolicy>,
    /// Blocks of prefill saved per block that the worker holds, at least 0; above
    /// 1 overlap counts for more than the work it saves. 0 routes by load alone,
    /// whatever the other credits are.
    pub overlap_score_credit: f64,
    /// How fast that credit falls with the worker's booked prefill, at least 0.
    pub overlap_score_credit_decay: f64,
    /// Weight of prefill against decode, at least 0.
    pub prefill_load_scale: f64,
    /// Cost of each running request, in blocks, at least 0.
    pub decode_active_request_weight: f64,
    /// Credit of a block in the worker's host memory, `0.0..=1.0`.
    pub host_cache_hit_weight: f64,
    /// Credit of a block on its disk or in its external store, `0.0..=1.0`.
    pub disk_cache_hit_weight: f64,
    /// Credit of a block in a cache that all workers share, `0.0..=1.0`.
    pub shared_cache_multiplier: f64,
    /// 0 takes the best worker; above it draws, with weights that fall
    /// exponentially with the normalised cost.
    pub router_temperature: f64,
    /// Whether workers say what they hold; if not, own decisions stand for it.
    pub use_kv_events: bool,
    /// How long own decisions stand for a cache that is not seen.
    pub router_approximate_cache_policy: ApproximateCachePolicy,
    /// For how long, in milliseconds; 0 for not at all.
    pub router_ttl_ms: u64,
    /// For how long a decision counts as cached before the worker says so, in
    /// milliseconds.
    pub router_predicted_ttl_ms: Option<u64>,
    /// Whether gateways tell each other what they have booked.
    pub router_replica_sync: bool,
    /// Whether prompt blocks are booked.
    pub router_track_active_blocks: bool,
    /// Whether generated blocks are booked; needs the former.
    pub router_track_output_blocks: bool,
    /// Whether requests that share a prefix share its blocks in bookings.
    pub router_assume_kv_reuse: bool,
    /// Whether prompt tokens are booked.
    pub router_track_prefill_tokens: bool,
    /// Booked prefill tokens, as a share of `max_num_batched_tokens`, above which
    /// prompts wait at a worker. Dynamo would keep them in a queue; here they wait
    /// in the engine's own, until `queue_limits` are reached everywhere.
    pub router_queue_threshold: Option<f64>,
    /// Beyond them requests are answered 429. Off unless the threshold is set.
    pub queue_limits: QueueLimits,
    /// Conditional disaggregation; off if `None`.
    pub conditional_disagg: Option<ConditionalDisagg>,
    /// Whether requests fail where a decode worker would serve without a prefill
    /// worker.
    pub enforce_disagg: bool,
    /// Session affinity; off if `None`.
    pub session_affinity: Option<SessionAffinity>,
    /// When workers are overloaded.
    pub busy_thresholds: BusyThresholds,
    /// After how long a booking that nobody frees or refreshes ends, in
    /// milliseconds, 1 s to 1 day.
    pub active_request_expiry_ms: u64,
    /// Status of answers when every worker is overloaded, 400 to 599
    /// (`DYN_HTTP_OVERLOAD_STATUS_CODE`).
    pub overload_status: u16,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            selection_policy: SelectionPolicy::DynamoDefault,
            prefill_policy: None,
            decode_policy: None,
            overlap_score_credit: 1.0,
            overlap_score_credit_decay: 0.0,
            prefill_load_scale: 1.0,
            decode_active_request_weight: 0.0,
            host_cache_hit_weight: 0.75,
            disk_cache_hit_weight: 0.25,
            shared_cache_multiplier: 0.0,
            router_temperature: 0.0,
            use_kv_events: true,
            router_approximate_cache_policy: ApproximateCachePolicy::Ttl,
            router_ttl_ms: 120_000,
            router_predicted_ttl_ms: None,
            router_replica_sync: false,
            router_track_active_blocks: true,
            router_track_output_blocks: false,
            router_assume_kv_reuse: true,
            router_track_prefill_tokens: true,
            router_queue_threshold: None,
            queue_limits: QueueLimits::default(),
            conditional_disagg: None,
            enforce_disagg: false,
            session_affinity: None,
            busy_thresholds: BusyThresholds::default(),
            active_request_expiry_ms: 300_000,
            overload_status: 529,
        }
    }
}

impl Settings {
    /// Whether every value is in its range and none contradicts another. All
    /// that read settings hold them against this.
    ///
    /// # Errors
    ///
    /// Everything that is wrong.
    pub fn validate(&self) -> Result<(), Vec<Wrong>> {
        let finished = Draft::of(*self).finish()?;
        // What follows from other fields must have been filled in.
        if finished == *self { Ok(()) } else { Err(vec![Wrong::unfinished()]) }
    }
}

/// The settings of all models, as they travel on the feed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouterSettings {
    /// Of models that have none of their own, and of the gateway as a whole.
    pub default: Settings,
    /// Of models whose workers bring settings of their own, by the model's
    /// number, ascending. They replace the default as a whole.
    pub of_models: Vec<(u16, Settings)>,
}

impl RouterSettings {
    /// The settings of a model.
    ///
    /// - `model`: its number; `None` for one that no card names.
    #[must_use]
    pub fn of(&self, model: Option<u16>) -> &Settings {
        let own = model.and_then(|model| {
            let at = self.of_models.binary_search_by_key(&model, |(number, _)| *number).ok()?;
            self.of_models.get(at)
        });
        own.map_or(&self.default, |(_, settings)| settings)
    }
}

#[cfg(test)]
mod tests;
