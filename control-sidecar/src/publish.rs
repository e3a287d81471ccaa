//! Publish: deltas, rosters and cards to the filters.
//!
//! Last stage of the feed path. `log` numbers and keeps frames, `service` takes
//! streams, `pace` says when a frame is written, `follow` and `snapshot` serve the two purposes of a stream.
//!
//! # Invariants
//!
//! 1. A follower gets every log frame behind its position, in order, or is told
//!    to take the index anew.
//! 2. A snapshot is exactly the state after the log frame that it names.
//! 3. Nothing waits for a filter: a slow one falls out of the log, a silent one
//!    runs out of credit, and neither holds up the state.

pub mod blobs;
pub mod follow;
pub mod log;
pub mod pace;
pub mod service;
pub mod snapshot;
pub mod socket;
pub mod usage;
