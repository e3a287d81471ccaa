//! Tests of the server over a real connection.

use std::path::Path;

use hyper::body::Bytes;
use serde_json::json;

use super::super::batch::Timing;
use super::super::model::Model;
use super::super::publisher::{Publisher, PublisherConfig};
use super::*;
use crate::stack::client::{Chat, Response as Answered, get, post};
use crate::stack::limits::REQUEST_WITHIN;

/// Serves an engine on a free port; its address.
async fn serve(change: impl FnOnce(&mut EngineConfig)) -> String {
    let mut config = EngineConfig {
        name: "engine-7".into(),
        loras: vec!["adapter".into()],
        timing: Timing::NONE,
        ..EngineConfig::default()
    };
    change(&mut config);
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny");
    let publisher = Publisher::start(PublisherConfig {
        events_port: 0,
        replay_port: 0,
        topic: String::new(),
        buffer_steps: 100,
        replay_has_topic: true,
    });
    let engine = Engine::new(Model::load(&directory).unwrap(), publisher.await.unwrap(), &config);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let routes = router(Arc::new(engine), config);
    tokio::spawn(async move { axum::serve(listener, routes).await });
    address
}

fn chat(text: &str, stream: bool) -> Chat {
    Chat { messages: vec![("user", text.into())], max_tokens: 6, stream }
}

async fn send(address: &str, path: &str, body: serde_json::Value) -> Answered {
    post(address, path, &[], body.to_string().into(), REQUEST_WITHIN).await.unwrap()
}

const LONG: &str = "one two three four five six seven eight nine ten and so on until it is long";

#[tokio::test]
async fn a_stream_says_what_a_whole_answer_says() {
    let address = serve(|_| {}).await;
    let whole = chat(LONG, false).send(&address, "qwen3", &[]).await.unwrap();
    let streamed = chat(LONG, true).send(&address, "qwen3", &[]).await.unwrap();
    assert_eq!(whole.text, streamed.text);
    assert_eq!(whole.engine(), Some("engine-7"));
    assert_eq!(whole.prompt_tokens, streamed.prompt_tokens);
    assert_eq!(whole.cached_tokens, 0);
    assert_eq!(streamed.cached_tokens, (whole.prompt_tokens - 1) / 16 * 16);
    let content_type = streamed.response.header("content-type");
    assert_eq!(content_type, Some("text/event-stream"));
}

/// Goal: every refusal has its status and an error object without any of the
/// request in it.
#[tokio::test]
async fn refusals_have_their_status_and_no_request_text() {
    let address = serve(|config| config.model_tokens_max = 100).await;
    let secret = "pineapple";
    let user = json!([{"role": "user", "content": secret}]);
    let long = json!([{"role": "user", "content": "word ".repeat(200)}]);
    let chat = "/v1/chat/completions";
    let cases = [
        (chat, json!({"model": secret, "messages": user}), 404),
        (chat, json!({"model": "qwen3", "messages": []}), 400),
        (chat, json!({"model": "qwen3", "messages": secret}), 400),
        (chat, json!({"model": "qwen3", "messages": [{"content": secret}]}), 400),
        (chat, json!({"model": "qwen3", "messages": user, "max_tokens": secret}), 400),
        (chat, json!({"model": "qwen3", "messages": long}), 400),
        (chat, json!({"messages": user}), 400),
        ("/v1/completions", json!({"model": "qwen3", "prompt": ""}), 400),
        ("/v1/completions", json!({"model": "qwen3", "prompt": []}), 400),
        ("/v1/completions", json!({"model": "qwen3", "prompt": {"a": secret}}), 400),
    ];
    for (path, body, status) in cases {
        let response = send(&address, path, body.clone()).await;
        assert_eq!(response.status.as_u16(), status, "{body}");
        let error = response.json().unwrap();
        assert_eq!(error["error"]["code"], status, "{body}");
        assert!(!error.to_string().contains(secret), "{error}");
    }
    let broken = post(&address, chat, &[], Bytes::from_static(b"{\"model\""), REQUEST_WITHIN);
    assert_eq!(broken.await.unwrap().status.as_u16(), 400);
}

#[tokio::test]
async fn completions_take_text_and_tokens_and_several() {
    let address = serve(|_| {}).await;
    let path = "/v1/completions";
    let prompts =
        [json!("hello there"), json!([5, 6, 7]), json!(["a b", "c d"]), json!([[5], [6]])];
    for (prompt, choices) in prompts.into_iter().zip([1, 1, 2, 2]) {
        let body = json!({"model": "qwen3", "prompt": prompt, "max_tokens": 3});
        let response = send(&address, path, body).await.json().unwrap();
        assert_eq!(response["choices"].as_array().unwrap().len(), choices, "{prompt}");
        assert_eq!(response["usage"]["completion_tokens"], 3 * choices, "{prompt}");
    }
}

/// Goal: adapter and salt have caches of their own, over HTTP too.
#[tokio::test]
async fn adapters_and_salts_are_separate() {
    let address = serve(|_| {}).await;
    let request = |model: &str, salt: serde_json::Value| {
        json!({"model": model, "messages": [{"role": "user", "content": LONG}],
            "max_tokens": 1, "cache_salt": salt})
    };
    let nothing = serde_json::Value::Null;
    for (model, salt) in [("qwen3", json!("s")), ("adapter", nothing.clone()), ("qwen3", nothing)] {
        for again in [false, true] {
            let body = request(model, salt.clone());
            let response = send(&address, "/v1/chat/completions", body).await.json().unwrap();
            let cached = &response["usage"]["prompt_tokens_details"]["cached_tokens"];
            assert_eq!(cached.as_u64().unwrap() > 0, again, "{model} {salt}");
        }
    }
}

#[tokio::test]
async fn pages_and_controls_answer() {
    let address = serve(|_| {}).await;
    chat(LONG, false).send(&address, "qwen3", &[]).await.unwrap();
    let page = get(&address, "/metrics").await.unwrap();
    let page = String::from_utf8(page.body.to_vec()).unwrap();
    for name in [
        "vllm:num_requests_running{",
        "vllm:num_requests_waiting{",
        "vllm:kv_cache_usage_perc{",
        "vllm:prefix_cache_queries_total{",
        "vllm:prefix_cache_hits_total{",
        "vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"1200\"",
    ] {
        assert!(page.contains(name), "{name} is missing in\n{page}");
    }
    let state = get(&address, "/control/state").await.unwrap().json().unwrap();
    assert_eq!(state["next_sequence"], 1);
    assert!(state["blocks_cached"].as_u64().unwrap() > 0);

    let control = |path: &'static str| {
        let address = address.clone();
        async move { post(&address, path, &[], Bytes::new(), REQUEST_WITHIN).await.unwrap().status }
    };
    assert_eq!(control("/control/clear").await, StatusCode::NO_CONTENT);
    let state = get(&address, "/control/state").await.unwrap().json().unwrap();
    assert_eq!((&state["next_sequence"], &state["blocks_cached"]), (&json!(2), &json!(0)));
    assert_eq!(control("/control/restart?cache=lose").await, StatusCode::NO_CONTENT);
    assert_eq!(control("/control/restart?cache=what").await, StatusCode::BAD_REQUEST);
    assert_eq!(control("/control/events?drop_every=3&pause=false").await, StatusCode::NO_CONTENT);
    let state = get(&address, "/control/state").await.unwrap().json().unwrap();
    assert_eq!(state["next_sequence"], 0);
    let sources = get(&address, "/kv_event_sources").await.unwrap().json().unwrap();
    assert_eq!(sources["0"]["publisher"], "zmq");
    let models = get(&address, "/v1/models").await.unwrap().json().unwrap();
    assert_eq!(models["data"].as_array().unwrap().len(), 2);
}

/// Goal: the tokens that a gateway sends along are compared, not believed.
#[tokio::test]
async fn token_data_is_compared() {
    let address = serve(|_| {}).await;
    let request = json!({"model": "qwen3", "max_tokens": 1, "nvext": {"token_data": [1, 2]},
        "messages": [{"role": "user", "content": "hi"}]});
    send(&address, "/v1/chat/completions", request).await;
    let state = get(&address, "/control/state").await.unwrap().json().unwrap();
    assert_eq!(state["token_data_different"], 1);
    assert_eq!(state["token_data_equal"], 0);
}

/// Goal: a long prompt, tokenized elsewhere, is counted like a short one.
#[tokio::test]
async fn long_prompts_are_tokenized_off_the_thread() {
    let address = serve(|config| config.blocks = 20_000).await;
    let tokens = async |text: String| {
        let body = json!({"model": "qwen3", "prompt": text, "max_tokens": 1});
        let response = send(&address, "/v1/completions", body).await.json().unwrap();
        response["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let words = |count: usize| "return ".repeat(count);
    assert!(words(12_000).len() > INLINE_BODY_BYTES_MAX);
    let per_thousand = tokens(words(2_000)).await - tokens(words(1_000)).await;
    let long = tokens(words(12_000)).await - tokens(words(2_000)).await;
    assert_eq!(long, 10 * per_thousand);
}

/// Goal: a stream is the same with its head early or late, and its pieces carry
/// their tokens where that is asked for; a chat's tokens are to be had without an
/// answer.
#[tokio::test]
async fn streams_and_tokens_are_to_be_had_in_several_ways() {
    let mut texts = Vec::new();
    for early_head in [true, false] {
        let address = serve(|config| config.early_head = early_head).await;
        let body = json!({"model": "qwen3", "prompt": [5, 6, 7, 8], "max_tokens": 3,
            "stream": true, "return_token_ids": true});
        let stream = send(&address, "/v1/completions", body).await;
        let stream = String::from_utf8_lossy(&stream.body).into_owned();
        assert_eq!(stream.matches("\"token_ids\":[").count(), 4, "{stream}");
        texts.push(stream);

        let messages = json!([{"role": "user", "content": "hello there"}]);
        let chat = json!({"model": "qwen3", "messages": messages, "max_tokens": 1});
        let path = "/v1/chat/completions/render";
        let rendered = send(&address, path, chat.clone()).await.json().unwrap();
        let answer = send(&address, "/v1/chat/completions", chat).await.json().unwrap();
        let tokens = rendered["token_ids"].as_array().unwrap().len() as u64;
        assert_eq!(answer["usage"]["prompt_tokens"].as_u64(), Some(tokens));
    }
    assert_eq!(texts[0], texts[1]);
}
