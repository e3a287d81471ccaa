//! TensorRT-LLM: events as its servers give them out when asked, in JSON.
//!
//! `POST /kv_cache_events` empties the server's buffer: a list of events, each
//! with a number and the window of the attention that its cache serves. What
//! TensorRT-LLM publishes by itself is vLLM's form and read there.
//!
//! As Dynamo's worker does (1.6.1): a run of blocks counts up to the first that
//! is not full; that a block has moved to another medium is not looked at.

use serde_json::Value;
use warmpath_core::event::{Group, KvEvent, Medium, Removed, Stored};
use warmpath_core::ids::{EngineHash, TokenId};
use warmpath_core::limits::{
    BATCH_EVENTS_MAX, EVENT_BLOCKS_MAX, EVENT_NAME_BYTES_MAX, EVENT_TOKENS_MAX,
};

use super::fields::push_object;
use super::keys::object_hash;
use super::{DecodeError, Skip};

/// One event of one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PulledEvent {
    /// Its number among its rank's events.
    pub id: u64,
    /// The data-parallel rank, if the server has several.
    pub rank: Option<u32>,
    /// The window of the attention whose cache it is about, in tokens.
    pub window: Option<u64>,
    /// What it says.
    pub change: PulledChange,
    /// Why it, or a part of it, was passed over.
    pub skipped: Option<Skip>,
}

/// What a pulled event says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PulledChange {
    /// The cache was made, and is empty.
    Created,
    /// The cache changed.
    Event(KvEvent),
    /// Nothing that is indexed.
    Nothing,
}

/// Reads an answer.
///
/// - `block_size`: tokens of a full block; at least 1.
///
/// # Errors
///
/// A [`DecodeError`]; what the answer said is lost then.
pub fn decode_pulled(body: &[u8], block_size: u32) -> Result<Vec<PulledEvent>, DecodeError> {
    let Ok(Value::Array(events)) = serde_json::from_slice(body) else {
        return Err(DecodeError::NotABatch);
    };
    if events.len() > BATCH_EVENTS_MAX {
        return Err(DecodeError::TooManyEvents);
    }
    events.iter().map(|event| read_event(event, block_size)).collect()
}

fn read_event(event: &Value, block_size: u32) -> Result<PulledEvent, DecodeError> {
    // Without a number nobody could tell what is missing.
    let id = event.get("event_id").and_then(Value::as_u64).ok_or(DecodeError::NotABatch)?;
    let rank = event.get("attention_dp_rank").and_then(Value::as_u64);
    let data = event.get("data").unwrap_or(&Value::Null);
    let (change, skipped) = match data.get("type").and_then(Value::as_str) {
        Some("created") => (PulledChange::Created, None),
        Some("stored") => match read_stored(data, block_size) {
            // A removal does not say from where, and that a block has moved is
            // not looked at: below the device nothing would ever be taken back.
            Some(Some(stored)) if stored.medium != Medium::Device => {
                (PulledChange::Nothing, Some(Skip::UnknownMedium))
            }
            Some(Some(stored)) => (PulledChange::Event(KvEvent::Stored(stored)), None),
            Some(None) => (PulledChange::Nothing, None),
            None => (PulledChange::Nothing, Some(Skip::Malformed)),
        },
        Some("removed") => match read_removed(data) {
            Some(removed) => (PulledChange::Event(KvEvent::Removed(removed)), None),
            // What may be gone is never reported as held.
            None => (PulledChange::Event(KvEvent::Cleared), Some(Skip::Malformed)),
        },
        Some("updated") => (PulledChange::Nothing, None),
        _ => (PulledChange::Nothing, Some(Skip::UnknownEvent)),
    };
    Ok(PulledEvent {
        id,
        rank: rank.and_then(|rank| u32::try_from(rank).ok()),
        window: event.get("window_size").and_then(Value::as_u64),
        change,
        skipped,
    })
}

/// A hash: 64 bits, signed or not.
fn read_hash(value: &Value) -> Option<EngineHash> {
    let bits = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    bits.map(EngineHash)
}

fn read_removed(data: &Value) -> Option<Removed> {
    let hashes = data.get("block_hashes")?.as_array()?;
    let pages: Option<Vec<_>> = hashes.iter().map(read_hash).collect();
    let pages = pages.filter(|pages| pages.len() <= EVENT_BLOCKS_MAX)?;
    Some(Removed { pages, medium: Medium::Device, group: Group::default() })
}

/// Reads a run of blocks: `Some(None)` if not even its first is full, `None` if
/// it cannot be read.
fn read_stored(data: &Value, block_size: u32) -> Option<Option<Stored>> {
    let blocks = data.get("blocks")?.as_array()?;
    if blocks.len() > EVENT_BLOCKS_MAX {
        return None;
    }
    let parent = match data.get("parent_hash")? {
        Value::Null => None,
        parent => Some(read_hash(parent)?),
    };
    let mut stored = Stored {
        pages: Vec::new(),
        parent,
        tokens: Vec::new(),
        page_size: block_size,
        pairs: false,
        lora: read_name(data, "lora_name")?,
        cache_salt: None,
        objects: Vec::new(),
        understood: usize::MAX,
        medium: read_medium(blocks.first()),
        group: Group::default(),
    };
    let mut salts = Vec::new();
    for block in blocks {
        let tokens = block.get("tokens")?.as_array()?;
        if tokens.len() as u64 != u64::from(block_size) {
            break;
        }
        if stored.tokens.len() + tokens.len() > EVENT_TOKENS_MAX {
            return None;
        }
        let page = stored.pages.len();
        stored.pages.push(read_hash(block.get("block_hash")?)?);
        for token in tokens {
            stored.tokens.push(read_token(token, &mut stored.understood, page)?);
        }
        read_objects(block, page, &mut stored);
        if is_numbered_adapter(data, block) && stored.lora.is_none() {
            stored.understood = 0;
        }
        salts.push(read_name(block, "cache_salt")?);
    }
    // One salt for all, or nobody could tell whose the blocks are.
    salts.dedup();
    if salts.len() > 1 {
        return None;
    }
    stored.cache_salt = salts.pop().flatten();
    stored.understood = stored.understood.min(stored.pages.len());
    Some((!stored.pages.is_empty()).then_some(stored))
}

/// The level of the cache: 0 is the device, others are the host's.
fn read_medium(first: Option<&Value>) -> Medium {
    match first.and_then(|block| block.get("cache_level")).and_then(Value::as_u64) {
        None | Some(0) => Medium::Device,
        Some(_) => Medium::HostPinned,
    }
}

/// A token. One with an id beside it stands for something that is not text: its
/// block is not understood.
fn read_token(token: &Value, understood: &mut usize, page: usize) -> Option<TokenId> {
    if token.get("token_extra_id").and_then(Value::as_u64) != Some(0) {
        *understood = (*understood).min(page);
    }
    TokenId::try_from(token.get("token_id")?.as_u64()?).ok()
}

fn read_objects(block: &Value, page: usize, stored: &mut Stored) {
    for key in block.get("mm_keys").and_then(Value::as_array).into_iter().flatten() {
        match key.get("hash").and_then(Value::as_str).and_then(object_hash) {
            Some(hash) => push_object(stored, page, hash),
            None => stored.understood = stored.understood.min(page),
        }
    }
}

/// Whether an adapter is numbered, on the run or on the block.
fn is_numbered_adapter(data: &Value, block: &Value) -> bool {
    [data, block].into_iter().any(|of| of.get("lora_id").is_some_and(|id| !id.is_null()))
}

/// A name: `Some(None)` if there is none, `None` if it is no name.
fn read_name(of: &Value, name: &str) -> Option<Option<String>> {
    match of.get(name) {
        None | Some(Value::Null) => Some(None),
        Some(Value::String(text)) if text.is_empty() => Some(None),
        Some(Value::String(text)) if text.len() <= EVENT_NAME_BYTES_MAX => Some(Some(text.clone())),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::tests::fixture;
    use proptest::prelude::*;
    use serde_json::json;

    fn read(events: &Value) -> Vec<PulledEvent> {
        decode_pulled(events.to_string().as_bytes(), 4).unwrap()
    }

    fn block(hash: u64, tokens: &[u32]) -> Value {
        let tokens: Vec<_> =
            tokens.iter().map(|id| json!({"token_id": id, "token_extra_id": 0})).collect();
        json!({"type": "stored_block", "block_hash": hash, "tokens": tokens, "cache_level": 0})
    }

    fn stored_by(data: &Value) -> (PulledChange, Option<Skip>) {
        let event = read(&json!([{"event_id": 1, "data": data}])).remove(0);
        (event.change, event.skipped)
    }

    fn stored(pages: &[u64], tokens: &[u32]) -> Stored {
        Stored {
            pages: pages.iter().copied().map(EngineHash).collect(),
            parent: None,
            tokens: tokens.to_vec(),
            page_size: 4,
            pairs: false,
            lora: None,
            cache_salt: None,
            objects: Vec::new(),
            understood: pages.len(),
            medium: Medium::Device,
            group: Group::default(),
        }
    }

    #[test]
    fn the_fixture_is_read() {
        let events = read(&fixture("trtllm-events.json")["poll_events"]);
        let page = 12_345_678_901_234_567_890;
        let removed = Removed {
            pages: vec![EngineHash(page)],
            medium: Medium::Device,
            group: Group::default(),
        };
        let expected = [
            (0, None, PulledChange::Created),
            (1, Some(0), PulledChange::Event(KvEvent::Stored(stored(&[page], &[7; 4])))),
            (2, None, PulledChange::Nothing),
            (3, None, PulledChange::Event(KvEvent::Removed(removed))),
        ];
        let expected = expected.map(|(id, rank, change)| PulledEvent {
            id,
            rank,
            window: Some(4_096),
            change,
            skipped: None,
        });
        assert_eq!(events, expected);
    }

    #[test]
    fn a_run_counts_up_to_its_first_block_that_is_not_full() {
        let blocks = [block(1, &[1, 2, 3, 4]), block(2, &[5, 6]), block(3, &[7, 8, 9, 10])];
        let data = json!({"type": "stored", "parent_hash": null, "blocks": blocks});
        let expected = PulledChange::Event(KvEvent::Stored(stored(&[1], &[1, 2, 3, 4])));
        assert_eq!(stored_by(&data), (expected, None));
        let data = json!({"type": "stored", "parent_hash": null, "blocks": [block(2, &[5, 6])]});
        assert_eq!(stored_by(&data), (PulledChange::Nothing, None));
    }

    #[test]
    fn salts_adapters_and_objects_are_read() {
        let (mut one, mut two) = (block(1, &[1, 2, 3, 4]), block(2, &[5, 6, 7, 8]));
        for block in [&mut one, &mut two] {
            block["cache_salt"] = "tenant".into();
        }
        two["mm_keys"] = json!([{"type": "mm_key", "hash": "0123456789abcdef".repeat(4)}]);
        let mut data = json!({
            "type": "stored", "parent_hash": -1, "lora_name": "a", "blocks": [one, two.clone()],
        });
        let expected = Stored {
            parent: Some(EngineHash(u64::MAX)),
            lora: Some("a".to_owned()),
            cache_salt: Some("tenant".to_owned()),
            objects: vec![warmpath_core::event::ObjectHash {
                page: 1,
                hash: 81_985_529_216_486_895,
            }],
            ..stored(&[1, 2], &[1, 2, 3, 4, 5, 6, 7, 8])
        };
        assert_eq!(stored_by(&data), (PulledChange::Event(KvEvent::Stored(expected)), None));
        // Two salts, or a token that is none.
        data["blocks"][1]["cache_salt"] = "other".into();
        assert_eq!(stored_by(&data), (PulledChange::Nothing, Some(Skip::Malformed)));
        data["blocks"] = json!([block(1, &[1, 2, 3, 4]), block(2, &[5, 6, 7, 8])]);
        data["blocks"][1]["tokens"][2]["token_extra_id"] = 9.into();
        let (PulledChange::Event(KvEvent::Stored(stored)), None) = stored_by(&data) else {
            panic!("not stored")
        };
        assert_eq!((stored.pages.len(), stored.understood), (2, 1));
    }

    #[test]
    fn what_cannot_be_read_is_never_held() {
        assert_eq!(
            stored_by(&json!({"type": "removed", "block_hashes": ["x"]})),
            (PulledChange::Event(KvEvent::Cleared), Some(Skip::Malformed))
        );
        for (data, skip) in [
            (json!({"type": "stored", "blocks": 3}), Skip::Malformed),
            (json!({"type": "moved"}), Skip::UnknownEvent),
            (json!(7), Skip::UnknownEvent),
        ] {
            assert_eq!(stored_by(&data), (PulledChange::Nothing, Some(skip)));
        }
        for body in ["", "{}", "[{}]", "[{\"event_id\": -1}]"] {
            assert_eq!(decode_pulled(body.as_bytes(), 4), Err(DecodeError::NotABatch));
        }
    }

    proptest! {
        #[test]
        fn decoding_is_total(body: Vec<u8>) {
            let _ = decode_pulled(&body, 4);
        }

        /// Goal: a fixture with any value in the place of any other is read or
        /// refused.
        #[test]
        fn damaged_events_are_read_or_refused(
            cut in any::<prop::sample::Index>(),
            word in prop_oneof![Just("null"), Just("-1"), Just("{}"), Just("[]"), Just("\"x\"")],
        ) {
            let text = fixture("trtllm-events.json")["poll_events"].to_string();
            let places: Vec<_> = text.match_indices(':').map(|(at, _)| at + 1).collect();
            let at = places[cut.index(places.len())];
            let (before, value) = text.split_at(at);
            let (_, after) = value.split_at(value.find([',', '}', ']']).unwrap());
            let damaged = format!("{before}{word}{after}");
            let _ = decode_pulled(damaged.as_bytes(), 4);
        }
    }
}
