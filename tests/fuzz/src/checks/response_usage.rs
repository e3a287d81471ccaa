//! An engine's response: how it is cut into chunks makes no difference.
//!
//! Input: a byte that chooses how it is cut, then the response.

use serde_json::Value;
use warmpath_core::limits::RESPONSE_TAIL_BYTES_MAX;
use warmpath_core::usage::ResponseReader;

use super::fixtures::behind;

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let usage = r#""usage":{"prompt_tokens":9,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":4}}"#;
    let plain = format!(r#"{{"choices":[{{"text":"\"usage\":{{}}"}}],{usage}}}"#);
    let events = format!(
        "data: {{\"choices\":[]}}\r\n\r\n: ping\n\nevent: x\ndata:{{\"usage\":null}}\n\ndata: {{{usage}}}\n\ndata: [DONE]\n\n"
    );
    let deltas = concat!(
        "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n",
        "data: {\"type\":\"response.output_text.delta\",\"delta\":\"b\"}\n\n",
        "data: {\"usage\":{\"output_tokens\":1}}\n\n",
    );
    let responses = [plain, events, deltas.to_owned(), " \n".to_owned(), "error".to_owned()];
    let responses: Vec<Vec<u8>> = responses.map(String::into_bytes).to_vec();
    [0, 7].iter().flat_map(|head| behind(&[*head], &responses)).collect()
}

pub(super) fn check(data: &[u8]) {
    let Some((cut, response)) = data.split_first() else { return };
    let mut whole = ResponseReader::new();
    assert_eq!(whole.feed(response), !response.is_empty());
    let mut cut_up = ResponseReader::new();
    let mut tokens = 0;
    for (at, chunk) in response.chunks(usize::from(*cut) + 1).enumerate() {
        assert_eq!(cut_up.feed(chunk), at == 0, "the first chunk is the first");
        cut_up.feed(&[]);
        tokens += cut_up.take_new_tokens();
    }
    // Where the engine counts fewer than it sent, what was taken stays taken.
    let at_once = whole.take_new_tokens();
    let counts = response.windows(6).any(|word| word == b"tokens");
    assert!(tokens == at_once || tokens > at_once && counts, "{tokens}, at once {at_once}");
    assert_eq!(whole.started(), cut_up.started());
    assert_eq!(whole.events(), cut_up.events(), "events");
    let (whole, cut_up) = (whole.finish(), cut_up.finish());
    assert_eq!(whole, cut_up, "usage");
    if response.len() < RESPONSE_TAIL_BYTES_MAX {
        compare(response, whole.and_then(|usage| usage.prompt_tokens));
    }
}

/// A plain response whose only `usage` is at its top level says what it says.
fn compare(response: &[u8], ours: Option<u64>) {
    let Ok(Value::Object(tree)) = serde_json::from_slice::<Value>(response) else { return };
    let is_plain = tree.iter().all(|(name, value)| {
        !name.contains('"')
            && (name == "usage" || !value.is_object() && !value.is_array() && !value.is_string())
    });
    let once = response.windows(5).filter(|window| *window == b"usage").count() == 1;
    let inner = tree.get("usage").and_then(Value::as_object);
    if let Some(usage) = inner.filter(|_| is_plain && once && !response.contains(&b'\\')) {
        let theirs = usage.get("prompt_tokens").and_then(Value::as_u64);
        assert_eq!(ours, theirs, "prompt tokens");
    }
}
