//! Borders: encoding goes on from one as if it had come there, in every text
//! that is the same as far as the border says.

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

use super::*;

/// Every border of a text, found by stopping behind each piece, and its ids.
fn borders(tokenizer: &mut Tokenizer, text: &str) -> (Vec<Border>, Vec<TokenId>) {
    let (mut progress, mut ids, mut found) = (Progress::default(), Vec::new(), Vec::new());
    loop {
        let ended = tokenizer.encode_slice(text, &mut progress, 1, &mut ids).expect("encodes");
        if let Some(border) = tokenizer.border(text, &progress) {
            assert_eq!(border.tokens, ids.len());
            assert!(border.at <= border.seen_to && border.seen_to <= text.len());
            found.push(border);
        }
        if ended {
            found.dedup();
            return (found, ids);
        }
    }
}

/// The ids of the rest of `text` from a border on.
fn resumed(tokenizer: &mut Tokenizer, text: &str, border: &Border) -> Vec<TokenId> {
    let mut progress = Progress::resume(text, border).expect("the text is long enough");
    let mut ids = Vec::new();
    while !tokenizer.encode_slice(text, &mut progress, 7, &mut ids).expect("encodes") {}
    ids
}

/// Checks one border of `text` against a text that ends otherwise.
fn check(tokenizer: &mut Tokenizer, text: &str, border: &Border, ids: &[TokenId], tail: &str) {
    let (before, after) = ids.split_at(border.tokens);
    assert_eq!(resumed(tokenizer, text, border), after, "{border:?} of {text:?}");
    let other = [text.get(..border.seen_to).expect("between characters"), tail].concat();
    let whole = encode(tokenizer, &other);
    assert_eq!(whole.get(..border.tokens), Some(before), "{border:?}: {text:?} and {other:?}");
    let rest = resumed(tokenizer, &other, border);
    assert_eq!(whole.get(border.tokens..), Some(&rest[..]), "{border:?} in {other:?}");
}

/// What may change the tokens of a text that it follows.
const TAILS: [&str; 16] = [
    "",
    " ",
    "\n",
    "s",
    "1",
    ".",
    "\u{301}",
    "\u{323}x",
    "|>",
    "m_end|>",
    "t_id|><|eot_id|>",
    "<|im_start|>",
    "\u{2581}a",
    "\u{11a8}",
    "\u{3099}",
    "\u{6f22}\u{5b57}",
];

/// Goal: every border of the golden texts is one.
#[test]
fn golden_texts_go_on_from_borders() {
    let texts = texts();
    for golden in &COMPILED {
        let mut tokenizer = golden.tokenizer();
        let mut count = 0;
        for (index, text) in texts.iter().enumerate() {
            let (borders, ids) = borders(&mut tokenizer, text);
            for (nth, border) in borders.iter().enumerate() {
                let tail = TAILS[(index + nth) % TAILS.len()];
                check(&mut tokenizer, text, border, &ids, tail);
            }
            count += borders.len();
        }
        assert!(count > texts.len() * 2, "{}: only {count} borders", golden.name);
    }
}

/// Goal: there are borders where a cache of prefixes needs them: behind added
/// tokens and words, up to shortly before the end.
#[test]
fn borders_are_close() {
    for (name, begin, end) in [
        ("qwen3", "<|im_start|>", "<|im_end|>"),
        ("gptoss", "<|start|>", "<|end|>"),
        ("llama3", "<|start_header_id|>", "<|eot_id|>"),
        ("deepseek3", "<\u{ff5c}User\u{ff5c}>", "<think>"),
        ("gpt2", "<|endoftext|>", ""),
        ("gemma3", "<start_of_turn>", "<end_of_turn>"),
    ] {
        let mut tokenizer = golden(name).tokenizer();
        let turn = [begin, "user\nIt is a question of some words?", end, "\n"].concat();
        let text = turn.repeat(5);
        let (borders, ids) = borders(&mut tokenizer, &text);
        let apart = borders.windows(2).map(|pair| pair[1].at - pair[0].at).max();
        assert!(apart < Some(24), "{name}: {apart:?} bytes apart");
        let ahead = borders.iter().map(|border| border.seen_to - border.at).max();
        assert!(ahead < Some(24), "{name}: {ahead:?} bytes ahead");
        let last = borders.last().expect("borders");
        assert!(last.at + 16 > text.len() && ids.len() - last.tokens < 8, "{name}: {last:?}");
    }
    // The end of an added token that no longer one begins with is a border.
    let (borders, ids) = borders(&mut golden("qwen3").tokenizer(), "word<|im_end|>");
    let border = Border { at: 14, seen_to: 14, tokens: ids.len() };
    assert_eq!(borders.last(), Some(&border));
}

/// Goal: a text that normalizing changes has borders, too, and they are some.
/// Method: marks that combine, that are put in order, that stay, and a character
/// that its normal form takes apart; every border against every tail.
#[test]
fn changed_texts_go_on_from_borders() {
    let changed =
        "Cafe\u{301} q\u{307}\u{323} x\u{301}y \u{958}\u{93e} \u{1100}\u{1161} \u{e9}\u{301} end. ";
    let text = ["<|im_start|>user\n", &changed.repeat(3), "<|im_end|>\n"].concat();
    let mut tokenizer = golden("qwen3").tokenizer();
    let (borders, ids) = borders(&mut tokenizer, &text);
    for border in &borders {
        for tail in TAILS {
            check(&mut tokenizer, &text, border, &ids, tail);
        }
    }
    let within = 17..17 + 3 * changed.len();
    let found = borders.iter().filter(|border| within.contains(&border.at)).count();
    assert!(found > 15, "{found} borders of {}", borders.len());
}

/// Goal: a text that is not the one of the border is noticed if it can be.
#[test]
fn other_texts_do_not_resume() {
    let border = Border { at: 3, seen_to: 5, tokens: 1 };
    assert!(Progress::resume("abcdef", &border).is_some());
    assert!(Progress::resume("abcd", &border).is_none());
    assert!(Progress::resume("ab\u{e9}def", &border).is_none());
    let backwards = Border { at: 3, seen_to: 2, tokens: 1 };
    assert!(Progress::resume("abcdef", &backwards).is_none());
}

/// Goal: the bound on tokens counts those before the border.
#[test]
fn resuming_counts_all_tokens() {
    let mut llama = golden("llama3").tokenizer();
    let border = Border { at: 0, seen_to: 0, tokens: crate::limits::TOKENIZE_TOKENS_MAX };
    let mut progress = Progress::resume("two words", &border).expect("resumes");
    let refused = llama.encode_slice("two words", &mut progress, usize::MAX, &mut Vec::new());
    assert_eq!(refused, Err(EncodeError::TooManyTokens));
}

#[cfg(not(target_arch = "wasm32"))]
mod random {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    static FILES: LazyLock<Vec<Vec<u8>>> =
        LazyLock::new(|| COMPILED.iter().map(Golden::file).collect());

    const TEXT: &str = concat!(
        "(\\PC|[ \n\t\r]|[ \n]{1,5}|<\\|im_(start|end)\\|>|<\\|eot_id\\|>|<\\|im_|<[|\u{ff5c}]|e\u{301}|\u{301}|",
        "<\u{ff5c}User\u{ff5c}>|<\u{ff5c}tool\u{2581}sep\u{ff5c}>|</?think>|<td>|<start_of_turn>|<eos>|<h[1-6]>|",
        "[a-z]{1,9}| [A-Za-z]{1,6}|'(s|ll|re)|[0-9]{1,5}|[\u{4e00}-\u{9fa5}]{1,4}|\u{2581}|\u{1100}\u{1161}|[.,!?]{1,3})",
    );

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]

        /// Goal: any border of any text is one, whatever follows it.
        #[test]
        fn any_text_goes_on_from_borders(
            which in 0..COMPILED.len(),
            text in prop::collection::vec(TEXT, 0..40).prop_map(|parts| parts.concat()),
            tails in prop::collection::vec(TEXT, 1..6),
        ) {
            let mut tokenizer = Tokenizer::load(AlignedBytes::from_slice(&FILES[which])).unwrap();
            let (borders, ids) = borders(&mut tokenizer, &text);
            for (nth, border) in borders.iter().enumerate() {
                let tail = &tails[nth % tails.len()..].concat();
                check(&mut tokenizer, &text, border, &ids, tail);
                check(&mut tokenizer, &text, border, &ids, TAILS[nth % TAILS.len()]);
            }
        }
    }
}
