//! Pure routing core of Warmpath.
//!
//! No I/O, no clock, no randomness, no environment, no threads: whatever
//! differs between two runs is an argument. The same code runs in the
//! gateway's WebAssembly VM, in the native sidecar, in tests and in benches.
//!
//! Modules are declared in the order in which data flows through them.

pub mod ids;
pub mod json;
pub mod limits;

// Request path.
pub mod handover;
pub mod hash;
pub mod render;
pub mod request;
pub mod tokenize;
pub mod usage;
