//! Who may attach: TLS, certificates of clients, tokens, Unix sockets, and that
//! all of these can be replaced while the sidecar runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tonic::Code;
use tonic::transport::{Channel, Endpoint, Uri};
use warmpath_core::frame::Kind;
use warmpath_core::uplink::{Hello, Purpose};
use warmpath_sidecar::config::{Config, Overrides};
use warmpath_sidecar::run::Sidecar;

use crate::certificates::{Authority, Signed, Valid};
use crate::support::*;

/// The gateways' name in these tests.
const GATEWAY: &str = "spiffe://cluster.local/ns/inference/sa/gateway";
const RULE: &str = "spiffe://cluster.local/ns/inference/*";
const TOKEN: &str = "a-token-of-the-tests-0123456789";

/// A folder with what a sidecar is given.
struct Files {
    folder: TempDir,
    authority: Authority,
}

impl Files {
    fn new() -> Self {
        let files =
            Self { folder: tempfile::tempdir().unwrap(), authority: Authority::new("ca").unwrap() };
        let server = files.authority.sign(&["sidecar.example"], Valid::Now).unwrap();
        files.write("server.pem", &server.certificate);
        files.write("server.key", &server.key);
        files.write("ca.pem", &files.authority.certificate());
        files.write("token", TOKEN);
        files
    }

    /// Replaces a file at once, as those do who rotate certificates.
    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        std::fs::write(path.with_extension("new"), text).unwrap();
        std::fs::rename(path.with_extension("new"), path).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn start(&self, feed: &str) -> Sidecar {
        let sidecar = Sidecar::start(self.config(feed)).await.unwrap();
        // Without workers it is never ready.
        eventually("open", || async { state(&sidecar).await["open"] == true }).await;
        sidecar
    }

    fn config(&self, feed: &str) -> Config {
        let text = format!(
            "feed: {{{feed}}}\nstatus: {{listen: \"127.0.0.1:0\"}}\nsync: {{deadline_ms: 0}}\n\
             models: [{{name: tiny, directory: {MODEL:?}, block_size: {BLOCK}}}]\nworkers: []\n"
        );
        Config::parse(&text, self.folder.path(), &Overrides::default()).unwrap()
    }

    fn client(&self, names: &[&str]) -> Signed {
        self.authority.sign(names, Valid::Now).unwrap()
    }
}

const MTLS: &str = "listen: \"127.0.0.1:0\", tls: {certificate: server.pem, key: server.key, \
                    client_ca: ca.pem, allowed_names: [\"spiffe://cluster.local/ns/inference/*\"]}";

/// What a client shows and trusts.
fn client_config(trusts: &str, shows: Option<&Signed>) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(trusts.as_bytes()) {
        roots.add(root.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match shows {
        Some(signed) => {
            let chain = CertificateDer::pem_slice_iter(signed.certificate.as_bytes());
            let chain = chain.collect::<Result<Vec<_>, _>>().unwrap();
            let key = PrivateKeyDer::from_pem_slice(signed.key.as_bytes()).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

/// A connection over TLS, which the server may still refuse.
async fn over_tls(sidecar: &Sidecar, config: ClientConfig) -> Result<Channel, ()> {
    let (address, connector) = (sidecar.feed, TlsConnector::from(Arc::new(config)));
    let connect = tower::service_fn(move |_: Uri| {
        let connector = connector.clone();
        async move {
            let stream = TcpStream::connect(address).await?;
            let name = ServerName::try_from("sidecar.example").unwrap();
            connector.connect(name, stream).await.map(TokioIo::new)
        }
    });
    let endpoint = Endpoint::from_static("http://sidecar.example");
    endpoint.connect_with_connector(connect).await.map_err(|_| ())
}

/// Attaches over TLS as a filter does; whether the cards came.
async fn attaches(sidecar: &Sidecar, trusts: &str, shows: Option<&Signed>) -> bool {
    match over_tls(sidecar, client_config(trusts, shows)).await {
        Ok(channel) => gets_cards(channel, &[]).await.is_ok(),
        Err(()) => false,
    }
}

/// Whether a follower gets what every follower gets first.
async fn gets_cards(channel: Channel, authorization: &[&str]) -> Result<(), Code> {
    let mut filter = Filter::over(channel, authorization).await.map_err(|status| status.code())?;
    let hello = Hello { purpose: Purpose::Follow, vm: 1, epoch: 0, sequence: 0, gateway: 0 };
    if !filter.try_say(Kind::Hello, &hello.encode()).await {
        return Err(Code::Unavailable);
    }
    match filter.next().await {
        Ok(Some(first)) => {
            assert_eq!(first.kind, Kind::Card);
            Ok(())
        }
        Ok(None) => Err(Code::Ok),
        Err(status) => Err(status.code()),
    }
}

/// How often the metrics' page has counted something.
async fn counted(sidecar: &Sidecar, line: &str) -> u64 {
    let (_, page) = page(sidecar, "/metrics").await;
    let found = page.lines().find_map(|it| it.strip_prefix(line)?.trim().parse().ok());
    found.unwrap_or(0)
}

async fn refused(sidecar: &Sidecar, reason: &str) -> u64 {
    counted(sidecar, &format!("warmpath_feed_refused_total{{reason=\"{reason}\"}}")).await
}

/// Goal: only who shows a valid certificate of the right authority with an allowed
/// name gets anything; everybody else is refused and counted under its reason.
#[tokio::test]
async fn strangers_are_refused_and_counted() {
    let files = Files::new();
    let sidecar = files.start(MTLS).await;
    let ca = files.authority.certificate();
    let good = files.client(&[GATEWAY]);
    assert!(attaches(&sidecar, &ca, Some(&good)).await);
    let other = Authority::new("ca").unwrap();
    let sign = |valid| files.authority.sign(&[GATEWAY], valid).unwrap();
    for (reason, shows) in [
        ("no_certificate", None),
        ("unknown_issuer", Some(other.sign(&[GATEWAY], Valid::Now).unwrap())),
        ("expired", Some(sign(Valid::Ended))),
        ("not_yet_valid", Some(sign(Valid::Later))),
        ("wrong_name", Some(files.client(&["spiffe://cluster.local/ns/other/sa/gateway"]))),
        ("wrong_name", Some(files.client(&["cluster.local"]))),
        ("wrong_name", Some(files.client(&[GATEWAY, "spiffe://cluster.local/ns/other/sa/b"]))),
        ("wrong_name", Some(files.client(&[]))),
    ] {
        let before = refused(&sidecar, reason).await;
        assert!(!attaches(&sidecar, &ca, shows.as_ref()).await, "{reason}: {shows:?}");
        eventually("counted", || async { refused(&sidecar, reason).await == before + 1 }).await;
    }
    // Without TLS, and a client that does not trust the server.
    let plain = Channel::from_shared(format!("http://{}", sidecar.feed)).unwrap().connect().await;
    if let Ok(channel) = plain {
        assert!(gets_cards(channel, &[]).await.is_err());
    }
    eventually("counted", || async { refused(&sidecar, "not_tls").await == 1 }).await;
    assert!(!attaches(&sidecar, &other.certificate(), Some(&good)).await);
    eventually("counted", || async { refused(&sidecar, "refused_by_client").await == 1 }).await;
    assert!(attaches(&sidecar, &ca, Some(&good)).await, "the right one still gets in");
    sidecar.stop().await;
}

/// Goal: a client that connects and says nothing does not keep others out, and is
/// sent away.
#[tokio::test]
async fn a_silent_client_holds_up_nobody() {
    let files = Files::new();
    let sidecar = files.start(MTLS).await;
    let silent = TcpStream::connect(sidecar.feed).await.unwrap();
    let (ca, good) = (files.authority.certificate(), files.client(&[GATEWAY]));
    assert!(attaches(&sidecar, &ca, Some(&good)).await);
    eventually("sent away", || async { refused(&sidecar, "handshake_timeout").await == 1 }).await;
    drop(silent);
    sidecar.stop().await;
}

/// Goal: certificates and authorities are replaced without a restart, files that
/// do not fit are counted and change nothing, and what is connected stays.
#[tokio::test]
async fn certificates_are_replaced_while_the_sidecar_runs() {
    let files = Files::new();
    let sidecar = files.start(MTLS).await;
    let (ca, good) = (files.authority.certificate(), files.client(&[GATEWAY]));
    let config = client_config(&ca, Some(&good));
    let channel = over_tls(&sidecar, config).await.unwrap();
    let mut stream = Filter::over(channel, &[]).await.unwrap();
    let hello = Hello { purpose: Purpose::Follow, vm: 1, epoch: 0, sequence: 0, gateway: 0 };
    stream.say(Kind::Hello, &hello.encode()).await;

    let reloads = |outcome: &'static str| {
        let line = format!("warmpath_credential_reloads_total{{outcome=\"{outcome}\"}}");
        let sidecar = &sidecar;
        async move { counted(sidecar, &line).await }
    };
    let later = Authority::new("the next").unwrap();
    let server = later.sign(&["sidecar.example"], Valid::Now).unwrap();
    // Half of the new pair does not fit the other half of the old one.
    files.write("server.pem", &server.certificate);
    eventually("half a pair", || async { reloads("key_mismatch").await == 1 }).await;
    assert!(attaches(&sidecar, &ca, Some(&good)).await, "the old pair is in force");
    files.write("server.key", "nothing");
    eventually("no key", || async { reloads("bad_key").await == 1 }).await;
    files.write("server.key", &server.key);
    eventually("the new pair", || async { reloads("taken").await == 1 }).await;
    assert!(!attaches(&sidecar, &ca, Some(&good)).await, "the server shows its new certificate");
    assert!(attaches(&sidecar, &later.certificate(), Some(&good)).await);
    // The authority of clients.
    files.write("ca.pem", "");
    eventually("no authority", || async { reloads("no_authority").await == 1 }).await;
    assert!(attaches(&sidecar, &later.certificate(), Some(&good)).await);
    files.write("ca.pem", &later.certificate());
    eventually("the new authority", || async { reloads("taken").await == 2 }).await;
    assert!(!attaches(&sidecar, &later.certificate(), Some(&good)).await);
    let new = later.sign(&[GATEWAY], Valid::Now).unwrap();
    assert!(attaches(&sidecar, &later.certificate(), Some(&new)).await);
    stream.next_of(&[Kind::Heartbeat]).await;
    sidecar.stop().await;
}

/// Goal: without a token nobody gets in, whatever is asked for, and tokens are
/// replaced without a gap.
#[tokio::test]
async fn tokens_are_asked_for() {
    let files = Files::new();
    let sidecar = files.start("listen: \"127.0.0.1:0\", token_file: token").await;
    let attach = async |values: &[&str]| {
        let channel = Channel::from_shared(format!("http://{}", sidecar.feed)).unwrap();
        gets_cards(channel.connect().await.unwrap(), values).await
    };
    let bearer = format!("Bearer {TOKEN}");
    assert_eq!(attach(&[&bearer]).await, Ok(()));
    assert_eq!(attach(&[]).await, Err(Code::Unauthenticated));
    assert_eq!(attach(&[TOKEN]).await, Err(Code::Unauthenticated));
    assert_eq!(attach(&[&format!("{bearer}0")]).await, Err(Code::Unauthenticated));
    assert_eq!(refused(&sidecar, "no_token").await, 2);
    assert_eq!(refused(&sidecar, "wrong_token").await, 1);

    files.write("token", &format!("{TOKEN}\nthe-next-token-0123456789\n"));
    let next = "Bearer the-next-token-0123456789";
    eventually("both are accepted", || async { attach(&[next]).await.is_ok() }).await;
    assert_eq!(attach(&[&bearer]).await, Ok(()));
    files.write("token", "the-next-token-0123456789");
    eventually("the old one is not", || async { attach(&[&bearer]).await.is_err() }).await;
    assert_eq!(attach(&[next]).await, Ok(()));
    files.write("token", "short");
    let line = "warmpath_credential_reloads_total{outcome=\"bad_token\"}";
    eventually("a bad file", || async { counted(&sidecar, line).await == 1 }).await;
    assert_eq!(attach(&[next]).await, Ok(()));
    sidecar.stop().await;
}

#[tokio::test]
async fn a_unix_socket_serves_filters() {
    let files = Files::new();
    let sidecar = files.start("listen: \"unix:feed.sock\"").await;
    assert_eq!(sidecar.feed.port(), 0);
    let path: Arc<Path> = files.path("feed.sock").into();
    let connect = tower::service_fn(move |_: Uri| {
        let path = Arc::clone(&path);
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://feed");
    let channel = endpoint.connect_with_connector(connect).await.unwrap();
    assert_eq!(gets_cards(channel, &[]).await, Ok(()));
    sidecar.stop().await;
}

/// Goal: a sidecar whose files are wrong does not start, and says which.
#[tokio::test]
async fn wrong_files_are_named_at_the_start() {
    assert!(MTLS.contains(RULE));
    for (name, text, of) in [
        ("server.pem", "", "feed.tls: no certificate"),
        ("server.key", "", "feed.tls: no usable private key"),
        ("ca.pem", "", "feed.tls: no usable certificate of an authority"),
        ("token", "x", "feed.token_file: a token has"),
    ] {
        let files = Files::new();
        files.write(name, text);
        let config = files.config(&format!("{MTLS}, token_file: token"));
        let error = Sidecar::start(config).await.unwrap_err().to_string();
        assert!(error.starts_with(of), "{error}");
        std::fs::remove_file(files.path(name)).unwrap();
        let config = files.config(&format!("{MTLS}, token_file: token"));
        let error = Sidecar::start(config).await.unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("not found"), "{error}");
    }
}
