//! Replicas: how bookings are exchanged with other routers. Whether they are is
//! one of the router's settings.
//!
//! Environment variables that Dynamo reads mean the same here; the file wins
//! over them.

use std::net::{IpAddr, SocketAddr};

use warmpath_core::settings::Settings;

use super::fields::Section;
use crate::limits::PEERS_MAX;
use crate::replicas::HOST_DEFAULT;

/// Environment variables that matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplicasEnv {
    /// `DYN_EVENT_PLANE_HOST`
    pub host: Option<String>,
    /// `DYN_ZMQ_BROKER_URL`
    pub broker: Option<String>,
}

impl ReplicasEnv {
    /// Reads the environment. An empty variable counts as not set.
    ///
    /// - `variable`: the value of a variable by its name.
    pub fn from_env(variable: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| variable(name).filter(|value| !value.is_empty());
        Self { host: get("DYN_EVENT_PLANE_HOST"), broker: get("DYN_ZMQ_BROKER_URL") }
    }
}

/// How bookings are exchanged with other routers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicasConfig {
    /// Whether they are.
    pub sync: bool,
    /// Address of our publishers on the event plane.
    pub host: IpAddr,
    /// Where other sidecars are told, where discovery has no records.
    pub listen: Option<SocketAddr>,
    /// `host:port` of other sidecars, where discovery has no records. A name
    /// stands for all addresses behind it.
    pub peers: Vec<String>,
    /// `host:port` of the sockets of ZMQ brokers that are published at.
    pub brokers: Vec<String>,
    /// After how long a booking that nobody speaks of ends, in milliseconds.
    pub expiry_ms: u64,
}

impl Default for ReplicasConfig {
    fn default() -> Self {
        Self {
            sync: false,
            host: HOST_DEFAULT,
            listen: None,
            peers: Vec::new(),
            brokers: Vec::new(),
            expiry_ms: Settings::default().active_request_expiry_ms,
        }
    }
}

impl ReplicasConfig {
    /// Takes a section apart.
    pub(super) fn read(mut section: Section<'_>, env: &ReplicasEnv, settings: &Settings) -> Self {
        let mut config = Self {
            sync: settings.router_replica_sync,
            expiry_ms: settings.active_request_expiry_ms,
            ..Self::default()
        };
        let host = section.text("host").or_else(|| env.host.clone());
        if let Some(text) = host {
            match text.parse() {
                Ok(host) => config.host = host,
                Err(_) => section.mistake("host", format!("must be an IP address, is {text:?}")),
            }
        }
        if let Some(text) = section.text("listen") {
            config.listen = text.parse().ok();
            if config.listen.is_none() {
                section.mistake("listen", "must be an address and a port such as 127.0.0.1:9020");
            }
        }
        config.peers = section.texts("peers");
        if config.peers.len() > PEERS_MAX {
            section.mistake("peers", format!("at most {PEERS_MAX}"));
        }
        config.brokers = section.texts("brokers");
        if config.brokers.is_empty() {
            config.brokers = env.broker.as_deref().map(publish_addresses).unwrap_or_default();
        }
        for list in [&mut config.peers, &mut config.brokers] {
            for address in list {
                if let Some(bare) = address.strip_prefix("tcp://") {
                    *address = bare.to_owned();
                }
                let port = address.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
                if !matches!(port, Some(Ok(1..))) {
                    section.mistake("peers", format!("must be host:port, is {address:?}"));
                }
            }
        }
        section.end();
        config
    }
}

/// The addresses to publish at in
/// `xsub=tcp://a:5555;tcp://b:5555 , xpub=tcp://a:5556`.
fn publish_addresses(text: &str) -> Vec<String> {
    let sides = text.split(',').filter_map(|side| side.trim().strip_prefix("xsub="));
    let urls = sides.flat_map(|urls| urls.split(';')).map(str::trim);
    urls.filter(|url| !url.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Config, Overrides};

    fn read(text: &str, env: ReplicasEnv) -> Result<ReplicasConfig, String> {
        let text =
            format!("workers: []\nmodels: [{{name: a, directory: b, block_size: 1}}]\n{text}");
        let overrides = Overrides { replicas: env, ..Overrides::default() };
        let config = Config::parse(&text, Path::new("."), &overrides);
        config.map(|config| config.replicas).map_err(|mistakes| mistakes.to_string())
    }

    #[test]
    fn file_and_environment_are_read() {
        assert_eq!(read("", ReplicasEnv::default()), Ok(ReplicasConfig::default()));
        let env = ReplicasEnv {
            host: Some("127.0.0.2".to_owned()),
            broker: Some("xsub=tcp://a:1;tcp://b:2 , xpub=tcp://a:3".to_owned()),
        };
        let from_env = read("", env.clone()).unwrap();
        assert!(!from_env.sync);
        assert_eq!(from_env.host.to_string(), "127.0.0.2");
        assert_eq!(from_env.brokers, ["a:1", "b:2"]);
        let file = "replicas: {listen: \"127.0.0.1:9\", peers: [\"tcp://x:9\"]}\n\
                    router: {router_replica_sync: true, active_request_expiry_secs: 7}";
        let from_file = read(file, env).unwrap();
        assert!(from_file.sync && from_file.expiry_ms == 7_000);
        assert_eq!(from_file.listen.unwrap().port(), 9);
        assert_eq!(from_file.peers, ["x:9"]);
    }

    #[test]
    fn mistakes_are_named() {
        let file = "replicas: {host: x, listen: y, peers: [z], more: 1}";
        let mistakes = read(file, ReplicasEnv::default()).unwrap_err();
        for of in ["replicas.host", "replicas.listen", "replicas.peers", "replicas.more"] {
            assert!(mistakes.contains(of), "{of}: {mistakes}");
        }
    }
}
