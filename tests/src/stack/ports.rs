//! Ports of 127.0.0.1 for servers that must be told theirs.
//!
//! The system hands out ports of one range to whoever connects or asks for any
//! port. One that was free in there may be somebody's by the time a server binds
//! it, or while a server restarts; these come from below that range.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU16, Ordering};

/// Where the system's range is told, on Linux.
const SYSTEM_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// Where it starts if that is not told, or leaves too little below it.
const SYSTEM_FIRST: u16 = 32_768;
/// Fewest ports below it that are enough.
const PORTS_MIN: u16 = 8_192;
/// Below are more ports that well-known services have.
const FIRST: u16 = 10_000;
/// Ports that a process looks at before it gives up, and that lie between the
/// first ones of two processes with consecutive numbers.
const TRIED_MAX: u16 = 64;

/// A port below the system's range that is free now, and that no other call in
/// this process has had.
///
/// # Errors
///
/// If there is none among the 64 that it looks at.
pub fn free_port() -> std::io::Result<u16> {
    static CALLS: AtomicU16 = AtomicU16::new(0);
    let ports = system_first() - FIRST;
    let start = std::process::id().wrapping_mul(u32::from(TRIED_MAX)) % u32::from(ports);
    let mut failure = std::io::ErrorKind::AddrInUse.into();
    for _ in 0..TRIED_MAX {
        let call = u32::from(CALLS.fetch_add(1, Ordering::Relaxed));
        let offset = (start + call) % u32::from(ports);
        let port = FIRST + u16::try_from(offset).unwrap_or(0);
        match TcpListener::bind(("127.0.0.1", port)) {
            Ok(_) => return Ok(port),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// The first port that the system hands out.
fn system_first() -> u16 {
    let range = std::fs::read_to_string(SYSTEM_RANGE).unwrap_or_default();
    let first = range.split_whitespace().next().and_then(|port| port.parse().ok());
    first.filter(|&first| first >= FIRST + PORTS_MIN).unwrap_or(SYSTEM_FIRST)
}
