//! Bookings: that they are atomic across Envoy's worker threads, and that each
//! ends once, whatever becomes of its request; for `make test-bookings`.
//!
//! | module | what |
//! |---|---|
//! | `workers` | servers that answer late, badly, or when a whole wave is placed |
//! | `gateway` | Envoy and the sidecar in front of them |
//! | `reader`, `ledger` | the ring log, and what it says was booked and freed |
//! | `atomic` | many clients at once: each decision on the newest state |
//! | `streams`, `chaos` | requests that end in every way there is |
//! | `crash` | a VM that crashes under load |
//!
//! What is true of bookings is what the ring log says in its order. It is read
//! through a second listener, by a module built with `test-hooks`; the module that
//! routes is the shipped one, except where a VM is crashed.

use std::process::ExitCode;

use tokio::runtime::{Handle, Runtime};

use crate::stack::options::Options;
use crate::stack::report::{Report, line};

pub mod atomic;
pub mod chaos;
pub mod crash;
pub mod gateway;
pub mod ledger;
pub mod reader;
pub mod streams;
pub mod workers;

/// Threads that clients and workers of this process share.
const THREADS: usize = 2;

/// Threads that end with the run, however that ends: a runtime that is simply
/// dropped waits, which nothing may do here.
struct Threads(Option<Runtime>);

impl Threads {
    fn start() -> std::io::Result<(Self, Handle)> {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(THREADS).enable_all().build()?;
        let handle = runtime.handle().clone();
        Ok((Self(Some(runtime)), handle))
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Runs everything. Prints each check and, last, `N passed, N failed`.
pub async fn run(options: Options) -> ExitCode {
    let mut report = Report::default();
    let folder = tempfile::Builder::new().prefix("warmpath-bookings-").tempdir();
    // Children are started from this thread; what is busy runs on others.
    match (folder, Threads::start()) {
        (Ok(folder), Ok((_threads, handle))) => {
            let path = folder.path();
            let wanted =
                |case: &str| options.cases.is_empty() || options.cases.iter().any(|it| it == case);
            if wanted("atomic") {
                atomic::check(&options, &handle, path, &mut report).await;
            }
            if wanted("chaos") {
                chaos::check(&options, &handle, path, &mut report).await;
            }
            if wanted("crash") {
                crash::check(&options, &handle, path, &mut report).await;
            }
            if report.has_failures() {
                line(format_args!("logs and configuration: {}", folder.keep().display()));
            }
        }
        (Err(error), _) | (_, Err(error)) => report.failure("folder and threads", error),
    }
    report.finish()
}
