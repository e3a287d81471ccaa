//! The engine for what `compile` refuses: HF's own `tokenizers` crate.
//!
//! WordPiece, Unigram, exotic normalizers. It parses JSON for up to two seconds
//! per VM, is about six times slower than the compiled form, and cannot stop
//! half way; so it is a feature of a second, larger module.
//!
//! Its regular expressions are those of `fancy-regex`, not of Oniguruma.

use tokenizers::Tokenizer;

use super::{EncodeError, LoadError};
use crate::ids::TokenId;
use crate::limits::HF_TEXT_BYTES_MAX;

/// A parsed `tokenizer.json`.
pub(super) struct HfEngine {
    tokenizer: Tokenizer,
    json_bytes: usize,
}

impl HfEngine {
    /// Parses a `tokenizer.json`; truncation and padding in it are put aside.
    pub(super) fn load(json: &[u8]) -> Result<Self, LoadError> {
        let mut tokenizer = Tokenizer::from_bytes(json).map_err(|_| LoadError::HfRefused)?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|_| LoadError::HfRefused)?;
        Ok(Self { tokenizer, json_bytes: json.len() })
    }

    /// Appends the ids of `text` to `out`.
    pub(super) fn encode(&self, text: &str, out: &mut Vec<TokenId>) -> Result<(), EncodeError> {
        if text.len() > HF_TEXT_BYTES_MAX {
            return Err(EncodeError::TextTooLong);
        }
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|_| EncodeError::Broken)?;
        out.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    /// Memory held: about eight times the JSON, as measured.
    pub(super) fn memory_bytes(&self) -> usize {
        self.json_bytes.saturating_mul(8)
    }
}

/// What the crate's hash maps are seeded with in the module, which has no
/// random numbers: the same ones every time. The words of a prompt reach one
/// such map, a cache of bounded size.
#[cfg(target_arch = "wasm32")]
mod seed {
    /// Fills `to` for the `getrandom` crate.
    ///
    /// # Safety
    ///
    /// `to` points to `len` bytes that may be written.
    #[expect(unsafe_code, reason = "the getrandom crate looks this symbol up by its name")]
    #[unsafe(no_mangle)]
    unsafe extern "Rust" fn __getrandom_v03_custom(
        to: *mut u8,
        len: usize,
    ) -> Result<(), getrandom::Error> {
        // SAFETY: the caller passes a buffer of `len` bytes.
        unsafe { to.write_bytes(0x5A, len) };
        Ok(())
    }
}
