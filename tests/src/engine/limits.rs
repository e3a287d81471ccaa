//! Every upper bound of the engine simulator, with its unit and its reason.

use std::time::Duration;

/// Longest request body, in bytes. Real engines have no bound of their own;
/// this one is above anything the gateway buffers.
pub const BODY_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Most requests waiting for admission, in requests. Beyond it: 503, counted
/// in `engine_sim_rejected_total`.
pub const WAITING_REQUESTS_MAX: usize = 4096;

/// Most prompts in one `/v1/completions` request, in prompts.
pub const PROMPTS_MAX: usize = 64;

/// Most tokens one request may ask for, in tokens.
pub const OUTPUT_TOKENS_MAX: usize = 32_768;

/// Generated pieces that wait for a slow client, in pieces; then decoding of
/// that request waits.
pub const OUTPUT_QUEUE_PIECES: usize = 64;

/// Event batches between the scheduler and the socket, in batches. Beyond it a
/// batch is lost with its sequence number, as a subscriber would see a gap;
/// counted in `engine_sim_event_batches_overflowed_total`.
pub const EVENT_QUEUE_BATCHES: usize = 16_384;

/// Batches withheld while events are paused, in batches. Beyond it live
/// delivery is dropped (replay still has them).
pub const HELD_BATCHES_MAX: usize = 16_384;

/// Blocks of the largest simulated cache, in blocks.
pub const CACHE_BLOCKS_MAX: usize = 1 << 22;

/// Longest wait for one peer to take a replay message, in milliseconds.
pub const REPLAY_SEND_MS_MAX: u64 = 2_000;

/// Longest body whose prompt is tokenized at once, in bytes: about 10 ms of
/// work. Longer ones go to a thread of their own, so that health checks and
/// streams do not wait for them.
pub const INLINE_BODY_BYTES_MAX: usize = 64 * 1024;

/// Free places in a client's queue, in pieces, below which it gets no further
/// token: one step may send three.
pub const LAG_PIECES: usize = 4;

/// Time between two looks at clients when none of them reads.
pub const LAG_POLL: Duration = Duration::from_millis(1);

/// How late a step may end and still be made up for. Beyond it the machine is
/// too slow for the engine, and catching up would only burst.
pub const BEHIND_MAX: Duration = Duration::from_millis(50);

/// Texts whose tokens are remembered, in texts; then all are forgotten. At some
/// hundred tokens each, 40 MB.
pub const SEGMENTS_MAX: usize = 65_536;
