//! Variables: what each of Dynamo's means here.

/// What a variable, or a field of Dynamo's, means.
#[derive(Clone, Copy, Debug)]
pub(super) enum Use {
    /// A field by its name.
    Field(&'static str),
    /// A field that it is the contrary of.
    Inverse(&'static str),
    /// Nothing that could be set here.
    Other(Rule),
    /// Read where what it belongs to is put together.
    Elsewhere,
}

/// What becomes of something that cannot be set here.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rule {
    /// A mistake unless it is one of these: decisions would be other ones.
    Only(&'static [&'static str], &'static str),
    /// A warning unless it is one of these.
    Ignored(&'static [&'static str], &'static str),
}

impl Rule {
    /// Whether that changes nothing.
    pub(super) fn is_quiet(&self, text: &str) -> bool {
        let (Self::Only(quiet, _) | Self::Ignored(quiet, _)) = self;
        quiet.iter().any(|word| text.trim().eq_ignore_ascii_case(word))
    }

    /// Whether decisions are the same whatever it is.
    pub(super) fn is_harmless(&self) -> bool {
        matches!(self, Self::Ignored(..))
    }
}

/// A variable of the environment.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    pub(super) of: Use,
}

const fn field(name: &'static str, field: &'static str) -> Variable {
    Variable { name, of: Use::Field(field) }
}

const fn other(name: &'static str, rule: Rule) -> Variable {
    Variable { name, of: Use::Other(rule) }
}

const fn elsewhere(name: &'static str) -> Variable {
    Variable { name, of: Use::Elsewhere }
}

/// Dynamo's words for no.
const NO: &[&str] = &["0", "false", "off", "no"];

const SHARED_CACHE: Rule = Rule::Only(
    &["none"],
    "must be none: what a shared cache holds is not asked for here, and decisions would differ",
);
const TRACKING_HASH: Rule = Rule::Only(
    &["public-xxh3-v1"],
    "must be public-xxh3-v1: bookings are not told to others under keyed hashes here",
);
const TRACKING_KEY: Rule = Rule::Only(&[], "must not be set: there are no keyed hashes here");
const LOAD_MODEL: Rule =
    Rule::Only(&["none"], "must be none: booked prefill does not decay by a model here");
const QUEUE_POLICY: Rule =
    Rule::Ignored(&["fcfs"], "orders a queue; here requests are answered at once");
const THREADS: Rule = Rule::Ignored(&[], "has no meaning: events are applied by one task");
const REMOTE: Rule = Rule::Ignored(NO, "has no meaning: the feed has the index");
const SERVE: Rule = Rule::Ignored(NO, "has no meaning: the index goes to filters only");
const SESSION_INDEX: Rule = Rule::Ignored(NO, "has no meaning: there is no index by session");
const INITIAL_WORKERS: Rule =
    Rule::Ignored(&["0", "false"], "has no meaning: /readyz says when there are workers");
const TRANSPORT: Rule = Rule::Ignored(&[], "has no meaning: sockets are managed otherwise here");

/// Every variable that Dynamo's routers read and that is about routing. Aliases
/// stand before what wins over them.
pub static VARIABLES: [Variable; 62] = [
    field("DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT", "overlap_score_credit"),
    field("DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT_DECAY", "overlap_score_credit_decay"),
    field("DYN_ROUTER_PREFILL_LOAD_SCALE", "prefill_load_scale"),
    field("DYN_ROUTER_DECODE_ACTIVE_REQUEST_WEIGHT", "decode_active_request_weight"),
    // They set the scale, which is checked; more of them when all has been read.
    field("DYN_OVERLAP_SCORE_WEIGHT", "prefill_load_scale"),
    field("DYN_ROUTER_KV_OVERLAP_SCORE_WEIGHT", "prefill_load_scale"),
    field("DYN_ROUTER_HOST_CACHE_HIT_WEIGHT", "host_cache_hit_weight"),
    field("DYN_ROUTER_DISK_CACHE_HIT_WEIGHT", "disk_cache_hit_weight"),
    other("DYN_SHARED_CACHE_TYPE", SHARED_CACHE),
    field("DYN_SHARED_CACHE_MULTIPLIER", "shared_cache_multiplier"),
    field("DYN_ROUTER_TEMPERATURE", "router_temperature"),
    field("DYN_USE_KV_EVENTS", "use_kv_events"),
    field("DYN_ROUTER_USE_KV_EVENTS", "use_kv_events"),
    field("DYN_ROUTER_REPLICA_SYNC", "router_replica_sync"),
    field("DYN_ROUTER_TRACK_ACTIVE_BLOCKS", "router_track_active_blocks"),
    field("DYN_ROUTER_TRACK_OUTPUT_BLOCKS", "router_track_output_blocks"),
    field("DYN_ROUTER_ASSUME_KV_REUSE", "router_assume_kv_reuse"),
    field("DYN_ROUTER_TRACK_PREFILL_TOKENS", "router_track_prefill_tokens"),
    other("DYN_ROUTER_PREFILL_LOAD_MODEL", LOAD_MODEL),
    other("DYN_ROUTER_TRACKING_HASH", TRACKING_HASH),
    other("DYN_ROUTER_TRACKING_KEY_FILE", TRACKING_KEY),
    other("DYN_ROUTER_TRACKING_KEY_ID", TRACKING_KEY),
    field("DYN_ROUTER_TTL_SECS", "router_ttl_secs"),
    field("DYN_ROUTER_APPROXIMATE_CACHE_POLICY", "router_approximate_cache_policy"),
    field("DYN_ROUTER_PREDICTED_TTL_SECS", "router_predicted_ttl_secs"),
    field("DYN_ROUTER_QUEUE_THRESHOLD", "router_queue_threshold"),
    other("DYN_ROUTER_QUEUE_POLICY", QUEUE_POLICY),
    elsewhere("DYN_ROUTER_POLICY_CONFIG"),
    elsewhere("DYN_ROUTER_PREFILL_POLICY"),
    elsewhere("DYN_ROUTER_DECODE_POLICY"),
    elsewhere("DYN_ROUTER_WORKER_SELECTION_POLICY"),
    other("DYN_ROUTER_EVENT_THREADS", THREADS),
    other("DYN_USE_REMOTE_INDEXER", REMOTE),
    other("DYN_SERVE_INDEXER", SERVE),
    other("DYN_ENABLE_SESSION_PREFIX_INDEX", SESSION_INDEX),
    other("DYN_ROUTER_MIN_INITIAL_WORKERS", INITIAL_WORKERS),
    field("DYN_ROUTER_CONDITIONAL_DISAGG", "conditional_disagg_enabled"),
    field("DYN_ROUTER_CONDITIONAL_DISAGG_POLICY", "conditional_disagg_policy"),
    field(
        "DYN_ROUTER_CONDITIONAL_DISAGG_EFF_ISL_THRESHOLD",
        "conditional_disagg_eff_isl_threshold",
    ),
    field(
        "DYN_ROUTER_CONDITIONAL_DISAGG_EFF_ISL_RATIO_THRESHOLD",
        "conditional_disagg_eff_isl_ratio_threshold",
    ),
    field(
        "DYN_ROUTER_CONDITIONAL_DISAGG_PREFILL_BUSY_THRESHOLD",
        "conditional_disagg_prefill_busy_threshold",
    ),
    field(
        "DYN_ROUTER_CONDITIONAL_DISAGG_DECODE_BUSY_THRESHOLD",
        "conditional_disagg_decode_busy_threshold",
    ),
    other(
        "DYN_ROUTER_OVERLAP_REFRESH_AFTER_SECS",
        Rule::Ignored(&[], "has no meaning: no request waits for so long that overlap changes"),
    ),
    field("DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS", "active_request_expiry_secs"),
    other("DYN_ROUTER_ACTIVE_SEQUENCE_DIRECT_ZMQ", TRANSPORT),
    other("DYN_ROUTER_ACTIVE_SEQUENCE_ZMQ_RCVHWM", TRANSPORT),
    other("DYN_ROUTER_ZMQ_ENDPOINTS_PER_SUB", TRANSPORT),
    field("DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD", "active_decode_blocks_threshold"),
    field("DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD", "active_prefill_tokens_threshold"),
    field("DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC", "active_prefill_tokens_threshold_frac"),
    // Dynamo 1.6.1 has no reader of it; its guide says what it is meant to do.
    field("DYN_BUSY_THRESHOLD", "busy_threshold"),
    field("DYN_HTTP_OVERLOAD_STATUS_CODE", "http_overload_status_code"),
    // The frontends' own mode may be in the environment that is shared with them.
    other(
        "DYN_ROUTER_MODE",
        Rule::Only(&["kv", "direct"], "must be kv: there is no other way to choose here"),
    ),
    field("DYN_ROUTER_SESSION_AFFINITY_TTL_SECS", "session_affinity_ttl_secs"),
    field("DYN_ROUTER_SESSION_AFFINITY_MODE", "session_affinity_mode"),
    elsewhere("DYN_ROUTER_LOAD_AWARE"),
    other(
        "DYN_ROUTER_SELECTION_POLICY",
        Rule::Only(&["linear"], "must be linear: there is no other way to weigh here"),
    ),
    other("DYN_ADMISSION_CONTROL", Rule::Ignored(&[], "has no meaning, as in Dynamo")),
    other(
        "DYN_DISABLE_FRONTEND_ADMIN_API",
        Rule::Ignored(&[], "has no meaning: there is no way to change settings over HTTP"),
    ),
    other(
        "DYN_EPP_MAX_INFLIGHT_REQUESTS",
        Rule::Ignored(&[], "has no meaning: the gateway's own circuit breakers bound requests"),
    ),
    // Older recipes': whether decode workers serve alone.
    Variable { name: "DYN_DECODE_FALLBACK", of: Use::Inverse("enforce_disagg") },
    field("DYN_ENFORCE_DISAGG", "enforce_disagg"),
];

/// Fields of Dynamo's configuration that cannot be set here.
pub(super) static OTHERS: [(&str, Rule); 14] = [
    ("shared_cache_type", SHARED_CACHE),
    ("router_prefill_load_model", LOAD_MODEL),
    ("router_tracking_hash", TRACKING_HASH),
    ("router_tracking_key_file", TRACKING_KEY),
    ("router_tracking_key_id", TRACKING_KEY),
    ("router_queue_policy", QUEUE_POLICY),
    ("router_event_threads", THREADS),
    ("use_remote_indexer", REMOTE),
    ("serve_indexer", SERVE),
    ("enable_session_prefix_index", SESSION_INDEX),
    ("skip_initial_worker_wait", INITIAL_WORKERS),
    // Of cards of older releases.
    ("durable_kv_events", Rule::Only(NO, "must be false: there is no such stream")),
    (
        "router_snapshot_threshold",
        Rule::Ignored(&[], "has no meaning: snapshots are made on demand"),
    ),
    ("router_reset_states", Rule::Ignored(NO, "has no meaning: state is taken from the workers")),
];
