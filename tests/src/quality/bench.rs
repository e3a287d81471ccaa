//! Bench: all routers through all traces, a table each, and a file of results.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::engines::{BLOCK_SIZE, ENGINES};
use super::figures::Figures;
use super::live::{self, Run};
use super::offline;
use super::policies::Policy;
use super::rivals::Rival;
use super::trace::{Kind, Trace, TraceError};
use crate::engine::model::Model;
use crate::stack::options::Options;
use crate::stack::report::line;

/// What `bench-quality --help` prints.
pub const USAGE: &str = "\
bench-quality: routers compared on the same requests and simulated engines

  --offline            policies in virtual time instead of routers, in seconds
  --seed N             of the traces that are made here             [1]
  --load X             arrivals per time, against what is meant     [1.0]
  --speedup N          times that the engines are faster than real  [4]

  QUALITY_TRACES, QUALITY_ROUTERS (environment)   names, with commas  [all]
";

/// Longest time for everything: no further run is begun after it.
const WITHIN: Duration = Duration::from_secs(14 * 60);

/// Where the results go, in the repository.
const RESULTS: &str = "target/bench/quality.json";

/// What to run.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Whether in virtual time.
    pub offline: bool,
    /// Which traces.
    pub kinds: Vec<Kind>,
    /// Which routers.
    pub rivals: Vec<Rival>,
    /// Seed of the traces that are made here.
    pub seed: u64,
    /// Arrivals per time, as a share of what each trace is meant for.
    pub load: f64,
    /// Times that the engines are faster than real ones.
    pub speedup: u64,
}

/// Why there is nothing to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlanError {
    /// `--help` was asked for.
    Help,
    /// Not a known word, or a value missing or wrong; the word.
    Bad(String),
}

impl std::fmt::Display for PlanError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Help => write!(formatter, "{USAGE}"),
            Self::Bad(word) => write!(formatter, "bad argument {word}; try --help"),
        }
    }
}

impl std::error::Error for PlanError {}

impl Plan {
    /// Parses command line arguments and variables of the environment.
    ///
    /// # Errors
    ///
    /// [`PlanError`], for the person at the terminal.
    pub fn parse(
        arguments: impl IntoIterator<Item = String>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, PlanError> {
        let kinds = chosen("QUALITY_TRACES", &Kind::ALL, Kind::name, &variable)?;
        let rivals = chosen("QUALITY_ROUTERS", &Rival::ALL, Rival::name, &variable)?;
        let mut plan = Self { offline: false, kinds, rivals, seed: 1, load: 1.0, speedup: 4 };
        let mut arguments = arguments.into_iter();
        while let Some(word) = arguments.next() {
            let bad = || PlanError::Bad(word.clone());
            let mut value = || arguments.next().ok_or_else(bad);
            match word.as_str() {
                "--help" => return Err(PlanError::Help),
                "--offline" => plan.offline = true,
                "--seed" => plan.seed = value()?.parse().map_err(|_| bad())?,
                "--load" => {
                    let load = value()?.parse().ok().filter(|load| (0.01..=100.0).contains(load));
                    plan.load = load.ok_or_else(bad)?;
                }
                "--speedup" => {
                    let speedup = value()?.parse().ok().filter(|it| (1..=1000).contains(it));
                    plan.speedup = speedup.ok_or_else(bad)?;
                }
                _ => return Err(bad()),
            }
        }
        Ok(plan)
    }
}

/// Those of `all` that a variable names; all if it is not there.
fn chosen<T: Copy>(
    name: &str,
    all: &[T],
    name_of: fn(T) -> &'static str,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Vec<T>, PlanError> {
    let Some(list) = variable(name).filter(|list| !list.is_empty()) else {
        return Ok(all.to_vec());
    };
    let find = |word: &str| all.iter().copied().find(|it| name_of(*it) == word);
    list.split(',').map(|word| find(word).ok_or_else(|| PlanError::Bad(word.into()))).collect()
}

/// Runs the policies in virtual time.
pub fn offline(plan: &Plan, model: &Model) -> ExitCode {
    for kind in &plan.kinds {
        let Some(trace) = trace(*kind, plan, model) else { return ExitCode::FAILURE };
        line(format_args!("\n{}\n{:<18} {}", describe(&trace), "", Figures::HEADING));
        for (name, policy) in Policy::all() {
            let figures = offline::run(&trace, model, ENGINES, policy);
            line(format_args!("{name:<18} {}", figures.row()));
        }
    }
    ExitCode::SUCCESS
}

/// Runs it all; a router that does not run or answers wrongly is a failure.
pub async fn run(plan: &Plan, options: &Options, model: &Model) -> ExitCode {
    let started = Instant::now();
    let mut fine = true;
    let mut rows = Vec::new();
    line(format_args!(
        "{ENGINES} simulated engines, {} times as fast as real ones; all times are theirs",
        plan.speedup
    ));
    for kind in &plan.kinds {
        let Some(trace) = trace(*kind, plan, model) else { return ExitCode::FAILURE };
        line(format_args!("\n{}\n{:<14} {HEADING}", describe(&trace), ""));
        for rival in &plan.rivals {
            if started.elapsed() > WITHIN {
                line(format_args!("{:<14} left out: the time is up", rival.name()));
                fine = false;
                continue;
            }
            match live::run(*rival, &trace, options, plan.speedup).await {
                Ok(run) => {
                    fine &= run.figures.failed == 0;
                    line(row(*rival, &run));
                    rows.push(entry(*kind, *rival, &run));
                }
                Err(error) => {
                    fine = false;
                    line(format_args!("{:<14} {error}", rival.name()));
                }
            }
        }
    }
    let results = json!({
        "command": "make bench-quality", "seed": plan.seed, "load": plan.load,
        "speedup": plan.speedup, "engines": ENGINES, "block_size": BLOCK_SIZE, "rows": rows,
    });
    let path = options.root.join(RESULTS);
    if let Err(error) = write(&path, &results) {
        line(format_args!("cannot write {}: {error}", path.display()));
        return ExitCode::FAILURE;
    }
    line(format_args!("\n{} s; written: {RESULTS}", started.elapsed().as_secs()));
    if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn trace(kind: Kind, plan: &Plan, model: &Model) -> Option<Trace> {
    let trace: Result<Trace, TraceError> = Trace::new(kind, model, plan.seed, plan.load);
    trace.inspect_err(|error| line(format_args!("{}: {error}", kind.name()))).ok()
}

/// What a trace is, in one line.
fn describe(trace: &Trace) -> String {
    let requests = trace.requests.len();
    format!(
        "{}: {requests} requests in {} s, {} prompt tokens each on average, {} blocks an engine",
        trace.kind.name(),
        trace.span_us() / 1_000_000,
        trace.prompt_tokens() / requests.max(1),
        trace.engine_blocks,
    )
}

/// Heading of a table.
const HEADING: &str = "  hits  TTFT p50    p90    p99   mean answer  max/mean requests  tokens  \
    failed  router ms  our CPU  machine  late ms  answered";

fn row(rival: Rival, run: &Run) -> String {
    let Run { figures, faults, router_ms, ours, machine, .. } = run;
    let [p50, p90, p99] = figures.first_token_ms;
    let answered: Vec<String> = figures.answered.iter().map(ToString::to_string).collect();
    let faults: String =
        faults.iter().map(|(fault, times)| format!("  {fault:?}: {times}")).collect();
    format!(
        "{:<14} {:>6.3} {p50:>9.0} {p90:>6.0} {p99:>6.0} {:>13.0} {:>18.2} {:>7.2} {:>7} \
         {router_ms:>10.2} {ours:>8.2} {machine:>8.2} {:>8}  {}{faults}",
        rival.name(),
        figures.hit_ratio,
        figures.mean_ms,
        figures.load_requests,
        figures.load_tokens,
        figures.failed,
        figures.late_ms,
        answered.join("/"),
    )
}

fn entry(kind: Kind, rival: Rival, run: &Run) -> Value {
    let mut entry = run.figures.json();
    if let Some(fields) = entry.as_object_mut() {
        fields.insert("trace".into(), kind.name().into());
        fields.insert("router".into(), rival.name().into());
        fields.insert("router_cpu_ms_per_request".into(), run.router_ms.into());
        fields.insert("our_share_of_machine".into(), run.ours.into());
        fields.insert("machine_busy".into(), run.machine.into());
        fields.insert("seconds".into(), run.took.as_secs().into());
    }
    entry
}

fn write(path: &Path, results: &Value) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, format!("{results:#}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_read_and_mistakes_named() {
        let parse = |words: &[&str], routers: Option<&str>| {
            let variable =
                |name: &str| routers.filter(|_| name == "QUALITY_ROUTERS").map(ToOwned::to_owned);
            Plan::parse(words.iter().map(ToString::to_string), variable)
        };
        let plan = parse(&["--seed", "3", "--offline"], Some("smg,warmpath")).unwrap();
        assert_eq!((plan.seed, plan.offline, plan.kinds.len()), (3, true, 3));
        assert_eq!(plan.rivals, [Rival::Smg, Rival::Warmpath]);
        let bad = |word: &str| Err(PlanError::Bad(word.to_owned()));
        assert_eq!(parse(&[], Some("smg,dynamos")), bad("dynamos"));
        assert_eq!(parse(&["--load", "0"], None), bad("--load"));
        assert_eq!(parse(&["--colour"], None), bad("--colour"));
    }
}
