//! A client's body: scanned, read, and the choice handed over in it.
//!
//! Input: a byte that chooses endpoint and choice, then the body. What counts is
//! what `serde_json` says of the same bytes.

use serde_json::{Value, json};
use warmpath_core::handover::{Handover, hand_over};
use warmpath_core::request::{Endpoint, Envelope, Prompt, RequestError, parse};

use super::fixtures::{behind, json};

/// Members that name a worker, which no client may set.
const ROUTING: [&str; 5] =
    ["backend_instance_id", "decode_worker_id", "prefill_worker_id", "dp_rank", "prefill_dp_rank"];

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let mut bodies: Vec<Vec<u8>> = [
        r#"{"model":"tiny","prompt":"a","stream":true,"max_tokens":5}"#,
        r#"{"prompt":["a","b"],"nvext":null}"#,
        r#"{"prompt":[1,2, 3],"cache_salt":"s"}"#,
        r#"{"prompt":[[1],[2]],"nvext":{"token_data":[1,2],"dp_rank":7,"agent_hints":{"priority":-1,"osl":5,"latency_sensitivity":0.5}}}"#,
        r#"{"nvext":{"backend_instance_id":1},"messages":[{"role":"user","content":"\ud83d\ude00"}],"n\u0076ext":{"dp\u005frank":1,"annotations":["a"]}}"#,
        r#"{"messages":[{"role":"user","content":[{"type":"text","text":"x"}]}],"tools":[{"type":"function","function":{"name":"f"}}],"tool_choice":"none","chat_template_kwargs":{"a":1}}"#,
        r#" {} "#,
        "[]",
        r#"{"nvext":7,"prompt":""}"#,
    ]
    .iter()
    .map(|body| body.as_bytes().to_vec())
    .collect();
    bodies.extend(conversations());
    [0, 1, 6, 7, 128].iter().flat_map(|head| behind(&[*head], &bodies)).collect()
}

/// The golden conversations as bodies.
pub(super) fn conversations() -> Vec<Vec<u8>> {
    let all = json("tests/golden/templates/conversations.json");
    all.as_array().expect("a list").iter().map(|body| body.to_string().into_bytes()).collect()
}

pub(super) fn check(data: &[u8]) {
    let Some((head, body)) = data.split_first() else { return };
    let endpoint = match (head & 1, head & 128) {
        (0, 0) => Endpoint::ChatCompletions,
        (_, 0) => Endpoint::Completions,
        _ => Endpoint::Responses,
    };
    let parsed = parse(endpoint, body);
    if let Ok(request) = &parsed
        && let Prompt::Texts(texts) = &request.prompt
    {
        assert_ne!(texts.len(), 1, "one prompt is no batch");
    }
    let tree = serde_json::from_slice::<Value>(body);
    let envelope = match (Envelope::scan(body), &tree) {
        (Ok(envelope), Ok(_)) => envelope,
        (Ok(envelope), Err(error)) => {
            assert!(is_known_difference(error), "accepted, but: {error}");
            envelope
        }
        (Err(error), Ok(tree)) => {
            let known = match error {
                RequestError::NotAnObject => !tree.is_object(),
                RequestError::TooDeep | RequestError::TooManyDuplicates => true,
                _ => false,
            };
            return assert!(known, "refused, but JSON: {error:?}");
        }
        (Err(_), Err(_)) => return,
    };
    let tokens = [0, 7, 128_000, u32::MAX];
    let handover = Handover {
        token_data: (head & 2 != 0).then_some(&tokens[..]),
        token_text: None,
        backend_instance_id: (head & 4 != 0).then_some(u64::MAX),
        decode_worker_id: (head & 8 != 0).then_some(0),
        prefill_worker_id: (head & 16 != 0).then_some(20),
        dp_rank: (head & 32 != 0).then_some(1),
        prefill_dp_rank: (head & 64 != 0).then_some(3),
    };
    let (Ok(edited), Ok(tree)) = (hand_over(&envelope.splice, &handover), tree) else { return };
    let edited: Value = serde_json::from_slice(&edited).expect("what was JSON stays JSON");
    assert_eq!(edited, expected(tree, &handover), "the edit as one would do it on a tree");
}

/// Depth, and numbers beyond `f64`, which `serde_json` alone refuses.
fn is_known_difference(error: &serde_json::Error) -> bool {
    let error = error.to_string();
    error.starts_with("number out of range") || error.starts_with("recursion limit exceeded")
}

fn expected(mut tree: Value, handover: &Handover<'_>) -> Value {
    let nvext = tree.as_object_mut().expect("an object").entry("nvext").or_insert(Value::Null);
    if nvext.is_null() {
        *nvext = json!({});
    }
    let nvext = nvext.as_object_mut().expect("handed over into an object");
    for name in ROUTING {
        nvext.remove(name);
    }
    let numbers = [
        handover.backend_instance_id,
        handover.decode_worker_id,
        handover.prefill_worker_id,
        handover.dp_rank.map(u64::from),
        handover.prefill_dp_rank.map(u64::from),
    ];
    for (name, number) in ROUTING.into_iter().zip(numbers) {
        if let Some(number) = number {
            nvext.insert(name.to_owned(), number.into());
        }
    }
    if let Some(tokens) = handover.token_data {
        nvext.insert("token_data".to_owned(), json!(tokens));
    }
    tree
}
