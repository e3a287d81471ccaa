//! The envelope: which known members a body has, and where.

use std::ops::Range;

use simdutf8::basic::from_utf8;

use super::RequestError;
use crate::json::{JsonError, Member, RawJson, Scanner};
use crate::limits::{BODY_BYTES_MAX, NVEXT_MEMBERS_MAX};

/// A top-level field that is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// `model`
    Model,
    /// `messages`
    Messages,
    /// `prompt`
    Prompt,
    /// `prompt_embeds`
    PromptEmbeds,
    /// `tools`
    Tools,
    /// `tool_choice`
    ToolChoice,
    /// `chat_template_kwargs` (vLLM, SGLang)
    ChatTemplateKwargs,
    /// `chat_template_args` (Dynamo)
    ChatTemplateArgs,
    /// `chat_template`
    ChatTemplate,
    /// `documents`
    Documents,
    /// `reasoning_effort`
    ReasoningEffort,
    /// `add_generation_prompt`
    AddGenerationPrompt,
    /// `continue_final_message`
    ContinueFinalMessage,
    /// `add_special_tokens`
    AddSpecialTokens,
    /// `truncate_prompt_tokens`
    TruncatePromptTokens,
    /// `stream`
    Stream,
    /// `max_tokens`
    MaxTokens,
    /// `max_completion_tokens`
    MaxCompletionTokens,
    /// `cache_salt`
    CacheSalt,
    /// `nvext`
    Nvext,
}

impl Field {
    const ALL: [Field; 20] = [
        Field::Model,
        Field::Messages,
        Field::Prompt,
        Field::PromptEmbeds,
        Field::Tools,
        Field::ToolChoice,
        Field::ChatTemplateKwargs,
        Field::ChatTemplateArgs,
        Field::ChatTemplate,
        Field::Documents,
        Field::ReasoningEffort,
        Field::AddGenerationPrompt,
        Field::ContinueFinalMessage,
        Field::AddSpecialTokens,
        Field::TruncatePromptTokens,
        Field::Stream,
        Field::MaxTokens,
        Field::MaxCompletionTokens,
        Field::CacheSalt,
        Field::Nvext,
    ];

    /// The field's key.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Field::Model => "model",
            Field::Messages => "messages",
            Field::Prompt => "prompt",
            Field::PromptEmbeds => "prompt_embeds",
            Field::Tools => "tools",
            Field::ToolChoice => "tool_choice",
            Field::ChatTemplateKwargs => "chat_template_kwargs",
            Field::ChatTemplateArgs => "chat_template_args",
            Field::ChatTemplate => "chat_template",
            Field::Documents => "documents",
            Field::ReasoningEffort => "reasoning_effort",
            Field::AddGenerationPrompt => "add_generation_prompt",
            Field::ContinueFinalMessage => "continue_final_message",
            Field::AddSpecialTokens => "add_special_tokens",
            Field::TruncatePromptTokens => "truncate_prompt_tokens",
            Field::Stream => "stream",
            Field::MaxTokens => "max_tokens",
            Field::MaxCompletionTokens => "max_completion_tokens",
            Field::CacheSalt => "cache_salt",
            Field::Nvext => "nvext",
        }
    }

    /// The field of a key. Called for every member: a body may have millions.
    fn of_key(key: RawJson<'_>) -> Option<Field> {
        let key = key.name()?;
        Field::ALL.into_iter().find(|field| key == field.name())
    }
}

/// One member called `nvext`, as byte ranges of the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvextSpan {
    /// From the key's quote to the value's end.
    pub member: Range<usize>,
    /// The value.
    pub value: Range<usize>,
}

/// Where `nvext` is, or would go, in a body.
#[derive(Clone, Debug)]
pub struct Splice<'a> {
    /// The whole body.
    pub body: &'a str,
    /// The members called `nvext`, in order; all but the last are overridden.
    pub nvext: Vec<NvextSpan>,
    /// Offset of the root object's closing brace.
    pub root_close: usize,
    /// Whether the root object has no members.
    pub root_empty: bool,
}

/// The top-level members of a body that is valid JSON and an object.
#[derive(Clone, Debug)]
pub struct Envelope<'a> {
    fields: [Option<RawJson<'a>>; Field::ALL.len()],
    /// Where `nvext` is, or would go.
    pub splice: Splice<'a>,
}

impl<'a> Envelope<'a> {
    /// Scans a body, all of it, and notes its known members.
    ///
    /// # Errors
    ///
    /// [`RequestError::TooLarge`], [`RequestError::InvalidUtf8`],
    /// [`RequestError::InvalidJson`], [`RequestError::TooDeep`],
    /// [`RequestError::NotAnObject`] or [`RequestError::TooManyDuplicates`].
    pub fn scan(body: &'a [u8]) -> Result<Self, RequestError> {
        if body.len() > BODY_BYTES_MAX {
            return Err(RequestError::TooLarge);
        }
        let text = from_utf8(body).map_err(|_| RequestError::InvalidUtf8)?;
        let mut scanner = Scanner::new(text);
        scanner.space();
        if scanner.peek() != Some(b'{') {
            scanner.value(0)?;
            scanner.end()?;
            return Err(RequestError::NotAnObject);
        }
        let splice = Splice { body: text, nvext: Vec::new(), root_close: 0, root_empty: true };
        let mut envelope = Envelope { fields: [None; Field::ALL.len()], splice };
        let mut next = scanner.first_member(1)?;
        while let Some(member) = next {
            envelope.note(&member)?;
            next = scanner.next_member(1)?;
        }
        // The position is after the closing brace.
        envelope.splice.root_close = scanner.at().saturating_sub(1);
        scanner.end()?;
        Ok(envelope)
    }

    fn note(&mut self, member: &Member<'a>) -> Result<(), RequestError> {
        self.splice.root_empty = false;
        let Some(field) = Field::of_key(member.key) else {
            return Ok(());
        };
        if let Some(slot) = self.fields.get_mut(field as usize) {
            *slot = Some(member.value);
        }
        if field == Field::Nvext {
            if self.splice.nvext.len() >= NVEXT_MEMBERS_MAX {
                return Err(RequestError::TooManyDuplicates);
            }
            self.splice.nvext.push(NvextSpan {
                member: member.start..member.end,
                value: member.value_start..member.end,
            });
        }
        Ok(())
    }

    /// The value of a field, unless it is absent.
    #[must_use]
    pub fn field(&self, field: Field) -> Option<RawJson<'a>> {
        self.fields.get(field as usize).copied().flatten().filter(|value| !value.is_null())
    }
}

impl From<JsonError> for RequestError {
    fn from(error: JsonError) -> Self {
        match error {
            JsonError::Syntax(at) => RequestError::InvalidJson(at),
            JsonError::TooDeep => RequestError::TooDeep,
        }
    }
}
