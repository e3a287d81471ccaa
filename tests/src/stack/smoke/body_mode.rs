//! Body mode: the choice travels in the body, on stock plugin settings.
//!
//! A second gateway with the same sidecar, in mode `body`, in front of frontends
//! that answer with what they received. A real frontend in direct mode forwards
//! to the worker that the body names; here the body itself is looked at.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::State;
use hyper::body::Bytes;
use hyper::{HeaderMap, Method};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::super::client::{Response, call, post};
use super::super::launch::{MODEL, Stack, local};
use super::super::limits::{ENGINES, POLL_START, READY_WITHIN, REQUEST_WITHIN};
use super::super::report::Report;

/// What the frontends received last.
pub(super) type Received = Arc<Mutex<(HeaderMap, Bytes)>>;

const PATH: &str = "/v1/chat/completions";

/// Members of `nvext` by which a body names workers.
const ROUTING: [&str; 5] =
    ["backend_instance_id", "decode_worker_id", "prefill_worker_id", "dp_rank", "prefill_dp_rank"];

/// Starts frontends and the gateway, and looks at what arrives.
pub(super) async fn check(stack: &mut Stack, report: &mut Report) {
    let received = Received::default();
    let ports = match frontends(&received).await {
        Ok(ports) => ports,
        Err(error) => return report.failure("frontends for mode `body` start", error),
    };
    // Without a sidecar the new gateway has no worker to name.
    stack.kill_sidecar().await;
    if let Err(error) = stack.start_body_gateway(ports).await {
        return report.failure("the gateway in mode `body` starts", error);
    }
    let gateway = local(stack.ports.body);
    unbooked_obeys_no_client(&gateway, &received, report).await;
    if let Err(error) = stack.start_sidecar().await {
        return report.failure("the sidecar starts again", error);
    }
    if !warm(&gateway).await {
        return report.failure("mode `body` routes by cache", "not in time");
    }
    names_the_worker(&gateway, &received, report).await;
    obeys_no_client(&gateway, &received, report).await;
    passes_on_the_rest(&gateway, &received, report).await;
    other_apis(&gateway, &received, report).await;
}

pub(super) async fn frontends(received: &Received) -> std::io::Result<[u16; ENGINES]> {
    let mut ports = [0; ENGINES];
    for port in &mut ports {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        *port = listener.local_addr()?.port();
        let app = Router::new().fallback(keep).with_state(received.clone());
        // Ends with the process; a frontend that fails shows as a 503 above.
        tokio::spawn(async move { axum::serve(listener, app).await });
    }
    Ok(ports)
}

async fn keep(State(received): State<Received>, headers: HeaderMap, body: Bytes) -> &'static str {
    // Envoy looks after their health; that is no request.
    let is_request = headers.contains_key("x-forwarded-proto");
    if let Some(mut last) = received.lock().ok().filter(|_| is_request) {
        *last = (headers, body);
    }
    "{}"
}

pub(super) fn last(received: &Received) -> Value {
    let bytes = received.lock().map(|last| last.1.clone()).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

async fn send(gateway: &str, body: &Value) -> Option<Response> {
    let bytes = Bytes::from(body.to_string());
    post(gateway, PATH, &[], bytes, REQUEST_WITHIN).await.ok()
}

fn chat(extra: &Value) -> Value {
    let text = "a sentence that fills more than one block of tokens, and then some more of it";
    let mut body = json!({
        "model": MODEL, "messages": [{ "role": "user", "content": text }],
        "temperature": 1e-7, "seed": 12_345_678_901_234_567_890_u64
    });
    if let (Some(body), Some(extra)) = (body.as_object_mut(), extra.as_object()) {
        body.extend(extra.clone());
    }
    body
}

/// Waits until a request is decided by cache.
pub(super) async fn warm(gateway: &str) -> bool {
    let deadline = std::time::Instant::now() + READY_WITHIN;
    while std::time::Instant::now() < deadline {
        let answer = send(gateway, &chat(&json!({}))).await;
        if answer.is_some_and(|answer| answer.header("x-warmpath-reason") == Some("kv")) {
            return true;
        }
        tokio::time::sleep(POLL_START).await;
    }
    false
}

pub(super) fn named(body: &Value) -> Option<u64> {
    let nvext = body.get("nvext")?;
    let worker = nvext.get("backend_instance_id")?.as_u64()?;
    let same = nvext.get("decode_worker_id")?.as_u64()? == worker;
    (same && nvext.get("dp_rank")?.as_u64() == Some(0)).then_some(worker)
}

async fn names_the_worker(gateway: &str, received: &Received, report: &mut Report) {
    let answer = send(gateway, &chat(&json!({}))).await;
    let chosen = answer.as_ref().and_then(|answer| answer.number("x-warmpath-worker"));
    let named = named(&last(received));
    report.check(
        "mode `body` names the chosen worker in the body",
        named.is_some() && named == chosen,
        format_args!("chosen {chosen:?}, named {named:?}"),
    );
}

/// A request in which the client names workers in every way.
fn spoof() -> Value {
    let mut nvext = json!({ "extra_fields": ["worker_id"] });
    if let Some(nvext) = nvext.as_object_mut() {
        nvext.extend(ROUTING.map(|member| (member.to_owned(), json!(777))));
    }
    chat(&json!({ "nvext": nvext }))
}

async fn unbooked_obeys_no_client(gateway: &str, received: &Received, report: &mut Report) {
    let answer = send(gateway, &spoof()).await;
    let reason = answer.as_ref().and_then(|answer| answer.header("x-warmpath-reason"));
    let body = last(received);
    let left = body.get("nvext").cloned().unwrap_or_default();
    report.check(
        "mode `body` without a sidecar removes a worker that the client names",
        reason == Some("warming") && left == json!({ "extra_fields": ["worker_id"] }),
        format_args!("reason {reason:?}, left {left}"),
    );
}

async fn obeys_no_client(gateway: &str, received: &Received, report: &mut Report) {
    let answer = send(gateway, &spoof()).await;
    let chosen = answer.as_ref().and_then(|answer| answer.number("x-warmpath-worker"));
    let body = last(received);
    let spoofed = ROUTING
        .iter()
        .any(|member| body.get("nvext").and_then(|n| n.get(member)) == Some(&json!(777)));
    let kept = body.pointer("/nvext/extra_fields") == Some(&json!(["worker_id"]));
    report.check(
        "mode `body` overrides a worker that the client names",
        chosen.is_some() && named(&body) == chosen && !spoofed && kept,
        format_args!("chosen {chosen:?}, spoofed {spoofed}, other members kept {kept}"),
    );
}

async fn passes_on_the_rest(gateway: &str, received: &Received, report: &mut Report) {
    let mut same = 0;
    for bytes in [10, 10_000, 300_000] {
        let sent = chat(&json!({ "user": "u".repeat(bytes) }));
        let is_ok = send(gateway, &sent).await.is_some_and(|answer| answer.status.is_success());
        let mut body = last(received);
        if let Some(body) = body.as_object_mut() {
            body.remove("nvext");
        }
        same += u32::from(is_ok && body == sent);
    }
    report.check(
        "mode `body` passes on the rest of the body as it is",
        same == 3,
        format_args!("{same} of 3 bodies, up to 300 KB"),
    );
}

/// The APIs whose frontends read `nvext` get it, the others nothing.
async fn other_apis(gateway: &str, received: &Received, report: &mut Report) {
    let body = json!({"model": MODEL, "input": "hello", "messages": [],
        "nvext": {"decode_worker_id": 777, "annotations": []}});
    let unnamed = json!({"model": MODEL, "input": "hello", "messages": [],
        "nvext": {"annotations": []}});
    for (path, is_named) in
        [("/v1/responses", true), ("/v1/messages", true), ("/v1/embeddings", false)]
    {
        let bytes = Bytes::from(body.to_string());
        let answer = post(gateway, path, &[], bytes, REQUEST_WITHIN).await.ok();
        let chosen = answer.as_ref().and_then(|answer| answer.number("x-warmpath-worker"));
        let reason = answer.as_ref().and_then(|answer| answer.header("x-warmpath-reason"));
        let arrived = last(received);
        let fits = if is_named {
            chosen.is_some() && named(&arrived) == chosen && reason == Some("by_load_api")
        } else {
            chosen.is_none() && arrived == unnamed && reason == Some("not_our_path")
        };
        report.check(
            &format!("mode `body`, {path}: {}", if is_named { "names" } else { "passes on" }),
            fits,
            format_args!("chosen {chosen:?}, reason {reason:?}, arrived {arrived}"),
        );
    }
    let answer =
        call(gateway, Method::GET, "/v1/models", &[], Bytes::new(), REQUEST_WITHIN).await.ok();
    let chosen = answer.as_ref().and_then(|answer| answer.header("x-warmpath-worker"));
    let told = received.lock().ok().and_then(|last| {
        let value = last.0.get("x-dynamo-worker-instance-id")?;
        value.to_str().ok().map(str::to_owned)
    });
    report.check(
        "mode `body`, GET /v1/models: named in the headers",
        chosen.is_some() && told.as_deref() == chosen,
        format_args!("chosen {chosen:?}, told {told:?}"),
    );
    let odd = json!({"model": MODEL, "input": "hello", "nvext": [1]});
    let bytes = Bytes::from(odd.to_string());
    let answer = post(gateway, "/v1/responses", &[], bytes, REQUEST_WITHIN).await.ok();
    let arrived = last(received);
    report.check(
        "mode `body`: an `nvext` that is no object passes as it is",
        answer.is_some_and(|answer| answer.status.is_success()) && arrived == odd,
        format_args!("{arrived}"),
    );
}
