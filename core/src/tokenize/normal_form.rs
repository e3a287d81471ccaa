//! The normal form of a stretch of text, and where it differs from the text.
//!
//! Few stretches differ from their normal form, and those in few places. So only
//! what lies between two characters that stay apart from their neighbours is
//! normalized; the rest is copied, and offsets of either can be told in the other.

use super::normalize::{append_normal, is_certainly_normal, is_easy, is_normal};
use crate::limits::NORMAL_FORM_CHANGES_MAX;

/// A place where text and normal form differ. Both sides start at a character that
/// does not combine with what precedes it, and end before one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Change {
    /// Where it starts and ends in the normal form, in bytes.
    normal: [usize; 2],
    /// The same in the text.
    raw: [usize; 2],
}

/// A normal form under way.
#[derive(Clone, Debug, Default)]
pub(super) struct NormalForm {
    text: String,
    /// Bytes of the stretch that are taken in.
    raw: usize,
    changes: Vec<Change>,
    /// Where changes are no longer noted, in bytes of the normal form.
    unknown_from: Option<usize>,
}

impl NormalForm {
    /// Of a beginning that is in normal form.
    pub(super) fn of(text: &str) -> Self {
        Self { text: text.to_owned(), raw: text.len(), ..Self::default() }
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Whether it differs from the text at all.
    pub(super) fn is_changed(&self) -> bool {
        !self.changes.is_empty() || self.unknown_from.is_some()
    }

    /// Takes in the next chunk of the text, which begins where one may
    /// ([`super::normalize::chunk_end`]).
    pub(super) fn append(&mut self, chunk: &str) {
        let mut rest = chunk;
        if is_normal(chunk) {
            return self.copy(chunk);
        }
        while let Some(hard) = rest.find(|character| !is_easy(character)) {
            let (easy, _) = rest.split_at(hard);
            // The character before may be the first of a composition.
            let start = easy.char_indices().next_back().map_or(0, |(at, _)| at);
            let (before, tail) = rest.split_at(start);
            let (first, others) = tail.split_at(hard - start);
            let end = first.len() + others.find(is_easy).unwrap_or(others.len());
            let (part, after) = tail.split_at(end);
            self.copy(before);
            self.normalize(part);
            rest = after;
        }
        self.copy(rest);
    }

    fn copy(&mut self, part: &str) {
        self.text.push_str(part);
        self.raw += part.len();
    }

    fn normalize(&mut self, part: &str) {
        if is_certainly_normal(part) {
            return self.copy(part);
        }
        let start = self.text.len();
        append_normal(part, &mut self.text);
        let raw = [self.raw, self.raw + part.len()];
        self.raw += part.len();
        if self.text.get(start..) == Some(part) {
            return;
        }
        if self.changes.len() < NORMAL_FORM_CHANGES_MAX {
            self.changes.push(Change { normal: [start, self.text.len()], raw });
        } else {
            self.unknown_from.get_or_insert(start);
        }
    }

    /// The last change that starts before `at`, a place in the normal form.
    fn before(&self, at: usize) -> Option<&Change> {
        let count = self.changes.partition_point(|change| change.normal[0] < at);
        self.changes.get(count.checked_sub(1)?)
    }

    /// Where a place in the normal form is in the text. `None` within a change, or
    /// where changes are not noted.
    pub(super) fn raw_at(&self, at: usize) -> Option<usize> {
        if self.unknown_from.is_some_and(|from| at > from) {
            return None;
        }
        match self.before(at) {
            None => Some(at),
            Some(Change { normal: [_, end], raw: [_, raw_end] }) => {
                at.checked_sub(*end).map(|behind| raw_end + behind)
            }
        }
    }

    /// The same, rounded up; all that is taken in where changes are not noted.
    pub(super) fn raw_to(&self, at: usize) -> usize {
        if self.unknown_from.is_some_and(|from| at > from) {
            return self.raw;
        }
        match self.before(at) {
            None => at,
            Some(Change { normal: [_, end], raw: [_, raw_end] }) => {
                raw_end + at.saturating_sub(*end)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn places_are_found_in_the_text() {
        // An e with an acute, three bytes, becomes one character of two.
        let mut form = NormalForm::of("ab");
        form.append("ce\u{301}d");
        assert_eq!((form.text(), form.is_changed()), ("abc\u{e9}d", true));
        let found: Vec<_> = (0..=6).map(|at| (form.raw_at(at), form.raw_to(at))).collect();
        let exact = |at: usize| (Some(at), at);
        assert_eq!(found, [exact(0), exact(1), exact(2), exact(3), (None, 6), exact(6), exact(7)]);
    }

    #[test]
    fn what_is_normal_is_no_change() {
        for text in ["", "abc", "x\u{301}y", "\u{e9}\u{4e00}", "\u{1100}\u{ff}"] {
            let mut form = NormalForm::default();
            form.append(text);
            assert_eq!((form.text(), form.is_changed()), (text, false));
        }
    }

    #[test]
    fn places_behind_too_many_changes_are_unknown() {
        let mut form = NormalForm::default();
        for _ in 0..=NORMAL_FORM_CHANGES_MAX {
            form.append("e\u{301}");
        }
        form.append("abc");
        let last = 2 * NORMAL_FORM_CHANGES_MAX;
        assert_eq!(form.raw_at(last), Some(3 * NORMAL_FORM_CHANGES_MAX));
        assert_eq!((form.raw_at(last + 1), form.raw_at(last + 4)), (None, None));
        assert_eq!(form.raw_to(last + 1), 3 * NORMAL_FORM_CHANGES_MAX + 6);
    }
}
