//! Values of a template, built from JSON the way Python builds its own.
//!
//! Objects keep the order of their keys, and a repeated key keeps its first
//! place and its last value, as in a Python `dict`. Lists and dicts print as
//! Python's `repr`, also where a template joins them to text.

use std::fmt;
use std::sync::Arc;

use minijinja::Value;
use minijinja::value::{Enumerator, Object, ObjectRepr};

use super::{RenderError, python};
use crate::json::{JsonKind, RawJson, Scanner};
use crate::limits::TEMPLATE_VALUES_MAX;

/// A Python `list`.
#[derive(Debug)]
pub(super) struct PyList(pub(super) Vec<Value>);

impl Object for PyList {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.get(key.as_usize()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.0.len())
    }

    fn render(self: &Arc<Self>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&python::repr(&Value::from_dyn_object(Arc::clone(self))))
    }
}

/// A Python `dict` whose keys are strings.
#[derive(Debug)]
pub(super) struct PyDict {
    /// In the order of insertion; no two keys are equal.
    entries: Vec<(Value, Value)>,
    /// Indexes into `entries` in the order of the keys, if there are more than
    /// [`SMALL_ENTRIES`]. Looking up by search rather than by hash: no client can
    /// choose colliding keys.
    sorted: Vec<u32>,
}

/// Up to how many entries looking at one after the other is fastest. Messages have
/// two to five.
const SMALL_ENTRIES: usize = 8;

fn has_doubles(entries: &[(Value, Value)]) -> bool {
    let mut rest = entries;
    while let Some((first, others)) = rest.split_first() {
        if others.iter().any(|other| key_text(other) == key_text(first)) {
            return true;
        }
        rest = others;
    }
    false
}

fn key_text(entry: &(Value, Value)) -> &str {
    entry.0.as_str().unwrap_or_default()
}

impl PyDict {
    /// Builds a dict of entries in the order in which they are set.
    pub(super) fn new(entries: Vec<(Value, Value)>) -> Self {
        if entries.len() <= SMALL_ENTRIES && !has_doubles(&entries) {
            return PyDict { entries, sorted: Vec::new() };
        }
        let mut order: Vec<usize> = (0..entries.len()).collect();
        let text = |index: usize| entries.get(index).map_or("", key_text);
        // Equal keys stay in the order of insertion.
        order.sort_by(|&left, &right| text(left).cmp(text(right)));
        let mut kept: Vec<Option<(Value, Value)>> = vec![None; entries.len()];
        let mut first: Option<usize> = None;
        for index in order {
            let place = match first {
                Some(first) if text(first) == text(index) => first,
                _ => index,
            };
            first = Some(place);
            if let (Some(slot), Some((key, value))) = (kept.get_mut(place), entries.get(index)) {
                *slot = Some((key.clone(), value.clone()));
            }
        }
        let entries: Vec<(Value, Value)> = kept.into_iter().flatten().collect();
        let mut sorted: Vec<u32> = (0..entries.len()).filter_map(|at| at.try_into().ok()).collect();
        sorted.sort_by(|&left, &right| {
            let text = |index: u32| entries.get(index as usize).map_or("", key_text);
            text(left).cmp(text(right))
        });
        PyDict { entries, sorted }
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        if self.entries.len() <= SMALL_ENTRIES {
            return self.entries.iter().find(|entry| key_text(entry) == key).map(|entry| &entry.1);
        }
        let text = |index: &u32| self.entries.get(*index as usize).map_or("", key_text);
        let at = self.sorted.binary_search_by(|index| text(index).cmp(key)).ok()?;
        let index = *self.sorted.get(at)?;
        self.entries.get(index as usize).map(|entry| &entry.1)
    }

    pub(super) fn entries(&self) -> &[(Value, Value)] {
        &self.entries
    }
}

impl Object for PyDict {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get(key.as_str()?).cloned()
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        self.get(key).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.entries.iter().map(|entry| entry.0.clone()).collect())
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.entries.len())
    }

    fn render(self: &Arc<Self>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&python::repr(&Value::from_dyn_object(Arc::clone(self))))
    }
}

/// A number that can be printed, not computed with: an integer beyond 128 bits,
/// or a float that Python prints with an exponent. The engine's own numbers
/// cannot hold the one, and print the other differently where a template joins
/// it to text.
#[derive(Debug)]
pub(super) struct PrintedNumber(String);

impl Object for PrintedNumber {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// Whether a value is a number in Python, though not the engine's.
pub(super) fn is_printed_number(value: &Value) -> bool {
    value.downcast_object_ref::<PrintedNumber>().is_some()
}

/// A list as a value.
pub(super) fn list(items: Vec<Value>) -> Value {
    Value::from_object(PyList(items))
}

/// A dict as a value; see [`PyDict::new`].
pub(super) fn dict(entries: Vec<(Value, Value)>) -> Value {
    Value::from_object(PyDict::new(entries))
}

/// Python's `None`.
pub(super) fn none() -> Value {
    Value::from(())
}

/// Builds the values of one rendering, at most [`TEMPLATE_VALUES_MAX`].
#[derive(Debug)]
pub(super) struct Builder {
    left: usize,
    /// The last string that had escapes, resolved. Kept for its room.
    resolved: String,
}

impl Builder {
    pub(super) fn new() -> Self {
        Builder { left: TEMPLATE_VALUES_MAX, resolved: String::new() }
    }

    /// What Python's `json.loads` makes of a value. Each byte is read once; the
    /// recursion is bounded by the depth of [`RawJson`].
    ///
    /// # Errors
    ///
    /// [`RenderError::TooManyValues`]
    pub(super) fn json(&mut self, json: RawJson<'_>) -> Result<Value, RenderError> {
        self.value(&mut Scanner::new(json.text()))
    }

    fn value(&mut self, scanner: &mut Scanner<'_>) -> Result<Value, RenderError> {
        self.left = self.left.checked_sub(1).ok_or(RenderError::TooManyValues)?;
        if scanner.take(b'{') {
            let mut entries = Vec::new();
            loop {
                scanner.space();
                scanner.take(b',');
                scanner.space();
                // Only the closing brace is no string here.
                let Some(key) = self.string(scanner) else { break };
                scanner.space();
                scanner.take(b':');
                scanner.space();
                entries.push((key, self.value(scanner)?));
            }
            scanner.take(b'}');
            return Ok(dict(entries));
        }
        if scanner.take(b'[') {
            let mut items = Vec::new();
            loop {
                scanner.space();
                scanner.take(b',');
                scanner.space();
                if scanner.peek().is_none() || scanner.take(b']') {
                    return Ok(list(items));
                }
                items.push(self.value(scanner)?);
            }
        }
        if let Some(text) = self.string(scanner) {
            return Ok(text);
        }
        Ok(scanner.scalar().map_or_else(|_| none(), scalar))
    }

    /// The string at the position; `None` if there is something else.
    fn string(&mut self, scanner: &mut Scanner<'_>) -> Option<Value> {
        let plain = scanner.resolved(&mut self.resolved).ok()?;
        Some(Value::from(plain.unwrap_or(&self.resolved)))
    }
}

/// A scalar other than a string.
fn scalar(json: RawJson<'_>) -> Value {
    match json.kind() {
        JsonKind::Bool => Value::from(json.boolean()),
        JsonKind::Number => number(json),
        JsonKind::Null | JsonKind::String | JsonKind::Array | JsonKind::Object => none(),
    }
}

/// An integer stays one, whatever its size; everything else is a float.
fn number(json: RawJson<'_>) -> Value {
    let text = json.text();
    if text.contains(['.', 'e', 'E']) {
        let float = json.float().unwrap_or_default();
        let printed = python::float(float);
        if printed.contains('e') {
            return Value::from_object(PrintedNumber(printed));
        }
        return Value::from(float);
    }
    if let Ok(small) = text.parse::<i64>() {
        Value::from(small)
    } else if let Ok(wide) = text.parse::<i128>() {
        Value::from(wide)
    } else {
        Value::from_object(PrintedNumber(text.to_owned()))
    }
}
