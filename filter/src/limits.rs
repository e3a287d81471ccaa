//! Bounds and periods of the filter, each with its reason.

/// Asked for between two ticks while something is under way, in milliseconds.
/// Envoy's timers have a grain of about 4 ms.
pub(crate) const TICK_MS: u32 = 5;

/// The same while nothing is, in milliseconds: a quarter of the time between two
/// renewals of the lease.
pub(crate) const TICK_IDLE_MS: u32 = 50;

/// Ticks in a row that must find nothing under way before they become fewer:
/// about half a second.
pub(crate) const TICKS_QUIET: u32 = 64;

/// Bytes of the ring log that may come between two ticks without making ticks
/// frequent: a quarter of what a request may apply.
pub(crate) const TICK_BUSY_BYTES: usize = REQUEST_FEED_BYTES_MAX / 4;

/// Time that a tick may spend on the ring log, in nanoseconds. A worker thread
/// serves requests in between, so it must stay well below their latency.
pub(crate) const TICK_RING_NS: u64 = 800_000;

/// Bytes of feed frames that a request applies before it is decided, over all
/// attempts at its booking: 0.8 ms in the worst case. What is left is applied on
/// ticks; the decision is then made on a slightly older state, and counted.
/// Bookings are always applied: they come no faster than requests are decided.
pub(crate) const REQUEST_FEED_BYTES_MAX: usize = 64 * 1024;

/// How often a booking is decided again when another VM was faster. Each time
/// one of them has got on; with four threads none of 30 000 decisions came near.
pub(crate) const BOOKING_ATTEMPTS_MAX: u32 = 64;

/// How long a lease on the feed holds without renewal, in milliseconds. Also
/// the longest that the feed stands still when its VM dies.
pub(crate) const LEASE_TERM_MS: u64 = 1_000;

/// Time between two renewals of the lease, in milliseconds.
pub(crate) const LEASE_RENEW_MS: u64 = 200;

/// Time between two attempts to open a stream, in milliseconds.
pub(crate) const STREAM_RETRY_MS: u64 = 250;

/// A follower's stream that brings nothing for so long is dead, in
/// milliseconds: the sidecar sends a heartbeat five times a second.
pub(crate) const STREAM_SILENCE_MS: u64 = 3_000;

/// Time that the messages of one turn of the event loop may spend on applying
/// frames, in nanoseconds: all that a socket has is read in one turn. What is left
/// is in the ring log and applied on ticks, or before a decision.
pub(crate) const TURN_FEED_NS: u64 = 500_000;

/// Messages that follow each other within so many nanoseconds are of one turn:
/// nobody else is served in between.
pub(crate) const SAME_TURN_NS: u64 = 30_000;

/// Parts of a snapshot that may be on their way at a time: applying one takes up
/// to half a millisecond, and two may come in one turn of the event loop.
pub(crate) const SNAPSHOT_CREDIT: u32 = 2;

/// Parts of a blob that may be on their way at a time.
pub(crate) const BLOB_CREDIT: u32 = 8;

/// Parts of a blob that a tick takes from the shelf: 256 KiB, about 0.1 ms.
pub(crate) const SHELF_PARTS_PER_TICK: u32 = 4;

/// Time between two looks for a blob that is not on the shelf yet, in
/// milliseconds.
pub(crate) const SHELF_RETRY_MS: u64 = 50;

/// Time between two looks for bookings that ran out, in milliseconds.
pub(crate) const EXPIRE_EVERY_MS: u64 = 1_000;

/// Time between two settings of the gauges, in milliseconds.
pub(crate) const GAUGES_EVERY_MS: u64 = 250;

/// Bookings of its own that a VM refreshes in one tick.
pub(crate) const REFRESHES_PER_TICK: usize = 64;

/// Entries that wait for the ring log when it is contended.
pub(crate) const DELAYED_ENTRIES_MAX: usize = 65_536;

/// How long a request's headers are held without any sign that its body comes
/// to the filter, in milliseconds, in a VM that has never seen one come.
pub(crate) const PAIRING_PROBE_MS: u64 = 1_000;

/// So many such requests in a row, and headers are not held any more…
pub(crate) const PAIRING_FAILURES_MAX: u32 = 3;

/// …but for one request in so many, to see whether that has changed.
pub(crate) const PAIRING_PROBE_EVERY: u32 = 256;

/// Requests whose headers are watched for that at a time.
pub(crate) const WATCHED_MAX: usize = 1_024;

/// Attempts at a number of its own that a VM makes.
pub(crate) const NUMBER_ATTEMPTS_MAX: u32 = 64;

/// Longest body whose prompt is begun in the callback that brings its end, in
/// bytes: scanning and rendering it takes half a millisecond. A longer one waits
/// for a turn, so that many that come at once do not follow each other without a
/// pause.
pub(crate) const INLINE_BODY_BYTES_MAX: usize = 192 * 1024;

/// Time for which a prompt is read in that callback, in nanoseconds; what is left
/// then waits for a turn. Ordinary prompts take a tenth of it.
pub(crate) const INLINE_SLICE_NS: u64 = 2_000_000;

/// Time for which a turn reads on, in nanoseconds. Whoever comes meanwhile waits
/// for so long, once or twice a request.
pub(crate) const SLICE_NS: u64 = 2_500_000;

/// Text that is read between two looks at the clock, in bytes: 0.1 to 0.3 ms.
pub(crate) const SLICE_STEP_BYTES: usize = 4 * 1024;

/// Tokens that are written for the body between two looks at the clock: about
/// 0.1 ms.
pub(crate) const SLICE_STEP_TOKENS: usize = 8 * 1024;

/// A prompt that has waited for so long, in milliseconds, is read before shorter
/// ones.
pub(crate) const READING_PATIENCE_MS: u64 = 250;

/// Turns that are taken by messages until something else has come: with the one
/// that a tick gave, at most two slices follow each other unseen.
pub(crate) const TURNS_UNSEEN_MAX: u32 = 1;

/// Asked for between two ticks while prompts wait to be read, in milliseconds:
/// where messages may not, ticks go on.
pub(crate) const READING_TICK_MS: u32 = 1;

/// A wake-up that has not come after this time, in milliseconds, is not waited
/// for: the tick reads on. It takes 0.1 to 0.5 ms.
pub(crate) const WAKE_MISSED_MS: u64 = 10;

/// So many wake-ups in a row that did not come, and none is asked for…
pub(crate) const WAKES_MISSED_MAX: u32 = 3;

/// …for this time, in milliseconds; ticks do the work. Messages that nobody takes
/// stay in the queue for good.
pub(crate) const WAKE_PAUSE_MS: u64 = 1_000;

/// Time between two offers to pass wake-ups on, in milliseconds.
pub(crate) const RELAY_OFFER_MS: u64 = 1_000;

/// Messages that are taken out of a queue at a time. One is there for each VM at
/// most, but for those that a VM left behind when it crashed.
pub(crate) const MESSAGES_PER_CALL: u32 = 64;
