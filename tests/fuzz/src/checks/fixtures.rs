//! Fixtures: the repository's captures and golden files, as seeds.

use std::path::PathBuf;

use serde_json::Value;

/// Shortest hexadecimal string of a capture that is taken for bytes, in digits.
const HEX_DIGITS_MIN: usize = 6;

/// A file of the repository.
pub(super) fn read(path: &str) -> Vec<u8> {
    let path = PathBuf::from(super::ROOT).join(path);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A text of the repository.
pub(super) fn text(path: &str) -> String {
    String::from_utf8(read(path)).expect("UTF-8")
}

/// A JSON file of the repository.
pub(super) fn json(path: &str) -> Value {
    serde_json::from_slice(&read(path)).expect("JSON")
}

/// The bytes in every capture of a folder: each string that is hexadecimal.
pub(super) fn captured(folder: &str) -> Vec<Vec<u8>> {
    let path = PathBuf::from(super::ROOT).join(folder);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    files.sort();
    let mut found = Vec::new();
    for file in files {
        let capture = std::fs::read(&file).expect("a file");
        collect(&serde_json::from_slice(&capture).expect("JSON"), &mut found);
    }
    found.sort();
    found.dedup();
    found
}

fn collect(value: &Value, found: &mut Vec<Vec<u8>>) {
    match value {
        Value::String(text) => found.extend(hex(text)),
        Value::Array(items) => items.iter().for_each(|item| collect(item, found)),
        Value::Object(members) => members.values().for_each(|member| collect(member, found)),
        _ => {}
    }
}

fn hex(text: &str) -> Option<Vec<u8>> {
    if text.len() < HEX_DIGITS_MIN || !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

/// `head` before each of `inputs`.
pub(super) fn behind(head: &[u8], inputs: &[Vec<u8>]) -> Vec<Vec<u8>> {
    inputs.iter().map(|input| [head, input].concat()).collect()
}
