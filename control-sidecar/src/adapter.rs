//! Adapter: engines' wire formats to [`warmpath_core::event`].
//!
//! Second stage of the feed path: `source` hands over the payload of one
//! message, which is one batch of events; `state` applies the events.
//!
//! # Terms
//!
//! - *batch*: what one engine step did to the cache; one message.
//! - *skipped*: an event that is understood well enough to know that it says
//!   nothing about what we index, or not understood at all. Skipping is counted
//!   by reason and never fatal.
//!
//! # Invariants
//!
//! 1. Total: any bytes in, a batch or a [`DecodeError`] out.
//! 2. Tolerant: a batch is a list or a map, an event is a list or a map, a hash
//!    is an integer or bytes; unknown keys, slots and events are passed over.
//!    Every schema change of an engine broke decoders stricter than that.
//! 3. A removal that cannot be read becomes a clear: what may be gone is never
//!    reported as held.

pub mod fields;
pub mod gauges;
pub mod keys;
pub mod msgpack;
pub mod plane;
pub mod sglang;
pub mod trtllm;
pub mod vllm;

use core::fmt;

use warmpath_core::event::{GroupKind, KvEvent};
use warmpath_core::limits::BATCH_EVENTS_MAX;

use fields::{Fields, Slots, Tag};
use msgpack::{MsgpackError, Reader, Shape};

/// Which engine's conventions apply where the bytes alone do not tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Engine {
    /// vLLM, and what publishes as it does (TensorRT-LLM, Dynamo's mocker).
    Vllm,
    /// SGLang.
    Sglang,
}

impl Engine {
    /// Name in configuration, metrics and the state page.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
        }
    }

    fn slots(self) -> Slots {
        match self {
            Self::Vllm => vllm::SLOTS,
            Self::Sglang => sglang::SLOTS,
        }
    }
}

/// Why a whole batch could not be read. What it changed is unknown, so the
/// caller forgets what it knew of the rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// The bytes are no MessagePack.
    Malformed(MsgpackError),
    /// They are, but neither form of a batch.
    NotABatch,
    /// More than [`BATCH_EVENTS_MAX`] events.
    TooManyEvents,
    /// Something follows the batch.
    TrailingBytes,
}

impl DecodeError {
    /// Fixed word for metrics.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::NotABatch => "not_a_batch",
            Self::TooManyEvents => "too_many_events",
            Self::TrailingBytes => "trailing_bytes",
        }
    }
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(error) => write!(f, "the batch is no MessagePack: {error}"),
            Self::NotABatch => f.write_str("the message is no batch of events"),
            Self::TooManyEvents => write!(f, "more than {BATCH_EVENTS_MAX} events in a batch"),
            Self::TrailingBytes => f.write_str("something follows the batch"),
        }
    }
}

impl core::error::Error for DecodeError {}

impl From<MsgpackError> for DecodeError {
    fn from(error: MsgpackError) -> Self {
        Self::Malformed(error)
    }
}

/// Why one event was passed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Skip {
    /// Not one of the three events we know.
    UnknownEvent,
    /// A field is missing or has an impossible value.
    Malformed,
    /// On a medium that we do not know.
    UnknownMedium,
    /// Held by another host.
    Remote,
    /// Held by something else than the worker.
    NotTheWorkers,
    /// Tokens given as text.
    TokenText,
}

impl Skip {
    /// All of them, for metrics.
    pub const ALL: [Self; 6] = [
        Self::UnknownEvent,
        Self::Malformed,
        Self::UnknownMedium,
        Self::Remote,
        Self::NotTheWorkers,
        Self::TokenText,
    ];

    /// Fixed word for metrics.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::UnknownEvent => "unknown_event",
            Self::Malformed => "malformed",
            Self::UnknownMedium => "unknown_medium",
            Self::Remote => "remote",
            Self::NotTheWorkers => "not_the_workers",
            Self::TokenText => "token_text",
        }
    }
}

/// One batch, decoded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// The data-parallel rank that the engine says it is.
    pub rank: Option<u32>,
    /// What happened, in order.
    pub events: Vec<KvEvent>,
    /// What was passed over, in order.
    pub skipped: Vec<Skip>,
}

/// Events for which there is room from the start; an event's own bytes may be
/// far fewer than what it becomes.
const EVENTS_RESERVED_MAX: usize = 64;

/// Decodes the payload of one message.
///
/// - `engine`: whose conventions to follow.
/// - `payload`: the last frame of the message.
///
/// # Errors
///
/// A [`DecodeError`]; the caller forgets the rank's blocks and counts the
/// reason.
pub fn decode(engine: Engine, payload: &[u8]) -> Result<Batch, DecodeError> {
    let mut reader = Reader::new(payload);
    let mut batch = Batch::default();
    match reader.shape()? {
        Shape::List => read_list_batch(engine, &mut reader, &mut batch)?,
        Shape::Map => read_map_batch(engine, &mut reader, &mut batch)?,
        _ => return Err(DecodeError::NotABatch),
    }
    if !reader.is_empty() {
        return Err(DecodeError::TrailingBytes);
    }
    Ok(batch)
}

/// `[time, [event, …], rank?, …]`
fn read_list_batch(
    engine: Engine,
    reader: &mut Reader<'_>,
    batch: &mut Batch,
) -> Result<(), DecodeError> {
    let values = reader.list()?;
    if values < 2 {
        return Err(DecodeError::NotABatch);
    }
    for slot in 0..values {
        match slot {
            1 => read_events(engine, reader, batch)?,
            2 => batch.rank = read_rank(reader)?,
            _ => reader.skip()?,
        }
    }
    Ok(())
}

/// `{ts, events, data_parallel_rank, …}`
fn read_map_batch(
    engine: Engine,
    reader: &mut Reader<'_>,
    batch: &mut Batch,
) -> Result<(), DecodeError> {
    let mut found = false;
    for _ in 0..reader.map()? {
        match reader.text()? {
            "events" => {
                read_events(engine, reader, batch)?;
                found = true;
            }
            "data_parallel_rank" | "attn_dp_rank" => batch.rank = read_rank(reader)?,
            _ => reader.skip()?,
        }
    }
    if found { Ok(()) } else { Err(DecodeError::NotABatch) }
}

fn read_rank(reader: &mut Reader<'_>) -> Result<Option<u32>, DecodeError> {
    if reader.shape()? != Shape::Integer {
        reader.skip()?;
        return Ok(None);
    }
    Ok(Some(reader.u32()?))
}

fn read_events(
    engine: Engine,
    reader: &mut Reader<'_>,
    batch: &mut Batch,
) -> Result<(), DecodeError> {
    if reader.shape()? != Shape::List {
        return Err(DecodeError::NotABatch);
    }
    let events = reader.list()?;
    if events > BATCH_EVENTS_MAX {
        return Err(DecodeError::TooManyEvents);
    }
    batch.events.reserve(events.min(EVENTS_RESERVED_MAX));
    for _ in 0..events {
        let mut inside = *reader;
        match Fields::read(&mut inside, engine.slots()) {
            Ok(mut fields) => {
                *reader = inside;
                finish(engine, &mut fields, batch);
            }
            Err(_) => {
                // Past the event whatever is wrong inside it; if it is not even
                // MessagePack, the whole batch is unreadable.
                reader.skip()?;
                batch.skipped.push(Skip::Malformed);
            }
        }
    }
    Ok(())
}

/// Turns the fields of one event into an event or a reason to skip it.
fn finish(engine: Engine, fields: &mut Fields<'_>, batch: &mut Batch) {
    let outcome = match fields.tag {
        None | Some(Tag::Unknown) => Err(Skip::UnknownEvent),
        Some(Tag::Cleared) => {
            if fields.is_the_workers() {
                Ok(KvEvent::Cleared)
            } else {
                Err(Skip::NotTheWorkers)
            }
        }
        Some(Tag::Removed) => fields.removed().map(KvEvent::Removed),
        Some(Tag::Stored) => fields
            .stored(|stored, fields| match engine {
                Engine::Vllm => vllm::read_keys(stored, fields),
                Engine::Sglang => sglang::read_keys(stored, fields),
            })
            .map(KvEvent::Stored),
    };
    match outcome {
        Ok(event) => batch.events.push(event),
        Err(skip) => {
            batch.skipped.push(skip);
            let unread_removal =
                fields.tag == Some(Tag::Removed) && matches!(skip, Skip::Malformed);
            if unread_removal && fields.kind != Some(GroupKind::Other) {
                batch.events.push(KvEvent::Cleared);
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
