//! The stages of the core, measured: the same code as a native program and as a
//! WebAssembly module in V8.
//!
//! A *stage* prepares its state, checks its answers against something too simple
//! to be wrong, and returns *figures*. Whoever runs it brings the clock and the
//! *inputs*: files by name, since a module cannot read any.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a benchmark: a wrong answer ends it, and it divides counts by times"
)]

mod choice;
mod feed;
mod figures;
mod fleet;
mod growth;
mod lookup;
pub mod text;
#[cfg(target_arch = "wasm32")]
mod vm;

use std::collections::BTreeMap;

pub use figures::{Clock, Figure};

/// What a stage is given.
pub struct Run<'a> {
    /// Whether to take seconds, not minutes.
    pub quick: bool,
    /// Files, by name.
    pub inputs: &'a BTreeMap<String, Vec<u8>>,
    /// Tells the time.
    pub clock: &'a dyn Clock,
}

/// A stage: its name, and what runs it.
pub type Stage = (&'static str, fn(&Run<'_>) -> Vec<Figure>);

/// All stages. Each runs in a virtual machine of its own, so that its memory is
/// its own.
pub const STAGES: [Stage; 8] = [
    ("lookup", lookup::small),
    ("lookup_large", lookup::large),
    ("choice", choice::run),
    ("apply", feed::apply),
    ("memory", feed::memory),
    ("memory_naive", feed::memory_naive),
    ("growth", growth::run),
    ("text", text::run),
];

/// Runs a stage; `None` if there is none of that name.
#[must_use]
pub fn run(stage: &str, with: &Run<'_>) -> Option<Vec<Figure>> {
    let (_, run) = STAGES.iter().find(|(name, _)| *name == stage)?;
    Some(run(with))
}
