//! Quality: how well requests are routed, ours against others, on the same
//! requests and the same simulated engines, for `make bench-quality`.
//!
//! | module | what |
//! |---|---|
//! | `trace` | the requests |
//! | `engines` | what the engines are like, and where the figures come from |
//! | `fleet` | the engines of one run |
//! | `rivals` | the routers, and how each is started |
//! | `client` | sends a trace, checks every answer |
//! | `live` | one router, one trace, real processes |
//! | `usage` | processor time |
//! | `figures` | what is measured of a run |
//! | `bench` | all routers, all traces: tables and the file of results |
//! | `offline` | a run in virtual time |
//! | `policies` | routers as functions of overlap and load, for it |

pub mod bench;
pub mod client;
pub mod engines;
pub mod figures;
pub mod fleet;
pub mod live;
pub mod offline;
pub mod policies;
pub mod rivals;
pub mod trace;
pub mod usage;
