//! The buffer a tokenizer file lives in: bytes that start at a multiple of 8.
//!
//! A tokenizer file arrives in parts and is used where it lies: its tables are
//! read as `u16`, `u32` and `u64` slices of this buffer, without a second copy
//! of what may be twelve megabytes in every VM.

/// Bytes of one word of the buffer.
const WORD: usize = size_of::<u64>();

/// An 8-aligned byte buffer of fixed length.
#[derive(Clone, Debug, Default)]
pub struct AlignedBytes {
    words: Vec<u64>,
    /// Bytes in use: at most `words.len() * 8`, and more than that minus 8.
    len: usize,
}

impl AlignedBytes {
    /// A buffer of `len` zero bytes, to be filled part by part.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        Self { words: vec![0; len.div_ceil(WORD)], len }
    }

    /// A copy of `bytes`.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Self {
        let mut copy = Self::zeroed(bytes.len());
        copy.as_bytes_mut().copy_from_slice(bytes);
        copy
    }

    /// The bytes, at an address that is a multiple of 8.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words).get(..self.len).unwrap_or_default()
    }

    /// The bytes, to be written.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.words).get_mut(..self.len).unwrap_or_default()
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
