//! Unplaced: why a request has no worker.

use crate::reason::Reason;

/// Which worker of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LegKind {
    /// The one that answers.
    Serving,
    /// The one that computes the prompt for it.
    Prefill,
}

/// Why a request has no worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unplaced {
    /// None is there.
    NoWorkers,
    /// There are decode workers, and they may not serve without prefill workers.
    PrefillUnavailable,
    /// The gateway's subset hint leaves no worker.
    NoHosts,
    /// No worker has the taints that the request demands.
    Unsatisfied,
    /// The request names a worker that is not there, or not for this leg.
    UnknownPin(LegKind),
    /// The request names a worker with several ranks and no rank, or a rank
    /// that the worker does not have.
    UnknownRank(LegKind),
    /// The request names a worker, or belongs to one, that takes no more.
    PinOverloaded,
    /// Every worker that may be chosen takes no more.
    Overloaded,
    /// Every worker that may be chosen has more prompts waiting than the queue's
    /// limits allow.
    QueueFull,
}

impl Unplaced {
    /// The reason as it is counted.
    #[must_use]
    pub fn reason(self) -> Reason {
        match self {
            Self::NoWorkers => Reason::NoWorkers,
            Self::NoHosts => Reason::NoHosts,
            Self::Unsatisfied => Reason::ConstraintsUnsatisfied,
            Self::PrefillUnavailable => Reason::PrefillUnavailable,
            Self::UnknownPin(_) | Self::UnknownRank(_) => Reason::UnknownPin,
            Self::PinOverloaded | Self::Overloaded => Reason::Overloaded,
            Self::QueueFull => Reason::QueueFull,
        }
    }
}
