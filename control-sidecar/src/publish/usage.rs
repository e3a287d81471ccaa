//! Usage: how full workers' caches are, for followers to pass on.
//!
//! Beside the log, since only the last word counts: whoever missed one misses
//! nothing once the next has come.

use std::sync::{Arc, Mutex, PoisonError};

/// The last body of a cache usage frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Latest {
    /// Grows with each; 0 before the first.
    pub number: u64,
    /// The body.
    pub body: Arc<[u8]>,
}

/// Where the keeper puts it and followers find it.
#[derive(Debug, Default)]
pub struct UsageBoard(Mutex<Latest>);

impl UsageBoard {
    /// Takes the place of what was there.
    pub fn put(&self, body: Vec<u8>) {
        let mut latest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        latest.number += 1;
        latest.body = body.into();
    }

    /// What was put there last.
    #[must_use]
    pub fn latest(&self) -> Latest {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
