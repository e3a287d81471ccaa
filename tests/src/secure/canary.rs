//! Canary: a word that is nowhere else, put in every place of a request where text of a
//! user can be, and then sought in everything that is written or shown.
//!
//! Envoy and the sidecar log all that they can. Requests are served and refused; a
//! worker dies. The word and its tokens must be in no log, access log, admin page,
//! metric or state. Envoy itself logs the headers of requests at that level: the word
//! that is in headers is sought in what the module and the sidecar write, and it must
//! be found in what Envoy writes, which shows that the search can find.

use std::path::Path;

use hyper::body::Bytes;
use serde_json::{Value, json};

use super::place::{Place, Plan};
use crate::engine::model::Model;
use crate::stack::client::{get, post};
use crate::stack::launch::MODEL;
use crate::stack::limits::{READY_WITHIN, REQUEST_WITHIN};
use crate::stack::options::Options;
use crate::stack::report::{Report, line};

/// In bodies: in no log of anybody.
const WORD: &str = "zqcanaryzq5281 quagga vex";

/// Its first part, which is sought, too: no piece of it may be there.
const PIECE: &str = "zqcanaryzq";

/// In headers.
const HEADER_WORD: &str = "hxcanaryhx7743";

const CHAT: &str = "/v1/chat/completions";

/// Admin pages that show what Envoy knows.
const ADMIN_PAGES: [&str; 10] = [
    "/stats",
    "/stats/prometheus",
    "/stats?format=json&histogram_buckets=detailed",
    "/config_dump?include_eds",
    "/clusters?format=json",
    "/listeners?format=json",
    "/server_info",
    "/certs",
    "/runtime",
    "/memory",
];

/// Pages of the sidecar.
const SIDECAR_PAGES: [&str; 3] = ["/metrics", "/v1/state", "/readyz"];

/// Makes the checks.
pub(super) async fn check(options: &Options, report: &mut Report) {
    for template in ["envoy.yaml", "envoy-buffer.yaml", "envoy-body.yaml"] {
        let mut place = match Place::engines(options).await {
            Ok(place) => place,
            Err(error) => return report.failure("the engines start", error),
        };
        if let Err(error) = checks(&mut place, template, options, report).await {
            report.failure(template, error);
        }
        if report.has_failures() {
            line(format_args!("logs: {}", place.keep().display()));
        }
        place.stop().await;
    }
}

async fn checks(
    place: &mut Place,
    template: &'static str,
    options: &Options,
    report: &mut Report,
) -> Result<(), Box<dyn std::error::Error>> {
    let plan = Plan {
        feed: format!("listen: \"127.0.0.1:{}\"", place.feed_port),
        template,
        plugin: "\"cache_salt_header\": \"x-customer\", ",
        is_traced: true,
        ..Plan::default()
    };
    place.start_sidecar(&plan).await?;
    place.start_envoy(&plan).await?;
    place.until_warm(READY_WITHIN).await?;

    let mut statuses = Vec::new();
    for (path, body) in requests() {
        statuses.push(send(place, path, body).await);
    }
    place.stack.kill_engine(0).await;
    for (path, body) in requests() {
        statuses.push(send(place, path, body).await);
    }
    let served = statuses.iter().filter(|status| **status == 200).count();
    let refused = statuses.iter().filter(|status| (400..600).contains(*status)).count();
    report.check(
        &format!("{template}: requests are served and refused"),
        served >= 8 && refused >= 8 && served + refused == statuses.len(),
        format_args!("{served} served, {refused} refused"),
    );
    let left = Left::gather(place).await?;
    let tokens = tokens(options)?;
    let shown = rendered(place).await?;
    let is_traced = |log: &[u8]| String::from_utf8_lossy(log).to_lowercase().contains("trace");
    report.check(
        &format!("{template}: everything is logged, and engines compute these tokens"),
        is_traced(&left.envoy)
            && is_traced(&left.sidecar)
            && tokens.iter().any(|form| shown.contains(form.as_str())),
        format_args!("{} and {} bytes; {tokens:?}", left.envoy.len(), left.sidecar.len()),
    );
    left.check_bodies(template, tokens, report);
    left.check_headers(template, report);
    Ok(())
}

/// What is left of the requests.
struct Left {
    envoy: Vec<u8>,
    sidecar: Vec<u8>,
    /// Pages of both, by name.
    pages: Vec<(String, Vec<u8>)>,
}

impl Left {
    async fn gather(place: &Place) -> Result<Self, Box<dyn std::error::Error>> {
        let mut pages = Vec::new();
        for (address, paths) in
            [(place.admin(), &ADMIN_PAGES[..]), (place.status(), &SIDECAR_PAGES[..])]
        {
            for path in paths {
                let page = get(&address, path).await.map_err(|error| format!("{path}: {error}"))?;
                pages.push((format!("{path} of {address}"), page.body.to_vec()));
            }
        }
        let envoy = read(&place.folder, "envoy.log")?;
        let sidecar = read(&place.folder, "sidecar.log")?;
        Ok(Self { envoy, sidecar, pages })
    }

    fn all(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let logs =
            [("Envoy's log and access log", &self.envoy), ("the sidecar's log", &self.sidecar)];
        let pages = self.pages.iter().map(|(name, content)| (name.as_str(), content));
        pages.chain(logs).map(|(name, content)| (name, content.as_slice()))
    }

    fn check_bodies(&self, template: &str, tokens: Vec<String>, report: &mut Report) {
        let mut sought: Vec<String> = vec![WORD.into(), PIECE.into()];
        sought.extend(tokens);
        let found: Vec<String> =
            self.all().flat_map(|(name, content)| places(name, content, &sought)).collect();
        let bytes: usize = self.all().map(|(_, content)| content.len()).sum();
        report.check(
            &format!("{template}: nothing of a body is anywhere"),
            found.is_empty(),
            format_args!(
                "{} forms sought in {bytes} bytes of logs and {} pages: {found:?}",
                sought.len(),
                self.pages.len()
            ),
        );
    }

    fn check_headers(&self, template: &str, report: &mut Report) {
        let text = String::from_utf8_lossy(&self.envoy);
        let with_it = text.lines().filter(|line| line.contains(HEADER_WORD));
        // The access log's lines are JSON.
        let (ours, envoys): (Vec<&str>, Vec<&str>) = with_it.partition(|line| {
            line.contains("[wasm]") || line.starts_with('{') || line.contains("warmpath:")
        });
        let mut found: Vec<String> = ours.into_iter().map(str::to_owned).collect();
        let header = [HEADER_WORD.to_owned()];
        found.extend(places("the sidecar's log", &self.sidecar, &header));
        for (name, content) in &self.pages {
            found.extend(places(name, content, &header));
        }
        report.check(
            &format!("{template}: nothing of a header is in what we write"),
            found.is_empty() && !envoys.is_empty(),
            format_args!("{} lines of Envoy's own have it, ours: {found:?}", envoys.len()),
        );
    }
}

fn read(folder: &Path, name: &str) -> std::io::Result<Vec<u8>> {
    std::fs::read(folder.join(name))
}

/// Where any of these is, with what is around it.
fn places(name: &str, content: &[u8], sought: &[String]) -> Vec<String> {
    const AROUND: usize = 80;
    let text = String::from_utf8_lossy(content);
    let mut found = Vec::new();
    for wanted in sought {
        let Some((before, after)) = text.split_once(wanted.as_str()) else { continue };
        let before: String = before.chars().rev().take(AROUND).collect();
        let before: String = before.chars().rev().collect();
        let after: String = after.chars().take(AROUND).collect();
        found.push(format!("{name}: …{before}«{wanted}»{after}…"));
    }
    found
}

/// The word's tokens, in the forms in which lists of numbers are written.
fn tokens(options: &Options) -> Result<Vec<String>, Box<dyn std::error::Error>> {
    let model = Model::load(&options.model_dir)?;
    let all = model.completion_tokens(WORD).map_err(|_| "the word has no tokens")?;
    // Borders differ with what is around it; the middle does not.
    let middle: Vec<String> = all.iter().skip(1).take(4).map(ToString::to_string).collect();
    if middle.len() < 4 {
        return Err(format!("only {} tokens", all.len()).into());
    }
    Ok([", ", ",", " "].map(|between| middle.join(between)).to_vec())
}

/// What an engine makes of the word, as it says itself: there the word's tokens are.
async fn rendered(place: &Place) -> Result<String, Box<dyn std::error::Error>> {
    let address = place.stack.engine_addresses().nth(1).ok_or("no engine")?;
    let body = json!({"model": MODEL, "messages": [{"role": "user", "content": WORD}]});
    let path = "/v1/chat/completions/render";
    let shown = post(&address, path, &[], body.to_string().into(), REQUEST_WITHIN).await?;
    Ok(String::from_utf8_lossy(&shown.body).into_owned())
}

async fn send(place: &Place, path: &str, body: Bytes) -> u16 {
    let headers = [
        ("x-session-id", HEADER_WORD),
        ("x-dynamo-session-id", HEADER_WORD),
        ("x-customer", HEADER_WORD),
        ("x-tenant-id", HEADER_WORD),
        ("x-dynamo-worker-instance-id", HEADER_WORD),
        ("x-gateway-destination-endpoint", HEADER_WORD),
        ("x-dynamo-meta-note", HEADER_WORD),
        ("authorization", "Bearer hxcanaryhx7743"),
    ];
    let odd = [("x-dynamo-request-priority", HEADER_WORD)];
    // Every other request has a header that cannot be read.
    let headers: Vec<(&str, &str)> = match body.len() % 4 {
        0 => headers.into_iter().chain(odd).collect(),
        _ => headers.to_vec(),
    };
    match post(&place.gateway(), path, &headers, body, REQUEST_WITHIN).await {
        Ok(response) => response.status.as_u16(),
        Err(_) => 0,
    }
}

/// A request: its path and its body.
type Sent = (&'static str, Bytes);

/// Requests that have the word wherever a user's text can be, good and bad ones.
fn requests() -> Vec<Sent> {
    let long = format!("{WORD} ").repeat(40);
    let chat = |more: Value| {
        let mut body = json!({
            "model": MODEL,
            "messages": [
                {"role": "system", "content": format!("{WORD}. {}", "You help. ".repeat(20))},
                {"role": "user", "content": long},
                {"role": "assistant", "content": WORD},
                {"role": "user", "content": [{"type": "text", "text": WORD}]},
            ],
            "tools": [{"type": "function", "function": {
                "name": "zqcanaryzq5281", "description": WORD,
                "parameters": {"type": "object", "properties": {"zqcanaryzq5281": {"type": "string"}}},
            }}],
            "user": WORD,
            "cache_salt": WORD,
            "max_tokens": 4,
        });
        if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
            body.extend(more);
        }
        Bytes::from(body.to_string())
    };
    let completion = |prompt: Value| {
        Bytes::from(json!({"model": MODEL, "prompt": prompt, "max_tokens": 4}).to_string())
    };
    let text = |text: String| Bytes::from(text);
    let latin = [b"{\"model\":\"qwen3\",\"messages\":\"", WORD.as_bytes(), b"\xff\"}"].concat();
    let spaces = |body: Bytes| {
        let mut sent = vec![body.clone()];
        // The length decides which headers go along.
        for more in 1..4 {
            let mut padded = body.to_vec();
            padded.resize(body.len() + more, b' ');
            sent.push(padded.into());
        }
        sent
    };
    let mut sent: Vec<Sent> = Vec::new();
    for body in spaces(chat(json!({}))) {
        sent.push((CHAT, body));
    }
    for body in spaces(chat(json!({"stream": true}))) {
        sent.push((CHAT, body));
    }
    for body in spaces(completion(format!("{WORD} {long}").into())) {
        sent.push(("/v1/completions", body));
    }
    sent.extend([
        (CHAT, chat(json!({"model": PIECE}))),
        (CHAT, chat(json!({"model": MODEL, "lora_name": PIECE}))),
        (CHAT, chat(json!({"nvext": WORD}))),
        (CHAT, chat(json!({"nvext": {"backend_instance_id": WORD}}))),
        (CHAT, chat(json!({"nvext": {"agent_hints": {"priority": WORD}}}))),
        (CHAT, chat(json!({"messages": WORD}))),
        (CHAT, chat(json!({"messages": [WORD]}))),
        (CHAT, chat(json!({"messages": [{"role": WORD, "content": WORD}]}))),
        ("/v1/completions", completion(json!({PIECE: WORD}))),
        (CHAT, text(format!("{{\"model\": \"qwen3\", {WORD}"))),
        (CHAT, text(format!("{{\"model\": \"qwen3\", \"messages\": \"{WORD}"))),
        (CHAT, latin.into()),
        (
            CHAT,
            chat(json!({"messages": [
                {"role": "user", "content": format!("{WORD} ").repeat(4_000)},
            ]})),
        ),
        ("/v1/responses", text(json!({"model": MODEL, "input": WORD}).to_string())),
    ]);
    sent
}
