//! Long prompts: held while they are read a slice at a time, and routed exactly
//! all the same, however the body comes, in every mode; and nothing is left of
//! those whose clients leave meanwhile.
//!
//! A stack of its own, whose engines are large enough to hold such prompts.

use std::convert::Infallible;
use std::time::Instant;

use futures_util::future::join_all;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Bytes, Frame};
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::super::client::post;
use super::super::launch::{EngineShape, MODEL, Stack, local};
use super::super::limits::{CATCH_UP_WITHIN, POLL, REQUEST_WITHIN};
use super::super::options::Options;
use super::super::position::{caught_up, gauge, stats};
use super::super::report::Report;
use super::body_mode::{Received, frontends, last, named, warm};
use super::buffer_mode;

const PATH: &str = "/v1/chat/completions";

/// Engines that hold several prompts of a megabyte, and compute them at once.
const SHAPE: EngineShape =
    EngineShape { blocks: 400_000, prefill_us_per_token: 0, decode_us_per_token: 0 };

/// Clients that leave, each with a prompt of a megabyte: the worker threads read
/// them for some tenths of a second.
const LEAVERS: usize = 24;

/// Bytes of one piece of a body that is sent in pieces.
const PIECE_BYTES: usize = 30_000;

/// Ways in which a body can come.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// HTTP/1.1 with its length.
    Length,
    /// HTTP/1.1 in chunks.
    Chunked,
    /// HTTP/2.
    Http2,
    /// HTTP/2, ended by trailers.
    Trailers,
}

const WAYS: [Way; 4] = [Way::Length, Way::Chunked, Way::Http2, Way::Trailers];

/// Starts the stack, makes the checks, stops it.
pub(super) async fn check(options: Options, report: &mut Report) {
    let mut stack = match Stack::start(options, SHAPE, None).await {
        Ok(stack) => stack,
        Err(error) => return report.failure("the stack for long prompts starts", error),
    };
    checks(&mut stack, report).await;
    if let Some((name, log)) = stack.ended() {
        report.failure("every process is alive", format_args!("{name} ended:\n{log}"));
    }
    stack.stop().await;
}

async fn checks(stack: &mut Stack, report: &mut Report) {
    let received = Received::default();
    let ports = match frontends(&received).await {
        Ok(ports) => ports,
        Err(error) => return report.failure("frontends for mode `body` start", error),
    };
    if let Err(error) = stack.start_body_gateway(ports).await {
        return report.failure("the gateway in mode `body` starts", error);
    }
    let body_gateway = local(stack.ports.body);
    if !warm(&body_gateway).await {
        return report.failure("mode `body` routes by cache", "not in time");
    }
    let buffering = match buffer_mode::start(stack).await {
        Ok(gateway) => gateway,
        Err(error) => return report.failure("the gateway in mode `buffer` starts", error),
    };
    for (at, bytes) in [300_000, 1_000_000].into_iter().enumerate() {
        for (way, number) in WAYS.into_iter().zip(0..) {
            let own = text(bytes, at * 10 + number);
            through_headers(stack, ("endpoint", &stack.gateway()), way, &own, report).await;
            through_body(&body_gateway, way, &own, &received, report).await;
            let own = text(bytes, 100 + at * 10 + number);
            through_headers(stack, ("buffer", &buffering.address()), way, &own, report).await;
        }
    }
    buffering.stop().await;
    leavers(stack, report).await;
}

/// Text of many different words, the same for the same number.
fn text(bytes: usize, number: usize) -> String {
    let mut text = format!("{number}:");
    let mut state = number as u64 + 1;
    while text.len() < bytes {
        // Knuth's multiplier; the upper bits are random enough for words.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        let mut rest = state >> 20;
        text.push(' ');
        for _ in 0..2 + rest % 8 {
            text.push(char::from(b'a' + u8::try_from(rest % 26).unwrap_or(0)));
            rest /= 3;
        }
    }
    text
}

fn chat(text: &str) -> Value {
    json!({ "model": MODEL, "max_tokens": 1, "messages": [{ "role": "user", "content": text }] })
}

/// Sends a body in one of the ways; the answer's headers and its body.
async fn send(gateway: &str, way: Way, body: Bytes) -> Option<(HeaderMap, Value)> {
    let answer = match way {
        Way::Length => {
            let answer = post(gateway, PATH, &[], body, REQUEST_WITHIN).await.ok()?;
            return Some((answer.headers.clone(), answer.json()?));
        }
        Way::Chunked | Way::Http2 | Way::Trailers => {
            timeout(REQUEST_WITHIN, in_pieces(gateway, way, body)).await.ok()??
        }
    };
    let (head, body) = answer.into_parts();
    let body = timeout(REQUEST_WITHIN, body.collect()).await.ok()?.ok()?.to_bytes();
    Some((head.headers, serde_json::from_slice(&body).ok()?))
}

async fn in_pieces(
    gateway: &str,
    way: Way,
    body: Bytes,
) -> Option<Response<hyper::body::Incoming>> {
    let mut frames: Vec<Result<Frame<Bytes>, Infallible>> = Vec::new();
    let mut rest = body;
    while !rest.is_empty() {
        frames.push(Ok(Frame::data(rest.split_to(rest.len().min(PIECE_BYTES)))));
    }
    if matches!(way, Way::Trailers) {
        let mut trailers = HeaderMap::new();
        trailers.insert("x-checksum", "none".parse().ok()?);
        frames.push(Ok(Frame::trailers(trailers)));
    }
    let body = StreamBody::new(stream::iter(frames));
    let stream = TokioIo::new(TcpStream::connect(gateway).await.ok()?);
    let is_http2 = matches!(way, Way::Http2 | Way::Trailers);
    let uri = if is_http2 { format!("http://{gateway}{PATH}") } else { PATH.to_owned() };
    let mut request = Request::post(uri).header("content-type", "application/json");
    if !is_http2 {
        request = request.header("host", gateway);
    }
    let request = request.body(body).ok()?;
    if is_http2 {
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.ok()?;
        tokio::spawn(connection);
        sender.send_request(request).await.ok()
    } else {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.ok()?;
        tokio::spawn(connection);
        sender.send_request(request).await.ok()
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("none")
}

/// The prompt is routed by its cache the second time, to the engine that had it,
/// and the prediction is what the engine reports.
///
/// - `mode`, `gateway`: in which headers name the worker, and where it is.
async fn through_headers(
    stack: &Stack,
    (mode, gateway): (&str, &str),
    way: Way,
    text: &str,
    report: &mut Report,
) {
    let body = Bytes::from(chat(text).to_string());
    let first = send(gateway, way, body.clone()).await;
    let known = caught_up(stack, CATCH_UP_WITHIN).await;
    let second = send(gateway, way, body).await;
    let cached = |answer: &Value| {
        answer.pointer("/usage/prompt_tokens_details/cached_tokens").and_then(Value::as_u64)
    };
    let (Some(first), Some(second)) = (first, second) else {
        return report.failure("a long prompt is answered", format_args!("{way:?}, {mode}"));
    };
    let told = |name: &str| [&first, &second].map(|(headers, _)| header(headers, name).to_owned());
    let reasons = told("x-warmpath-reason");
    let engines = told("x-engine-id");
    let predicted = header(&second.0, "x-warmpath-predicted-cached-tokens").parse().ok();
    let reported = cached(&second.1);
    report.check(
        &format!("mode `{mode}`, {} bytes ({way:?}): by its cache", text.len()),
        reasons == ["kv", "kv"]
            && engines[0] == engines[1]
            && reported.is_some_and(|tokens| tokens > 10_000)
            && predicted == reported
            && known.is_ok(),
        format_args!(
            "{reasons:?}, {engines:?}, {predicted:?} predicted, {reported:?} reported, {} us",
            header(&second.0, "x-warmpath-decision-us")
        ),
    );
}

/// The engines hold the prompt by now: the body names the one that does, and is
/// the client's otherwise.
async fn through_body(
    gateway: &str,
    way: Way,
    text: &str,
    received: &Received,
    report: &mut Report,
) {
    let sent = chat(text);
    let answer = send(gateway, way, Bytes::from(sent.to_string())).await;
    let headers = answer.map(|(headers, _)| headers).unwrap_or_default();
    let mut arrived = last(received);
    let worker = named(&arrived);
    if let Some(arrived) = arrived.as_object_mut() {
        arrived.remove("nvext");
    }
    let chosen = header(&headers, "x-warmpath-worker").parse().ok();
    let predicted: u64 =
        header(&headers, "x-warmpath-predicted-cached-tokens").parse().unwrap_or(0);
    let reason = header(&headers, "x-warmpath-reason");
    let is_whole = arrived == sent;
    report.check(
        &format!("mode `body`, {} bytes ({way:?}): by its cache", text.len()),
        reason == "kv" && chosen.is_some() && worker == chosen && predicted > 10_000 && is_whole,
        format_args!(
            "reason {reason}, chosen {chosen:?}, named {worker:?}, {predicted} predicted, \
             rest as it was: {is_whole}"
        ),
    );
}

/// The counters of long prompts, and how many requests were routed by cache.
async fn counts(stack: &Stack) -> Option<[u64; 3]> {
    let begun = gauge(stack, "warmpath_readings_begun_total$").await?;
    let ended = gauge(stack, "warmpath_readings_ended_total$").await?;
    Some([begun, ended, gauge(stack, "warmpath_decisions_total.reason.kv$").await?])
}

/// How much each has grown.
fn grown(before: [u64; 3], after: [u64; 3]) -> [u64; 3] {
    let mut grown = after;
    grown.iter_mut().zip(before).for_each(|(after, before)| *after -= before);
    grown
}

/// Clients that leave while their prompts are read leave nothing behind.
async fn leavers(stack: &Stack, report: &mut Report) {
    let before = counts(stack).await.unwrap_or_default();
    let gateway = stack.gateway();
    let sent = join_all((0..LEAVERS).map(|number| leave(&gateway, number))).await;
    let sent = sent.into_iter().filter(Option::is_some).count();
    let deadline = Instant::now() + CATCH_UP_WITHIN;
    let mut left = None;
    let mut after = before;
    while Instant::now() < deadline {
        after = counts(stack).await.unwrap_or_default();
        let waiting = gauge(stack, "warmpath_readings_waiting$").await;
        let bookings = gauge(stack, "warmpath_bookings$").await;
        left = waiting.zip(bookings);
        if after[0] > before[0] && after[0] == after[1] && left == Some((0, 0)) {
            break;
        }
        sleep(POLL).await;
    }
    let [begun, ended, by_cache] = grown(before, after);
    report.check(
        "clients that leave while their prompts are read leave nothing behind",
        sent == LEAVERS && begun > by_cache && begun == ended && left == Some((0, 0)),
        format_args!(
            "{sent} sent, {begun} begun, {ended} ended, {by_cache} decided, \
             waiting and booked: {left:?}"
        ),
    );
    let reloads = stats(stack, "vm_reload").await.unwrap_or_default();
    let crashed: u64 = reloads.iter().map(|(_, value)| value).sum();
    let answer = send(&gateway, Way::Length, Bytes::from(chat("short").to_string())).await;
    report.check(
        "the module lives on",
        crashed == 0 && answer.is_some(),
        format_args!("{crashed} reloads, answered: {}", answer.is_some()),
    );
}

/// Sends a whole request and closes the connection at once.
async fn leave(gateway: &str, number: usize) -> Option<()> {
    let body = chat(&text(1_000_000, 1_000 + number)).to_string();
    let head = format!(
        "POST {PATH} HTTP/1.1\r\nhost: {gateway}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    let mut stream = TcpStream::connect(gateway).await.ok()?;
    stream.write_all(head.as_bytes()).await.ok()?;
    stream.write_all(body.as_bytes()).await.ok()?;
    stream.shutdown().await.ok()
}
