//! Secure: who may feed a real Envoy, what an old frame does, and that nothing of a
//! prompt is left anywhere.
//!
//! | module | what |
//! |---|---|
//! | `certificates` | an authority of the run's own |
//! | `place` | engines, sidecar and Envoy whose feed is as a run wants it |
//! | `strangers` | mTLS, tokens and Unix sockets, and what happens when they do not fit |
//! | `relay`, `replay` | a feed server that sends old frames again |
//! | `canary` | a word in every place of a request, sought in all that is written |

pub mod certificates;

mod canary;
mod place;
mod relay;
mod replay;
mod strangers;

use std::process::ExitCode;

use crate::stack::options::Options;
use crate::stack::report::{Report, line};

/// Names in the certificates of this run.
const SIDECAR: &str = "spiffe://cluster.local/ns/inference/sa/warmpath-sidecar";
const GATEWAY: &str = "spiffe://cluster.local/ns/inference/sa/gateway";

/// Runs all cases, or those that were asked for. Prints each check and, last,
/// `N passed, N failed`.
pub async fn run(options: Options) -> ExitCode {
    let mut report = Report::default();
    let wanted = |case: &str| options.cases.is_empty() || options.cases.iter().any(|it| it == case);
    if wanted("strangers") {
        line("-- who may feed the gateway");
        strangers::check(&options, &mut report).await;
    }
    if wanted("socket") {
        strangers::check_socket(&options, &mut report).await;
    }
    if wanted("replay") {
        line("-- old frames");
        replay::check(&options, &mut report).await;
    }
    if wanted("canary") {
        line("-- what is left of a request");
        canary::check(&options, &mut report).await;
    }
    report.finish()
}
