//! Router: how workers are chosen and booked, out of everything that says so.
//!
//! # Precedence
//!
//! The section `router` of the sidecar's file, else that of Dynamo's policy file
//! (`DYN_ROUTER_POLICY_CONFIG`), else the environment, else the default; as
//! Dynamo has it, whose policy file wins over flags and environment. Parameters
//! of a named formula win over all of them.
//!
//! Dynamo passes over numbers that it cannot read, and takes the default. Here
//! they are mistakes and the sidecar does not start: an operator who has set
//! something wants it to count. What Dynamo has and we have not is a mistake
//! where it would change decisions, and else a warning.

pub mod card;
mod policy;
mod variables;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;
use warmpath_core::settings::{
    Draft, Field, RouterSettings, SelectionPolicy, Settings, Value, Wrong,
};

use super::fields::{Report, Section};
use super::yaml;
use card::CardRouter;
use policy::PolicyFile;
pub use variables::VARIABLES;
use variables::{OTHERS, Rule, Use};

/// Where the names of formulas are given: the variable, and the field.
const STAGES: [(&str, &str); 3] = [
    ("DYN_ROUTER_WORKER_SELECTION_POLICY", "worker_selection_policy"),
    ("DYN_ROUTER_PREFILL_POLICY", "router_prefill_policy"),
    ("DYN_ROUTER_DECODE_POLICY", "router_decode_policy"),
];

/// What Dynamo's preset for routing by load alone sets.
const LOAD_AWARE: [(&str, Value<'static>); 6] = [
    ("overlap_score_credit", Value::Number(0.0)),
    ("use_kv_events", Value::Flag(false)),
    ("router_assume_kv_reuse", Value::Flag(false)),
    ("router_track_active_blocks", Value::Flag(true)),
    ("router_track_prefill_tokens", Value::Flag(true)),
    ("shared_cache_multiplier", Value::Number(0.0)),
];

/// Fields that stay the router's own where a card brings settings: Dynamo's
/// cards do not have them, or not for this.
const KEPT: [&str; 4] = [
    "session_affinity_mode",
    "active_request_expiry_secs",
    "http_overload_status_code",
    "busy_threshold",
];

/// What the environment says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouterEnv {
    /// Variables by name, none empty.
    variables: BTreeMap<String, String>,
    /// Dynamo's policy file, if one is named: its path and what was read.
    policy: Option<(PathBuf, Result<String, String>)>,
}

impl RouterEnv {
    /// Takes what concerns the router out of the environment. A variable without
    /// a value is none, as in Dynamo.
    #[must_use]
    pub fn of(variables: impl Iterator<Item = (String, String)>) -> Self {
        let is_known = |name: &str| VARIABLES.iter().any(|variable| variable.name == name);
        let variables = variables
            .filter(|(name, _)| is_known(name) || name.starts_with("DYN_ROUTER_"))
            .filter(|(_, value)| !value.trim().is_empty())
            .collect();
        Self { variables, policy: None }
    }

    /// Where Dynamo's policy file is, if one is named.
    ///
    /// - `text`: the sidecar's own file, which wins over the environment.
    /// - `directory`: where its relative paths start.
    #[must_use]
    pub fn policy_path(&self, text: &str, directory: &Path) -> Option<PathBuf> {
        let file = yaml(text).unwrap_or_default();
        let own = file.pointer("/router/router_policy_config").and_then(Json::as_str);
        let variable = self.variables.get("DYN_ROUTER_POLICY_CONFIG");
        own.map(|path| directory.join(path)).or_else(|| variable.map(PathBuf::from))
    }

    /// Takes in what was read of the policy file.
    pub fn set_policy(&mut self, path: PathBuf, read: Result<String, String>) {
        self.policy = Some((path, read));
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str)
    }
}

/// The router's own settings, and where they come from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouterConfig {
    /// What is in force for models whose cards say nothing.
    pub settings: Settings,
    /// The same, with what is said of things that are off.
    draft: Draft,
    /// Where each field comes from that was set: a variable, or a path in a file.
    pub origins: BTreeMap<&'static str, String>,
    /// What was given and means nothing here, and why.
    pub warnings: Vec<String>,
}

impl Eq for RouterConfig {}

impl RouterConfig {
    /// Puts the settings together.
    ///
    /// - `section`: `router` of the sidecar's file.
    /// - `report`: where mistakes go; with any, what is returned is of no use.
    #[must_use]
    pub fn read(mut section: Section<'_>, env: &RouterEnv, report: &Report) -> Self {
        let mut reading = Reading { report, draft: Draft::default(), own: Self::default() };
        reading.environment(env);
        let mut policy = match &env.policy {
            Some((path, read)) => PolicyFile::read(path, read, report),
            None => PolicyFile::default(),
        };
        let of_policy = core::mem::take(&mut policy.router);
        reading.fields(of_policy, "router_policy_config: router");
        for (name, value) in core::mem::take(&mut policy.queues) {
            if let Some(field) = Field::find(name) {
                let value = value.map_or(Value::Off, Value::Number);
                reading.set(field, value, "router_policy_config: policy_classes");
            }
        }
        reading.own.warnings.append(&mut policy.warnings);
        let names = STAGES.map(|(_, field)| section.text(field));
        // The path was looked at before the file was read.
        section.take("router_policy_config");
        reading.fields(section.into_fields(), "router");
        reading.stages(&policy, names, env);
        reading.finish()
    }

    /// The settings of a model whose workers bring some.
    ///
    /// They replace the router's as a whole, but for the formulas and what is
    /// `KEPT`. `enforce_disagg` counts if either says so: every card has it,
    /// and one that was never asked says no.
    ///
    /// # Errors
    ///
    /// If they contradict each other.
    pub fn of_card(&self, card: &CardRouter) -> Result<Settings, Vec<Wrong>> {
        let mut draft = card.0;
        let kept = KEPT.into_iter().filter_map(Field::find);
        for field in kept {
            draft.set(field, self.draft.get(field)).map_err(|wrong| vec![wrong])?;
        }
        if self.settings.enforce_disagg
            && let Some(field) = Field::find("enforce_disagg")
        {
            draft.set(field, Value::Flag(true)).map_err(|wrong| vec![wrong])?;
        }
        let Settings { selection_policy, prefill_policy, decode_policy, .. } = self.settings;
        draft.set_policies(
            selection_policy,
            prefill_policy.unwrap_or(selection_policy),
            decode_policy.unwrap_or(selection_policy),
        );
        draft.finish()
    }

    /// The settings of all models.
    ///
    /// - `of_models`: what workers bring, by the model's number.
    #[must_use]
    pub fn with(&self, of_models: &BTreeMap<u16, Settings>) -> RouterSettings {
        RouterSettings {
            default: self.settings,
            of_models: of_models.iter().map(|(number, settings)| (*number, *settings)).collect(),
        }
    }
}

/// Settings on their way.
struct Reading<'a> {
    report: &'a Report,
    draft: Draft,
    own: RouterConfig,
}

impl Reading<'_> {
    fn environment(&mut self, env: &RouterEnv) {
        for variable in &VARIABLES {
            let Some(text) = env.get(variable.name) else { continue };
            match variable.of {
                Use::Field(name) => self.text(name, text, variable.name),
                Use::Inverse(name) => self.inverse(name, text, variable.name),
                Use::Other(rule) => self.other(rule, text, variable.name),
                Use::Elsewhere => {}
            }
        }
        // The scale is set; what wins over the new variables must do so wholly.
        let weight = ["DYN_ROUTER_KV_OVERLAP_SCORE_WEIGHT", "DYN_OVERLAP_SCORE_WEIGHT"];
        let weight = weight.into_iter().find_map(|name| Some((name, env.get(name)?)));
        if let Some((name, text)) = weight
            && text.trim().parse() == Ok(0.0)
        {
            self.overlap_weight(0.0, name);
        }
        let preset = "DYN_ROUTER_LOAD_AWARE";
        match env.get(preset).map(parse_flag) {
            Some(Some(true)) => self.load_aware(preset),
            Some(None) => self.report.add(preset, "must be true or false"),
            Some(Some(false)) | None => {}
        }
        let is_known = |name: &String| VARIABLES.iter().any(|variable| variable.name == name);
        for name in env.variables.keys().filter(|name| !is_known(name)) {
            self.warn(name, "is not a variable that is known here");
        }
    }

    /// Sets a field from a variable.
    fn text(&mut self, name: &str, text: &str, path: &str) {
        let Some(field) = Field::find(name) else { return };
        match field.parse(text) {
            Some(value) => self.set(field, value, path),
            None => self.report.add(path, format!("{}, is {text:?}", field.takes())),
        }
    }

    fn inverse(&mut self, name: &str, text: &str, path: &str) {
        let Some(field) = Field::find(name) else { return };
        match parse_flag(text) {
            Some(flag) => self.set(field, Value::Flag(!flag), path),
            None => self.report.add(path, format!("{}, is {text:?}", field.takes())),
        }
    }

    fn set(&mut self, field: &'static Field, value: Value<'_>, path: &str) {
        match self.draft.set(field, value) {
            Ok(()) => {
                self.own.origins.insert(field.name, path.to_owned());
            }
            Err(wrong) => self.report.add(path, wrong.why),
        }
    }

    fn other(&mut self, rule: Rule, text: &str, path: &str) {
        if rule.is_quiet(text) {
            return;
        }
        match rule {
            Rule::Only(_, why) => self.report.add(path, format!("{why}, is {text:?}")),
            Rule::Ignored(_, why) => self.warn(path, why),
        }
    }

    fn warn(&mut self, path: &str, why: &str) {
        self.own.warnings.push(format!("{path}: {why}"));
    }

    /// Fields of a file, by name.
    fn fields(&mut self, fields: BTreeMap<String, Json>, at: &str) {
        for (name, value) in &fields {
            let path = format!("{at}.{name}");
            if let Some(field) = Field::find(name) {
                match Value::of_json(value) {
                    Some(value) => self.set(field, value, &path),
                    None => self.report.add(&path, field.takes()),
                }
            } else if let Some((_, rule)) = OTHERS.iter().find(|(known, _)| known == name) {
                if !value.is_null() {
                    self.other(*rule, &plain(value), &path);
                }
            } else if !matches!(name.as_str(), "overlap_score_weight" | "load_aware") {
                self.report.add(&path, "is not a known field");
            }
        }
        // Behind the fields that they win over.
        let scale = Field::find("prefill_load_scale");
        match fields.get("overlap_score_weight").and_then(Value::of_json) {
            None | Some(Value::Off) => {}
            Some(Value::Number(weight)) if weight.is_finite() => {
                self.overlap_weight(weight, &format!("{at}.overlap_score_weight"));
            }
            Some(_) => {
                let takes = scale.map(Field::takes).unwrap_or_default();
                self.report.add(&format!("{at}.overlap_score_weight"), takes);
            }
        }
        match fields.get("load_aware") {
            None | Some(Json::Null | Json::Bool(false)) => {}
            Some(Json::Bool(true)) => self.load_aware(&format!("{at}.load_aware")),
            Some(_) => self.report.add(&format!("{at}.load_aware"), "must be true or false"),
        }
    }

    /// Dynamo's old weight: it scales prefill, and only 0 takes the credit.
    fn overlap_weight(&mut self, weight: f64, path: &str) {
        if let Some(field) = Field::find("prefill_load_scale") {
            self.set(field, Value::Number(weight), path);
        }
        if weight == 0.0
            && let Some(field) = Field::find("overlap_score_credit")
        {
            self.set(field, Value::Number(0.0), path);
        }
    }

    fn load_aware(&mut self, path: &str) {
        for (name, value) in LOAD_AWARE {
            if let Some(field) = Field::find(name) {
                self.set(field, value, path);
            }
        }
    }

    /// Takes the formula of each stage: its own name, else the one for all, else
    /// the policy file's.
    ///
    /// - `names`: what the sidecar's file says.
    fn stages(&mut self, policy: &PolicyFile, names: [Option<String>; 3], env: &RouterEnv) {
        let mut named = names.into_iter().zip(STAGES).map(|(own, (variable, field))| {
            let of_env = || Some((env.get(variable)?.trim().to_owned(), variable.to_owned()));
            own.map(|name| (name, format!("router.{field}"))).or_else(of_env)
        });
        let all = named.next().flatten();
        let prefill = named.next().flatten().or_else(|| all.clone());
        let decode = named.next().flatten().or_else(|| all.clone());
        let chosen = [("aggregated", all), ("prefill", prefill), ("decode", decode)];
        let before = self.draft;
        let mut formulas = [SelectionPolicy::DynamoDefault; 3];
        let mut weighed: Option<(&str, Draft)> = None;
        let mut unknown = Vec::new();
        for ((stage, named), (formula, (_, field))) in
            chosen.into_iter().zip(formulas.iter_mut().zip(STAGES))
        {
            let of_file = || {
                let name = policy.stage(stage)?;
                Some((name.to_owned(), format!("router_policy_config: worker_selection.{stage}")))
            };
            let (name, path) = named.or_else(of_file).unwrap_or(("default".into(), String::new()));
            let Some(instance) = policy.instance(&name) else {
                // Once, if it is the one for all.
                if !unknown.contains(&path) {
                    self.report.add(&path, format!("{name:?} {}", policy::NO_INSTANCE));
                    unknown.push(path);
                }
                continue;
            };
            *formula = instance.formula;
            if !path.is_empty()
                && let Some(field) = Field::find(field)
            {
                self.own.origins.insert(field.name, path.clone());
            }
            if instance.formula != SelectionPolicy::DynamoDefault {
                continue;
            }
            let mut draft = before;
            for (name, value) in &instance.parameters {
                let Some(field) = Field::find(name) else { continue };
                let path = format!("{path} {:?}: {name}", instance.name);
                match draft.set(field, Value::Number(*value)) {
                    Ok(()) => drop(self.own.origins.insert(field.name, path)),
                    Err(wrong) => self.report.add(&path, wrong.why),
                }
            }
            match &weighed {
                Some((other, first)) if *first != draft => self.report.add(
                    &path,
                    format!(
                        "{stage} would have other parameters than {other}: \
                         name one instance for all stages"
                    ),
                ),
                _ => weighed = Some((stage, draft)),
            }
        }
        if let Some((_, draft)) = weighed {
            self.draft = draft;
        }
        for name in ["host_cache_hit_weight", "disk_cache_hit_weight"] {
            let Some(field) = Field::find(name) else { continue };
            if before.get(field) != self.draft.get(field) {
                self.warn(name, "as a formula's parameter counts for cached tokens, too");
            }
        }
        let [aggregated, prefill, decode] = formulas;
        self.draft.set_policies(aggregated, prefill, decode);
    }

    fn finish(mut self) -> RouterConfig {
        match self.draft.finish() {
            Ok(settings) => self.own.settings = settings,
            Err(mistakes) => {
                for wrong in mistakes {
                    let path = self.own.origins.get(wrong.field);
                    self.report.add(path.map_or(wrong.field, String::as_str), wrong.why);
                }
            }
        }
        let (default, draft) = (Draft::default(), self.draft);
        self.own.draft = draft;
        self.own.origins.retain(|name, _| {
            Field::find(name).is_some_and(|field| draft.get(field) != default.get(field))
        });
        self.own
    }
}

fn parse_flag(text: &str) -> Option<bool> {
    match Field::find("use_kv_events")?.parse(text)? {
        Value::Flag(flag) => Some(flag),
        _ => None,
    }
}

/// A value of a file as it would stand in a variable.
fn plain(value: &Json) -> String {
    match value {
        Json::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests;
