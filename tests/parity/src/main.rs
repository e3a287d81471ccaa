//! Parity: the core's routing against Dynamo's own crates, over random states.
//!
//! Run by `make test-parity`. Every comparison has a fixed seed, prints what it
//! compared, and the last line is `N passed, N failed`. Arguments name those to
//! run; all without.

mod bookings;
mod costs;
mod draws;
mod dynamo;
mod selection;
mod states;
mod two_tier;

use std::process::ExitCode;
use std::time::Instant;

/// What a comparison tells when nothing differs, or the first difference.
type Outcome = Result<String, String>;

/// All comparisons.
const COMPARISONS: &[(&str, fn() -> Outcome)] = &[
    ("bookings", bookings::compare),
    ("costs", costs::compare),
    ("selection", selection::compare),
    ("two-tier", two_tier::compare),
    ("draws", draws::compare),
];

/// Each on a thread of its own: Dynamo's random numbers are the thread's.
fn main() -> ExitCode {
    if let Err(error) = tracing::subscriber::set_global_default(dynamo::Listener) {
        println!("FAILED  listener: {error}");
    }
    let (mut passed, mut failed) = (0, 0);
    let named: Vec<String> = std::env::args().skip(1).collect();
    let is_wanted = |name: &str| named.is_empty() || named.iter().any(|it| it == name);
    let outcomes = std::thread::scope(|scope| {
        let running: Vec<_> = COMPARISONS
            .iter()
            .filter(|(name, _)| is_wanted(name))
            .map(|(name, compare)| {
                let timed = move || {
                    let started = Instant::now();
                    (compare(), started.elapsed())
                };
                (name, scope.spawn(timed))
            })
            .collect();
        running.into_iter().map(|(name, thread)| (name, thread.join())).collect::<Vec<_>>()
    });
    for (name, outcome) in outcomes {
        match outcome {
            Ok((Ok(told), took)) => {
                passed += 1;
                println!("ok      {name} ({:.1} s): {told}", took.as_secs_f64());
            }
            Ok((Err(difference), _)) => {
                failed += 1;
                println!("FAILED  {name}: {difference}");
            }
            Err(_) => {
                failed += 1;
                println!("FAILED  {name}: panicked");
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
