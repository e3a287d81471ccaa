//! Demands: what a request asks of the workers that it may go to.
//!
//! Read from the request (`nvext`, headers that a trusted hop has set) and from
//! the gateway (subset hint) by `request` and the filter; obeyed by `route`.

use core::net::SocketAddr;

use crate::ids::{DpRank, WorkerId};

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
