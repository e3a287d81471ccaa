//! Our tokenizer against HF's `tokenizers` with Oniguruma, live, on the small
//! tokenizers of `golden/tokenizers`.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub,
    reason = "a test binary: it panics to fail and prints figures"
)]

mod compare;
mod corpus;

use std::path::Path;

use compare::Pair;

const FAMILIES: [&str; 7] = ["llama3", "qwen3", "gptoss", "deepseek3", "gpt2", "gemma3", "glued"];

fn pair(name: &str) -> Pair {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/tokenizers");
    Pair::load(name, &folder.join(format!("{name}.json")))
}

/// Goal: the pre-tokenizer sorts every character as Oniguruma does, and NFC
/// is HF's.
/// Method: every code point of the first two planes, and each 16th of the
/// others, between letters, digits, spaces and marks.
#[test]
fn every_character_is_sorted_alike() {
    let mut around = Vec::new();
    let sparse = (0x2_0000..=0x10_FFFF).step_by(16);
    let characters: Vec<char> = (0..0x2_0000).chain(sparse).filter_map(char::from_u32).collect();
    for chunk in characters.chunks(32) {
        let mut text = String::new();
        for c in chunk {
            text.extend(['a', *c, 'b', ' ', *c, '1', *c, ' ', ' ', *c, '\n']);
        }
        around.push(text);
    }
    for name in FAMILIES {
        let tally = pair(name).compare(around.iter().map(String::as_str));
        println!("{}", tally.line(name));
        assert_eq!(tally.differences, 0, "{name}");
    }
}

/// Goal: no text is encoded differently.
/// Method: seeded texts, added tokens and long words.
#[test]
fn fuzz_is_encoded_alike() {
    for name in FAMILIES {
        let mut pair = pair(name);
        let mut texts = corpus::fuzz(1, 4000, 60);
        texts.extend(corpus::fuzz(2, 60, 4000));
        texts.extend(corpus::added_fuzz(3, 2000, &pair.added_tokens()));
        texts.extend(corpus::long_words(3000));
        let tally = pair.compare(texts.iter().map(String::as_str));
        println!("{}", tally.line(name));
        assert_eq!(tally.differences, 0, "{name}");
    }
}
