//! Real templates against `transformers`: see tests/golden/templates.

use super::*;

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const CASES: &str = include_str!("../../../../tests/golden/templates/cases.json");
const CONVERSATIONS: &str = include_str!("../../../../tests/golden/templates/conversations.json");
const KNOWN: &str = include_str!("../../../../tests/golden/templates/known-differences.json");

#[derive(serde::Deserialize)]
struct Case {
    name: String,
    template: String,
    /// The text by conversation; `None` where Python raises.
    expected: BTreeMap<String, Option<String>>,
}

#[derive(serde::Deserialize)]
struct Known {
    template: String,
    conversation: String,
    reason: String,
}

/// The conversations as a client's bodies, by name.
fn bodies() -> BTreeMap<String, &'static str> {
    let conversations = RawJson::parse(CONVERSATIONS).unwrap();
    let name = |body: RawJson<'_>| body.member("name").unwrap().string().unwrap().into_owned();
    conversations.items().map(|body| (name(body), body.text())).collect()
}

/// Goal: what the engine's tokenizer reads is what `transformers` renders.
/// Method: every real template with every conversation, byte for byte; where
/// Python raises, so must we. Differences are listed with their reasons, and a
/// listed one that has gone away fails too.
#[test]
fn templates_render_as_in_transformers() {
    let cases: Vec<Case> = serde_json::from_str(CASES).unwrap();
    let known: Vec<Known> = serde_json::from_str(KNOWN).unwrap();
    let mut known: BTreeMap<(&str, &str), &str> = known
        .iter()
        .map(|known| ((&*known.template, &*known.conversation), &*known.reason))
        .collect();
    let bodies = bodies();
    let (mut identical, mut both_raise, mut listed) = (0, 0, 0);
    let mut surprises = Vec::new();
    for case in &cases {
        let options = RenderOptions { flavour: Flavour::Raw, ..RenderOptions::default() };
        let template = ChatTemplate::compile_with(&source(&case.template), options);
        assert_eq!(case.expected.len(), bodies.len());
        for (name, expected) in &case.expected {
            let body = bodies[name];
            let actual = match &template {
                Ok(template) => template.render(&chat(body), NOW).map_err(RenderError::reason),
                Err(error) => Err(error.reason()),
            };
            let same = match (&actual, expected) {
                (Ok(actual), Some(expected)) => actual == expected,
                (Err(_), None) => true,
                _ => false,
            };
            match (same, known.remove(&(&*case.name, &**name))) {
                (true, None) if expected.is_some() => identical += 1,
                (true, None) => both_raise += 1,
                (false, Some(_)) => listed += 1,
                (true, Some(_)) => {
                    surprises.push(format!("{}/{name}: no longer differs", case.name))
                }
                (false, None) => {
                    surprises.push(difference(&case.name, name, actual, expected.as_deref()));
                }
            }
        }
    }
    surprises.extend(known.keys().map(|(template, name)| format!("{template}/{name}: no case")));
    let total = cases.len() * bodies.len();
    println!(
        "{total} cases: {identical} identical, {both_raise} both raise, {listed} known differences"
    );
    assert!(surprises.is_empty(), "{} surprises:\n{}", surprises.len(), surprises.join("\n"));
    assert_eq!(identical + both_raise + listed, total);
}

/// Where two texts part.
fn difference(
    template: &str,
    conversation: &str,
    actual: Result<String, &str>,
    expected: Option<&str>,
) -> String {
    match (actual, expected) {
        (Ok(actual), Some(expected)) => {
            let at = actual.bytes().zip(expected.bytes()).take_while(|(a, b)| a == b).count();
            let around = |text: &str| {
                let bytes = &text.as_bytes()[at.saturating_sub(40).min(text.len())..];
                String::from_utf8_lossy(&bytes[..bytes.len().min(100)]).into_owned()
            };
            format!(
                "{template}/{conversation}: at {at}: ours {:?}, Python {:?}",
                around(&actual),
                around(expected)
            )
        }
        (Ok(actual), None) => {
            format!("{template}/{conversation}: Python raises, ours has {} bytes", actual.len())
        }
        (Err(reason), _) => format!("{template}/{conversation}: ours fails: {reason}"),
    }
}
