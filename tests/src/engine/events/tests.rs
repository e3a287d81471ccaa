//! Tests of the event encoder: its bytes against those of real publishers.

use serde_json::Value;

use super::*;

const VLLM: &str = include_str!("../../../fixtures/vllm-0.31.0-zmq-publisher.json");
const SGLANG: &str = include_str!("../../../fixtures/sglang-0.5.21-zmq-publisher.json");
const LEGACY: &str = include_str!("../../../fixtures/legacy-positional-payloads.json");

/// Timestamp in every captured payload of the two publishers.
const CAPTURED_AT: u64 = 0x41da_c0a3_1160_0000;

fn live_payload(file: &str, case: usize, message: usize) -> String {
    let file: Value = serde_json::from_str(file).unwrap();
    file["cases"][case]["live"][message][2].as_str().unwrap().to_owned()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn format(form: EventForm, block_size: u32) -> EventFormat {
    EventFormat {
        form,
        hash: HashForm::Integer,
        block_size,
        dp_rank: 0,
        kind: Some("full_attention"),
    }
}

/// A hash whose last eight bytes are `low`.
fn low(low: u64) -> EngineHash {
    let mut hash = [0; 32];
    hash[24..].copy_from_slice(&low.to_be_bytes());
    EngineHash(hash)
}

/// A hash whose first eight bytes are `high`.
fn high(high: u64) -> EngineHash {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&high.to_be_bytes());
    EngineHash(hash)
}

fn from_hex(text: &str) -> EngineHash {
    let digit = |byte: u8| u8::try_from(char::from(byte).to_digit(16).unwrap()).unwrap();
    let bytes: Vec<u8> =
        text.as_bytes().chunks(2).map(|two| digit(two[0]) << 4 | digit(two[1])).collect();
    EngineHash(bytes.try_into().unwrap())
}

fn stored(parent: Option<EngineHash>, hashes: &[EngineHash], tokens: Vec<u32>) -> CacheEvent {
    CacheEvent::Stored { parent, hashes: hashes.to_vec(), tokens, keys: CacheKeys::default() }
}

fn captured(events: &[CacheEvent], format: &EventFormat) -> String {
    hex(&encode_batch(f64::from_bits(CAPTURED_AT), events, format))
}

#[test]
fn vllm_maps_equal_the_capture() {
    let form = format(EventForm::VllmMap, 16);
    let hashes = [low(0x833b_26f0_cc06_4633), low(0x459a_486a_511f_832f)];
    let first = stored(None, &hashes, (100..132).collect());
    assert_eq!(captured(&[first], &form), live_payload(VLLM, 0, 0));

    let removed = CacheEvent::Removed { hash: low(0x2019_1f65_e049_ce4a) };
    assert_eq!(captured(&[removed], &form), live_payload(VLLM, 0, 3));

    assert_eq!(captured(&[CacheEvent::Cleared], &form), live_payload(VLLM, 0, 6));
}

#[test]
fn vllm_bytes_hashes_equal_the_capture() {
    let form = EventFormat { hash: HashForm::Bytes, dp_rank: 2, ..format(EventForm::VllmMap, 16) };
    let hashes = [
        from_hex("91d6039a01f57163ec02db197e5481ffc170187e262006fa833b26f0cc064633"),
        from_hex("28cb03b06c288e88c6a880eeba293bf9c9bb9fa586128586459a486a511f832f"),
    ];
    let first = stored(None, &hashes, (0..32).collect());
    assert_eq!(captured(&[first], &form), live_payload(VLLM, 1, 0));
    let removed = CacheEvent::Removed { hash: hashes[1] };
    assert_eq!(captured(&[removed], &form), live_payload(VLLM, 1, 1));
}

#[test]
fn vllm_positional_equals_the_reference_layout() {
    let legacy: Value = serde_json::from_str(LEGACY).unwrap();
    let name = "vllm (#37688): + group_idx on stored (slot 9) and removed (slot 3)";
    let form = EventFormat { kind: None, ..format(EventForm::VllmPositional, 16) };
    let first = low(0xc01e_52dd_b787_5b4b);
    let events = [stored(None, &[first], (0..16).collect()), CacheEvent::Removed { hash: first }];

    assert_eq!(hex(&encode_batch(1.5, &events, &form)), legacy["payloads"][name].as_str().unwrap());
}

#[test]
fn sglang_maps_equal_the_capture() {
    let form = format(EventForm::Sglang, 64);
    let hashes = [high(0x5fec_eb66_ffc8_6f38), high(0x6b86_b273_ff34_fce1)];
    let first = stored(None, &hashes, (0..128).collect());
    assert_eq!(captured(&[first], &form), live_payload(SGLANG, 0, 0));

    let removed = CacheEvent::Removed { hash: high(0xd473_5e3a_265e_16ee) };
    assert_eq!(captured(&[removed], &form), live_payload(SGLANG, 0, 4));

    assert_eq!(captured(&[CacheEvent::Cleared], &form), live_payload(SGLANG, 0, 5));
}

/// Goal: what is hashed beside the tokens reaches the subscriber, once per
/// block for the adapter and only at a prompt's start for the salt.
#[test]
fn extra_keys_name_the_adapter_and_the_salt() {
    let keys = CacheKeys { lora_name: Some("adapter-a".into()), cache_salt: Some("salt-1".into()) };
    let event = |parent| CacheEvent::Stored {
        parent,
        hashes: vec![low(1), low(2)],
        tokens: vec![1, 2],
        keys: keys.clone(),
    };
    let form = format(EventForm::VllmMap, 1);
    let key = hex(b"\xaaextra_keys");
    let adapter = hex(b"\xa9adapter-a");
    let salt = hex(b"\xa6salt-1");

    let first = captured(&[event(None)], &form);
    assert!(first.contains(&format!("{key}9292{adapter}{salt}91{adapter}")), "{first}");
    let later = captured(&[event(Some(low(9)))], &form);
    assert!(later.contains(&format!("{key}9291{adapter}91{adapter}")), "{later}");
}

/// Goal: every width of integer is the shortest, as msgspec writes it.
#[test]
fn integers_take_their_shortest_form() {
    let form = format(EventForm::VllmMap, 16);
    let mut encoder = Encoder { out: Vec::new(), format: &form };
    for value in [0, 127, 128, 255, 256, 65_535, 65_536, 1 << 32] {
        encoder.unsigned(value);
    }
    for value in [-1, -32, -33, -128, -129, -32_769, i64::MIN] {
        encoder.signed(value);
    }
    let unsigned = "007fcc80ccffcd0100cdffffce00010000cf0000000100000000";
    let signed = "ffe0d0dfd080d1ff7fd2ffff7fffd38000000000000000";
    assert_eq!(hex(&encoder.out), format!("{unsigned}{signed}"));
}
