//! Local stack: Envoy with the module, the sidecar and three simulated engines
//! on 127.0.0.1, for `make run` and `make smoke`.
//!
//! | module | what |
//! |---|---|
//! | `options` | flags of `warmpath-run`, and where things are found |
//! | `child` | processes that do not outlive this one |
//! | `launch` | configuration files, start, readiness, stop |
//! | `envoy` | one Envoy |
//! | `gateway` | sidecar and Envoy alone, for other runs' workers |
//! | `client` | requests as an OpenAI client sends them |
//! | `position` | whether the feed has caught up with the engines |
//! | `conversations` | the requests of demo and smoke, from a seed |
//! | `report` | checks, their figures, the last line |
//! | `demo`, `smoke` | what the two commands do |
//!
//! Nothing here knows how a worker is chosen; the smoke run judges from the
//! outside: response headers, the engines' own reports, the admin pages.

pub mod child;
pub mod client;
pub mod conversations;
pub mod demo;
pub mod envoy;
pub mod gateway;
pub mod launch;
pub mod limits;
pub mod options;
pub mod ports;
pub mod position;
pub mod report;
pub mod smoke;
