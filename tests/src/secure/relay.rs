//! Relay: a feed server between Envoy and the sidecar, which passes on what comes and
//! remembers it, and can say it again.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use hyper::body::Bytes;
use tokio::net::TcpListener;
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::body::Body;
use tonic::client;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::codegen::{Body as HttpBody, Service, StdError, http};
use tonic::server::{self, NamedService, StreamingService};
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use warmpath_core::frame::{Frame, Kind};

use crate::stack::launch::local;

/// A message of the feed, either way.
#[derive(Clone, PartialEq, prost::Message)]
struct Message {
    #[prost(bytes = "bytes", tag = "1")]
    frame: Bytes,
}

/// Messages that wait on a stream. What is said again must all fit.
const QUEUED: usize = 4_096;

/// Frames that are remembered.
const REMEMBERED_MAX: usize = 4_096;

/// Most bytes of a message that is passed on.
const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;

#[derive(Clone)]
struct Feed {
    sidecar: String,
    heard: Arc<Mutex<Vec<Bytes>>>,
    again: broadcast::Sender<Bytes>,
}

/// A running relay.
pub(super) struct Relay {
    /// Its port.
    pub(super) port: u16,
    service: Feed,
    server: JoinHandle<()>,
}

impl Relay {
    /// Starts in front of a sidecar's feed.
    pub(super) async fn start(sidecar: u16) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let service = Feed {
            sidecar: format!("http://{}", local(sidecar)),
            heard: Arc::default(),
            again: broadcast::channel(QUEUED).0,
        };
        let server = Server::builder()
            .add_service(service.clone())
            .serve_with_incoming(TcpListenerStream::new(listener));
        let server = tokio::spawn(async move {
            // Ends with the run.
            let _ended = server.await;
        });
        Ok(Self { port, service, server })
    }

    /// The frames of logs that have been passed on so far, each once.
    pub(super) fn heard(&self) -> Vec<Bytes> {
        self.service.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says frames again on all streams; `false` if there is none.
    pub(super) fn say(&self, frames: &[Bytes]) -> bool {
        frames.iter().all(|frame| self.service.again.send(frame.clone()).is_ok())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Feed {
    fn remember(&self, bytes: &Bytes) {
        let Ok(frame) = Frame::decode(bytes) else { return };
        let numbered = frame.kind.is_in_log() || frame.kind == Kind::Resync;
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if numbered && heard.len() < REMEMBERED_MAX && !heard.contains(bytes) {
            heard.push(bytes.clone());
        }
    }

    async fn attach(
        &self,
        mut up: Streaming<Message>,
    ) -> Result<ReceiverStream<Result<Message, Status>>, Status> {
        let gone = |_| Status::unavailable("no sidecar");
        let channel = Channel::from_shared(self.sidecar.clone());
        let channel = channel.map_err(|_| Status::internal("address"))?;
        let mut sidecar = client::Grpc::new(channel.connect().await.map_err(gone)?)
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        sidecar.ready().await.map_err(gone)?;
        let (said, saying) = mpsc::channel(QUEUED);
        tokio::spawn(async move {
            while let Ok(Some(message)) = up.message().await {
                if said.send(message).await.is_err() {
                    return;
                }
            }
        });
        let codec = ProstCodec::<Message, Message>::default();
        let path = PathAndQuery::from_static("/warmpath.feed.v1.Feed/Attach");
        let request = Request::new(ReceiverStream::new(saying));
        let mut answers = sidecar.streaming(request, path, codec).await?.into_inner();
        let (down, frames) = mpsc::channel(QUEUED);
        let (service, mut again) = (self.clone(), self.again.subscribe());
        tokio::spawn(async move {
            loop {
                let message = tokio::select! {
                    answer = answers.message() => match answer {
                        Ok(Some(message)) => {
                            service.remember(&message.frame);
                            Ok(message)
                        }
                        Ok(None) => return,
                        Err(status) => Err(status),
                    },
                    Ok(frame) = again.recv() => Ok(Message { frame }),
                };
                let is_end = message.is_err();
                if down.send(message).await.is_err() || is_end {
                    return;
                }
            }
        });
        Ok(ReceiverStream::new(frames))
    }
}

type Pending<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl NamedService for Feed {
    const NAME: &'static str = "warmpath.feed.v1.Feed";
}

impl StreamingService<Message> for Feed {
    type Response = Message;
    type ResponseStream = ReceiverStream<Result<Message, Status>>;
    type Future = Pending<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<Message>>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move { service.attach(request.into_inner()).await.map(Response::new) })
    }
}

impl<B> Service<http::Request<B>> for Feed
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
        let service = self.clone();
        Box::pin(async move {
            let codec = ProstCodec::<Message, Message>::default();
            Ok(server::Grpc::new(codec).streaming(service, request).await)
        })
    }
}
