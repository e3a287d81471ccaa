//! Tls: how connections to the picker are secured.
//!
//! Gateways do not check its certificate (`insecureSkipVerify` in the endpoint-picker
//! contract's meshes), so one that is made at the start will do; files are for those
//! that do.

use std::sync::Arc;

use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::config::picker::Security;
use crate::credentials::Reloaded;
use crate::metrics::Metrics;
use crate::run::Failure;
use crate::tls::accept::Listener;
use crate::tls::{TlsFiles, files, serve_from};

/// Names in the certificate that is made at the start.
const NAMES: [&str; 2] = ["localhost", "warmpath-sidecar"];

/// Of gRPC, for ALPN.
const PROTOCOLS: &[&[u8]] = &[b"h2"];

/// Lets a listener take connections as the configuration has it.
///
/// # Errors
///
/// If the files cannot be read or do not fit each other.
pub(super) async fn secured(
    listener: TcpListener,
    security: &Security,
    metrics: &Arc<Metrics>,
    stop: &CancellationToken,
) -> Result<Listener, Failure> {
    let settings = match security {
        Security::Plain => return Ok(Listener::Tcp(listener)),
        Security::SelfSigned => Reloaded::fixed(self_signed()?),
        Security::Files { certificate, key } => {
            let files =
                TlsFiles { certificate: certificate.clone(), key: key.clone(), clients: None };
            serve_from("picker", &files, PROTOCOLS, Arc::clone(metrics), stop.clone()).await?
        }
    };
    Ok(Listener::Tls(listener, settings))
}

fn self_signed() -> Result<ServerConfig, Failure> {
    let made = rcgen::generate_simple_self_signed(NAMES.map(str::to_owned))?;
    let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    Ok(files::server_config(certificate.as_bytes(), key.as_bytes(), None, PROTOCOLS)?)
}
