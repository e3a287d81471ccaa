//! Demo: a short conversation set, told request by request, then a gateway to
//! try things on.

use std::pin::Pin;
use std::process::ExitCode;
use std::time::Duration;

use tokio::time::sleep;

use super::client::Answer;
use super::conversations::{Conversations, Shape};
use super::launch::{EngineShape, MODEL, Stack, engine_name, local};
use super::limits::{CATCH_UP_WITHIN, ENGINES};
use super::options::Options;
use super::position::known;
use super::report::line;

/// Engines that feel like engines: a prefill that one can see.
const ENGINE_SHAPE: EngineShape =
    EngineShape { blocks: 1200, prefill_us_per_token: 100, decode_us_per_token: 2_000 };

/// Four sessions of four turns, two of them sharing a system prompt each.
const SHAPE: Shape = Shape {
    groups: 2,
    sessions_per_group: 2,
    turns: 4,
    system_words: 200,
    user_words: 40,
    answer_tokens: 16,
};

/// Port of the gateway unless another was asked for or it is taken.
const PORT: u16 = 10_000;

/// Time between two looks at whether everything still runs.
const WATCH: Duration = Duration::from_millis(500);

/// Runs until `stop` is ready or a part dies.
pub async fn run(options: Options, mut stop: Pin<&mut impl Future<Output = ()>>) -> ExitCode {
    let seed = options.seed;
    let port = options.port.or_else(|| {
        let free = std::net::TcpListener::bind(("127.0.0.1", PORT)).is_ok();
        free.then_some(PORT)
    });
    line(format_args!("model: {}", options.model_dir.display()));
    if options.model_is_tiny {
        line("note: this is the small committed model; `make setup` gets the Qwen3 tokenizer");
    }
    line("starting three simulated engines, the sidecar and Envoy ...");
    let mut stack = tokio::select! {
        started = Stack::start(options, ENGINE_SHAPE, port) => match started {
            Ok(stack) => stack,
            Err(error) => {
                line(format_args!("the stack does not start: {error}"));
                return ExitCode::FAILURE;
            }
        },
        // What was started so far is killed with the future that started it.
        () = &mut stop => return ExitCode::SUCCESS,
    };
    let fine = tokio::select! {
        fine = show(&mut stack, seed) => fine,
        () = stop => true,
    };
    line("stopping ...");
    stack.stop().await;
    if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Tells the conversations and stays up; returns `false` when something broke
/// and not otherwise.
async fn show(stack: &mut Stack, seed: u64) -> bool {
    if !conversation(stack, seed).await {
        return false;
    }
    invitation(stack);
    loop {
        sleep(WATCH).await;
        if let Some((name, log)) = stack.ended() {
            line(format_args!("{name} ended by itself; its log:\n{log}"));
            return false;
        }
    }
}

/// Sends the conversations and tells what happened. `false` if one failed.
async fn conversation(stack: &Stack, seed: u64) -> bool {
    let Conversations { mut sessions, order } = Conversations::new(&SHAPE, seed);
    line("");
    line("session turn  worker    prompt  predicted  reported  decision   total");
    line("                        tokens     cached    cached");
    for (number, index) in order.into_iter().enumerate() {
        let Some(session) = sessions.get_mut(index) else {
            continue;
        };
        match session.ask().send(&stack.gateway(), MODEL, &[]).await {
            Ok(answer) => {
                let turn = number / (SHAPE.groups * SHAPE.sessions_per_group) + 1;
                line(row(index + 1, turn, &answer));
                // A person asks the next question later than the feed takes.
                let engine = (0..ENGINES).find(|&at| answer.engine() == Some(&engine_name(at)));
                if let Some(engine) = engine
                    && let Err(behind) = known(stack, engine, CATCH_UP_WITHIN).await
                {
                    line(format_args!("the feed is behind: {behind:?}"));
                }
                session.answered(answer.text);
            }
            Err(error) => {
                line(format_args!("request {number} failed: {error}"));
                return false;
            }
        }
    }
    true
}

fn row(session: usize, turn: usize, answer: &Answer) -> String {
    let predicted = match answer.predicted_tokens() {
        Some(tokens) => tokens.to_string(),
        None => format!("({})", answer.reason().unwrap_or("no reason")),
    };
    let decision = match answer.decision_us() {
        Some(time) => format!("{time} us"),
        None => "-".into(),
    };
    format!(
        "{session:>7} {turn:>4}  {:<8}  {:>6}  {predicted:>9}  {:>8}  {decision:>8}  {:>3} ms",
        answer.engine().unwrap_or("unknown"),
        answer.prompt_tokens,
        answer.cached_tokens,
        answer.response.took.as_millis(),
    )
}

fn invitation(stack: &Stack) {
    line("");
    line("The gateway is up. Try, twice:");
    line("");
    line(format_args!(
        "  curl -si http://{}/v1/chat/completions -H 'content-type: application/json' \\",
        stack.gateway()
    ));
    line(format_args!(
        "    -d '{{\"model\":\"{MODEL}\",\"max_tokens\":16,\"messages\":[{{\"role\":\"user\",\
         \"content\":\"Tell me about prefix caches, and why it matters where a request goes.\"}}]}}'"
    ));
    line("");
    line(format_args!("Sidecar:      curl -s http://{}/v1/state", local(stack.ports.status)));
    line(format_args!(
        "Metrics:      curl -s http://{}/stats/prometheus | grep warmpath",
        local(stack.ports.admin)
    ));
    line(format_args!(
        "Without it:   an engine itself is at http://{}",
        stack.engine_addresses().next().unwrap_or_default()
    ));
    line("Ctrl-C stops everything.");
}
