//! The captures' fleets, the rules one by one, and random subsets.

use proptest::prelude::*;
use serde_json::{Value, json};
use warmpath_core::limits::{TAINT_BYTES_MAX, WORKER_TAINTS_MAX};

use super::*;
use crate::adapter::plane::envelope::Topic;
use crate::config::router::RouterConfig;
use crate::discovery::captures::{self, Captured};
use crate::discovery::record::Key;
use crate::fleet::{Channel, LoadKind, ModelFiles, RecoveryTarget};

fn rules() -> Rules {
    Rules {
        namespaces: NamespaceRule::Exact("dynamo".into()),
        frontend: FrontendRule::PodPort(8000),
        models: Vec::new(),
        brokers: false,
    }
}

fn fleet_of(captured: &Captured) -> Fleet {
    join(&captures::listing(captured, Author::default()), &rules())
}

fn reasons(fleet: &Fleet) -> Vec<&'static str> {
    fleet.problems.iter().map(|problem| problem.reason).collect()
}

/// Changes the records whose key has a part.
fn change(captured: &mut Captured, part: &str, with: impl Fn(&mut Value)) {
    let mut found = false;
    for (key, value) in captured {
        if key.to_string().contains(part) {
            with(value);
            found = true;
        }
    }
    assert!(found, "no record has {part} in its key");
}

fn without(captured: &Captured, part: &str) -> Captured {
    captured.iter().filter(|(key, _)| !key.to_string().contains(part)).cloned().collect()
}

/// The same records in another namespace.
fn moved(captured: &Captured, namespace: &str) -> Captured {
    let text = serde_json::to_string(&captured.iter().map(|it| &it.1).collect::<Vec<_>>()).unwrap();
    let text = text.replace(r#""namespace":"dynamo""#, &format!(r#""namespace":"{namespace}""#));
    let values: Vec<Value> = serde_json::from_str(&text).unwrap();
    let key =
        |key: &Key| Key { rest: key.rest.replacen("dynamo", namespace, 1), bucket: key.bucket };
    captured.iter().zip(values).map(|((old, _), value)| (key(old), value)).collect()
}

/// The file capture's records, of another instance.
fn renumbered(captured: &Captured, id: u64) -> Captured {
    let text = |it: &str| {
        let it = it.replace("83df8211c5f328d8", &format!("{id:x}"));
        it.replace("9502456751622138072", &id.to_string())
    };
    let value = |it: &Value| serde_json::from_str(&text(&it.to_string())).unwrap();
    let key = |key: &Key| Key { rest: text(&key.rest), bucket: key.bucket };
    captured.iter().map(|(name, it)| (key(name), value(it))).collect()
}

#[test]
fn the_file_capture_is_two_ranks_of_one_worker() {
    let fleet = fleet_of(&captures::file());
    assert_eq!(fleet.problems, []);
    let [model] = fleet.models.as_slice() else { panic!() };
    assert_eq!(
        (model.name.as_str(), model.block_size, model.context_length),
        ("tiny-mock", 16, 4096)
    );
    assert!(matches!(&model.files, ModelFiles::Artifacts(files) if files.len() == 3));
    let [first, second] = fleet.ranks.as_slice() else { panic!() };
    assert_eq!(first.spec.worker.id, WorkerId(9_502_456_751_622_138_072));
    assert_eq!((first.spec.worker.rank, second.spec.worker.rank), (DpRank(0), DpRank(1)));
    assert_eq!((first.spec.role, first.spec.total_kv_blocks), (Role::Aggregated, 64));
    assert_eq!(first.spec.endpoint, "127.0.0.1:8000");
    assert_eq!(first.namespace.as_deref(), Some("dynamo"));
    assert!(first.spec.has_events && first.spec.incarnation != second.spec.incarnation);
    let expected = PlaneStream {
        publisher: 5_341_608_378_377_643,
        channel: Channel::Direct("127.0.0.1:36611".into()),
        recovery: Some(RecoveryTarget {
            address: "127.0.0.1:45539".into(),
            path: "83df8211c5f328d8/dynamo/backend/worker_kv_query_source_12fa2a1dec25ab".into(),
        }),
    };
    assert_eq!(second.stream, Some(RankStream::Plane(expected)));
    let kinds: Vec<&str> = fleet
        .load_streams
        .iter()
        .map(|it| match it.kind {
            LoadKind::ForwardPass(_) => "passes",
            LoadKind::KvMetrics(_) => "metrics",
            LoadKind::SglangLoad(_) | LoadKind::Scrape(_) => "not of the plane",
        })
        .collect();
    assert_eq!(kinds, ["passes", "metrics"]);
    let [sequences] = &fleet.sequence_streams[..] else { panic!("not one") };
    assert_eq!(sequences.topic, Topic::ActiveSequences);
    assert_eq!(sequences.source.publisher, Some(4_854_122_813_729_361));
    assert_eq!(sequences.source.channel, Channel::Direct("127.0.0.1:40729".into()));
    let path = &fleet.paths[&first.spec.worker.id];
    assert_eq!((path.component.as_str(), path.endpoint.as_str()), ("backend", "generate"));
    assert_eq!(fleet.load_streams[0].worker, None, "files do not say who wrote them");
}

#[test]
fn the_etcd_capture_is_a_prefill_and_a_decode_worker_of_one_model() {
    let fleet = fleet_of(&captures::etcd());
    assert_eq!(fleet.problems, []);
    assert_eq!(fleet.models.len(), 1);
    let [decode, prefill] = fleet.ranks.as_slice() else { panic!() };
    assert_eq!((decode.spec.role, prefill.spec.role), (Role::Decode, Role::Prefill));
    assert_eq!(decode.stream, None);
    assert!(!decode.spec.has_events && prefill.spec.has_events);
}

#[test]
fn the_resource_capture_is_listed_once_a_decode_worker_is_there() {
    let mut listing = captures::listing(&captures::resource(), captures::resource_author());
    let fleet = join(&listing, &rules());
    assert_eq!((fleet.ranks.len(), reasons(&fleet)), (0, vec!["needs_unmet"]));
    let decode = without(&captures::etcd(), "/prefill");
    listing.entries.extend(captures::listing(&decode, Author::default()).entries);
    let fleet = join(&listing, &rules());
    assert_eq!(reasons(&fleet), Vec::<&str>::new());
    let [decode, prefill] = fleet.ranks.as_slice() else { panic!() };
    assert_eq!(decode.spec.role, Role::Decode);
    assert_eq!(prefill.spec.worker.id, WorkerId(6_917_097_255_046_897));
    assert_eq!(prefill.spec.endpoint, "10.1.2.3:8123");
    assert_eq!(prefill.name.as_deref(), Some("tiny-prefill-0"));
    let load = &fleet.load_streams;
    let tied: Vec<_> = load.iter().filter(|it| it.worker == Some(prefill.spec.worker.id)).collect();
    assert_eq!(tied.len(), 2);
    assert_eq!(tied[0].ranks, [0]);
}

#[test]
fn a_worker_goes_with_its_endpoint_and_with_its_card() {
    for part in ["v1/instances/dynamo/backend/generate", "v1/mdc"] {
        let fleet = fleet_of(&without(&captures::file(), part));
        assert_eq!((fleet.ranks.len(), fleet.load_streams.len()), (0, 0), "{part}");
    }
    // The recovery endpoint's record is no serving endpoint, and its absence
    // ends nothing.
    let fleet = fleet_of(&without(&captures::file(), "v1/instances/dynamo/backend/worker"));
    assert_eq!(fleet.ranks.len(), 2);
}

#[test]
fn decode_stays_when_prefill_goes_and_prefill_goes_with_decode() {
    let fleet = fleet_of(&without(&captures::etcd(), "v1/instances/dynamo/prefill/generate"));
    assert_eq!(fleet.ranks.iter().map(|it| it.spec.role).collect::<Vec<_>>(), [Role::Decode]);
    let fleet = fleet_of(&without(&captures::etcd(), "v1/instances/dynamo/backend/generate"));
    assert_eq!((fleet.ranks.len(), reasons(&fleet)), (0, vec!["needs_unmet"]));
}

#[test]
fn needs_are_met_in_the_same_namespace_by_the_same_model() {
    let (decode, prefill) =
        (without(&captures::etcd(), "/prefill"), without(&captures::etcd(), "/backend"));
    let mut apart = decode.clone();
    apart.extend(moved(&prefill, "dynamo-0123abcd"));
    let fleet = fleet_of(&apart);
    assert_eq!((fleet.ranks.len(), reasons(&fleet)), (1, vec!["needs_unmet"]));
    let mut other = captures::etcd();
    change(&mut other, "v1/mdc/dynamo/backend", |it| it["card_json"]["display_name"] = json!("b"));
    assert_eq!(reasons(&fleet_of(&other)), ["needs_unmet"]);
    // One alternative is enough, but the whole of it.
    for (needs, listed) in [
        (json!([["encode"], ["decode"]]), 2),
        (json!([["decode", "encode"]]), 1),
        (json!([["wish"]]), 1),
        (json!([]), 2),
    ] {
        let mut captured = captures::etcd();
        change(&mut captured, "v1/mdc/dynamo/prefill", |it| {
            it["card_json"]["needs"] = needs.clone()
        });
        assert_eq!(fleet_of(&captured).ranks.len(), listed, "{needs}");
    }
}

#[test]
fn encode_and_unknown_workers_are_left_out() {
    for (word, reason) in [("encode", "encode_worker"), ("wish", "unknown_worker_type")] {
        let mut captured = captures::file();
        change(&mut captured, "v1/mdc", |it| it["card_json"]["worker_type"] = json!(word));
        let fleet = fleet_of(&captured);
        assert_eq!((fleet.ranks.len(), reasons(&fleet)), (0, vec![reason]));
    }
}

/// Goal: a model follows the settings of the workers that answer, and what is
/// not followed is told.
#[test]
fn workers_bring_the_settings_of_their_model() {
    let bring = |captured: &mut Captured, part: &str, config: Value| {
        change(captured, part, |it| it["card_json"]["router_config"] = config.clone());
    };
    let warm = |temperature: f64| json!({"router_mode": "k_v", "kv_router_config": {"router_temperature": temperature}});
    let brought = |backend: Value, prefill: Value| {
        let mut captured = captures::etcd();
        bring(&mut captured, "v1/mdc/dynamo/backend", backend);
        bring(&mut captured, "v1/mdc/dynamo/prefill", prefill);
        let fleet = fleet_of(&captured);
        let card = fleet.settings.get(&0).copied();
        let settings = card.map(|card| RouterConfig::default().of_card(&card).unwrap());
        (settings.map(|it| it.router_temperature), reasons(&fleet))
    };
    let differs = vec!["router_config_differs"];
    assert_eq!(brought(Value::Null, Value::Null), (None, vec![]));
    assert_eq!(brought(warm(0.5), Value::Null), (Some(0.5), vec![]));
    assert_eq!(brought(warm(0.5), warm(0.5)), (Some(0.5), vec![]));
    assert_eq!(brought(warm(0.5), warm(0.25)), (Some(0.5), differs.clone()));
    assert_eq!(brought(Value::Null, warm(0.25)), (None, differs));
    assert_eq!(brought(warm(-1.0), Value::Null), (None, vec!["router_config"]));
}

#[test]
fn older_cards_say_prefill_in_their_model_type() {
    let mut captured = captures::etcd();
    change(&mut captured, "v1/mdc", |it| {
        let card = it["card_json"].as_object_mut().unwrap();
        card.remove("worker_type");
        card.remove("needs");
    });
    change(&mut captured, "v1/mdc/dynamo/prefill", |it| {
        it["card_json"]["model_type"] = json!("Prefill");
    });
    let roles = |captured: &Captured| {
        fleet_of(captured).ranks.iter().map(|it| it.spec.role).collect::<Vec<_>>()
    };
    assert_eq!(roles(&captured), [Role::Aggregated, Role::Prefill]);
    assert_eq!(roles(&without(&captured, "v1/instances/dynamo/backend")), []);
}

#[test]
fn generations_are_taken_as_the_rule_says() {
    let exact = NamespaceRule::Exact("dynamo".into());
    for (namespace, taken) in [
        ("dynamo", true),
        ("dynamo-0123abcd", true),
        ("dynamo-0123ABCD", false),
        ("dynamo-0123abc", false),
        ("dynamo-0123abcde", false),
        ("dynamo0123abcd", false),
        ("dynamo-other", false),
        ("other", false),
        ("", false),
    ] {
        assert_eq!(exact.admits(namespace), taken, "{namespace}");
    }
    let prefix = NamespaceRule::Prefix("dynamo".into());
    assert!(prefix.admits("dynamo") && prefix.admits("dynamo-other") && !prefix.admits("dynam"));
    // Two generations side by side: equal content is one model, other content
    // a second of the same name.
    let next = renumbered(&moved(&captures::file(), "dynamo-0123abcd"), 23);
    let mut both = captures::file();
    both.extend(next.clone());
    let fleet = fleet_of(&both);
    assert_eq!((fleet.models.len(), fleet.ranks.len()), (1, 4));
    let mut both = captures::file();
    both.extend(next);
    change(&mut both, "v1/mdc/dynamo-0123abcd", |it| {
        it["card_json"]["kv_cache_block_size"] = json!(32);
    });
    let fleet = fleet_of(&both);
    assert_eq!((fleet.models.len(), fleet.ranks.len()), (2, 4));
    assert_eq!(fleet.models[0].name, fleet.models[1].name);
    assert_eq!((fleet.ranks[0].spec.model, fleet.ranks[2].spec.model), (0, 1));
}

#[test]
fn what_a_card_lacks_is_said_and_its_worker_is_still_listed() {
    let cases = [
        ("/tokenizer", Value::Null, "no_tokenizer", true),
        ("/tokenizer", json!({"tik_token_model": {"path": "/t"}}), "tokenizer_kind", true),
        ("/tokenizer/hf_tokenizer_json/path", json!("hf://x"), "artifact_location", true),
        ("/model_input", json!("Text"), "text_input", true),
        ("/kv_cache_block_size", json!(0), "block_size_unknown", false),
        ("/kv_cache_block_size", json!(1 << 20), "block_size_unknown", false),
        (
            "/runtime_config/kv_event_source_mode",
            json!("state_agent_v2"),
            "unknown_event_mode",
            false,
        ),
    ];
    for (pointer, with, reason, has_events) in cases {
        let mut captured = captures::file();
        change(&mut captured, "v1/mdc", |it| {
            let card = &mut it["card_json"];
            if card.pointer(pointer).is_none() {
                card["runtime_config"]["kv_event_source_mode"] = Value::Null;
            }
            *card.pointer_mut(pointer).unwrap() = with.clone();
        });
        let fleet = fleet_of(&captured);
        assert!(reasons(&fleet).contains(&reason), "{reason}: {:?}", fleet.problems);
        assert_eq!(fleet.ranks.len(), 2, "{reason}");
        assert_eq!(fleet.ranks[0].spec.has_events, has_events, "{reason}");
        assert_eq!(fleet.ranks[0].stream.is_some(), has_events, "{reason}");
        assert!(fleet.models[0].block_size >= 1);
    }
}

/// Goal: a worker has the taints of its card and its place in the topology;
/// those that nobody could ask for are left out, and it is said.
#[test]
fn taints_and_step_size_come_from_the_card() {
    let fleet_with = |field: &str, value: Value| {
        let mut captured = captures::file();
        change(&mut captured, "v1/mdc", |it| {
            let runtime = &mut it["card_json"]["runtime_config"];
            runtime["max_num_batched_tokens"] = json!(8192);
            runtime["taints"] = json!(["spot", "gpu=h100", "spot"]);
            runtime["topology_domains"] = json!({"zone": "a", "rack": "r1"});
            runtime[field] = value.clone();
        });
        let fleet = fleet_of(&captured);
        let said = reasons(&fleet).contains(&"taints_left_out");
        (fleet.ranks[0].spec.clone(), said)
    };
    let (rack, zone) = ("dynamo.topology/rack=r1", "dynamo.topology/zone=a");
    let (spec, said) = fleet_with("context_length", json!(1));
    assert_eq!(spec.taints, [rack, zone, "gpu=h100", "spot"]);
    assert_eq!((spec.max_num_batched_tokens, said), (8192, false));

    let (spec, said) = fleet_with("topology_domains", json!({"zone": 1, "rack": "", "": "x"}));
    assert_eq!((spec.taints, said), (vec!["gpu=h100".to_owned(), "spot".to_owned()], true));
    let (spec, said) = fleet_with("taints", json!(["", 7, "x".repeat(TAINT_BYTES_MAX + 1)]));
    assert_eq!((spec.taints, said), (vec![rack.to_owned(), zone.to_owned()], true));
    let (spec, said) = fleet_with("taints", Value::Null);
    assert_eq!((spec.taints, said), (vec![rack.to_owned(), zone.to_owned()], false));
    let many: Vec<String> = (0..WORKER_TAINTS_MAX).map(|n| format!("t{n:02}")).collect();
    let (spec, said) = fleet_with("taints", json!(many));
    assert_eq!((spec.taints.len(), said), (WORKER_TAINTS_MAX, true));
    let (spec, said) = fleet_with("max_num_batched_tokens", Value::Null);
    assert_eq!((spec.max_num_batched_tokens, said), (0, false));
}

#[test]
fn a_configured_directory_wins_over_the_cards_files() {
    let own = ModelConfig {
        name: "tiny-mock".into(),
        aliases: vec!["tiny".into()],
        directory: "/models/tiny".into(),
        block_size: 32,
        eagle: false,
        engine: crate::config::CompletionEngine::Vllm,
        hf_tokenizers: true,
    };
    let rules = Rules { models: vec![own], ..rules() };
    let mut captured = captures::file();
    change(&mut captured, "v1/mdc", |it| it["card_json"]["tokenizer"] = Value::Null);
    change(&mut captured, "v1/mdc", |it| it["card_json"]["aliases"] = json!(["tiny", "small"]));
    let fleet = join(&captures::listing(&captured, Author::default()), &rules);
    assert_eq!(fleet.problems, []);
    let model = &fleet.models[0];
    assert_eq!(model.files, ModelFiles::Directory("/models/tiny".into()));
    assert_eq!((model.block_size, model.hf_tokenizers), (16, true));
    assert_eq!(model.aliases, ["tiny", "small"]);
    change(&mut captured, "v1/mdc", |it| it["card_json"]["kv_cache_block_size"] = json!(0));
    let fleet = join(&captures::listing(&captured, Author::default()), &rules);
    assert_eq!((fleet.models[0].block_size, reasons(&fleet)), (32, Vec::new()));
}

#[test]
fn two_publishers_of_a_rank_are_none() {
    let mut captured = captures::etcd();
    let source =
        captured.iter().find(|(key, _)| key.to_string().contains("event_sources")).unwrap();
    let (mut key, mut value) = source.clone();
    key.rest = key.rest.replace("1436931f5595c", "17");
    value["publisher_id"] = json!(23);
    value["metadata"]["publisher_id"] = json!(23);
    captured.push((key, value));
    let fleet = fleet_of(&captured);
    assert_eq!(reasons(&fleet), ["ambiguous_publisher"]);
    assert!(fleet.ranks.iter().all(|rank| rank.stream.is_none() && !rank.spec.has_events));
}

#[test]
fn a_publisher_without_a_channel_is_heard_on_its_subject() {
    let captured = moved(&without(&captures::etcd(), "topic/kv-events/"), "a.b");
    let sources = moved(&captures::etcd(), "a.b");
    let source = sources.iter().find(|(key, _)| key.to_string().contains("event_sources")).unwrap();
    let mut captured = captured;
    captured.push(source.clone());
    let brokers =
        Rules { namespaces: NamespaceRule::Prefix(String::new()), brokers: true, ..rules() };
    let fleet = join(&captures::listing(&captured, Author::default()), &brokers);
    let Some(RankStream::Plane(stream)) = &fleet.ranks[1].stream else { panic!() };
    let subject = "namespace.a%2Eb.component.prefill.endpoint.generate.kv-events";
    assert_eq!(stream.channel, Channel::Subject(subject.into()));
    let untied = fleet.load_streams.iter().filter(|it| {
        matches!(&it.kind, LoadKind::KvMetrics(it) | LoadKind::ForwardPass(it) if it.publisher.is_none())
    });
    assert_eq!(untied.count(), 4);
}

#[test]
fn channels_of_nats_are_subjects_and_bad_ones_nothing() {
    let mut captured = captures::file();
    change(&mut captured, "v1/event_channels", |it| {
        it["transport"] = json!({"kind": "Nats", "config": {"subject_prefix": "x"}});
    });
    let Some(RankStream::Plane(stream)) = fleet_of(&captured).ranks[0].stream.clone() else {
        panic!()
    };
    let subject = "namespace.dynamo.component.backend.endpoint.generate.kv-events";
    assert_eq!(stream.channel, Channel::Subject(subject.into()));
    change(&mut captured, "v1/event_channels", |it| {
        it["transport"] = json!({"kind": "Zmq", "config": {"endpoint": "tcp://*:5"}});
    });
    let fleet = fleet_of(&captured);
    assert!(fleet.ranks.iter().all(|rank| rank.stream.is_none()));
    assert!(reasons(&fleet).contains(&"bad_channel"));
}

#[test]
fn adapters_are_held_by_whom_their_cards_say() {
    let mut captured = captures::file();
    let card = captured.iter().find(|(key, _)| key.to_string().contains("v1/mdc")).unwrap();
    let (mut key, mut value) = card.clone();
    key.rest.push_str("/sql");
    value["card_json"]["display_name"] = json!("tiny-sql");
    value["card_json"]["lora"] = json!({"name": "sql"});
    captured.push((key, value));
    let fleet = fleet_of(&captured);
    let [adapter] = fleet.adapters.as_slice() else { panic!() };
    assert_eq!(
        (adapter.name.as_str(), adapter.lora.as_str(), adapter.model),
        ("tiny-sql", "sql", 0)
    );
    assert_eq!(adapter.holders, [fleet.ranks[0].spec.worker.id]);
    assert_eq!((fleet.ranks.len(), fleet.models.len()), (2, 1));
    let alone: Captured = captured
        .into_iter()
        .filter(|(key, _)| {
            !key.to_string().ends_with("mdc/dynamo/backend/generate/83df8211c5f328d8")
        })
        .collect();
    let fleet = fleet_of(&alone);
    assert_eq!((fleet.adapters.len(), reasons(&fleet)), (0, vec!["adapter_without_base"]));
}

#[test]
fn a_record_that_speaks_for_another_worker_is_dropped() {
    let author = Author { instance: Some(7), ..captures::resource_author() };
    let listing = captures::listing(&captures::resource(), author);
    let fleet = join(&listing, &rules());
    assert!(fleet.ranks.is_empty());
    assert_eq!(reasons(&fleet), ["foreign_record"; 4]);
}

#[test]
fn a_channel_that_another_worker_wrote_is_not_heard() {
    let mut captured = captures::resource();
    change(&mut captured, "v1/mdc", |it| it["card_json"]["needs"] = json!([]));
    let stream = |listing: &Listing| join(listing, &rules()).ranks[0].stream.clone().unwrap();
    let own = captures::listing(&captured, captures::resource_author());
    let expected = stream(&own);
    let is_channel = |key: &Key| key.to_string().contains("event_channels");
    let mut forged: Captured = captured.into_iter().filter(|(key, _)| is_channel(key)).collect();
    change(&mut forged, "kv-events", |it| {
        it["transport"]["config"]["endpoint"] = json!("tcp://10.9.9.9:9");
    });
    let forger = Author { instance: Some(7), ..captures::resource_author() };
    let forged = captures::listing(&forged, forger);
    for before in [false, true] {
        let mut both = own.clone();
        let at = if before { 0 } else { both.entries.len() };
        both.entries.splice(at..at, forged.entries.clone());
        assert_eq!(stream(&both), expected);
    }
}

#[test]
fn requests_go_where_the_rule_says() {
    let mut captured = captures::file();
    let endpoint = |captured: &Captured, frontend| {
        let rules = Rules { frontend, ..rules() };
        join(&captures::listing(captured, Author::default()), &rules).ranks[0].spec.endpoint.clone()
    };
    assert_eq!(endpoint(&captured, FrontendRule::PodPort(81)), "127.0.0.1:81");
    assert_eq!(endpoint(&captured, FrontendRule::None), "");
    let fixed = FrontendRule::Fixed("10.0.0.9:8000".parse().unwrap());
    assert_eq!(endpoint(&captured, fixed), "10.0.0.9:8000");
    change(&mut captured, "v1/instances/dynamo/backend/generate", |it| {
        it["transport"] = json!({"tcp": "[fd00::1]:9/x"});
    });
    assert_eq!(endpoint(&captured, FrontendRule::PodPort(81)), "[fd00::1]:81");
    change(&mut captured, "v1/instances/dynamo/backend/generate", |it| {
        it["transport"] = json!({"nats_tcp": "x"});
    });
    assert_eq!(endpoint(&captured, FrontendRule::PodPort(81)), "");
    assert_eq!(reasons(&fleet_of(&captured)), ["no_address"]);
}

#[test]
fn a_publisher_or_a_pod_anew_is_another_life() {
    let life = |captured: &Captured, author| {
        join(&captures::listing(captured, author), &rules()).ranks[0].spec.incarnation
    };
    let captured = captures::file();
    let first = life(&captured, Author::default());
    assert_eq!(life(&captured, Author::default()), first);
    let other = Author { uid: Some("b".into()), ..Author::default() };
    assert_ne!(life(&captured, other), first);
    let unheard = without(&captured, "v1/event_sources");
    assert_ne!(life(&unheard, Author::default()), first);
    assert_eq!(reasons(&fleet_of(&unheard)), ["no_event_source"; 2]);
}

#[test]
fn workers_and_models_beyond_the_limits_are_refused() {
    let many = |count: u64, with: &dyn Fn(&mut Value, u64)| {
        let mut all = Captured::new();
        for id in 1..=count {
            let mut one = renumbered(&captures::file(), id);
            change(&mut one, "v1/mdc", |it| with(&mut it["card_json"], id));
            all.extend(one);
        }
        fleet_of(&all)
    };
    let fleet = many(9, &|card, _| {
        card["runtime_config"]["data_parallel_size"] = json!(1024);
        card["runtime_config"]["kv_event_publishing_enabled"] = json!(false);
    });
    assert_eq!(
        (fleet.ranks.len(), reasons(&fleet)),
        (ROSTER_WORKERS_MAX, vec!["too_many_workers"])
    );
    let fleet = many(66, &|card, id| card["display_name"] = json!(format!("m{id}")));
    assert_eq!((fleet.models.len(), fleet.ranks.len()), (64, 128));
    assert_eq!(reasons(&fleet).iter().filter(|it| **it == "too_many_models").count(), 2);
    let fleet = many(300, &|card, _| card["worker_type"] = json!("encode"));
    assert_eq!(fleet.problems.len(), 257);
    assert_eq!(fleet.problems[256].reason, "too_many_problems");
    assert_eq!(fleet.problems[256].of, "44 more");
}

#[test]
fn ranks_beyond_the_limit_are_refused() {
    for (start, size, ok) in
        [(0, 1024, true), (5, 1024, true), (0, 1025, false), (u64::MAX, 1, false)]
    {
        let mut captured = captures::file();
        change(&mut captured, "v1/mdc", |it| {
            it["card_json"]["runtime_config"]["data_parallel_start_rank"] = json!(start);
            it["card_json"]["runtime_config"]["data_parallel_size"] = json!(size);
        });
        let fleet = fleet_of(&captured);
        assert_eq!(fleet.ranks.len(), if ok { 1024 } else { 0 }, "{start} {size}");
        assert_eq!(reasons(&fleet).contains(&"too_many_ranks"), !ok);
    }
}

proptest! {
    #[test]
    fn any_part_of_the_records_in_any_order_keeps_the_rules(
        kept in prop::collection::vec(any::<bool>(), 30), turn in 0_usize..30, shuffle in any::<bool>(),
    ) {
        let mut captured = captures::file();
        captured.extend(captures::etcd());
        captured.extend(captures::resource());
        let mut kept = kept.iter();
        captured.retain(|_| *kept.next().unwrap());
        let fleet = fleet_of(&captured);
        if !captured.is_empty() {
            let turn = turn % captured.len();
            captured.rotate_left(turn);
        }
        if shuffle {
            captured.reverse();
        }
        prop_assert_eq!(&fleet_of(&captured), &fleet, "order does not matter");
        let has = |part: String| captured.iter().any(|(key, _)| key.to_string().ends_with(&part));
        for rank in &fleet.ranks {
            let id = rank.spec.worker.id.0;
            let component = if rank.spec.role == Role::Prefill { "prefill" } else { "backend" };
            let key = format!("dynamo/{component}/generate/{id:x}");
            let (instance, card) = (format!("v1/instances/{key}"), format!("v1/mdc/{key}"));
            prop_assert!(has(instance) && has(card));
            prop_assert_eq!(rank.spec.has_events, rank.stream.is_some());
            prop_assert!(usize::from(rank.spec.model) < fleet.models.len());
        }
        let decode = fleet.ranks.iter().any(|rank| rank.spec.role == Role::Decode);
        prop_assert!(decode || !fleet.ranks.iter().any(|rank| rank.spec.role == Role::Prefill));
    }
}
