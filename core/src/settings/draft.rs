//! Draft: settings put together field by field.

use core::fmt;

use super::fields::{FIELDS, Field, Form, NUMBER_MAX, Range, SHARE};
use super::{
    AffinityMode, ApproximateCachePolicy, ConditionalDisagg, ConditionalDisaggPolicy,
    SelectionPolicy, SessionAffinity, Settings, TwoTier,
};

/// What a field is given.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// Nothing: the field is off.
    Off,
    /// Yes or no.
    Flag(bool),
    /// A number, in the unit of the field's name.
    Number(f64),
    /// One of a few words.
    Word(&'a str),
}

impl<'a> Value<'a> {
    /// A value out of JSON, or YAML; `None` for a list or a map.
    #[must_use]
    pub fn of_json(value: &'a serde_json::Value) -> Option<Self> {
        use serde_json::Value as Json;
        Some(match value {
            Json::Null => Self::Off,
            Json::Bool(flag) => Self::Flag(*flag),
            Json::Number(number) => Self::Number(number.as_f64()?),
            Json::String(word) => Self::Word(word),
            Json::Array(_) | Json::Object(_) => return None,
        })
    }
}

/// A field that has no such value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// The field's name.
    pub field: &'static str,
    /// What would be right.
    pub why: String,
}

impl Wrong {
    /// Settings that no draft gives.
    pub(super) fn unfinished() -> Self {
        let field = "conditional_disagg_prefill_busy_threshold";
        Self { field, why: "must be set for this `conditional_disagg_policy`".to_owned() }
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` {}", self.field, self.why)
    }
}

/// Settings that are being put together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draft {
    /// All but what is below.
    pub(super) settings: Settings,
    /// What is said of conditional disaggregation also while it is off.
    pub(super) disagg: ConditionalDisagg,
    pub(super) divides_conditionally: bool,
    pub(super) affinity_ttl_ms: Option<u64>,
    pub(super) affinity_mode: AffinityMode,
}

/// A draft holds no NaN: [`Draft::set`] refuses it, and whoever starts from
/// settings has validated them.
impl Eq for Draft {}

impl Default for Draft {
    fn default() -> Self {
        Self::of(Settings::default())
    }
}

impl Draft {
    /// Starts from settings.
    #[must_use]
    pub fn of(settings: Settings) -> Self {
        Self {
            disagg: settings.conditional_disagg.unwrap_or_default(),
            divides_conditionally: settings.conditional_disagg.is_some(),
            affinity_ttl_ms: settings.session_affinity.map(|affinity| affinity.ttl_ms),
            affinity_mode: settings.session_affinity.map(|it| it.mode).unwrap_or_default(),
            settings,
        }
    }

    /// Sets one field.
    ///
    /// # Errors
    ///
    /// If the field does not take that; it stays as it was.
    pub fn set(&mut self, field: &Field, value: Value<'_>) -> Result<(), Wrong> {
        match (field.form, value) {
            (Form::Flag(_, set), Value::Flag(flag)) => set(self, flag),
            (Form::Number(range, _, set), Value::Off) if range.may_be_off => set(self, None),
            (Form::Number(range, _, set), Value::Number(number))
                if range.negative_is_off && number < 0.0 =>
            {
                set(self, None);
            }
            (Form::Number(range, _, set), Value::Number(number)) if range.holds(number) => {
                set(self, Some(number));
            }
            (Form::Word(.., set, true), Value::Off) => set(self, None),
            (Form::Word(words, _, set, _), Value::Word(word)) => {
                let at = words.iter().position(|known| *known == word);
                set(self, Some(at.ok_or_else(|| field.wrong())?));
            }
            _ => return Err(field.wrong()),
        }
        Ok(())
    }

    /// What a field is set to.
    #[must_use]
    pub fn get(&self, field: &Field) -> Value<'static> {
        match field.form {
            Form::Flag(get, _) => Value::Flag(get(self)),
            Form::Number(_, get, _) => get(self).map_or(Value::Off, Value::Number),
            Form::Word(words, get, ..) => {
                get(self).and_then(|at| words.get(at)).map_or(Value::Off, |word| Value::Word(word))
            }
        }
    }

    /// Sets the formulas of all stages, with their thresholds.
    pub fn set_policies(
        &mut self,
        aggregated: SelectionPolicy,
        prefill: SelectionPolicy,
        decode: SelectionPolicy,
    ) {
        self.settings.selection_policy = aggregated;
        self.settings.prefill_policy = Some(prefill).filter(|policy| *policy != aggregated);
        self.settings.decode_policy = Some(decode).filter(|policy| *policy != aggregated);
    }

    /// The settings, if they are right.
    ///
    /// A prefill worker is busy where nothing else is said from
    /// `router_queue_threshold` on, as in Dynamo.
    ///
    /// # Errors
    ///
    /// Everything that is wrong: values outside of their ranges, and such as
    /// contradict each other.
    pub fn finish(&self) -> Result<Settings, Vec<Wrong>> {
        let Self { mut settings, mut disagg, divides_conditionally, .. } = *self;
        let by_load = disagg.policy != ConditionalDisaggPolicy::IslBounding;
        if divides_conditionally && by_load {
            disagg.prefill_busy_threshold =
                disagg.prefill_busy_threshold.or(settings.router_queue_threshold);
        }
        settings.conditional_disagg = divides_conditionally.then_some(disagg);
        settings.session_affinity =
            self.affinity_ttl_ms.map(|ttl_ms| SessionAffinity { ttl_ms, mode: self.affinity_mode });
        let mut wrong = self.wrong();
        let mut contradiction = |is: bool, field, why: &str| {
            if is {
                wrong.push(Wrong { field, why: why.to_owned() });
            }
        };
        contradiction(
            settings.router_track_output_blocks && !settings.router_track_active_blocks,
            "router_track_output_blocks",
            "needs `router_track_active_blocks`",
        );
        contradiction(
            settings.router_predicted_ttl_ms.is_some() && !settings.use_kv_events,
            "router_predicted_ttl_secs",
            "needs `use_kv_events`",
        );
        contradiction(
            settings.router_approximate_cache_policy == ApproximateCachePolicy::Lru
                && settings.use_kv_events,
            "router_approximate_cache_policy",
            "can only be lru without `use_kv_events`",
        );
        contradiction(
            divides_conditionally && by_load && disagg.prefill_busy_threshold.is_none(),
            "conditional_disagg_policy",
            "needs `conditional_disagg_prefill_busy_threshold` or `router_queue_threshold`",
        );
        if wrong.is_empty() { Ok(settings) } else { Err(wrong) }
    }

    /// The values that are outside of their ranges.
    fn wrong(&self) -> Vec<Wrong> {
        let mut wrong: Vec<Wrong> = FIELDS
            .iter()
            .filter(|field| match field.form {
                Form::Flag(..) | Form::Word(..) => false,
                Form::Number(range, get, _) => get(self).is_some_and(|it| !range.holds(it)),
            })
            .map(Field::wrong)
            .collect();
        let Settings { selection_policy, prefill_policy, decode_policy, .. } = self.settings;
        let policies = [Some(selection_policy), prefill_policy, decode_policy];
        let names = ["worker_selection_policy", "router_prefill_policy", "router_decode_policy"];
        for (field, policy) in names.into_iter().zip(policies) {
            let checked = match policy {
                Some(SelectionPolicy::TwoTier(thresholds)) => thresholds.check(),
                Some(SelectionPolicy::ExpectedTime(parameters)) => parameters.check(),
                Some(SelectionPolicy::DynamoDefault) | None => Ok(()),
            };
            if let Err(why) = checked {
                wrong.push(Wrong { field, why: why.to_owned() });
            }
        }
        wrong
    }
}

impl TwoTier {
    /// Whether the thresholds are in their ranges.
    ///
    /// # Errors
    ///
    /// What would be right.
    pub fn check(&self) -> Result<(), &'static str> {
        if !SHARE.holds(self.cache_threshold) {
            Err("must have a `cache_threshold` from 0 to 1")
        } else if !Range::of(1.0, NUMBER_MAX).holds(self.balance_rel_threshold) {
            Err("must have a `balance_rel_threshold` of at least 1")
        } else {
            Ok(())
        }
    }
}

pub(super) fn to_ms(seconds: f64) -> u64 {
    to_whole((seconds * 1_000.0).round())
}

pub(super) fn to_seconds(ms: u64) -> f64 {
    from_whole(ms) / 1_000.0
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "in range; and the conversion saturates"
)]
pub(super) fn to_whole(number: f64) -> u64 {
    number as u64
}

/// Exact up to `WHOLE_MAX`; what is above it stays above.
pub(super) fn from_whole(number: u64) -> f64 {
    number as f64
}
