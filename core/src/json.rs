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
//!    [`JSON_DEPTH_MAX`] levels below the root it was cut from.
//! 2. Scanning is linear in the text and uses no recursion.
//! 3. The verdict equals that of `serde_json` on the same bytes, but for the
//!    depth and for numbers beyond the range of `f64`, which are valid here (as
//!    they are in Python).
//!
//! What the fields mean is not known here.

use std::borrow::Cow;

use crate::limits::{JSON_DEPTH_MAX, NAME_BYTES_MAX};

/// Why a text is not JSON that we read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JsonError {
    /// Not JSON; the byte offset where that became certain.
    Syntax(usize),
    /// Nested more than [`JSON_DEPTH_MAX`] levels.
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
        let inner = self.0.strip_prefix('"')?.strip_suffix('"')?;
        Some(if inner.contains('\\') { Cow::Owned(unescape(inner)) } else { Cow::Borrowed(inner) })
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

/// The kinds of the levels around a position: one bit each.
#[derive(Clone, Copy, Debug)]
struct Nesting {
    objects: u128,
    depth: usize,
}

const _: () = assert!(JSON_DEPTH_MAX <= 128, "Nesting has one bit per level in a u128");

impl Nesting {
    fn push(&mut self, object: bool, outside: usize) -> Result<(), JsonError> {
        if self.depth + outside >= JSON_DEPTH_MAX {
            return Err(JsonError::TooDeep);
        }
        self.objects = (self.objects << 1) | u128::from(object);
        self.depth += 1;
        Ok(())
    }

    fn pop(&mut self) {
        self.objects >>= 1;
        self.depth -= 1;
    }

    fn in_object(self) -> bool {
        self.objects & 1 == 1
    }
}

/// A position in a text that is checked as it advances.
#[derive(Clone, Debug)]
pub struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scanner<'a> {
    /// Starts at the beginning of `text`.
    #[must_use]
    pub fn new(text: &'a str) -> Self {
        Scanner { text, at: 0 }
    }

    /// The next byte's offset in the text.
    #[must_use]
    pub fn at(&self) -> usize {
        self.at
    }

    /// The next byte, if any.
    #[must_use]
    pub fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    /// Skips space.
    pub fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\n' | b'\r' | b'\t')) {
            self.at += 1;
        }
    }

    /// Checks that nothing but space is left.
    ///
    /// # Errors
    ///
    /// [`JsonError::Syntax`] if something is.
    pub fn end(&mut self) -> Result<(), JsonError> {
        self.space();
        if self.at == self.text.len() { Ok(()) } else { Err(self.wrong()) }
    }

    /// Enters the object at the position and reads its first member.
    ///
    /// - `outside`: levels around the members' values, this object included.
    ///
    /// Returns `None`, with the position after the object, if it is empty.
    ///
    /// # Errors
    ///
    /// [`JsonError`] if there is no object, or its first member is not valid.
    pub fn first_member(&mut self, outside: usize) -> Result<Option<Member<'a>>, JsonError> {
        self.expect(b'{')?;
        self.space();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(None);
        }
        self.member(outside).map(Some)
    }

    /// Reads the member after one that was just read; arguments, result and
    /// errors as in [`Scanner::first_member`].
    ///
    /// # Errors
    ///
    /// [`JsonError`] if neither a member nor the object's end follows.
    pub fn next_member(&mut self, outside: usize) -> Result<Option<Member<'a>>, JsonError> {
        self.space();
        match self.peek() {
            Some(b'}') => {
                self.at += 1;
                Ok(None)
            }
            Some(b',') => {
                self.at += 1;
                self.space();
                self.member(outside).map(Some)
            }
            _ => Err(self.wrong()),
        }
    }

    fn member(&mut self, outside: usize) -> Result<Member<'a>, JsonError> {
        let start = self.at;
        self.string()?;
        let key = self.since(start);
        self.space();
        self.expect(b':')?;
        self.space();
        let value_start = self.at;
        let value = self.value(outside)?;
        Ok(Member { key, value, start, value_start, end: self.at })
    }

    fn first_item(&mut self, outside: usize) -> Result<Option<RawJson<'a>>, JsonError> {
        self.expect(b'[')?;
        self.space();
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(None);
        }
        self.value(outside).map(Some)
    }

    fn next_item(&mut self, outside: usize) -> Result<Option<RawJson<'a>>, JsonError> {
        self.space();
        match self.peek() {
            Some(b']') => {
                self.at += 1;
                Ok(None)
            }
            Some(b',') => {
                self.at += 1;
                self.space();
                self.value(outside).map(Some)
            }
            _ => Err(self.wrong()),
        }
    }

    /// Reads the value at the position, however deep.
    ///
    /// - `outside`: levels around it.
    ///
    /// # Errors
    ///
    /// [`JsonError`] if there is no valid value, or one too deep.
    pub fn value(&mut self, outside: usize) -> Result<RawJson<'a>, JsonError> {
        let start = self.at;
        let mut levels = Nesting { objects: 0, depth: 0 };
        loop {
            if !self.scalar_or_open(&mut levels, outside)? {
                continue;
            }
            // After a value: close what ends here, or go to the next one.
            loop {
                if levels.depth == 0 {
                    return Ok(self.since(start));
                }
                self.space();
                match (self.peek(), levels.in_object()) {
                    (Some(b'}'), true) | (Some(b']'), false) => {
                        self.at += 1;
                        levels.pop();
                    }
                    (Some(b','), object) => {
                        self.at += 1;
                        self.space();
                        if object {
                            self.key()?;
                        }
                        break;
                    }
                    _ => return Err(self.wrong()),
                }
            }
        }
    }

    /// Reads a scalar or an empty container, or opens a container up to its
    /// first value. Returns whether a value ended.
    fn scalar_or_open(&mut self, levels: &mut Nesting, outside: usize) -> Result<bool, JsonError> {
        match self.peek() {
            Some(b'"') => self.string()?,
            Some(b'{') => {
                levels.push(true, outside)?;
                self.at += 1;
                self.space();
                if self.peek() != Some(b'}') {
                    self.key()?;
                    return Ok(false);
                }
                self.at += 1;
                levels.pop();
            }
            Some(b'[') => {
                levels.push(false, outside)?;
                self.at += 1;
                self.space();
                if self.peek() != Some(b']') {
                    return Ok(false);
                }
                self.at += 1;
                levels.pop();
            }
            Some(b't') => self.literal("true")?,
            Some(b'f') => self.literal("false")?,
            Some(b'n') => self.literal("null")?,
            _ => self.number()?,
        }
        Ok(true)
    }

    /// Reads the scalar at the position. The template's values are built with
    /// this, level by level, so that each byte is read once.
    ///
    /// # Errors
    ///
    /// [`JsonError::Syntax`] if there is none.
    pub(crate) fn scalar(&mut self) -> Result<RawJson<'a>, JsonError> {
        let start = self.at;
        match self.peek() {
            Some(b'"') => self.string()?,
            Some(b't') => self.literal("true")?,
            Some(b'f') => self.literal("false")?,
            Some(b'n') => self.literal("null")?,
            _ => self.number()?,
        }
        Ok(self.since(start))
    }

    /// Skips `byte` if it is next; returns whether it was.
    pub(crate) fn take(&mut self, byte: u8) -> bool {
        let next = self.peek() == Some(byte);
        self.at += usize::from(next);
        next
    }

    fn key(&mut self) -> Result<(), JsonError> {
        self.string()?;
        self.space();
        self.expect(b':')?;
        self.space();
        Ok(())
    }

    fn literal(&mut self, word: &str) -> Result<(), JsonError> {
        if !self
            .text
            .as_bytes()
            .get(self.at..)
            .is_some_and(|rest| rest.starts_with(word.as_bytes()))
        {
            return Err(self.wrong());
        }
        self.at += word.len();
        Ok(())
    }

    fn number(&mut self) -> Result<(), JsonError> {
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1;
        } else {
            self.digits()?;
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), JsonError> {
        let start = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        if self.at == start { Err(self.wrong()) } else { Ok(()) }
    }

    /// Reads a string, quotes included.
    fn string(&mut self) -> Result<(), JsonError> {
        self.expect(b'"')?;
        loop {
            self.at += plain_bytes(self.text.as_bytes().get(self.at..).unwrap_or_default());
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some(b'\\') => {
                    self.at += 1;
                    self.escape()?;
                }
                _ => return Err(self.wrong()),
            }
        }
    }

    /// Reads an escape after its backslash; a surrogate only as part of a pair.
    fn escape(&mut self) -> Result<(), JsonError> {
        match self.peek() {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => {
                self.at += 1;
                Ok(())
            }
            Some(b'u') => {
                self.at += 1;
                match self.hex4()? {
                    0xdc00..=0xdfff => Err(self.wrong()),
                    0xd800..=0xdbff => {
                        self.expect(b'\\')?;
                        self.expect(b'u')?;
                        match self.hex4()? {
                            0xdc00..=0xdfff => Ok(()),
                            _ => Err(self.wrong()),
                        }
                    }
                    _ => Ok(()),
                }
            }
            _ => Err(self.wrong()),
        }
    }

    fn hex4(&mut self) -> Result<u32, JsonError> {
        let mut unit = 0;
        for _ in 0..4 {
            let digit = self.peek().and_then(|byte| char::from(byte).to_digit(16));
            unit = unit << 4 | digit.ok_or(self.wrong())?;
            self.at += 1;
        }
        Ok(unit)
    }

    fn expect(&mut self, byte: u8) -> Result<(), JsonError> {
        if self.peek() != Some(byte) {
            return Err(self.wrong());
        }
        self.at += 1;
        Ok(())
    }

    /// The text from `start` to the position. Both are at ASCII characters.
    fn since(&self, start: usize) -> RawJson<'a> {
        RawJson(self.text.get(start..self.at).unwrap_or_default())
    }

    fn wrong(&self) -> JsonError {
        JsonError::Syntax(self.at)
    }
}

/// Number of leading bytes that stand for themselves inside a string: no
/// quote, no backslash, no control character. Eight at a time, because most of
/// a request is the inside of strings.
fn plain_bytes(bytes: &[u8]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGHS: u64 = ONES << 7;
    let mut plain = 0;
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        let word = <[u8; 8]>::try_from(chunk).map_or(0, u64::from_le_bytes);
        // Each term sets the high bit of a byte that is below the bound, and
        // perhaps of bytes after the first such byte: the first is exact.
        let below = |word: u64, bound: u64| word.wrapping_sub(ONES * bound) & !word & HIGHS;
        let special = below(word, 0x20)
            | below(word ^ (ONES * u64::from(b'"')), 1)
            | below(word ^ (ONES * u64::from(b'\\')), 1);
        if special != 0 {
            return plain + special.trailing_zeros() as usize / 8;
        }
        plain += 8;
    }
    let tail = chunks.remainder();
    plain
        + tail
            .iter()
            .position(|&byte| byte < 0x20 || byte == b'"' || byte == b'\\')
            .unwrap_or(tail.len())
}

/// Resolves the escapes of a string's inside, which is known to be valid.
fn unescape(inner: &str) -> String {
    let mut out = String::with_capacity(inner.len());
    let mut rest = inner;
    while let Some((plain, escape)) = rest.split_once('\\') {
        out.push_str(plain);
        let mut chars = escape.chars();
        match chars.next() {
            Some('b') => out.push('\u{8}'),
            Some('f') => out.push('\u{c}'),
            Some('n') => out.push('\n'),
            Some('r') => out.push('\r'),
            Some('t') => out.push('\t'),
            Some('u') => {
                let mut unit = take_hex4(&mut chars);
                if (0xd800..0xdc00).contains(&unit) {
                    chars.next();
                    chars.next();
                    let low = take_hex4(&mut chars);
                    unit = 0x1_0000 + ((unit - 0xd800) << 10 | (low & 0x3ff));
                }
                out.push(char::from_u32(unit).unwrap_or(char::REPLACEMENT_CHARACTER));
            }
            Some(itself) => out.push(itself),
            None => {}
        }
        rest = chars.as_str();
    }
    out.push_str(rest);
    out
}

fn take_hex4(chars: &mut std::str::Chars<'_>) -> u32 {
    chars.by_ref().take(4).fold(0, |unit, digit| unit << 4 | digit.to_digit(16).unwrap_or(0))
}

#[cfg(test)]
pub(crate) mod tests;
