//! Interop: the checks of one case after the other.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::time::sleep;

use super::cases::{CASES, Case, Pools};
use super::peers::Peers;
use super::replicas;
use super::traffic::{Clients, Served, conversations, send};
use super::truth::settled;
use crate::stack::conversations::{Numbers, Shape};
use crate::stack::gateway::Gateway;
use crate::stack::launch::StackError;
use crate::stack::limits::{CATCH_UP_WITHIN, POLL, POLL_START, READY_WITHIN};
use crate::stack::options::Options;
use crate::stack::report::{Report, line};

/// Traffic of a case: 16 sessions of 5 turns, 80 requests.
const SHAPE: Shape = Shape {
    groups: 8,
    sessions_per_group: 2,
    turns: 5,
    system_words: 60,
    user_words: 60,
    answer_tokens: 8,
};

/// Traffic while something is away: 8 sessions of 3 turns, 24 requests.
const OUTAGE_SHAPE: Shape = Shape {
    groups: 4,
    sessions_per_group: 2,
    turns: 3,
    system_words: 60,
    user_words: 60,
    answer_tokens: 8,
};

/// Time in which a dead worker must be out of the roster.
const FENCED_WITHIN: Duration = Duration::from_secs(1);

/// Requests answered before and after each step of a rollout.
const AROUND_A_CHANGE: usize = 20;

/// Requests sent one by one, each when everything is known of the one before.
const QUIET_REQUESTS: usize = 12;

/// Consecutive requests that must have been routed by cache before the gateway
/// counts as warm: enough to meet both of Envoy's worker threads.
const WARM_REQUESTS: u32 = 8;

/// Time in which the sidecar must know what idle workers hold.
const SETTLED_WITHIN: Duration = Duration::from_secs(15);

/// Runs the cases named, or all. Prints each check and, last, `N passed, N
/// failed`.
pub async fn run(options: Options) -> ExitCode {
    let mut report = Report::default();
    let wanted =
        |case: &&Case| options.cases.is_empty() || options.cases.contains(&case.name.into());
    for case in CASES.iter().filter(wanted) {
        line(format_args!("--- {}", case.name));
        if let Err(error) = run_case(*case, &options, &mut report).await {
            report.failure(&format!("{}: the parts start", case.name), error);
        }
    }
    report.finish()
}

async fn run_case(case: Case, options: &Options, report: &mut Report) -> Result<(), StackError> {
    let folder = tempfile::Builder::new().prefix("warmpath-dynamo-").tempdir()?;
    let tokenizer = options.root.join("tests/models/tiny");
    let mut peers = Peers::start(case, &options.python, &tokenizer, folder.path()).await?;
    let config = peers.sidecar_config();
    let gateway =
        Gateway::start(options, case.mode, &config, &peers.frontends, folder.path()).await;
    let mut gateway = match gateway {
        Ok(gateway) => gateway,
        Err(error) => {
            line(format_args!("logs and configuration: {}", folder.keep().display()));
            return Err(error);
        }
    };
    let failed = report.failed();
    let script = options.root.join("tests/dynamo/tree_dump.py");
    let mut checks =
        Checks { case, peers: &mut peers, gateway: &gateway, python: &options.python, script };
    if case.replicas {
        checks.replicas(options.seed, report).await;
    } else {
        checks.run(options.seed, report).await;
    }
    if let Some((name, log)) = peers.ended().or_else(|| gateway.ended()) {
        report.failure(
            &format!("{}: every process is alive", case.name),
            format_args!("{name} ended:\n{log}"),
        );
    }
    gateway.stop().await;
    peers.stop().await;
    if report.failed() > failed {
        line(format_args!("logs and configuration: {}", folder.keep().display()));
    }
    Ok(())
}

struct Checks<'a> {
    case: Case,
    peers: &'a mut Peers,
    gateway: &'a Gateway,
    python: &'a Path,
    script: PathBuf,
}

impl Checks<'_> {
    fn check(&self, report: &mut Report, name: &str, holds: bool, figures: impl std::fmt::Display) {
        report.check(&format!("{}: {name}", self.case.name), holds, figures);
    }

    async fn run(&mut self, seed: u64, report: &mut Report) {
        let warm = self.warm_up().await;
        self.check(report, "routing by cache starts", warm.is_ok(), format_args!("{warm:?}"));
        let outcomes = conversations(&self.gateway.address(), &SHAPE, seed).await;
        self.judge(&outcomes, "conversations", report);
        let known = self.settle().await;
        self.check(
            report,
            "the index is what the workers' tree dumps say",
            known.is_ok(),
            format_args!("{known:?}"),
        );
        self.quiet(seed, report).await;
        self.outage(seed, report).await;
        if self.case.rolls_out {
            self.rollout(seed, report).await;
        }
        if self.case.loses_a_worker() {
            self.dead_worker(seed, report).await;
        }
        let deadline = Instant::now() + CATCH_UP_WITHIN;
        let mut bookings = self.gateway.stat("warmpath_bookings$").await;
        while bookings != Some(0) && Instant::now() < deadline {
            sleep(POLL_START).await;
            bookings = self.gateway.stat("warmpath_bookings$").await;
        }
        self.check(report, "no booking is left", bookings == Some(0), format_args!("{bookings:?}"));
    }

    async fn replicas(&self, seed: u64, report: &mut Report) {
        let warm = self.warm_up().await;
        self.check(report, "routing by cache starts", warm.is_ok(), format_args!("{warm:?}"));
        if let [syncs, stands_aside] = self.peers.routers[..] {
            let routers = [syncs, stands_aside];
            replicas::check(self.case.name, self.gateway, routers, seed, report).await;
        }
    }

    async fn settle(&self) -> Result<super::truth::Difference, String> {
        settled(self.peers, self.gateway, self.python, &self.script, SETTLED_WITHIN).await
    }

    async fn warm_up(&self) -> Result<Duration, String> {
        let started = Instant::now();
        let (mut warm, mut sent) = (0, 0_u32);
        while warm < WARM_REQUESTS {
            sent += 1;
            let text = format!("probe {sent} {}", "of the gateway ".repeat(16));
            match send(&self.gateway.address(), &[("user", text)], 1).await {
                Ok(served) if served.reason == "kv" => warm += 1,
                other if started.elapsed() > READY_WITHIN => return Err(format!("{other:?}")),
                Ok(_) | Err(_) => {
                    warm = 0;
                    sleep(POLL_START).await;
                }
            }
        }
        Ok(started.elapsed())
    }

    /// All workers are replaced by another generation, in a namespace of its own,
    /// while requests flow and nothing of ours is restarted.
    async fn rollout(&mut self, seed: u64, report: &mut Report) {
        let before = self.listed().await;
        let clients = Clients::start(&self.gateway.address(), seed ^ 0x2011);
        self.answered(&clients).await;
        let started = self.peers.start_next_generation();
        let both = self.until(|listed| listed.len() == 2 * before.len()).await;
        self.answered(&clients).await;
        let slots = self.complete_slots().await;
        self.peers.stop_first_generation().await;
        let next = self.until(|listed| listed.is_disjoint(&before)).await;
        self.answered(&clients).await;
        let outcomes = clients.stop().await;
        self.check(
            report,
            "rollout: both generations are seen, then the next one alone",
            started.is_ok()
                && both.len() > before.len()
                && next.is_disjoint(&before)
                && !next.is_empty(),
            format_args!("{} workers, then {}, then {}", before.len(), both.len(), next.len()),
        );
        let kept = self.slots().await;
        self.check(
            report,
            "rollout: nothing known of the next generation is forgotten",
            !kept.is_empty() && kept.is_subset(&slots),
            format_args!("{} ranks of {} as before", kept.intersection(&slots).count(), kept.len()),
        );
        // A frontend that sees both generations draws one of them for itself, and
        // refuses a worker of the other; one whose worker has just gone refuses
        // it, too. In a cluster each pod's frontend knows its own generation, and
        // readiness goes before the worker does.
        let (refused, failed): (Vec<&String>, Vec<&String>) =
            outcomes.iter().filter_map(|it| it.as_ref().err()).partition(|it| is_frontends(it));
        self.check(
            report,
            "rollout: no request fails but at a frontend that does not know the worker",
            failed.is_empty() && !outcomes.is_empty(),
            format_args!(
                "{} requests, {} refused, {} failed {:?}",
                outcomes.len(),
                refused.len(),
                failed.len(),
                failed.first()
            ),
        );
        let served: Vec<&Served> = outcomes.iter().flatten().collect();
        let wrong = served.iter().filter(|it| !self.is_obeyed(it)).count();
        self.check(
            report,
            "rollout: whoever was chosen has served",
            wrong == 0 && !served.is_empty(),
            format_args!("{} of {}", served.len() - wrong, served.len()),
        );
        let outcomes = conversations(&self.gateway.address(), &OUTAGE_SHAPE, seed ^ 0x2012).await;
        let strangers = outcomes
            .iter()
            .flatten()
            .filter(|it| it.chosen.is_none_or(|(worker, _)| !next.contains(&worker)));
        let strangers = strangers.count();
        self.check(
            report,
            "rollout: afterwards everything goes to the next generation",
            strangers == 0 && outcomes.iter().all(Result::is_ok),
            format_args!("{} requests, {strangers} elsewhere", outcomes.len()),
        );
        let known = self.settle().await;
        self.check(report, "rollout: the index is right", known.is_ok(), format_args!("{known:?}"));
    }

    /// A worker is killed: long before its lease runs out it is not chosen any
    /// more. Its frontend has nowhere else to go with a request that names it, so
    /// those of the time in between fail.
    async fn dead_worker(&mut self, seed: u64, report: &mut Report) {
        let clients = Clients::start(&self.gateway.address(), seed ^ 0xdead2);
        self.answered(&clients).await;
        self.peers.kill_worker().await;
        let killed = Instant::now();
        let mut fenced = self.fenced().await;
        while fenced == 0 && killed.elapsed() < READY_WITHIN {
            sleep(POLL).await;
            fenced = self.fenced().await;
        }
        let took = killed.elapsed();
        self.answered(&clients).await;
        let asked = clients.stop().await;
        let failed = asked.iter().filter(|it| it.is_err()).count();
        self.check(
            report,
            "dead worker: fenced in time",
            fenced > 0 && took <= FENCED_WITHIN,
            format_args!(
                "{fenced} ranks after {} ms, at most 1000; {failed} of {} requests failed",
                took.as_millis(),
                asked.len(),
            ),
        );
        let outcomes = conversations(&self.gateway.address(), &OUTAGE_SHAPE, seed ^ 0x0dd).await;
        self.judge(&outcomes, "dead worker", report);
    }

    /// Ranks that the sidecar keeps out of the roster.
    async fn fenced(&self) -> usize {
        let state = self.gateway.state().await.unwrap_or_default();
        let workers = state.get("workers").and_then(Value::as_array).cloned().unwrap_or_default();
        workers.iter().filter(|worker| worker.get("fenced") == Some(&Value::Bool(true))).count()
    }

    /// Waits for some more requests of the clients.
    async fn answered(&self, clients: &Clients) {
        let (wanted, deadline) = (clients.asked() + AROUND_A_CHANGE, Instant::now() + READY_WITHIN);
        while clients.asked() < wanted && Instant::now() < deadline {
            sleep(POLL_START).await;
        }
    }

    /// Ids of the workers that the sidecar lists.
    async fn listed(&self) -> BTreeSet<u64> {
        let state = self.gateway.state().await.unwrap_or_default();
        let workers = state.get("workers").and_then(Value::as_array).cloned().unwrap_or_default();
        workers.iter().filter_map(|worker| worker.get("id")?.as_u64()).collect()
    }

    /// The same, once every worker has written all of its records: it writes
    /// where its events are after the rest.
    async fn complete_slots(&self) -> BTreeSet<[u64; 3]> {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            let state = self.gateway.state().await.unwrap_or_default();
            let problems = state.get("problems").and_then(Value::as_array);
            if problems.is_some_and(Vec::is_empty) || Instant::now() > deadline {
                return self.slots().await;
            }
            sleep(POLL_START).await;
        }
    }

    /// Incarnations that the sidecar follows: worker, rank and slot.
    async fn slots(&self) -> BTreeSet<[u64; 3]> {
        let state = self.gateway.state().await.unwrap_or_default();
        let workers = state.get("workers").and_then(Value::as_array).cloned().unwrap_or_default();
        let number = |worker: &Value, key| worker.get(key).and_then(Value::as_u64);
        let slot = |it: &Value| Some([number(it, "id")?, number(it, "rank")?, number(it, "slot")?]);
        workers.iter().filter_map(slot).collect()
    }

    /// Waits until the workers are as wished; returns those that are there then.
    async fn until(&self, is_right: impl Fn(&BTreeSet<u64>) -> bool) -> BTreeSet<u64> {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            let listed = self.listed().await;
            if is_right(&listed) || Instant::now() > deadline {
                return listed;
            }
            sleep(POLL_START).await;
        }
    }

    /// etcd and NATS are killed and come back: no request fails, and everything
    /// that happened meanwhile is known afterwards.
    async fn outage(&mut self, seed: u64, report: &mut Report) {
        let killed = self.peers.kill_stores().await;
        if killed.is_empty() {
            return;
        }
        let what = format!("without {}", killed.join(" and "));
        let outcomes = conversations(&self.gateway.address(), &OUTAGE_SHAPE, seed ^ 0xdead).await;
        self.judge(&outcomes, &what, report);
        let revived = self.peers.revive_stores().await;
        let since = Instant::now();
        // Something new, so that publishers notice what they could not send.
        let outcomes = conversations(&self.gateway.address(), &OUTAGE_SHAPE, seed ^ 0xbac).await;
        self.judge(&outcomes, &format!("{} again", killed.join(" and ")), report);
        let known = self.settle().await;
        self.check(
            report,
            &format!("{} again: the index is right", killed.join(" and ")),
            revived.is_ok() && known.is_ok(),
            format_args!("{:.2} s after, {known:?}", since.elapsed().as_secs_f64()),
        );
    }

    /// Whether all succeeded, and those that were chosen have served.
    fn judge(&self, outcomes: &[Result<Served, String>], what: &str, report: &mut Report) {
        let failed: Vec<&String> = outcomes.iter().filter_map(|it| it.as_ref().err()).collect();
        self.check(
            report,
            &format!("{what}: every request succeeds"),
            failed.is_empty() && !outcomes.is_empty(),
            format_args!(
                "{} requests, {} failed {:?}",
                outcomes.len(),
                failed.len(),
                failed.first()
            ),
        );
        let served: Vec<&Served> = outcomes.iter().filter_map(|it| it.as_ref().ok()).collect();
        let wrong: Vec<&&Served> = served.iter().filter(|it| !self.is_obeyed(it)).collect();
        self.check(
            report,
            &format!("{what}: whoever was chosen has served"),
            wrong.is_empty() && !served.is_empty(),
            format_args!(
                "{} of {}, first other: {:?}",
                served.len() - wrong.len(),
                served.len(),
                wrong.first()
            ),
        );
        let ranks: BTreeSet<_> = served.iter().map(|it| it.chosen).collect();
        self.check(
            report,
            &format!("{what}: several ranks are used"),
            ranks.len() > 1,
            format_args!("{} ranks", ranks.len()),
        );
    }

    fn is_obeyed(&self, served: &Served) -> bool {
        let decode = served.chosen.is_some() && served.chosen == served.served;
        match self.case.pools {
            Pools::Aggregated => decode && served.prefill_chosen.is_none(),
            Pools::Disaggregated => {
                let prefill = served.prefill_chosen;
                decode && prefill.is_some() && prefill == served.prefill_served
            }
        }
    }

    /// One request at a time, with everything known in between: what is
    /// predicted is what is reported.
    async fn quiet(&self, seed: u64, report: &mut Report) {
        let mut numbers = Numbers::new(seed ^ 0x5eed);
        let mut messages = vec![("system", numbers.text(80))];
        let (mut outcomes, mut late) = (Vec::new(), Vec::new());
        for _ in 0..QUIET_REQUESTS {
            messages.push(("user", numbers.text(40)));
            outcomes.push(send(&self.gateway.address(), &messages, 1).await);
            if let Err(error) = self.settle().await {
                late.push(error);
                break;
            }
        }
        self.check(
            report,
            "quiet: everything is known in time",
            late.is_empty(),
            format_args!("{late:?}"),
        );
        let served: Vec<&Served> = outcomes.iter().filter_map(|it| it.as_ref().ok()).collect();
        let shown: Vec<_> = served.iter().map(|it| (it.predicted, it.cached)).collect();
        if self.case.reports_cached() {
            let exact = shown.iter().filter(|(predicted, cached)| predicted == cached).count();
            let warm = shown.iter().filter(|(predicted, _)| *predicted > Some(0)).count();
            self.check(
                report,
                "quiet: predicted is what the engine reports",
                exact == QUIET_REQUESTS && warm + 1 >= QUIET_REQUESTS,
                format_args!("{exact} of {QUIET_REQUESTS}, {warm} with hits: {shown:?}"),
            );
        } else {
            let grows = shown.windows(2).all(|pair| match pair {
                [(before, _), (after, _)] => before < after,
                _ => false,
            });
            self.check(
                report,
                "quiet: every turn finds more than the one before",
                grows && shown.len() == QUIET_REQUESTS,
                format_args!("{shown:?}"),
            );
        }
    }
}

/// Whether it was a frontend that refused a request: it does not know the worker
/// (400), or is still putting together what it needs to reach it (503, in its own
/// words).
fn is_frontends(refusal: &str) -> bool {
    refusal.starts_with("400") || refusal.contains("Service temporarily unavailable")
}
