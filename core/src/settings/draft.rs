//! Draft: settings put together field by field, by the names that operators
//! write, and the ranges of all of them.

use core::fmt;

use super::{
    AffinityMode, ApproximateCachePolicy, ConditionalDisagg, ConditionalDisaggPolicy,
    SelectionPolicy, SessionAffinity, Settings, TwoTier,
};
use crate::score::expected_time::ExpectedTime;

/// Largest value of numbers that Dynamo leaves unbounded: products of a few of
/// them stay finite.
const NUMBER_MAX: f64 = 1e9;

/// Longest time, in seconds: a year.
const SECONDS_MAX: f64 = 31_536_000.0;

/// Largest whole number; up to here floating point has them all.
const WHOLE_MAX: f64 = 9_007_199_254_740_992.0;

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

/// Which numbers a field takes.
#[derive(Clone, Copy, Debug)]
struct Range {
    min: f64,
    max: f64,
    is_whole: bool,
    /// Whether the field can be off.
    may_be_off: bool,
    /// Whether a negative number turns it off.
    negative_is_off: bool,
}

impl Range {
    const fn of(min: f64, max: f64) -> Self {
        Self { min, max, is_whole: false, may_be_off: false, negative_is_off: false }
    }

    const fn whole(self) -> Self {
        Self { is_whole: true, ..self }
    }

    const fn or_off(self) -> Self {
        Self { may_be_off: true, ..self }
    }

    const fn negative_is_off(self) -> Self {
        Self { negative_is_off: true, ..self.or_off() }
    }

    fn holds(&self, number: f64) -> bool {
        // False for what is no number.
        (self.min..=self.max).contains(&number) && (!self.is_whole || number.fract() == 0.0)
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_whole { "a whole number" } else { "a number" };
        write!(f, "must be {kind} from {} to {}", self.min, self.max)?;
        if self.negative_is_off {
            f.write_str(", or negative for off")
        } else if self.may_be_off {
            f.write_str(", or null for off")
        } else {
            Ok(())
        }
    }
}

const SHARE: Range = Range::of(0.0, 1.0);
const AMOUNT: Range = Range::of(0.0, NUMBER_MAX);
const SECONDS: Range = Range::of(0.0, SECONDS_MAX);

type Get<T> = fn(&Draft) -> T;
type Set<T> = fn(&mut Draft, T);

/// Where a field is kept, and what it takes.
#[derive(Clone, Copy, Debug)]
enum Form {
    Flag(Get<bool>, Set<bool>),
    Number(Range, Get<Option<f64>>, Set<Option<f64>>),
    /// The words, the place of one among them, and whether it can be off.
    Word(&'static [&'static str], Get<Option<usize>>, Set<Option<usize>>, bool),
}

/// One setting by its name.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// The name, Dynamo's where it has one.
    pub name: &'static str,
    form: Form,
}

macro_rules! flag {
    ($name:literal, $($place:ident).+) => {
        Field {
            name: $name,
            form: Form::Flag(|it| it.$($place).+, |it, to| it.$($place).+ = to),
        }
    };
}

macro_rules! number {
    ($name:literal, $range:expr, $($place:ident).+) => {
        Field {
            name: $name,
            form: Form::Number(
                $range,
                |it| Some(it.$($place).+),
                |it, to| it.$($place).+ = to.unwrap_or_default(),
            ),
        }
    };
}

macro_rules! optional_number {
    ($name:literal, $range:expr, $($place:ident).+) => {
        Field {
            name: $name,
            form: Form::Number(
                $range.or_off(),
                |it| it.$($place).+,
                |it, to| it.$($place).+ = to,
            ),
        }
    };
}

macro_rules! seconds {
    ($name:literal, $range:expr, $($place:ident).+) => {
        Field {
            name: $name,
            form: Form::Number(
                $range,
                |it| Some(to_seconds(it.$($place).+)),
                |it, to| it.$($place).+ = to_ms(to.unwrap_or_default()),
            ),
        }
    };
}

macro_rules! optional_seconds {
    ($name:literal, $range:expr, $($place:ident).+) => {
        Field {
            name: $name,
            form: Form::Number(
                $range.or_off(),
                |it| it.$($place).+.map(to_seconds),
                |it, to| it.$($place).+ = to.map(to_ms),
            ),
        }
    };
}

/// Words of formulas. The first is a name for the second.
const POLICIES: [&str; 4] =
    ["default", "dynamo-default-cost-fn", "dynamo-two-tier-cost-fn", "expected-time"];

fn policy_at(policy: SelectionPolicy) -> usize {
    match policy {
        SelectionPolicy::DynamoDefault => 1,
        SelectionPolicy::TwoTier(_) => 2,
        SelectionPolicy::ExpectedTime(_) => 3,
    }
}

/// The formula at that place. Thresholds stay as they are if it is the same.
fn policy_of(at: usize, before: Option<SelectionPolicy>) -> SelectionPolicy {
    match (at, before) {
        (2, Some(SelectionPolicy::TwoTier(thresholds))) => SelectionPolicy::TwoTier(thresholds),
        (2, _) => SelectionPolicy::TwoTier(TwoTier::default()),
        (3, Some(SelectionPolicy::ExpectedTime(parameters))) => {
            SelectionPolicy::ExpectedTime(parameters)
        }
        (3, _) => SelectionPolicy::ExpectedTime(ExpectedTime::default()),
        _ => SelectionPolicy::DynamoDefault,
    }
}

/// Every setting.
pub static FIELDS: [Field; 38] = [
    Field {
        name: "worker_selection_policy",
        form: Form::Word(
            &POLICIES,
            |it| Some(policy_at(it.settings.selection_policy)),
            |it, at| {
                let before = it.settings.selection_policy;
                it.settings.selection_policy = policy_of(at.unwrap_or(0), Some(before));
            },
            false,
        ),
    },
    Field {
        name: "router_prefill_policy",
        form: Form::Word(
            &POLICIES,
            |it| it.settings.prefill_policy.map(policy_at),
            |it, at| {
                let before = it.settings.prefill_policy;
                it.settings.prefill_policy = at.map(|at| policy_of(at, before));
            },
            true,
        ),
    },
    Field {
        name: "router_decode_policy",
        form: Form::Word(
            &POLICIES,
            |it| it.settings.decode_policy.map(policy_at),
            |it, at| {
                let before = it.settings.decode_policy;
                it.settings.decode_policy = at.map(|at| policy_of(at, before));
            },
            true,
        ),
    },
    number!("overlap_score_credit", AMOUNT, settings.overlap_score_credit),
    number!("overlap_score_credit_decay", AMOUNT, settings.overlap_score_credit_decay),
    number!("prefill_load_scale", AMOUNT, settings.prefill_load_scale),
    number!("decode_active_request_weight", AMOUNT, settings.decode_active_request_weight),
    number!("host_cache_hit_weight", SHARE, settings.host_cache_hit_weight),
    number!("disk_cache_hit_weight", SHARE, settings.disk_cache_hit_weight),
    number!("shared_cache_multiplier", SHARE, settings.shared_cache_multiplier),
    number!("router_temperature", AMOUNT, settings.router_temperature),
    flag!("use_kv_events", settings.use_kv_events),
    Field {
        name: "router_approximate_cache_policy",
        form: Form::Word(
            &["ttl", "lru"],
            |it| Some(it.settings.router_approximate_cache_policy as usize),
            |it, at| {
                it.settings.router_approximate_cache_policy = match at {
                    Some(1) => ApproximateCachePolicy::Lru,
                    _ => ApproximateCachePolicy::Ttl,
                }
            },
            false,
        ),
    },
    seconds!("router_ttl_secs", SECONDS, settings.router_ttl_ms),
    optional_seconds!("router_predicted_ttl_secs", SECONDS, settings.router_predicted_ttl_ms),
    flag!("router_replica_sync", settings.router_replica_sync),
    flag!("router_track_active_blocks", settings.router_track_active_blocks),
    flag!("router_track_output_blocks", settings.router_track_output_blocks),
    flag!("router_assume_kv_reuse", settings.router_assume_kv_reuse),
    flag!("router_track_prefill_tokens", settings.router_track_prefill_tokens),
    optional_number!("router_queue_threshold", AMOUNT, settings.router_queue_threshold),
    Field {
        name: "request_queue_limit_per_worker",
        form: Form::Number(
            Range::of(0.0, WHOLE_MAX).whole().or_off(),
            |it| it.settings.queue_limits.requests_per_worker.map(from_whole),
            |it, to| it.settings.queue_limits.requests_per_worker = to.map(to_whole),
        ),
    },
    Field {
        name: "raw_isl_token_queue_limit_per_worker",
        form: Form::Number(
            Range::of(0.0, WHOLE_MAX).whole().or_off(),
            |it| it.settings.queue_limits.tokens_per_worker.map(from_whole),
            |it, to| it.settings.queue_limits.tokens_per_worker = to.map(to_whole),
        ),
    },
    flag!("conditional_disagg_enabled", divides_conditionally),
    Field {
        name: "conditional_disagg_policy",
        form: Form::Word(
            &["isl_bounding", "prefill_load", "isl_or_load"],
            |it| Some(it.disagg.policy as usize),
            |it, at| {
                it.disagg.policy = match at {
                    Some(1) => ConditionalDisaggPolicy::PrefillLoad,
                    Some(2) => ConditionalDisaggPolicy::IslOrLoad,
                    _ => ConditionalDisaggPolicy::IslBounding,
                }
            },
            false,
        ),
    },
    Field {
        name: "conditional_disagg_eff_isl_threshold",
        form: Form::Number(
            Range::of(0.0, 4_294_967_295.0).whole(),
            |it| Some(f64::from(it.disagg.eff_isl_threshold)),
            |it, to| {
                let tokens = u32::try_from(to_whole(to.unwrap_or_default()));
                it.disagg.eff_isl_threshold = tokens.unwrap_or(u32::MAX);
            },
        ),
    },
    number!("conditional_disagg_eff_isl_ratio_threshold", SHARE, disagg.eff_isl_ratio_threshold),
    optional_number!(
        "conditional_disagg_prefill_busy_threshold",
        AMOUNT,
        disagg.prefill_busy_threshold
    ),
    optional_number!(
        "conditional_disagg_decode_busy_threshold",
        AMOUNT,
        disagg.decode_busy_threshold
    ),
    flag!("enforce_disagg", settings.enforce_disagg),
    optional_seconds!("session_affinity_ttl_secs", Range::of(1.0, SECONDS_MAX), affinity_ttl_ms),
    Field {
        name: "session_affinity_mode",
        form: Form::Word(
            &["hard", "soft"],
            |it| Some(it.affinity_mode as usize),
            |it, at| {
                it.affinity_mode = match at {
                    Some(1) => AffinityMode::Soft,
                    _ => AffinityMode::Hard,
                }
            },
            false,
        ),
    },
    optional_number!(
        "active_decode_blocks_threshold",
        SHARE,
        settings.busy_thresholds.active_decode_blocks
    ),
    Field {
        name: "active_prefill_tokens_threshold",
        form: Form::Number(
            Range::of(0.0, WHOLE_MAX).whole().or_off(),
            |it| it.settings.busy_thresholds.active_prefill_tokens.map(from_whole),
            |it, to| it.settings.busy_thresholds.active_prefill_tokens = to.map(to_whole),
        ),
    },
    optional_number!(
        "active_prefill_tokens_threshold_frac",
        AMOUNT,
        settings.busy_thresholds.active_prefill_tokens_frac
    ),
    Field {
        name: "busy_threshold",
        form: Form::Number(
            SHARE.negative_is_off(),
            |it| it.settings.busy_thresholds.busy,
            |it, to| it.settings.busy_thresholds.busy = to,
        ),
    },
    seconds!(
        "active_request_expiry_secs",
        Range::of(1.0, 86_400.0),
        settings.active_request_expiry_ms
    ),
    Field {
        name: "http_overload_status_code",
        form: Form::Number(
            Range::of(400.0, 599.0).whole(),
            |it| Some(f64::from(it.settings.overload_status)),
            |it, to| {
                let status = u16::try_from(to_whole(to.unwrap_or_default()));
                it.settings.overload_status = status.unwrap_or(u16::MAX);
            },
        ),
    },
];

impl Field {
    /// The field of that name.
    #[must_use]
    pub fn find(name: &str) -> Option<&'static Self> {
        FIELDS.iter().find(|field| field.name == name)
    }

    /// A value from text, as in an environment variable: Dynamo's words for yes
    /// and no, a number, or a word. `None` if it is none of what the field
    /// takes; whether it is in range, [`Draft::set`] says.
    #[must_use]
    pub fn parse<'a>(&self, text: &'a str) -> Option<Value<'a>> {
        let text = text.trim();
        match self.form {
            Form::Flag(..) => parse_flag(text).map(Value::Flag),
            Form::Number(range, ..) if range.may_be_off && text.eq_ignore_ascii_case("none") => {
                Some(Value::Off)
            }
            Form::Number(..) => text.parse().ok().map(Value::Number),
            Form::Word(..) => Some(Value::Word(text)),
        }
    }

    /// What the field takes, as in "must be …".
    #[must_use]
    pub fn takes(&self) -> String {
        match self.form {
            Form::Flag(..) => "must be true or false".to_owned(),
            Form::Number(range, ..) => range.to_string(),
            Form::Word(words, .., may_be_off) => {
                let off = if may_be_off { ", or null" } else { "" };
                format!("must be one of {}{off}", words.join(", "))
            }
        }
    }

    fn wrong(&self) -> Wrong {
        Wrong { field: self.name, why: self.takes() }
    }
}

/// Dynamo's words for yes and no, whatever their case.
fn parse_flag(text: &str) -> Option<bool> {
    const YES: [&str; 4] = ["1", "true", "on", "yes"];
    const NO: [&str; 4] = ["0", "false", "off", "no"];
    let is_among = |words: [&str; 4]| words.iter().any(|word| text.eq_ignore_ascii_case(word));
    if is_among(YES) {
        Some(true)
    } else if is_among(NO) {
        Some(false)
    } else {
        None
    }
}

/// Settings that are being put together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draft {
    /// All but what is below.
    settings: Settings,
    /// What is said of conditional disaggregation also while it is off.
    disagg: ConditionalDisagg,
    divides_conditionally: bool,
    affinity_ttl_ms: Option<u64>,
    affinity_mode: AffinityMode,
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

fn to_ms(seconds: f64) -> u64 {
    to_whole((seconds * 1_000.0).round())
}

fn to_seconds(ms: u64) -> f64 {
    from_whole(ms) / 1_000.0
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "in range; and the conversion saturates"
)]
fn to_whole(number: f64) -> u64 {
    number as u64
}

/// Exact up to [`WHOLE_MAX`]; what is above it stays above.
fn from_whole(number: u64) -> f64 {
    number as f64
}
