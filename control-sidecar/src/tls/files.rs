//! Files: a server's settings from PEM.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{InconsistentKeys, RootCertStore, ServerConfig};

use super::names::{NameRule, NamedClients};
use crate::credentials::CredentialError;

/// The settings of a server.
///
/// - `clients`: authorities that sign clients' certificates, and the names of
///   which a client's must carry one; `None` lets in whoever connects.
/// - `protocols`: for ALPN.
///
/// # Errors
///
/// A [`CredentialError`] that says which part cannot be used.
pub fn server_config(
    certificate: &[u8],
    key: &[u8],
    clients: Option<(&[u8], &[NameRule])>,
    protocols: &[&[u8]],
) -> Result<ServerConfig, CredentialError> {
    let chain = certificates(certificate).map_err(|()| CredentialError::BadCertificate)?;
    if chain.is_empty() {
        return Err(CredentialError::NoCertificate);
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| CredentialError::BadKey)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = match clients {
        Some((authorities, allowed)) => Some(verifier(authorities, allowed, &provider)?),
        None => None,
    };
    let builder = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|_| CredentialError::BadCertificate)?;
    let builder = match verifier {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|error| match error {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            CredentialError::KeyMismatch
        }
        rustls::Error::InvalidCertificate(_) => CredentialError::BadCertificate,
        _ => CredentialError::BadKey,
    })?;
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    // A resumed session would not show its certificate again: it could have
    // expired, or its authority be gone.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn verifier(
    authorities: &[u8],
    allowed: &[NameRule],
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<NamedClients>, CredentialError> {
    let mut roots = RootCertStore::empty();
    for root in certificates(authorities).map_err(|()| CredentialError::NoAuthority)? {
        roots.add(root).map_err(|_| CredentialError::NoAuthority)?;
    }
    let inner = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .build()
        .map_err(|_| CredentialError::NoAuthority)?;
    Ok(Arc::new(NamedClients::new(inner, allowed.to_vec())))
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, ()> {
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|_| ())
}
