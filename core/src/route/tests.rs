//! The request path from a body to a worker, with a small real tokenizer.

use super::*;
use crate::card::{Blind, BlobId, Cards, ModelCard, NamedTemplate};
use crate::choose::Random;
use crate::delta::{Operation, SnapshotStart, encode_operations};
use crate::entry::Entry;
use crate::frame::{Frame, Kind};
use crate::hash::{BlockShape, Salt, sequence_hashes};
use crate::ids::{DpRank, Worker, WorkerId};
use crate::load::{Booking, BookingId};
use crate::models::Models;
use crate::render::{Flavour, WallClock};
use crate::replica::Replica;
use crate::request::{Endpoint, parse};
use crate::roster::{Parity, Role, Roster, RosterWorker, TierSlots};
use crate::settings::Settings;
use crate::tokenize::{AlignedBytes, Tokenizer, compile::compile};

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const TOKENIZER: &[u8] = include_bytes!("../../../tests/golden/tokenizers/qwen3.json");
const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<reply>";
const NOW: WallClock = WallClock { unix_seconds: 0, utc_offset_seconds: 0 };
const BLOCK_SIZE: u32 = 4;

fn card(name: &str, tokenizer: Result<BlobId, Blind>) -> ModelCard {
    ModelCard {
        name: name.to_owned(),
        aliases: vec![format!("{name}-alias")],
        block_size: BLOCK_SIZE,
        context_length: 0,
        eagle: false,
        flavour: Flavour::Vllm,
        tokenizer,
        templates: vec![NamedTemplate { name: "default".into(), source: TEMPLATE.into() }],
        special_tokens: Vec::new(),
        completion_prefix: vec![77],
    }
}

/// Models `seen` (0), `blind` (1), `bare` (2, no template) and `coming` (3, its
/// tokenizer has not arrived).
fn models() -> Models {
    let file = compile(TOKENIZER).unwrap();
    let blob = BlobId::of(&file);
    let mut models = Models::default();
    models.take_cards(&Cards {
        models: vec![
            card("seen", Ok(blob)),
            card("blind", Err(Blind::Tokenizer)),
            ModelCard { templates: Vec::new(), ..card("bare", Ok(blob)) },
            card("coming", Ok(BlobId { hash: 1, len: 1 })),
        ],
    });
    assert!(models.load(blob, AlignedBytes::from_slice(&file)));
    models
}

fn encode(text: &str) -> Vec<TokenId> {
    let file = compile(TOKENIZER).unwrap();
    let mut tokens = Vec::new();
    let mut tokenizer = Tokenizer::load(AlignedBytes::from_slice(&file)).unwrap();
    tokenizer.encode(text, &mut tokens).unwrap();
    tokens
}

fn read(endpoint: Endpoint, body: &str) -> Prepared {
    read_with(&mut models(), &Roster::default(), endpoint, body, None, &mut Random::seeded(1))
}

fn read_with(
    models: &mut Models,
    roster: &Roster,
    endpoint: Endpoint,
    body: &str,
    trusted_salt: Option<&str>,
    random: &mut Random,
) -> Prepared {
    let request = parse(endpoint, body.as_bytes()).unwrap();
    let circumstances = Circumstances {
        body_bytes: body.len(),
        now: NOW,
        trusted_salt,
        salt_from_body: true,
        demands: &Demands::default(),
    };
    prepare(models, roster, &request, &circumstances, random)
}

fn chat(model: &str, content: &str) -> Prepared {
    let body = serde_json::json!({
        "model": model, "messages": [{ "role": "user", "content": content }]
    });
    read(Endpoint::ChatCompletions, &body.to_string())
}

const TEXT: &str = "The quick brown fox jumps over the lazy dog and runs far away into the woods.";

#[test]
fn a_chat_is_rendered_tokenized_and_hashed() {
    let prepared = chat("seen", TEXT);
    let tokens = encode(&format!("<user>{TEXT}<reply>"));
    let mut hashes = Vec::new();
    let shape = BlockShape { block_size: BLOCK_SIZE, eagle: false };
    sequence_hashes(&tokens, shape, Salt::default(), &mut hashes);
    assert_eq!(prepared.tokens, tokens);
    assert_eq!(prepared.hashes, hashes);
    assert_eq!((prepared.model, prepared.reason), (Some(0), Reason::Kv));
    assert_eq!(chat("seen-alias", TEXT), prepared);
}

#[test]
fn completions_carry_the_engine_s_prefix_unless_told_not_to() {
    let body = serde_json::json!({ "model": "seen", "prompt": TEXT });
    let with = read(Endpoint::Completions, &body.to_string());
    assert_eq!(with.tokens, [vec![77], encode(TEXT)].concat());
    let body = serde_json::json!({ "model": "seen", "prompt": TEXT, "add_special_tokens": false });
    let without = read(Endpoint::Completions, &body.to_string());
    assert_eq!(without.tokens, encode(TEXT));
}

#[test]
fn token_prompts_are_taken_as_they_are() {
    let body = r#"{"model":"seen","prompt":[1,2,3,4,5]}"#;
    assert_eq!(read(Endpoint::Completions, body).tokens, [1, 2, 3, 4, 5]);
    let body = r#"{"model":"seen","prompt":[[1,2,3,4,5],[9]]}"#;
    let batch = read(Endpoint::Completions, body);
    assert_eq!((batch.tokens.len(), batch.reason), (5, Reason::Batch));
    assert!(!batch.is_exact(), "tokens of a batch must not replace it");
    let body = r#"{"model":"seen","prompt":[[1],[9]]}"#;
    let short = read(Endpoint::Completions, body);
    assert_eq!(short.reason, Reason::ShortPrompt);
    assert!(!short.is_exact(), "nor those of a batch of short prompts");
    assert!(read(Endpoint::Completions, r#"{"model":"seen","prompt":[1]}"#).is_exact());
}

/// Goal: an API whose prompts are not read goes to the workers of its model.
#[test]
fn other_apis_are_routed_by_load_to_the_model_s_workers() {
    let body = r#"{"model":"blind","input":"of any kind","nvext":{"token_data":[1,2,3,4]}}"#;
    for endpoint in [Endpoint::Responses, Endpoint::Embeddings, Endpoint::Messages] {
        let prepared = read(endpoint, body);
        assert_eq!((prepared.reason, prepared.model), (Reason::ByLoadApi, Some(1)));
        assert!(prepared.tokens.is_empty() && !prepared.is_exact() && prepared.prompt_tokens > 0);
        let mut workers = two_workers();
        workers[1].model = 1;
        let choice = choose(&mut replica(workers), &prepared);
        assert_eq!((choice.serving.slot, choice.reason), (WorkerSlot(2), Reason::ByLoadApi));
    }
}

#[test]
fn demands_are_handed_on_whatever_becomes_of_the_prompt() {
    let demands = Demands { strict_priority: 7, ..Demands::default() };
    for model in ["seen", "blind", "nobody"] {
        let body = serde_json::json!({ "model": model, "prompt": TEXT }).to_string();
        let request = parse(Endpoint::Completions, body.as_bytes()).unwrap();
        let circumstances = Circumstances {
            body_bytes: body.len(),
            now: NOW,
            trusted_salt: None,
            salt_from_body: true,
            demands: &demands,
        };
        let random = &mut Random::seeded(1);
        let prepared = prepare(&mut models(), &Roster::default(), &request, &circumstances, random);
        assert_eq!(prepared.demands, demands, "{model}");
    }
}

#[test]
fn a_salt_separates_equal_prompts() {
    let body = |salt: &str| {
        serde_json::json!({ "model": "seen", "prompt": TEXT, "cache_salt": salt }).to_string()
    };
    let (a, b) = (body("a"), body("b"));
    let (a, b) = (read(Endpoint::Completions, &a), read(Endpoint::Completions, &b));
    assert_eq!(a.tokens, b.tokens);
    assert!(a.hashes.iter().zip(&b.hashes).all(|(a, b)| a != b));
}

#[test]
fn what_cannot_be_read_has_a_reason() {
    assert_eq!(chat("blind", TEXT).reason, Reason::BlindTokenizer);
    assert_eq!(chat("bare", TEXT).reason, Reason::BlindTemplate);
    assert_eq!(chat("coming", TEXT).reason, Reason::WarmingModel);
    assert_eq!(chat("seen", "").reason, Reason::Kv);
    let unknown = chat("nobody", TEXT);
    assert_eq!((unknown.reason, unknown.model), (Reason::UnknownModel, None));
    assert!(unknown.prompt_tokens > 0, "its load is estimated");
    let short = read(Endpoint::Completions, r#"{"model":"seen","prompt":[1,2,3]}"#);
    assert_eq!(short.reason, Reason::ShortPrompt);
    let body = serde_json::json!({
        "model": "seen", "messages": [{ "role": "user", "content": TEXT }],
        "chat_template": "{{ messages }}"
    });
    let altered = read(Endpoint::ChatCompletions, &body.to_string());
    assert_eq!(altered.reason, Reason::AlteredPrompt);
}

fn worker(slot: u16, model: u16, role: Role, parity: Parity) -> RosterWorker {
    RosterWorker {
        slot: WorkerSlot(slot),
        worker: Worker { id: WorkerId(100 + u64::from(slot)), rank: DpRank(0) },
        model,
        role,
        parity,
        namespace: 0,
        endpoint: format!("10.0.0.{slot}:8000"),
        total_kv_blocks: 0,
        max_num_batched_tokens: 0,
        taints: Vec::new(),
        tiers: TierSlots::default(),
    }
}

fn replica(workers: Vec<RosterWorker>) -> Replica {
    let mut replica = Replica::new(1_000);
    let body = Roster { workers, adapters: Vec::new() }.encode();
    replica.apply_state_bytes(&frame(Kind::Roster, &body));
    replica
}

fn frame(kind: Kind, body: &[u8]) -> Vec<u8> {
    Frame { kind, epoch: 1, sequence: 1, body }.encode()
}

fn hold(replica: &mut Replica, held: &[(u16, &[SequenceHash])]) {
    let operations: Vec<_> =
        held.iter().map(|(slot, hashes)| (Operation::Stored, WorkerSlot(*slot), *hashes)).collect();
    replica.begin_snapshot();
    let start = SnapshotStart { blocks: 0 }.encode();
    replica.apply_snapshot_frame(&frame(Kind::SnapshotStart, &start));
    let part = encode_operations(&operations);
    replica.apply_snapshot_frame(&frame(Kind::SnapshotPart, &part));
    replica.apply_snapshot_frame(&frame(Kind::SnapshotEnd, &[]));
}

/// A prompt of 8 blocks and two tokens.
fn prompt_with(demands: Demands) -> Prepared {
    Prepared {
        model: Some(0),
        holders: None,
        reason: Reason::Kv,
        prompt_tokens: 34,
        tokens: (0..34).collect(),
        hashes: (1..9)
            .map(|n: u64| SequenceHash(xxhash_rust::xxh3::xxh3_64(&n.to_le_bytes())))
            .collect(),
        block_size: BLOCK_SIZE,
        is_whole: true,
        demands,
    }
}

fn two_workers() -> Vec<RosterWorker> {
    (1..=2).map(|slot| worker(slot, 0, Role::Aggregated, Parity::Exact)).collect()
}

fn choose(replica: &mut Replica, prepared: &Prepared) -> Choice {
    select(replica, prepared, &Settings::default(), 0, &mut Random::seeded(1)).unwrap()
}

#[test]
fn the_warm_worker_is_chosen_and_its_hit_predicted() {
    let prepared = chat("seen", TEXT);
    let blocks = prepared.hashes.len();
    assert!(blocks > 4, "{blocks} blocks");
    let mut replica = replica(two_workers());
    hold(&mut replica, &[(1, &prepared.hashes[..1]), (2, &prepared.hashes[..4])]);
    let choice = choose(&mut replica, &prepared);
    assert_eq!((choice.serving.slot, choice.serving.held.device), (WorkerSlot(2), 4));
    assert_eq!(choice.predicted_cached_tokens, 4 * BLOCK_SIZE);
    assert_eq!(choice.reason, Reason::Kv);
    assert_eq!(choice.serving.endpoint, "10.0.0.2:8000");
    assert_eq!(choice.computing().prefill_tokens, prepared.prompt_tokens - 4 * BLOCK_SIZE);
}

/// Goal: a prompt that is held whole, of whole blocks, is predicted as engines
/// report it: its last token is computed, and with it its last block.
#[test]
fn the_last_block_of_a_prompt_held_whole_is_computed() {
    for (tokens, expected_blocks) in [(16_u32, 3), (17, 4), (15, 3)] {
        let ids: Vec<u32> = (0..tokens).collect();
        let body = serde_json::json!({ "model": "seen", "prompt": ids }).to_string();
        let prepared = read(Endpoint::Completions, &body);
        let mut replica = replica(two_workers());
        hold(&mut replica, &[(1, &prepared.hashes)]);
        let choice = choose(&mut replica, &prepared);
        assert_eq!(choice.predicted_cached_tokens, expected_blocks * BLOCK_SIZE, "{tokens} tokens");
    }
}

#[test]
fn load_outweighs_a_small_hit() {
    let prepared = chat("seen", TEXT);
    let mut replica = replica(two_workers());
    hold(&mut replica, &[(2, &prepared.hashes[..1])]);
    assert_eq!(choose(&mut replica, &prepared).serving.slot, WorkerSlot(2));
    let booking = Booking {
        prefill_tokens: 100 * BLOCK_SIZE,
        ..Booking::new(BookingId(1), WorkerSlot(2), 0)
    };
    replica.apply_entry(&Entry::Booked(booking).encode());
    assert_eq!(choose(&mut replica, &prepared).serving.slot, WorkerSlot(1));
    replica.apply_entry(&Entry::Freed(BookingId(1)).encode());
    assert_eq!(choose(&mut replica, &prepared).serving.slot, WorkerSlot(2));
}

#[test]
fn only_workers_of_the_model_that_decode_are_eligible() {
    let mut workers = two_workers();
    workers[0].model = 1;
    workers.push(worker(3, 0, Role::Prefill, Parity::Exact));
    let mut replica = replica(workers);
    let prepared = chat("seen", TEXT);
    for seed in 0..20 {
        let mut random = Random::seeded(seed);
        let choice = select(&mut replica, &prepared, &Settings::default(), 0, &mut random).unwrap();
        assert_eq!(choice.serving.slot, WorkerSlot(2));
    }
    let elsewhere = Prepared::by_load(Reason::Unparsed, Some(7), 100);
    let nobody = select(&mut replica, &elsewhere, &Settings::default(), 0, &mut Random::seeded(1));
    assert_eq!(nobody, Err(Unplaced::NoWorkers));
}

#[test]
fn a_degraded_state_has_a_reason() {
    let prepared = chat("seen", TEXT);
    let mut cold = replica(two_workers());
    assert_eq!(choose(&mut cold, &prepared).reason, Reason::Warming);
    hold(&mut cold, &[]);
    assert_eq!(choose(&mut cold, &prepared).reason, Reason::Kv);
    cold.overrun();
    assert_eq!(choose(&mut cold, &prepared).reason, Reason::Resyncing);

    let blind = (1..=2).map(|slot| worker(slot, 0, Role::Aggregated, Parity::Blind)).collect();
    let mut blind = replica(blind);
    hold(&mut blind, &[]);
    assert_eq!(choose(&mut blind, &prepared).reason, Reason::BlindWorkers);
    let bare = Prepared { model: Some(0), ..chat("bare", TEXT) };
    assert_eq!(choose(&mut blind, &bare).reason, Reason::BlindTemplate);
}

#[test]
fn equal_workers_share() {
    let prepared = chat("seen", TEXT);
    let mut replica = replica(two_workers());
    let mut random = Random::seeded(5);
    let first = (0..1_000)
        .filter(|_| {
            let choice =
                select(&mut replica, &prepared, &Settings::default(), 0, &mut random).unwrap();
            choice.serving.slot == WorkerSlot(1)
        })
        .count();
    assert!((400..600).contains(&first), "{first} of 1000");
}

mod demands;
mod legs;
mod names;
mod prefixes;
mod reading;
