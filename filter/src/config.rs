//! Config: the plugin's configuration, JSON.
//!
//! Unknown members are refused, and every mistake is named at once; a
//! configuration that is refused leaves the old one in force.

use core::fmt;
use core::ops::RangeInclusive;

use warmpath_core::headers::may_carry_salt;
use warmpath_core::json::{JsonError, JsonKind, RawJson};

use crate::overrides::Overrides;

/// How the choice is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Headers are held until the body is in, then name the worker's endpoint.
    /// Needs `allow_on_headers_stop_iteration: true` on the plugin.
    Endpoint,
    /// Headers go at once, the body names the worker in `nvext`. Works on any
    /// plugin settings, with Dynamo workers.
    Body,
    /// Headers go at once, and Envoy's own `buffer` filter behind this one holds
    /// them until the body is in. The choice is in properties of the request, from
    /// which a `header_mutation` filter behind that writes the headers. For Envoy
    /// before 1.35, which has no setting that `Endpoint` needs.
    Buffer,
}

/// Whether bookings are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BookingOrder {
    /// A booking counts only right behind the state that it was decided on; if
    /// another VM was faster, the decision is made again.
    Strict,
    /// A booking is appended wherever the log is by then. A diagnostic, to see
    /// what the order is worth: worker threads pick the same worker at once.
    None,
}

/// As written. Read by our own scanner: serde's would be a twentieth of the
/// module's code.
#[derive(Debug)]
struct RawConfig<'a> {
    mode: Mode,
    feed_cluster: String,
    debug_headers: bool,
    token_data: bool,
    index_blocks_max: u64,
    prefix_cache_bytes_max: u64,
    body_bytes_max: u64,
    booking_expiry_ms: Option<u64>,
    booking_order: BookingOrder,
    feed_stale_ms: u64,
    readings_max: u64,
    reading_bytes_max: u64,
    reading_ms_max: u64,
    enforce_disagg: Option<bool>,
    prefiller_header: bool,
    legacy_headers: bool,
    trust_pins: bool,
    cache_salt_header: Option<String>,
    cache_salt_from_body: bool,
    router: RawJson<'a>,
}

impl Default for RawConfig<'_> {
    fn default() -> Self {
        Self {
            mode: Mode::Body,
            feed_cluster: "warmpath_feed".to_owned(),
            debug_headers: false,
            token_data: false,
            index_blocks_max: 4_000_000,
            prefix_cache_bytes_max: 32 * 1024 * 1024,
            body_bytes_max: 4 * 1024 * 1024,
            booking_expiry_ms: None,
            booking_order: BookingOrder::Strict,
            feed_stale_ms: 2_000,
            readings_max: 256,
            reading_bytes_max: 64 * 1024 * 1024,
            reading_ms_max: 10_000,
            enforce_disagg: None,
            prefiller_header: false,
            legacy_headers: false,
            trust_pins: false,
            cache_salt_header: None,
            cache_salt_from_body: true,
            router: RawJson::EMPTY_OBJECT,
        }
    }
}

impl<'a> RawConfig<'a> {
    /// Reads a configuration; what is wrong with it in words.
    fn read(json: &'a [u8]) -> Result<Self, String> {
        let text = str::from_utf8(json).map_err(|err| err.to_string())?;
        let json = RawJson::parse(text).map_err(|err| match err {
            JsonError::Syntax(at) => format!("not JSON from byte {at} on"),
            JsonError::TooDeep => "nested too deep".to_owned(),
        })?;
        if json.kind() != JsonKind::Object {
            return Err("must be a JSON object".to_owned());
        }
        let mut config = Self::default();
        let mut seen = Vec::new();
        for member in json.members() {
            let name = member.key.string().unwrap_or_default();
            let takes = config.set(&name, member.value)?;
            if let Err(Takes(what)) = takes {
                return Err(format!("`{name}` must be {what}"));
            }
            if seen.contains(&name) {
                return Err(format!("`{name}` is there twice"));
            }
            seen.push(name);
        }
        Ok(config)
    }

    /// Sets a member. Fails if there is none of that name.
    fn set(&mut self, name: &str, value: RawJson<'a>) -> Result<Result<(), Takes>, String> {
        Ok(match name {
            "mode" => {
                let words =
                    [("endpoint", Mode::Endpoint), ("body", Mode::Body), ("buffer", Mode::Buffer)];
                word(value, &words).map(|mode| self.mode = mode)
            }
            "booking_order" => {
                let words = [("strict", BookingOrder::Strict), ("none", BookingOrder::None)];
                word(value, &words).map(|order| self.booking_order = order)
            }
            "feed_cluster" => text(value).map(|name| self.feed_cluster = name),
            "debug_headers" => flag(value).map(|flag| self.debug_headers = flag),
            "token_data" => flag(value).map(|flag| self.token_data = flag),
            "index_blocks_max" => number(value).map(|blocks| self.index_blocks_max = blocks),
            "prefix_cache_bytes_max" => {
                number(value).map(|bytes| self.prefix_cache_bytes_max = bytes)
            }
            "body_bytes_max" => number(value).map(|bytes| self.body_bytes_max = bytes),
            "readings_max" => number(value).map(|prompts| self.readings_max = prompts),
            "reading_bytes_max" => number(value).map(|bytes| self.reading_bytes_max = bytes),
            "reading_ms_max" => number(value).map(|time_ms| self.reading_ms_max = time_ms),
            "booking_expiry_ms" => {
                optional(value, number).map(|expiry| self.booking_expiry_ms = expiry)
            }
            "feed_stale_ms" => number(value).map(|age_ms| self.feed_stale_ms = age_ms),
            "enforce_disagg" => optional(value, flag).map(|flag| self.enforce_disagg = flag),
            "prefiller_header" => flag(value).map(|flag| self.prefiller_header = flag),
            "legacy_headers" => flag(value).map(|flag| self.legacy_headers = flag),
            "trust_pins" => flag(value).map(|flag| self.trust_pins = flag),
            "cache_salt_header" => optional(value, text).map(|name| self.cache_salt_header = name),
            "cache_salt_from_body" => flag(value).map(|flag| self.cache_salt_from_body = flag),
            "router" if value.kind() == JsonKind::Object => {
                self.router = value;
                Ok(())
            }
            "router" => Err(Takes("an object")),
            _ => return Err(format!("`{name}` is not a known member")),
        })
    }
}

impl RawConfig<'_> {
    /// What is wrong with its numbers, in words.
    fn out_of_range(&self) -> Vec<String> {
        const MIB: u64 = 1024 * 1024;
        let numbers = [
            ("index_blocks_max", Some(self.index_blocks_max), 1_000..=40_000_000),
            ("prefix_cache_bytes_max", Some(self.prefix_cache_bytes_max), 0..=256 * MIB),
            ("body_bytes_max", Some(self.body_bytes_max), 1_024..=16 * MIB),
            ("booking_expiry_ms", self.booking_expiry_ms, 1_000..=86_400_000),
            ("feed_stale_ms", Some(self.feed_stale_ms), 500..=3_600_000),
            ("readings_max", Some(self.readings_max), 1..=4_096),
            ("reading_bytes_max", Some(self.reading_bytes_max), MIB..=128 * MIB),
            ("reading_ms_max", Some(self.reading_ms_max), 10..=600_000),
        ];
        let wrong = numbers
            .into_iter()
            .filter(|(_, number, range)| number.is_some_and(|number| !range.contains(&number)));
        let words = |(name, _, range): (&str, _, RangeInclusive<u64>)| {
            format!("`{name}` must be {} to {}", range.start(), range.end())
        };
        wrong.map(words).collect()
    }
}

/// What a member takes, in words.
struct Takes(&'static str);

fn flag(value: RawJson<'_>) -> Result<bool, Takes> {
    value.boolean().ok_or(Takes("true or false"))
}

fn number(value: RawJson<'_>) -> Result<u64, Takes> {
    value.unsigned().ok_or(Takes("a whole number"))
}

fn text(value: RawJson<'_>) -> Result<String, Takes> {
    value.string().map(std::borrow::Cow::into_owned).ok_or(Takes("a string"))
}

/// One of some words.
fn word<T: Copy>(value: RawJson<'_>, words: &[(&'static str, T)]) -> Result<T, Takes> {
    let found = words.iter().find(|(word, _)| value.is_string(word));
    found.map(|(_, meant)| *meant).ok_or(Takes("one of the words that it takes"))
}

/// Nothing for `null`.
fn optional<T>(
    value: RawJson<'_>,
    read: impl FnOnce(RawJson<'_>) -> Result<T, Takes>,
) -> Result<Option<T>, Takes> {
    if value.is_null() { Ok(None) } else { read(value).map(Some) }
}

/// As used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// How the choice is handed over. Default `body`, which can never hang a
    /// request.
    pub mode: Mode,
    /// Envoy cluster of the sidecar's feed. Default `warmpath_feed`.
    pub feed_cluster: String,
    /// Whether responses say what was decided (`x-warmpath-*`). Default no.
    pub debug_headers: bool,
    /// Whether the prompt's tokens are handed over as `nvext.token_data`, so
    /// that the worker need not tokenize again. Only sent when they are exact.
    /// Default no.
    pub token_data: bool,
    /// Most blocks of the prefix index, 1 000 to 40 million (a VM has 1 GiB of
    /// memory, a block takes up to 13 bytes, twice while a snapshot comes in).
    /// Default 4 million.
    pub index_blocks_max: usize,
    /// Most bytes of memory for the beginnings of prompts that were tokenized
    /// before, in each VM, so that a turn of a conversation costs only that turn;
    /// text takes about twice its length. 0 to 256 MiB; default 32 MiB; 0 keeps
    /// none.
    pub prefix_cache_bytes_max: usize,
    /// Longest body that is looked at, in bytes; a longer one is routed by
    /// load: looking at it would hold the worker thread up for too long. 1 KiB to
    /// 16 MiB; default 4 MiB.
    pub body_bytes_max: usize,
    /// Whether bookings are ordered. Default `strict`; `none` is a diagnostic.
    pub booking_order: BookingOrder,
    /// Age of the feed from which decisions count as made on stale state, in
    /// milliseconds. 500 ms to 1 hour; default 2 s.
    pub feed_stale_ms: u64,
    /// Most long prompts of a worker thread that wait to be read, a slice at a
    /// time; one more is routed by load. 1 to 4096; default 256.
    pub readings_max: usize,
    /// Most bytes of their bodies. What is held of a prompt while it is read takes
    /// up to five times as much of a VM's memory. 1 MiB to 128 MiB; default
    /// 64 MiB.
    pub reading_bytes_max: usize,
    /// Longest that such a prompt may take to be read, in milliseconds; it is
    /// routed by load then. 10 ms to 10 minutes; default 10 s.
    pub reading_ms_max: u64,
    /// Whether `x-prefiller-host-port` says where the prefill worker is reached,
    /// for engines with llm-d's sidecar. Default no.
    pub prefiller_header: bool,
    /// Whether the worker is also named in the headers that Dynamo's frontends
    /// read before June 2026. Default no.
    pub legacy_headers: bool,
    /// Whether whoever sends requests may name their workers, in Dynamo's headers
    /// or in `nvext`: only where every sender is trusted. Default no: such names
    /// are removed unread. A gateway that removes the headers before this filter
    /// sees them, as our configurations do, must not.
    pub trust_pins: bool,
    /// Name, in lower case, of the header in which a trusted hop says what
    /// separates the request's cache from others'. It is passed on, since the
    /// engine must be told, too. None by default: such headers are then ignored.
    pub cache_salt_header: Option<String>,
    /// Whether the body's own cache salt counts where that header is absent.
    /// Default yes. The body is passed on in any case.
    pub cache_salt_from_body: bool,
    /// Settings that win over the feed's: `router`, and two with members of
    /// their own. `enforce_disagg` is whether requests are answered 503 where a
    /// decode worker would have to serve without a prefill worker;
    /// `booking_expiry_ms`, 1 s to 1 day, is after how long a booking that
    /// nobody frees or refreshes ends. Default none.
    pub overrides: Overrides,
}

/// Why a configuration is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigError {
    /// Not JSON of the known members; words that name member or place.
    Malformed(String),
    /// Members out of their ranges, all of them.
    OutOfRange(Vec<String>),
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(words) => write!(f, "plugin configuration: {words}"),
            Self::OutOfRange(members) => {
                write!(f, "plugin configuration: {}", members.join("; "))
            }
        }
    }
}

impl Config {
    /// Parses a plugin's configuration. An empty one is all defaults.
    ///
    /// # Errors
    ///
    /// A [`ConfigError`] with every mistake.
    pub fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        let raw: RawConfig = if json.trim_ascii().is_empty() {
            RawConfig::default()
        } else {
            RawConfig::read(json).map_err(ConfigError::Malformed)?
        };
        let mut wrong = raw.out_of_range();
        if raw.feed_cluster.is_empty() {
            wrong.push("`feed_cluster` must not be empty".to_owned());
        }
        let cache_salt_header = raw.cache_salt_header.map(|name| name.to_ascii_lowercase());
        if cache_salt_header.as_deref().is_some_and(|name| !may_carry_salt(name)) {
            wrong.push("`cache_salt_header` must name a header that steers no routing".to_owned());
        }
        let overrides =
            overrides(raw.router, raw.enforce_disagg, raw.booking_expiry_ms, &mut wrong);
        let sizes = [
            raw.index_blocks_max,
            raw.prefix_cache_bytes_max,
            raw.body_bytes_max,
            raw.readings_max,
            raw.reading_bytes_max,
        ];
        let (
            [
                Ok(index_blocks_max),
                Ok(prefix_cache_bytes_max),
                Ok(body_bytes_max),
                Ok(readings_max),
                Ok(reading_bytes_max),
            ],
            true,
        ) = (sizes.map(usize::try_from), wrong.is_empty())
        else {
            return Err(ConfigError::OutOfRange(wrong));
        };
        Ok(Self {
            mode: raw.mode,
            feed_cluster: raw.feed_cluster,
            debug_headers: raw.debug_headers,
            token_data: raw.token_data,
            index_blocks_max,
            prefix_cache_bytes_max,
            body_bytes_max,
            booking_order: raw.booking_order,
            feed_stale_ms: raw.feed_stale_ms,
            readings_max,
            reading_bytes_max,
            reading_ms_max: raw.reading_ms_max,
            prefiller_header: raw.prefiller_header,
            legacy_headers: raw.legacy_headers,
            trust_pins: raw.trust_pins,
            cache_salt_header,
            cache_salt_from_body: raw.cache_salt_from_body,
            overrides,
        })
    }
}

/// The settings that win over the feed's.
fn overrides(
    router: RawJson<'_>,
    enforce_disagg: Option<bool>,
    booking_expiry_ms: Option<u64>,
    wrong: &mut Vec<String>,
) -> Overrides {
    let mut overrides = Overrides::default();
    for member in router.members() {
        let name = member.key.string().unwrap_or_default();
        if let Err(why) = overrides.add(&name, member.value.text()) {
            wrong.push(format!("`router`: {why}"));
        }
    }
    let expiry_secs = booking_expiry_ms.map(|ms| format!("{}.{:03}", ms / 1_000, ms % 1_000));
    let own = [
        ("enforce_disagg", "enforce_disagg", enforce_disagg.map(|flag| flag.to_string())),
        ("booking_expiry_ms", "active_request_expiry_secs", expiry_secs),
    ];
    for (member, name, value) in own {
        let Some(value) = value else { continue };
        if router.member(name).is_some() {
            wrong.push(format!("`{member}` is `router.{name}`: give one of them"));
        } else if wrong.is_empty()
            && let Err(why) = overrides.add(name, &value)
        {
            wrong.push(why);
        }
    }
    overrides
}

#[cfg(test)]
mod tests {
    use super::*;
    use warmpath_core::limits::HEADER_NAME_BYTES_MAX;
    use warmpath_core::settings::{RouterSettings, Settings};

    #[test]
    fn nothing_is_all_defaults() {
        let config = Config::parse(b"").unwrap();
        assert_eq!(config, Config::parse(b"{}").unwrap());
        assert_eq!(config.mode, Mode::Body);
        assert_eq!(config.overrides, Overrides::default());
        assert!(!config.prefiller_header);
        assert_eq!(config.prefix_cache_bytes_max, 33_554_432);
        assert_eq!((config.legacy_headers, config.trust_pins), (false, false));
        assert_eq!(config.booking_order, BookingOrder::Strict);
        assert_eq!((config.cache_salt_header, config.cache_salt_from_body), (None, true));
    }

    #[test]
    fn members_are_taken() {
        let json = br#"{"mode":"endpoint","feed_cluster":"f","debug_headers":true,
            "booking_order":"none","prefix_cache_bytes_max":0}"#;
        let config = Config::parse(json).unwrap();
        assert_eq!(config.prefix_cache_bytes_max, 0);
        assert_eq!(config.booking_order, BookingOrder::None);
        assert_eq!((config.mode, config.debug_headers), (Mode::Endpoint, true));
        assert_eq!(config.feed_cluster, "f");
    }

    #[test]
    fn the_salt_s_header_steers_no_routing() {
        let parse = |name: &str| {
            let json = serde_json::json!({ "cache_salt_header": name }).to_string();
            Config::parse(json.as_bytes()).map(|config| config.cache_salt_header)
        };
        for name in ["x-tenant-id", "X-Tenant-Id"] {
            assert_eq!(parse(name), Ok(Some("x-tenant-id".to_owned())));
        }
        assert_eq!(parse("x-customer"), Ok(Some("x-customer".to_owned())));
        let long = "x".repeat(HEADER_NAME_BYTES_MAX + 1);
        let refused = ["", ":path", "a b", "X-Dynamo-Dp-Rank", "x-llm-d-tenant", "x-warmpath-a"];
        for name in refused.into_iter().chain([long.as_str()]) {
            assert!(parse(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_member_that_is_not_known_is_named() {
        let Err(ConfigError::Malformed(words)) = Config::parse(br#"{"feed_clutser":"x"}"#) else {
            panic!("must be refused");
        };
        assert!(words.contains("feed_clutser"), "{words}");
    }

    #[test]
    fn all_mistakes_are_named_together() {
        let json = br#"{"feed_cluster":"","index_blocks_max":1,"booking_expiry_ms":5,
            "prefix_cache_bytes_max":268435457,
            "readings_max":0,"reading_bytes_max":1,"reading_ms_max":1}"#;
        let Err(ConfigError::OutOfRange(wrong)) = Config::parse(json) else {
            panic!("must be refused");
        };
        assert_eq!(wrong.len(), 7, "{wrong:?}");
    }

    fn settings(json: &str) -> Settings {
        let config = Config::parse(json.as_bytes()).unwrap_or_else(|err| panic!("{json}: {err}"));
        config.overrides.over(&RouterSettings::default()).0.default
    }

    #[test]
    fn settings_of_the_plugin_win() {
        assert_eq!(settings("{}"), Settings::default());
        let old = settings(r#"{"enforce_disagg": true, "booking_expiry_ms": 1500}"#);
        assert!(old.enforce_disagg);
        assert_eq!(old.active_request_expiry_ms, 1_500);
        let new =
            settings(r#"{"router": {"enforce_disagg": true, "active_request_expiry_secs": 1.5}}"#);
        assert_eq!(new, old);
    }

    #[test]
    fn settings_that_cannot_be_are_named() {
        for (json, expected) in [
            (r#"{"router": {"router_temprature": 1}}"#, "router_temprature"),
            (r#"{"router": {"router_temperature": -1}}"#, "`router_temperature` must be a number"),
            (r#"{"router": {"router_temperature": "1"}}"#, "`router_temperature` must be a number"),
            (r#"{"router": {"use_kv_events": [true]}}"#, "`use_kv_events` must be true or false"),
            (r#"{"router": [1]}"#, "plugin configuration"),
            (
                r#"{"enforce_disagg": true, "router": {"enforce_disagg": false}}"#,
                "`enforce_disagg` is `router.enforce_disagg`",
            ),
            (
                r#"{"booking_expiry_ms": 1000, "router": {"active_request_expiry_secs": 1}}"#,
                "`booking_expiry_ms` is `router.active_request_expiry_secs`",
            ),
        ] {
            let words = Config::parse(json.as_bytes()).unwrap_err().to_string();
            assert!(words.contains(expected), "{json}: {words}");
        }
    }

    /// Goal: a member of the wrong kind is named, and nothing is guessed.
    #[test]
    fn a_member_of_another_kind_is_named() {
        for (json, expected) in [
            (r#"{"debug_headers": 1}"#, "`debug_headers` must be true or false"),
            (r#"{"index_blocks_max": "5000"}"#, "`index_blocks_max` must be a whole number"),
            (r#"{"index_blocks_max": 5000.5}"#, "`index_blocks_max` must be a whole number"),
            (r#"{"index_blocks_max": -5000}"#, "`index_blocks_max` must be a whole number"),
            (r#"{"feed_cluster": null}"#, "`feed_cluster` must be a string"),
            (r#"{"mode": true}"#, "`mode` must be"),
            (r#"{"trust_pins": true, "trust_pins": true}"#, "`trust_pins` is there twice"),
        ] {
            let words = Config::parse(json.as_bytes()).unwrap_err().to_string();
            assert!(words.contains(expected), "{json}: {words}");
        }
        let nothing = br#" {"booking_expiry_ms": null, "cache_salt_header": null} "#;
        assert_eq!(Config::parse(nothing), Config::parse(b"{}"));
        let escaped = br#"{"feed\u005fcluster": "a\u0062"}"#;
        assert_eq!(Config::parse(escaped).unwrap().feed_cluster, "ab");
    }

    #[test]
    fn a_mode_that_is_not_known_is_refused() {
        assert!(Config::parse(br#"{"mode":"buffered"}"#).is_err());
        assert!(Config::parse(br#"{"booking_order":"loose"}"#).is_err());
        assert!(Config::parse(b"[]").is_err());
        assert!(Config::parse(b"{").is_err());
    }
}
