//! Byte fixtures of real publishers, and bytes that no publisher would send.

#![expect(
    clippy::cast_possible_truncation,
    clippy::string_slice,
    clippy::too_many_lines,
    reason = "the tests' own small numbers"
)]

use proptest::prelude::*;
use warmpath_core::event::{Group, Medium, ObjectHash, Removed, Stored};
use warmpath_core::ids::EngineHash;

use super::*;

mod captures;

pub(crate) fn fixture(name: &str) -> serde_json::Value {
    let path = format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

pub(crate) fn hex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

fn payload(frames: &serde_json::Value) -> Vec<u8> {
    hex(frames.as_array().unwrap().last().unwrap().as_str().unwrap())
}

fn live(file: &str, case: usize) -> Vec<Batch> {
    let engine = if file.starts_with("sglang") { Engine::Sglang } else { Engine::Vllm };
    fixture(file)["cases"][case]["live"]
        .as_array()
        .unwrap()
        .iter()
        .map(|frames| decode(engine, &payload(frames)).unwrap())
        .collect()
}

fn stored(pages: &[u64], parent: Option<u64>, tokens: impl IntoIterator<Item = u32>) -> Stored {
    Stored {
        pages: pages.iter().copied().map(EngineHash).collect(),
        parent: parent.map(EngineHash),
        tokens: tokens.into_iter().collect(),
        page_size: 16,
        pairs: false,
        lora: None,
        cache_salt: None,
        objects: Vec::new(),
        understood: pages.len(),
        medium: Medium::Device,
        group: Group::default(),
    }
}

fn removed(pages: &[u64], group: Group) -> KvEvent {
    let pages = pages.iter().copied().map(EngineHash).collect();
    KvEvent::Removed(Removed { pages, medium: Medium::Device, group })
}

const MAIN: Group = Group { index: Some(0), kind: Some(GroupKind::Main) };
const FIRST: Group = Group { index: Some(0), kind: None };

#[test]
fn vllm_maps_with_integer_hashes() {
    let batches = live("vllm-0.31.0-zmq-publisher.json", 0);
    assert!(batches.iter().all(|batch| batch.rank == Some(0)));
    let root = Stored {
        group: MAIN,
        ..stored(&[9_456_194_658_251_458_099, 5_015_400_756_495_221_551], None, 100..132)
    };
    assert_eq!(batches[0].events, [KvEvent::Stored(root)]);
    let parent = Some(5_015_400_756_495_221_551);
    let child = Stored { group: MAIN, ..stored(&[2_312_914_406_046_551_626], parent, 132..148) };
    let window = Stored {
        group: Group { index: Some(1), kind: Some(GroupKind::Other) },
        ..stored(&[5_464_512_358_275_206_189], parent, 132..148)
    };
    assert_eq!(batches[1].events, [KvEvent::Stored(child), KvEvent::Stored(window)]);
    let keyed = Stored {
        group: MAIN,
        lora: Some("adapter-a".into()),
        cache_salt: Some("salt-1".into()),
        objects: vec![ObjectHash { page: 0, hash: 0x0123_4567_89ab_cdef }],
        ..stored(&[8_539_470_838_668_198_164], None, 0..16)
    };
    assert_eq!(batches[2].events, [KvEvent::Stored(keyed)]);
    assert_eq!(batches[3].events, [removed(&[2_312_914_406_046_551_626], FIRST)]);
    let placeholder = Stored {
        medium: Medium::HostPinned,
        group: FIRST,
        page_size: 0,
        ..stored(&[9_456_194_658_251_458_099], None, [])
    };
    assert_eq!(batches[4].events, [KvEvent::Stored(placeholder)]);
    assert_eq!(batches[4].skipped, [Skip::Remote]);
    let KvEvent::Removed(from_host) = &batches[5].events[0] else { panic!() };
    assert_eq!(from_host.medium, Medium::HostPinned);
    assert_eq!(batches[6].events, [KvEvent::Cleared]);
}

#[test]
fn vllm_maps_with_bytes_hashes() {
    let batches = live("vllm-0.31.0-zmq-publisher.json", 1);
    assert!(batches.iter().all(|batch| batch.rank == Some(2)));
    let root = Stored {
        group: MAIN,
        ..stored(&[0x833b_26f0_cc06_4633, 0x459a_486a_511f_832f], None, 0..32)
    };
    assert_eq!(batches[0].events, [KvEvent::Stored(root)]);
    assert_eq!(batches[1].events, [removed(&[0x459a_486a_511f_832f], FIRST)]);
    assert_eq!(batches[2].events, [KvEvent::Cleared]);
}

#[test]
fn sglang_maps() {
    let batches = live("sglang-0.5.21-zmq-publisher.json", 0);
    let (a, b) = (0x5fec_eb66_ffc8_6f38, 0x6b86_b273_ff34_fce1);
    let root = Stored { page_size: 64, ..stored(&[a, b], None, 0..128) };
    assert_eq!(batches[0].events, [KvEvent::Stored(root)]);
    let negative = (-3_138_060_911_502_289_170_i64).cast_unsigned();
    let salted = Stored {
        page_size: 64,
        cache_salt: Some("tenant-a".into()),
        ..stored(&[negative], Some(b), 128..192)
    };
    assert_eq!(batches[1].events, [KvEvent::Stored(salted)]);
    let host = Stored { page_size: 64, medium: Medium::HostPinned, ..stored(&[a], None, 0..64) };
    assert_eq!(batches[2].events, [KvEvent::Stored(host)]);
    let pairs = Stored {
        page_size: 2,
        pairs: true,
        ..stored(&[(-417_513_864_012_699_362_i64).cast_unsigned()], None, [1, 2, 3])
    };
    assert_eq!(batches[3].events, [KvEvent::Stored(pairs)]);
    assert_eq!(batches[4].events, [removed(&[negative], Group::default())]);
    assert_eq!(batches[5].events, [KvEvent::Cleared]);
    assert_eq!(live("sglang-0.5.21-zmq-publisher.json", 1)[0].rank, Some(3));
}

/// Goal: every layout that was ever released decodes, under the engine that
/// sent it, to the same event, as far as the layout could say it.
#[test]
fn legacy_layouts() {
    let parent = 0x6729_d73a_27fb_57e9;
    let hash = 0xc01e_52dd_b787_5b4b;
    let signed = 0xffff_8fb7_79f2_2087;
    let group = Group { index: Some(0), kind: None };
    let plain = stored(&[hash], None, 1..17);
    let expected: [(&str, Vec<KvEvent>); 11] = [
        (
            "vllm_0.9 (#16750)",
            vec![
                KvEvent::Stored(stored(&[signed], None, 1..17)),
                removed(&[signed], Group::default()),
                KvEvent::Cleared,
            ],
        ),
        (
            "vllm_0.9.x/0.10",
            vec![KvEvent::Stored(plain.clone()), removed(&[hash], Group::default())],
        ),
        (
            "vllm_0.10.2/0.11",
            vec![
                KvEvent::Stored(Stored { parent: Some(EngineHash(parent)), ..plain.clone() }),
                removed(&[hash], Group::default()),
                KvEvent::Cleared,
            ],
        ),
        (
            "vllm_0.11 bytes",
            vec![KvEvent::Stored(Stored { parent: Some(EngineHash(parent)), ..plain.clone() })],
        ),
        (
            "vllm after 0.11.2",
            vec![KvEvent::Stored(Stored { lora: Some("adapter-a".into()), ..plain.clone() })],
        ),
        (
            "vllm (#33304)",
            vec![KvEvent::Stored(Stored {
                objects: vec![ObjectHash { page: 0, hash: 0xaaaa_aaaa_aaaa_aaaa }],
                ..plain.clone()
            })],
        ),
        (
            "vllm (#37688)",
            vec![KvEvent::Stored(Stored { group, ..plain.clone() }), removed(&[hash], group)],
        ),
        (
            "vllm (#40984)",
            vec![KvEvent::Stored(Stored {
                group: Group { index: Some(1), kind: Some(GroupKind::Other) },
                ..plain.clone()
            })],
        ),
        (
            "vllm dev snapshot",
            vec![
                KvEvent::Stored(Stored { group: MAIN, ..stored(&[hash], None, 0..16) }),
                removed(&[hash], group),
                KvEvent::Cleared,
            ],
        ),
        (
            "sglang before #37482",
            vec![KvEvent::Stored(stored(&[(-5_i64).cast_unsigned()], None, 1..17))],
        ),
        (
            "sglang positional + trailing",
            vec![KvEvent::Stored(Stored {
                cache_salt: Some("tenant-a".into()),
                ..stored(&[(-5_i64).cast_unsigned()], None, 1..17)
            })],
        ),
    ];
    let payloads = fixture("legacy-positional-payloads.json")["payloads"].clone();
    let payloads = payloads.as_object().unwrap();
    assert_eq!(payloads.len(), expected.len());
    for (name, bytes) in payloads {
        let (_, events) = expected.iter().find(|(start, _)| name.starts_with(start)).unwrap();
        let engine = if name.starts_with("sglang") { Engine::Sglang } else { Engine::Vllm };
        let batch = decode(engine, &hex(bytes.as_str().unwrap())).unwrap();
        for (actual, expected) in batch.events.iter().zip(events) {
            // The fixtures' tokens start at 0 or 1; what counts is the shape.
            match (actual, expected) {
                (KvEvent::Stored(actual), KvEvent::Stored(expected)) => {
                    assert_eq!(actual.tokens.len(), 16, "{name}");
                    let tokens = actual.tokens.clone();
                    assert_eq!(actual, &Stored { tokens, ..expected.clone() }, "{name}");
                }
                _ => assert_eq!(actual, expected, "{name}"),
            }
        }
        assert_eq!(batch.events.len(), events.len(), "{name}");
        assert!(batch.skipped.is_empty(), "{name}");
    }
}

#[test]
fn tensorrt_llm_streaming() {
    let frames = fixture("trtllm-events.json")["native_streaming_frames"].clone();
    let batches: Vec<Batch> = frames
        .as_array()
        .unwrap()
        .iter()
        .map(|frames| decode(Engine::Vllm, &payload(frames)).unwrap())
        .collect();
    let root = Stored { page_size: 32, ..stored(&[11111, 22222], None, 0..64) };
    assert_eq!(batches[0].events, [KvEvent::Stored(root)]);
    let KvEvent::Stored(second) = &batches[1].events[0] else { panic!() };
    assert_eq!(second.parent, Some(EngineHash(22222)));
    assert_eq!(second.objects, [ObjectHash { page: 0, hash: 0x0123_4567_89ab_cdef }]);
    assert_eq!(second.tokens.len(), 32);
    assert_eq!(batches[2].events, [removed(&[33333], Group::default())]);
}

/// Goal: every raw capture of Dynamo's mocker decodes without anything being
/// skipped, and the mocker's own hashes chain as ours do.
#[test]
fn dynamo_mocker_raw_streams() {
    let mut events = 0;
    let trtllm = fixture("dynamo-1.6.1-mocker-trtllm-raw-zmq.json");
    let raw = fixture("dynamo-1.6.1-mocker-raw-zmq.json")["agg_dp2"].clone();
    let replay = fixture("dynamo-1.6.1-mocker-replay.json")["dealer_replies"].clone();
    let frames = trtllm.as_array().unwrap().iter().chain(raw.as_array().unwrap());
    let mut payloads: Vec<Vec<u8>> = frames.map(|message| payload(&message["frames"])).collect();
    payloads.extend(replay.as_array().unwrap().iter().map(payload).filter(|it| !it.is_empty()));
    for bytes in payloads {
        let batch = decode(Engine::Vllm, &bytes).unwrap();
        assert!(batch.skipped.is_empty());
        assert!(!batch.events.is_empty());
        for event in &batch.events {
            events += 1;
            if let KvEvent::Stored(stored) = event {
                assert_eq!(stored.tokens.len(), stored.pages.len() * 16);
                let mut previous = stored.parent.map(|parent| parent.0);
                for (page, tokens) in stored.pages.iter().zip(stored.tokens.chunks(16)) {
                    let chained = warmpath_core::hash::sequence_hash(
                        previous.map(warmpath_core::ids::SequenceHash),
                        warmpath_core::hash::block_hash(tokens, 1337),
                    );
                    assert_eq!(chained.0, page.0);
                    previous = Some(page.0);
                }
            }
        }
    }
    assert_eq!(events, 17);
}

fn map_event(write: impl FnOnce(&mut Vec<u8>) -> u32) -> Vec<u8> {
    let mut fields = Vec::new();
    let count = write(&mut fields);
    let mut bytes = vec![0x92, 0xc0, 0x91];
    rmp::encode::write_map_len(&mut bytes, count).unwrap();
    bytes.extend(fields);
    bytes
}

fn key(bytes: &mut Vec<u8>, name: &str) {
    rmp::encode::write_str(bytes, name).unwrap();
}

#[test]
fn a_removal_that_cannot_be_read_clears() {
    let bytes = map_event(|bytes| {
        key(bytes, "type");
        key(bytes, "BlockRemoved");
        key(bytes, "block_hashes");
        key(bytes, "not a list");
        2
    });
    let batch = decode(Engine::Vllm, &bytes).unwrap();
    assert_eq!(batch.events, [KvEvent::Cleared]);
    assert_eq!(batch.skipped, [Skip::Malformed]);
}

#[test]
fn unknown_events_media_and_owners_are_skipped() {
    let with = |name: &str, value: &str| {
        map_event(|bytes| {
            key(bytes, "type");
            key(bytes, "BlockRemoved");
            key(bytes, "block_hashes");
            bytes.extend([0x91, 7]);
            key(bytes, name);
            key(bytes, value);
            3
        })
    };
    for (name, value, expected) in [
        ("medium", "HBM9", Skip::UnknownMedium),
        ("locality", "REMOTE", Skip::Remote),
        ("locality", "SOMEWHERE", Skip::Remote),
        ("ownership", "kvcr", Skip::NotTheWorkers),
    ] {
        let batch = decode(Engine::Vllm, &with(name, value)).unwrap();
        assert_eq!((batch.events, batch.skipped), (vec![], vec![expected]), "{name}={value}");
    }
    let batch = decode(Engine::Vllm, &with("colour", "blue")).unwrap();
    assert_eq!(batch.events, [removed(&[7], Group::default())]);
    let unknown = map_event(|bytes| {
        key(bytes, "type");
        key(bytes, "BlockBlessed");
        1
    });
    assert_eq!(decode(Engine::Vllm, &unknown).unwrap().skipped, [Skip::UnknownEvent]);
}

#[test]
fn keys_that_cannot_be_hashed_end_what_is_understood() {
    let bytes = map_event(|bytes| {
        key(bytes, "type");
        key(bytes, "BlockStored");
        key(bytes, "block_hashes");
        bytes.extend([0x93, 1, 2, 3]);
        key(bytes, "token_ids");
        bytes.extend([0x93, 1, 2, 3]);
        key(bytes, "block_size");
        bytes.push(1);
        key(bytes, "extra_keys");
        // nil, a digest of embeddings, nil
        bytes.extend([0x93, 0xc0, 0x91, 0xc4, 1, 9, 0xc0]);
        5
    });
    let batch = decode(Engine::Vllm, &bytes).unwrap();
    let KvEvent::Stored(stored) = &batch.events[0] else { panic!() };
    assert_eq!(stored.understood, 1);
}

#[test]
fn what_is_no_batch_is_refused() {
    let refused = [
        (vec![], DecodeError::Malformed(MsgpackError::Truncated)),
        (vec![7], DecodeError::NotABatch),
        (vec![0x91, 7], DecodeError::NotABatch),
        (vec![0x92, 7, 7], DecodeError::NotABatch),
        (vec![0x80], DecodeError::NotABatch),
        (vec![0x92, 7, 0x90, 7], DecodeError::TrailingBytes),
        (
            vec![0x92, 7, 0xdd, 0xff, 0xff, 0xff, 0xff],
            DecodeError::Malformed(MsgpackError::Truncated),
        ),
    ];
    for (bytes, error) in refused {
        assert_eq!(decode(Engine::Vllm, &bytes), Err(error), "{bytes:?}");
    }
    let mut many = vec![0x92, 7, 0xdd];
    many.extend((BATCH_EVENTS_MAX as u32 + 1).to_be_bytes());
    many.extend(std::iter::repeat_n(0x80, BATCH_EVENTS_MAX + 1));
    assert_eq!(decode(Engine::Vllm, &many), Err(DecodeError::TooManyEvents));
}

/// Every payload of the fixtures, for mutation.
static CORPUS: std::sync::LazyLock<Vec<Vec<u8>>> = std::sync::LazyLock::new(corpus);

fn corpus() -> Vec<Vec<u8>> {
    let mut corpus = Vec::new();
    for file in ["vllm-0.31.0-zmq-publisher.json", "sglang-0.5.21-zmq-publisher.json"] {
        for case in fixture(file)["cases"].as_array().unwrap() {
            corpus.extend(case["live"].as_array().unwrap().iter().map(payload));
        }
    }
    let legacy = fixture("legacy-positional-payloads.json");
    corpus.extend(
        legacy["payloads"].as_object().unwrap().values().map(|it| hex(it.as_str().unwrap())),
    );
    let trtllm = fixture("trtllm-events.json");
    corpus.extend(trtllm["native_streaming_frames"].as_array().unwrap().iter().map(payload));
    corpus
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Goal: any bytes in, a batch or an error out; what comes out is bounded by
    /// what went in.
    /// Method: real payloads, cut and with bytes replaced.
    #[test]
    fn decoding_is_total(
        pick: prop::sample::Index,
        cut: prop::sample::Index,
        keep_all: bool,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        sglang: bool,
    ) {
        let mut bytes = CORPUS[pick.index(CORPUS.len())].clone();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if !keep_all {
            bytes.truncate(cut.index(bytes.len()));
        }
        let engine = if sglang { Engine::Sglang } else { Engine::Vllm };
        if let Ok(batch) = decode(engine, &bytes) {
            for event in batch.events {
                if let KvEvent::Stored(stored) = event {
                    prop_assert!(stored.pages.len() <= bytes.len());
                    prop_assert!(stored.tokens.len() <= bytes.len());
                    prop_assert!(stored.understood <= stored.pages.len());
                }
            }
        }
    }

    #[test]
    fn arbitrary_bytes_are_no_trouble(bytes: Vec<u8>) {
        let _ = decode(Engine::Vllm, &bytes);
    }
}
