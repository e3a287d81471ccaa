//! The endpoint picker, as a gateway sees it: the protocol cases of the Gateway API
//! inference extension that need no cluster, and what a gateway may send beside
//! them.

mod gateway;
mod health;
mod routers;
mod secured;

use serde_json::{Value, json};
use tonic::Code;
use warmpath_sidecar::config::Config;
use warmpath_sidecar::picker::proto::{BodyMode, Part, ProcessingRequest, Reply};
use warmpath_sidecar::run::Sidecar;

use crate::support::*;
use gateway::{BUFFERED, DUPLEX, Exchange, Mutated, headers, mutated, streamed};

const DESTINATION: &str = "x-gateway-destination-endpoint";
const WARM: &str = "127.0.0.1:7007";
const COLD: &str = "127.0.0.1:8008";
const COMPLETIONS: &str = "/v1/completions";

/// What the picker of a test is like.
const PICKER: &str = "picker: {listen: \"127.0.0.1:0\", health_listen: \"127.0.0.1:0\", secure: false, debug_headers: true";

/// A sidecar with its picker, and two workers of which one holds the first 8
/// blocks of [`prompt`].
struct Stack {
    sidecar: Sidecar,
    _publishers: [Publisher; 2],
}

impl Stack {
    async fn start() -> Self {
        Self::start_with("threads: 1").await
    }

    async fn start_with(picker: &str) -> Self {
        let mut publishers = [
            Publisher::start(ReplayForm::WithTopic).await,
            Publisher::start(ReplayForm::WithTopic).await,
        ];
        let worker = |id: u64, endpoint: &str, publisher: &Publisher| {
            format!(
                "{{id: {id}, model: tiny, endpoint: {endpoint:?}, total_kv_blocks: 1000, \
                 kv_events: \"tcp://127.0.0.1:{}\", replay: \"tcp://127.0.0.1:{}\"}}",
                publisher.events, publisher.replay
            )
        };
        let workers = [worker(7, WARM, &publishers[0]), worker(8, COLD, &publishers[1])];
        let rest = format!("workers: [{}]\n{PICKER}, {picker}}}", workers.join(", "));
        let sidecar = Sidecar::start(config(3_000, &rest)).await.unwrap();
        ready(&sidecar).await;
        let tokens: Vec<u32> = prompt(8);
        let blocks: Vec<u64> = (1..=8).collect();
        publishers[0].publish(batch(&[stored(&blocks, None, &tokens)])).await;
        let stack = Self { sidecar, _publishers: publishers };
        // Until the picker's own index shows it.
        let metrics = async || page(&stack.sidecar, "/metrics").await.1;
        eventually("the index is live", || async {
            metrics().await.contains("warmpath_picker_index_live 1\n")
        })
        .await;
        eventually("the warm worker is known", || async {
            stack
                .complete(DUPLEX, 10)
                .await
                .1
                .get("x-warmpath-predicted-cached-tokens")
                .map(String::as_str)
                == Some("32")
        })
        .await;
        stack
    }

    fn picker(&self) -> std::net::SocketAddr {
        self.sidecar.picker.as_ref().unwrap().address
    }

    async fn open(&self, modes: (BodyMode, BodyMode)) -> Exchange {
        Exchange::open(self.picker(), modes).await
    }

    /// A whole completion of a prompt of so many blocks: what named it, and the
    /// response's headers.
    async fn complete(
        &self,
        modes: (BodyMode, BodyMode),
        blocks: u32,
    ) -> (Mutated, std::collections::BTreeMap<String, String>) {
        let mut exchange = self.open(modes).await;
        exchange.post(COMPLETIONS).await;
        if modes == BUFFERED {
            exchange.reply().await;
        }
        exchange.body(completion(blocks), true).await;
        let named = mutated(exchange.reply().await);
        if modes == DUPLEX {
            // It may have tokens behind it.
            let sent = completion(blocks);
            assert!(exchange.whole_body(false).await.starts_with(&sent[..sent.len() - 1]));
        }
        exchange.respond("200", false).await;
        let told = mutated(exchange.reply().await);
        exchange.response_body("{\"choices\":[]}", true).await;
        exchange.reply().await;
        (named, told.set)
    }

    /// A number of the metrics page.
    async fn count(&self, name: &str) -> u64 {
        let page = page(&self.sidecar, "/metrics").await.1;
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or("0").parse().unwrap_or_else(|_| panic!("{name}: {line:?}"))
    }

    /// Waits until all that was booked is freed.
    async fn all_freed(&self) {
        eventually("all is freed", || async {
            let made = self.count("warmpath_bookings_made_total").await;
            made > 0 && made == self.count("warmpath_bookings_freed_total").await
        })
        .await;
    }
}

/// Tokens of so many blocks, all different.
fn prompt(blocks: u32) -> Vec<u32> {
    (0..blocks * BLOCK).map(|token| 1 + token).collect()
}

fn completion(blocks: u32) -> Vec<u8> {
    json!({"model": "tiny", "prompt": prompt(blocks), "max_tokens": 1}).to_string().into_bytes()
}

fn error(body: &[u8]) -> Value {
    serde_json::from_slice::<Value>(body).unwrap()["error"].clone()
}

/// Goal: the one who holds the prompt is named, in header and metadata alike, in
/// both modes; the answer frees what was booked.
#[tokio::test]
async fn the_warm_worker_is_named_in_header_and_metadata() {
    let stack = Stack::start().await;
    for modes in [BUFFERED, DUPLEX] {
        let (named, told) = stack.complete(modes, 12).await;
        assert_eq!(named.set[DESTINATION], WARM);
        assert_eq!(named.destination.as_deref(), Some(WARM), "must equal the header");
        assert_eq!(named.set["x-dynamo-worker-instance-id"], "7");
        assert_eq!(named.set["x-dynamo-dp-rank"], "0");
        assert_eq!(named.set["x-dynamo-routing-mode"], "aggregated");
        assert_eq!(named.reason.as_deref(), Some("kv"));
        assert!(named.clears_route && named.body.is_none());
        assert_eq!(told["x-warmpath-reason"], "kv");
        assert_eq!(told["x-warmpath-predicted-cached-tokens"], "32");
        assert_eq!(
            (told["x-warmpath-worker"].as_str(), told["x-warmpath-endpoint"].as_str()),
            ("7", WARM)
        );
    }
    stack.all_freed().await;
    stack.sidecar.stop().await;
}

/// Goal: streamed both ways, nothing is answered before the body is whole, in
/// however many pieces it comes; it comes back as it was.
#[tokio::test]
async fn a_streamed_body_is_held_until_it_is_whole() {
    let stack = Stack::start().await;
    let mut body = completion(12);
    body.extend(std::iter::repeat_n(b' ', 200_000));
    let mut exchange = stack.open(DUPLEX).await;
    exchange.post(COMPLETIONS).await;
    let pieces: Vec<&[u8]> = body.chunks(7_001).collect();
    let (last, others) = pieces.split_last().unwrap();
    for piece in others {
        exchange.body(piece.to_vec(), false).await;
    }
    assert!(exchange.is_silent().await, "not before the end");
    exchange.body(last.to_vec(), true).await;
    let named = mutated(exchange.reply().await);
    assert_eq!(named.set[DESTINATION], WARM);
    assert_eq!(exchange.whole_body(false).await, body);
    stack.sidecar.stop().await;
}

/// Goal: a request that ends with trailers is complete, too.
#[tokio::test]
async fn trailers_end_a_body() {
    let stack = Stack::start().await;
    let mut exchange = stack.open(DUPLEX).await;
    exchange.post(COMPLETIONS).await;
    exchange.body(completion(12), false).await;
    assert!(exchange.is_silent().await);
    exchange.trailers().await;
    assert_eq!(mutated(exchange.reply().await).set[DESTINATION], WARM);
    assert_eq!(exchange.whole_body(true).await, completion(12));
    let mut exchange = stack.open(BUFFERED).await;
    exchange.post(COMPLETIONS).await;
    exchange.reply().await;
    exchange.body(completion(12), false).await;
    assert_eq!(mutated(exchange.reply().await).set[DESTINATION], WARM);
    exchange.trailers().await;
    assert!(matches!(exchange.reply().await.response, Some(Reply::RequestTrailers(_))));
    stack.sidecar.stop().await;
}

/// Goal: what has no body, and what is no path of ours, has a destination at once.
#[tokio::test]
async fn requests_without_a_prompt_have_a_destination_at_once() {
    let stack = Stack::start().await;
    for (method, path, ends, reason) in [
        ("GET", "/v1/models", true, "by_load_api"),
        ("GET", "/health", true, "not_our_path"),
        ("POST", "/tokenize", false, "not_our_path"),
        ("POST", COMPLETIONS, true, "unparsed"),
    ] {
        for modes in [DUPLEX, BUFFERED] {
            let mut exchange = stack.open(modes).await;
            exchange.headers(method, path, &[], ends).await;
            let named = mutated(exchange.reply().await);
            assert!([WARM, COLD].contains(&named.set[DESTINATION].as_str()), "{path}");
            assert_eq!(named.destination, named.set.get(DESTINATION).cloned());
            assert_eq!(named.reason.as_deref(), Some(reason), "{path}");
            if !ends {
                exchange.body("abc", false).await;
                exchange.body("", true).await;
                let [first, second] = [exchange.reply().await, exchange.reply().await];
                let (Some(Reply::RequestBody(first)), Some(Reply::RequestBody(second))) =
                    (first.response, second.response)
                else {
                    panic!("a reply to each piece");
                };
                if modes == DUPLEX {
                    assert_eq!(streamed(first), ("abc".into(), false));
                    assert_eq!(streamed(second), ("".into(), true));
                }
            }
        }
    }
    stack.all_freed().await;
    stack.sidecar.stop().await;
}

/// Goal: whatever a client says of workers goes, in headers and in the body.
#[tokio::test]
async fn a_client_does_not_name_its_worker() {
    let stack = Stack::start().await;
    let spoofed = [
        (DESTINATION, COLD),
        ("X-Dynamo-Worker-Instance-Id", "8"),
        ("x-worker-instance-id", "8"),
        ("x-prefiller-host-port", COLD),
        ("x-llm-d-anything", "8"),
        ("x-tenant-id", "a"),
        ("x-warmpath-worker", "8"),
        ("x-gateway-destination-endpoint-subset", COLD),
        ("x-request-id", "kept"),
    ];
    let body = json!({
        "model": "tiny", "prompt": prompt(12),
        "nvext": {"backend_instance_id": 8, "extra_fields": ["worker_id"], "decode_worker_id": 8},
    })
    .to_string();
    let edited =
        body.replace("\"backend_instance_id\":8,", "").replace("\"decode_worker_id\":8,", "");
    let length = body.len().to_string();
    let mut sent = spoofed.to_vec();
    sent.push(("content-length", &length));
    for modes in [DUPLEX, BUFFERED] {
        let mut exchange = stack.open(modes).await;
        exchange.headers("POST", COMPLETIONS, &sent, false).await;
        let mut removed = Vec::new();
        if modes == BUFFERED {
            removed = mutated(exchange.reply().await).removed;
        }
        exchange.body(body.clone(), true).await;
        let named = mutated(exchange.reply().await);
        removed.extend(named.removed);
        let mut all: Vec<&str> = removed.iter().map(String::as_str).collect();
        all.extend(named.set.keys().map(String::as_str));
        for (name, _) in &spoofed[..spoofed.len() - 1] {
            let name = name.to_ascii_lowercase();
            assert!(all.contains(&name.as_str()), "{name} goes, or is ours");
        }
        assert!(!all.contains(&"x-request-id"));
        assert_eq!(named.set[DESTINATION], WARM);
        assert_eq!(named.set["x-dynamo-worker-instance-id"], "7");
        assert_eq!(named.set["content-length"], edited.len().to_string());
        let got: Value = match named.body {
            Some(body) => serde_json::from_slice(&body).unwrap(),
            None => serde_json::from_slice(&exchange.whole_body(false).await).unwrap(),
        };
        assert_eq!(got, serde_json::from_str::<Value>(&edited).unwrap());
    }
    // On requests without a body as well.
    let mut exchange = stack.open(DUPLEX).await;
    exchange.headers("GET", "/v1/models", &spoofed, true).await;
    let named = mutated(exchange.reply().await);
    assert!(named.removed.contains(&"x-worker-instance-id".to_owned()));
    assert_eq!(stack.count("warmpath_headers_stripped_total").await, 24);
    stack.sidecar.stop().await;
}

/// Goal: tokens are handed over where that is asked for, and are the prompt's.
#[tokio::test]
async fn tokens_are_handed_over_if_configured() {
    let stack = Stack::start_with("token_data: true, legacy_headers: true").await;
    let body = json!({"model": "tiny", "prompt": "Hello, world. Hello, world."}).to_string();
    let mut exchange = stack.open(BUFFERED).await;
    exchange.post(COMPLETIONS).await;
    exchange.reply().await;
    exchange.body(body, true).await;
    let named = mutated(exchange.reply().await);
    let got: Value = serde_json::from_slice(&named.body.unwrap()).unwrap();
    assert!(!got["nvext"]["token_data"].as_array().unwrap().is_empty());
    assert_eq!(named.set["x-worker-instance-id"], named.set["x-dynamo-worker-instance-id"]);
    stack.sidecar.stop().await;
}

/// Goal: the gateway's hint leaves the workers that it names, and no others;
/// nothing that a client could say widens it.
#[tokio::test]
async fn the_subset_hint_is_obeyed() {
    use prost_types::value::Kind;
    let stack = Stack::start().await;
    let hint = ("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset");
    for (hosts, expected) in [
        (Kind::StringValue(COLD.to_owned()), Some(COLD)),
        (Kind::StringValue(format!("10.0.0.1:1, {COLD}")), Some(COLD)),
        (Kind::StringValue("127.0.0.1".to_owned()), Some(WARM)),
        (Kind::StringValue(String::new()), None),
        (Kind::StringValue("nonsense".to_owned()), None),
        (Kind::NumberValue(1.0), None),
        (Kind::NullValue(0), Some(WARM)),
    ] {
        let mut exchange = stack.open(DUPLEX).await;
        exchange.say(hint.0, hint.1, hosts.clone());
        exchange.post(COMPLETIONS).await;
        exchange.body(completion(12), true).await;
        match expected {
            Some(expected) => {
                assert_eq!(mutated(exchange.reply().await).set[DESTINATION], expected, "{hosts:?}");
            }
            None => {
                let answer = exchange.answer().await;
                assert_eq!(answer.status.unwrap().code, 503, "{hosts:?}");
                assert_eq!(error(&answer.body)["code"], "no_hosts");
            }
        }
    }
    for (hosts, expected) in [(&[COLD][..], Some(COLD)), (&["bad", WARM], Some(WARM)), (&[], None)]
    {
        // Of requests without a body, too.
        let mut exchange = stack.open(BUFFERED).await;
        exchange.allow(hosts);
        exchange.headers("GET", "/v1/models", &[], true).await;
        match expected {
            Some(expected) => {
                assert_eq!(mutated(exchange.reply().await).set[DESTINATION], expected)
            }
            None => assert_eq!(exchange.answer().await.status.unwrap().code, 503),
        }
    }
    assert_eq!(stack.count("warmpath_subset_malformed_total").await, 3);
    stack.sidecar.stop().await;
}

/// Goal: what the gateway says of who has served is counted and shown.
#[tokio::test]
async fn the_served_endpoint_is_reported() {
    let stack = Stack::start().await;
    for served in [WARM, COLD] {
        let mut exchange = stack.open(DUPLEX).await;
        exchange.post(COMPLETIONS).await;
        exchange.body(completion(12), true).await;
        assert_eq!(mutated(exchange.reply().await).set[DESTINATION], WARM);
        exchange.whole_body(false).await;
        let text = prost_types::value::Kind::StringValue(served.to_owned());
        exchange.say("envoy.lb", "x-gateway-destination-endpoint-served", text);
        exchange.respond("200", false).await;
        assert_eq!(mutated(exchange.reply().await).set["x-warmpath-served"], served);
    }
    for result in ["chosen", "other"] {
        let name = format!("warmpath_picker_served_total{{result=\"{result}\"}}");
        assert_eq!(stack.count(&name).await, 1, "{result}");
    }
    stack.sidecar.stop().await;
}

/// Goal: errors are answered as the filter answers them.
#[tokio::test]
async fn errors_are_answers_that_clients_can_read() {
    let stack = Stack::start_with("trust_pins: true").await;
    let json_header = |answer: &warmpath_sidecar::picker::proto::ImmediateResponse| {
        let set = &answer.headers.as_ref().unwrap().set_headers;
        set.iter().any(|it| it.header.as_ref().unwrap().raw_value == "application/json")
    };
    for modes in [DUPLEX, BUFFERED] {
        let mut exchange = stack.open(modes).await;
        exchange.post("/v1/chat/completions").await;
        if modes == BUFFERED {
            exchange.reply().await;
        }
        exchange.body("{\"messages\": 1}", true).await;
        let answer = exchange.answer().await;
        assert_eq!((answer.status.unwrap().code, answer.details.as_str()), (400, "unparsed_type"));
        assert!(json_header(&answer));
        let error = error(&answer.body);
        assert_eq!(
            (error["type"].as_str(), error["param"].as_str()),
            (Some("invalid_request_error"), Some("messages"))
        );
    }
    let mut exchange = stack.open(DUPLEX).await;
    exchange.headers("POST", COMPLETIONS, &[("x-dynamo-request-priority", "first")], false).await;
    let answer = exchange.answer().await;
    assert_eq!((answer.status.unwrap().code, answer.details.as_str()), (400, "bad_header"));
    let mut exchange = stack.open(DUPLEX).await;
    exchange.headers("POST", COMPLETIONS, &[("x-dynamo-worker-instance-id", "99")], false).await;
    exchange.body(completion(2), true).await;
    let answer = exchange.answer().await;
    assert_eq!((answer.status.unwrap().code, answer.details.as_str()), (400, "unknown_pin"));
    let reasons = "warmpath_decisions_total{reason=\"bad_request\"}";
    assert_eq!(stack.count(reasons).await, 3);
    assert_eq!(
        stack.count("warmpath_bookings_made_total").await,
        stack.count("warmpath_bookings_freed_total").await
    );
    stack.sidecar.stop().await;
}

/// Goal: without a worker, a request is answered 503 and may be tried again.
#[tokio::test]
async fn without_workers_requests_are_answered() {
    let sidecar = Sidecar::start(config(0, &format!("workers: []\n{PICKER}}}"))).await.unwrap();
    let picker = sidecar.picker.as_ref().unwrap().address;
    for path in [COMPLETIONS, "/else"] {
        let mut exchange = Exchange::open(picker, DUPLEX).await;
        exchange.post(path).await;
        exchange.body(completion(2), true).await;
        let answer = exchange.answer().await;
        assert_eq!(answer.status.unwrap().code, 503);
        assert_eq!(error(&answer.body)["code"], "no_workers");
        let set = answer.headers.unwrap().set_headers;
        assert!(set.iter().any(|it| it.header.as_ref().unwrap().key == "retry-after"));
    }
    sidecar.stop().await;
}

/// Goal: a body that is too long to be looked at, and modes in which the headers
/// leave before the body is here, are routed by load, and lose nothing.
#[tokio::test]
async fn what_is_not_looked_at_goes_by_load() {
    let stack = Stack::start_with("body_bytes_max: 2000").await;
    let body = vec![b'x'; 5_000];
    let mut exchange = stack.open(DUPLEX).await;
    exchange.post(COMPLETIONS).await;
    for piece in body.chunks(900) {
        exchange.body(piece.to_vec(), false).await;
    }
    exchange.body("", true).await;
    let named = mutated(exchange.reply().await);
    assert_eq!(named.reason.as_deref(), Some("body_too_large"));
    assert!(named.set.contains_key(DESTINATION));
    assert_eq!(exchange.whole_body(false).await, body);
    drop(exchange);
    // Announced.
    let mut exchange = stack.open(DUPLEX).await;
    exchange.headers("POST", COMPLETIONS, &[("content-length", "5000")], false).await;
    assert_eq!(mutated(exchange.reply().await).reason.as_deref(), Some("body_too_large"));
    drop(exchange);
    // Held by the gateway.
    for (mode, ends) in [(BodyMode::Buffered, true), (BodyMode::BufferedPartial, false)] {
        let mut exchange = stack.open((mode, BodyMode::None)).await;
        exchange.post(COMPLETIONS).await;
        exchange.reply().await;
        exchange.body(if ends { body.clone() } else { completion(12) }, ends).await;
        let named = mutated(exchange.reply().await);
        assert_eq!(named.reason.as_deref(), Some("body_too_large"), "{mode:?}");
        assert!(named.set.contains_key(DESTINATION) && named.body.is_none());
    }
    for mode in [BodyMode::None, BodyMode::Streamed] {
        let mut exchange = stack.open((mode, BodyMode::None)).await;
        exchange.post(COMPLETIONS).await;
        let named = mutated(exchange.reply().await);
        assert_eq!(named.reason.as_deref(), Some("wrong_pairing"));
        assert!(named.set.contains_key(DESTINATION));
    }
    // A gateway that says nothing of its modes speaks as the contract has it.
    stack.all_freed().await;
    let channel = gateway::connect(stack.picker()).await;
    let mut exchange = Exchange::try_open(channel, None).await.unwrap();
    exchange.post(COMPLETIONS).await;
    exchange.body(completion(12), true).await;
    assert_eq!(mutated(exchange.reply().await).set[DESTINATION], WARM);
    stack.sidecar.stop().await;
}

/// Goal: parts out of order end the stream, and nothing else.
#[tokio::test]
async fn parts_out_of_order_end_the_stream() {
    let stack = Stack::start().await;
    let mut exchange = stack.open(DUPLEX).await;
    exchange.body("{}", true).await;
    assert_eq!(exchange.next().await.unwrap_err().code(), Code::InvalidArgument);
    let mut exchange = stack.open(DUPLEX).await;
    exchange.post(COMPLETIONS).await;
    exchange.post(COMPLETIONS).await;
    assert_eq!(exchange.next().await.unwrap_err().code(), Code::InvalidArgument);
    let mut exchange = stack.open(DUPLEX).await;
    let part = Part::RequestHeaders(headers(&[(":method", "GET"), (":path", "/")], true));
    let observing = ProcessingRequest {
        observability_mode: true,
        request: Some(part),
        ..ProcessingRequest::default()
    };
    exchange.send_message(observing).await;
    assert_eq!(exchange.next().await.unwrap_err().code(), Code::FailedPrecondition);
    // A message that says nothing is none of these.
    let mut exchange = stack.open(DUPLEX).await;
    exchange.send_message(ProcessingRequest::default()).await;
    exchange.headers("GET", "/v1/models", &[], true).await;
    assert!(mutated(exchange.reply().await).set.contains_key(DESTINATION));
    let order = "warmpath_picker_streams_refused_total{reason=\"order\"}";
    assert_eq!(stack.count(order).await, 2);
    stack.sidecar.stop().await;
}

/// Goal: whatever ends a stream frees what was booked, once.
#[tokio::test]
async fn bookings_are_freed_whatever_ends_the_stream() {
    let stack = Stack::start().await;
    stack.all_freed().await;
    let freed = stack.count("warmpath_bookings_freed_total").await;
    for step in 0..5 {
        let mut exchange = stack.open(DUPLEX).await;
        exchange.post(COMPLETIONS).await;
        exchange.body(completion(12), true).await;
        exchange.reply().await;
        exchange.whole_body(false).await;
        if step > 0 {
            exchange.respond("200", step == 1).await;
            exchange.reply().await;
        }
        if step > 2 {
            exchange.response_body("{", false).await;
            exchange.reply().await;
            exchange.response_body("}", step == 3).await;
            exchange.reply().await;
        }
        if step == 4 {
            exchange.send(Part::ResponseTrailers(Default::default())).await;
            exchange.reply().await;
        }
        drop(exchange);
    }
    stack.all_freed().await;
    assert_eq!(stack.count("warmpath_bookings_freed_total").await, freed + 5);
    eventually("no stream is left", || async { stack.count("warmpath_picker_streams").await == 0 })
        .await;
    stack.sidecar.stop().await;
}

/// Goal: responses pass as they are, in every mode, and what the engine reports
/// is compared with the prediction.
#[tokio::test]
async fn responses_pass_and_are_read() {
    let stack = Stack::start().await;
    let usage = "data: {\"choices\":[{\"text\":\"a\"}]}\n\ndata: {\"choices\":[],\"usage\":\
                 {\"prompt_tokens\":48,\"completion_tokens\":1,\"prompt_tokens_details\":\
                 {\"cached_tokens\":32}}}\n\ndata: [DONE]\n\n";
    for mode in [BodyMode::FullDuplexStreamed, BodyMode::Streamed, BodyMode::Buffered] {
        let mut exchange = stack.open((BodyMode::FullDuplexStreamed, mode)).await;
        exchange.post(COMPLETIONS).await;
        exchange.body(completion(12), true).await;
        exchange.reply().await;
        exchange.whole_body(false).await;
        exchange.respond("200", false).await;
        exchange.reply().await;
        let (first, second) = usage.split_at(50);
        for (text, ends) in [(first, false), (second, true)] {
            exchange.response_body(text, ends).await;
            let Some(Reply::ResponseBody(common)) = exchange.reply().await.response else {
                panic!("a reply to the body");
            };
            if mode == BodyMode::FullDuplexStreamed {
                assert_eq!(streamed(common), (text.into(), ends));
            } else {
                assert_eq!(common.response, None);
            }
        }
    }
    let exact = "warmpath_predictions_total{result=\"exact\"}";
    assert_eq!(stack.count(exact).await, 3);
    assert_eq!(stack.count("warmpath_observed_cached_tokens_total").await, 96);
    stack.sidecar.stop().await;
}

/// Goal: threads that choose at once never do so on the same stale load: of
/// requests that come together, all as long and held by nobody, each worker gets
/// exactly half.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn requests_that_come_together_see_each_other() {
    const REQUESTS: u32 = 64;
    let stack = Stack::start_with("threads: 4").await;
    let mut tasks = Vec::new();
    for number in 0..REQUESTS {
        let channel = gateway::connect(stack.picker()).await;
        tasks.push(tokio::spawn(async move {
            let mut exchange = Exchange::try_open(channel, Some(DUPLEX)).await.unwrap();
            exchange.post(COMPLETIONS).await;
            let tokens: Vec<u32> = (0..48).map(|at| 10_000 + number * 100 + at).collect();
            let body = json!({"model": "tiny", "prompt": tokens}).to_string();
            exchange.body(body, true).await;
            let named = mutated(exchange.reply().await);
            (exchange, named.set[DESTINATION].clone())
        }));
    }
    let mut exchanges = Vec::new();
    let mut warm = 0;
    for task in tasks {
        let (exchange, destination) = task.await.unwrap();
        warm += u32::from(destination == WARM);
        exchanges.push(exchange);
    }
    assert_eq!(stack.count("warmpath_picker_streams").await, u64::from(REQUESTS));
    assert_eq!(warm, REQUESTS / 2);
    drop(exchanges);
    stack.all_freed().await;
    stack.sidecar.stop().await;
}

/// Goal: a request that is here when the sidecar is stopped goes on to its end;
/// none is begun.
#[tokio::test]
async fn a_stop_lets_requests_end() {
    let stack = Stack::start().await;
    let channel = gateway::connect(stack.picker()).await;
    let mut exchange = Exchange::try_open(channel.clone(), Some(DUPLEX)).await.unwrap();
    exchange.post(COMPLETIONS).await;
    exchange.body(completion(12), true).await;
    exchange.reply().await;
    exchange.whole_body(false).await;
    let picker = stack.picker();
    let Stack { sidecar, _publishers } = stack;
    let stopping = tokio::spawn(sidecar.stop());
    eventually("nobody is let in", || async {
        tokio::net::TcpStream::connect(picker).await.is_err()
    })
    .await;
    assert!(Exchange::try_open(channel, Some(DUPLEX)).await.is_err());
    exchange.respond("200", false).await;
    exchange.reply().await;
    exchange.response_body("{}", true).await;
    let Some(Reply::ResponseBody(common)) = exchange.reply().await.response else {
        panic!("its end")
    };
    assert_eq!(streamed(common), ("{}".into(), true));
    drop(exchange);
    tokio::time::timeout(PATIENCE, stopping).await.unwrap().unwrap();
}

/// Goal: prefill and decode workers are both named.
#[tokio::test]
async fn both_legs_are_named() {
    let workers = "workers: [{id: 1, model: tiny, endpoint: \"127.0.0.1:11\", role: prefill}, \
                   {id: 2, model: tiny, endpoint: \"127.0.0.1:12\", role: decode}]";
    let config: Config = config(0, &format!("{workers}\n{PICKER}, prefiller_header: true}}"));
    let sidecar = Sidecar::start(config).await.unwrap();
    ready(&sidecar).await;
    let stack_picker = sidecar.picker.as_ref().unwrap().address;
    eventually("there are workers", || async {
        let mut exchange = Exchange::open(stack_picker, DUPLEX).await;
        exchange.headers("GET", "/v1/models", &[], true).await;
        matches!(exchange.reply().await.response, Some(Reply::RequestHeaders(_)))
    })
    .await;
    let mut exchange = Exchange::open(stack_picker, DUPLEX).await;
    exchange.post(COMPLETIONS).await;
    exchange.body(completion(4), true).await;
    let named = mutated(exchange.reply().await);
    assert_eq!(named.set[DESTINATION], "127.0.0.1:12");
    assert_eq!(named.set["x-dynamo-worker-instance-id"], "2");
    assert_eq!(named.set["x-dynamo-prefill-instance-id"], "1");
    assert_eq!(named.set["x-dynamo-routing-mode"], "disaggregated");
    assert_eq!(named.set["x-prefiller-host-port"], "127.0.0.1:11");
    sidecar.stop().await;
}
