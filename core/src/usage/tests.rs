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
    }
}
