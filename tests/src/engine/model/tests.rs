//! Tests of tokenizer and template set-up, on the committed small model.

use super::*;

fn tiny() -> Model {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny");
    Model::load(&directory).unwrap()
}

fn messages(json: &str) -> Vec<Value> {
    serde_json::from_str(json).unwrap()
}

fn context(json: &str) -> ChatContext {
    ChatContext {
        messages: messages(json),
        tools: Value::from(()),
        documents: Value::from(()),
        add_generation_prompt: true,
        kwargs: Vec::new(),
    }
}

#[test]
fn a_chat_is_rendered() {
    let text = tiny()
        .render(&context(
            r#"[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi"}]"#,
        ))
        .unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
         <|im_start|>assistant\n"
    );
}

/// Goal: tools reach the template in the request's order and in Python's form.
#[test]
fn tools_keep_their_order_and_pythons_separators() {
    let mut chat = context(r#"[{"role":"user","content":"Hi"}]"#);
    chat.tools = serde_json::from_str(r#"[{"type":"function","a":[1,2.5],"Z":"ü<b>"}]"#).unwrap();
    let text = tiny().render(&chat).unwrap();
    assert!(text.contains(r#"{"type": "function", "a": [1, 2.5], "Z": "ü<b>"}"#), "{text}");
}

#[test]
fn special_tokens_of_the_template_are_single_tokens() {
    let model = tiny();
    let tokens = model.chat_tokens(&context(r#"[{"role":"user","content":""}]"#)).unwrap();
    let marker = model.tokenizer.token_to_id("<|im_start|>").unwrap();
    assert_eq!(tokens.first(), Some(&marker));
    assert_eq!(tokens.iter().filter(|&&token| token == marker).count(), 2);
}

/// Goal: an answer sent back as history continues the cached prefix exactly.
/// Method: for many prompts, the tokens of prompt + answer must be the start of
/// the next turn's tokens.
#[test]
fn an_answer_sent_back_gives_the_same_tokens() {
    let model = tiny();
    for case in 0..200 {
        let first = format!(r#"[{{"role":"user","content":"Question {case}"}}]"#);
        let prompt = model.chat_tokens(&context(&first)).unwrap();
        let seed = answer_seed(&prompt);
        let words: Vec<Word> = (0..24).map(|place| model.word(seed, place)).collect();
        let text: String = words.iter().map(|word| word.text.as_str()).collect();
        let mut expected = prompt;
        expected.extend(words.iter().map(|word| word.token));

        let next = format!(
            r#"[{{"role":"user","content":"Question {case}"}},
                {{"role":"assistant","content":"{text}"}},{{"role":"user","content":"More"}}]"#
        );
        let next = model.chat_tokens(&context(&next)).unwrap();

        assert_eq!(next.get(..expected.len()), Some(expected.as_slice()), "case={case} {text}");
    }
}

#[test]
fn answers_follow_from_the_prompt() {
    let model = tiny();
    let words = |prompt: &[u32]| -> Vec<Word> {
        (0..8).map(|place| model.word(answer_seed(prompt), place)).collect()
    };
    assert_eq!(words(&[1, 2, 3]), words(&[1, 2, 3]));
    assert_ne!(words(&[1, 2, 3]), words(&[1, 2, 4]));
}

#[test]
fn missing_and_broken_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = Model::load(folder.path()).err().unwrap();
    assert!(matches!(&error, ModelError::Unreadable(path) if path.ends_with("tokenizer.json")));
    std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    let error = Model::load(folder.path()).err().unwrap();
    assert!(matches!(&error, ModelError::Invalid(path) if path.ends_with("tokenizer.json")));
}
