//! Oracles: `serde_json` for what is JSON and what a field's value is; a table
//! for every way in which a body can be wrong.

use serde_json::{Value, json};

use super::*;
use crate::limits::{
    BODY_BYTES_MAX, JSON_DEPTH_MAX, NVEXT_MEMBERS_MAX, PROMPT_BATCH_MAX, TAINT_BYTES_MAX,
    TAINTS_MAX,
};

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

fn chat(body: &str) -> Result<ParsedRequest<'_>, RequestError> {
    parse(Endpoint::ChatCompletions, body.as_bytes())
}

fn completion(body: &str) -> Result<ParsedRequest<'_>, RequestError> {
    parse(Endpoint::Completions, body.as_bytes())
}

fn conversation<'a>(request: &ParsedRequest<'a>) -> ChatPrompt<'a> {
    match request.prompt {
        Prompt::Chat(chat) => chat,
        ref other => panic!("{other:?}"),
    }
}

#[test]
fn endpoints_by_path() {
    use Endpoint::{ChatCompletions, Completions, Embeddings, Messages, Models, Responses};
    for (path, expected) in [
        ("/v1/chat/completions", Some(ChatCompletions)),
        ("/v1/chat/completions/", Some(ChatCompletions)),
        ("/v1/chat/completions?a=/v1/completions", Some(ChatCompletions)),
        ("/llama/v1/chat/completions", Some(ChatCompletions)),
        ("/v1/completions", Some(Completions)),
        ("/x/y/v1/completions?z", Some(Completions)),
        ("/v1/completions//", None),
        ("/v1/Completions", None),
        ("/v1/chat%2Fcompletions", None),
        ("/v1/embeddings?next=/v1/completions", Some(Embeddings)),
        ("/v1/responses", Some(Responses)),
        ("/v1/responses/resp_1", None),
        ("/prod/v1/messages/", Some(Messages)),
        ("/v1/messages/count_tokens", None),
        ("/v1/models", Some(Models)),
        ("/eu/v1/models?limit=1", Some(Models)),
        ("/v1/models/Qwen/Qwen3-0.6B", Some(Models)),
        ("/v1/modelsx", None),
        ("/v1/health", None),
        ("/xv1/completions", None),
        ("", None),
    ] {
        assert_eq!(Endpoint::from_path(path), expected, "{path}");
    }
}

#[test]
fn methods_of_endpoints() {
    use Endpoint::{ChatCompletions, Completions, Embeddings, Messages, Models, Responses};
    for endpoint in [ChatCompletions, Completions, Embeddings, Messages, Responses] {
        assert!(endpoint.takes("POST") && endpoint.takes("GET"));
    }
    assert!(Models.takes("GET") && !Models.takes("POST"));
    for method in ["HEAD", "OPTIONS", "DELETE", "PUT", "get", ""] {
        assert!(!Models.takes(method) && !ChatCompletions.takes(method), "{method}");
    }
    let silent: Vec<Endpoint> =
        [ChatCompletions, Completions, Embeddings, Messages, Models, Responses]
            .into_iter()
            .filter(|endpoint| !endpoint.reads_nvext())
            .collect();
    assert_eq!(silent, [Embeddings, Models]);
}

#[test]
fn apis_by_load_are_read_but_for_their_prompt() {
    let body = r#"{"model":"m","input":[{"role":"user"}],"messages":"of any kind","stream":true,
        "nvext":{"dp_rank":1,"agent_hints":{"osl":7}}}"#;
    for endpoint in [Endpoint::Responses, Endpoint::Embeddings, Endpoint::Messages] {
        let request = parse(endpoint, body.as_bytes()).unwrap();
        assert!(matches!(request.prompt, Prompt::Unread));
        assert_eq!((request.model.as_ref(), request.stream), ("m", true));
        assert_eq!(request.nvext.unwrap().agent_hints.osl, Some(7));
        assert_eq!(request.splice.nvext.len(), 1);
    }
}

/// Goal: what a client says of routing is taken, or refused by its name.
#[test]
fn members_that_steer_routing_are_checked_one_by_one() {
    let nvext = |members: &str| {
        let body = format!(r#"{{"messages":[1],"nvext":{{{members}}}}}"#);
        chat(&body).map(|request| {
            let nvext = request.nvext.unwrap();
            (nvext.agent_hints, nvext.routing_constraints)
        })
    };
    let long = "x".repeat(TAINT_BYTES_MAX + 1);
    let fits = r"\u0061".repeat(TAINT_BYTES_MAX);
    let many: Vec<String> = (0..=TAINTS_MAX).map(|n| format!(r#""t{n}""#)).collect();
    let weighted: Vec<String> = many.iter().map(|taint| format!("{taint}:1")).collect();
    let taints = |list: &str| format!(r#""routing_constraints":{{"required_taints":{list}}}"#);
    let weights = |map: &str| format!(r#""routing_constraints":{{"preferred_taints":{map}}}"#);
    let hint = |name: &str, value: &str| format!(r#""agent_hints":{{"{name}":{value}}}"#);
    let mut wrong = vec![
        (r#""agent_hints":[]"#.to_owned(), "nvext.agent_hints"),
        (r#""routing_constraints":"a""#.to_owned(), "nvext.routing_constraints"),
    ];
    for value in ["1.5", r#""1""#, "1e3", "true", "[]", "-2147483649", "2147483648", "4e9"] {
        wrong.push((hint("priority", value), "nvext.agent_hints.priority"));
    }
    for value in ["-1", "4294967296", "1.0", r#""1""#, "{}"] {
        wrong.push((hint("strict_priority", value), "nvext.agent_hints.strict_priority"));
        wrong.push((hint("osl", value), "nvext.agent_hints.osl"));
    }
    for value in ["1e999", "-1e999", r#""1""#, "[]"] {
        wrong.push((hint("latency_sensitivity", value), "nvext.agent_hints.latency_sensitivity"));
    }
    let required = "nvext.routing_constraints.required_taints";
    for list in ["{}", r#""a""#, "[1]", "[null]", "[[]]"] {
        wrong.push((taints(list), required));
    }
    wrong.push((taints(&format!("[{}]", many.join(","))), required));
    wrong.push((taints(&format!(r#"["{long}"]"#)), required));
    let preferred = "nvext.routing_constraints.preferred_taints";
    for map in ["[]", r#"{"a":"1"}"#, r#"{"a":null}"#, r#"{"a":1e39}"#, r#"{"a":1e999}"#] {
        wrong.push((weights(map), preferred));
    }
    wrong.push((weights(&format!("{{{}}}", weighted.join(","))), preferred));
    wrong.push((weights(&format!(r#"{{"{long}":1}}"#)), preferred));
    for (members, name) in wrong {
        let error = nvext(&members).unwrap_err();
        assert_eq!(error, RequestError::Nvext(name), "{members}");
        assert_eq!((error.answer(), error.field()), (Answer::BadRequest, Some(name)));
        assert!(error.to_string().contains(name));
    }

    let (hints, _) = nvext(&hint("priority", "-2147483648")).unwrap();
    assert_eq!(hints.priority, Some(i32::MIN));
    let (_, kept) = nvext(&taints(&format!("[{}]", many[1..].join(",")))).unwrap();
    assert_eq!(kept.required_taints.len(), TAINTS_MAX);
    let (_, kept) = nvext(&taints(&format!(r#"["{fits}"]"#))).unwrap();
    assert_eq!(kept.required_taints, ["a".repeat(TAINT_BYTES_MAX)]);
    let (_, kept) = nvext(&weights(r#"{"a":0.1,"b":-3}"#)).unwrap();
    assert_eq!(kept.preferred_taints, [("a".into(), f64::from(0.1_f32)), ("b".into(), -3.0)]);
    for absent in [
        r#""agent_hints":null,"routing_constraints":null"#,
        r#""agent_hints":{"priority":null,"unknown":[]}"#,
        r#""routing_constraints":{"required_taints":null,"preferred_taints":null,"x":1}"#,
    ] {
        assert_eq!(nvext(absent).unwrap(), (AgentHints::default(), RoutingConstraints::default()));
    }
}

#[test]
fn parts_that_are_no_text_are_media() {
    for (content, expected) in [
        (r#""text""#, false),
        ("null", false),
        (r#"["text"]"#, false),
        (r#"[{"type":"text","text":"a"}]"#, false),
        (r#"[{"type":"image_url","image_url":{"url":"u"}}]"#, true),
        (r#"[{"type":"text","text":"a"},{"type":"input_audio"}]"#, true),
        (r#"[{"text":"a"}]"#, true),
    ] {
        let body = format!(
            r#"{{"messages":[{{"role":"system"}},{{"role":"user","content":{content}}}]}}"#
        );
        assert_eq!(chat(&body).unwrap().prompt.has_media(), expected, "{content}");
    }
    assert!(!completion(r#"{"prompt":"a"}"#).unwrap().prompt.has_media());
}

#[test]
fn every_chat_field_is_read() {
    let body = r#" {
        "model" : "Qwen/Qwen3-0.6B", "messages":[ {"role":"user","content":"h\u0069"} ] ,
        "tools":[{"type":"function"}], "tool_choice":"none",
        "chat_template_args":{"x":1}, "chat_template_kwargs":{"enable_thinking":false},
        "documents":[{"text":"d"}], "reasoning_effort":"high",
        "add_generation_prompt":false, "continue_final_message":true,
        "stream":true, "max_tokens":7, "max_completion_tokens":9, "cache_salt":"top",
        "unknown":{"messages":[1,2]},
        "nvext":{"cache_salt":"inner","token_data":[1,4294967295],"extra_fields":["worker_id"],
            "annotations":["a"],"dp_rank":3,"routing_constraints":
            {"required_taints":["gpu=h100","gpu=h100"],"preferred_taints":{"rack":1,"rack":-0.5}},
            "agent_hints":{"priority":-5,"strict_priority":2,"osl":100,"latency_sensitivity":0.5}}
    } "#;
    let request = chat(body).unwrap();
    assert_eq!(request.model, "Qwen/Qwen3-0.6B");
    assert_eq!((request.stream, request.max_tokens), (true, Some(9)));
    assert_eq!(request.cache_salt.as_deref(), Some("inner"));
    assert_eq!(request.alteration, None);
    let prompt = conversation(&request);
    assert_eq!(prompt.messages.text(), r#"[ {"role":"user","content":"h\u0069"} ]"#);
    assert_eq!(prompt.tools.unwrap().text(), r#"[{"type":"function"}]"#);
    assert!(prompt.forbids_tools());
    assert_eq!(prompt.template_args.unwrap().text(), r#"{"enable_thinking":false}"#);
    assert_eq!(prompt.documents.unwrap().text(), r#"[{"text":"d"}]"#);
    assert_eq!(prompt.reasoning_effort.unwrap().text(), r#""high""#);
    assert_eq!(prompt.add_generation_prompt, Some(false));
    assert!(prompt.continue_final_message);
    let nvext = request.nvext.unwrap();
    assert_eq!(nvext.token_data.unwrap(), [1, u32::MAX]);
    assert_eq!(nvext.extra_fields.unwrap().text(), r#"["worker_id"]"#);
    assert_eq!(nvext.annotations.unwrap().text(), r#"["a"]"#);
    let constraints = RoutingConstraints {
        required_taints: vec!["gpu=h100".into()],
        preferred_taints: vec![("rack".into(), -0.5)],
    };
    assert_eq!(nvext.routing_constraints, constraints);
    assert_eq!(nvext.pins.map(|pin| pin.map(RawJson::text)), [None, None, None, Some("3"), None]);
    let hints = AgentHints {
        priority: Some(-5),
        strict_priority: Some(2),
        osl: Some(100),
        latency_sensitivity: Some(0.5),
    };
    assert_eq!(nvext.agent_hints, hints);
}

#[test]
fn absent_fields_have_their_defaults() {
    for body in [
        r#"{"messages":[{}]}"#,
        r#"{"messages":[{}],"model":null,"tools":null,"tool_choice":null,"stream":null,
            "chat_template_kwargs":null,"documents":null,"max_tokens":null,"cache_salt":null,
            "add_generation_prompt":null,"continue_final_message":null,"nvext":null,
            "chat_template":null,"truncate_prompt_tokens":null}"#,
        r#"{"messages":[{}],"tools":[],"cache_salt":""}"#,
    ] {
        let request = chat(body).unwrap();
        assert_eq!(request.model, "");
        assert_eq!((request.stream, request.max_tokens), (false, None));
        assert_eq!(request.cache_salt, None);
        assert_eq!(request.alteration, None);
        assert!(request.nvext.is_none());
        let prompt = conversation(&request);
        assert!(prompt.tools.is_none() && prompt.documents.is_none());
        assert!(prompt.template_args.is_none() && !prompt.forbids_tools());
        assert_eq!(prompt.add_generation_prompt, None);
        assert!(!prompt.continue_final_message);
    }
}

#[test]
fn salt_of_nvext_wins_unless_empty() {
    for (body, expected) in [
        (r#"{"messages":[1],"cache_salt":"t","nvext":{"cache_salt":""}}"#, Some("t")),
        (r#"{"messages":[1],"cache_salt":"t","nvext":{"cache_salt":"n"}}"#, Some("n")),
        (r#"{"messages":[1],"nvext":{"cache_salt":"n","cache_salt":null}}"#, None),
        (r#"{"messages":[1],"cache_salt":"t\n"}"#, Some("t\n")),
    ] {
        assert_eq!(chat(body).unwrap().cache_salt.as_deref(), expected, "{body}");
    }
}

#[test]
fn the_last_of_equal_keys_counts() {
    let request =
        chat(r#"{"model":"a","messages":[1],"mod\u0065l":"b","messages":[2],"stream":true,"stream":null}"#)
            .unwrap();
    assert_eq!(request.model, "b");
    assert_eq!(conversation(&request).messages.text(), "[2]");
    assert!(!request.stream);
}

#[test]
fn alterations_of_the_prompt_are_noted() {
    for (field, expected) in [
        (r#""chat_template":"{{ 1 }}""#, PromptAlteration::RequestTemplate),
        (r#""truncate_prompt_tokens":5"#, PromptAlteration::Truncation),
        (r#""nvext":{"use_raw_prompt":true}"#, PromptAlteration::RawPrompt),
    ] {
        let body = format!(r#"{{"messages":[1],{field}}}"#);
        assert_eq!(chat(&body).unwrap().alteration, Some(expected));
    }
}

#[test]
fn the_four_forms_of_a_completion_prompt() {
    let read = |prompt: &str| {
        completion(&format!(r#"{{"prompt":{prompt}}}"#)).map(|request| match request.prompt {
            Prompt::Chat(_) | Prompt::Unread => panic!("not a completion"),
            Prompt::Text(text) => json!(text),
            Prompt::Texts(texts) => json!({ "texts": texts }),
            Prompt::Tokens(tokens) => json!(tokens),
            Prompt::TokenLists(lists) => json!({ "lists": lists }),
        })
    };
    assert_eq!(read(r#""a\tb""#), Ok(json!("a\tb")));
    assert_eq!(read(r#""""#), Ok(json!("")));
    assert_eq!(read(r#"["a"]"#), Ok(json!("a")));
    assert_eq!(read(r#"[ "a" , "" ]"#), Ok(json!({ "texts": ["a", ""] })));
    assert_eq!(read("[0, 4294967295]"), Ok(json!([0, u32::MAX])));
    assert_eq!(read("[[1,2]]"), Ok(json!([1, 2])));
    assert_eq!(read("[[1],[2,3]]"), Ok(json!({ "lists": [[1], [2, 3]] })));
    for empty in ["[]", "[ ]", "[[]]", "[[1],[]]"] {
        assert_eq!(read(empty), Err(RequestError::EmptyPrompt), "{empty}");
    }
    for wrong in ["4294967296", "-1", "1.0", "1e2", "99999999999999999999"] {
        assert_eq!(read(&format!("[{wrong}]")), Err(RequestError::TokenId), "{wrong}");
    }
    for wrong in ["1", "true", "{}", r#"["a",1]"#, "[[1],2]", "[null]", "[{}]"] {
        assert_eq!(read(wrong), Err(RequestError::WrongType(Field::Prompt)), "{wrong}");
    }
    assert_eq!(read("[ 10 ,\n20\t,30\r]"), Ok(json!([10, 20, 30])));
    for wrong in ["[1,[]]", "[1,{}]", "[1,-0]", "[1,true]", r#"[1,"a"]"#, "[1,null]", "[[1,[2]]]"] {
        assert_eq!(read(wrong), Err(RequestError::TokenId), "{wrong}");
    }
}

#[test]
fn bodies_that_are_no_request() {
    use Answer::{BadRequest, ByLoad};
    use Field::{
        AddGenerationPrompt, CacheSalt, ChatTemplateKwargs, MaxTokens, Messages, Model, Nvext,
        Stream, ToolChoice, Tools,
    };
    use RequestError::{EmptyPrompt, InvalidJson, NoMessages, NotAnObject, TokenId, WrongType};
    for (body, error, answer) in [
        ("", InvalidJson(0), BadRequest),
        ("  ", InvalidJson(2), BadRequest),
        ("hello", InvalidJson(0), BadRequest),
        (r#"{"messages":[{}]"#, InvalidJson(16), BadRequest),
        (r#"{"messages":[{}]}}"#, InvalidJson(17), BadRequest),
        (r#"{"messages":[{}]} x"#, InvalidJson(18), BadRequest),
        (r#"{"messages":[{}],"x":nul}"#, InvalidJson(21), BadRequest),
        ("[]", NotAnObject, ByLoad),
        ("null", NotAnObject, ByLoad),
        ("\"a\"", NotAnObject, ByLoad),
        ("{}", NoMessages, BadRequest),
        (r#"{"messages":null}"#, NoMessages, BadRequest),
        (r#"{"prompt":"a"}"#, NoMessages, BadRequest),
        (r#"{"messages":[]}"#, EmptyPrompt, ByLoad),
        (r#"{"messages":[ ]}"#, EmptyPrompt, ByLoad),
        (r#"{"messages":"hi"}"#, WrongType(Messages), BadRequest),
        (r#"{"messages":{}}"#, WrongType(Messages), BadRequest),
        (r#"{"messages":[1],"model":1}"#, WrongType(Model), ByLoad),
        (r#"{"messages":[1],"tools":{}}"#, WrongType(Tools), ByLoad),
        (r#"{"messages":[1],"tool_choice":1}"#, WrongType(ToolChoice), ByLoad),
        (r#"{"messages":[1],"stream":"yes"}"#, WrongType(Stream), ByLoad),
        (r#"{"messages":[1],"max_tokens":"5"}"#, WrongType(MaxTokens), ByLoad),
        (r#"{"messages":[1],"max_tokens":-5}"#, WrongType(MaxTokens), ByLoad),
        (r#"{"messages":[1],"cache_salt":5}"#, WrongType(CacheSalt), ByLoad),
        (r#"{"messages":[1],"add_generation_prompt":1}"#, WrongType(AddGenerationPrompt), ByLoad),
        (r#"{"messages":[1],"chat_template_kwargs":[]}"#, WrongType(ChatTemplateKwargs), ByLoad),
        (r#"{"messages":[1],"nvext":[]}"#, WrongType(Nvext), ByLoad),
        (r#"{"messages":[1],"nvext":{"cache_salt":1}}"#, WrongType(Nvext), ByLoad),
        (r#"{"messages":[1],"nvext":{"token_data":"1"}}"#, WrongType(Nvext), ByLoad),
        (r#"{"messages":[1],"nvext":{"token_data":[-1]}}"#, TokenId, BadRequest),
    ] {
        let actual = chat(body).map(|_| ()).unwrap_err();
        assert_eq!((actual, actual.answer()), (error, answer), "{body}");
        assert!(actual.reason().starts_with("unparsed_"));
    }
    assert_eq!(completion("{}").map(|_| ()), Err(RequestError::NoPrompt));
    let embeddings = completion(r#"{"prompt":"","prompt_embeds":"AAAA"}"#);
    assert_eq!(embeddings.map(|_| ()), Err(RequestError::Embeddings));
    let latin = parse(Endpoint::ChatCompletions, b"{\"messages\":[\"\xe9\"]}");
    assert_eq!(latin.map(|_| ()), Err(RequestError::InvalidUtf8));
}

#[test]
fn limits_hold_exactly() {
    let nested =
        |depth| format!(r#"{{"messages":[1],"x":{}{}}}"#, "[".repeat(depth), "]".repeat(depth));
    assert!(chat(&nested(JSON_DEPTH_MAX - 1)).is_ok());
    for depth in [JSON_DEPTH_MAX, 1_000, 100_000] {
        assert_eq!(chat(&nested(depth)).map(|_| ()), Err(RequestError::TooDeep));
    }

    let repeated = |times| format!(r#"{{"messages":[1]{}}}"#, r#","nvext":{}"#.repeat(times));
    assert_eq!(chat(&repeated(NVEXT_MEMBERS_MAX)).unwrap().splice.nvext.len(), NVEXT_MEMBERS_MAX);
    let error = chat(&repeated(NVEXT_MEMBERS_MAX + 1)).map(|_| ());
    assert_eq!(error, Err(RequestError::TooManyDuplicates));

    let batch = |prompts: usize| format!(r#"{{"prompt":[{}""]}}"#, r#""","#.repeat(prompts - 1));
    assert!(completion(&batch(PROMPT_BATCH_MAX)).is_ok());
    let error = completion(&batch(PROMPT_BATCH_MAX + 1)).map(|_| ());
    assert_eq!(error, Err(RequestError::BatchTooLarge));

    let long = |length: usize| {
        let frame = r#"{"messages":[""]}"#.len();
        format!(r#"{{"messages":["{}"]}}"#, "x".repeat(length - frame))
    };
    assert!(chat(&long(BODY_BYTES_MAX)).is_ok());
    assert_eq!(chat(&long(BODY_BYTES_MAX + 1)).map(|_| ()), Err(RequestError::TooLarge));
}

#[test]
fn huge_keys_are_read_over() {
    for start in ["", r"\u0061"] {
        let key = "k".repeat(10_000_000);
        let body = format!(r#"{{"{start}{key}":1,"messages":[1],"model":"m"}}"#);
        assert_eq!(chat(&body).unwrap().model, "m");
    }
}

#[test]
fn errors_never_quote_the_body() {
    let secret = "s3cret";
    for body in [
        format!(r#"{{"messages":"{secret}"}}"#),
        format!(r#"{{"messages":["{secret}]}}"#),
        format!(r#"{{"{secret}"}}"#),
        secret.to_owned(),
    ] {
        let error = chat(&body).map(|_| ()).unwrap_err();
        assert!(!format!("{error} {error:?} {}", error.reason()).contains(secret));
    }
}

/// What the oracle says of one field of a body.
fn oracle_string(body: &Value, field: &str) -> Option<String> {
    body.get(field)?.as_str().map(str::to_owned)
}

#[test]
fn oracle_knows_the_last_of_equal_keys() {
    let body: Value = serde_json::from_str(r#"{"model":"a","model":"b"}"#).unwrap();
    assert_eq!(oracle_string(&body, "model").as_deref(), Some("b"));
}

#[cfg(not(target_arch = "wasm32"))]
mod properties {
    use proptest::prelude::*;

    use super::*;
    use crate::json::tests::json_text;

    /// A body of known and unknown fields with values of any kind.
    pub(crate) fn body_text() -> impl Strategy<Value = String> {
        let key = prop::sample::select(vec![
            r#""model""#,
            r#""messages""#,
            r#""prompt""#,
            r#""tools""#,
            r#""stream""#,
            r#""max_tokens""#,
            r#""cache_salt""#,
            r#""nvext""#,
            r#""n\u0076ext""#,
            r#""x""#,
            r#""chat_template_kwargs""#,
            r#""documents""#,
        ]);
        let value = prop_oneof![
            2 => json_text(),
            1 => prop::sample::select(vec![
                r#"[{"role":"user","content":"hé"}]"#, r#""text""#, "[1,2,3]", "[[1],[2]]", "null",
                r#"["a","b"]"#, "true", "12", r#"{"cache_salt":"s"}"#, r#"{"dp_rank":1 , "a":[ ]}"#,
                r#"{"token_data":[1,2],"x":1,"backend_instance_id":9}"#, "{ }",
            ]).prop_map(str::to_owned),
        ];
        prop::collection::vec((key, "[ \n]{0,2}", value), 0..7).prop_map(|members| {
            let members: Vec<String> = members
                .into_iter()
                .map(|(key, space, value)| format!("{space}{key}{space}:{value}"))
                .collect();
            format!("{{{}}}", members.join(","))
        })
    }

    fn check(body: &[u8]) {
        let oracle = serde_json::from_slice::<Value>(body);
        for endpoint in [Endpoint::ChatCompletions, Endpoint::Completions] {
            let actual = parse(endpoint, body);
            match (&oracle, &actual) {
                (Err(error), _) if error.to_string().starts_with("number out of range") => {}
                (Err(_), Err(error)) => assert!(
                    matches!(error, RequestError::InvalidJson(_) | RequestError::InvalidUtf8),
                    "{error:?}"
                ),
                (Err(error), Ok(_)) => panic!("serde_json refuses: {error}"),
                (Ok(_), Err(error)) => assert!(
                    !matches!(error, RequestError::InvalidJson(_) | RequestError::InvalidUtf8),
                    "{error:?}"
                ),
                (Ok(value), Ok(request)) => {
                    let model = oracle_string(value, "model").unwrap_or_default();
                    assert_eq!(request.model, model);
                    assert_eq!(request.stream, value["stream"] == true);
                    if let Prompt::Chat(chat) = request.prompt {
                        let messages: Value = serde_json::from_str(chat.messages.text()).unwrap();
                        assert_eq!(messages, value["messages"]);
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3_000))]

        #[test]
        fn bodies_agree_with_serde_json(body in body_text()) {
            check(body.as_bytes());
        }

        #[test]
        fn mutated_bodies_agree_with_serde_json(
            body in body_text(),
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut bytes = body.into_bytes();
            for (index, byte) in edits {
                let at = index.index(bytes.len());
                bytes[at] = byte;
            }
            check(&bytes);
        }
    }
}
#[cfg(not(target_arch = "wasm32"))]
pub(crate) use properties::body_text;
