//! Fields, ranges and the wire.

use super::*;
use crate::wire::WireError;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

/// Everything that can be present, other than it is by default.
fn full() -> Settings {
    let two_tier = |cache_threshold| {
        SelectionPolicy::TwoTier(TwoTier {
            cache_threshold,
            balance_abs_threshold: 7,
            balance_rel_threshold: 1.5,
        })
    };
    Settings {
        selection_policy: two_tier(0.25),
        prefill_policy: Some(SelectionPolicy::DynamoDefault),
        decode_policy: Some(two_tier(0.75)),
        overlap_score_credit: 1.5,
        overlap_score_credit_decay: 0.5,
        prefill_load_scale: 2.0,
        decode_active_request_weight: 3.0,
        host_cache_hit_weight: 0.5,
        disk_cache_hit_weight: 0.125,
        shared_cache_multiplier: 0.0625,
        router_temperature: 0.5,
        use_kv_events: true,
        router_approximate_cache_policy: ApproximateCachePolicy::Ttl,
        router_ttl_ms: 60_000,
        router_predicted_ttl_ms: Some(1_500),
        router_replica_sync: true,
        router_track_active_blocks: true,
        router_track_output_blocks: true,
        router_assume_kv_reuse: false,
        router_track_prefill_tokens: false,
        router_queue_threshold: Some(4.0),
        queue_limits: QueueLimits { requests_per_worker: Some(9), tokens_per_worker: None },
        conditional_disagg: Some(ConditionalDisagg {
            policy: ConditionalDisaggPolicy::IslOrLoad,
            eff_isl_threshold: 512,
            eff_isl_ratio_threshold: 0.5,
            prefill_busy_threshold: Some(1.0),
            decode_busy_threshold: Some(0.875),
        }),
        enforce_disagg: true,
        session_affinity: Some(SessionAffinity { ttl_ms: 300_000, mode: AffinityMode::Soft }),
        busy_thresholds: BusyThresholds {
            active_decode_blocks: Some(0.75),
            active_prefill_tokens: Some(10_000),
            active_prefill_tokens_frac: Some(2.5),
            busy: Some(0.875),
        },
        active_request_expiry_ms: 60_000,
        overload_status: 503,
    }
}

fn example() -> RouterSettings {
    let lru = Settings {
        use_kv_events: false,
        router_approximate_cache_policy: ApproximateCachePolicy::Lru,
        ..Settings::default()
    };
    RouterSettings { default: Settings::default(), of_models: vec![(1, full()), (3, lru)] }
}

fn field(name: &str) -> &'static Field {
    Field::find(name).unwrap_or_else(|| panic!("{name}"))
}

#[test]
fn settings_survive_the_wire() {
    for settings in [RouterSettings::default(), example()] {
        assert_eq!(RouterSettings::decode(&settings.encode()), Ok(settings));
    }
}

/// Goal: the layout does not change unnoticed; the bytes were put together by
/// hand from the description in `wire`.
#[test]
fn the_layout_is_pinned() {
    let number = |value: f64| value.to_bits().to_le_bytes().to_vec();
    let whole = |value: u64| value.to_le_bytes().to_vec();
    let default: Vec<u8> = [
        vec![0, 0, 0],
        [1.0, 0.0, 1.0, 0.0, 0.75, 0.25, 0.0, 0.0].into_iter().flat_map(number).collect(),
        vec![1, 0],
        whole(120_000),
        vec![0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        whole(300_000),
        529_u16.to_le_bytes().to_vec(),
    ]
    .concat();
    let tiers = |cache| [vec![1], number(cache), whole(7), number(1.5)].concat();
    let with = |value: Vec<u8>| [vec![1], value].concat();
    let all: Vec<u8> = [
        tiers(0.25),
        vec![1, 0],
        with(tiers(0.75)),
        [1.5, 0.5, 2.0, 3.0, 0.5, 0.125, 0.0625, 0.5].into_iter().flat_map(number).collect(),
        vec![1, 0],
        whole(60_000),
        with(whole(1_500)),
        vec![1, 1, 1, 0, 0],
        with(number(4.0)),
        with(whole(9)),
        vec![0],
        vec![1, 2, 0, 2, 0, 0],
        number(0.5),
        with(number(1.0)),
        with(number(0.875)),
        vec![1],
        with(whole(300_000)),
        vec![1],
        with(number(0.75)),
        with(whole(10_000)),
        with(number(2.5)),
        with(number(0.875)),
        whole(60_000),
        503_u16.to_le_bytes().to_vec(),
    ]
    .concat();
    let whole_frame = RouterSettings { default: Settings::default(), of_models: vec![(5, full())] };
    let expected = [default, vec![1, 0, 0, 0, 5, 0], all].concat();
    assert_eq!(whole_frame.encode(), expected);
}

#[test]
fn every_cut_is_refused() {
    let good = example().encode();
    for len in 0..good.len() {
        assert!(RouterSettings::decode(&good[..len]).is_err(), "{len} bytes");
    }
    let long = [good, vec![0]].concat();
    assert_eq!(RouterSettings::decode(&long), Err(WireError::TrailingBytes));
}

/// Goal: whatever is read has been validated.
/// Method: every bit of a body, flipped alone.
#[test]
fn no_flipped_bit_gives_settings_that_are_wrong() {
    let good = example().encode();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        if let Ok(settings) = RouterSettings::decode(&bad) {
            let all = settings.of_models.iter().map(|(_, own)| own);
            for one in all.chain([&settings.default]) {
                assert_eq!(one.validate(), Ok(()), "bit {bit}");
            }
        }
    }
}

#[test]
fn numbers_out_of_range_are_refused_on_the_wire() {
    let wrong = [
        Settings { overlap_score_credit: f64::NAN, ..Settings::default() },
        Settings { overlap_score_credit: -1.0, ..Settings::default() },
        Settings { router_temperature: f64::INFINITY, ..Settings::default() },
        Settings { host_cache_hit_weight: 1.5, ..Settings::default() },
        Settings { router_queue_threshold: Some(f64::NAN), ..Settings::default() },
        Settings { overload_status: 200, ..Settings::default() },
        Settings {
            conditional_disagg: Some(ConditionalDisagg {
                policy: ConditionalDisaggPolicy::PrefillLoad,
                ..ConditionalDisagg::default()
            }),
            ..full()
        },
        Settings { active_request_expiry_ms: 999, ..Settings::default() },
        Settings { router_ttl_ms: u64::MAX, ..Settings::default() },
        Settings { router_track_output_blocks: true, router_track_active_blocks: false, ..full() },
        Settings {
            selection_policy: SelectionPolicy::TwoTier(TwoTier {
                balance_rel_threshold: 0.5,
                ..TwoTier::default()
            }),
            ..Settings::default()
        },
    ];
    for settings in wrong {
        assert!(settings.validate().is_err(), "{settings:?}");
        let body = RouterSettings { default: settings, of_models: Vec::new() }.encode();
        assert_eq!(RouterSettings::decode(&body), Err(WireError::OutOfRange));
    }
    let mut twice = example();
    twice.of_models[1].0 = 1;
    assert_eq!(RouterSettings::decode(&twice.encode()), Err(WireError::OutOfRange));
}

#[test]
fn a_model_has_its_own_settings_or_the_default() {
    let settings = example();
    assert_eq!(*settings.of(Some(1)), full());
    assert_eq!(*settings.of(Some(3)), settings.of_models[1].1);
    for model in [None, Some(0), Some(2), Some(4)] {
        assert_eq!(*settings.of(model), Settings::default(), "{model:?}");
    }
}

/// A value that a field takes and that is not the default, with what is needed
/// for it beside it.
fn another(field: &Field) -> Value<'static> {
    match Draft::default().get(field) {
        Value::Flag(flag) => Value::Flag(!flag),
        Value::Word("dynamo-default-cost-fn") => Value::Word("dynamo-two-tier-cost-fn"),
        Value::Word("ttl") => Value::Word("lru"),
        Value::Word("isl_bounding") => Value::Word("isl_or_load"),
        Value::Word("hard") => Value::Word("soft"),
        Value::Word(word) => panic!("{word}"),
        Value::Off if field.name.ends_with("_policy") => Value::Word("dynamo-two-tier-cost-fn"),
        Value::Off => Value::Number(1.0),
        Value::Number(number) if number >= 400.0 => Value::Number(number - 1.0),
        Value::Number(number) if number > 1.0 => Value::Number(number + 1.0),
        Value::Number(number) => Value::Number(if number == 0.5 { 0.25 } else { 0.5 }),
    }
}

/// Goal: no setting can be written that the filters do not get.
/// Method: every field set alone must change the bytes of the frame, and come
/// out of them as it was set.
#[test]
fn every_field_changes_the_settings_and_comes_through_the_wire() {
    for own in &FIELDS {
        let mut before = Draft::default();
        for name in ["conditional_disagg_enabled", "use_kv_events"] {
            let is_on = name != "use_kv_events" || own.name != "router_approximate_cache_policy";
            before.set(field(name), Value::Flag(is_on)).unwrap();
        }
        before.set(field("conditional_disagg_prefill_busy_threshold"), Value::Number(2.0)).unwrap();
        before.set(field("session_affinity_ttl_secs"), Value::Number(9.0)).unwrap();
        let mut after = before;
        let value = match own.name {
            "conditional_disagg_enabled" => Value::Flag(false),
            _ => another(own),
        };
        after.set(own, value).unwrap_or_else(|wrong| panic!("{wrong}"));
        let [before, settings] = [before, after].map(|draft| draft.finish().unwrap());
        assert_ne!(before, settings, "{}", own.name);
        let sent = RouterSettings { default: settings, of_models: Vec::new() };
        let got = RouterSettings::decode(&sent.encode()).unwrap();
        assert_eq!(Draft::of(got.default).get(own), value, "{}", own.name);
    }
}

#[test]
fn fields_refuse_what_they_do_not_take() {
    for own in &FIELDS {
        let mut draft = Draft::default();
        for value in [
            Value::Word("no such word"),
            Value::Number(f64::NAN),
            Value::Number(f64::INFINITY),
            Value::Number(1e300),
        ] {
            let refused = draft.set(own, value).unwrap_err();
            assert_eq!((refused.field, draft), (own.name, Draft::default()), "{value:?}");
        }
        let negative = draft.set(own, Value::Number(-1.0));
        assert_eq!(negative.is_ok(), own.name == "busy_threshold", "{}", own.name);
    }
    let mut draft = Draft::default();
    assert!(draft.set(field("active_prefill_tokens_threshold"), Value::Number(1.5)).is_err());
    assert!(draft.set(field("router_ttl_secs"), Value::Off).is_err());
    assert!(draft.set(field("router_queue_threshold"), Value::Off).is_ok());
}

#[test]
fn names_are_distinct() {
    let mut names: Vec<&str> = FIELDS.iter().map(|field| field.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), FIELDS.len());
}

#[test]
fn texts_are_read_as_dynamo_reads_them() {
    let flag = field("use_kv_events");
    for (text, expected) in [
        ("1", Some(true)),
        ("TRUE", Some(true)),
        (" on ", Some(true)),
        ("Yes", Some(true)),
        ("0", Some(false)),
        ("False", Some(false)),
        ("off", Some(false)),
        ("NO", Some(false)),
        ("2", None),
        ("y", None),
        ("", None),
    ] {
        assert_eq!(flag.parse(text), expected.map(Value::Flag), "{text:?}");
    }
    let number = field("router_queue_threshold");
    assert_eq!(number.parse("2.5"), Some(Value::Number(2.5)));
    assert_eq!(number.parse("None"), Some(Value::Off));
    assert_eq!(number.parse("two"), None);
    assert_eq!(field("router_ttl_secs").parse("none"), None);
}

#[test]
fn a_prefill_worker_is_busy_where_queues_would_begin() {
    let mut draft = Draft::default();
    draft.set(field("conditional_disagg_enabled"), Value::Flag(true)).unwrap();
    draft.set(field("conditional_disagg_policy"), Value::Word("prefill_load")).unwrap();
    let wrong = draft.finish().unwrap_err();
    assert_eq!(wrong[0].field, "conditional_disagg_policy");
    draft.set(field("router_queue_threshold"), Value::Number(3.0)).unwrap();
    let disagg = draft.finish().unwrap().conditional_disagg.unwrap();
    assert_eq!(disagg.prefill_busy_threshold, Some(3.0));
    draft.set(field("conditional_disagg_prefill_busy_threshold"), Value::Number(1.0)).unwrap();
    let disagg = draft.finish().unwrap().conditional_disagg.unwrap();
    assert_eq!(disagg.prefill_busy_threshold, Some(1.0));
}

#[test]
fn a_stage_keeps_its_thresholds_while_its_formula_stays() {
    let thresholds =
        SelectionPolicy::TwoTier(TwoTier { cache_threshold: 0.1, ..TwoTier::default() });
    let mut draft = Draft::default();
    draft.set_policies(thresholds, SelectionPolicy::DynamoDefault, thresholds);
    let settings = draft.finish().unwrap();
    assert_eq!(settings.prefill_policy, Some(SelectionPolicy::DynamoDefault));
    assert_eq!(settings.decode_policy, None);
    let word = Value::Word("dynamo-two-tier-cost-fn");
    draft.set(field("worker_selection_policy"), word).unwrap();
    assert_eq!(draft.finish().unwrap().selection_policy, thresholds);
    draft.set(field("worker_selection_policy"), Value::Word("default")).unwrap();
    assert_eq!(draft.finish().unwrap().selection_policy, SelectionPolicy::DynamoDefault);
}

#[cfg(not(target_arch = "wasm32"))]
proptest::proptest! {
    #[test]
    fn decoding_is_total(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400)) {
        let _ = RouterSettings::decode(&bytes);
    }
}

/// Our own formula's parameters travel, and those that cannot be are refused.
#[test]
fn expected_time_travels() {
    let with = |answer_weight| {
        let parameters = ExpectedTime { answer_weight, ..ExpectedTime::default() };
        let selection_policy = SelectionPolicy::ExpectedTime(parameters);
        let default = Settings { selection_policy, ..Settings::default() };
        RouterSettings { default, ..RouterSettings::default() }
    };
    assert_eq!(RouterSettings::decode(&with(0.25).encode()), Ok(with(0.25)));
    assert!(RouterSettings::decode(&with(2.0).encode()).is_err());
}
