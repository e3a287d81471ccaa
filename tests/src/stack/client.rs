//! Client: requests as an OpenAI client sends them.
//!
//! Every request takes a new connection, so that Envoy's worker threads share
//! them, and has a deadline.

use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{HeaderMap, Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::limits::{REQUEST_WITHIN, RESPONSE_BYTES_MAX};

/// Why a request got no response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallError {
    /// Nothing listens there, or the connection failed before a response.
    Connection,
    /// The response ended early or is too long.
    Body,
    /// No whole response in time.
    TimedOut,
    /// The request could not be built; a mistake of the caller's.
    Request,
}

impl std::fmt::Display for CallError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Connection => "connection failed",
            Self::Body => "response cut off or too long",
            Self::TimedOut => "no response in time",
            Self::Request => "request could not be built",
        })
    }
}

impl std::error::Error for CallError {}

/// A whole response.
#[derive(Clone, Debug)]
pub struct Response {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
    /// From the request's start to the response's end.
    pub took: Duration,
}

impl Response {
    /// A header as text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// A header as a number.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<u64> {
        self.header(name)?.parse().ok()
    }

    /// The body as JSON.
    #[must_use]
    pub fn json(&self) -> Option<Value> {
        serde_json::from_slice(&self.body).ok()
    }
}

/// Sends a request and reads the whole response.
///
/// - `address`: `ip:port`.
/// - `headers`: pairs of name and value, in order, repeats included.
/// - `within`: bound of the whole call.
///
/// # Errors
///
/// [`CallError`]; any response is no error.
pub async fn call(
    address: &str,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
    within: Duration,
) -> Result<Response, CallError> {
    let mut request = Request::builder().method(method).uri(path).header("host", address);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(body)).map_err(|_| CallError::Request)?;
    let started = Instant::now();
    let exchange = async {
        let stream = TcpStream::connect(address).await.map_err(|_| CallError::Connection)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|_| CallError::Connection)?;
        let connection = tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(|_| CallError::Connection)?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, RESPONSE_BYTES_MAX);
        let body = body.collect().await.map_err(|_| CallError::Body)?.to_bytes();
        connection.abort();
        Ok((head, body))
    };
    let (head, body) = timeout(within, exchange).await.map_err(|_| CallError::TimedOut)??;
    Ok(Response { status: head.status, headers: head.headers, body, took: started.elapsed() })
}

/// `GET path`.
///
/// # Errors
///
/// As [`call`].
pub async fn get(address: &str, path: &str) -> Result<Response, CallError> {
    call(address, Method::GET, path, &[], Bytes::new(), REQUEST_WITHIN).await
}

/// `POST path` with a JSON body.
///
/// # Errors
///
/// As [`call`].
pub async fn post(
    address: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
    within: Duration,
) -> Result<Response, CallError> {
    let mut all = vec![("content-type", "application/json")];
    all.extend_from_slice(headers);
    call(address, Method::POST, path, &all, body, within).await
}

/// A chat request.
#[derive(Clone, Debug)]
pub struct Chat {
    /// The conversation so far: role and text.
    pub messages: Vec<(&'static str, String)>,
    /// Tokens to generate.
    pub max_tokens: u32,
    /// Whether to stream.
    pub stream: bool,
}

/// What came back, read the same from a stream and from a whole response.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The response itself.
    pub response: Response,
    /// Generated text.
    pub text: String,
    /// Prompt tokens, by the engine's count.
    pub prompt_tokens: u64,
    /// Of these, found in the engine's cache.
    pub cached_tokens: u64,
}

impl Answer {
    /// Name of the engine that served.
    #[must_use]
    pub fn engine(&self) -> Option<&str> {
        self.response.header("x-engine-id")
    }

    /// Worker that the gateway chose.
    #[must_use]
    pub fn worker(&self) -> Option<&str> {
        self.response.header("x-warmpath-worker")
    }

    /// Prefill worker that the gateway chose.
    #[must_use]
    pub fn prefill_worker(&self) -> Option<&str> {
        self.response.header("x-warmpath-prefill-worker")
    }

    /// Prefill worker that the engine was told of.
    #[must_use]
    pub fn prefill_told(&self) -> Option<&str> {
        self.response.header("x-engine-prefill-id")
    }

    /// Cached tokens that the gateway predicted.
    #[must_use]
    pub fn predicted_tokens(&self) -> Option<u64> {
        self.response.number("x-warmpath-predicted-cached-tokens")
    }

    /// Why the gateway chose so.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        self.response.header("x-warmpath-reason")
    }

    /// Time the decision took, in microseconds.
    #[must_use]
    pub fn decision_us(&self) -> Option<u64> {
        self.response.number("x-warmpath-decision-us")
    }
}

/// Why a chat request has no answer.
#[derive(Clone, Debug)]
pub enum ChatError {
    /// No response.
    Call(CallError),
    /// A response that is not 200.
    Status(StatusCode),
    /// 200, but not a complete answer with usage.
    Incomplete,
}

impl std::fmt::Display for ChatError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Call(error) => error.fmt(formatter),
            Self::Status(status) => write!(formatter, "status {status}"),
            Self::Incomplete => formatter.write_str("incomplete answer"),
        }
    }
}

impl Chat {
    /// The request's body.
    #[must_use]
    pub fn body(&self, model: &str) -> Bytes {
        let messages: Vec<Value> = self
            .messages
            .iter()
            .map(|(role, text)| json!({"role": role, "content": text}))
            .collect();
        let mut body = json!({
            "model": model,
            "messages": messages,
            "max_tokens": self.max_tokens,
        });
        if let (true, Some(fields)) = (self.stream, body.as_object_mut()) {
            fields.insert("stream".into(), true.into());
            fields.insert("stream_options".into(), json!({"include_usage": true}));
        }
        body.to_string().into()
    }

    /// Sends it and takes whatever comes.
    ///
    /// # Errors
    ///
    /// As [`call`].
    pub async fn post(
        &self,
        address: &str,
        model: &str,
        headers: &[(&str, &str)],
    ) -> Result<Response, CallError> {
        post(address, "/v1/chat/completions", headers, self.body(model), REQUEST_WITHIN).await
    }

    /// Sends it and reads the answer.
    ///
    /// # Errors
    ///
    /// [`ChatError`].
    pub async fn send(
        &self,
        address: &str,
        model: &str,
        headers: &[(&str, &str)],
    ) -> Result<Answer, ChatError> {
        let response = self.post(address, model, headers).await.map_err(ChatError::Call)?;
        if response.status != StatusCode::OK {
            return Err(ChatError::Status(response.status));
        }
        let read = if self.stream { read_stream(&response.body) } else { read_whole(&response) };
        let (text, usage) = read.ok_or(ChatError::Incomplete)?;
        let number = |pointer: &str| usage.pointer(pointer).and_then(Value::as_u64);
        let (Some(prompt_tokens), Some(cached_tokens)) =
            (number("/prompt_tokens"), number("/prompt_tokens_details/cached_tokens"))
        else {
            return Err(ChatError::Incomplete);
        };
        Ok(Answer { response, text, prompt_tokens, cached_tokens })
    }
}

fn read_whole(response: &Response) -> Option<(String, Value)> {
    let body = response.json()?;
    let text = body.pointer("/choices/0/message/content")?.as_str()?.to_owned();
    Some((text, body.get("usage")?.clone()))
}

/// Puts a stream together. `None` if it lacks its end marker or usage.
fn read_stream(body: &[u8]) -> Option<(String, Value)> {
    let (mut text, mut usage, mut done) = (String::new(), None, false);
    let body = std::str::from_utf8(body).ok()?;
    for data in body.lines().filter_map(|line| line.strip_prefix("data: ")) {
        if data == "[DONE]" {
            done = true;
            continue;
        }
        let message: Value = serde_json::from_str(data).ok()?;
        if let Some(piece) = message.pointer("/choices/0/delta/content").and_then(Value::as_str) {
            text.push_str(piece);
        }
        usage = message.get("usage").filter(|usage| !usage.is_null()).cloned().or(usage);
    }
    Some((text, usage.filter(|_| done)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_put_together() {
        let piece = |text| format!("data: {}\n\n", json!({"choices":[{"delta":{"content":text}}]}));
        let usage = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3}}\n\n";
        let whole = format!("{}{}{usage}data: [DONE]\n\n", piece("a"), piece(" b"));
        let (text, usage) = read_stream(whole.as_bytes()).unwrap();
        assert_eq!((text.as_str(), usage["prompt_tokens"].as_u64()), ("a b", Some(3)));
        let cut = whole.strip_suffix("data: [DONE]\n\n").unwrap();
        assert!(read_stream(cut.as_bytes()).is_none(), "a cut stream passed as complete");
    }
}
