//! Oracle: the same edit done on a `serde_json::Value`.

use serde_json::{Value, json};

use super::*;
use crate::request::Envelope;

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const FULL: Handover<'static> = Handover {
    token_data: Some(&[0, 7, 10, 99, 100, 128_000, u32::MAX]),
    token_text: None,
    backend_instance_id: Some(u64::MAX),
    decode_worker_id: Some(1),
    prefill_worker_id: Some(20),
    dp_rank: Some(0),
    prefill_dp_rank: Some(3),
};

fn edit(body: &str, handover: &Handover<'_>) -> Result<String, HandoverError> {
    let envelope = Envelope::scan(body.as_bytes()).unwrap();
    hand_over(&envelope.splice, handover).map(|body| String::from_utf8(body).unwrap())
}

/// The edit as one would do it on a tree.
fn oracle(body: &str, handover: &Handover<'_>) -> Option<Value> {
    let mut body: Value = serde_json::from_str(body).unwrap();
    let root = body.as_object_mut().unwrap();
    let nvext = root.entry("nvext").or_insert(Value::Null);
    if nvext.is_null() {
        *nvext = json!({});
    }
    let nvext = nvext.as_object_mut()?;
    let mut set = |name: &str, value: Option<Value>| {
        nvext.remove(name);
        if let Some(value) = value {
            nvext.insert(name.to_owned(), value);
        }
    };
    set("backend_instance_id", handover.backend_instance_id.map(Value::from));
    set("decode_worker_id", handover.decode_worker_id.map(Value::from));
    set("prefill_worker_id", handover.prefill_worker_id.map(Value::from));
    set("dp_rank", handover.dp_rank.map(Value::from));
    set("prefill_dp_rank", handover.prefill_dp_rank.map(Value::from));
    if let Some(tokens) = handover.token_data {
        set("token_data", Some(json!(tokens)));
    }
    Some(body)
}

fn agrees(body: &str, handover: &Handover<'_>) {
    match (edit(body, handover), oracle(body, handover)) {
        (Ok(edited), Some(expected)) => {
            let actual: Value = serde_json::from_str(&edited).expect("the result is JSON");
            assert_eq!(actual, expected, "{body} -> {edited}");
            assert_eq!(edited.matches("\"nvext\"").count().max(1), 1, "{edited}");
        }
        (Err(HandoverError::NvextNotAnObject), None) => {}
        (edited, expected) => panic!("{body}: {edited:?}, expected {expected:?}"),
    }
}

#[test]
fn fields_are_written_where_they_belong() {
    let rank = Handover { dp_rank: Some(5), ..Handover::default() };
    for (body, expected) in [
        ("{}", r#"{"nvext":{"dp_rank":5}}"#),
        (" { } ", r#" { "nvext":{"dp_rank":5}} "#),
        (r#"{"a":1.50 }"#, r#"{"a":1.50 ,"nvext":{"dp_rank":5}}"#),
        (r#"{"nvext":null,"a":1}"#, r#"{"nvext":{"dp_rank":5},"a":1}"#),
        (r#"{"nvext": { } ,"a":1}"#, r#"{"nvext": {"dp_rank":5} ,"a":1}"#),
        (
            r#"{"nvext":{"token_data":[1], "cache_salt" : "\u0061" ,"x":{"dp_rank":9}}}"#,
            r#"{"nvext":{"dp_rank":5,"token_data":[1],"cache_salt" : "\u0061","x":{"dp_rank":9}}}"#,
        ),
    ] {
        assert_eq!(edit(body, &rank).unwrap(), expected);
    }
}

#[test]
fn a_client_does_not_choose_its_worker() {
    let bodies = [
        r#"{"nvext":{"backend_instance_id":1,"decode_worker_id":2,"prefill_worker_id":3,"dp_rank":4,"prefill_dp_rank":5,"k":6}}"#,
        r#"{"nvext":{"b\u0061ckend_instance_id":1,"\u0064p_rank":4,"k":6}}"#,
        r#"{"nvext":{"dp_rank":4,"dp_rank":5,"k":6}}"#,
        r#"{"nvext":{"dp_rank":4},"n\u0076ext":{"decode_worker_id":2} , "nvext":{"k":6}}"#,
    ];
    for body in bodies {
        let edited = edit(body, &Handover::default()).unwrap();
        let value: Value = serde_json::from_str(&edited).unwrap();
        assert_eq!(value, json!({ "nvext": { "k": 6 } }), "{edited}");
        for name in ["instance_id", "worker_id", "rank", "u006"] {
            assert!(!edited.contains(name), "{edited}");
        }
        agrees(body, &FULL);
    }
}

#[test]
fn everything_else_is_kept_byte_for_byte() {
    let before = "{ \"seed\" : 12345678901234567890123, \"temperature\":1E-2,\n\"a\":\"\\u00e9\",";
    let after = ", \"a\" : [1 ,2] }\n";
    let body = format!("{before}\"nvext\":{{\"x\": 1.0}}{after}");
    let edited = edit(&body, &FULL).unwrap();
    assert!(edited.starts_with(before) && edited.ends_with(after), "{edited}");
    assert!(edited.contains(",\"x\": 1.0}"));
}

#[test]
fn an_nvext_that_is_no_object_is_left_alone() {
    for nvext in ["1", "[]", "\"{}\"", "true"] {
        let body = format!(r#"{{"nvext":{nvext}}}"#);
        assert_eq!(edit(&body, &FULL), Err(HandoverError::NvextNotAnObject));
    }
}

#[test]
fn decimals_are_right() {
    let mut numbers: Vec<u64> = (0..=1_100).collect();
    let mut power = 1_u64;
    while let Some(next) = power.checked_mul(10) {
        numbers.extend([next - 1, next, next + 1, next + 99]);
        power = next;
    }
    numbers.extend([u64::from(u32::MAX), u64::MAX - 1, u64::MAX]);
    for number in numbers {
        let mut out = Vec::new();
        decimal::write(number, &mut out);
        assert_eq!(String::from_utf8(out).unwrap(), number.to_string());
    }
}

#[cfg(not(target_arch = "wasm32"))]
mod properties {
    use proptest::prelude::*;

    use super::*;
    use crate::request::tests::body_text;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3_000))]

        #[test]
        fn the_result_is_the_edited_tree(
            body in body_text(),
            tokens in prop::option::of(prop::collection::vec(any::<u32>(), 0..5)),
            ids in any::<[Option<u64>; 3]>(),
            ranks in any::<[Option<u32>; 2]>(),
        ) {
            let handover = Handover {
                token_data: tokens.as_deref(),
                token_text: None,
                backend_instance_id: ids[0],
                decode_worker_id: ids[1],
                prefill_worker_id: ids[2],
                dp_rank: ranks[0],
                prefill_dp_rank: ranks[1],
            };
            if serde_json::from_str::<Value>(&body).is_ok()
                && Envelope::scan(body.as_bytes()).is_ok()
            {
                agrees(&body, &handover);
            }
        }
    }
}

/// Goal: tokens that are written a part at a time are those written at once.
#[test]
fn tokens_in_parts_are_the_same() {
    for tokens in [FULL.token_data.unwrap(), &[], &[5]] {
        let whole = Handover { token_data: Some(tokens), ..FULL };
        for tokens_max in [1, 2, 7, 100] {
            let mut text = TokenText::default();
            assert!(text.is_empty());
            let mut calls = 1;
            while !text.write(tokens, tokens_max) {
                calls += 1;
                assert!(calls <= tokens.len() + 1, "there is an end");
            }
            assert!(calls >= tokens.len() / tokens_max);
            assert!(text.write(tokens, tokens_max), "no more than once");
            let parts = Handover { token_data: None, token_text: Some(&text), ..FULL };
            for body in ["{}", r#"{"a":1,"nvext":{"token_data":[9],"x":2}}"#] {
                assert_eq!(edit(body, &parts), edit(body, &whole));
            }
        }
    }
}
