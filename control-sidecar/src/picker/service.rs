//! Service: the gRPC end, one stream a request.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::{Body as HttpBody, Service, StdError, http};
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::proto::{PROCESS, ProcessingRequest, ProcessingResponse, SERVICE};
use super::session::{Common, Fault, Session};
use crate::limits::{PICKER_MESSAGE_BYTES_MAX, PICKER_REPLIES_QUEUED, PICKER_STREAMS_MAX};

/// The service, to be added to a server.
#[derive(Clone, Debug)]
pub(super) struct Processor {
    common: Arc<Common>,
    streams: Arc<Semaphore>,
    /// From then on no request is begun.
    stop: CancellationToken,
}

impl Processor {
    pub(super) fn new(common: Arc<Common>, stop: CancellationToken) -> Self {
        Self { common, streams: Arc::new(Semaphore::new(PICKER_STREAMS_MAX)), stop }
    }
}

type Replies = mpsc::Sender<Result<ProcessingResponse, Status>>;

/// Serves one request, to its end: whatever that is, what it has booked is freed.
async fn serve(common: Arc<Common>, mut up: Streaming<ProcessingRequest>, down: Replies) {
    let metrics = Arc::clone(&common.metrics);
    let mut session = Session::new(common);
    let work = async {
        // It has half-closed, or reset the stream.
        while let Ok(Some(message)) = up.message().await {
            for reply in session.take(message).await? {
                if down.send(Ok(reply)).await.is_err() {
                    return Ok(());
                }
            }
        }
        Ok::<(), Fault>(())
    };
    let ended = tokio::select! {
        ended = work => ended,
        () = down.closed() => Ok(()),
    };
    if let Err(fault) = ended {
        metrics.picker.stream_refused(fault.reason());
        // The queue may be full: then the end of the stream has to do.
        let _ = down.try_send(Err(status(fault)));
    }
}

fn status(fault: Fault) -> Status {
    match fault {
        Fault::Order => Status::invalid_argument("a part of the stream that cannot come now"),
        Fault::Observing => Status::failed_precondition("observability_mode waits for no answer"),
        Fault::Stopping => Status::unavailable("the endpoint picker is stopping"),
    }
}

impl NamedService for Processor {
    const NAME: &'static str = SERVICE;
}

type Pending<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl StreamingService<ProcessingRequest> for Processor {
    type Response = ProcessingResponse;
    type ResponseStream = ReceiverStream<Result<ProcessingResponse, Status>>;
    type Future = Pending<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<ProcessingRequest>>) -> Self::Future {
        let Self { common, streams, stop } = self.clone();
        Box::pin(async move {
            if stop.is_cancelled() {
                common.metrics.picker.stream_refused(Fault::Stopping.reason());
                return Err(status(Fault::Stopping));
            }
            let Ok(permit) = streams.try_acquire_owned() else {
                common.metrics.picker.stream_refused("streams");
                return Err(Status::resource_exhausted("too many requests"));
            };
            let (down, replies) = mpsc::channel(PICKER_REPLIES_QUEUED);
            tokio::spawn(async move {
                let metrics = Arc::clone(&common.metrics);
                metrics.picker.streams.inc();
                serve(common, request.into_inner(), down).await;
                metrics.picker.streams.dec();
                drop(permit);
            });
            Ok(Response::new(ReceiverStream::new(replies)))
        })
    }
}

impl<B> Service<http::Request<B>> for Processor
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
            if request.uri().path() != PROCESS {
                return Ok(Status::unimplemented("no such method").into_http());
            }
            let codec = ProstCodec::<ProcessingResponse, ProcessingRequest>::default();
            let mut grpc = Grpc::new(codec).max_decoding_message_size(PICKER_MESSAGE_BYTES_MAX);
            Ok(grpc.streaming(method, request).await)
        })
    }
}
