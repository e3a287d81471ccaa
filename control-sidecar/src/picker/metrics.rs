//! Metrics of the endpoint picker. What the filter counts, too, has its name.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use warmpath_core::reason::Reason;

type Label = [(&'static str, &'static str); 1];
type Words = Family<Label, Counter>;
type Level = Gauge<u64, AtomicU64>;

/// Bounds of the durations of decisions, in microseconds.
const DURATIONS_US: [f64; 12] = [
    50.0,
    100.0,
    250.0,
    500.0,
    1_000.0,
    2_500.0,
    5_000.0,
    10_000.0,
    25_000.0,
    100_000.0,
    1_000_000.0,
    10_000_000.0,
];

/// Counters and gauges.
#[derive(Debug)]
pub struct PickerMetrics {
    decisions: Words,
    /// Prompt tokens of routed requests, as far as they were tokenized.
    pub prompt_tokens: Counter,
    /// Of those, tokens that the chosen worker should have cached.
    pub predicted_cached_tokens: Counter,
    /// Cached tokens that engines reported for requests with a prediction.
    pub observed_cached_tokens: Counter,
    predictions: Words,
    /// Bookings made.
    pub bookings_made: Counter,
    /// Bookings freed.
    pub bookings_freed: Counter,
    /// Bookings that ran out.
    pub bookings_expired: Counter,
    /// Requests for a LoRA adapter that no eligible worker is known to hold.
    pub adapter_unheld: Counter,
    /// Client headers that steer routing, removed.
    pub headers_stripped: Counter,
    /// Entries of the gateway's subset hints that are no address.
    pub subset_malformed: Counter,
    /// Requests whose `nvext` is no object: passed on as they are.
    pub nvext_not_object: Counter,
    /// Entries of bookings that were not passed on to other routers one by one.
    pub uplink_dropped: Counter,
    /// Tokenizer files that could not be loaded.
    pub tokenizers_refused: Counter,
    /// Requests that began to wait for a thread.
    pub readings_begun: Counter,
    /// Those of them that wait no more.
    pub readings_ended: Counter,
    decision_duration_us: Histogram,
    /// Requests that a gateway has here.
    pub streams: Level,
    streams_refused: Words,
    connections_refused: Words,
    served: Words,
    /// 1 if the index is live.
    pub index_live: Level,
}

impl Default for PickerMetrics {
    fn default() -> Self {
        Self {
            decisions: Words::default(),
            prompt_tokens: Counter::default(),
            predicted_cached_tokens: Counter::default(),
            observed_cached_tokens: Counter::default(),
            predictions: Words::default(),
            bookings_made: Counter::default(),
            bookings_freed: Counter::default(),
            bookings_expired: Counter::default(),
            adapter_unheld: Counter::default(),
            headers_stripped: Counter::default(),
            subset_malformed: Counter::default(),
            nvext_not_object: Counter::default(),
            uplink_dropped: Counter::default(),
            tokenizers_refused: Counter::default(),
            readings_begun: Counter::default(),
            readings_ended: Counter::default(),
            decision_duration_us: Histogram::new(DURATIONS_US),
            streams: Level::default(),
            streams_refused: Words::default(),
            connections_refused: Words::default(),
            served: Words::default(),
            index_live: Level::default(),
        }
    }
}

impl PickerMetrics {
    /// All at zero, and registered: every reason is visible from the start.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        macro_rules! register {
            ($($field:ident, $name:literal, $help:literal;)*) => {
                $(registry.register($name, $help, metrics.$field.clone());)*
            };
        }
        register! {
            decisions, "decisions", "Requests to the endpoint picker, by reason";
            prompt_tokens, "prompt_tokens", "Prompt tokens of requests to the endpoint picker";
            predicted_cached_tokens, "predicted_cached_tokens", "Of those, tokens that the chosen worker should have cached";
            observed_cached_tokens, "observed_cached_tokens", "Cached tokens that engines reported for requests with a prediction";
            predictions, "predictions", "Requests whose engine reported what was predicted, or something else";
            bookings_made, "bookings_made", "Bookings that the endpoint picker made";
            bookings_freed, "bookings_freed", "Bookings that the endpoint picker freed";
            bookings_expired, "bookings_expired", "Bookings that ran out";
            adapter_unheld, "adapter_unheld", "Requests for an adapter that no eligible worker is known to hold";
            headers_stripped, "headers_stripped", "Client headers that steer routing, removed";
            subset_malformed, "subset_malformed", "Entries of subset hints that are no address";
            nvext_not_object, "nvext_not_object", "Requests whose nvext is no object";
            uplink_dropped, "uplink_dropped", "Entries of bookings not passed on to other routers one by one";
            tokenizers_refused, "tokenizers_refused", "Tokenizer files that could not be loaded";
            readings_begun, "readings_begun", "Requests that began to wait for a thread of the endpoint picker";
            readings_ended, "readings_ended", "Those of them that wait no more";
            decision_duration_us, "decision_duration_us", "Time that a thread spent on a decision, in microseconds";
            streams, "picker_streams", "Requests that gateways have at the endpoint picker";
            streams_refused, "picker_streams_refused", "Streams of the endpoint picker refused or ended, by reason";
            connections_refused, "picker_connections_refused", "Connections to the endpoint picker refused, by reason";
            served, "picker_served", "What gateways reported to have served: the worker that was chosen, or another";
            index_live, "picker_index_live", "1 if the endpoint picker's index is live";
        }
        for reason in Reason::ALL {
            drop(metrics.decisions.get_or_create(&[("reason", reason.word())]));
        }
        metrics
    }

    /// Counts a request under its one reason.
    pub fn decided(&self, reason: Reason) {
        self.decisions.get_or_create(&[("reason", reason.word())]).inc();
    }

    /// A decision has taken so long.
    pub fn took(&self, time: Duration) {
        self.decision_duration_us.observe(time.as_secs_f64() * 1e6);
    }

    /// An engine reported how much it had cached.
    pub fn observed(&self, cached: u64, predicted: u64) {
        self.observed_cached_tokens.inc_by(cached);
        let result = if cached == predicted { "exact" } else { "off" };
        self.predictions.get_or_create(&[("result", result)]).inc();
    }

    /// A stream was refused, or ended by us.
    pub fn stream_refused(&self, word: &'static str) {
        self.streams_refused.get_or_create(&[("reason", word)]).inc();
    }

    /// A connection was refused.
    pub fn connection_refused(&self, word: &'static str) {
        self.connections_refused.get_or_create(&[("reason", word)]).inc();
    }

    /// The gateway reported who has served.
    pub fn served_by(&self, is_chosen: bool) {
        let result = if is_chosen { "chosen" } else { "other" };
        self.served.get_or_create(&[("result", result)]).inc();
    }
}
