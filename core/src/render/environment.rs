//! The template engine, made to behave as jinja2 does under `transformers`.
//!
//! Differences between minijinja and Python that real templates meet: how values
//! print, `tojson`, which values count as iterable, what Python strips as space,
//! and the functions that `transformers` adds.

use std::fmt;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::python::{self, JsonStyle};
use super::value::is_printed_number;
use crate::limits::TEMPLATE_FUEL_MAX;

/// Marks the error of a template that called `raise_exception`. What it said may
/// quote the conversation, so it is not kept.
#[derive(Debug)]
pub(super) struct Raised;

impl fmt::Display for Raised {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("raised by the template")
    }
}

impl std::error::Error for Raised {}

/// An environment without templates.
pub(super) fn environment() -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    env.set_syntax(syntax);
    env.set_fuel(Some(TEMPLATE_FUEL_MAX));
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_formatter(|out, _, value| {
        let written = match value.as_str() {
            Some(text) => out.write_str(text),
            None => out.write_str(&python::text(value)),
        };
        written.map_err(|_| Error::new(ErrorKind::WriteFailure, "the output is full"))
    });
    env.set_unknown_method_callback(method);
    env.add_filter("tojson", tojson);
    env.add_filter("string", |value: &Value| python::text(value));
    env.add_filter("trim", trim);
    env.add_test("iterable", |value: &Value| {
        value.is_undefined() || is_sequence(value) || value.kind() == ValueKind::Iterable
    });
    env.add_test("sequence", |value: &Value| value.is_undefined() || is_sequence(value));
    // In Python a boolean is a number.
    env.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool) || is_printed_number(value)
    });
    env.add_function("raise_exception", |_: Rest<Value>| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised))
    });
    Ok(env)
}

/// Whether Python's value has a length and items: strings and dicts do. A slice
/// of a list is a list there and an iterable here.
fn is_sequence(value: &Value) -> bool {
    match value.kind() {
        ValueKind::String | ValueKind::Seq | ValueKind::Map => true,
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    }
}

/// What Python's `str.strip` takes for space.
fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

fn trim(value: &Value, characters: Option<&str>) -> String {
    let text = python::text(value);
    match characters {
        Some(characters) => text.trim_matches(|one| characters.contains(one)).to_owned(),
        None => text.trim_matches(is_space).to_owned(),
    }
}

/// Python's methods, where minijinja's stand-ins differ or are missing.
fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        match (name, args) {
            ("strip", []) => return Ok(Value::from(text.trim_matches(is_space))),
            ("lstrip", []) => return Ok(Value::from(text.trim_start_matches(is_space))),
            ("rstrip", []) => return Ok(Value::from(text.trim_end_matches(is_space))),
            ("removeprefix", [prefix]) => {
                let prefix = prefix.as_str().unwrap_or_default();
                return Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)));
            }
            ("removesuffix", [suffix]) => {
                let suffix = suffix.as_str().unwrap_or_default();
                return Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)));
            }
            _ => {}
        }
    }
    unknown_method_callback(state, value, name, args)
}

/// `tojson` of `transformers`: `json.dumps` with `ensure_ascii=False`.
///
/// - `args`: `ensure_ascii`, `indent`, `separators`, `sort_keys`, by position or
///   by name.
fn tojson(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let argument = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let named = kwargs.get::<Option<Value>>(name)?;
        Ok(named.or_else(|| args.get(index).cloned()).filter(|value| !value.is_none()))
    };
    let flag = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let ensure_ascii = flag(argument(0, "ensure_ascii")?);
    let indent = argument(1, "indent")?.map(|indent| indentation(&indent)).transpose()?;
    let separators = argument(2, "separators")?;
    let sort_keys = flag(argument(3, "sort_keys")?);
    kwargs.assert_all_used()?;
    let separator = |index: usize, default: &str| match &separators {
        None => Ok(default.to_owned()),
        Some(pair) => pair
            .get_item_by_index(index)?
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "separators are strings")),
    };
    let item_separator = separator(0, if indent.is_some() { "," } else { ", " })?;
    let key_separator = separator(1, ": ")?;
    let style = JsonStyle { ensure_ascii, sort_keys, indent, item_separator, key_separator };
    python::json(value, &style)
}

fn indentation(indent: &Value) -> Result<String, Error> {
    /// Wider than any template's; bounds what one number can make us print.
    const WIDTH_MAX: i64 = 64;
    if let Some(text) = indent.as_str() {
        return Ok(text.to_owned());
    }
    match indent.as_i64() {
        Some(width) if width <= WIDTH_MAX => {
            Ok(" ".repeat(usize::try_from(width).unwrap_or_default()))
        }
        _ => Err(Error::new(ErrorKind::InvalidOperation, "indentation is too wide")),
    }
}

/// Replaces the tags of the `generation` block, which `transformers` uses to
/// mark what the assistant wrote, by those of a block that only has a scope.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        out.push_str(before);
        out.push_str("{%");
        rest = tag;
        let body = tag.trim_start_matches(['-', '+']);
        let marker_bytes = tag.len() - body.len();
        let word = body.trim_start();
        for (from, to) in [("generation", "with"), ("endgeneration", "endwith")] {
            let Some(after) = word.strip_prefix(from) else { continue };
            if after.trim_start().trim_start_matches(['-', '+']).starts_with("%}") {
                out.push_str(tag.get(..marker_bytes).unwrap_or_default());
                out.push(' ');
                out.push_str(to);
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}
