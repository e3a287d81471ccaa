//! Intake: a request's headers, taken from the host and stripped there.

use warmpath_core::demands::{Refusal, Rules, SubsetHint};
use warmpath_core::request::Endpoint;

use crate::config::Config;
use crate::host::{self, Headers};
use crate::metrics::Counter;
use crate::vm;

pub(crate) use warmpath_core::intake::Intake;

/// Where the gateway says which hosts it allows (GAIE's endpoint-picker
/// protocol). Metadata is the gateway's own: no client can set it.
const SUBSET_HINT: [&str; 4] = [
    "metadata",
    "filter_metadata",
    "envoy.lb.subset_hint",
    "x-gateway-destination-endpoint-subset",
];

/// Headers of a request.
pub(crate) struct RequestHeaders(warmpath_core::intake::RequestHeaders);

impl RequestHeaders {
    /// Takes the headers, and removes those that steer routing. What they say is
    /// here for whoever may be trusted with it.
    pub(crate) fn take(config: &Config) -> Self {
        let headers =
            Self(warmpath_core::intake::RequestHeaders(host::header_pairs(Headers::Request)));
        headers.strip(config.cache_salt_header.as_deref());
        headers
    }

    /// - `trusted`: the one header that a trusted hop, not the client, has set.
    fn strip(&self, trusted: Option<&str>) {
        let mut stripped = 0;
        for name in self.0.stripped(trusted) {
            if host::remove_header(Headers::Request, name).is_ok() {
                stripped += 1;
            }
        }
        if stripped > 0 {
            vm::with(|vm| vm.metrics.add(Counter::HeadersStripped, stripped));
        }
    }

    /// The API that is asked for, if it is one that is routed.
    pub(crate) fn endpoint(&self) -> Option<Endpoint> {
        self.0.endpoint()
    }

    /// Whether the request is one that has a body by its nature.
    pub(crate) fn posts(&self) -> bool {
        self.0.posts()
    }

    /// Reads what the request asks for.
    ///
    /// # Errors
    ///
    /// [`Refusal`], to be told to the client.
    pub(crate) fn read(&self, config: &Config) -> Result<Intake, Refusal> {
        let rules = Rules {
            trusts_pins: config.trust_pins,
            binds_sessions: vm::with(|vm| vm.binds_sessions()).unwrap_or(false),
        };
        self.0.read(rules, config.cache_salt_header.as_deref(), hint())
    }
}

fn hint() -> Option<SubsetHint> {
    let hint = SubsetHint::parse(&host::property(&SUBSET_HINT)?);
    vm::with(|vm| vm.metrics.add(Counter::SubsetMalformed, hint.malformed.into()));
    Some(hint)
}
