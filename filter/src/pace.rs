//! Pace: how often a VM gets a tick.
//!
//! Every tick of every VM costs CPU, also when there is nothing to do: ticks at
//! full pace are nearly all that an idle gateway spends. What a request needs of
//! the ring log it applies itself, so ticks need to be fast only while more is
//! under way than a request should be burdened with.

use crate::host;
use crate::limits::{READING_TICK_MS, TICK_BUSY_BYTES, TICK_IDLE_MS, TICK_MS, TICKS_QUIET};

/// The pace of one VM; slow to slow down, quick to speed up.
#[derive(Debug)]
pub(crate) struct Pace {
    /// What the host was asked for last.
    period_ms: u32,
    /// Ticks in a row that found little to do.
    quiet_ticks: u32,
    /// Bytes of the ring log applied since the last tick, by it or by requests.
    bytes: usize,
}

impl Default for Pace {
    /// As every root context begins.
    fn default() -> Self {
        Self { period_ms: TICK_MS, quiet_ticks: 0, bytes: 0 }
    }
}

impl Pace {
    /// Entries were applied. A slow VM that has got many speeds up at once.
    pub(crate) fn applied(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes >= TICK_BUSY_BYTES {
            self.speed_up();
        }
    }

    /// Something has come up that a tick should see to soon.
    pub(crate) fn speed_up(&mut self) {
        self.quiet_ticks = 0;
        if self.period_ms > TICK_MS {
            self.set(TICK_MS);
        }
    }

    /// A long prompt waits to be read.
    pub(crate) fn has_to_read(&mut self) {
        self.quiet_ticks = 0;
        self.set(READING_TICK_MS);
    }

    /// A tick has done what there was to do.
    ///
    /// - `is_busy`: whether some work goes on over several ticks.
    /// - `is_reading`: whether long prompts wait to be read.
    pub(crate) fn ticked(&mut self, is_busy: bool, is_reading: bool) {
        let bytes = core::mem::take(&mut self.bytes);
        if is_reading {
            return self.has_to_read();
        }
        if is_busy || bytes >= TICK_BUSY_BYTES {
            self.quiet_ticks = 0;
            return self.set(TICK_MS);
        }
        self.quiet_ticks = self.quiet_ticks.saturating_add(1);
        if self.quiet_ticks >= TICKS_QUIET {
            self.set(TICK_IDLE_MS);
        } else if self.period_ms < TICK_MS {
            self.set(TICK_MS);
        }
    }

    /// If the host refuses, ticks come as before, and it is asked again.
    fn set(&mut self, period_ms: u32) {
        if self.period_ms != period_ms && host::set_tick_period(period_ms).is_ok() {
            self.period_ms = period_ms;
        }
    }
}
