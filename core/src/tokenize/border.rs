//! Borders: places from which the encoding of a text can start anew.
//!
//! A text that begins as another one did need not be encoded from its start
//! again, if it is known up to where the tokens cannot differ. That is short of
//! where the two texts part, since a cut looks at what follows it.
//!
//! # What a cut looks at
//!
//! - the automaton of the pre-tokenizer, or the pair of characters at a seam:
//!   noted piece by piece;
//! - added tokens that start before the cut, as far as the text agrees with
//!   one of them;
//! - the end of the stretch it is in, if that was reached: the added token that
//!   ends it, or the end of the text;
//! - with Normalization Form C, the next character that does not combine with
//!   what precedes it.

use super::added::{self, FirstBytes};
use super::encode::{Engine, Progress, Stage};
use super::file::{FLAG_NFC, Trie};
use super::normalize;
use crate::limits::ADDED_TOKEN_BYTES_MAX;

/// A place from which the encoding of a text can start anew.
///
/// # Invariants
///
/// 1. The first `tokens` ids of the text are those of its first `at` bytes, and
///    the others are those of the rest, encoded from [`Progress::resume`] on.
/// 2. Both hold for every text that has the same first `seen_to` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Border {
    /// Where to start, in bytes of the text; between two characters.
    pub at: usize,
    /// Up to here the text decided about the tokens before `at`; in bytes, `at`
    /// at least and the length of the text at most; between two characters.
    pub seen_to: usize,
    /// Tokens before `at`.
    pub tokens: usize,
}

impl Progress {
    /// The progress of a text whose first bytes gave `border`.
    ///
    /// `text` has the same first [`Border::seen_to`] bytes as the text of the
    /// border, which the caller has made sure of. `None` if it is too short or
    /// has no character there, so that it cannot be.
    #[must_use]
    pub fn resume(text: &str, border: &Border) -> Option<Self> {
        let known = border.at <= border.seen_to
            && text.is_char_boundary(border.at)
            && text.is_char_boundary(border.seen_to);
        known.then(|| {
            let mut progress = Self::default();
            progress.tokens = border.tokens;
            progress.seen = border.seen_to;
            progress.raw.restart(border.at);
            progress
        })
    }
}

impl Engine {
    /// See [`super::Tokenizer::border`].
    pub(super) fn border(&self, text: &str, progress: &Progress) -> Option<Border> {
        if progress.text_bytes.is_some_and(|bytes| bytes != text.len()) {
            return None;
        }
        let start = progress.raw.start;
        let begun = matches!(progress.stage, Stage::FindNormalAdded | Stage::Pieces);
        let (at, mut seen) = if begun && progress.inner.start > 0 {
            let inner = progress.inner.start;
            let inner = progress.normal.as_ref().map_or(Some(inner), |form| form.raw_at(inner))?;
            (start + inner, self.seen_within(text, progress)?)
        } else {
            (start, progress.seen)
        };
        seen = seen.max(at).max(self.reach(text, at)?);
        while seen < text.len() && !text.is_char_boundary(seen) {
            seen += 1;
        }
        (seen <= text.len()).then_some(Border { at, seen_to: seen, tokens: progress.tokens })
    }

    /// What decided about the tokens of a stretch so far, in bytes of the text.
    /// `None` if added tokens were searched for in a stretch that normalizing
    /// changed, if the end of the text did, or if what follows may combine with it.
    fn seen_within(&self, text: &str, progress: &Progress) -> Option<usize> {
        let tables = self.layout.tables(self.file.as_bytes())?;
        if progress.normal.is_some() && !tables.normal_added.edges.is_empty() {
            return None;
        }
        let (start, end) = (progress.raw.start, progress.raw.end);
        let stretch = text.get(start..end)?.as_bytes();
        let normal_reach =
            |at| start + reach(tables.normal_added, &self.normal_added_first, stretch, at);
        let mut seen = progress.seen.max(normal_reach(progress.inner.start));
        if progress.seen_end {
            // What ends the pieces had a part in the last of them.
            seen = seen.max(match progress.inner.next {
                Some(next) => normal_reach(next.end).max(start + next.end),
                None => end + 1,
            });
        }
        if self.layout.flags & FLAG_NFC != 0 {
            seen = normalize::settled(text.get(..end)?, seen)?;
        }
        if seen > end {
            let next = progress.raw.next?.end;
            seen = seen.max(next).max(self.reach(text, next)?);
        }
        Some(seen)
    }

    /// How far the search for added tokens of the raw text looked before it knew
    /// which ones start before `at`.
    fn reach(&self, text: &str, at: usize) -> Option<usize> {
        let tables = self.layout.tables(self.file.as_bytes())?;
        Some(reach(tables.added, &self.added_first, text.as_bytes(), at))
    }
}

/// How far a search of `text` looks before it knows which added tokens start
/// before `at`; beyond the end if the end is what it had to know.
fn reach(trie: Trie<'_>, first: &FirstBytes, text: &[u8], at: usize) -> usize {
    if trie.edges.is_empty() {
        return 0;
    }
    let (mut from, mut reach) = (at.saturating_sub(ADDED_TOKEN_BYTES_MAX), 0);
    while let Some(skipped) = text.get(from..at).and_then(|text| first.find(text)) {
        let start = from + skipped;
        let rest = text.get(start..).unwrap_or_default();
        reach = reach.max(start + added::agreement(trie, rest));
        from = start + 1;
    }
    reach
}
