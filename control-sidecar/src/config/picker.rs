//! Picker: the endpoint picker's part of the configuration.
//!
//! What the filter's configuration has, too, means the same here.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use warmpath_core::headers::may_carry_salt;

use super::fields::Section;
use crate::limits::PICKER_THREADS_MAX;

const MIB: u64 = 1024 * 1024;

/// What environment and flags say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PickerEnv {
    /// Where gateways ask; wins over the file, and switches the picker on.
    pub listen: Option<String>,
    /// `DYN_SECURE_SERVING`, if the file does not say.
    pub secure: Option<String>,
}

/// How connections are secured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Security {
    /// Not at all: plain HTTP/2.
    Plain,
    /// TLS with a certificate that is made at the start, and that nobody can
    /// check.
    SelfSigned,
    /// TLS with a certificate of files, read again when they change.
    Files {
        /// PEM: the certificate, and those between it and the root.
        certificate: PathBuf,
        /// PEM: its key.
        key: PathBuf,
    },
}

/// The endpoint picker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PickerConfig {
    /// Where gateways ask. Default `127.0.0.1:9002`.
    pub listen: SocketAddr,
    /// Where the gRPC health service is in plain, for probes; it is on the other
    /// port, too. Default `127.0.0.1:9003`.
    pub health_listen: SocketAddr,
    /// How connections are secured. Default self-signed.
    pub security: Security,
    /// Threads that read prompts and choose. Each holds the models' tokenizers
    /// and a prefix cache. 1 to 64; default 2.
    pub threads: usize,
    /// Whether responses say what was decided. Default no.
    pub debug_headers: bool,
    /// Whether tokens are handed over as `nvext.token_data`. Default no.
    pub token_data: bool,
    /// Whether `x-prefiller-host-port` is set. Default no.
    pub prefiller_header: bool,
    /// Whether workers are also named in the older headers. Default no.
    pub legacy_headers: bool,
    /// Whether whoever sends requests may name their workers. Default no.
    pub trust_pins: bool,
    /// Header, in lower case, of a trusted hop's cache salt. Default none.
    pub cache_salt_header: Option<String>,
    /// Whether the body's own cache salt counts. Default yes.
    pub cache_salt_from_body: bool,
    /// Longest body that is looked at, in bytes. 1 KiB to 16 MiB; default 4 MiB.
    pub body_bytes_max: usize,
    /// Most requests that wait for a thread; one more is routed by load. 1 to
    /// 4096; default 256.
    pub readings_max: usize,
    /// Most bytes of bodies that are held at a time, of requests that wait or
    /// that are still coming in; one more is routed by load. 1 MiB to 1 GiB;
    /// default 64 MiB.
    pub reading_bytes_max: usize,
    /// Longest that a prompt may take to be read, in milliseconds. 10 ms to 10
    /// minutes; default 10 s.
    pub reading_ms_max: u64,
    /// Most blocks of the prefix index. 1 000 to 40 million; default 4 million.
    pub index_blocks_max: usize,
    /// Most bytes of a thread's prefix cache. 0 to 256 MiB; default 32 MiB.
    pub prefix_cache_bytes_max: usize,
}

impl Default for PickerConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 9002)),
            health_listen: SocketAddr::from(([127, 0, 0, 1], 9003)),
            security: Security::SelfSigned,
            threads: 2,
            debug_headers: false,
            token_data: false,
            prefiller_header: false,
            legacy_headers: false,
            trust_pins: false,
            cache_salt_header: None,
            cache_salt_from_body: true,
            body_bytes_max: 4 * 1024 * 1024,
            readings_max: 256,
            reading_bytes_max: 64 * 1024 * 1024,
            reading_ms_max: 10_000,
            index_blocks_max: 4_000_000,
            prefix_cache_bytes_max: 32 * 1024 * 1024,
        }
    }
}

impl PickerConfig {
    /// Takes a section apart.
    ///
    /// - `directory`: where relative paths start.
    pub(super) fn read(mut section: Section<'_>, directory: &Path, env: &PickerEnv) -> Self {
        let mut config = Self::default();
        let from_file = section.text("listen");
        let listen = env.listen.clone().or(from_file);
        for (name, text, target) in [
            ("listen", listen, &mut config.listen),
            ("health_listen", section.text("health_listen"), &mut config.health_listen),
        ] {
            match text.map(|text| text.parse().map_err(|_| text)) {
                None => {}
                Some(Ok(address)) => *target = address,
                Some(Err(text)) => section.mistake(
                    name,
                    format!("must be an address and a port such as {target}, is {text:?}"),
                ),
            }
        }
        config.security = security(&mut section, directory, env);
        for (name, target) in [
            ("debug_headers", &mut config.debug_headers),
            ("token_data", &mut config.token_data),
            ("prefiller_header", &mut config.prefiller_header),
            ("legacy_headers", &mut config.legacy_headers),
            ("trust_pins", &mut config.trust_pins),
            ("cache_salt_from_body", &mut config.cache_salt_from_body),
        ] {
            *target = section.flag(name).unwrap_or(*target);
        }
        config.cache_salt_header =
            section.text("cache_salt_header").map(|name| name.to_ascii_lowercase());
        if config.cache_salt_header.as_deref().is_some_and(|name| !may_carry_salt(name)) {
            section.mistake("cache_salt_header", "must name a header that steers no routing");
        }
        for (name, low, high, target) in [
            ("threads", 1, PICKER_THREADS_MAX, &mut config.threads),
            ("body_bytes_max", 1_024, 16 * MIB, &mut config.body_bytes_max),
            ("readings_max", 1, 4_096, &mut config.readings_max),
            ("reading_bytes_max", MIB, 1_024 * MIB, &mut config.reading_bytes_max),
            ("index_blocks_max", 1_000, 40_000_000, &mut config.index_blocks_max),
            ("prefix_cache_bytes_max", 0, 256 * MIB, &mut config.prefix_cache_bytes_max),
        ] {
            let given = section.number(name, low, high).and_then(|it| usize::try_from(it).ok());
            *target = given.unwrap_or(*target);
        }
        let reading_ms = section.number("reading_ms_max", 10, 600_000);
        config.reading_ms_max = reading_ms.unwrap_or(config.reading_ms_max);
        section.end();
        config
    }
}

fn security(section: &mut Section<'_>, directory: &Path, env: &PickerEnv) -> Security {
    let secure = section.flag("secure");
    let [certificate, key] =
        ["certificate", "key"].map(|name| section.text(name).map(|path| directory.join(path)));
    let from_env = env.secure.as_deref().map(str::trim).filter(|word| !word.is_empty());
    let from_env = match from_env.map(str::to_ascii_lowercase).as_deref() {
        None => true,
        Some("true" | "1" | "yes" | "on") => true,
        Some("false" | "0" | "no" | "off") => false,
        Some(word) => {
            if secure.is_none() {
                section.mistake(
                    "secure",
                    format!("DYN_SECURE_SERVING must be true or false, is {word:?}"),
                );
            }
            true
        }
    };
    match (certificate, key) {
        (None, None) if secure.unwrap_or(from_env) => Security::SelfSigned,
        (None, None) => Security::Plain,
        (Some(_), Some(_)) if secure == Some(false) => {
            section.mistake("certificate", "is of no use while `secure` is false");
            Security::Plain
        }
        (Some(certificate), Some(key)) => Security::Files { certificate, key },
        _ => {
            section.mistake("certificate", "needs `key`, and `key` needs it");
            Security::SelfSigned
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Overrides};
    use super::*;

    fn parse_with(section: &str, picker: PickerEnv) -> Result<Option<PickerConfig>, String> {
        let text =
            format!("models: [{{name: m, directory: d, block_size: 16}}]\nworkers: []\n{section}");
        let overrides = Overrides { picker, ..Overrides::default() };
        Config::parse(&text, Path::new("/c"), &overrides)
            .map(|config| config.picker)
            .map_err(|mistakes| mistakes.to_string())
    }

    fn parse(section: &str) -> Result<Option<PickerConfig>, String> {
        parse_with(section, PickerEnv::default())
    }

    #[test]
    fn it_is_off_unless_asked_for() {
        assert_eq!(parse(""), Ok(None));
        assert_eq!(parse("picker: {}"), Ok(Some(PickerConfig::default())));
        let listen = Some("127.0.0.1:1".to_owned());
        let on = parse_with("", PickerEnv { listen, secure: None }).unwrap().unwrap();
        assert_eq!(on.listen.port(), 1);
    }

    #[test]
    fn certificates_come_in_pairs_and_the_file_wins() {
        let of = |section: &str, secure: &str| {
            let secure = Some(secure.to_owned());
            parse_with(section, PickerEnv { listen: None, secure }).unwrap().unwrap().security
        };
        assert_eq!(of("picker: {}", "false"), Security::Plain);
        assert_eq!(of("picker: {}", ""), Security::SelfSigned);
        assert_eq!(of("picker: {secure: true}", "0"), Security::SelfSigned);
        let files = Security::Files { certificate: "/c/a".into(), key: "/b".into() };
        assert_eq!(of("picker: {certificate: a, key: /b}", "false"), files);
        for wrong in [
            "picker: {certificate: a}",
            "picker: {certificate: a, key: b, secure: false}",
            "picker: {secure: maybe}",
            "picker: {listen: here}",
            "picker: {cache_salt_header: x-dynamo-dp-rank}",
            "picker: {threads: 0}",
            "picker: {unknown: 1}",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        let secure = Some("perhaps".to_owned());
        assert!(parse_with("picker: {}", PickerEnv { listen: None, secure }).is_err());
    }
}
