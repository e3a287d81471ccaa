//! The sidecar between real sockets: publishers of another ZeroMQ
//! implementation on one side, gRPC streams as filters open them on the other.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test binary"
)]

#[path = "../../../tests/src/secure/certificates.rs"]
#[expect(unreachable_pub, reason = "it is a module of a library, too")]
mod certificates;
mod dynamo;
mod feed;
mod picker;
mod plane;
#[path = "../../../tests/src/stack/ports.rs"]
#[expect(unreachable_pub, reason = "it is a module of a library, too")]
mod ports;
mod program;
mod pull;
mod replicas;
mod secure;
mod sources;
mod support;
