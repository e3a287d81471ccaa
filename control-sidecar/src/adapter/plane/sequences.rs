//! Sequences: requests that routers have placed, and how far they are.
//!
//! Read from others and written for others, in the same form. On a topic of our
//! own ([`Account`]) sidecars tell each other all that they have placed, for
//! which Dynamo's format has no words.

use warmpath_core::ids::{DpRank, SequenceHash, Worker, WorkerId};
use warmpath_core::limits::{EVENT_BLOCKS_MAX, EVENT_NAME_BYTES_MAX};

use super::{PlaneError, each_field, finished, optional_u64};
use crate::adapter::msgpack::{MsgpackError, Reader, Shape};
use crate::limits::SEQUENCE_EVENTS_MAX;

/// One step in the life of a placed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceEvent {
    /// Names the request to everybody.
    pub request: String,
    /// Where it was placed.
    pub worker: Worker,
    /// Who says so: a router, or the worker itself.
    pub router: u64,
    /// The adapter that it uses.
    pub lora: Option<String>,
    /// What happened.
    pub step: Step,
}

/// What happened to a placed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// It was placed.
    Added(Added),
    /// Its first token is there.
    PrefillCompleted,
    /// It ended.
    Freed,
}

impl Step {
    /// Fixed word for metrics.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Added(_) => "added",
            Self::PrefillCompleted => "prefill_completed",
            Self::Freed => "freed",
        }
    }
}

/// A request, as it was placed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Added {
    /// The blocks of its prompt; `None` if they are not tracked.
    pub blocks: Option<Vec<SequenceHash>>,
    /// Whether its prompt counts as prefill load.
    pub tracks_prefill: bool,
    /// Tokens that it is expected to generate.
    pub expected_output_tokens: Option<u64>,
    /// Prompt tokens that must be computed.
    pub prefill_tokens: Option<u64>,
}

/// Writes the payload of a message on the topic `active_sequences_events`: of one
/// event alone, as NATS carries it.
#[must_use]
pub fn encode_event(event: &SequenceEvent) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_sequence(&mut bytes, event);
    bytes
}

/// As [`encode_event`], of several events, as ZMQ carries them.
#[must_use]
pub fn encode_events(events: &[SequenceEvent]) -> Vec<u8> {
    let mut bytes = Vec::new();
    map(&mut bytes, 1);
    text(&mut bytes, "events");
    write_list(&mut bytes, events);
    bytes
}

/// What a sidecar says to others on a topic of our own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Account {
    /// It is new, and wants to hear what others have placed.
    Hello,
    /// All that it has placed and that still runs, over one or more messages.
    List {
        /// Whether the list begins here.
        begins: bool,
        /// Whether the list ends here: what it does not name has ended.
        ends: bool,
        /// Requests, each added, and marked if its first token is there.
        events: Vec<SequenceEvent>,
    },
}

impl Account {
    /// Writes the payload.
    ///
    /// - `router`: who says so.
    #[must_use]
    pub fn encode(&self, router: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        let (kind, begins, ends, events) = match self {
            Self::Hello => ("hello", false, false, &[][..]),
            Self::List { begins, ends, events } => ("list", *begins, *ends, &events[..]),
        };
        map(&mut bytes, 5);
        text(&mut bytes, "kind");
        text(&mut bytes, kind);
        text(&mut bytes, "router_id");
        number(&mut bytes, router);
        text(&mut bytes, "begins");
        flag(&mut bytes, begins);
        text(&mut bytes, "ends");
        flag(&mut bytes, ends);
        text(&mut bytes, "events");
        write_list(&mut bytes, events);
        bytes
    }

    /// Reads a payload: who says it, and what.
    ///
    /// # Errors
    ///
    /// A [`PlaneError`].
    pub fn decode(payload: &[u8]) -> Result<(u64, Self), PlaneError> {
        let mut reader = Reader::new(payload);
        let (mut kind, mut router, mut events) = (None, None, Vec::new());
        let (mut begins, mut ends) = (false, false);
        each_field(&mut reader, |name, value| {
            match name {
                "kind" => kind = Some(value.text()?),
                "router_id" => router = Some(value.u64()?),
                "begins" => begins = value.boolean()?,
                "ends" => ends = value.boolean()?,
                "events" => events = read_list(value)?,
                _ => {}
            }
            Ok(())
        })?;
        finished(&reader)?;
        let account = match kind {
            Some("hello") => Self::Hello,
            Some("list") => Self::List { begins, ends, events },
            _ => return Err(PlaneError::Missing),
        };
        Ok((router.ok_or(PlaneError::Missing)?, account))
    }
}

/// Reads the payload of a message on the topic `active_sequences_events`: one
/// event, or `{events: [event, …]}`.
///
/// # Errors
///
/// A [`PlaneError`].
pub fn decode_sequences(payload: &[u8]) -> Result<Vec<SequenceEvent>, PlaneError> {
    let mut reader = Reader::new(payload);
    let mut several = None;
    let start = reader;
    each_field(&mut reader, |name, value| {
        if name == "events" {
            several = Some(*value);
        }
        Ok(())
    })?;
    finished(&reader)?;
    let Some(mut list) = several else {
        return Ok(vec![read_sequence(&mut start.clone())?]);
    };
    read_list(&mut list)
}

fn read_list(list: &mut Reader<'_>) -> Result<Vec<SequenceEvent>, PlaneError> {
    let count = list.list()?;
    if count > SEQUENCE_EVENTS_MAX {
        return Err(PlaneError::TooMany);
    }
    (0..count).map(|_| read_sequence(list)).collect()
}

// Writing to a vector cannot fail, and no length here comes near 32 bits.

fn map(bytes: &mut Vec<u8>, len: u32) {
    let _ = rmp::encode::write_map_len(bytes, len);
}

fn list(bytes: &mut Vec<u8>, len: usize) {
    let _ = rmp::encode::write_array_len(bytes, u32::try_from(len).unwrap_or(u32::MAX));
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    let _ = rmp::encode::write_str(bytes, text);
}

fn number(bytes: &mut Vec<u8>, value: u64) {
    let _ = rmp::encode::write_uint(bytes, value);
}

fn flag(bytes: &mut Vec<u8>, value: bool) {
    let _ = rmp::encode::write_bool(bytes, value);
}

fn nil(bytes: &mut Vec<u8>) {
    let _ = rmp::encode::write_nil(bytes);
}

fn write_list(bytes: &mut Vec<u8>, events: &[SequenceEvent]) {
    list(bytes, events.len());
    for event in events {
        write_sequence(bytes, event);
    }
}

fn write_sequence(bytes: &mut Vec<u8>, event: &SequenceEvent) {
    map(bytes, 5);
    text(bytes, "request_id");
    text(bytes, &event.request);
    text(bytes, "worker");
    map(bytes, 2);
    text(bytes, "worker_id");
    number(bytes, event.worker.id.0);
    text(bytes, "dp_rank");
    number(bytes, event.worker.rank.0.into());
    text(bytes, "data");
    match &event.step {
        Step::Added(added) => {
            map(bytes, 1);
            text(bytes, "AddRequest");
            write_added(bytes, added);
        }
        Step::PrefillCompleted => text(bytes, "MarkPrefillCompleted"),
        Step::Freed => text(bytes, "Free"),
    }
    text(bytes, "router_id");
    number(bytes, event.router);
    text(bytes, "lora_name");
    match &event.lora {
        Some(lora) => text(bytes, lora),
        None => nil(bytes),
    }
}

fn write_added(bytes: &mut Vec<u8>, added: &Added) {
    map(bytes, 4);
    text(bytes, "token_sequence");
    match &added.blocks {
        Some(blocks) => {
            list(bytes, blocks.len());
            blocks.iter().for_each(|hash| number(bytes, hash.0));
        }
        None => nil(bytes),
    }
    text(bytes, "track_prefill_tokens");
    flag(bytes, added.tracks_prefill);
    text(bytes, "expected_output_tokens");
    match added.expected_output_tokens {
        Some(tokens) => number(bytes, tokens),
        None => nil(bytes),
    }
    text(bytes, "prefill_load_hint");
    match added.prefill_tokens {
        Some(tokens) => {
            map(bytes, 2);
            text(bytes, "initial_effective_prefill_tokens");
            number(bytes, tokens);
            text(bytes, "expected_prefill_duration");
            nil(bytes);
        }
        None => nil(bytes),
    }
}

fn read_sequence(reader: &mut Reader<'_>) -> Result<SequenceEvent, PlaneError> {
    let (mut request, mut worker, mut router) = (None, None, None);
    let (mut lora, mut step) = (None, None);
    each_field(reader, |name, value| {
        match name {
            "request_id" => request = Some(read_name(value)?),
            "worker" => worker = Some(read_worker(value)?),
            "router_id" => router = Some(value.u64()?),
            "lora_name" if !value.nil()? => lora = Some(read_name(value)?),
            "data" => step = Some(read_step(value)?),
            _ => {}
        }
        Ok(())
    })?;
    Ok(SequenceEvent {
        request: request.ok_or(PlaneError::Missing)?,
        worker: worker.ok_or(PlaneError::Missing)?,
        router: router.ok_or(PlaneError::Missing)?,
        lora,
        step: step.ok_or(PlaneError::Missing)?,
    })
}

fn read_name(reader: &mut Reader<'_>) -> Result<String, MsgpackError> {
    let name = reader.text()?;
    if name.len() > EVENT_NAME_BYTES_MAX { Err(MsgpackError::Value) } else { Ok(name.to_owned()) }
}

fn read_worker(reader: &mut Reader<'_>) -> Result<Worker, PlaneError> {
    let (mut id, mut rank) = (None, 0);
    each_field(reader, |name, value| {
        match name {
            "worker_id" => id = Some(value.u64()?),
            "dp_rank" => rank = value.u32()?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(Worker { id: WorkerId(id.ok_or(PlaneError::Missing)?), rank: DpRank(rank) })
}

fn read_step(reader: &mut Reader<'_>) -> Result<Step, PlaneError> {
    if reader.shape()? == Shape::Map && reader.map()? != 1 {
        return Err(PlaneError::Missing);
    }
    match reader.text()? {
        "AddRequest" => read_added(reader).map(Step::Added),
        "MarkPrefillCompleted" => Ok(Step::PrefillCompleted),
        "Free" => Ok(Step::Freed),
        _ => Err(PlaneError::Missing),
    }
}

fn read_added(reader: &mut Reader<'_>) -> Result<Added, PlaneError> {
    let mut added = Added::default();
    each_field(reader, |name, value| {
        match name {
            "token_sequence" if !value.nil()? => {
                let count = value.list()?;
                if count > EVENT_BLOCKS_MAX {
                    return Err(PlaneError::TooMany);
                }
                let blocks: Result<Vec<_>, _> =
                    (0..count).map(|_| value.integer_bits().map(SequenceHash)).collect();
                added.blocks = Some(blocks?);
            }
            "track_prefill_tokens" => added.tracks_prefill = value.boolean()?,
            "expected_output_tokens" => added.expected_output_tokens = optional_u64(value)?,
            "prefill_load_hint" if !value.nil()? => {
                each_field(value, |name, value| {
                    if name == "initial_effective_prefill_tokens" {
                        added.prefill_tokens = optional_u64(value)?;
                    }
                    Ok(())
                })?;
            }
            _ => {}
        }
        Ok(())
    })?;
    Ok(added)
}
