//! `bench-neighbour`: what small requests pay for long prompts on the same worker
//! thread; takes the options of `warmpath-run` that say where things are.
//!
//! One thread only: children are tied to the thread that started them.

use std::io::Write;
use std::process::ExitCode;

use warmpath_tests::bench::neighbour;
use warmpath_tests::stack::child;
use warmpath_tests::stack::options::Options;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    // The same parts are needed as for the fleet's run.
    let words = std::iter::once("fleet".to_owned()).chain(std::env::args().skip(1));
    let options = match Options::parse(words) {
        Ok(options) => options,
        Err(error) => return fail(&error.to_string()),
    };
    // Dropping the work kills its children.
    let result = tokio::select! {
        result = neighbour::run(options) => result,
        () = child::asked_to_stop() => Err("stopped".to_owned()),
    };
    child::reap().await;
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(words) => fail(&words),
    }
}

fn fail(words: &str) -> ExitCode {
    // Nobody to tell if standard error is closed.
    let _shown = writeln!(std::io::stderr(), "bench-neighbour: {words}");
    ExitCode::FAILURE
}
