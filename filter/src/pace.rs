//! Pace: how often a VM gets a tick.
//!
//! Every tick of every VM costs CPU, also when there is nothing to do: ticks at
//! full pace are nearly all that an idle gateway spends. What a request needs of
//! the ring log it applies itself, so ticks need to be fast only while more is
//! under way than a request should be burdened with.

use crate::host;
use crate::limits::{TICK_BUSY_BYTES, TICK_IDLE_MS, TICK_MS, TICKS_QUIET};

/// The pace of one VM; slow to slow down, quick to speed up.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    is_slow: bool,
    /// Ticks in a row that found little to do.
    quiet_ticks: u32,
    /// Bytes of the ring log applied since the last tick, by it or by requests.
    bytes: usize,
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
        if self.is_slow {
            // If the host refuses, ticks come as before: late, but they come.
            self.is_slow = host::set_tick_period(TICK_MS).is_err();
        }
    }

    /// A tick has done what there was to do.
    ///
    /// - `is_busy`: whether some work goes on over several ticks.
    pub(crate) fn ticked(&mut self, is_busy: bool) {
        let bytes = core::mem::take(&mut self.bytes);
        if is_busy || bytes >= TICK_BUSY_BYTES {
            return self.speed_up();
        }
        self.quiet_ticks = self.quiet_ticks.saturating_add(1);
        if !self.is_slow && self.quiet_ticks >= TICKS_QUIET {
            self.is_slow = host::set_tick_period(TICK_IDLE_MS).is_ok();
        }
    }
}
