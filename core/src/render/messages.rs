//! What engines do to messages and tools before the template sees them.
//!
//! vLLM rebuilds every message from the fields it knows, joins text parts (or
//! splits text into parts, for templates that loop over them), turns tool-call
//! arguments from JSON text into objects, and dumps tools through its own types,
//! which adds the fields left out as `None`. Dynamo's frontend keeps messages,
//! joins arrays of text parts, and completes tool schemas. `transformers` hands
//! everything on as it is.

use minijinja::Value;
use minijinja::value::ValueKind;

use super::value::{Builder, PyDict, PyList, dict, list, none};
use super::{ContentFormat, Flavour, RenderError};
use crate::json::RawJson;

/// How one template's messages are rewritten.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rewrite {
    pub(super) flavour: Flavour,
    /// Never `Auto`.
    pub(super) content_format: ContentFormat,
    /// Whether the template's text mentions `reasoning_content`.
    pub(super) mentions_reasoning: bool,
}

fn as_dict(value: &Value) -> Option<&PyDict> {
    value.downcast_object_ref::<PyDict>()
}

fn as_list(value: &Value) -> Option<&[Value]> {
    value.downcast_object_ref::<PyList>().map(|list| list.0.as_slice())
}

fn present<'a>(dict: &'a PyDict, key: &str) -> Option<&'a Value> {
    dict.get(key).filter(|value| !value.is_none())
}

fn entry(key: &str, value: Value) -> (Value, Value) {
    (Value::from(key), value)
}

/// A copy of a dict with one value set: in its place, or at the end.
fn with(source: &PyDict, key: &str, value: Value) -> Value {
    let mut entries = source.entries().to_vec();
    entries.push(entry(key, value));
    dict(entries)
}

fn without(source: &PyDict, key: &str) -> Value {
    let kept = source.entries().iter().filter(|(own, _)| own.as_str() != Some(key));
    dict(kept.cloned().collect())
}

impl Rewrite {
    /// The messages as the template is to see them.
    ///
    /// # Errors
    ///
    /// [`RenderError::Messages`], [`RenderError::ToolArguments`],
    /// [`RenderError::Media`], [`RenderError::NotFollowed`] or
    /// [`RenderError::TooManyValues`].
    pub(super) fn messages(
        self,
        messages: RawJson<'_>,
        builder: &mut Builder,
    ) -> Result<Vec<Value>, RenderError> {
        let messages = builder.json(messages)?;
        let messages = as_list(&messages).ok_or(RenderError::Messages)?;
        messages
            .iter()
            .map(|message| {
                let fields = as_dict(message).ok_or(RenderError::Messages)?;
                match self.flavour {
                    Flavour::Raw => Ok(alias_reasoning(message, fields)),
                    Flavour::Vllm if self.is_kept(fields) => Ok(message.clone()),
                    Flavour::Vllm => self.vllm_message(fields, builder),
                    Flavour::Dynamo => self.dynamo_message(message, fields, builder),
                }
            })
            .collect()
    }

    /// The tools as the template is to see them.
    ///
    /// # Errors
    ///
    /// [`RenderError::Tools`] or [`RenderError::TooManyValues`].
    pub(super) fn tools(
        self,
        tools: RawJson<'_>,
        builder: &mut Builder,
    ) -> Result<Value, RenderError> {
        let tools = builder.json(tools)?;
        let items = as_list(&tools).ok_or(RenderError::Tools)?;
        let rewritten: Result<Vec<Value>, RenderError> = items
            .iter()
            .map(|tool| {
                let fields = as_dict(tool).ok_or(RenderError::Tools)?;
                match self.flavour {
                    Flavour::Raw => Ok(tool.clone()),
                    Flavour::Vllm => vllm_tool(fields),
                    Flavour::Dynamo => Ok(dynamo_tool(tool, fields)),
                }
            })
            .collect();
        rewritten.map(list)
    }

    /// Whether vLLM would build the same message again: most are a role and a text.
    fn is_kept(self, message: &PyDict) -> bool {
        let [(first, role), (second, content)] = message.entries() else { return false };
        let is_text = content.as_str().is_some() && self.content_format != ContentFormat::Parts;
        let role = role.as_str().filter(|&role| role != "developer");
        is_text
            && role.is_some()
            && first.as_str() == Some("role")
            && second.as_str() == Some("content")
    }

    fn vllm_message(self, message: &PyDict, builder: &mut Builder) -> Result<Value, RenderError> {
        let role = message.get("role").and_then(Value::as_str).ok_or(RenderError::Messages)?;
        let mut texts = vllm_texts(present(message, "content"))?;
        let is_parts = self.content_format == ContentFormat::Parts;
        let content = if is_parts && role != "tool" {
            let part = |text| dict(vec![entry("type", "text".into()), entry("text", text)]);
            list(texts.into_iter().map(part).collect())
        } else {
            // An empty part leaves no line of its own, if text is what is taken.
            texts.retain(|text| is_parts || text.as_str().is_some_and(|text| !text.is_empty()));
            joined(texts)
        };
        let mut entries = vec![entry("role", Value::from(role)), entry("content", content)];
        match role {
            "assistant" => {
                if let Some(calls) = present(message, "tool_calls") {
                    let calls = vllm_tool_calls(calls, builder)?;
                    entries.extend(calls.map(|calls| entry("tool_calls", calls)));
                }
                let reasoning =
                    present(message, "reasoning").or(present(message, "reasoning_content"));
                if let Some(reasoning) = reasoning {
                    entries.push(entry("reasoning", reasoning.clone()));
                    entries.push(entry("reasoning_content", reasoning.clone()));
                }
            }
            "tool" => entries
                .extend(message.get("tool_call_id").map(|id| entry("tool_call_id", id.clone()))),
            _ => {}
        }
        let name = message.get("name").filter(|name| name.kind() == ValueKind::String);
        entries.extend(name.map(|name| entry("name", name.clone())));
        if role == "developer" {
            entries.push(entry("tools", message.get("tools").cloned().unwrap_or_else(none)));
        }
        Ok(dict(entries))
    }

    fn dynamo_message(
        self,
        message: &Value,
        fields: &PyDict,
        builder: &mut Builder,
    ) -> Result<Value, RenderError> {
        if present(fields, "reasoning_content").is_some() && !self.mentions_reasoning {
            return Err(RenderError::NotFollowed);
        }
        let mut rewritten = message.clone();
        if let Some(parts) = fields.get("content").and_then(as_list) {
            let texts: Option<Vec<&str>> = parts.iter().map(text_of_text_part).collect();
            let texts = texts.ok_or(RenderError::Media)?;
            if self.content_format == ContentFormat::Text && !texts.is_empty() {
                rewritten = with(fields, "content", Value::from(texts.join("\n")));
            }
        }
        let Some(fields) = as_dict(&rewritten) else { return Ok(rewritten) };
        let Some(calls) = fields.get("tool_calls").and_then(as_list) else {
            return Ok(rewritten);
        };
        let mut parsed = Vec::with_capacity(calls.len());
        for call in calls {
            parsed.push(match parse_arguments(call, builder) {
                Err(RenderError::ToolArguments) => call.clone(),
                result => result?,
            });
        }
        Ok(with(fields, "tool_calls", list(parsed)))
    }
}

/// `transformers` 5 offers a message's reasoning under all of its names.
fn alias_reasoning(message: &Value, fields: &PyDict) -> Value {
    let names = ["reasoning_content", "thinking", "reasoning"];
    let Some(reasoning) = names.into_iter().find_map(|name| present(fields, name)) else {
        return message.clone();
    };
    let mut entries = vec![entry("thinking", reasoning.clone())];
    entries.extend_from_slice(fields.entries());
    entries.push(entry("reasoning_content", reasoning.clone()));
    dict(entries)
}

/// Texts as lines. One alone, which is the rule, is not copied.
fn joined(mut texts: Vec<Value>) -> Value {
    if texts.len() == 1 {
        return texts.pop().unwrap_or_default();
    }
    let lines: Vec<&str> = texts.iter().filter_map(Value::as_str).collect();
    Value::from(lines.join("\n"))
}

/// The texts of a message's content, one for each part: strings.
fn vllm_texts(content: Option<&Value>) -> Result<Vec<Value>, RenderError> {
    let Some(content) = content else {
        return Ok(Vec::new());
    };
    if content.as_str().is_some() {
        return Ok(vec![content.clone()]);
    }
    let parts = as_list(content).ok_or(RenderError::Messages)?;
    let mut texts = Vec::with_capacity(parts.len());
    for part in parts {
        if part.as_str().is_some() {
            texts.push(part.clone());
            continue;
        }
        let part = as_dict(part).ok_or(RenderError::Messages)?;
        let kind = part.get("type").and_then(Value::as_str).ok_or(RenderError::Media)?;
        let field = match kind {
            "text" | "input_text" | "output_text" => "text",
            "refusal" => "refusal",
            "thinking" => "thinking",
            _ => return Err(RenderError::Media),
        };
        match present(part, field) {
            Some(text) if text.as_str().is_none() => return Err(RenderError::Messages),
            Some(text) => texts.push(text.clone()),
            None if matches!(kind, "text" | "refusal") => {}
            None => return Err(RenderError::Messages),
        }
    }
    Ok(texts)
}

/// Tool calls with their arguments as objects; `None` for an empty list.
fn vllm_tool_calls(calls: &Value, builder: &mut Builder) -> Result<Option<Value>, RenderError> {
    let calls = as_list(calls).ok_or(RenderError::Messages)?;
    if calls.is_empty() {
        return Ok(None);
    }
    let parsed: Result<Vec<Value>, RenderError> =
        calls.iter().map(|call| parse_arguments(call, builder)).collect();
    parsed.map(|calls| Some(list(calls)))
}

/// One tool call with its arguments as an object; missing and empty ones become
/// the empty object.
///
/// # Errors
///
/// [`RenderError::ToolArguments`] if there is no function or its arguments are
/// not JSON.
fn parse_arguments(call: &Value, builder: &mut Builder) -> Result<Value, RenderError> {
    const WRONG: RenderError = RenderError::ToolArguments;
    let call = as_dict(call).ok_or(WRONG)?;
    let function = call.get("function").and_then(as_dict).ok_or(WRONG)?;
    let arguments = match function.get("arguments") {
        Some(arguments) if arguments.is_true() => match arguments.as_str() {
            Some(text) => {
                let parsed = builder.json(RawJson::parse(text).map_err(|_| WRONG)?)?;
                if parsed.is_none() { dict(Vec::new()) } else { parsed }
            }
            None if matches!(arguments.kind(), ValueKind::Map | ValueKind::Seq) => {
                arguments.clone()
            }
            None => return Err(WRONG),
        },
        _ => dict(Vec::new()),
    };
    Ok(with(call, "function", with(function, "arguments", arguments)))
}

/// A tool as vLLM's types dump it: known fields first, `None` where missing.
fn vllm_tool(tool: &PyDict) -> Result<Value, RenderError> {
    let function = tool.get("function").and_then(as_dict).ok_or(RenderError::Tools)?;
    let name = function.get("name").filter(|name| name.as_str().is_some());
    let dump = |source: &PyDict, known: Vec<(Value, Value)>| {
        let extra =
            source.entries().iter().filter(|(key, _)| !known.iter().any(|(known, _)| known == key));
        let extra: Vec<(Value, Value)> = extra.cloned().collect();
        dict(known.into_iter().chain(extra).collect())
    };
    let or_none = |key: &str| function.get(key).cloned().unwrap_or_else(none);
    let known = vec![
        entry("name", name.ok_or(RenderError::Tools)?.clone()),
        entry("description", or_none("description")),
        entry("parameters", or_none("parameters")),
    ];
    let function = dump(function, known);
    let kind = tool.get("type").cloned().unwrap_or_else(|| Value::from("function"));
    Ok(dump(tool, vec![entry("type", kind), entry("function", function)]))
}

/// A tool whose schema has at least `type` and `properties`.
fn dynamo_tool(tool: &Value, fields: &PyDict) -> Value {
    let Some(function) = fields.get("function").and_then(as_dict) else { return tool.clone() };
    // Unset fields are not serialized by Dynamo's types.
    let function = match function.get("strict") {
        Some(strict) if strict.is_none() => without(function, "strict"),
        _ => dict(function.entries().to_vec()),
    };
    let Some(function) = as_dict(&function) else { return tool.clone() };
    let Some(parameters) = function.get("parameters").and_then(as_dict) else {
        return with(fields, "function", dict(function.entries().to_vec()));
    };
    let mut entries = parameters.entries().to_vec();
    if parameters.get("type").is_none() {
        entries.push(entry("type", Value::from("object")));
    }
    if parameters.get("properties").is_none() {
        entries.push(entry("properties", dict(Vec::new())));
    }
    with(fields, "function", with(function, "parameters", dict(entries)))
}

fn text_of_text_part(part: &Value) -> Option<&str> {
    let part = as_dict(part)?;
    if part.get("type").and_then(Value::as_str) != Some("text") {
        return None;
    }
    part.get("text").and_then(Value::as_str)
}

/// Tags the text of the last message, so that its end is found in the rendered
/// prompt. Returns the text without the tag.
///
/// # Errors
///
/// [`RenderError::Continuation`] if the last message has no text.
pub(super) fn tag_last(messages: &mut [Value], tag: &str) -> Result<String, RenderError> {
    let last = messages.last_mut().ok_or(RenderError::Continuation)?;
    let fields = as_dict(last).ok_or(RenderError::Continuation)?;
    let content = fields.get("content").ok_or(RenderError::Continuation)?;
    let tagged = |text: &str| Value::from(format!("{text}{tag}"));
    let (text, content) = if let Some(text) = content.as_str() {
        (text.to_owned(), tagged(text))
    } else {
        let mut parts = as_list(content).ok_or(RenderError::Continuation)?.to_vec();
        let with_text = parts.iter_mut().rev().find_map(|part| {
            let text = as_dict(part)?.get("text")?.as_str()?.to_owned();
            Some((part, text))
        });
        let (part, text) = with_text.ok_or(RenderError::Continuation)?;
        let replaced = as_dict(part).map(|fields| with(fields, "text", tagged(&text)));
        *part = replaced.ok_or(RenderError::Continuation)?;
        (text, list(parts))
    };
    *last = with(fields, "content", content);
    Ok(text)
}
