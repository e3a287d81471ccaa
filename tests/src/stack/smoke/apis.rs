//! Apis: those that are routed by load go to a worker that is told of it.

use hyper::body::Bytes;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use super::super::client::{Response, call, post};
use super::super::launch::{MODEL, Stack, engine_name};
use super::super::limits::REQUEST_WITHIN;
use super::super::report::Report;

/// Headers of a request, name and value.
pub(super) type Headers<'a> = &'a [(&'a str, &'a str)];

/// A request that demands something: what, its headers and `nvext`, and the
/// status, code and parameter of the answer.
type Demand<'a> = (&'a str, Headers<'a>, Value, u16, &'a str, Option<&'a str>);

/// Makes the checks.
pub(super) async fn check(stack: &Stack, report: &mut Report) {
    let gateway = stack.gateway();
    for (path, body) in [
        ("/v1/responses", json!({"model": MODEL, "input": "hello"})),
        ("/v1/embeddings", json!({"model": MODEL, "input": ["hello", "you"]})),
        (
            "/v1/messages",
            json!({"model": MODEL, "max_tokens": 1, "messages":
            [{"role": "user", "content": "hello"}]}),
        ),
    ] {
        let sent = post(&gateway, path, &[], Bytes::from(body.to_string()), REQUEST_WITHIN).await;
        let answer = sent.ok();
        routed(&format!("{path} goes to a worker that is told"), answer.as_ref(), 200, report);
    }
    for (path, status) in
        [("/v1/models", 200), ("/v1/models?limit=1", 200), ("/v1/chat/completions", 405)]
    {
        let answer = bare(&gateway, Method::GET, path).await;
        let name = format!("GET {path} goes to a worker that is told");
        routed(&name, answer.as_ref(), status, report);
    }
    let models = bare(&gateway, Method::GET, "/v1/models").await;
    let first = models.and_then(|answer| answer.json());
    let first = first.as_ref().and_then(|models| models.pointer("/data/0/id")).cloned();
    report.check(
        "/v1/models answers with the model",
        first == Some(Value::from(MODEL)),
        format_args!("{first:?}"),
    );
    for (method, path) in [
        (Method::HEAD, "/v1/models"),
        (Method::OPTIONS, "/v1/chat/completions"),
        (Method::GET, "/health"),
        (Method::POST, "/v1/models"),
    ] {
        let answer = bare(&gateway, method.clone(), path).await;
        let reason = answer.as_ref().and_then(|it| it.header("x-warmpath-reason"));
        let worker = answer.as_ref().and_then(|it| it.header("x-warmpath-worker"));
        report.check(
            &format!("{method} {path} is left to the gateway's own balancing"),
            reason == Some("not_our_path") && worker.is_none(),
            format_args!("reason {reason:?}, worker {worker:?}"),
        );
    }
    asked_for_too_much(&gateway, report).await;
}

async fn bare(gateway: &str, method: Method, path: &str) -> Option<Response> {
    call(gateway, method, path, &[], Bytes::new(), REQUEST_WITHIN).await.ok()
}

/// Checks that the worker that was chosen answered, and was told that it was.
fn routed(name: &str, answer: Option<&Response>, status: u16, report: &mut Report) {
    let header = |name: &str| answer.and_then(|answer| answer.header(name)).unwrap_or("none");
    let (chosen, told) = (header("x-warmpath-worker"), header("x-engine-told"));
    let index: usize = chosen.parse().unwrap_or(0);
    let home = engine_name(index.wrapping_sub(1));
    let is_told = told == format!("x-dynamo-worker-instance-id={chosen},x-dynamo-dp-rank=0");
    let is_by_load = header("x-warmpath-reason") == "by_load_api";
    let has_status = answer.is_some_and(|answer| answer.status.as_u16() == status);
    report.check(
        name,
        has_status && is_by_load && is_told && header("x-engine-id") == home,
        format_args!(
            "{:?}, reason {}, chosen {chosen}, told {told:?}, answered by {}",
            answer.map(|answer| answer.status),
            header("x-warmpath-reason"),
            header("x-engine-id"),
        ),
    );
}

/// What a request demands, and cannot have: the answer names it.
async fn asked_for_too_much(gateway: &str, report: &mut Report) {
    let long = "s".repeat(300);
    let many: Vec<String> = (0..65).map(|n| format!("x-dynamo-meta-{n}")).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|name| (name.as_str(), "v")).collect();
    let constraints = json!({"routing_constraints": {"required_taints": ["nobody-has-it"]}});
    let hints = json!({"agent_hints": {"priority": "high"}});
    let taints = json!({"routing_constraints": {"preferred_taints": {"a": 1e300}}});
    let cases: [Demand<'_>; 8] = [
        (
            "a priority that is no number",
            &[("x-dynamo-request-priority", "soon")],
            json!({}),
            400,
            "bad_header",
            Some("x-dynamo-request-priority"),
        ),
        (
            "a strict priority below 0",
            &[("x-dynamo-request-strict-priority", "-1")],
            json!({}),
            400,
            "bad_header",
            Some("x-dynamo-request-strict-priority"),
        ),
        ("a priority below 0", &[("x-dynamo-request-priority", "-7")], json!({}), 200, "", None),
        ("a session where none is bound", &[("x-session-id", &long)], json!({}), 200, "", None),
        ("too many metadata headers", &many, json!({}), 431, "metadata_too_large", None),
        (
            "a hint of the wrong type",
            &[],
            hints,
            400,
            "unparsed_nvext",
            Some("nvext.agent_hints.priority"),
        ),
        (
            "a taint of absurd weight",
            &[],
            taints,
            400,
            "unparsed_nvext",
            Some("nvext.routing_constraints.preferred_taints"),
        ),
        ("a taint that nobody has", &[], constraints, 503, "constraints_unsatisfied", None),
    ];
    for (what, headers, nvext, status, code, param) in cases {
        let name = format!("{what}: {status}");
        let answer = chat(gateway, headers, &nvext).await;
        let error = answer.as_ref().and_then(|answer| answer.json()).unwrap_or_default();
        let said = |member: &str| error.pointer(&format!("/error/{member}"));
        let fits = if status == 200 {
            said("code").is_none()
        } else {
            said("code") == Some(&Value::from(code)) && said("param") == Some(&Value::from(param))
        };
        let actual = answer.map(|answer| answer.status);
        report.check(
            &name,
            fits && actual.map(|status| status.as_u16()) == Some(status),
            format_args!("{actual:?}, code {:?}, param {:?}", said("code"), said("param")),
        );
    }
    untrusted(gateway, report).await;
}

/// A worker that a client names is not even looked at.
async fn untrusted(gateway: &str, report: &mut Report) {
    let ignored = [("x-dynamo-worker-instance-id", "no number"), ("x-dp-rank", "-1")];
    let answer = chat(gateway, &ignored, &json!({"decode_worker_id": "?"})).await;
    let status = answer.map(|answer| answer.status);
    report.check(
        "a worker that is named without trust is not even read",
        status == Some(StatusCode::OK),
        format_args!("{status:?}"),
    );
}

/// A chat request with these headers and this `nvext`.
pub(super) async fn chat(gateway: &str, headers: Headers<'_>, nvext: &Value) -> Option<Response> {
    let text = "how are you, and how is everybody else? ".repeat(8);
    let body = json!({"model": MODEL, "max_tokens": 1, "nvext": nvext,
        "messages": [{"role": "user", "content": text}]});
    let body = Bytes::from(body.to_string());
    post(gateway, "/v1/chat/completions", headers, body, REQUEST_WITHIN).await.ok()
}
