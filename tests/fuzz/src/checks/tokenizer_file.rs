//! A compiled tokenizer, damaged: refused, or bounded.
//!
//! Input: a byte that chooses a file, or none; then the damage as changes of five
//! bytes each (place, new byte), or a whole file. Length and checksum are made
//! right, so that what is behind them is reached.

use std::sync::OnceLock;

use warmpath_core::tokenize::{AlignedBytes, Tokenizer, compile};
use xxhash_rust::xxh3::xxh3_64;

use super::fixtures::read;

/// Where the length, the checksum and what it covers stand.
const LENGTH_AT: usize = 16;
const CHECKSUM_AT: usize = 24;
const CHECKED_AT: usize = 32;

const TEXTS: [&str; 3] = [
    "It's 12,345 requests; we'll see.\n\n  def route(request):\n\treturn best[1] \u{2581}\u{2581} ",
    "如果队列太长😀e\u{301}ก่อน <|im_start|><bos>\n\n\n\u{10ffff}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
];

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = (1..=3).map(|which| vec![which]).collect();
    // Kind, flags, first entries of the table, and somewhere inside.
    for place in [12_u32, 32, 40, 44, 48, 100, 1_000, 10_000] {
        for which in 1..=3 {
            seeds.push([&[which], &place.to_le_bytes()[..], &[0xff]].concat());
        }
    }
    seeds.push([&[0], &files()[0][..256]].concat());
    seeds
}

pub(super) fn check(data: &[u8]) {
    let Some((which, rest)) = data.split_first() else { return };
    let files = files();
    let mut file = match usize::from(*which).checked_sub(1) {
        None => rest.to_vec(),
        Some(which) => files[which % files.len()].clone(),
    };
    if *which > 0 {
        for change in rest.as_chunks::<5>().0 {
            let [place @ .., byte] = *change;
            let place = u32::from_le_bytes(place) as usize % file.len();
            file[place] = byte;
        }
    }
    seal(&mut file);
    let Ok(mut tokenizer) = Tokenizer::load(AlignedBytes::from_slice(&file)) else { return };
    for text in TEXTS {
        let mut tokens = Vec::new();
        if tokenizer.encode(text, &mut tokens).is_ok() {
            assert!(tokens.len() <= text.len(), "more tokens than bytes");
        }
    }
}

/// A byte-level, a SentencePiece and the tiny model's tokenizer, compiled.
fn files() -> &'static [Vec<u8>; 3] {
    static FILES: OnceLock<[Vec<u8>; 3]> = OnceLock::new();
    FILES.get_or_init(|| {
        let golden = |name: &str| read(&format!("tests/golden/tokenizers/{name}.json"));
        [golden("gpt2"), golden("gemma3"), read("tests/models/tiny/tokenizer.json")]
            .map(|json| compile::compile(&json).expect("compiles"))
    })
}

fn seal(file: &mut [u8]) {
    let len = (file.len() as u64).to_le_bytes();
    if let Some(field) = file.get_mut(LENGTH_AT..CHECKSUM_AT) {
        field.copy_from_slice(&len);
    }
    let Some(checksum) = file.get(CHECKED_AT..).map(xxh3_64) else { return };
    if let Some(field) = file.get_mut(CHECKSUM_AT..CHECKED_AT) {
        field.copy_from_slice(&checksum.to_le_bytes());
    }
}
