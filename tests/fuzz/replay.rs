//! What the fuzzing targets start from, and what they once found, without a
//! fuzzer: each input through its check.

#![cfg(test)]
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::string_slice,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a test binary: it panics to fail"
)]

#[path = "src/checks/mod.rs"]
mod checks;

/// The repository.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Goal: every seed passes its check, whole and cut in the middle, and every
/// target has some.
#[test]
fn seeds_pass() {
    for target in checks::TARGETS {
        let seeds = (target.seeds)();
        assert!(!seeds.is_empty(), "{}", target.name);
        for seed in seeds {
            (target.check)(&seed);
            (target.check)(&seed[..seed.len() / 2]);
        }
    }
}

/// Goal: what was found once stays mended. Every folder belongs to a target.
#[test]
fn regressions_pass() {
    let folder = std::path::Path::new(ROOT).join("tests/fuzz/regressions");
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if !entry.file_type().unwrap().is_dir() {
            continue;
        }
        let target = checks::TARGETS.iter().find(|target| target.name == name);
        let target = target.unwrap_or_else(|| panic!("no target is called {name}"));
        for input in std::fs::read_dir(entry.path()).unwrap() {
            let path = input.unwrap().path();
            println!("{}", path.display());
            (target.check)(&std::fs::read(path).unwrap());
        }
    }
}
