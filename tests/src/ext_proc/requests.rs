//! Requests: a mix of all that a gateway is asked, from a seed.

use hyper::Method;
use hyper::body::Bytes;
use serde_json::{Value, json};

use super::engines::HOLD;
use crate::bench::gateway::prompts::{PromptsError, tokens};
use crate::engine::model::Model;
use crate::stack::conversations::Numbers;
use crate::stack::launch::MODEL;

/// Families of prompts that begin alike.
const FAMILIES: usize = 16;

/// Words of what a family has in common, and of a question.
const COMMON_WORDS: usize = 160;
const QUESTION_WORDS: usize = 24;

/// Words of a long prompt: some 300 KB.
const LONG_WORDS: usize = 55_000;

/// What a client may try to choose its worker with.
const SPOOFED: [(&str, &str); 8] = [
    ("x-gateway-destination-endpoint", "127.0.0.1:1"),
    ("x-gateway-destination-endpoint-subset", "127.0.0.1:1"),
    ("x-dynamo-worker-instance-id", "2"),
    ("x-worker-instance-id", "2"),
    ("x-dynamo-dp-rank", "3"),
    ("x-prefiller-host-port", "127.0.0.1:1"),
    ("x-llm-d-prefiller-host-port", "127.0.0.1:1"),
    ("x-tenant-id", "somebody"),
];

/// A request, and what is to be compared of its fate.
#[derive(Clone, Debug)]
pub struct Sent {
    /// What it is, for people.
    pub kind: &'static str,
    /// Method.
    pub method: Method,
    /// Path.
    pub path: &'static str,
    /// Headers but `host`.
    pub headers: Vec<(&'static str, &'static str)>,
    /// Body.
    pub body: Bytes,
    /// Whether one worker is better than all others even while nobody has any
    /// load.
    pub has_best: bool,
}

impl Sent {
    fn post(kind: &'static str, path: &'static str, body: &Value) -> Self {
        Self {
            kind,
            method: Method::POST,
            path,
            headers: vec![("content-type", "application/json")],
            body: body.to_string().into(),
            has_best: false,
        }
    }

    fn with(mut self, headers: &[(&'static str, &'static str)]) -> Self {
        self.headers.extend_from_slice(headers);
        self
    }
}

/// Prompts that begin alike.
struct Family {
    system: Value,
    /// Tokens that all of them begin with.
    common: Vec<u32>,
}

/// The mix.
pub struct Mix {
    families: Vec<Family>,
    numbers: Numbers,
}

impl Mix {
    /// Makes the families.
    ///
    /// # Errors
    ///
    /// [`PromptsError`].
    pub fn new(model: &Model, seed: u64) -> Result<Self, PromptsError> {
        let mut numbers = Numbers::new(seed);
        let mut families = Vec::new();
        for _ in 0..FAMILIES {
            let system = message("system", numbers.text(COMMON_WORDS));
            let with = |text: &str| tokens(model, &[system.clone(), message("user", text.into())]);
            let (one, other) = (with("a")?, with("1")?);
            let common = one.iter().zip(&other).take_while(|(one, other)| one == other);
            families.push(Family { common: common.map(|(token, _)| *token).collect(), system });
        }
        Ok(Self { families, numbers })
    }

    /// What each engine is to hold: its number and tokens. Of each family one holds
    /// all that is common, another half of it.
    #[must_use]
    pub fn held(&self, engines: usize) -> Vec<(usize, Vec<u32>)> {
        let halves = self.families.iter().enumerate().flat_map(|(at, family)| {
            let half = family.common.get(..family.common.len() / 2).unwrap_or_default();
            [(at % engines, family.common.clone()), ((at + 1) % engines, half.to_vec())]
        });
        halves.collect()
    }

    /// A question to each family.
    pub fn one_of_each(&mut self) -> Vec<Sent> {
        (0..FAMILIES).map(|family| self.chat(family, "warm-up")).collect()
    }

    fn chat(&mut self, family: usize, kind: &'static str) -> Sent {
        self.chat_of(family, kind, QUESTION_WORDS)
    }

    fn chat_of(&mut self, family: usize, kind: &'static str, words: usize) -> Sent {
        let system = self.families.get(family).map(|family| family.system.clone());
        let question = message("user", self.numbers.text(words));
        let messages: Vec<Value> = system.into_iter().chain([question]).collect();
        let body = json!({"model": MODEL, "messages": messages, "max_tokens": 1});
        Sent { has_best: true, ..Sent::post(kind, "/v1/chat/completions", &body) }
    }

    /// A request whose answer is held back; of every second family it is streamed,
    /// so that its prompt counts as computed.
    pub fn holding(&mut self, family: usize, words: usize) -> Sent {
        let mut sent = self.chat_of(family, "held", words).with(&[(HOLD, "1")]);
        let mut body: Value = serde_json::from_slice(&sent.body).unwrap_or_default();
        if let Some(body) = body.as_object_mut() {
            body.insert("stream".into(), family.is_multiple_of(2).into());
        }
        sent.body = body.to_string().into();
        sent
    }

    /// A chat of some family.
    pub fn next_chat(&mut self) -> Sent {
        let family = self.numbers.below(FAMILIES);
        self.chat(family, "chat")
    }

    /// The next request.
    pub fn any(&mut self) -> Sent {
        let family = self.numbers.below(FAMILIES);
        let text = |numbers: &mut Numbers| numbers.text(QUESTION_WORDS);
        match self.numbers.below(100) {
            0..50 => self.chat(family, "chat"),
            50..58 => self.chat(family, "spoofed").with(&SPOOFED),
            58..63 => {
                let mut sent = self.chat(family, "spoofed nvext");
                let mut body: Value = serde_json::from_slice(&sent.body).unwrap_or_default();
                if let Some(body) = body.as_object_mut() {
                    let nvext =
                        json!({"backend_instance_id": 2, "annotations": ["a"], "dp_rank": 1});
                    body.insert("nvext".into(), nvext);
                }
                sent.body = body.to_string().into();
                sent
            }
            63..68 => self.chat(family, "priority").with(&[("x-dynamo-request-priority", "3")]),
            68..70 => self.chat(family, "bad priority").with(&[("x-dynamo-request-priority", "a")]),
            70..75 => {
                let body =
                    json!({"model": MODEL, "prompt": text(&mut self.numbers), "max_tokens": 1});
                Sent::post("completion", "/v1/completions", &body)
            }
            75..80 => {
                // What a family begins with, as tokens.
                let tokens = self.families.get(family).map(|family| family.common.clone());
                let mut tokens = tokens.unwrap_or_default();
                tokens.extend((0..40).map(|at| at + 20));
                let body = json!({"model": MODEL, "prompt": tokens, "max_tokens": 1});
                let sent = Sent::post("tokens", "/v1/completions", &body);
                Sent { has_best: true, ..sent }
            }
            80..84 => {
                let body = json!({"model": MODEL, "input": text(&mut self.numbers)});
                Sent::post("embedding", "/v1/embeddings", &body)
            }
            84..87 => {
                let body = json!({"model": MODEL, "input": text(&mut self.numbers)});
                Sent::post("response", "/v1/responses", &body)
            }
            87..90 => {
                let sent = Sent::post("models", "/v1/models", &Value::Null);
                Sent { method: Method::GET, body: Bytes::new(), ..sent }
            }
            90..93 => {
                let body = json!({"model": "other", "messages": [message("user", "a".into())]});
                Sent::post("unknown model", "/v1/chat/completions", &body)
            }
            93..95 => {
                let sent = Sent::post("no JSON", "/v1/chat/completions", &Value::Null);
                Sent { body: Bytes::from_static(b"{\"model\":"), ..sent }
            }
            95..97 => {
                let body = json!({"model": MODEL, "messages": 3});
                Sent::post("no messages", "/v1/chat/completions", &body)
            }
            97 => self.chat_of(family, "long", LONG_WORDS),
            _ => {
                let sent = Sent::post("no body", "/v1/chat/completions", &Value::Null);
                Sent { body: Bytes::new(), ..sent }
            }
        }
    }
}

fn message(role: &str, content: String) -> Value {
    json!({"role": role, "content": content})
}
