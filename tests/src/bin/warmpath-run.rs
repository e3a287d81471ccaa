//! `warmpath-run`: Envoy with Warmpath, the sidecar and three simulated engines
//! on this machine; see `--help`.
//!
//! One thread only: children are tied to the thread that started them.

use std::io::Write;
use std::pin::Pin;
use std::process::ExitCode;

use warmpath_tests::bookings;
use warmpath_tests::dynamo::interop;
use warmpath_tests::ext_proc;
use warmpath_tests::fleet::changes;
use warmpath_tests::secure;
use warmpath_tests::stack::options::{Command, Options, OptionsError, USAGE};
use warmpath_tests::stack::report::Report;
use warmpath_tests::stack::{child, demo, smoke};
use warmpath_tests::{replicas, spoof};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let counted = matches!(
        std::env::args().nth(1).as_deref(),
        Some(
            "smoke"
                | "fleet"
                | "bookings"
                | "replicas"
                | "secure"
                | "spoof"
                | "ext-proc"
                | "dynamo",
        )
    );
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(OptionsError::Help) => {
            // Nobody to tell if standard output is closed.
            let _shown = write!(std::io::stdout(), "{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) if counted => {
            // Counted, so that the last line is there whatever happens.
            let mut report = Report::default();
            report.failure("all parts are there", error);
            return report.finish();
        }
        Err(error) => {
            let _shown = writeln!(std::io::stderr(), "warmpath-run: {error}");
            return ExitCode::FAILURE;
        }
    };
    let stop = std::pin::pin!(child::asked_to_stop());
    let status = match options.command {
        Command::Demo => demo::run(options, stop).await,
        Command::Smoke => bounded(smoke::run(options), stop).await,
        Command::Baseline => bounded(smoke::baseline(options), stop).await,
        Command::Fleet => bounded(changes::run(options), stop).await,
        Command::Bookings => bounded(bookings::run(options), stop).await,
        Command::Replicas => bounded(replicas::run(options), stop).await,
        Command::Secure => bounded(secure::run(options), stop).await,
        Command::Spoof => bounded(spoof::run(options), stop).await,
        Command::ExtProc => bounded(ext_proc::run(options), stop).await,
        Command::Dynamo => bounded(interop::run(options), stop).await,
    };
    child::reap().await;
    status
}

/// Runs to the end unless asked to stop: dropping the work kills its children.
async fn bounded(
    work: impl Future<Output = ExitCode>,
    stop: Pin<&mut impl Future<Output = ()>>,
) -> ExitCode {
    tokio::select! {
        status = work => status,
        () = stop => ExitCode::FAILURE,
    }
}
