//! What a request's `model` means: generations, adapters, salts.

use super::*;
use crate::ids::SequenceHash;
use crate::roster::Adapter;

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

/// Models that need no tokenizer: their prompts come as tokens.
fn named(names: &[&str]) -> Models {
    let card = |name: &&str| ModelCard {
        block_size: 64,
        ..card(name, Err(if name.is_empty() { Blind::Tokenizer } else { Blind::Loading }))
    };
    let mut models = Models::default();
    models.take_cards(&Cards { models: names.iter().map(card).collect() });
    models
}

fn adapter(name: &str, model: u16, holders: &[u16]) -> Adapter {
    let holders = holders.iter().copied().map(WorkerSlot).collect();
    Adapter { name: name.to_owned(), model, lora: "my-lora".to_owned(), holders }
}

/// Workers with these models and roles, and the adapters.
fn roster(workers: &[(u16, Role)], adapters: Vec<Adapter>) -> Roster {
    let workers = (1..)
        .zip(workers)
        .map(|(slot, (model, role))| worker(slot, *model, *role, Parity::Exact))
        .collect();
    Roster { workers, adapters }
}

/// A request for the tokens 0 to 127, those of the conformance vectors.
fn body(model: &str, extra: &serde_json::Value) -> String {
    let tokens: Vec<u32> = (0..128).collect();
    let mut body = serde_json::json!({ "model": model, "prompt": tokens });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body.to_string()
}

fn ask(models: &[&str], roster: &Roster, model: &str, extra: &serde_json::Value) -> Prepared {
    ask_as(models, roster, &body(model, extra), None)
}

fn ask_as(models: &[&str], roster: &Roster, body: &str, salt: Option<&str>) -> Prepared {
    let random = &mut Random::seeded(1);
    read_with(&mut named(models), roster, Endpoint::Completions, body, salt, random)
}

fn hashes(prepared: &Prepared) -> Vec<u64> {
    prepared.hashes.iter().map(|SequenceHash(hash)| *hash).collect()
}

const PLAIN: [u64; 2] = [3480597578098033343, 2575318956255022795];
const LORA: [u64; 2] = [10083414349746181142, 6467397007800490233];
const SALT: [u64; 2] = [14430344014821386405, 4697013937403288077];
const LORA_AND_SALT: [u64; 2] = [362533297564636366, 3604936815748851560];

/// Goal: an adapter's blocks are hashed as Dynamo's router hashes them, and
/// its base model's are not. Vectors from its crate, version 1.6.1.
#[test]
fn an_adapter_s_blocks_have_its_name_in_their_hashes() {
    let none = serde_json::json!({});
    let salted = serde_json::json!({ "cache_salt": "tenant-a" });
    let roster = roster(&[(0, Role::Aggregated)], vec![adapter("sql", 0, &[1])]);
    let base = ask(&["base"], &roster, "base", &none);
    assert_eq!((hashes(&base), base.holders), (PLAIN.to_vec(), None));
    let sql = ask(&["base"], &roster, "sql", &none);
    assert_eq!((hashes(&sql), sql.model), (LORA.to_vec(), Some(0)));
    assert_eq!((sql.holders, sql.reason), (Some(vec![WorkerSlot(1)]), Reason::Kv));
    assert_eq!(hashes(&ask(&["base"], &roster, "base", &salted)), SALT);
    assert_eq!(hashes(&ask(&["base"], &roster, "sql", &salted)), LORA_AND_SALT);
}

#[test]
fn a_model_comes_before_an_adapter_of_its_name() {
    let adapters = vec![adapter("base", 0, &[1]), adapter("lost", 7, &[1]), adapter("old", 1, &[])];
    let roster = roster(&[(0, Role::Aggregated)], adapters);
    let none = serde_json::json!({});
    assert_eq!(ask(&["base", ""], &roster, "base", &none).holders, None);
    for name in ["lost", "old", "nobody"] {
        let prepared = ask(&["base", ""], &roster, name, &none);
        assert_eq!((prepared.model, prepared.reason), (None, Reason::UnknownModel), "{name}");
    }
    assert_eq!(ask(&["base", ""], &roster, "", &none).model, Some(0), "the only model");
}

/// Goal: an adapter that cannot be tokenized for is still narrowed to holders.
#[test]
fn what_cannot_be_read_keeps_its_holders() {
    let roster = roster(&[(0, Role::Aggregated)], vec![adapter("sql", 0, &[1])]);
    let body = r#"{"model":"sql","prompt":"a text"}"#;
    let prepared = ask_as(&["base"], &roster, body, None);
    assert_eq!((prepared.reason, prepared.model), (Reason::WarmingModel, Some(0)));
    assert_eq!(prepared.holders, Some(vec![WorkerSlot(1)]));
}

#[test]
fn an_adapter_goes_to_its_holders_or_else_to_anyone() {
    let workers: Vec<RosterWorker> =
        (1..=3).map(|slot| worker(slot, 0, Role::Aggregated, Parity::Exact)).collect();
    let mut replica = replica(workers);
    let asked = |holders: &[u16]| Prepared {
        holders: Some(holders.iter().copied().map(WorkerSlot).collect()),
        ..Prepared::by_load(Reason::Kv, Some(0), 100)
    };
    let mut random = Random::seeded(4);
    let mut seen = |holders: &[u16]| {
        let mut slots = std::collections::BTreeSet::new();
        let mut unheld = std::collections::BTreeSet::new();
        for _ in 0..100 {
            let choice =
                select(&mut replica, &asked(holders), &Settings::default(), 0, &mut random)
                    .unwrap();
            slots.insert(choice.serving.slot.0);
            unheld.insert(choice.adapter_unheld);
        }
        (slots.into_iter().collect::<Vec<_>>(), unheld.into_iter().collect::<Vec<_>>())
    };
    assert_eq!(seen(&[2]), (vec![2], vec![false]));
    assert_eq!(seen(&[1, 3, 9]), (vec![1, 3], vec![false]));
    assert_eq!(seen(&[9]), (vec![1, 2, 3], vec![true]));
    assert_eq!(seen(&[]), (vec![1, 2, 3], vec![true]));
}

/// Goal: each leg goes to holders where some of its workers are.
#[test]
fn both_legs_go_to_holders() {
    let roles = [Role::Prefill, Role::Prefill, Role::Decode, Role::Decode];
    let workers =
        (1..).zip(roles).map(|(slot, role)| worker(slot, 0, role, Parity::Exact)).collect();
    let mut replica = replica(workers);
    for (holders, unheld) in [(vec![2, 3], false), (vec![3], true), (vec![2], true)] {
        for seed in 0..20 {
            let prepared = Prepared {
                holders: Some(holders.iter().copied().map(WorkerSlot).collect()),
                ..Prepared::by_load(Reason::Kv, Some(0), 100)
            };
            let mut random = Random::seeded(seed);
            let choice =
                select(&mut replica, &prepared, &Settings::default(), 0, &mut random).unwrap();
            let prefill = choice.prefill.unwrap();
            assert_eq!(choice.adapter_unheld, unheld);
            assert!(!holders.contains(&2) || prefill.slot.0 == 2);
            assert!(!holders.contains(&3) || choice.serving.slot.0 == 3);
        }
    }
}

/// Goal: generations of a model get requests as they have workers to serve them.
/// Method: 12 000 draws at weights 1, 0 and 3; shares within 4 % of expected
/// (about 6 standard deviations).
#[test]
fn a_generation_is_drawn_by_its_workers() {
    let workers = [
        (0, Role::Aggregated),
        (2, Role::Decode),
        (2, Role::Aggregated),
        (2, Role::Decode),
        // Others' workers, and those that cannot serve, weigh nothing.
        (1, Role::Prefill),
        (0, Role::Prefill),
        (3, Role::Aggregated),
    ];
    let adapters = (0..3).map(|model| adapter("sql", model, &[])).collect();
    let roster = roster(&workers, adapters);
    let mut models = named(&["m", "m", "m", "other"]);
    for asked in ["m", "sql"] {
        let body = body(asked, &serde_json::json!({}));
        let mut random = Random::seeded(9);
        let mut counts = [0_u32; 4];
        for _ in 0..12_000 {
            let endpoint = Endpoint::Completions;
            let prepared = read_with(&mut models, &roster, endpoint, &body, None, &mut random);
            counts[usize::from(prepared.model.unwrap())] += 1;
        }
        assert!(counts[0].abs_diff(3_000) < 300 && counts[2].abs_diff(9_000) < 300, "{counts:?}");
        assert_eq!(counts[1] + counts[3], 0);
    }
}

#[test]
fn generations_without_workers_are_drawn_if_there_are_no_others() {
    let prepared = ask(&["m", "m"], &Roster::default(), "m", &serde_json::json!({}));
    assert_eq!(prepared.model, Some(0));
}

#[test]
fn a_trusted_salt_comes_before_the_body_s() {
    let roster = Roster::default();
    for extra in [
        serde_json::json!({}),
        serde_json::json!({ "cache_salt": "mine" }),
        serde_json::json!({ "nvext": { "cache_salt": "mine" } }),
    ] {
        let body = body("m", &extra);
        assert_eq!(hashes(&ask_as(&["m"], &roster, &body, Some("tenant-a"))), SALT, "{extra}");
    }
}

#[test]
fn the_body_s_salt_can_be_left_out() {
    let body = body("m", &serde_json::json!({ "cache_salt": "tenant-a" }));
    let request = parse(Endpoint::Completions, body.as_bytes()).unwrap();
    let ask = |trusted_salt, salt_from_body| {
        let circumstances = Circumstances {
            body_bytes: body.len(),
            now: NOW,
            trusted_salt,
            salt_from_body,
            demands: &Demands::default(),
        };
        let (mut models, mut random) = (named(&["m"]), Random::seeded(1));
        prepare(&mut models, &Roster::default(), &request, &circumstances, &mut random)
    };
    assert_eq!(hashes(&ask(None, true)), SALT);
    assert_eq!(hashes(&ask(None, false)), PLAIN);
    assert_eq!(hashes(&ask(Some("tenant-a"), false)), SALT);
}
