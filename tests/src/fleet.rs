//! Fleet: simulated engines that come, go, die and trade places behind Envoy
//! with Warmpath, under load, for `make test-fleet`.
//!
//! | module | what |
//! |---|---|
//! | `members` | the engines and the worker list that names them |
//! | `load` | clients that ask all the time, and what they saw |
//! | `changes` | the checks: rolling update, swapped models, deaths, roles |

pub mod changes;
pub mod load;
pub mod members;
