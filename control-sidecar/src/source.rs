//! Source: bytes in, from the engines' own publishers.
//!
//! First stage of the feed path. Nothing is decoded here but what is needed to
//! put messages into order; `adapter` reads what is in them.

pub mod sequence;

pub mod zmtp;
