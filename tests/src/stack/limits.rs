//! Every bound of the local run, with its unit and its reason.

use std::time::Duration;

/// Engines of the stack.
pub const ENGINES: usize = 3;

/// Longest time for the whole stack to become ready. Debug builds of the
/// sidecar compile a real tokenizer in it.
pub const READY_WITHIN: Duration = Duration::from_secs(90);

/// Longest time for one ordinary request.
pub const REQUEST_WITHIN: Duration = Duration::from_secs(30);

/// Longest time for a bad request; the largest has 10 MB to tokenize.
pub const BAD_REQUEST_WITHIN: Duration = Duration::from_secs(60);

/// Longest time for the feed to catch up with an idle engine.
pub const CATCH_UP_WITHIN: Duration = Duration::from_secs(10);

/// Time between two looks at a condition. A look costs well under 1 ms.
pub const POLL: Duration = Duration::from_millis(2);

/// Time between two looks while something starts.
pub const POLL_START: Duration = Duration::from_millis(25);

/// Time a process gets to end by itself before it is killed.
pub const STOP_WITHIN: Duration = Duration::from_secs(5);

/// Longest response that is read, in bytes.
pub const RESPONSE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// End of a log that is shown when something failed, in bytes.
pub const LOG_TAIL_BYTES: u64 = 4_000;

/// Time in which routing must be exact again after the sidecar was killed.
pub const EXACT_AGAIN_WITHIN: Duration = Duration::from_secs(5);

/// Time for which exactness after a kill is waited for, so that a miss of the
/// bound above is reported with its figure.
pub const EXACT_AGAIN_WAIT: Duration = Duration::from_secs(30);
