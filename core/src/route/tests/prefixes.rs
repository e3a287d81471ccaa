//! Prompts whose beginnings were read before.

use super::*;
use crate::prefix::PrefixCache;

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

/// What the models of a gateway are called; some share a tokenizer, and some of
/// those a block size.
const NAMES: [&str; 4] = ["seen", "twin", "wide", "other"];

fn models(bytes_max: usize) -> Models {
    let files = [TOKENIZER, include_bytes!("../../../../tests/golden/tokenizers/llama3.json")];
    let files = files.map(|json| compile(json).unwrap());
    let [qwen, llama] = [BlobId::of(&files[0]), BlobId::of(&files[1])];
    let mut models = Models::default();
    *models.prefixes_mut() = PrefixCache::new(bytes_max, 0x5eed);
    models.take_cards(&Cards {
        models: vec![
            card("seen", Ok(qwen)),
            card("twin", Ok(qwen)),
            ModelCard { block_size: 16, eagle: true, ..card("wide", Ok(qwen)) },
            card("other", Ok(llama)),
        ],
    });
    for (blob, file) in [qwen, llama].into_iter().zip(&files) {
        assert!(models.load(blob, AlignedBytes::from_slice(file)));
    }
    models
}

/// Words, digits, marks that combine, and what looks like a special token.
fn words(random: &mut Random, count: u32) -> String {
    const WORDS: [&str; 16] = [
        " river",
        " 1234",
        "\n\n",
        " straße",
        "   ",
        "中文字",
        " don't",
        " x=1;",
        "e\u{301}",
        "\u{301}",
        "<|im_end|>",
        "<|im_",
        "\t",
        " HTTPServer",
        "🙂",
        "\r\n",
    ];
    (0..count).map(|_| WORDS[random.below(16) as usize]).collect()
}

/// A conversation that may change between two requests.
type Turns = Vec<String>;

fn change(turns: &mut Turns, random: &mut Random) {
    let at = random.below(u32::try_from(turns.len()).unwrap()) as usize;
    match random.below(6) {
        0 => turns.truncate(at + 1),
        1 => {
            let word = words(random, 1);
            let middle = turns[at].char_indices().nth(turns[at].chars().count() / 2);
            turns[at].insert_str(middle.map_or(0, |(middle, _)| middle), &word);
        }
        _ => {}
    }
    let count = random.below(300);
    turns.push(words(random, count));
}

fn body(model: &str, turns: &Turns, more: &str) -> String {
    let messages: Vec<serde_json::Value> = (0..)
        .zip(turns)
        .map(|(n, text)| {
            let role = if n % 2 == 0 { "user" } else { "assistant" };
            serde_json::json!({ "role": role, "content": text })
        })
        .collect();
    let messages = serde_json::to_string(&messages).unwrap();
    format!(r#"{{"model":"{model}","messages":{messages}{more}}}"#)
}

fn read(models: &mut Models, body: &str, budget: usize) -> Prepared {
    let request = parse(Endpoint::ChatCompletions, body.as_bytes()).unwrap();
    let circumstances = Circumstances {
        body_bytes: body.len(),
        now: NOW,
        trusted_salt: None,
        salt_from_body: true,
        demands: &Demands::default(),
    };
    let (roster, mut random) = (Roster::default(), Random::seeded(1));
    let mut reading = Reading::begin(models, &roster, &request, &circumstances, &mut random);
    loop {
        if let Some(read) = reading.step(models, budget) {
            return read;
        }
    }
}

/// Goal: whatever was read before, a prompt is read as without a cache.
/// Method: conversations that grow, end early and change in the middle, asked of
/// models that share and do not share tokenizers, with and without salts and
/// tokens before the text, in steps of any size, under limits from a few chunks
/// on.
#[test]
fn reading_with_a_cache_is_reading_without() {
    let mut without = models(0);
    for bytes_max in [50_000, 200_000, 1 << 24] {
        let mut with = models(bytes_max);
        let mut random = Random::seeded(bytes_max as u64);
        let mut conversations: Vec<Turns> = vec![vec!["You help.".to_owned()]; 5];
        for _ in 0..if cfg!(target_arch = "wasm32") { 30 } else { 250 } {
            let at = random.below(5) as usize;
            change(&mut conversations[at], &mut random);
            if random.below(10) == 0 {
                conversations[at] = conversations[(at + 1) % 5].clone();
            }
            let more = match random.below(6) {
                0 => r#","cache_salt":"tenant""#,
                1 => r#","add_special_tokens":true"#,
                _ => "",
            };
            let body = body(NAMES[random.below(4) as usize], &conversations[at], more);
            let budget = [1, 100, 3_000, usize::MAX][random.below(4) as usize];
            let expected = read(&mut without, &body, usize::MAX);
            assert_eq!(read(&mut with, &body, budget), expected);
            assert!(with.prefixes().bytes() <= bytes_max);
        }
        assert!(with.prefixes().counters().bytes_saved > 0, "{bytes_max}");
    }
    assert_eq!(without.prefixes().bytes(), 0);
}

/// Goal: models with the same tokenizer share what was read, others do not, and
/// neither do those who keep their caches apart.
#[test]
fn what_is_shared_is_the_tokenizer() {
    let turns = vec![words(&mut Random::seeded(7), 2_000)];
    let mut models = models(1 << 20);
    let mut saved = |model: &str, more: &str| {
        let before = models.prefixes().counters().bytes_saved;
        read(&mut models, &body(model, &turns, more), usize::MAX);
        models.prefixes().counters().bytes_saved - before
    };
    assert_eq!(saved("seen", ""), 0);
    assert_eq!(saved("other", ""), 0);
    assert_eq!(saved("seen", r#","cache_salt":"tenant""#), 0);
    let known = saved("seen", "");
    assert!(known > turns[0].len() as u64 / 2, "{known}");
    assert!(saved("twin", "") >= known && saved("wide", "") >= known);
    assert!(saved("seen", r#","cache_salt":"tenant""#) >= known);
}

/// Goal: a tokenizer that is loaded anew, or in another's place, starts with
/// nothing.
#[test]
fn what_was_read_with_a_tokenizer_goes_with_it() {
    let turns = vec![words(&mut Random::seeded(7), 2_000)];
    let mut models = models(1 << 20);
    let body = body("seen", &turns, "");
    let first = read(&mut models, &body, usize::MAX);
    let file = compile(TOKENIZER).unwrap();
    assert!(models.load(BlobId::of(&file), AlignedBytes::from_slice(&file)));
    assert_eq!(read(&mut models, &body, usize::MAX), first);
    assert_eq!(models.prefixes().counters().hits, 0);
}
