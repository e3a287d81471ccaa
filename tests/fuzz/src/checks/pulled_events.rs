//! What TensorRT-LLM answers when its events are fetched.
//!
//! Input: the answer.

use warmpath_core::event::KvEvent;
use warmpath_sidecar::adapter::trtllm::{PulledChange, decode_pulled};

use super::engine_batch::{Index, one_worker};
use super::fixtures::json;

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    collect(&json("control-sidecar/tests/fixtures/trtllm-events.json"), &mut found);
    found
}

/// Every list of events in a capture.
fn collect(value: &serde_json::Value, found: &mut Vec<Vec<u8>>) {
    match value {
        serde_json::Value::Array(items) => {
            if items.iter().any(|item| item.get("event_id").is_some()) {
                found.push(value.to_string().into_bytes());
            }
            items.iter().for_each(|item| collect(item, found));
        }
        serde_json::Value::Object(members) => {
            members.values().for_each(|member| collect(member, found));
        }
        _ => {}
    }
}

pub(super) fn check(data: &[u8]) {
    let (mut state, slot) = one_worker(0);
    let mut index = Index::default();
    let block_size = state.tracked().next().expect("one worker").spec.shape.block_size;
    let Ok(events) = decode_pulled(data, block_size) else { return };
    let events: Vec<KvEvent> = events
        .into_iter()
        .filter_map(|event| match event.change {
            PulledChange::Event(event) => Some(event),
            PulledChange::Created | PulledChange::Nothing => None,
        })
        .collect();
    state.apply(slot, &events);
    index.take(&mut state);
    index.agrees(&state);
}
