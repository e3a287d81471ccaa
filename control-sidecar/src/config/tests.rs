//! Files with and without mistakes.

use super::workers::id_of_name;
use super::*;
use crate::adapter::Engine;
use crate::fleet::{LoadKind, PullStream, RankStream};
use warmpath_core::ids::{DpRank, WorkerId};
use warmpath_core::limits::{TAINT_BYTES_MAX, WORKER_TAINTS_MAX};
use warmpath_core::roster::Role;

const GOOD: &str = r#"
feed: {listen: "127.0.0.1:9110"}
status: {listen: "127.0.0.1:9111"}
sync: {deadline_ms: 1500}
models:
  - {name: qwen3, aliases: [Qwen/Qwen3], directory: models/qwen3, block_size: 16, engine: vllm}
workers_file: workers.yaml
"#;

const WORKERS: &str = r#"
workers:
  - {id: 1, model: qwen3, endpoint: "127.0.0.1:19001", engine: vllm, role: aggregated,
     kv_events: "tcp://127.0.0.1:19501", replay: "tcp://127.0.0.1:19601", total_kv_blocks: 1200}
  - {name: pod-0, model: Qwen/Qwen3, endpoint: "[fd00::1]:8000", engine: sglang, role: prefill,
     kv_events: "tcp://engine.example:5557", dp_size: 2, dp_start_rank: 4}
  - {name: blind, model: qwen3, endpoint: "10.0.0.3:8000"}
"#;

fn parse(text: &str) -> Result<Config, Mistakes> {
    Config::parse(text, Path::new("/etc/warmpath"), &Overrides::default())
}

fn models() -> Vec<ModelConfig> {
    parse(GOOD).unwrap().models
}

#[test]
fn a_good_file_is_taken_over() {
    let config = parse(GOOD).unwrap();
    assert_eq!(config.feed.listen.to_string(), "127.0.0.1:9110");
    assert_eq!(config.status_listen.port(), 9111);
    assert_eq!(config.sync_deadline, Duration::from_millis(1500));
    assert_eq!(config.workers, WorkerSource::File("/etc/warmpath/workers.yaml".into()));
    assert_eq!(
        config.models,
        [ModelConfig {
            name: "qwen3".into(),
            aliases: vec!["Qwen/Qwen3".into()],
            directory: "/etc/warmpath/models/qwen3".into(),
            block_size: 16,
            eagle: false,
            engine: CompletionEngine::Vllm,
            hf_tokenizers: false,
        }]
    );
}

#[test]
fn a_good_list_gives_one_entry_a_rank() {
    let list = WorkerList::parse(WORKERS, &models()).unwrap();
    assert_eq!(list.ranks.len(), 4);
    let first = &list.ranks[0];
    assert_eq!(first.spec.worker.id, WorkerId(1));
    assert_eq!(first.spec.total_kv_blocks, 1200);
    let Some(RankStream::Engine(stream)) = &first.stream else { panic!() };
    assert_eq!(stream.events, "127.0.0.1:19501");
    assert_eq!(stream.replay.as_deref(), Some("127.0.0.1:19601"));
    assert!(!stream.one_of_many);
    let second = &list.ranks[2];
    assert_eq!(second.spec.worker.id, id_of_name("pod-0"));
    assert_eq!(second.spec.worker.rank, DpRank(5));
    assert_eq!((second.spec.role, second.spec.small_pages), (Role::Prefill, true));
    assert_eq!(second.spec.endpoint, "[fd00::1]:8000");
    let Some(RankStream::Engine(stream)) = &second.stream else { panic!() };
    assert_eq!((stream.engine, stream.events.as_str()), (Engine::Sglang, "engine.example:5562"));
    assert!(stream.one_of_many);
    assert!(!list.ranks[3].spec.has_events);
}

#[test]
fn events_may_be_pulled_and_loads_looked_at() {
    let text = r#"
workers:
  - {id: 1, model: qwen3, endpoint: "127.0.0.1:1", dp_size: 2,
     pull_events: "http://127.0.0.1:1", metrics: "http://127.0.0.1:1/metrics"}
  - {id: 2, model: qwen3, endpoint: "127.0.0.1:2", engine: sglang, dp_size: 2,
     kv_events: "tcp://127.0.0.1:20", load: "tcp://127.0.0.1:30"}
"#;
    let list = WorkerList::parse(text, &models()).unwrap();
    let pulled = RankStream::Pull(PullStream { url: "http://127.0.0.1:1".into() });
    assert_eq!(list.ranks[1].stream.as_ref(), Some(&pulled));
    assert!(list.ranks[1].spec.has_events);
    let loads: Vec<_> = list.load_streams.iter().map(|it| (it.kind.clone(), &*it.ranks)).collect();
    let expected: [(LoadKind, &[u32]); 3] = [
        (LoadKind::Scrape("http://127.0.0.1:1/metrics".into()), &[0, 1]),
        (LoadKind::SglangLoad("127.0.0.1:30".into()), &[0]),
        (LoadKind::SglangLoad("127.0.0.1:31".into()), &[1]),
    ];
    assert_eq!(loads, expected);
    for wrong in ["ftp://127.0.0.1:1", "127.0.0.1:1", ""] {
        let text = text.replace("http://127.0.0.1:1/metrics", wrong);
        assert!(WorkerList::parse(&text, &models()).is_err(), "{wrong:?}");
    }
}

#[test]
fn workers_are_listed_with_their_adapters() {
    let text = r#"
workers:
  - {id: 1, model: qwen3, endpoint: "127.0.0.1:1", adapters: [sql, chat]}
  - {id: 2, model: qwen3, endpoint: "127.0.0.1:2", adapters: [sql], dp_size: 2}
"#;
    let list = WorkerList::parse(text, &models()).unwrap();
    let held: Vec<_> =
        list.adapters.iter().map(|it| (it.name.as_str(), it.lora.as_str(), &*it.holders)).collect();
    let ids = [WorkerId(1), WorkerId(2)];
    assert_eq!(held, [("sql", "sql", &ids[..]), ("chat", "chat", &ids[..1])]);
    for (wrong, part) in [("[qwen3]", "is a model"), ("['']", "names have")] {
        let mistakes = WorkerList::parse(&text.replace("[sql]", wrong), &models()).unwrap_err();
        assert!(mistakes.to_string().contains(part), "{mistakes}");
    }
}

#[test]
fn workers_are_listed_with_their_taints_and_step_size() {
    let text = r#"
workers:
  - {id: 1, model: qwen3, endpoint: "127.0.0.1:1", dp_size: 2, max_num_batched_tokens: 8192,
     taints: [gpu=h100, dynamo.topology/zone=a, gpu=h100]}
  - {id: 2, model: qwen3, endpoint: "127.0.0.1:2"}
"#;
    let list = WorkerList::parse(text, &models()).unwrap();
    for rank in &list.ranks[..2] {
        assert_eq!(rank.spec.taints, ["dynamo.topology/zone=a", "gpu=h100"]);
        assert_eq!(rank.spec.max_num_batched_tokens, 8192);
    }
    assert_eq!(list.ranks[2].spec.max_num_batched_tokens, 0);
    assert!(list.ranks[2].spec.taints.is_empty());
    let many: Vec<String> = (0..=WORKER_TAINTS_MAX).map(|n| format!("t{n}")).collect();
    let long = "x".repeat(TAINT_BYTES_MAX + 1);
    for (wrong, part) in [
        ("['']".to_owned(), "taints have"),
        (format!("[{long}]"), "taints have"),
        (format!("[{}]", many.join(", ")), "at most 64 taints, are 65"),
        ("gpu".to_owned(), "must be a list"),
    ] {
        let right = "[gpu=h100, dynamo.topology/zone=a, gpu=h100]";
        let mistakes = WorkerList::parse(&text.replace(right, &wrong), &models()).unwrap_err();
        assert!(mistakes.to_string().contains(part), "{mistakes}");
    }
}

#[test]
fn the_same_list_may_stand_in_the_configuration() {
    let text = format!("{}{WORKERS}", GOOD.replace("workers_file: workers.yaml", ""));
    let WorkerSource::Inline(list) = parse(&text).unwrap().workers else { panic!() };
    assert_eq!(list, WorkerList::parse(WORKERS, &models()).unwrap());
}

#[test]
fn environment_and_flags_win() {
    let overrides = Overrides {
        feed_listen: Some("127.0.0.1:1".into()),
        status_listen: Some("[::1]:2".into()),
        log: Some(LogFormat::Json),
        block_size: Some("64".into()),
        cache_directory: Some("/var/cache/warmpath".into()),
        discovery: DiscoveryEnv::default(),
        router: RouterEnv::default(),
        replicas: ReplicasEnv::default(),
        picker: PickerEnv::default(),
    };
    let config = Config::parse(GOOD, Path::new(""), &overrides).unwrap();
    assert_eq!(config.feed.listen.to_string(), "127.0.0.1:1");
    assert_eq!(config.status_listen.port(), 2);
    assert_eq!(config.log, LogFormat::Json);
    assert_eq!(config.cache_directory, Some("/var/cache/warmpath".into()));
    let named = format!("cache: {{directory: /there}}\n{GOOD}");
    let named = Config::parse(&named, Path::new(""), &overrides).unwrap();
    assert_eq!(named.cache_directory, Some("/there".into()), "a folder is only a default");
    assert_eq!(config.models[0].block_size, 16, "the file's own wins over a default");
    let without = GOOD.replace(", block_size: 16", "");
    let config = Config::parse(&without, Path::new(""), &overrides).unwrap();
    assert_eq!(config.models[0].block_size, 64);
    assert!(parse(&without).unwrap_err().to_string().contains("models[0].block_size: is missing"));
}

/// Goal: every mistake is found, named by its field, and says what is right.
#[test]
fn mistakes_are_named() {
    let cases = [
        ("", "models: is missing"),
        ("7", "must be a map, is a number"),
        ("models: [", "not valid YAML"),
        ("{models: [], models: []}", "not valid YAML"),
        ("fed: {}", "fed: is not a known field"),
        ("feed: {listen: localhost}", "feed.listen: must be an address and a port"),
        ("feed: {listen: 9010}", "feed.listen: must be a text, is a number"),
        ("feed: {port: 9010}", "feed.port: is not a known field"),
        ("feed: {retained_bytes: 10}", "feed.retained_bytes: must be from 1048576"),
        ("log: {format: xml}", "log.format: must be one of text, json, is \"xml\""),
        ("models: qwen3", "models: must be a list, is a text"),
        ("models: [qwen3]", "models[0]: must be a map, is a text"),
        ("models: [{directory: d, block_size: 16}]", "models[0].name: is missing"),
        ("models: [{name: a, block_size: 16}]", "models[0].directory: is missing"),
        (
            "models: [{name: a, directory: d, block_size: 0}]",
            "models[0].block_size: must be from 1",
        ),
        ("models: [{name: a, directory: d, block_size: -1}]", "is a negative number"),
        ("models: [{name: a, directory: d, block_size: 1.5}]", "is a fraction"),
        (
            "models: [{name: a, directory: d, block_size: 16, engine: tgi}]",
            "models[0].engine: must be one of vllm",
        ),
        (
            "models: [{name: a, directory: d, block_size: 16}, {name: b, aliases: [a], directory: d, block_size: 16}]",
            "models[1]: the name \"a\" is used twice",
        ),
        ("{workers_file: w, workers: []}", "workers: give one of them: workers, workers_file"),
    ];
    for (text, expected) in cases {
        let mistakes = parse(text).unwrap_err().to_string();
        assert!(mistakes.contains(expected), "{text}: {mistakes}");
    }
}

#[test]
fn mistakes_of_a_worker_list_are_named() {
    let entry = |fields: &str| {
        format!("workers: [{{id: 1, model: qwen3, endpoint: \"10.0.0.1:1\"{fields}}}]")
    };
    let cases = [
        (String::new(), "workers: is missing"),
        ("workers: {}".into(), "workers: must be a list, is a map"),
        ("workers: [{}]".into(), "workers[0].id: is missing: give id or name"),
        ("workers: [{}]".into(), "workers[0].model: is missing"),
        ("workers: [{}]".into(), "workers[0].endpoint: is missing"),
        ("workers: [{id: -1, model: qwen3, endpoint: \"10.0.0.1:1\"}]".into(), "workers[0].id: must be a whole number"),
        ("workers: [{id: 1, model: gpt, endpoint: \"10.0.0.1:1\"}]".into(), "workers[0].model: \"gpt\" is not among"),
        ("workers: [{id: 1, model: qwen3, endpoint: worker-0:80}]".into(), "workers[0].endpoint: must be an IP"),
        (entry(", rank: 1"), "workers[0].rank: is not a known field"),
        (entry(", role: boss"), "workers[0].role: must be one of aggregated, prefill, decode"),
        (entry(", kv_events: \"10.0.0.1:5557\""), "workers[0].kv_events: must be tcp://host:port"),
        (entry(", kv_events: \"tcp://*:5557\""), "give the address to connect to"),
        (entry(", kv_events: \"tcp://a:70000\""), "workers[0].kv_events: must have a port"),
        (entry(", kv_events: \"tcp://a:65535\", dp_size: 2"), "must have a port from 1 to 65534"),
        (entry(", replay: \"tcp://a:1\""), "workers[0].replay: needs kv_events"),
        (entry(", dp_size: 0"), "workers[0].dp_size: must be from 1"),
        (
            "workers: [{id: 1, model: qwen3, endpoint: \"10.0.0.1:1\"}, {id: 1, model: qwen3, endpoint: \"10.0.0.2:1\"}]".into(),
            "workers[1]: is the same worker as workers[0]",
        ),
        (
            "workers: [{id: 1, model: qwen3, endpoint: \"10.0.0.1:1\"}, {id: 2, model: qwen3, endpoint: \"10.0.0.1:1\"}]".into(),
            "workers[1].endpoint: is the endpoint of workers[0] too",
        ),
    ];
    for (text, expected) in cases {
        let mistakes = WorkerList::parse(&text, &models()).unwrap_err().to_string();
        assert!(mistakes.contains(expected), "{text}: {mistakes}");
    }
    assert_eq!(WorkerList::parse("workers: []", &models()).unwrap(), WorkerList::default());
}

#[test]
fn all_mistakes_come_together() {
    let text = "{feed: {listen: x}, status: {listen: y}, models: [{}], colour: blue}";
    let Mistakes(mistakes) = parse(text).unwrap_err();
    let paths: Vec<&str> = mistakes.iter().map(|mistake| mistake.path.as_str()).collect();
    for path in [
        "feed.listen",
        "status.listen",
        "models[0].name",
        "models[0].directory",
        "models[0].block_size",
        "workers_file",
        "colour",
    ] {
        assert!(paths.contains(&path), "{path} in {paths:?}");
    }
}

/// Vectors of Dynamo's endpoint picker.
#[test]
fn ids_of_names_are_dynamos() {
    for (name, id) in [
        ("pod-0", 3_319_042_764_719_725),
        ("vllm-agg-vllmdecodeworker-0", 8_626_113_982_458_367),
        ("vllm-agg-decode-abc123", 2_513_758_460_154_244),
        ("worker-a", 282_580_808_468_563),
        ("worker-b", 3_685_613_139_029_339),
        ("vllm-agg-0-vllmdecodeworker-7f9c4-xk2lp", 2_902_549_419_303_654),
        ("my-pod-sidecar", 8_066_343_618_907_874),
        ("", 121_655_548_788_207),
        ("worker-0", 1_186_445_869_714_687),
        ("worker-1", 6_167_992_384_364_830),
        ("dynamo-vllm-decode-7c9f6d5b8-abcde", 2_316_720_582_735_295),
        ("dynamo-vllm-decode-7c9f6d5b8-abcde-sidecar", 6_680_966_591_832_445),
        ("tiny-prefill-0", 6_917_097_255_046_897),
    ] {
        assert_eq!(id_of_name(name), WorkerId(id), "{name}");
    }
    // As releases without the mask have it.
    for (name, id) in [
        ("pod-0", 0x496b_caa6_dcfc_466d),
        ("worker-a", 0x7d01_0101_78b5_8853),
        ("worker-b", 0xeecd_180b_adee_6d5b),
        ("", 0x3040_6ea5_23c5_3def),
    ] {
        assert_eq!(discovery::IdBits::Whole.id_of(name), WorkerId(id), "{name}");
    }
}
