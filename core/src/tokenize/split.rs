//! Pre-tokenizer: cuts text into pieces that are merged on their own.
//!
//! The split patterns of `tokenizer.json` are compiled natively into one
//! deterministic automaton over bytes, so that the module carries no regular
//! expressions. A piece is the leftmost match, by the priority of alternatives
//! (Perl and Oniguruma semantics); what lies between two matches is a piece too.
//!
//! # Terms
//!
//! - *state*: 0 is dead, 1 the start; states `2..2 + matches.len()` report a
//!   match that ended *before* the byte that led to them.
//! - *class*: bytes that no state tells apart; the last class is the end.
//! - *match kind*: 0 is the match itself; 1 gives back its last character,
//!   which is how the look-ahead in `\s+(?!\S)` is expressed without one; from
//!   2 on it is one character that no pattern matches, and the kinds of text
//!   that an earlier split told apart are different numbers.
//! - *gap*: characters of the same kind of text that no pattern matches.

use super::EncodeError;
use super::file::Tables;
use crate::limits::PRETOKEN_BYTES_MAX;

/// A match is a piece.
#[cfg(any(test, feature = "compile"))]
pub(crate) const MATCH_WHOLE: u8 = 0;
/// A match gives back its last character.
pub(crate) const MATCH_DROPS_LAST: u8 = 1;
/// A match is a character of a gap, from this number on.
pub(crate) const MATCH_GAP: u8 = 2;
/// The kind of a gap that no pattern of the automaton stands for.
const PLAIN_GAP: u8 = u8::MAX;

/// One piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where the piece ends; always after its start.
    pub(crate) end: usize,
    /// Bytes looked at.
    pub(crate) steps: u64,
    /// Up to here the text had a part in the cut; one more than there is if its
    /// end had.
    pub(crate) seen: usize,
}

/// The piece of `text` that starts at `start`, which must be before its end.
///
/// `steps_max`: bytes that may be looked at.
///
/// # Errors
///
/// [`EncodeError::PretokenTooLong`] if the piece is longer than
/// [`PRETOKEN_BYTES_MAX`], or takes looking further ahead than twice that.
/// [`EncodeError::TooMuchWork`] beyond `steps_max`, by at most one look ahead.
pub(crate) fn next_piece(
    tables: &Tables<'_>,
    text: &[u8],
    start: usize,
    steps_max: u64,
) -> Result<Piece, EncodeError> {
    let walk = Walk::of(tables);
    let mut at = start;
    let (mut steps, mut seen) = (0, start);
    let mut gap = None;
    while at < text.len() {
        let look = match_at(&walk, text, at).ok_or(EncodeError::PretokenTooLong)?;
        steps += look.steps as u64;
        seen = seen.max(at + look.steps);
        let (end, gap_here) = match look.found {
            Some((end, kind)) if kind < MATCH_GAP => (end, None),
            Some((end, kind)) => (end, Some(kind)),
            None => (at + char_len(text, at), Some(PLAIN_GAP)),
        };
        // A gap ends at a match, and at a gap of another kind.
        if at > start && gap != gap_here {
            return Ok(Piece { end: at, steps, seen });
        }
        if end - start > PRETOKEN_BYTES_MAX {
            return Err(EncodeError::PretokenTooLong);
        }
        if gap_here.is_none() {
            return Ok(Piece { end, steps, seen });
        }
        if steps > steps_max {
            return Err(EncodeError::TooMuchWork);
        }
        gap = gap_here;
        at = end;
    }
    Ok(Piece { end: at, steps, seen })
}

/// The automaton, to be walked state by state.
#[derive(Clone, Copy)]
pub(crate) struct Walk<'a> {
    classes: &'a [u16; 256],
    transitions: &'a [u16],
    matches: &'a [u8],
    stride: usize,
}

impl<'a> Walk<'a> {
    /// The dead state.
    pub(crate) const DEAD: usize = 0;
    /// Where matching starts.
    pub(crate) const START: usize = 1;
    /// The first state that reports a match.
    const FIRST_MATCH: usize = 2;

    /// The automaton of a file.
    #[inline]
    pub(crate) fn of(tables: &Tables<'a>) -> Self {
        Self {
            classes: tables.dfa_classes.first_chunk().unwrap_or(&[0; 256]),
            transitions: tables.dfa_transitions,
            matches: tables.dfa_matches,
            stride: tables.dfa_stride,
        }
    }

    #[inline]
    fn by_class(&self, state: usize, class: usize) -> usize {
        let next = self.transitions.get(state * self.stride + class);
        next.map_or(Self::DEAD, |&next| usize::from(next))
    }

    /// The state that `byte` leads to.
    #[inline]
    pub(crate) fn next(&self, state: usize, byte: u8) -> usize {
        let class = self.classes.get(usize::from(byte)).map_or(0, |&class| usize::from(class));
        self.by_class(state, class)
    }

    /// The state that the end of the text leads to.
    #[inline]
    fn at_end(&self, state: usize) -> usize {
        self.by_class(state, self.stride.saturating_sub(1))
    }

    /// The kind of the match that a state reports, if it reports one.
    #[inline]
    pub(crate) fn kind(&self, state: usize) -> Option<u8> {
        self.matches.get(state.checked_sub(Self::FIRST_MATCH)?).copied()
    }

    /// Whether nothing follows a state but the dead one.
    pub(crate) fn is_last(&self, state: usize) -> bool {
        (0..self.stride).all(|class| self.by_class(state, class) == Self::DEAD)
    }
}

/// What lies at one position.
struct Look {
    /// The end and the kind of the match, if there is one.
    found: Option<(usize, u8)>,
    /// Bytes looked at, and one more if the end was.
    steps: usize,
}

/// Matches at `start`. `None` if that takes looking too far ahead.
#[inline]
fn match_at(walk: &Walk<'_>, text: &[u8], start: usize) -> Option<Look> {
    let matches_end = Walk::FIRST_MATCH + walk.matches.len();
    let tail = text.get(start..).unwrap_or_default();
    let mut state = Walk::START;
    let mut last = None;
    let mut looked = 0;
    for &byte in tail.iter().take(2 * PRETOKEN_BYTES_MAX) {
        state = walk.next(state, byte);
        if state < matches_end {
            if state == Walk::DEAD {
                break;
            }
            if state >= Walk::FIRST_MATCH {
                last = Some((looked, state));
            }
        }
        looked += 1;
    }
    if state != Walk::DEAD {
        if looked < tail.len() {
            return None;
        }
        let state = walk.at_end(state);
        if walk.kind(state).is_some() {
            last = Some((looked, state));
        }
    }
    let found = last.and_then(|(len, state)| {
        let kind = walk.kind(state)?;
        Some((start + match_len(tail, len, kind)?, kind))
    });
    Some(Look { found, steps: looked + 1 })
}

/// The length of the piece of a match; `None` if nothing is left of it.
fn match_len(tail: &[u8], len: usize, kind: u8) -> Option<usize> {
    let len = if kind == MATCH_DROPS_LAST {
        tail.get(..len)?.iter().rposition(|&byte| !is_continuation(byte))?
    } else {
        len
    };
    (len > 0).then_some(len)
}

/// Bytes of the character at `at`, to the next start of a character.
fn char_len(text: &[u8], at: usize) -> usize {
    let tail = text.get(at + 1..).unwrap_or_default();
    1 + tail.iter().take_while(|&&byte| is_continuation(byte)).count()
}

/// Whether a byte of UTF-8 continues a character.
#[inline]
pub(crate) fn is_continuation(byte: u8) -> bool {
    byte & 0xC0 == 0x80
}
