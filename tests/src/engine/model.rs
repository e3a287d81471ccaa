//! Model: tokenizer and chat template, as a serving engine sets them up.
//!
//! Tokens come from Hugging Face's `tokenizers`. The template is rendered the
//! way `transformers` does it: trimmed blocks, Python's string methods,
//! `tojson` in `json.dumps` form, absent `tools` and `documents` as none. None
//! of it is shared with the filter.
//!
//! There is no model behind it: "generated" tokens are words picked by the
//! prompt's own tokens. Each is a word that the tokenizer keeps whole, so that
//! the answer, sent back as history, gives the same tokens again.

use std::fmt;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde::Deserialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use tokenizers::Tokenizer;

use super::segments::Segments;

/// Words to answer with, at most. More would not make answers any better.
const WORDS_MAX: usize = 512;

/// Name of the only template in the environment.
const TEMPLATE: &str = "chat";

/// Why a model directory cannot be served.
#[derive(Debug)]
pub enum ModelError {
    /// A file is missing or unreadable.
    Unreadable(PathBuf),
    /// A file is there but not what it should be.
    Invalid(PathBuf),
    /// The vocabulary has no plain words to answer with.
    NoWords,
}

impl fmt::Display for ModelError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(path) => write!(formatter, "cannot read {}", path.display()),
            Self::Invalid(path) => write!(formatter, "cannot use {}", path.display()),
            Self::NoWords => write!(formatter, "the vocabulary has no plain words"),
        }
    }
}

impl std::error::Error for ModelError {}

/// Why a request cannot be turned into tokens. Carries nothing of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptError {
    /// The model has no chat template.
    NoTemplate,
    /// The template raised, or could not be evaluated.
    Template,
    /// The tokenizer refused the text.
    Tokenizer,
}

/// What a chat template is given.
#[derive(Clone, Debug, Default)]
pub struct ChatContext {
    /// Messages in request order.
    pub messages: Vec<Value>,
    /// Tools; none when the request has none.
    pub tools: Value,
    /// Documents; none when the request has none.
    pub documents: Value,
    /// Whether the assistant's turn is opened.
    pub add_generation_prompt: bool,
    /// `chat_template_kwargs`; they win over everything above.
    pub kwargs: Vec<(String, Value)>,
}

/// The parts of `tokenizer_config.json` that an engine reads.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    chat_template: Option<serde_json::Value>,
    #[serde(default)]
    bos_token: Option<SpecialToken>,
    #[serde(default)]
    eos_token: Option<SpecialToken>,
}

/// A special token, as a string or as a described one.
#[derive(Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Described { content: String },
}

impl SpecialToken {
    fn text(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Described { content } => content,
        }
    }
}

/// A word to answer with: one token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word {
    /// The token.
    pub token: u32,
    /// Its text.
    pub text: String,
}

/// Tokenizer, template and words of one model.
pub struct Model {
    tokenizer: Tokenizer,
    environment: Option<Environment<'static>>,
    bos_token: Value,
    eos_token: Value,
    /// Words that begin an answer: no space in front.
    openers: Vec<Word>,
    /// Words that go on: one space in front.
    words: Vec<Word>,
    /// Remembers what was tokenized, if the tokenizer lets it.
    segments: Option<Segments>,
}

impl Model {
    /// Loads a model directory: `tokenizer.json`, and for chat a template from
    /// `chat_template.jinja` or else from `tokenizer_config.json`.
    ///
    /// # Errors
    ///
    /// [`ModelError`], naming the file.
    pub fn load(directory: &Path) -> Result<Self, ModelError> {
        let tokenizer_path = directory.join("tokenizer.json");
        let bytes = read(&tokenizer_path)?;
        let tokenizer =
            Tokenizer::from_bytes(bytes).map_err(|_| ModelError::Invalid(tokenizer_path))?;
        let config_path = directory.join("tokenizer_config.json");
        let config: TokenizerConfig = if config_path.exists() {
            serde_json::from_slice(&read(&config_path)?)
                .map_err(|_| ModelError::Invalid(config_path))?
        } else {
            TokenizerConfig::default()
        };
        let template_path = directory.join("chat_template.jinja");
        let environment = match template_source(&config, &template_path)? {
            Some(source) => {
                Some(environment(source).map_err(|_| ModelError::Invalid(directory.into()))?)
            }
            None => None,
        };
        let token = |token: &Option<SpecialToken>| match token {
            Some(token) => Value::from(token.text()),
            None => Value::from(()),
        };
        let (openers, words) = plain_words(&tokenizer);
        if openers.is_empty() || words.is_empty() {
            return Err(ModelError::NoWords);
        }
        Ok(Self {
            segments: Segments::of(&tokenizer),
            bos_token: token(&config.bos_token),
            eos_token: token(&config.eos_token),
            tokenizer,
            environment,
            openers,
            words,
        })
    }

    /// Renders a chat and tokenizes it. The template writes special tokens
    /// itself, so none are added.
    ///
    /// # Errors
    ///
    /// [`PromptError`]; a client error.
    pub fn chat_tokens(&self, context: &ChatContext) -> Result<Vec<u32>, PromptError> {
        self.encode(&self.render(context)?, false)
    }

    /// Tokenizes the text of a completion, special tokens added.
    ///
    /// # Errors
    ///
    /// [`PromptError::Tokenizer`].
    pub fn completion_tokens(&self, text: &str) -> Result<Vec<u32>, PromptError> {
        self.encode(text, true)
    }

    /// Renders a chat.
    ///
    /// # Errors
    ///
    /// [`PromptError`]; a client error.
    pub fn render(&self, context: &ChatContext) -> Result<String, PromptError> {
        let environment = self.environment.as_ref().ok_or(PromptError::NoTemplate)?;
        let template = environment.get_template(TEMPLATE).map_err(|_| PromptError::Template)?;
        let base = [
            ("messages", Value::from(context.messages.clone())),
            ("tools", context.tools.clone()),
            ("documents", context.documents.clone()),
            ("add_generation_prompt", Value::from(context.add_generation_prompt)),
            ("bos_token", self.bos_token.clone()),
            ("eos_token", self.eos_token.clone()),
        ];
        let base = base.map(|(key, value)| (key.to_owned(), value));
        let values = Value::from_pairs(base.into_iter().chain(context.kwargs.iter().cloned()));
        template.render(values).map_err(|_| PromptError::Template)
    }

    /// The word at `place` of the answer to a prompt.
    ///
    /// - `seed`: from the prompt, see [`answer_seed`].
    ///
    /// Equal inputs give equal words.
    #[must_use]
    pub fn word(&self, seed: u64, place: usize) -> Word {
        let word = self.find_word(seed, place);
        word.cloned().unwrap_or_else(|| Word { token: 0, text: String::new() })
    }

    /// The token of [`Self::word`].
    #[must_use]
    pub fn token(&self, seed: u64, place: usize) -> u32 {
        self.find_word(seed, place).map_or(0, |word| word.token)
    }

    fn find_word(&self, seed: u64, place: usize) -> Option<&Word> {
        let list = if place == 0 { &self.openers } else { &self.words };
        let mixed = mix(seed.wrapping_add(place as u64));
        list.get(usize::try_from(mixed % list.len().max(1) as u64).unwrap_or(0))
    }

    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, PromptError> {
        if let (false, Some(segments)) = (special, &self.segments) {
            return segments.encode(&self.tokenizer, text);
        }
        let encoding =
            self.tokenizer.encode_fast(text, special).map_err(|_| PromptError::Tokenizer)?;
        Ok(encoding.get_ids().to_vec())
    }
}

/// Folds a prompt into the seed of its answer.
#[must_use]
pub fn answer_seed(prompt: &[u32]) -> u64 {
    prompt.iter().fold(0, |seed, &token| mix(seed ^ u64::from(token)))
}

/// Spreads a number over 64 bits (the finalizer of SplitMix64).
fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    std::fs::read(path).map_err(|_| ModelError::Unreadable(path.into()))
}

fn template_source(config: &TokenizerConfig, file: &Path) -> Result<Option<String>, ModelError> {
    if file.exists() {
        let source = String::from_utf8(read(file)?);
        return source.map(Some).map_err(|_| ModelError::Invalid(file.into()));
    }
    let template = config.chat_template.as_ref();
    if let Some(named) = template.and_then(serde_json::Value::as_array) {
        let default = named.iter().find(|entry| entry["name"] == "default");
        let source = default.and_then(|entry| entry["template"].as_str());
        return Ok(source.map(ToOwned::to_owned));
    }
    Ok(template.and_then(serde_json::Value::as_str).map(ToOwned::to_owned))
}

/// Words of ASCII letters that the tokenizer gives back as one token.
fn plain_words(tokenizer: &Tokenizer) -> (Vec<Word>, Vec<Word>) {
    let mut openers = Vec::new();
    let mut words = Vec::new();
    let size = u32::try_from(tokenizer.get_vocab_size(true)).unwrap_or(u32::MAX);
    for token in 0..size {
        if openers.len() >= WORDS_MAX && words.len() >= WORDS_MAX {
            break;
        }
        let Ok(text) = tokenizer.decode(&[token], false) else {
            continue;
        };
        let (letters, list) = match text.strip_prefix(' ') {
            Some(letters) => (letters, &mut words),
            None => (text.as_str(), &mut openers),
        };
        let plain = letters.len() >= 3 && letters.bytes().all(|byte| byte.is_ascii_lowercase());
        if !plain || list.len() >= WORDS_MAX {
            continue;
        }
        let whole = tokenizer.encode_fast(text.as_str(), false);
        if whole.is_ok_and(|encoding| encoding.get_ids() == [token]) {
            list.push(Word { token, text });
        }
    }
    (openers, words)
}

/// The template environment of `transformers`.
fn environment(source: String) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |_message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raised by the template"))
    });
    environment.add_template_owned(TEMPLATE, source)?;
    Ok(environment)
}

/// `tojson` as `json.dumps(value, ensure_ascii=False)` writes it.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let failed = |_| Error::new(ErrorKind::BadSerialization, "not JSON");
    let bytes = match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent.min(16));
            serialize(value, PrettyFormatter::with_indent(spaces.as_bytes())).map_err(failed)?
        }
        None => serialize(value, PythonFormatter).map_err(failed)?,
    };
    let text = String::from_utf8(bytes)
        .map_err(|_| Error::new(ErrorKind::BadSerialization, "not UTF-8"))?;
    Ok(Value::from_safe_string(text))
}

fn serialize<F: Formatter>(value: &Value, formatter: F) -> serde_json::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    serde::Serialize::serialize(value, &mut Serializer::with_formatter(&mut bytes, formatter))?;
    Ok(bytes)
}

/// Python's default separators: a space after each comma and colon.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()>
    where
        W: ?Sized + std::io::Write,
    {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()>
    where
        W: ?Sized + std::io::Write,
    {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W>(&mut self, writer: &mut W) -> std::io::Result<()>
    where
        W: ?Sized + std::io::Write,
    {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests;
