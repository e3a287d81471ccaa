//! Load: requests in a closed loop over kept-alive connections, from one thread,
//! each answer checked, and the processor time of whatever serves them.
//!
//! A closed loop sends the next request when the last one is answered, so nothing
//! queues but what the connections themselves make queue. What is compared takes
//! turns at the same requests ([`Connection::send`]), or at slices of them
//! ([`at_once`]): then whatever else the machine does hits all alike.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{HeaderMap, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Longest time for one answer. The slowest of what is measured takes 2 s for
/// 1 MB alone, and 16 times that if 16 are asked at once.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// Longest answer that is read, in bytes.
const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Ticks of a second in `/proc`, on every architecture that Linux has today.
const TICKS_PER_SECOND: u64 = 100;

/// What is wrong with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// No connection, or one that broke.
    Connection,
    /// Not whole in [`ANSWER_WITHIN`].
    TimedOut,
    /// A status that is not 200.
    Status(u16),
    /// 200, but not what was asked for; a word for it.
    Wrong(&'static str),
}

impl std::fmt::Display for Fault {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Connection => formatter.write_str("connection failed"),
            Self::TimedOut => write!(formatter, "no answer within {ANSWER_WITHIN:?}"),
            Self::Status(status) => write!(formatter, "status {status}"),
            Self::Wrong(what) => write!(formatter, "wrong answer: {what}"),
        }
    }
}

impl std::error::Error for Fault {}

/// A request, ready to be sent any number of times.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// Path.
    pub path: &'static str,
    /// Headers beside `host` and `content-type`.
    pub headers: Vec<(&'static str, String)>,
    /// JSON.
    pub body: Bytes,
}

impl Outgoing {
    /// A chat request.
    #[must_use]
    pub fn chat(body: Bytes) -> Self {
        Self { path: "/v1/chat/completions", headers: Vec::new(), body }
    }
}

/// An answer with status 200.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
    /// From just before the request is written until the last byte is read.
    pub took: Duration,
}

impl Answer {
    /// A header as text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// A kept-alive connection.
pub struct Connection {
    address: String,
    sender: SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
}

impl Connection {
    /// Connects to `ip:port`.
    ///
    /// # Errors
    ///
    /// [`Fault::Connection`].
    pub async fn open(address: &str) -> Result<Self, Fault> {
        let stream = TcpStream::connect(address).await.map_err(|_| Fault::Connection)?;
        stream.set_nodelay(true).map_err(|_| Fault::Connection)?;
        let (sender, connection) =
            handshake(TokioIo::new(stream)).await.map_err(|_| Fault::Connection)?;
        // How it ended shows in the next request.
        let driver = tokio::spawn(async move { drop(connection.await) });
        Ok(Self { address: address.to_owned(), sender, driver })
    }

    /// Sends a request and reads its answer.
    ///
    /// # Errors
    ///
    /// [`Fault`], for anything but a whole 200.
    pub async fn send(&mut self, outgoing: &Outgoing) -> Result<Answer, Fault> {
        let mut request = Request::post(outgoing.path)
            .header("host", &self.address)
            .header("content-type", "application/json");
        for (name, value) in &outgoing.headers {
            request = request.header(*name, value);
        }
        let body = Full::new(outgoing.body.clone());
        let request = request.body(body).map_err(|_| Fault::Wrong("request"))?;
        let started = Instant::now();
        let exchange = async {
            self.sender.ready().await.map_err(|_| Fault::Connection)?;
            let response =
                self.sender.send_request(request).await.map_err(|_| Fault::Connection)?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
            Ok((head, body.map_err(|_| Fault::Connection)?.to_bytes()))
        };
        let (head, body) =
            timeout(ANSWER_WITHIN, exchange).await.map_err(|_| Fault::TimedOut)??;
        let took = started.elapsed();
        if head.status == StatusCode::OK {
            Ok(Answer { headers: head.headers, body, took })
        } else {
            Err(Fault::Status(head.status.as_u16()))
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// What came of a slice of requests.
#[derive(Debug, Default)]
pub struct Slice {
    /// How long each right answer took.
    pub times: Times,
    /// Why others were not, in the order they came.
    pub faults: Vec<Fault>,
    /// From the first request to the last answer.
    pub took: Duration,
}

/// Sends `requests` over all `connections` at once, each of them in a closed loop.
///
/// - `check`: whether the answer to the request at a position is right.
pub async fn at_once(
    connections: &mut [Connection],
    requests: &[Outgoing],
    check: impl Fn(usize, &Answer) -> Result<(), Fault>,
) -> Slice {
    let started = Instant::now();
    let queue = RefCell::new(requests.iter().enumerate());
    let slice = RefCell::new(Slice::default());
    join_all(connections.iter_mut().map(async |connection| {
        loop {
            let next = queue.borrow_mut().next();
            let Some((position, request)) = next else { break };
            let answer = connection.send(request).await;
            let checked = answer.and_then(|answer| check(position, &answer).map(|()| answer));
            match checked {
                Ok(answer) => slice.borrow_mut().times.push(answer.took),
                Err(fault) => slice.borrow_mut().faults.push(fault),
            }
        }
    }))
    .await;
    let mut slice = slice.into_inner();
    slice.took = started.elapsed();
    slice
}

/// Times of many answers.
#[derive(Clone, Debug, Default)]
pub struct Times {
    sorted: bool,
    ms: Vec<f64>,
}

impl Times {
    /// Adds one.
    pub fn push(&mut self, took: Duration) {
        self.ms.push(took.as_secs_f64() * 1000.0);
        self.sorted = false;
    }

    /// Adds all of another's.
    pub fn extend(&mut self, other: &Self) {
        self.ms.extend_from_slice(&other.ms);
        self.sorted = false;
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.ms.len()
    }

    /// The time that a share of the answers was not slower than, in milliseconds;
    /// `None` if there is none.
    ///
    /// - `share`: 0.5 for the median, 0.99 for p99.
    pub fn percentile(&mut self, share: f64) -> Option<f64> {
        if !self.sorted {
            self.ms.sort_by(f64::total_cmp);
            self.sorted = true;
        }
        let last = self.ms.len().checked_sub(1)?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a position in a list"
        )]
        let position = ((last as f64) * share.clamp(0.0, 1.0)).round() as usize;
        self.ms.get(position).copied()
    }
}

/// Processor time that processes have taken so far, over all threads that they
/// have now, in nanoseconds. Zero where Linux does not tell.
///
/// The scheduler's count is exact to the nanosecond; the other one, for kernels
/// that lack it, to a hundredth of a second.
#[must_use]
pub fn cpu_ns(processes: &[u32]) -> u64 {
    processes.iter().map(|id| scheduled_ns(*id).unwrap_or_else(|| ticks_ns(*id))).sum()
}

fn scheduled_ns(process: u32) -> Option<u64> {
    let mut sum = 0;
    for thread in std::fs::read_dir(format!("/proc/{process}/task")).ok()? {
        // A thread may end between the two looks.
        let path = thread.ok()?.path().join("schedstat");
        let Ok(line) = std::fs::read_to_string(path) else { continue };
        sum += line.split_whitespace().next()?.parse::<u64>().ok()?;
    }
    (sum > 0).then_some(sum)
}

fn ticks_ns(process: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The second field is a name in parentheses, which may have spaces in it.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks: u64 = ticks.filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    ticks * (1_000_000_000 / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::routing::post;
    use tokio::net::TcpListener;

    use super::*;

    /// Answers with what it was sent, but refuses `bad`.
    async fn echo() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let route = post(async |body: Bytes| {
            let status = if body == "bad" { StatusCode::BAD_REQUEST } else { StatusCode::OK };
            (status, body)
        });
        let router = Router::new().route("/v1/chat/completions", route);
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    }

    #[tokio::test]
    async fn every_request_of_a_slice_is_sent_once_and_checked() {
        let address = echo().await;
        let mut connections = Vec::new();
        for _ in 0..3 {
            connections.push(Connection::open(&address).await.unwrap());
        }
        let mut requests: Vec<Outgoing> =
            (0..20).map(|at| Outgoing::chat(at.to_string().into())).collect();
        requests.push(Outgoing::chat("bad".into()));
        let seen = RefCell::new(Vec::new());
        let slice = at_once(&mut connections, &requests, |at, answer| {
            seen.borrow_mut().push(at);
            if answer.body == at.to_string() && at != 7 { Ok(()) } else { Err(Fault::Wrong("7")) }
        })
        .await;
        seen.borrow_mut().sort_unstable();
        assert_eq!(seen.into_inner(), (0..20).collect::<Vec<_>>());
        assert_eq!(slice.times.count(), 19);
        let mut faults = slice.faults;
        faults.sort_by_key(|fault| matches!(fault, Fault::Status(_)));
        assert_eq!(faults, [Fault::Wrong("7"), Fault::Status(400)]);
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_a_fault() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        assert_eq!(Connection::open(&address).await.err(), Some(Fault::Connection));
    }

    #[test]
    fn percentiles_are_of_sorted_times() {
        let mut times = Times::default();
        assert_eq!(times.percentile(0.5), None);
        for ms in [30, 10, 20, 50, 40] {
            times.push(Duration::from_millis(ms));
        }
        let at = |times: &mut Times, share| times.percentile(share).unwrap().round();
        assert_eq!([0.0, 0.5, 0.99, 1.0].map(|share| at(&mut times, share)), [10., 30., 50., 50.]);
        let mut more = Times::default();
        more.push(Duration::from_millis(1));
        times.extend(&more);
        assert_eq!((at(&mut times, 0.0), times.count()), (1.0, 6));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn processor_time_grows_with_work() {
        let own = [std::process::id()];
        let before = cpu_ns(&own);
        let started = Instant::now();
        let mut sum = 0_u64;
        while started.elapsed() < Duration::from_millis(60) {
            sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(7));
        }
        let spent = cpu_ns(&own) - before;
        // Other threads of the test program may add to it, a busy machine take away.
        assert!(spent > 2_000_000, "{spent}");
        assert_eq!(cpu_ns(&[]), 0);
    }
}
