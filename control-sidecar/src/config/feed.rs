//! Feed: where filters attach, and which are let in.
//!
//! What travels there names every worker and tells what its cache holds, and
//! whoever attaches can say what a gateway has booked. So only this machine
//! reaches it unless the configuration says who else may, and how they prove it.

use core::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::fields::Section;
use crate::limits::ALLOWED_NAMES_MAX;
use crate::tls::names::NameRule;
use crate::tls::{Clients, TlsFiles};

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// TCP; port 0 for any.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix {
        /// Its path.
        path: PathBuf,
        /// Who may use it, as a file's mode.
        mode: u32,
    },
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix { path, .. } => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The feed's server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeedConfig {
    /// Where filters attach.
    pub listen: Listen,
    /// Its certificate, and those of filters; `None` for no TLS.
    pub tls: Option<TlsFiles>,
    /// File of the tokens, one of which a filter must send; `None` for none.
    pub token_file: Option<PathBuf>,
    /// What is let through although it is not as it should be, in words for the
    /// log.
    pub warning: Option<&'static str>,
}

const DEFAULT: &str = "127.0.0.1:9010";
const OPEN: &str = "the feed is open to whoever reaches its address";
const READABLE: &str = "the feed's tokens can be read on the way to it: it is without TLS";

impl FeedConfig {
    /// Takes a section apart; relative paths start at `directory`. `None` if the
    /// address is missing or wrong, which is noted.
    pub(super) fn read(
        mut section: Section<'_>,
        wins: Option<&str>,
        directory: &Path,
    ) -> Option<Self> {
        let listen = read_listen(&mut section, wins, directory);
        let tls = read_tls(&mut section, "tls", directory);
        let token_file = section.text("token_file").map(|path| directory.join(path));
        let insecure = section.flag("insecure").unwrap_or(false);
        let asks = token_file.is_some() || tls.as_ref().is_some_and(|tls| tls.clients.is_some());
        let mut warning = None;
        match &listen {
            Some(Listen::Tcp(address)) if !address.ip().is_loopback() => {
                if !asks && insecure {
                    warning = Some(OPEN);
                } else if !asks {
                    section.mistake(
                        "listen",
                        format!(
                            "{address} can be reached from other hosts: give token_file, \
                             tls.client_ca or a loopback address; `insecure: true` lets \
                             everybody in"
                        ),
                    );
                } else if tls.is_none() {
                    warning = Some(READABLE);
                }
            }
            Some(Listen::Unix { .. }) if tls.is_some() => {
                section.mistake("tls", "is for TCP; a Unix socket has a mode");
            }
            _ => {}
        }
        section.end();
        Some(Self { listen: listen?, tls, token_file, warning })
    }
}

fn read_listen(section: &mut Section<'_>, wins: Option<&str>, directory: &Path) -> Option<Listen> {
    let mode = section.word("socket_mode", &[("0600", 0o600), ("0660", 0o660), ("0666", 0o666)]);
    let from_file = section.text("listen");
    let text = wins.map(str::to_owned).or(from_file).unwrap_or_else(|| DEFAULT.to_owned());
    if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
        return Some(Listen::Unix { path: directory.join(path), mode: mode.unwrap_or(0o600) });
    }
    if mode.is_some() {
        section.mistake("socket_mode", "is for a Unix socket");
    }
    let address = text.parse().ok();
    if address.is_none() {
        section.mistake(
            "listen",
            format!("must be an address and a port such as {DEFAULT}, or unix:PATH, is {text:?}"),
        );
    }
    address.map(Listen::Tcp)
}

/// Takes a server's TLS settings; `None` if there are none, or wrong ones.
pub(crate) fn read_tls(parent: &mut Section<'_>, name: &str, directory: &Path) -> Option<TlsFiles> {
    if !parent.has(name) {
        return None;
    }
    let mut section = parent.section(name);
    let file =
        |section: &mut Section<'_>, name: &str| section.text(name).map(|path| directory.join(path));
    let certificate = file(&mut section, "certificate");
    let key = file(&mut section, "key");
    let authorities = file(&mut section, "client_ca");
    for (name, path) in [("certificate", &certificate), ("key", &key)] {
        if path.is_none() {
            section.mistake(name, "is missing: a PEM file");
        }
    }
    let names = section.texts("allowed_names");
    let allowed: Vec<NameRule> = names
        .iter()
        .filter_map(|name| {
            let rule = NameRule::parse(name);
            if rule.is_none() {
                section.mistake(
                    "allowed_names",
                    format!(
                        "{name:?} is none of spiffe://domain/path, spiffe://domain/*, a DNS \
                         name, *"
                    ),
                );
            }
            rule
        })
        .collect();
    if names.len() > ALLOWED_NAMES_MAX {
        section.mistake("allowed_names", format!("at most {ALLOWED_NAMES_MAX}"));
    }
    if authorities.is_some() && names.is_empty() {
        section.mistake(
            "allowed_names",
            "is missing: an authority signs more than gateways; \"*\" lets all of its in",
        );
    }
    if authorities.is_none() && !names.is_empty() {
        section.mistake("client_ca", "is missing: without it nobody shows a name");
    }
    section.end();
    let clients = authorities.map(|authorities| Clients { authorities, allowed });
    Some(TlsFiles { certificate: certificate?, key: key?, clients })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Overrides};

    fn read(feed: &str) -> Result<FeedConfig, String> {
        let text = format!(
            "workers: []\nmodels: [{{name: a, directory: b, block_size: 1}}]\nfeed: {{{feed}}}\n"
        );
        let config = Config::parse(&text, Path::new("/etc/x"), &Overrides::default());
        config.map(|config| config.feed).map_err(|mistakes| mistakes.to_string())
    }

    #[test]
    fn loopback_is_the_default_and_asks_nothing() {
        let config = read("").unwrap();
        assert_eq!(config.listen.to_string(), DEFAULT);
        assert_eq!((config.tls, config.token_file, config.warning), (None, None, None));
        assert!(read("listen: \"[::1]:0\"").is_ok());
    }

    /// Goal: nobody opens the feed to other hosts without saying who may attach,
    /// or that everybody may.
    #[test]
    fn other_hosts_must_prove_who_they_are() {
        for open in ["0.0.0.0:9010", "[::]:9010", "10.0.0.1:9010"] {
            let with = |rest: &str| read(&format!("listen: \"{open}\"{rest}"));
            for nothing in ["", ", tls: {certificate: c, key: k}", ", insecure: false"] {
                let mistakes = with(nothing).unwrap_err();
                assert!(mistakes.contains("feed.listen: ") && mistakes.contains("insecure"));
            }
            assert_eq!(with(", insecure: true").unwrap().warning, Some(OPEN));
            assert_eq!(with(", token_file: t").unwrap().warning, Some(READABLE));
            let tls = "tls: {certificate: c, key: k, client_ca: a, allowed_names: [gw.example]}";
            assert_eq!(with(&format!(", {tls}")).unwrap().warning, None);
            let both = ", token_file: t, tls: {certificate: c, key: k}";
            assert_eq!(with(both).unwrap().warning, None);
        }
    }

    #[test]
    fn files_and_names_are_taken() {
        let config = read(
            "token_file: token, tls: {certificate: c.pem, key: /k.pem, client_ca: ca.pem, \
             allowed_names: [\"spiffe://td/ns/gw/*\", gw.example]}",
        )
        .unwrap();
        assert_eq!(config.token_file, Some("/etc/x/token".into()));
        let tls = config.tls.unwrap();
        assert_eq!((tls.certificate, tls.key), ("/etc/x/c.pem".into(), "/k.pem".into()));
        let clients = tls.clients.unwrap();
        assert_eq!(clients.authorities, PathBuf::from("/etc/x/ca.pem"));
        assert_eq!(clients.allowed.len(), 2);
        let socket = read("listen: \"unix:/run/feed.sock\", socket_mode: \"0660\"").unwrap();
        assert_eq!(socket.listen, Listen::Unix { path: "/run/feed.sock".into(), mode: 0o660 });
        assert_eq!(socket.listen.to_string(), "unix:/run/feed.sock");
        let socket = read("listen: \"unix:feed.sock\"").unwrap();
        assert_eq!(socket.listen, Listen::Unix { path: "/etc/x/feed.sock".into(), mode: 0o600 });
    }

    #[test]
    fn mistakes_are_named() {
        for (text, of) in [
            ("tls: {key: k}", "feed.tls.certificate"),
            ("tls: {certificate: c}", "feed.tls.key"),
            ("tls: {certificate: c, key: k, client_ca: a}", "feed.tls.allowed_names: is missing"),
            ("tls: {certificate: c, key: k, allowed_names: [a]}", "feed.tls.client_ca"),
            (
                "tls: {certificate: c, key: k, client_ca: a, allowed_names: [\"*.a\"]}",
                "feed.tls.allowed_names: \"*.a\"",
            ),
            ("tls: {certificate: c, key: k, verify: no}", "feed.tls.verify"),
            ("listen: \"unix:\"", "feed.listen"),
            ("listen: \"unix:/a\", tls: {certificate: c, key: k}", "feed.tls: is for TCP"),
            ("listen: \"unix:/a\", socket_mode: \"0777\"", "feed.socket_mode"),
            ("socket_mode: \"0600\"", "feed.socket_mode: is for a Unix socket"),
        ] {
            let mistakes = read(text).unwrap_err();
            assert!(mistakes.contains(of), "{text}: {mistakes}");
        }
    }
}
