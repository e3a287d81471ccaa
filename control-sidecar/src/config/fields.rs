//! Fields: takes a parsed file apart and collects every mistake in it.

use core::fmt;
use std::cell::RefCell;
use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::limits::MISTAKES_MAX;

/// One mistake in a file, with the path of the field that has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Such as `workers[2].endpoint`.
    pub path: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            f.write_str(&self.message)
        } else {
            write!(f, "{}: {}", self.path, self.message)
        }
    }
}

/// All mistakes found in a file; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistakes(pub Vec<Mistake>);

impl Mistakes {
    /// A single mistake.
    #[must_use]
    pub fn one(path: &str, message: impl Into<String>) -> Self {
        Self(vec![Mistake { path: path.to_owned(), message: message.into() }])
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, mistake) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str("; ")?;
            }
            write!(f, "{mistake}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Mistakes {}

/// Where mistakes go.
#[derive(Debug, Default)]
pub struct Report(RefCell<Vec<Mistake>>);

impl Report {
    /// Adds a mistake; beyond [`MISTAKES_MAX`] they are left out.
    pub fn add(&self, path: &str, message: impl Into<String>) {
        let mut mistakes = self.0.borrow_mut();
        if mistakes.len() < MISTAKES_MAX {
            mistakes.push(Mistake { path: path.to_owned(), message: message.into() });
        }
    }

    /// The value, if no mistake was found.
    ///
    /// # Errors
    ///
    /// All mistakes.
    pub fn finish<T>(self, value: T) -> Result<T, Mistakes> {
        let mistakes = self.0.into_inner();
        if mistakes.is_empty() { Ok(value) } else { Err(Mistakes(mistakes)) }
    }
}

/// A map of the file, whose fields are taken one by one.
#[derive(Debug)]
pub struct Section<'a> {
    path: String,
    fields: Map<String, Value>,
    report: &'a Report,
}

impl<'a> Section<'a> {
    /// Takes a value apart as a map; anything else is a mistake and reads as an
    /// empty map.
    #[must_use]
    pub fn new(path: &str, value: Value, report: &'a Report) -> Self {
        let fields = match value {
            Value::Object(fields) => fields,
            Value::Null => Map::new(),
            other => {
                report.add(path, format!("must be a map, is {}", kind(&other)));
                Map::new()
            }
        };
        Self { path: path.to_owned(), fields, report }
    }

    /// The path of one of its fields.
    #[must_use]
    pub fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Adds a mistake about one of its fields.
    pub fn mistake(&self, name: &str, message: impl Into<String>) {
        self.report.add(&self.path(name), message);
    }

    /// Whether a field is there and not nil.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.fields.get(name).is_some_and(|value| !value.is_null())
    }

    /// Takes a field as it is; nil is absent.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.fields.remove(name).filter(|value| !value.is_null())
    }

    /// Takes a field that is a map.
    pub fn section(&mut self, name: &str) -> Self {
        let value = self.take(name).unwrap_or(Value::Null);
        Section::new(&self.path(name), value, self.report)
    }

    /// Takes a field that is a list of maps.
    pub fn sections(&mut self, name: &str) -> Vec<Self> {
        let path = self.path(name);
        match self.take(name) {
            None => Vec::new(),
            Some(Value::Array(items)) => items
                .into_iter()
                .enumerate()
                .map(|(at, item)| Section::new(&format!("{path}[{at}]"), item, self.report))
                .collect(),
            Some(other) => {
                self.mistake(name, format!("must be a list, is {}", kind(&other)));
                Vec::new()
            }
        }
    }

    /// Takes a field that is a text.
    pub fn text(&mut self, name: &str) -> Option<String> {
        match self.take(name)? {
            Value::String(text) => Some(text),
            other => {
                self.mistake(name, format!("must be a text, is {}", kind(&other)));
                None
            }
        }
    }

    /// Takes a field that is a list of texts.
    pub fn texts(&mut self, name: &str) -> Vec<String> {
        let Some(value) = self.take(name) else { return Vec::new() };
        let texts: Option<Vec<String>> = value
            .as_array()
            .and_then(|items| items.iter().map(|item| item.as_str().map(str::to_owned)).collect());
        texts.unwrap_or_else(|| {
            self.mistake(name, "must be a list of texts");
            Vec::new()
        })
    }

    /// Takes a field that is a whole number within bounds.
    pub fn number(&mut self, name: &str, min: u64, max: u64) -> Option<u64> {
        let value = self.take(name)?;
        match value.as_u64() {
            Some(number) if (min..=max).contains(&number) => Some(number),
            Some(number) => {
                self.mistake(name, format!("must be from {min} to {max}, is {number}"));
                None
            }
            None => {
                self.mistake(
                    name,
                    format!("must be a whole number from {min} to {max}, is {}", kind(&value)),
                );
                None
            }
        }
    }

    /// Takes a field that is a number, a fraction perhaps.
    pub fn fraction(&mut self, name: &str) -> Option<f64> {
        let value = self.take(name)?;
        let number = value.as_f64().filter(|number| number.is_finite() && *number >= 0.0);
        if number.is_none() {
            self.mistake(name, format!("must be a number of at least 0, is {}", kind(&value)));
        }
        number
    }

    /// Takes a field that is true or false.
    pub fn flag(&mut self, name: &str) -> Option<bool> {
        let value = self.take(name)?;
        let flag = value.as_bool();
        if flag.is_none() {
            self.mistake(name, format!("must be true or false, is {}", kind(&value)));
        }
        flag
    }

    /// Takes a field that is one of a few words.
    pub fn word<T: Copy>(&mut self, name: &str, words: &[(&str, T)]) -> Option<T> {
        let text = self.text(name)?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            self.mistake(name, format!("must be one of {}, is {text:?}", known.join(", ")));
        }
        found
    }

    /// The fields that nobody took, with those that are nil.
    #[must_use]
    pub fn into_fields(self) -> BTreeMap<String, Value> {
        self.fields.into_iter().collect()
    }

    /// Notes every field that nobody took.
    pub fn end(self) {
        for name in self.fields.keys() {
            self.mistake(name, "is not a known field");
        }
    }
}

/// What a value is, for messages.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(number) if number.is_u64() => "a number",
        Value::Number(number) if number.is_i64() => "a negative number",
        Value::Number(_) => "a fraction",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a map",
    }
}
