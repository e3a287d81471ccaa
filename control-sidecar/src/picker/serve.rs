//! Serve: connections of gateways, plain or secured.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::limits::{PICKER_CONNECTIONS_MAX, PICKER_CONNECTIONS_QUEUED, PICKER_HANDSHAKE};
use crate::metrics::Metrics;

/// Pause after a connection could not be accepted: there may be no descriptors.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(50);

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: Stream,
    _permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

macro_rules! forward {
    ($self:ident, $stream:ident => $call:expr) => {
        match &mut $self.get_mut().stream {
            Stream::Plain(stream) => {
                let $stream = Pin::new(stream);
                $call
            }
            Stream::Tls(stream) => {
                let $stream = Pin::new(&mut **stream);
                $call
            }
        }
    };
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        forward!(self, stream => stream.poll_read(context, buffer))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        forward!(self, stream => stream.poll_write(context, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        forward!(self, stream => stream.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        forward!(self, stream => stream.poll_shutdown(context))
    }
}

/// Accepts connections until the stop. Handshakes do not hold each other up.
pub(super) fn accept(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) -> ReceiverStream<std::io::Result<Connection>> {
    let (accepted, connections) = mpsc::channel(PICKER_CONNECTIONS_QUEUED);
    tokio::spawn(async move {
        let accepting = accept_all(listener, tls, metrics, accepted);
        stop.run_until_cancelled(accepting).await;
    });
    ReceiverStream::new(connections)
}

async fn accept_all(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    metrics: Arc<Metrics>,
    accepted: mpsc::Sender<std::io::Result<Connection>>,
) {
    let room = Arc::new(Semaphore::new(PICKER_CONNECTIONS_MAX));
    let (patience, handshakes) = PICKER_HANDSHAKE;
    let handshakes = Arc::new(Semaphore::new(handshakes));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
            metrics.picker.connection_refused("connections");
            continue;
        };
        // Without it, answers wait for acknowledgements; an error costs only that.
        let _ = stream.set_nodelay(true);
        let Some(tls) = &tls else {
            let connection = Connection { stream: Stream::Plain(stream), _permit: permit };
            if accepted.send(Ok(connection)).await.is_err() {
                return;
            }
            continue;
        };
        let Ok(turn) = Arc::clone(&handshakes).try_acquire_owned() else {
            metrics.picker.connection_refused("handshakes");
            continue;
        };
        let (handshake, accepted) = (tls.accept(stream), accepted.clone());
        let metrics = Arc::clone(&metrics);
        tokio::spawn(async move {
            match timeout(patience, handshake).await {
                Ok(Ok(stream)) => {
                    let stream = Stream::Tls(Box::new(stream));
                    // Nobody takes it any more if we are stopping.
                    let _ = accepted.send(Ok(Connection { stream, _permit: permit })).await;
                }
                Ok(Err(_)) => metrics.picker.connection_refused("handshake"),
                Err(_) => metrics.picker.connection_refused("handshake_late"),
            }
            drop(turn);
        });
    }
}
