//! Metrics: every name, unit and label set of the sidecar, once.
//!
//! Labels are words of closed lists or come from the configuration; nothing
//! that an engine or a filter sends becomes a label.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use warmpath_core::roster::LeftOut;

use crate::adapter::Skip;
use crate::picker::metrics::PickerMetrics;
use crate::source::sequence::Loss;
use crate::state::counts::{Counts, Notice};

type Label = [(&'static str, &'static str); 1];
type Reasons = Family<Label, Counter>;
type Level = Gauge<u64, AtomicU64>;

/// The sidecar's counters and gauges.
#[derive(Debug, Default)]
pub struct Metrics {
    registry: Registry,
    /// Of the endpoint picker.
    pub picker: PickerMetrics,
    connection_failures: Reasons,
    replays: Counter,
    replay_failures: Reasons,
    clears: Reasons,
    undecodable: Reasons,
    skipped: Reasons,
    messages_malformed: Counter,
    other_rank: Counter,
    plane_dropped: Reasons,
    plane_evicted: Counter,
    callbacks_refused: Reasons,
    sequence_events: Reasons,
    replica_events: Reasons,
    replica_dropped: Reasons,
    bookings: Family<Label, Level>,
    load_dropped: Reasons,
    scrape_failures: Reasons,
    notices: Reasons,
    stored: Counter,
    removed: Counter,
    workers_list_errors: Counter,
    models_not_loaded: Reasons,
    frames: Reasons,
    frame_bytes: Counter,
    resyncs: Reasons,
    snapshots: Reasons,
    streams_refused: Reasons,
    feed_refused: Reasons,
    credential_reloads: Reasons,
    blobs_unknown: Counter,
    followers: Level,
    streams: Level,
    sequence: Level,
    blocks: Level,
    lower_blocks: Family<Label, Level>,
    ranks: Family<Label, Level>,
    left_out: Family<Label, Level>,
    ready: Level,
    workers_list_bad: Level,
}

fn reason(word: &'static str) -> Label {
    [("reason", word)]
}

impl Metrics {
    /// All at zero, and registered.
    #[must_use]
    pub fn new() -> Self {
        let mut metrics = Self::default();
        let mut registry = Registry::with_prefix("warmpath");
        macro_rules! register {
            ($($field:ident, $name:literal, $help:literal;)*) => {
                $(registry.register($name, $help, metrics.$field.clone());)*
            };
        }
        register! {
            connection_failures, "publisher_connection_failures", "Connections to publishers that failed or broke, by reason";
            replays, "replays", "Replays asked for";
            replay_failures, "replay_failures", "Replays that failed, by reason";
            clears, "rank_clears", "Ranks whose blocks were forgotten, by reason";
            undecodable, "batches_undecodable", "Batches that could not be decoded, by reason";
            skipped, "events_skipped", "Events passed over by the decoder, by reason";
            messages_malformed, "messages_malformed", "Messages of publishers without a number";
            other_rank, "batches_of_other_rank", "Batches refused because they name another rank";
            plane_dropped, "plane_messages_dropped", "Messages of the event plane dropped, by reason";
            plane_evicted, "plane_events_evicted", "Events given up while history was asked for, because too many waited";
            callbacks_refused, "recovery_callbacks_refused", "Connections to the recovery listener that were refused, by reason";
            sequence_events, "sequence_events", "Steps of requests that routers have said, by kind";
            replica_events, "replica_events", "Steps of requests that were said to other routers, by kind";
            replica_dropped, "replica_dropped", "Steps of requests, entries of gateways and messages to others that were dropped, by reason";
            bookings, "bookings", "Requests that run, by who has booked them: own gateways, or other routers";
            load_dropped, "load_messages_dropped", "Accounts of load dropped, by reason";
            scrape_failures, "load_scrape_failures", "Pages for Prometheus that could not be had, by reason";
            notices, "events_not_indexed", "Events or pages that are not in the index, by reason";
            stored, "blocks_stored", "Blocks that became held";
            removed, "blocks_removed", "Blocks that ceased to be held";
            workers_list_errors, "workers_list_errors", "Worker lists that were refused";
            models_not_loaded, "model_load_failures", "Attempts to load a model that failed, by reason";
            frames, "feed_frames", "Log frames written, by kind";
            frame_bytes, "feed_bytes", "Bytes of log frames written";
            resyncs, "feed_resyncs", "Followers told to take the index anew, by reason";
            snapshots, "feed_snapshots", "Snapshots, by outcome";
            streams_refused, "feed_streams_refused", "Streams of filters refused or ended, by reason";
            feed_refused, "feed_refused", "Connections and streams refused because of who asks, by reason";
            credential_reloads, "credential_reloads", "Changed files of certificates or tokens that were read, by outcome";
            blobs_unknown, "feed_blobs_unknown", "Blobs asked for that are not known";
            followers, "feed_followers", "Filters that follow the log";
            streams, "feed_streams", "Streams of filters";
            sequence, "feed_sequence", "Sequence number of the last log frame";
            blocks, "index_blocks", "Blocks held on devices, over all ranks";
            lower_blocks, "index_lower_blocks", "Blocks held in lower tiers, over all ranks, by tier";
            ranks, "ranks", "Ranks in the roster, by parity";
            left_out, "roster_left_out", "What had no room in the last roster, by kind";
            ready, "ready", "Whether the sidecar is ready";
            workers_list_bad, "workers_list_bad", "Whether the last worker list was refused";
        }
        metrics.picker = PickerMetrics::new(&mut registry);
        metrics.registry = registry;
        metrics
    }

    /// The page for Prometheus, in the OpenMetrics text format.
    #[must_use]
    pub fn page(&self) -> String {
        let mut page = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut page, &self.registry);
        page
    }

    /// A publisher was not reached, or its connection broke.
    pub fn connection_failed(&self, word: &'static str) {
        self.connection_failures.get_or_create(&reason(word)).inc();
    }

    /// A replay was asked for.
    pub fn replay_started(&self) {
        self.replays.inc();
    }

    /// A replay failed.
    pub fn replay_failed(&self, word: &'static str) {
        self.replay_failures.get_or_create(&reason(word)).inc();
    }

    /// A rank's blocks were forgotten.
    pub fn rank_cleared(&self, loss: Loss) {
        self.clears.get_or_create(&reason(loss.reason())).inc();
    }

    /// A batch could not be decoded.
    pub fn batch_undecodable(&self, word: &'static str) {
        self.undecodable.get_or_create(&reason(word)).inc();
    }

    /// An event was passed over by the decoder.
    pub fn event_skipped(&self, skip: Skip) {
        self.skipped.get_or_create(&reason(skip.reason())).inc();
    }

    /// A message had no number.
    pub fn message_malformed(&self) {
        self.messages_malformed.inc();
    }

    /// A batch named another rank than the one it came from.
    pub fn batch_of_other_rank(&self) {
        self.other_rank.inc();
    }

    /// A model's files could not be had.
    pub fn model_not_loaded(&self, word: &'static str) {
        self.models_not_loaded.get_or_create(&reason(word)).inc();
    }

    /// A message of the event plane was dropped.
    pub fn plane_dropped(&self, word: &'static str) {
        self.plane_dropped.get_or_create(&reason(word)).inc();
    }

    /// Events were given up while history was asked for.
    pub fn plane_evicted(&self, events: u64) {
        self.plane_evicted.inc_by(events);
    }

    /// A connection to the recovery listener was refused.
    pub fn callback_refused(&self, word: &'static str) {
        self.callbacks_refused.get_or_create(&reason(word)).inc();
    }

    /// A router or worker has said a step of a request.
    pub fn sequence_event(&self, kind: &'static str) {
        self.sequence_events.get_or_create(&[("kind", kind)]).inc();
    }

    /// A step of a request was said to other routers.
    pub fn replica_event(&self, kind: &'static str) {
        self.replica_events.get_or_create(&[("kind", kind)]).inc();
    }

    /// Something about bookings was dropped, on its way in or out.
    pub fn replica_dropped(&self, word: &'static str) {
        self.replica_dropped.get_or_create(&reason(word)).inc();
    }

    /// How many bookings there are.
    pub fn set_bookings(&self, own: u64, remote: u64) {
        self.bookings.get_or_create(&[("of", "own")]).set(own);
        self.bookings.get_or_create(&[("of", "remote")]).set(remote);
    }

    /// An account of load was dropped.
    pub fn load_dropped(&self, word: &'static str) {
        self.load_dropped.get_or_create(&reason(word)).inc();
    }

    /// A page for Prometheus could not be had.
    pub fn scrape_failed(&self, word: &'static str) {
        self.scrape_failures.get_or_create(&reason(word)).inc();
    }

    /// A worker list was refused.
    pub fn workers_list_refused(&self) {
        self.workers_list_errors.inc();
        self.workers_list_bad.set(1);
    }

    /// A worker list was taken over.
    pub fn workers_list_taken(&self) {
        self.workers_list_bad.set(0);
    }

    /// A log frame was written.
    pub fn frame_written(&self, kind: &'static str, bytes: usize, sequence: u64) {
        self.frames.get_or_create(&[("kind", kind)]).inc();
        self.frame_bytes.inc_by(bytes as u64);
        self.sequence.set(sequence);
    }

    /// What had no room in the last roster.
    pub fn set_left_out(&self, left_out: LeftOut) {
        for (kind, count) in [("adapters", left_out.adapters), ("taints", left_out.taints)] {
            self.left_out.get_or_create(&[("kind", kind)]).set(count as u64);
        }
    }

    /// A follower was told to take the index anew.
    pub fn resync_sent(&self, word: &'static str) {
        self.resyncs.get_or_create(&reason(word)).inc();
    }

    /// A snapshot ended.
    pub fn snapshot_ended(&self, outcome: &'static str) {
        self.snapshots.get_or_create(&[("outcome", outcome)]).inc();
    }

    /// A filter's stream was refused or ended by us.
    pub fn stream_refused(&self, word: &'static str) {
        self.streams_refused.get_or_create(&reason(word)).inc();
    }

    /// A connection or stream was refused because of who asks for it.
    pub fn feed_refused(&self, word: &'static str) {
        self.feed_refused.get_or_create(&reason(word)).inc();
    }

    /// Files of certificates or tokens have changed and were read.
    pub fn credentials_read(&self, outcome: &'static str) {
        self.credential_reloads.get_or_create(&[("outcome", outcome)]).inc();
    }

    /// A filter asked for a blob that is not known.
    pub fn blob_unknown(&self) {
        self.blobs_unknown.inc();
    }

    /// A stream began (`1`) or ended (`-1`).
    pub fn streams_changed(&self, by: i8) {
        if by > 0 {
            self.streams.inc()
        } else {
            self.streams.dec()
        };
    }

    /// A follower began (`1`) or ended (`-1`).
    pub fn followers_changed(&self, by: i8) {
        if by > 0 {
            self.followers.inc()
        } else {
            self.followers.dec()
        };
    }

    /// Filters that follow the log now.
    #[must_use]
    pub fn followers(&self) -> u64 {
        self.followers.get()
    }

    /// Streams of filters now.
    #[must_use]
    pub fn streams(&self) -> u64 {
        self.streams.get()
    }

    /// Takes over what the state has counted since `before`.
    pub fn counted(&self, before: &Counts, now: &Counts) {
        for notice in Notice::ALL {
            let more = now.of(notice).saturating_sub(before.of(notice));
            if more > 0 {
                self.notices.get_or_create(&reason(notice.reason())).inc_by(more);
            }
        }
        self.stored.inc_by(now.stored.saturating_sub(before.stored));
        self.removed.inc_by(now.removed.saturating_sub(before.removed));
    }

    /// Sets the levels that are looked at when the page is asked for.
    ///
    /// - `lower_blocks`: in the host's memory, on disks, in external storage.
    pub fn set_levels(
        &self,
        blocks: u64,
        lower_blocks: [u64; 3],
        ranks: [(&'static str, u64); 3],
        ready: bool,
    ) {
        self.blocks.set(blocks);
        for (tier, count) in ["host", "disk", "external"].into_iter().zip(lower_blocks) {
            self.lower_blocks.get_or_create(&[("tier", tier)]).set(count);
        }
        for (parity, count) in ranks {
            self.ranks.get_or_create(&[("parity", parity)]).set(count);
        }
        self.ready.set(u64::from(ready));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_shows_what_was_counted() {
        let metrics = Metrics::new();
        metrics.rank_cleared(Loss::Restart);
        metrics.frame_written("delta", 10, 7);
        let page = metrics.page();
        assert!(page.contains("warmpath_rank_clears_total{reason=\"restart\"} 1"), "{page}");
        assert!(page.contains("warmpath_feed_sequence 7"), "{page}");
        assert!(page.ends_with("# EOF\n"));
    }
}
