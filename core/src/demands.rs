//! Demands: what a request asks of the workers that it may go to.
//!
//! Read from the request's headers ([`Asked`]) and its `nvext`, and from the
//! gateway ([`SubsetHint`]); obeyed by `route`.
//!
//! # Terms
//!
//! - *pin*: a worker that the request names. A client must never name its worker,
//!   so pins count only where the operator says that whoever sends them is
//!   trusted; elsewhere they are not even read.
//! - *demand*: everything else, which a client may say of its own request.
//!
//! # Rules
//!
//! Dynamo's router's and frontend's (1.6.1), field by field: a header counts
//! before the body; of a header with several names the first name that is there;
//! of equal headers the first. Where Dynamo silently ignores what it cannot read,
//! the request is refused here, with the name of the header or field: nobody
//! finds out otherwise.

use core::fmt;
use core::net::SocketAddr;

use crate::ids::{DpRank, WorkerId};

mod asked;
mod hosts;
mod session;

pub use asked::{Asked, Rules};
pub use hosts::SubsetHint;

#[cfg(test)]
mod tests;

/// Why a request is refused for what it demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The value of a header cannot be read, or is out of its range.
    Header(&'static str),
    /// The value of a member of the body cannot be read, or is out of its range.
    Field(&'static str),
    /// The name of a session, in this header, is longer than
    /// [`SESSION_ID_BYTES_MAX`](crate::limits::SESSION_ID_BYTES_MAX).
    SessionTooLong(&'static str),
    /// More metadata headers than
    /// [`METADATA_ENTRIES_MAX`](crate::limits::METADATA_ENTRIES_MAX) or
    /// [`METADATA_BYTES_MAX`](crate::limits::METADATA_BYTES_MAX).
    TooMuchMetadata,
}

impl Refusal {
    /// The reason as it is counted and told.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Header(_) => "bad_header",
            Self::Field(_) => "bad_field",
            Self::SessionTooLong(_) => "session_id_too_long",
            Self::TooMuchMetadata => "metadata_too_large",
        }
    }

    /// The header or field that is at fault.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::Header(name) | Self::Field(name) | Self::SessionTooLong(name) => Some(name),
            Self::TooMuchMetadata => None,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(name) => {
                write!(out, "the header `{name}` must be a decimal number in its range")
            }
            Self::Field(name) => write!(out, "`{name}` must be a number in its range"),
            Self::SessionTooLong(name) => {
                write!(out, "the header `{name}` names a session of more than 256 bytes")
            }
            Self::TooMuchMetadata => out
                .write_str("metadata headers exceed 64 entries or 65536 bytes of keys and values"),
        }
    }
}

impl std::error::Error for Refusal {}

/// A worker that was named for one leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The worker.
    pub worker: WorkerId,
    /// Its rank; if none is named the worker must have exactly one.
    pub rank: Option<DpRank>,
}

/// Name of a session: a hash of its id, which is text of the client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionKey(pub u128);

/// A host of the gateway's cluster, as a subset hint names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// One address and port.
    Socket(SocketAddr),
    /// Every port of an address.
    Address(core::net::IpAddr),
}

/// What a request asks for. The default asks for nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Demands {
    /// Who is to compute the prompt, of prefill workers.
    pub prefill: Option<Pin>,
    /// Who is to answer.
    pub serving: Option<Pin>,
    /// Hosts that the gateway allows; all if `None`, none if empty.
    pub hosts: Option<Vec<Host>>,
    /// Taints that a worker must have, all of them.
    pub required_taints: Vec<String>,
    /// Taints that make a worker cheaper (or, with a negative weight, dearer).
    pub preferred_taints: Vec<(String, f64)>,
    /// The session that the request belongs to.
    pub session: Option<SessionKey>,
    /// How many tokens the answer is expected to have.
    pub expected_output_tokens: Option<u32>,
    /// How far ahead of others it would be in a queue, in seconds; at least 0.
    pub priority_jump: f64,
    /// Higher classes would leave a queue first.
    pub strict_priority: u32,
}
