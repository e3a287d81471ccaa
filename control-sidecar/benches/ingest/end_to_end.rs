//! End to end: a publisher of another implementation on a thread of its own, real
//! sockets, a whole sidecar, its log.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::sleep;
use warmpath_sidecar::config::{Config, Overrides};
use warmpath_sidecar::run::Sidecar;
use zeromq::{PubSocket, Socket, SocketSend, ZmqMessage};

use crate::payloads::{BLOCK_SIZE, CACHE_BLOCKS, Traffic};

/// Most messages between the publisher and the state: it drops what its queue of
/// 100 000 cannot take, as every publisher does, and that would be measured as a
/// repair.
const MESSAGES_AHEAD_MAX: u64 = 20_000;

/// Pause between two looks at how far the state is.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Longest run.
const PATIENCE: Duration = Duration::from_secs(300);

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/tiny");

/// What the publisher's thread is told.
struct Control {
    /// The sidecar has heard of the publisher: traffic may begin.
    heard: AtomicBool,
    /// Messages that the state has applied.
    applied: AtomicU64,
    /// Number of the last message, when all are sent.
    last: AtomicU64,
}

/// Whole cycles until `block_events` have passed; block events a second.
pub(crate) fn run(traffic: &Traffic, block_events: u64) -> f64 {
    let cycles = block_events.div_ceil(traffic.cycle_events);
    let control = Arc::new(Control {
        heard: AtomicBool::new(false),
        applied: AtomicU64::new(0),
        last: AtomicU64::new(u64::MAX),
    });
    let (port, bound) = oneshot::channel();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let seconds = std::thread::scope(|scope| {
        let for_publisher = Arc::clone(&control);
        scope.spawn(move || publisher(traffic, cycles, &for_publisher, port));
        runtime.block_on(async {
            let port = bound.await.expect("a publisher");
            sidecar(traffic, cycles, &control, port).await
        })
    });
    (traffic.first_events + cycles * traffic.cycle_events) as f64 / seconds
}

/// Publishes; the only thing on its thread.
fn publisher(traffic: &Traffic, cycles: u64, control: &Control, port: oneshot::Sender<u16>) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut socket = PubSocket::new();
        let endpoint = socket.bind("tcp://127.0.0.1:0").await.expect("a free port").to_string();
        let own = endpoint.rsplit_once(':').expect("a port").1.parse().expect("a port");
        port.send(own).expect("somebody listens");
        let mut number = 0;
        // What is published before the subscription stands is dropped.
        let nothing = Bytes::from_static(&[0x93, 0x01, 0x90, 0x00]);
        while !control.heard.load(Ordering::Acquire) {
            publish(&mut socket, &mut number, nothing.clone()).await;
            sleep(LOOK_EVERY).await;
        }
        let repeated = (0..cycles).flat_map(|_| &traffic.cycle);
        for payload in traffic.first.iter().chain(repeated) {
            while number > control.applied.load(Ordering::Acquire) + MESSAGES_AHEAD_MAX {
                sleep(LOOK_EVERY).await;
            }
            publish(&mut socket, &mut number, payload.clone()).await;
            if number.is_multiple_of(64) {
                // The socket's own tasks run on this thread, too.
                tokio::task::yield_now().await;
            }
        }
        control.last.store(number - 1, Ordering::Release);
        while control.applied.load(Ordering::Acquire) < number {
            sleep(LOOK_EVERY).await;
        }
    });
}

async fn publish(socket: &mut PubSocket, number: &mut u64, payload: Bytes) {
    let mut message = ZmqMessage::from(Bytes::new());
    message.push_back(Bytes::copy_from_slice(&number.to_be_bytes()));
    message.push_back(payload);
    socket.send(message).await.expect("published");
    *number += 1;
}

/// Runs the sidecar until it has applied everything; returns the time from the
/// first message of the traffic on, in seconds.
async fn sidecar(traffic: &Traffic, cycles: u64, control: &Control, port: u16) -> f64 {
    let sidecar = Sidecar::start(config(port)).await.expect("starts");
    let deadline = Instant::now() + PATIENCE;
    let mut started = None;
    let worker = loop {
        assert!(Instant::now() < deadline, "never done");
        let worker = page(&sidecar).await["workers"][0].clone();
        if let Some(applied) = worker["last_engine_sequence"].as_u64() {
            started.get_or_insert_with(Instant::now);
            control.applied.store(applied + 1, Ordering::Release);
            control.heard.store(true, Ordering::Release);
            if applied == control.last.load(Ordering::Acquire) {
                break worker;
            }
        }
        sleep(LOOK_EVERY).await;
    };
    let seconds = started.expect("began").elapsed().as_secs_f64();
    assert_eq!(worker["blocks"].as_u64(), Some(traffic.held.len() as u64), "{worker}");
    assert_eq!(worker["parity"], "exact");
    assert_eq!(worker["source"]["gaps"], 0, "{worker}");
    assert_eq!(worker["last_clear"], serde_json::Value::Null, "{worker}");
    let metrics = get(&sidecar, "/metrics").await;
    let counted = |name: &str| {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)).expect("a metric");
        line.trim().parse::<u64>().expect("a number")
    };
    let half = cycles * traffic.cycle_events / 2;
    assert_eq!(counted("warmpath_blocks_stored_total"), traffic.first_events + half);
    assert_eq!(counted("warmpath_blocks_removed_total"), half);
    assert!(counted("warmpath_feed_sequence") > 0, "the log is written");
    sidecar.stop().await;
    seconds
}

fn config(port: u16) -> Config {
    let text = format!(
        "feed: {{listen: \"127.0.0.1:0\"}}\n\
         status: {{listen: \"127.0.0.1:0\"}}\n\
         models: [{{name: tiny, directory: {MODEL:?}, block_size: {BLOCK_SIZE}}}]\n\
         workers: [{{id: 7, model: tiny, endpoint: \"127.0.0.1:9\", \
         kv_events: \"tcp://127.0.0.1:{port}\", total_kv_blocks: {CACHE_BLOCKS}}}]\n"
    );
    Config::parse(&text, std::path::Path::new("."), &Overrides::default()).expect("valid")
}

async fn page(sidecar: &Sidecar) -> serde_json::Value {
    serde_json::from_str(&get(sidecar, "/v1/state").await).expect("JSON")
}

async fn get(sidecar: &Sidecar, path: &str) -> String {
    let mut stream = TcpStream::connect(sidecar.status).await.expect("the status server");
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    answer.split_once("\r\n\r\n").expect("a body").1.to_owned()
}
