//! The automaton of `split` for ASCII, so that most pieces take one look at a
//! small table for each byte.
//!
//! A state stands for one of the automaton together with its last match: how
//! many bytes ago that ended, and its kind. So an entry tells at once where the
//! piece ends. What does not fit in (other characters, the end of the text,
//! matches long ago, gaps) is left to the automaton, from the start of the
//! piece on.

use super::file::Tables;
use super::split::{MATCH_DROPS_LAST, MATCH_GAP, Piece, Walk};
use crate::limits::PRETOKEN_BYTES_MAX;

/// Entries from here on end a piece, so many bytes before the one looked at as
/// they are above.
const ENDS: u8 = 0xF0;
/// The entry of what is left to the automaton.
const LEFT: u8 = 0xFF;
/// Most bytes since the last match.
const BACK_MAX: u8 = LEFT - ENDS - 2;

/// Entries of one state: one for each byte.
const ROW: usize = 256;

/// The table.
pub(crate) struct AsciiSplit {
    rows: Box<[u8; ROW * ROW]>,
    /// Which letters a state leads back to itself by.
    loops: [Loop; ROW],
}

/// Letters that can be passed over eight at a time.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loop {
    None,
    Small,
    All,
}

/// A one, and the highest bit, in each byte.
const ONES: u64 = u64::MAX / 0xFF;
const HIGHS: u64 = ONES << 7;

/// The last match: how many bytes ago it ended, and its kind.
type Last = Option<(u8, u8)>;

impl AsciiSplit {
    /// The table of an automaton; of one that is empty, nothing is known.
    pub(crate) fn new(tables: &Tables<'_>) -> Self {
        let mut rows = vec![LEFT; ROW * ROW].into_boxed_slice();
        let mut states: Vec<(usize, Last)> = vec![(Walk::START, None)];
        let mut index = 0;
        while let Some(&(state, last)) = states.get(index) {
            for byte in 0..=0x7F_u8 {
                let entry = entry(tables, &mut states, state, last, byte);
                if let Some(to) = rows.get_mut(index * ROW + usize::from(byte)) {
                    *to = entry;
                }
            }
            index += 1;
        }
        let rows = rows.try_into().unwrap_or_else(|_| Box::new([LEFT; ROW * ROW]));
        let mut split = Self { rows, loops: [Loop::None; ROW] };
        for state in 0..ENDS {
            let back = |mut letters: std::ops::RangeInclusive<u8>| {
                letters.all(|letter| split.entry(state, letter) == state)
            };
            let of_state = match (back(b'a'..=b'z'), back(b'A'..=b'Z')) {
                (true, true) => Loop::All,
                (true, false) => Loop::Small,
                _ => Loop::None,
            };
            if let Some(to) = split.loops.get_mut(usize::from(state)) {
                *to = of_state;
            }
        }
        split
    }

    #[inline]
    fn entry(&self, state: u8, byte: u8) -> u8 {
        // Always within: two bytes make the index.
        self.rows.get(usize::from(state) * ROW + usize::from(byte)).copied().unwrap_or(LEFT)
    }

    /// Bytes of memory held.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.rows.len() + self.loops.len()
    }

    /// The piece of `text` that starts at `start`, if the table knows it.
    #[inline]
    pub(crate) fn next_piece(&self, text: &[u8], start: usize) -> Option<Piece> {
        let mut state = 0_u8;
        let tail = text.get(start..)?;
        let mut index = 0;
        while index < PRETOKEN_BYTES_MAX {
            let entry = self.entry(state, *tail.get(index)?);
            if entry >= ENDS {
                let at = start + index;
                let end = at.checked_sub(usize::from(entry - ENDS))?;
                let found = entry != LEFT && end > start;
                return found.then(|| Piece { end, steps: (index + 1) as u64, seen: at + 1 });
            }
            state = entry;
            index += 1;
            let passed = self.loops.get(usize::from(state)).copied().unwrap_or(Loop::None);
            if passed != Loop::None
                && let Some(chunk) = tail.get(index..).and_then(<[u8]>::first_chunk)
            {
                index += letters(u64::from_le_bytes(*chunk), passed == Loop::All);
            }
        }
        None
    }
}

/// How many of eight bytes are letters, from the first on: `a` to `z`, and with
/// `capitals` also `A` to `Z`.
#[inline]
fn letters(bytes: u64, capitals: bool) -> usize {
    let folded = if capitals { bytes | (0x20 * ONES) } else { bytes };
    // The highest bit of a sum tells whether its byte is at least what was
    // chosen; none is carried, since both are below 0x80.
    let seven = folded & !HIGHS;
    let from_a = seven + ONES * u64::from(0x80 - b'a');
    let beyond_z = seven + ONES * u64::from(0x7F - b'z');
    let others = !(from_a & !beyond_z & !bytes) & HIGHS;
    (others.trailing_zeros() / 8) as usize
}

/// The entry of a byte in a state; what it leads to is added to `states`.
fn entry(
    tables: &Tables<'_>,
    states: &mut Vec<(usize, Last)>,
    state: usize,
    last: Last,
    byte: u8,
) -> u8 {
    let walk = Walk::of(tables);
    let next = walk.next(state, byte);
    if next == Walk::DEAD {
        return end(last);
    }
    // A match is reported by the byte behind it.
    let last = walk.kind(next).map_or(last, |kind| Some((0, kind)));
    if walk.is_last(next) {
        return end(last);
    }
    let last = last.map(|(back, kind)| (back + 1, kind));
    if last.is_some_and(|(back, _)| back > BACK_MAX) {
        return LEFT;
    }
    let known = states.iter().position(|&known| known == (next, last));
    let index = known.unwrap_or_else(|| {
        states.push((next, last));
        states.len() - 1
    });
    match u8::try_from(index) {
        Ok(index) if index < ENDS => index,
        _ => {
            states.truncate(usize::from(ENDS));
            LEFT
        }
    }
}

/// The entry of a piece that ends with the last match.
fn end(last: Last) -> u8 {
    match last {
        Some((_, kind)) if kind >= MATCH_GAP => LEFT,
        // The last character of the match is one byte.
        Some((back, MATCH_DROPS_LAST)) => ENDS + back + 1,
        Some((back, _)) => ENDS + back,
        None => LEFT,
    }
}

#[cfg(test)]
mod tests {
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    use super::*;

    /// Goal: letters are counted up to any other byte, wherever it is.
    #[test]
    fn letters_end_at_any_other_byte() {
        for capitals in [false, true] {
            for place in 0..8 {
                for byte in 0..=u8::MAX {
                    let mut bytes = *b"azmtbyqe";
                    bytes[place] = byte;
                    let letter = byte.is_ascii_lowercase() || capitals && byte.is_ascii_uppercase();
                    let count = letters(u64::from_le_bytes(bytes), capitals);
                    assert_eq!(count, if letter { 8 } else { place }, "{byte} at {place}");
                }
            }
        }
    }
}
