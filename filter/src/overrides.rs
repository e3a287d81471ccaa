//! Overrides: settings of this plugin that win over the feed's.
//!
//! One sidecar configures all gateways; a gateway that must differ says so in its
//! plugin's configuration, field by field.

use serde_json::Value as Json;
use warmpath_core::settings::{Draft, Field, RouterSettings, Settings, Value, Wrong};

/// Fields and what they are set to, each once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides(Vec<(&'static str, Json)>);

impl Overrides {
    /// Adds a field.
    ///
    /// # Errors
    ///
    /// If there is no such field, or it does not take that; in words.
    pub fn add(&mut self, name: &str, value: Json) -> Result<(), String> {
        let field = Field::find(name).ok_or_else(|| format!("`{name}` is not a known field"))?;
        set(&mut Draft::default(), field, &value).map_err(|wrong| wrong.to_string())?;
        self.0.push((field.name, value));
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
        for (name, value) in &self.0 {
            if let Some(field) = Field::find(name) {
                set(&mut draft, field, value).map_err(|wrong| vec![wrong])?;
            }
        }
        draft.finish()
    }
}

fn set(draft: &mut Draft, field: &Field, value: &Json) -> Result<(), Wrong> {
    let value =
        Value::of_json(value).ok_or_else(|| Wrong { field: field.name, why: field.takes() })?;
    draft.set(field, value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn overrides(fields: &[(&str, Json)]) -> Overrides {
        let mut overrides = Overrides::default();
        for (name, value) in fields {
            overrides.add(name, value.clone()).unwrap();
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
        let fields = [("overlap_score_credit", json!(0.25)), ("enforce_disagg", json!(true))];
        let (all, wrong) = overrides(&fields).over(&feed());
        assert_eq!(wrong, []);
        for (laid, before) in
            [(all.of(None), feed().default), (all.of(Some(2)), feed().of_models[0].1)]
        {
            let expected = Settings { overlap_score_credit: 0.25, enforce_disagg: true, ..before };
            assert_eq!(*laid, expected);
        }
    }

    /// Goal: the feed's settings may change under a plugin's; a contradiction
    /// leaves a gateway that routes.
    #[test]
    fn a_contradiction_leaves_the_feed_s_settings() {
        let (all, wrong) = overrides(&[("use_kv_events", json!(false))]).over(&feed());
        assert!(!all.default.use_kv_events);
        assert_eq!(all.of_models, feed().of_models);
        assert_eq!(wrong[0].field, "router_predicted_ttl_secs");
    }
}
