//! The scanner: checks JSON and finds its values' ends, byte by byte.
//!
//! It knows the grammar and nothing else. Containers that a value opens are
//! remembered as one bit each, so that no text makes it recurse.

use super::{JsonError, Member, RawJson};
use crate::limits::JSON_DEPTH_MAX;

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

    pub(super) fn first_item(&mut self, outside: usize) -> Result<Option<RawJson<'a>>, JsonError> {
        self.expect(b'[')?;
        self.space();
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(None);
        }
        self.value(outside).map(Some)
    }

    pub(super) fn next_item(&mut self, outside: usize) -> Result<Option<RawJson<'a>>, JsonError> {
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

    /// Reads the string at the position, escapes resolved: its text, if it has no
    /// escapes, else `None`, and the text is in `resolved`, in place of what was
    /// there. Each byte is looked at once.
    ///
    /// # Errors
    ///
    /// [`JsonError::Syntax`] if there is none.
    pub(crate) fn resolved(&mut self, resolved: &mut String) -> Result<Option<&'a str>, JsonError> {
        self.expect(b'"')?;
        let mut start = self.at;
        let mut has_escapes = false;
        loop {
            self.at += plain_bytes(self.text.as_bytes().get(self.at..).unwrap_or_default());
            // Between ASCII characters, so there is always a text.
            let plain = self.text.get(start..self.at).unwrap_or_default();
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    if !has_escapes {
                        return Ok(Some(plain));
                    }
                    resolved.push_str(plain);
                    return Ok(None);
                }
                Some(b'\\') => {
                    if !has_escapes {
                        resolved.clear();
                        has_escapes = true;
                    }
                    resolved.push_str(plain);
                    self.at += 1;
                    resolved.push(self.escape()?);
                    start = self.at;
                }
                _ => return Err(self.wrong()),
            }
        }
    }

    /// Reads an escape after its backslash, and says what it stands for; a
    /// surrogate only as part of a pair.
    #[inline]
    fn escape(&mut self) -> Result<char, JsonError> {
        let one = match self.peek() {
            Some(b'n') => '\n',
            Some(b'"') => '"',
            Some(b'\\') => '\\',
            Some(b'/') => '/',
            Some(b't') => '\t',
            Some(b'r') => '\r',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'u') => {
                self.at += 1;
                return self.code_point();
            }
            _ => return Err(self.wrong()),
        };
        self.at += 1;
        Ok(one)
    }

    fn code_point(&mut self) -> Result<char, JsonError> {
        let mut unit = self.hex4()?;
        if (0xd800..0xdc00).contains(&unit) {
            self.expect(b'\\')?;
            self.expect(b'u')?;
            match self.hex4()? {
                low @ 0xdc00..=0xdfff => unit = 0x1_0000 + ((unit - 0xd800) << 10 | (low & 0x3ff)),
                _ => return Err(self.wrong()),
            }
        }
        // The second half of a pair is no character.
        char::from_u32(unit).ok_or(self.wrong())
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
/// quote, no backslash, no control character. Several at a time, because most of
/// a request is the inside of strings.
#[inline]
pub(super) fn plain_bytes(bytes: &[u8]) -> usize {
    let (steps, tail) = bytes.as_chunks::<STEP>();
    for (at, step) in steps.iter().enumerate() {
        if let Some(first) = first_special(step) {
            return at * STEP + first;
        }
    }
    let special = tail.iter().position(|&byte| byte < 0x20 || byte == b'"' || byte == b'\\');
    steps.len() * STEP + special.unwrap_or(tail.len())
}

/// Bytes that are looked at together.
#[cfg(target_arch = "wasm32")]
const STEP: usize = 16;
#[cfg(not(target_arch = "wasm32"))]
const STEP: usize = 8;

/// The first byte that does not stand for itself.
#[cfg(target_arch = "wasm32")]
#[inline]
fn first_special(step: &[u8; STEP]) -> Option<usize> {
    use core::arch::wasm32::{u8x16_bitmask, u8x16_eq, u8x16_lt, u8x16_splat, u64x2, v128_or};
    let (low, high) = step.split_at(STEP / 2);
    let half = |half: &[u8]| half.first_chunk().map_or(0, |half| u64::from_le_bytes(*half));
    let bytes = u64x2(half(low), half(high));
    let control = u8x16_lt(bytes, u8x16_splat(0x20));
    let quote = u8x16_eq(bytes, u8x16_splat(b'"'));
    let backslash = u8x16_eq(bytes, u8x16_splat(b'\\'));
    let special = u8x16_bitmask(v128_or(v128_or(control, quote), backslash));
    (special != 0).then(|| special.trailing_zeros() as usize)
}

/// The first byte that does not stand for itself.
#[cfg(not(target_arch = "wasm32"))]
#[inline]
fn first_special(step: &[u8; STEP]) -> Option<usize> {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGHS: u64 = ONES << 7;
    let word = u64::from_le_bytes(*step);
    // Each term sets the high bit of a byte that is below the bound, and perhaps
    // of bytes after the first such byte: the first is exact. Bytes that had it
    // set before are none.
    let below = |word: u64, bound: u64| word.wrapping_sub(ONES * bound);
    let quote = below(word ^ (ONES * u64::from(b'"')), 1);
    let backslash = below(word ^ (ONES * u64::from(b'\\')), 1);
    let special = (below(word, 0x20) | quote | backslash) & !word & HIGHS;
    (special != 0).then(|| special.trailing_zeros() as usize / 8)
}
