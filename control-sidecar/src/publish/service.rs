//! Service: the gRPC end of the feed, `proto/feed.proto` written out.
//!
//! Two messages with one field and one method: not worth a code generator at
//! build time. The tests hold this file and the .proto file against each other.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Duration, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::{Body as HttpBody, Service, StdError, http};
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use tracing::debug;
use warmpath_core::bookings::Bookings;
use warmpath_core::frame::{Frame, Kind};
use warmpath_core::uplink::{FetchBlob, Hello, More, Purpose};

use super::blobs::Blobs;
use super::log::FeedLog;
use super::usage::UsageBoard;
use super::{follow, snapshot};
use crate::credentials::Reloaded;
use crate::credentials::token::Tokens;
use crate::keeper::Question;
use crate::limits::{SNAPSHOTS_MAX, STREAM_FRAMES_QUEUED, STREAMS_MAX, UP_BYTES_MAX};
use crate::metrics::Metrics;
use crate::replicas::Exchange;

/// Longest wait for a stream's first frame.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// From a filter.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Up {
    /// A frame.
    #[prost(bytes = "bytes", tag = "1")]
    pub frame: Bytes,
}

/// To a filter.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Down {
    /// A frame.
    #[prost(bytes = "bytes", tag = "1")]
    pub frame: Bytes,
}

/// What every stream shares.
#[derive(Debug)]
pub struct Shared {
    /// The log.
    pub log: FeedLog,
    /// Tokenizer files.
    pub blobs: Blobs,
    /// How full workers' caches are.
    pub usage: UsageBoard,
    /// Where the state is asked.
    pub questions: mpsc::Sender<Question>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Ends all streams.
    pub stop: CancellationToken,
    /// What gateways and other routers have booked.
    pub exchange: Exchange,
    /// Bounds the snapshots under way.
    pub snapshots: Semaphore,
    streams: Arc<Semaphore>,
}

impl Shared {
    /// Nothing is attached yet.
    #[must_use]
    pub fn new(
        log: FeedLog,
        questions: mpsc::Sender<Question>,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            log,
            blobs: Blobs::default(),
            usage: UsageBoard::default(),
            questions,
            metrics,
            stop,
            exchange: Exchange::default(),
            snapshots: Semaphore::new(SNAPSHOTS_MAX),
            streams: Arc::new(Semaphore::new(STREAMS_MAX)),
        }
    }
}

/// Why a stream was ended by us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The filter has gone, or has got what it wanted.
    Done,
    /// We are stopping.
    Stopping,
    /// A frame could not be read, or is not one that a filter may send.
    BadFrame,
    /// The first frame did not come in time, or the credit.
    Stalled,
    /// More was asked for than is allowed.
    OverLimit,
}

impl End {
    /// What the filter is told; `None` for an end as it should be.
    fn status(self) -> Option<(&'static str, Status)> {
        Some(match self {
            Self::Done => return None,
            Self::Stopping => ("stopping", Status::unavailable("the sidecar is stopping")),
            Self::BadFrame => ("bad_frame", Status::invalid_argument("bad frame")),
            Self::Stalled => ("stalled", Status::deadline_exceeded("no frame in time")),
            Self::OverLimit => ("over_limit", Status::resource_exhausted("too many requests")),
        })
    }
}

/// What a filter may say once a stream has begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// It has room for so many more parts.
    More(u32),
    /// It wants a blob.
    Fetch(FetchBlob),
    /// What its gateway has booked: the body of a frame.
    Bookings(Bytes),
}

/// The filter's side of a stream.
#[derive(Debug)]
pub struct FromFilter(Streaming<Up>);

impl FromFilter {
    async fn next(&mut self) -> Result<Bytes, End> {
        match self.0.message().await {
            Ok(Some(up)) => Ok(up.frame),
            // It has half-closed, or reset the stream.
            Ok(None) | Err(_) => Err(End::Done),
        }
    }

    async fn hello(&mut self) -> Result<Hello, End> {
        let bytes = timeout(HELLO_TIMEOUT, self.next()).await.map_err(|_| End::Stalled)??;
        let frame = Frame::decode(&bytes).map_err(|_| End::BadFrame)?;
        if frame.kind != Kind::Hello {
            return Err(End::BadFrame);
        }
        Hello::decode(frame.body).map_err(|_| End::BadFrame)
    }

    /// What the filter says next. May be dropped and called again.
    ///
    /// # Errors
    ///
    /// Why the stream ends.
    pub async fn said(&mut self) -> Result<Said, End> {
        let bytes = self.next().await?;
        let frame = Frame::decode(&bytes).map_err(|_| End::BadFrame)?;
        match frame.kind {
            Kind::More => More::decode(frame.body)
                .map(|more| Said::More(more.parts))
                .map_err(|_| End::BadFrame),
            Kind::FetchBlob => {
                FetchBlob::decode(frame.body).map(Said::Fetch).map_err(|_| End::BadFrame)
            }
            Kind::Bookings => {
                Bookings::decode(frame.body).map_err(|_| End::BadFrame)?;
                Ok(Said::Bookings(bytes.slice_ref(frame.body)))
            }
            _ => Err(End::BadFrame),
        }
    }
}

/// Our side of a stream.
#[derive(Clone, Debug)]
pub struct ToFilter(mpsc::Sender<Result<Down, Status>>);

impl ToFilter {
    /// Sends a frame, waiting for room.
    ///
    /// # Errors
    ///
    /// [`End::Done`] if the filter has gone.
    pub async fn send(&self, frame: Bytes) -> Result<(), End> {
        self.0.send(Ok(Down { frame })).await.map_err(|_| End::Done)
    }

    /// Encodes and sends a frame.
    ///
    /// # Errors
    ///
    /// As [`ToFilter::send`].
    pub async fn frame(&self, frame: Frame<'_>) -> Result<(), End> {
        self.send(frame.encode().into()).await
    }

    /// Ends when the filter has gone.
    pub async fn closed(&self) {
        self.0.closed().await;
    }
}

/// Serves one stream from its first frame to its end.
async fn serve(shared: Arc<Shared>, up: Streaming<Up>, down: mpsc::Sender<Result<Down, Status>>) {
    let mut from = FromFilter(up);
    let to = ToFilter(down.clone());
    let stop = shared.stop.clone();
    let work = async {
        let hello = from.hello().await?;
        debug!(vm = hello.vm, purpose = ?hello.purpose, epoch = hello.epoch, sequence = hello.sequence, "filter attached");
        match hello.purpose {
            Purpose::Follow => follow::serve(&shared, &hello, &mut from, &to).await,
            Purpose::Snapshot => snapshot::serve(&shared, &hello, &mut from, &to).await,
        }
    };
    let end = tokio::select! {
        outcome = work => outcome.err().unwrap_or(End::Done),
        () = stop.cancelled() => End::Stopping,
        () = to.closed() => End::Done,
    };
    if let Some((reason, status)) = end.status() {
        shared.metrics.stream_refused(reason);
        // The queue may be full of frames that the filter does not take: then
        // the end of the stream has to do.
        let _ = down.try_send(Err(status));
    }
}

/// The service, to be added to a server.
#[derive(Clone, Debug)]
pub struct FeedServer {
    /// What every stream shares.
    pub shared: Arc<Shared>,
    /// Tokens, one of which must come with each request; `None` for no token.
    pub tokens: Option<Reloaded<Tokens>>,
}

impl FeedServer {
    fn check(&self, headers: &http::HeaderMap) -> Result<(), Status> {
        let Some(tokens) = &self.tokens else { return Ok(()) };
        tokens.get().check(headers).map_err(|refusal| {
            self.shared.metrics.feed_refused(refusal.reason());
            Status::unauthenticated("a bearer token is needed")
        })
    }
}

impl NamedService for FeedServer {
    const NAME: &'static str = "warmpath.feed.v1.Feed";
}

/// Path of the one method.
pub const ATTACH: &str = "/warmpath.feed.v1.Feed/Attach";

type Pending<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl StreamingService<Up> for FeedServer {
    type Response = Down;
    type ResponseStream = ReceiverStream<Result<Down, Status>>;
    type Future = Pending<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<Up>>) -> Self::Future {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            let Ok(permit) = Arc::clone(&shared.streams).try_acquire_owned() else {
                shared.metrics.stream_refused("streams");
                return Err(Status::resource_exhausted("too many streams"));
            };
            let (down, frames) = mpsc::channel(STREAM_FRAMES_QUEUED);
            tokio::spawn(async move {
                shared.metrics.streams_changed(1);
                serve(Arc::clone(&shared), request.into_inner(), down).await;
                shared.metrics.streams_changed(-1);
                drop(permit);
            });
            Ok(Response::new(ReceiverStream::new(frames)))
        })
    }
}

impl<B> Service<http::Request<B>> for FeedServer
where
    B: HttpBody + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pending<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let method = self.clone();
        Box::pin(async move {
            if let Err(status) = method.check(request.headers()) {
                return Ok(status.into_http());
            }
            if request.uri().path() != ATTACH {
                return Ok(Status::unimplemented("no such method").into_http());
            }
            let codec = ProstCodec::<Down, Up>::default();
            let mut grpc = Grpc::new(codec).max_decoding_message_size(UP_BYTES_MAX);
            Ok(grpc.streaming(method, request).await)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    /// Goal: names and numbers here are those of the .proto file, from which
    /// others generate their code.
    #[test]
    fn the_proto_file_says_the_same() {
        let proto = include_str!("../../proto/feed.proto");
        let (package, service) = FeedServer::NAME.rsplit_once('.').unwrap();
        assert!(proto.contains(&format!("package {package};")));
        assert!(proto.contains(&format!("service {service} {{")));
        assert!(proto.contains("rpc Attach(stream Up) returns (stream Down);"));
        assert_eq!(ATTACH, format!("/{package}.{service}/Attach"));
        for message in ["Up", "Down"] {
            assert!(proto.contains(&format!("message {message} {{\n  bytes frame = 1;\n}}")));
        }
        let bytes = Down { frame: Bytes::from_static(b"ab") }.encode_to_vec();
        assert_eq!(bytes, [1 << 3 | 2, 2, b'a', b'b']);
        assert_eq!(Up::decode(&bytes[..]).unwrap().frame, "ab");
    }
}
