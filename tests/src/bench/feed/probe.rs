//! Probe: what the module's hooks say of the feed, and what is made of it.

use warmpath_core::wire::{Reader, WireError};

/// How long callbacks took, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Times {
    pub(super) count: u64,
    pub(super) total_ns: u64,
    pub(super) max_ns: u64,
}

impl Times {
    pub(super) fn max_ms(self) -> f64 {
        self.max_ns as f64 / 1e6
    }
}

/// What the feed did in the VM of the worker thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) ticks: Times,
    pub(super) messages: Times,
    pub(super) requests: Times,
    /// Callbacks of the feed right behind each other.
    pub(super) pauses: Times,
    /// When the first snapshot was asked for, on the host's monotonic clock.
    pub(super) snapshot_began_ns: u64,
    /// When the index was first live.
    pub(super) live_at_ns: u64,
    pub(super) is_live: bool,
    pub(super) blocks: u64,
    pub(super) bytes: u64,
    pub(super) operations: u64,
    /// Id and blocks of each worker.
    pub(super) workers: Vec<(u64, u64)>,
    /// When each marker became visible.
    pub(super) markers: Vec<u64>,
}

impl Seen {
    /// Reads the answer of the hooks' listener.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let mut times = || -> Result<Times, WireError> {
            Ok(Times { count: reader.u64()?, total_ns: reader.u64()?, max_ns: reader.u64()? })
        };
        let (ticks, messages, requests, pauses) = (times()?, times()?, times()?, times()?);
        let (snapshot_began_ns, live_at_ns) = (reader.u64()?, reader.u64()?);
        let (is_live, blocks, bytes) = (reader.u64()? == 1, reader.u64()?, reader.u64()?);
        let operations = reader.u64()?;
        let workers = reader.u64()?;
        let workers = (0..workers)
            .map(|_| Ok((reader.u64()?, reader.u64()?)))
            .collect::<Result<Vec<_>, WireError>>()?;
        let markers = reader.u64()?;
        let markers = (0..markers).map(|_| reader.u64()).collect::<Result<Vec<_>, _>>()?;
        reader.finish()?;
        Ok(Self {
            ticks,
            messages,
            requests,
            pauses,
            snapshot_began_ns,
            live_at_ns,
            is_live,
            blocks,
            bytes,
            operations,
            workers,
            markers,
        })
    }

    /// Blocks of a worker.
    pub(super) fn blocks_of(&self, id: u64) -> u64 {
        self.workers.iter().find(|(it, _)| *it == id).map_or(0, |(_, blocks)| *blocks)
    }
}

/// Times from sending to being visible, in milliseconds, ascending; of the
/// markers from one number on.
pub(super) fn lags_ms(sent: &[u64], visible: &[u64], from: usize) -> Vec<f64> {
    let mut lags: Vec<f64> = sent
        .iter()
        .zip(visible)
        .skip(from)
        .map(|(sent, visible)| visible.saturating_sub(*sent) as f64 / 1e6)
        .collect();
    lags.sort_by(f64::total_cmp);
    lags
}

/// The share's place in ascending numbers; 0 of none.
pub(super) fn percentile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1) as f64;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and the length"
    )]
    let place = (last * share).round() as usize;
    sorted.get(place).copied().unwrap_or(0.0)
}

/// How long after `resumed_ns` markers were late for the last time: milliseconds
/// until one is visible within `on_time_ms`, and all behind it are.
pub(super) fn catch_up_ms(
    sent: &[u64],
    visible: &[u64],
    resumed_ns: u64,
    on_time_ms: f64,
) -> Option<f64> {
    let late = |(sent, visible): (&u64, &u64)| {
        let lag_ms = visible.saturating_sub(*sent) as f64 / 1e6;
        (lag_ms > on_time_ms).then_some(*visible)
    };
    let last = sent.iter().zip(visible).filter_map(late).max()?;
    Some(last.saturating_sub(resumed_ns) as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use warmpath_core::wire::Writer;

    #[test]
    fn the_hooks_answer_is_read() {
        let mut writer = Writer::new();
        for number in (1..=12).chain([70, 80, 1, 5, 6, 7, 1, 9, 5, 2, 100, 200]) {
            writer.u64(number);
        }
        let bytes = writer.into_bytes();
        let seen = Seen::decode(&bytes).unwrap();
        assert_eq!(seen.pauses, Times { count: 10, total_ns: 11, max_ns: 12 });
        assert_eq!((seen.snapshot_began_ns, seen.live_at_ns, seen.is_live), (70, 80, true));
        assert_eq!((seen.blocks_of(9), seen.blocks_of(8)), (5, 0));
        assert_eq!(seen.markers, [100, 200]);
        for len in 0..bytes.len() {
            assert!(Seen::decode(&bytes[..len]).is_err(), "cut at {len}");
        }
    }

    #[test]
    fn lags_are_of_the_same_marker() {
        let (sent, visible) = ([0, 1_000_000, 2_000_000], [500_000, 4_000_000, 4_000_000]);
        assert_eq!(lags_ms(&sent, &visible, 0), [0.5, 2.0, 3.0]);
        assert_eq!(lags_ms(&sent, &visible, 2), [2.0]);
        assert_eq!(percentile(&[1.0, 2.0, 3.0], 0.5), 2.0);
        assert_eq!(percentile(&[], 0.5), 0.0);
        assert_eq!(catch_up_ms(&sent, &visible, 1_000_000, 1.0), Some(3.0));
        assert_eq!(catch_up_ms(&sent, &visible, 1_000_000, 9.0), None);
    }
}
