//! What a model's card says about its chat template.

use std::fmt;

use crate::json::{JsonKind, RawJson};
use crate::limits::{SPECIAL_TOKENS_MAX, TEMPLATE_BYTES_MAX, TEMPLATES_MAX};

/// A model's templates and the special tokens they may print. Plain data: the
/// sidecar reads it and sends it in the feed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TemplateSource {
    /// The templates.
    pub chat_template: TemplateForm,
    /// Special tokens by the names under which a template sees them:
    /// `bos_token`, `eos_token`, `unk_token`, `pad_token` and so on.
    pub special_tokens: Vec<(String, String)>,
}

/// The two forms of `chat_template` in `tokenizer_config.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TemplateForm {
    /// One template for everything.
    Single(String),
    /// Templates by name. `tool_use` renders requests with tools, `default` all
    /// others; further names are not used.
    Named(Vec<(String, String)>),
}

impl Default for TemplateForm {
    fn default() -> Self {
        TemplateForm::Single(String::new())
    }
}

/// Why a model has no usable chat template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TemplateError {
    /// `tokenizer_config.json` is not a JSON object in UTF-8.
    InvalidConfig,
    /// There is no template, or none called `default`.
    NoTemplate,
    /// More or longer templates or tokens than
    /// [`TEMPLATE_BYTES_MAX`], [`TEMPLATES_MAX`] and [`SPECIAL_TOKENS_MAX`] allow.
    TooLarge,
    /// The template does not compile; the line where, if known.
    Syntax(Option<u32>),
    /// The default template arguments are not a JSON object.
    InvalidDefaults,
}

impl TemplateError {
    /// The reason as it is counted.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            TemplateError::InvalidConfig => "template_config",
            TemplateError::NoTemplate => "template_missing",
            TemplateError::TooLarge => "template_too_large",
            TemplateError::Syntax(_) => "template_syntax",
            TemplateError::InvalidDefaults => "template_defaults",
        }
    }
}

impl fmt::Display for TemplateError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TemplateError::InvalidConfig => {
                out.write_str("tokenizer_config.json is not a JSON object")
            }
            TemplateError::NoTemplate => out.write_str("the model has no chat template"),
            TemplateError::TooLarge => out.write_str("the chat template is too large"),
            TemplateError::Syntax(Some(line)) => {
                write!(out, "the chat template does not compile (line {line})")
            }
            TemplateError::Syntax(None) => out.write_str("the chat template does not compile"),
            TemplateError::InvalidDefaults => {
                out.write_str("the default template arguments are not a JSON object")
            }
        }
    }
}

impl std::error::Error for TemplateError {}

impl TemplateSource {
    /// Reads a model's `tokenizer_config.json`.
    ///
    /// - `tokenizer_config_json`: the file's bytes.
    /// - `chat_template_jinja`: the contents of `chat_template.jinja` beside it,
    ///   which takes the place of the configuration's template.
    ///
    /// Special tokens may be strings or objects with `content`.
    ///
    /// # Errors
    ///
    /// [`TemplateError`]; whether the template compiles is not looked at.
    pub fn from_tokenizer_config(
        tokenizer_config_json: &[u8],
        chat_template_jinja: Option<&str>,
    ) -> Result<Self, TemplateError> {
        let text = std::str::from_utf8(tokenizer_config_json);
        let config = text.ok().and_then(|text| RawJson::parse(text).ok());
        let config = config
            .filter(|config| config.kind() == JsonKind::Object)
            .ok_or(TemplateError::InvalidConfig)?;
        let chat_template = match chat_template_jinja {
            Some(template) => TemplateForm::Single(template.to_owned()),
            None => form(config.member("chat_template").ok_or(TemplateError::NoTemplate)?)?,
        };
        let source = TemplateSource { chat_template, special_tokens: special_tokens(config) };
        source.check_limits()?;
        Ok(source)
    }

    /// Checks what a feed may have brought.
    pub(super) fn check_limits(&self) -> Result<(), TemplateError> {
        let (bytes, templates) = match &self.chat_template {
            TemplateForm::Single(template) => (template.len(), 1),
            TemplateForm::Named(named) => {
                (named.iter().map(|(_, template)| template.len()).sum(), named.len())
            }
        };
        if bytes > TEMPLATE_BYTES_MAX
            || templates > TEMPLATES_MAX
            || self.special_tokens.len() > SPECIAL_TOKENS_MAX
        {
            return Err(TemplateError::TooLarge);
        }
        Ok(())
    }

    /// The template called `name`; a single one answers to `default` only.
    pub(super) fn template(&self, name: &str) -> Option<&str> {
        match &self.chat_template {
            TemplateForm::Single(template) => (name == "default").then_some(template),
            TemplateForm::Named(named) => {
                named.iter().rev().find(|(own, _)| own == name).map(|(_, template)| &**template)
            }
        }
    }
}

fn form(template: RawJson<'_>) -> Result<TemplateForm, TemplateError> {
    if let Some(text) = template.string() {
        return Ok(TemplateForm::Single(text.into_owned()));
    }
    let mut named = Vec::new();
    for entry in template.items() {
        let text = |key| entry.member(key).and_then(RawJson::string);
        let (Some(name), Some(template)) = (text("name"), text("template")) else {
            return Err(TemplateError::InvalidConfig);
        };
        if named.len() >= TEMPLATES_MAX {
            return Err(TemplateError::TooLarge);
        }
        named.push((name.into_owned(), template.into_owned()));
    }
    if named.is_empty() { Err(TemplateError::NoTemplate) } else { Ok(TemplateForm::Named(named)) }
}

/// The members called `…_token`, at the top level and in `extra_special_tokens`.
fn special_tokens(config: RawJson<'_>) -> Vec<(String, String)> {
    let extra = config.member("extra_special_tokens");
    let mut tokens: Vec<(String, String)> = Vec::new();
    for member in config.members().chain(extra.into_iter().flat_map(RawJson::members)) {
        let Some(name) = member.key.string().filter(|name| name.ends_with("_token")) else {
            continue;
        };
        let text = match member.value.kind() {
            JsonKind::Object => member.value.member("content").and_then(RawJson::string),
            _ => member.value.string(),
        };
        if let Some(text) = text
            && tokens.len() <= SPECIAL_TOKENS_MAX
        {
            tokens.retain(|(own, _)| *own != name);
            tokens.push((name.into_owned(), text.into_owned()));
        }
    }
    tokens
}
