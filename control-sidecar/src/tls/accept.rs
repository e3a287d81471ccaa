//! Accept: connections over TCP, TLS or a Unix socket, for servers that take a
//! stream of them.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::{CertificateError, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::credentials::Reloaded;
use crate::limits::{
    CONNECTIONS_QUEUED, HANDSHAKE_TIMEOUT, HANDSHAKES_MAX, RECONNECT_PAUSE, SERVER_CONNECTIONS_MAX,
};

/// Where connections come from.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// TCP, with TLS on it.
    Tls(TcpListener, Reloaded<ServerConfig>),
    /// A Unix socket.
    Unix(UnixListener),
}

impl Listener {
    async fn accept(&self) -> io::Result<Raw> {
        match self {
            Self::Tcp(listener) | Self::Tls(listener, _) => {
                let (stream, _) = listener.accept().await?;
                // Frames are small and wait for nothing.
                stream.set_nodelay(true)?;
                Ok(Raw::Tcp(stream))
            }
            Self::Unix(listener) => Ok(Raw::Unix(listener.accept().await?.0)),
        }
    }
}

enum Raw {
    Tcp(TcpStream),
    Unix(UnixStream),
}

#[derive(Debug)]
enum Inner {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
}

/// A connection whose client has proved what it must.
#[derive(Debug)]
pub struct Connection {
    inner: Inner,
    _permit: OwnedSemaphorePermit,
}

/// Takes connections until `stop`.
///
/// At most [`SERVER_CONNECTIONS_MAX`] are open at a time, and
/// [`HANDSHAKES_MAX`] in their handshakes; others are closed.
///
/// - `refused`: told of each that is refused, by a fixed word.
pub fn incoming(
    listener: Listener,
    refused: impl Fn(&'static str) + Clone + Send + 'static,
    stop: CancellationToken,
) -> ReceiverStream<io::Result<Connection>> {
    let (sender, connections) = mpsc::channel(CONNECTIONS_QUEUED);
    tokio::spawn(async move {
        tokio::select! {
            () = accept(listener, refused, sender) => {}
            () = stop.cancelled() => {}
        }
    });
    ReceiverStream::new(connections)
}

async fn accept(
    listener: Listener,
    refused: impl Fn(&'static str) + Clone + Send + 'static,
    sender: mpsc::Sender<io::Result<Connection>>,
) {
    let open = Arc::new(Semaphore::new(SERVER_CONNECTIONS_MAX));
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    while !sender.is_closed() {
        let Ok(raw) = listener.accept().await else {
            // Out of file descriptors, say: soon is not at once.
            sleep(RECONNECT_PAUSE.0).await;
            continue;
        };
        let Ok(permit) = Arc::clone(&open).try_acquire_owned() else {
            refused("connections");
            continue;
        };
        let inner = match (raw, &listener) {
            (Raw::Unix(stream), _) => Inner::Unix(stream),
            (Raw::Tcp(stream), Listener::Tls(_, config)) => {
                let Ok(handshake) = Arc::clone(&handshakes).try_acquire_owned() else {
                    refused("handshakes");
                    continue;
                };
                let acceptor = TlsAcceptor::from(config.get());
                let (sender, refused) = (sender.clone(), refused.clone());
                tokio::spawn(async move {
                    let greeted = timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await;
                    drop(handshake);
                    match greeted {
                        Ok(Ok(stream)) => {
                            let inner = Inner::Tls(Box::new(stream));
                            // The server has gone if nobody takes it.
                            let _ = sender.send(Ok(Connection { inner, _permit: permit })).await;
                        }
                        Ok(Err(error)) => refused(reason(&error)),
                        Err(_) => refused("handshake_timeout"),
                    }
                });
                continue;
            }
            (Raw::Tcp(stream), _) => Inner::Tcp(stream),
        };
        if sender.send(Ok(Connection { inner, _permit: permit })).await.is_err() {
            return;
        }
    }
}

/// Why a handshake failed, in a word of a closed list.
fn reason(error: &io::Error) -> &'static str {
    let inner = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::NoCertificatesPresented) => "no_certificate",
        Some(rustls::Error::InvalidCertificate(error)) => match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => "expired",
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "not_yet_valid"
            }
            CertificateError::UnknownIssuer | CertificateError::BadSignature => "unknown_issuer",
            CertificateError::ApplicationVerificationFailure => "wrong_name",
            _ => "bad_certificate",
        },
        // The client refuses us.
        Some(rustls::Error::AlertReceived(_)) => "refused_by_client",
        Some(_) => "not_tls",
        None => "connection_lost",
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

macro_rules! each {
    ($self:ident, $stream:ident => $call:expr) => {
        match &mut $self.get_mut().inner {
            Inner::Tcp($stream) => {
                let $stream = Pin::new($stream);
                $call
            }
            Inner::Tls($stream) => {
                let $stream = Pin::new($stream.as_mut());
                $call
            }
            Inner::Unix($stream) => {
                let $stream = Pin::new($stream);
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
    ) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_read(context, buffer))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        each!(self, stream => stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, stream => stream.poll_write_vectored(context, slices))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.inner {
            Inner::Tcp(stream) => stream.is_write_vectored(),
            Inner::Tls(stream) => stream.is_write_vectored(),
            Inner::Unix(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_shutdown(context))
    }
}
