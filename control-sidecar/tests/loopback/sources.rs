//! Real sockets: a publisher of another implementation on one side, what the
//! sidecar's snapshot shows on the other.

use std::collections::BTreeSet;

use crate::support::*;
use warmpath_sidecar::run::Sidecar;

async fn start(publisher: &Publisher, with_replay: bool) -> Sidecar {
    Sidecar::start(config(3_000, &worker(publisher, with_replay))).await.unwrap()
}

fn blocks(numbers: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    numbers.into_iter().map(hash_of).collect()
}

/// Goal: what was published before the sidecar came is had by replay, in both
/// framings, and live messages follow on it.
#[tokio::test]
async fn history_and_live_messages_give_the_engines_cache() {
    for form in [ReplayForm::WithTopic, ReplayForm::WithoutTopic] {
        let mut publisher = Publisher::start(form).await;
        let prompt: Vec<u32> = (0..12).collect();
        publisher.publish(batch(&[stored(&[1, 2], None, &prompt[..8])])).await;
        publisher.publish(batch(&[stored(&[3], Some(2), &prompt[8..]), removed(&[2])])).await;
        let sidecar = start(&publisher, true).await;
        ready(&sidecar).await;
        let all = hashes(&prompt);
        assert_eq!(held(&sidecar).await, [all[0], all[2]].into());
        publisher.publish(batch(&[stored(&[2], Some(1), &prompt[4..8])])).await;
        settled(&sidecar, 2).await;
        assert_eq!(held(&sidecar).await, all.into_iter().collect());
        sidecar.stop().await;
    }
}

/// Goal: messages that the publisher dropped are had by replay before what
/// follows them is applied.
#[tokio::test]
async fn a_gap_is_repaired() {
    let mut publisher = Publisher::start(ReplayForm::WithTopic).await;
    let sidecar = start(&publisher, true).await;
    publisher.publish(one_block(1)).await;
    ready(&sidecar).await;
    settled(&sidecar, 0).await;
    publisher.lose(&one_block(2));
    publisher.lose(&batch(&[removed(&[1])]));
    publisher.publish(one_block(3)).await;
    settled(&sidecar, 3).await;
    assert_eq!(held(&sidecar).await, blocks([2, 3]));
    let state = state(&sidecar).await;
    assert_eq!(state["workers"][0]["source"]["gaps"], 1);
    assert_eq!(state["workers"][0]["source"]["partial"], serde_json::Value::Null);
    sidecar.stop().await;
}

/// Goal: a message that was dropped last, with nothing behind it, is had all
/// the same.
#[tokio::test]
async fn a_lost_tail_is_found() {
    let mut publisher = Publisher::start(ReplayForm::WithTopic).await;
    let sidecar = start(&publisher, true).await;
    publisher.publish(one_block(1)).await;
    settled(&sidecar, 0).await;
    publisher.lose(&one_block(2));
    settled(&sidecar, 1).await;
    assert_eq!(held(&sidecar).await, blocks([1, 2]));
    sidecar.stop().await;
}

/// Goal: history that is gone clears the rank and is shown.
#[tokio::test]
async fn a_gap_beyond_the_buffer_clears() {
    let mut publisher = Publisher::start(ReplayForm::WithTopic).await;
    let sidecar = start(&publisher, true).await;
    publisher.publish(one_block(1)).await;
    settled(&sidecar, 0).await;
    publisher.lose(&one_block(2));
    publisher.lose(&one_block(3));
    publisher.forget();
    publisher.publish(one_block(4)).await;
    settled(&sidecar, 3).await;
    assert_eq!(held(&sidecar).await, blocks([4]));
    let worker = state(&sidecar).await["workers"][0].clone();
    assert_eq!(worker["source"]["partial"], "history_lost");
    assert_eq!(worker["last_clear"], "history_lost");
    sidecar.stop().await;
}

/// Goal: an engine that restarts leaves nothing of its old cache, even when its
/// new numbers fit behind the old ones.
#[tokio::test]
async fn a_restart_forgets_the_old_cache() {
    let mut publisher = Publisher::start(ReplayForm::WithTopic).await;
    let (events, replay) = (publisher.events, publisher.replay);
    let sidecar = start(&publisher, true).await;
    publisher.publish(one_block(1)).await;
    publisher.publish(one_block(2)).await;
    settled(&sidecar, 1).await;
    drop(publisher);
    let mut publisher = Publisher::start_at(ReplayForm::WithTopic, events, replay).await;
    for number in 11..14 {
        publisher.publish(one_block(number)).await;
    }
    settled(&sidecar, 2).await;
    assert_eq!(held(&sidecar).await, blocks(11..14));
    sidecar.stop().await;
}

/// Goal: a replay socket that does not answer neither blocks the start nor
/// invents anything: the rank is learnt from live traffic.
#[tokio::test]
async fn without_replay_the_rank_is_learnt_from_live_traffic() {
    let mut publisher = Publisher::start(ReplayForm::Silent).await;
    publisher.publish(one_block(1)).await;
    let sidecar = start(&publisher, false).await;
    ready(&sidecar).await;
    eventually("the subscription stands", || async {
        state(&sidecar).await["workers"][0]["source"]["connected"] == true
    })
    .await;
    // PUB drops until it has seen the subscription, so until one arrives.
    let mut published = 1;
    while !state(&sidecar).await["workers"][0]["last_engine_sequence"].is_u64() {
        assert!(published < 100_000, "never applied");
        publisher.publish(one_block(2)).await;
        published += 1;
    }
    settled(&sidecar, published - 1).await;
    assert_eq!(held(&sidecar).await, blocks([2]));
    let worker = state(&sidecar).await["workers"][0].clone();
    assert_eq!(worker["source"]["partial"], "no_replay");
    assert_eq!(worker["parity"], "exact");
    sidecar.stop().await;
}

/// Goal: a worker whose publisher has died is fenced, and one that is then listed
/// as publishing elsewhere is let in again before anybody answers there.
#[tokio::test]
async fn a_fence_falls_with_the_place_that_raised_it() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("workers.yaml");
    let publisher = Publisher::start(ReplayForm::WithTopic).await;
    let listed = worker(&publisher, true);
    std::fs::write(&file, &listed).unwrap();
    let rest = format!("workers_file: {file:?}");
    let sidecar = Sidecar::start(config(3_000, &rest)).await.unwrap();
    let is_fenced = || async { state(&sidecar).await["workers"][0]["fenced"] == true };
    ready(&sidecar).await;
    assert!(!is_fenced().await);

    let (events, nobody) = (publisher.events.to_string(), "9");
    drop(publisher);
    eventually("the dead worker is fenced", is_fenced).await;

    std::fs::write(&file, listed.replace(&events, nobody)).unwrap();
    eventually("it is let in again", || async { !is_fenced().await }).await;
    eventually("nobody answers at the new place", || async {
        state(&sidecar).await["workers"][0]["source"]["failure"] == "refused"
    })
    .await;
    assert!(!is_fenced().await, "one that was never reached is not dead");
    sidecar.stop().await;
}
