//! Golden cases from `transformers`, and the engines' rewrites by example.

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};

use super::*;
use crate::json::RawJson;
use crate::request::{Endpoint, ParsedRequest, Prompt, parse};

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

mod golden;
mod python;

/// Friday, 26 July 2024, 13:05:09: the clock of the golden cases.
const NOW: WallClock = WallClock { unix_seconds: 1_721_999_109, utc_offset_seconds: 0 };

fn source(template: &str) -> TemplateSource {
    let token = |name: &str, text: &str| (name.to_owned(), text.to_owned());
    TemplateSource {
        chat_template: TemplateForm::Single(template.to_owned()),
        special_tokens: vec![
            token("bos_token", "<s>"),
            token("eos_token", "</s>"),
            token("unk_token", "<unk>"),
            token("pad_token", "<pad>"),
        ],
    }
}

fn compile(template: &str, flavour: Flavour) -> ChatTemplate {
    let options = RenderOptions { flavour, ..RenderOptions::default() };
    ChatTemplate::compile_with(&source(template), options).unwrap()
}

fn chat(body: &str) -> ChatPrompt<'_> {
    match parse(Endpoint::ChatCompletions, body.as_bytes()) {
        Ok(ParsedRequest { prompt: Prompt::Chat(chat), .. }) => chat,
        other => panic!("{body}: {other:?}"),
    }
}

/// Renders what `template` sees of `messages`, as JSON.
fn seen(flavour: Flavour, template: &str, body: &Json) -> Result<Json, RenderError> {
    let body = body.to_string();
    let text = compile(template, flavour).render(&chat(&body), NOW)?;
    Ok(serde_json::from_str(&text).unwrap())
}

const DUMP: &str = "{{ messages|tojson }}";
/// Dumps the messages, and passes for a template that loops over parts.
const DUMP_PARTS: &str = "{% if messages[0].content is string %}{{ messages|tojson }}{% elif messages[0].content[0].text == 'warmpath-probe' %}warmpath-probe{% else %}{{ messages|tojson }}{% endif %}";

#[test]
fn content_formats_are_found_out() {
    let loops = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}";
    let only_parts =
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}";
    let only_text = "{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}";
    let prints = "{% for m in messages %}{{ m.content }}{% endfor %}";
    for (template, vllm, dynamo) in [
        (loops, ContentFormat::Parts, ContentFormat::Text),
        (only_parts, ContentFormat::Parts, ContentFormat::Parts),
        (only_text, ContentFormat::Text, ContentFormat::Text),
        (prints, ContentFormat::Text, ContentFormat::Text),
        (DUMP, ContentFormat::Text, ContentFormat::Text),
    ] {
        assert_eq!(compile(template, Flavour::Vllm).content_format(), vllm, "{template}");
        assert_eq!(compile(template, Flavour::Dynamo).content_format(), dynamo, "{template}");
    }
}

#[test]
fn vllm_rebuilds_messages_as_text() {
    let body = json!({ "messages": [
        { "content": [{ "type": "text", "text": "a" }, "b", { "type": "text", "text": "" },
            { "type": "input_text", "text": "c" }], "role": "user", "name": "n", "x": 1 },
        { "role": "assistant", "content": null, "reasoning_content": "r", "tool_calls": [
            { "id": "1", "type": "function", "function": { "name": "f", "arguments": "{\"a\": 1.0}" } },
            { "id": "2", "type": "function", "function": { "name": "f", "arguments": "" } },
            { "id": "3", "type": "function", "function": { "arguments": "null", "name": "f" } },
        ] },
        { "role": "assistant", "content": "t", "tool_calls": [] },
        { "role": "tool", "content": [{ "type": "text", "text": "x" }], "tool_call_id": "1" },
    ] });
    let call = |id: &str, arguments: Json| json!({ "id": id, "type": "function", "function": { "name": "f", "arguments": arguments } });
    let expected = json!([
        { "role": "user", "content": "a\nb\nc", "name": "n" },
        { "role": "assistant", "content": "",
          "tool_calls": [call("1", json!({ "a": 1.0 })), call("2", json!({})), call("3", json!({}))],
          "reasoning": "r", "reasoning_content": "r" },
        { "role": "assistant", "content": "t" },
        { "role": "tool", "content": "x", "tool_call_id": "1" },
    ]);
    assert_eq!(seen(Flavour::Vllm, DUMP, &body), Ok(expected));
}

#[test]
fn vllm_splits_text_into_parts_for_templates_that_loop() {
    let body = json!({ "messages": [
        { "role": "user", "content": "a" },
        { "role": "user", "content": [{ "type": "text", "text": "b", "x": 1 }, { "type": "text", "text": "" }] },
        { "role": "tool", "content": [{ "type": "text", "text": "c" }, { "type": "text", "text": "d" }] },
        { "role": "assistant", "content": null },
    ] });
    let part = |text: &str| json!({ "type": "text", "text": text });
    let expected = json!([
        { "role": "user", "content": [part("a")] },
        { "role": "user", "content": [part("b"), part("")] },
        { "role": "tool", "content": "c\nd" },
        { "role": "assistant", "content": [] },
    ]);
    assert_eq!(seen(Flavour::Vllm, DUMP_PARTS, &body), Ok(expected));
}

#[test]
fn dynamo_joins_text_parts_and_keeps_the_rest() {
    let body = json!({ "messages": [
        { "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "" }], "role": "user", "x": 1 },
        { "role": "assistant", "tool_calls": [{ "function": { "name": "f", "arguments": "{\"k\":2}" } }] },
    ] });
    let expected = json!([
        { "content": "a\n", "role": "user", "x": 1 },
        { "role": "assistant", "tool_calls": [{ "function": { "name": "f", "arguments": { "k": 2 } } }] },
    ]);
    assert_eq!(seen(Flavour::Dynamo, DUMP, &body), Ok(expected));
}

#[test]
fn tools_are_dumped_as_the_engines_do() {
    let body = json!({ "messages": [{ "role": "user", "content": "" }], "tools": [
        { "function": { "strict": null, "parameters": { "x": 1 }, "name": "f" }, "extra": 1 },
        { "type": "function", "function": { "name": "g" } },
    ] });
    let dump = |flavour| {
        let body = body.to_string();
        compile("{{ tools|tojson }}", flavour).render(&chat(&body), NOW).unwrap()
    };
    assert_eq!(
        dump(Flavour::Vllm),
        r#"[{"type": "function", "function": {"name": "f", "description": null, "parameters": {"x": 1}, "strict": null}, "extra": 1}, {"type": "function", "function": {"name": "g", "description": null, "parameters": null}}]"#
    );
    let dynamo: Json = serde_json::from_str(&dump(Flavour::Dynamo)).unwrap();
    assert_eq!(
        dynamo[0]["function"]["parameters"],
        json!({ "x": 1, "type": "object", "properties": {} })
    );
    assert_eq!(dynamo[1], json!({ "type": "function", "function": { "name": "g" } }));
}

#[test]
fn conversations_that_are_not_rendered() {
    use RenderError::{Continuation, Media, Messages, NotFollowed, ToolArguments, Tools};
    let user = json!({ "role": "user", "content": "a" });
    let image = json!({ "type": "image_url", "image_url": { "url": "x" } });
    let call = |arguments: Json| json!({ "role": "assistant", "tool_calls": [{ "function": { "arguments": arguments } }] });
    for (flavour, body, expected) in [
        (Flavour::Vllm, json!({ "messages": ["a"] }), Messages),
        (Flavour::Raw, json!({ "messages": [[]] }), Messages),
        (Flavour::Vllm, json!({ "messages": [{ "content": "a" }] }), Messages),
        (Flavour::Vllm, json!({ "messages": [{ "role": "user", "content": 5 }] }), Messages),
        (Flavour::Vllm, json!({ "messages": [{ "role": "user", "content": [image] }] }), Media),
        (Flavour::Dynamo, json!({ "messages": [{ "role": "user", "content": [image] }] }), Media),
        (Flavour::Vllm, json!({ "messages": [call(json!("{"))] }), ToolArguments),
        (Flavour::Vllm, json!({ "messages": [call(json!(5))] }), ToolArguments),
        (Flavour::Vllm, json!({ "messages": [user], "tools": [1] }), Tools),
        (Flavour::Vllm, json!({ "messages": [user], "tools": [{ "function": {} }] }), Tools),
        (
            Flavour::Vllm,
            json!({ "messages": [user], "continue_final_message": true }),
            Continuation,
        ),
        (
            Flavour::Dynamo,
            json!({ "messages": [{ "role": "assistant", "content": "", "reasoning_content": "r" }] }),
            NotFollowed,
        ),
    ] {
        assert_eq!(seen(flavour, DUMP, &body), Err(expected), "{body}");
        assert!(expected.reason().starts_with("render_"));
    }
}

#[test]
fn errors_of_the_template_are_told_apart_and_say_nothing() {
    let body = r#"{"messages":[{"role":"user","content":"s3cret"}]}"#;
    for (template, expected) in [
        ("{{ raise_exception('no ' + messages[0].content) }}", RenderError::Raised),
        (
            "{% macro m() %}{{ raise_exception(messages[0].content) }}{% endmacro %}{{ m() }}",
            RenderError::Raised,
        ),
        ("{{ messages[0].content.nothing.more }}", RenderError::Failed),
        ("{{ messages[0].content + 1 }}", RenderError::Failed),
        ("{{ nothing|tojson }}", RenderError::Failed),
        (
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
            RenderError::OutOfFuel,
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", RenderError::Failed),
    ] {
        let error = compile(template, Flavour::Vllm).render(&chat(body), NOW).unwrap_err();
        assert_eq!(error, expected, "{template}");
        assert!(!format!("{error} {error:?}").contains("s3cret"));
    }
}

#[test]
fn what_is_printed_is_bounded() {
    let template = "{% for i in range(90) %}{{ messages[0].content }}{% endfor %}";
    let body = json!({ "messages": [{ "role": "user", "content": "x".repeat(1_000_000) }] });
    let error = compile(template, Flavour::Vllm).render(&chat(&body.to_string()), NOW);
    assert_eq!(error, Err(RenderError::TooLarge));
}

#[test]
fn the_values_of_a_request_are_bounded() {
    let template = compile("", Flavour::Vllm);
    let body = |values: usize| {
        let numbers = "0,".repeat(values - 1);
        format!(r#"{{"messages":[{{"role":"user","content":""}}],"documents":[{numbers}0]}}"#)
    };
    let render = |values| template.render(&chat(&body(values)), NOW).map(drop);
    // The list of messages, one message with two fields, and the documents.
    let others = 5;
    let most = crate::limits::TEMPLATE_VALUES_MAX - others;
    assert_eq!(render(most), Ok(()));
    assert_eq!(render(most + 1), Err(RenderError::TooManyValues));
}

/// Goal: nothing that a client nests makes the template engine or the printing
/// of values run out of stack.
/// Method: the deepest schema that parses, printed in every way, and walked by
/// a template that calls itself.
#[test]
fn deep_nesting_is_printed_or_refused() {
    let depth = crate::limits::JSON_DEPTH_MAX - 4;
    let deep = format!("{}{}", r#"{"a":"#.repeat(depth), "}".repeat(depth)).replace(":}", ":1}");
    let body = format!(r#"{{"messages":[{{"role":"user","content":"","x":{deep}}}]}}"#);
    for template in [
        "{{ messages }}{{ messages|tojson }}{{ messages|tojson(indent=2) }}{{ '' ~ messages }}{{ messages|string|length }}",
        "{% macro walk(v) %}{% if v is mapping %}{% for k in v %}{{ walk(v[k]) }}{% endfor %}{% else %}{{ v }}{% endif %}{% endmacro %}{{ walk(messages[0]) }}",
    ] {
        let template = compile(template, Flavour::Raw);
        match template.render(&chat(&body), NOW) {
            Ok(text) => assert!(text.contains('1')),
            Err(error) => assert_eq!(error, RenderError::Failed),
        }
    }
}

#[test]
fn arguments_of_the_template_win_in_their_order() {
    let template =
        "{{ a }} {{ b }} {{ reasoning_effort }} {{ add_generation_prompt }} {{ bos_token }}";
    let options = RenderOptions {
        default_args: Some(r#"{"a": 1, "b": [1.0]}"#.to_owned()),
        ..RenderOptions::default()
    };
    let template = ChatTemplate::compile_with(&source(template), options).unwrap();
    let body = r#"{"messages":[{"role":"user","content":""}],"reasoning_effort":"low",
        "chat_template_kwargs":{"b":null,"bos_token":"<B>"}}"#;
    assert_eq!(template.render(&chat(body), NOW).unwrap(), "1 None low True <B>");
}

#[test]
fn tools_choose_their_template() {
    let named = vec![
        ("default".to_owned(), "plain".to_owned()),
        ("tool_use".to_owned(), "tools {{ tools|length }}".to_owned()),
    ];
    let source = TemplateSource { chat_template: TemplateForm::Named(named), ..Default::default() };
    let options =
        RenderOptions { exclude_tools_when_choice_none: true, ..RenderOptions::default() };
    let template = ChatTemplate::compile_with(&source, options).unwrap();
    let render = |more: &str| {
        let body = format!(r#"{{"messages":[{{"role":"user","content":""}}]{more}}}"#);
        template.render(&chat(&body), NOW).unwrap()
    };
    let tool = r#","tools":[{"function":{"name":"f"}}]"#;
    assert_eq!(render(""), "plain");
    assert_eq!(render(r#","tools":[]"#), "plain");
    assert_eq!(render(tool), "tools 1");
    assert_eq!(render(&format!(r#"{tool},"tool_choice":"none""#)), "plain");
    assert_eq!(render(&format!(r#"{tool},"tool_choice":"auto""#)), "tools 1");
}

#[test]
fn the_last_message_is_continued() {
    let body = r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"so far "}],
        "add_generation_prompt":false,"continue_final_message":true}"#;
    for (template, expected) in [
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", Ok("[q][so far ")),
        ("{% for m in messages %}[{{ m.content|trim }}]{% endfor %}", Ok("[q][so far")),
        ("{{ messages[0].content }}", Err(RenderError::Continuation)),
    ] {
        let rendered = compile(template, Flavour::Vllm).render(&chat(body), NOW);
        assert_eq!(rendered.as_deref(), expected.as_deref(), "{template}");
    }
}

#[test]
fn sources_are_read_from_the_card() {
    let config = br#"{"bos_token":"<s>","eos_token":{"content":"</s>","lstrip":false},
        "pad_token":null,"add_bos_token":true,"extra_special_tokens":{"image_token":"<i>"},
        "chat_template":"{{ bos_token }}{{ image_token }}"}"#;
    let read = TemplateSource::from_tokenizer_config(config, None).unwrap();
    let tokens: Vec<(&str, &str)> =
        read.special_tokens.iter().map(|(name, token)| (&**name, &**token)).collect();
    assert_eq!(tokens, [("bos_token", "<s>"), ("eos_token", "</s>"), ("image_token", "<i>")]);
    let body = r#"{"messages":[{"role":"user","content":""}]}"#;
    let text = ChatTemplate::compile(&read).unwrap().render(&chat(body), NOW).unwrap();
    assert_eq!(text, "<s><i>");

    let named = br#"{"chat_template":[{"name":"default","template":"d"},{"name":"tool_use","template":"t"}]}"#;
    let read = TemplateSource::from_tokenizer_config(named, None).unwrap();
    assert!(matches!(&read.chat_template, TemplateForm::Named(named) if named.len() == 2));
    let file = TemplateSource::from_tokenizer_config(named, Some("file")).unwrap();
    assert_eq!(file.chat_template, TemplateForm::Single("file".to_owned()));
}

#[test]
fn cards_without_a_usable_template() {
    let error = |config: &[u8]| TemplateSource::from_tokenizer_config(config, None).unwrap_err();
    assert_eq!(error(b"{}"), TemplateError::NoTemplate);
    assert_eq!(error(b"[]"), TemplateError::InvalidConfig);
    assert_eq!(error(b"{"), TemplateError::InvalidConfig);
    assert_eq!(error(b"\xff"), TemplateError::InvalidConfig);
    assert_eq!(error(br#"{"chat_template":[]}"#), TemplateError::NoTemplate);
    assert_eq!(error(br#"{"chat_template":[{"name":"a"}]}"#), TemplateError::InvalidConfig);
    let large = json!({ "chat_template": "x".repeat(crate::limits::TEMPLATE_BYTES_MAX + 1) });
    assert_eq!(error(large.to_string().as_bytes()), TemplateError::TooLarge);

    let compile = |template: &str| ChatTemplate::compile(&source(template)).map(drop);
    assert_eq!(compile("a\n{% if %}"), Err(TemplateError::Syntax(Some(2))));
    let only_tools = TemplateForm::Named(vec![("tool_use".to_owned(), String::new())]);
    let only_tools = TemplateSource { chat_template: only_tools, ..Default::default() };
    assert_eq!(ChatTemplate::compile(&only_tools).map(drop), Err(TemplateError::NoTemplate));
    let options = RenderOptions { default_args: Some("[]".to_owned()), ..Default::default() };
    let defaults = ChatTemplate::compile_with(&source(""), options).map(drop);
    assert_eq!(defaults, Err(TemplateError::InvalidDefaults));
}

/// Goal: a message that vLLM would build again is the same if it is kept.
/// Method: the same messages with a field that no engine knows are built again, and
/// a template prints all that it is given.
#[test]
fn kept_messages_are_those_that_would_be_built() {
    let template = compile("{{ messages }}", Flavour::Vllm);
    for role in ["system", "user", "assistant", "tool", "developer", "odd"] {
        for content in [r#""""#, r#"" a\n\u00e9 ""#, "null", "[]", r#"["a", "b"]"#, "1"] {
            let render = |more: &str| {
                let body =
                    format!(r#"{{"messages":[{{"role":"{role}","content":{content}{more}}}]}}"#);
                template.render(&chat(&body), NOW)
            };
            assert_eq!(render(""), render(r#","x":1"#), "{role} {content}");
        }
    }
    let swapped = r#"{"messages":[{"content":"c","role":"user"}]}"#;
    let text = template.render(&chat(swapped), NOW).unwrap();
    assert_eq!(text, "[{'role': 'user', 'content': 'c'}]");
}

/// Goal: templates that do not mention the clock are the only ones without it.
#[test]
fn the_clock_is_there_for_who_mentions_it() {
    let body = r#"{"messages":[{"role":"user","content":""}]}"#;
    let render = |template| compile(template, Flavour::Raw).render(&chat(body), NOW).unwrap();
    assert_eq!(render("{{ strftime_now is defined }}"), "True");
    let named = |tool_use: &str| {
        vec![("default".to_owned(), "d".to_owned()), ("tool_use".to_owned(), tool_use.to_owned())]
    };
    let source = TemplateSource {
        chat_template: TemplateForm::Named(named("{{ strftime_now('%Y') }}")),
        ..Default::default()
    };
    let body = r#"{"messages":[{"role":"user","content":""}],"tools":[{"function":{"name":"f"}}]}"#;
    let text = ChatTemplate::compile(&source).unwrap().render(&chat(body), NOW).unwrap();
    assert_eq!(text.len(), 4, "{text}");
}

#[test]
fn generation_tags_become_a_scope() {
    let template = "{%- generation -%} a {%- endgeneration %}{% set generation = 'g' %}{{ generation }}{%generation%}b{%  endgeneration +%}\n{# x #}";
    let body = r#"{"messages":[{"role":"user","content":""}]}"#;
    assert_eq!(compile(template, Flavour::Raw).render(&chat(body), NOW).unwrap(), "agb\n");
}
