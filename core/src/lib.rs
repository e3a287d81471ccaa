//! Pure routing core of Warmpath.
//!
//! No I/O, no clock, no randomness, no environment, no threads: whatever
//! differs between two runs is an argument. The same code runs in the
//! gateway's WebAssembly VM, in the native sidecar, in tests and in benches.
//!
//! Modules are declared in the order in which data flows through them.

pub mod ids;
pub mod limits;

// Request path.
pub mod choose;
pub mod hash;
pub mod load;
pub mod overlap;
pub mod render;
pub mod request;
pub mod score;
pub mod tokenize;

// Feed path.
pub mod card;
pub mod delta;
pub mod frame;
pub mod index;
pub mod replica;
pub mod roster;
pub mod uplink;
pub mod wire;

// Between the VMs of one gateway process.
pub mod entry;
pub mod lease;
pub mod ring;
pub mod shared;
pub mod shelf;
