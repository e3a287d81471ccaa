//! Tables of every header and field, good and bad; the words of Dynamo's rules.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::*;
use crate::limits::{
    METADATA_BYTES_MAX, METADATA_ENTRIES_MAX, SESSION_ID_BYTES_MAX, SUBSET_HOSTS_MAX,
};
use crate::request::{Endpoint, parse};

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const TRUSTING: Rules = Rules { trusts_pins: true, binds_sessions: true };
const USUAL: Rules = Rules { trusts_pins: false, binds_sessions: true };

fn demands(rules: Rules, headers: &[(&str, &str)], nvext: &str) -> Result<Demands, Refusal> {
    let headers: Vec<(String, String)> =
        headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let body = format!(r#"{{"messages":[1],"nvext":{nvext}}}"#);
    let request = parse(Endpoint::ChatCompletions, body.as_bytes()).unwrap();
    Asked::read(&headers, rules)?.demands(request.nvext.as_ref())
}

fn pin(worker: u64, rank: Option<u32>) -> Option<Pin> {
    Some(Pin { worker: WorkerId(worker), rank: rank.map(DpRank) })
}

/// Serving and prefill pin.
fn pins(headers: &[(&str, &str)], nvext: &str) -> (Option<Pin>, Option<Pin>) {
    let demands = demands(TRUSTING, headers, nvext).unwrap();
    (demands.serving, demands.prefill)
}

#[test]
fn nothing_asked_is_the_default() {
    for nvext in ["null", "{}"] {
        assert_eq!(demands(TRUSTING, &[], nvext), Ok(Demands::default()));
        let other = [("content-type", "x"), ("x-request-id", "1"), ("x-dynamo-request-id", "?")];
        assert_eq!(demands(TRUSTING, &other, nvext), Ok(Demands::default()));
    }
}

/// Goal: nobody names a worker unless the operator trusts whoever does.
#[test]
fn pins_are_not_even_read_without_trust() {
    let headers = [
        ("x-dynamo-worker-instance-id", "1"),
        ("x-worker-instance-id", "not a number"),
        ("x-dynamo-prefill-instance-id", "2"),
        ("x-dynamo-dp-rank", "-1"),
        ("x-prefill-dp-rank", "3"),
    ];
    let nvext = r#"{"backend_instance_id":1,"decode_worker_id":"x","prefill_worker_id":2,
        "dp_rank":-1,"prefill_dp_rank":4}"#;
    assert_eq!(demands(USUAL, &headers, nvext), Ok(Demands::default()));
    assert_eq!(demands(Rules::default(), &headers, nvext), Ok(Demands::default()));
}

#[test]
fn each_leg_has_its_pin_and_headers_come_first() {
    let max = u64::MAX;
    for (headers, nvext, serving, prefill) in [
        (
            &[("x-dynamo-worker-instance-id", "18446744073709551615")] as &[_],
            "null",
            pin(max, None),
            pin(max, None),
        ),
        (
            &[("x-worker-instance-id", "7"), ("x-dp-rank", "2")],
            "null",
            pin(7, Some(2)),
            pin(7, Some(2)),
        ),
        (
            &[("x-worker-instance-id", "7"), ("x-data-parallel-rank", "2")],
            "null",
            pin(7, Some(2)),
            pin(7, Some(2)),
        ),
        (
            &[
                ("x-dynamo-worker-instance-id", "1"),
                ("x-dynamo-prefill-instance-id", "2"),
                ("x-dynamo-dp-rank", "3"),
                ("x-dynamo-prefill-dp-rank", "4"),
            ],
            "null",
            pin(1, Some(3)),
            pin(2, Some(4)),
        ),
        (
            &[("x-prefill-instance-id", "2"), ("x-prefill-dp-rank", "4")],
            "null",
            None,
            pin(2, Some(4)),
        ),
        // The value that stands for none.
        (
            &[("x-prefill-instance-id", "2"), ("x-prefill-dp-rank", "4294967295")],
            r#"{"prefill_dp_rank":6}"#,
            None,
            pin(2, Some(6)),
        ),
        // Canonical names before aliases, the first of equal ones, headers before
        // the body, number by number.
        (
            &[
                ("x-worker-instance-id", "7"),
                ("x-dynamo-worker-instance-id", "8"),
                ("x-dynamo-worker-instance-id", "9"),
            ],
            r#"{"backend_instance_id":1,"decode_worker_id":2,"dp_rank":5}"#,
            pin(8, Some(5)),
            pin(8, Some(5)),
        ),
        (&[], r#"{"backend_instance_id":1,"dp_rank":5}"#, pin(1, Some(5)), pin(1, Some(5))),
        (
            &[],
            r#"{"backend_instance_id":1,"decode_worker_id":2,"prefill_worker_id":3,
            "prefill_dp_rank":0}"#,
            pin(2, None),
            pin(3, Some(0)),
        ),
        (&[], r#"{"prefill_worker_id":3,"dp_rank":1}"#, None, pin(3, Some(1))),
        // A rank alone names nobody.
        (&[("x-dynamo-dp-rank", "3")], r#"{"prefill_dp_rank":4}"#, None, None),
        (&[("x-dynamo-dp-rank", "0")], r#"{"decode_worker_id":null}"#, None, None),
    ] {
        assert_eq!(pins(headers, nvext), (serving, prefill), "{headers:?} {nvext}");
    }
}

#[test]
fn pins_must_be_plain_decimal_and_in_range() {
    let ids = ["", " 1", "1 ", "+1", "-1", "0x1f", "1f", "1.0", "1e3", "1,2", "eins", "١"];
    for name in [
        "x-dynamo-worker-instance-id",
        "x-worker-instance-id",
        "x-dynamo-prefill-instance-id",
        "x-prefill-instance-id",
    ] {
        for value in ids.into_iter().chain(["18446744073709551616"]) {
            let refused = demands(TRUSTING, &[(name, value)], "null");
            assert_eq!(refused, Err(Refusal::Header(name)), "{value:?}");
        }
    }
    for name in [
        "x-dynamo-dp-rank",
        "x-dp-rank",
        "x-data-parallel-rank",
        "x-dynamo-prefill-dp-rank",
        "x-prefill-dp-rank",
    ] {
        for value in ids.into_iter().chain(["4294967296"]) {
            let refused = demands(TRUSTING, &[(name, value)], "null");
            assert_eq!(refused, Err(Refusal::Header(name)), "{value:?}");
            assert!(refused.unwrap_err().to_string().contains(name));
        }
    }
    // A name that is there counts, and the older one is not looked at.
    let both = [("x-worker-instance-id", "x"), ("x-dynamo-worker-instance-id", "1")];
    assert_eq!(pins(&both, "null").0, pin(1, None));
    for (member, name) in [
        ("backend_instance_id", "nvext.backend_instance_id"),
        ("decode_worker_id", "nvext.decode_worker_id"),
        ("prefill_worker_id", "nvext.prefill_worker_id"),
        ("dp_rank", "nvext.dp_rank"),
        ("prefill_dp_rank", "nvext.prefill_dp_rank"),
    ] {
        for value in ["\"1\"", "-1", "1.0", "1e3", "true", "[1]", "18446744073709551616"] {
            let refused = demands(TRUSTING, &[], &format!(r#"{{"{member}":{value}}}"#));
            assert_eq!(refused, Err(Refusal::Field(name)), "{value}");
        }
    }
    for member in ["dp_rank", "prefill_dp_rank"] {
        let refused = demands(TRUSTING, &[], &format!(r#"{{"{member}":4294967296}}"#));
        assert!(matches!(refused, Err(Refusal::Field(_))));
    }
}

#[test]
fn priorities_of_headers_come_before_the_body_s() {
    let hints = |hints: &str| format!(r#"{{"agent_hints":{{{hints}}}}}"#);
    for (headers, nvext, jump, strict) in [
        (&[("x-dynamo-request-priority", "5")] as &[_], hints(r#""priority":9"#), 5.0, 0),
        (&[("x-dynamo-request-priority", " 5\t")], hints(""), 5.0, 0),
        (&[("x-dynamo-request-priority", "+5")], hints(""), 5.0, 0),
        (&[("x-dynamo-request-priority", "0")], hints(r#""priority":9"#), 0.0, 0),
        (&[("x-dynamo-request-priority", "-3")], hints(r#""priority":9"#), 0.0, 0),
        (
            &[("x-dynamo-request-priority", "1"), ("x-dynamo-request-priority", "x")],
            hints(""),
            1.0,
            0,
        ),
        (&[], hints(r#""priority":9,"latency_sensitivity":3.5"#), 9.0, 0),
        (&[], hints(r#""priority":-9,"latency_sensitivity":3.5"#), 0.0, 0),
        (&[], hints(r#""latency_sensitivity":3.5"#), 3.5, 0),
        (&[], hints(r#""latency_sensitivity":-3.5"#), 0.0, 0),
        (
            &[("x-dynamo-request-strict-priority", "4294967295")],
            hints(r#""strict_priority":1"#),
            0.0,
            u32::MAX,
        ),
        (&[("x-dynamo-request-strict-priority", "0")], hints(r#""strict_priority":1"#), 0.0, 0),
        (&[], hints(r#""strict_priority":1"#), 0.0, 1),
    ] {
        let demands = demands(USUAL, headers, &nvext).unwrap();
        let actual = (demands.priority_jump, demands.strict_priority);
        assert_eq!(actual, (jump, strict), "{headers:?} {nvext}");
    }
    for (name, values) in [
        ("x-dynamo-request-priority", &["", "x", "1.5", "2147483648", "-2147483649", "1 2"]),
        ("x-dynamo-request-strict-priority", &["", "x", "1.5", "4294967296", "-1", "0x1"]),
    ] {
        for value in *values {
            assert_eq!(demands(USUAL, &[(name, value)], "null"), Err(Refusal::Header(name)));
        }
    }
}

#[test]
fn what_the_body_asks_is_handed_on() {
    let nvext = r#"{"agent_hints":{"osl":100},"routing_constraints":
        {"required_taints":["a","b"],"preferred_taints":{"c":0.5}}}"#;
    let demands = demands(USUAL, &[], nvext).unwrap();
    assert_eq!(demands.expected_output_tokens, Some(100));
    assert_eq!(demands.required_taints, ["a", "b"]);
    assert_eq!(demands.preferred_taints, [("c".to_owned(), 0.5)]);
}

#[test]
fn sessions_are_looked_for_in_dynamo_s_order() {
    let key = |headers: &[(&str, &str)]| demands(USUAL, headers, "null").unwrap().session;
    let (own, group) = (|id| Some(SessionKey::of(id)), |id| Some(SessionKey::of_children(id)));
    for (headers, expected) in [
        (&[("x-dynamo-session-id", " s ")] as &[_], own("s")),
        (
            &[
                ("x-session-id", "o"),
                ("thread-id", "t"),
                ("x-claude-code-session-id", "c"),
                ("x-dynamo-session-id", "s"),
            ],
            own("s"),
        ),
        (&[("x-session-id", "o"), ("thread-id", "t"), ("x-claude-code-session-id", "c")], own("c")),
        (&[("x-session-id", "o"), ("thread-id", "t")], own("t")),
        (&[("x-session-id", "o")], own("o")),
        (&[("x-dynamo-session-id", "  "), ("x-session-id", "o")], own("o")),
        (&[("x-dynamo-session-id", "é"), ("x-session-id", "o")], own("o")),
        // Children of one parent are together, apart from the parent itself.
        (&[("x-dynamo-session-id", "s"), ("x-dynamo-parent-session-id", "p")], group("p")),
        (&[("x-dynamo-session-id", "s"), ("x-dynamo-parent-session-id", "s")], own("s")),
        (&[("x-dynamo-session-id", "s"), ("x-parent-session-id", "p")], own("s")),
        (&[("thread-id", "t"), ("x-codex-parent-thread-id", "p")], group("p")),
        (&[("x-session-id", "o"), ("x-parent-session-id", "p")], group("p")),
        (&[("x-claude-code-session-id", "c"), ("x-claude-code-agent-id", "a")], group("c")),
        (
            &[
                ("x-claude-code-session-id", "c"),
                ("x-claude-code-agent-id", "a"),
                ("x-claude-code-parent-agent-id", "p"),
            ],
            group("p"),
        ),
        (
            &[
                ("x-claude-code-session-id", "c"),
                ("x-claude-code-agent-id", "a"),
                ("x-claude-code-parent-agent-id", "a"),
            ],
            group("c"),
        ),
        (
            &[
                ("x-claude-code-session-id", "c"),
                ("x-claude-code-agent-id", "c"),
                ("x-claude-code-parent-agent-id", "p"),
            ],
            own("c"),
        ),
        (&[("x-claude-code-session-id", "c"), ("x-claude-code-parent-agent-id", "p")], own("c")),
        (&[("x-claude-code-agent-id", "a"), ("x-dynamo-parent-session-id", "p")], None),
        (&[], None),
    ] {
        assert_eq!(key(headers), expected, "{headers:?}");
    }
    let child = [
        ("x-dynamo-session-id", "s"),
        ("x-dynamo-parent-session-id", "p"),
        ("x-dynamo-worker-instance-id", "1"),
    ];
    let pinned = demands(TRUSTING, &child, "null").unwrap();
    assert_eq!(pinned.session, own("s"), "with a worker of its own it stands for itself");
    assert_ne!(own("p"), group("p"));
}

#[test]
fn a_session_s_name_that_is_too_long_is_refused_where_it_counts() {
    let fits = "s".repeat(SESSION_ID_BYTES_MAX);
    let long = format!("{fits}s");
    for name in ["x-dynamo-session-id", "x-claude-code-session-id", "thread-id", "x-session-id"] {
        let asked = |rules, id: &str| demands(rules, &[(name, id)], "null").map(|it| it.session);
        assert_eq!(asked(USUAL, &fits), Ok(Some(SessionKey::of(&fits))));
        assert_eq!(asked(USUAL, &long), Err(Refusal::SessionTooLong(name)));
        assert_eq!(asked(Rules::default(), &long), Ok(None));
    }
}

#[test]
fn metadata_is_bounded_as_in_dynamo() {
    let read = |headers: &[(String, String)]| Asked::read(headers, USUAL).map(|_| ());
    let header = |key: &str, value: &str| (format!("x-dynamo-meta-{key}"), value.to_owned());
    let mut headers: Vec<_> =
        (0..METADATA_ENTRIES_MAX).map(|n| header(&n.to_string(), "v")).collect();
    headers.push(header("0", "the first of equal keys counts"));
    headers.push(header("authorization", "is none"));
    headers.push(header("token", "Bearer is none"));
    headers.push(("x-dynamo-metadata".into(), "is none".into()));
    assert_eq!(read(&headers), Ok(()));
    headers.push(header("", "v"));
    assert_eq!(read(&headers), Err(Refusal::TooMuchMetadata));
    let filling = |bytes: usize| [header("key", &format!(" {} ", "v".repeat(bytes - 3)))];
    assert_eq!(read(&filling(METADATA_BYTES_MAX)), Ok(()));
    assert_eq!(read(&filling(METADATA_BYTES_MAX + 1)), Err(Refusal::TooMuchMetadata));
}

/// The host's form of a list.
fn pairs(items: &[&[u8]]) -> Vec<u8> {
    let length = |len: usize| u32::try_from(len).unwrap().to_le_bytes();
    let mut bytes = length(items.len()).to_vec();
    for item in items {
        bytes.extend(length(item.len()));
        bytes.extend(length(0));
    }
    for item in items {
        bytes.extend_from_slice(item);
        bytes.extend([0, 0]);
    }
    bytes
}

#[test]
fn a_subset_hint_is_a_list_or_a_text() {
    let socket = |port| Host::Socket(SocketAddr::from(([10, 0, 0, 1], port)));
    let all = [
        socket(8000),
        Host::Address(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2))),
        Host::Socket(SocketAddr::from((Ipv6Addr::LOCALHOST, 8000))),
        Host::Address(IpAddr::V6(Ipv6Addr::LOCALHOST)),
        Host::Address(IpAddr::V6(Ipv6Addr::LOCALHOST)),
    ];
    let text = "10.0.0.1:8000, 10.0.0.2 ,[::1]:8000,::1,[::1]";
    let expected = SubsetHint { hosts: all.to_vec(), malformed: 0 };
    assert_eq!(SubsetHint::parse(text.as_bytes()), expected);
    let items: Vec<&[u8]> = text.split(',').map(str::as_bytes).collect();
    assert_eq!(SubsetHint::parse(&pairs(&items)), expected);

    for (property, hosts, malformed) in [
        (b"".to_vec(), 0, 0),
        (b" , ,".to_vec(), 0, 0),
        (pairs(&[]), 0, 0),
        (b"worker-1:8000".to_vec(), 0, 1),
        (b"10.0.0.1:8000,10.0.0.1:99999,10.0.0,x".to_vec(), 1, 3),
        (b"\xff\xfe".to_vec(), 0, 1),
        (1.5_f64.to_le_bytes().to_vec(), 0, 1),
        (pairs(&[b"10.0.0.1", b"\xff", b""]), 1, 2),
        // A list that is cut off is no list.
        (pairs(&[b"10.0.0.1"])[..10].to_vec(), 0, 1),
    ] {
        let hint = SubsetHint::parse(&property);
        assert_eq!((hint.hosts.len(), hint.malformed), (hosts, malformed), "{property:?}");
    }
    let many = vec!["10.0.0.1"; SUBSET_HOSTS_MAX + 2].join(",");
    let hint = SubsetHint::parse(many.as_bytes());
    assert_eq!((hint.hosts.len(), hint.malformed), (SUBSET_HOSTS_MAX, 2));
}

#[test]
fn refusals_tell_what_is_at_fault() {
    let all = [
        Refusal::Header("x-a"),
        Refusal::Field("nvext.a"),
        Refusal::SessionTooLong("x-b"),
        Refusal::TooMuchMetadata,
    ];
    let mut reasons: Vec<&str> = all.iter().map(|refusal| refusal.reason()).collect();
    for refusal in all {
        assert!(refusal.to_string().contains(refusal.name().unwrap_or("metadata")));
    }
    reasons.dedup();
    assert_eq!(reasons.len(), all.len());
}

#[cfg(not(target_arch = "wasm32"))]
mod properties {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn any_property_is_a_hint(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let hint = SubsetHint::parse(&bytes);
            prop_assert!(hint.hosts.len() <= bytes.len());
        }

        #[test]
        fn lists_and_texts_say_the_same(
            hosts in prop::collection::vec(any::<(IpAddr, Option<u16>)>(), 0..8),
        ) {
            let texts: Vec<String> = hosts
                .iter()
                .map(|(ip, port)| match port {
                    Some(port) => SocketAddr::new(*ip, *port).to_string(),
                    None => ip.to_string(),
                })
                .collect();
            let expected: Vec<Host> = hosts
                .iter()
                .map(|(ip, port)| match port {
                    Some(port) => Host::Socket(SocketAddr::new(*ip, *port)),
                    None => Host::Address(*ip),
                })
                .collect();
            let expected = SubsetHint { hosts: expected, malformed: 0 };
            let items: Vec<&[u8]> = texts.iter().map(String::as_bytes).collect();
            prop_assert_eq!(&SubsetHint::parse(&pairs(&items)), &expected);
            prop_assert_eq!(&SubsetHint::parse(texts.join(",").as_bytes()), &expected);
        }

        /// What is read of a number is the number, and nothing else is read.
        #[test]
        fn pins_are_the_numbers_that_were_sent(
            value in prop_oneof!["[0-9]{1,21}", "[+-]?[0-9a-fx. ]{0,6}", any::<u64>().prop_map(|n| n.to_string())],
        ) {
            let headers = [("x-dynamo-worker-instance-id", value.as_str())];
            let expected = value.parse::<u64>().ok().filter(|_| !value.starts_with('+'));
            let actual = demands(TRUSTING, &headers, "null");
            match expected {
                Some(worker) => prop_assert_eq!(actual.unwrap().serving, pin(worker, None)),
                None => prop_assert!(actual.is_err()),
            }
        }
    }
}
