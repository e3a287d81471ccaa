//! `bench-core [--quick]`: the stages of the core, natively and in V8.
//!
//! What is measured is in the library, whose answers check themselves; here are
//! what it reads, the peer that knows the tokens, and the table.

mod corpus;
mod inputs;
#[expect(unreachable_pub, reason = "it is public where it is at home")]
#[path = "../../src/bench/rows.rs"]
#[allow(dead_code, reason = "of this file only what one program needs is used")]
mod rows;
mod sizing;
mod table;
#[expect(unreachable_pub, reason = "it is public where it is at home")]
#[path = "../../src/bench/corpus.rs"]
#[allow(dead_code, reason = "of this file only what one program needs is used")]
mod wide;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use warmpath_core_bench::{Clock, Figure, Run};

/// As the proxy host runs a module.
const V8_FLAGS: [&str; 2] = ["--no-liftoff", "--no-wasm-lazy-compilation"];

/// Stages that V8 runs. Those of growth and memory are of the machine that the
/// gateway has, and only there.
const STAGES: [&str; 7] =
    ["lookup", "lookup_large", "choice", "apply", "memory", "memory_naive", "growth"];

/// Stages that run natively, too, to compare answers and times.
const NATIVE: [&str; 3] = ["lookup", "choice", "apply"];

/// Why there is no table.
#[derive(Debug)]
enum BenchError {
    /// Something could not be read, written or started.
    Io(String),
    /// A stage ended early: an answer was wrong.
    Stage(String),
    /// The two targets answer differently.
    Differs(String),
}

impl std::fmt::Display for BenchError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(what) => write!(out, "{what}"),
            Self::Stage(what) => write!(out, "stage {what} failed"),
            Self::Differs(what) => write!(out, "{what} differs between native and V8"),
        }
    }
}

impl std::error::Error for BenchError {}

/// Names a failed operation on a path.
fn at(path: &Path) -> impl FnOnce(std::io::Error) -> BenchError + use<'_> {
    move |error| BenchError::Io(format!("{}: {error}", path.display()))
}

struct Elapsed(Instant);

impl Clock for Elapsed {
    fn now_ns(&self) -> f64 {
        self.0.elapsed().as_secs_f64() * 1e9
    }
}

/// All figures by name, of both targets.
#[derive(Default)]
struct Figures {
    v8: BTreeMap<String, Figure>,
    native: BTreeMap<String, Figure>,
}

impl Figures {
    /// Where both targets have an answer it is the same.
    fn check(&self) -> Result<(), BenchError> {
        let both = self.native.iter().filter_map(|(name, it)| Some((name, it, self.v8.get(name)?)));
        for (name, native, v8) in both {
            if native.answer != v8.answer {
                return Err(BenchError::Differs(name.clone()));
            }
        }
        Ok(())
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn main() -> ExitCode {
    let quick = match std::env::args().nth(1).as_deref() {
        None => false,
        Some("--quick") => true,
        Some(_) => return fail(&"usage: bench-core [--quick]"),
    };
    match run(quick) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    // Nobody to tell if standard error is closed.
    let _shown = writeln!(std::io::stderr(), "bench-core: {error}");
    ExitCode::FAILURE
}

/// Measures everything, prints the table and writes it.
fn run(quick: bool) -> Result<(), BenchError> {
    let module = root().join("target/wasm/wasm-target/wasm/warmpath_core_bench.wasm");
    let mut figures = Figures::default();
    let none = BTreeMap::new();
    for stage in STAGES {
        take(&mut figures.v8, "", in_v8(&module, stage, quick, Path::new("."), &[])?);
        if NATIVE.contains(&stage) {
            take(&mut figures.native, "", natively(stage, quick, &none)?);
        }
    }
    let texts = inputs::texts()?;
    for family in inputs::FAMILIES {
        let folder = inputs::prepare(family, &texts)?;
        let label = format!("_{}", family.name);
        take(&mut figures.v8, &label, in_v8(&module, "text", quick, &folder, &inputs::FILES)?);
        if !quick {
            let read = |name: &&str| {
                let path = folder.join(name);
                Ok(((*name).to_owned(), std::fs::read(&path).map_err(at(&path))?))
            };
            let files = inputs::FILES.iter().map(read).collect::<Result<_, BenchError>>()?;
            take(&mut figures.native, &label, natively("text", quick, &files)?);
        }
    }
    figures.check()?;
    table::write(&figures)?;
    sizing::write(&figures.v8)
}

fn take(all: &mut BTreeMap<String, Figure>, label: &str, figures: Vec<Figure>) {
    all.extend(figures.into_iter().map(|it| (format!("{}{label}", it.name), it)));
}

fn natively(
    stage: &str,
    quick: bool,
    inputs: &BTreeMap<String, Vec<u8>>,
) -> Result<Vec<Figure>, BenchError> {
    let clock = Elapsed(Instant::now());
    warmpath_core_bench::run(stage, &Run { quick, inputs, clock: &clock })
        .ok_or_else(|| BenchError::Stage(stage.to_owned()))
}

fn in_v8(
    module: &Path,
    stage: &str,
    quick: bool,
    folder: &Path,
    inputs: &[&str],
) -> Result<Vec<Figure>, BenchError> {
    let driver = Path::new(env!("CARGO_MANIFEST_DIR")).join("drive.mjs");
    let node = Path::new("node");
    let output = Command::new(node)
        .args(V8_FLAGS)
        .args([driver.as_path(), module])
        .args([stage, if quick { "1" } else { "0" }])
        .arg(folder)
        .args(inputs)
        .stderr(std::process::Stdio::inherit())
        .output()
        .map_err(at(node))?;
    let figures = output.status.success().then(|| serde_json::from_slice(&output.stdout).ok());
    figures.flatten().ok_or_else(|| BenchError::Stage(format!("{stage} in V8")))
}
