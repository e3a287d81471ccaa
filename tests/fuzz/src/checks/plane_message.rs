//! A message of Dynamo's event plane, a payload of one, or a worker's answer
//! about its history: decoded, and what it says of a cache applied.
//!
//! Input: a byte that chooses the decoder, then the bytes.

use bytes::Bytes;
use warmpath_core::event::KvEvent;
use warmpath_sidecar::adapter::plane::answer::{Answer, decode_item};
use warmpath_sidecar::adapter::plane::envelope::{Topic, decode_envelope, decode_frames};
use warmpath_sidecar::adapter::plane::load::{
    decode_forward_pass, decode_kv_metrics, decode_load_stat,
};
use warmpath_sidecar::adapter::plane::router_event::{Change, RouterEvent, decode_events};
use warmpath_sidecar::adapter::plane::sequences::decode_sequences;

use super::engine_batch::{Index, one_worker};
use super::fixtures::{behind, captured};

/// Decoders that the first byte chooses from.
const DECODERS: u8 = 8;

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let messages = captured("control-sidecar/tests/fixtures");
    // Whole messages, the payloads inside them, and answers.
    let payloads: Vec<Vec<u8>> =
        messages.iter().filter_map(|message| payload_of(message)).collect();
    let mut seeds: Vec<Vec<u8>> =
        [0, 1, 7].iter().flat_map(|at| behind(&[*at], &messages)).collect();
    seeds.extend((2..7).flat_map(|at| behind(&[at], &payloads)));
    seeds
}

/// What is inside a message, with or without ZMQ's frame around it.
fn payload_of(message: &[u8]) -> Option<Vec<u8>> {
    Topic::ALL.iter().find_map(|topic| {
        let bytes = Bytes::copy_from_slice(message);
        let framed = bytes.get(5..).map(Bytes::copy_from_slice);
        let plain = decode_envelope(&bytes, *topic).ok();
        plain.or_else(|| decode_envelope(&framed?, *topic).ok()).map(|it| it.payload.to_vec())
    })
}

pub(super) fn check(data: &[u8]) {
    let Some((head, bytes)) = data.split_first() else { return };
    // Nothing but the caches' events has anything to compare with: they must
    // not panic, and not take long.
    match head % DECODERS {
        0 => {
            for topic in Topic::ALL {
                let _ = decode_envelope(&Bytes::copy_from_slice(bytes), topic);
            }
        }
        1 => {
            let frame = Bytes::copy_from_slice(bytes);
            let number = frame.slice(..frame.len().min(8));
            let frames = [Bytes::from_static(b"kv-events"), number.clone(), number, frame];
            let _ = decode_frames(&frames, "kv-events", Topic::KvEvents);
        }
        2 => {
            if let Ok(events) = decode_events(bytes) {
                apply(&events);
            }
        }
        3 => drop(decode_kv_metrics(bytes)),
        4 => drop(decode_forward_pass(bytes)),
        5 => drop(decode_load_stat(bytes)),
        6 => drop(decode_sequences(bytes)),
        _ => {
            let item = decode_item(bytes).ok().and_then(|item| item.answer);
            if let Some(Answer::Events { events, .. } | Answer::Dump { events, .. }) = item {
                apply(&events);
            }
        }
    }
}

/// The index that the deltas give is what the state says is held, after every
/// event and after taking all as one account.
fn apply(events: &[RouterEvent]) {
    let (mut state, slot) = one_worker(0);
    let mut index = Index::default();
    let events: Vec<KvEvent> = events
        .iter()
        .filter_map(|event| match &event.change {
            Change::Event(event) => Some(event.clone()),
            Change::ClearedAll => Some(KvEvent::Cleared),
            Change::Nothing => None,
        })
        .collect();
    state.apply(slot, &events);
    index.take(&mut state);
    index.agrees(&state);
    state.replace(slot, &events);
    index.take(&mut state);
    index.agrees(&state);
}
