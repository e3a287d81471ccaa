//! Workers: servers that answer as an engine's client expects, at once, late,
//! badly or not at all, as the request's headers say.
//!
//! All in this process: what each has under way is known exactly, and many
//! answers can be held back until a whole wave of requests has been placed.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

/// Header that says how the worker behaves; one of [`Behaviour`]'s words.
pub const BEHAVIOUR: &str = "x-test-behaviour";

/// Header with the number of the wave that the request belongs to: its answer
/// is held back until that wave is released.
pub const WAVE: &str = "x-test-wave";

/// How long a slow worker takes, and the pause between pieces of a stream.
const SLOW: Duration = Duration::from_millis(15);

/// Between two pieces of a stream that is held open.
const DRIP: Duration = Duration::from_millis(20);

/// Longest that a worker keeps a request that it never answers.
const HANG: Duration = Duration::from_secs(30);

/// Pieces of a streamed answer.
const PIECES: usize = 4;

const USAGE: &str = r#""usage":{"prompt_tokens":20,"completion_tokens":1,"total_tokens":21}"#;

/// What a worker does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Behaviour {
    /// Answers at once, whole.
    Whole,
    /// Answers at once, in pieces.
    Stream,
    /// Answers whole, a little later.
    Slow,
    /// Closes the connection instead of answering.
    Reset,
    /// Closes the connection in the middle of a stream.
    ResetMidway,
    /// Never answers.
    Hang,
    /// Never finishes its stream.
    HangMidway,
    /// Answers 503.
    Unavailable,
    /// Begins at once and sends pieces until the request's wave is released.
    Drip,
}

impl Behaviour {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Whole,
        Self::Stream,
        Self::Slow,
        Self::Reset,
        Self::ResetMidway,
        Self::Hang,
        Self::HangMidway,
        Self::Unavailable,
        Self::Drip,
    ];

    /// As it stands in the header.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Stream => "stream",
            Self::Slow => "slow",
            Self::Reset => "reset",
            Self::ResetMidway => "reset-midway",
            Self::Hang => "hang",
            Self::HangMidway => "hang-midway",
            Self::Unavailable => "unavailable",
            Self::Drip => "drip",
        }
    }

    fn of(request: &Request<Incoming>) -> Self {
        let word = request.headers().get(BEHAVIOUR).and_then(|value| value.to_str().ok());
        let known = Self::ALL.into_iter().find(|it| Some(it.word()) == word);
        known.unwrap_or(Self::Whole)
    }
}

/// What the workers share.
#[derive(Debug)]
struct Shared {
    /// Requests under way, by worker.
    busy: Vec<AtomicUsize>,
    /// The last wave that is released.
    released: watch::Sender<u64>,
}

impl Shared {
    /// Waits until a wave is released; wave 0 always is.
    async fn released(&self, wave: u64) {
        let mut released = self.released.subscribe();
        // An error says that the workers are gone.
        let _gone = released.wait_for(|released| *released >= wave).await;
    }
}

/// Some workers on 127.0.0.1.
#[derive(Debug)]
pub struct Workers {
    /// Where each listens.
    pub ports: Vec<u16>,
    shared: Arc<Shared>,
}

impl Workers {
    /// Starts so many. They run until the runtime ends.
    ///
    /// # Errors
    ///
    /// If there are no ports.
    pub fn start(count: usize, runtime: &Handle) -> std::io::Result<Self> {
        let busy = (0..count).map(|_| AtomicUsize::new(0)).collect();
        let shared = Arc::new(Shared { busy, released: watch::Sender::new(0) });
        let mut ports = Vec::new();
        for number in 0..count {
            let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
            listener.set_nonblocking(true)?;
            ports.push(listener.local_addr()?.port());
            runtime.spawn(serve(listener, number, Arc::clone(&shared)));
        }
        Ok(Self { ports, shared })
    }

    /// Requests under way, by worker.
    #[must_use]
    pub fn busy(&self) -> Vec<usize> {
        self.shared.busy.iter().map(|busy| busy.load(Ordering::SeqCst)).collect()
    }

    /// Lets the answers of a wave, and of all before it, go.
    pub fn release(&self, wave: u64) {
        self.shared.released.send_replace(wave);
    }
}

async fn serve(listener: std::net::TcpListener, number: usize, shared: Arc<Shared>) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    while let Ok((stream, _)) = listener.accept().await {
        // Small answers must not wait for acknowledgements.
        let _slower = stream.set_nodelay(true);
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let service =
                service_fn(move |request| answer(request, Busy::new(number, Arc::clone(&shared))));
            // An error is a client that went away, or a reset that was asked for.
            let _ended = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

/// Counts a request while it is under way.
struct Busy {
    number: usize,
    shared: Arc<Shared>,
}

impl Busy {
    fn new(number: usize, shared: Arc<Shared>) -> Self {
        let busy = Self { number, shared };
        busy.count(|count| count.fetch_add(1, Ordering::SeqCst));
        busy
    }

    fn count(&self, change: impl FnOnce(&AtomicUsize) -> usize) {
        if let Some(count) = self.shared.busy.get(self.number) {
            change(count);
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.count(|count| count.fetch_sub(1, Ordering::SeqCst));
    }
}

/// Tells the server to close the connection without an answer.
#[derive(Debug)]
struct Closed;

impl std::fmt::Display for Closed {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("closed on request")
    }
}

impl std::error::Error for Closed {}

async fn answer(request: Request<Incoming>, busy: Busy) -> Result<Response<Answer>, Closed> {
    let behaviour = Behaviour::of(&request);
    let wave = request.headers().get(WAVE).and_then(|value| value.to_str().ok()?.parse().ok());
    // The whole body first, as engines do. One that is cut off needs no answer.
    if request.into_body().collect().await.is_err() {
        return Err(Closed);
    }
    let wave = wave.unwrap_or(0);
    if behaviour != Behaviour::Drip {
        busy.shared.released(wave).await;
    }
    match behaviour {
        Behaviour::Reset => return Err(Closed),
        Behaviour::Hang => sleep(HANG).await,
        Behaviour::Slow => sleep(SLOW).await,
        _ => {}
    }
    let (status, body) = match behaviour {
        Behaviour::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, Answer::whole("{}".into())),
        Behaviour::Drip | Behaviour::Stream | Behaviour::ResetMidway | Behaviour::HangMidway => {
            (StatusCode::OK, Answer::stream(behaviour, wave, busy))
        }
        _ => (StatusCode::OK, Answer::whole(format!("{{\"choices\":[],{USAGE}}}"))),
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    Ok(response)
}

/// The body of an answer.
enum Answer {
    Whole(Full<Bytes>),
    /// Pieces as they come; `Err` ends the connection.
    Stream(mpsc::Receiver<Result<Bytes, Closed>>),
}

impl Answer {
    fn whole(text: String) -> Self {
        Self::Whole(Full::new(text.into()))
    }

    fn stream(behaviour: Behaviour, wave: u64, busy: Busy) -> Self {
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            // Ends when the client has gone away and the body is dropped.
            tokio::select! {
                () = async {
                    if behaviour == Behaviour::Drip {
                        drip(&sender, busy.shared.released(wave)).await;
                    }
                    send_pieces(behaviour, &sender).await;
                } => {}
                () = sender.closed() => {}
            }
            drop(busy);
        });
        Self::Stream(receiver)
    }
}

/// Sends something now and then, until it is told to come to the end.
async fn drip(sender: &mpsc::Sender<Result<Bytes, Closed>>, end: impl Future<Output = ()>) {
    let mut end = std::pin::pin!(end);
    loop {
        if sender.send(Ok(Bytes::from_static(b": drip\n\n"))).await.is_err() {
            return;
        }
        tokio::select! {
            () = &mut end => return,
            () = sleep(DRIP) => {}
        }
    }
}

async fn send_pieces(behaviour: Behaviour, sender: &mpsc::Sender<Result<Bytes, Closed>>) {
    for piece in 0..PIECES {
        let last = piece + 1 == PIECES;
        let text = if last {
            format!("data: {{\"choices\":[],{USAGE}}}\n\ndata: [DONE]\n\n")
        } else {
            format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{piece}\"}}}}]}}\n\n")
        };
        let sent = match behaviour {
            Behaviour::ResetMidway if piece == 2 => sender.send(Err(Closed)).await,
            Behaviour::HangMidway if piece == 2 => {
                sleep(HANG).await;
                return;
            }
            _ => sender.send(Ok(text.into())).await,
        };
        if sent.is_err() {
            return;
        }
        tokio::task::yield_now().await;
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Closed;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Closed>>> {
        match self.get_mut() {
            Self::Whole(body) => {
                let frame = Pin::new(body).poll_frame(context);
                frame.map(|frame| {
                    frame.map(|frame| frame.map_err(|never: Infallible| match never {}))
                })
            }
            Self::Stream(pieces) => {
                pieces.poll_recv(context).map(|piece| piece.map(|piece| piece.map(Frame::data)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(body) => body.is_end_stream(),
            Self::Stream(_) => false,
        }
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match self {
            Self::Whole(body) => body.size_hint(),
            Self::Stream(_) => hyper::body::SizeHint::default(),
        }
    }
}
