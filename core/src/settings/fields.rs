//! Fields: every setting by the name that operators write, and what it takes.

use core::fmt;

use super::draft::{Draft, Value, Wrong, from_whole, to_ms, to_seconds, to_whole};
use super::{
    AffinityMode, ApproximateCachePolicy, ConditionalDisaggPolicy, SelectionPolicy, TwoTier,
};
use crate::score::expected_time::ExpectedTime;

/// Largest value of numbers that Dynamo leaves unbounded: products of a few of
/// them stay finite.
pub(super) const NUMBER_MAX: f64 = 1e9;

/// Longest time, in seconds: a year.
pub(super) const SECONDS_MAX: f64 = 31_536_000.0;

/// Largest whole number; up to here floating point has them all.
pub(super) const WHOLE_MAX: f64 = 9_007_199_254_740_992.0;

/// Which numbers a field takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    min: f64,
    max: f64,
    is_whole: bool,
    /// Whether the field can be off.
    pub(super) may_be_off: bool,
    /// Whether a negative number turns it off.
    pub(super) negative_is_off: bool,
}

impl Range {
    pub(super) const fn of(min: f64, max: f64) -> Self {
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

    pub(super) fn holds(&self, number: f64) -> bool {
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

pub(super) const SHARE: Range = Range::of(0.0, 1.0);
const AMOUNT: Range = Range::of(0.0, NUMBER_MAX);
const SECONDS: Range = Range::of(0.0, SECONDS_MAX);

pub(super) type Get<T> = fn(&Draft) -> T;
pub(super) type Set<T> = fn(&mut Draft, T);

/// Where a field is kept, and what it takes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Form {
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
    pub(super) form: Form,
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

    pub(super) fn wrong(&self) -> Wrong {
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
