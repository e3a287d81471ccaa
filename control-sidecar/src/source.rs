//! Source: bytes in, from the engines' own publishers.
//!
//! First stage of the feed path. `zmtp` speaks the transport, `sequence` puts
//! messages into order, `zmq` drives both for one rank and hands decoded events
//! on.

pub mod sequence;
pub mod zmq;
pub mod zmtp;
