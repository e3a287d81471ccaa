//! Bench: all routers through all traces, a table each, and a file of results.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::{Value, json};

use super::figures::Figures;
use super::live::{self, Run};
use super::rivals::Rival;
use super::trace::{Kind, Trace};
use crate::engine::model::Model;
use crate::stack::options::Options;
use crate::stack::report::line;

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
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
    /// Where the results go.
    pub results: PathBuf,
}

/// Runs it all; a router that does not run or answers wrongly is a failure.
pub async fn run(plan: &Plan, options: &Options, model: &Model) -> ExitCode {
    let mut fine = true;
    let mut rows = Vec::new();
    for kind in &plan.kinds {
        let trace = match Trace::new(*kind, model, plan.seed, plan.load) {
            Ok(trace) => trace,
            Err(error) => {
                line(format_args!("{}: {error}", kind.name()));
                return ExitCode::FAILURE;
            }
        };
        line("");
        line(describe(&trace, plan.speedup));
        line(format_args!(
            "{:<14} {}  router ms  machine  late ms",
            "",
            Figures::HEADING
        ));
        for rival in &plan.rivals {
            let result = live::run(*rival, &trace, options, plan.speedup).await;
            fine &= result.as_ref().is_ok_and(|run| run.figures.failed == 0);
            match result {
                Ok(run) => {
                    line(row(*rival, &run));
                    rows.push(entry(*kind, *rival, &run));
                }
                Err(error) => line(format_args!("{:<14} {error}", rival.name())),
            }
        }
    }
    let results = json!({
        "command": "make bench-quality", "seed": plan.seed, "load": plan.load,
        "speedup": plan.speedup, "rows": rows,
    });
    if let Err(error) = write(&plan.results, &results) {
        line(format_args!("cannot write {}: {error}", plan.results.display()));
        return ExitCode::FAILURE;
    }
    line(format_args!("\nwritten: {}", plan.results.display()));
    if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What a trace is, in one line.
#[must_use]
pub fn describe(trace: &Trace, speedup: u64) -> String {
    let requests = trace.requests.len();
    format!(
        "{}: {requests} requests in {} s of the engines' time, played {speedup} times as fast; \
         {} prompt tokens on average; {} blocks an engine",
        trace.kind.name(),
        trace.span_us() / 1_000_000,
        trace.prompt_tokens() / requests.max(1),
        trace.engine_blocks,
    )
}

fn row(rival: Rival, run: &Run) -> String {
    let Run { figures, faults, router_ms, machine, .. } = run;
    let faults: String = faults.iter().map(|(fault, times)| format!("  {fault:?}: {times}")).collect();
    format!(
        "{:<14} {:<100} {router_ms:>8.2} {machine:>8.2} {:>8}{faults}",
        rival.name(),
        figures.row(),
        figures.late_ms,
    )
}

fn entry(kind: Kind, rival: Rival, run: &Run) -> Value {
    let mut entry = run.figures.json();
    if let Some(fields) = entry.as_object_mut() {
        fields.insert("trace".into(), kind.name().into());
        fields.insert("router".into(), rival.name().into());
        fields.insert("router_cpu_ms_per_request".into(), run.router_ms.into());
        fields.insert("machine_busy".into(), run.machine.into());
        fields.insert("seconds".into(), run.took.as_secs().into());
    }
    entry
}

fn write(path: &PathBuf, results: &Value) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, format!("{results:#}\n"))
}
