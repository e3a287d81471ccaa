//! Headers: the names by which a choice travels, and those a client may never
//! bring along.

/// Where Envoy's `override_host` policy sends the request: `ip:port`.
pub const DESTINATION: &str = "x-gateway-destination-endpoint";

/// The worker that is to run the request (decode or aggregated): decimal.
pub const WORKER: &str = "x-dynamo-worker-instance-id";

/// Its data-parallel rank: decimal.
pub const DP_RANK: &str = "x-dynamo-dp-rank";

/// `aggregated` or `disaggregated`.
pub const ROUTING_MODE: &str = "x-dynamo-routing-mode";

/// Prefix of the response headers that say what was decided.
pub const DEBUG_PREFIX: &str = "x-warmpath-";

/// Every name that steers routing somewhere, in any generation of the engines'
/// and pickers' protocols. Removed from each request before anything else: a
/// client that sets one must not reach a worker of its choosing.
pub const STRIPPED: [&str; 44] = [
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
    "x-dynamo-prefill-instance-id",
    DP_RANK,
    "x-dynamo-prefill-dp-rank",
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
    "x-prefiller-host-port",
    "x-prefiller-url",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-kv-cache-source-host-port",
    "x-llm-d-prefiller-host-port",
    "x-llm-d-encoder-hosts-ports",
    "x-llm-d-data-parallel-host-port",
    "x-tenant-id",
    "routing-strategy",
    "external-filter",
    "target-pod",
    // Our own.
    "x-warmpath-worker",
    "x-warmpath-endpoint",
    "x-warmpath-predicted-cached-tokens",
    "x-warmpath-reason",
    "x-warmpath-decision-us",
];

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn names_are_lower_case_and_distinct() {
        let mut names = STRIPPED.to_vec();
        assert!(names.iter().all(|name| !name.bytes().any(|b| b.is_ascii_uppercase())));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), STRIPPED.len());
    }
}
