//! Flow: small requests at a steady rate on one connection, by a thread of its
//! own, and how long each took.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time between two requests.
const EVERY: Duration = Duration::from_millis(3);

/// Longest wait for an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Longest answer, in bytes.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// What the thread tells.
#[derive(Debug, Default)]
struct Told {
    stop: AtomicBool,
    took_ms: Mutex<Vec<f64>>,
    failure: Mutex<Option<String>>,
}

/// The running requests.
pub(super) struct Flow {
    told: Arc<Told>,
    thread: JoinHandle<()>,
}

impl Flow {
    /// Starts it.
    pub(super) fn start(address: String, body: &[u8]) -> Self {
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let request = [head.as_bytes(), body].concat();
        let told = Arc::new(Told::default());
        let own = Arc::clone(&told);
        let thread = std::thread::spawn(move || {
            if let Err(error) = run(&address, &request, &own) {
                *own.failure.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some(error.to_string());
            }
        });
        Self { told, thread }
    }

    /// Times of the requests since this was last asked, in milliseconds,
    /// ascending.
    pub(super) fn take(&self) -> Vec<f64> {
        let mut took =
            core::mem::take(&mut *self.told.took_ms.lock().unwrap_or_else(PoisonError::into_inner));
        took.sort_by(f64::total_cmp);
        took
    }

    /// Ends it; an error is the first request that was not answered with 200.
    pub(super) fn stop(self) -> Result<(), String> {
        self.told.stop.store(true, Ordering::Release);
        self.thread.join().map_err(|_| "the thread of the requests died".to_owned())?;
        let mut failure = self.told.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.take().map_or(Ok(()), Err)
    }
}

fn run(address: &str, request: &[u8], told: &Told) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER_WITHIN))?;
    let mut next = Instant::now();
    let mut answer = Vec::new();
    while !told.stop.load(Ordering::Acquire) {
        let now = Instant::now();
        if let Some(left) = next.checked_duration_since(now) {
            std::thread::sleep(left);
        }
        next = next.max(now) + EVERY;
        let started = Instant::now();
        stream.write_all(request)?;
        read_answer(&mut stream, &mut answer)?;
        let took_ms = started.elapsed().as_secs_f64() * 1e3;
        told.took_ms.lock().unwrap_or_else(PoisonError::into_inner).push(took_ms);
    }
    Ok(())
}

/// Reads one whole answer, which must be a 200 with a length.
fn read_answer(stream: &mut TcpStream, answer: &mut Vec<u8>) -> std::io::Result<()> {
    answer.clear();
    let mut piece = [0; 4096];
    while length(answer).is_none_or(|length| answer.len() < length) {
        let count = stream.read(&mut piece)?;
        if count == 0 || answer.len() > ANSWER_BYTES_MAX {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        answer.extend_from_slice(piece.get(..count).unwrap_or_default());
    }
    if answer.starts_with(b"HTTP/1.1 200 ") {
        return Ok(());
    }
    let text = String::from_utf8_lossy(answer);
    Err(std::io::Error::other(text.lines().next().unwrap_or_default().to_owned()))
}

/// Length of an answer with its headers; `None` while they are not all there.
fn length(answer: &[u8]) -> Option<usize> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(answer.get(..end)?).ok()?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    Some(end + 4 + length.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answers_length_is_that_of_head_and_body() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc";
        assert_eq!(length(answer), Some(answer.len()));
        assert_eq!(length(&answer[..20]), None);
    }
}
