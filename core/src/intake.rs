//! Intake: what a request's headers say of where it may go.
//!
//! First stage of the request path. Whoever owns the headers takes those away
//! that steer routing ([`steers_routing`]) and
//! reads them here.

use crate::demands::{Asked, Demands, Host, Refusal, Rules, SubsetHint};
use crate::headers::{cache_salt, steers_routing};
use crate::request::{Endpoint, NvExt};

/// Headers of a request in order: names in lower case, and values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestHeaders(pub Vec<(String, String)>);

impl RequestHeaders {
    /// The names that steer routing, as often as they are there: to be removed
    /// before the request goes anywhere.
    ///
    /// - `trusted`: the one header that a trusted hop, not the client, has set.
    pub fn stripped<'a>(&'a self, trusted: Option<&'a str>) -> impl Iterator<Item = &'a str> {
        let names = self.0.iter().map(|(name, _)| name.as_str());
        names.filter(move |name| steers_routing(name) && trusted != Some(*name))
    }

    /// The first value of a header.
    #[must_use]
    pub fn first(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The API that is asked for, if it is one that is routed.
    #[must_use]
    pub fn endpoint(&self) -> Option<Endpoint> {
        let endpoint = self.first(":path").and_then(Endpoint::from_path)?;
        endpoint.takes(self.first(":method")?).then_some(endpoint)
    }

    /// Whether the request is one that has a body by its nature.
    #[must_use]
    pub fn posts(&self) -> bool {
        self.first(":method") == Some("POST")
    }

    /// Reads what the request asks for.
    ///
    /// - `trusted_salt`: name of the header in which a trusted hop says what
    ///   separates the request's cache from others'.
    /// - `hint`: what the gateway says of the hosts that it allows, if it does.
    ///
    /// # Errors
    ///
    /// [`Refusal`], to be told to the client.
    pub fn read(
        &self,
        rules: Rules,
        trusted_salt: Option<&str>,
        hint: Option<SubsetHint>,
    ) -> Result<Intake, Refusal> {
        let trusted_salt = trusted_salt.and_then(|name| {
            let values = self.0.iter().filter(|(known, _)| known == name);
            cache_salt(values.map(|(_, value)| value.as_str())).map(str::to_owned)
        });
        Ok(Intake {
            asked: Asked::read(&self.0, rules)?,
            hosts: hint.map(|hint| hint.hosts),
            trusted_salt,
            length: self.first("content-length").and_then(|text| text.parse().ok()),
        })
    }
}

/// What a request's headers say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Intake {
    /// What it asks of its workers.
    asked: Asked,
    /// The hosts that the gateway allows; all if `None`.
    hosts: Option<Vec<Host>>,
    /// The cache salt that a trusted hop has set.
    pub trusted_salt: Option<String>,
    /// Length of the body in bytes, if the client announced it.
    pub length: Option<usize>,
}

impl Intake {
    /// What the request asks of its workers.
    ///
    /// - `nvext`: what its body says, if that is known.
    ///
    /// # Errors
    ///
    /// [`Refusal`], to be told to the client.
    pub fn demands(&self, nvext: Option<&NvExt<'_>>) -> Result<Demands, Refusal> {
        let demands = self.asked.demands(nvext)?;
        Ok(Demands { hosts: self.hosts.clone(), ..demands })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn headers(pairs: &[(&str, &str)]) -> RequestHeaders {
        RequestHeaders(pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn what_steers_routing_is_stripped_but_for_the_trusted_one() {
        let headers = headers(&[
            ("accept", "*/*"),
            ("x-dynamo-worker-instance-id", "1"),
            ("x-tenant-id", "a"),
            ("x-warmpath-anything", "b"),
            ("x-tenant-id", "c"),
        ]);
        let all: Vec<&str> = headers.stripped(None).collect();
        let [worker, own] = ["x-dynamo-worker-instance-id", "x-warmpath-anything"];
        assert_eq!(all, [worker, "x-tenant-id", own, "x-tenant-id"]);
        let trusted: Vec<&str> = headers.stripped(Some("x-tenant-id")).collect();
        assert_eq!(trusted, [worker, own]);
    }

    #[test]
    fn only_our_paths_and_methods_are_ours() {
        let of = |method, path| headers(&[(":method", method), (":path", path)]);
        let chat = of("POST", "/a/v1/chat/completions?b");
        assert_eq!((chat.endpoint(), chat.posts()), (Some(Endpoint::ChatCompletions), true));
        assert_eq!(of("GET", "/v1/models").endpoint(), Some(Endpoint::Models));
        assert_eq!(of("OPTIONS", "/v1/models").endpoint(), None);
        assert_eq!(of("POST", "/health").endpoint(), None);
        assert_eq!(RequestHeaders::default().endpoint(), None);
    }

    #[test]
    fn salt_length_and_hosts_are_taken_from_where_they_may_be() {
        let headers = headers(&[("x-tenant-id", " a "), ("content-length", "12")]);
        let plain = headers.read(Rules::default(), None, None).unwrap();
        assert_eq!((plain.trusted_salt.as_deref(), plain.length), (None, Some(12)));
        assert_eq!(plain.demands(None).unwrap().hosts, None);
        let hint = SubsetHint::parse(b"");
        let all = headers.read(Rules::default(), Some("x-tenant-id"), Some(hint)).unwrap();
        assert_eq!(all.trusted_salt.as_deref(), Some("a"));
        assert_eq!(all.demands(None).unwrap().hosts, Some(Vec::new()), "none is allowed");
    }
}
