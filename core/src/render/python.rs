//! What Python prints: `repr`, floats and `json.dumps`.
//!
//! The formulas are CPython's: `float.__repr__` (shortest digits that read back;
//! an exponent below 1e-4 and from 1e16), `str.__repr__`, and the encoder of the
//! `json` module.

use std::fmt::Write;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

use super::value::is_printed_number;
use crate::json::write_string;

/// Python's `repr` of a float: `1e-07`, `1e+22`, `3.0`, `nan`, `-inf`.
pub(super) fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let mut buffer = zmij::Buffer::new();
    let shortest = buffer.format_finite(value);
    let (sign, magnitude) = match shortest.strip_prefix('-') {
        Some(magnitude) => ("-", magnitude),
        None => ("", shortest),
    };
    let (mantissa, exponent) = magnitude.split_once('e').unwrap_or((magnitude, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    let leading_zeros = digits.len() - digits.trim_start_matches('0').len();
    let significant = digits.trim_matches('0');
    if significant.is_empty() {
        return format!("{sign}0.0");
    }
    // The value is 0.SIGNIFICANT times ten to the power of `point`.
    let shift = i32::try_from(whole.len()).unwrap_or(0) - i32::try_from(leading_zeros).unwrap_or(0);
    let point = exponent.parse::<i32>().unwrap_or(0) + shift;
    format!("{sign}{}", place_point(significant, point))
}

fn place_point(digits: &str, point: i32) -> String {
    let count = i32::try_from(digits.len()).unwrap_or(i32::MAX);
    if !(-3..=16).contains(&point) {
        let (first, rest) = digits.split_at_checked(1).unwrap_or((digits, ""));
        let dot = if rest.is_empty() { "" } else { "." };
        let exponent = point - 1;
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{first}{dot}{rest}e{sign}{:02}", exponent.unsigned_abs());
    }
    let zeros = |count: i32| "0".repeat(usize::try_from(count).unwrap_or(0));
    if point <= 0 {
        format!("0.{}{digits}", zeros(-point))
    } else if point >= count {
        format!("{digits}{}.0", zeros(point - count))
    } else {
        let at = usize::try_from(point).unwrap_or(0);
        let (whole, fraction) = digits.split_at_checked(at).unwrap_or((digits, ""));
        format!("{whole}.{fraction}")
    }
}

/// The float in a value, if it is one rather than an integer.
fn as_float(value: &Value) -> Option<f64> {
    if value.kind() == ValueKind::Number && !value.is_integer() {
        f64::try_from(value.clone()).ok()
    } else {
        None
    }
}

/// What Python prints for a value: `str()` of it.
pub(super) fn text(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None => repr(value),
    }
}

/// Python's `repr` of a value; nothing for an undefined one.
pub(super) fn repr(value: &Value) -> String {
    let mut out = String::new();
    write_repr(value, &mut out);
    out
}

fn write_repr(value: &Value, out: &mut String) {
    if let Some(text) = value.as_str() {
        write_string_repr(text, out);
        return;
    }
    if let Some(float_value) = as_float(value) {
        out.push_str(&float(float_value));
        return;
    }
    match value.kind() {
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                if index > 0 {
                    out.push_str(", ");
                }
                write_repr(&key, out);
                out.push_str(": ");
                write_repr(&value.get_item(&key).unwrap_or_default(), out);
            }
            out.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable if value.len().is_some() => {
            let tuple = value.is_tuple();
            out.push(if tuple { '(' } else { '[' });
            for (index, item) in value.try_iter().into_iter().flatten().enumerate() {
                if index > 0 {
                    out.push_str(", ");
                }
                write_repr(&item, out);
            }
            if tuple && value.len() == Some(1) {
                out.push(',');
            }
            out.push(if tuple { ')' } else { ']' });
        }
        // Booleans, None and integers print as in Python.
        _ => {
            let _ = write!(out, "{value}");
        }
    }
}

/// Python's `repr` of a string: single quotes unless only those occur inside.
fn write_string_repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if character == quote => {
                out.push('\\');
                out.push(quote);
            }
            _ if is_printable(character) => out.push(character),
            _ => {
                let code = u32::from(character);
                let _ = match code {
                    0..=0xff => write!(out, "\\x{code:02x}"),
                    0x100..=0xffff => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
}

/// Python's `str.isprintable` of one character. Rust's table is made from the
/// same categories; it also escapes combining characters, but not after another
/// character.
fn is_printable(character: char) -> bool {
    if character.is_ascii() {
        return !character.is_ascii_control();
    }
    let mut pair = String::from("a");
    pair.push(character);
    pair.escape_debug().nth(1) == Some(character)
}

/// How `json.dumps` is asked to print.
#[derive(Clone, Debug)]
pub(super) struct JsonStyle {
    /// Escape everything but ASCII.
    pub(super) ensure_ascii: bool,
    /// Sort the keys of dicts.
    pub(super) sort_keys: bool,
    /// One level's indentation; `None` prints on one line.
    pub(super) indent: Option<String>,
    /// Between items.
    pub(super) item_separator: String,
    /// Between key and value.
    pub(super) key_separator: String,
}

/// Python's `json.dumps`.
///
/// # Errors
///
/// A value that Python's encoder refuses: undefined ones and functions.
pub(super) fn json(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let mut out = String::new();
    write_json(value, style, 0, &mut out)?;
    Ok(out)
}

fn write_json(
    value: &Value,
    style: &JsonStyle,
    level: usize,
    out: &mut String,
) -> Result<(), Error> {
    if let Some(text) = value.as_str() {
        write_string(text, style.ensure_ascii, out);
        return Ok(());
    }
    if let Some(float_value) = as_float(value) {
        out.push_str(&json_float(float_value));
        return Ok(());
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => {
            let _ = write!(out, "{value}");
        }
        ValueKind::Map => return write_json_dict(value, style, level, out),
        ValueKind::Seq | ValueKind::Iterable => {
            let mut empty = true;
            out.push('[');
            for item in value.try_iter()? {
                separate(style, level, empty, out);
                empty = false;
                write_json(&item, style, level + 1, out)?;
            }
            close(style, level, empty, out);
            out.push(']');
        }
        _ if is_printed_number(value) => {
            let _ = write!(out, "{value}");
        }
        _ => return Err(not_serializable()),
    }
    Ok(())
}

fn write_json_dict(
    value: &Value,
    style: &JsonStyle,
    level: usize,
    out: &mut String,
) -> Result<(), Error> {
    let mut keys: Vec<Value> = value.try_iter()?.collect();
    if style.sort_keys {
        keys.sort();
    }
    let mut empty = true;
    out.push('{');
    for key in keys {
        separate(style, level, empty, out);
        empty = false;
        let name = match (key.as_str(), key.kind()) {
            (Some(name), _) => name.to_owned(),
            (None, ValueKind::None) => "null".to_owned(),
            (None, ValueKind::Bool) => if key.is_true() { "true" } else { "false" }.to_owned(),
            (None, ValueKind::Number) => as_float(&key).map_or_else(|| key.to_string(), json_float),
            _ => return Err(not_serializable()),
        };
        write_string(&name, style.ensure_ascii, out);
        out.push_str(&style.key_separator);
        write_json(&value.get_item(&key)?, style, level + 1, out)?;
    }
    close(style, level, empty, out);
    out.push('}');
    Ok(())
}

fn separate(style: &JsonStyle, level: usize, first: bool, out: &mut String) {
    if !first {
        out.push_str(&style.item_separator);
    }
    new_line(style, level + 1, out);
}

fn close(style: &JsonStyle, level: usize, empty: bool, out: &mut String) {
    if !empty {
        new_line(style, level, out);
    }
}

fn new_line(style: &JsonStyle, level: usize, out: &mut String) {
    if let Some(indent) = &style.indent {
        out.push('\n');
        for _ in 0..level {
            out.push_str(indent);
        }
    }
}

fn json_float(value: f64) -> String {
    if value.is_nan() {
        "NaN".to_owned()
    } else if value.is_infinite() {
        if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned()
    } else {
        float(value)
    }
}

fn not_serializable() -> Error {
    Error::new(ErrorKind::BadSerialization, "not JSON serializable")
}
