//! Engines: workers that answer at once, and say in KV events what they hold.
//!
//! No simulation: what is measured is the way to them, so they take next to no time.
//! They serve on a thread of their own. Their events are published before anything
//! is measured: that each holds its system prompt and what it was given to hold.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::time::sleep;

use crate::engine::cache::{CacheEvent, CacheKeys, block_hashes};
use crate::engine::events::{EventFormat, encode_batch};
use crate::engine::publisher::{Publisher, PublisherConfig};
use crate::stack::launch::{BLOCK_SIZE, EnginePorts, StackError, local};

/// Engines behind each router.
pub const ENGINES: usize = 4;

/// Blocks that each claims to have.
pub const BLOCKS: u64 = 1 << 20;

/// Response header with the port of the engine that answered.
pub const SERVED: &str = "x-engine-served";

/// Response header with what the request's header said of its destination.
pub const TOLD: &str = "x-engine-told";

/// Response header with the number of `nvext.token_data` and their sum; only if the
/// request has [`COUNT`].
pub const TOKENS: &str = "x-engine-tokens";

/// Request header that asks for [`TOKENS`].
pub const COUNT: &str = "x-bench-count";

/// Blocks of one event.
const BATCH_BLOCKS: usize = 64;

/// Pause after each batch: queues between here and the indexes stay short.
const BATCH_PAUSE: Duration = Duration::from_millis(1);

/// What every engine answers.
const ANSWER: &str = r#"{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"qwen3","choices":[{"index":0,"message":{"role":"assistant","content":"ok"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}"#;

/// The running engines.
pub struct Engines {
    /// Where they are.
    pub ports: Vec<EnginePorts>,
    publishers: Vec<Publisher>,
}

impl Engines {
    /// Starts them. They end with this process.
    ///
    /// # Errors
    ///
    /// [`StackError::Io`].
    pub async fn start() -> Result<Self, StackError> {
        let mut ports = Vec::new();
        let mut publishers = Vec::new();
        let mut listeners = Vec::new();
        for _ in 0..ENGINES {
            let config = PublisherConfig {
                events_port: 0,
                replay_port: 0,
                topic: String::new(),
                buffer_steps: 10_000,
                replay_has_topic: true,
            };
            let publisher = Publisher::start(config).await;
            let publisher = publisher.map_err(|error| std::io::Error::other(error.to_string()))?;
            let listener = std::net::TcpListener::bind(local(0))?;
            listener.set_nonblocking(true)?;
            let http = listener.local_addr()?.port();
            listeners.push((http, listener));
            ports.push(EnginePorts {
                http,
                events: publisher.events_port,
                replay: publisher.replay_port,
            });
            publishers.push(publisher);
        }
        let serving = std::thread::Builder::new().name("engines".into());
        serving.spawn(move || serve(listeners))?;
        Ok(Self { ports, publishers })
    }

    /// Announces that an engine holds the whole blocks of a prompt.
    pub async fn hold(&self, engine: usize, prompt: &[u32]) {
        let Some(publisher) = self.publishers.get(engine) else { return };
        let block = BLOCK_SIZE as usize;
        let keys = CacheKeys::default();
        let hashes = block_hashes(prompt, block, &keys);
        let mut parent = None;
        let tokens = prompt.chunks(BATCH_BLOCKS * block);
        for (hashes, tokens) in hashes.chunks(BATCH_BLOCKS).zip(tokens) {
            let tokens = tokens.get(..hashes.len() * block).unwrap_or_default().to_vec();
            let stored =
                CacheEvent::Stored { parent, hashes: hashes.to_vec(), tokens, keys: keys.clone() };
            let format = EventFormat {
                form: crate::engine::events::EventForm::VllmMap,
                hash: crate::engine::events::HashForm::Integer,
                block_size: BLOCK_SIZE,
                dp_rank: 0,
                kind: None,
            };
            publisher.publish(encode_batch(0.0, &[stored], &format));
            parent = hashes.last().copied();
            sleep(BATCH_PAUSE).await;
        }
    }

    /// Ports for HTTP.
    #[must_use]
    pub fn http(&self) -> Vec<u16> {
        self.ports.iter().map(|ports| ports.http).collect()
    }
}

/// Serves until the process ends.
fn serve(listeners: Vec<(u16, std::net::TcpListener)>) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return;
    };
    runtime.block_on(async {
        for (port, listener) in listeners {
            let Ok(listener) = TcpListener::from_std(listener) else { return };
            tokio::spawn(accept(port, listener));
        }
        std::future::pending::<()>().await;
    });
}

async fn accept(port: u16, listener: TcpListener) {
    let served = Arc::new(HeaderValue::from(port));
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        // Without it, answers wait for acknowledgements; an error costs only that.
        let _set = stream.set_nodelay(true);
        let served = Arc::clone(&served);
        let service = service_fn(move |request| answer(request, Arc::clone(&served)));
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

async fn answer(
    request: Request<Incoming>,
    served: Arc<HeaderValue>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, mut body) = request.into_parts();
    let mut counted = None;
    if head.headers.contains_key(COUNT) {
        let bytes = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        counted = Some(count(&bytes));
    } else {
        // Read and dropped, piece by piece.
        while let Some(Ok(_)) = body.frame().await {}
    }
    let text = match head.uri.path() {
        "/v1/models" => r#"{"object":"list","data":[{"id":"qwen3","object":"model"}]}"#,
        _ => ANSWER,
    };
    let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(SERVED, HeaderValue::clone(&served));
    if let Some(told) = head.headers.get("x-gateway-destination-endpoint") {
        headers.insert(TOLD, told.clone());
    }
    if let Some(counted) = counted.and_then(|counted| HeaderValue::from_str(&counted).ok()) {
        headers.insert(TOKENS, counted);
    }
    Ok(response)
}

/// What [`TOKENS`] says of a body.
fn count(body: &[u8]) -> String {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let tokens = body.pointer("/nvext/token_data").and_then(Value::as_array);
    let tokens = tokens.into_iter().flatten().filter_map(Value::as_u64);
    digest(tokens)
}

/// Number of tokens, and a sum in which their order counts.
#[must_use]
pub fn digest(tokens: impl Iterator<Item = u64>) -> String {
    let (count, sum) = tokens.fold((0_u64, 0_u64), |(count, sum), token| {
        (count + 1, sum.wrapping_mul(31).wrapping_add(token))
    });
    format!("{count}-{sum:016x}")
}
