//! Normalization Form C, piece by piece.
//!
//! The tables are those of `unicode-normalization-alignments` 0.1.12, because
//! HF's tokenizers 0.23 uses them: newer Unicode versions differ on characters
//! that were assigned since, and the ids have to be the engine's.
//!
//! Text is normalized in chunks that begin at characters which neither combine
//! with what precedes them nor are reordered, so that the parts together are
//! what normalizing the whole would be.

use unicode_normalization_alignments::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use crate::limits::PRETOKEN_BYTES_MAX;

/// Bytes after which a chunk ends at the next border.
const CHUNK_BYTES: usize = 4096;

/// Bytes that [`settled`] looks at.
const SETTLED_BYTES_MAX: usize = 1024;

/// The end of the chunk of `text` that starts at `start`.
///
/// `None` if there is no border within [`PRETOKEN_BYTES_MAX`] after the usual
/// length of a chunk: thousands of combining marks in a row.
pub(crate) fn chunk_end(text: &str, start: usize) -> Option<usize> {
    let mut from = start.checked_add(CHUNK_BYTES).filter(|&from| from < text.len());
    while let Some(at) = from
        && !text.is_char_boundary(at)
    {
        from = Some(at + 1);
    }
    let Some(from) = from else { return Some(text.len()) };
    for (at, character) in text.get(from..)?.char_indices() {
        if is_border(character) {
            return Some(from + at);
        }
        if at > PRETOKEN_BYTES_MAX {
            return None;
        }
    }
    Some(text.len())
}

/// Up to where `text` has to be known so that its first `from` bytes are in
/// Normalization Form C whatever follows, given that they are as they stand:
/// behind the next border, or one more than there is if `text` ends before.
///
/// `None` if there is no border within [`SETTLED_BYTES_MAX`].
pub(crate) fn settled(text: &str, from: usize) -> Option<usize> {
    let mut at = from;
    while at < text.len() && !text.is_char_boundary(at) {
        at += 1;
    }
    let Some(tail) = text.get(at..) else { return Some(from) };
    for (index, character) in tail.char_indices() {
        if is_border(character) {
            return Some(at + index + character.len_utf8());
        }
        if index > SETTLED_BYTES_MAX {
            return None;
        }
    }
    Some(text.len() + 1)
}

/// Whether `chunk` is certainly in Normalization Form C.
pub(crate) fn is_normal(chunk: &str) -> bool {
    // Below U+0300 everything is, and no lead byte of UTF-8 is above this.
    if chunk.bytes().all(|byte| byte < 0xCC) {
        return true;
    }
    let mut rest = chunk;
    while let Some(start) = rest.find(|character| !is_easy(character)) {
        let (_, from) = rest.split_at(start);
        let end = from.find(is_easy).unwrap_or(from.len());
        let (hard, after) = from.split_at(end);
        if !is_certainly_normal(hard) {
            return false;
        }
        rest = after;
    }
    true
}

/// The quick check alone.
pub(super) fn is_certainly_normal(text: &str) -> bool {
    matches!(is_nfc_quick(text.chars()), IsNormalized::Yes)
}

/// Whether `character` is in Normalization Form C and no combining mark,
/// whatever stands beside it: what the quick check need not look at.
pub(super) fn is_easy(character: char) -> bool {
    character < '\u{300}' || is_border(character)
}

/// Appends the normal form of `chunk` to `out`.
pub(crate) fn append_normal(chunk: &str, out: &mut String) {
    out.extend(chunk.nfc().map(|(character, _)| character));
}

/// Whether a chunk may begin with `character`: it is no combining mark, has no
/// part in a composition but as the first character, and does not change.
/// Not every such character, only blocks in which that holds for all.
fn is_border(character: char) -> bool {
    matches!(character,
        '\0'..='\u{7f}'
        | '\u{410}'..='\u{44f}'
        | '\u{5d0}'..='\u{5ea}'
        | '\u{621}'..='\u{63a}'
        | '\u{904}'..='\u{928}'
        | '\u{e01}'..='\u{e30}'
        | '\u{3041}'..='\u{3096}'
        | '\u{30a1}'..='\u{30fa}'
        | '\u{4e00}'..='\u{9fa5}'
        | '\u{ac00}'..='\u{d7a3}')
}
