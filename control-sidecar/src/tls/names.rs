//! Names: which clients are let in, by the names in their certificates.
//!
//! An authority of a mesh signs every workload of it, so that its signature alone
//! says little. The subject's common name is not looked at.

use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};
use webpki::EndEntityCert;

/// A name that lets a client in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NameRule {
    /// Whatever its name is: its authority signs nobody else.
    Any,
    /// A DNS name, in lower case.
    Dns(String),
    /// A SPIFFE id.
    Spiffe(String),
    /// SPIFFE ids that begin so: a trust domain, or a path of it, and a slash.
    SpiffeUnder(String),
}

impl NameRule {
    /// Reads a rule: `*`, `gateway.example`, `spiffe://domain/ns/a/sa/b`, or
    /// `spiffe://domain/ns/a/*`. `None` if it is none of these.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text == "*" {
            return Some(Self::Any);
        }
        if text.contains("://") {
            return match text.strip_suffix('*') {
                Some(under) if under.ends_with('/') && is_spiffe(under.trim_end_matches('/')) => {
                    Some(Self::SpiffeUnder(under.to_owned()))
                }
                None if is_spiffe(text) => Some(Self::Spiffe(text.to_owned())),
                _ => None,
            };
        }
        let is_dns = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
        let is_name = !text.is_empty() && text.len() <= 253 && text.bytes().all(is_dns);
        is_name.then(|| Self::Dns(text.to_ascii_lowercase()))
    }

    fn fits(&self, uris: &[&str], dns: &[&str]) -> bool {
        // A certificate with two ids has none, says SPIFFE.
        let id = match uris {
            [id] if is_spiffe(id) => Some(*id),
            _ => None,
        };
        match self {
            Self::Any => true,
            Self::Dns(name) => dns.iter().any(|it| it.eq_ignore_ascii_case(name)),
            Self::Spiffe(name) => id == Some(name),
            Self::SpiffeUnder(begin) => id.is_some_and(|id| id.starts_with(begin.as_str())),
        }
    }
}

/// Whether a text is a SPIFFE id: a trust domain and perhaps a path without
/// empty or dotted steps, by which it would be under another path than it seems.
fn is_spiffe(text: &str) -> bool {
    let Some(rest) = text.strip_prefix("spiffe://") else { return false };
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_/".contains(&byte);
    text.len() <= 2_048
        && rest.bytes().all(is_plain)
        && rest.split('/').all(|step| !matches!(step, "" | "." | ".."))
}

/// Lets in clients with a certificate of the authorities and an allowed name.
#[derive(Debug)]
pub(super) struct NamedClients {
    inner: Arc<dyn ClientCertVerifier>,
    allowed: Vec<NameRule>,
}

impl NamedClients {
    pub(super) fn new(inner: Arc<dyn ClientCertVerifier>, allowed: Vec<NameRule>) -> Self {
        Self { inner, allowed }
    }

    fn allows(&self, certificate: &CertificateDer<'_>) -> bool {
        let Ok(certificate) = EndEntityCert::try_from(certificate) else { return false };
        let uris: Vec<&str> = certificate.valid_uri_names().collect();
        let dns: Vec<&str> = certificate.valid_dns_names().collect();
        self.allowed.iter().any(|rule| rule.fits(&uris, &dns))
    }
}

impl ClientCertVerifier for NamedClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        if self.allows(end_entity) {
            return Ok(verified);
        }
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read() {
        assert_eq!(NameRule::parse("*"), Some(NameRule::Any));
        assert_eq!(
            NameRule::parse("Gateway.Example"),
            Some(NameRule::Dns("gateway.example".into()))
        );
        for id in ["spiffe://a", "spiffe://cluster.local/ns/x/sa/y"] {
            assert_eq!(NameRule::parse(id), Some(NameRule::Spiffe(id.into())));
        }
        for under in ["spiffe://a/", "spiffe://a/ns/x/"] {
            let rule = NameRule::parse(&format!("{under}*"));
            assert_eq!(rule, Some(NameRule::SpiffeUnder(under.into())));
        }
        for bad in [
            "",
            "*.example",
            "a b",
            "spiffe://",
            "spiffe://*",
            "spiffe:///*",
            "spiffe://a*",
            "spiffe://a/b*",
            "spiffe://a/../*",
            "spiffe://a//b",
            "https://a/b",
            "spiffe://a/%2e/b",
        ] {
            assert_eq!(NameRule::parse(bad), None, "{bad:?}");
        }
    }

    /// Goal: a rule lets in what it says, and nothing that only looks like it.
    #[test]
    fn rules_fit_what_they_say() {
        let fits = |rule: &str, uris: &[&str], dns: &[&str]| {
            NameRule::parse(rule).unwrap().fits(uris, dns)
        };
        assert!(fits("*", &[], &[]));
        assert!(fits("a.example", &[], &["b.example", "A.example"]));
        assert!(!fits("a.example", &["spiffe://a.example"], &["a.example.org", "*.example"]));
        let under = "spiffe://td/ns/a/*";
        assert!(fits(under, &["spiffe://td/ns/a/sa/b"], &[]));
        assert!(fits("spiffe://td/*", &["spiffe://td/ns/a/sa/b"], &[]));
        for other in [
            "spiffe://td/ns/ab/sa/b",
            "spiffe://td.evil/ns/a/sa/b",
            "spiffe://td/ns/a",
            "spiffe://td/ns/a/../b",
            "spiffe://td/ns/a//b",
            "xspiffe://td/ns/a/b",
        ] {
            assert!(!fits(under, &[other], &[]), "{other}");
        }
        assert!(fits("spiffe://td/x", &["spiffe://td/x"], &[]));
        assert!(!fits("spiffe://td/x", &["spiffe://td/x/y"], &["spiffe://td/x"]));
        assert!(
            !fits("spiffe://td/x", &["spiffe://td/x", "spiffe://td/y"], &[]),
            "two ids are none"
        );
    }
}
