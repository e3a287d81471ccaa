//! Replay: a feed server says again what it said before.
//!
//! Blocks are stored and removed, then all frames so far come again on the live
//! stream: no block may come back, the index stays live, and each frame is counted.
//! Then the same with the frames of a sidecar that was killed meanwhile.

use hyper::body::Bytes;
use warmpath_core::frame::{Frame, Kind};

use super::place::{Place, Plan, until};
use super::relay::Relay;
use crate::stack::limits::{CATCH_UP_WITHIN, READY_WITHIN};
use crate::stack::options::Options;
use crate::stack::position::caught_up;
use crate::stack::report::{Report, line};

/// Prompts whose blocks are stored and removed.
const PROMPTS: usize = 6;

/// VMs of a gateway with two worker threads: one each, and the main thread's. Each
/// takes a snapshot when the sidecar has started.
const VMS: u64 = 3;

const REPLAYED: &str = "warmpath_frames_replayed_total";
const SNAPSHOTS: &str = "warmpath_snapshots_total";

/// Makes the checks.
pub(super) async fn check(options: &Options, report: &mut Report) {
    let mut place = match Place::engines(options).await {
        Ok(place) => place,
        Err(error) => return report.failure("the engines start", error),
    };
    if let Err(error) = checks(&mut place, report).await {
        report.failure("a feed that says old frames again", error);
    }
    if report.has_failures() {
        line(format_args!("logs: {}", place.keep().display()));
    }
    place.stop().await;
}

async fn checks(place: &mut Place, report: &mut Report) -> Result<(), Box<dyn std::error::Error>> {
    let relay = Relay::start(place.feed_port).await?;
    let plan = Plan {
        feed: format!("listen: \"127.0.0.1:{}\"", place.feed_port),
        template: "envoy.yaml",
        relay: Some(relay.port),
        ..Plan::default()
    };
    place.start_sidecar(&plan).await?;
    place.start_envoy(&plan).await?;
    place.until_warm(READY_WITHIN).await?;

    let snapshots = || place.stat(SNAPSHOTS);
    until("every VM has the index", VMS, snapshots).await?;
    let figures = say_again(place, &relay, None, "store").await?;
    report.check("frames of this log that come again", true, figures);

    let old = relay.heard();
    place.kill_sidecar().await;
    place.start_sidecar(&plan).await?;
    place.until_warm(READY_WITHIN).await?;
    let snapshots = || place.stat(SNAPSHOTS);
    until("every VM has the index again", 2 * VMS, snapshots).await?;
    let figures = say_again(place, &relay, Some(old), "epoch").await?;
    report.check("frames of a log of before", true, figures);
    Ok(())
}

/// Stores blocks and removes them, says frames again, and looks whether the blocks
/// came back.
///
/// - `before`: what is said again; `None` for all that has come until then.
/// - `seed`: a word that makes the prompts new.
async fn say_again(
    place: &Place,
    relay: &Relay,
    before: Option<Vec<Bytes>>,
    seed: &str,
) -> Result<String, Box<dyn std::error::Error>> {
    let prompts = (0..PROMPTS).map(|at| format!("{seed} {at} {}", "of old blocks ".repeat(60)));
    let prompts: Vec<String> = prompts.collect();
    let behind = |behind| format!("the feed is behind: {behind:?}");
    for prompt in &prompts {
        place.ask(prompt).await?;
    }
    caught_up(&place.stack, CATCH_UP_WITHIN).await.map_err(behind)?;
    for prompt in &prompts {
        let answer = place.ask(prompt).await?;
        if answer.predicted_tokens() != Some(answer.cached_tokens) || answer.cached_tokens == 0 {
            return Err("the blocks are not known at first".into());
        }
    }
    if !place.stack.clear_caches().await {
        return Err("the caches cannot be cleared".into());
    }
    caught_up(&place.stack, CATCH_UP_WITHIN).await.map_err(behind)?;

    let frames = before.unwrap_or_else(|| relay.heard());
    let (counted, gaps, snapshots) = (
        place.stat(REPLAYED).await,
        place.stat("warmpath_feed_gaps_total").await,
        place.stat(SNAPSHOTS).await,
    );
    // The newest of cards, settings and rosters may come again: streams begin so.
    let deltas = frames.iter().filter(|it| kind(it) == Some(Kind::Delta)).count() as u64;
    if deltas < 4 || !relay.say(&frames) {
        return Err(format!("{deltas} deltas to say again").into());
    }
    let now = until("counted", counted + deltas, || place.stat(REPLAYED)).await?;
    let mut served = 0;
    for prompt in &prompts {
        let answer = place.ask(prompt).await?;
        if answer.reason() != Some("kv") || answer.predicted_tokens() != Some(answer.cached_tokens)
        {
            return Err(format!(
                "{:?}: {:?} predicted, {} cached",
                answer.reason(),
                answer.predicted_tokens(),
                answer.cached_tokens
            )
            .into());
        }
        served += 1;
    }
    let after = (place.stat("warmpath_feed_gaps_total").await, place.stat(SNAPSHOTS).await);
    if after != (gaps, snapshots) {
        return Err(format!("gaps and snapshots: {:?}, then {after:?}", (gaps, snapshots)).into());
    }
    Ok(format!(
        "{} frames again, {deltas} of them deltas: {} refused, no block came back in {served} \
         prompts, no gap, no snapshot",
        frames.len(),
        now - counted,
    ))
}

fn kind(bytes: &[u8]) -> Option<Kind> {
    Frame::decode(bytes).ok().map(|frame| frame.kind)
}
