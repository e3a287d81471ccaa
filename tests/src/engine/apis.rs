//! Apis: those that leave nothing in the cache. They answer in their shapes, and
//! with nothing of the request in them.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use axum::routing::post;
use serde_json::{Value, json};

use super::http::{Refusal, Server, json_response, parse};
use super::openai::Common;

/// Request headers by which a gateway tells which workers it has chosen.
const TOLD: [&str; 8] = [
    "x-dynamo-worker-instance-id",
    "x-dynamo-dp-rank",
    "x-dynamo-prefill-instance-id",
    "x-dynamo-prefill-dp-rank",
    "x-worker-instance-id",
    "x-dp-rank",
    "x-prefill-instance-id",
    "x-prefill-dp-rank",
];

/// Their routes.
pub(super) fn routes() -> Router<Arc<Server>> {
    Router::new()
        .route("/v1/responses", post(responses))
        .route("/v1/embeddings", post(embeddings))
        .route("/v1/messages", post(messages))
}

/// What the request's headers tell of workers: `name=value`, with commas.
pub(super) fn told(headers: &HeaderMap) -> String {
    let values = TOLD.iter().flat_map(|name| {
        let values = headers.get_all(*name).iter();
        values.map(move |value| format!("{name}={}", value.to_str().unwrap_or("?")))
    });
    values.collect::<Vec<_>>().join(",")
}

fn model(server: &Server, body: &[u8]) -> Result<String, Refusal> {
    let request: Common = parse(body)?;
    server.keys(&request)?;
    Ok(request.model)
}

fn answer(value: &Value) -> Response {
    json_response(StatusCode::OK, value)
}

async fn responses(State(server): State<Arc<Server>>, body: Bytes) -> Result<Response, Refusal> {
    let model = model(&server, &body)?;
    let part = json!({"type": "output_text", "text": "yes", "annotations": []});
    let output = json!([{"type": "message", "role": "assistant", "content": [part]}]);
    Ok(answer(&json!({"object": "response", "status": "completed", "model": model,
        "output": output})))
}

async fn embeddings(State(server): State<Arc<Server>>, body: Bytes) -> Result<Response, Refusal> {
    let model = model(&server, &body)?;
    let data = json!([{"object": "embedding", "index": 0, "embedding": [0.0, 1.0]}]);
    Ok(answer(&json!({"object": "list", "model": model, "data": data})))
}

async fn messages(State(server): State<Arc<Server>>, body: Bytes) -> Result<Response, Refusal> {
    let model = model(&server, &body)?;
    let content = json!([{"type": "text", "text": "yes"}]);
    Ok(answer(&json!({"type": "message", "role": "assistant", "model": model,
        "content": content, "stop_reason": "end_turn"})))
}
