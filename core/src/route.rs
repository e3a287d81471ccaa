//! Route: runs the stages of the request path, and is the only place that
//! decides what happens when one of them cannot do its work.
//!
//! In two steps, because only the second depends on what other VMs do at the
//! same time: a [`Reading`] reads the prompt once, a part at a time where it is
//! long; [`select()`] weighs the workers and may be repeated when the state has
//! moved on.
//!
//! # Terms
//!
//! - *leg*: one worker's part of a request. The *serving leg* answers; the
//!   *prefill leg*, if another worker is to compute the prompt, comes before it.
//!
//! # Invariants
//!
//! 1. Every request that reaches a worker is counted under exactly one reason.
//! 2. What cannot be read is still routed, by load; nothing here fails a
//!    request except that no worker is there.

use crate::demands::Demands;
use crate::ids::{SequenceHash, TokenId, WorkerSlot};
use crate::reason::Reason;

mod choice;
mod eligible;
mod open;
mod read;
mod select;
mod unplaced;
mod weigh;

pub use choice::{Choice, Leg, Tracking};
pub use open::{Closed, Conditions, Opened, Opening, open};
pub use read::{Circumstances, Reading, prepare};
pub use select::select;
pub use unplaced::{LegKind, Unplaced};

/// Bytes that a token stands for when a prompt is not tokenized: only the load
/// of the request depends on it.
const BYTES_PER_TOKEN_ESTIMATE: usize = 4;

/// Tokens that a block stands for when the model is not known: only the load of
/// the request depends on it.
const BLOCK_SIZE_ESTIMATE: u32 = 16;

/// A request, read as far as routing needs it.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// The model's number in rosters; `None` if no card has its name.
    pub model: Option<u16>,
    /// Workers that hold the LoRA adapter that was asked for; `None` if none
    /// was. Empty if it is not known who holds it.
    pub holders: Option<Vec<WorkerSlot>>,
    /// Why it will be routed as it is, as far as the prompt decides that.
    pub reason: Reason,
    /// Tokens of the prompt; an estimate if `tokens` is empty.
    pub prompt_tokens: u32,
    /// The prompt's tokens, if they are known: of the first prompt of several.
    pub tokens: Vec<TokenId>,
    /// Sequence hashes of the complete blocks of `tokens`.
    pub hashes: Vec<SequenceHash>,
    /// Tokens of a block; 0 if the model is not known.
    pub block_size: u32,
    /// Whether `tokens` are the whole prompt as the engine will see it.
    pub is_whole: bool,
    /// What the request asks of its workers.
    pub demands: Demands,
}

impl Prepared {
    /// A request of which only the length is known.
    #[must_use]
    pub fn by_load(reason: Reason, model: Option<u16>, body_bytes: usize) -> Self {
        let tokens = body_bytes / BYTES_PER_TOKEN_ESTIMATE;
        Self {
            model,
            holders: None,
            reason,
            prompt_tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
            tokens: Vec::new(),
            hashes: Vec::new(),
            block_size: 0,
            is_whole: false,
            demands: Demands::default(),
        }
    }

    /// Whether the tokens are the whole prompt as the engine will see it, so
    /// that they may be handed over in its place.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.is_whole && !self.tokens.is_empty()
    }

    /// Blocks that the prompt fills; an estimate if `tokens` is empty.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        let block_size = if self.block_size == 0 { BLOCK_SIZE_ESTIMATE } else { self.block_size };
        self.prompt_tokens / block_size
    }
}

#[cfg(test)]
mod tests;
