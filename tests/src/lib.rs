//! Support library of the tests: the engine simulator, the local stack, the
//! fleet that changes under load, the bookings run, several gateways, the endpoint
//! picker beside the module, the runs against real Dynamo, who may feed a gateway, the
//! comparison of routers, and the benchmarks.

pub mod bench;
pub mod bookings;
pub mod dynamo;
pub mod engine;
pub mod ext_proc;
pub mod fleet;
pub mod quality;
pub mod replicas;
pub mod secure;
pub mod spoof;
pub mod stack;
