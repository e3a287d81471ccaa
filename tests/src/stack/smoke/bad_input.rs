//! Bad input: each gets a response, none hurts the gateway.

use hyper::body::Bytes;
use serde_json::json;

use super::super::client::{Chat, post};
use super::super::launch::{MODEL, Stack};
use super::super::limits::BAD_REQUEST_WITHIN;
use super::super::report::{Report, line};

const CHAT: &str = "/v1/chat/completions";
const COMPLETION: &str = "/v1/completions";

/// What may be answered.
#[derive(Clone, Copy, PartialEq)]
enum Expected {
    /// Refused by gateway or engine.
    ClientError,
    /// Odd, but a request that engines serve.
    Served,
}

/// Makes the checks.
pub(super) async fn check(stack: &Stack, report: &mut Report) {
    for (name, path, body, expected) in inputs() {
        let sent = body.len();
        match post(&stack.gateway(), path, &[], body, BAD_REQUEST_WITHIN).await {
            Ok(response) => {
                let fits = match expected {
                    Expected::ClientError => response.status.is_client_error(),
                    Expected::Served => response.status.is_success(),
                };
                report.check(
                    &format!("bad input: {name}"),
                    fits,
                    format_args!(
                        "{sent} bytes: {} in {} ms, reason {}, served by {}",
                        response.status.as_u16(),
                        response.took.as_millis(),
                        response.header("x-warmpath-reason").unwrap_or("none"),
                        response.header("x-engine-id").unwrap_or("the gateway"),
                    ),
                );
            }
            Err(error) => report.failure(&format!("bad input: {name}"), error),
        }
    }
    let chat = Chat { messages: vec![("user", "hello".into())], max_tokens: 2, stream: true };
    let after = chat.send(&stack.gateway(), MODEL, &[]).await;
    match after {
        Ok(answer) => {
            report.check("the gateway serves after bad input", true, answer.reason().unwrap_or(""));
        }
        Err(error) => {
            line(&error);
            report.failure("the gateway serves after bad input", error);
        }
    }
}

/// A request: what is wrong with it, path, body, and what may be answered.
type Input = (&'static str, &'static str, Bytes, Expected);

fn inputs() -> impl Iterator<Item = Input> {
    let malformed = malformed().into_iter();
    let malformed = malformed.map(|(name, body)| (name, CHAT, body, Expected::ClientError));
    malformed.chain(odd())
}

/// Bodies that are no chat request.
fn malformed() -> Vec<(&'static str, Bytes)> {
    let text = |text: &str| Bytes::from(text.to_owned());
    let json = |value: serde_json::Value| Bytes::from(value.to_string());
    let user = json!([{"role": "user", "content": "hi"}]);
    let nested = format!("{}1{}", "[".repeat(1000), "]".repeat(1000));
    let nested = format!("{{\"model\":\"{MODEL}\",\"messages\":{nested}}}");
    let twice = format!(
        "{{\"model\":\"nope\",\"messages\":[{{\"role\":\"user\",\"content\":\"hi\"}}],\
         \"max_tokens\":1,\"model\":\"{MODEL}\"}}"
    );
    let invalid_utf8 = [
        br#"{"model":"qwen3","messages":[{"role":"user","content":""#.as_slice(),
        b"\xff\xfe",
        br#""}]}"#,
    ];
    vec![
        ("invalid JSON", text("{\"model\": \"qwen3\", ")),
        ("not JSON at all", text("hello")),
        ("an empty body", Bytes::new()),
        ("an array instead of an object", text("[]")),
        ("invalid UTF-8", invalid_utf8.concat().into()),
        ("nesting of 1000 levels", nested.into()),
        ("a key twice", twice.into()),
        ("an unknown model", json(json!({"model": "nope", "messages": user}))),
        ("no model", json(json!({"messages": user}))),
        ("no messages", json(json!({"model": MODEL}))),
        ("an empty list of messages", json(json!({"model": MODEL, "messages": []}))),
        ("messages of the wrong type", json(json!({"model": MODEL, "messages": "hi"}))),
        ("a message of the wrong type", json(json!({"model": MODEL, "messages": [7]}))),
        (
            "max_tokens of the wrong type",
            json(json!({"model": MODEL, "messages": user, "max_tokens": "many"})),
        ),
    ]
}

/// Bodies that are requests, but of an odd kind.
fn odd() -> Vec<Input> {
    use Expected::{ClientError, Served};
    let completion = |prompt: serde_json::Value| {
        let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 1});
        Bytes::from(body.to_string())
    };
    let long = "word ".repeat(2 * 1024 * 1024);
    let long = json!({"model": MODEL, "messages": [{"role": "user", "content": long}]});
    vec![
        ("a body of 10 MB", CHAT, long.to_string().into(), ClientError),
        ("an empty prompt", COMPLETION, completion("".into()), ClientError),
        ("a prompt of the wrong type", COMPLETION, completion(json!({})), ClientError),
        ("a prompt shorter than a block", COMPLETION, completion("hi".into()), Served),
    ]
}
