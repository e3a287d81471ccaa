//! Request: body bytes to the fields that routing needs.
//!
//! First stage of the request path: an HTTP body becomes a [`ParsedRequest`]
//! whose parts are spans of that body; `render` and `tokenize` work on them,
//! and `handover` edits the body at the places noted in [`Splice`].
//!
//! # Terms
//!
//! - *envelope*: the top-level members of a body, found by one scan that also
//!   checks all of the body, with their meaning not yet looked at.
//! - *absent*: a field that is missing or `null`. Clients send both for "not set".
//!
//! # Invariants
//!
//! 1. The whole body is checked: what is accepted here is valid UTF-8 and valid
//!    JSON to its last byte.
//! 2. If a key occurs more than once the last occurrence counts, as in Python
//!    (vLLM, SGLang). Dynamo's frontend refuses such a body; it then answers the
//!    client itself.
//! 3. No error carries text of the request.
//!
//! Which models exist, and what their templates do, is not known here.

use std::borrow::Cow;
use std::fmt;

use crate::json::{JsonKind, RawJson};

mod envelope;
pub(crate) mod nvext;
mod prompt;

pub use envelope::{Envelope, Field, NvextSpan, Splice};
pub use nvext::{AgentHints, NvExt, RoutingConstraints};
pub use prompt::{ChatPrompt, Prompt, PromptAlteration};

/// The APIs that are routed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `POST /v1/chat/completions`: a conversation, rendered by a template.
    ChatCompletions,
    /// `POST /v1/completions`: text or token ids.
    Completions,
    /// `POST /v1/responses`, by load: the engine turns what it is sent into a
    /// conversation in ways of its own, and may keep part of it.
    Responses,
    /// `POST /v1/embeddings`, by load: nothing of it stays in a cache.
    Embeddings,
    /// `POST /v1/messages` (Anthropic's), by load, as [`Endpoint::Responses`].
    Messages,
    /// `GET /v1/models` and below: any worker answers.
    Models,
}

impl Endpoint {
    /// Which endpoint a request path names.
    ///
    /// - `path`: the `:path` of the request. A query string and one trailing
    ///   slash do not matter. The path may have anything before `/v1/`, as
    ///   gateways route by prefixes and rewrite them after the filters. Letters
    ///   are compared exactly and percent escapes are not resolved, as in the
    ///   engines' own routers.
    ///
    /// Returns `None` for every other path: not ours.
    #[must_use]
    pub fn from_path(path: &str) -> Option<Endpoint> {
        const ENDS: [(&str, Endpoint); 6] = [
            ("/v1/chat/completions", Endpoint::ChatCompletions),
            ("/v1/completions", Endpoint::Completions),
            ("/v1/responses", Endpoint::Responses),
            ("/v1/embeddings", Endpoint::Embeddings),
            ("/v1/messages", Endpoint::Messages),
            ("/v1/models", Endpoint::Models),
        ];
        let path = path.split(['?', '#']).next().unwrap_or_default();
        let path = path.strip_suffix('/').unwrap_or(path);
        let known = ENDS.into_iter().find(|(end, _)| path.ends_with(end));
        // The names of models have slashes in them.
        let is_model = || path.contains("/v1/models/").then_some(Endpoint::Models);
        known.map(|(_, endpoint)| endpoint).or_else(is_model)
    }

    /// Whether requests of a method are routed here at all. Others are left to
    /// the gateway, and what they ask for to the worker: `OPTIONS` and the like.
    #[must_use]
    pub fn takes(self, method: &str) -> bool {
        match method {
            "GET" => true,
            "POST" => self != Endpoint::Models,
            _ => false,
        }
    }

    /// Whether Dynamo's frontends read of the body's `nvext` which worker is to
    /// serve the request.
    #[must_use]
    pub fn reads_nvext(self) -> bool {
        !matches!(self, Endpoint::Embeddings | Endpoint::Models)
    }
}

/// What routing needs of one request. Borrows the body.
#[derive(Clone, Debug)]
pub struct ParsedRequest<'a> {
    /// The model asked for. Empty if the client named none, which the engines
    /// take for their default model.
    pub model: Cow<'a, str>,
    /// What the model is to read.
    pub prompt: Prompt<'a>,
    /// Whether the response is to be streamed. Default `false`.
    pub stream: bool,
    /// Most tokens to generate: `max_completion_tokens`, else `max_tokens`.
    pub max_tokens: Option<u64>,
    /// What separates this request's cache from others': `nvext.cache_salt` if
    /// not empty, else `cache_salt` if not empty.
    pub cache_salt: Option<Cow<'a, str>>,
    /// Whether the tokenizer is to add its special tokens, if the client said.
    pub add_special_tokens: Option<bool>,
    /// A field by which the client changes the prompt in a way that is not
    /// followed here: tokens computed from `prompt` are not the engine's.
    pub alteration: Option<PromptAlteration>,
    /// Dynamo's extension object, if there is one.
    pub nvext: Option<NvExt<'a>>,
    /// Where `nvext` is, or would go, in the body.
    pub splice: Splice<'a>,
}

/// Why a body is not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// Longer than [`BODY_BYTES_MAX`](crate::limits::BODY_BYTES_MAX).
    TooLarge,
    /// Not UTF-8.
    InvalidUtf8,
    /// Not JSON; the byte offset where that became certain.
    InvalidJson(usize),
    /// Nested more than [`JSON_DEPTH_MAX`](crate::limits::JSON_DEPTH_MAX) levels.
    TooDeep,
    /// JSON, but not an object.
    NotAnObject,
    /// More than [`NVEXT_MEMBERS_MAX`](crate::limits::NVEXT_MEMBERS_MAX)
    /// members called `nvext`.
    TooManyDuplicates,
    /// A field has a type that none of the engines takes.
    WrongType(Field),
    /// A chat request without `messages`.
    NoMessages,
    /// A completion request without `prompt`.
    NoPrompt,
    /// An empty list of messages or prompts.
    EmptyPrompt,
    /// A token id that is not an integer in `0..2^32`.
    TokenId,
    /// More than [`PROMPT_BATCH_MAX`](crate::limits::PROMPT_BATCH_MAX) prompts.
    BatchTooLarge,
    /// The prompt is given as embeddings, which have no tokens.
    Embeddings,
    /// A member of `nvext` by which the client steers routing, named by its path,
    /// has a wrong type or is out of its range.
    Nvext(&'static str),
}

/// What to do with a request that is not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Answer 400: every engine would.
    BadRequest,
    /// Route it by load and let the engine judge.
    ByLoad,
}

impl RequestError {
    /// The reason as it is counted.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            RequestError::TooLarge => "unparsed_too_large",
            RequestError::InvalidUtf8 => "unparsed_utf8",
            RequestError::InvalidJson(_) => "unparsed_json",
            RequestError::TooDeep => "unparsed_too_deep",
            RequestError::NotAnObject => "unparsed_not_object",
            RequestError::TooManyDuplicates => "unparsed_duplicates",
            RequestError::WrongType(_) => "unparsed_type",
            RequestError::NoMessages => "unparsed_no_messages",
            RequestError::NoPrompt => "unparsed_no_prompt",
            RequestError::EmptyPrompt => "unparsed_empty_prompt",
            RequestError::TokenId => "unparsed_token_id",
            RequestError::BatchTooLarge => "unparsed_batch",
            RequestError::Embeddings => "unparsed_embeddings",
            RequestError::Nvext(_) => "unparsed_nvext",
        }
    }

    /// The field at fault, if it is one by name.
    #[must_use]
    pub fn field(self) -> Option<&'static str> {
        match self {
            RequestError::WrongType(field) => Some(field.name()),
            RequestError::NoMessages => Some(Field::Messages.name()),
            RequestError::NoPrompt | RequestError::EmptyPrompt | RequestError::TokenId => {
                Some(Field::Prompt.name())
            }
            RequestError::Nvext(name) => Some(name),
            _ => None,
        }
    }

    /// The suggested answer: 400 where the body cannot be a request at all,
    /// else the engine's own verdict, which knows its lenient spellings.
    #[must_use]
    pub fn answer(self) -> Answer {
        match self {
            RequestError::InvalidUtf8
            | RequestError::InvalidJson(_)
            | RequestError::TooDeep
            | RequestError::TooManyDuplicates
            | RequestError::WrongType(Field::Messages | Field::Prompt)
            | RequestError::NoMessages
            | RequestError::NoPrompt
            | RequestError::TokenId
            | RequestError::Nvext(_) => Answer::BadRequest,
            RequestError::TooLarge
            | RequestError::NotAnObject
            | RequestError::WrongType(_)
            | RequestError::EmptyPrompt
            | RequestError::BatchTooLarge
            | RequestError::Embeddings => Answer::ByLoad,
        }
    }
}

impl fmt::Display for RequestError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RequestError::TooLarge => out.write_str("the body is too long to be parsed"),
            RequestError::InvalidUtf8 => out.write_str("the body is not valid UTF-8"),
            RequestError::InvalidJson(at) => {
                write!(out, "the body is not valid JSON (at byte {at})")
            }
            RequestError::TooDeep => out.write_str("the body is nested too deeply"),
            RequestError::NotAnObject => out.write_str("the body is not a JSON object"),
            RequestError::TooManyDuplicates => out.write_str("`nvext` is repeated too often"),
            RequestError::WrongType(field) => {
                write!(out, "`{}` has the wrong type", field.name())
            }
            RequestError::NoMessages => out.write_str("`messages` is missing"),
            RequestError::NoPrompt => out.write_str("`prompt` is missing"),
            RequestError::EmptyPrompt => out.write_str("the prompt is empty"),
            RequestError::TokenId => out.write_str("`prompt` holds a number that is no token id"),
            RequestError::BatchTooLarge => out.write_str("`prompt` holds too many prompts"),
            RequestError::Embeddings => out.write_str("the prompt is given as embeddings"),
            RequestError::Nvext(name) => {
                write!(out, "`{name}` has the wrong type or is out of its range")
            }
        }
    }
}

impl std::error::Error for RequestError {}

/// Parses one request body.
///
/// - `endpoint`: from the request's path.
/// - `body`: the complete body.
///
/// # Errors
///
/// [`RequestError`]; its [`answer`](RequestError::answer) says whether the
/// client should be told, or the request routed by load. A caller that still
/// wants to write `nvext` into such a body uses [`Envelope::scan`] and, for the
/// fields, [`Envelope::read`]: they fail separately.
///
/// # Cost
///
/// Linear: a UTF-8 check and one scan of the body; allocates only for strings
/// with escapes, batches and token ids.
pub fn parse(endpoint: Endpoint, body: &[u8]) -> Result<ParsedRequest<'_>, RequestError> {
    Envelope::scan(body)?.read(endpoint)
}

impl<'a> Envelope<'a> {
    /// Reads the fields of a scanned body.
    ///
    /// # Errors
    ///
    /// [`RequestError`], never for reasons that the scan already excluded.
    pub fn read(&self, endpoint: Endpoint) -> Result<ParsedRequest<'a>, RequestError> {
        let nvext = self.object(Field::Nvext)?.map(NvExt::read).transpose()?;
        let salt = |salt: Option<Cow<'a, str>>| salt.filter(|salt| !salt.is_empty());
        let nvext_salt = nvext.as_ref().and_then(|nvext| nvext.cache_salt.clone());
        let top_level_salt = salt(self.string(Field::CacheSalt)?);
        let max_completion_tokens = self.unsigned(Field::MaxCompletionTokens)?;
        let max_tokens = self.unsigned(Field::MaxTokens)?;
        Ok(ParsedRequest {
            model: self.string(Field::Model)?.unwrap_or_default(),
            prompt: prompt::read(self, endpoint)?,
            stream: self.boolean(Field::Stream)?.unwrap_or(false),
            max_tokens: max_completion_tokens.or(max_tokens),
            cache_salt: salt(nvext_salt).or(top_level_salt),
            add_special_tokens: self.boolean(Field::AddSpecialTokens)?,
            alteration: prompt::alteration(self, nvext.as_ref()),
            nvext,
            splice: self.splice.clone(),
        })
    }

    fn typed<T>(
        &self,
        field: Field,
        read: impl FnOnce(RawJson<'a>) -> Option<T>,
    ) -> Result<Option<T>, RequestError> {
        match self.field(field) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or(RequestError::WrongType(field)),
        }
    }

    fn string(&self, field: Field) -> Result<Option<Cow<'a, str>>, RequestError> {
        self.typed(field, RawJson::string)
    }

    fn boolean(&self, field: Field) -> Result<Option<bool>, RequestError> {
        self.typed(field, RawJson::boolean)
    }

    fn unsigned(&self, field: Field) -> Result<Option<u64>, RequestError> {
        self.typed(field, RawJson::unsigned)
    }

    fn object(&self, field: Field) -> Result<Option<RawJson<'a>>, RequestError> {
        self.typed(field, |value| (value.kind() == JsonKind::Object).then_some(value))
    }

    fn array(&self, field: Field) -> Result<Option<RawJson<'a>>, RequestError> {
        self.typed(field, |value| (value.kind() == JsonKind::Array).then_some(value))
    }
}

#[cfg(test)]
pub(crate) mod tests;
