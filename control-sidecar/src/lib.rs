//! Native sidecar of Warmpath.
//!
//! Takes in what engines say about their KV caches and which workers there
//! are, and serves both, with the models' tokenizers and templates, to the
//! filters in the gateway as one ordered feed.
//!
//! Modules are declared in the order in which data flows through them.

pub mod limits;

pub mod credentials;

pub mod tls;

pub mod config;

pub mod fleet;

pub mod discovery;

pub mod model;

pub mod source;

pub mod adapter;

pub mod state;

pub mod usage;

pub mod keeper;

pub mod replicas;

pub mod publish;

pub mod picker;

pub mod status;

pub mod metrics;

pub mod run;
