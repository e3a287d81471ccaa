//! `warmpath-run`: Envoy with Warmpath, the sidecar and three simulated engines
//! on this machine; see `--help`.
//!
//! One thread only: children are tied to the thread that started them.

use std::io::Write;
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};
use warmpath_tests::stack::options::{Command, Options, OptionsError, USAGE};
use warmpath_tests::stack::report::Report;
use warmpath_tests::stack::{demo, smoke};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let counted = std::env::args().nth(1).as_deref() == Some("smoke");
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
    let command = options.command;
    let work = async move {
        match command {
            Command::Demo => demo::run(options).await,
            Command::Smoke => smoke::run(options).await,
            Command::Baseline => smoke::baseline(options).await,
        }
    };
    // Dropping the work kills its children; the demo, once up, stops them in
    // order by itself.
    tokio::select! {
        biased;
        status = work => status,
        () = asked_to_stop() => ExitCode::FAILURE,
    }
}

/// Ctrl-C or SIGTERM.
async fn asked_to_stop() {
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}
