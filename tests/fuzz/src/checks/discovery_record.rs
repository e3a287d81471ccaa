//! A record of Dynamo's discovery among others, and pages that engines serve
//! about themselves.
//!
//! Input: a byte that chooses, then `KEY \n VALUE` of a record, or a page.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use serde_json::Value;
use warmpath_sidecar::adapter::gauges::scan;
use warmpath_sidecar::config::discovery::{FrontendRule, NamespaceRule};
use warmpath_sidecar::discovery::join::{Rules, join};
use warmpath_sidecar::discovery::listing::{Author, Listing};
use warmpath_sidecar::discovery::probe::{served, sglang_sockets, vllm_sockets};
use warmpath_sidecar::discovery::record::{Key, parse};
use warmpath_sidecar::limits::{FLEET_PROBLEMS_MAX, INSTANCE_RANKS_MAX};

use super::fixtures::{behind, json, read};

const CAPTURE: &str =
    "control-sidecar/tests/fixtures/dynamo-1.6.1-discovery-etcd-prefill-decode.json";

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let records: Vec<Vec<u8>> =
        captured().iter().map(|(key, value)| format!("{key}\n{value}").into_bytes()).collect();
    let mut seeds = behind(&[0], &records);
    let page = read("control-sidecar/tests/fixtures/dynamo-1.6.1-mocker-metrics.prom");
    seeds.push([&[1], &page[..]].concat());
    let pages: [&[u8]; 3] = [
        br#"{"0": {"publisher": "zmq", "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5657"}}"#,
        br#"{"kv_events": {"publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": 5557, "dp_size": 2, "block_size": 1}}"#,
        br#"{"data": [{"id": "base", "root": "/m"}, {"id": "sql", "parent": "base"}]}"#,
    ];
    seeds.extend(pages.iter().map(|page| [&[1], *page].concat()));
    seeds
}

fn captured() -> Vec<(String, String)> {
    let capture = json(CAPTURE);
    let kvs = capture["kvs"].as_array().expect("a list");
    let text = |value: &Value| value.as_str().expect("a key").to_owned();
    kvs.iter().map(|kv| (text(&kv["key"]), kv["value"].to_string())).collect()
}

pub(super) fn check(data: &[u8]) {
    let Some((head, bytes)) = data.split_first() else { return };
    if head & 1 == 1 {
        let ip = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let _ = (vllm_sockets(bytes, ip), sglang_sockets(bytes, ip), served(bytes));
        if let Ok(page) = std::str::from_utf8(bytes) {
            let _ = scan(page);
        }
        return;
    }
    let mut parts = bytes.splitn(2, |byte| *byte == b'\n');
    let (Some(key), Some(value)) = (parts.next(), parts.next()) else { return };
    let Some(key) = std::str::from_utf8(key).ok().and_then(Key::of_etcd) else { return };
    let author = Arc::new(Author::default());
    // Among the records of a whole fleet, in the place of the one with its key.
    let mut listing = Listing::default();
    for (other, value) in captured() {
        let other = Key::of_etcd(&other).expect("a key of discovery's");
        if other != key {
            listing.add(&other, &parse(&other, value.as_bytes()).map(Arc::new), &author);
        }
    }
    listing.add(&key, &parse(&key, value).map(Arc::new), &author);
    let rules = Rules {
        namespaces: NamespaceRule::Prefix(String::new()),
        frontend: FrontendRule::PodPort(8000),
        models: Vec::new(),
        brokers: head & 2 != 0,
    };
    let fleet = join(&listing, &rules);
    assert!(fleet.problems.len() <= FLEET_PROBLEMS_MAX + 1, "problems are bounded");
    assert!(fleet.ranks.len() <= 4 * INSTANCE_RANKS_MAX as usize, "ranks are bounded");
    for rank in &fleet.ranks {
        assert!(usize::from(rank.spec.model) < fleet.models.len(), "a rank's model is there");
        let endpoint = &rank.spec.endpoint;
        let is_address = endpoint.parse::<std::net::SocketAddr>().is_ok();
        assert!(endpoint.is_empty() || is_address, "what becomes a header is an address");
    }
}
