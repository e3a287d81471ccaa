//! Gauges: how busy ranks are, from the pages that engines keep for Prometheus.
//!
//! Of a page of a thousand lines a handful matters, so lines are scanned for
//! their names and the rest is passed over.

use std::collections::BTreeMap;

use crate::fleet::RankLoad;
use crate::limits::LOAD_RANKS_MAX;

/// What a gauge tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gauge {
    Running,
    Waiting,
    CacheUsage,
    TotalBlocks,
    /// Always 1; what it tells is in its labels.
    CacheConfig,
}

/// The gauges of vLLM, SGLang, TensorRT-LLM and Dynamo's workers. The usage of
/// the cache has been called otherwise in older releases of vLLM.
const GAUGES: [(&str, Gauge); 14] = [
    ("vllm:num_requests_running", Gauge::Running),
    ("vllm:num_requests_waiting", Gauge::Waiting),
    ("vllm:kv_cache_usage_perc", Gauge::CacheUsage),
    ("vllm:gpu_cache_usage_perc", Gauge::CacheUsage),
    ("vllm:cache_config_info", Gauge::CacheConfig),
    ("sglang:num_running_reqs", Gauge::Running),
    ("sglang:num_queue_reqs", Gauge::Waiting),
    ("sglang:token_usage", Gauge::CacheUsage),
    ("sglang:full_token_usage", Gauge::CacheUsage),
    ("trtllm:num_requests_running", Gauge::Running),
    ("trtllm:num_requests_waiting", Gauge::Waiting),
    ("trtllm:kv_cache_usage_perc", Gauge::CacheUsage),
    ("trtllm_kv_cache_utilization", Gauge::CacheUsage),
    ("dynamo_component_total_blocks", Gauge::TotalBlocks),
];

/// Integers above are not exact in a float.
const EXACT_MAX: f64 = 9_007_199_254_740_992.0;

/// Reads a page: for each rank that its labels name what it says of it; `None`
/// is the rank of lines that name none. Lines that cannot be read are passed
/// over. Several series of one rank, such as one a tensor-parallel rank, give
/// their largest value.
#[must_use]
pub fn scan(page: &str) -> BTreeMap<Option<u32>, RankLoad> {
    let mut ranks: BTreeMap<Option<u32>, RankLoad> = BTreeMap::new();
    for line in page.lines() {
        let Some((rank, load)) = scan_line(line) else { continue };
        if ranks.len() < LOAD_RANKS_MAX || ranks.contains_key(&rank) {
            raise(ranks.entry(rank).or_default(), &load);
        }
    }
    ranks
}

fn scan_line(line: &str) -> Option<(Option<u32>, RankLoad)> {
    let name_len = line.find(['{', ' ', '\t'])?;
    let (name, rest) = line.split_at_checked(name_len)?;
    let gauge = GAUGES.iter().find(|(known, _)| *known == name)?.1;
    let (mut rank, mut blocks) = (None, None);
    let rest = labels(rest, |name, value| match name {
        "engine" | "dp_rank" => rank = value.parse().ok(),
        "num_gpu_blocks" => blocks = value.parse().ok(),
        _ => {}
    })?;
    let value: f64 = rest.split_ascii_whitespace().next()?.parse().ok()?;
    let mut load = RankLoad::default();
    match gauge {
        Gauge::Running => load.running = Some(count(value)?),
        Gauge::Waiting => load.waiting = Some(count(value)?),
        Gauge::CacheUsage if (0.0..=1.0).contains(&value) => load.cache_usage = Some(value),
        Gauge::CacheUsage => return None,
        Gauge::TotalBlocks => load.total_kv_blocks = Some(count(value)?),
        Gauge::CacheConfig => load.total_kv_blocks = Some(blocks?),
    }
    Some((rank, load))
}

/// Calls `take` with every label and returns what follows them. Escapes in
/// values stay as they are: no value that is looked at has any.
fn labels<'a>(text: &'a str, mut take: impl FnMut(&'a str, &'a str)) -> Option<&'a str> {
    let Some(mut rest) = text.strip_prefix('{') else { return Some(text) };
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(after) = rest.strip_prefix('}') {
            return Some(after);
        }
        let (name, quoted) = rest.split_once("=\"")?;
        let end = end_of_value(quoted)?;
        let (value, after) = quoted.split_at_checked(end)?;
        take(name, value);
        rest = after.strip_prefix('"')?;
    }
}

/// Where the quote is that ends a label's value.
fn end_of_value(text: &str) -> Option<usize> {
    let mut escaped = false;
    text.bytes().position(|byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    })
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "within what a float holds exactly, and not negative"
)]
fn count(value: f64) -> Option<u64> {
    (0.0..=EXACT_MAX).contains(&value).then_some(value as u64)
}

fn raise(load: &mut RankLoad, more: &RankLoad) {
    load.running = load.running.max(more.running);
    load.waiting = load.waiting.max(more.waiting);
    load.total_kv_blocks = load.total_kv_blocks.max(more.total_kv_blocks);
    load.cache_usage = match (load.cache_usage, more.cache_usage) {
        (Some(one), Some(other)) => Some(one.max(other)),
        (one, other) => one.or(other),
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_captured_page_is_read() {
        let path = format!(
            "{}/tests/fixtures/dynamo-1.6.1-mocker-metrics.prom",
            env!("CARGO_MANIFEST_DIR")
        );
        let page = std::fs::read_to_string(path).unwrap();
        let idle = RankLoad {
            running: Some(0),
            waiting: Some(0),
            cache_usage: Some(0.0),
            ..RankLoad::default()
        };
        let of_sglang = RankLoad { cache_usage: None, ..idle };
        let expected = [(None, of_sglang), (Some(0), idle), (Some(1), idle)];
        assert_eq!(scan(&page), expected.into());
    }

    #[test]
    fn values_and_labels_are_read_as_engines_write_them() {
        let page = concat!(
            "# HELP vllm:num_requests_running x\n",
            "vllm:num_requests_running{engine=\"1\",model_name=\"a\\\"b,}\"} 3.0\n",
            "vllm:num_requests_waiting{model_name=\"m\",engine=\"1\",} 1.2e+06 1795329150\n",
            "vllm:cache_config_info{block_size=\"16\",engine=\"1\",num_gpu_blocks=\"4096\"} 1.0\n",
            "vllm:num_requests_running_total{engine=\"1\"} 9\n",
            "vllm:kv_cache_usage_perc{engine=\"1\"} NaN\n",
            "vllm:kv_cache_usage_perc{engine=\"2\"} 7\n",
            "sglang:num_running_reqs{tp_rank=\"0\",dp_rank=\"3\"} 2\n",
            "sglang:num_running_reqs{tp_rank=\"1\",dp_rank=\"3\"} 4\n",
            "sglang:token_usage 0.25\n",
            "sglang:num_queue_reqs -1\n",
            "sglang:num_queue_reqs{broken=\"\n",
        );
        let one = RankLoad {
            running: Some(3),
            waiting: Some(1_200_000),
            total_kv_blocks: Some(4_096),
            ..RankLoad::default()
        };
        let three = RankLoad { running: Some(4), ..RankLoad::default() };
        let none = RankLoad { cache_usage: Some(0.25), ..RankLoad::default() };
        assert_eq!(scan(page), [(None, none), (Some(1), one), (Some(3), three)].into());
    }

    proptest! {
        #[test]
        fn scanning_is_total(page: String) {
            let _ = scan(&page);
        }

        #[test]
        fn scanning_a_line_is_total(rest in "[{},=\"\\\\a-c0-9. ]{0,40}") {
            let _ = scan(&format!("sglang:token_usage{rest}"));
        }
    }
}
