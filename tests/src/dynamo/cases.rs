//! Cases: which parts of Dynamo are put together.

use crate::stack::gateway::Mode;

/// Where workers register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discovery {
    /// Files in a directory.
    File,
    /// etcd.
    Etcd,
}

/// What carries events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plane {
    /// Every publisher's own ZMQ socket.
    Zmq,
    /// A ZMQ broker.
    Broker,
    /// NATS core.
    Nats,
}

/// Which workers there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pools {
    /// Two workers of two data-parallel ranks each.
    Aggregated,
    /// Two prefill and two decode workers.
    Disaggregated,
}

/// One combination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Name on the command line and in the report.
    pub name: &'static str,
    /// Where workers register.
    pub discovery: Discovery,
    /// What carries events.
    pub plane: Plane,
    /// Which engine is mocked.
    pub engine: &'static str,
    /// Which workers there are.
    pub pools: Pools,
    /// How the gateway names the worker.
    pub mode: Mode,
    /// Whether the workers are replaced by another generation under load.
    pub rolls_out: bool,
    /// Whether frontends of Dynamo's own route beside us, and bookings are
    /// exchanged with them; then that alone is checked.
    pub replicas: bool,
}

impl Case {
    /// Whether one of the workers is killed at the end: where each publishes on a
    /// socket of its own, which shows at once that it is gone.
    #[must_use]
    pub fn loses_a_worker(&self) -> bool {
        self.pools == Pools::Aggregated && self.plane == Plane::Zmq && !self.rolls_out
    }

    /// Whether `usage` tells what the engine found in the cache that was
    /// predicted: SGLang's mock says nothing, and of two legs it is decode's.
    #[must_use]
    pub fn reports_cached(&self) -> bool {
        self.pools == Pools::Aggregated && self.engine != "sglang"
    }
}

/// All combinations.
pub const CASES: [Case; 11] = [
    Case {
        name: "file-zmq",
        discovery: Discovery::File,
        plane: Plane::Zmq,
        engine: "vllm",
        pools: Pools::Aggregated,
        mode: Mode::Endpoint,
        rolls_out: true,
        replicas: false,
    },
    Case {
        name: "file-nats",
        discovery: Discovery::File,
        plane: Plane::Nats,
        engine: "vllm",
        pools: Pools::Aggregated,
        mode: Mode::Body,
        rolls_out: false,
        replicas: false,
    },
    Case {
        name: "etcd-zmq",
        discovery: Discovery::Etcd,
        plane: Plane::Zmq,
        engine: "vllm",
        pools: Pools::Aggregated,
        mode: Mode::Body,
        rolls_out: false,
        replicas: false,
    },
    Case {
        name: "etcd-broker",
        discovery: Discovery::Etcd,
        plane: Plane::Broker,
        engine: "vllm",
        pools: Pools::Aggregated,
        mode: Mode::Endpoint,
        rolls_out: false,
        replicas: false,
    },
    Case {
        name: "etcd-zmq-disagg",
        discovery: Discovery::Etcd,
        plane: Plane::Zmq,
        engine: "vllm",
        pools: Pools::Disaggregated,
        mode: Mode::Endpoint,
        rolls_out: false,
        replicas: false,
    },
    Case {
        name: "file-nats-disagg",
        discovery: Discovery::File,
        plane: Plane::Nats,
        engine: "vllm",
        pools: Pools::Disaggregated,
        mode: Mode::Body,
        rolls_out: false,
        replicas: false,
    },
    Case {
        name: "file-zmq-sglang",
        discovery: Discovery::File,
        plane: Plane::Zmq,
        engine: "sglang",
        pools: Pools::Aggregated,
        mode: Mode::Endpoint,
        rolls_out: false,
        replicas: false,
    },
    Case {
        name: "file-zmq-trtllm",
        discovery: Discovery::File,
        plane: Plane::Zmq,
        engine: "trtllm",
        pools: Pools::Aggregated,
        mode: Mode::Endpoint,
        rolls_out: false,
        replicas: false,
    },
    Case {
        name: "file-zmq-replicas",
        discovery: Discovery::File,
        plane: Plane::Zmq,
        engine: "vllm",
        pools: Pools::Aggregated,
        mode: Mode::Endpoint,
        rolls_out: false,
        replicas: true,
    },
    Case {
        name: "etcd-nats-replicas",
        discovery: Discovery::Etcd,
        plane: Plane::Nats,
        engine: "vllm",
        pools: Pools::Aggregated,
        mode: Mode::Endpoint,
        rolls_out: false,
        replicas: true,
    },
    Case {
        name: "etcd-broker-replicas",
        discovery: Discovery::Etcd,
        plane: Plane::Broker,
        engine: "vllm",
        pools: Pools::Aggregated,
        mode: Mode::Endpoint,
        rolls_out: false,
        replicas: true,
    },
];
