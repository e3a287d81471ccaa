//! Headers: the names by which a choice travels, and those a client may never
//! bring along.

use crate::limits::HEADER_NAME_BYTES_MAX;

/// Where Envoy's `override_host` policy sends the request: `ip:port`.
pub const DESTINATION: &str = "x-gateway-destination-endpoint";

/// The worker that is to run the request (decode or aggregated): decimal.
pub const WORKER: &str = "x-dynamo-worker-instance-id";

/// Its data-parallel rank: decimal.
pub const DP_RANK: &str = "x-dynamo-dp-rank";

/// The worker that is to compute the prompt for it, if that is another one:
/// decimal.
pub const PREFILL_WORKER: &str = "x-dynamo-prefill-instance-id";

/// That worker's data-parallel rank: decimal.
pub const PREFILL_DP_RANK: &str = "x-dynamo-prefill-dp-rank";

/// Where that worker is reached, for llm-d's sidecar: `ip:port`.
pub const PREFILLER: &str = "x-prefiller-host-port";

/// `aggregated` or `disaggregated`.
pub const ROUTING_MODE: &str = "x-dynamo-routing-mode";

/// What Dynamo's frontend takes for the cache salt.
pub const TENANT: &str = "x-tenant-id";

/// How far ahead of others the request would be in a queue: a signed integer,
/// negative ones count as 0.
pub const PRIORITY: &str = "x-dynamo-request-priority";

/// Class of the request in a queue: an unsigned integer.
pub const STRICT_PRIORITY: &str = "x-dynamo-request-strict-priority";

/// Prefix of the headers that carry metadata for Dynamo's policies.
pub const METADATA_PREFIX: &str = "x-dynamo-meta-";

/// Names of the serving worker's id, the canonical one first, as Dynamo's
/// frontend reads them.
pub const WORKER_NAMES: [&str; 2] = [WORKER, "x-worker-instance-id"];

/// Names of its rank.
pub const DP_RANK_NAMES: [&str; 3] = [DP_RANK, "x-dp-rank", "x-data-parallel-rank"];

/// Names of the prefill worker's id.
pub const PREFILL_WORKER_NAMES: [&str; 2] = [PREFILL_WORKER, "x-prefill-instance-id"];

/// Names of its rank.
pub const PREFILL_DP_RANK_NAMES: [&str; 2] = [PREFILL_DP_RANK, "x-prefill-dp-rank"];

/// The name by which frontends before Dynamo's renaming in June 2026 read what a
/// header says; `None` if there is none.
#[must_use]
pub fn legacy_name(name: &str) -> Option<&'static str> {
    let all: [&[&str]; 4] =
        [&WORKER_NAMES, &DP_RANK_NAMES, &PREFILL_WORKER_NAMES, &PREFILL_DP_RANK_NAMES];
    let names = all.into_iter().find(|names| names.first() == Some(&name))?;
    names.get(1).copied()
}

/// The property of a request in which a filter says what a header would, where it
/// can no longer write headers: Envoy's filter state has it as `wasm.<name>`. `None`
/// for a name by which no choice travels.
#[must_use]
pub fn property_name(name: &str) -> Option<&'static str> {
    Some(match name {
        DESTINATION => "warmpath_destination",
        WORKER => "warmpath_worker",
        DP_RANK => "warmpath_dp_rank",
        PREFILL_WORKER => "warmpath_prefill_worker",
        PREFILL_DP_RANK => "warmpath_prefill_dp_rank",
        PREFILLER => "warmpath_prefiller",
        ROUTING_MODE => "warmpath_routing_mode",
        _ => return None,
    })
}

/// Prefix of the response headers that say what was decided.
pub const DEBUG_PREFIX: &str = "x-warmpath-";

/// Every name that steers routing somewhere, in any generation of the engines'
/// and pickers' protocols. Removed from each request before anything else: a
/// client that sets one must not reach a worker of its choosing.
pub const STRIPPED: [&str; 45] = [
    // Endpoint-picker protocol.
    DESTINATION,
    "x-gateway-destination-endpoint-subset",
    "x-gateway-destination-endpoint-served",
    "x-gateway-destination-endpoint-fallback",
    "x-gateway-inference-fairness-id",
    "x-gateway-inference-objective",
    "x-gateway-model-name-rewrite",
    "x-gateway-model-name",
    "x-gateway-base-model-name",
    "test-epp-endpoint-selection",
    "x-envoy-original-dst-host",
    // Dynamo, canonical.
    WORKER,
    PREFILL_WORKER,
    DP_RANK,
    PREFILL_DP_RANK,
    ROUTING_MODE,
    // Dynamo, older names that its frontend still reads.
    "x-worker-instance-id",
    "x-prefill-instance-id",
    "x-dp-rank",
    "x-data-parallel-rank",
    "x-prefill-dp-rank",
    "x-dynamo-backend-instance-id",
    "x-dynamo-decode-worker-id",
    "x-dynamo-prefill-worker-id",
    "x-dynamo-token-data",
    // Dynamo's pickers talking to themselves.
    "x-dynamo-epp-booking-id",
    "x-dynamo-epp-prefill-reservation-id",
    // llm-d and other pickers.
    PREFILLER,
    "x-prefiller-url",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-kv-cache-source-host-port",
    "x-llm-d-prefiller-host-port",
    "x-llm-d-encoder-hosts-ports",
    "x-llm-d-data-parallel-host-port",
    TENANT,
    "routing-strategy",
    "external-filter",
    "target-pod",
    // Our own.
    "x-warmpath-worker",
    "x-warmpath-prefill-worker",
    "x-warmpath-endpoint",
    "x-warmpath-predicted-cached-tokens",
    "x-warmpath-reason",
    "x-warmpath-decision-us",
];

/// Families of names that are removed whatever follows.
const STRIPPED_PREFIXES: [&str; 2] = ["x-llm-d-", DEBUG_PREFIX];

/// Whether a header of this lower-case name is removed from each request.
#[must_use]
pub fn steers_routing(name: &str) -> bool {
    STRIPPED.contains(&name) || STRIPPED_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// The cache salt that a header's values say: the last that is not blank,
/// without the space around it, as Dynamo's frontend reads it.
pub fn cache_salt<'a>(values: impl DoubleEndedIterator<Item = &'a str>) -> Option<&'a str> {
    values.rev().map(str::trim).find(|value| !value.is_empty())
}

/// Whether a lower-case name is that of a header, and of one that may be passed
/// on: what the client sends in the others must go.
#[must_use]
pub fn may_carry_salt(name: &str) -> bool {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    let is_name = !name.is_empty() && name.len() <= HEADER_NAME_BYTES_MAX;
    is_name && name.bytes().all(is_token) && (name == TENANT || !steers_routing(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn the_last_value_that_is_not_blank_is_the_salt() {
        assert_eq!(cache_salt([].into_iter()), None);
        assert_eq!(cache_salt(["", " "].into_iter()), None);
        assert_eq!(cache_salt(["a", " tenant b ", "  "].into_iter()), Some("tenant b"));
    }

    #[test]
    fn names_that_pin_a_worker_have_older_forms_and_are_stripped() {
        assert_eq!(legacy_name(WORKER), Some("x-worker-instance-id"));
        assert_eq!(legacy_name(DP_RANK), Some("x-dp-rank"));
        assert_eq!(legacy_name(PREFILL_WORKER), Some("x-prefill-instance-id"));
        assert_eq!(legacy_name(PREFILL_DP_RANK), Some("x-prefill-dp-rank"));
        assert_eq!(legacy_name(DESTINATION), None);
        assert_eq!(legacy_name("x-dp-rank"), None);
        let pins: [&[&str]; 4] =
            [&WORKER_NAMES, &DP_RANK_NAMES, &PREFILL_WORKER_NAMES, &PREFILL_DP_RANK_NAMES];
        assert!(pins.concat().iter().all(|name| steers_routing(name)));
    }

    #[test]
    fn what_names_a_choice_has_a_property_of_its_own() {
        let names = [
            DESTINATION,
            WORKER,
            DP_RANK,
            PREFILL_WORKER,
            PREFILL_DP_RANK,
            PREFILLER,
            ROUTING_MODE,
        ];
        let mut properties: Vec<&str> = names.iter().filter_map(|it| property_name(it)).collect();
        properties.sort_unstable();
        properties.dedup();
        assert_eq!(properties.len(), names.len());
        assert_eq!(property_name("x-dp-rank"), None);
    }

    #[test]
    fn names_are_lower_case_and_distinct() {
        let mut names = STRIPPED.to_vec();
        assert!(names.iter().all(|name| !name.bytes().any(|b| b.is_ascii_uppercase())));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), STRIPPED.len());
    }
}
