//! What a request demands: headers, `nvext` and the gateway's subset hint.
//!
//! Input: a byte of rules, the subset hint's length, the hint, then lines of
//! headers (`name: value`), an empty line, and the body.

use serde_json::Value;
use warmpath_core::demands::{Asked, Host, Refusal, Rules, SubsetHint};
use warmpath_core::limits::{SUBSET_HOSTS_MAX, TAINT_BYTES_MAX, TAINTS_MAX};
use warmpath_core::request::{Endpoint, RequestError, parse};

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let requests = [
        "x-dynamo-worker-instance-id: 7\nx-dynamo-dp-rank: 1\n\n{\"prompt\":\"a\"}",
        "x-worker-instance-id: x\nx-prefill-dp-rank: 4294967295\n\n{}",
        "x-dynamo-request-priority: -3\nx-dynamo-request-strict-priority: 9\n\n{\"prompt\":\"a\",\"nvext\":null}",
        "x-claude-code-session-id: c\nx-claude-code-agent-id: a\nx-dynamo-meta-k: v\n\n{\"prompt\":[1],\"nvext\":{\"backend_instance_id\":18446744073709551615,\"dp_rank\":0,\"agent_hints\":{\"priority\":5,\"osl\":9,\"latency_sensitivity\":0.5}}}",
        "\n{\"prompt\":\"a\",\"nvext\":{\"prefill_worker_id\":\"1\",\"routing_constraints\":{\"required_taints\":[\"a\"],\"preferred_taints\":{\"b\":-0.5}}}}",
    ];
    let hints: [&[u8]; 4] =
        [b"", b"10.0.0.1:80,::1,[::1]:9,x", b"\0\0\0\0", b"\x01\0\0\0\x01\0\0\0\0\0\0\0x\0\0"];
    let mut seeds = Vec::new();
    for request in requests {
        for hint in hints {
            for rules in [0, 3] {
                let length = u8::try_from(hint.len()).expect("a short seed");
                seeds.push([&[rules, length], hint, request.as_bytes()].concat());
            }
        }
    }
    seeds
}

pub(super) fn check(data: &[u8]) {
    let [rules, length, rest @ ..] = data else { return };
    let (hint, request) = rest.split_at(usize::from(*length).min(rest.len()));
    check_hint(hint);
    let Some(end) = request.windows(2).position(|two| two == b"\n\n") else { return };
    let (head, body) = request.split_at(end);
    let headers = headers(head);
    let rules = Rules { trusts_pins: rules & 1 != 0, binds_sessions: rules & 2 != 0 };
    let Ok(asked) = Asked::read(&headers, rules) else { return };
    let parsed = parse(Endpoint::Completions, body.get(2..).unwrap_or_default());
    let nvext = match &parsed {
        Ok(request) => request.nvext.as_ref(),
        Err(RequestError::Nvext(name)) => return assert!(name.starts_with("nvext.")),
        Err(_) => None,
    };
    let demands = match asked.demands(nvext) {
        Ok(demands) => demands,
        Err(Refusal::Field(name)) => {
            return assert!(rules.trusts_pins && name.starts_with("nvext."));
        }
        Err(refusal) => {
            return assert!(matches!(refusal, Refusal::SessionTooLong(_)) && rules.binds_sessions);
        }
    };
    assert!(demands.priority_jump >= 0.0 && demands.priority_jump.is_finite());
    assert!(demands.required_taints.len() <= TAINTS_MAX);
    assert!(demands.preferred_taints.len() <= TAINTS_MAX);
    let weighted = demands.preferred_taints.iter().map(|(taint, _)| taint);
    let mut taints = demands.required_taints.iter().chain(weighted);
    assert!(taints.all(|taint| taint.len() <= TAINT_BYTES_MAX));
    assert!(demands.preferred_taints.iter().all(|(_, weight)| weight.is_finite()));
    let is_pinned = demands.serving.is_some() || demands.prefill.is_some();
    assert!(rules.trusts_pins || !is_pinned, "a worker is named without trust");
    let body: Value = match serde_json::from_slice(body) {
        Ok(body) => body,
        Err(_) => return,
    };
    let said = |member: &str| body.pointer(&format!("/nvext/{member}")).and_then(Value::as_u64);
    let is_named = headers.iter().any(|(name, _)| name.ends_with("worker-instance-id"));
    if rules.trusts_pins && !is_named && nvext.is_some() {
        let expected = said("decode_worker_id").or(said("backend_instance_id"));
        assert_eq!(demands.serving.map(|pin| pin.worker.0), expected, "the body's pin");
    }
}

fn headers(head: &[u8]) -> Vec<(String, String)> {
    let text = String::from_utf8_lossy(head);
    let pairs = text.lines().filter_map(|line| line.split_once(": "));
    pairs.map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect()
}

fn check_hint(property: &[u8]) {
    let hint = SubsetHint::parse(property);
    assert!(hint.hosts.len() <= SUBSET_HOSTS_MAX.min(property.len()));
    // What was understood is understood again when it is said anew.
    let texts: Vec<String> = hint
        .hosts
        .iter()
        .map(|host| match host {
            Host::Socket(socket) => socket.to_string(),
            Host::Address(address) => address.to_string(),
        })
        .collect();
    let again = SubsetHint::parse(texts.join(",").as_bytes());
    assert_eq!((again.hosts, again.malformed), (hint.hosts, 0));
}
