//! Crash: a client that names its worker while the VM of a worker thread is down.
//!
//! The VM is crashed again and again, and right behind each crash come requests with
//! every routing header. What is answered meanwhile may be a refusal; whatever an
//! engine gets must have none of what the client has said.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::net::TcpListener;

use super::place::{Place, Plan, chat};
use crate::stack::client::Response;
use crate::stack::launch::MODEL;
use crate::stack::limits::READY_WITHIN;
use crate::stack::options::Options;
use crate::stack::report::{Report, line};
use crate::stack::smoke::ROUTING_HEADERS;

/// Crashes the VM of the worker thread that gets the request (module with hooks).
const CRASH: (&str, &str) = ("x-test-crash-vm", "1");

/// An id that no worker has, so that the gateway never names it by itself.
const NO_WORKER: &str = "770077";

/// Requests behind each crash: enough to meet both worker threads.
const BEHIND: usize = 4;

/// Makes the checks in both modes.
pub(super) async fn check(options: &Options, report: &mut Report) {
    let hooks = options.wasm.with_file_name("warmpath-hooks.wasm");
    if !hooks.exists() {
        return report.failure("the module with hooks", "make module-hooks builds it");
    }
    let options = Options { wasm: hooks, ..options.clone() };
    for template in ["envoy.yaml", "envoy-body.yaml"] {
        let name = format!("{template}: a client cannot name its worker while VMs crash");
        let mut place = match Place::engines(&options).await {
            Ok(place) => place,
            Err(error) => return report.failure(&name, error),
        };
        match attempts(&mut place, template).await {
            Ok(tried) => report.check(
                &name,
                tried.obeyed.is_empty()
                    && tried.foreign == 0
                    && tried.down > 0
                    && tried.served > 0
                    && tried.reloads > 0,
                format_args!(
                    "{} names, {} answers while a VM was down, {} served, {} reloads: {} told to \
                     engines {:?}, foreign host connected to {} times",
                    ROUTING_HEADERS.len(),
                    tried.down,
                    tried.served,
                    tried.reloads,
                    tried.obeyed.len(),
                    tried.obeyed.first(),
                    tried.foreign,
                ),
            ),
            Err(error) => report.failure(&name, error),
        }
        if report.has_failures() {
            line(format_args!("logs: {}", place.keep().display()));
        }
        place.stop().await;
    }
}

#[derive(Default)]
struct Tried {
    /// Answered 503.
    down: u64,
    /// Answered by an engine.
    served: u64,
    reloads: u64,
    foreign: u64,
    /// What engines were told of what the client said.
    obeyed: Vec<String>,
}

async fn attempts(
    place: &mut Place,
    template: &'static str,
) -> Result<Tried, Box<dyn std::error::Error>> {
    let feed = format!("listen: \"127.0.0.1:{}\"", place.feed_port);
    let plan = Plan { feed, template, ..Plan::default() };
    place.start_sidecar(&plan).await?;
    place.start_envoy(&plan).await?;
    place.until_warm(READY_WITHIN).await?;

    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let foreign = listener.local_addr()?.to_string();
    let connections = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&connections);
    let trap = tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    let mut tried = Tried::default();
    for name in ROUTING_HEADERS {
        for value in [foreign.as_str(), NO_WORKER] {
            let crashed = ask(place, &[CRASH]).await?;
            if crashed.status != 503 {
                return Err(format!("a crash is answered {}", crashed.status).into());
            }
            for _ in 0..BEHIND {
                let answer = ask(place, &[(name, value)]).await?;
                if answer.status == 503 {
                    tried.down += 1;
                    continue;
                }
                tried.served += 1;
                let told = answer.header("x-engine-told").unwrap_or("");
                if told.contains(value) {
                    tried.obeyed.push(format!("{name}: {value}: {told}"));
                }
            }
        }
    }
    trap.abort();
    tried.foreign = connections.load(Ordering::Relaxed);
    tried.reloads = place.stat("vm_reload_success").await;
    Ok(tried)
}

async fn ask(place: &Place, headers: &[(&str, &str)]) -> Result<Response, String> {
    let answer = chat("who is there?".into()).post(&place.gateway(), MODEL, headers).await;
    answer.map_err(|error| error.to_string())
}
