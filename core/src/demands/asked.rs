//! Asked: what a request's headers ask for, and then its body.

use super::session::Session;
use super::{Demands, Pin, Refusal};
use crate::headers::{
    DP_RANK_NAMES, METADATA_PREFIX, PREFILL_DP_RANK_NAMES, PREFILL_WORKER_NAMES, PRIORITY,
    STRICT_PRIORITY, WORKER_NAMES,
};
use crate::ids::{DpRank, WorkerId};
use crate::json::RawJson;
use crate::limits::{METADATA_BYTES_MAX, METADATA_ENTRIES_MAX};
use crate::request::NvExt;
use crate::request::nvext::PIN_FIELDS;

/// What the headers call a rank that is not set.
const UNSET_RANK: u32 = u32::MAX;

/// What counts of what a request asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Whether whoever sends requests may name workers.
    pub trusts_pins: bool,
    /// Whether sessions are bound to workers at all; only then is a name that
    /// is too long for that refused.
    pub binds_sessions: bool,
}

/// What a request's headers ask for. Read before they are stripped, and joined
/// with what its body asks for when that is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    rules: Rules,
    pins: Pins,
    priority: Option<i32>,
    strict_priority: Option<u32>,
    session: Option<Session>,
}

/// The five numbers that name workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Pins {
    backend: Option<u64>,
    decode: Option<u64>,
    prefill: Option<u64>,
    rank: Option<u32>,
    prefill_rank: Option<u32>,
}

impl Asked {
    /// Reads a request's headers.
    ///
    /// - `headers`: names in lower case and values, in order.
    ///
    /// # Errors
    ///
    /// [`Refusal`], which names the header.
    pub fn read(headers: &[(String, String)], rules: Rules) -> Result<Self, Refusal> {
        bound_metadata(headers)?;
        let first = |name: &str| {
            headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
        };
        let pins = if rules.trusts_pins { Pins::of_headers(first)? } else { Pins::default() };
        let integer = |name: &'static str| first(name).map(|value| (name, value.trim()));
        let priority =
            integer(PRIORITY).map(|(name, value)| value.parse().map_err(|_| Refusal::Header(name)));
        let strict_priority = integer(STRICT_PRIORITY)
            .map(|(name, value)| value.parse().map_err(|_| Refusal::Header(name)));
        Ok(Self {
            rules,
            pins,
            priority: priority.transpose()?,
            strict_priority: strict_priority.transpose()?,
            session: Session::read(first),
        })
    }

    /// Joins it with what the body asks for.
    ///
    /// # Errors
    ///
    /// [`Refusal`], which names the field of the body, or the header.
    pub fn demands(&self, nvext: Option<&NvExt<'_>>) -> Result<Demands, Refusal> {
        let pins = match nvext {
            Some(nvext) if self.rules.trusts_pins => self.pins.or(Pins::of_body(nvext)?),
            _ => self.pins,
        };
        let (prefill, serving) = (pins.prefill(), pins.serving());
        let is_pinned = prefill.is_some() || serving.is_some();
        let session = match self.session.map(|session| session.key(is_pinned)) {
            Some(Err(refusal)) if self.rules.binds_sessions => return Err(refusal),
            session => session.and_then(Result::ok),
        };
        let hints = nvext.map(|nvext| nvext.agent_hints).unwrap_or_default();
        let priority = self.priority.or(hints.priority).map(f64::from);
        let constraints = nvext.map(|nvext| nvext.routing_constraints.clone()).unwrap_or_default();
        Ok(Demands {
            prefill,
            serving,
            hosts: None,
            required_taints: constraints.required_taints,
            preferred_taints: constraints.preferred_taints,
            session,
            expected_output_tokens: hints.osl,
            priority_jump: priority.or(hints.latency_sensitivity).unwrap_or(0.0).max(0.0),
            strict_priority: self.strict_priority.or(hints.strict_priority).unwrap_or(0),
        })
    }
}

impl Pins {
    fn of_headers<'a>(first: impl Fn(&str) -> Option<&'a str>) -> Result<Self, Refusal> {
        // A name that is there counts, whatever its value; the others do not.
        let value = |names: &[&'static str]| {
            names.iter().find_map(|name| first(name).map(|value| (*name, value)))
        };
        let id = |names: &[&'static str]| {
            value(names)
                .map(|(name, value)| decimal(value).ok_or(Refusal::Header(name)))
                .transpose()
        };
        let rank = |names: &[&'static str]| {
            let rank = value(names).map(|(name, value)| {
                let rank = decimal(value).and_then(|rank| u32::try_from(rank).ok());
                rank.ok_or(Refusal::Header(name))
            });
            rank.transpose()
        };
        let worker = id(&WORKER_NAMES)?;
        Ok(Self {
            backend: worker,
            decode: worker,
            prefill: id(&PREFILL_WORKER_NAMES)?,
            rank: rank(&DP_RANK_NAMES)?,
            prefill_rank: rank(&PREFILL_DP_RANK_NAMES)?.filter(|rank| *rank != UNSET_RANK),
        })
    }

    fn of_body(nvext: &NvExt<'_>) -> Result<Self, Refusal> {
        let [backend, decode, prefill, rank, prefill_rank] = nvext.pins;
        let [backend_name, decode_name, prefill_name, rank_name, prefill_rank_name] = PIN_FIELDS;
        let id = |value: Option<RawJson<'_>>, name| {
            value.map(|value| value.unsigned().ok_or(Refusal::Field(name))).transpose()
        };
        let small = |value: Option<RawJson<'_>>, name| {
            let rank = id(value, name)?.map(u32::try_from);
            rank.transpose().map_err(|_| Refusal::Field(name))
        };
        Ok(Self {
            backend: id(backend, backend_name)?,
            decode: id(decode, decode_name)?,
            prefill: id(prefill, prefill_name)?,
            rank: small(rank, rank_name)?,
            prefill_rank: small(prefill_rank, prefill_rank_name)?,
        })
    }

    /// Number by number, what is here before what `other` has.
    fn or(self, other: Self) -> Self {
        Self {
            backend: self.backend.or(other.backend),
            decode: self.decode.or(other.decode),
            prefill: self.prefill.or(other.prefill),
            rank: self.rank.or(other.rank),
            prefill_rank: self.prefill_rank.or(other.prefill_rank),
        }
    }

    /// Who is to answer. A rank without a worker names nobody.
    fn serving(self) -> Option<Pin> {
        pin(self.decode.or(self.backend), self.rank)
    }

    /// Who is to compute the prompt, where that is somebody else's work.
    fn prefill(self) -> Option<Pin> {
        pin(self.prefill.or(self.backend), self.prefill_rank.or(self.rank))
    }
}

fn pin(worker: Option<u64>, rank: Option<u32>) -> Option<Pin> {
    worker.map(|worker| Pin { worker: WorkerId(worker), rank: rank.map(DpRank) })
}

/// A number in decimal digits and nothing else.
fn decimal(text: &str) -> Option<u64> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit());
    if is_plain { text.parse().ok() } else { None }
}

/// Checks the bound on metadata, which Dynamo's frontend answers for. It is not
/// looked at otherwise: what it steers are queues.
fn bound_metadata(headers: &[(String, String)]) -> Result<(), Refusal> {
    let mut keys: Vec<&str> = Vec::new();
    let mut bytes = 0_usize;
    for (name, value) in headers {
        let Some(key) = name.strip_prefix(METADATA_PREFIX) else { continue };
        let value = value.trim();
        // Credentials are no metadata, and of equal keys the first counts.
        if keys.contains(&key) || key == "authorization" || is_bearer(value) {
            continue;
        }
        keys.push(key);
        bytes = bytes.saturating_add(key.len()).saturating_add(value.len());
        if keys.len() > METADATA_ENTRIES_MAX || bytes > METADATA_BYTES_MAX {
            return Err(Refusal::TooMuchMetadata);
        }
    }
    Ok(())
}

fn is_bearer(value: &str) -> bool {
    value.get(..7).is_some_and(|start| start.eq_ignore_ascii_case("bearer "))
}
