//! Msgpack: reading one value after the other off untrusted bytes.
//!
//! Engines encode their events as MessagePack. What a field may look like
//! differs from release to release, so the caller looks at the next value's
//! [`Shape`] and decides; whatever it does not want it skips.
//!
//! # Invariants
//!
//! 1. Total: any bytes in, a value or a [`MsgpackError`] out. No length found in
//!    the bytes is believed before so many bytes are there.
//! 2. Skipping needs no stack: nesting costs nothing but the bytes it takes.

use core::fmt;

/// Why bytes are no MessagePack value of the wanted shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsgpackError {
    /// The bytes end before the value does, or a length is a lie.
    Truncated,
    /// The next value has another shape than the caller needs.
    Shape,
    /// A number does not fit, or a text is not UTF-8.
    Value,
}

impl fmt::Display for MsgpackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Truncated => "the bytes end before the value does",
            Self::Shape => "a value has an unexpected shape",
            Self::Value => "a value is out of range",
        })
    }
}

impl core::error::Error for MsgpackError {}

/// What the next value is, as far as a caller must know to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Nothing.
    Nil,
    /// A signed or unsigned integer.
    Integer,
    /// Text.
    Text,
    /// Bytes.
    Bytes,
    /// A list.
    List,
    /// Keys and values.
    Map,
    /// Anything else: truth values, floats, extensions.
    Other,
}

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

    /// Whether everything has been read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The shape of the next value, which stays unread.
    ///
    /// # Errors
    ///
    /// [`MsgpackError::Truncated`] at the end.
    #[inline]
    pub fn shape(&self) -> Result<Shape, MsgpackError> {
        Ok(match self.rest.first().ok_or(MsgpackError::Truncated)? {
            0xc0 => Shape::Nil,
            0x00..=0x7f | 0xe0..=0xff | 0xcc..=0xd3 => Shape::Integer,
            0xa0..=0xbf | 0xd9..=0xdb => Shape::Text,
            0xc4..=0xc6 => Shape::Bytes,
            0x90..=0x9f | 0xdc | 0xdd => Shape::List,
            0x80..=0x8f | 0xde | 0xdf => Shape::Map,
            _ => Shape::Other,
        })
    }

    /// Takes a nil if one is next. Returns whether it was.
    ///
    /// # Errors
    ///
    /// [`MsgpackError::Truncated`] at the end.
    #[inline]
    pub fn nil(&mut self) -> Result<bool, MsgpackError> {
        let nil = self.shape()? == Shape::Nil;
        if nil {
            self.take(1)?;
        }
        Ok(nil)
    }

    /// The bits of an integer of up to 64 bits, signed or not; negative ones in
    /// two's complement.
    ///
    /// # Errors
    ///
    /// A [`MsgpackError`].
    pub fn integer_bits(&mut self) -> Result<u64, MsgpackError> {
        Ok(match self.integer()? {
            Integer::Unsigned(value) => value,
            Integer::Negative(value) => value.cast_unsigned(),
        })
    }

    /// An integer of at most 32 bits and no sign.
    ///
    /// # Errors
    ///
    /// A [`MsgpackError`].
    #[inline]
    pub fn u32(&mut self) -> Result<u32, MsgpackError> {
        u32::try_from(self.u64()?).map_err(|_| MsgpackError::Value)
    }

    /// An integer of at most 64 bits and no sign.
    ///
    /// # Errors
    ///
    /// A [`MsgpackError`].
    #[inline]
    pub fn u64(&mut self) -> Result<u64, MsgpackError> {
        match self.integer()? {
            Integer::Unsigned(value) => Ok(value),
            Integer::Negative(_) => Err(MsgpackError::Value),
        }
    }

    /// A truth value.
    ///
    /// # Errors
    ///
    /// A [`MsgpackError`].
    pub fn boolean(&mut self) -> Result<bool, MsgpackError> {
        match self.marker()? {
            0xc2 => Ok(false),
            0xc3 => Ok(true),
            _ => Err(MsgpackError::Shape),
        }
    }

    #[inline]
    fn integer(&mut self) -> Result<Integer, MsgpackError> {
        let marker = self.marker()?;
        Ok(match marker {
            0x00..=0x7f => Integer::Unsigned(u64::from(marker)),
            0xcc => Integer::Unsigned(u64::from(u8::from_be_bytes(self.chunk()?))),
            0xcd => Integer::Unsigned(u64::from(u16::from_be_bytes(self.chunk()?))),
            0xce => Integer::Unsigned(u64::from(u32::from_be_bytes(self.chunk()?))),
            0xcf => Integer::Unsigned(u64::from_be_bytes(self.chunk()?)),
            0xe0..=0xff => Integer::of(i64::from(i8::from_be_bytes([marker]))),
            0xd0 => Integer::of(i64::from(i8::from_be_bytes(self.chunk()?))),
            0xd1 => Integer::of(i64::from(i16::from_be_bytes(self.chunk()?))),
            0xd2 => Integer::of(i64::from(i32::from_be_bytes(self.chunk()?))),
            0xd3 => Integer::of(i64::from_be_bytes(self.chunk()?)),
            _ => return Err(MsgpackError::Shape),
        })
    }

    /// A text.
    ///
    /// # Errors
    ///
    /// A [`MsgpackError`].
    pub fn text(&mut self) -> Result<&'a str, MsgpackError> {
        core::str::from_utf8(self.text_bytes()?).map_err(|_| MsgpackError::Value)
    }

    /// The bytes of a text, which need not be UTF-8: enough to compare it.
    ///
    /// # Errors
    ///
    /// A [`MsgpackError`].
    #[inline]
    pub fn text_bytes(&mut self) -> Result<&'a [u8], MsgpackError> {
        let len = match self.marker()? {
            marker @ 0xa0..=0xbf => usize::from(marker & 0x1f),
            0xd9 => self.length::<1>()?,
            0xda => self.length::<2>()?,
            0xdb => self.length::<4>()?,
            _ => return Err(MsgpackError::Shape),
        };
        self.take(len)
    }

    /// Bytes.
    ///
    /// # Errors
    ///
    /// A [`MsgpackError`].
    pub fn bytes(&mut self) -> Result<&'a [u8], MsgpackError> {
        let len = match self.marker()? {
            0xc4 => self.length::<1>()?,
            0xc5 => self.length::<2>()?,
            0xc6 => self.length::<4>()?,
            _ => return Err(MsgpackError::Shape),
        };
        self.take(len)
    }

    /// The head of a list: how many values follow.
    ///
    /// # Errors
    ///
    /// A [`MsgpackError`]; [`MsgpackError::Truncated`] if so many values cannot
    /// be left.
    pub fn list(&mut self) -> Result<usize, MsgpackError> {
        let marker = self.marker()?;
        let len = match marker {
            0x90..=0x9f => usize::from(marker & 0x0f),
            0xdc => self.length::<2>()?,
            0xdd => self.length::<4>()?,
            _ => return Err(MsgpackError::Shape),
        };
        self.believe(len, 1)
    }

    /// The head of a map: how many keys, each with its value, follow.
    ///
    /// # Errors
    ///
    /// As [`Reader::list`].
    pub fn map(&mut self) -> Result<usize, MsgpackError> {
        let marker = self.marker()?;
        let len = match marker {
            0x80..=0x8f => usize::from(marker & 0x0f),
            0xde => self.length::<2>()?,
            0xdf => self.length::<4>()?,
            _ => return Err(MsgpackError::Shape),
        };
        self.believe(len, 2)
    }

    /// Skips the next value, whatever it is.
    ///
    /// # Errors
    ///
    /// [`MsgpackError::Truncated`], or [`MsgpackError::Shape`] for the one byte
    /// that starts no value.
    pub fn skip(&mut self) -> Result<(), MsgpackError> {
        let mut pending: usize = 1;
        while pending > 0 {
            pending = pending - 1 + self.skip_one()?;
            // Every value takes a byte: more than are left is a lie.
            if pending > self.rest.len() {
                return Err(MsgpackError::Truncated);
            }
        }
        Ok(())
    }

    /// Skips one value but not what it contains; returns how many it contains.
    fn skip_one(&mut self) -> Result<usize, MsgpackError> {
        match self.shape()? {
            Shape::List => return self.list(),
            Shape::Map => return Ok(self.map()? * 2),
            Shape::Text => {
                self.text_bytes()?;
            }
            Shape::Bytes => {
                self.bytes()?;
            }
            Shape::Integer => {
                self.integer()?;
            }
            Shape::Nil | Shape::Other => {
                let len = match self.marker()? {
                    0xc0 | 0xc2 | 0xc3 => 0,
                    0xca => 4,
                    0xcb => 8,
                    0xd4 => 2,
                    0xd5 => 3,
                    0xd6 => 5,
                    0xd7 => 9,
                    0xd8 => 17,
                    0xc7 => 1 + self.length::<1>()?,
                    0xc8 => 1 + self.length::<2>()?,
                    0xc9 => 1 + self.length::<4>()?,
                    _ => return Err(MsgpackError::Shape),
                };
                self.take(len)?;
            }
        }
        Ok(0)
    }

    fn believe(&self, count: usize, bytes_each: usize) -> Result<usize, MsgpackError> {
        let bytes = count.checked_mul(bytes_each).ok_or(MsgpackError::Truncated)?;
        if bytes > self.rest.len() {
            return Err(MsgpackError::Truncated);
        }
        Ok(count)
    }

    #[inline]
    fn marker(&mut self) -> Result<u8, MsgpackError> {
        let (first, rest) = self.rest.split_first().ok_or(MsgpackError::Truncated)?;
        self.rest = rest;
        Ok(*first)
    }

    #[inline]
    fn take(&mut self, len: usize) -> Result<&'a [u8], MsgpackError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(MsgpackError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    #[inline]
    fn chunk<const N: usize>(&mut self) -> Result<[u8; N], MsgpackError> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(MsgpackError::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    /// A length of `N` bytes, at most four.
    fn length<const N: usize>(&mut self) -> Result<usize, MsgpackError> {
        let bytes = self.chunk::<N>()?;
        Ok(bytes.iter().fold(0, |value, byte| value << 8 | usize::from(*byte)))
    }
}

/// An integer of up to 64 bits.
#[derive(Clone, Copy)]
enum Integer {
    Unsigned(u64),
    Negative(i64),
}

impl Integer {
    fn of(value: i64) -> Self {
        u64::try_from(value).map_or(Self::Negative(value), Self::Unsigned)
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "the tests' own small numbers")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Goal: integers are read as the `rmp` crate writes them.
        #[test]
        fn integers_agree_with_rmp(value: i64, shift in 0_u32..64) {
            let value = value >> shift;
            let mut bytes = Vec::new();
            rmp::encode::write_sint(&mut bytes, value).unwrap();
            let mut reader = Reader::new(&bytes);
            prop_assert_eq!(reader.shape(), Ok(Shape::Integer));
            prop_assert_eq!(reader.integer_bits(), Ok(value.cast_unsigned()));
            prop_assert!(reader.is_empty());
        }

        /// Goal: texts, bytes and heads of every length form are read as the
        /// `rmp` crate writes them, and skipped to the byte.
        #[test]
        fn lengths_agree_with_rmp(len in prop_oneof![0_usize..40, 200_usize..300, 65_500_usize..65_600]) {
            let text = "x".repeat(len);
            let mut bytes = Vec::new();
            rmp::encode::write_str(&mut bytes, &text).unwrap();
            prop_assert_eq!(Reader::new(&bytes).text(), Ok(text.as_str()));
            let mut binary = Vec::new();
            rmp::encode::write_bin(&mut binary, text.as_bytes()).unwrap();
            prop_assert_eq!(Reader::new(&binary).bytes(), Ok(text.as_bytes()));
            let mut list = Vec::new();
            rmp::encode::write_array_len(&mut list, len as u32).unwrap();
            list.extend(std::iter::repeat_n(0xc0, len));
            prop_assert_eq!(Reader::new(&list).list(), Ok(len));
            let mut map = Vec::new();
            rmp::encode::write_map_len(&mut map, len as u32).unwrap();
            map.extend(std::iter::repeat_n(0xc0, 2 * len));
            prop_assert_eq!(Reader::new(&map).map(), Ok(len));
            for mut value in [bytes, binary, list, map] {
                value.push(7);
                let mut reader = Reader::new(&value);
                prop_assert_eq!(reader.skip(), Ok(()));
                prop_assert_eq!(reader.u32(), Ok(7));
                prop_assert!(reader.is_empty());
            }
        }

        #[test]
        fn skipping_is_total(bytes: Vec<u8>) {
            let mut reader = Reader::new(&bytes);
            let _ = reader.skip();
        }
    }

    #[test]
    fn floats_truth_values_and_extensions_are_skipped() {
        let mut bytes = Vec::new();
        rmp::encode::write_f64(&mut bytes, 1.5).unwrap();
        rmp::encode::write_f32(&mut bytes, 1.5).unwrap();
        rmp::encode::write_bool(&mut bytes, true).unwrap();
        for len in [1_usize, 2, 4, 8, 16, 3, 300, 70_000] {
            rmp::encode::write_ext_meta(&mut bytes, len as u32, 5).unwrap();
            bytes.extend(std::iter::repeat_n(0, len));
        }
        bytes.push(9);
        let mut reader = Reader::new(&bytes);
        for _ in 0..11 {
            reader.skip().unwrap();
        }
        assert_eq!(reader.u32(), Ok(9));
    }

    #[test]
    fn a_hostile_length_is_not_believed() {
        for head in [[0xdd, 0xff, 0xff, 0xff, 0xff], [0xdf, 0xff, 0xff, 0xff, 0xff]] {
            assert_eq!(Reader::new(&head).skip(), Err(MsgpackError::Truncated));
        }
        assert_eq!(Reader::new(&[0xdd, 0, 0, 0, 9]).list(), Err(MsgpackError::Truncated));
    }

    /// Goal: nesting costs no stack.
    #[test]
    fn deep_nesting_is_skipped() {
        let mut bytes = vec![0x91; 1_000_000];
        bytes.push(0xc0);
        assert_eq!(Reader::new(&bytes).skip(), Ok(()));
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        let mut bytes = Vec::new();
        rmp::encode::write_sint(&mut bytes, -1).unwrap();
        assert_eq!(Reader::new(&bytes).u32(), Err(MsgpackError::Value));
        let mut bytes = Vec::new();
        rmp::encode::write_uint(&mut bytes, 1 << 32).unwrap();
        assert_eq!(Reader::new(&bytes).u32(), Err(MsgpackError::Value));
    }
}
