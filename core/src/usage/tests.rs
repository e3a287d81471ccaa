//! Oracle: the whole response at once, read with `serde_json`; every way to cut
//! a response into chunks must read the same.

use super::*;

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const USAGE: Usage =
    Usage { prompt_tokens: Some(120), completion_tokens: Some(7), cached_tokens: Some(96) };

const PLAIN: &str = r#"{"id":"x","choices":[{"message":{"content":"say \"usage\": {\"prompt_tokens\":1} é😀"}}],
  "usage" : { "prompt_tokens":120, "completion_tokens":7,"prompt_tokens_details":{"cached_tokens":96}, "total_tokens":127 } }"#;

const EVENTS: &str = concat!(
    ": comment\n\n",
    "data: {\"choices\":[{\"delta\":{\"content\":\"a \\\"usage\\\":{\\\"prompt_tokens\\\":9}\"}}],\"usage\":null}\n\n",
    "data: {\"choices\":[{\"delta\":{\"content\":\"é😀\"}}],\"usage\":{\"prompt_tokens\":120,\"completion_tokens\":1}}\r\n\r\n",
    "data:{\"choices\":[],\"usage\":{\"prompt_tokens\":120,\"completion_tokens\":7,",
    "\"prompt_tokens_details\":{\"cached_tokens\":96}},\"x\":\"é\"}\n\n",
    "data: [DONE]\n\n",
);

fn read<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> (u64, Option<Usage>) {
    let mut reader = ResponseReader::new();
    let mut firsts = 0;
    for chunk in chunks {
        firsts += usize::from(reader.feed(chunk));
        assert!(reader.tail.len() <= RESPONSE_TAIL_BYTES_MAX);
    }
    assert_eq!(firsts, usize::from(reader.started()));
    (reader.events(), reader.finish())
}

/// Goal: chunk borders do not matter.
/// Method: every chunk size, and every single cut, with empty chunks between.
#[test]
fn chunk_borders_make_no_difference() {
    for (response, events) in [(PLAIN, 0), (EVENTS, 3)] {
        let bytes = response.as_bytes();
        for size in 1..=bytes.len() {
            let chunks = bytes.chunks(size).flat_map(|chunk| [&[] as &[u8], chunk]);
            assert_eq!(read(chunks), (events, Some(USAGE)), "chunks of {size}");
        }
        for cut in 0..=bytes.len() {
            assert_eq!(read([&bytes[..cut], &bytes[cut..]]), (events, Some(USAGE)), "cut {cut}");
        }
    }
}

/// Tokens of a stream, asked for after each chunk, and the largest step.
fn tokens<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    let mut reader = ResponseReader::new();
    let mut sum = 0;
    for chunk in chunks {
        reader.feed(chunk);
        sum += reader.take_new_tokens();
        assert_eq!(reader.take_new_tokens(), 0, "taken twice");
    }
    sum
}

fn stream(events: &[&str]) -> String {
    events.iter().map(|event| format!("event: x\ndata: {event}\n\n")).collect()
}

/// Checks the tokens of streams: a name, events as an engine sends them, and how
/// many tokens these bring.
fn check_tokens(streams: &[(&str, &[&str], u64)]) {
    for (name, events, expected) in streams {
        let stream = stream(events);
        for size in [1, 7, stream.len()] {
            assert_eq!(tokens(stream.as_bytes().chunks(size)), *expected, "{name}, {size}");
        }
    }
}

/// Goal: chats count about as many tokens as they bring.
#[test]
fn events_of_chats_with_text_are_tokens() {
    check_tokens(&[
        (
            "chat",
            &[
                r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}],"usage":null}"#,
                r#"{"choices":[{"index":0,"delta":{"content":"a"},"logprobs":{"content":[{"token":"a"}]}}]}"#,
                r#"{"choices":[{"index":0,"delta":{"content" : "\"content\":\"x\""},"finish_reason":null}]}"#,
                r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#,
            ],
            2,
        ),
        (
            "two choices in one event",
            &[
                r#"{"choices":[{"index":0,"delta":{"content":"a"}},{"index":1,"delta":{"content":":"}}]}"#,
            ],
            2,
        ),
        (
            "reasoning under two names",
            &[
                r#"{"choices":[{"delta":{"reasoning":"a","reasoning_content":"a","content":null}}]}"#,
                r#"{"choices":[{"delta":{"reasoning_content":"b","content":""}}]}"#,
            ],
            2,
        ),
        (
            "tool calls",
            &[
                r#"{"choices":[{"delta":{"tool_calls":[{"id":"1","function":{"name":"f","arguments":""}}]}}]}"#,
                r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\"text\":"}}]}}]}"#,
                r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"\"a\"}"}}]}}]}"#,
            ],
            2,
        ),
    ]);
}

#[test]
fn events_of_other_apis_with_text_are_tokens() {
    check_tokens(&[
        (
            "completion",
            &[
                r#"{"choices":[{"index":0,"text":"a","logprobs":null}]}"#,
                r#"{"choices":[{"index":0,"text":"","finish_reason":"length"}]}"#,
            ],
            1,
        ),
        (
            "responses",
            &[
                r#"{"type":"response.created","response":{"output":[],"instructions":"do"}}"#,
                r#"{"type":"response.content_part.added","part":{"type":"output_text","text":""}}"#,
                r#"{"type":"response.output_text.delta","item_id":"m","delta":"a"}"#,
                r#"{"type":"response.function_call_arguments.delta","delta":"{"}"#,
                r#"{"type":"response.output_text.done","text":"a"}"#,
                r#"{"type":"response.content_part.done","part":{"type":"output_text","text":"a"}}"#,
            ],
            2,
        ),
        (
            "messages",
            &[
                r#"{"type":"content_block_start","content_block":{"type":"text","text":""}}"#,
                r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"a"}}"#,
                r#"{"type":"content_block_delta","delta":{"type":"input_json_delta","partial_json":"{"}}"#,
                r#"{"type":"content_block_delta","delta":{"type":"thinking_delta","thinking":"hm"}}"#,
                r#"{"type":"content_block_stop","index":0}"#,
            ],
            3,
        ),
        ("no events", &["[DONE]", "", "{}", r#""content""#, r#"{"content":1}"#], 0),
    ]);
}

#[test]
fn the_engine_s_own_count_comes_first() {
    let said = |text: &str, tokens: u64| {
        format!(
            r#"{{"choices":[{{"delta":{{"content":"{text}"}}}}],"usage":{{"completion_tokens":{tokens}}}}}"#
        )
    };
    let silent = r#"{"choices":[{"delta":{"content":"a"}}]}"#;
    // Counted as it goes: several tokens in an event are seen.
    let continuous = [said("a", 1), said("b c d", 4), said("", 4), said("e", 5)];
    let continuous: Vec<&str> = continuous.iter().map(String::as_str).collect();
    assert_eq!(tokens(stream(&continuous).as_bytes().chunks(50)), 5);
    // Counted at the end: more than events, then fewer.
    let at_end = |tokens| stream(&[silent, silent, silent, &said("", tokens)]);
    assert_eq!(tokens(at_end(9).as_bytes().chunks(50)), 9);
    assert_eq!(tokens(at_end(2).as_bytes().chunks(50)), 3, "what was taken stays taken");
    let other = r#"{"type":"message_delta","usage":{"output_tokens":7}}"#;
    assert_eq!(tokens([stream(&[silent, other]).as_bytes()]), 7);
    assert_eq!(tokens([PLAIN.as_bytes()]), 0, "a plain response is no stream");
}

#[test]
fn the_first_chunk_that_is_not_empty_is_reported_once() {
    let mut reader = ResponseReader::new();
    assert!(!reader.feed(b""));
    assert!(!reader.started());
    assert!(reader.feed(b"\n"));
    assert!(!reader.feed(b"data: {}\n"));
    assert!(reader.started());
    assert_eq!(reader.events(), 1);
}

#[test]
fn a_stream_that_ends_inside_its_last_event_is_read() {
    let end = r#"data: {"usage":{"prompt_tokens":5}}"#;
    let expected = Usage { prompt_tokens: Some(5), ..Usage::default() };
    assert_eq!(read([end.as_bytes()]).1, Some(expected));
}

#[test]
fn responses_without_usage_have_none() {
    for response in [
        "",
        "{}",
        "[]",
        "<html>\"usage\": {\"prompt_tokens\":1}</html>",
        r#"{"usage":null}"#,
        r#"{"usage":5}"#,
        r#"{"usage":{}}"#,
        r#"{"usage":{"prompt_tokens":"5"}}"#,
        r#"{"usage":{"prompt_tokens":5"#,
        r#"{"text":"\"usage\":{\"prompt_tokens\":5}"}"#,
        r#"{"a\"usage":{"prompt_tokens":5}}"#,
        "data: {\"text\":\"\\\"usage\\\":{\\\"prompt_tokens\\\":5}\"}\n\n",
        "event: x\nid: \"usage\":{\"prompt_tokens\":5}\n\n",
    ] {
        assert_eq!(read([response.as_bytes()]).1, None, "{response}");
    }
}

#[test]
fn only_the_end_of_a_long_response_is_kept() {
    let usage = r#""usage":{"prompt_tokens":120,"completion_tokens":7,"prompt_tokens_details":{"cached_tokens":96}}}"#;
    let long = "é".repeat(RESPONSE_TAIL_BYTES_MAX);
    let plain = format!(r#"{{"text":"{long}",{usage}"#);
    let event = format!("data: {{\"text\":\"{long}\",{usage}\n\ndata: [DONE]\n\n");
    for response in [&plain, &event] {
        for size in [1_000, 65_537, response.len()] {
            let mut reader = ResponseReader::new();
            for chunk in response.as_bytes().chunks(size) {
                reader.feed(chunk);
                assert!(reader.tail.len() <= RESPONSE_TAIL_BYTES_MAX);
            }
            assert!(size == response.len() || reader.cut());
            assert_eq!(reader.finish(), Some(USAGE), "chunks of {size}");
        }
    }
    let early = format!(r#"{{{},"text":"{long}"}}"#, usage.strip_suffix('}').unwrap());
    assert_eq!(read(early.as_bytes().chunks(4_096)).1, None, "usage before the kept end");
}

#[cfg(not(target_arch = "wasm32"))]
mod properties {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]

        #[test]
        fn any_bytes_are_read_alike_however_cut(
            bytes in prop::collection::vec(
                prop::sample::select(vec![
                    &b"data:"[..], b"\n", b" ", b"\"usage\"", b":", b"{", b"}", b"\\",
                    b"\"prompt_tokens\":1", b"[DONE]", b"\xff", "é".as_bytes(), b",",
                ]), 0..40,
            ),
            size in 1_usize..9,
        ) {
            let bytes = bytes.concat();
            prop_assert_eq!(read(bytes.chunks(size)), read([bytes.as_slice()]));
        }

        /// However a stream is cut, and whatever is in it, its tokens are the same
        /// but for those that were taken before the engine counted fewer.
        #[test]
        fn tokens_are_counted_alike_however_cut(
            bytes in prop::collection::vec(
                prop::sample::select(vec![
                    &b"data:"[..], b"\n", b" ", b"\"content\"", b"\"text\"", b"\"type\"", b":",
                    b"\"", b"\"response.x\"", b"\"delta\"", b"\\", b"a", b"\xff", b",",
                ]), 0..60,
            ),
            size in 1_usize..9,
        ) {
            let bytes = bytes.concat();
            prop_assert_eq!(tokens(bytes.chunks(size)), tokens([bytes.as_slice()]));
        }
    }
}
