//! Wire: bounds-checked reading and writing of the feed's little-endian bytes.
//!
//! Everything that travels between the sidecar and the filters, or between the
//! filters of one gateway, is written and read here.
//!
//! # Invariants
//!
//! 1. Reading is total: any bytes in, a value or a [`WireError`] out. No length
//!    found in the bytes is believed before that many bytes are there, so a
//!    hostile length allocates nothing.
//! 2. No `usize` on the wire: lengths are `u32`.

use core::fmt;

/// Why bytes could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireError {
    /// The bytes end before the value does.
    Truncated,
    /// Bytes are left over behind the last value.
    TrailingBytes,
    /// A text is not UTF-8.
    NotUtf8,
    /// A number that must name a known case does not.
    UnknownCase,
    /// A count or length is above its named limit.
    OverLimit,
    /// A number is outside of its range, or contradicts another.
    OutOfRange,
    /// The first bytes are not a frame's, or of another version.
    NotAFrame,
    /// The checksum does not match.
    Checksum,
}

impl WireError {
    /// Fixed word for metrics.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Truncated => "truncated",
            Self::TrailingBytes => "trailing_bytes",
            Self::NotUtf8 => "not_utf8",
            Self::UnknownCase => "unknown_case",
            Self::OverLimit => "over_limit",
            Self::OutOfRange => "out_of_range",
            Self::NotAFrame => "not_a_frame",
            Self::Checksum => "checksum",
        }
    }
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Truncated => "the bytes end before the value does",
            Self::TrailingBytes => "bytes are left over behind the last value",
            Self::NotUtf8 => "a text is not UTF-8",
            Self::UnknownCase => "a number names no known case",
            Self::OverLimit => "a count or length is above its limit",
            Self::OutOfRange => "a number is outside of its range",
            Self::NotAFrame => "not a frame of this version",
            Self::Checksum => "the checksum does not match",
        })
    }
}

impl core::error::Error for WireError {}

/// Reads values off the front of a byte slice.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts at the front of `bytes`.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// What has not been read.
    #[must_use]
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    ///
    /// [`WireError::Truncated`] if fewer are left.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(WireError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(WireError::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    /// The next byte.
    ///
    /// # Errors
    ///
    /// [`WireError::Truncated`].
    pub fn u8(&mut self) -> Result<u8, WireError> {
        self.array().map(|[byte]| byte)
    }

    /// The next two bytes.
    ///
    /// # Errors
    ///
    /// [`WireError::Truncated`].
    pub fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    /// The next four bytes.
    ///
    /// # Errors
    ///
    /// [`WireError::Truncated`].
    pub fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next eight bytes.
    ///
    /// # Errors
    ///
    /// [`WireError::Truncated`].
    pub fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    /// A count of at most `max` items of at least `item_bytes` bytes each.
    ///
    /// # Errors
    ///
    /// [`WireError::OverLimit`] above `max`; [`WireError::Truncated`] if that
    /// many items cannot be left.
    pub fn count(&mut self, max: usize, item_bytes: usize) -> Result<usize, WireError> {
        let count = self.u32()? as usize;
        if count > max {
            return Err(WireError::OverLimit);
        }
        if count.checked_mul(item_bytes).is_none_or(|bytes| bytes > self.rest.len()) {
            return Err(WireError::Truncated);
        }
        Ok(count)
    }

    /// Length-prefixed bytes, at most `max` of them.
    ///
    /// # Errors
    ///
    /// As [`Reader::count`].
    pub fn bytes(&mut self, max: usize) -> Result<&'a [u8], WireError> {
        let len = self.count(max, 1)?;
        self.take(len)
    }

    /// Length-prefixed text, at most `max` bytes of it.
    ///
    /// # Errors
    ///
    /// As [`Reader::count`], and [`WireError::NotUtf8`].
    pub fn text(&mut self, max: usize) -> Result<&'a str, WireError> {
        core::str::from_utf8(self.bytes(max)?).map_err(|_| WireError::NotUtf8)
    }

    /// Ends the reading.
    ///
    /// # Errors
    ///
    /// [`WireError::TrailingBytes`] if anything is left.
    pub fn finish(self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(WireError::TrailingBytes) }
    }

    /// Whether everything has been read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }
}

/// Appends values to a byte vector.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// An empty writer.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends one byte.
    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    /// Appends two bytes.
    pub fn u16(&mut self, value: u16) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Appends four bytes.
    pub fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Appends eight bytes.
    pub fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Appends a count or length. One beyond `u32::MAX` saturates, and the
    /// reader refuses it: no limit here is anywhere near it.
    pub fn count(&mut self, count: usize) {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX));
    }

    /// Appends bytes as they are, without a length.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Appends length-prefixed bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.raw(bytes);
    }

    /// Appends length-prefixed text.
    pub fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    /// Bytes written so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing has been written yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The written bytes.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}
