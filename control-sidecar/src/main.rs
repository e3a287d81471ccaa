//! Entry point of the sidecar.

use std::process::ExitCode;

use clap::Parser;
use warmpath_sidecar::run::{Arguments, run};

#[expect(clippy::print_stderr, reason = "there may be no log yet to say it in")]
fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
