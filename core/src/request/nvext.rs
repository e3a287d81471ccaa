//! Dynamo's extension object `nvext`, as far as routing looks at it.

use std::borrow::Cow;

use super::{Field, RequestError, prompt};
use crate::ids::TokenId;
use crate::json::{JsonKind, Member, RawJson};

/// Members of `nvext` that name workers: for us to write, never for a client.
pub(crate) const ROUTING_MEMBERS: [&str; 5] =
    ["backend_instance_id", "decode_worker_id", "prefill_worker_id", "dp_rank", "prefill_dp_rank"];

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
    /// `routing_constraints`: an object.
    pub routing_constraints: Option<RawJson<'a>>,
    /// Whether the client named a worker or a rank. It is not obeyed.
    pub names_worker: bool,
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
            routing_constraints: None,
            names_worker: false,
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
        match member.key.name().as_deref() {
            Some(name) if ROUTING_MEMBERS.contains(&name) => {
                self.names_worker |= value.is_some();
            }
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
                self.routing_constraints = of_kind(JsonKind::Object)?;
            }
            Some("agent_hints") => {
                let hints =
                    of_kind(JsonKind::Object)?.map(|hints| AgentHints::read(hints).ok_or(WRONG));
                self.agent_hints = hints.transpose()?.unwrap_or_default();
            }
            _ => {}
        }
        Ok(())
    }
}

impl AgentHints {
    /// Reads the object; `None` if a member is of the wrong type or range.
    fn read(raw: RawJson<'_>) -> Option<Self> {
        let mut hints = AgentHints::default();
        for member in raw.members().filter(|member| !member.value.is_null()) {
            let value = member.value;
            let unsigned = || value.unsigned().and_then(|value| u32::try_from(value).ok());
            match member.key.name().as_deref() {
                Some("priority") => {
                    hints.priority = Some(value.signed().and_then(|value| value.try_into().ok())?);
                }
                Some("strict_priority") => hints.strict_priority = Some(unsigned()?),
                Some("osl") => hints.osl = Some(unsigned()?),
                Some("latency_sensitivity") => hints.latency_sensitivity = Some(value.float()?),
                _ => {}
            }
        }
        Some(hints)
    }
}
