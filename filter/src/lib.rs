//! Proxy-wasm HTTP filter of Warmpath.
//!
//! Routes LLM requests to the worker whose KV cache is warm, inside the gateway.
//! The routing itself is `warmpath-core`; here are the host's callbacks, the
//! feed's streams and the life of a request.

#![cfg_attr(
    not(target_arch = "wasm32"),
    allow(dead_code, reason = "natively nothing calls the host's callbacks")
)]

pub mod config;
pub mod host;
pub mod http;
pub mod limits;
pub mod metrics;
pub mod overrides;

mod abi;
mod allocator;
mod answer;
mod feed;
mod intake;
mod pace;
mod pairing;
mod place;
mod reading;
mod vm;
mod wake;

// Natively only the linter looks at the callbacks: a test binary could not be
// linked against a host that is not there.
#[cfg(not(test))]
mod contexts;
#[cfg(all(not(test), feature = "test-hooks"))]
mod hooks;
