//! Card: the settings that a Dynamo worker brings in its model card.

use serde_json::{Map, Value as Json};
use warmpath_core::settings::{Draft, Field, Value};

use super::variables::OTHERS;

/// Thresholds that cards have, by the names that fields have, too.
const THRESHOLDS: [&str; 3] = [
    "active_decode_blocks_threshold",
    "active_prefill_tokens_threshold",
    "active_prefill_tokens_threshold_frac",
];

/// Dynamo's old weight.
const WEIGHT: &str = "overlap_score_weight";

/// What a card's `router_config` says, over Dynamo's defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CardRouter(pub(super) Draft);

/// Why a card's settings do not count; a word for the state page.
pub type Refused = &'static str;

impl CardRouter {
    /// Reads `router_config`; `None` if the card has none.
    ///
    /// Whatever would change decisions and is not understood refuses all of it:
    /// the router's own settings are then more right than half of the card's.
    ///
    /// # Errors
    ///
    /// Why it does not count.
    pub fn read(card: &Json) -> Option<Result<Self, Refused>> {
        match card.get("router_config")? {
            Json::Null => None,
            Json::Object(config) => Some(read(config)),
            _ => Some(Err("router_config")),
        }
    }
}

fn read(config: &Map<String, Json>) -> Result<CardRouter, Refused> {
    let mode = config.get("router_mode").and_then(Json::as_str);
    if mode.is_some_and(|mode| !matches!(mode, "k_v" | "kv" | "direct")) {
        return Err("router_mode");
    }
    let mut draft = Draft::default();
    for (name, value) in map(config, "kv_router_config")? {
        kv_field(&mut draft, name, value)?;
    }
    // Behind the fields that it wins over.
    for (_, weight) in map(config, "kv_router_config")?.filter(|(name, _)| *name == WEIGHT) {
        if weight.is_null() {
            continue;
        }
        set(&mut draft, "prefill_load_scale", weight)?;
        if weight.as_f64() == Some(0.0) {
            set(&mut draft, "overlap_score_credit", weight)?;
        }
    }
    let thresholds = map(config, "load_threshold_config")?;
    for (name, value) in thresholds.filter(|(name, _)| THRESHOLDS.contains(&name.as_str())) {
        set(&mut draft, name, value)?;
    }
    // A mode is the router's own.
    for name in ["enforce_disagg", "session_affinity_ttl_secs"] {
        match config.get(name) {
            None | Some(Json::Null) => {}
            Some(value) => set(&mut draft, name, value)?,
        }
    }
    draft.finish().map_err(|_| "router_config")?;
    Ok(CardRouter(draft))
}

/// A member that is a map; nothing of it if it is absent.
fn map<'a>(
    config: &'a Map<String, Json>,
    name: &str,
) -> Result<impl Iterator<Item = (&'a String, &'a Json)>, Refused> {
    match config.get(name) {
        None | Some(Json::Null) => Ok(None.into_iter().flatten()),
        Some(Json::Object(fields)) => Ok(Some(fields).into_iter().flatten()),
        Some(_) => Err("router_config"),
    }
}

fn kv_field(draft: &mut Draft, name: &str, value: &Json) -> Result<(), Refused> {
    if let Some((_, rule)) = OTHERS.iter().find(|(known, _)| *known == name) {
        let is_quiet = value.is_null() || rule.is_quiet(&super::plain(value));
        return if is_quiet || rule.is_harmless() { Ok(()) } else { Err("router_config") };
    }
    match (name, value) {
        // The multiplier's default is that of the cache's type, which is none.
        ("router_policy_config" | "shared_cache_multiplier", Json::Null) | (WEIGHT, _) => Ok(()),
        // A file on the worker's host.
        ("router_policy_config", _) => Err("router_policy_config"),
        _ => set(draft, name, value),
    }
}

fn set(draft: &mut Draft, name: &str, value: &Json) -> Result<(), Refused> {
    let field = Field::find(name).ok_or("router_config")?;
    let value = Value::of_json(value).ok_or("router_config")?;
    draft.set(field, value).map_err(|_| "router_config")
}
