//! Engines: what the simulated engines are like.
//!
//! A model of 70 billion parameters in 16 bits with grouped-query attention (80
//! layers, 8 key-value heads of 128) on four accelerators of 989 TFLOP/s and 3.35
//! TB/s each, at half of the arithmetic and 70 % of the memory rate:
//!
//! - prompt: 2 · 70e9 operations a token at 2e15/s: 70 µs;
//! - step: 140 GB of weights at 9.4 TB/s: 15 ms;
//! - context: 2 · 80 · 8 · 128 · 2 bytes a token, 328 kB, at 9.4 TB/s: 35 ns;
//! - request: sampling and bookkeeping, 30 µs.
//!
//! Only the ratios decide which router is better, and they move little with the
//! model's size: weights, operations and context grow together.

use crate::engine::batch::{Bounds, Timing};

/// Engines behind each router.
pub const ENGINES: usize = 4;

/// Tokens of a block.
pub const BLOCK_SIZE: usize = 16;

/// How long their work takes, at real speed.
pub const TIMING: Timing = Timing {
    step_us: 15_000,
    prefill_us_per_token: 70,
    sequence_us: 30,
    context_ns_per_token: 35,
    speedup: 1,
};

/// Bounds of a step: vLLM's defaults on such a machine.
pub const BOUNDS: Bounds = Bounds { step_tokens_max: 8_192, running_max: 256, stream_interval: 16 };
