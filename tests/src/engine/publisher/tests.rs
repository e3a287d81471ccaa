//! Tests of the publisher over real sockets on loopback.

use zeromq::{DealerSocket, SubSocket};

use super::*;

async fn publisher(topic: &str, buffer_steps: usize, replay_has_topic: bool) -> Publisher {
    let config = PublisherConfig {
        events_port: 0,
        replay_port: 0,
        topic: topic.into(),
        buffer_steps,
        replay_has_topic,
    };
    Publisher::start(config).await.unwrap()
}

/// A subscriber that is known to be subscribed: batches are published until
/// the first arrives. Returns the number of the next batch.
async fn subscribe(publisher: &Publisher) -> SubSocket {
    let mut socket = SubSocket::new();
    socket.connect(&format!("tcp://127.0.0.1:{}", publisher.events_port)).await.unwrap();
    socket.subscribe("").await.unwrap();
    loop {
        publisher.publish(b"probe".to_vec());
        let wait = Duration::from_millis(20);
        if tokio::time::timeout(wait, socket.recv()).await.is_ok() {
            break;
        }
    }
    // Probes published before the first that arrived are gone; the rest queue.
    let last = publisher.next_sequence() - 1;
    publisher.publish(b"end of probes".to_vec());
    loop {
        let (sequence, payload) = receive(&mut socket).await;
        if payload == b"end of probes" {
            assert_eq!(sequence, last + 1);
            return socket;
        }
    }
}

async fn receive(socket: &mut SubSocket) -> (u64, Vec<u8>) {
    let message = within(socket.recv()).await.unwrap();
    let frames: Vec<&[u8]> = message.iter().map(AsRef::as_ref).collect();
    let [_, sequence, payload] = frames.as_slice() else {
        panic!("{frames:?}");
    };
    (u64::from_be_bytes((*sequence).try_into().unwrap()), payload.to_vec())
}

async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(10), future).await.expect("in ten seconds")
}

/// Asks for a replay and returns the reply's messages after the empty frame,
/// end marker included.
async fn replay(publisher: &Publisher, start: u64) -> Vec<Vec<Vec<u8>>> {
    let mut socket = DealerSocket::new();
    socket.connect(&format!("tcp://127.0.0.1:{}", publisher.replay_port)).await.unwrap();
    socket.send(frames(vec![Vec::new(), start.to_be_bytes().to_vec()])).await.unwrap();
    let mut messages = Vec::new();
    loop {
        let message = within(socket.recv()).await.unwrap();
        let mut parts = message.iter().map(|frame| frame.to_vec());
        assert_eq!(parts.next(), Some(Vec::new()), "the delimiter comes first");
        let parts: Vec<Vec<u8>> = parts.collect();
        let ended = parts.last().is_some_and(Vec::is_empty);
        messages.push(parts);
        if ended {
            return messages;
        }
    }
}

fn kept(topic: &[u8], sequence: u64, payload: &[u8]) -> Vec<Vec<u8>> {
    vec![topic.to_vec(), sequence.to_be_bytes().to_vec(), payload.to_vec()]
}

/// Frames of a live message, and of replies with and without topic, as the
/// captures have them.
#[tokio::test]
async fn replay_has_the_captured_framing() {
    let publisher = publisher("kv@x", 2, true).await;
    for payload in [b"a", b"b", b"c"] {
        publisher.publish(payload.to_vec());
    }
    let end = vec![Vec::new(), END_SEQUENCE.to_vec(), Vec::new()];
    assert_eq!(
        replay(&publisher, 0).await,
        [kept(b"kv@x", 1, b"b"), kept(b"kv@x", 2, b"c"), end.clone()],
        "only the last two are kept"
    );
    assert_eq!(replay(&publisher, 2).await, [kept(b"kv@x", 2, b"c"), end.clone()]);
    assert_eq!(replay(&publisher, 1_000_000).await, [end]);
}

#[tokio::test]
async fn sglangs_replay_has_no_topic() {
    let publisher = publisher("t", 8, false).await;
    publisher.publish(b"a".to_vec());
    let number = 0_u64.to_be_bytes().to_vec();
    assert_eq!(
        replay(&publisher, 0).await,
        [vec![number, b"a".to_vec()], vec![END_SEQUENCE.to_vec(), Vec::new()]]
    );
}

/// Goal: a dropped batch leaves a gap live and none in the replay.
#[tokio::test]
async fn a_dropped_batch_can_be_replayed() {
    let publisher = publisher("", 1000, true).await;
    let mut socket = subscribe(&publisher).await;
    publisher.set(Fault::DropEvery(2)).await;
    let first = publisher.next_sequence();
    for number in 0..6_u8 {
        publisher.publish(vec![number]);
    }
    let odd = u64::from(first.is_multiple_of(2));
    let mut live = Vec::new();
    for _ in 0..3 {
        live.push(receive(&mut socket).await.0);
    }
    // Numbers whose successor is even are dropped, so even ones arrive.
    let expected: Vec<u64> = (first..first + 6).filter(|number| number % 2 == 0).collect();
    assert_eq!(live, expected, "odd={odd}");
    assert_eq!(replay(&publisher, first).await.len(), 6 + 1);
    assert_eq!(publisher.counters().dropped.load(Ordering::Relaxed), 3);
}

/// Goal: what was withheld arrives later, in order and without a gap.
#[tokio::test]
async fn paused_batches_arrive_on_resume() {
    let publisher = publisher("", 1000, true).await;
    let mut socket = subscribe(&publisher).await;
    let sent_before = publisher.counters().sent.load(Ordering::Relaxed);
    publisher.set(Fault::Pause(true)).await;
    let first = publisher.next_sequence();
    for number in 0..3_u8 {
        publisher.publish(vec![number]);
    }
    // A replay is answered after the batches before it, so they were seen.
    assert_eq!(replay(&publisher, first).await.len(), 3 + 1);
    assert_eq!(publisher.counters().sent.load(Ordering::Relaxed), sent_before);
    publisher.set(Fault::Pause(false)).await;
    for number in 0..3_u8 {
        let expected = (first + u64::from(number), vec![number]);
        assert_eq!(receive(&mut socket).await, expected);
    }
}

/// Goal: after a restart numbers begin at 0 on the same ports, and a
/// subscriber that was connected gets them after it has reconnected.
#[tokio::test]
async fn a_restart_begins_at_zero_on_the_same_ports() {
    let publisher = publisher("", 1000, true).await;
    let mut socket = subscribe(&publisher).await;
    let ports = (publisher.events_port, publisher.replay_port);
    publisher.restart().await.unwrap();

    assert_eq!(publisher.next_sequence(), 0);
    assert_eq!(replay(&publisher, 0).await.len(), 1, "nothing is kept but the end marker");
    publisher.publish(b"new".to_vec());
    assert_eq!(replay(&publisher, 0).await.len(), 2);
    assert_eq!((publisher.events_port, publisher.replay_port), ports);

    let seen = within(async {
        loop {
            let before = publisher.next_sequence();
            publisher.publish(b"again".to_vec());
            let wait = Duration::from_millis(20);
            if let Ok(message) = tokio::time::timeout(wait, socket.recv()).await {
                let message = message.unwrap();
                let number = message.iter().nth(1).map(|frame| frame.to_vec()).unwrap();
                return (u64::from_be_bytes(number.try_into().unwrap()), before);
            }
        }
    })
    .await;
    assert!(seen.0 <= seen.1, "{seen:?}");
}
