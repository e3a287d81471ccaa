//! Probe: what engines without Dynamo say of themselves over HTTP.
//!
//! Pure: bodies in, facts out. What an engine does not say is absent, and what
//! it says in a way that is not understood makes it absent too; only a body
//! that is not JSON at all is an error.

use core::fmt;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde_json::Value;
use warmpath_core::limits::CARD_NAME_BYTES_MAX;

use super::record::{name, number, text};
use crate::limits::{FLEET_ADAPTERS_MAX, INSTANCE_RANKS_MAX};

/// Why an engine's answer cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProbeError {
    /// No answer, or none in time.
    Unreachable,
    /// A status that says nothing about the question.
    Status,
    /// Longer than what is read.
    TooLong,
    /// Not JSON, or not of the expected form.
    Form,
}

impl ProbeError {
    /// Fixed word for metrics and the state page.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Unreachable => "probe_unreachable",
            Self::Status => "probe_status",
            Self::TooLong => "probe_too_long",
            Self::Form => "probe_form",
        }
    }
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unreachable => "the engine does not answer",
            Self::Status => "the engine answers with an error",
            Self::TooLong => "the engine's answer is too long",
            Self::Form => "the engine's answer is not understood",
        })
    }
}

impl std::error::Error for ProbeError {}

/// Where one rank of an engine is heard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RankSockets {
    /// `host:port` of its event publisher.
    pub events: Option<String>,
    /// `host:port` of its replay socket.
    pub replay: Option<String>,
    /// `host:port` of its load publisher.
    pub load: Option<String>,
}

/// The sockets of an engine by data-parallel rank.
pub type Sockets = BTreeMap<u32, RankSockets>;

/// One model that an engine serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// Name that requests use.
    pub name: String,
    /// The model that it is an adapter of.
    pub parent: Option<String>,
}

/// Reads vLLM's `/kv_event_sources`: a map from ranks to publishers.
///
/// - `ip`: the engine's address, for sockets that are bound to every address.
///
/// # Errors
///
/// [`ProbeError::Form`] if the body is not a map.
pub fn vllm_sockets(body: &[u8], ip: IpAddr) -> Result<Sockets, ProbeError> {
    let value: Value = serde_json::from_slice(body).map_err(|_| ProbeError::Form)?;
    let ranks = value.as_object().ok_or(ProbeError::Form)?;
    let mut sockets = Sockets::new();
    for (rank, source) in ranks {
        let Some(rank) = rank.parse().ok().filter(|rank| *rank < INSTANCE_RANKS_MAX) else {
            continue;
        };
        let on = source.get("enable_kv_cache_events").and_then(Value::as_bool) != Some(false)
            && text(source, "/publisher") == Some("zmq");
        let socket = |field| text(source, field).and_then(|it| reachable(it, ip));
        let (events, replay) = (socket("/endpoint"), socket("/replay_endpoint"));
        let replay = replay.filter(|_| on && events.is_some());
        sockets.insert(rank, RankSockets { events: events.filter(|_| on), replay, load: None });
    }
    Ok(sockets)
}

/// Reads the part `kv_events` of SGLang's `/server_info`. Ports grow with the
/// rank. Empty if the engine publishes nothing.
///
/// - `ip`: the engine's address, for sockets that are bound to every address.
///
/// # Errors
///
/// [`ProbeError::Form`] if the body is not a map.
pub fn sglang_sockets(body: &[u8], ip: IpAddr) -> Result<Sockets, ProbeError> {
    let value: Value = serde_json::from_slice(body).map_err(|_| ProbeError::Form)?;
    let about = value.as_object().ok_or(ProbeError::Form)?.get("kv_events");
    let Some(about) = about.filter(|about| text(about, "/publisher") == Some("zmq")) else {
        return Ok(Sockets::new());
    };
    let host = text(about, "/endpoint_host").unwrap_or("*");
    let size = number(about, "/dp_size").unwrap_or(1).clamp(1, u64::from(INSTANCE_RANKS_MAX));
    let socket = |field: &str, rank: u64| {
        let port = number(about, field)?.checked_add(rank)?;
        reachable(&format!("tcp://{host}:{}", u16::try_from(port).ok()?), ip)
    };
    let rank = |rank: u64| {
        let sockets = RankSockets {
            events: socket("/endpoint_port_base", rank),
            replay: None,
            load: socket("/load_endpoint_port_base", rank),
        };
        Some((u32::try_from(rank).ok()?, sockets))
    };
    Ok((0..size).filter_map(rank).collect())
}

/// Reads `/v1/models`, at most one model and [`FLEET_ADAPTERS_MAX`] adapters.
///
/// # Errors
///
/// [`ProbeError::Form`] if the body has no list of models.
pub fn served(body: &[u8]) -> Result<Vec<Served>, ProbeError> {
    let value: Value = serde_json::from_slice(body).map_err(|_| ProbeError::Form)?;
    let list = value.get("data").and_then(Value::as_array).ok_or(ProbeError::Form)?;
    let read = |it: &Value| Some(Served { name: name(it, "/id")?, parent: name(it, "/parent") });
    Ok(list.iter().filter_map(read).take(FLEET_ADAPTERS_MAX.saturating_add(1)).collect())
}

/// `host:port` of a ZMQ endpoint, with the engine's own address in the place of
/// every address; `None` if it is none to connect to.
fn reachable(endpoint: &str, ip: IpAddr) -> Option<String> {
    let (host, port) = endpoint.strip_prefix("tcp://")?.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port != 0)?;
    let plain = host.trim_start_matches('[').trim_end_matches(']');
    match plain {
        "*" | "0.0.0.0" | "::" => Some(SocketAddr::new(ip, port).to_string()),
        "" => None,
        _ if host.len() > CARD_NAME_BYTES_MAX => None,
        _ => match plain.parse() {
            Ok(ip) => Some(SocketAddr::new(ip, port).to_string()),
            Err(_) => Some(format!("{host}:{port}")),
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const IP: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

    fn vllm(value: &Value) -> Sockets {
        vllm_sockets(value.to_string().as_bytes(), IP).unwrap()
    }

    fn sglang(value: &Value) -> Sockets {
        sglang_sockets(value.to_string().as_bytes(), IP).unwrap()
    }

    #[test]
    fn vllm_names_the_sockets_of_every_rank() {
        let source = |endpoint: &str, replay: Value| {
            json!({"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": endpoint,
                "replay_endpoint": replay, "buffer_steps": 10000, "hwm": 100000,
                "max_queue_size": 100000, "topic": ""})
        };
        let sockets = vllm(&json!({
            "0": source("tcp://*:5557", json!("tcp://0.0.0.0:5567")),
            "1": source("tcp://10.9.9.9:41234", Value::Null),
            "2": {"enable_kv_cache_events": false, "publisher": "zmq", "endpoint": "tcp://*:1"},
            "3": {"publisher": "null"},
            "4": source("ipc:///tmp/x", json!("tcp://*:5567")),
            "first": source("tcp://*:5557", Value::Null),
            "5000": source("tcp://*:5557", Value::Null),
        }));
        assert_eq!(sockets.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        assert_eq!(sockets[&0].events.as_deref(), Some("10.0.0.1:5557"));
        assert_eq!(sockets[&0].replay.as_deref(), Some("10.0.0.1:5567"));
        assert_eq!(sockets[&1].events.as_deref(), Some("10.9.9.9:41234"));
        for rank in [2, 3, 4] {
            assert_eq!(sockets[&rank], RankSockets::default());
        }
    }

    #[test]
    fn sglang_counts_ports_from_a_base() {
        let info = json!({"kv_events": {"publisher": "zmq", "endpoint_host": "*",
            "endpoint_port_base": 5557, "topic": "kv", "block_size": 1, "dp_size": 2,
            "load_endpoint_port_base": 5559, "load_topic": "load"}});
        let sockets = sglang(&info);
        assert_eq!(sockets[&1].events.as_deref(), Some("10.0.0.1:5558"));
        assert_eq!(sockets[&1].load.as_deref(), Some("10.0.0.1:5560"));
        assert_eq!(sglang(&json!({"kv_events": null})), Sockets::new());
        assert_eq!(sglang(&json!({})), Sockets::new());
        let high =
            json!({"kv_events": {"publisher": "zmq", "endpoint_port_base": 65535, "dp_size": 2}});
        assert_eq!(sglang(&high)[&1].events, None, "no port behind the last");
    }

    #[test]
    fn adapters_have_a_parent() {
        let models = json!({"object": "list", "data": [
            {"id": "base", "root": "/m", "parent": null}, {"id": "sql", "parent": "base"}, {"id": 7}]});
        let served = served(models.to_string().as_bytes()).unwrap();
        let expected = [
            Served { name: "base".into(), parent: None },
            Served { name: "sql".into(), parent: Some("base".into()) },
        ];
        assert_eq!(served, expected);
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        for body in ["", "[]", "7", "nonsense"] {
            assert_eq!(vllm_sockets(body.as_bytes(), IP), Err(ProbeError::Form));
            assert_eq!(sglang_sockets(body.as_bytes(), IP), Err(ProbeError::Form));
            assert_eq!(served(body.as_bytes()), Err(ProbeError::Form));
        }
    }

    #[test]
    fn addresses_are_made_reachable() {
        for (endpoint, expected) in [
            ("tcp://*:1", Some("10.0.0.1:1")),
            ("tcp://[::]:1", Some("10.0.0.1:1")),
            ("tcp://[fd00::1]:1", Some("[fd00::1]:1")),
            ("tcp://engine:1", Some("engine:1")),
            ("tcp://:1", None),
            ("tcp://*:0", None),
            ("tcp://*", None),
            ("inproc://x", None),
        ] {
            assert_eq!(reachable(endpoint, IP).as_deref(), expected, "{endpoint}");
        }
    }

    proptest! {
        #[test]
        fn any_body_is_read_or_refused(body in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = (vllm_sockets(&body, IP), sglang_sockets(&body, IP), served(&body));
        }

        #[test]
        fn any_member_may_be_anything(field in "[a-z_]{1,24}", number in any::<u64>(), text in ".{0,20}") {
            for value in [json!(number), json!(text), json!([text]), Value::Null] {
                let mut about = json!({"publisher": "zmq", "endpoint": "tcp://*:5557",
                    "endpoint_host": "*", "endpoint_port_base": 5557, "dp_size": 2});
                about[&field] = value;
                vllm(&json!({"0": about}));
                let ranks = sglang(&json!({"kv_events": about})).len();
                prop_assert!(ranks <= 1024);
            }
        }
    }
}
