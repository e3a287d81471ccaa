//! Inputs: what the stage `text` reads of each model family, with the answers of
//! Hugging Face's tokenizer. Made once, then kept below `target/bench`.

use std::path::PathBuf;

use warmpath_core::card::{BlobId, Cards, ModelCard, NamedTemplate};
use warmpath_core::render::{Flavour, TemplateForm, TemplateSource};
use warmpath_core::tokenize::compile::compile;
use warmpath_core_bench::text::{Text, digest};

use super::corpus;
use super::{BenchError, at, root};

/// A model family, as `scripts/fetch-tokenizer.sh all` lays it out.
pub(super) struct Family {
    pub(super) name: &'static str,
    package: &'static str,
}

/// All that are measured.
pub(super) const FAMILIES: &[Family] = &[
    Family { name: "qwen3", package: "tokenizer-qwen3" },
    Family { name: "llama3", package: "tokenizer-llama3_1" },
    Family { name: "gptoss", package: "tokenizer-gptoss" },
    Family { name: "deepseek3", package: "tokenizer-deepseek_v3" },
    Family { name: "gemma3", package: "tokenizer-gemma3" },
];

/// The files of a family.
pub(super) const FILES: [&str; 3] = ["card", "tokenizer", "texts"];

/// For the family whose package has no template.
const PLAIN: &str = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}\
                     <|end|>{% endfor %}<|start|>assistant";

/// What all families read: group and text.
pub(super) fn texts() -> Result<Vec<(String, String)>, BenchError> {
    let mut texts = corpus::ordinary()?;
    texts.extend(corpus::wide()?);
    texts.extend(corpus::odd());
    Ok(texts)
}

/// The folder with a family's files, made if they are not those of now.
pub(super) fn prepare(family: &Family, texts: &[(String, String)]) -> Result<PathBuf, BenchError> {
    let models = root().join(".cache/tokenizers").join(family.package).join("models");
    let path = models.join("tokenizer.json");
    let json = std::fs::read(&path).map_err(at(&path))?;
    let folder = root().join("target/bench/core-inputs").join(family.name);
    std::fs::create_dir_all(&folder).map_err(at(&folder))?;
    let stamp = stamp(&json, texts);
    let stamp_path = folder.join("stamp");
    if std::fs::read_to_string(&stamp_path).is_ok_and(|it| it == stamp) {
        return Ok(folder);
    }
    let bad = |what: &str| BenchError::Io(format!("{}: {what}", path.display()));
    let compiled = compile(&json).map_err(|error| bad(error.reason()))?;
    let hf = tokenizers::Tokenizer::from_bytes(&json).map_err(|_| bad("HF refuses it"))?;
    let texts = texts
        .iter()
        .map(|(group, text)| {
            let encoding = hf.encode_fast(text.as_str(), false).map_err(|_| bad("HF fails"))?;
            let tokens = digest(encoding.get_ids());
            Ok(Text { group: group.clone(), tokens, text: text.clone() })
        })
        .collect::<Result<Vec<Text>, BenchError>>()?;
    let config_path = models.join("tokenizer_config.json");
    let config = std::fs::read(&config_path).map_err(at(&config_path))?;
    let card = Cards { models: vec![card(&config, &compiled)] }.encode();
    let texts = serde_json::to_vec(&texts).map_err(|_| bad("texts"))?;
    for (name, bytes) in FILES.into_iter().zip([card, compiled, texts]) {
        let path = folder.join(name);
        std::fs::write(&path, bytes).map_err(at(&path))?;
    }
    std::fs::write(&stamp_path, stamp).map_err(at(&stamp_path))?;
    Ok(folder)
}

/// Stands for everything that the files are made of.
fn stamp(json: &[u8], texts: &[(String, String)]) -> String {
    let texts = texts.iter().flat_map(|(group, text)| [group.as_bytes(), text.as_bytes()]);
    let all: Vec<BlobId> = std::iter::once(json).chain(texts).map(BlobId::of).collect();
    let hashes: Vec<String> = all.iter().map(|blob| format!("{:x}", blob.hash)).collect();
    // A number for the program's own form of the files.
    format!("1 {:?}", hashes.join(" "))
}

fn card(tokenizer_config: &[u8], compiled: &[u8]) -> ModelCard {
    let source = TemplateSource::from_tokenizer_config(tokenizer_config, None).ok();
    let (form, special_tokens) = source.map_or_else(
        || (TemplateForm::Single(PLAIN.to_owned()), Vec::new()),
        |source| (source.chat_template, source.special_tokens),
    );
    let templates = match form {
        TemplateForm::Single(source) => vec![NamedTemplate { name: "default".into(), source }],
        TemplateForm::Named(named) => {
            named.into_iter().map(|(name, source)| NamedTemplate { name, source }).collect()
        }
    };
    ModelCard {
        name: "m".to_owned(),
        aliases: Vec::new(),
        block_size: 16,
        context_length: 0,
        eagle: false,
        flavour: Flavour::Vllm,
        tokenizer: Ok(BlobId::of(compiled)),
        templates,
        special_tokens,
        completion_prefix: Vec::new(),
    }
}
