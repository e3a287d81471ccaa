//! Metrics: every name, unit and label of the filter, once.
//!
//! Envoy's stats have no labels of their own: a label is a part of the name
//! (`….reason.<word>`) that the bootstrap's `stats_tags` cut out. Values of all
//! VMs of a process fall into one metric: counters add up, gauges show the VM
//! that wrote last.
//!
//! A request counts a dozen things, and every call into the host costs as much as
//! some of the stages of a decision. So counts are kept in the VM and handed over
//! on ticks, together. What a VM that crashes has not handed over is lost.

use core::cell::Cell;

use warmpath_core::reason::Reason;

use crate::host::{self, MetricKind};

/// Counters that are not counted by reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Prompt tokens of routed requests, as far as they were tokenized.
    PromptTokens,
    /// Of those, tokens that the chosen worker should have cached.
    PredictedCachedTokens,
    /// Cached tokens that engines reported for requests with a prediction.
    ObservedCachedTokens,
    /// Requests whose engine reported exactly what was predicted.
    PredictionsExact,
    /// Requests whose engine reported something else.
    PredictionsOff,
    /// Entries of the ring log applied.
    RingEntries,
    /// Bookings made. What this exceeds the freed ones by runs, or was cut by a
    /// VM's crash and runs out.
    BookingsMade,
    /// Bookings freed.
    BookingsFreed,
    /// Bookings that had to be decided again, since another VM was faster.
    BookingConflicts,
    /// Bookings written without the guarantee that nobody was faster.
    BookingUnordered,
    /// Bookings that ran out.
    BookingsExpired,
    /// Entries that could not be written to the ring log at once.
    RingAppendsDelayed,
    /// Frames that could not be read.
    BadFrames,
    /// Frames that had come before, are older than what has, or are of another log
    /// than their stream: passed over.
    FramesReplayed,
    /// Times that a frame was missing.
    FeedGaps,
    /// Times that the ring log had moved on before it was read.
    RingOverruns,
    /// Snapshots taken.
    Snapshots,
    /// Streams to the sidecar that ended.
    FeedStreamsEnded,
    /// Tokenizer files that could not be loaded.
    TokenizersRefused,
    /// Requests for a LoRA adapter that no eligible worker is known to hold.
    AdapterUnheld,
    /// Requests released because their body never came to the filter: the
    /// plugin lacks `allow_on_headers_stop_iteration`.
    PairingWrong,
    /// Client headers that steer routing, removed.
    HeadersStripped,
    /// Entries of the gateway's subset hints that are no address.
    SubsetMalformed,
    /// Requests whose `nvext` is no object: passed on as they are.
    NvextNotObject,
    /// Host calls that were refused.
    HostRefused,
    /// Calls into state that was in use already.
    Reentered,
    /// Entries of bookings that were not passed on to the sidecar one by one.
    UplinkDropped,
    /// Bookings of other routers that there was no room for.
    RemoteRefused,
    /// Bookings that there was no room for.
    BookingsRefused,
    /// Bookings whose blocks are not shared with others, for want of room.
    BookingsCrowded,
    /// Sessions that there was no room for.
    SessionsRefused,
    /// Own decisions that there was no room for, or not for all of their blocks.
    DecisionsRefused,
    /// Prompts whose beginning was looked up among those that were read before.
    PrefixLookups,
    /// Of those, prompts whose beginning was known.
    PrefixHits,
    /// Bytes of prompts that were not tokenized again.
    PrefixBytesSaved,
    /// Chunks of beginnings that were forgotten for want of room.
    PrefixEvicted,
    /// Chunks of beginnings that were not remembered for want of room.
    PrefixRefused,
    /// Long prompts that began to wait for their turns. What this exceeds the
    /// ended ones by waits, or was cut by a VM's crash.
    ReadingsBegun,
    /// Those of them that wait no more: read, given up, or gone.
    ReadingsEnded,
    /// Wake-ups that did not come in time: a tick did the work.
    WakesMissed,
}

const COUNTERS: [(Counter, &str); 40] = [
    (Counter::PromptTokens, "warmpath_prompt_tokens_total"),
    (Counter::PredictedCachedTokens, "warmpath_predicted_cached_tokens_total"),
    (Counter::ObservedCachedTokens, "warmpath_observed_cached_tokens_total"),
    (Counter::PredictionsExact, "warmpath_predictions_total.result.exact"),
    (Counter::PredictionsOff, "warmpath_predictions_total.result.off"),
    (Counter::RingEntries, "warmpath_ring_entries_total"),
    (Counter::BookingsMade, "warmpath_bookings_made_total"),
    (Counter::BookingsFreed, "warmpath_bookings_freed_total"),
    (Counter::BookingConflicts, "warmpath_booking_conflicts_total"),
    (Counter::BookingUnordered, "warmpath_booking_unordered_total"),
    (Counter::BookingsExpired, "warmpath_bookings_expired_total"),
    (Counter::RingAppendsDelayed, "warmpath_ring_appends_delayed_total"),
    (Counter::BadFrames, "warmpath_bad_frames_total"),
    (Counter::FramesReplayed, "warmpath_frames_replayed_total"),
    (Counter::FeedGaps, "warmpath_feed_gaps_total"),
    (Counter::RingOverruns, "warmpath_ring_overruns_total"),
    (Counter::Snapshots, "warmpath_snapshots_total"),
    (Counter::FeedStreamsEnded, "warmpath_feed_streams_ended_total"),
    (Counter::TokenizersRefused, "warmpath_tokenizers_refused_total"),
    (Counter::AdapterUnheld, "warmpath_adapter_unheld_total"),
    (Counter::PairingWrong, "warmpath_pairing_wrong_total"),
    (Counter::HeadersStripped, "warmpath_headers_stripped_total"),
    (Counter::SubsetMalformed, "warmpath_subset_malformed_total"),
    (Counter::NvextNotObject, "warmpath_nvext_not_object_total"),
    (Counter::HostRefused, "warmpath_host_refused_total"),
    (Counter::Reentered, "warmpath_reentered_total"),
    (Counter::UplinkDropped, "warmpath_uplink_dropped_total"),
    (Counter::RemoteRefused, "warmpath_remote_bookings_refused_total"),
    (Counter::BookingsRefused, "warmpath_bookings_refused_total"),
    (Counter::BookingsCrowded, "warmpath_bookings_crowded_total"),
    (Counter::SessionsRefused, "warmpath_sessions_refused_total"),
    (Counter::DecisionsRefused, "warmpath_decisions_unrecorded_total"),
    (Counter::PrefixLookups, "warmpath_prefix_lookups_total"),
    (Counter::PrefixHits, "warmpath_prefix_hits_total"),
    (Counter::PrefixBytesSaved, "warmpath_prefix_bytes_saved_total"),
    (Counter::PrefixEvicted, "warmpath_prefix_evicted_chunks_total"),
    (Counter::PrefixRefused, "warmpath_prefix_refused_chunks_total"),
    (Counter::ReadingsBegun, "warmpath_readings_begun_total"),
    (Counter::ReadingsEnded, "warmpath_readings_ended_total"),
    (Counter::WakesMissed, "warmpath_reading_wakes_missed_total"),
];

/// Gauges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gauge {
    /// Blocks in a VM's index.
    IndexBlocks,
    /// Bytes that a VM's index holds.
    IndexBytes,
    /// Blocks dropped from a VM's index to keep its limit.
    IndexEvicted,
    /// Bytes that a VM's tokenizers hold.
    TokenizerBytes,
    /// Bytes that a VM holds of beginnings of prompts that were read before.
    PrefixBytes,
    /// Milliseconds since the sidecar was heard of.
    FeedAgeMs,
    /// Bookings that are not freed.
    Bookings,
    /// Workers in the roster.
    Workers,
    /// Sequence of the log frame that a VM's index stands at.
    FeedSequence,
    /// 1 if a VM's index is live.
    IndexLive,
    /// Long prompts that wait for their turns.
    ReadingsWaiting,
}

const GAUGES: [(Gauge, &str); 11] = [
    (Gauge::IndexBlocks, "warmpath_index_blocks"),
    (Gauge::IndexBytes, "warmpath_index_bytes"),
    (Gauge::IndexEvicted, "warmpath_index_evicted_blocks"),
    (Gauge::TokenizerBytes, "warmpath_tokenizer_bytes"),
    (Gauge::PrefixBytes, "warmpath_prefix_bytes"),
    (Gauge::FeedAgeMs, "warmpath_feed_age_ms"),
    (Gauge::Bookings, "warmpath_bookings"),
    (Gauge::Workers, "warmpath_workers"),
    (Gauge::FeedSequence, "warmpath_feed_sequence"),
    (Gauge::IndexLive, "warmpath_index_live"),
    (Gauge::ReadingsWaiting, "warmpath_readings_waiting"),
];

/// Distributions, all of microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Histogram {
    /// Time that the thread spent on a decision, over all its slices.
    Decision,
    /// Time that the thread spent at a time on a prompt that is read in slices.
    ReadingSlice,
    /// From the end of such a request's body to its decision.
    ReadingElapsed,
}

const HISTOGRAMS: [(Histogram, &str); 3] = [
    (Histogram::Decision, "warmpath_decision_duration_us"),
    (Histogram::ReadingSlice, "warmpath_reading_slice_us"),
    (Histogram::ReadingElapsed, "warmpath_reading_elapsed_us"),
];

/// A counter of the host, and what it has not been told yet.
#[derive(Debug)]
struct Count {
    id: u32,
    untold: Cell<u64>,
}

impl Count {
    fn add(&self, count: u64) {
        self.untold.set(self.untold.get().saturating_add(count));
    }

    fn tell(&self) {
        let count = self.untold.take();
        if count > 0 {
            host::increment_metric(self.id, i64::try_from(count).unwrap_or(i64::MAX));
        }
    }
}

/// The numbers that the host gave to the metrics. One that it refused is left
/// out; nothing fails for want of a metric.
#[derive(Debug, Default)]
pub struct Metrics {
    counters: Vec<(Counter, Count)>,
    gauges: Vec<(Gauge, u32)>,
    decisions: Vec<(Reason, Count)>,
    histograms: Vec<(Histogram, u32)>,
}

impl Metrics {
    /// Defines every metric, so that each is visible from the start.
    #[must_use]
    pub fn define() -> Self {
        let define = |kind, name: &str| host::define_metric(kind, name).ok();
        let count = |name: &str| {
            Some(Count { id: define(MetricKind::Counter, name)?, untold: Cell::new(0) })
        };
        Self {
            counters: COUNTERS
                .iter()
                .filter_map(|(counter, name)| Some((*counter, count(name)?)))
                .collect(),
            gauges: GAUGES
                .iter()
                .filter_map(|(gauge, name)| Some((*gauge, define(MetricKind::Gauge, name)?)))
                .collect(),
            decisions: Reason::ALL
                .iter()
                .filter_map(|reason| {
                    let name = format!("warmpath_decisions_total.reason.{}", reason.word());
                    Some((*reason, count(&name)?))
                })
                .collect(),
            histograms: HISTOGRAMS
                .iter()
                .filter_map(|(it, name)| Some((*it, define(MetricKind::Histogram, name)?)))
                .collect(),
        }
    }

    /// Adds to a counter.
    pub fn add(&self, counter: Counter, count: u64) {
        if let Some((_, known)) = self.counters.iter().find(|(known, _)| *known == counter) {
            known.add(count);
        }
    }

    /// Counts a request under its one reason.
    pub fn decided(&self, reason: Reason) {
        if let Some((_, known)) = self.decisions.iter().find(|(known, _)| *known == reason) {
            known.add(1);
        }
    }

    /// Tells the host what was counted since it was last told. To be called on
    /// ticks, and before a VM ends.
    pub fn tell(&self) {
        self.counters.iter().for_each(|(_, count)| count.tell());
        self.decisions.iter().for_each(|(_, count)| count.tell());
    }

    /// Sets a gauge.
    pub fn set(&self, gauge: Gauge, value: u64) {
        if let Some((_, id)) = self.gauges.iter().find(|(known, _)| *known == gauge) {
            host::record_metric(*id, value);
        }
    }

    /// Records a duration.
    pub fn took(&self, histogram: Histogram, nanoseconds: u64) {
        if let Some((_, id)) = self.histograms.iter().find(|(known, _)| *known == histogram) {
            host::record_metric(*id, nanoseconds / 1_000);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_is_told_once() {
        let count = Count { id: 7, untold: Cell::new(0) };
        count.add(2);
        count.add(3);
        assert_eq!(count.untold.get(), 5);
        count.tell();
        assert_eq!(count.untold.get(), 0);
    }

    #[test]
    fn names_are_distinct() {
        let mut names: Vec<&str> =
            COUNTERS.iter().map(|(_, n)| *n).chain(GAUGES.iter().map(|(_, n)| *n)).collect();
        names.extend(HISTOGRAMS.iter().map(|(_, name)| *name));
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
