//! Engines: workers that answer at once, and say what reached them.
//!
//! What they hold is announced before anything is compared and stays as it is, so
//! that every gateway decides on the same state.

use std::convert::Infallible;

use futures_util::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::bench::gateway::engines::Engines;
use crate::stack::launch::{EnginePorts, StackError};

/// Response header with the engine's port.
pub const PORT: &str = "x-echo-port";

/// Response header with length and sum of the body that came.
pub const BODY: &str = "x-echo-body";

/// Response header with the routing headers that came.
pub const NAMES: &str = "x-echo-names";

/// Request header that holds the answer's end back until [`Echoes::release`].
pub const HOLD: &str = "x-echo-hold";

/// Beginnings of the headers that [`NAMES`] tells.
const ROUTING: [&str; 9] = [
    "x-gateway-",
    "x-dynamo-",
    "x-prefill",
    "x-warmpath-",
    "x-worker-",
    "x-dp-",
    "x-data-parallel",
    "x-llm-d-",
    "x-tenant",
];

/// The two parts of every answer.
const ANSWER: [&str; 2] = [
    r#"{"id":"1","object":"chat.completion","created":1,"model":"qwen3","choices":[],"#,
    r#""usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}"#,
];

/// The running engines; they end with this process.
pub struct Echoes {
    /// What they hold is announced there.
    pub events: Engines,
    /// Where they are.
    pub ports: Vec<EnginePorts>,
    held: watch::Sender<bool>,
}

impl Echoes {
    /// Starts them.
    ///
    /// # Errors
    ///
    /// [`StackError::Io`].
    pub async fn start() -> Result<Self, StackError> {
        let events = Engines::start().await?;
        let held = watch::Sender::new(true);
        let mut ports = Vec::new();
        for announced in &events.ports {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let http = listener.local_addr()?.port();
            tokio::spawn(accept(listener, http, held.subscribe()));
            let EnginePorts { events, replay, .. } = *announced;
            ports.push(EnginePorts { http, events, replay });
        }
        Ok(Self { events, ports, held })
    }

    /// Ports for HTTP.
    #[must_use]
    pub fn http(&self) -> Vec<u16> {
        self.ports.iter().map(|ports| ports.http).collect()
    }

    /// Lets answers end that are held back.
    pub fn release(&self) {
        self.held.send_replace(false);
    }
}

async fn accept(listener: TcpListener, port: u16, held: watch::Receiver<bool>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let held = held.clone();
        let service = service_fn(move |request| answer(request, port, held.clone()));
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

type Body = BoxBody<Bytes, Infallible>;

async fn answer(
    request: Request<Incoming>,
    port: u16,
    held: watch::Receiver<bool>,
) -> Result<Response<Body>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let sum = body.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut names: Vec<String> = head
        .headers
        .iter()
        .filter(|(name, _)| ROUTING.iter().any(|begin| name.as_str().starts_with(begin)))
        .map(|(name, value)| format!("{name}={}", value.to_str().unwrap_or("?")))
        .collect();
    names.sort();
    let waits = head.headers.contains_key(HOLD);
    let parts = stream::unfold((0, held), move |(at, mut held)| async move {
        let part = ANSWER.get(at)?;
        if at == 1 && waits {
            // It ends with this process.
            let _ = held.wait_for(|held| !held).await;
        }
        Some((Ok(Frame::data(Bytes::from_static(part.as_bytes()))), (at + 1, held)))
    });
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(parts)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(PORT, HeaderValue::from(port));
    let told = [(BODY, format!("{}-{sum:016x}", body.len())), (NAMES, names.join(" "))];
    for (name, value) in told {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(name, value);
        }
    }
    Ok(response)
}
