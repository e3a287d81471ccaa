//! The prompt of a request, in the forms the two endpoints take.

use std::borrow::Cow;

use super::{Endpoint, Envelope, Field, NvExt, RequestError};
use crate::ids::TokenId;
use crate::json::{JsonKind, RawJson};
use crate::limits::PROMPT_BATCH_MAX;

/// What the model is to read.
#[derive(Clone, Debug)]
pub enum Prompt<'a> {
    /// A conversation, to be rendered by the model's chat template.
    Chat(ChatPrompt<'a>),
    /// One text.
    Text(Cow<'a, str>),
    /// Several texts: one request each to the engine. Two or more.
    Texts(Vec<Cow<'a, str>>),
    /// One prompt's token ids, used as they are. Not empty.
    Tokens(Vec<TokenId>),
    /// Several prompts' token ids. Two or more.
    TokenLists(Vec<Vec<TokenId>>),
    /// What an API that is routed by load alone is sent.
    Unread,
}

/// A conversation as the client sent it.
#[derive(Clone, Copy, Debug)]
pub struct ChatPrompt<'a> {
    /// `messages`: an array, not empty. Its items are looked at by `render`.
    pub messages: RawJson<'a>,
    /// `tools`: an array, not empty.
    pub tools: Option<RawJson<'a>>,
    /// `tool_choice`: a string or an object.
    pub tool_choice: Option<RawJson<'a>>,
    /// `chat_template_kwargs`, else `chat_template_args`: an object whose
    /// members become variables of the template.
    pub template_args: Option<RawJson<'a>>,
    /// `documents`: an array.
    pub documents: Option<RawJson<'a>>,
    /// `reasoning_effort`: a string.
    pub reasoning_effort: Option<RawJson<'a>>,
    /// `add_generation_prompt`, if the client said.
    pub add_generation_prompt: Option<bool>,
    /// `continue_final_message`: whether the last message is to be continued
    /// rather than answered. Default `false`.
    pub continue_final_message: bool,
}

impl Prompt<'_> {
    /// Whether there is more to the prompt than its text: the engine puts tokens
    /// in place of images and the like that no template prints.
    #[must_use]
    pub fn has_media(&self) -> bool {
        matches!(self, Self::Chat(chat) if chat.has_media())
    }
}

impl ChatPrompt<'_> {
    fn has_media(&self) -> bool {
        const TEXTS: [&str; 5] = ["text", "input_text", "output_text", "refusal", "thinking"];
        let is_text = |part: RawJson<'_>| {
            part.kind() != JsonKind::Object
                || part
                    .member("type")
                    .and_then(RawJson::name)
                    .is_some_and(|kind| TEXTS.contains(&&*kind))
        };
        self.messages.items().any(|message| {
            let content = message.member("content");
            content.is_some_and(|content| content.items().any(|part| !is_text(part)))
        })
    }

    /// Whether the client forbids tool calls (`tool_choice` is `"none"`).
    #[must_use]
    pub fn forbids_tools(&self) -> bool {
        self.tool_choice.is_some_and(|choice| choice.is_string("none"))
    }
}

/// How a client changes its prompt in ways that are not followed here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptAlteration {
    /// `chat_template`: the client brings its own template.
    RequestTemplate,
    /// `truncate_prompt_tokens`: the engine cuts the prompt.
    Truncation,
    /// `nvext.use_raw_prompt`: the template is skipped.
    RawPrompt,
}

impl PromptAlteration {
    /// The reason as it is counted.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            PromptAlteration::RequestTemplate => "request_template",
            PromptAlteration::Truncation => "prompt_truncation",
            PromptAlteration::RawPrompt => "raw_prompt",
        }
    }
}

pub(super) fn alteration(
    envelope: &Envelope<'_>,
    nvext: Option<&NvExt<'_>>,
) -> Option<PromptAlteration> {
    if envelope.field(Field::ChatTemplate).is_some() {
        Some(PromptAlteration::RequestTemplate)
    } else if envelope.field(Field::TruncatePromptTokens).is_some() {
        Some(PromptAlteration::Truncation)
    } else if nvext.is_some_and(|nvext| nvext.use_raw_prompt) {
        Some(PromptAlteration::RawPrompt)
    } else {
        None
    }
}

pub(super) fn read<'a>(
    envelope: &Envelope<'a>,
    endpoint: Endpoint,
) -> Result<Prompt<'a>, RequestError> {
    match endpoint {
        Endpoint::ChatCompletions => chat(envelope).map(Prompt::Chat),
        Endpoint::Completions => match envelope.field(Field::Prompt) {
            _ if envelope.field(Field::PromptEmbeds).is_some() => Err(RequestError::Embeddings),
            Some(prompt) => completion(prompt),
            None => Err(RequestError::NoPrompt),
        },
        Endpoint::Responses | Endpoint::Embeddings | Endpoint::Messages | Endpoint::Models => {
            Ok(Prompt::Unread)
        }
    }
}

fn chat<'a>(envelope: &Envelope<'a>) -> Result<ChatPrompt<'a>, RequestError> {
    let messages = envelope.array(Field::Messages)?.ok_or(RequestError::NoMessages)?;
    if messages.is_empty_container() {
        return Err(RequestError::EmptyPrompt);
    }
    let kwargs = envelope.object(Field::ChatTemplateKwargs)?;
    let args = envelope.object(Field::ChatTemplateArgs)?;
    let tool_choice = envelope.typed(Field::ToolChoice, |choice| {
        matches!(choice.kind(), JsonKind::String | JsonKind::Object).then_some(choice)
    })?;
    let reasoning_effort = envelope.typed(Field::ReasoningEffort, |effort| {
        (effort.kind() == JsonKind::String).then_some(effort)
    })?;
    Ok(ChatPrompt {
        messages,
        tools: envelope.array(Field::Tools)?.filter(|tools| !tools.is_empty_container()),
        tool_choice,
        template_args: kwargs.or(args),
        documents: envelope.array(Field::Documents)?,
        reasoning_effort,
        add_generation_prompt: envelope.boolean(Field::AddGenerationPrompt)?,
        continue_final_message: envelope.boolean(Field::ContinueFinalMessage)?.unwrap_or(false),
    })
}

/// Reads the four forms of `prompt`; a batch of one is the one.
fn completion(prompt: RawJson<'_>) -> Result<Prompt<'_>, RequestError> {
    const WRONG: RequestError = RequestError::WrongType(Field::Prompt);
    if let Some(text) = prompt.string() {
        return Ok(Prompt::Text(text));
    }
    if prompt.kind() != JsonKind::Array {
        return Err(WRONG);
    }
    match prompt.first_item_kind() {
        None => Err(RequestError::EmptyPrompt),
        Some(JsonKind::Number) => token_ids(prompt).map(Prompt::Tokens),
        Some(JsonKind::String) => {
            let mut texts = batch(prompt, |item| item.string().ok_or(WRONG))?;
            Ok(if texts.len() == 1 {
                Prompt::Text(texts.pop().unwrap_or_default())
            } else {
                Prompt::Texts(texts)
            })
        }
        Some(JsonKind::Array) => {
            let mut lists = batch(prompt, |item| match item.kind() {
                JsonKind::Array if item.is_empty_container() => Err(RequestError::EmptyPrompt),
                JsonKind::Array => token_ids(item),
                _ => Err(WRONG),
            })?;
            Ok(if lists.len() == 1 {
                Prompt::Tokens(lists.pop().unwrap_or_default())
            } else {
                Prompt::TokenLists(lists)
            })
        }
        Some(_) => Err(WRONG),
    }
}

fn batch<'a, T>(
    prompt: RawJson<'a>,
    read: impl Fn(RawJson<'a>) -> Result<T, RequestError>,
) -> Result<Vec<T>, RequestError> {
    let mut prompts = Vec::new();
    for item in prompt.items() {
        if prompts.len() >= PROMPT_BATCH_MAX {
            return Err(RequestError::BatchTooLarge);
        }
        prompts.push(read(item)?);
    }
    Ok(prompts)
}

/// Reads an array of token ids. Their number is bounded by the body's length.
///
/// The array is known to be valid JSON, so its items are token ids if there is
/// nothing but digits, commas and space in it.
pub(super) fn token_ids(array: RawJson<'_>) -> Result<Vec<TokenId>, RequestError> {
    if array.is_empty_container() {
        return Ok(Vec::new());
    }
    // An id and its comma take two bytes or more, usually about five.
    let mut ids = Vec::with_capacity(array.text().len() / 5);
    let mut id: TokenId = 0;
    for byte in array.text().bytes().skip(1) {
        match byte {
            b'0'..=b'9' => {
                let digit = TokenId::from(byte - b'0');
                id = id
                    .checked_mul(10)
                    .and_then(|id| id.checked_add(digit))
                    .ok_or(RequestError::TokenId)?;
            }
            b',' | b']' => {
                ids.push(id);
                id = 0;
            }
            b' ' | b'\n' | b'\r' | b'\t' => {}
            _ => return Err(RequestError::TokenId),
        }
    }
    Ok(ids)
}
