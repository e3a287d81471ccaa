//! Pods of a stand-in API server whose engines are real sockets.

use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, Uri};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::timeout;

use super::*;
use crate::config::CompletionEngine;
use crate::config::discovery::{FrontendRule, NamespaceRule};
use crate::discovery::join::Rules;
use crate::discovery::stand_in::StandIn;
use crate::discovery::{ListEvent, drive};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(20);

fn config(engine: Engine) -> PodsConfig {
    PodsConfig {
        namespace: Some("prod".into()),
        selector: "app=engine".into(),
        engine,
        port: 8000,
        kv_events_port: None,
        replay_port: None,
    }
}

fn models() -> Vec<ModelConfig> {
    vec![ModelConfig {
        name: "base".into(),
        aliases: vec!["org/base".into()],
        directory: "/models/base".into(),
        block_size: 16,
        eagle: false,
        engine: CompletionEngine::Vllm,
        hf_tokenizers: false,
    }]
}

fn ready(role: Option<&str>) -> PodFacts {
    PodFacts {
        uid: "u".into(),
        ip: Some(IpAddr::from([10, 0, 0, 1])),
        ready: true,
        role: role.map(str::to_owned),
        ..PodFacts::default()
    }
}

fn answered(sockets: Sockets, served: &[(&str, Option<&str>)]) -> Known {
    let served = served.iter().map(|(name, parent)| Served {
        name: (*name).to_owned(),
        parent: parent.map(str::to_owned),
    });
    let answers = Answers { sockets, served: served.collect() };
    let life = Life { uid: "u".into(), restarts: 0 };
    Known { life, answers: Some(answers), failed: None }
}

fn of(pod: PodFacts, known: Known, config: &PodsConfig) -> Fleet {
    let (pods, known) =
        (BTreeMap::from([("p".into(), pod)]), BTreeMap::from([("p".into(), known)]));
    fleet(&pods, &known, config, &models())
}

fn two_ranks() -> Sockets {
    let sockets = |rank: u32| RankSockets {
        events: Some(format!("10.0.0.1:{}", 5557 + rank)),
        replay: None,
        load: Some(format!("10.0.0.1:{}", 6000 + rank)),
    };
    Sockets::from([(0, sockets(0)), (1, sockets(1))])
}

#[test]
fn ranks_adapters_and_load_are_those_that_the_engine_names() {
    let served = [("org/base", None), ("sql", Some("org/base"))];
    let config = PodsConfig { replay_port: Some(7000), ..config(Engine::Sglang) };
    let fleet = of(ready(None), answered(two_ranks(), &served), &config);
    assert_eq!(fleet.problems, []);
    assert_eq!(fleet.ranks.len(), 2);
    let rank = &fleet.ranks[1];
    assert_eq!((rank.spec.worker.id, rank.spec.worker.rank), (id_of_name("p"), DpRank(1)));
    assert_eq!((rank.spec.endpoint.as_str(), rank.spec.role), ("10.0.0.1:8000", Role::Aggregated));
    let expected = EngineStream {
        engine: Engine::Sglang,
        events: "10.0.0.1:5558".into(),
        replay: Some("10.0.0.1:7001".into()),
        one_of_many: true,
    };
    assert_eq!(rank.stream, Some(RankStream::Engine(expected)));
    assert!(rank.spec.small_pages && rank.spec.incarnation != 0);
    let [adapter] = fleet.adapters.as_slice() else { panic!() };
    assert_eq!((adapter.name.as_str(), adapter.lora.as_str()), ("sql", "sql"));
    assert_eq!(adapter.holders, [id_of_name("p")]);
    assert_eq!(fleet.load_streams.len(), 2);
    assert_eq!(fleet.load_streams[1].kind, LoadKind::SglangLoad("10.0.0.1:6001".into()));
    assert_eq!(fleet.load_streams[1].ranks, [1]);
}

#[test]
fn an_engine_that_does_not_tell_has_the_configured_port_or_no_stream() {
    let known = answered(Sockets::new(), &[("base", None)]);
    let silent = of(ready(None), known.clone(), &config(Engine::Vllm));
    assert_eq!(silent.ranks[0].stream, None);
    assert_eq!(silent.problems[0].reason, "no_event_source");
    let scrape = LoadKind::Scrape("http://10.0.0.1:8000/metrics".into());
    assert_eq!((&silent.load_streams[0].kind, silent.load_streams[0].ranks.len()), (&scrape, 1));
    let config = PodsConfig { kv_events_port: Some(5557), ..config(Engine::Vllm) };
    let told = of(ready(None), known, &config);
    let Some(RankStream::Engine(stream)) = &told.ranks[0].stream else { panic!() };
    assert_eq!((stream.events.as_str(), &stream.replay), ("10.0.0.1:5557", &None));
}

#[test]
fn who_cannot_be_listed_is_a_problem() {
    let base: &[_] = &[("base", None)];
    for (pod, served, expected) in [
        (ready(Some("prefill")), base, Ok(Role::Prefill)),
        (ready(Some("decode")), base, Ok(Role::Decode)),
        (ready(Some("both")), base, Ok(Role::Aggregated)),
        (ready(Some("encode")), base, Err("encode_worker")),
        (ready(Some("wish")), base, Err("unknown_worker_type")),
        (ready(None), &[("other", None)], Err("unknown_model")),
        (ready(None), &[("base", Some("other"))], Err("unknown_model")),
        (PodFacts { ip: None, ..ready(None) }, base, Err("no_address")),
    ] {
        let fleet = of(pod, answered(two_ranks(), served), &config(Engine::Vllm));
        match expected {
            Ok(role) => assert_eq!(fleet.ranks[0].spec.role, role),
            Err(reason) => {
                assert_eq!((fleet.ranks.len(), fleet.load_streams.len()), (0, 0));
                assert_eq!(fleet.problems[0].reason, reason);
            }
        }
    }
    let unready = PodFacts { ready: false, ..ready(None) };
    let fleet = of(unready, answered(two_ranks(), base), &config(Engine::Vllm));
    assert_eq!((fleet.ranks.len(), fleet.problems.len()), (0, 0));
}

#[test]
fn an_engine_that_falls_silent_keeps_what_it_said() {
    let known = answered(two_ranks(), &[("base", None)]);
    let known = Known { failed: Some(ProbeError::Unreachable), ..known };
    let fleet = of(ready(None), known, &config(Engine::Vllm));
    assert_eq!((fleet.ranks.len(), fleet.problems[0].reason), (2, "probe_unreachable"));
}

/// What an engine answers, by path.
type Pages = Arc<Mutex<BTreeMap<&'static str, Value>>>;

/// An engine on a port of its own.
async fn engine(pages: Pages) -> u16 {
    async fn answer(State(pages): State<Pages>, uri: Uri) -> (StatusCode, String) {
        match pages.lock().unwrap().get(uri.path()) {
            Some(page) => (StatusCode::OK, page.to_string()),
            None => (StatusCode::NOT_FOUND, String::new()),
        }
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let router = Router::new().fallback(answer).with_state(pages);
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    port
}

fn pod(name: &str, port: u16, ready: bool, restarts: u32) -> Value {
    json!({
        "metadata": {"name": name, "uid": "u", "labels": {"llm-d.ai/role": "decode"}},
        "spec": {"containers": [{"name": "e", "ports": [{"name": "http", "containerPort": port}]}]},
        "status": {
            "podIP": "127.0.0.1",
            "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
            "containerStatuses": [{"name": "e", "ready": ready, "restartCount": restarts,
                "image": "i", "imageID": "i"}]
        }
    })
}

async fn taken(lists: &mut mpsc::Receiver<ListEvent>) -> Fleet {
    match timeout(PATIENCE, lists.recv()).await.expect("in time").expect("it goes on") {
        ListEvent::Taken(fleet) => fleet,
        ListEvent::Refused(message) => panic!("{message}"),
    }
}

#[tokio::test]
async fn a_ready_pod_is_asked_listed_and_asked_again() {
    let source = json!({"0": {"enable_kv_cache_events": true, "publisher": "zmq",
        "endpoint": "tcp://*:5557", "replay_endpoint": null}});
    let base = json!({"id": "base", "parent": null});
    let pages: Pages = Arc::new(Mutex::new(BTreeMap::from([
        ("/v1/models", json!({"data": [base]})),
        ("/kv_event_sources", source),
    ])));
    let port = engine(Arc::clone(&pages)).await;
    let server = StandIn::start().await;
    server.put("pods", pod("p", port, false, 0));
    let (sights, queue) = mpsc::channel(4);
    let (events, mut lists) = mpsc::channel(1);
    let rules = Rules {
        namespaces: NamespaceRule::Prefix(String::new()),
        frontend: FrontendRule::None,
        models: Vec::new(),
        brokers: false,
    };
    let backend = watch_with(server.client(), config(Engine::Vllm), models(), sights);
    let task = tokio::spawn(async move {
        tokio::select! {
            () = backend => {}
            () = drive::settle(queue, &rules, &events) => {}
        }
    });
    assert_eq!(taken(&mut lists).await.ranks.len(), 0);
    server.put("pods", pod("p", port, true, 0));
    let first = taken(&mut lists).await;
    let [rank] = first.ranks.as_slice() else { panic!("{first:?}") };
    assert_eq!(rank.spec.endpoint, format!("127.0.0.1:{port}"));
    assert_eq!(rank.spec.role, Role::Decode);
    let Some(RankStream::Engine(stream)) = &rank.stream else { panic!() };
    assert_eq!(stream.events, "127.0.0.1:5557");

    // An adapter is found at one of the next looks.
    let sql = json!({"id": "sql", "parent": "base"});
    pages.lock().unwrap().insert("/v1/models", json!({"data": [base, sql]}));
    assert_eq!(taken(&mut lists).await.adapters.len(), 1);

    // Another life of the engine is listed once it has answered itself.
    server.put("pods", pod("p", port, true, 1));
    let mut again = taken(&mut lists).await;
    if again.ranks.is_empty() {
        again = taken(&mut lists).await;
    }
    assert_ne!(again.ranks[0].spec.incarnation, rank.spec.incarnation);
    server.put("pods", pod("p", port, false, 1));
    assert_eq!(taken(&mut lists).await.ranks.len(), 0);
    task.abort();
}
