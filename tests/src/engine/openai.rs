//! OpenAI: the shapes of requests and responses that the simulator knows.
//!
//! Requests are read leniently, as vLLM does: unknown fields are ignored, a
//! wrong type in a known one is a client error. Errors carry no request text.

use minijinja::value::{Value, ValueKind};
use serde::{Deserialize, Serialize};

use super::model::ChatContext;

/// Tokens generated if the request does not say.
const OUTPUT_TOKENS_DEFAULT: usize = 16;

/// What both endpoints read.
#[derive(Clone, Debug, Deserialize)]
pub struct Common {
    /// Model or adapter.
    pub model: String,
    /// Whether the answer is streamed.
    #[serde(default)]
    pub stream: Option<bool>,
    /// Options of a stream.
    #[serde(default)]
    pub stream_options: Option<StreamOptions>,
    /// Most tokens to generate.
    #[serde(default)]
    pub max_tokens: Option<usize>,
    /// The same, newer name; wins.
    #[serde(default)]
    pub max_completion_tokens: Option<usize>,
    /// Separates the request's cache from others'.
    #[serde(default)]
    pub cache_salt: Option<String>,
    /// Whether a completion's pieces carry their tokens, as vLLM's do then.
    #[serde(default)]
    pub return_token_ids: Option<bool>,
    /// Dynamo's extension; only its tokens are looked at.
    #[serde(default)]
    pub nvext: Option<Nvext>,
}

impl Common {
    /// Tokens to generate, at least one.
    #[must_use]
    pub fn output_tokens(&self) -> usize {
        let asked = self.max_completion_tokens.or(self.max_tokens);
        asked.unwrap_or(OUTPUT_TOKENS_DEFAULT).max(1)
    }

    /// Whether a stream ends with a usage message.
    #[must_use]
    pub fn include_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
    }
}

/// `stream_options`.
#[derive(Clone, Debug, Deserialize)]
pub struct StreamOptions {
    /// Ask for a last message with usage.
    #[serde(default)]
    pub include_usage: Option<bool>,
}

/// The part of `nvext` that a gateway may have written.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Nvext {
    /// Prompt tokens as the gateway saw them.
    #[serde(default)]
    pub token_data: Option<Vec<u32>>,
    /// Worker that the gateway chose.
    #[serde(default)]
    pub backend_instance_id: Option<u64>,
}

/// `POST /v1/chat/completions`.
#[derive(Clone, Debug, Deserialize)]
pub struct ChatRequest {
    /// Shared fields.
    #[serde(flatten)]
    pub common: Common,
    /// The conversation.
    pub messages: Vec<Value>,
    /// Tools offered.
    #[serde(default)]
    pub tools: Option<Value>,
    /// Documents offered.
    #[serde(default)]
    pub documents: Option<Value>,
    /// Further template variables.
    #[serde(default, alias = "chat_template_args")]
    pub chat_template_kwargs: Option<Value>,
    /// Whether the assistant's turn is opened; yes unless told.
    #[serde(default)]
    pub add_generation_prompt: Option<bool>,
}

impl ChatRequest {
    /// What the chat template is given. `None` if a message is no object or
    /// has no role.
    #[must_use]
    pub fn context(&self) -> Option<ChatContext> {
        let messages: Option<Vec<Value>> = self.messages.iter().map(message).collect();
        let none = || Value::from(());
        Some(ChatContext {
            messages: messages?,
            tools: self.tools.clone().unwrap_or_else(none),
            documents: self.documents.clone().unwrap_or_else(none),
            add_generation_prompt: self.add_generation_prompt.unwrap_or(true),
            kwargs: self.chat_template_kwargs.as_ref().map(entries).unwrap_or_default(),
        })
    }
}

/// Prepares a message as vLLM does before the template sees it: text parts are
/// joined by line breaks, and a tool call's arguments become an object.
fn message(message: &Value) -> Option<Value> {
    if message.kind() != ValueKind::Map || message.get_attr("role").ok()?.is_undefined() {
        return None;
    }
    let fields = entries(message).into_iter().map(|(key, value)| {
        let value = match key.as_str() {
            "content" => content(value),
            "tool_calls" => tool_calls(&value),
            _ => value,
        };
        (key, value)
    });
    Some(Value::from_pairs(fields))
}

fn content(content: Value) -> Value {
    match content.kind() {
        ValueKind::None => Value::from(""),
        ValueKind::Seq => {
            let parts = content.try_iter().into_iter().flatten();
            let texts: Vec<String> = parts
                .filter_map(|part| match part.kind() {
                    ValueKind::String => Some(part.to_string()),
                    _ => part
                        .get_attr("text")
                        .ok()
                        .filter(|text| !text.is_undefined())
                        .map(|text| text.to_string()),
                })
                .collect();
            Value::from(texts.join("\n"))
        }
        _ => content,
    }
}

fn tool_calls(calls: &Value) -> Value {
    let calls = calls.try_iter().into_iter().flatten();
    calls
        .map(|call| {
            let fields = entries(&call).into_iter().map(|(key, value)| match key.as_str() {
                "function" => (key, function(&value)),
                _ => (key, value),
            });
            Value::from_pairs(fields)
        })
        .collect::<Vec<Value>>()
        .into()
}

fn function(function: &Value) -> Value {
    let fields = entries(function).into_iter().map(|(key, value)| {
        let parsed = value.as_str().filter(|_| key == "arguments").map(|text| {
            if text.is_empty() {
                Ok(Value::from_pairs::<[(String, Value); 0], _, _>([]))
            } else {
                serde_json::from_str::<Value>(text)
            }
        });
        match parsed {
            Some(Ok(arguments)) => (key, arguments),
            _ => (key, value),
        }
    });
    Value::from_pairs(fields)
}

/// The entries of a map in their order; nothing for anything else.
fn entries(map: &Value) -> Vec<(String, Value)> {
    if map.kind() != ValueKind::Map {
        return Vec::new();
    }
    let keys = map.try_iter().into_iter().flatten();
    keys.filter_map(|key| {
        let value = map.get_item(&key).ok()?;
        Some((key.as_str()?.to_owned(), value))
    })
    .collect()
}

/// `POST /v1/completions`.
#[derive(Clone, Debug, Deserialize)]
pub struct CompletionRequest {
    /// Shared fields.
    #[serde(flatten)]
    pub common: Common,
    /// One prompt or several, as text or tokens.
    pub prompt: Prompt,
}

/// A completion's prompt.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    /// One text.
    Text(String),
    /// One list of tokens.
    Tokens(Vec<u32>),
    /// Several texts.
    Texts(Vec<String>),
    /// Several lists of tokens.
    TokenLists(Vec<Vec<u32>>),
}

/// Token counts of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Generated tokens.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
    /// More about the prompt.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// `usage.prompt_tokens_details`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PromptTokensDetails {
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: usize,
}

impl Usage {
    /// Adds another prompt's counts.
    pub fn add(&mut self, prompt_tokens: usize, cached_tokens: usize, completion_tokens: usize) {
        self.prompt_tokens += prompt_tokens;
        self.completion_tokens += completion_tokens;
        self.total_tokens += prompt_tokens + completion_tokens;
        self.prompt_tokens_details.cached_tokens += cached_tokens;
    }
}
