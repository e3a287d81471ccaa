//! Changes: the checks of the fleet run, one after the other on one gateway.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::load::{Asked, Load, failed_since, milliseconds};
use super::members::{ADAPTER, ADAPTER_PLACE, MODEL, Members, OTHER_MODEL, PLACES, name_of, timed};
use crate::stack::client::{Answer, Chat};
use crate::stack::conversations::Numbers;
use crate::stack::launch::StackError;
use crate::stack::limits::READY_WITHIN;
use crate::stack::options::Options;
use crate::stack::report::{Report, line};

/// Requests answered before and after each change.
const AROUND_A_CHANGE: usize = 20;

/// Time in which the next request must know that a worker came or went.
const KNOWN_WITHIN: Duration = Duration::from_secs(1);

/// Requests for an adapter.
const ADAPTER_REQUESTS: u32 = 10;

/// Prompts that must be predicted exactly after a change.
const EXACT_PROMPTS: u32 = 4;

/// Consecutive requests that must have been routed by cache before the gateway
/// counts as warm: enough to meet both of Envoy's worker threads.
const WARM_REQUESTS: u32 = 8;

/// Runs all changes. Prints each check and, last, `N passed, N failed`.
pub async fn run(options: Options) -> ExitCode {
    let mut report = Report::default();
    match tempfile::Builder::new().prefix("warmpath-fleet-").tempdir() {
        Ok(folder) => {
            match Members::start(options.clone(), folder.path()).await {
                Ok(members) => all(members, options.seed, &mut report).await,
                Err(error) => report.failure("the fleet starts", error),
            }
            if report.has_failures() {
                line(format_args!("logs and configuration: {}", folder.keep().display()));
            }
        }
        Err(error) => report.failure("a folder can be made", error),
    }
    report.finish()
}

async fn all(mut members: Members, seed: u64, report: &mut Report) {
    let outcome = async {
        warm_up(&members, seed).await?;
        adapter(&members, seed, report).await?;
        rolling_update(&mut members, seed, report).await?;
        model_swap(&mut members, seed, report).await?;
        dead_worker(&mut members, seed, report).await?;
        dead_sidecar(&mut members, seed, report).await?;
        prefill_workers(&mut members, seed, report).await
    };
    if let Err(error) = outcome.await {
        report.failure("every step of the run can be made", error);
    }
    if let Some((name, log)) = members.ended() {
        report.failure("every process is alive", format_args!("{name} ended:\n{log}"));
    }
    members.stop().await;
}

async fn chat(members: &Members, model: &str, text: String) -> Option<Answer> {
    let chat = Chat { messages: vec![("user", text)], max_tokens: 1, stream: false };
    chat.send(&members.gateway.address(), model, &[]).await.ok()
}

/// Waits until prompts go by cache.
async fn warm_up(members: &Members, seed: u64) -> Result<(), StackError> {
    let mut numbers = Numbers::new(seed ^ 0x3a93);
    let is_warm = |answer: &Answer| answer.reason() == Some("kv");
    let mut in_a_row = 0;
    while in_a_row < WARM_REQUESTS {
        let mut asked = 0;
        let text = || {
            asked += 1;
            numbers.text(40)
        };
        first_answer(members, MODEL, "routing by cache", is_warm, text).await?;
        in_a_row = if asked == 1 { in_a_row + 1 } else { 0 };
    }
    Ok(())
}

/// Goal: requests for an adapter go to the worker that holds it, and what it has
/// cached of the base model's prompts is not taken for the adapter's.
async fn adapter(members: &Members, seed: u64, report: &mut Report) -> Result<(), StackError> {
    let mut numbers = Numbers::new(seed ^ 0x107a);
    let holder = members.at(ADAPTER_PLACE).map(|member| name_of(member.id));
    let mut elsewhere = Vec::new();
    for _ in 0..ADAPTER_REQUESTS {
        let answer = chat(members, ADAPTER, numbers.text(60)).await;
        let engine = answer.and_then(|answer| answer.engine().map(str::to_owned));
        if engine != holder {
            elsewhere.push(engine);
        }
    }
    report.check(
        "adapter: requests go to the worker that holds it",
        elsewhere.is_empty() && holder.is_some(),
        format_args!("{ADAPTER_REQUESTS} requests, elsewhere: {elsewhere:?}"),
    );
    exact(members, ADAPTER, "adapter", seed ^ 4, report).await?;
    let text = numbers.text(120);
    let known = |answer: &Answer| answer.predicted_tokens() > Some(0);
    let what = "the base model's prompt is known";
    first_answer(members, MODEL, what, known, || text.clone()).await?;
    let answer = chat(members, ADAPTER, text).await;
    let seen = answer.map(|it| (it.predicted_tokens(), it.cached_tokens));
    report.check(
        "adapter: the base model's cache is not the adapter's",
        seen == Some((Some(0), 0)),
        format_args!("{seen:?}"),
    );
    Ok(())
}

/// Goal: a rollout costs no request, and a new pod is never credited with what
/// the old one at its address held.
async fn rolling_update(
    members: &mut Members,
    seed: u64,
    report: &mut Report,
) -> Result<(), StackError> {
    let load = Load::start(&members.gateway.address(), seed);
    load.answered(AROUND_A_CHANGE).await;
    let old: Vec<String> = members.members.iter().map(|member| name_of(member.id)).collect();
    for place in 0..PLACES {
        members.drain(place).await?;
        load.answered(AROUND_A_CHANGE).await;
        members.join(place, MODEL).await?;
        load.answered(AROUND_A_CHANGE).await;
    }
    let rolled = Instant::now();
    load.answered(AROUND_A_CHANGE * 2).await;
    let asked = load.stop().await;
    judge(&asked, "rolling update", report);
    let late: Vec<&Asked> = asked
        .iter()
        .filter(|it| {
            it.at > rolled && it.outcome.as_ref().is_ok_and(|seen| old.contains(&seen.engine))
        })
        .collect();
    report.check(
        "rolling update: nothing goes to the old generation",
        late.is_empty(),
        format_args!("{} of it {:?}", late.len(), late.first()),
    );
    exact(members, MODEL, "rolling update", seed, report).await
}

/// Goal: an address that serves another model from now on is that model's, and
/// no longer the first one's.
async fn model_swap(
    members: &mut Members,
    seed: u64,
    report: &mut Report,
) -> Result<(), StackError> {
    let load = Load::start(&members.gateway.address(), seed ^ 0x51);
    load.answered(AROUND_A_CHANGE).await;
    members.drain(0).await?;
    members.join(0, OTHER_MODEL).await?;
    load.answered(AROUND_A_CHANGE).await;
    let swapped = exact(members, OTHER_MODEL, "model swap", seed, report).await;
    members.drain(0).await?;
    members.join(0, MODEL).await?;
    load.answered(AROUND_A_CHANGE).await;
    let asked = load.stop().await;
    swapped?;
    judge(&asked, "model swap", report);
    exact(members, MODEL, "model swap", seed ^ 1, report).await
}

/// Goal: a worker's death costs only the requests that it was working on, it is
/// left alone at once, and what its next life holds is learnt anew.
async fn dead_worker(
    members: &mut Members,
    seed: u64,
    report: &mut Report,
) -> Result<(), StackError> {
    let load = Load::start(&members.gateway.address(), seed ^ 0xdead);
    load.answered(AROUND_A_CHANGE).await;
    let killed = Instant::now();
    members.kill(1).await;
    let dead = Instant::now();
    let fenced = timed("the dead worker is fenced", || async {
        let state = members.state_of(1).await;
        let is_fenced = state.and_then(|it| it.get("fenced")?.as_bool()) == Some(true);
        is_fenced && members.is_level().await
    })
    .await?;
    load.answered(AROUND_A_CHANGE * 2).await;
    members.revive(1).await?;
    let back = timed("the worker is back", || async {
        let state = members.state_of(1).await;
        let flag = |state: &Value, name| state.pointer(name).and_then(Value::as_bool);
        state.is_some_and(|state| {
            flag(&state, "/fenced") == Some(false)
                && flag(&state, "/source/connected") == Some(true)
                && flag(&state, "/source/repairing") == Some(false)
        }) && members.is_level().await
    })
    .await?;
    load.answered(AROUND_A_CHANGE).await;
    let asked = load.stop().await;
    let failed = failed_since(&asked, dead);
    report.check(
        "dead worker: no new request fails",
        failed.is_empty() && asked.len() > AROUND_A_CHANGE,
        format_args!(
            "{} requests, {} failed of those sent after the kill {:?}, {} of those before",
            asked.len(),
            failed.len(),
            failed.first(),
            asked.iter().filter(|it| it.at < dead && it.outcome.is_err()).count(),
        ),
    );
    report.check(
        "dead worker: fenced in time",
        fenced + (dead - killed) <= KNOWN_WITHIN,
        format_args!(
            "{}, at most 1000; back {} after its start",
            milliseconds(fenced),
            milliseconds(back)
        ),
    );
    let overrated: Vec<&Asked> = asked.iter().filter(|it| it.is_overrated()).collect();
    report.check(
        "dead worker: no credit for what died with it",
        overrated.is_empty(),
        format_args!("{} overrated {:?}", overrated.len(), overrated.first()),
    );
    exact(members, MODEL, "dead worker", seed ^ 2, report).await
}

/// Goal: the sidecar's death costs no request, and its next life knows
/// everything again.
async fn dead_sidecar(
    members: &mut Members,
    seed: u64,
    report: &mut Report,
) -> Result<(), StackError> {
    let load = Load::start(&members.gateway.address(), seed ^ 0x51de);
    load.answered(AROUND_A_CHANGE).await;
    members.gateway.kill_sidecar().await?;
    load.answered(AROUND_A_CHANGE).await;
    let asked = load.stop().await;
    judge(&asked, "dead sidecar", report);
    exact(members, MODEL, "dead sidecar", seed ^ 3, report).await
}

/// Goal: prefill workers that appear and disappear are known to the next
/// request within a second.
async fn prefill_workers(
    members: &mut Members,
    seed: u64,
    report: &mut Report,
) -> Result<(), StackError> {
    let mut numbers = Numbers::new(seed ^ 0x9f);
    let id = members.at(0).map(|member| member.id.to_string());
    let named =
        |answer: &Answer| answer.response.header("x-warmpath-prefill-worker").map(str::to_owned);
    members.set_roles(["prefill", "decode", "decode"])?;
    let what = "a prefill worker is used";
    let (appeared, answer) =
        first_answer(members, MODEL, what, |answer| named(answer).is_some(), || numbers.text(60))
            .await?;
    report.check(
        "prefill: one that appears is used in time",
        appeared <= KNOWN_WITHIN && id.is_some() && named(&answer) == id,
        format_args!("{}, at most 1000; {:?}", milliseconds(appeared), named(&answer)),
    );
    let decode = answer.engine().map(str::to_owned);
    report.check(
        "prefill: a decode worker gets the request",
        decode.is_some() && decode != id.map(|id| format!("engine-{id}")),
        format_args!("{decode:?}"),
    );
    members.drain(0).await?;
    let started = Instant::now();
    let answer = chat(members, MODEL, numbers.text(60)).await;
    report.check(
        "prefill: without one, decode workers do it all",
        answer.as_ref().is_some_and(|answer| named(answer).is_none()),
        format_args!(
            "{:?} after {}",
            answer.map(|it| it.response.status),
            milliseconds(started.elapsed())
        ),
    );
    Ok(())
}

/// Asks until an answer is as wished; returns how long that took, and the
/// answer.
async fn first_answer(
    members: &Members,
    model: &str,
    what: &'static str,
    is_right: impl Fn(&Answer) -> bool,
    mut text: impl FnMut() -> String,
) -> Result<(Duration, Answer), StackError> {
    let started = Instant::now();
    loop {
        if let Some(answer) = chat(members, model, text()).await.filter(&is_right) {
            return Ok((started.elapsed(), answer));
        }
        if started.elapsed() > READY_WITHIN {
            return Err(StackError::NotReady(what, String::new()));
        }
    }
}

/// Whether every request was answered, and none on false credit.
fn judge(asked: &[Asked], what: &str, report: &mut Report) {
    let failed: Vec<&Asked> = asked.iter().filter(|it| it.outcome.is_err()).collect();
    report.check(
        &format!("{what}: no request fails"),
        failed.is_empty() && asked.len() > AROUND_A_CHANGE,
        format_args!("{} requests, {} failed {:?}", asked.len(), failed.len(), failed.first()),
    );
    let overrated: Vec<&Asked> = asked.iter().filter(|it| it.is_overrated()).collect();
    let credited = asked.iter().filter(|it| it.is_credited()).count();
    report.check(
        &format!("{what}: no credit for what a worker does not hold"),
        overrated.is_empty() && credited > 0,
        format_args!("{credited} credited, {} overrated {:?}", overrated.len(), overrated.first()),
    );
}

/// Prompts sent twice: the second is predicted as the engine reports it, and
/// finds something.
async fn exact(
    members: &Members,
    model: &'static str,
    what: &str,
    seed: u64,
    report: &mut Report,
) -> Result<(), StackError> {
    let mut numbers = Numbers::new(seed ^ 0xe8ac7);
    let mut shown = Vec::new();
    for _ in 0..EXACT_PROMPTS {
        let text = numbers.text(120);
        let first = chat(members, model, text.clone()).await.is_some();
        // What was stored may not have reached the gateway yet: asked until
        // something is found, which must then be exact.
        let is_found = |answer: &Answer| answer.predicted_tokens() > Some(0);
        let what = "a prompt sent again is found";
        let (_, second) = first_answer(members, model, what, is_found, || text.clone()).await?;
        shown.push((first, second.predicted_tokens(), second.cached_tokens));
    }
    let right =
        shown.iter().filter(|(first, predicted, cached)| *first && *predicted == Some(*cached));
    let right = right.count();
    report.check(
        &format!("{what}: exact afterwards"),
        right == shown.len(),
        format_args!("{right} of {} {:?}", shown.len(), shown.first()),
    );
    Ok(())
}
