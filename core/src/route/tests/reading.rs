//! Prompts that are read a part at a time.

use super::*;
use crate::ids::TokenId;

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

/// A conversation with words, digits, spaces and letters of several scripts.
fn long_text() -> String {
    let words =
        ["river", " 12345", "\n\n", " straße", "  ", "中文字", "don't", " x=1;", "\t\u{e9}"];
    (0..3_000_usize).map(|n| words[n * n % 11 % words.len()]).collect()
}

fn body(text: &str) -> String {
    let messages = [serde_json::json!({ "role": "user", "content": text })];
    serde_json::json!({ "model": "seen", "messages": messages }).to_string()
}

fn begin(models: &mut Models, endpoint: Endpoint, body: &str) -> Reading {
    let request = parse(endpoint, body.as_bytes()).unwrap();
    let circumstances = Circumstances {
        body_bytes: body.len(),
        now: NOW,
        trusted_salt: Some("salt"),
        salt_from_body: true,
        demands: &Demands { strict_priority: 7, ..Demands::default() },
    };
    Reading::begin(models, &Roster::default(), &request, &circumstances, &mut Random::seeded(1))
}

/// Goal: whatever the steps, the same is read; and each does only its part.
/// Method: budgets from one byte to all at once, against reading at once.
#[test]
fn steps_of_any_size_read_the_same() {
    let mut models = models();
    let tokens: Vec<TokenId> = (0..5_000).collect();
    let requests = [
        (Endpoint::ChatCompletions, body(&long_text())),
        (Endpoint::ChatCompletions, body("")),
        (
            Endpoint::Completions,
            serde_json::json!({ "model": "seen", "prompt": long_text() }).to_string(),
        ),
        (
            Endpoint::Completions,
            serde_json::json!({ "model": "seen", "prompt": tokens }).to_string(),
        ),
        (
            Endpoint::Completions,
            serde_json::json!({ "model": "seen", "prompt": [TEXT, "more"] }).to_string(),
        ),
    ];
    for (endpoint, body) in requests {
        let whole = begin(&mut models, endpoint, &body).step(&mut models, usize::MAX).unwrap();
        assert_eq!(whole.demands.strict_priority, 7);
        for budget in [1, 7, 100, 1_000, 9_999] {
            let mut reading = begin(&mut models, endpoint, &body);
            let at_first = reading.bytes_left();
            let mut steps = 0;
            let read = loop {
                steps += 1;
                assert!(steps <= body.len() * 3 + 2, "{budget}: there is an end");
                if let Some(read) = reading.step(&mut models, budget) {
                    break read;
                }
                assert!(reading.bytes_left() <= at_first);
            };
            assert_eq!(read, whole, "{budget}");
            assert!(steps >= at_first / budget / 4, "{budget}: {steps} steps for {at_first}");
        }
    }
}

#[test]
fn what_is_held_is_known() {
    let mut models = models();
    let text = long_text();
    let mut reading = begin(&mut models, Endpoint::ChatCompletions, &body(&text));
    assert!(reading.held_bytes() >= text.len() && reading.bytes_left() >= text.len());
    assert_eq!(reading.step(&mut models, 5_000), None);
    let left = reading.bytes_left();
    assert!(left < text.len() && left + 8_000 > text.len(), "{left} of {}", text.len());
    assert!(reading.step(&mut models, usize::MAX).is_some());
    let mut reading = begin(&mut models, Endpoint::Responses, r#"{"model":"seen"}"#);
    assert_eq!(reading.bytes_left(), 0);
    assert_eq!(reading.step(&mut models, 0).unwrap().reason, Reason::ByLoadApi);
}

/// Cards that come between two steps of a reading, and what becomes of it.
fn changed(change: impl FnOnce(&mut Vec<ModelCard>)) -> (Prepared, Vec<TokenId>) {
    let mut models = models();
    let blob = models.model(0).unwrap().card().tokenizer.unwrap();
    let text = long_text();
    let mut reading = begin(&mut models, Endpoint::ChatCompletions, &body(&text));
    assert_eq!(reading.step(&mut models, 1_000), None);
    let mut cards = vec![card("seen", Ok(blob)), card("blind", Err(Blind::Tokenizer))];
    change(&mut cards);
    models.take_cards(&Cards { models: cards });
    let prepared = reading.step(&mut models, usize::MAX).unwrap();
    (prepared, encode(&format!("<user>{text}<reply>")))
}

#[test]
fn a_model_that_stays_is_read_on() {
    let (read, tokens) = changed(|cards| {
        cards[1] = card("another", Err(Blind::Loading));
        cards.push(card("blind", Err(Blind::Tokenizer)));
    });
    assert_eq!((read.reason, read.model), (Reason::Kv, Some(0)));
    assert_eq!(read.tokens, tokens);
}

#[test]
fn blocks_are_those_of_the_card_in_force_at_the_end() {
    let (read, tokens) = changed(|cards| cards[0].block_size = 8);
    let mut hashes = Vec::new();
    let shape = BlockShape { block_size: 8, eagle: false };
    let salt = Salt { cache_salt: Some("salt"), lora: None };
    sequence_hashes(&tokens, shape, salt, &mut hashes);
    assert_eq!((read.hashes, read.block_size), (hashes, 8));
}

#[test]
fn a_model_that_goes_leaves_its_request_to_all_workers() {
    let (gone, _) = changed(|cards| cards.truncate(0));
    let (freed, _) = changed(|cards| cards[0].name.clear());
    let (renamed, _) = changed(|cards| cards[0].name = "other".into());
    for read in [gone, freed, renamed] {
        assert_eq!((read.reason, read.model), (Reason::UnknownModel, None));
        assert_eq!(read.demands.strict_priority, 7);
        assert!(read.tokens.is_empty() && read.hashes.is_empty() && read.prompt_tokens > 0);
    }
}

#[test]
fn a_model_with_another_tokenizer_is_routed_by_load() {
    let (other, _) = changed(|cards| cards[0].tokenizer = Ok(BlobId { hash: 1, len: 1 }));
    let (blind, _) = changed(|cards| cards[0].tokenizer = Err(Blind::Tokenizer));
    for read in [other, blind] {
        assert_eq!((read.reason, read.model), (Reason::WarmingModel, Some(0)));
        assert!(read.tokens.is_empty() && !read.is_exact());
    }
}

#[test]
fn a_reading_that_is_given_up_is_routed_by_load() {
    let mut models = models();
    let mut reading = begin(&mut models, Endpoint::ChatCompletions, &body(&long_text()));
    assert_eq!(reading.step(&mut models, 1_000), None);
    let read = reading.give_up(&models, Reason::PromptTooLong);
    assert_eq!((read.reason, read.model), (Reason::PromptTooLong, Some(0)));
    assert_eq!(read.demands.strict_priority, 7);
    assert!(read.tokens.is_empty() && read.prompt_tokens > 0);
}
