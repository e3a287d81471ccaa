//! Corpus: texts to read. Ordinary ones are made of this repository's own files,
//! which nobody else's word cache has been tuned for; odd ones are drawn.

use std::fmt::Write as _;
use std::path::Path;

use warmpath_core::choose::Random;
use warmpath_core::limits::PRETOKEN_BYTES_MAX;

use super::{BenchError, at, root, wide};

/// Sizes and numbers of the ordinary texts.
pub(super) const ORDINARY: [(&str, usize, usize); 2] =
    [("8k", 8 * 1024, 24), ("128k", 128 * 1024, 4)];

/// Sizes and numbers of the wide texts: of many languages, prose, code and
/// numbers, as the gateway's benchmark reads them.
const WIDE: [(&str, usize, usize); 2] = [("wide_8k", 8 * 1024, 24), ("wide_128k", 128 * 1024, 4)];

const ODD_BYTES: usize = 128 * 1024;

/// Paragraphs of the repository's files, in a fixed disorder, no two alike.
fn paragraphs() -> Result<Vec<String>, BenchError> {
    let root = root();
    let mut files = Vec::new();
    for folder in ["core/src", "control-sidecar/src", "tests/src", "filter/src"] {
        list(&root.join(folder), &mut files)?;
    }
    files.sort();
    files.extend(["README.md", "ARCHITECTURE.md"].map(|name| root.join(name)));
    let mut all = Vec::new();
    for path in files {
        let text = std::fs::read_to_string(&path).map_err(at(&path))?;
        all.extend(text.split("\n\n").filter(|part| part.len() > 40).map(str::to_owned));
    }
    let path = root.join("tests/golden/tokenizers/texts.json");
    let golden = std::fs::read(&path).map_err(at(&path))?;
    // Ours, so it can be read.
    all.extend(serde_json::from_slice::<Vec<String>>(&golden).unwrap_or_default());
    all.sort();
    all.dedup();
    let mut random = Random::seeded(11);
    for at in (1..all.len()).rev() {
        all.swap(at, below(&mut random, at + 1));
    }
    Ok(all)
}

fn list(folder: &Path, files: &mut Vec<std::path::PathBuf>) -> Result<(), BenchError> {
    for entry in std::fs::read_dir(folder).map_err(at(folder))? {
        let path = entry.map_err(at(folder))?.path();
        if path.is_dir() {
            list(&path, files)?;
        } else if path.extension().is_some_and(|it| it == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn below(random: &mut Random, bound: usize) -> usize {
    random.below(u32::try_from(bound).unwrap_or(u32::MAX)) as usize
}

/// A word that no file has: letters, sometimes digits or accents.
fn coined(random: &mut Random) -> String {
    const LETTERS: [char; 12] = ['a', 'e', 'i', 'o', 'n', 'r', 't', 's', 'k', 'm', 'é', 'ß'];
    let len = 3 + random.below(8);
    (0..len).filter_map(|_| LETTERS.get(random.below(12) as usize)).collect()
}

/// The ordinary texts, by group. No paragraph is in two texts of a group.
pub(super) fn ordinary() -> Result<Vec<(String, String)>, BenchError> {
    let paragraphs = paragraphs()?;
    let mut random = Random::seeded(12);
    let mut texts = Vec::new();
    for (group, bytes, count) in ORDINARY {
        let mut rest = paragraphs.iter().cycle();
        for _ in 0..count {
            let mut text = String::new();
            while text.len() < bytes {
                text.push_str(rest.next().map_or("nothing", String::as_str));
                let _ = writeln!(text, "\n{} {}\n", coined(&mut random), random.below(100_000));
            }
            let mut end = bytes;
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            text.truncate(end);
            texts.push((group.to_owned(), text));
        }
    }
    Ok(texts)
}

/// The wide texts, by group. Nothing comes twice in them.
pub(super) fn wide() -> Result<Vec<(String, String)>, BenchError> {
    let unread = |error: wide::CorpusError| BenchError::Io(error.to_string());
    let mut corpus = wide::Corpus::load(&root(), 14).map_err(unread)?;
    let mut texts = Vec::new();
    for (group, bytes, count) in WIDE {
        for _ in 0..count {
            texts.push((group.to_owned(), corpus.text(bytes).map_err(unread)?));
        }
    }
    Ok(texts)
}

/// The odd texts, each of its own group: what makes tokenizers slow.
pub(super) fn odd() -> Vec<(String, String)> {
    let mut random = Random::seeded(13);
    let mut drawn = |from: &str| {
        let all: Vec<char> = from.chars().collect();
        let mut text = String::new();
        while text.len() < ODD_BYTES {
            text.extend(all.get(below(&mut random, all.len())));
        }
        text
    };
    let lower = "abcdefghijklmnopqrstuvwxyz";
    let base64 = format!("{lower}{}0123456789+/", lower.to_uppercase());
    let letters = drawn(lower);
    let ideographs: String = ('\u{4e00}'..'\u{9fa0}').collect();
    let emoji = ["👩\u{200d}👩\u{200d}👧\u{200d}👦", "🏳\u{fe0f}\u{200d}🌈", "👍🏽", "🇩🇪"];
    let marks: String = ('\u{300}'..'\u{340}').collect();
    let combining = drawn(&marks);
    let marked: String =
        combining.chars().zip(lower.chars().cycle()).flat_map(|(mark, c)| [c, mark]).collect();
    // The longest pieces that are still merged.
    let piece = letters.get(..PRETOKEN_BYTES_MAX - 2).unwrap_or_default();
    let pieces = format!("{piece}\n").repeat(ODD_BYTES / PRETOKEN_BYTES_MAX);
    let shorter = letters.get(..4_000).unwrap_or_default();
    let texts = [
        ("a", "a".repeat(ODD_BYTES)),
        ("spaces", " ".repeat(ODD_BYTES)),
        ("newlines", "\n".repeat(ODD_BYTES)),
        ("letters", letters.clone()),
        ("base64", drawn(&base64)),
        ("digits", drawn("0123456789")),
        ("punctuation", drawn("!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~")),
        ("ideographs", drawn(&ideographs)),
        ("emoji", emoji.concat().repeat(ODD_BYTES / emoji.concat().len())),
        ("marks", marked.chars().take(ODD_BYTES / 2).collect()),
        ("pieces_16k", pieces),
        ("pieces_4k", format!("{shorter} ").repeat(ODD_BYTES / 4_001)),
    ];
    texts.into_iter().map(|(name, text)| (name.to_owned(), text)).collect()
}
