//! Model directories, whole and damaged.

use warmpath_core::card::{BlobId, Cards};

use super::*;
use crate::fleet::ModelFiles;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/tiny");

fn spec(directory: &Path) -> ModelSpec {
    ModelSpec {
        name: "tiny".into(),
        aliases: vec!["t".into()],
        files: ModelFiles::Directory(directory.to_owned()),
        block_size: 16,
        context_length: 0,
        eagle: false,
        engine: CompletionEngine::Vllm,
        hf_tokenizers: false,
    }
}

fn write(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = directory.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    directory
}

fn load_tiny(cache: &Cache) -> LoadedModel {
    load(&spec(Path::new(TINY)), Path::new(TINY), cache)
}

#[test]
fn a_whole_directory_gives_a_card_and_a_tokenizer() {
    let LoadedModel { card, tokenizer } = load_tiny(&Cache::default());
    assert_eq!(card.tokenizer, Ok(BlobId::of(&tokenizer.unwrap())));
    assert_eq!(card.templates.len(), 1);
    assert_eq!(card.templates[0].name, "default");
    let cards = Cards { models: vec![card] };
    assert_eq!(Cards::decode(&cards.encode()), Ok(cards));
}

#[test]
fn a_second_start_takes_the_tokenizer_from_the_cache() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::new(Some(directory.path().to_owned()));
    let first = load_tiny(&cache);
    let json = std::fs::read(Path::new(TINY).join("tokenizer.json")).unwrap();
    assert_eq!(cache.find(&json), first.tokenizer);
    // What it finds is what it takes.
    cache.keep(&json, b"other");
    assert_eq!(load_tiny(&cache).tokenizer.as_deref(), Some(&b"other"[..]));
}

#[test]
fn a_missing_or_damaged_tokenizer_blinds_the_model() {
    let empty = write(&[]);
    let damaged = write(&[("tokenizer.json", "{\"model\": ")]);
    let wordpiece = write(&[(
        "tokenizer.json",
        r#"{"version":"1.0","model":{"type":"WordPiece","vocab":{"a":0}},"added_tokens":[]}"#,
    )]);
    for (directory, hf_tokenizers, expected) in [
        (&empty, false, Err(Blind::Tokenizer)),
        (&damaged, false, Err(Blind::Tokenizer)),
        (&wordpiece, false, Err(Blind::TokenizerKind)),
        (&wordpiece, true, Ok(())),
    ] {
        let spec = ModelSpec { hf_tokenizers, ..spec(directory.path()) };
        let loaded = load(&spec, directory.path(), &Cache::default());
        assert_eq!(loaded.card.tokenizer.map(|_| ()), expected);
        assert_eq!(loaded.tokenizer.map(|_| ()).ok_or(()), expected.map_err(|_| ()));
    }
}

#[test]
fn templates_come_from_where_transformers_takes_them() {
    let both = write(&[
        ("tokenizer_config.json", r#"{"chat_template": "from config"}"#),
        ("chat_template.jinja", "from file"),
        ("additional_chat_templates/tool_use.jinja", "tools"),
    ]);
    let named = write(&[(
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]}"#,
    )]);
    let old = write(&[("chat_template.json", r#"{"chat_template": "from json"}"#)]);
    let huge = "x".repeat(TEMPLATE_BYTES_MAX + 1);
    let long = write(&[("chat_template.jinja", &huge)]);
    let cases: [(&tempfile::TempDir, &[(&str, &str)]); 4] = [
        (&both, &[("default", "from file"), ("tool_use", "tools")]),
        (&named, &[("default", "a"), ("rag", "b")]),
        (&old, &[("default", "from json")]),
        (&long, &[]),
    ];
    for (directory, expected) in cases {
        let config = read_json(directory.path(), "tokenizer_config.json").unwrap_or_default();
        let found = templates(directory.path(), &config);
        let found: Vec<(&str, &str)> =
            found.iter().map(|it| (it.name.as_str(), it.source.as_str())).collect();
        assert_eq!(found, expected);
    }
}

#[test]
fn special_tokens_are_texts_or_maps() {
    let directory = write(&[
        (
            "tokenizer_config.json",
            r#"{"bos_token": null, "eos_token": {"content": "</s>", "lstrip": false},
                "pad_token": "<pad>", "extra_special_tokens": {"image_token": "<img>"}}"#,
        ),
        ("special_tokens_map.json", r#"{"bos_token": "<s>", "unk_token": "<unk>"}"#),
    ]);
    let config = read_json(directory.path(), "tokenizer_config.json").unwrap();
    let mut tokens = special_tokens(directory.path(), &config);
    tokens.sort();
    let expected = [
        ("eos_token", "</s>"),
        ("image_token", "<img>"),
        ("pad_token", "<pad>"),
        ("unk_token", "<unk>"),
    ];
    assert_eq!(tokens, expected.map(|(name, token)| (name.to_owned(), token.to_owned())));
}

#[test]
fn completion_prefixes_are_those_of_the_post_processor() {
    let of = |json: &str| completion_prefix(json.as_bytes());
    let template = r#"{"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                   {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [128000], "tokens": ["<s>"]},
                           "</s>": {"id": "</s>", "ids": [7], "tokens": ["</s>"]}}}"#;
    assert_eq!(of(&format!(r#"{{"post_processor": {template}}}"#)), [128_000]);
    let sequence = format!(
        r#"{{"post_processor": {{"type": "Sequence", "processors": [{{"type": "ByteLevel"}}, {template}]}}}}"#
    );
    assert_eq!(of(&sequence), [128_000]);
    assert_eq!(of(r#"{"post_processor": {"type": "RobertaProcessing", "cls": ["<s>", 3]}}"#), [3]);
    assert_eq!(of(r#"{"post_processor": {"type": "ByteLevel"}}"#), Vec::<u32>::new());
    assert_eq!(of("{}"), Vec::<u32>::new());
}

#[test]
fn the_context_length_may_be_that_of_the_text_model() {
    let of = |json: &str| context_length(&serde_json::from_str(json).unwrap());
    assert_eq!(of(r#"{"max_position_embeddings": 40960}"#), 40_960);
    assert_eq!(of(r#"{"text_config": {"max_position_embeddings": 131072}}"#), 131_072);
    assert_eq!(of("{}"), 0);
}
