//! Streams: requests that end in every way there is.

use std::time::Duration;

use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Bytes, Frame};
use hyper::client::conn::{http1, http2};
use hyper::{Method, Request};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;

use super::gateway::{DIVIDED_MODEL, EMPTY_MODEL, MODEL};
use super::workers::{BEHAVIOUR, Behaviour};
use crate::stack::conversations::Numbers;

/// Path of every prompt: its tokens are the text's alone.
const PATH: &str = "/v1/completions";

/// Longest that a client waits for the end of an answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Longest body that the filter is told to look at, in bytes. Envoy keeps less
/// than that of an HTTP/1.1 body, and more of an HTTP/2 one.
pub const LOOKED_AT_BYTES: usize = 49_152;

/// Longer than what Envoy keeps of any.
const HUGE_BYTES: usize = 100_000;

type Sent = BoxBody<Bytes, std::convert::Infallible>;

/// A completion's body.
#[must_use]
pub fn completion(model: &str, prompt: &str, is_stream: bool) -> Bytes {
    let body = json!({"model": model, "prompt": prompt, "max_tokens": 4, "stream": is_stream});
    body.to_string().into()
}

/// A client that keeps its connection, HTTP/1.1.
pub struct Keep {
    address: String,
    sender: http1::SendRequest<Full<Bytes>>,
}

impl Keep {
    /// Connects.
    pub async fn connect(address: &str) -> Option<Self> {
        let stream = TcpStream::connect(address).await.ok()?;
        let _slower = stream.set_nodelay(true);
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.ok()?;
        tokio::spawn(connection);
        Some(Self { address: address.to_owned(), sender })
    }

    /// Sends a completion and reads the answer to its end; its status, if it
    /// came whole.
    pub async fn ask(
        &mut self,
        model: &str,
        prompt: &str,
        headers: &[(&str, &str)],
    ) -> Option<u16> {
        self.sender.ready().await.ok()?;
        let mut request = Request::post(PATH).header("host", &self.address);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = Full::new(completion(model, prompt, false));
        let exchange = async {
            let response = self.sender.send_request(request.body(body).ok()?).await.ok()?;
            let status = response.status().as_u16();
            response.into_body().collect().await.ok()?;
            Some(status)
        };
        timeout(PATIENCE, exchange).await.ok()?
    }
}

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// A prompt.
    Prompt,
    /// Not JSON.
    Garbage,
    /// More than the filter looks at.
    Long,
    /// The same, its length not announced.
    LongChunked,
    /// More than Envoy keeps, its length not announced.
    Huge,
    /// No body at all.
    Nothing,
    /// No prompt, but meant for a worker.
    Models,
    /// A path that is none of the filter's.
    Other,
}

/// When the client goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaves {
    /// Not before the answer's end.
    Never,
    /// In its headers; such a request never begins for the filter.
    InHeaders,
    /// In its body.
    InBody,
    /// While it waits for an answer.
    Waiting,
    /// In the answer.
    InAnswer,
}

/// One request, and what becomes of it.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    behaviour: Behaviour,
    content: Content,
    leaves: Leaves,
    model: &'static str,
    is_http2: bool,
    is_short: bool,
    is_aborted: bool,
    pause: Duration,
    number: usize,
}

/// How it ended for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// With a whole answer of this status.
    Status(u16),
    /// The answer was cut off.
    Cut,
    /// The client left.
    Left,
    /// Without an answer, or not in time.
    Nothing,
}

impl Case {
    /// A random one.
    pub fn draw(numbers: &mut Numbers) -> Self {
        let mut one_in = |n: usize| numbers.below(n) == 0;
        let leaves_waiting = one_in(12);
        let mut case = Self {
            behaviour: Behaviour::Whole,
            content: Content::Prompt,
            leaves: Leaves::Never,
            model: if one_in(3) { DIVIDED_MODEL } else { MODEL },
            is_http2: one_in(2),
            is_short: false,
            is_aborted: one_in(40),
            pause: Duration::from_micros(numbers.below(4_000) as u64),
            number: numbers.below(1 << 40),
        };
        case.behaviour = match numbers.below(40) {
            0 => Behaviour::Reset,
            1 => Behaviour::ResetMidway,
            2 => Behaviour::Hang,
            3 => Behaviour::HangMidway,
            4 | 5 => Behaviour::Unavailable,
            6..=9 => Behaviour::Slow,
            10..=24 => Behaviour::Stream,
            _ => Behaviour::Whole,
        };
        case.content = match numbers.below(60) {
            0 => Content::Garbage,
            1 => Content::Long,
            2 => Content::LongChunked,
            3 => Content::Huge,
            4 => Content::Nothing,
            5 => Content::Models,
            6 => Content::Other,
            _ => Content::Prompt,
        };
        case.leaves = match numbers.below(40) {
            0 if !case.is_http2 => Leaves::InHeaders,
            1 | 2 => Leaves::InBody,
            3 | 4 => Leaves::InAnswer,
            _ if leaves_waiting => Leaves::Waiting,
            _ => Leaves::Never,
        };
        if leaves_waiting && case.behaviour == Behaviour::Whole {
            case.behaviour = Behaviour::Slow;
        }
        if numbers.below(50) == 0 {
            case.model = EMPTY_MODEL;
        }
        // What never ends by itself is ended by the client or the gateway.
        case.is_short = matches!(case.behaviour, Behaviour::Hang | Behaviour::HangMidway);
        case
    }

    fn body(&self) -> Bytes {
        let filler = |bytes: usize| "long ".repeat(bytes / 5);
        let text = match self.content {
            Content::Garbage => return Bytes::from_static(b"{\"model\": 1, \"prompt\""),
            Content::Nothing | Content::Models | Content::Other => return Bytes::new(),
            Content::Long | Content::LongChunked => filler(LOOKED_AT_BYTES + 1_000),
            Content::Huge => filler(HUGE_BYTES),
            Content::Prompt => "some words to think about ".repeat(1 + self.number % 8),
        };
        let is_stream = self.behaviour != Behaviour::Whole;
        completion(self.model, &format!("{} {text}", self.number), is_stream)
    }

    fn is_chunked(&self) -> bool {
        matches!(self.content, Content::LongChunked | Content::Huge)
    }

    fn request(&self, address: &str, body: Sent) -> Option<Request<Sent>> {
        let (method, path) = match self.content {
            Content::Models => (Method::GET, "/v1/models"),
            Content::Other => (Method::POST, "/v1/other"),
            _ => (Method::POST, PATH),
        };
        let path = if self.is_http2 { format!("http://{address}{path}") } else { path.to_owned() };
        let mut request =
            Request::builder().method(method).uri(path).header(BEHAVIOUR, self.behaviour.word());
        if !self.is_http2 {
            request = request.header("host", address);
        }
        if self.is_short {
            request = request.header("x-test-route", "short");
        }
        if self.is_aborted {
            request = request.header("x-envoy-fault-abort-request", "429");
        }
        request.body(body).ok()
    }

    /// Does it.
    ///
    /// - `shared`: the HTTP/2 connection of this client, made when needed.
    pub async fn run(self, address: &str, shared: &mut Option<Http2>) -> End {
        match timeout(PATIENCE, self.exchange(address, shared)).await {
            Ok(Some(end)) => end,
            Ok(None) | Err(_) => End::Nothing,
        }
    }

    async fn exchange(self, address: &str, shared: &mut Option<Http2>) -> Option<End> {
        if self.leaves == Leaves::InHeaders {
            let mut stream = TcpStream::connect(address).await.ok()?;
            let part = format!("POST {PATH} HTTP/1.1\r\nhost: {address}\r\ncontent-le");
            stream.write_all(part.as_bytes()).await.ok()?;
            sleep(self.pause).await;
            return Some(End::Left);
        }
        let bytes = self.body();
        // Kept open while the client is to leave in the middle of its body.
        let mut rest = None;
        let body = if self.leaves == Leaves::InBody || self.is_chunked() {
            let half = bytes.len() / 2;
            let (sender, receiver) = mpsc::channel(2);
            sender.try_send(Ok(Frame::data(bytes.slice(..half)))).ok()?;
            if self.leaves == Leaves::InBody {
                rest = Some(sender);
            } else {
                sender.try_send(Ok(Frame::data(bytes.slice(half..)))).ok()?;
            }
            BodyExt::boxed(StreamBody::new(ReceiverStream::new(receiver)))
        } else {
            Full::new(bytes).boxed()
        };
        let request = self.request(address, body)?;
        let end = if self.is_http2 {
            self.over_http2(address, shared, request).await
        } else {
            self.over_http1(address, request).await
        };
        drop(rest);
        end
    }

    async fn over_http1(&self, address: &str, request: Request<Sent>) -> Option<End> {
        let stream = TcpStream::connect(address).await.ok()?;
        let _slower = stream.set_nodelay(true);
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.ok()?;
        let connection = tokio::spawn(connection);
        let end = self.ask(sender.send_request(request)).await;
        // Leaves, whatever is under way.
        connection.abort();
        Some(end)
    }

    async fn over_http2(
        &self,
        address: &str,
        shared: &mut Option<Http2>,
        request: Request<Sent>,
    ) -> Option<End> {
        if shared.as_ref().is_none_or(http2::SendRequest::is_closed) {
            let stream = TcpStream::connect(address).await.ok()?;
            let _slower = stream.set_nodelay(true);
            let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
            let (sender, connection) = handshake.await.ok()?;
            tokio::spawn(connection);
            *shared = Some(sender);
        }
        let sender = shared.as_mut()?;
        sender.ready().await.ok()?;
        Some(self.ask(sender.send_request(request)).await)
    }

    /// Waits for the answer as long as this client does. Dropping what is left
    /// of it resets an HTTP/2 stream.
    async fn ask(
        &self,
        answer: impl Future<Output = hyper::Result<hyper::Response<hyper::body::Incoming>>>,
    ) -> End {
        let response = match self.leaves {
            Leaves::InBody | Leaves::Waiting => {
                let Ok(response) = timeout(self.pause, answer).await else { return End::Left };
                response
            }
            _ => answer.await,
        };
        let Ok(response) = response else { return End::Cut };
        let status = response.status().as_u16();
        let mut body = response.into_body();
        while let Some(frame) = body.frame().await {
            if frame.is_err() {
                return End::Cut;
            }
            if self.leaves == Leaves::InAnswer {
                return End::Left;
            }
        }
        End::Status(status)
    }
}

/// An HTTP/2 connection.
pub type Http2 = http2::SendRequest<Sent>;
