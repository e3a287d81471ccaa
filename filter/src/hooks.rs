//! Hooks: what tests need and no shipped module has (feature `test-hooks`).
//!
//! - A request with the header `x-test-crash-vm` crashes the VM.
//! - A plugin configured as [`RING_READER`], with the `vm_id` of the plugin that
//!   routes, answers requests with the ring log: the one place where the order of
//!   all VMs' bookings can be seen.

use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;
use warmpath_core::ring::{Read, Ring};
use warmpath_core::wire::Writer;

use crate::host::{self, Headers, HostStore};

/// Configuration of a plugin that reads the ring log.
pub(crate) const RING_READER: &[u8] = b"ring-reader";

const CRASH_HEADER: &str = "x-test-crash-vm";

/// Most entries of one answer.
const ENTRIES_MAX: u64 = 2_048;

/// Crashes the VM if the request's headers say so.
pub(crate) fn crash_if_asked() {
    if host::header_pairs(Headers::Request).iter().any(|(name, _)| name == CRASH_HEADER) {
        log::warn!("warmpath: crashing on request");
        #[cfg(target_arch = "wasm32")]
        core::arch::wasm32::unreachable();
    }
}

/// Answers `GET /N` with the entries from number N on: the head, the number of
/// the first entry (u64 each), then each entry as its length (u32) and bytes. A
/// first entry beyond N says that those before it are gone.
pub(crate) struct RingReader;

impl Context for RingReader {}

impl HttpContext for RingReader {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        let headers = host::header_pairs(Headers::Request);
        let path = headers.iter().find(|(name, _)| name == ":path").map(|(_, path)| path.as_str());
        let from = path.and_then(|path| path.strip_prefix('/')?.parse().ok());
        let answer = from.and_then(entries);
        let (status, body) = answer.map_or((404, Vec::new()), |body| (200, body));
        if host::respond(status, "test_ring_reader", &[], &body).is_err() {
            return Action::Continue;
        }
        Action::Pause
    }
}

fn entries(from: u64) -> Option<Vec<u8>> {
    let (ring, store) = (Ring::default(), HostStore);
    let head = ring.head(&store).ok()?;
    let oldest = (head + 1).saturating_sub(ring.slots());
    let mut first = from.max(oldest).max(1);
    let mut found = Vec::new();
    let mut next = first;
    while next <= head && next < first + ENTRIES_MAX {
        match ring.read(&store, next).ok()? {
            Read::Entry(entry) => found.push(entry),
            // Used again meanwhile: what was found before has a gap behind it.
            Read::Overrun => {
                found.clear();
                first = next + 1;
            }
            Read::NotYet => break,
        }
        next += 1;
    }
    let mut writer = Writer::new();
    writer.u64(head);
    writer.u64(first);
    for entry in &found {
        writer.u32(u32::try_from(entry.len()).ok()?);
        writer.raw(entry);
    }
    Some(writer.into_bytes())
}
