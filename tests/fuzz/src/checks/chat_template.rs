//! A conversation through a chat template.
//!
//! Input: a byte that chooses, then either a body for the tiny model's template or
//! a template for a fixed conversation: bodies come from clients, templates from
//! whatever model is served. Both end, with text or an error.

use std::sync::OnceLock;

use warmpath_core::limits::RENDERED_BYTES_MAX;
use warmpath_core::render::{
    ChatTemplate, Flavour, RenderOptions, TemplateForm, TemplateSource, WallClock,
};
use warmpath_core::request::{Endpoint, ParsedRequest, Prompt, parse};

use super::fixtures::{behind, json, read, text};
use super::request_body::conversations;

/// Set in the first byte: the rest is a template.
const TEMPLATE: u8 = 0x80;

/// Longest of the golden templates that are seeds, in bytes.
const SEED_BYTES_MAX: usize = 8_192;

const NOW: WallClock = WallClock { unix_seconds: 1_700_000_000, utc_offset_seconds: 3_600 };

const CONVERSATION: &str = r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":[{"type":"text","text":"a"}]},{"role":"assistant","content":null,"tool_calls":[{"id":"1","type":"function","function":{"name":"f","arguments":"{\"a\":[1,2.5]}"}}]},{"role":"tool","tool_call_id":"1","content":"é"}],"tools":[{"type":"function","function":{"name":"f","description":"d","parameters":{"type":"object","properties":{"a":{"type":"array"}}}}}],"chat_template_kwargs":{"enable_thinking":false}}"#;

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let mut bodies = conversations();
    bodies.push(CONVERSATION.as_bytes().to_vec());
    let golden = json("tests/golden/templates/cases.json");
    let templates: Vec<Vec<u8>> = golden
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|case| case["template"].as_str())
        .filter(|template| template.len() <= SEED_BYTES_MAX)
        .map(|template| template.as_bytes().to_vec())
        .collect();
    let mut seeds: Vec<Vec<u8>> =
        [0, 1, 2].iter().flat_map(|head| behind(&[*head], &bodies)).collect();
    seeds.extend(behind(&[TEMPLATE | 1], &templates));
    seeds
}

pub(super) fn check(data: &[u8]) {
    let Some((head, input)) = data.split_first() else { return };
    let options = RenderOptions {
        flavour: flavour(*head),
        exclude_tools_when_choice_none: head & 8 != 0,
        ..RenderOptions::default()
    };
    if head & TEMPLATE == 0 {
        return render(tiny(*head), input);
    }
    let Ok(template) = str::from_utf8(input) else { return };
    let source = TemplateSource {
        chat_template: TemplateForm::Single(template.to_owned()),
        special_tokens: vec![("eos_token".to_owned(), "<|im_end|>".to_owned())],
    };
    if let Ok(template) = ChatTemplate::compile_with(&source, options) {
        render(&template, CONVERSATION.as_bytes());
    }
}

fn flavour(head: u8) -> Flavour {
    match head % 3 {
        0 => Flavour::Raw,
        1 => Flavour::Vllm,
        _ => Flavour::Dynamo,
    }
}

/// The tiny model's template, compiled once for each flavour.
fn tiny(head: u8) -> &'static ChatTemplate {
    static TINY: OnceLock<[ChatTemplate; 3]> = OnceLock::new();
    let all = TINY.get_or_init(|| {
        let jinja = text("tests/models/tiny/chat_template.jinja");
        let config = read("tests/models/tiny/tokenizer_config.json");
        let source = TemplateSource::from_tokenizer_config(&config, Some(&jinja)).expect("a model");
        [0, 1, 2].map(|head| {
            let options = RenderOptions { flavour: flavour(head), ..RenderOptions::default() };
            ChatTemplate::compile_with(&source, options).expect("compiles")
        })
    });
    &all[usize::from(head % 3)]
}

fn render(template: &ChatTemplate, body: &[u8]) {
    let Ok(ParsedRequest { prompt: Prompt::Chat(chat), .. }) =
        parse(Endpoint::ChatCompletions, body)
    else {
        return;
    };
    let once = template.render(&chat, NOW);
    if let Ok(text) = &once {
        assert!(text.len() <= RENDERED_BYTES_MAX, "the prompt is bounded");
    }
    assert_eq!(once, template.render(&chat, NOW), "the same conversation, the same prompt");
}
