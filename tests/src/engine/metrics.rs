//! Metrics: the Prometheus page, with vLLM's names.

use std::fmt::Write;
use std::sync::atomic::Ordering;

use super::config::EngineConfig;
use super::scheduler::Engine;

/// Writes the page.
#[must_use]
pub fn page(engine: &Engine, config: &EngineConfig) -> String {
    let figures = engine.figures();
    let position = engine.position();
    let counters = engine.publisher.counters();
    let mut page = Page {
        text: String::new(),
        labels: format!("engine=\"{}\",model_name=\"{}\"", config.dp_rank, config.model_name),
    };
    page.gauge("vllm:num_requests_running", figures.running as f64);
    page.gauge("vllm:num_requests_waiting", figures.waiting as f64);
    let total = position.blocks_total.max(1) as f64;
    page.gauge("vllm:kv_cache_usage_perc", position.blocks_used as f64 / total);
    page.counter("vllm:prefix_cache_queries", figures.prefix_queries);
    page.counter("vllm:prefix_cache_hits", figures.prefix_hits);
    page.counter("vllm:prompt_tokens", figures.prompt_tokens);
    page.counter("vllm:generation_tokens", figures.generation_tokens);
    page.counter("vllm:request_success", figures.finished);
    page.counter("vllm:num_preemptions", 0);
    let labels = format!(
        "block_size=\"{}\",num_gpu_blocks=\"{}\",enable_prefix_caching=\"True\",engine=\"{}\"",
        config.block_size, position.blocks_total, config.dp_rank
    );
    page.line("vllm:cache_config_info", "gauge", &labels, 1.0);

    page.counter("engine_sim_aborted", figures.aborted);
    page.counter("engine_sim_rejected", figures.rejected);
    page.counter("engine_sim_token_data_equal", figures.token_data_equal);
    page.counter("engine_sim_token_data_different", figures.token_data_different);
    page.counter("engine_sim_event_batches_sent", counters.sent.load(Ordering::Relaxed));
    page.counter("engine_sim_event_batches_dropped", counters.dropped.load(Ordering::Relaxed));
    page.counter(
        "engine_sim_event_batches_overflowed",
        counters.overflowed.load(Ordering::Relaxed),
    );
    page.counter("engine_sim_event_batches_replayed", counters.replayed.load(Ordering::Relaxed));
    page.text
}

struct Page {
    text: String,
    labels: String,
}

impl Page {
    fn gauge(&mut self, name: &str, value: f64) {
        let labels = self.labels.clone();
        self.line(name, "gauge", &labels, value);
    }

    /// A counter; on the wire its name ends in `_total`.
    fn counter(&mut self, name: &str, value: u64) {
        let labels = self.labels.clone();
        self.line(&format!("{name}_total"), "counter", &labels, value as f64);
    }

    fn line(&mut self, name: &str, kind: &str, labels: &str, value: f64) {
        // Writing to a string cannot fail.
        let _written = writeln!(self.text, "# TYPE {name} {kind}\n{name}{{{labels}}} {value}");
    }
}
