//! Pure routing core of Warmpath.
//!
//! No I/O, no clock, no randomness, no environment, no threads: whatever
//! differs between two runs is an argument. The same code runs in the
//! gateway's WebAssembly VM, in the native sidecar, in tests and in benches.
//!
//! Modules are declared in the order in which data flows through them.

pub mod ids;
pub mod limits;

pub mod settings;

// Request path.
pub mod json;
pub mod request;

pub mod demands;

pub mod intake;

pub mod render;

pub mod tokenize;

pub mod hash;

pub mod overlap;

pub mod approximate;

pub mod load;

pub mod affinity;

pub mod score;

pub mod choose;

pub mod handover;

pub mod usage;

pub mod headers;

pub mod models;

pub mod prefix;
pub mod reason;

pub mod route;

pub mod answer;

// Feed path.
pub mod wire;

pub mod frame;

pub mod cache_usage;
pub mod card;

pub mod roster;

pub mod event;

pub mod delta;

pub mod index;

pub mod replica;

pub mod stream;

pub mod uplink;

pub mod bookings;

// Between the VMs of one gateway process.
pub mod shared;

pub mod ring;

pub mod entry;

pub mod lease;

pub mod shelf;
