//! Intake: what is taken from a request's headers, and what is taken away.

use warmpath_core::demands::{Asked, Demands, Host, Refusal, Rules, SubsetHint};
use warmpath_core::headers::{cache_salt, steers_routing};
use warmpath_core::request::{Endpoint, NvExt};

use crate::config::Config;
use crate::host::{self, Headers};
use crate::metrics::Counter;
use crate::vm;

/// Where the gateway says which hosts it allows (GAIE's endpoint-picker
/// protocol). Metadata is the gateway's own: no client can set it.
const SUBSET_HINT: [&str; 4] = [
    "metadata",
    "filter_metadata",
    "envoy.lb.subset_hint",
    "x-gateway-destination-endpoint-subset",
];

/// What a request's headers say.
#[derive(Clone, Debug, Default)]
pub(crate) struct Intake {
    /// What it asks of its workers.
    asked: Asked,
    /// The hosts that the gateway allows; all if `None`.
    hosts: Option<Vec<Host>>,
    /// The cache salt that a trusted hop has set.
    pub(crate) trusted_salt: Option<String>,
    /// Length of the body, if the client announced it.
    pub(crate) length: Option<usize>,
}

/// Headers of a request in order: names in lower case, and values.
pub(crate) struct RequestHeaders(Vec<(String, String)>);

impl RequestHeaders {
    /// Takes the headers, and removes those that steer routing. What they say is
    /// here for whoever may be trusted with it.
    pub(crate) fn take(config: &Config) -> Self {
        let headers = Self(host::header_pairs(Headers::Request));
        headers.strip(config.cache_salt_header.as_deref());
        headers
    }

    /// - `trusted`: the one header that a trusted hop, not the client, has set.
    fn strip(&self, trusted: Option<&str>) {
        let mut stripped = 0;
        for (name, _) in &self.0 {
            let is_clients = steers_routing(name) && trusted != Some(name.as_str());
            if is_clients && host::remove_header(Headers::Request, name).is_ok() {
                stripped += 1;
            }
        }
        if stripped > 0 {
            vm::with(|vm| vm.metrics.add(Counter::HeadersStripped, stripped));
        }
    }

    fn first(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The API that is asked for, if it is one that is routed.
    pub(crate) fn endpoint(&self) -> Option<Endpoint> {
        let endpoint = self.first(":path").and_then(Endpoint::from_path)?;
        endpoint.takes(self.first(":method")?).then_some(endpoint)
    }

    /// Whether the request is one that has a body by its nature.
    pub(crate) fn posts(&self) -> bool {
        self.first(":method") == Some("POST")
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
        let trusted_salt = config.cache_salt_header.as_deref().and_then(|name| {
            let values = self.0.iter().filter(|(known, _)| known == name);
            cache_salt(values.map(|(_, value)| value.as_str())).map(str::to_owned)
        });
        Ok(Intake {
            asked: Asked::read(&self.0, rules)?,
            hosts: hosts(),
            trusted_salt,
            length: self.first("content-length").and_then(|text| text.parse().ok()),
        })
    }
}

impl Intake {
    /// What the request asks of its workers.
    ///
    /// - `nvext`: what its body says, if that is known.
    ///
    /// # Errors
    ///
    /// [`Refusal`], to be told to the client.
    pub(crate) fn demands(&self, nvext: Option<&NvExt<'_>>) -> Result<Demands, Refusal> {
        let demands = self.asked.demands(nvext)?;
        Ok(Demands { hosts: self.hosts.clone(), ..demands })
    }
}

fn hosts() -> Option<Vec<Host>> {
    let hint = SubsetHint::parse(&host::property(&SUBSET_HINT)?);
    vm::with(|vm| vm.metrics.add(Counter::SubsetMalformed, hint.malformed.into()));
    Some(hint.hosts)
}
