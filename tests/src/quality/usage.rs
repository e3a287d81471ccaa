//! Usage: processor time, as Linux tells it. Zero elsewhere.

use std::fs::read_to_string;

/// Ticks of a second in `/proc`, on every architecture that Linux has today.
const TICKS_PER_SECOND: f64 = 100.0;

/// A measurement under way.
pub struct Usage {
    processes: Vec<u32>,
    own_ticks: u64,
    machine: (u64, u64),
}

impl Usage {
    /// Begins to measure processes and the machine.
    #[must_use]
    pub fn begin(processes: &[u32]) -> Self {
        Self {
            processes: processes.to_vec(),
            own_ticks: processes.iter().map(|id| ticks(*id)).sum(),
            machine: machine(),
        }
    }

    /// Processor time of the processes, in milliseconds, and the share of the
    /// machine's time that was busy.
    #[must_use]
    pub fn end(&self) -> (f64, f64) {
        let own: u64 = self.processes.iter().map(|id| ticks(*id)).sum();
        let (busy, all) = machine();
        let busy = float(busy.saturating_sub(self.machine.0));
        let all = float(all.saturating_sub(self.machine.1)).max(1.0);
        let own_ms = float(own.saturating_sub(self.own_ticks)) * 1000.0 / TICKS_PER_SECOND;
        (own_ms, busy / all)
    }
}

/// Processors of the machine.
#[must_use]
pub fn processors() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1))
}

/// User and system time of a process.
fn ticks(id: u32) -> u64 {
    let stat = read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    // The second field is a name in parentheses, which may have spaces in it.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    fields.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum()
}

/// Busy and all ticks of all processors.
fn machine() -> (u64, u64) {
    let stat = read_to_string("/proc/stat").unwrap_or_default();
    let first = stat.lines().next().unwrap_or_default();
    let ticks: Vec<u64> =
        first.split_whitespace().skip(1).take(8).filter_map(|ticks| ticks.parse().ok()).collect();
    let all: u64 = ticks.iter().sum();
    let idle: u64 = ticks.iter().skip(3).take(2).sum();
    (all - idle, all)
}

fn float(number: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2⁵³")]
    let number = number as f64;
    number
}
