//! The fuzzing program: libFuzzer with one target of `checks`, named by the
//! variable `WARMPATH_FUZZ_TARGET`. One program for all targets: linking it takes
//! longer than any of them.
//!
//! With `WARMPATH_FUZZ_SEEDS=FOLDER` it writes the seeds of every target as
//! `FOLDER/TARGET/seed-NNNN` instead, and prints the targets' names, one a line.

#![no_main]

mod checks;

use std::path::Path;
use std::sync::OnceLock;

/// The repository.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// The variables that say what to do.
const TARGET: &str = "WARMPATH_FUZZ_TARGET";
const SEEDS: &str = "WARMPATH_FUZZ_SEEDS";

static CHECK: OnceLock<fn(&[u8])> = OnceLock::new();

libfuzzer_sys::fuzz_target!(
    init: start(),
    |data: &[u8]| if let Some(check) = CHECK.get() { check(data) }
);

fn start() {
    if let Some(folder) = std::env::var_os(SEEDS) {
        write_seeds(Path::new(&folder)).expect("seeds are written");
        std::process::exit(0);
    }
    let name = std::env::var(TARGET).unwrap_or_default();
    let target = checks::TARGETS.iter().find(|target| target.name == name);
    let target = target.unwrap_or_else(|| panic!("{TARGET} names no target: {name:?}"));
    CHECK.get_or_init(|| target.check);
}

fn write_seeds(folder: &Path) -> std::io::Result<()> {
    for target in checks::TARGETS {
        let corpus = folder.join(target.name);
        std::fs::create_dir_all(&corpus)?;
        for (at, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(corpus.join(format!("seed-{at:04}")), seed)?;
        }
        println!("{}", target.name);
    }
    Ok(())
}
