//! Prompt: from a chat request's body to the prompt's tokens.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use dynamo_tokenizers::traits::{Encoder, Tokenizer};
use dynamo_tokenizers::{CachedTokenizer, Encoding, FastTokenizer, HuggingFaceTokenizer};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::Deserialize;

use crate::Engine;

/// Memory of the tokenizer's cache of prefixes, in bytes: Dynamo's default.
const CACHE_BYTES: usize = 64 * 1024 * 1024;

const TEMPLATE: &str = "chat";

/// What is read of a request: right into the values that the template takes.
#[derive(Debug, Deserialize)]
struct ChatRequest {
    messages: Value,
    #[serde(default)]
    tools: Value,
    #[serde(default)]
    max_tokens: Option<u32>,
}

/// A prompt's tokens.
pub struct Prompt {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Tokens that the answer may have.
    pub max_tokens: Option<u32>,
}

/// Template and tokenizer of a model.
pub struct Prompts {
    environment: Environment<'static>,
    tokenizer: CachedTokenizer,
}

impl Prompts {
    /// Loads a model's directory.
    pub fn load(directory: &Path, engine: Engine) -> anyhow::Result<Self> {
        let path = directory.join("tokenizer.json");
        let path = path.to_str().context("the path is not UTF-8")?;
        let mut hf = tokenizers::Tokenizer::from_file(path).map_err(|error| anyhow!(error))?;
        dynamo_tokenizers::hf::merge_special_tokens_from_config(&mut hf, directory);
        let mut special: Vec<String> = hf
            .get_added_tokens_decoder()
            .into_values()
            .filter(|token| token.special)
            .map(|token| token.content)
            .collect();
        special.sort();
        special.dedup();
        let inner: Arc<dyn Tokenizer> = match engine {
            Engine::Hf => Arc::new(HuggingFaceTokenizer::from_tokenizer(hf)),
            Engine::Fastokens => Arc::new(FastTokenizer::from_file(path)?),
        };
        let tokenizer = CachedTokenizer::new(inner, special, CACHE_BYTES)?.with_extend(true);
        Ok(Self { environment: environment(directory)?, tokenizer })
    }

    /// The prompt of a request.
    pub fn of(&self, body: &[u8]) -> anyhow::Result<Prompt> {
        let request: ChatRequest = serde_json::from_slice(body)?;
        let text = self.environment.get_template(TEMPLATE)?.render(context! {
            messages => request.messages,
            tools => request.tools,
            add_generation_prompt => true,
        })?;
        let tokens = match self.tokenizer.encode(&text)? {
            Encoding::Sp(tokens) => tokens,
            Encoding::Hf(encoding) => encoding.get_ids().to_vec(),
        };
        Ok(Prompt { tokens, max_tokens: request.max_tokens })
    }
}

/// The chat template, as `transformers` renders it.
fn environment(directory: &Path) -> anyhow::Result<Environment<'static>> {
    let template = match std::fs::read_to_string(directory.join("chat_template.jinja")) {
        Ok(template) => template,
        Err(_) => {
            let config = std::fs::read(directory.join("tokenizer_config.json"))?;
            let config: serde_json::Value = serde_json::from_slice(&config)?;
            config["chat_template"].as_str().context("no chat template")?.to_owned()
        }
    };
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_template_owned(TEMPLATE, template)?;
    Ok(environment)
}
