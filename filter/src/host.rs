//! Host: every call into the gateway, and nothing else.
//!
//! The SDK's wrappers panic on any status they do not expect, and a panic cuts
//! every stream of an Envoy worker thread. So the raw imports are declared here
//! and each status becomes a value. The one exception is opening a gRPC stream,
//! which the SDK must know of to deliver its messages; the statuses that a host
//! returns for it are the ones the SDK handles.
//!
//! # Invariants
//!
//! 1. No call can panic, whatever the host answers.
//! 2. Buffers that the host hands over were allocated through this module's own
//!    allocator export with exactly the announced length.

#![expect(unsafe_code, reason = "the one place where the host is called")]

use warmpath_core::shared::{SharedData, Unavailable, Versioned, Write};

use crate::abi;

/// Statuses of the ABI that are told apart here.
const OK: u32 = 0;
const NOT_FOUND: u32 = 1;
const CAS_MISMATCH: u32 = 8;

/// WASI's number of the monotonic clock.
const CLOCK_MONOTONIC: u32 = 1;

#[cfg(target_arch = "wasm32")]
mod imports {
    #[link(wasm_import_module = "env")]
    unsafe extern "C" {
        pub(super) fn proxy_log(level: u32, message: *const u8, len: usize) -> u32;
        pub(super) fn proxy_get_current_time_nanoseconds(time: *mut u64) -> u32;
        pub(super) fn proxy_set_tick_period_milliseconds(period: u32) -> u32;
        pub(super) fn proxy_get_buffer_bytes(
            buffer: u32,
            start: usize,
            max: usize,
            data: *mut *mut u8,
            len: *mut usize,
        ) -> u32;
        pub(super) fn proxy_set_buffer_bytes(
            buffer: u32,
            start: usize,
            replaced: usize,
            data: *const u8,
            len: usize,
        ) -> u32;
        pub(super) fn proxy_get_header_map_pairs(
            map: u32,
            data: *mut *mut u8,
            len: *mut usize,
        ) -> u32;
        pub(super) fn proxy_continue_stream(stream: u32) -> u32;
        pub(super) fn proxy_set_effective_context(context: u32) -> u32;
        pub(super) fn proxy_replace_header_map_value(
            map: u32,
            key: *const u8,
            key_len: usize,
            value: *const u8,
            value_len: usize,
        ) -> u32;
        pub(super) fn proxy_remove_header_map_value(
            map: u32,
            key: *const u8,
            key_len: usize,
        ) -> u32;
        pub(super) fn proxy_get_property(
            path: *const u8,
            path_len: usize,
            data: *mut *mut u8,
            len: *mut usize,
        ) -> u32;
        pub(super) fn proxy_set_property(
            path: *const u8,
            path_len: usize,
            value: *const u8,
            value_len: usize,
        ) -> u32;
        pub(super) fn proxy_get_shared_data(
            key: *const u8,
            key_len: usize,
            data: *mut *mut u8,
            len: *mut usize,
            version: *mut u32,
        ) -> u32;
        pub(super) fn proxy_set_shared_data(
            key: *const u8,
            key_len: usize,
            value: *const u8,
            value_len: usize,
            version: u32,
        ) -> u32;
        pub(super) fn proxy_register_shared_queue(
            name: *const u8,
            name_len: usize,
            queue: *mut u32,
        ) -> u32;
        pub(super) fn proxy_resolve_shared_queue(
            vm_id: *const u8,
            vm_id_len: usize,
            name: *const u8,
            name_len: usize,
            queue: *mut u32,
        ) -> u32;
        pub(super) fn proxy_enqueue_shared_queue(queue: u32, data: *const u8, len: usize) -> u32;
        pub(super) fn proxy_dequeue_shared_queue(
            queue: u32,
            data: *mut *mut u8,
            len: *mut usize,
        ) -> u32;
        pub(super) fn proxy_send_local_response(
            status: u32,
            details: *const u8,
            details_len: usize,
            body: *const u8,
            body_len: usize,
            headers: *const u8,
            headers_len: usize,
            grpc_status: i32,
        ) -> u32;
        pub(super) fn proxy_grpc_send(
            token: u32,
            message: *const u8,
            len: usize,
            end_of_stream: u32,
        ) -> u32;
        pub(super) fn proxy_grpc_cancel(token: u32) -> u32;
        pub(super) fn proxy_grpc_close(token: u32) -> u32;
        pub(super) fn proxy_define_metric(
            kind: u32,
            name: *const u8,
            name_len: usize,
            id: *mut u32,
        ) -> u32;
        pub(super) fn proxy_increment_metric(id: u32, offset: i64) -> u32;
        pub(super) fn proxy_record_metric(id: u32, value: u64) -> u32;
    }

    #[link(wasm_import_module = "wasi_snapshot_preview1")]
    unsafe extern "C" {
        pub(super) fn clock_time_get(clock: u32, precision: u64, time: *mut u64) -> u32;
    }
}

/// Natively there is no host: every call answers "not found". The crate is
/// built natively for the linter and for tests of its pure parts.
#[cfg(not(target_arch = "wasm32"))]
#[expect(clippy::too_many_arguments, reason = "the ABI's signatures")]
mod imports {
    macro_rules! absent {
        ($($name:ident($($argument:ident: $kind:ty),*);)*) => {
            $(pub(super) unsafe fn $name($($argument: $kind),*) -> u32 {
                let _ = ($($argument,)*);
                super::NOT_FOUND
            })*
        };
    }
    absent! {
        proxy_log(level: u32, message: *const u8, len: usize);
        proxy_get_current_time_nanoseconds(time: *mut u64);
        proxy_set_tick_period_milliseconds(period: u32);
        proxy_get_buffer_bytes(buffer: u32, start: usize, max: usize, data: *mut *mut u8, len: *mut usize);
        proxy_set_buffer_bytes(buffer: u32, start: usize, replaced: usize, data: *const u8, len: usize);
        proxy_get_header_map_pairs(map: u32, data: *mut *mut u8, len: *mut usize);
        proxy_continue_stream(stream: u32);
        proxy_set_effective_context(context: u32);
        proxy_replace_header_map_value(map: u32, key: *const u8, key_len: usize, value: *const u8, value_len: usize);
        proxy_remove_header_map_value(map: u32, key: *const u8, key_len: usize);
        proxy_get_property(path: *const u8, path_len: usize, data: *mut *mut u8, len: *mut usize);
        proxy_set_property(path: *const u8, path_len: usize, value: *const u8, value_len: usize);
        proxy_get_shared_data(key: *const u8, key_len: usize, data: *mut *mut u8, len: *mut usize, version: *mut u32);
        proxy_set_shared_data(key: *const u8, key_len: usize, value: *const u8, value_len: usize, version: u32);
        proxy_register_shared_queue(name: *const u8, name_len: usize, queue: *mut u32);
        proxy_resolve_shared_queue(vm_id: *const u8, vm_id_len: usize, name: *const u8, name_len: usize, queue: *mut u32);
        proxy_enqueue_shared_queue(queue: u32, data: *const u8, len: usize);
        proxy_dequeue_shared_queue(queue: u32, data: *mut *mut u8, len: *mut usize);
        proxy_send_local_response(status: u32, details: *const u8, details_len: usize, body: *const u8, body_len: usize, headers: *const u8, headers_len: usize, grpc_status: i32);
        proxy_grpc_send(token: u32, message: *const u8, len: usize, end_of_stream: u32);
        proxy_grpc_cancel(token: u32);
        proxy_grpc_close(token: u32);
        proxy_define_metric(kind: u32, name: *const u8, name_len: usize, id: *mut u32);
        proxy_increment_metric(id: u32, offset: i64);
        proxy_record_metric(id: u32, value: u64);
        clock_time_get(clock: u32, precision: u64, time: *mut u64);
    }
}

/// A buffer of the ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Buffer {
    /// The request's body, as far as it is buffered.
    RequestBody = 0,
    /// The chunk of the response's body.
    ResponseBody = 1,
    /// The message of a gRPC stream.
    GrpcMessage = 5,
    /// The plugin's configuration.
    PluginConfiguration = 7,
}

/// A header map of the ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Headers {
    /// Of the request. May be written only until its header callback has let
    /// them go.
    Request = 0,
    /// Of the response.
    Response = 2,
}

/// What a metric does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MetricKind {
    /// Grows.
    Counter = 0,
    /// Is set.
    Gauge = 1,
    /// Counts values by size.
    Histogram = 2,
}

/// A status that the caller did not want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

fn check(status: u32) -> Result<(), Refused> {
    if status == OK { Ok(()) } else { Err(Refused) }
}

/// Takes over a buffer that the host has filled.
fn adopt(data: *mut u8, len: usize) -> Vec<u8> {
    if data.is_null() {
        return Vec::new();
    }
    // SAFETY: the host got `data` from the SDK's `malloc` export for exactly
    // `len` bytes, has filled it, and gives it up.
    unsafe { Vec::from_raw_parts(data, len, len) }
}

/// Runs a call that returns bytes; `None` for every status but OK.
fn fetch(call: impl FnOnce(*mut *mut u8, *mut usize) -> u32) -> Option<Vec<u8>> {
    let mut data = core::ptr::null_mut();
    let mut len = 0;
    let status = call(&raw mut data, &raw mut len);
    let bytes = adopt(data, len);
    (status == OK).then_some(bytes)
}

/// Writes to the gateway's log.
pub fn log(level: u32, message: &str) {
    // SAFETY: the pointer and length are of one live string. A log that is
    // refused has nowhere to be reported.
    let _ = unsafe { imports::proxy_log(level, message.as_ptr(), message.len()) };
}

/// The host's monotonic clock, in nanoseconds. All VMs of a process share it.
/// 0 if the host has none, which stops every expiry rather than the filter.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let mut time = 0;
    // SAFETY: `time` outlives the call.
    let status = unsafe { imports::clock_time_get(CLOCK_MONOTONIC, 0, &raw mut time) };
    if status == OK { time } else { 0 }
}

/// The host's wall clock, in nanoseconds since 1970; for templates that print
/// the date, never for expiry.
#[must_use]
pub fn wall_clock_ns() -> u64 {
    let mut time = 0;
    // SAFETY: `time` outlives the call.
    let status = unsafe { imports::proxy_get_current_time_nanoseconds(&raw mut time) };
    if status == OK { time } else { 0 }
}

/// Asks for ticks.
///
/// # Errors
///
/// [`Refused`].
pub fn set_tick_period(milliseconds: u32) -> Result<(), Refused> {
    // SAFETY: no pointers.
    check(unsafe { imports::proxy_set_tick_period_milliseconds(milliseconds) })
}

/// Up to `max` bytes of a buffer from `start` on; `None` if there is none.
#[must_use]
pub fn buffer(buffer: Buffer, start: usize, max: usize) -> Option<Vec<u8>> {
    // SAFETY: the out-pointers outlive the call.
    fetch(|data, len| unsafe {
        imports::proxy_get_buffer_bytes(buffer as u32, start, max, data, len)
    })
}

/// Replaces the whole of a buffer of `old_len` bytes.
///
/// # Errors
///
/// [`Refused`]; the buffer is as it was.
pub fn replace_buffer(buffer: Buffer, old_len: usize, bytes: &[u8]) -> Result<(), Refused> {
    // SAFETY: the pointer and length are of one live slice.
    check(unsafe {
        imports::proxy_set_buffer_bytes(buffer as u32, 0, old_len, bytes.as_ptr(), bytes.len())
    })
}

/// All headers, names in lower case as the host keeps them. Names and values
/// that are not UTF-8 are left out: none that matters here is.
#[must_use]
pub fn header_pairs(headers: Headers) -> Vec<(String, String)> {
    // SAFETY: the out-pointers outlive the call.
    let bytes = fetch(|data, len| unsafe {
        imports::proxy_get_header_map_pairs(headers as u32, data, len)
    });
    bytes.as_deref().and_then(abi::read_headers).unwrap_or_default()
}

/// Makes the calls that follow concern a request's context. Returns whether the
/// host knows it. What is in force when the callback returns does not matter.
#[must_use]
pub fn enter(context: u32) -> bool {
    // SAFETY: no pointers.
    unsafe { imports::proxy_set_effective_context(context) == OK }
}

/// Lets a held request go on.
pub fn resume_request() {
    // SAFETY: no pointers. A request that cannot be resumed has ended.
    let _ = unsafe { imports::proxy_continue_stream(0) };
}

/// Sets a header, in place of any it has.
///
/// # Errors
///
/// [`Refused`]: the headers have gone already.
pub fn set_header(headers: Headers, name: &str, value: &str) -> Result<(), Refused> {
    // SAFETY: pointers and lengths are of live strings.
    check(unsafe {
        imports::proxy_replace_header_map_value(
            headers as u32,
            name.as_ptr(),
            name.len(),
            value.as_ptr(),
            value.len(),
        )
    })
}

/// Removes every header of a name.
///
/// # Errors
///
/// [`Refused`]: the headers have gone already.
pub fn remove_header(headers: Headers, name: &str) -> Result<(), Refused> {
    // SAFETY: the pointer and length are of one live string.
    check(unsafe {
        imports::proxy_remove_header_map_value(headers as u32, name.as_ptr(), name.len())
    })
}

/// A property of the stream; `None` if it has none of that path.
#[must_use]
pub fn property(path: &[&str]) -> Option<Vec<u8>> {
    let path = path.join("\0");
    // SAFETY: the path's pointer and length are of one live string, the
    // out-pointers outlive the call.
    fetch(|data, len| unsafe { imports::proxy_get_property(path.as_ptr(), path.len(), data, len) })
}

/// Sets filter state `wasm.<name>` of the stream, for access logs and for
/// filters behind this one.
///
/// # Errors
///
/// [`Refused`].
pub fn set_property(name: &str, value: &[u8]) -> Result<(), Refused> {
    // SAFETY: pointers and lengths are of live slices.
    check(unsafe {
        imports::proxy_set_property(name.as_ptr(), name.len(), value.as_ptr(), value.len())
    })
}

/// Answers the request in the gateway's name.
///
/// - `details`: fixed words for the access log.
///
/// # Errors
///
/// [`Refused`].
pub fn respond(
    status: u32,
    details: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Result<(), Refused> {
    let headers = abi::write_headers(headers);
    // SAFETY: pointers and lengths are of live slices.
    check(unsafe {
        imports::proxy_send_local_response(
            status,
            details.as_ptr(),
            details.len(),
            body.as_ptr(),
            body.len(),
            headers.as_ptr(),
            headers.len(),
            -1,
        )
    })
}

/// Opens a gRPC stream on behalf of the root context that is being called.
///
/// # Errors
///
/// [`Refused`]: the cluster is not known, or has no connection to offer.
#[cfg(not(test))]
pub fn open_stream(cluster: &str, service: &str, method: &str) -> Result<u32, Refused> {
    let target = abi::grpc_service(cluster);
    let target = target.as_deref().unwrap_or(cluster);
    proxy_wasm::hostcalls::open_grpc_stream(target, service, method, Vec::new())
        .map_err(|_| Refused)
}

/// Natively there are no streams.
///
/// # Errors
///
/// Always [`Refused`].
#[cfg(test)]
pub fn open_stream(_cluster: &str, _service: &str, _method: &str) -> Result<u32, Refused> {
    Err(Refused)
}

/// Sends a message on a stream.
///
/// # Errors
///
/// [`Refused`]: the stream is gone.
pub fn send(stream: u32, message: &[u8]) -> Result<(), Refused> {
    // SAFETY: the pointer and length are of one live slice.
    check(unsafe { imports::proxy_grpc_send(stream, message.as_ptr(), message.len(), 0) })
}

/// Ends a stream from our side. To be called also when the other side has ended
/// it: the host keeps the stream until both have. A stream that is unknown to
/// the host is ended already.
pub fn close_stream(stream: u32) {
    // SAFETY: no pointers.
    let _ = unsafe { imports::proxy_grpc_close(stream) };
}

/// Resets a stream: nothing more is sent or received on it.
pub fn reset_stream(stream: u32) {
    // SAFETY: no pointers.
    let _ = unsafe { imports::proxy_grpc_cancel(stream) };
}

/// Defines a metric and returns its number; the same for a name that is defined
/// already.
///
/// # Errors
///
/// [`Refused`].
pub fn define_metric(kind: MetricKind, name: &str) -> Result<u32, Refused> {
    let mut id = 0;
    // SAFETY: the pointer and length are of one live string, `id` outlives the
    // call.
    check(unsafe {
        imports::proxy_define_metric(kind as u32, name.as_ptr(), name.len(), &raw mut id)
    })?;
    Ok(id)
}

/// Adds to a counter or gauge. A metric that the host does not know is not
/// worth failing for.
pub fn increment_metric(id: u32, offset: i64) {
    // SAFETY: no pointers.
    let _ = unsafe { imports::proxy_increment_metric(id, offset) };
}

/// Sets a gauge, or records a value in a histogram.
pub fn record_metric(id: u32, value: u64) {
    // SAFETY: no pointers.
    let _ = unsafe { imports::proxy_record_metric(id, value) };
}

/// Takes over a queue of the process: its messages come to the root context that
/// is being called. Returns the queue's number, which all VMs share.
///
/// # Errors
///
/// [`Refused`].
pub fn register_queue(name: &str) -> Result<u32, Refused> {
    let mut queue = 0;
    // SAFETY: the pointer and length are of one live string, `queue` outlives
    // the call.
    check(unsafe {
        imports::proxy_register_shared_queue(name.as_ptr(), name.len(), &raw mut queue)
    })?;
    Ok(queue)
}

/// The number of a queue that some VM of the same `vm_id` has registered.
///
/// # Errors
///
/// [`Refused`]: none has.
pub fn find_queue(name: &str) -> Result<u32, Refused> {
    let mut queue = 0;
    // SAFETY: the pointers and lengths are of live strings, `queue` outlives the
    // call. An empty `vm_id` is the caller's own.
    check(unsafe {
        imports::proxy_resolve_shared_queue(
            "".as_ptr(),
            0,
            name.as_ptr(),
            name.len(),
            &raw mut queue,
        )
    })?;
    Ok(queue)
}

/// Puts a message into a queue.
///
/// # Errors
///
/// [`Refused`]: there is no such queue.
pub fn enqueue(queue: u32, message: &[u8]) -> Result<(), Refused> {
    // SAFETY: the pointer and length are of one live slice.
    check(unsafe { imports::proxy_enqueue_shared_queue(queue, message.as_ptr(), message.len()) })
}

/// Takes the next message out of a queue; `None` if there is none.
#[must_use]
pub fn dequeue(queue: u32) -> Option<Vec<u8>> {
    // SAFETY: the out-pointers outlive the call.
    fetch(|data, len| unsafe { imports::proxy_dequeue_shared_queue(queue, data, len) })
}

/// The gateway's shared data.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostStore;

impl SharedData for HostStore {
    fn get(&self, key: &str) -> Result<Option<Versioned>, Unavailable> {
        let mut data = core::ptr::null_mut();
        let mut len = 0;
        let mut version = 0;
        // SAFETY: the key's pointer and length are of one live string, the
        // out-pointers outlive the call.
        let status = unsafe {
            imports::proxy_get_shared_data(
                key.as_ptr(),
                key.len(),
                &raw mut data,
                &raw mut len,
                &raw mut version,
            )
        };
        let value = adopt(data, len);
        match status {
            OK => Ok(Some(Versioned { value, version })),
            NOT_FOUND => Ok(None),
            _ => Err(Unavailable),
        }
    }

    fn set(&self, key: &str, value: &[u8], version: Option<u32>) -> Result<Write, Unavailable> {
        // SAFETY: pointers and lengths are of live slices.
        let status = unsafe {
            imports::proxy_set_shared_data(
                key.as_ptr(),
                key.len(),
                value.as_ptr(),
                value.len(),
                version.unwrap_or(0),
            )
        };
        match status {
            OK => Ok(Write::Done),
            CAS_MISMATCH => Ok(Write::Lost),
            _ => Err(Unavailable),
        }
    }
}

/// Sends what is logged to the gateway's log.
#[derive(Clone, Copy, Debug)]
pub struct HostLog;

impl log::Log for HostLog {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let level = match record.level() {
            log::Level::Trace => 0,
            log::Level::Debug => 1,
            log::Level::Info => 2,
            log::Level::Warn => 3,
            log::Level::Error => 4,
        };
        log(level, &record.args().to_string());
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_refuses_everything_is_an_answer() {
        assert_eq!(monotonic_ns(), 0);
        assert_eq!(header_pairs(Headers::Request), []);
        assert_eq!(HostStore.get("key"), Ok(None));
        assert_eq!(HostStore.set("key", b"", None), Err(Unavailable));
        assert_eq!(set_header(Headers::Request, "a", "b"), Err(Refused));
    }
}
