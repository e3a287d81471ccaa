//! What the compiler refuses, and that it names it.

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

use serde_json::{Value, json};

use super::compile::{AddedToken, CompileError, compile, compile_with_added};
use super::*;

fn parsed(golden: &Golden) -> Value {
    serde_json::from_slice(golden.json).expect("golden tokenizer")
}

/// Compiles with the value at `pointer` replaced.
pub(super) fn with(golden: &Golden, pointer: &str, value: Value) -> Result<Vec<u8>, CompileError> {
    let mut json = parsed(golden);
    let (parent, key) = pointer.rsplit_once('/').expect("pointer");
    json.pointer_mut(parent).expect("parent")[key] = value;
    compile(json.to_string().as_bytes())
}

/// Goal: every component that is not reproduced is refused by name.
/// Method: one field of a file that compiles is changed at a time.
#[test]
fn unknown_components_are_named() {
    let llama = golden("llama3");
    let regex = "/pre_tokenizer/pretokenizers/0/pattern";
    let token = |field: &str| {
        let mut token = json!({"id": 1, "content": "x", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": false});
        token[field] = json!(true);
        json!([token])
    };
    let cases = [
        ("/version", json!("2.0"), "version"),
        ("/model/type", json!("WordLevel"), "model WordLevel"),
        ("/model/dropout", json!(0.1), "dropout"),
        ("/model/continuing_subword_prefix", json!("##"), "continuing_subword_prefix"),
        ("/model/end_of_word_suffix", json!("</w>"), "end_of_word_suffix"),
        ("/model/byte_fallback", json!(true), "byte_fallback"),
        ("/normalizer", json!({"type": "Lowercase"}), "normalizer Lowercase"),
        ("/normalizer", json!({"type": "NFKC"}), "normalizer NFKC"),
        (
            "/normalizer",
            json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFD"}]}),
            "normalizer Sequence",
        ),
        (
            "/normalizer",
            json!({"type": "Replace", "pattern": {"String": "a"}, "content": "b"}),
            "normalizer Replace",
        ),
        ("/pre_tokenizer", json!({"type": "Whitespace"}), "pre_tokenizer Whitespace"),
        ("/pre_tokenizer", Value::Null, "neither ByteLevel nor"),
        ("/pre_tokenizer/pretokenizers/0/behavior", json!("Removed"), "does not isolate"),
        ("/pre_tokenizer/pretokenizers/0/invert", json!(true), "does not isolate"),
        ("/pre_tokenizer/pretokenizers/0/pattern", json!({"String": " "}), "literal Split"),
        ("/pre_tokenizer/pretokenizers/1/add_prefix_space", json!(true), "add_prefix_space"),
        ("/added_tokens", token("single_word"), "single_word"),
        ("/added_tokens", token("lstrip"), "lstrip"),
        ("/added_tokens", token("rstrip"), "rstrip"),
    ];
    for (pointer, value, name) in cases {
        assert_names(&with(llama, pointer, value), name);
    }
    for (pattern, name) in [
        (r"a(?=b)|\s+", "look-around"),
        (r"(?<=a)b", "look-around"),
        (r"\w+", r"\w"),
        (r"\bword", "anchor"),
        ("^a", "anchor"),
        ("a.", "."),
        (r"\p{Han}+", "property"),
        (r"\p{L}++x", "possessive"),
        ("(?i:strasse)", "flags"),
        ("(?i)a", "flags"),
        ("[a-z&&b]", "&&"),
        ("[[:alpha:]]", "[["),
        ("a*", "nothing at all"),
        ("(", "pattern"),
    ] {
        assert_names(&with(llama, regex, json!({"Regex": pattern})), name);
    }
}

fn assert_names(refused: &Result<Vec<u8>, CompileError>, name: &str) {
    match refused {
        Err(error) => {
            let message = error.to_string();
            assert!(message.contains(name), "{message:?} does not name {name:?}");
        }
        Ok(_) => panic!("{name:?} compiles"),
    }
}

/// Goal: other models are refused by their type.
#[test]
fn other_models_are_named() {
    let [wordpiece, unigram] = &REFUSED;
    assert_names(&compile(wordpiece.json), "model WordPiece");
    assert_names(&compile(unigram.json), "model Unigram");
}

/// Goal: files that HF's crate refuses do not compile either.
#[test]
fn inconsistent_files_are_refused() {
    let llama = golden("llama3");
    let missing = with(llama, "/model/merges", json!([["not", "there"]]));
    assert_names(&missing, "vocabulary lacks");
    assert_names(&with(llama, "/model/merges", Value::Null), "without merges");
    assert_names(&with(llama, "/model/merges", json!(["a b c"])), "merge");
    assert_names(&with(llama, "/model/vocab", json!({"a": 1, "b": 1})), "same id");
    assert_names(&with(llama, "/model/vocab", json!({"a": 1})), "every byte");
    assert_names(&with(llama, "/model/vocab", json!({"a": 4_000_000})), "too large");
    for junk in [&b""[..], b"{", b"[]", b"{}", b"null", b"\xff"] {
        assert!(compile(junk).is_err());
    }
}

/// Goal: SentencePiece files outside what is reproduced are refused.
#[test]
fn other_sentence_piece_files_are_named() {
    let gemma = golden("gemma3");
    assert_names(&with(gemma, "/model/byte_fallback", json!(false)), "byte_fallback");
    assert_names(&with(gemma, "/model/ignore_merges", json!(true)), "ignore_merges");
    assert_names(&with(gemma, "/pre_tokenizer/pattern", json!({"String": "\u{2581}"})), "String");
    assert_names(&with(gemma, "/pre_tokenizer/pattern", json!({"Regex": "a"})), "isolate");
    let mut json = parsed(gemma);
    json["added_tokens"][6]["normalized"] = json!(true);
    json["added_tokens"][6]["content"] = json!("a b");
    assert_names(&compile(json.to_string().as_bytes()), "normalized added token");
}

/// Goal: added tokens of the caller get the next free ids and match; one that
/// the file has already keeps its id.
#[test]
fn extra_added_tokens_follow() {
    let llama = golden("llama3");
    let token = |content: &str| AddedToken { content: content.to_owned(), ..AddedToken::default() };
    let extra = [token("<|one|>"), token("<|eot_id|>"), token("<|two|>")];
    let file = compile_with_added(llama.json, &extra).expect("compiles");
    let mut tokenizer = Tokenizer::load(AlignedBytes::from_slice(&file)).expect("loads");
    let json = parsed(llama);
    let last = json["added_tokens"].as_array().expect("list").iter();
    let last = last.map(|token| token["id"].as_u64().expect("id")).max().expect("one");
    let last = u32::try_from(last).expect("id");
    let known = encode(&mut llama.tokenizer(), "<|eot_id|>");
    let ids = encode(&mut tokenizer, "<|one|><|two|><|eot_id|>");
    assert_eq!(ids, [last + 1, last + 2, known[0]]);
}
