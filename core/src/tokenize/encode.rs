//! The stages of encoding one text, resumable between any two steps.
//!
//! find an added token -> normalize what precedes it -> find an added token in
//! the normal form -> cut that into pre-tokens -> ids. Each stage does a
//! bounded amount at a time, so that a long prompt can be spread over ticks.

use super::added::{self, FirstBytes, Match, Searched};
use super::ascii::AsciiSplit;
use super::file::{FLAG_NFC, Kind, Layout, Tables, Trie};
use super::normal_form::NormalForm;
use super::words::{self, BATCH, LOW_LINE, Words};
use super::{EncodeError, normalize, split};
use crate::ids::TokenId;
use crate::limits::{TOKENIZE_STEPS_PER_BYTE_MAX, TOKENIZE_TEXT_BYTES_MAX, TOKENIZE_TOKENS_MAX};

/// Bytes that one step searches for added tokens.
const SEARCH_BYTES: usize = 16 * 1024;
/// Searching costs an eighth of splitting and merging, per byte; normalizing a
/// quarter. Budgets count bytes that are split and merged.
const SEARCH_SHARE: u64 = 8;
const NORMALIZE_SHARE: u64 = 4;

/// How far the encoding of one text has come. Belongs to one text and one
/// tokenizer; start with `Progress::default()`.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Length of the text, to notice when another one is passed. `None` before
    /// the first slice.
    pub(super) text_bytes: Option<usize>,
    pub(super) stage: Stage,
    /// Work done, in bytes looked at.
    steps: u64,
    /// Tokens appended.
    pub(super) tokens: usize,
    /// Up to here the raw text was looked at to cut it, as far as the pieces
    /// know.
    pub(super) seen: usize,
    /// Whether the end of the inner stretch had a part in cutting it.
    pub(super) seen_end: bool,
    /// The stretch of raw text that is worked on, and the token that ends it.
    pub(super) raw: Stretch,
    /// Raw text up to here is normalized.
    normalized_to: usize,
    /// The normal form of the stretch, if it differs from the stretch.
    pub(super) normal: Option<NormalForm>,
    /// The stretch between two added tokens of the normal form.
    pub(super) inner: Stretch,
}

/// Text between two added tokens.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stretch {
    /// Where what is left of it starts.
    pub(super) start: usize,
    /// Up to here it holds no added token.
    searched: usize,
    /// Where it ends, once that is known.
    pub(super) end: usize,
    /// The added token that follows.
    pub(super) next: Option<Match>,
}

impl Stretch {
    /// Starts over behind the added token.
    pub(super) fn restart(&mut self, at: usize) {
        *self = Self { start: at, searched: at, end: at, next: None };
    }

    /// Takes in the result of a search; whether the end is known by now.
    fn take(&mut self, searched: &Searched, text_end: usize) -> bool {
        self.searched = searched.until;
        self.next = searched.found;
        self.end = searched.until;
        searched.found.is_some() || searched.until >= text_end
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Stage {
    #[default]
    FindAdded,
    Normalize,
    FindNormalAdded,
    Pieces,
    Done,
}

/// A loaded tokenizer file and its caches.
pub(crate) struct Engine {
    pub(super) file: super::AlignedBytes,
    pub(super) layout: Layout,
    pub(super) added_first: FirstBytes,
    pub(super) normal_added_first: FirstBytes,
    ascii: AsciiSplit,
    words: Words,
    /// A word with spaces for [`LOW_LINE`]s.
    spaced: String,
}

impl Engine {
    /// Takes a file whose layout was checked.
    pub(crate) fn new(file: super::AlignedBytes, layout: Layout) -> Option<Self> {
        let tables = layout.tables(file.as_bytes())?;
        let added_first = added::first_bytes(tables.added);
        let normal_added_first = added::first_bytes(tables.normal_added);
        let ascii = AsciiSplit::new(&tables);
        let words = Words::new(&tables, layout.kind);
        let spaced = String::new();
        Some(Self { file, layout, added_first, normal_added_first, ascii, words, spaced })
    }

    /// Bytes of memory held.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.file.len()
            + self.ascii.memory_bytes()
            + self.words.memory_bytes()
            + self.spaced.capacity()
            + size_of::<FirstBytes>() * 2
    }

    /// See [`super::Tokenizer::encode_slice`].
    pub(crate) fn encode_slice(
        &mut self,
        text: &str,
        progress: &mut Progress,
        bytes_budget: usize,
        out: &mut Vec<TokenId>,
    ) -> Result<bool, EncodeError> {
        let tables = self.layout.tables(self.file.as_bytes()).ok_or(EncodeError::Broken)?;
        let mut run = Run {
            tables: &tables,
            kind: self.layout.kind,
            nfc: self.layout.flags & FLAG_NFC != 0,
            added_first: &self.added_first,
            normal_added_first: &self.normal_added_first,
            ascii: &self.ascii,
            words: &mut self.words,
            spaced: &mut self.spaced,
            text,
            steps_max: (text.len() as u64 + 1024).saturating_mul(TOKENIZE_STEPS_PER_BYTE_MAX),
            out,
        };
        progress.begin(text)?;
        let pause_at = progress.steps.saturating_add(bytes_budget as u64);
        loop {
            run.step(progress, pause_at)?;
            if progress.stage == Stage::Done {
                return Ok(true);
            }
            if progress.steps >= pause_at {
                return Ok(false);
            }
        }
    }
}

impl Progress {
    fn begin(&mut self, text: &str) -> Result<(), EncodeError> {
        if text.len() > TOKENIZE_TEXT_BYTES_MAX {
            return Err(EncodeError::TextTooLong);
        }
        match self.text_bytes {
            Some(bytes) if bytes != text.len() => Err(EncodeError::OtherText),
            _ => {
                self.text_bytes = Some(text.len());
                Ok(())
            }
        }
    }

    /// The stretch that pre-tokens are cut from.
    fn stretch<'a>(&'a self, text: &'a str) -> Result<&'a str, EncodeError> {
        match &self.normal {
            Some(normal) => Ok(normal.text()),
            None => text.get(self.raw.start..self.raw.end).ok_or(EncodeError::OtherText),
        }
    }
}

/// What cutting pieces took.
struct Cut {
    /// Bytes looked at.
    steps: u64,
    /// Up to here the text had a part in the cuts; one more than there is if its
    /// end had.
    seen: usize,
}

/// One slice of the encoding of one text.
struct Run<'a> {
    tables: &'a Tables<'a>,
    kind: Kind,
    nfc: bool,
    added_first: &'a FirstBytes,
    normal_added_first: &'a FirstBytes,
    ascii: &'a AsciiSplit,
    words: &'a mut Words,
    spaced: &'a mut String,
    text: &'a str,
    steps_max: u64,
    out: &'a mut Vec<TokenId>,
}

impl Run<'_> {
    fn step(&mut self, progress: &mut Progress, pause_at: u64) -> Result<(), EncodeError> {
        match progress.stage {
            Stage::FindAdded => self.find_added(progress),
            Stage::Normalize => self.normalize(progress)?,
            Stage::FindNormalAdded => self.find_normal_added(progress)?,
            Stage::Pieces => self.pieces(progress, pause_at)?,
            Stage::Done => {}
        }
        if progress.steps > self.steps_max {
            return Err(EncodeError::TooMuchWork);
        }
        Ok(())
    }

    fn find_added(&mut self, progress: &mut Progress) {
        let text = self.text.as_bytes();
        let found = search(self.tables.added, self.added_first, text, progress.raw.searched);
        progress.steps += found.steps as u64 / SEARCH_SHARE + 1;
        if progress.raw.take(&found, text.len()) {
            progress.normalized_to = progress.raw.start;
            progress.normal = None;
            progress.inner.restart(0);
            progress.stage = if self.nfc { Stage::Normalize } else { Stage::FindNormalAdded };
        }
    }

    fn normalize(&mut self, progress: &mut Progress) -> Result<(), EncodeError> {
        let (start, end) = (progress.raw.start, progress.raw.end);
        let from = progress.normalized_to;
        let text = self.text.get(..end).ok_or(EncodeError::OtherText)?;
        let to = normalize::chunk_end(text, from).ok_or(EncodeError::PretokenTooLong)?;
        let chunk = text.get(from..to).ok_or(EncodeError::OtherText)?;
        if let Some(normal) = &mut progress.normal {
            normal.append(chunk);
        } else if !normalize::is_normal(chunk) {
            let before = text.get(start..from).ok_or(EncodeError::OtherText)?;
            let mut normal = NormalForm::of(before);
            normal.append(chunk);
            // It may have been normal after all.
            progress.normal = normal.is_changed().then_some(normal);
        }
        progress.steps += chunk.len() as u64 / NORMALIZE_SHARE + 1;
        progress.normalized_to = to;
        if to >= end {
            progress.stage = Stage::FindNormalAdded;
        }
        Ok(())
    }

    fn find_normal_added(&mut self, progress: &mut Progress) -> Result<(), EncodeError> {
        let stretch = progress.stretch(self.text)?.as_bytes();
        let searched = progress.inner.searched;
        let found = search(self.tables.normal_added, self.normal_added_first, stretch, searched);
        let stretch_len = stretch.len();
        progress.steps += found.steps as u64 / SEARCH_SHARE + 1;
        if progress.inner.take(&found, stretch_len) {
            progress.stage = Stage::Pieces;
        }
        Ok(())
    }

    /// Pieces up to the next added token of the normal form, or to the pause.
    fn pieces(&mut self, progress: &mut Progress, pause_at: u64) -> Result<(), EncodeError> {
        let (mut at, end) = (progress.inner.start, progress.inner.end);
        let (mut steps, before) = (progress.steps, self.out.len());
        let (mut seen, mut seen_end) = (0, progress.seen_end);
        let stretch = progress.stretch(self.text)?;
        let stretch_len = stretch.len();
        let part = stretch.get(..end).ok_or(EncodeError::OtherText)?;
        let tokens_max = TOKENIZE_TOKENS_MAX.saturating_sub(progress.tokens);
        while at < end && self.out.len() - before <= tokens_max {
            let mut cut = Cut { steps: 0, seen: 0 };
            let to = match self.kind {
                Kind::SentencePiece => self.seam_piece(part, at, &mut cut)?,
                Kind::ByteLevel | Kind::Json => {
                    self.split_pieces(part, at, steps, pause_at, &mut cut)?
                }
            };
            at = to;
            steps += cut.steps;
            if cut.seen > end {
                seen_end = true;
            } else {
                seen = seen.max(cut.seen);
            }
            if steps >= pause_at || steps > self.steps_max {
                break;
            }
        }
        let seen = progress.normal.as_ref().map_or(seen, |normal| normal.raw_to(seen));
        progress.seen = progress.seen.max(progress.raw.start + seen);
        progress.seen_end = seen_end;
        progress.inner.start = at;
        progress.steps = steps;
        if at >= end {
            self.after_pieces(progress, stretch_len);
        }
        self.count(progress, before)
    }

    /// Encodes pre-tokens from `at` on, some at a time: where the last one ends.
    fn split_pieces(
        &mut self,
        part: &str,
        at: usize,
        steps: u64,
        pause_at: u64,
        cut: &mut Cut,
    ) -> Result<usize, EncodeError> {
        let bytes = part.as_bytes();
        let mut ends = [0; BATCH];
        let (mut count, mut to) = (0, at);
        for end in &mut ends {
            let piece = match self.ascii.next_piece(bytes, to) {
                Some(piece) => piece,
                None => {
                    let left = self.steps_max.saturating_sub(steps + cut.steps);
                    split::next_piece(self.tables, bytes, to, left)?
                }
            };
            cut.steps += piece.steps;
            // One beyond the part means its end; other pieces only add to it.
            cut.seen = cut.seen.max(piece.seen);
            (*end, to) = (piece.end, piece.end);
            count += 1;
            let steps = steps + cut.steps;
            if to >= bytes.len() || steps >= pause_at || steps > self.steps_max {
                break;
            }
        }
        let ends = ends.get(..count).unwrap_or_default();
        let encoded = self.words.encode(self.tables, self.kind, part, at, ends, self.out);
        encoded.map(|()| to).ok_or(EncodeError::Broken)
    }

    /// Encodes the word at `at` of a SentencePiece text: where it ends.
    fn seam_piece(&mut self, part: &str, at: usize, cut: &mut Cut) -> Result<usize, EncodeError> {
        let tail = part.get(at..).ok_or(EncodeError::Broken)?;
        let word = words::seam_word(self.tables, tail).ok_or(EncodeError::PretokenTooLong)?;
        let end = at + word.end;
        let encoded = if word.low_line {
            let text = part.get(at..end).ok_or(EncodeError::Broken)?;
            self.spaced.clear();
            self.spaced.extend(text.chars().map(|c| if c == LOW_LINE { ' ' } else { c }));
            let ends = [self.spaced.len()];
            self.words.encode(self.tables, self.kind, self.spaced, 0, &ends, self.out)
        } else {
            self.words.encode(self.tables, self.kind, part, at, &[end], self.out)
        };
        encoded.ok_or(EncodeError::Broken)?;
        let next = part.get(end..).and_then(|rest| rest.chars().next());
        *cut = Cut { steps: word.end as u64, seen: end + next.map_or(1, char::len_utf8) };
        Ok(end)
    }

    /// Appends the added token behind the pieces and decides what comes next.
    fn after_pieces(&mut self, progress: &mut Progress, stretch_len: usize) {
        progress.seen_end = false;
        if let Some(next) = progress.inner.next {
            self.out.push(next.token);
            progress.inner.restart(next.end);
            if next.end < stretch_len {
                progress.stage = Stage::FindNormalAdded;
                return;
            }
        }
        let raw_end = progress.raw.end;
        let next_start = match progress.raw.next {
            Some(next) => {
                self.out.push(next.token);
                next.end
            }
            None => {
                // The end of the text had a part in the last tokens.
                progress.seen = usize::MAX;
                raw_end
            }
        };
        progress.raw.restart(next_start);
        progress.normal = None;
        progress.stage = if next_start >= self.text.len() { Stage::Done } else { Stage::FindAdded };
    }

    /// Counts the tokens appended since `before`.
    fn count(&self, progress: &mut Progress, before: usize) -> Result<(), EncodeError> {
        progress.tokens += self.out.len() - before;
        if progress.tokens > TOKENIZE_TOKENS_MAX {
            return Err(EncodeError::TooManyTokens);
        }
        Ok(())
    }
}

/// One bounded search; none at all if there are no added tokens.
fn search(trie: Trie<'_>, first: &FirstBytes, text: &[u8], from: usize) -> Searched {
    if trie.edges.is_empty() {
        return Searched { found: None, until: text.len(), steps: 0 };
    }
    added::search(trie, first, text, from, from.saturating_add(SEARCH_BYTES))
}
