//! Roles: prefill and decode workers behind a real gateway.
//!
//! The same engines, told apart by the worker list alone: what is looked at is
//! whom the gateway chooses and what it tells the engine. Simulated engines
//! compute every prompt themselves.

use std::time::Instant;

use tokio::time::sleep;

use super::super::client::{Answer, Chat};
use super::super::conversations::Numbers;
use super::super::launch::{MODEL, Stack, engine_name};
use super::super::limits::{CATCH_UP_WITHIN, ENGINES, POLL_START, READY_WITHIN};
use super::super::position::known;
use super::super::report::Report;
use super::ENGINE_SHAPE;

/// Words of a prompt; about that many tokens.
const PROMPT_WORDS: usize = 400;

/// The engine that decodes; the others compute prompts.
const DECODE: usize = 0;

/// The engine that has computed a prompt before.
const WARM: usize = 2;

/// Makes the checks. All engines do everything again afterwards.
pub(super) async fn check(stack: &Stack, seed: u64, report: &mut Report) {
    let name = "a prefill worker is named by overlap, a decode worker serves";
    match divided(stack, seed).await {
        Ok(Seen { answer, cached }) => {
            let warm = (WARM + 1).to_string();
            let is_named = answer.prefill_worker() == Some(warm.as_str());
            let is_told = answer.prefill_told() == answer.prefill_worker();
            let served = answer.engine() == Some(engine_name(DECODE).as_str());
            let predicted = answer.predicted_tokens();
            report.check(
                name,
                is_named && is_told && served && predicted == Some(cached) && cached > 0,
                format_args!(
                    "prefill {:?}, told {:?}, served by {:?}, predicted {predicted:?} of {cached} \
                     cached tokens",
                    answer.prefill_worker(),
                    answer.prefill_told(),
                    answer.engine(),
                ),
            );
        }
        Err(error) => report.failure(name, error),
    }
    let is_alone = |answer: &Answer| {
        answer.prefill_told().is_none() && answer.reason() == Some("prefill_unavailable")
    };
    let lost = settle(stack, ["decode"; ENGINES], is_alone).await;
    let name = "without prefill workers decode workers serve, and it is said";
    report.check(name, lost.is_ok(), format_args!("{:?}", lost.err()));
    let is_whole =
        |answer: &Answer| answer.prefill_worker().is_none() && answer.reason() == Some("kv");
    let back = settle(stack, ["aggregated"; ENGINES], is_whole).await;
    let name = "engines that do everything are known as such again";
    report.check(name, back.is_ok(), format_args!("{:?}", back.err()));
}

/// What became of a prompt that one prefill worker knows.
struct Seen {
    answer: Answer,
    /// Tokens of it that this worker has cached, by its own count.
    cached: u64,
}

async fn divided(stack: &Stack, seed: u64) -> Result<Seen, String> {
    let mut roles = ["prefill"; ENGINES];
    if let Some(role) = roles.get_mut(DECODE) {
        *role = "decode";
    }
    settle(stack, roles, |answer| answer.prefill_worker().is_some()).await?;
    let text = Numbers::new(seed ^ 0x0a11).text(PROMPT_WORDS);
    let chat = Chat { messages: vec![("user", text)], max_tokens: 1, stream: true };
    // As the decode worker's side would have it computed.
    let engine = stack.engine_addresses().nth(WARM).ok_or("no such engine")?;
    send(&chat, &engine).await?;
    known(stack, WARM, CATCH_UP_WITHIN).await.map_err(|behind| format!("{behind:?}"))?;
    let answer = send(&chat, &stack.gateway()).await?;
    let cached = send(&chat, &engine).await?.cached_tokens;
    Ok(Seen { answer, cached })
}

/// Gives the engines their roles and waits until the gateway's answers show it.
async fn settle(
    stack: &Stack,
    roles: [&str; ENGINES],
    shows: impl Fn(&Answer) -> bool,
) -> Result<(), String> {
    /// In a row, each on a connection of its own, to meet both worker threads.
    const ANSWERS: u32 = 8;
    stack.set_roles(ENGINE_SHAPE, roles).map_err(|error| error.to_string())?;
    let deadline = Instant::now() + READY_WITHIN;
    let mut shown = 0;
    while shown < ANSWERS {
        let text = format!("what is it that you do {}", "and so on ".repeat(16));
        let chat = Chat { messages: vec![("user", text)], max_tokens: 1, stream: false };
        let answer = send(&chat, &stack.gateway()).await?;
        if shows(&answer) {
            shown += 1;
            continue;
        }
        shown = 0;
        if Instant::now() > deadline {
            return Err(format!(
                "not in time: reason {:?}, prefill {:?}",
                answer.reason(),
                answer.prefill_worker()
            ));
        }
        sleep(POLL_START).await;
    }
    Ok(())
}

async fn send(chat: &Chat, address: &str) -> Result<Answer, String> {
    chat.send(address, MODEL, &[]).await.map_err(|error| error.to_string())
}
