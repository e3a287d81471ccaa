//! Policy: Dynamo's policy file, as far as it can be followed here.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value as Json;
use warmpath_core::score::expected_time::ExpectedTime;
use warmpath_core::settings::{SelectionPolicy, TwoTier};

use super::super::fields::{Report, Section};
use super::super::yaml;

/// What is wrong with a name that means nothing.
pub(super) const NO_INSTANCE: &str =
    "is neither default, dynamo-default-cost-fn, dynamo-two-tier-cost-fn nor an instance of these";

/// Dynamo's default formula.
const DEFAULT: &str = "dynamo-default-cost-fn";

/// The other one.
const TWO_TIER: &str = "dynamo-two-tier-cost-fn";

/// Our own.
const EXPECTED_TIME: &str = "expected-time";

/// Fields that Dynamo takes in the file's section `router`.
const ROUTER: [&str; 20] = [
    "host_cache_hit_weight",
    "disk_cache_hit_weight",
    "use_kv_events",
    "router_replica_sync",
    "router_track_active_blocks",
    "router_track_output_blocks",
    "router_assume_kv_reuse",
    "router_track_prefill_tokens",
    "router_tracking_hash",
    "router_tracking_key_file",
    "router_tracking_key_id",
    "router_prefill_load_model",
    "router_ttl_secs",
    "router_approximate_cache_policy",
    "router_event_threads",
    "use_remote_indexer",
    "serve_indexer",
    "enable_session_prefix_index",
    "shared_cache_type",
    "router_predicted_ttl_secs",
];

/// Parameters of Dynamo's default formula: fields of the same names.
const PARAMETERS: [&str; 8] = [
    "overlap_score_credit",
    "overlap_score_credit_decay",
    "prefill_load_scale",
    "decode_active_request_weight",
    "host_cache_hit_weight",
    "disk_cache_hit_weight",
    "shared_cache_multiplier",
    "router_temperature",
];

/// Sections that cannot be followed.
const UNKNOWN_HERE: [(&str, &str); 2] = [
    ("models", "is not supported: give one profile for all models"),
    ("request_classifier", "is not supported"),
];

/// A formula under a name.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Instance {
    pub(super) name: String,
    pub(super) formula: SelectionPolicy,
    /// Of Dynamo's default formula; what is not among them is the router's.
    pub(super) parameters: Vec<(&'static str, f64)>,
}

/// What a policy file says.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct PolicyFile {
    /// Its section `router`.
    pub(super) router: BTreeMap<String, Json>,
    /// When requests would wait, and when they are turned away: fields and their
    /// values. Empty without a profile, which replaces all of them.
    pub(super) queues: Vec<(&'static str, Option<f64>)>,
    /// What was given and means nothing here, and why.
    pub(super) warnings: Vec<String>,
    stages: Vec<(&'static str, String)>,
    instances: Vec<Instance>,
}

impl PolicyFile {
    /// Takes a file apart.
    pub(super) fn read(path: &Path, read: &Result<String, String>, report: &Report) -> Self {
        let at = "router_policy_config";
        let text = match read {
            Ok(text) => text,
            Err(error) => {
                report.add(at, format!("{}: {error}", path.display()));
                return Self::default();
            }
        };
        let value = match yaml(text) {
            Ok(value) => value,
            Err(mistakes) => {
                report.add(at, format!("{}: {mistakes}", path.display()));
                return Self::default();
            }
        };
        let mut root = Section::new(at, value, report);
        for (name, why) in UNKNOWN_HERE {
            if root.take(name).is_some() {
                root.mistake(name, why);
            }
        }
        let queues = queues(&mut root);
        let mut router = root.section("router").into_fields();
        router.retain(|name, _| {
            let is_known = ROUTER.contains(&name.as_str());
            if !is_known {
                report.add(&format!("{at}.router.{name}"), "is not a known field");
            }
            is_known
        });
        let mut selection = root.section("worker_selection");
        root.end();
        let instances = selection.sections("instances").into_iter().filter_map(instance).collect();
        // Nothing encodes here, but the name must be a formula's all the same.
        let stages = ["aggregated", "prefill", "decode", "encode"]
            .into_iter()
            .filter_map(|stage| Some((stage, selection.text(stage)?)))
            .collect();
        let mut warnings = Vec::new();
        if !queues.is_empty() {
            warnings.push(format!("{at}.policy_classes: {ORDER}"));
        }
        let this = Self { router, queues, warnings, stages, instances };
        for (at, instance) in this.instances.iter().enumerate() {
            let path = format!("instances[{at}].name");
            let rest = this.instances.get(at + 1..).unwrap_or(&[]);
            if rest.iter().any(|other| other.name == instance.name) {
                selection.mistake(&path, format!("{:?} is used twice", instance.name));
            }
        }
        for (stage, name) in &this.stages {
            if this.instance(name).is_none() {
                selection.mistake(stage, format!("{name:?} {NO_INSTANCE}"));
            }
        }
        selection.end();
        this
    }

    /// The name of a stage's formula.
    pub(super) fn stage(&self, stage: &str) -> Option<&str> {
        self.stages.iter().find(|(known, _)| *known == stage).map(|(_, name)| name.as_str())
    }

    /// The formula of that name: an instance, or a formula's own name, which
    /// Dynamo takes for `default` only.
    pub(super) fn instance(&self, name: &str) -> Option<Instance> {
        if let Some(found) = self.instances.iter().find(|instance| instance.name == name) {
            return Some(found.clone());
        }
        let formula = match name {
            "default" | DEFAULT => SelectionPolicy::DynamoDefault,
            TWO_TIER => SelectionPolicy::TwoTier(TwoTier::default()),
            EXPECTED_TIME => SelectionPolicy::ExpectedTime(ExpectedTime::default()),
            _ => return None,
        };
        Some(Instance { name: name.to_owned(), formula, parameters: Vec::new() })
    }
}

/// What is left out of classes of requests.
const ORDER: &str = "order and quantum have no meaning: requests wait in the engines' queues";

/// The profile of classes of requests, if one is given.
///
/// Classes differ in the order in which they leave the queue, and in when they
/// enter it. There is no queue here, so the former does not matter; the latter
/// must be the same for all, since requests are not told apart.
fn queues(root: &mut Section<'_>) -> Vec<(&'static str, Option<f64>)> {
    const PARTS: [&str; 3] = ["default_policy_family", "uncached_isl_buckets", "policy_classes"];
    let given = PARTS.into_iter().filter(|name| root.has(name)).count();
    if given == 0 {
        return Vec::new();
    }
    if given < PARTS.len() {
        root.mistake("policy_classes", format!("{} go together", PARTS.join(", ")));
    }
    root.text("default_policy_family");
    root.take("uncached_isl_buckets");
    let mut classes = Vec::new();
    for mut class in root.sections("policy_classes") {
        for name in ["name", "policy_family", "cache_bucket"] {
            class.text(name);
        }
        class.word("queue_policy", &[("fcfs", ()), ("wspt", ())]);
        if !class.has("quantum") {
            class.mistake("quantum", "is missing");
        }
        class.number("quantum", 1, u64::MAX);
        for name in ["prefill_busy_threshold", "cached_token_queue_limit_per_worker"] {
            if class.take(name).is_some() {
                class.mistake(name, "is not supported");
            }
        }
        let limits = [
            ("router_queue_threshold", "prefill_busy_threshold_frac"),
            ("request_queue_limit_per_worker", "request_queue_limit_per_worker"),
            ("raw_isl_token_queue_limit_per_worker", "raw_isl_token_queue_limit_per_worker"),
        ];
        classes.push(limits.map(|(field, name)| (field, class.fraction(name))));
        class.end();
    }
    let first = classes.first().copied();
    if classes.iter().any(|class| Some(*class) != first) {
        root.mistake(
            "policy_classes",
            "must have the same thresholds and limits: requests of one class are those of all",
        );
    }
    first.map(Vec::from).unwrap_or_default()
}

fn instance(mut section: Section<'_>) -> Option<Instance> {
    let name = section.text("name");
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    let named =
        name.filter(|name| !name.is_empty() && name != "default" && name.bytes().all(is_name));
    if named.is_none() {
        section.mistake("name", "must have letters, digits, _, . and -, and not be default");
    }
    let types = [
        (DEFAULT, SelectionPolicy::DynamoDefault),
        (TWO_TIER, SelectionPolicy::TwoTier(TwoTier::default())),
        (EXPECTED_TIME, SelectionPolicy::ExpectedTime(ExpectedTime::default())),
    ];
    if !section.has("type") {
        section.mistake("type", "is missing");
    }
    let formula = section.word("type", &types);
    let mut given = section.section("parameters");
    let (formula, parameters) = match formula {
        Some(SelectionPolicy::DynamoDefault) => {
            let mut number = |name| Some((name, given.fraction(name)?));
            let parameters = PARAMETERS.into_iter().filter_map(&mut number).collect();
            (Some(SelectionPolicy::DynamoDefault), parameters)
        }
        Some(SelectionPolicy::TwoTier(mut tiers)) => {
            let cache = given.fraction("cache_threshold");
            tiers.cache_threshold = cache.unwrap_or(tiers.cache_threshold);
            let absolute = given.number("balance_abs_threshold", 0, u64::MAX);
            tiers.balance_abs_threshold = absolute.unwrap_or(tiers.balance_abs_threshold);
            let relative = given.fraction("balance_rel_threshold");
            tiers.balance_rel_threshold = relative.unwrap_or(tiers.balance_rel_threshold);
            if let Err(why) = tiers.check() {
                section.mistake("parameters", why);
            }
            (Some(SelectionPolicy::TwoTier(tiers)), Vec::new())
        }
        Some(SelectionPolicy::ExpectedTime(mut time)) => {
            for (name, parameter) in time.parameters_mut() {
                *parameter = given.fraction(name).unwrap_or(*parameter);
            }
            if let Err(why) = time.check() {
                section.mistake("parameters", why);
            }
            (Some(SelectionPolicy::ExpectedTime(time)), Vec::new())
        }
        None => {
            // What the parameters of an unknown type are, is unknown.
            drop(given.into_fields());
            section.end();
            return None;
        }
    };
    given.end();
    section.end();
    Some(Instance { name: named?, formula: formula?, parameters })
}
