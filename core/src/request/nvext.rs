//! Dynamo's extension object `nvext`, as far as routing looks at it.

use std::borrow::Cow;

use super::{Field, RequestError, prompt};
use crate::ids::TokenId;
use crate::json::{JsonKind, Member, RawJson};
use crate::limits::{TAINT_BYTES_MAX, TAINTS_MAX};

/// Members of `nvext` that name workers: for us to write, never for a client.
pub(crate) const ROUTING_MEMBERS: [&str; 5] =
    ["backend_instance_id", "decode_worker_id", "prefill_worker_id", "dp_rank", "prefill_dp_rank"];

/// The same as paths in the body, for messages.
pub(crate) const PIN_FIELDS: [&str; 5] = [
    "nvext.backend_instance_id",
    "nvext.decode_worker_id",
    "nvext.prefill_worker_id",
    "nvext.dp_rank",
    "nvext.prefill_dp_rank",
];

/// What a request's `nvext` says.
///
/// Only types that Dynamo's frontend would refuse are errors; members that are
/// not looked at stay in [`NvExt::raw`].
#[derive(Clone, Debug)]
pub struct NvExt<'a> {
    /// The object itself.
    pub raw: RawJson<'a>,
    /// `token_data`: the prompt's tokens as the client computed them, used by
    /// the frontend in place of the prompt's own.
    pub token_data: Option<Vec<TokenId>>,
    /// `cache_salt`, as sent (possibly empty).
    pub cache_salt: Option<Cow<'a, str>>,
    /// `agent_hints`.
    pub agent_hints: AgentHints,
    /// `use_raw_prompt`: whether the template is to be skipped.
    pub use_raw_prompt: bool,
    /// `annotations`: an array of strings.
    pub annotations: Option<RawJson<'a>>,
    /// `extra_fields`: an array of the response fields the client asks for.
    pub extra_fields: Option<RawJson<'a>>,
    /// `routing_constraints`.
    pub routing_constraints: RoutingConstraints,
    /// The members that name workers, in the order of their names above and as
    /// sent: they count only if the sender is trusted.
    pub pins: [Option<RawJson<'a>>; 5],
}

/// `nvext.agent_hints`: what the client knows about its request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AgentHints {
    /// Priority; higher is sooner.
    pub priority: Option<i32>,
    /// Priority class that is never overtaken by a lower one.
    pub strict_priority: Option<u32>,
    /// Expected output, in tokens.
    pub osl: Option<u32>,
    /// Deprecated form of `priority`.
    pub latency_sensitivity: Option<f64>,
}

/// `nvext.routing_constraints`: which workers the client wants.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoutingConstraints {
    /// Taints that a worker must have, each once.
    pub required_taints: Vec<String>,
    /// Taints that a worker had better have, each once, and how much. Finite.
    pub preferred_taints: Vec<(String, f64)>,
}

impl<'a> NvExt<'a> {
    /// Reads an object, the last of equal keys.
    pub(super) fn read(raw: RawJson<'a>) -> Result<Self, RequestError> {
        let mut nvext = NvExt {
            raw,
            token_data: None,
            cache_salt: None,
            agent_hints: AgentHints::default(),
            use_raw_prompt: false,
            annotations: None,
            extra_fields: None,
            routing_constraints: RoutingConstraints::default(),
            pins: [None; 5],
        };
        for member in raw.members() {
            nvext.member(&member)?;
        }
        Ok(nvext)
    }

    fn member(&mut self, member: &Member<'a>) -> Result<(), RequestError> {
        const WRONG: RequestError = RequestError::WrongType(Field::Nvext);
        let value = Some(member.value).filter(|value| !value.is_null());
        let of_kind = |kind| match value {
            Some(value) if value.kind() != kind => Err(WRONG),
            value => Ok(value),
        };
        let name = member.key.name();
        let pin = ROUTING_MEMBERS.iter().position(|pin| name.as_deref() == Some(pin));
        if let Some(pin) = pin.and_then(|pin| self.pins.get_mut(pin)) {
            *pin = value;
            return Ok(());
        }
        match name.as_deref() {
            Some("token_data") => {
                self.token_data = of_kind(JsonKind::Array)?.map(prompt::token_ids).transpose()?;
            }
            Some("cache_salt") => {
                self.cache_salt = of_kind(JsonKind::String)?.and_then(RawJson::string);
            }
            Some("use_raw_prompt") => {
                let raw_prompt = of_kind(JsonKind::Bool)?.and_then(RawJson::boolean);
                self.use_raw_prompt = raw_prompt == Some(true);
            }
            Some("annotations") => self.annotations = of_kind(JsonKind::Array)?,
            Some("extra_fields") => self.extra_fields = of_kind(JsonKind::Array)?,
            Some("routing_constraints") => {
                let constraints = value.map(RoutingConstraints::read);
                self.routing_constraints = constraints.transpose()?.unwrap_or_default();
            }
            Some("agent_hints") => {
                self.agent_hints = value.map(AgentHints::read).transpose()?.unwrap_or_default();
            }
            _ => {}
        }
        Ok(())
    }
}

impl AgentHints {
    /// Reads the value. A member that is not looked at here is the frontend's to
    /// judge.
    fn read(raw: RawJson<'_>) -> Result<Self, RequestError> {
        object(raw, "nvext.agent_hints")?;
        let mut hints = AgentHints::default();
        for member in raw.members().filter(|member| !member.value.is_null()) {
            let value = member.value;
            let unsigned = |name| {
                let number = value.unsigned().and_then(|value| u32::try_from(value).ok());
                number.ok_or(RequestError::Nvext(name)).map(Some)
            };
            match member.key.name().as_deref() {
                Some("priority") => {
                    let number = value.signed().and_then(|value| value.try_into().ok());
                    let number = number.ok_or(RequestError::Nvext("nvext.agent_hints.priority"));
                    hints.priority = Some(number?);
                }
                Some("strict_priority") => {
                    hints.strict_priority = unsigned("nvext.agent_hints.strict_priority")?;
                }
                Some("osl") => hints.osl = unsigned("nvext.agent_hints.osl")?,
                Some("latency_sensitivity") => {
                    const NAME: &str = "nvext.agent_hints.latency_sensitivity";
                    let number = value.float().filter(|number| number.is_finite());
                    hints.latency_sensitivity = Some(number.ok_or(RequestError::Nvext(NAME))?);
                }
                _ => {}
            }
        }
        Ok(hints)
    }
}

impl RoutingConstraints {
    /// Reads the value, as [`AgentHints::read`] does.
    fn read(raw: RawJson<'_>) -> Result<Self, RequestError> {
        object(raw, "nvext.routing_constraints")?;
        let mut constraints = Self::default();
        for member in raw.members().filter(|member| !member.value.is_null()) {
            match member.key.name().as_deref() {
                Some("required_taints") => constraints.required_taints = required(member.value)?,
                Some("preferred_taints") => constraints.preferred_taints = preferred(member.value)?,
                _ => {}
            }
        }
        Ok(constraints)
    }
}

fn object(raw: RawJson<'_>, name: &'static str) -> Result<(), RequestError> {
    if raw.kind() == JsonKind::Object { Ok(()) } else { Err(RequestError::Nvext(name)) }
}

fn required(list: RawJson<'_>) -> Result<Vec<String>, RequestError> {
    const WRONG: RequestError = RequestError::Nvext("nvext.routing_constraints.required_taints");
    if list.kind() != JsonKind::Array {
        return Err(WRONG);
    }
    let mut taints: Vec<String> = Vec::new();
    for item in list.items() {
        let taint = taint(item).ok_or(WRONG)?;
        if !taints.contains(&taint) {
            taints.push(taint);
        }
        if taints.len() > TAINTS_MAX {
            return Err(WRONG);
        }
    }
    Ok(taints)
}

fn preferred(map: RawJson<'_>) -> Result<Vec<(String, f64)>, RequestError> {
    const WRONG: RequestError = RequestError::Nvext("nvext.routing_constraints.preferred_taints");
    if map.kind() != JsonKind::Object {
        return Err(WRONG);
    }
    let mut taints: Vec<(String, f64)> = Vec::new();
    for member in map.members() {
        let (Some(taint), Some(weight)) =
            (taint(member.key), member.value.float().and_then(single))
        else {
            return Err(WRONG);
        };
        match taints.iter_mut().find(|(known, _)| *known == taint) {
            Some((_, known)) => *known = weight,
            None => taints.push((taint, weight)),
        }
        if taints.len() > TAINTS_MAX {
            return Err(WRONG);
        }
    }
    Ok(taints)
}

fn taint(raw: RawJson<'_>) -> Option<String> {
    // An escape spells one byte in at most six.
    if raw.text().len() > TAINT_BYTES_MAX * 6 + 2 {
        return None;
    }
    raw.string().filter(|text| text.len() <= TAINT_BYTES_MAX).map(Cow::into_owned)
}

/// A weight as Dynamo keeps it, in single precision; `None` beyond that.
#[expect(clippy::cast_possible_truncation, reason = "single precision is what is wanted")]
fn single(weight: f64) -> Option<f64> {
    Some(f64::from(weight as f32)).filter(|weight| weight.is_finite())
}
