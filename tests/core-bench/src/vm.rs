//! The module's side of `drive.mjs`: bytes in, a stage, JSON out.

#![expect(unsafe_code, reason = "what V8 calls and what it offers is raw")]

use std::cell::RefCell;
use std::collections::BTreeMap;

use crate::{Clock, Run};

#[link(wasm_import_module = "bench")]
unsafe extern "C" {
    /// Nanoseconds since any moment.
    fn now() -> f64;
}

struct HostClock;

impl Clock for HostClock {
    fn now_ns(&self) -> f64 {
        // SAFETY: a function without arguments, which the driver provides.
        unsafe { now() }
    }

    fn memory_bytes(&self) -> f64 {
        (core::arch::wasm32::memory_size(0) * 65_536) as f64
    }
}

thread_local! {
    static INPUTS: RefCell<BTreeMap<String, Vec<u8>>> = const { RefCell::new(BTreeMap::new()) };
    static OUT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Makes room for `len` bytes that the driver writes, and that it then names with
/// one of the calls below.
#[unsafe(no_mangle)]
extern "C" fn bench_room(len: usize) -> *mut u8 {
    OUT.with_borrow_mut(|out| {
        *out = vec![0; len];
        out.as_mut_ptr()
    })
}

/// Takes what was written: the first `name_len` bytes are its name.
#[unsafe(no_mangle)]
extern "C" fn bench_take(name_len: usize) {
    let mut bytes = OUT.take();
    let name = String::from_utf8(bytes.drain(..name_len).collect()).unwrap();
    INPUTS.with_borrow_mut(|inputs| inputs.insert(name, bytes));
}

/// Runs the stage whose name was written. Returns the length of the JSON that
/// [`bench_out`] points to.
#[unsafe(no_mangle)]
extern "C" fn bench_run(quick: u32) -> usize {
    let stage = String::from_utf8(OUT.take()).unwrap();
    let inputs = INPUTS.take();
    let run = Run { quick: quick != 0, inputs: &inputs, clock: &HostClock };
    let json = serde_json::to_vec(&crate::run(&stage, &run).unwrap()).unwrap();
    let len = json.len();
    OUT.set(json);
    len
}

/// Where the JSON is.
#[unsafe(no_mangle)]
extern "C" fn bench_out() -> *const u8 {
    OUT.with_borrow(|out| out.as_ptr())
}
