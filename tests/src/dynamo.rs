//! Dynamo interop: real Dynamo workers and frontends behind Envoy with
//! Warmpath, for `make test-dynamo`.
//!
//! | module | what |
//! |---|---|
//! | `cases` | which discovery, event plane, engine and pools |
//! | `peers` | etcd, NATS, mocked workers, direct-mode frontends |
//! | `traffic` | requests, and who the frontend says has served them |
//! | `truth` | what the workers' caches hold, against what the sidecar believes |
//! | `interop` | the checks of one case after the other |
//!
//! Dynamo's mocker listens on all interfaces, so all of it runs in a network
//! namespace of its own; `scripts/test-dynamo.sh` makes it.

pub mod cases;
pub mod interop;
pub mod peers;
pub mod replicas;
pub mod traffic;
pub mod truth;
