//! `bench-feed`: how soon engines' events count; see `--help`.
//!
//! One thread starts all children: they are tied to the thread that started them.

use std::io::Write;
use std::process::ExitCode;

use warmpath_tests::bench::feed::{self, Plan, USAGE};
use warmpath_tests::stack::child;
use warmpath_tests::stack::options::Options;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Some(plan) = Plan::parse(std::env::args().skip(1)) else {
        // Nobody to tell if standard output is closed.
        let _shown = write!(std::io::stdout(), "{USAGE}");
        return ExitCode::FAILURE;
    };
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny");
    // The same parts are needed as for the run of the bookings.
    let words = ["bookings", "--model-dir", tiny];
    let options = match Options::parse(words.map(str::to_owned)) {
        Ok(options) => options,
        Err(error) => {
            let _shown = writeln!(std::io::stderr(), "bench-feed: {error}");
            return ExitCode::FAILURE;
        }
    };
    // Dropping the work kills its children.
    let status = tokio::select! {
        status = feed::run(&plan, &options) => status,
        () = child::asked_to_stop() => ExitCode::FAILURE,
    };
    child::reap().await;
    status
}
