//! Every variable, every field, and who wins.

use super::*;
use crate::config::fields::Mistakes;
use serde_json::json;
use warmpath_core::score::expected_time::ExpectedTime;
use warmpath_core::settings::{FIELDS, QueueLimits, TwoTier};

fn env(variables: &[(&str, &str)]) -> RouterEnv {
    let own = |text: &&str| (*text).to_owned();
    RouterEnv::of(variables.iter().map(|(name, value)| (own(name), own(value))))
}

fn parse(text: &str, env: &RouterEnv) -> Result<RouterConfig, Mistakes> {
    let report = Report::default();
    let section = Section::new("router", yaml(text)?, &report);
    let config = RouterConfig::read(section, env, &report);
    report.finish(config)
}

fn of_env(variables: &[(&str, &str)]) -> RouterConfig {
    parse("", &env(variables)).unwrap_or_else(|wrong| panic!("{variables:?}: {wrong}"))
}

fn with_policy(policy: &str, variables: &[(&str, &str)]) -> RouterEnv {
    let mut env = env(variables);
    env.set_policy("policy.yaml".into(), Ok(policy.to_owned()));
    env
}

/// What a variable does: the field, a text that it takes, what the field is
/// then, and a text that it does not take; and what else it needs.
type Case = (&'static str, &'static str, &'static str, Value<'static>, &'static str);

const FIELD_CASES: [Case; 37] = {
    use Value::{Flag, Number, Word};
    [
        ("DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT", "overlap_score_credit", "0.5", Number(0.5), "-1"),
        (
            "DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT_DECAY",
            "overlap_score_credit_decay",
            "2",
            Number(2.0),
            "inf",
        ),
        ("DYN_ROUTER_PREFILL_LOAD_SCALE", "prefill_load_scale", "3", Number(3.0), "NaN"),
        (
            "DYN_ROUTER_DECODE_ACTIVE_REQUEST_WEIGHT",
            "decode_active_request_weight",
            "1.5",
            Number(1.5),
            "x",
        ),
        ("DYN_ROUTER_KV_OVERLAP_SCORE_WEIGHT", "prefill_load_scale", "2", Number(2.0), "-0.5"),
        ("DYN_OVERLAP_SCORE_WEIGHT", "prefill_load_scale", "2", Number(2.0), "two"),
        ("DYN_ROUTER_HOST_CACHE_HIT_WEIGHT", "host_cache_hit_weight", "0.5", Number(0.5), "1.1"),
        ("DYN_ROUTER_DISK_CACHE_HIT_WEIGHT", "disk_cache_hit_weight", "0", Number(0.0), "-0.1"),
        ("DYN_SHARED_CACHE_MULTIPLIER", "shared_cache_multiplier", "0.5", Number(0.5), "2"),
        ("DYN_ROUTER_TEMPERATURE", "router_temperature", "0.7", Number(0.7), "-1"),
        ("DYN_ROUTER_USE_KV_EVENTS", "use_kv_events", "off", Flag(false), "2"),
        ("DYN_USE_KV_EVENTS", "use_kv_events", "False", Flag(false), "never"),
        ("DYN_ROUTER_REPLICA_SYNC", "router_replica_sync", "yes", Flag(true), "y"),
        ("DYN_ROUTER_TRACK_ACTIVE_BLOCKS", "router_track_active_blocks", "0", Flag(false), "-"),
        ("DYN_ROUTER_TRACK_OUTPUT_BLOCKS", "router_track_output_blocks", "1", Flag(true), "-"),
        ("DYN_ROUTER_ASSUME_KV_REUSE", "router_assume_kv_reuse", "no", Flag(false), "-"),
        ("DYN_ROUTER_TRACK_PREFILL_TOKENS", "router_track_prefill_tokens", "no", Flag(false), "-"),
        ("DYN_ROUTER_TTL_SECS", "router_ttl_secs", "1.5", Number(1.5), "-1"),
        ("DYN_ROUTER_PREDICTED_TTL_SECS", "router_predicted_ttl_secs", "5", Number(5.0), "five"),
        ("DYN_ROUTER_QUEUE_THRESHOLD", "router_queue_threshold", "2", Number(2.0), "-2"),
        ("DYN_ROUTER_CONDITIONAL_DISAGG", "conditional_disagg_enabled", "on", Flag(true), "maybe"),
        (
            "DYN_ROUTER_CONDITIONAL_DISAGG_POLICY",
            "conditional_disagg_policy",
            "prefill_load",
            Word("prefill_load"),
            "load",
        ),
        (
            "DYN_ROUTER_CONDITIONAL_DISAGG_EFF_ISL_THRESHOLD",
            "conditional_disagg_eff_isl_threshold",
            "512",
            Number(512.0),
            "0.5",
        ),
        (
            "DYN_ROUTER_CONDITIONAL_DISAGG_EFF_ISL_RATIO_THRESHOLD",
            "conditional_disagg_eff_isl_ratio_threshold",
            "0.5",
            Number(0.5),
            "1.5",
        ),
        (
            "DYN_ROUTER_CONDITIONAL_DISAGG_PREFILL_BUSY_THRESHOLD",
            "conditional_disagg_prefill_busy_threshold",
            "4",
            Number(4.0),
            "-1",
        ),
        (
            "DYN_ROUTER_CONDITIONAL_DISAGG_DECODE_BUSY_THRESHOLD",
            "conditional_disagg_decode_busy_threshold",
            "0.9",
            Number(0.9),
            "-1",
        ),
        (
            "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD",
            "active_decode_blocks_threshold",
            "0.8",
            Number(0.8),
            "8",
        ),
        (
            "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD",
            "active_prefill_tokens_threshold",
            "1000",
            Number(1000.0),
            "0.5",
        ),
        (
            "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC",
            "active_prefill_tokens_threshold_frac",
            "1.5",
            Number(1.5),
            "-1",
        ),
        ("DYN_BUSY_THRESHOLD", "busy_threshold", "0.9", Number(0.9), "2"),
        ("DYN_HTTP_OVERLOAD_STATUS_CODE", "http_overload_status_code", "503", Number(503.0), "200"),
        (
            "DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS",
            "active_request_expiry_secs",
            "60",
            Number(60.0),
            "0",
        ),
        (
            "DYN_ROUTER_SESSION_AFFINITY_TTL_SECS",
            "session_affinity_ttl_secs",
            "600",
            Number(600.0),
            "31536001",
        ),
        ("DYN_ROUTER_SESSION_AFFINITY_MODE", "session_affinity_mode", "soft", Word("soft"), "weak"),
        ("DYN_ENFORCE_DISAGG", "enforce_disagg", "true", Flag(true), "always"),
        ("DYN_DECODE_FALLBACK", "enforce_disagg", "false", Flag(true), "sometimes"),
        (
            "DYN_ROUTER_WORKER_SELECTION_POLICY",
            "worker_selection_policy",
            "dynamo-two-tier-cost-fn",
            Word("dynamo-two-tier-cost-fn"),
            "thunderagent",
        ),
    ]
};

/// Variables whose values are checked against others, or that have none of a
/// field's.
const FURTHER: [&str; 25] = [
    "DYN_ROUTER_APPROXIMATE_CACHE_POLICY",
    "DYN_ROUTER_PREFILL_POLICY",
    "DYN_ROUTER_DECODE_POLICY",
    "DYN_ROUTER_POLICY_CONFIG",
    "DYN_ROUTER_LOAD_AWARE",
    "DYN_SHARED_CACHE_TYPE",
    "DYN_ROUTER_PREFILL_LOAD_MODEL",
    "DYN_ROUTER_TRACKING_HASH",
    "DYN_ROUTER_TRACKING_KEY_FILE",
    "DYN_ROUTER_TRACKING_KEY_ID",
    "DYN_ROUTER_SELECTION_POLICY",
    "DYN_ROUTER_MODE",
    "DYN_ROUTER_QUEUE_POLICY",
    "DYN_ROUTER_EVENT_THREADS",
    "DYN_USE_REMOTE_INDEXER",
    "DYN_SERVE_INDEXER",
    "DYN_ENABLE_SESSION_PREFIX_INDEX",
    "DYN_ROUTER_MIN_INITIAL_WORKERS",
    "DYN_ROUTER_OVERLAP_REFRESH_AFTER_SECS",
    "DYN_ROUTER_ACTIVE_SEQUENCE_DIRECT_ZMQ",
    "DYN_ROUTER_ACTIVE_SEQUENCE_ZMQ_RCVHWM",
    "DYN_ROUTER_ZMQ_ENDPOINTS_PER_SUB",
    "DYN_ADMISSION_CONTROL",
    "DYN_EPP_MAX_INFLIGHT_REQUESTS",
    "DYN_DISABLE_FRONTEND_ADMIN_API",
];

/// Goal: no variable of Dynamo's routers is passed over.
/// Method: the list, as Dynamo's documentation and its guide have it, written
/// down above, is the table.
#[test]
fn every_variable_is_known_and_tested() {
    let mut tested: Vec<&str> = FIELD_CASES.iter().map(|case| case.0).chain(FURTHER).collect();
    let mut known: Vec<&str> = VARIABLES.iter().map(|variable| variable.name).collect();
    tested.sort_unstable();
    known.sort_unstable();
    assert_eq!(known, tested);
    known.dedup();
    assert_eq!(known.len(), VARIABLES.len());
}

#[test]
fn every_field_has_a_variable_or_a_name_in_dynamo() {
    let named = |field: &&Field| FIELD_CASES.iter().any(|case| case.1 == field.name);
    let others: Vec<&str> =
        FIELDS.iter().filter(|field| !named(field)).map(|field| field.name).collect();
    let expected = [
        "router_prefill_policy",
        "router_decode_policy",
        "router_approximate_cache_policy",
        // Of classes in Dynamo's policy file.
        "request_queue_limit_per_worker",
        "raw_isl_token_queue_limit_per_worker",
    ];
    assert_eq!(others, expected);
}

#[test]
fn nothing_said_is_all_defaults() {
    let none = of_env(&[]);
    assert_eq!(none, RouterConfig::default());
    assert_eq!(none.settings, Settings::default());
    // As Kubernetes' templates leave it.
    let empty: Vec<(&str, &str)> = VARIABLES.iter().map(|it| (it.name, "  ")).collect();
    assert_eq!(of_env(&empty), none);
}

#[test]
fn each_variable_sets_its_field_and_refuses_what_is_wrong() {
    for (variable, name, text, expected, bad) in FIELD_CASES {
        let field = Field::find(name).unwrap();
        let config = of_env(&[(variable, text)]);
        assert_eq!(config.draft.get(field), expected, "{variable}");
        assert_eq!(config.origins, BTreeMap::from([(name, variable.to_owned())]), "{variable}");
        assert_eq!(config.warnings, [""; 0], "{variable}");
        let wrong = parse("", &env(&[(variable, bad)])).unwrap_err();
        assert_eq!(wrong.0.len(), 1, "{wrong}");
        assert_eq!(wrong.0[0].path, variable);
        assert!(
            wrong.0[0].message.contains("must be") || wrong.0[0].message.contains("is neither")
        );
        // The same in the sidecar's file, which wins.
        let given = match expected {
            Value::Flag(flag) => json!(flag),
            Value::Number(number) => json!(number),
            Value::Word(word) => json!(word),
            Value::Off => json!(null),
        };
        let file = json!({ name: given }).to_string();
        let of_file = parse(&file, &env(&[])).unwrap();
        assert_eq!(of_file.settings, config.settings, "{name}");
        assert_eq!(of_file.origins, BTreeMap::from([(name, format!("router.{name}"))]));
    }
}

#[test]
fn what_means_nothing_here_is_told_or_refused() {
    for (variable, quiet, loud) in [
        ("DYN_ROUTER_QUEUE_POLICY", "fcfs", "wspt"),
        ("DYN_USE_REMOTE_INDEXER", "false", "true"),
        ("DYN_SERVE_INDEXER", "0", "1"),
        ("DYN_ENABLE_SESSION_PREFIX_INDEX", "off", "on"),
        ("DYN_ROUTER_MIN_INITIAL_WORKERS", "0", "2"),
        ("DYN_ROUTER_EVENT_THREADS", "", "4"),
        ("DYN_ROUTER_OVERLAP_REFRESH_AFTER_SECS", "", "10"),
        ("DYN_ROUTER_ACTIVE_SEQUENCE_DIRECT_ZMQ", "", "true"),
        ("DYN_ROUTER_ACTIVE_SEQUENCE_ZMQ_RCVHWM", "", "1024"),
        ("DYN_ROUTER_ZMQ_ENDPOINTS_PER_SUB", "", "1"),
        ("DYN_ADMISSION_CONTROL", "", "token-capacity"),
        ("DYN_EPP_MAX_INFLIGHT_REQUESTS", "", "1024"),
        ("DYN_DISABLE_FRONTEND_ADMIN_API", "", "1"),
        // Not Dynamo's, and perhaps a slip of the pen.
        ("DYN_ROUTER_TEMPRATURE", "", "1"),
    ] {
        assert_eq!(of_env(&[(variable, quiet)]), RouterConfig::default(), "{variable}");
        let told = of_env(&[(variable, loud)]);
        assert_eq!(told.settings, Settings::default());
        let [warning] = told.warnings.as_slice() else { panic!("{variable}: {:?}", told.warnings) };
        assert!(warning.starts_with(variable), "{warning}");
    }
    for (variable, good, bad) in [
        ("DYN_SHARED_CACHE_TYPE", "none", "hicache"),
        ("DYN_ROUTER_PREFILL_LOAD_MODEL", "none", "ais"),
        ("DYN_ROUTER_TRACKING_HASH", "public-xxh3-v1", "keyed-xxh3-v1"),
        ("DYN_ROUTER_TRACKING_KEY_FILE", "", "/key"),
        ("DYN_ROUTER_TRACKING_KEY_ID", "", "1"),
        ("DYN_ROUTER_SELECTION_POLICY", "linear", "lmetric"),
        ("DYN_ROUTER_MODE", "kv", "round-robin"),
        ("DYN_ROUTER_MODE", "direct", "random"),
        ("DYN_ROUTER_LOAD_AWARE", "no", "nope"),
        ("DYN_ROUTER_PREFILL_POLICY", "default", "mine"),
        ("DYN_ROUTER_DECODE_POLICY", "default", "mine"),
    ] {
        assert_eq!(of_env(&[(variable, good)]), RouterConfig::default(), "{variable}");
        let wrong = parse("", &env(&[(variable, bad)])).unwrap_err();
        assert_eq!((wrong.0.len(), wrong.0[0].path.as_str()), (1, variable), "{wrong}");
    }
}

#[test]
fn the_old_weight_scales_prefill_and_wins() {
    let new =
        [("DYN_ROUTER_PREFILL_LOAD_SCALE", "3"), ("DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT", "0.5")];
    let with = |more: &[(&'static str, &'static str)]| {
        let Settings { prefill_load_scale, overlap_score_credit, .. } =
            of_env(&[&new, more].concat()).settings;
        (prefill_load_scale, overlap_score_credit)
    };
    let (canonical, old) = ("DYN_ROUTER_KV_OVERLAP_SCORE_WEIGHT", "DYN_OVERLAP_SCORE_WEIGHT");
    assert_eq!(with(&[]), (3.0, 0.5));
    assert_eq!(with(&[(old, "2")]), (2.0, 0.5));
    assert_eq!(with(&[(old, "0")]), (0.0, 0.0));
    assert_eq!(with(&[(canonical, "2"), (old, "0")]), (2.0, 0.5));
    assert_eq!(with(&[(canonical, "0"), (old, "2")]), (0.0, 0.0));
    let file = parse("{overlap_score_weight: 0, prefill_load_scale: 2}", &env(&new)).unwrap();
    assert_eq!((file.settings.prefill_load_scale, file.settings.overlap_score_credit), (0.0, 0.0));
    assert_eq!(file.origins["overlap_score_credit"], "router.overlap_score_weight");
}

#[test]
fn newer_names_win_over_older_ones() {
    let events = |new, old| {
        of_env(&[("DYN_ROUTER_USE_KV_EVENTS", new), ("DYN_USE_KV_EVENTS", old)])
            .settings
            .use_kv_events
    };
    assert!(events("true", "false") && !events("false", "true") && !events("", "false"));
    let enforce = |new, old| {
        of_env(&[("DYN_ENFORCE_DISAGG", new), ("DYN_DECODE_FALLBACK", old)]).settings.enforce_disagg
    };
    assert!(enforce("true", "true") && !enforce("false", "false"));
    assert!(enforce("", "false") && !enforce("", "true"));
}

#[test]
fn a_negative_busy_threshold_is_off() {
    let busy = |text| of_env(&[("DYN_BUSY_THRESHOLD", text)]).settings.busy_thresholds.busy;
    assert_eq!([busy("-1"), busy("-0.5"), busy("0.5")], [None, None, Some(0.5)]);
    let none = of_env(&[("DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD", "None")]);
    assert_eq!(none, RouterConfig::default());
}

#[test]
fn load_alone_is_a_preset() {
    let preset = [("DYN_ROUTER_LOAD_AWARE", "1"), ("DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT", "1")];
    let settings = of_env(&preset).settings;
    let expected = Settings {
        overlap_score_credit: 0.0,
        use_kv_events: false,
        router_assume_kv_reuse: false,
        ..Settings::default()
    };
    assert_eq!(settings, expected);
    let file = parse("{load_aware: true}", &env(&[])).unwrap();
    assert_eq!(file.settings, expected);
    let wins = parse("{use_kv_events: true}", &env(&preset)).unwrap();
    assert!(wins.settings.use_kv_events);
}

#[test]
fn what_contradicts_is_named_by_where_it_comes_from() {
    for (variables, path) in [
        (
            vec![("DYN_ROUTER_APPROXIMATE_CACHE_POLICY", "lru")],
            "DYN_ROUTER_APPROXIMATE_CACHE_POLICY",
        ),
        (
            vec![("DYN_ROUTER_PREDICTED_TTL_SECS", "1"), ("DYN_USE_KV_EVENTS", "0")],
            "DYN_ROUTER_PREDICTED_TTL_SECS",
        ),
        (
            vec![("DYN_ROUTER_TRACK_OUTPUT_BLOCKS", "1"), ("DYN_ROUTER_TRACK_ACTIVE_BLOCKS", "0")],
            "DYN_ROUTER_TRACK_OUTPUT_BLOCKS",
        ),
        (
            vec![
                ("DYN_ROUTER_CONDITIONAL_DISAGG", "1"),
                ("DYN_ROUTER_CONDITIONAL_DISAGG_POLICY", "isl_or_load"),
            ],
            "DYN_ROUTER_CONDITIONAL_DISAGG_POLICY",
        ),
    ] {
        let wrong = parse("", &env(&variables)).unwrap_err();
        assert_eq!((wrong.0.len(), wrong.0[0].path.as_str()), (1, path), "{wrong}");
    }
    let lru = [("DYN_ROUTER_APPROXIMATE_CACHE_POLICY", "lru"), ("DYN_USE_KV_EVENTS", "0")];
    let policy = of_env(&lru).settings.router_approximate_cache_policy;
    assert_eq!(policy, warmpath_core::settings::ApproximateCachePolicy::Lru);
}

const POLICY: &str = r"
router: {host_cache_hit_weight: 0.5, router_ttl_secs: 42.0, router_queue_threshold: null}
";

#[test]
fn the_policy_file_wins_over_the_environment_and_the_sidecar_s_over_both() {
    let policy = "router: {router_ttl_secs: 42.0, router_predicted_ttl_secs: null}";
    let variables = [("DYN_ROUTER_TTL_SECS", "7"), ("DYN_ROUTER_PREDICTED_TTL_SECS", "5")];
    let env = with_policy(policy, &variables);
    let settings = parse("", &env).unwrap().settings;
    assert_eq!((settings.router_ttl_ms, settings.router_predicted_ttl_ms), (42_000, None));
    let file = parse("{router_ttl_secs: 9}", &env).unwrap();
    assert_eq!(file.settings.router_ttl_ms, 9_000);
    assert_eq!(file.origins["router_ttl_secs"], "router.router_ttl_secs");
    // Dynamo takes these elsewhere only.
    let wrong = parse("", &with_policy(POLICY, &[])).unwrap_err().to_string();
    assert!(wrong.contains("router_policy_config.router.router_queue_threshold"), "{wrong}");
}

/// Dynamo's precedence of stages.
#[test]
fn a_stage_s_own_name_wins_over_the_one_for_all_and_that_over_the_file_s() {
    let policy = r"
worker_selection:
  aggregated: tiers
  decode: dynamo-two-tier-cost-fn
  instances:
    - {name: tiers, type: dynamo-two-tier-cost-fn,
       parameters: {cache_threshold: 0.25, balance_abs_threshold: 4, balance_rel_threshold: 2}}
";
    let two_tier = |cache_threshold, balance_abs_threshold, balance_rel_threshold| {
        SelectionPolicy::TwoTier(TwoTier {
            cache_threshold,
            balance_abs_threshold,
            balance_rel_threshold,
        })
    };
    let (own, stock) = (two_tier(0.25, 4, 2.0), SelectionPolicy::TwoTier(TwoTier::default()));
    let stages = |file: &str, variables: &[(&str, &str)]| {
        let settings = parse(file, &with_policy(policy, variables)).unwrap().settings;
        let of = |stage: Option<SelectionPolicy>| stage.unwrap_or(settings.selection_policy);
        (settings.selection_policy, of(settings.prefill_policy), of(settings.decode_policy))
    };
    let default = SelectionPolicy::DynamoDefault;
    assert_eq!(stages("", &[]), (own, default, stock));
    let all = ("DYN_ROUTER_WORKER_SELECTION_POLICY", "default");
    assert_eq!(stages("", &[all]), (default, default, default));
    let decode = ("DYN_ROUTER_DECODE_POLICY", "tiers");
    assert_eq!(stages("", &[all, decode]), (default, default, own));
    assert_eq!(stages("", &[decode, ("DYN_ROUTER_PREFILL_POLICY", "tiers")]), (own, own, own));
    assert_eq!(stages("{router_decode_policy: default}", &[decode]), (own, default, default));
}

#[test]
fn parameters_of_an_instance_win() {
    let policy = |stages: &str| {
        format!(
            r"
worker_selection:
  {stages}
  instances:
    - {{name: mine, type: dynamo-default-cost-fn,
       parameters: {{overlap_score_credit: 0.5, router_temperature: 0.25}}}}
"
        )
    };
    let all = policy("aggregated: mine\n  prefill: mine\n  decode: mine");
    let variables = [("DYN_ROUTER_TEMPERATURE", "1"), ("DYN_ROUTER_PREFILL_LOAD_SCALE", "2")];
    let config = parse("{overlap_score_credit: 0.75}", &with_policy(&all, &variables)).unwrap();
    let expected = Settings {
        overlap_score_credit: 0.5,
        router_temperature: 0.25,
        prefill_load_scale: 2.0,
        ..Settings::default()
    };
    assert_eq!(config.settings, expected);
    assert!(config.origins["router_temperature"].contains("worker_selection"));
    // Each stage would have its own, which the filters cannot follow.
    let one = policy("aggregated: mine");
    let wrong = parse("", &with_policy(&one, &[])).unwrap_err().to_string();
    assert!(wrong.contains("other parameters"), "{wrong}");
    // What is equal to the router's own is no other.
    let same = [("DYN_ROUTER_TEMPERATURE", "0.25"), ("DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT", "0.5")];
    assert!(parse("", &with_policy(&one, &same)).is_ok());
}

#[test]
fn mistakes_of_a_policy_file_are_named() {
    for (policy, expected) in [
        ("policy_classes: [{name: a, quantum: 1}]", "policy_classes go together"),
        ("policy_classes: [{name: a}]", "policy_classes[0].quantum: is missing"),
        (
            "policy_classes: [{name: a, quantum: 1, prefill_busy_threshold: 9}]",
            "policy_classes[0].prefill_busy_threshold: is not supported",
        ),
        ("request_classifier: {type: thunderagent}", "request_classifier: is not supported"),
        ("models: {tiny: {}}", "models: is not supported"),
        ("colour: blue", "colour: is not a known field"),
        ("router: {use_kv_events: 1}", "use_kv_events: must be true or false"),
        ("router: {shared_cache_type: hicache}", "shared_cache_type: must be none"),
        ("worker_selection: {aggregated: mine}", "\"mine\" is neither"),
        ("worker_selection: {instances: [{name: a, type: thunderagent}]}", "type: must be one of"),
        (
            "worker_selection: {instances: [{name: a b, type: dynamo-default-cost-fn}]}",
            "name: must have",
        ),
        (
            "worker_selection: {instances: [{name: a, type: dynamo-default-cost-fn, parameters: {x: 1}}]}",
            "parameters.x: is not a known field",
        ),
        (
            "worker_selection: {instances: [{name: a, type: dynamo-two-tier-cost-fn, parameters: {cache_threshold: 2}}]}",
            "`cache_threshold` from 0 to 1",
        ),
        (
            "worker_selection: {instances: [{name: a, type: dynamo-default-cost-fn}, {name: a, type: dynamo-default-cost-fn}]}",
            "\"a\" is used twice",
        ),
        ("[", "not valid YAML"),
    ] {
        let wrong = parse("", &with_policy(policy, &[])).unwrap_err().to_string();
        assert!(wrong.contains(expected), "{policy}: {wrong}");
    }
    let mut unread = env(&[]);
    unread.set_policy("/there".into(), Err("no such file".into()));
    let wrong = parse("", &unread).unwrap_err().to_string();
    assert!(wrong.contains("/there: no such file"), "{wrong}");
}

const CLASSES: &str = r"
default_policy_family: batch
uncached_isl_buckets: [{min_tokens: 0, bucket: all}]
policy_classes:
  - {name: a, policy_family: batch, cache_bucket: all, queue_policy: wspt, quantum: 4,
     prefill_busy_threshold_frac: 1.5, request_queue_limit_per_worker: 8}
  - {name: b, quantum: 1, prefill_busy_threshold_frac: 1.5, request_queue_limit_per_worker: 8}
";

#[test]
fn classes_that_wait_alike_are_followed() {
    let variables = [("DYN_ROUTER_QUEUE_THRESHOLD", "3")];
    let config = parse("", &with_policy(CLASSES, &variables)).unwrap();
    let expected = Settings {
        router_queue_threshold: Some(1.5),
        queue_limits: QueueLimits { requests_per_worker: Some(8), tokens_per_worker: None },
        ..Settings::default()
    };
    assert_eq!(config.settings, expected);
    assert_eq!(config.origins.len(), 2);
    assert!(config.warnings[0].contains("order and quantum"), "{:?}", config.warnings);
    // A profile replaces the threshold, also by none.
    let never = CLASSES.replace("prefill_busy_threshold_frac: 1.5, ", "");
    let config = parse("", &with_policy(&never, &variables)).unwrap();
    assert_eq!(config.settings.router_queue_threshold, None);
    let differ = CLASSES.replacen("1.5", "2.5", 1);
    let wrong = parse("", &with_policy(&differ, &[])).unwrap_err().to_string();
    assert!(wrong.contains("policy_classes: must have the same"), "{wrong}");
}

#[test]
fn the_policy_file_is_found() {
    let named = env(&[("DYN_ROUTER_POLICY_CONFIG", "p.yaml")]);
    let directory = Path::new("/etc/warmpath");
    assert_eq!(named.policy_path("", directory), Some("p.yaml".into()));
    let own = "router: {router_policy_config: q.yaml}";
    assert_eq!(named.policy_path(own, directory), Some("/etc/warmpath/q.yaml".into()));
    assert_eq!(env(&[]).policy_path("models: [", directory), None);
}

#[test]
fn mistakes_of_the_sidecar_s_section_are_named() {
    for (file, expected) in [
        ("{temperature: 1}", "router.temperature: is not a known field"),
        ("{router_temperature: warm}", "router.router_temperature: must be a number"),
        ("{router_temperature: [1]}", "router.router_temperature: must be a number"),
        ("{router_tracking_hash: keyed-xxh3-v1}", "router.router_tracking_hash: must be"),
        ("{load_aware: 1}", "router.load_aware: must be true or false"),
        ("{overlap_score_weight: x}", "router.overlap_score_weight: must be a number"),
        ("{router_prefill_policy: mine}", "router.router_prefill_policy: \"mine\" is neither"),
        ("[1]", "router: must be a map"),
    ] {
        let wrong = parse(file, &env(&[])).unwrap_err().to_string();
        assert!(wrong.contains(expected), "{file}: {wrong}");
    }
    let told = parse("{router_event_threads: 4, serve_indexer: false}", &env(&[])).unwrap();
    assert_eq!(told.warnings.len(), 1, "{:?}", told.warnings);
}

/// What Dynamo 1.6.1 writes for its defaults.
fn card() -> Json {
    json!({"router_config": {
        "router_mode": "k_v",
        "kv_router_config": {
            "overlap_score_credit": 1.0, "overlap_score_credit_decay": 0.0,
            "prefill_load_scale": 1.0, "host_cache_hit_weight": 0.75,
            "disk_cache_hit_weight": 0.25, "router_temperature": 0.0, "use_kv_events": true,
            "router_replica_sync": false, "router_track_active_blocks": true,
            "router_track_output_blocks": false, "router_assume_kv_reuse": true,
            "router_track_prefill_tokens": true, "router_prefill_load_model": "none",
            "router_ttl_secs": 120.0, "router_queue_threshold": null,
            "router_policy_config": null, "router_event_threads": 4,
            "skip_initial_worker_wait": false, "router_queue_policy": "fcfs",
            "use_remote_indexer": false, "serve_indexer": false, "shared_cache_type": "none",
            "router_predicted_ttl_secs": null
        },
        "load_threshold_config": {
            "active_decode_blocks_threshold": null, "active_prefill_tokens_threshold": null,
            "active_prefill_tokens_threshold_frac": null
        },
        "enforce_disagg": false, "session_affinity_ttl_secs": null, "session_affinity_mode": "hard"
    }})
}

fn changed(pointer: &str, value: Json) -> Json {
    let mut card = card();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    let parent = format!("/router_config{parent}");
    card.pointer_mut(&parent).unwrap()[name] = value;
    card
}

#[test]
fn a_card_s_settings_replace_the_router_s() {
    assert_eq!(CardRouter::read(&json!({})), None);
    assert_eq!(CardRouter::read(&json!({"router_config": null})), None);
    let own = of_env(&[
        ("DYN_ROUTER_TEMPERATURE", "1"),
        ("DYN_ROUTER_WORKER_SELECTION_POLICY", "dynamo-two-tier-cost-fn"),
        ("DYN_ROUTER_SESSION_AFFINITY_MODE", "soft"),
        ("DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS", "60"),
        ("DYN_HTTP_OVERLOAD_STATUS_CODE", "503"),
        ("DYN_BUSY_THRESHOLD", "0.5"),
        ("DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD", "0.25"),
        ("DYN_ENFORCE_DISAGG", "1"),
    ]);
    let card = CardRouter::read(&changed("/session_affinity_ttl_secs", json!(30)));
    let settings = own.of_card(&card.unwrap().unwrap()).unwrap();
    let expected = Settings {
        selection_policy: SelectionPolicy::TwoTier(TwoTier::default()),
        session_affinity: Some(warmpath_core::settings::SessionAffinity {
            ttl_ms: 30_000,
            mode: warmpath_core::settings::AffinityMode::Soft,
        }),
        active_request_expiry_ms: 60_000,
        overload_status: 503,
        busy_thresholds: warmpath_core::settings::BusyThresholds {
            busy: Some(0.5),
            ..Default::default()
        },
        enforce_disagg: true,
        ..Settings::default()
    };
    assert_eq!(settings, expected);
    let all = own.with(&BTreeMap::from([(4, settings)]));
    assert_eq!((*all.of(None), *all.of(Some(4))), (own.settings, settings));
}

#[test]
fn a_card_counts_as_a_whole_or_not_at_all() {
    let read = |pointer: &str, value: Json| {
        let card = CardRouter::read(&changed(pointer, value)).unwrap();
        card.map(|card| RouterConfig::default().of_card(&card).unwrap())
    };
    let kv = |name: &str| format!("/kv_router_config/{name}");
    let scale = read(&kv("overlap_score_weight"), json!(0)).unwrap();
    assert_eq!((scale.prefill_load_scale, scale.overlap_score_credit), (0.0, 0.0));
    let busy = read("/load_threshold_config/active_prefill_tokens_threshold", json!(7)).unwrap();
    assert_eq!(busy.busy_thresholds.active_prefill_tokens, Some(7));
    assert!(read("/enforce_disagg", json!(true)).unwrap().enforce_disagg);
    assert!(read(&kv("router_event_threads"), json!(9)).is_ok());
    for (pointer, value, reason) in [
        (kv("router_temperature"), json!(-1), "router_config"),
        (kv("colour"), json!("blue"), "router_config"),
        (kv("router_tracking_hash"), json!("keyed-xxh3-v1"), "router_config"),
        (kv("shared_cache_type"), json!("hicache"), "router_config"),
        (kv("router_policy_config"), json!("/p.yaml"), "router_policy_config"),
        (kv("router_track_active_blocks"), json!(1), "router_config"),
        ("/router_mode".into(), json!("round_robin"), "router_mode"),
        ("/kv_router_config".into(), json!([]), "router_config"),
    ] {
        assert_eq!(read(&pointer, value), Err(reason), "{pointer}");
    }
}

/// Our own formula is named like Dynamo's, with parameters or without.
#[test]
fn expected_time_is_a_formula_like_the_others() {
    let policy = r"
worker_selection:
  aggregated: ours
  instances:
    - {name: ours, type: expected-time, parameters: {prefill_us: 35, answer_weight: 0.5}}
";
    let formula = |variables: &[(&str, &str)]| {
        parse("", &with_policy(policy, variables)).unwrap().settings.selection_policy
    };
    let ours = ExpectedTime { prefill_us: 35.0, answer_weight: 0.5, ..ExpectedTime::default() };
    assert_eq!(formula(&[]), SelectionPolicy::ExpectedTime(ours));
    let plain = formula(&[("DYN_ROUTER_WORKER_SELECTION_POLICY", "expected-time")]);
    assert_eq!(plain, SelectionPolicy::ExpectedTime(ExpectedTime::default()));
    for wrong in ["answer_weight: 2", "prefill_us: -1", "prefil_us: 1"] {
        let policy = policy.replace("answer_weight: 0.5", wrong);
        assert!(parse("", &with_policy(&policy, &[])).is_err(), "{wrong}");
    }
}
