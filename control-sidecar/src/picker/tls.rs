//! Tls: the picker's certificate, and the connections that it secures.
//!
//! Gateways do not check it (`insecureSkipVerify` in the endpoint-picker contract's
//! meshes), so one that is made at the start will do; files are for those that do.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::picker::Security;
use crate::limits::{CERTIFICATE_BYTES_MAX, CERTIFICATE_LOOK_EVERY};
use crate::metrics::Metrics;
use crate::run::Failure;

/// Names in the certificate that is made at the start.
const NAMES: [&str; 2] = ["localhost", "warmpath-sidecar"];

/// The certificate that is shown now.
#[derive(Debug)]
struct Shown(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// Files as they were read last.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Files {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

/// How connections are secured; `None` if they are not.
///
/// # Errors
///
/// If the files cannot be read or do not fit each other.
pub(super) async fn start(
    security: &Security,
    metrics: &Arc<Metrics>,
    stop: &CancellationToken,
) -> Result<Option<TlsAcceptor>, Failure> {
    let shown = match security {
        Security::Plain => return Ok(None),
        Security::SelfSigned => Arc::new(Shown(RwLock::new(Arc::new(self_signed()?)))),
        Security::Files { certificate, key } => {
            let files = read(certificate, key).await?;
            let shown = Arc::new(Shown(RwLock::new(Arc::new(certified(&files)?))));
            let paths = [certificate.clone(), key.clone()];
            let watching = watch(Arc::clone(&shown), paths, files, Arc::clone(metrics));
            let stop = stop.clone();
            tokio::spawn(async move { stop.run_until_cancelled(watching).await });
            shown
        }
    };
    let provider = Arc::new(ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(shown);
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Some(TlsAcceptor::from(Arc::new(config))))
}

fn self_signed() -> Result<CertifiedKey, Failure> {
    let made = rcgen::generate_simple_self_signed(NAMES.map(str::to_owned))?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let chain = vec![made.cert.der().clone()];
    Ok(CertifiedKey::from_der(chain, key.into(), &ring::default_provider())?)
}

fn certified(files: &Files) -> Result<CertifiedKey, Failure> {
    let chain =
        CertificateDer::pem_slice_iter(&files.certificate).collect::<Result<Vec<_>, _>>()?;
    if chain.is_empty() {
        return Err("the certificate's file has no certificate".into());
    }
    let key = PrivateKeyDer::from_pem_slice(&files.key)?;
    // Fails if they do not belong together.
    Ok(CertifiedKey::from_der(chain, key, &ring::default_provider())?)
}

async fn read(certificate: &Path, key: &Path) -> Result<Files, Failure> {
    let bounded = async |path: &Path| -> Result<Vec<u8>, Failure> {
        let named = |error: std::io::Error| format!("{}: {error}", path.display());
        let len = tokio::fs::metadata(path).await.map_err(named)?.len();
        if len > CERTIFICATE_BYTES_MAX {
            return Err(format!("{}: too long", path.display()).into());
        }
        Ok(tokio::fs::read(path).await.map_err(named)?)
    };
    Ok(Files { certificate: bounded(certificate).await?, key: bounded(key).await? })
}

/// Looks at the files, and shows what is in them once they fit each other. Until
/// then the certificate that was good stays.
async fn watch(
    shown: Arc<Shown>,
    [certificate, key]: [PathBuf; 2],
    mut known: Files,
    metrics: Arc<Metrics>,
) {
    let mut refused = None;
    loop {
        tokio::time::sleep(CERTIFICATE_LOOK_EVERY).await;
        let files = match read(&certificate, &key).await {
            Ok(files) if files == known || refused.as_ref() == Some(&files) => continue,
            Ok(files) => files,
            // It may be on its way.
            Err(_) => continue,
        };
        match certified(&files) {
            Ok(fresh) => {
                *shown.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
                info!(file = %certificate.display(), "the picker's certificate was read again");
                (known, refused) = (files, None);
            }
            Err(error) => {
                metrics.picker.certificates_refused.inc();
                warn!(file = %certificate.display(), %error, "the certificate cannot be used");
                refused = Some(files);
            }
        }
    }
}
