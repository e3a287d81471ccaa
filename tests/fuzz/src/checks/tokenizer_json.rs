//! A model's `tokenizer.json`, as the sidecar compiles it: refused, or a file
//! that loads.
//!
//! Input: the file.

use serde_json::{Value, json};
use warmpath_core::tokenize::{AlignedBytes, Tokenizer, compile};

use super::fixtures::json;

/// Tokens and merges that are kept of a golden tokenizer's: a small input is
/// changed in more ways in the same time.
const TOKENS_KEPT: u64 = 300;

pub(super) fn seeds() -> Vec<Vec<u8>> {
    ["llama3", "qwen3", "gptoss", "deepseek3", "gpt2", "gemma3", "glued", "wordpiece", "unigram"]
        .iter()
        .map(|name| small(json(&format!("tests/golden/tokenizers/{name}.json"))))
        .map(|tree| tree.to_string().into_bytes())
        .collect()
}

/// A tokenizer of few tokens, of the same kind.
fn small(mut tree: Value) -> Value {
    if let Some(vocab) = tree["model"]["vocab"].as_object_mut() {
        vocab.retain(|_, id| id.as_u64().is_some_and(|id| id < TOKENS_KEPT));
        tree["model"]["merges"] = json!([]);
    }
    tree
}

pub(super) fn check(data: &[u8]) {
    let Ok(file) = compile::compile(data) else { return };
    let loaded = Tokenizer::load(AlignedBytes::from_slice(&file));
    let mut tokenizer = match loaded {
        Ok(tokenizer) => tokenizer,
        Err(error) => panic!("our own file: {}", error.reason()),
    };
    let text = "It's 12 a\u{301} <|im_end|> \n\n😀";
    let mut tokens = Vec::new();
    let _ = tokenizer.encode(text, &mut tokens);
}
