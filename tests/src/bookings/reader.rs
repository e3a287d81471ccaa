//! Reader: follows the ring log through the gateway's reader listener.

use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use warmpath_core::wire::Reader as Wire;

use super::ledger::Ledger;

/// Where a follower of the log stands.
pub struct Reader {
    address: String,
    sender: Option<SendRequest<Empty<Bytes>>>,
    next: u64,
    /// Number of the log's newest entry when it was last looked at.
    pub head: u64,
    /// Entries that had left the log before they were read.
    pub missed: u64,
}

impl Reader {
    /// A follower from the log's first entry on.
    #[must_use]
    pub fn new(address: String) -> Self {
        Self { address, sender: None, next: 1, head: 0, missed: 0 }
    }

    /// Reads what is new into the ledger. Returns how many entries that were;
    /// `None` if the log cannot be read now.
    pub async fn read(&mut self, ledger: &mut Ledger) -> Option<u64> {
        let answer = self.ask().await;
        if answer.is_none() {
            self.sender = None;
        }
        let answer = answer?;
        let mut wire = Wire::new(&answer);
        self.head = wire.u64().ok()?;
        let first = wire.u64().ok()?;
        if self.next < first && self.next <= self.head {
            self.missed += first - self.next;
            self.next = first;
        }
        let mut count = 0;
        while !wire.is_empty() {
            let len = usize::try_from(wire.u32().ok()?).ok()?;
            ledger.apply(wire.take(len).ok()?);
            count += 1;
        }
        self.next += count;
        Some(count)
    }

    /// Reads until nothing is new.
    pub async fn read_all(&mut self, ledger: &mut Ledger) -> Option<()> {
        while self.read(ledger).await? > 0 {}
        Some(())
    }

    /// Entries that are not read yet, as far as is known.
    #[must_use]
    pub fn behind(&self) -> u64 {
        (self.head + 1).saturating_sub(self.next)
    }

    async fn ask(&mut self) -> Option<Bytes> {
        if self.sender.as_ref().is_none_or(SendRequest::is_closed) {
            let stream = TcpStream::connect(&self.address).await.ok()?;
            let (sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
            tokio::spawn(connection);
            self.sender = Some(sender);
        }
        let sender = self.sender.as_mut()?;
        sender.ready().await.ok()?;
        let request = Request::get(format!("/{}", self.next)).header("host", "reader");
        let response = sender.send_request(request.body(Empty::new()).ok()?).await.ok()?;
        let is_fine = response.status().is_success();
        let body = response.into_body().collect().await.ok()?.to_bytes();
        is_fine.then_some(body)
    }
}
