//! Support library of the tests: the engine simulator, the local stack, and the
//! runs against real Dynamo.

pub mod dynamo;
pub mod engine;
pub mod stack;
