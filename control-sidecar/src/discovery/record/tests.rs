//! Captures of Dynamo's own records, and whatever else may stand there.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::discovery::captures;
use crate::discovery::card::{CardTokenizer, WorkerType};

#[test]
fn every_record_of_the_captures_is_read() {
    let (file, etcd, resource) = (captures::file(), captures::etcd(), captures::resource());
    for (captured, count) in [(file, 11), (etcd, 12), (resource, 7)] {
        assert_eq!(captured.len(), count);
        for (key, value) in captured {
            let record = parse_value(&key, &value).unwrap_or_else(|error| panic!("{key}: {error}"));
            let bytes = serde_json::to_vec(&value).unwrap();
            assert_eq!(parse(&key, &bytes).as_ref(), Ok(&record));
        }
    }
}

#[test]
fn a_card_says_what_routing_needs() {
    let records = captures::parsed(captures::etcd());
    let cards: Vec<&Card> = records
        .iter()
        .filter_map(|record| match record {
            Record::Model(model) => Some(&model.card),
            _ => None,
        })
        .collect();
    let [decode, prefill] = cards.as_slice() else { panic!() };
    assert_eq!(decode.name, "tiny-mock");
    assert_eq!(decode.worker_type, Some(WorkerType::Decode));
    assert_eq!(decode.needs, [[WorkerType::Prefill]]);
    assert!(!decode.publishes_events && prefill.publishes_events);
    assert_eq!((prefill.block_size, prefill.context_length), (16, 4096));
    assert_eq!((prefill.total_kv_blocks, prefill.rank_start, prefill.rank_count), (64, 0, 1));
    assert_eq!(prefill.tokenizer, CardTokenizer::Json);
    let names: Vec<&str> = prefill.artifacts.iter().map(|it| it.file_name).collect();
    assert_eq!(names, ["config.json", "tokenizer.json", "tokenizer_config.json"]);
    assert_eq!(
        prefill.artifacts[1].blake3.as_deref(),
        Some("67824d94323d411f7e1816d1e091df6f165f720679bb3c7ba115225c9d1b087e")
    );
    assert!(prefill.artifacts[1].location.ends_with("/_base/tokenizer.json"));
}

#[test]
fn a_source_says_whose_events_it_has_and_where_their_history_is() {
    let records = captures::parsed(captures::etcd());
    let sources: Vec<&SourceRecord> = records
        .iter()
        .filter_map(|record| match record {
            Record::Source(source) => Some(source),
            _ => None,
        })
        .collect();
    let [source] = sources.as_slice() else { panic!() };
    assert_eq!(source.worker, Some((9_041_998_806_233_225_733, 0)));
    let recovery = source.recovery.as_ref().unwrap();
    assert_eq!(recovery.address, "127.0.0.1:32775");
    assert_eq!(
        recovery.path,
        "7d7ba201f9099a05/dynamo/prefill/worker_kv_query_source_1436931f5595c"
    );
}

fn endpoint(id: u64) -> Value {
    json!({"type": "Endpoint", "namespace": "a", "component": "b", "endpoint": "c",
        "instance_id": id, "transport": {"tcp": "[::1]:80/x"}})
}

#[test]
fn keys_are_read_in_all_three_ways() {
    let key = Key::of_etcd("v1/instances/a/b/c/1f").unwrap();
    assert_eq!(Key::of_file(Bucket::Instances, "a%2Fb%2Fc%2F1f"), Some(key.clone()));
    assert_eq!(Key::of_resource(Bucket::Instances, "a/b/c/1f"), key);
    assert_eq!(key.to_string(), "v1/instances/a/b/c/1f");
    assert!(parse_value(&key, &endpoint(0x1f)).is_ok());
    assert_eq!(Key::of_file(Bucket::Instances, ".tmp_x"), None);
    assert_eq!(Key::of_file(Bucket::Instances, "%ff"), None);
    assert_eq!(Key::of_etcd("v1/instances"), None);
    assert_eq!(Key::of_etcd("v1/other/x"), None);
}

#[test]
fn what_cannot_be_used_is_refused_with_its_reason() {
    let key = Key::of_etcd("v1/instances/a/b/c/1f").unwrap();
    let long = vec![b' '; RECORD_BYTES_MAX + 1];
    assert_eq!(parse(&key, &long), Err(RecordError::TooLong));
    assert_eq!(parse(&key, b"{"), Err(RecordError::NotJson));
    assert_eq!(parse(&key, b"[]"), Err(RecordError::Field));
    assert_eq!(parse(&key, br#"{"type": "Wish"}"#), Err(RecordError::UnknownType));
    assert_eq!(parse(&key, br#"{"type": "Endpoint"}"#), Err(RecordError::Field));
    // Another instance's key, and another kind's.
    assert_eq!(parse_value(&key, &endpoint(0x20)), Err(RecordError::Key));
    let models = Key { bucket: Bucket::Models, ..key };
    assert_eq!(parse_value(&models, &endpoint(0x1f)), Err(RecordError::Key));
}

#[test]
fn a_need_that_is_not_understood_is_never_taken_for_none() {
    let needs =
        |value: Value| Card::read(&json!({"display_name": "m", "needs": value})).unwrap().needs;
    assert_eq!(needs(Value::Null), Vec::<Vec<WorkerType>>::new());
    assert_eq!(needs(json!("decode")), [[WorkerType::Unknown]]);
    assert_eq!(needs(json!(["decode"])), [[WorkerType::Unknown]]);
    assert_eq!(needs(json!([["decode", "wish"]])), [[WorkerType::Decode, WorkerType::Unknown]]);
}

#[test]
fn files_are_read_from_here_or_over_http_only() {
    let card = |path: &str| {
        let tokenizer = json!({"hf_tokenizer_json": {"path": path}});
        Card::read(&json!({"display_name": "m", "tokenizer": tokenizer})).unwrap()
    };
    assert_eq!(card("/m/tokenizer.json").tokenizer, CardTokenizer::Json);
    assert_eq!(card("http://h:1/t").artifacts[0].location, "http://h:1/t");
    assert_eq!(card("hf://m/tokenizer.json").tokenizer, CardTokenizer::OtherPlace);
    assert_eq!(card("../x").artifacts, []);
    let extra = json!([{"path": "/m/other"}, {"path": "/m/chat_template.jinja"}]);
    let card = Card::read(&json!({"display_name": "m", "extra_files": extra})).unwrap();
    assert_eq!(card.artifacts[0].file_name, "chat_template.jinja");
    assert_eq!(card.tokenizer, CardTokenizer::Missing);
    let custom = json!({"hf_chat_template": {"is_custom": true, "file": {"path": "/t.jinja"}}});
    let card = Card::read(&json!({"display_name": "m", "chat_template_file": custom})).unwrap();
    assert_eq!(card.artifacts[0].location, "/t.jinja");
}

/// Any JSON, up to a few levels.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map("[a-z_]{1,8}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Puts a value in the place of one of a tree's members, at any depth.
fn replace(tree: &mut Value, at: &mut usize, with: &Value) {
    if *at == 0 {
        tree.clone_from(with);
    }
    *at = at.wrapping_sub(1);
    match tree {
        Value::Object(map) => map.values_mut().for_each(|it| replace(it, at, with)),
        Value::Array(list) => list.iter_mut().for_each(|it| replace(it, at, with)),
        _ => {}
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(rest in ".{0,40}", bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for bucket in Bucket::ALL {
            let key = Key { bucket, rest: rest.clone() };
            prop_assert!(parse(&key, &bytes).is_err());
        }
    }

    #[test]
    fn a_record_with_any_member_replaced_is_read_or_refused(
        pick in 0_usize..30, mut at in 0_usize..60, with in any_json(),
    ) {
        let mut all = captures::file();
        all.extend(captures::etcd());
        all.extend(captures::resource());
        let (key, mut value) = all.swap_remove(pick % all.len());
        replace(&mut value, &mut at, &with);
        let parsed = parse_value(&key, &value);
        let again = serde_json::to_vec(&value).unwrap();
        prop_assert_eq!(parse(&key, &again), parsed);
    }

    #[test]
    fn a_file_name_gives_back_its_key(rest in "[ -~]{1,60}") {
        let name = percent_encoding::utf8_percent_encode(&rest, percent_encoding::NON_ALPHANUMERIC);
        let key = Key::of_file(Bucket::Models, &name.to_string()).unwrap();
        prop_assert_eq!(key.rest, rest);
    }
}
