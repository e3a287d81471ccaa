//! HTTP: the server around an engine, on 127.0.0.1.
//!
//! | route | what |
//! |---|---|
//! | `POST /v1/chat/completions`, `/v1/completions` | answers, streamed or whole |
//! | `POST /v1/responses`, `/v1/embeddings`, `/v1/messages` | the same answer always |
//! | `POST /v1/chat/completions/render` | the prompt's tokens, as vLLM's |
//! | `GET /v1/models`, `/health`, `/metrics`, `/kv_event_sources` | as vLLM |
//! | `GET /control/state` | position of the event stream and the cache |
//! | `POST /control/events?drop_every=N&pause=BOOL` | event faults |
//! | `POST /control/clear` | clear the cache, announced; 409 while busy |
//! | `POST /control/restart?cache=lose\|keep` | stream from 0 again, cache lost unannounced |
//!
//! Every response carries `x-engine-id`, `x-engine-prefill-id` with the prefill
//! worker that the request's headers named, if they did, and `x-engine-told` with
//! all that they said of workers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::apis;
use super::cache::CacheKeys;
use super::config::EngineConfig;
use super::limits::{
    BODY_BYTES_MAX, INLINE_BODY_BYTES_MAX, OUTPUT_QUEUE_PIECES, OUTPUT_TOKENS_MAX, PROMPTS_MAX,
};
use super::metrics;
use super::model::PromptError;
use super::openai::{ChatRequest, Common, CompletionRequest, Prompt, Usage};
use super::publisher::Fault;
use super::scheduler::{Engine, Generation, Piece, RejectError};

/// What every handler needs.
pub struct Server {
    engine: Arc<Engine>,
    config: EngineConfig,
    answers: AtomicU64,
}

/// The routes over one engine.
pub fn router(engine: Arc<Engine>, config: EngineConfig) -> Router {
    let name = HeaderValue::from_str(&config.name).unwrap_or(HeaderValue::from_static("engine"));
    let server = Arc::new(Server { engine, config, answers: AtomicU64::new(0) });
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/chat/completions/render", post(render))
        .route("/v1/completions", post(completion))
        .merge(apis::routes())
        .route("/v1/models", get(models))
        .route("/health", get(|| async { StatusCode::OK }))
        .route("/metrics", get(metrics_page))
        .route("/kv_event_sources", get(event_sources))
        .route("/control/state", get(control_state))
        .route("/control/events", post(control_events))
        .route("/control/clear", post(control_clear))
        .route("/control/restart", post(control_restart))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn(move |request: Request, next: Next| {
            let name = name.clone();
            let prefill = request.headers().get("x-dynamo-prefill-instance-id").cloned();
            let told = HeaderValue::from_str(&apis::told(request.headers())).ok();
            async move {
                let mut response = next.run(request).await;
                response.headers_mut().insert("x-engine-id", name);
                if let Some(prefill) = prefill {
                    response.headers_mut().insert("x-engine-prefill-id", prefill);
                }
                if let Some(told) = told {
                    response.headers_mut().insert("x-engine-told", told);
                }
                response
            }
        }))
        .with_state(server)
}

/// A refusal, as vLLM words it: no request text.
pub(super) struct Refusal {
    status: StatusCode,
    kind: &'static str,
    message: &'static str,
}

impl Refusal {
    fn bad(message: &'static str) -> Self {
        Self { status: StatusCode::BAD_REQUEST, kind: "BadRequestError", message }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let code = self.status.as_u16();
        let error =
            json!({"message": self.message, "type": self.kind, "param": null, "code": code});
        json_response(self.status, &json!({ "error": error }))
    }
}

impl From<PromptError> for Refusal {
    fn from(error: PromptError) -> Self {
        Self::bad(match error {
            PromptError::NoTemplate => "the model has no chat template",
            PromptError::Template => "the chat template refused the messages",
            PromptError::Tokenizer => "the tokenizer refused the prompt",
        })
    }
}

impl From<RejectError> for Refusal {
    fn from(error: RejectError) -> Self {
        match error {
            RejectError::TooLong => Self::bad("prompt and answer exceed the model's length"),
            RejectError::Busy => Self {
                status: StatusCode::SERVICE_UNAVAILABLE,
                kind: "ServiceUnavailableError",
                message: "too many requests wait",
            },
        }
    }
}

pub(super) fn json_response(status: StatusCode, value: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

/// How an answer is written: the two endpoints differ in names only.
#[derive(Clone, Copy)]
enum Shape {
    Chat,
    Completion,
}

async fn chat(State(server): State<Arc<Server>>, body: Bytes) -> Result<Response, Refusal> {
    let request: ChatRequest = parse(&body)?;
    let keys = server.keys(&request.common)?;
    if request.messages.is_empty() {
        return Err(Refusal::bad("messages must not be empty"));
    }
    let context =
        request.context().ok_or(Refusal::bad("a message must be an object with a role"))?;
    let engine = Arc::clone(&server.engine);
    let tokens = off_thread(body.len(), move || engine.model.chat_tokens(&context)).await?;
    if let Some(sent) = request.common.nvext.as_ref().and_then(|nvext| nvext.token_data.as_ref()) {
        server.engine.note_token_data(*sent == tokens);
    }
    server.answer(Shape::Chat, &request.common, keys, vec![tokens]).await
}

/// Tokens of a chat, without an answer.
async fn render(State(server): State<Arc<Server>>, body: Bytes) -> Result<Response, Refusal> {
    let request: ChatRequest = parse(&body)?;
    let context =
        request.context().ok_or(Refusal::bad("a message must be an object with a role"))?;
    let engine = Arc::clone(&server.engine);
    let tokens = off_thread(body.len(), move || engine.model.chat_tokens(&context)).await?;
    let number = server.answers.fetch_add(1, Ordering::Relaxed);
    let rendered = json!({"request_id": format!("chatcmpl-{number}"), "token_ids": tokens});
    Ok(json_response(StatusCode::OK, &rendered))
}

async fn completion(State(server): State<Arc<Server>>, body: Bytes) -> Result<Response, Refusal> {
    let request: CompletionRequest = parse(&body)?;
    let keys = server.keys(&request.common)?;
    let engine = Arc::clone(&server.engine);
    let texts = async |texts: Vec<String>| {
        let tokenize = move || -> Result<Vec<Vec<u32>>, PromptError> {
            texts.iter().map(|text| engine.model.completion_tokens(text)).collect()
        };
        off_thread(body.len(), tokenize).await
    };
    let prompts = match request.prompt {
        Prompt::Text(text) => texts(vec![text]).await?,
        Prompt::Texts(several) => texts(several).await?,
        Prompt::Tokens(tokens) => vec![tokens],
        Prompt::TokenLists(lists) => lists,
    };
    server.answer(Shape::Completion, &request.common, keys, prompts).await
}

/// Does the work here if it is short, else where it holds nobody up.
async fn off_thread<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> Result<T, PromptError> + Send + 'static,
) -> Result<T, PromptError> {
    if bytes <= INLINE_BODY_BYTES_MAX {
        return work();
    }
    // A panic in the tokenizer is a refusal as well.
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(PromptError::Tokenizer))
}

pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|_| Refusal::bad("the body is not a valid request"))
}

impl Server {
    /// Checks the model's name; an adapter's name selects its cache.
    pub(super) fn keys(&self, request: &Common) -> Result<CacheKeys, Refusal> {
        let lora_name = if request.model == self.config.model_name {
            None
        } else if self.config.loras.contains(&request.model) {
            Some(request.model.clone())
        } else {
            return Err(Refusal {
                status: StatusCode::NOT_FOUND,
                kind: "NotFoundError",
                message: "the model does not exist",
            });
        };
        let cache_salt = request.cache_salt.clone().filter(|salt| !salt.is_empty());
        Ok(CacheKeys { lora_name, cache_salt })
    }

    async fn answer(
        &self,
        shape: Shape,
        request: &Common,
        keys: CacheKeys,
        prompts: Vec<Vec<u32>>,
    ) -> Result<Response, Refusal> {
        if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
            return Err(Refusal::bad("the prompt must not be empty"));
        }
        if prompts.len() > PROMPTS_MAX || request.output_tokens() > OUTPUT_TOKENS_MAX {
            return Err(Refusal::bad("too many prompts or tokens asked for"));
        }
        let mut started = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let tokens = prompt.len();
            let output_tokens = request.output_tokens();
            let keys = keys.clone();
            let pieces = self.engine.start(Generation { prompt, output_tokens, keys })?;
            started.push((tokens, pieces));
        }
        let number = self.answers.fetch_add(1, Ordering::Relaxed);
        let token_ids = request.return_token_ids == Some(true);
        let writer = Writer { shape, model: request.model.clone(), number, token_ids };
        if request.stream == Some(true) {
            let early_head = self.config.early_head;
            Ok(stream(writer, request.include_usage(), early_head, started).await)
        } else {
            Ok(whole(&writer, started).await)
        }
    }
}

/// Prompt tokens and pieces of each prompt of a request.
type Started = Vec<(usize, mpsc::Receiver<Piece>)>;

/// Writes answers in OpenAI's shapes.
struct Writer {
    shape: Shape,
    model: String,
    number: u64,
    /// Whether a completion's pieces carry their tokens.
    token_ids: bool,
}

impl Writer {
    fn envelope(&self, streamed: bool, choices: Value, usage: Option<&Usage>) -> Value {
        let (prefix, object) = match (self.shape, streamed) {
            (Shape::Chat, false) => ("chatcmpl", "chat.completion"),
            (Shape::Chat, true) => ("chatcmpl", "chat.completion.chunk"),
            (Shape::Completion, _) => ("cmpl", "text_completion"),
        };
        let id = format!("{prefix}-{}", self.number);
        let model = &self.model;
        match usage {
            Some(usage) => json!({"id": id, "object": object, "created": 0, "model": model,
                "choices": choices, "usage": usage}),
            None => json!({"id": id, "object": object, "created": 0, "model": model,
                "choices": choices}),
        }
    }

    fn delta(&self, index: usize, text: &str, tokens: &[u32], finish: Option<&str>) -> Value {
        let choice = match self.shape {
            Shape::Chat if finish.is_some() => {
                json!({"index": index, "delta": {}, "finish_reason": finish})
            }
            Shape::Chat => {
                json!({"index": index, "delta": {"content": text}, "finish_reason": null})
            }
            Shape::Completion if self.token_ids => json!({
                "index": index, "text": text, "token_ids": tokens, "finish_reason": finish,
            }),
            Shape::Completion => json!({"index": index, "text": text, "finish_reason": finish}),
        };
        self.envelope(true, json!([choice]), None)
    }

    fn choice(&self, index: usize, text: &str) -> Value {
        match self.shape {
            Shape::Chat => json!({
                "index": index,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "length",
            }),
            Shape::Completion => json!({"index": index, "text": text, "finish_reason": "length"}),
        }
    }
}

async fn whole(writer: &Writer, started: Started) -> Response {
    let mut usage = Usage::default();
    let mut choices = Vec::new();
    for (index, (prompt_tokens, mut pieces)) in started.into_iter().enumerate() {
        let (mut text, mut words, mut cached, mut complete) = (String::new(), 0, 0, false);
        while let Some(piece) = pieces.recv().await {
            match piece {
                Piece::Started { cached_tokens } => cached = cached_tokens,
                Piece::Words(more) => {
                    words += more.len();
                    text.extend(more.into_iter().map(|word| word.text));
                }
                Piece::Finished => complete = true,
            }
        }
        if !complete {
            return StatusCode::INTERNAL_SERVER_ERROR.into_response();
        }
        usage.add(prompt_tokens, cached, words);
        choices.push(writer.choice(index, &text));
    }
    json_response(StatusCode::OK, &writer.envelope(false, Value::from(choices), Some(&usage)))
}

async fn stream(
    writer: Writer,
    include_usage: bool,
    early_head: bool,
    started: Started,
) -> Response {
    let (sender, mut receiver) = mpsc::channel::<Bytes>(OUTPUT_QUEUE_PIECES);
    tokio::spawn(async move {
        let mut usage = Usage::default();
        for (index, (prompt_tokens, mut pieces)) in started.into_iter().enumerate() {
            let (mut words, mut cached) = (0, 0);
            while let Some(piece) = pieces.recv().await {
                let message = match piece {
                    Piece::Started { cached_tokens } => {
                        cached = cached_tokens;
                        continue;
                    }
                    Piece::Words(more) => {
                        words += more.len();
                        let text: String = more.iter().map(|word| word.text.as_str()).collect();
                        let tokens: Vec<u32> = more.iter().map(|word| word.token).collect();
                        writer.delta(index, &text, &tokens, None)
                    }
                    Piece::Finished => writer.delta(index, "", &[], Some("length")),
                };
                if sender.send(event(&message.to_string())).await.is_err() {
                    return;
                }
            }
            usage.add(prompt_tokens, cached, words);
        }
        if include_usage {
            let last = writer.envelope(true, json!([]), Some(&usage)).to_string();
            if sender.send(event(&last)).await.is_err() {
                return;
            }
        }
        // The client may leave before the end marker; its answer was complete.
        let _sent = sender.send(event("[DONE]")).await;
    });
    let first = if early_head { None } else { receiver.recv().await };
    let chunks = futures_util::stream::unfold((first, receiver), |(first, mut receiver)| async {
        let chunk = match first {
            Some(chunk) => chunk,
            None => receiver.recv().await?,
        };
        Some((Ok::<Bytes, std::convert::Infallible>(chunk), (None, receiver)))
    });
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(chunks)).into_response()
}

fn event(data: &str) -> Bytes {
    Bytes::from(format!("data: {data}\n\n"))
}

async fn models(State(server): State<Arc<Server>>) -> Response {
    let base = &server.config.model_name;
    let adapters = server.config.loras.iter().map(|name| {
        json!({"id": name, "object": "model", "created": 0, "owned_by": "engine-sim",
            "root": name, "parent": base})
    });
    let own = json!({"id": base, "object": "model", "created": 0, "owned_by": "engine-sim",
        "root": base, "parent": null, "max_model_len": server.config.model_tokens_max});
    let data: Vec<Value> = std::iter::once(own).chain(adapters).collect();
    json_response(StatusCode::OK, &json!({"object": "list", "data": data}))
}

async fn metrics_page(State(server): State<Arc<Server>>) -> Response {
    let page = metrics::page(&server.engine, &server.config);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], page).into_response()
}

async fn event_sources(State(server): State<Arc<Server>>) -> Response {
    let publisher = &server.engine.publisher;
    let source = json!({
        "enable_kv_cache_events": true,
        "publisher": "zmq",
        "endpoint": format!("tcp://127.0.0.1:{}", publisher.events_port),
        "replay_endpoint": format!("tcp://127.0.0.1:{}", publisher.replay_port),
        "buffer_steps": server.config.buffer_steps,
        "topic": server.config.events_topic,
    });
    let mut sources = serde_json::Map::new();
    sources.insert(server.config.dp_rank.to_string(), source);
    json_response(StatusCode::OK, &Value::Object(sources))
}

async fn control_state(State(server): State<Arc<Server>>) -> Response {
    let position = server.engine.position();
    let figures = server.engine.figures();
    let state = json!({
        "next_sequence": position.next_sequence,
        "blocks_cached": position.blocks_cached,
        "blocks_used": position.blocks_used,
        "blocks_total": position.blocks_total,
        "running": figures.running,
        "waiting": figures.waiting,
        "prefix_queries": figures.prefix_queries,
        "prefix_hits": figures.prefix_hits,
        "finished": figures.finished,
        "generation_tokens": figures.generation_tokens,
        "steps": figures.steps,
        "busy_ms": figures.busy_ms,
        "request_ms": figures.request_ms,
        "late_ms": figures.late_ms,
        "token_data_equal": figures.token_data_equal,
        "token_data_different": figures.token_data_different,
    });
    json_response(StatusCode::OK, &state)
}

#[derive(Deserialize)]
struct EventFaults {
    drop_every: Option<u64>,
    pause: Option<bool>,
}

async fn control_events(
    State(server): State<Arc<Server>>,
    Query(faults): Query<EventFaults>,
) -> StatusCode {
    if let Some(every) = faults.drop_every {
        server.engine.publisher.set(Fault::DropEvery(every)).await;
    }
    if let Some(pause) = faults.pause {
        server.engine.publisher.set(Fault::Pause(pause)).await;
    }
    StatusCode::NO_CONTENT
}

async fn control_clear(State(server): State<Arc<Server>>) -> StatusCode {
    if server.engine.clear_cache() { StatusCode::NO_CONTENT } else { StatusCode::CONFLICT }
}

#[derive(Deserialize)]
struct Restart {
    cache: Option<String>,
}

async fn control_restart(
    State(server): State<Arc<Server>>,
    Query(restart): Query<Restart>,
) -> StatusCode {
    match restart.cache.as_deref() {
        None | Some("lose") => server.engine.forget_cache(),
        Some("keep") => {}
        Some(_) => return StatusCode::BAD_REQUEST,
    }
    match server.engine.publisher.restart().await {
        Ok(()) => StatusCode::NO_CONTENT,
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[cfg(test)]
mod tests;
