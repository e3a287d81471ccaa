//! Options: the flags of `warmpath-run`, and where its parts are found.

use std::path::{Path, PathBuf};

/// What `warmpath-run --help` prints.
pub const USAGE: &str = "\
warmpath-run: Envoy with Warmpath, the sidecar and three simulated engines

  warmpath-run demo          a short conversation, then stays up until Ctrl-C
  warmpath-run smoke         the same, bounded and asserting
  warmpath-run fleet         engines that come, go, die and trade places under load
  warmpath-run bookings      bookings under races, faults and crashes, in order and to the end
  warmpath-run replicas      two gateways of the same engines, with replica sync and without
  warmpath-run secure        who may feed the gateway, old frames, what is left of a request
  warmpath-run spoof         clients that name a host of their choosing, in every mode and failure
  warmpath-run ext-proc      the endpoint picker beside the module: the same decisions
  warmpath-run dynamo        real Dynamo workers and frontends instead of simulated engines
  warmpath-run baseline      engines behind plain Envoy, round robin: no module, no sidecar

  --model-dir DIR            model [.cache/models/qwen3, else tests/models/tiny]
  --wasm FILE                module [target/warmpath.wasm]
  --bin-dir DIR              engine-sim and warmpath-sidecar [beside this program]
  --port N                   gateway's port for demo [10000 if free]
  --seed N                   of the requests [1]
  --streams N                of bookings under faults [100000]
  --python FILE              Python that has Dynamo, for dynamo [.cache/dynamo/bin/python]
  --case NAME                only this case of bookings (atomic, chaos, crash), secure (strangers,
                             socket, replay, canary) or dynamo; may be repeated

  ENVOY (environment)        Envoy to run [.venv/bin/envoy, else envoy on the PATH]
";

/// Streams of the bookings run, unless the user says otherwise.
const STREAMS: u64 = 100_000;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Show a conversation and stay up.
    Demo,
    /// Check everything and end.
    Smoke,
    /// Measure the sequence without Warmpath.
    Baseline,
    /// Check what happens when workers come and go.
    Fleet,
    /// Check that bookings are atomic and all end.
    Bookings,
    /// Check whether two gateways agree.
    Replicas,
    /// Check who may feed the gateway, and what is left of a request.
    Secure,
    /// Check that clients cannot choose a host.
    Spoof,
    /// Check that the endpoint picker decides as the module does.
    ExtProc,
    /// Check the interplay with real Dynamo.
    Dynamo,
}

/// All options, resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// What to do.
    pub command: Command,
    /// Model directory.
    pub model_dir: PathBuf,
    /// Whether the small committed model stands in for a real one.
    pub model_is_tiny: bool,
    /// The module.
    pub wasm: PathBuf,
    /// Folder of `engine-sim` and `warmpath-sidecar`.
    pub bin_dir: PathBuf,
    /// Envoy.
    pub envoy: PathBuf,
    /// The repository, for templates.
    pub root: PathBuf,
    /// Gateway's port, if the user chose one.
    pub port: Option<u16>,
    /// Seed of the requests.
    pub seed: u64,
    /// Streams that the bookings run puts through all faults.
    pub streams: u64,
    /// Python that has Dynamo.
    pub python: PathBuf,
    /// Cases of the runs that have several; empty for all.
    pub cases: Vec<String>,
}

/// Why there is nothing to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionsError {
    /// `--help` was asked for.
    Help,
    /// Not a known word, or a value missing or wrong; the word.
    Bad(String),
    /// A part is not there; what and where it was sought.
    Missing(&'static str, PathBuf),
}

impl std::fmt::Display for OptionsError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Help => write!(formatter, "{USAGE}"),
            Self::Bad(word) => write!(formatter, "bad argument {word}; try --help"),
            Self::Missing(what, path) => write!(formatter, "no {what} at {}", path.display()),
        }
    }
}

impl std::error::Error for OptionsError {}

impl Options {
    /// Parses command line arguments and looks for the parts.
    ///
    /// # Errors
    ///
    /// [`OptionsError`], for the person at the terminal.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, OptionsError> {
        let root = repository();
        let mut command = None;
        let (mut model_dir, mut wasm, mut bin_dir) = (None, None, None);
        let (mut port, mut seed) = (None, 1);
        let mut streams = STREAMS;
        let (mut python, mut cases) = (None, Vec::new());
        let mut arguments = arguments.into_iter();
        while let Some(word) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| OptionsError::Bad(word.clone()));
            match word.as_str() {
                "--help" => return Err(OptionsError::Help),
                "demo" => command = Some(Command::Demo),
                "smoke" => command = Some(Command::Smoke),
                "baseline" => command = Some(Command::Baseline),
                "fleet" => command = Some(Command::Fleet),
                "bookings" => command = Some(Command::Bookings),
                "replicas" => command = Some(Command::Replicas),
                "secure" => command = Some(Command::Secure),
                "spoof" => command = Some(Command::Spoof),
                "ext-proc" => command = Some(Command::ExtProc),
                "dynamo" => command = Some(Command::Dynamo),
                "--model-dir" => model_dir = Some(PathBuf::from(value()?)),
                "--wasm" => wasm = Some(PathBuf::from(value()?)),
                "--bin-dir" => bin_dir = Some(PathBuf::from(value()?)),
                "--streams" => streams = number(&word, &value()?)?,
                "--port" => port = Some(number(&word, &value()?)?),
                "--seed" => seed = number(&word, &value()?)?,
                "--python" => python = Some(PathBuf::from(value()?)),
                "--case" => cases.push(value()?),
                _ => return Err(OptionsError::Bad(word)),
            }
        }
        let command = command.ok_or(OptionsError::Help)?;
        let tiny = root.join("tests/models/tiny");
        let model_dir = model_dir.unwrap_or_else(|| {
            let real = root.join(".cache/models/qwen3");
            if real.join("tokenizer.json").exists() { real } else { tiny.clone() }
        });
        let beside = std::env::current_exe().ok();
        let beside = beside.as_deref().and_then(Path::parent).map(Path::to_path_buf);
        let options = Self {
            command,
            model_is_tiny: model_dir == tiny,
            model_dir: absolute(model_dir),
            wasm: absolute(wasm.unwrap_or_else(|| root.join("target/warmpath.wasm"))),
            bin_dir: absolute(bin_dir.or(beside).unwrap_or_default()),
            envoy: envoy(&root),
            python: absolute(python.unwrap_or_else(|| root.join(".cache/dynamo/bin/python"))),
            root,
            port,
            seed,
            streams,
            cases,
        };
        options.check()?;
        Ok(options)
    }

    /// A program that was built with this one.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin_dir.join(name)
    }

    /// A file of `envoy-config/`.
    #[must_use]
    pub fn envoy_config(&self, name: &str) -> PathBuf {
        self.root.join("envoy-config").join(name)
    }

    fn check(&self) -> Result<(), OptionsError> {
        let mut parts = vec![
            ("model", self.model_dir.join("tokenizer.json")),
            ("engine simulator", self.program("engine-sim")),
            ("Envoy (make setup installs it)", self.envoy.clone()),
        ];
        if self.command != Command::Baseline {
            parts.push(("module (make wasm builds it)", self.wasm.clone()));
            parts.push(("sidecar", self.program("warmpath-sidecar")));
        }
        if matches!(self.command, Command::Bookings | Command::Spoof) {
            let hooks = self.wasm.with_file_name("warmpath-hooks.wasm");
            parts.push(("module with hooks (make test-bookings builds it)", hooks));
        }
        if self.command == Command::Dynamo {
            parts.push(("Python with Dynamo (make test-dynamo installs it)", self.python.clone()));
        }
        match parts.into_iter().find(|(_, path)| !path.exists()) {
            Some((what, path)) => Err(OptionsError::Missing(what, path)),
            None => Ok(()),
        }
    }
}

fn number<N: std::str::FromStr>(word: &str, text: &str) -> Result<N, OptionsError> {
    text.parse().map_err(|_| OptionsError::Bad(word.into()))
}

/// The repository: the nearest folder above the current one that has the
/// bootstrap, else where this program was built.
fn repository() -> PathBuf {
    let here = std::env::current_dir().unwrap_or_default();
    let found = here.ancestors().find(|folder| folder.join("envoy-config/envoy.yaml").exists());
    match found {
        Some(folder) => folder.to_path_buf(),
        None => absolute(Path::new(env!("CARGO_MANIFEST_DIR")).join("..")),
    }
}

/// Links are kept: the program in a venv finds its package by its own path.
fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

fn envoy(root: &Path) -> PathBuf {
    if let Some(named) = std::env::var_os("ENVOY") {
        return absolute(named.into());
    }
    let local = root.join(".venv/bin/envoy");
    if local.exists() {
        return local;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join("envoy"));
    found.into_iter().find(|program| program.exists()).unwrap_or(local)
}
