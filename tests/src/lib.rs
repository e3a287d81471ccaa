//! Support library of the tests: the engine simulator, the local stack, the
//! fleet that changes under load, the bookings run, several gateways, and the
//! runs against real Dynamo.

pub mod bookings;
pub mod dynamo;
pub mod engine;
pub mod fleet;
pub mod replicas;
pub mod stack;
