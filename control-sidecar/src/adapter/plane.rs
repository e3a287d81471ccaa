//! Plane: messages of Dynamo's event plane (1.6.1), and answers of its workers.
//!
//! `envelope` is what every message comes in; `router_event`, `load` and
//! `sequences` are what can be inside; `answer` is what a worker says when it is
//! asked for its history. All of it is MessagePack with names for fields.
//!
//! # Terms
//!
//! - *publisher*: one process's source of messages on one topic. Its id is
//!   random and new in each life of the process.
//! - *event id*: the number of an event of one rank, from 1 on without holes.
//! - *domain*: whose copy of a block an event is about. Only the worker's own
//!   is indexed.
//!
//! # Invariants
//!
//! 1. Total: any bytes in, a value or a [`PlaneError`] out.
//! 2. Tolerant: unknown fields are passed over. An event whose contents are odd
//!    still has its worker and its event id; one without these makes the whole
//!    message unreadable, since nobody could tell whose it is.

pub mod answer;
pub mod envelope;
pub mod load;
pub mod router_event;
pub mod sequences;

use core::fmt;

use super::msgpack::{MsgpackError, Reader};

/// Why a message could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlaneError {
    /// The bytes are no MessagePack, or not of the wanted form.
    Malformed(MsgpackError),
    /// A field without which nothing can be made of the message is missing.
    Missing,
    /// The frames around the envelope are not as they should be.
    Frames,
    /// Another version of the frame than ours.
    Version,
    /// The frames and the envelope contradict each other.
    Contradiction,
    /// More events than a message may have.
    TooMany,
    /// Something follows the message.
    TrailingBytes,
}

impl PlaneError {
    /// Fixed word for metrics.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::Missing => "missing",
            Self::Frames => "frames",
            Self::Version => "version",
            Self::Contradiction => "contradiction",
            Self::TooMany => "too_many_events",
            Self::TrailingBytes => "trailing_bytes",
        }
    }
}

impl fmt::Display for PlaneError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(error) => write!(f, "the message is not of its form: {error}"),
            Self::Missing => f.write_str("a field that must be there is not"),
            Self::Frames => f.write_str("the frames around the envelope are malformed"),
            Self::Version => f.write_str("the frame has an unknown version"),
            Self::Contradiction => f.write_str("frames and envelope contradict each other"),
            Self::TooMany => f.write_str("more events than a message may have"),
            Self::TrailingBytes => f.write_str("something follows the message"),
        }
    }
}

impl core::error::Error for PlaneError {}

impl From<MsgpackError> for PlaneError {
    fn from(error: MsgpackError) -> Self {
        Self::Malformed(error)
    }
}

/// Calls `take` with the name of every field of the map that is next, and with
/// a reader at its value.
fn each_field<'a>(
    reader: &mut Reader<'a>,
    mut take: impl FnMut(&'a str, &mut Reader<'a>) -> Result<(), PlaneError>,
) -> Result<(), PlaneError> {
    for _ in 0..reader.map()? {
        let name = reader.text()?;
        let mut value = *reader;
        // Past the value first, so that an odd one leaves the rest readable.
        reader.skip()?;
        take(name, &mut value)?;
    }
    Ok(())
}

/// An integer, or nil for none.
fn optional_u64(reader: &mut Reader<'_>) -> Result<Option<u64>, MsgpackError> {
    if reader.nil()? { Ok(None) } else { reader.u64().map(Some) }
}

/// That nothing follows.
fn finished(reader: &Reader<'_>) -> Result<(), PlaneError> {
    if reader.is_empty() { Ok(()) } else { Err(PlaneError::TrailingBytes) }
}

#[cfg(test)]
mod tests;
