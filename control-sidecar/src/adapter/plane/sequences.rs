//! Sequences: requests that other routers have placed, and how far they are.

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
    let count = list.list()?;
    if count > SEQUENCE_EVENTS_MAX {
        return Err(PlaneError::TooMany);
    }
    (0..count).map(|_| read_sequence(&mut list)).collect()
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
