//! Proxy-wasm HTTP filter of Warmpath.
