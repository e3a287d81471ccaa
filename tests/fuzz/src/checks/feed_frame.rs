//! A frame of the feed, and the body of each kind of frame behind a right
//! checksum.
//!
//! Input: a byte that chooses the kind, then the body; 0 is a whole frame.

use warmpath_core::cache_usage::{CacheUsage, CacheUsages, Share};
use warmpath_core::card::{Blind, BlobId, Cards, ModelCard, NamedTemplate};
use warmpath_core::delta::{Delta, Operation, SnapshotStart, encode_operations};
use warmpath_core::frame::{Frame, Kind};
use warmpath_core::ids::{DpRank, SequenceHash, Worker, WorkerId, WorkerSlot};
use warmpath_core::render::Flavour;
use warmpath_core::roster::{Adapter, Parity, Role, Roster, RosterWorker, TierSlots};
use warmpath_core::settings::{Draft, Field, RouterSettings, Value};

use super::fixtures::text;

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let bodies = bodies();
    let mut seeds: Vec<Vec<u8>> =
        bodies.iter().map(|(kind, body)| [&[*kind as u8], &body[..]].concat()).collect();
    for (kind, body) in bodies {
        let frame = Frame { kind, epoch: 7, sequence: 1, body: &body }.encode();
        seeds.push([&[0], &frame[..]].concat());
    }
    seeds
}

/// A body of each kind that has one.
pub(super) fn bodies() -> Vec<(Kind, Vec<u8>)> {
    let slot = WorkerSlot(3);
    let hashes = [SequenceHash(1), SequenceHash(u64::MAX)];
    let delta = encode_operations(&[
        (Operation::Stored, slot, &hashes),
        (Operation::Removed, slot, &hashes[..1]),
        (Operation::Cleared, slot, &[]),
    ]);
    let worker = RosterWorker {
        slot,
        worker: Worker { id: WorkerId(u64::MAX), rank: DpRank(1) },
        model: 0,
        role: Role::Decode,
        parity: Parity::Unproven,
        namespace: 1,
        endpoint: "[::1]:8000".to_owned(),
        total_kv_blocks: 100,
        max_num_batched_tokens: 8192,
        taints: vec!["a".to_owned(), "b".to_owned()],
        tiers: TierSlots { host: Some(WorkerSlot(4)), ..TierSlots::default() },
    };
    let usage = CacheUsage { used: Share::of(1, 2), active: None };
    let adapter =
        Adapter { name: "sql".to_owned(), model: 0, lora: "sql-1".to_owned(), holders: vec![slot] };
    let template = text("tests/models/tiny/chat_template.jinja");
    let card = ModelCard {
        name: "tiny".to_owned(),
        aliases: vec!["t".to_owned()],
        block_size: 16,
        context_length: 4096,
        eagle: false,
        flavour: Flavour::Dynamo,
        tokenizer: Ok(BlobId { hash: 5, len: 6 }),
        templates: vec![NamedTemplate { name: "default".to_owned(), source: template }],
        special_tokens: vec![("eos_token".to_owned(), "<|im_end|>".to_owned())],
        completion_prefix: vec![1, 2],
    };
    let blind = ModelCard { tokenizer: Err(Blind::Loading), templates: vec![], ..card.clone() };
    vec![
        (Kind::Delta, delta.clone()),
        (Kind::Roster, Roster { workers: vec![worker], adapters: vec![adapter] }.encode()),
        (Kind::Card, Cards { models: vec![card, blind] }.encode()),
        (Kind::Heartbeat, Vec::new()),
        (Kind::Resync, Vec::new()),
        (Kind::SnapshotStart, SnapshotStart { blocks: 2 }.encode()),
        (Kind::SnapshotPart, delta),
        (Kind::SnapshotEnd, Vec::new()),
        (Kind::Settings, settings().encode()),
        (Kind::CacheUsage, CacheUsages::of([(slot, usage)]).encode()),
    ]
}

/// Settings of which every part is present in one or the other.
fn settings() -> RouterSettings {
    let mut draft = Draft::default();
    for (name, value) in [
        ("worker_selection_policy", Value::Word("dynamo-two-tier-cost-fn")),
        ("router_prefill_policy", Value::Word("default")),
        ("router_queue_threshold", Value::Number(1.5)),
        ("conditional_disagg_enabled", Value::Flag(true)),
        ("session_affinity_ttl_secs", Value::Number(60.0)),
        ("busy_threshold", Value::Number(0.5)),
    ] {
        let field = Field::find(name).expect("a field");
        draft.set(field, value).expect("in range");
    }
    let own = draft.finish().expect("no contradiction");
    RouterSettings { of_models: vec![(1, own)], ..RouterSettings::default() }
}

pub(super) fn check(data: &[u8]) {
    let Some((kind, body)) = data.split_first() else { return };
    let Some(kind) = kind_of(*kind) else {
        if let Ok(frame) = Frame::decode(body) {
            check_body(frame.kind, frame.body);
            // Three bytes of the header are not looked at.
            let again = frame.encode();
            assert_eq!(Frame::decode(&again).expect("our own frame"), frame);
        }
        return;
    };
    let frame = Frame { kind, epoch: 1, sequence: 2, body };
    match Frame::decode(&frame.encode()) {
        Ok(decoded) => assert_eq!(decoded, frame),
        Err(error) => panic!("our own frame: {error:?}"),
    }
    check_body(kind, body);
}

pub(super) fn kind_of(byte: u8) -> Option<Kind> {
    Some(match byte {
        1 => Kind::Delta,
        2 => Kind::Roster,
        3 => Kind::Card,
        4 => Kind::Heartbeat,
        5 => Kind::Resync,
        6 => Kind::SnapshotStart,
        7 => Kind::SnapshotPart,
        8 => Kind::SnapshotEnd,
        10 => Kind::Settings,
        12 => Kind::CacheUsage,
        _ => return None,
    })
}

fn check_body(kind: Kind, body: &[u8]) {
    match kind {
        Kind::Delta | Kind::SnapshotPart => {
            let Ok(delta) = Delta::decode(body) else { return };
            let groups: usize = delta.groups().map(|group| group.hashes().len().max(1)).sum();
            assert_eq!(groups, delta.operations(), "groups add up");
        }
        Kind::Roster => {
            let Ok(roster) = Roster::decode(body) else { return };
            assert_eq!(Roster::decode(&roster.encode()).as_ref(), Ok(&roster));
        }
        Kind::Card => {
            let Ok(cards) = Cards::decode(body) else { return };
            assert_eq!(Cards::decode(&cards.encode()).as_ref(), Ok(&cards));
        }
        Kind::Settings => {
            let Ok(settings) = RouterSettings::decode(body) else { return };
            assert_eq!(settings.encode(), body);
            for (_, own) in &settings.of_models {
                assert_eq!(own.validate(), Ok(()));
            }
        }
        Kind::CacheUsage => {
            let Ok(usages) = CacheUsages::decode(body) else { return };
            assert_eq!(CacheUsages::decode(&usages.encode()).as_ref(), Ok(&usages));
        }
        Kind::SnapshotStart => {
            let Ok(start) = SnapshotStart::decode(body) else { return };
            assert_eq!(start.encode(), body);
        }
        _ => {}
    }
}
