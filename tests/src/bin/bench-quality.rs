//! `bench-quality`: routers compared; see `--help`.
//!
//! One thread only: children are tied to the thread that started them.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use warmpath_tests::engine::model::Model;
use warmpath_tests::quality::bench::{self, Plan, PlanError, USAGE};
use warmpath_tests::stack::child;
use warmpath_tests::stack::options::Options;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let plan = match Plan::parse(std::env::args().skip(1), |name| std::env::var(name).ok()) {
        Ok(plan) => plan,
        Err(PlanError::Help) => {
            // Nobody to tell if standard output is closed.
            let _shown = write!(std::io::stdout(), "{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&error),
    };
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny");
    let model = match Model::load(Path::new(tiny)) {
        Ok(model) => model,
        Err(error) => return fail(&error),
    };
    if plan.offline {
        return bench::offline(&plan, &model);
    }
    // The same parts are needed as for the fleet's run.
    let words = ["fleet", "--model-dir", tiny];
    let options = match Options::parse(words.map(str::to_owned)) {
        Ok(options) => options,
        Err(error) => return fail(&error),
    };
    // Dropping the work kills its children.
    let status = tokio::select! {
        status = bench::run(&plan, &options, &model) => status,
        () = child::asked_to_stop() => ExitCode::FAILURE,
    };
    child::reap().await;
    status
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    let _shown = writeln!(std::io::stderr(), "bench-quality: {error}");
    ExitCode::FAILURE
}
