//! Real gRPC: the sidecar's streams as a filter sees them.

use std::collections::BTreeMap;

use crate::support::*;
use warmpath_core::cache_usage::CacheUsages;
use warmpath_core::card::{BlobId, Cards};
use warmpath_core::frame::Kind;
use warmpath_core::ids::WorkerSlot;
use warmpath_core::limits::{BLOB_PART_BYTES_MAX, DELTA_OPERATIONS_MAX};
use warmpath_core::roster::{Parity, Roster};
use warmpath_core::settings::RouterSettings;
use warmpath_core::uplink::{BlobPart, FetchBlob, Purpose};
use warmpath_sidecar::config::Config;
use warmpath_sidecar::run::Sidecar;

const LOG: [Kind; 5] = [Kind::Card, Kind::Settings, Kind::Roster, Kind::Delta, Kind::Resync];

async fn start_with(change: impl FnOnce(&mut Config)) -> (Publisher, Sidecar) {
    let publisher = Publisher::start(ReplayForm::WithTopic).await;
    let mut config = config(3_000, &worker(&publisher, true));
    change(&mut config);
    let sidecar = Sidecar::start(config).await.unwrap();
    ready(&sidecar).await;
    (publisher, sidecar)
}

async fn start() -> (Publisher, Sidecar) {
    start_with(|_| {}).await
}

/// A new follower up to the resync that every new follower gets.
async fn follow(sidecar: &Sidecar) -> (Filter, Got) {
    let mut filter = Filter::attach(sidecar.feed, Purpose::Follow, 0, 0).await;
    let resync = filter.next_of(&[Kind::Resync]).await;
    (filter, resync)
}

#[tokio::test]
async fn a_new_follower_gets_cards_settings_and_roster_first() {
    let (mut publisher, sidecar) = start().await;
    let mut filter = Filter::attach(sidecar.feed, Purpose::Follow, 0, 0).await;
    let card = filter.next_of(&LOG).await;
    assert_eq!(card.kind, Kind::Card);
    let cards = Cards::decode(&card.body).unwrap();
    assert_eq!(cards.models[0].name, "tiny");
    assert!(cards.models[0].tokenizer.is_ok());
    let settings = filter.next_of(&LOG).await;
    assert_eq!(settings.kind, Kind::Settings);
    assert_eq!(RouterSettings::decode(&settings.body), Ok(RouterSettings::default()));
    let roster = filter.next_of(&LOG).await;
    let workers = Roster::decode(&roster.body).unwrap().workers;
    assert_eq!(workers.len(), 1);
    assert_eq!((workers[0].worker.id.0, workers[0].parity), (7, Parity::Unproven));
    assert_eq!(workers[0].endpoint, "127.0.0.1:9");
    let resync = filter.next_of(&LOG).await;
    assert_eq!(resync.kind, Kind::Resync);
    assert!(resync.epoch != 0 && resync.sequence >= roster.sequence);
    // Then the log, without a hole.
    publisher.publish(one_block(1)).await;
    let delta = filter.next_of(&LOG).await;
    assert_eq!((delta.kind, delta.sequence), (Kind::Delta, resync.sequence + 1));
    let mut blocks = Blocks::new();
    apply(&mut blocks, &delta.body);
    assert_eq!(blocks, [(workers[0].slot.0, [hash_of(1)].into())].into());
    // The block proves the rank.
    let roster = filter.next_of(&LOG).await;
    assert_eq!((roster.kind, roster.sequence), (Kind::Roster, delta.sequence + 1));
    assert_eq!(Roster::decode(&roster.body).unwrap().workers[0].parity, Parity::Exact);
    let beat = filter.next_of(&[Kind::Heartbeat]).await;
    assert_eq!((beat.epoch, beat.sequence), (roster.epoch, roster.sequence));
    sidecar.stop().await;
    let end = loop {
        match filter.next().await {
            Ok(Some(_)) => {}
            other => break other,
        }
    };
    assert!(end.is_err_and(|status| status.code() == tonic::Code::Unavailable));
}

/// Goal: what is set reaches the filters, and the status page says where it came
/// from.
#[tokio::test]
async fn settings_reach_the_filters_and_the_status_page() {
    let file = "router: {router_temperature: 0.5, busy_threshold: 0.75}\n";
    let publisher = Publisher::start(ReplayForm::WithTopic).await;
    let config = config(3_000, &format!("{file}{}", worker(&publisher, true)));
    let sidecar = Sidecar::start(config).await.unwrap();
    ready(&sidecar).await;
    let mut filter = Filter::attach(sidecar.feed, Purpose::Follow, 0, 0).await;
    let got = filter.next_of(&[Kind::Settings]).await;
    let settings = RouterSettings::decode(&got.body).unwrap().default;
    assert_eq!((settings.router_temperature, settings.busy_thresholds.busy), (0.5, Some(0.75)));
    let router = &state(&sidecar).await["router"];
    assert_eq!(router["settings"]["router_temperature"], 0.5);
    assert_eq!(router["settings"]["http_overload_status_code"], 529.0);
    assert_eq!(router["from"]["busy_threshold"], "router.busy_threshold");
    assert_eq!(router["from"].as_object().unwrap().len(), 2);
    sidecar.stop().await;
}

/// Goal: followers are told how full caches are, those that come later, too, and
/// it is no frame of the log.
#[tokio::test]
async fn followers_are_told_how_full_caches_are() {
    let publisher = Publisher::start(ReplayForm::WithTopic).await;
    let (url, pages) = metrics_page("vllm:kv_cache_usage_perc{engine=\"0\"} 0.5\n").await;
    let listed = worker(&publisher, true).replace("id: 7", &format!("id: 7, metrics: \"{url}\""));
    let sidecar = Sidecar::start(config(3_000, &listed)).await.unwrap();
    ready(&sidecar).await;
    let mut last = 0;
    for _ in 0..2 {
        let (mut filter, resync) = follow(&sidecar).await;
        let told = filter.next_of(&[Kind::CacheUsage]).await;
        let usages = CacheUsages::decode(&told.body).unwrap();
        let share = usages.of_slot(WorkerSlot(0)).and_then(|it| it.share());
        assert!(share.is_some_and(|share| (share - 0.5).abs() < 1e-4), "{share:?}");
        assert_eq!((told.epoch, told.sequence), (resync.epoch, 0));
        let beat = filter.next_of(&[Kind::Heartbeat]).await;
        assert!(last == 0 || beat.sequence == last, "told again without a log frame");
        last = beat.sequence;
    }
    pages.abort();
    sidecar.stop().await;
}

/// Goal: a follower that reconnects goes on where it was, and one that asks for
/// what is not held any more, or of another epoch, is told.
#[tokio::test]
async fn followers_resume_where_they_were() {
    let (mut publisher, sidecar) = start_with(|config| config.retained_bytes = 20_000).await;
    let (mut first, _) = follow(&sidecar).await;
    publisher.publish(one_block(1)).await;
    let delta = first.next_of(&[Kind::Delta]).await;
    let roster = first.next_of(&[Kind::Roster]).await;
    drop(first);
    for number in 2..5 {
        publisher.publish(one_block(number)).await;
        settled(&sidecar, number - 1).await;
    }
    let mut second =
        Filter::attach(sidecar.feed, Purpose::Follow, delta.epoch, roster.sequence).await;
    let mut blocks = Blocks::new();
    let mut last = roster.sequence;
    while blocks.values().map(|held| held.len()).sum::<usize>() < 3 {
        let got = second.next_of(&[Kind::Delta, Kind::Resync]).await;
        assert_eq!((got.kind, got.sequence), (Kind::Delta, last + 1));
        last = got.sequence;
        apply(&mut blocks, &got.body);
    }
    // More than is retained: 1000 blocks take 8 KB and more.
    let mut publish_more = async |numbers: std::ops::Range<u64>| {
        for start in numbers.step_by(1000) {
            let events: Vec<_> =
                (start..start + 1000).map(|it| stored(&[it], None, &tokens_of(it))).collect();
            publisher.publish(batch(&events)).await;
        }
    };
    publish_more(100..6_100).await;
    settled(&sidecar, 9).await;
    for (epoch, sequence) in [(delta.epoch, 1), (delta.epoch ^ 1, last), (delta.epoch, 1 << 40)] {
        let mut filter = Filter::attach(sidecar.feed, Purpose::Follow, epoch, sequence).await;
        let got = filter.next_of(&[Kind::Delta, Kind::Resync]).await;
        assert_eq!(got.kind, Kind::Resync, "epoch {epoch} sequence {sequence}");
        assert_eq!(got.epoch, delta.epoch);
    }
    sidecar.stop().await;
}

/// Goal: a snapshot is exactly the state after the log frame that it names,
/// whatever happens while it is taken.
/// Method: a follower keeps the state after every frame; meanwhile blocks come
/// and go, and snapshots are taken one after the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn snapshots_are_exact_under_change() {
    let (mut publisher, sidecar) = start().await;
    let (mut filter, resync) = follow(&sidecar).await;
    let follower = tokio::spawn(async move {
        let mut states: BTreeMap<u64, Blocks> = BTreeMap::from([(resync.sequence, Blocks::new())]);
        let mut blocks = Blocks::new();
        loop {
            let got = filter.next_of(&LOG).await;
            assert_eq!(got.sequence, *states.last_key_value().unwrap().0 + 1);
            if got.kind == Kind::Delta {
                apply(&mut blocks, &got.body);
            }
            states.insert(got.sequence, blocks.clone());
            // The last message stores block 1 alone.
            if blocks.values().flatten().eq([&hash_of(1)]) {
                return states;
            }
        }
    });
    let changes = tokio::spawn(async move {
        for round in 0..60_u64 {
            let events: Vec<_> = (0..100)
                .map(|at| stored(&[10 + round * 100 + at], None, &tokens_of(10 + round * 100 + at)))
                .collect();
            publisher.publish(batch(&events)).await;
            if round > 0 {
                let old: Vec<u64> = (0..100).map(|at| 10 + (round - 1) * 100 + at).collect();
                publisher.publish(batch(&[removed(&old)])).await;
            }
            tokio::task::yield_now().await;
        }
        let old: Vec<u64> = (0..100).map(|at| 10 + 59 * 100 + at).collect();
        publisher.publish(batch(&[removed(&old), stored(&[1], None, &tokens_of(1))])).await;
        publisher
    });
    let mut snapshots = Vec::new();
    while !changes.is_finished() || snapshots.len() < 5 {
        snapshots.push(Filter::snapshot(sidecar.feed).await);
    }
    let publisher = changes.await.unwrap();
    let states = follower.await.unwrap();
    snapshots.push(Filter::snapshot(sidecar.feed).await);
    for (sequence, blocks) in &snapshots {
        if let Some(expected) = states.get(sequence) {
            assert_eq!(blocks, expected, "after frame {sequence}");
        } else {
            // Before the follower's first frame, or after its last.
            assert!(*sequence > *states.last_key_value().unwrap().0 || blocks.is_empty());
        }
    }
    drop(publisher);
    sidecar.stop().await;
}

/// Goal: no part is sent without credit, and no more than the credit.
#[tokio::test]
async fn parts_are_sent_against_credit() {
    let (mut publisher, sidecar) = start().await;
    let count = DELTA_OPERATIONS_MAX as u64 * 2 + 10;
    for start in (10..10 + count).step_by(500) {
        let events: Vec<_> = (start..(start + 500).min(10 + count))
            .map(|it| stored(&[it], None, &tokens_of(it)))
            .collect();
        publisher.publish(batch(&events)).await;
    }
    settled(&sidecar, count.div_ceil(500) - 1).await;

    let mut filter = Filter::attach(sidecar.feed, Purpose::Snapshot, 0, 0).await;
    assert_eq!(filter.next().await.unwrap().unwrap().kind, Kind::SnapshotStart);
    for _ in 0..2 {
        assert!(filter.is_silent().await, "nothing without credit");
        filter.more(1).await;
        assert_eq!(filter.next().await.unwrap().unwrap().kind, Kind::SnapshotPart);
    }
    filter.more(5).await;
    assert_eq!(filter.next().await.unwrap().unwrap().kind, Kind::SnapshotPart);
    assert_eq!(filter.next().await.unwrap().unwrap().kind, Kind::SnapshotEnd);

    let mut filter = Filter::attach(sidecar.feed, Purpose::Follow, 0, 0).await;
    let card = filter.next_of(&[Kind::Card]).await;
    let blob = Cards::decode(&card.body).unwrap().models[0].tokenizer.unwrap();
    filter.fetch(FetchBlob { blob, offset: 0 }).await;
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < blob.len {
        assert!(filter.has_no(Kind::BlobPart).await, "nothing without credit");
        filter.more(1).await;
        let got = filter.next_of(&[Kind::BlobPart]).await;
        let part = BlobPart::decode(&got.body).unwrap();
        assert_eq!((part.blob, part.offset), (blob, bytes.len() as u64));
        assert!(part.bytes.len() <= BLOB_PART_BYTES_MAX);
        bytes.extend_from_slice(part.bytes);
    }
    assert_eq!(BlobId::of(&bytes), blob);
    // A blob that does not exist is one empty part.
    filter.fetch(FetchBlob { blob: BlobId { hash: 1, len: 2 }, offset: 0 }).await;
    filter.more(1).await;
    let got = filter.next_of(&[Kind::BlobPart]).await;
    assert!(BlobPart::decode(&got.body).unwrap().bytes.is_empty());
    sidecar.stop().await;
}

/// Goal: a follower that does not read holds nobody up and no memory; when it
/// reads again it is told to take the index anew.
#[tokio::test]
async fn a_slow_follower_falls_out_of_the_log() {
    let (mut publisher, sidecar) = start_with(|config| config.retained_bytes = 100_000).await;
    let (mut slow, resync) = follow(&sidecar).await;
    // Far more than log, queue and the connection's windows hold.
    let mut number = 0;
    for _ in 0..300 {
        let events: Vec<_> = (0..1000)
            .map(|_| {
                number += 1;
                stored(&[number], None, &tokens_of(number))
            })
            .collect();
        publisher.publish(batch(&events)).await;
    }
    settled(&sidecar, 299).await;
    publisher.publish(one_block(1 << 20)).await;
    settled(&sidecar, 300).await;
    let last = state(&sidecar).await["sequence"].as_u64().unwrap();
    let mut position = resync.sequence;
    let mut resyncs = 0;
    while position < last {
        let got = slow.next_of(&[Kind::Delta, Kind::Roster, Kind::Resync]).await;
        match got.kind {
            Kind::Resync => {
                assert!(got.sequence > position);
                position = got.sequence;
                resyncs += 1;
            }
            // The latest roster comes once more with every resync.
            Kind::Roster if got.sequence <= position => {}
            _ => {
                assert_eq!(got.sequence, position + 1, "no hole but a resync");
                position = got.sequence;
            }
        }
    }
    assert!(resyncs > 0);
    let (_, metrics) = page(&sidecar, "/metrics").await;
    let line = format!("warmpath_feed_resyncs_total{{reason=\"slow\"}} {resyncs}");
    assert!(metrics.contains(&line), "{metrics}");
    sidecar.stop().await;
}

/// Goal: while the sidecar has not heard of all sources, a filter keeps the
/// index it has: it gets cards and rosters, and heartbeats with its own
/// position, and no resync; and no snapshot is taken of half an index.
#[tokio::test]
async fn filters_keep_their_index_until_ours_is_whole() {
    // Ports that were free a moment ago, with nobody behind them.
    let gone = Publisher::start(ReplayForm::WithTopic).await;
    let (events, replay) = (gone.events, gone.replay);
    let config = config(60_000, &worker(&gone, true));
    drop(gone);
    let sidecar = Sidecar::start(config).await.unwrap();
    let mut filter = Filter::attach(sidecar.feed, Purpose::Follow, 99, 1234).await;
    let mut snapshot = Filter::attach(sidecar.feed, Purpose::Snapshot, 0, 0).await;
    snapshot.more(100).await;
    let mut kinds = Vec::new();
    for _ in 0..5 {
        let got = filter.next().await.unwrap().unwrap();
        if got.kind == Kind::Heartbeat {
            assert_eq!((got.epoch, got.sequence), (99, 1234));
        }
        kinds.push(got.kind);
    }
    assert!(!kinds.contains(&Kind::Resync));
    assert!(snapshot.is_silent().await);
    let (status, body) = page(&sidecar, "/readyz").await;
    assert_eq!(status, 503);
    assert!(body.contains("synchronising"), "{body}");

    let mut publisher = Publisher::start_at(ReplayForm::WithTopic, events, replay).await;
    publisher.publish(one_block(1)).await;
    let resync = filter.next_of(&[Kind::Resync]).await;
    assert_ne!(resync.epoch, 99);
    let start = snapshot.next().await.unwrap().unwrap();
    assert_eq!(start.kind, Kind::SnapshotStart);
    assert!(start.sequence >= resync.sequence);
    ready(&sidecar).await;
    sidecar.stop().await;
}

/// Goal: a source that never answers delays the filters no longer than the
/// deadline.
#[tokio::test]
async fn the_deadline_opens_the_index() {
    let gone = Publisher::start(ReplayForm::WithTopic).await;
    let config = config(200, &worker(&gone, true));
    drop(gone);
    let sidecar = Sidecar::start(config).await.unwrap();
    let (_, resync) = follow(&sidecar).await;
    assert!(resync.sequence > 0);
    assert_eq!(Filter::snapshot(sidecar.feed).await.1, Blocks::new());
    sidecar.stop().await;
}

#[tokio::test]
async fn streams_that_say_something_odd_are_ended() {
    let (_publisher, sidecar) = start().await;
    // Not a hello.
    let mut filter = Filter::attach_silently(sidecar.feed).await;
    filter.more(1).await;
    assert_eq!(filter.next().await.unwrap_err().code(), tonic::Code::InvalidArgument);
    // A frame that only the sidecar sends.
    let (mut filter, _) = follow(&sidecar).await;
    filter.say(Kind::Delta, &[]).await;
    let error = loop {
        match filter.next().await {
            Ok(got) => assert!(got.is_some()),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code(), tonic::Code::InvalidArgument);
    sidecar.stop().await;
}

/// Goal: a worker list with a mistake changes nothing and is shown; the next
/// good one is taken over, and who went is cleared in the feed.
#[tokio::test]
async fn the_worker_file_is_taken_over_when_it_changes() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("workers.yaml");
    let mut publisher = Publisher::start(ReplayForm::WithTopic).await;
    let good = worker(&publisher, true);
    std::fs::write(&file, &good).unwrap();
    let rest = format!("workers_file: {file:?}");
    let sidecar = Sidecar::start(config(3_000, &rest)).await.unwrap();
    ready(&sidecar).await;
    let (mut filter, _) = follow(&sidecar).await;
    publisher.publish(one_block(1)).await;
    let mut blocks = Blocks::new();
    apply(&mut blocks, &filter.next_of(&[Kind::Delta]).await.body);
    assert_eq!(blocks.len(), 1);

    std::fs::write(&file, good.replace("model: tiny", "model: huge")).unwrap();
    eventually("the mistake is shown", || async {
        let error = state(&sidecar).await["workers_list_error"].clone();
        error.as_str().is_some_and(|it| it.contains("workers[0].model: \"huge\" is not among"))
    })
    .await;
    assert_eq!(state(&sidecar).await["workers"].as_array().unwrap().len(), 1);
    assert_eq!(page(&sidecar, "/readyz").await.0, 200);

    std::fs::write(&file, "workers: [{id: 8, model: tiny, endpoint: \"127.0.0.1:8\"}]").unwrap();
    apply(&mut blocks, &filter.next_of(&[Kind::Delta]).await.body);
    assert_eq!(blocks, Blocks::new());
    let roster = loop {
        let got = filter.next_of(&[Kind::Roster]).await;
        let workers = Roster::decode(&got.body).unwrap().workers;
        if workers[0].worker.id.0 == 8 {
            break workers;
        }
    };
    assert_eq!((roster.len(), roster[0].parity), (1, Parity::Blind));
    assert_ne!(roster[0].slot.0, 0, "a slot is not used again at once");
    let state = state(&sidecar).await;
    assert_eq!(state["workers_list_error"], serde_json::Value::Null);
    sidecar.stop().await;
}

#[tokio::test]
async fn the_pages_say_how_things_stand() {
    let (mut publisher, sidecar) = start().await;
    publisher.publish(one_block(1)).await;
    settled(&sidecar, 0).await;
    let _snapshot = Filter::snapshot(sidecar.feed).await;
    assert_eq!(page(&sidecar, "/healthz").await, (200, "ok\n".to_owned()));
    assert_eq!(page(&sidecar, "/readyz").await, (200, r#"{"ready":true,"reasons":[]}"#.to_owned()));
    let state = state(&sidecar).await;
    assert_eq!(state["workers"][0]["id"], 7);
    assert_eq!(state["workers"][0]["blocks"], 1);
    assert_eq!(state["workers"][0]["parity"], "exact");
    assert_eq!(state["models"][0]["tokenizer"]["state"], "ready");
    let (status, metrics) = page(&sidecar, "/metrics").await;
    assert_eq!(status, 200);
    for line in [
        "warmpath_index_blocks 1",
        "warmpath_blocks_stored_total 1",
        "warmpath_ranks{parity=\"exact\"} 1",
        "warmpath_ready 1",
        "warmpath_feed_snapshots_total{outcome=\"complete\"} 1",
    ] {
        assert!(metrics.contains(line), "{line} in\n{metrics}");
    }
    sidecar.stop().await;
}
