//! Text through the tiny model's tokenizer: the tokens' bytes are the text's.
//!
//! Input: a byte for the slices, then text; bytes that are no UTF-8 become
//! replacement characters.

use std::cell::RefCell;
use std::collections::HashMap;

use serde_json::Value;
use unicode_normalization_alignments::UnicodeNormalization;
use warmpath_core::tokenize::{AlignedBytes, Progress, Tokenizer, compile};

use super::fixtures::{behind, json, read};

const MODEL: &str = "tests/models/tiny/tokenizer.json";

/// Of the golden texts one in so many is a seed.
const SEED_EVERY: usize = 8;

struct Model {
    tokenizer: Tokenizer,
    /// The bytes of each token.
    bytes: HashMap<u32, Vec<u8>>,
}

thread_local! {
    static TINY: RefCell<Model> = RefCell::new(Model::load());
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let texts = json("tests/golden/tokenizers/texts.json");
    let texts: Vec<Vec<u8>> = texts
        .as_array()
        .expect("a list")
        .iter()
        .step_by(SEED_EVERY)
        .filter_map(|text| Some(text.as_str()?.as_bytes().to_vec()))
        .collect();
    behind(&[5], &texts)
}

pub(super) fn check(data: &[u8]) {
    let Some((budget, text)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(text);
    TINY.with_borrow_mut(|model| {
        let mut tokens = Vec::new();
        model.tokenizer.encode(&text, &mut tokens).expect("a short text");
        let spelt: Vec<u8> = tokens.iter().flat_map(|token| model.bytes[token].clone()).collect();
        // Added tokens are cut out first, and normal form does not cross them.
        let normal: String = text.nfc().map(|(character, _)| character).collect();
        let as_it_is = text.contains("<|");
        assert!(as_it_is || spelt == normal.as_bytes(), "the tokens spell the text");
        let spelt = String::from_utf8(spelt).expect("whole characters");
        let spelt: String = spelt.nfc().map(|(character, _)| character).collect();
        assert_eq!(spelt, normal, "the tokens spell the text, added tokens or not");

        let (mut progress, mut sliced) = (Progress::default(), Vec::new());
        let budget = usize::from(*budget);
        while !model
            .tokenizer
            .encode_slice(&text, &mut progress, budget, &mut sliced)
            .expect("a short text")
        {}
        assert_eq!(sliced, tokens, "slices give what encoding at once gives");
    });
}

impl Model {
    fn load() -> Self {
        let file = compile::compile(&read(MODEL)).expect("compiles");
        let tokenizer = Tokenizer::load(AlignedBytes::from_slice(&file)).expect("loads");
        let tree = json(MODEL);
        let alphabet = alphabet();
        let mut bytes = HashMap::new();
        for (token, id) in tree["model"]["vocab"].as_object().expect("a vocabulary") {
            let spelt = token.chars().map(|character| alphabet[&character]).collect();
            bytes.insert(number(id), spelt);
        }
        for added in tree["added_tokens"].as_array().expect("a list") {
            let content = added["content"].as_str().expect("a text").as_bytes().to_vec();
            bytes.insert(number(&added["id"]), content);
        }
        Self { tokenizer, bytes }
    }
}

fn number(value: &Value) -> u32 {
    value.as_u64().and_then(|id| u32::try_from(id).ok()).expect("a token id")
}

/// The characters by which byte-level vocabularies write bytes: printable ones
/// stand for themselves, the others for those from U+0100 on, in order.
fn alphabet() -> HashMap<char, u8> {
    let mut next = 0x100;
    (0..=u8::MAX)
        .map(|byte| {
            let printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
            let character = if printable {
                char::from(byte)
            } else {
                next += 1;
                char::from_u32(next - 1).expect("a character")
            };
            (character, byte)
        })
        .collect()
}
