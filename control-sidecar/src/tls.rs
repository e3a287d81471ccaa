//! TLS: servers that prove who they are and ask their clients to.
//!
//! `files` makes a server's settings of certificates and keys, `names` says which
//! clients are let in, `accept` takes connections. Whoever serves over TLS uses
//! [`serve_from`] with its own protocol names and gets a stream of connections.
//!
//! # Invariants
//!
//! 1. With authorities of clients configured, a connection comes out of
//!    [`accept::incoming`] only after its client has shown a certificate of theirs
//!    that is valid now and carries an allowed name. Sessions are not resumed:
//!    each connection shows it anew.
//! 2. A client that does not finish its handshake holds up nobody else.

pub mod accept;
pub mod files;
pub mod names;

use std::path::PathBuf;
use std::sync::Arc;

use rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use crate::credentials::{CredentialError, Reloaded};
use crate::metrics::Metrics;

use names::NameRule;

/// The files of a server, PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Its certificate, and those between it and the authority.
    pub certificate: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// Whom to let in; `None` for whoever connects.
    pub clients: Option<Clients>,
}

/// Whom a server lets in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clients {
    /// File of the authorities that sign clients' certificates, PEM.
    pub authorities: PathBuf,
    /// Names, one of which a client's certificate must carry.
    pub allowed: Vec<NameRule>,
}

/// Reads a server's files, and again whenever they change until `stop`.
///
/// - `what`: what the log calls it.
/// - `protocols`: for ALPN, the preferred first; `h2` for gRPC.
///
/// # Errors
///
/// If the files are not good at the start.
pub async fn serve_from(
    what: &'static str,
    files: &TlsFiles,
    protocols: &'static [&'static [u8]],
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) -> Result<Reloaded<ServerConfig>, CredentialError> {
    let mut paths = vec![files.certificate.clone(), files.key.clone()];
    paths.extend(files.clients.as_ref().map(|clients| clients.authorities.clone()));
    let allowed = files.clients.as_ref().map(|clients| clients.allowed.clone());
    let read = move |contents: &[Vec<u8>]| {
        let [certificate, key, authorities @ ..] = contents else {
            return Err(CredentialError::NoCertificate);
        };
        let clients = authorities.first().zip(allowed.as_deref());
        let clients = clients.map(|(authorities, allowed)| (authorities.as_slice(), allowed));
        files::server_config(certificate, key, clients, protocols)
    };
    Reloaded::start(what, paths, read, metrics, stop).await
}
