//! Mode `buffer`: Envoy's own filters hold the headers and write the choice, for
//! gateways without the setting that mode `endpoint` needs.

use super::super::client::Chat;
use super::super::conversations::Numbers;
use super::super::launch::{MODEL, Stack, StackError};
use super::super::limits::{CATCH_UP_WITHIN, ENGINES};
use super::super::position::caught_up;
use super::super::report::Report;
use super::spoof;
use super::variant::Variant;

/// Prompts that are sent twice.
const PROMPTS: u64 = 12;

/// Words of each.
const PROMPT_WORDS: usize = 300;

/// Where the two filters behind the module begin, and what comes after them.
const BEHIND: &str = "          # Holds the headers";
const ROUTER: &str = "          - name: envoy.filters.http.router";

fn template(stack: &Stack) -> Result<String, StackError> {
    Ok(std::fs::read_to_string(stack.options.envoy_config("envoy-buffer.yaml"))?)
}

/// Starts the gateway.
///
/// # Errors
///
/// [`StackError`].
pub(super) async fn start(stack: &Stack) -> Result<Variant, StackError> {
    Variant::start_template(stack, "envoy-buffer", &template(stack)?).await
}

/// Makes the checks.
pub(super) async fn check(stack: &Stack, seed: u64, report: &mut Report) {
    match start(stack).await {
        Ok(gateway) => {
            routed(stack, &gateway, seed, report).await;
            let case = spoof::prepare(stack, seed + 2).await;
            spoof::check_at(stack, &gateway.address(), case, "mode `buffer`", report).await;
            gateway.stop().await;
        }
        Err(error) => report.failure("the gateway in mode `buffer` starts", error),
    }
    if let Err(error) = unpaired(stack, report).await {
        report.failure("a gateway in mode `buffer` without its filters starts", error);
    }
}

/// Every prompt goes to the worker that was named; the second time that is the one
/// that holds it.
async fn routed(stack: &Stack, gateway: &Variant, seed: u64, report: &mut Report) {
    let (mut served, mut exact, mut engines) = (0, 0, Vec::new());
    let mut wrong = Vec::new();
    for number in 0..PROMPTS {
        let text = Numbers::new(seed ^ (number + 77)).text(PROMPT_WORDS);
        let chat = Chat { messages: vec![("user", text)], max_tokens: 1, stream: false };
        let mut home = None;
        for _ in 0..2 {
            let answer = match chat.send(&gateway.address(), MODEL, &[]).await {
                Ok(answer) => answer,
                Err(error) => {
                    wrong.push(error.to_string());
                    break;
                }
            };
            let named = answer.worker().map(|worker| format!("engine-{worker}"));
            let engine = answer.engine().unwrap_or_default().to_owned();
            served += u64::from(named.as_ref() == Some(&engine));
            let is_home = home.as_ref().is_none_or(|home| *home == engine);
            exact += u64::from(is_home && answer.predicted_tokens() == Some(answer.cached_tokens));
            if !engines.contains(&engine) {
                engines.push(engine.clone());
            }
            home = Some(engine);
            if let Err(behind) = caught_up(stack, CATCH_UP_WITHIN).await {
                wrong.push(format!("{behind:?}"));
            }
        }
    }
    report.check(
        "mode `buffer`: the worker that served is the one that was named",
        served == 2 * PROMPTS && wrong.is_empty() && engines.len() == ENGINES,
        format_args!("{served} of {}, engines {engines:?}, {:?}", 2 * PROMPTS, wrong.first()),
    );
    report.check(
        "mode `buffer`: predicted cached tokens equal the engine's",
        exact == 2 * PROMPTS,
        format_args!("{exact} of {}", 2 * PROMPTS),
    );
    let unnamed = gateway.counter("warmpath_pairing_wrong_total", 0).await;
    report.check(
        "mode `buffer`: no answer came from elsewhere",
        unnamed == Some(0),
        format_args!("{unnamed:?}"),
    );
}

/// Without the filters nobody is named: requests are served all the same, and it
/// is told.
async fn unpaired(stack: &Stack, report: &mut Report) -> Result<(), StackError> {
    let whole = template(stack)?;
    let cut = whole.split_once(BEHIND).and_then(|(before, rest)| {
        let (_, after) = rest.split_once(ROUTER)?;
        Some(format!("{before}{ROUTER}{after}"))
    });
    let Some(cut) = cut else {
        return Err(StackError::Unfilled("place of the filters behind".into()));
    };
    let gateway = Variant::start_template(stack, "envoy-unpaired", &cut).await?;
    let mut answered = 0;
    for number in 0..4 * PROMPTS {
        let text = Numbers::new(number + 1).text(20);
        let chat = Chat { messages: vec![("user", text)], max_tokens: 1, stream: false };
        answered += u64::from(chat.send(&gateway.address(), MODEL, &[]).await.is_ok());
    }
    let unnamed = gateway.counter("warmpath_pairing_wrong_total", 1).await;
    let log = gateway.log();
    report.check(
        "mode `buffer` without its filters is told of, and serves",
        answered == 4 * PROMPTS
            && unnamed.is_some_and(|count| count > 0)
            && log.contains("needs the filters `buffer` and `header_mutation`"),
        format_args!("{answered} of {} answered, {unnamed:?} counted", 4 * PROMPTS),
    );
    gateway.stop().await;
    Ok(())
}
