//! JSON: spans of a text, found by scanning, without building a tree.
//!
//! Below the request path's stages: `request` finds the fields it needs with
//! it, `render` turns a span into template values, `handover` edits a body in
//! place and `usage` reads a response.
//!
//! # Terms
//!
//! - *raw*: as the sender spelled it: number spelling, escapes and the order of
//!   keys are kept, because an engine's template sees them.
//! - *level*: one array or object around a value; the root is at level 0.
//!
//! # Invariants
//!
//! 1. A [`RawJson`] is one complete, valid JSON value (RFC 8259), nested at most
//!    [`JSON_DEPTH_MAX`](crate::limits::JSON_DEPTH_MAX) levels below the root it was cut from.
//! 2. Scanning is linear in the text and uses no recursion.
//! 3. The verdict equals that of `serde_json` on the same bytes, but for the
//!    depth and for numbers beyond the range of `f64`, which are valid here (as
//!    they are in Python).
//!
//! What the fields mean is not known here.

use std::borrow::Cow;

use crate::limits::NAME_BYTES_MAX;

mod scanner;
mod write;

pub use scanner::Scanner;
pub use write::write_string;

/// Why a text is not JSON that we read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JsonError {
    /// Not JSON; the byte offset where that became certain.
    Syntax(usize),
    /// Nested more than [`JSON_DEPTH_MAX`](crate::limits::JSON_DEPTH_MAX) levels.
    TooDeep,
}

/// One JSON value as its sender spelled it, without surrounding space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawJson<'a>(&'a str);

/// The six kinds of JSON value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JsonKind {
    /// `null`
    Null,
    /// `true` or `false`
    Bool,
    /// A number.
    Number,
    /// A string.
    String,
    /// An array.
    Array,
    /// An object.
    Object,
}

/// One member of an object.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    /// The key, a string.
    pub key: RawJson<'a>,
    /// Its value.
    pub value: RawJson<'a>,
    /// The member's first byte (the key's quote) in the scanned text.
    pub start: usize,
    /// The value's first byte in the scanned text.
    pub value_start: usize,
    /// The byte after the value in the scanned text.
    pub end: usize,
}

impl<'a> RawJson<'a> {
    /// The empty object.
    pub const EMPTY_OBJECT: RawJson<'static> = RawJson("{}");

    /// Checks that `text` is one JSON value, with or without space around it.
    ///
    /// # Errors
    ///
    /// [`JsonError`] if it is not.
    pub fn parse(text: &'a str) -> Result<Self, JsonError> {
        let mut scanner = Scanner::new(text);
        scanner.space();
        let value = scanner.value(0)?;
        scanner.end()?;
        Ok(value)
    }

    /// The value's text.
    #[must_use]
    pub fn text(self) -> &'a str {
        self.0
    }

    /// Which kind of value this is.
    #[must_use]
    pub fn kind(self) -> JsonKind {
        match self.0.as_bytes().first() {
            Some(b'{') => JsonKind::Object,
            Some(b'[') => JsonKind::Array,
            Some(b'"') => JsonKind::String,
            Some(b't' | b'f') => JsonKind::Bool,
            Some(b'n') => JsonKind::Null,
            _ => JsonKind::Number,
        }
    }

    /// Whether this is `null`.
    #[must_use]
    pub fn is_null(self) -> bool {
        self.kind() == JsonKind::Null
    }

    /// The text of a string, escapes resolved; `None` for any other kind.
    ///
    /// Allocates only if the string has escapes.
    #[must_use]
    pub fn string(self) -> Option<Cow<'a, str>> {
        let mut resolved = String::new();
        let plain = Scanner::new(self.0).resolved(&mut resolved).ok()?;
        Some(plain.map_or(Cow::Owned(resolved), Cow::Borrowed))
    }

    /// Whether this is a string equal to `expected`.
    ///
    /// - `expected`: at most [`NAME_BYTES_MAX`] bytes, as the names of fields are.
    #[must_use]
    pub fn is_string(self, expected: &str) -> bool {
        self.name().is_some_and(|name| name == expected)
    }

    /// The text of a key, escapes resolved; `None` if it is longer than the name
    /// of any field that is looked for, however spelled.
    #[must_use]
    pub fn name(self) -> Option<Cow<'a, str>> {
        // An escape spells one character in at most six bytes.
        if self.0.len() > NAME_BYTES_MAX * 6 { None } else { self.string() }
    }

    /// The value of `true` or `false`; `None` for any other kind.
    #[must_use]
    pub fn boolean(self) -> Option<bool> {
        match self.0 {
            "true" => Some(true),
            "false" => Some(false),
            _ => None,
        }
    }

    /// The value of a non-negative integer that is spelled without fraction
    /// and exponent and fits; `None` otherwise.
    #[must_use]
    pub fn unsigned(self) -> Option<u64> {
        match self.0.as_bytes().first() {
            Some(b'0'..=b'9') => self.0.parse().ok(),
            _ => None,
        }
    }

    /// The value of an integer that is spelled without fraction and exponent
    /// and fits; `None` otherwise.
    #[must_use]
    pub fn signed(self) -> Option<i64> {
        match self.0.as_bytes().first() {
            Some(b'0'..=b'9' | b'-') => self.0.parse().ok(),
            _ => None,
        }
    }

    /// The value of a number, rounded to the nearest `f64`; infinite beyond its
    /// range, as in Python; `None` for any other kind.
    #[must_use]
    pub fn float(self) -> Option<f64> {
        if self.kind() == JsonKind::Number { self.0.parse().ok() } else { None }
    }

    /// Whether this is an array or an object with nothing in it. Looks at the
    /// first bytes only.
    #[must_use]
    pub fn is_empty_container(self) -> bool {
        let inner = self.0.get(1..).unwrap_or_default().trim_start();
        match self.kind() {
            JsonKind::Array => inner.starts_with(']'),
            JsonKind::Object => inner.starts_with('}'),
            _ => false,
        }
    }

    /// The kind of an array's first item; `None` if there is none. Looks at
    /// the first bytes only.
    #[must_use]
    pub fn first_item_kind(self) -> Option<JsonKind> {
        let inner = self.0.strip_prefix('[')?.trim_start();
        (!inner.starts_with(']')).then(|| RawJson(inner).kind())
    }

    /// The members of an object, in order, duplicates included; nothing for
    /// any other kind.
    #[must_use]
    pub fn members(self) -> Members<'a> {
        Members { scanner: Scanner::new(self.0), state: Walk::Start }
    }

    /// The items of an array, in order; nothing for any other kind.
    #[must_use]
    pub fn items(self) -> Items<'a> {
        Items { scanner: Scanner::new(self.0), state: Walk::Start }
    }

    /// The value of an object's member; the last one's if the key occurs more
    /// than once, as Python and serde_json have it.
    ///
    /// - `key`: see [`RawJson::is_string`].
    #[must_use]
    pub fn member(self, key: &str) -> Option<RawJson<'a>> {
        self.members().filter(|member| member.key.is_string(key)).last().map(|member| member.value)
    }
}

/// Where a walk over members or items stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Walk {
    Start,
    Inside,
    Done,
}

/// Iterator over the members of an object.
#[derive(Clone, Debug)]
pub struct Members<'a> {
    scanner: Scanner<'a>,
    state: Walk,
}

impl<'a> Iterator for Members<'a> {
    type Item = Member<'a>;

    fn next(&mut self) -> Option<Member<'a>> {
        let step = match self.state {
            Walk::Start => self.scanner.first_member(1),
            Walk::Inside => self.scanner.next_member(1),
            Walk::Done => return None,
        };
        // An error means that this is no object: the text itself is valid.
        let member = step.ok().flatten();
        self.state = if member.is_some() { Walk::Inside } else { Walk::Done };
        member
    }
}

/// Iterator over the items of an array.
#[derive(Clone, Debug)]
pub struct Items<'a> {
    scanner: Scanner<'a>,
    state: Walk,
}

impl<'a> Iterator for Items<'a> {
    type Item = RawJson<'a>;

    fn next(&mut self) -> Option<RawJson<'a>> {
        let step = match self.state {
            Walk::Start => self.scanner.first_item(1),
            Walk::Inside => self.scanner.next_item(1),
            Walk::Done => return None,
        };
        let item = step.ok().flatten();
        self.state = if item.is_some() { Walk::Inside } else { Walk::Done };
        item
    }
}

#[cfg(test)]
pub(crate) mod tests;
