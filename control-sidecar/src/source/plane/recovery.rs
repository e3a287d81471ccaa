//! Recovery: asks workers for the history of their ranks.
//!
//! Dynamo's request plane answers in a roundabout way: a query goes to the
//! worker over one connection, and the worker calls back on another to say the
//! answer. So there is one listener for the whole sidecar, and a random subject
//! that ties each call to its query.
//!
//! # Invariants
//!
//! 1. A connection that does not name a subject under way gets nothing and is
//!    closed; subjects cannot be guessed.
//! 2. Never more than [`RECOVERY_QUERIES_MAX`] answers are in memory, none
//!    longer than [`RECOVERY_ANSWER_BYTES_MAX`], and memory grows only with what
//!    has come.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use core::fmt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use warmpath_core::ids::Worker;

use super::request::Request;
use crate::adapter::plane::PlaneError;
use crate::adapter::plane::answer::{Answer, decode_item};
use crate::fleet::RecoveryTarget;
use crate::limits::{
    CONNECT_TIMEOUT, RECONNECT_PAUSE, RECOVERY_ANSWER_BYTES_MAX, RECOVERY_BODY_BYTES_MAX,
    RECOVERY_CALLBACK_TIMEOUT, RECOVERY_CALLBACKS_MAX, RECOVERY_FRAMES_MAX,
    RECOVERY_HEADER_BYTES_MAX, RECOVERY_QUERIES_MAX, RECOVERY_TIMEOUT,
};
use crate::metrics::Metrics;

/// Why a query brought no answer. All are tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecoveryError {
    /// Not in time.
    Timeout,
    /// A connection was not to be had, or broke.
    Network(io::ErrorKind),
    /// The worker would not take the query, or could not work on it.
    Refused,
    /// A frame or the answer is above its limit.
    OverLimit,
    /// What came is not the request plane's.
    Protocol,
    /// The answer could not be read.
    Undecodable(PlaneError),
    /// The answer speaks of another rank.
    OtherWorker,
    /// The answer ended before it said anything.
    Empty,
    /// There is no randomness for a subject.
    NoRandomness,
}

impl RecoveryError {
    /// Fixed word for metrics.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Network(_) => "network",
            Self::Refused => "refused",
            Self::OverLimit => "over_limit",
            Self::Protocol => "protocol",
            Self::Undecodable(_) => "undecodable",
            Self::OtherWorker => "other_worker",
            Self::Empty => "empty",
            Self::NoRandomness => "no_randomness",
        }
    }
}

impl fmt::Display for RecoveryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Timeout => f.write_str("no answer in time"),
            Self::Network(kind) => write!(f, "network: {kind}"),
            Self::Refused => f.write_str("the worker refuses the query"),
            Self::OverLimit => f.write_str("the answer is above its limit"),
            Self::Protocol => f.write_str("the worker does not speak the request plane"),
            Self::Undecodable(error) => write!(f, "the answer cannot be read: {error}"),
            Self::OtherWorker => f.write_str("the answer speaks of another rank"),
            Self::Empty => f.write_str("the answer is empty"),
            Self::NoRandomness => f.write_str("there is no randomness for a subject"),
        }
    }
}

impl std::error::Error for RecoveryError {}

impl From<io::Error> for RecoveryError {
    fn from(error: io::Error) -> Self {
        Self::Network(error.kind())
    }
}

impl From<PlaneError> for RecoveryError {
    fn from(error: PlaneError) -> Self {
        Self::Undecodable(error)
    }
}

/// Queries that wait for a call, by subject.
type Waiting = Arc<Mutex<HashMap<String, oneshot::Sender<TcpStream>>>>;

/// Asks workers; one for the whole sidecar.
#[derive(Debug)]
pub struct Recovery {
    listen: SocketAddr,
    advertised: Option<String>,
    waiting: Waiting,
    permits: Semaphore,
    listener: AbortHandle,
}

impl Drop for Recovery {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

impl Recovery {
    /// Starts to listen for calls.
    ///
    /// - `listen`: address and port; port 0 for any.
    /// - `advertised`: `host:port` that workers are told to call; `None` for the
    ///   address by which a worker is reached from here, which is right unless
    ///   addresses are translated in between.
    ///
    /// # Errors
    ///
    /// If the address cannot be bound.
    pub async fn bind(
        listen: SocketAddr,
        advertised: Option<String>,
        metrics: Arc<Metrics>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        let listen = listener.local_addr()?;
        let waiting = Waiting::default();
        let task = tokio::spawn(accept(listener, Arc::clone(&waiting), metrics));
        let permits = Semaphore::new(RECOVERY_QUERIES_MAX);
        Ok(Self { listen, advertised, waiting, permits, listener: task.abort_handle() })
    }

    /// Asks for a rank's history. May be dropped at any point.
    ///
    /// - `start`: first event wanted; `None` for all that the rank holds.
    ///
    /// # Errors
    ///
    /// A [`RecoveryError`]; the caller tries again later.
    pub async fn query(
        &self,
        target: &RecoveryTarget,
        worker: Worker,
        start: Option<u64>,
    ) -> Result<Answer, RecoveryError> {
        // Waiting for others is not the worker's fault, so it has no timeout.
        let _permit = self.permits.acquire().await.map_err(|_| RecoveryError::Refused)?;
        timeout(RECOVERY_TIMEOUT, self.exchange(target, worker, start))
            .await
            .map_err(|_| RecoveryError::Timeout)?
    }

    async fn exchange(
        &self,
        target: &RecoveryTarget,
        worker: Worker,
        start: Option<u64>,
    ) -> Result<Answer, RecoveryError> {
        let (id, subject) = (random_name()?, random_name()?);
        let mut stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(&target.address))
            .await
            .map_err(|_| RecoveryError::Timeout)??;
        stream.set_nodelay(true)?;
        let address = self.address(&stream)?;
        let path = &target.path;
        let request =
            Request { path, id: &id, subject: &subject, address: &address, worker, start };
        let request = request.encode().ok_or(RecoveryError::OverLimit)?;
        let call = Call::expect(&self.waiting, subject);
        stream.write_all(&request).await?;
        if stream.read_u32().await? != 0 {
            // Its bytes say why, in words that are not ours to pass on.
            return Err(RecoveryError::Refused);
        }
        let mut answer = call.come().await?;
        let answer = read_answer(&mut answer).await?;
        if speaks_of(&answer, worker) { Ok(answer) } else { Err(RecoveryError::OtherWorker) }
    }

    /// Where the worker at the other end of `stream` is told to call.
    fn address(&self, stream: &TcpStream) -> io::Result<String> {
        if let Some(advertised) = &self.advertised {
            return Ok(advertised.clone());
        }
        if self.listen.ip().is_unspecified() {
            let ours = stream.local_addr()?.ip();
            return Ok(SocketAddr::new(ours, self.listen.port()).to_string());
        }
        Ok(self.listen.to_string())
    }
}

/// Whether all events of an answer are of one rank.
fn speaks_of(answer: &Answer, worker: Worker) -> bool {
    match answer {
        Answer::Events { events, .. } | Answer::Dump { events, .. } => {
            events.iter().all(|event| event.worker == worker)
        }
        Answer::TooNew { .. } | Answer::Refused(_) => true,
    }
}

/// A call that is expected; dropping it expects it no longer.
#[derive(Debug)]
struct Call {
    waiting: Waiting,
    subject: String,
    stream: oneshot::Receiver<TcpStream>,
}

impl Call {
    fn expect(waiting: &Waiting, subject: String) -> Self {
        let (sender, stream) = oneshot::channel();
        let waiting = Arc::clone(waiting);
        waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(subject.clone(), sender);
        Self { waiting, subject, stream }
    }

    async fn come(mut self) -> Result<TcpStream, RecoveryError> {
        (&mut self.stream).await.map_err(|_| RecoveryError::Refused)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.subject);
    }
}

/// Takes calls and hands each to the query that it names.
async fn accept(listener: TcpListener, waiting: Waiting, metrics: Arc<Metrics>) {
    let permits = Arc::new(Semaphore::new(RECOVERY_CALLBACKS_MAX));
    loop {
        let Ok((mut stream, _)) = listener.accept().await else {
            // Out of file descriptors, say: soon is not at once.
            sleep(RECONNECT_PAUSE.1).await;
            continue;
        };
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else {
            metrics.callback_refused("too_many");
            continue;
        };
        let (waiting, metrics) = (Arc::clone(&waiting), Arc::clone(&metrics));
        tokio::spawn(async move {
            let _permit = permit;
            match timeout(RECOVERY_CALLBACK_TIMEOUT, read_subject(&mut stream)).await {
                Ok(Ok(subject)) => {
                    let query =
                        waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&subject);
                    // A query that ended meanwhile needs no answer any more.
                    if query.is_none_or(|query| query.send(stream).is_err()) {
                        metrics.callback_refused("unknown_subject");
                    }
                }
                Ok(Err(error)) => metrics.callback_refused(error.reason()),
                Err(_) => metrics.callback_refused("timeout"),
            }
        });
    }
}

async fn read_subject(stream: &mut TcpStream) -> Result<String, RecoveryError> {
    let mut budget = RECOVERY_HEADER_BYTES_MAX;
    let frame = read_frame(stream, &mut budget).await?.ok_or(RecoveryError::Protocol)?;
    let header: serde_json::Value =
        serde_json::from_slice(&frame.header).map_err(|_| RecoveryError::Protocol)?;
    let subject = header.get("subject").and_then(serde_json::Value::as_str);
    subject.map(str::to_owned).ok_or(RecoveryError::Protocol)
}

/// Reads an answer, to its end.
async fn read_answer(stream: &mut (impl AsyncRead + Unpin)) -> Result<Answer, RecoveryError> {
    let mut budget = RECOVERY_ANSWER_BYTES_MAX;
    let mut answer = None;
    for _ in 0..RECOVERY_FRAMES_MAX {
        let Some(frame) = read_frame(stream, &mut budget).await? else {
            // An answer without its end may be half of one.
            return Err(RecoveryError::Network(io::ErrorKind::UnexpectedEof));
        };
        if !frame.header.is_empty() {
            match control(&frame.header)? {
                Control::Begin => {}
                Control::End => return answer.ok_or(RecoveryError::Empty),
            }
        }
        if frame.body.is_empty() {
            continue;
        }
        let item = decode_item(&frame.body)?;
        if item.answer.is_some() && answer.is_some() {
            return Err(RecoveryError::Protocol);
        }
        answer = answer.or(item.answer);
        if item.is_final {
            return answer.ok_or(RecoveryError::Empty);
        }
    }
    Err(RecoveryError::OverLimit)
}

/// What a header says.
enum Control {
    /// The answer follows.
    Begin,
    /// Nothing follows.
    End,
}

fn control(header: &[u8]) -> Result<Control, RecoveryError> {
    let header: serde_json::Value =
        serde_json::from_slice(header).map_err(|_| RecoveryError::Protocol)?;
    match header.as_str() {
        Some("sentinel") => return Ok(Control::End),
        Some(_) => return Err(RecoveryError::Refused),
        None => {}
    }
    match header.get("error") {
        Some(serde_json::Value::Null) => Ok(Control::Begin),
        Some(_) => Err(RecoveryError::Refused),
        None => Err(RecoveryError::Protocol),
    }
}

/// A frame of two parts.
#[derive(Debug, PartialEq, Eq)]
struct Frame {
    header: Vec<u8>,
    body: Vec<u8>,
}

/// Reads one frame; `None` if the stream ends before it. Its checksum is not
/// looked at: senders may leave it out, and TCP has its own.
async fn read_frame(
    stream: &mut (impl AsyncRead + Unpin),
    budget: &mut usize,
) -> Result<Option<Frame>, RecoveryError> {
    let header_len = match stream.read_u64().await {
        Ok(len) => len,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let body_len = stream.read_u64().await?;
    let _checksum = stream.read_u64().await?;
    let header = read_part(stream, header_len, RECOVERY_HEADER_BYTES_MAX, budget).await?;
    let body = read_part(stream, body_len, RECOVERY_BODY_BYTES_MAX, budget).await?;
    Ok(Some(Frame { header, body }))
}

async fn read_part(
    stream: &mut (impl AsyncRead + Unpin),
    len: u64,
    len_max: usize,
    budget: &mut usize,
) -> Result<Vec<u8>, RecoveryError> {
    let bytes = usize::try_from(len).map_err(|_| RecoveryError::OverLimit)?;
    *budget = budget.checked_sub(bytes).ok_or(RecoveryError::OverLimit)?;
    if bytes > len_max {
        return Err(RecoveryError::OverLimit);
    }
    let mut part = Vec::new();
    // Not reserved: the length is only believed as its bytes come.
    if stream.take(len).read_to_end(&mut part).await? < bytes {
        return Err(RecoveryError::Network(io::ErrorKind::UnexpectedEof));
    }
    Ok(part)
}

/// A name that nobody can guess, in the form of a UUID.
fn random_name() -> Result<String, RecoveryError> {
    let random = || getrandom::u64().map_err(|_| RecoveryError::NoRandomness);
    let (high, low) = (random()?, random()?);
    Ok(format!(
        "{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}",
        high >> 32,
        high >> 16 & 0xffff,
        high & 0xfff,
        low >> 48 & 0x3fff | 0x8000,
        low & 0xffff_ffff_ffff,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::tests::{fixture, hex};
    use proptest::prelude::*;
    use tokio::task::JoinHandle;
    use warmpath_core::ids::{DpRank, WorkerId};

    const WORKER: Worker = Worker { id: WorkerId(5_828_232_121_315_182_395), rank: DpRank(0) };

    fn frame(header: &str, body: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_be_bytes().to_vec();
        bytes.extend_from_slice(&(body.len() as u64).to_be_bytes());
        bytes.extend_from_slice(&7_u64.to_be_bytes());
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    /// The frames of a captured answer behind the one that names its subject.
    fn captured(query: usize) -> Vec<u8> {
        let capture = fixture("dynamo-1.6.1-kv-recovery-tcp.json");
        let frames = capture["queries"][query]["response_frames"].as_array().unwrap().clone();
        let bytes = frames[1..].iter().map(|it| {
            frame(it["header"].as_str().unwrap(), &hex(it["body_hex"].as_str().unwrap()))
        });
        bytes.collect::<Vec<_>>().concat()
    }

    /// What a stand-in worker does with a query.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Manner {
        /// Answers as the captured worker did.
        Captured(usize),
        /// Calls back with a subject that nobody waits for.
        OtherSubject,
        /// Says that it will not.
        Refuse,
        /// Closes in the middle of its answer.
        HangUp,
    }

    /// A worker for one query: reads it as the request plane's server does, and
    /// calls back.
    async fn worker(manner: Manner) -> (RecoveryTarget, JoinHandle<Option<u64>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let target = RecoveryTarget { address, path: "a1/ns/backend/query".to_owned() };
        let task = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut parts = Vec::new();
            for _ in 0..2 {
                let mut part = vec![0; usize::from(stream.read_u16().await.unwrap())];
                stream.read_exact(&mut part).await.unwrap();
                parts.push(String::from_utf8(part).unwrap());
            }
            assert_eq!(parts[0], "a1/ns/backend/query");
            stream.read_u32().await.unwrap();
            let mut budget = 1 << 20;
            let request = read_frame(&mut stream, &mut budget).await.unwrap().unwrap();
            let header: serde_json::Value = serde_json::from_slice(&request.header).unwrap();
            let info = header["connection_info"]["info"].as_str().unwrap();
            let info: serde_json::Value = serde_json::from_str(info).unwrap();
            if manner == Manner::Refuse {
                stream.write_all(&[0, 0, 0, 2, b'n', b'o']).await.unwrap();
                return None;
            }
            stream.write_all(&[0; 4]).await.unwrap();
            let subject = match manner {
                Manner::OtherSubject => "somebody-else",
                _ => info["subject"].as_str().unwrap(),
            };
            let mut call = TcpStream::connect(info["address"].as_str().unwrap()).await.unwrap();
            let hello = format!("{{\"subject\":\"{subject}\",\"stream_type\":\"response\"}}");
            call.write_all(&frame(&hello, b"")).await.unwrap();
            let mut answer = match manner {
                Manner::Captured(query) => captured(query),
                _ => captured(1),
            };
            if manner == Manner::HangUp {
                answer.truncate(500);
            }
            // A caller that nobody waits for is hung up on.
            let _ = call.write_all(&answer).await;
            let mut reader = crate::adapter::msgpack::Reader::new(&request.body);
            for _ in 0..reader.map().unwrap() {
                if reader.text().unwrap() == "start_event_id" {
                    return (!reader.nil().unwrap()).then(|| reader.u64().unwrap());
                }
                reader.skip().unwrap();
            }
            None
        });
        (target, task)
    }

    async fn recovery(metrics: &Arc<Metrics>) -> Recovery {
        let listen = "127.0.0.1:0".parse().unwrap();
        Recovery::bind(listen, None, Arc::clone(metrics)).await.unwrap()
    }

    #[tokio::test]
    async fn answers_come_on_calls() {
        let recovery = recovery(&Arc::new(Metrics::new())).await;
        for (query, start) in [(0, None), (1, Some(3)), (2, Some(1_000_000))] {
            let (target, asked) = worker(Manner::Captured(query)).await;
            let answer = recovery.query(&target, WORKER, start).await.unwrap();
            match (query, answer) {
                (0, Answer::Dump { events, last: 7 }) => assert_eq!(events.len(), 7),
                (1, Answer::Events { events, last: 7 }) => assert_eq!(events.len(), 5),
                (2, Answer::TooNew { newest: 7 }) => {}
                (_, answer) => panic!("{answer:?}"),
            }
            assert_eq!(asked.await.unwrap(), start);
        }
        assert!(recovery.waiting.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_goes_wrong_is_an_error_and_leaves_nothing_behind() {
        let metrics = Arc::new(Metrics::new());
        let recovery = recovery(&metrics).await;
        let eof = RecoveryError::Network(io::ErrorKind::UnexpectedEof);
        for (manner, error) in [(Manner::Refuse, RecoveryError::Refused), (Manner::HangUp, eof)] {
            let (target, _worker) = worker(manner).await;
            assert_eq!(recovery.query(&target, WORKER, None).await, Err(error));
        }
        let (target, _worker) = worker(Manner::Captured(0)).await;
        let other = Worker { rank: DpRank(1), ..WORKER };
        let outcome = recovery.query(&target, other, None).await;
        assert_eq!(outcome, Err(RecoveryError::OtherWorker));
        // Nobody listens there any more.
        assert!(matches!(
            recovery.query(&target, WORKER, None).await,
            Err(RecoveryError::Network(_))
        ));
        assert!(recovery.waiting.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_call_that_nobody_waits_for_is_refused() {
        let metrics = Arc::new(Metrics::new());
        let recovery = recovery(&metrics).await;
        let (target, called) = worker(Manner::OtherSubject).await;
        tokio::select! {
            outcome = recovery.query(&target, WORKER, None) => panic!("{outcome:?}"),
            _ = called => {}
        }
        assert!(recovery.waiting.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn lengths_are_not_believed() {
        for lens in [[u64::MAX, 0], [0, u64::MAX], [RECOVERY_HEADER_BYTES_MAX as u64 + 1, 0]] {
            let mut bytes = lens[0].to_be_bytes().to_vec();
            bytes.extend_from_slice(&lens[1].to_be_bytes());
            bytes.extend_from_slice(&[0; 8]);
            let outcome = read_answer(&mut &bytes[..]).await;
            assert_eq!(outcome, Err(RecoveryError::OverLimit));
        }
        let many = frame("{\"error\":null}", b"").repeat(RECOVERY_FRAMES_MAX + 1);
        assert_eq!(read_answer(&mut &many[..]).await, Err(RecoveryError::OverLimit));
        let failed = frame("{\"error\":\"no\"}", b"");
        assert_eq!(read_answer(&mut &failed[..]).await, Err(RecoveryError::Refused));
        let empty = frame("\"sentinel\"", b"");
        assert_eq!(read_answer(&mut &empty[..]).await, Err(RecoveryError::Empty));
    }

    #[test]
    fn names_are_uuids_and_differ() {
        let (one, other) = (random_name().unwrap(), random_name().unwrap());
        assert_eq!((one.len(), one.get(14..15)), (36, Some("4")));
        assert_ne!(one, other);
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
    }

    proptest! {
        #[test]
        fn reading_answers_is_total(bytes: Vec<u8>) {
            let _ = run(read_answer(&mut &bytes[..]));
        }

        /// Goal: an answer that is cut is never taken for a whole one.
        #[test]
        fn a_cut_answer_is_an_error(query in 0_usize..3, cut: prop::sample::Index) {
            let whole = captured(query);
            // The last frame says once more what the one before it did.
            let end = whole.len() - frame("\"sentinel\"", b"").len();
            let bytes = &whole[..cut.index(end)];
            prop_assert!(run(read_answer(&mut &bytes[..])).is_err());
        }
    }
}
