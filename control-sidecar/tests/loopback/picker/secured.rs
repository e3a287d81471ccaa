//! TLS as gateways of the endpoint-picker contract have it.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use warmpath_sidecar::run::Sidecar;

use crate::support::*;

/// Takes any certificate, as `insecureSkipVerify` does.
#[derive(Debug)]
struct Any;

impl ServerCertVerifier for Any {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Shakes hands: the certificate that is shown, and the protocol that is agreed on.
async fn shake(at: SocketAddr) -> std::io::Result<(Vec<u8>, Option<Vec<u8>>)> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Any))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let stream = TcpStream::connect(at).await?;
    let name = ServerName::try_from("localhost").unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    let (_, connection) = stream.get_ref();
    let shown = connection.peer_certificates().unwrap()[0].to_vec();
    Ok((shown, connection.alpn_protocol().map(<[u8]>::to_vec)))
}

fn picker(security: &str) -> String {
    let ports = "listen: \"127.0.0.1:0\", health_listen: \"127.0.0.1:0\"";
    format!("workers: []\npicker: {{{ports}{security}}}")
}

#[tokio::test]
async fn it_is_secured_by_default() {
    let sidecar = Sidecar::start(config(0, &picker(""))).await.unwrap();
    let at = sidecar.picker.as_ref().unwrap().address;
    let (_, protocol) = shake(at).await.unwrap();
    assert_eq!(protocol.as_deref(), Some(&b"h2"[..]));
    // Plain words are refused, and counted.
    let mut plain = TcpStream::connect(at).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut plain, b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    eventually("it is counted", || async {
        let metrics = page(&sidecar, "/metrics").await.1;
        metrics.contains("warmpath_picker_connections_refused_total{reason=\"not_tls\"} 1")
    })
    .await;
    sidecar.stop().await;
}

/// Goal: another certificate is shown as soon as both files fit each other, and a
/// pair that does not leaves the one that was good.
#[tokio::test]
async fn certificates_are_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let make = || rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let (first, second) = (make(), make());
    let (certificate, key) = (folder.path().join("tls.crt"), folder.path().join("tls.key"));
    std::fs::write(&certificate, first.cert.pem()).unwrap();
    std::fs::write(&key, first.signing_key.serialize_pem()).unwrap();
    let files = format!(", certificate: {certificate:?}, key: {key:?}");
    let sidecar = Sidecar::start(config(0, &picker(&files))).await.unwrap();
    let at = sidecar.picker.as_ref().unwrap().address;
    assert_eq!(shake(at).await.unwrap().0, first.cert.der().to_vec());
    std::fs::write(&certificate, second.cert.pem()).unwrap();
    eventually("the pair is refused", || async {
        let metrics = page(&sidecar, "/metrics").await.1;
        metrics.contains("warmpath_credential_reloads_total{outcome=\"key_mismatch\"} 1")
    })
    .await;
    assert_eq!(shake(at).await.unwrap().0, first.cert.der().to_vec(), "the good one stays");
    std::fs::write(&key, second.signing_key.serialize_pem()).unwrap();
    eventually("the other is shown", || async {
        shake(at).await.unwrap().0 == second.cert.der().to_vec()
    })
    .await;
    sidecar.stop().await;
}

#[tokio::test]
async fn files_that_cannot_be_used_stop_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key) = (folder.path().join("tls.crt"), folder.path().join("tls.key"));
    let files = format!(", certificate: {certificate:?}, key: {key:?}");
    let missing = Sidecar::start(config(0, &picker(&files))).await.unwrap_err().to_string();
    assert!(missing.contains("tls.crt"), "{missing}");
    std::fs::write(&certificate, "nothing").unwrap();
    std::fs::write(&key, "nothing").unwrap();
    assert!(Sidecar::start(config(0, &picker(&files))).await.is_err());
}
