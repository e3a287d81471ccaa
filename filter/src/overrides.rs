//! Overrides: settings of this plugin that win over the feed's.
//!
//! One sidecar configures all gateways; a gateway that must differ says so in its
//! plugin's configuration, field by field.

use warmpath_core::json::{JsonKind, RawJson};
use warmpath_core::settings::{Draft, Field, RouterSettings, Settings, Value, Wrong};

/// Fields and what they are set to, each once, in JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides(Vec<(&'static str, String)>);

impl Overrides {
    /// Adds a field.
    ///
    /// - `json`: what it is set to.
    ///
    /// # Errors
    ///
    /// If there is no such field, or it does not take that; in words.
    pub fn add(&mut self, name: &str, json: &str) -> Result<(), String> {
        let field = Field::find(name).ok_or_else(|| format!("`{name}` is not a known field"))?;
        set(&mut Draft::default(), field, json).map_err(|wrong| wrong.to_string())?;
        self.0.retain(|(known, _)| *known != field.name);
        self.0.push((field.name, json.to_owned()));
        Ok(())
    }

    /// Lays the fields over the feed's settings, of every model.
    ///
    /// Where the two contradict each other the feed's settings stay as a whole:
    /// they were right together. Then what is wrong is returned, too.
    #[must_use]
    pub fn over(&self, feed: &RouterSettings) -> (RouterSettings, Vec<Wrong>) {
        let mut all = feed.clone();
        let mut wrong = Vec::new();
        let of_models = all.of_models.iter_mut().map(|(_, settings)| settings);
        for settings in of_models.chain([&mut all.default]) {
            match self.over_one(settings) {
                Ok(laid) => *settings = laid,
                Err(mistakes) => wrong.extend(mistakes),
            }
        }
        (all, wrong)
    }

    fn over_one(&self, settings: &Settings) -> Result<Settings, Vec<Wrong>> {
        let mut draft = Draft::of(*settings);
        for (name, json) in &self.0 {
            if let Some(field) = Field::find(name) {
                set(&mut draft, field, json).map_err(|wrong| vec![wrong])?;
            }
        }
        draft.finish()
    }
}

fn set(draft: &mut Draft, field: &Field, json: &str) -> Result<(), Wrong> {
    let refused = || Wrong { field: field.name, why: field.takes() };
    let json = RawJson::parse(json).map_err(|_| refused())?;
    let word = json.string().unwrap_or_default();
    let value = match json.kind() {
        JsonKind::Null => Some(Value::Off),
        JsonKind::Bool => json.boolean().map(Value::Flag),
        JsonKind::Number => json.float().map(Value::Number),
        JsonKind::String => Some(Value::Word(&word)),
        JsonKind::Array | JsonKind::Object => None,
    };
    draft.set(field, value.ok_or_else(refused)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn overrides(fields: &[(&str, &str)]) -> Overrides {
        let mut overrides = Overrides::default();
        for (name, value) in fields {
            overrides.add(name, value).unwrap();
        }
        overrides
    }

    fn feed() -> RouterSettings {
        let predicts = Settings { router_predicted_ttl_ms: Some(1_000), ..Settings::default() };
        let warm = Settings { router_temperature: 0.5, ..Settings::default() };
        RouterSettings { default: warm, of_models: vec![(2, predicts)] }
    }

    #[test]
    fn nothing_changes_nothing() {
        assert_eq!(Overrides::default().over(&feed()), (feed(), Vec::new()));
    }

    #[test]
    fn fields_win_and_the_others_stay() {
        let fields = [("overlap_score_credit", "0.25"), ("enforce_disagg", "true")];
        let (all, wrong) = overrides(&fields).over(&feed());
        assert_eq!(wrong, []);
        for (laid, before) in
            [(all.of(None), feed().default), (all.of(Some(2)), feed().of_models[0].1)]
        {
            let expected = Settings { overlap_score_credit: 0.25, enforce_disagg: true, ..before };
            assert_eq!(*laid, expected);
        }
    }

    #[test]
    fn values_are_read_as_the_feed_s_are() {
        for (name, json, feed) in [
            ("router_temperature", "1.5e-1", json!(0.15)),
            ("router_predicted_ttl_secs", "null", json!(null)),
            ("enforce_disagg", "false", json!(false)),
            ("router_temperature", r#""1""#, json!("1")),
            ("session_affinity_mode", r#""s\u0074rict""#, json!("strict")),
            ("enforce_disagg", "[true]", json!([true])),
        ] {
            let field = Field::find(name).unwrap();
            let (mut ours, mut theirs) = (Draft::default(), Draft::default());
            let wanted = Value::of_json(&feed).map(|value| theirs.set(field, value).is_ok());
            let set = set(&mut ours, field, json).is_ok();
            assert_eq!((set, ours), (wanted == Some(true), theirs), "{name} {json}");
        }
    }

    #[test]
    fn the_last_one_counts() {
        let twice = [("enforce_disagg", "true"), ("enforce_disagg", "false")];
        assert_eq!(overrides(&twice), overrides(&twice[1..]));
    }

    /// Goal: the feed's settings may change under a plugin's; a contradiction
    /// leaves a gateway that routes.
    #[test]
    fn a_contradiction_leaves_the_feed_s_settings() {
        let (all, wrong) = overrides(&[("use_kv_events", "false")]).over(&feed());
        assert!(!all.default.use_kv_events);
        assert_eq!(all.of_models, feed().of_models);
        assert_eq!(wrong[0].field, "router_predicted_ttl_secs");
    }
}
