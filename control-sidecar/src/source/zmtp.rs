//! Zmtp: the ends of ZeroMQ's protocol that a sidecar needs.
//!
//! ZMTP 3 over TCP with the NULL mechanism, as RFC 23 and 37 of the ZeroMQ
//! project describe it: SUB, to listen to a publisher, DEALER, to ask its replay
//! socket, and PUB, to publish what was booked. Written here because a sidecar must see what a library hides:
//! where one connection ends and the next begins (a publisher that restarted
//! must not be taken for the old one), and because a length in the stream must
//! not decide how much memory is taken.
//!
//! # Invariants
//!
//! 1. No more is buffered than one message of [`MESSAGE_BYTES_MAX`].
//! 2. [`Connection::receive`] may be dropped at any point; nothing is lost.

use std::io;
use std::net::SocketAddr;

use bytes::{Buf, Bytes, BytesMut};
use core::fmt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

use crate::limits::{CONNECT_TIMEOUT, MESSAGE_BYTES_MAX, MESSAGE_FRAMES_MAX, PING_AFTER};

const GREETING_BYTES: usize = 64;
const FLAG_MORE: u8 = 1;
const FLAG_LONG: u8 = 2;
const FLAG_COMMAND: u8 = 4;

/// What kind of socket we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketKind {
    /// Listens to a publisher.
    Sub,
    /// Asks a router.
    Dealer,
    /// Publishes.
    Pub,
}

impl SocketKind {
    fn name(self) -> &'static [u8] {
        match self {
            Self::Sub => b"SUB",
            Self::Dealer => b"DEALER",
            Self::Pub => b"PUB",
        }
    }
}

/// Why a connection could not be made, or ended.
#[derive(Debug)]
pub enum ZmtpError {
    /// Nobody listens at the address: the process is gone.
    Refused,
    /// No answer in time.
    Timeout,
    /// The name of the host does not resolve.
    NoAddress,
    /// The peer closed the connection.
    Closed,
    /// Another error of the network.
    Network(io::ErrorKind),
    /// The peer does not speak ZMTP 3 without security.
    Protocol,
    /// A message is longer than [`MESSAGE_BYTES_MAX`] or has too many frames.
    OverLimit,
}

impl ZmtpError {
    /// Fixed word for metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Timeout => "timeout",
            Self::NoAddress => "no_address",
            Self::Closed => "closed",
            Self::Network(_) => "network",
            Self::Protocol => "protocol",
            Self::OverLimit => "over_limit",
        }
    }
}

impl fmt::Display for ZmtpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => f.write_str("nobody listens at the address"),
            Self::Timeout => f.write_str("no answer in time"),
            Self::NoAddress => f.write_str("the host's name does not resolve"),
            Self::Closed => f.write_str("the peer closed the connection"),
            Self::Network(kind) => write!(f, "network: {kind}"),
            Self::Protocol => f.write_str("the peer does not speak ZMTP 3 without security"),
            Self::OverLimit => f.write_str("a message is above its limit"),
        }
    }
}

impl std::error::Error for ZmtpError {}

impl From<io::Error> for ZmtpError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe => Self::Closed,
            kind => Self::Network(kind),
        }
    }
}

/// One connection to one peer.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    buffer: BytesMut,
    /// Frames of a message that is not complete yet, and their bytes.
    frames: Vec<Bytes>,
    frame_bytes: usize,
    /// Whether the peer knows signs of life (ZMTP 3.1).
    answers_pings: bool,
    last_heard: Instant,
    pinged: bool,
}

impl Connection {
    /// Connects and shakes hands; a SUB socket subscribes to everything.
    ///
    /// - `address`: `host:port`.
    ///
    /// # Errors
    ///
    /// A [`ZmtpError`]; the caller tries again later.
    pub async fn open(address: &str, kind: SocketKind) -> Result<Self, ZmtpError> {
        timeout(CONNECT_TIMEOUT, Self::open_unbounded(address, kind, ""))
            .await
            .map_err(|_| ZmtpError::Timeout)?
    }

    /// Connects as a SUB socket and subscribes to the topics that begin with
    /// `topic`.
    ///
    /// - `address`: `host:port`.
    ///
    /// # Errors
    ///
    /// As [`Connection::open`].
    pub async fn subscribe(address: &str, topic: &str) -> Result<Self, ZmtpError> {
        timeout(CONNECT_TIMEOUT, Self::open_unbounded(address, SocketKind::Sub, topic))
            .await
            .map_err(|_| ZmtpError::Timeout)?
    }

    async fn open_unbounded(
        address: &str,
        kind: SocketKind,
        topic: &str,
    ) -> Result<Self, ZmtpError> {
        let addresses: Vec<SocketAddr> =
            tokio::net::lookup_host(address).await.map_err(|_| ZmtpError::NoAddress)?.collect();
        let mut outcome = Err(ZmtpError::NoAddress);
        for address in addresses {
            outcome = TcpStream::connect(address).await.map_err(ZmtpError::from);
            if outcome.is_ok() {
                break;
            }
        }
        let mut connection = Self::over(outcome?)?;
        connection.shake_hands(kind).await?;
        if kind == SocketKind::Sub {
            // The form of ZMTP 3.0, which every publisher takes.
            connection.send(&[[&[1], topic.as_bytes()].concat()]).await?;
        }
        Ok(connection)
    }

    /// Takes a connection that somebody has made to us, and shakes hands.
    ///
    /// # Errors
    ///
    /// A [`ZmtpError`].
    pub async fn accept(stream: TcpStream, kind: SocketKind) -> Result<Self, ZmtpError> {
        let work = async {
            let mut connection = Self::over(stream)?;
            connection.shake_hands(kind).await?;
            Ok(connection)
        };
        timeout(CONNECT_TIMEOUT, work).await.map_err(|_| ZmtpError::Timeout)?
    }

    fn over(stream: TcpStream) -> Result<Self, ZmtpError> {
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            buffer: BytesMut::new(),
            frames: Vec::new(),
            frame_bytes: 0,
            answers_pings: false,
            last_heard: Instant::now(),
            pinged: false,
        })
    }

    async fn shake_hands(&mut self, kind: SocketKind) -> Result<(), ZmtpError> {
        let mut greeting = [0; GREETING_BYTES];
        let fields: [(usize, &[u8]); 4] =
            [(0, &[0xff]), (9, &[0x7f]), (10, &[3, 0]), (12, b"NULL")];
        for (at, bytes) in fields {
            if let Some(field) = greeting.get_mut(at..at + bytes.len()) {
                field.copy_from_slice(bytes);
            }
        }
        self.stream.write_all(&greeting).await?;
        let mut theirs = [0; GREETING_BYTES];
        self.stream.read_exact(&mut theirs).await?;
        let [0xff, ..] = theirs else {
            return Err(ZmtpError::Protocol);
        };
        let version = (theirs.get(10).copied(), theirs.get(11).copied());
        let mechanism = theirs.get(12..32);
        if version.0.is_none_or(|major| major < 3)
            || mechanism.is_none_or(|name| name.get(..5) != Some(b"NULL\0"))
        {
            return Err(ZmtpError::Protocol);
        }
        self.answers_pings = version.1.is_some_and(|minor| minor >= 1);

        let mut ready = vec![5];
        ready.extend_from_slice(b"READY");
        for (name, value) in [(&b"Socket-Type"[..], kind.name()), (b"Identity", b"")] {
            ready.push(u8::try_from(name.len()).unwrap_or(0));
            ready.extend_from_slice(name);
            ready.extend_from_slice(&u32::try_from(value.len()).unwrap_or(0).to_be_bytes());
            ready.extend_from_slice(value);
        }
        self.write_frame(FLAG_COMMAND, &ready).await?;
        loop {
            if let Some(frame) = self.next_frame()? {
                let is_ready =
                    frame.flags & FLAG_COMMAND != 0 && frame.body.starts_with(b"\x05READY");
                return if is_ready { Ok(()) } else { Err(ZmtpError::Protocol) };
            }
            self.fill().await?;
        }
    }

    /// Sends one message.
    ///
    /// # Errors
    ///
    /// A [`ZmtpError`]; the connection is of no use any more.
    pub async fn send<F: AsRef<[u8]>>(&mut self, frames: &[F]) -> Result<(), ZmtpError> {
        for (at, frame) in frames.iter().enumerate() {
            let more = if at + 1 < frames.len() { FLAG_MORE } else { 0 };
            self.write_frame(more, frame.as_ref()).await?;
        }
        Ok(())
    }

    async fn write_frame(&mut self, flags: u8, body: &[u8]) -> Result<(), ZmtpError> {
        let mut bytes = Vec::with_capacity(body.len() + 9);
        match u8::try_from(body.len()) {
            Ok(len) => bytes.extend_from_slice(&[flags, len]),
            Err(_) => {
                bytes.push(flags | FLAG_LONG);
                bytes.extend_from_slice(&(body.len() as u64).to_be_bytes());
            }
        }
        bytes.extend_from_slice(body);
        self.stream.write_all(&bytes).await?;
        Ok(())
    }

    /// The next message, all of its frames.
    ///
    /// May be dropped and called again. A peer that can answer is asked for a
    /// sign of life after [`PING_AFTER`] of silence, and given up after as long
    /// again.
    ///
    /// # Errors
    ///
    /// A [`ZmtpError`]; the connection is of no use any more.
    pub async fn receive(&mut self) -> Result<Vec<Bytes>, ZmtpError> {
        loop {
            while let Some(frame) = self.next_frame()? {
                if frame.flags & FLAG_COMMAND != 0 {
                    self.command(&frame.body).await?;
                    continue;
                }
                self.frame_bytes += frame.body.len();
                self.frames.push(frame.body);
                if self.frames.len() > MESSAGE_FRAMES_MAX || self.frame_bytes > MESSAGE_BYTES_MAX {
                    return Err(ZmtpError::OverLimit);
                }
                if frame.flags & FLAG_MORE == 0 {
                    self.frame_bytes = 0;
                    return Ok(core::mem::take(&mut self.frames));
                }
            }
            if !self.answers_pings {
                self.fill().await?;
                continue;
            }
            let patience = if self.pinged { PING_AFTER * 2 } else { PING_AFTER };
            match timeout_at(self.last_heard + patience, self.fill()).await {
                Ok(outcome) => outcome?,
                Err(_) if self.pinged => return Err(ZmtpError::Timeout),
                Err(_) => {
                    self.pinged = true;
                    // Name, time to live in tenths of a second, no context.
                    self.write_frame(FLAG_COMMAND, b"\x04PING\0\0").await?;
                }
            }
        }
    }

    async fn command(&mut self, body: &[u8]) -> Result<(), ZmtpError> {
        if let Some(rest) = body.strip_prefix(b"\x04PING") {
            let mut pong = b"\x04PONG".to_vec();
            pong.extend_from_slice(rest.get(2..).unwrap_or(&[]));
            self.write_frame(FLAG_COMMAND, &pong).await?;
        }
        Ok(())
    }

    async fn fill(&mut self) -> Result<(), ZmtpError> {
        self.buffer.reserve(16 * 1024);
        if self.stream.read_buf(&mut self.buffer).await? == 0 {
            return Err(ZmtpError::Closed);
        }
        self.last_heard = Instant::now();
        self.pinged = false;
        Ok(())
    }

    /// Takes the next frame off the buffer, if it is there whole.
    fn next_frame(&mut self) -> Result<Option<Frame>, ZmtpError> {
        take_frame(&mut self.buffer)
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Frame {
    flags: u8,
    body: Bytes,
}

/// Takes one frame off the front of `buffer`, if it is there whole.
fn take_frame(buffer: &mut BytesMut) -> Result<Option<Frame>, ZmtpError> {
    let Some((flags, rest)) = buffer.split_first() else {
        return Ok(None);
    };
    let flags = *flags;
    if flags & !(FLAG_MORE | FLAG_LONG | FLAG_COMMAND) != 0 {
        return Err(ZmtpError::Protocol);
    }
    let (len, head) = if flags & FLAG_LONG == 0 {
        match rest.first() {
            Some(len) => (usize::from(*len), 2),
            None => return Ok(None),
        }
    } else {
        match rest.first_chunk::<8>() {
            Some(len) => {
                let len = u64::from_be_bytes(*len);
                (usize::try_from(len).map_err(|_| ZmtpError::OverLimit)?, 9)
            }
            None => return Ok(None),
        }
    };
    if len > MESSAGE_BYTES_MAX {
        return Err(ZmtpError::OverLimit);
    }
    if buffer.len() < head + len {
        return Ok(None);
    }
    buffer.advance(head);
    // A copy, so that a small message does not keep a large buffer alive.
    let body = Bytes::copy_from_slice(buffer.get(..len).unwrap_or(&[]));
    buffer.advance(len);
    Ok(Some(Frame { flags, body }))
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "the tests' own small numbers")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn frames_of_both_lengths_are_taken_whole() {
        for len in [0, 1, 255, 256, 70_000] {
            let body = vec![7; len];
            let mut bytes = BytesMut::new();
            if len < 256 {
                bytes.extend_from_slice(&[FLAG_MORE, len as u8]);
            } else {
                bytes.extend_from_slice(&[FLAG_LONG]);
                bytes.extend_from_slice(&(len as u64).to_be_bytes());
            }
            bytes.extend_from_slice(&body);
            let whole = bytes.clone();
            for cut in [0, 1, whole.len() - 1].into_iter().filter(|cut| *cut < whole.len()) {
                assert_eq!(take_frame(&mut BytesMut::from(&whole[..cut])).unwrap(), None);
            }
            let frame = take_frame(&mut bytes).unwrap().unwrap();
            assert_eq!(frame.body, body);
            assert!(bytes.is_empty());
        }
    }

    #[test]
    fn a_hostile_length_is_refused_at_once() {
        let mut bytes = BytesMut::from(&[FLAG_LONG, 0x7f, 255, 255, 255, 255, 255, 255, 255][..]);
        assert!(matches!(take_frame(&mut bytes), Err(ZmtpError::OverLimit)));
    }

    proptest! {
        #[test]
        fn taking_frames_is_total(bytes: Vec<u8>) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = take_frame(&mut buffer) {}
        }
    }
}
