//! Captures of Dynamo 1.6.1, vectors of its own encoder, and bytes that it would
//! never send.

#![expect(clippy::cast_possible_truncation, reason = "the tests' own small numbers")]

use bytes::Bytes;
use proptest::prelude::*;
use warmpath_core::event::{Group, Hashed, KvEvent, Medium, Removed};
use warmpath_core::hash::sequence_hash;
use warmpath_core::ids::{BlockHash, DpRank, EngineHash, SequenceHash, Worker, WorkerId};

use super::answer::{Answer, Item, decode_item};
use super::envelope::{
    Message, Topic, decode_envelope, decode_frames, encode_envelope, encode_frames,
};
use super::load::{decode_forward_pass, decode_kv_metrics, decode_load_stat};
use super::router_event::{Change, RouterEvent, decode_events};
use super::sequences::{
    Account, Added, SequenceEvent, Step, decode_sequences, encode_event, encode_events,
};
use super::*;
use crate::adapter::Skip;
use crate::adapter::tests::{fixture, hex};
use crate::fleet::RankLoad;

const REMOVED: &str = "84a9776f726b65725f69642aac73746f726167655f74696572a6646576696365b07265736964656e63795f646f6d61696ea6776f726b6572a56576656e7483a86576656e745f696402a46461746181a772656d6f76656481ac626c6f636b5f686173686573910ba764705f72616e6b00";
const CLEARED: &str = "83a9776f726b65725f69642aac73746f726167655f74696572a6646576696365a56576656e7483a86576656e745f696403a464617461a7636c6561726564a764705f72616e6b00";
const STORED_BATCH: &str = "9184a9776f726b65725f69642aac73746f726167655f74696572a6646576696365b07265736964656e63795f646f6d61696ea6776f726b6572a56576656e7483a86576656e745f696401a46461746181a673746f72656483ab706172656e745f68617368c0ae73746172745f706f736974696f6ec0a6626c6f636b739183aa626c6f636b5f686173680bab746f6b656e735f6861736816ad6d6d5f65787472615f696e666fc0a764705f72616e6b00";

fn worker(id: u64, rank: u32) -> Worker {
    Worker { id: WorkerId(id), rank: DpRank(rank) }
}

fn frames(message: &serde_json::Value) -> Vec<Bytes> {
    let frames = message["frames"].as_array().unwrap();
    frames.iter().map(|frame| Bytes::from(hex(frame.as_str().unwrap()))).collect()
}

/// The messages of one topic in a run of the ZMQ capture.
fn captured(run: &str, topic: Topic) -> Vec<Message> {
    fixture("dynamo-1.6.1-mocker-zmq.json")[run]
        .as_array()
        .unwrap()
        .iter()
        .filter(|message| {
            message["src"].as_str().unwrap().starts_with(&format!("ep:{}:", topic.name()))
        })
        .map(|message| decode_frames(&frames(message), topic.name(), topic).unwrap())
        .collect()
}

/// A batch of one event, written by an independent encoder.
fn batch_of(event: &[(&str, Option<&str>)], data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x91];
    rmp::encode::write_map_len(&mut bytes, event.len() as u32 + 2).unwrap();
    rmp::encode::write_str(&mut bytes, "worker_id").unwrap();
    rmp::encode::write_uint(&mut bytes, 42).unwrap();
    for (name, value) in event {
        rmp::encode::write_str(&mut bytes, name).unwrap();
        match value {
            Some(value) => rmp::encode::write_str(&mut bytes, value).unwrap(),
            None => rmp::encode::write_nil(&mut bytes).unwrap(),
        }
    }
    rmp::encode::write_str(&mut bytes, "event").unwrap();
    rmp::encode::write_map_len(&mut bytes, 2).unwrap();
    rmp::encode::write_str(&mut bytes, "event_id").unwrap();
    rmp::encode::write_uint(&mut bytes, 9).unwrap();
    rmp::encode::write_str(&mut bytes, "data").unwrap();
    bytes.extend_from_slice(data);
    bytes
}

fn change_of(event: &[(&str, Option<&str>)], data: &[u8]) -> (Change, Option<Skip>) {
    let events = decode_events(&batch_of(event, data)).unwrap();
    let [event] = &events[..] else { panic!("not one event") };
    assert_eq!((event.worker, event.id), (worker(42, 0), 9));
    (event.change.clone(), event.skipped)
}

const CLEARED_WORD: &[u8] = b"\xa7cleared";
const REMOVED_ELEVEN: &[u8] = b"\x81\xa7removed\x81\xacblock_hashes\x91\x0b";

fn removed_eleven(medium: Medium) -> Change {
    let pages = vec![EngineHash(11)];
    Change::Event(KvEvent::Removed(Removed { pages, medium, group: Group::default() }))
}

#[test]
fn dynamos_own_vectors_are_read() {
    let batch = |text: &str| [vec![0x91], hex(text)].concat();
    let event = |id, change| RouterEvent { worker: worker(42, 0), id, change, skipped: None };
    assert_eq!(decode_events(&batch(REMOVED)), Ok(vec![event(2, removed_eleven(Medium::Device))]));
    assert_eq!(decode_events(&batch(CLEARED)), Ok(vec![event(3, Change::ClearedAll)]));
    let blocks = vec![(EngineHash(11), BlockHash(22))];
    let stored = Hashed { blocks, parent: None, medium: Medium::Device };
    assert_eq!(
        decode_events(&hex(STORED_BATCH)),
        Ok(vec![event(1, Change::Event(KvEvent::Hashed(stored)))])
    );
    let load = hex(
        "85a9776f726b65725f69642aa764705f72616e6b00b46163746976655f6465636f64655f626c6f636b730ab56163746976655f70726566696c6c5f746f6b656e73c0ae6b765f757365645f626c6f636b730c",
    );
    let expected = RankLoad {
        active_decode_blocks: Some(10),
        kv_used_blocks: Some(12),
        ..RankLoad::default()
    };
    assert_eq!(decode_kv_metrics(&load), Ok((worker(42, 0), expected)));
    let free = hex(
        "85aa726571756573745f6964a27231a6776f726b657282a9776f726b65725f69642aa764705f72616e6b00a464617461a446726565a9726f757465725f696407a96c6f72615f6e616d65c0",
    );
    let events = decode_sequences(&free).unwrap();
    assert_eq!(events.len(), 1);
    assert_eq!((events[0].request.as_str(), events[0].worker), ("r1", worker(42, 0)));
    assert_eq!((events[0].router, &events[0].step), (7, &Step::Freed));
}

/// Goal: every event of the capture is read, in order, and its hashes are those
/// that the mocker chained itself.
#[test]
fn captured_events_chain_to_the_mockers_own_hashes() {
    let mut chained = 0;
    for run in ["agg_dp2", "host_offload_events"] {
        let messages = captured(run, Topic::KvEvents);
        assert!(!messages.is_empty());
        for message in messages {
            for event in decode_events(&message.payload).unwrap() {
                assert_eq!(event.skipped, None);
                let Change::Event(KvEvent::Hashed(stored)) = event.change else { continue };
                let of_host = run == "host_offload_events";
                let expected = if of_host { Medium::HostPinned } else { Medium::Device };
                assert_eq!(stored.medium, expected);
                let mut parent = stored.parent.map(|parent| SequenceHash(parent.0));
                for (engine, block) in stored.blocks {
                    let hash = sequence_hash(parent, block);
                    assert_eq!(hash.0, engine.0);
                    parent = Some(hash);
                    chained += 1;
                }
            }
        }
    }
    assert!(chained > 20, "{chained}");
}

#[test]
fn captured_ids_follow_each_other() {
    let ids: Vec<u64> = captured("agg_dp2", Topic::KvEvents)
        .iter()
        .filter(|message| message.publisher == 5_341_608_378_377_643)
        .flat_map(|message| decode_events(&message.payload).unwrap())
        .inspect(|event| assert_eq!(event.worker, worker(9_502_456_751_622_138_072, 1)))
        .map(|event| event.id)
        .collect();
    // Messages in between were left out of the capture.
    assert_eq!(ids[..4], [18, 19, 25, 26]);
    assert!(ids.is_sorted());
}

#[test]
fn nats_messages_are_envelopes() {
    let capture = fixture("dynamo-1.6.1-mocker-nats.json");
    let mut read = [0; 4];
    for message in capture["messages"].as_array().unwrap() {
        let subject = message["subject"].as_str().unwrap();
        let of = |topic: &&Topic| subject.ends_with(&format!(".{}", topic.name()));
        let topic = *Topic::ALL.iter().find(of).unwrap();
        let bytes = Bytes::from(hex(message["hex"].as_str().unwrap()));
        let payload = decode_envelope(&bytes, topic).unwrap().payload;
        match topic {
            Topic::KvEvents => assert!(!decode_events(&payload).unwrap().is_empty()),
            Topic::KvMetrics => {
                assert!(decode_kv_metrics(&payload).unwrap().1.kv_used_blocks.is_some())
            }
            Topic::ForwardPass => {
                assert!(decode_forward_pass(&payload).unwrap().1.running.is_some())
            }
            Topic::ActiveSequences => assert_eq!(decode_sequences(&payload).unwrap().len(), 1),
            Topic::Accounts => panic!("not one of Dynamo's"),
        }
        read[topic as usize] += 1;
        let other = Topic::ALL[(topic as usize + 1) % 4];
        assert_eq!(decode_envelope(&bytes, other), Err(PlaneError::Contradiction));
    }
    assert!(read.iter().all(|count| *count > 0), "{read:?}");
}

#[test]
fn frames_must_agree_with_their_envelope() {
    let capture = fixture("dynamo-1.6.1-mocker-zmq.json");
    let whole = capture["agg_dp2"].as_array().unwrap().iter();
    let whole = whole.map(frames).find(|frames| frames[0] == "kv-events").unwrap();
    let read = |frames: &[Bytes]| decode_frames(frames, "kv-events", Topic::KvEvents);
    let message = read(&whole).unwrap();
    assert_eq!(message.publisher, 5_341_608_378_377_643);
    assert_eq!(message.sequence, 15);
    assert_eq!(read(&whole[..3]), Err(PlaneError::Frames));
    for (at, bytes, error) in [
        (0, Bytes::from_static(b"kv-events-2"), PlaneError::Contradiction),
        (1, Bytes::from_static(&[0; 8]), PlaneError::Contradiction),
        (2, Bytes::from_static(&[0; 7]), PlaneError::Frames),
        (3, Bytes::new(), PlaneError::Frames),
        (3, whole[3].slice(..whole[3].len() - 1), PlaneError::Frames),
        (3, [&[2], &whole[3][1..]].concat().into(), PlaneError::Version),
    ] {
        let mut frames = whole.clone();
        frames[at] = bytes;
        assert_eq!(read(&frames), Err(error), "frame {at}");
    }
}

/// Goal: the domain decides whether an event counts, and how far a clear goes.
#[test]
fn only_the_workers_own_domain_counts() {
    let domain = |word| [("residency_domain", word)];
    assert_eq!(
        change_of(&domain(Some("worker")), CLEARED_WORD),
        (Change::Event(KvEvent::Cleared), None)
    );
    assert_eq!(change_of(&[], CLEARED_WORD), (Change::ClearedAll, None));
    assert_eq!(change_of(&[], REMOVED_ELEVEN), (removed_eleven(Medium::Device), None));
    for (word, skip) in [
        (Some("cache_owner"), Skip::NotTheWorkers),
        (Some("moon"), Skip::Malformed),
        (None, Skip::Malformed),
    ] {
        assert_eq!(change_of(&domain(word), CLEARED_WORD), (Change::Nothing, Some(skip)));
        assert_eq!(change_of(&domain(word), REMOVED_ELEVEN), (Change::Nothing, Some(skip)));
    }
}

#[test]
fn tiers_are_media_and_unknown_ones_are_not_the_device() {
    for (tier, expected) in [
        (Some("device"), (removed_eleven(Medium::Device), None)),
        (Some("host_pinned"), (removed_eleven(Medium::HostPinned), None)),
        (Some("disk"), (removed_eleven(Medium::Disk), None)),
        (Some("external"), (removed_eleven(Medium::External), None)),
        (Some("hbm4"), (Change::Nothing, Some(Skip::UnknownMedium))),
        (None, (Change::Nothing, Some(Skip::UnknownMedium))),
    ] {
        assert_eq!(change_of(&[("storage_tier", tier)], REMOVED_ELEVEN), expected);
    }
}

/// Goal: what may be gone is never reported as held.
#[test]
fn a_removal_that_cannot_be_read_clears() {
    let cleared = (Change::Event(KvEvent::Cleared), Some(Skip::Malformed));
    for data in [&b"\x81\xa7removed\x80"[..], b"\x81\xa7removed\x81\xacblock_hashes\x91\xa1x"] {
        assert_eq!(change_of(&[], data), cleared);
    }
    for (data, skip) in [
        (&b"\x81\xa6stored\x80"[..], Skip::Malformed),
        (b"\x81\xa5moved\x80", Skip::UnknownEvent),
        (b"\x07", Skip::Malformed),
    ] {
        assert_eq!(change_of(&[], data), (Change::Nothing, Some(skip)));
    }
}

#[test]
fn an_event_of_nobody_makes_the_message_unreadable() {
    let nobody =
        [vec![0x91], hex(&REMOVED.replace("a9776f726b65725f6964", "a9776f726b65725f6978"))];
    assert_eq!(decode_events(&nobody.concat()), Err(PlaneError::Missing));
    assert_eq!(decode_events(&hex(REMOVED)), Err(PlaneError::Malformed(MsgpackError::Shape)));
    let twice = [hex(STORED_BATCH), vec![0]].concat();
    assert_eq!(decode_events(&twice), Err(PlaneError::TrailingBytes));
}

#[test]
fn captured_loads_are_read() {
    let id = 9_502_456_751_622_138_072;
    let metrics = captured("agg_dp2", Topic::KvMetrics);
    let used: Vec<_> = metrics
        .iter()
        .map(|message| decode_kv_metrics(&message.payload).unwrap())
        .map(|(of, load)| (of, load.kv_used_blocks.unwrap(), load.active_prefill_tokens))
        .collect();
    assert_eq!(used[..4], [0, 0, 16, 17].map(|blocks| (worker(id, 1), blocks, None)));
    let passes = captured("agg_dp2", Topic::ForwardPass);
    let passes: Vec<_> = passes
        .iter()
        .map(|message| decode_forward_pass(&message.payload).unwrap())
        .map(|(of, load)| {
            (of.rank.0, load.running.unwrap(), load.waiting.unwrap(), load.active_prefill_tokens)
        })
        .collect();
    assert_eq!(passes[..3], [(0, 0, 0, Some(0)), (1, 1, 0, Some(7)), (1, 1, 0, Some(0))]);
}

#[test]
fn sglangs_loads_are_read() {
    let capture = fixture("sglang-0.5.21-zmq-publisher.json");
    let payload = hex(capture["load_stat"]["frames"][2].as_str().unwrap());
    let (rank, load) = decode_load_stat(&payload).unwrap();
    let expected = RankLoad {
        running: Some(4),
        waiting: Some(2),
        active_prefill_tokens: Some(3_000),
        cache_usage: Some(81_234.0 / 1_048_576.0),
        ..RankLoad::default()
    };
    assert_eq!((rank, load), (DpRank(0), expected));
    // Six fields are all that an older release has.
    let older = [&[0x96][..], &payload[1..23]].concat();
    assert_eq!(decode_load_stat(&older).unwrap().1.active_prefill_tokens, None);
    let pass = hex(capture["forward_pass_metrics"][0][2].as_str().unwrap());
    let (of, load) = decode_forward_pass(&pass).unwrap();
    assert_eq!(of, worker(1234, 0));
    assert_eq!((load.running, load.waiting), (Some(8), Some(2)));
    assert_eq!(load.active_prefill_tokens, Some(512 + 1_024));
}

#[test]
fn captured_sequences_are_read() {
    let messages = captured("replica_sync_router_events", Topic::ActiveSequences);
    let events: Vec<_> =
        messages.iter().flat_map(|message| decode_sequences(&message.payload).unwrap()).collect();
    let steps: Vec<_> = events.iter().map(|event| event.step.name()).collect();
    assert_eq!(steps, ["added", "prefill_completed", "freed"]);
    let Step::Added(added) = &events[0].step else { panic!("not added") };
    assert!(added.blocks.as_ref().unwrap().len() > 10);
    assert_eq!(added.blocks.as_ref().unwrap()[0], SequenceHash(5_818_935_156_418_368_504));
    assert!(events.iter().all(|event| event.request == events[0].request));
}

/// Goal: what we write is, byte for byte, what Dynamo's own router and workers
/// write.
/// Method: the captures of a frontend with `--router-replica-sync`, read and
/// written again, up to the frames of the socket.
#[test]
fn captured_sequences_are_written_the_same() {
    let capture = fixture("dynamo-1.6.1-mocker-zmq.json");
    let topic = Topic::ActiveSequences;
    let mut written = 0;
    for original in capture["replica_sync_router_events"].as_array().unwrap() {
        let original = frames(original);
        let message = decode_frames(&original, topic.name(), topic).unwrap();
        let events = decode_sequences(&message.payload).unwrap();
        assert_eq!(encode_events(&events), message.payload);
        let reader = Reader::new(&original[3][5..]);
        let mut at_ms = 0;
        each_field(&mut reader.clone(), |name, value| {
            if name == "published_at" {
                at_ms = value.u64()?;
            }
            Ok(())
        })
        .unwrap();
        let envelope = encode_envelope(&message, topic, at_ms);
        assert_eq!(encode_frames(&message, topic.name(), &envelope)[..], original[..]);
        written += 1;
    }
    assert_eq!(written, 3);
    // On NATS each event is alone; as the crate itself encodes them.
    let mut event = SequenceEvent {
        request: "r1".to_owned(),
        worker: worker(42, 0),
        router: 7,
        lora: None,
        step: Step::Freed,
    };
    let start = "85aa726571756573745f6964a27231a6776f726b657282a9776f726b65725f69642aa764705f72616e6b00a464617461";
    let end = "a9726f757465725f696407a96c6f72615f6e616d65c0";
    assert_eq!(encode_event(&event), hex(&format!("{start}a446726565{end}")));
    event.step = Step::PrefillCompleted;
    let mark = "b44d61726b50726566696c6c436f6d706c65746564";
    assert_eq!(encode_event(&event), hex(&format!("{start}{mark}{end}")));
}

#[test]
fn accounts_survive_the_wire() {
    let added = Added {
        blocks: Some(vec![SequenceHash(1), SequenceHash(u64::MAX)]),
        tracks_prefill: true,
        expected_output_tokens: Some(9),
        prefill_tokens: Some(300),
    };
    let event = |step| SequenceEvent {
        request: "r".to_owned(),
        worker: worker(u64::MAX, 3),
        router: 5,
        lora: Some("sql".to_owned()),
        step,
    };
    let untracked = Step::Added(Added::default());
    let events = vec![event(Step::Added(added)), event(untracked), event(Step::PrefillCompleted)];
    for account in [Account::Hello, Account::List { begins: true, ends: false, events }] {
        let bytes = account.encode(5);
        assert_eq!(Account::decode(&bytes), Ok((5, account)));
        for len in 0..bytes.len() {
            assert!(Account::decode(&bytes[..len]).is_err(), "cut at {len}");
        }
    }
}

#[test]
fn captured_answers_are_read() {
    let capture = fixture("dynamo-1.6.1-kv-recovery-tcp.json");
    let items = |query: usize| -> Vec<Item> {
        let frames = capture["queries"][query]["response_frames"].as_array().unwrap();
        let bodies = frames.iter().map(|frame| hex(frame["body_hex"].as_str().unwrap()));
        bodies.filter(|body| !body.is_empty()).map(|body| decode_item(&body).unwrap()).collect()
    };
    let last = Item { answer: None, is_final: true };
    let [Item { answer: Some(Answer::Dump { events, last: 7 }), is_final: false }, end] =
        &items(0)[..]
    else {
        panic!("no dump")
    };
    assert_eq!((events.len(), end), (7, &last));
    let of = worker(5_828_232_121_315_182_395, 0);
    assert!(events.iter().all(|event| event.worker == of && event.skipped.is_none()));
    let [Item { answer: Some(Answer::Events { events, last: 7 }), .. }, _] = &items(1)[..] else {
        panic!("no events")
    };
    assert_eq!(events.iter().map(|event| event.id).collect::<Vec<_>>(), [3, 4, 5, 6, 7]);
    let [Item { answer: Some(Answer::TooNew { newest: 7 }), .. }, _] = &items(2)[..] else {
        panic!("not too new")
    };
}

fn decode_all(bytes: &[u8]) {
    let shared = Bytes::copy_from_slice(bytes);
    let _ = decode_events(bytes);
    let _ = decode_item(bytes);
    let _ = decode_kv_metrics(bytes);
    let _ = decode_forward_pass(bytes);
    let _ = decode_load_stat(bytes);
    let _ = decode_sequences(bytes);
    let _ = Account::decode(bytes);
    let _ = decode_envelope(&shared, Topic::KvEvents);
    let eight = Bytes::from_static(&[0; 8]);
    let _ = decode_frames(&[Bytes::new(), eight.clone(), eight, shared], "", Topic::KvEvents);
}

/// Goal: a damaged capture is a value or an error.
#[test]
fn damaged_captures_are_read_or_refused() {
    let mut messages = vec![hex(STORED_BATCH)];
    for topic in Topic::ALL {
        messages.extend(captured("agg_dp2", topic).pop().map(|message| message.payload.to_vec()));
    }
    for message in messages {
        for at in 0..message.len() {
            decode_all(&message[..at]);
            for bit in 0..8 {
                let mut damaged = message.clone();
                damaged[at] ^= 1 << bit;
                decode_all(&damaged);
            }
        }
    }
}

proptest! {
    #[test]
    fn decoders_are_total(bytes: Vec<u8>) {
        decode_all(&bytes);
    }
}
