//! Answer: what a worker says when it is asked for a rank's history.

use super::router_event::{RouterEvent, read_events};
use super::{PlaneError, each_field, finished};
use crate::adapter::msgpack::{Reader, Shape};
use crate::limits::RECOVERY_EVENTS_MAX;

/// What a worker answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Events as they were published.
    Events {
        /// In order.
        events: Vec<RouterEvent>,
        /// Number of the last event that they show.
        last: u64,
    },
    /// All that the rank holds, as events with numbers that mean nothing. There
    /// are removals among them, of blocks in the middle of runs.
    Dump {
        /// In order.
        events: Vec<RouterEvent>,
        /// Number of the last event that they show.
        last: u64,
    },
    /// What was asked for has not happened yet.
    TooNew {
        /// Number of the last event there is.
        newest: u64,
    },
    /// The worker would not or could not.
    Refused(Refusal),
}

/// Why a worker did not answer with events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The range makes no sense to it.
    InvalidRange,
    /// It could not write down what the rank holds.
    DumpFailed,
    /// Another error of its own.
    Error,
    /// An answer that is not known here.
    Unknown,
}

impl Refusal {
    /// Fixed word for metrics.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::InvalidRange => "invalid_range",
            Self::DumpFailed => "dump_failed",
            Self::Error => "error",
            Self::Unknown => "unknown_answer",
        }
    }
}

/// One frame of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What was answered, unless that came before.
    pub answer: Option<Answer>,
    /// Whether nothing follows.
    pub is_final: bool,
}

/// Reads one frame's body.
///
/// # Errors
///
/// A [`PlaneError`].
pub fn decode_item(body: &[u8]) -> Result<Item, PlaneError> {
    let mut item = Item { answer: None, is_final: false };
    let mut reader = Reader::new(body);
    each_field(&mut reader, |name, value| {
        match name {
            "data" if !value.nil()? => item.answer = Some(read_answer(value)?),
            "complete_final" => item.is_final = value.boolean()?,
            _ => {}
        }
        Ok(())
    })?;
    finished(&reader)?;
    Ok(item)
}

/// Reads an answer: its kind as a word, or as the one key of a map.
fn read_answer(reader: &mut Reader<'_>) -> Result<Answer, PlaneError> {
    if reader.shape()? == Shape::Map && reader.map()? != 1 {
        return Ok(Answer::Refused(Refusal::Unknown));
    }
    Ok(match reader.text()? {
        "Events" => {
            let (events, last) = read_account(reader)?;
            Answer::Events { events, last }
        }
        "TreeDump" => {
            let (events, last) = read_account(reader)?;
            Answer::Dump { events, last }
        }
        "TooNew" => Answer::TooNew { newest: read_newest(reader)? },
        "InvalidRange" => Answer::Refused(Refusal::InvalidRange),
        "TreeDumpFailed" => Answer::Refused(Refusal::DumpFailed),
        "Error" => Answer::Refused(Refusal::Error),
        _ => Answer::Refused(Refusal::Unknown),
    })
}

fn read_account(reader: &mut Reader<'_>) -> Result<(Vec<RouterEvent>, u64), PlaneError> {
    let (mut events, mut last) = (None, None);
    each_field(reader, |name, value| {
        match name {
            "events" => events = Some(read_events(value, RECOVERY_EVENTS_MAX)?),
            "last_event_id" => last = Some(value.u64()?),
            _ => {}
        }
        Ok(())
    })?;
    Ok((events.ok_or(PlaneError::Missing)?, last.ok_or(PlaneError::Missing)?))
}

fn read_newest(reader: &mut Reader<'_>) -> Result<u64, PlaneError> {
    let mut newest = None;
    each_field(reader, |name, value| {
        if name == "newest_available" {
            newest = Some(value.u64()?);
        }
        Ok(())
    })?;
    newest.ok_or(PlaneError::Missing)
}
