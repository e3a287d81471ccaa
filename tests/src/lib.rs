//! Support library of the tests: the engine simulator and the local stack.

pub mod engine;
pub mod stack;
