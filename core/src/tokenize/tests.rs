//! Golden ids of HF's `tokenizers` 0.23.3 on small tokenizers of every family
//! (`tests/golden/tokenizers`, with the generator), and what must hold for any
//! tokenizer: slices, limits, refusals, total loading.

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

macro_rules! entry {
    ($name:literal) => {
        Golden {
            name: $name,
            json: include_bytes!(concat!("../../../tests/golden/tokenizers/", $name, ".json")),
            ids: include_str!(concat!("../../../tests/golden/tokenizers/", $name, ".ids.json")),
        }
    };
}

mod borders;
mod loading;
mod refusals;

use super::key::WordKey;
use super::*;
use crate::limits::{PRETOKEN_BYTES_MAX, TOKENIZE_TEXT_BYTES_MAX};

struct Golden {
    name: &'static str,
    json: &'static [u8],
    ids: &'static str,
}

/// What `compile` takes.
static COMPILED: [Golden; 7] = [
    entry!("llama3"),
    entry!("qwen3"),
    entry!("gptoss"),
    entry!("deepseek3"),
    entry!("gpt2"),
    entry!("gemma3"),
    entry!("glued"),
];

/// What `compile` refuses.
static REFUSED: [Golden; 2] = [entry!("wordpiece"), entry!("unigram")];

fn golden(name: &str) -> &'static Golden {
    COMPILED.iter().find(|golden| golden.name == name).expect("one of the list")
}

impl Golden {
    fn file(&self) -> Vec<u8> {
        compile::compile(self.json).expect("compiles")
    }

    fn tokenizer(&self) -> Tokenizer {
        Tokenizer::load(AlignedBytes::from_slice(&self.file())).expect("loads")
    }

    fn expected(&self) -> Vec<Vec<TokenId>> {
        serde_json::from_str(self.ids).expect("golden ids")
    }
}

fn texts() -> Vec<String> {
    serde_json::from_str(include_str!("../../../tests/golden/tokenizers/texts.json"))
        .expect("golden texts")
}

/// A long text with all the others in it.
fn long_text() -> String {
    texts().join("\n\n")
}

fn encode(tokenizer: &mut Tokenizer, text: &str) -> Vec<TokenId> {
    let mut ids = Vec::new();
    tokenizer.encode(text, &mut ids).expect("encodes");
    ids
}

fn assert_golden(tokenizer: &mut Tokenizer, golden: &Golden) {
    let (texts, expected) = (texts(), golden.expected());
    assert_eq!(texts.len(), expected.len());
    assert!(texts.len() > 800, "a short list of texts would prove little");
    for (text, expected) in texts.iter().zip(&expected) {
        assert_eq!(&encode(tokenizer, text), expected, "{}: {text:?}", golden.name);
    }
}

/// Goal: the ids are HF's, for every family.
/// Method: golden ids, first with empty caches, then with full ones.
#[test]
fn ids_are_those_of_hf() {
    for golden in &COMPILED {
        let mut tokenizer = golden.tokenizer();
        assert_golden(&mut tokenizer, golden);
        assert_golden(&mut tokenizer, golden);
    }
}

/// Goal: slices give what encoding at once gives, and stop at their budget.
/// Method: one long text, budgets from one byte up.
#[test]
fn slices_add_up() {
    let text = long_text();
    for golden in &COMPILED {
        let mut tokenizer = golden.tokenizer();
        let whole = encode(&mut tokenizer, &text);
        for budget in [0, 1, 100, 4096, usize::MAX] {
            let (mut progress, mut ids, mut slices) = (Progress::default(), Vec::new(), 1);
            while !tokenizer.encode_slice(&text, &mut progress, budget, &mut ids).expect("encodes")
            {
                slices += 1;
            }
            assert_eq!(ids, whole, "{} in slices of {budget}", golden.name);
            let least = text.len() / (budget.saturating_add(PRETOKEN_BYTES_MAX));
            assert!(slices > least, "{} in {slices} slices of {budget}", golden.name);
        }
    }
}

/// Goal: a text in Normalization Form D gives the ids of its Form C, also when
/// it is longer than what is normalized at a time.
#[test]
fn long_text_is_normalized_like_short() {
    let mut qwen = golden("qwen3").tokenizer();
    // 2 + 3 bytes that become 1 + 2, beyond the length of a chunk.
    let apart = "ze\u{301} ".repeat(5000);
    let together = "z\u{e9} ".repeat(5000);
    assert_eq!(encode(&mut qwen, &apart), encode(&mut qwen, &together));
}

/// Goal: the bound on one pre-token holds exactly, for both kinds of BPE.
/// Method: `thth...` is one word to each tokenizer, since "th" and "ht" both
/// occur within its tokens.
#[test]
fn long_pretokens_are_refused() {
    let word = "th".repeat(PRETOKEN_BYTES_MAX);
    for golden in &COMPILED {
        let mut tokenizer = golden.tokenizer();
        let mut encode =
            |bytes: usize| tokenizer.encode(word.get(..bytes).unwrap(), &mut Vec::new());
        let refused = Err(EncodeError::PretokenTooLong);
        assert_eq!(encode(PRETOKEN_BYTES_MAX), Ok(()), "{}", golden.name);
        assert_eq!(encode(PRETOKEN_BYTES_MAX + 1), refused, "{}", golden.name);
        assert_eq!(encode(2 * PRETOKEN_BYTES_MAX), refused, "{}", golden.name);
    }
}

/// Goal: a pattern that looks far ahead from every byte ends with an error
/// instead of taking quadratic time.
#[test]
fn work_is_bounded() {
    let pattern = serde_json::json!({"Regex": r"a+b|a|[^a]+"});
    let file = refusals::with(golden("llama3"), "/pre_tokenizer/pretokenizers/0/pattern", pattern);
    let file = AlignedBytes::from_slice(&file.expect("compiles"));
    let mut tokenizer = Tokenizer::load(file).expect("loads");
    let mut ids = Vec::new();
    assert_eq!(tokenizer.encode(&"a".repeat(100), &mut ids), Ok(()));
    let long = "a".repeat(PRETOKEN_BYTES_MAX);
    assert_eq!(tokenizer.encode(&long, &mut ids), Err(EncodeError::TooMuchWork));
}

/// Goal: what the quick check of Normalization Form C passes over is normal and
/// no mark, and first bytes are found wherever they are.
#[test]
fn shortcuts_pass_over_nothing() {
    use unicode_normalization_alignments::{IsNormalized, is_nfc_quick};
    for character in ('\0'..=char::MAX).filter(|&character| normalize::is_easy(character)) {
        // Behind a mark of a high class, any other mark would be out of order.
        for text in [&['\u{35d}', character][..], &[character]] {
            let quick = is_nfc_quick(text.iter().copied());
            assert!(matches!(quick, IsNormalized::Yes), "{character:?}");
        }
    }
    for golden in &COMPILED {
        let file = AlignedBytes::from_slice(&golden.file());
        let layout = Layout::read(&file).expect("layout");
        let first = added::first_bytes(layout.tables(file.as_bytes()).expect("tables").added);
        let text: Vec<u8> = (0..=u8::MAX).chain(b"xyz".repeat(9)).chain(*b"<a\n<").collect();
        for start in 0..text.len() {
            for end in [start, start + 1, start + 9, text.len()] {
                let part = text.get(start..end).unwrap_or_default();
                let slow = part.iter().position(|&byte| first.contains(byte));
                assert_eq!(first.find(part), slow, "{} in {start}..{end}", golden.name);
            }
        }
    }
}

/// Goal: a SentencePiece text without spaces is cut where no merge reaches
/// across, so that Chinese prompts are not one pre-token.
#[test]
fn text_without_spaces_has_borders() {
    let mut gemma = golden("gemma3").tokenizer();
    let chinese = "路由器会选择缓存中已经有提示词前缀的那一台机器，".repeat(1000);
    assert!(!encode(&mut gemma, &chinese).is_empty());
}

/// Goal: merging by scan and by heap agree, at any length.
/// Method: words of a few letters, so that most pairs merge and merges overlap.
#[test]
fn heap_and_scan_agree() {
    let file = AlignedBytes::from_slice(&golden("gpt2").file());
    let layout = Layout::read(&file).expect("layout");
    let tables = layout.tables(file.as_bytes()).expect("tables");
    let (mut by_scan, mut by_heap) = (merge::Merger::new(&tables), merge::Merger::new(&tables));
    let mut state = 1_u32;
    let mut merged = 0;
    for len in (0..300).chain([2000]) {
        let symbols: Vec<TokenId> = (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let letters = b"theransio ";
                tables.byte_tokens[usize::from(letters[(state >> 16) as usize % letters.len()])]
            })
            .collect();
        for merger in [&mut by_scan, &mut by_heap] {
            merger.clear();
            symbols.iter().for_each(|&symbol| merger.push(&tables, symbol));
        }
        by_scan.merge_by_scan(&tables);
        by_heap.merge_by_heap(&tables);
        assert_eq!(by_scan.merged(), by_heap.merged(), "{len} symbols");
        merged += symbols.len() - by_scan.merged().len();
    }
    assert!(merged > 10_000, "only {merged} merges were made");
}

/// Goal: a later split works on each match of an earlier one, and what neither
/// matches stays apart where an earlier split cut.
/// Method: pieces as HF's pre-tokenizer of the same file gives them.
#[test]
fn sequences_of_splits_cut_alike() {
    let file = AlignedBytes::from_slice(&golden("deepseek3").file());
    let layout = Layout::read(&file).expect("layout");
    let tables = layout.tables(file.as_bytes()).expect("tables");
    let expected: [&[&str]; 2] = [
        &[
            "a",
            "\u{3040}\u{3097}",
            "\u{378}\u{379}",
            " ",
            "カ",
            "・",
            "カ",
            "゠",
            "か",
            "123",
            "45",
            "漢",
        ],
        &["\u{378}", "\u{3040}か", "\u{3098}"],
    ];
    for pieces in expected {
        let text = pieces.concat();
        let (mut at, mut found) = (0, Vec::new());
        while at < text.len() {
            let piece = split::next_piece(&tables, text.as_bytes(), at, u64::MAX).expect("piece");
            found.push(text.get(at..piece.end).expect("a border of characters"));
            at = piece.end;
        }
        assert_eq!(found, pieces);
    }
}

/// Goal: mistakes of the caller and long texts are errors, not panics.
#[test]
fn other_texts_and_long_texts_are_errors() {
    let mut llama = golden("llama3").tokenizer();
    let (mut progress, mut ids) = (Progress::default(), Vec::new());
    assert_eq!(llama.encode_slice("ab cd \u{e9}\u{e9}", &mut progress, 1, &mut ids), Ok(false));
    let other = llama.encode_slice("something else", &mut progress, 1, &mut ids);
    assert_eq!(other, Err(EncodeError::OtherText));
    // The same length, but other characters: no error that can be seen, and
    // no panic either.
    let mut progress = Progress::default();
    for text in ["abcd\u{e9}\u{e9}", "\u{e9}\u{e9}\u{e9}\u{e9}", "\u{6f22}\u{6f22}ab"] {
        let _ = llama.encode_slice(text, &mut progress, 1, &mut ids);
    }
    let long = " a".repeat(TOKENIZE_TEXT_BYTES_MAX / 2 + 1);
    assert_eq!(llama.encode(&long, &mut ids), Err(EncodeError::TextTooLong));
}

/// Goal: a hit in a cache compares the word, not its hash.
#[test]
fn equal_hashes_are_not_equal_words() {
    let key = |word: &[u8]| WordKey { hash: 7, ..WordKey::of(word, 0, word) };
    let mut short = cache::ShortWords::new(16);
    short.remember(3, &key(b"one"), &[1]);
    assert_eq!(short.find(3, &key(b"one")), Some(&[1][..]));
    assert_eq!(short.find(3, &key(b"two")), None);
    assert_eq!(short.find(2, &key(b"on")), None);
    assert_eq!(short.find(4, &key(b"one\0")), None, "a zero is a byte, too");
    short.remember(17, &key(b"sixteen and more."), &[2]);
    short.remember(3, &key(b"ids"), &[1; cache::SHORT_IDS + 1]);
    assert_eq!(short.find(3, &key(b"one")), Some(&[1][..]), "what does not fit replaces nothing");

    let mut long = cache::LongWords::new(16);
    let (one, two) = (&b"a word of twenty-five bytes"[..], &b"a word of twenty-five bites"[..]);
    long.remember(one, &key(one), &[1]);
    assert_eq!(long.find(one, &key(one)), Some(&[1][..]));
    assert_eq!(long.find(two, &key(two)), None);
    long.remember(&[b'x'; 95], &key(two), &[2]);
    long.remember(two, &key(two), &[1; 25]);
    assert_eq!(long.find(one, &key(one)), Some(&[1][..]), "what does not fit replaces nothing");
}

/// Goal: the key of a word is that of its bytes, whatever stands around it.
#[test]
fn keys_are_of_the_word_alone() {
    let text = b"some text that is long enough for words of all lengths up to forty bytes";
    for start in 0..text.len() {
        for len in 1..=40.min(text.len() - start) {
            let word = &text[start..start + len];
            let key = WordKey::of(text, start, word);
            assert_eq!(key, WordKey::of(word, 0, word), "{len} bytes at {start}");
            let mut other = word.to_vec();
            *other.last_mut().unwrap() ^= 1;
            assert_ne!(key, WordKey::of(&other, 0, &other));
        }
    }
}

/// Goal: the table for ASCII cuts as the automaton does, wherever it cuts.
/// Method: all texts of four characters of every kind before two ends, and
/// every position of the golden texts.
#[test]
fn ascii_is_split_like_any_text() {
    let characters = b" a\nZs1'.\r<\t/";
    let mut texts = texts();
    for number in 0..characters.len().pow(4) {
        let pick = |place: u32| {
            let index = number / characters.len().pow(place) % characters.len();
            char::from(characters[index])
        };
        let text: String = (0..4).map(pick).collect();
        texts.push([&text, "x"].concat());
        texts.push([&text, "s 1"].concat());
    }
    for golden in COMPILED.iter().filter(|golden| golden.name != "gemma3" && golden.name != "glued")
    {
        let file = AlignedBytes::from_slice(&golden.file());
        let layout = Layout::read(&file).expect("layout");
        let tables = layout.tables(file.as_bytes()).expect("tables");
        let ascii = ascii::AsciiSplit::new(&tables);
        let (mut known, mut ascii_bytes) = (0, 0);
        for text in &texts {
            ascii_bytes += text.bytes().filter(u8::is_ascii).count();
            for (at, _) in text.char_indices() {
                if let Some(piece) = ascii.next_piece(text.as_bytes(), at) {
                    let slow = split::next_piece(&tables, text.as_bytes(), at, u64::MAX);
                    let slow = slow.expect("a piece");
                    assert_eq!(piece.end, slow.end, "{}: {at} of {text:?}", golden.name);
                    assert!(piece.seen <= slow.seen);
                    known += 1;
                }
            }
        }
        assert!(known * 2 > ascii_bytes, "{}: {known} of {ascii_bytes}", golden.name);
    }
}

/// Goal: equal inputs give equal files.
#[test]
fn compiling_is_deterministic() {
    assert_eq!(golden("gemma3").file(), golden("gemma3").file());
    assert_eq!(golden("qwen3").file(), golden("qwen3").file());
}

/// Goal: a `tokenizer.json` as it is loads with the engine for it, and says
/// what is missing without.
#[test]
fn json_files_need_the_other_engine() {
    for golden in REFUSED.iter().chain(&COMPILED) {
        let file = AlignedBytes::from_slice(&compile::wrap_json(golden.json));
        if cfg!(feature = "hf-tokenizers") {
            assert_golden(&mut Tokenizer::load(file).expect("loads"), golden);
        } else {
            assert_eq!(Tokenizer::load(file).err(), Some(LoadError::NeedsHfTokenizers));
        }
    }
    if cfg!(feature = "hf-tokenizers") {
        let file = AlignedBytes::from_slice(&compile::wrap_json(b"{}"));
        assert_eq!(Tokenizer::load(file).err(), Some(LoadError::HfRefused));
    }
}

/// Goal: memory is told, and is the file and the caches.
#[test]
fn memory_is_bounded() {
    let golden = golden("llama3");
    let file = golden.file();
    let mut tokenizer = golden.tokenizer();
    let fresh = tokenizer.memory_bytes();
    assert!(fresh > file.len() && fresh < file.len() + (3 << 20), "{fresh}");
    encode(&mut tokenizer, &long_text());
    assert!(tokenizer.memory_bytes() < fresh + (1 << 20));
}
