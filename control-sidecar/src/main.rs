//! Entry point of the sidecar.

fn main() {}
