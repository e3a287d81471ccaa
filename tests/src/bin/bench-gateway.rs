//! `bench-gateway`: what a gateway adds to a request; see `--help`.
//!
//! One thread sends; another one serves as the engines. Children are tied to the
//! thread that started them, the first one.

use std::io::Write;
use std::process::ExitCode;

use warmpath_tests::bench::gateway::measure::Plan;
use warmpath_tests::bench::gateway::run;
use warmpath_tests::bench::gateway::targets::Target;
use warmpath_tests::stack::child;
use warmpath_tests::stack::options::Options;

const USAGE: &str = "\
bench-gateway: what a gateway adds to a request, ours beside others

  --quick          few cases; only those peers that are built or installed
  --seed N         of the texts [1]
  --targets A,B    of: envoy, warmpath, warmpath_token_data, picker_fastokens, picker_hf,
                   picker_fastokens_duplex, sglang_router, dynamo, dynamo_fastokens
                   [all; quick: the first five]
";

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let plan = match parse(std::env::args().skip(1)) {
        Ok(plan) => plan,
        Err(text) => {
            // Nobody to tell if standard error is closed.
            let _shown = writeln!(std::io::stderr(), "{text}");
            return ExitCode::FAILURE;
        }
    };
    // The same parts are needed as for the fleet's run.
    let options = match Options::parse(["fleet".to_owned()]) {
        Ok(options) => options,
        Err(error) => return fail(&error),
    };
    // Dropping the work kills its children.
    let status = tokio::select! {
        result = run(&plan, &options) => match result {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        },
        () = child::asked_to_stop() => ExitCode::FAILURE,
    };
    child::reap().await;
    status
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Plan, String> {
    let mut plan = Plan { quick: false, seed: 1, targets: Vec::new() };
    let mut arguments = arguments;
    while let Some(word) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{word} needs a value"));
        match word.as_str() {
            "--quick" => plan.quick = true,
            "--seed" => plan.seed = value()?.parse().map_err(|_| "--seed is a number")?,
            "--targets" => {
                let names = value()?;
                let find = |name: &str| Target::ALL.into_iter().find(|it| it.name() == name);
                let found = names.split(',').map(|name| find(name).ok_or(USAGE.to_owned()));
                plan.targets = found.collect::<Result<_, _>>()?;
            }
            _ => return Err(USAGE.into()),
        }
    }
    if plan.targets.is_empty() {
        let count = if plan.quick { 5 } else { Target::ALL.len() };
        plan.targets = Target::ALL.into_iter().take(count).collect();
    }
    Ok(plan)
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    let _shown = writeln!(std::io::stderr(), "bench-gateway: {error}");
    ExitCode::FAILURE
}
