//! Oracle: `serde_json` on the same text, but for the two documented
//! differences (depth, numbers beyond `f64`).

use serde_json::Value;

use super::scanner::plain_bytes;
use super::*;
use crate::limits::JSON_DEPTH_MAX;

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

/// Rebuilds a value through the public walk, as serde_json's own type.
fn rebuild(json: RawJson<'_>) -> Value {
    match json.kind() {
        JsonKind::Null => Value::Null,
        JsonKind::Bool => Value::Bool(json.boolean().unwrap()),
        JsonKind::Number => serde_json::from_str(json.text()).unwrap(),
        JsonKind::String => Value::String(json.string().unwrap().into_owned()),
        JsonKind::Array => json.items().map(rebuild).collect(),
        JsonKind::Object => json
            .members()
            .map(|member| (member.key.string().unwrap().into_owned(), rebuild(member.value)))
            .collect(),
    }
}

/// Checks one text against the oracle; returns whether it was accepted.
fn agrees(text: &str) -> bool {
    let expected = serde_json::from_str::<Value>(text);
    let actual = RawJson::parse(text);
    match (expected, actual) {
        (Ok(expected), Ok(actual)) => {
            assert_eq!(rebuild(actual), expected, "{text:?}");
            true
        }
        (Err(_), Err(_)) => false,
        (Err(error), Ok(_)) if error.to_string().starts_with("number out of range") => false,
        (expected, actual) => panic!("{text:?}: serde_json {expected:?}, ours {actual:?}"),
    }
}

#[test]
fn valid_texts_are_accepted() {
    for text in [
        "null",
        "true",
        " false\t",
        "0",
        "-0",
        "-0.5e+07",
        "1E9",
        "[]",
        "[ ]",
        "{}",
        "{ }",
        "[1 , 2]",
        r#"{"a":1,"a":2}"#,
        r#"{"a" : {"b" : [ { } ] } , "c" : "" }"#,
        r#""\"\\\/\b\f\n\r\t\u0041\u00e9\ud83d\ude00""#,
        "\"\u{7f}é😀\"",
        r#""12345678\n12345678""#,
    ] {
        assert!(agrees(text), "{text:?} is valid");
    }
}

#[test]
fn invalid_texts_are_refused() {
    for text in [
        "",
        " ",
        "nul",
        "nulls",
        "truefalse",
        "01",
        "-",
        "+1",
        "1.",
        ".5",
        "1e",
        "1e+",
        "NaN",
        "Infinity",
        "[",
        "]",
        "[1",
        "[1,",
        "[1,]",
        "[,1]",
        "[1 2]",
        "[1}",
        "{1:2}",
        "{\"a\"}",
        "{\"a\":}",
        "{\"a\":1,}",
        "{\"a\":1]",
        "{,}",
        "\"",
        "\"a",
        "\"\\\"",
        "\"\\x\"",
        "\"\\u12\"",
        "\"\\u123g\"",
        "\"\\ud800\"",
        "\"\\ud800\\u0041\"",
        "\"\\udc00\"",
        "\"\\ud800\\n\"",
        "\"\u{1}\"",
        "\"1234567\u{1f}\"",
        "\"\n\"",
        "1 1",
        "{} x",
        "\u{feff}{}",
        "'a'",
        "// c\n1",
    ] {
        assert!(!agrees(text), "{text:?} is not valid");
    }
}

/// Goal: every position ends a run of plain bytes exactly.
/// Method: all lengths below 40 with each special byte at each position, and high
/// bytes around it, against a byte-by-byte count.
#[test]
fn plain_bytes_stops_at_the_first_special_byte() {
    for filler in [b'a', 0x7f, 0x80, 0xff, b' ', b'!', b'#', b'[', b']'] {
        for length in 0..40 {
            let mut bytes = vec![filler; length];
            assert_eq!(plain_bytes(&bytes), length);
            for at in 0..length {
                for special in [0, 1, 0x1f, b'"', b'\\'] {
                    for after in [filler, special] {
                        bytes[at..].fill(after);
                        bytes[at] = special;
                        assert_eq!(plain_bytes(&bytes), at, "{filler} {special} {at}/{length}");
                    }
                }
                bytes.fill(filler);
            }
        }
    }
}

#[test]
fn depth_is_bounded_exactly() {
    for (open, close) in [("[", "]"), (r#"{"a":"#, "}")] {
        let nested = |depth: usize| {
            let inside = if open == "[" { "" } else { "1" };
            format!("{}{inside}{}", open.repeat(depth), close.repeat(depth))
        };
        assert!(RawJson::parse(&nested(JSON_DEPTH_MAX)).is_ok());
        assert_eq!(RawJson::parse(&nested(JSON_DEPTH_MAX + 1)), Err(JsonError::TooDeep));
        assert_eq!(RawJson::parse(&nested(100_000)), Err(JsonError::TooDeep));
        assert!(agrees(&nested(JSON_DEPTH_MAX - 1)));
    }
}

#[test]
fn numbers_keep_their_spelling() {
    let json = RawJson::parse(" [1.50, 1e400, -7, 18446744073709551616] ").unwrap();
    let items: Vec<_> = json.items().map(RawJson::text).collect();
    assert_eq!(items, ["1.50", "1e400", "-7", "18446744073709551616"]);
    let read: Vec<_> = json.items().map(|item| (item.unsigned(), item.signed())).collect();
    assert_eq!(read, [(None, None), (None, None), (None, Some(-7)), (None, None)]);
}

#[test]
fn member_takes_the_last_of_equal_keys_however_spelled() {
    let json = RawJson::parse(r#"{"model":1,"mod\u0065l":2,"models":3}"#).unwrap();
    assert_eq!(json.member("model").unwrap().text(), "2");
    assert!(json.member("mode").is_none());
    assert!(RawJson::parse("[1]").unwrap().member("a").is_none());
    assert_eq!(RawJson::parse("\"[1]\"").unwrap().items().count(), 0);
}

#[cfg(not(target_arch = "wasm32"))]
mod properties {
    use proptest::prelude::*;

    use super::*;

    /// A JSON text with odd spacing, escapes, surrogates and duplicate keys.
    pub(crate) fn json_text() -> impl Strategy<Value = String> {
        let space = "[ \t\n\r]{0,2}";
        let string = r#""([ -!#-\[\]-~é漢😀]|\\["\\/bfnrt]|\\u00[0-9a-fA-F]{2}|\\ud83d\\ude0[0-9]|\\u[1-9]abc){0,12}""#;
        let number = r"-?(0|[1-9][0-9]{0,20})(\.[0-9]{1,4})?([eE][+-]?[0-9]{1,3})?";
        let key = prop_oneof![Just("\"a\"".to_owned()), Just("\"\\u0061\"".to_owned()), string];
        let leaf = prop_oneof![
            Just("null".to_owned()),
            Just("true".to_owned()),
            Just("false".to_owned()),
            number,
            string,
        ];
        let pad = move |inner: BoxedStrategy<String>| {
            (space, inner, space).prop_map(|(before, text, after)| before + &text + &after)
        };
        pad(leaf
            .prop_recursive(6, 64, 6, move |inner| {
                let padded = pad(inner.boxed()).boxed();
                let member = (pad(key.clone().boxed()), padded.clone())
                    .prop_map(|(key, value)| format!("{key}:{value}"));
                prop_oneof![
                    prop::collection::vec(padded, 0..6)
                        .prop_map(|items| format!("[{}]", items.join(","))),
                    prop::collection::vec(member, 0..6)
                        .prop_map(|members| format!("{{{}}}", members.join(","))),
                ]
            })
            .boxed())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn generated_json_agrees_with_serde_json(text in json_text()) {
            let accepted = agrees(&text);
            let in_range = !matches!(
                serde_json::from_str::<Value>(&text),
                Err(error) if error.to_string().starts_with("number out of range")
            );
            prop_assert_eq!(accepted, in_range);
        }

        #[test]
        fn mutated_json_agrees_with_serde_json(
            text in json_text(),
            edits in prop::collection::vec(
                (any::<prop::sample::Index>(), prop_oneof![any::<u8>(), prop::sample::select(br#"{}[]":,\0eE.-+ntfu "#.as_slice())], 0..3),
                1..4,
            ),
        ) {
            let mut bytes = text.into_bytes();
            for (index, byte, kind) in edits {
                if bytes.is_empty() {
                    break;
                }
                let at = index.index(bytes.len());
                match kind {
                    0 => bytes[at] = byte,
                    1 => bytes.insert(at, byte),
                    _ => {
                        bytes.remove(at);
                    }
                }
            }
            if let Ok(text) = std::str::from_utf8(&bytes) {
                agrees(text);
            }
        }

        #[test]
        fn any_text_agrees_with_serde_json(text in ".{0,24}") {
            agrees(&text);
        }
    }
}
#[cfg(not(target_arch = "wasm32"))]
pub(crate) use properties::json_text;
