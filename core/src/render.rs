//! Render: a conversation to the text that the model reads.
//!
//! Second stage of the request path: `request` gives the conversation as spans
//! of the body, this module runs the model's chat template on it, `tokenize`
//! turns the text into tokens. The text must be the engine's to the byte, or no
//! block of it is found in a cache.
//!
//! # Terms
//!
//! - *flavour*: what the engine does to messages and tools before its template
//!   sees them; the template itself runs alike everywhere.
//! - *content format*: whether a template takes a message's content as text or
//!   as a list of parts.
//!
//! # Invariants
//!
//! 1. Output equals that of `transformers` (jinja2) on the same context, or
//!    there is none: the golden cases and their listed exceptions say how far.
//! 2. The order of keys and the difference between integers and floats are kept.
//! 3. What a rendering costs is bounded by fuel, and its length by
//!    [`RENDERED_BYTES_MAX`].
//! 4. No error says what a conversation or a template contains.
//!
//! The time is an argument: some templates print the date.

use std::fmt;
use std::io;

use minijinja::{Environment, Error, ErrorKind, Value};
use simdutf8::basic::from_utf8;

use crate::json::RawJson;
use crate::limits::RENDERED_BYTES_MAX;
use crate::request::{Answer, ChatPrompt};

mod clock;
mod environment;
mod messages;
mod python;
mod source;
mod value;

pub use clock::WallClock;
pub use source::{TemplateError, TemplateForm, TemplateSource};

use messages::Rewrite;
use value::Builder;

/// What happens to messages and tools before the template.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flavour {
    /// Nothing but what `transformers`' own `apply_chat_template` does.
    Raw,
    /// As vLLM's OpenAI server: see the source of `messages` for the list.
    #[default]
    Vllm,
    /// As Dynamo's frontend.
    Dynamo,
}

/// How a template takes a message's content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ContentFormat {
    /// Found out by rendering a probe when the template is compiled. For
    /// [`Flavour::Vllm`] parts if the template prints the text of a part (vLLM
    /// itself looks for a loop over the content); for [`Flavour::Dynamo`] parts
    /// only if it prints that and cannot print text.
    #[default]
    Auto,
    /// Text; vLLM calls it `string`.
    Text,
    /// A list of parts; vLLM calls it `openai`.
    Parts,
}

/// What the engine's configuration adds to its template.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RenderOptions {
    /// What the engine does before the template.
    pub flavour: Flavour,
    /// How the template takes content.
    pub content_format: ContentFormat,
    /// Whether tools are kept from the template if `tool_choice` is `none`
    /// (vLLM: `--exclude-tools-when-tool-choice-none`, off by default; Dynamo: on
    /// by default).
    pub exclude_tools_when_choice_none: bool,
    /// Template arguments that hold unless the client sets them: a JSON object
    /// (vLLM: `--default-chat-template-kwargs`).
    pub default_args: Option<String>,
}

/// Why a conversation is not rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenderError {
    /// `messages` has a shape that no engine takes.
    Messages,
    /// `tools` has a shape that the engine refuses.
    Tools,
    /// A tool call's arguments are not JSON.
    ToolArguments,
    /// A message has images, sound or other parts whose tokens are not known
    /// here.
    Media,
    /// The engine rewrites this conversation in a way that is not followed here.
    NotFollowed,
    /// The last message cannot be continued as asked.
    Continuation,
    /// The template refused the conversation (`raise_exception`).
    Raised,
    /// The template failed.
    Failed,
    /// More than [`TEMPLATE_FUEL_MAX`](crate::limits::TEMPLATE_FUEL_MAX) of fuel.
    OutOfFuel,
    /// Longer than [`RENDERED_BYTES_MAX`].
    TooLarge,
    /// More than [`TEMPLATE_VALUES_MAX`](crate::limits::TEMPLATE_VALUES_MAX)
    /// values in messages, tools and arguments.
    TooManyValues,
}

impl RenderError {
    /// The reason as it is counted.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            RenderError::Messages => "render_messages",
            RenderError::Tools => "render_tools",
            RenderError::ToolArguments => "render_tool_arguments",
            RenderError::Media => "render_media",
            RenderError::NotFollowed => "render_not_followed",
            RenderError::Continuation => "render_continuation",
            RenderError::Raised => "render_raised",
            RenderError::Failed => "render_failed",
            RenderError::OutOfFuel => "render_out_of_fuel",
            RenderError::TooLarge => "render_too_large",
            RenderError::TooManyValues => "render_too_many_values",
        }
    }

    /// The suggested answer. Only what no engine takes is answered here; what a
    /// template makes of it is the engine's to say.
    #[must_use]
    pub fn answer(self) -> Answer {
        match self {
            RenderError::Messages => Answer::BadRequest,
            _ => Answer::ByLoad,
        }
    }
}

impl fmt::Display for RenderError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            RenderError::Messages => "`messages` is malformed",
            RenderError::Tools => "`tools` is malformed",
            RenderError::ToolArguments => "the arguments of a tool call are not JSON",
            RenderError::Media => "a message has parts other than text",
            RenderError::NotFollowed => "the engine rewrites this conversation",
            RenderError::Continuation => "the last message cannot be continued",
            RenderError::Raised => "the chat template refused the conversation",
            RenderError::Failed => "the chat template failed",
            RenderError::OutOfFuel => "the chat template took too long",
            RenderError::TooLarge => "the rendered prompt is too long",
            RenderError::TooManyValues => "the conversation has too many parts",
        })
    }
}

impl std::error::Error for RenderError {}

/// A model's chat template, ready to render.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    /// The special tokens, as they enter every context.
    special_tokens: Vec<(Value, Value)>,
    /// Whether a template's text mentions [`CLOCK`]; no other can call it.
    mentions_clock: bool,
    options: RenderOptions,
    rewrite: Rewrite,
}

/// Room for what a template prints besides the messages, in bytes. More is found
/// when it is needed.
const RENDERED_MORE_BYTES: usize = 1024;

/// Entries of a context besides special tokens and arguments.
const CONTEXT_ENTRIES: usize = 8;

/// The function that prints the time.
const CLOCK: &str = "strftime_now";

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// Appended to a message that is to be continued; `transformers` uses this one,
/// and its space at the end tells whether the template strips the message.
const CONTINUATION_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// The text of the message that finds out a template's content format.
const PROBE: &str = "warmpath-probe";

impl ChatTemplate {
    /// Compiles a model's templates with the default options.
    ///
    /// # Errors
    ///
    /// [`TemplateError`]: the model's requests are routed without a prompt.
    pub fn compile(source: &TemplateSource) -> Result<Self, TemplateError> {
        Self::compile_with(source, RenderOptions::default())
    }

    /// Compiles a model's templates.
    ///
    /// # Errors
    ///
    /// [`TemplateError`]
    ///
    /// # Cost
    ///
    /// About 0.1 to 0.3 ms, and two renderings of a probe.
    pub fn compile_with(
        source: &TemplateSource,
        options: RenderOptions,
    ) -> Result<Self, TemplateError> {
        source.check_limits()?;
        if let Some(defaults) = &options.default_args
            && !RawJson::parse(defaults).is_ok_and(|args| args.text().starts_with('{'))
        {
            return Err(TemplateError::InvalidDefaults);
        }
        let syntax = |error: Error| {
            TemplateError::Syntax(error.line().and_then(|line| u32::try_from(line).ok()))
        };
        let mut env = environment::environment().map_err(syntax)?;
        let default = source.template(DEFAULT).ok_or(TemplateError::NoTemplate)?;
        let (mut mentions_reasoning, mut mentions_clock) = (false, false);
        for (name, template) in [(DEFAULT, Some(default)), (TOOL_USE, source.template(TOOL_USE))] {
            let Some(template) = template else { continue };
            mentions_reasoning |= template.contains("reasoning_content");
            mentions_clock |= template.contains(CLOCK);
            let template = environment::without_generation_tags(template);
            env.add_template_owned(name, template).map_err(syntax)?;
        }
        let flavour = options.flavour;
        let content_format = options.content_format;
        let tokens = source.special_tokens.iter();
        let mut template = ChatTemplate {
            env,
            special_tokens: tokens.map(|(name, token)| (name.into(), token.into())).collect(),
            mentions_clock,
            options,
            rewrite: Rewrite { flavour, content_format, mentions_reasoning },
        };
        if content_format == ContentFormat::Auto {
            template.rewrite.content_format = template.probe();
        }
        Ok(template)
    }

    /// How this template takes content; never [`ContentFormat::Auto`].
    #[must_use]
    pub fn content_format(&self) -> ContentFormat {
        self.rewrite.content_format
    }

    /// Renders a conversation.
    ///
    /// - `chat`: from the parsed request.
    /// - `now`: the engine's wall clock, as well as it is known.
    ///
    /// Returns the prompt's text, special tokens included: it is to be tokenized
    /// without adding any.
    ///
    /// # Errors
    ///
    /// [`RenderError`]; its [`answer`](RenderError::answer) says whether the
    /// client should be told, or the request routed by load.
    ///
    /// # Cost
    ///
    /// 5 to 80 us for a short conversation, then some 4 to 9 us per kilobyte.
    pub fn render(&self, chat: &ChatPrompt<'_>, now: WallClock) -> Result<String, RenderError> {
        let mut builder = Builder::new();
        let mut messages = self.rewrite.messages(chat.messages, &mut builder)?;
        if !chat.continue_final_message {
            return self.run(chat, messages, builder, now);
        }
        // No engine continues a message and opens a new one.
        if chat.add_generation_prompt != Some(false) {
            return Err(RenderError::Continuation);
        }
        let last = messages::tag_last(&mut messages, CONTINUATION_TAG)?;
        let rendered = self.run(chat, messages, builder, now)?;
        if !rendered.contains(last.trim()) {
            return Err(RenderError::Continuation);
        }
        let tag = CONTINUATION_TAG.trim_end();
        let (before, after) = rendered.rsplit_once(tag).ok_or(RenderError::Continuation)?;
        // A template that strips the message also took the tag's space.
        let kept = if after.starts_with(' ') { before } else { before.trim_end() };
        Ok(kept.to_owned())
    }

    fn run(
        &self,
        chat: &ChatPrompt<'_>,
        messages: Vec<Value>,
        mut builder: Builder,
        now: WallClock,
    ) -> Result<String, RenderError> {
        let excluded = self.options.exclude_tools_when_choice_none && chat.forbids_tools();
        let tools = match chat.tools {
            Some(tools) if !excluded => Some(self.rewrite.tools(tools, &mut builder)?),
            _ => None,
        };
        let name = match tools {
            Some(_) if self.env.get_template(TOOL_USE).is_ok() => TOOL_USE,
            _ => DEFAULT,
        };
        let documents = chat.documents.map(|documents| builder.json(documents)).transpose()?;
        let add_generation_prompt = chat.add_generation_prompt.unwrap_or(true);
        let mut context = self.base_context(now);
        context.extend([
            (Value::from("messages"), value::list(messages)),
            (Value::from("tools"), tools.unwrap_or_else(value::none)),
            (Value::from("documents"), documents.unwrap_or_else(value::none)),
            (Value::from("add_generation_prompt"), Value::from(add_generation_prompt)),
        ]);
        let defaults = self.options.default_args.as_deref();
        let defaults = defaults.and_then(|args| RawJson::parse(args).ok());
        extend_with_members(defaults, &mut builder, &mut context)?;
        if self.options.flavour != Flavour::Raw
            && let Some(effort) = chat.reasoning_effort
        {
            context.push((Value::from("reasoning_effort"), builder.json(effort)?));
        }
        extend_with_members(chat.template_args, &mut builder, &mut context)?;
        // Escapes take more room in the body than what they stand for, and a
        // template's own text is short.
        let bytes_expected = chat.messages.text().len() + RENDERED_MORE_BYTES;
        self.evaluate(name, context, bytes_expected)
    }

    /// The special tokens and the functions that need the request's time.
    fn base_context(&self, now: WallClock) -> Vec<(Value, Value)> {
        let mut context = Vec::with_capacity(self.special_tokens.len() + CONTEXT_ENTRIES);
        context.extend_from_slice(&self.special_tokens);
        if self.mentions_clock {
            let strftime = move |format: &str| clock::strftime(now, format);
            context.push((Value::from(CLOCK), Value::from_function(strftime)));
        }
        context
    }

    fn evaluate(
        &self,
        name: &str,
        context: Vec<(Value, Value)>,
        bytes_expected: usize,
    ) -> Result<String, RenderError> {
        let template = self.env.get_template(name).map_err(|_| RenderError::Failed)?;
        let mut out = Bounded { text: String::with_capacity(bytes_expected), full: false };
        let rendered = template.render_captured_to(value::dict(context), &mut out).map(drop);
        match rendered {
            _ if out.full => Err(RenderError::TooLarge),
            Err(error) => Err(classify(&error)),
            Ok(()) => Ok(out.text),
        }
    }

    /// Finds out how the default template takes content.
    fn probe(&self) -> ContentFormat {
        let text = |content: Value| {
            let message = value::dict(vec![
                (Value::from("role"), Value::from("user")),
                (Value::from("content"), content),
            ]);
            let mut context = self.base_context(WallClock::default());
            context.extend([
                (Value::from("messages"), value::list(vec![message])),
                (Value::from("tools"), value::none()),
                (Value::from("documents"), value::none()),
                (Value::from("add_generation_prompt"), Value::from(false)),
            ]);
            self.evaluate(DEFAULT, context, 0).unwrap_or_default()
        };
        let part = value::dict(vec![
            (Value::from("type"), Value::from("text")),
            (Value::from("text"), Value::from(PROBE)),
        ]);
        let from_parts = text(value::list(vec![part]));
        // A quote before the probe means that the list itself was printed.
        let prints_parts =
            from_parts.split_once(PROBE).is_some_and(|(before, _)| !before.ends_with(['\'', '"']));
        let prints_text =
            self.options.flavour == Flavour::Dynamo && text(Value::from(PROBE)).contains(PROBE);
        if prints_parts && !prints_text { ContentFormat::Parts } else { ContentFormat::Text }
    }
}

fn extend_with_members(
    object: Option<RawJson<'_>>,
    builder: &mut Builder,
    context: &mut Vec<(Value, Value)>,
) -> Result<(), RenderError> {
    for member in object.into_iter().flat_map(RawJson::members) {
        let key = member.key.string().unwrap_or_default();
        context.push((Value::from(&*key), builder.json(member.value)?));
    }
    Ok(())
}

/// A writer that refuses what is beyond [`RENDERED_BYTES_MAX`].
struct Bounded {
    text: String,
    full: bool,
}

impl io::Write for &mut Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.text.len() + bytes.len() > RENDERED_BYTES_MAX {
            self.full = true;
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        // The engine writes pieces of text one by one, none of them in parts.
        let piece = from_utf8(bytes).map_err(|_| io::ErrorKind::InvalidData)?;
        self.text.push_str(piece);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn classify(error: &Error) -> RenderError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if current.is::<environment::Raised>() {
            return RenderError::Raised;
        }
        if current.downcast_ref::<Error>().is_some_and(|e| e.kind() == ErrorKind::OutOfFuel) {
            return RenderError::OutOfFuel;
        }
        cause = current.source();
    }
    RenderError::Failed
}
#[cfg(test)]
mod tests;
