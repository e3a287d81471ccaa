//! Spoof: a client that names its worker does not get it.
//!
//! A prompt is cached on one engine, so that the gateway's own choice is known.
//! The same prompt is then sent with every routing header, naming another
//! engine, and naming a listener that is no engine. Each must be served by the
//! engine that has it cached, and the listener must never be connected to.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::net::TcpListener;

use super::super::client::{Answer, Chat};
use super::super::conversations::Numbers;
use super::super::launch::{MODEL, Stack, engine_name, local};
use super::super::limits::{CATCH_UP_WITHIN, ENGINES};
use super::super::position::known;
use super::super::report::Report;

/// Every name by which some gateway, router or engine lets a request name its
/// worker, in all generations; the lists of the Dynamo and endpoint-picker
/// protocols and of other routers. Kept apart from the module's and Envoy's own
/// lists on purpose.
pub(crate) const NAMES: [&str; 42] = [
    "x-gateway-destination-endpoint",
    "x-gateway-destination-endpoint-subset",
    "x-gateway-destination-endpoint-served",
    "x-gateway-inference-fairness-id",
    "x-gateway-inference-objective",
    "x-gateway-model-name",
    "x-gateway-base-model-name",
    "x-gateway-model-name-rewrite",
    "x-dynamo-worker-instance-id",
    "x-dynamo-prefill-instance-id",
    "x-dynamo-dp-rank",
    "x-dynamo-prefill-dp-rank",
    "x-dynamo-routing-mode",
    "x-dynamo-token-data",
    "x-dynamo-backend-instance-id",
    "x-dynamo-decode-worker-id",
    "x-dynamo-prefill-worker-id",
    "x-dynamo-epp-booking-id",
    "x-dynamo-epp-prefill-reservation-id",
    "x-worker-instance-id",
    "x-prefill-instance-id",
    "x-dp-rank",
    "x-data-parallel-rank",
    "x-prefill-dp-rank",
    "x-prefiller-host-port",
    "x-prefiller-url",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-kv-cache-source-host-port",
    "x-llm-d-prefiller-host-port",
    "x-llm-d-anything",
    "x-tenant-id",
    "routing-strategy",
    "external-filter",
    "target-pod",
    "x-envoy-original-dst-host",
    "test-epp-endpoint-selection",
    "x-warmpath-worker",
    "x-warmpath-endpoint",
    "X-Gateway-Destination-Endpoint",
    "X-DYNAMO-WORKER-INSTANCE-ID",
    "X-Warmpath-Anything",
];

/// Words of the cached prompt; about that many tokens.
const PROMPT_WORDS: usize = 400;

/// A prompt that one engine has cached, and the gateway knows it.
pub(super) struct Case {
    chat: Chat,
    home: String,
}

/// Gets a fresh prompt cached somewhere. The feed must be alive.
///
/// # Errors
///
/// What was not as it should be, in words.
pub(super) async fn prepare(stack: &Stack, seed: u64) -> Result<Case, String> {
    let text = Numbers::new(seed ^ 0x5eed).text(PROMPT_WORDS);
    let chat = Chat { messages: vec![("user", text)], max_tokens: 1, stream: false };
    let first = send(&stack.gateway(), &chat, &[]).await?;
    let home = first.engine().ok_or("no engine named itself")?.to_owned();
    let index = (0..ENGINES).find(|index| engine_name(*index) == home).unwrap_or(0);
    known(stack, index, CATCH_UP_WITHIN).await.map_err(|behind| format!("{behind:?}"))?;
    Ok(Case { chat, home })
}

/// Makes the check; `when` tells the state of the stack.
pub(super) async fn check(
    stack: &Stack,
    case: Result<Case, String>,
    when: &str,
    report: &mut Report,
) {
    check_at(stack, &stack.gateway(), case, when, report).await;
}

/// The same through another gateway of the stack.
pub(super) async fn check_at(
    stack: &Stack,
    gateway: &str,
    case: Result<Case, String>,
    when: &str,
    report: &mut Report,
) {
    let name = format!("a client cannot name its worker ({when})");
    let tried = match case {
        Ok(case) => attempts(stack, gateway, &case).await,
        Err(error) => Err(error),
    };
    match tried {
        Ok(tried) => report.check(
            &name,
            tried.obeyed.is_empty() && tried.foreign_connections == 0 && tried.sent > 0,
            format_args!(
                "{} requests with {} names: {} not served as without {:?}, foreign host \
                 connected to {} times",
                tried.sent,
                NAMES.len(),
                tried.obeyed.len(),
                tried.obeyed.first(),
                tried.foreign_connections,
            ),
        ),
        Err(error) => report.failure(&name, error),
    }
}

struct Tried {
    sent: usize,
    obeyed: Vec<String>,
    foreign_connections: u64,
}

async fn attempts(stack: &Stack, gateway: &str, case: &Case) -> Result<Tried, String> {
    // Without any header the prompt goes home, or the rest shows nothing.
    let plain = send(gateway, &case.chat, &[]).await?;
    if plain.engine() != Some(case.home.as_str()) || plain.cached_tokens == 0 {
        return Err(format!("not routed by cache: {:?}, not {}", plain.engine(), case.home));
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|error| error.to_string())?;
    let foreign = listener.local_addr().map_err(|error| error.to_string())?.to_string();
    let connections = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&connections);
    let trap = tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });

    let other = (0..ENGINES).find(|index| engine_name(*index) != case.home).unwrap_or(0);
    let other_port = stack.ports.engines.get(other).map(|ports| ports.http).unwrap_or_default();
    let values = [local(other_port), foreign, (other + 1).to_string()];
    let mut tried = Tried { sent: 0, obeyed: Vec::new(), foreign_connections: 0 };
    for name in NAMES {
        for value in values.iter().map(String::as_str) {
            // Once, and twice with the value in the second place.
            for headers in [&[(name, value)] as &[(&str, &str)], &[(name, "x"), (name, value)]] {
                tried.sent += 1;
                match send(gateway, &case.chat, headers).await {
                    Ok(answer) if answer.engine() == Some(case.home.as_str()) => {}
                    Ok(answer) => {
                        tried.obeyed.push(format!("{name}: {value}: {:?}", answer.engine()));
                    }
                    Err(error) => tried.obeyed.push(format!("{name}: {value}: {error}")),
                }
            }
        }
    }
    trap.abort();
    tried.foreign_connections = connections.load(Ordering::Relaxed);
    Ok(tried)
}

async fn send(gateway: &str, chat: &Chat, headers: &[(&str, &str)]) -> Result<Answer, String> {
    chat.send(gateway, MODEL, headers).await.map_err(|error| error.to_string())
}
