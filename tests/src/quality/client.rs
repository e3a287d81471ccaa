//! Client: sends a trace to a router, each request when its time has come, and
//! checks every answer.

use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Request as HttpRequest, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::figures::Seen;
use super::trace::{Request, Trace};
use crate::stack::launch::MODEL;

/// Longest time for one answer, in real time.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// Longest answer, in bytes.
const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What came of a trace.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Right answers.
    pub seen: Vec<Seen>,
    /// Why others were not, with how often.
    pub faults: Vec<(Fault, usize)>,
    /// From the first request to the last answer, in real time.
    pub took: Duration,
}

/// What is wrong with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No response, or one cut off.
    Connection,
    /// Not in time.
    TimedOut,
    /// A status that is not 200.
    Status(u16),
    /// 200, but without end or usage.
    Incomplete,
    /// Other tokens than were to be had, or more cached than the prompt has.
    Count,
}

type Pool = Client<HttpConnector, Full<Bytes>>;

/// Sends all requests of a trace and reads all answers.
///
/// - `speedup`: times that the engines are faster than real ones; the trace is
///   sent as much faster, and times are counted as much longer.
pub async fn send(trace: &Trace, address: &str, speedup: u64) -> Outcome {
    let pool: Pool = Client::builder(TokioExecutor::new()).build_http();
    let uri = format!("http://{address}/v1/chat/completions");
    let bodies: Vec<Bytes> =
        trace.requests.iter().map(|request| request.body(MODEL).into()).collect();
    let mut tasks = JoinSet::new();
    let started = Instant::now();
    for (request, body) in trace.requests.iter().zip(bodies) {
        let due = started + Duration::from_micros(request.at_us / speedup.max(1));
        sleep_until(due).await;
        let (pool, uri, expected) = (pool.clone(), uri.clone(), Expected::of(request));
        tasks.spawn(async move {
            let answer = timeout(ANSWER_WITHIN, answer(&pool, &uri, body, due, speedup)).await;
            answer.unwrap_or(Err(Fault::TimedOut)).and_then(|seen| expected.check(seen))
        });
    }
    let mut outcome = Outcome::default();
    while let Some(answer) = tasks.join_next().await {
        match answer.unwrap_or(Err(Fault::Connection)) {
            Ok(seen) => outcome.seen.push(seen),
            Err(fault) => match outcome.faults.iter_mut().find(|(known, _)| *known == fault) {
                Some((_, times)) => *times += 1,
                None => outcome.faults.push((fault, 1)),
            },
        }
    }
    outcome.took = started.elapsed();
    outcome
}

/// What a right answer says.
struct Expected {
    prompt_tokens: u64,
    output_tokens: u64,
}

impl Expected {
    fn of(request: &Request) -> Self {
        Self {
            prompt_tokens: request.prompt.len() as u64,
            output_tokens: request.output_tokens as u64,
        }
    }

    fn check(&self, (seen, output_tokens): (Seen, u64)) -> Result<Seen, Fault> {
        let right = seen.prompt_tokens == self.prompt_tokens
            && output_tokens == self.output_tokens
            && seen.cached_tokens <= seen.prompt_tokens;
        if right { Ok(seen) } else { Err(Fault::Count) }
    }
}

/// One answer, and how many tokens it has.
async fn answer(
    pool: &Pool,
    uri: &str,
    body: Bytes,
    due: Instant,
    speedup: u64,
) -> Result<(Seen, u64), Fault> {
    let request = HttpRequest::post(uri)
        .header("content-type", "application/json")
        .body(Full::new(body))
        .map_err(|_| Fault::Connection)?;
    let response = pool.request(request).await.map_err(|_| Fault::Connection)?;
    if response.status() != StatusCode::OK {
        return Err(Fault::Status(response.status().as_u16()));
    }
    let since_due = || {
        let real = Instant::now().saturating_duration_since(due).as_micros();
        u64::try_from(real).unwrap_or(u64::MAX).saturating_mul(speedup)
    };
    let mut text = Vec::new();
    let mut first_token_us = None;
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Fault::Connection)?;
        let Some(data) = frame.data_ref() else { continue };
        text.extend_from_slice(data);
        if text.len() > ANSWER_BYTES_MAX {
            return Err(Fault::Incomplete);
        }
        if first_token_us.is_none() && has_token(&text) {
            first_token_us = Some(since_due());
        }
    }
    let last_token_us = since_due();
    let usage = usage(&text).ok_or(Fault::Incomplete)?;
    let number = |pointer: &str| usage.pointer(pointer).and_then(Value::as_u64);
    let seen = Seen {
        first_token_us: first_token_us.ok_or(Fault::Incomplete)?,
        last_token_us,
        prompt_tokens: number("/prompt_tokens").ok_or(Fault::Incomplete)?,
        // Not said means none, as with OpenAI.
        cached_tokens: number("/prompt_tokens_details/cached_tokens").unwrap_or(0),
    };
    Ok((seen, number("/completion_tokens").ok_or(Fault::Incomplete)?))
}

/// Whether a stream's beginning has text of the answer: some routers send a
/// message with the role alone before.
fn has_token(stream: &[u8]) -> bool {
    const CONTENT: &[u8] = b"\"content\":\"";
    let mut places = stream.windows(CONTENT.len() + 1);
    places.any(|window| window.starts_with(CONTENT) && window.last() != Some(&b'"'))
}

/// Usage of a complete stream.
fn usage(stream: &[u8]) -> Option<Value> {
    let text = std::str::from_utf8(stream).ok()?;
    let mut usage = None;
    let mut done = false;
    for data in text.lines().filter_map(|line| line.strip_prefix("data: ")) {
        done |= data == "[DONE]";
        if data.contains("\"usage\":{") {
            usage = serde_json::from_str::<Value>(data).ok()?.get("usage").cloned();
        }
    }
    usage.filter(|_| done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_token_is_not_the_role() {
        assert!(!has_token(b"data: {\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}"));
        assert!(has_token(b"data: {\"delta\":{\"content\":\"a\"}}"));
        assert!(!has_token(b"\"content\":\""));
    }

    #[test]
    fn wrong_answers_are_found() {
        let expected = Expected { prompt_tokens: 10, output_tokens: 3 };
        let seen = Seen { prompt_tokens: 10, cached_tokens: 10, ..Seen::default() };
        assert_eq!(expected.check((seen, 3)), Ok(seen));
        assert_eq!(expected.check((seen, 2)), Err(Fault::Count));
        let more = Seen { cached_tokens: 11, ..seen };
        assert_eq!(expected.check((more, 3)), Err(Fault::Count));
        let other = Seen { prompt_tokens: 11, ..seen };
        assert_eq!(expected.check((other, 3)), Err(Fault::Count));
        let stream = b"data: {\"usage\":{\"prompt_tokens\":1}}\n\ndata: [DONE]\n\n";
        assert_eq!(usage(stream).unwrap()["prompt_tokens"], 1);
        assert_eq!(usage(&stream[..stream.len() - 9]), None);
    }
}
