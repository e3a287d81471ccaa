//! Prompts: chat requests of a size, first seen or the next turn of a conversation,
//! and which engine holds how much of each.
//!
//! Each prompt begins with one of four system prompts, one held by each engine, so
//! that there is a right choice for every request, and it shows in the answer
//! whether it was made. What follows is of the corpus: nobody has seen it before.

use minijinja::Value as Shown;
use serde_json::{Value, json};

use super::engines::ENGINES;
use crate::bench::corpus::{Corpus, CorpusError};
use crate::bench::load::Outgoing;
use crate::engine::model::{ChatContext, Model};
use crate::stack::launch::MODEL;

/// Sizes of a request's body, in bytes, with their names.
pub const SIZES: [(&str, usize); 4] =
    [("1k", 1 << 10), ("8k", 8 << 10), ("128k", 128 << 10), ("1m", 1 << 20)];

/// Share of a body that is text: the rest is JSON around it and escapes, as a mean.
const TEXT_PERCENT: usize = 94;

/// Messages of a conversation before its last turn, at most, system prompt aside.
const MESSAGES_MAX: usize = 23;

/// Shortest message of a conversation, in bytes.
const MESSAGE_BYTES_MIN: usize = 160;

/// Answer and question of a conversation's last turn, in bytes at most.
const TURN_BYTES_MAX: usize = 1_000;

/// What a request is to those who have seen the ones before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// New but for the system prompt.
    First,
    /// The next turn of a conversation.
    Turn,
}

impl Kind {
    /// Both.
    pub const ALL: [Self; 2] = [Self::First, Self::Turn];

    /// Name in rows.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Turn => "turn",
        }
    }
}

/// A prompt.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// The turn before, which all have seen; not measured.
    pub earlier: Option<Outgoing>,
    /// What is measured.
    pub request: Outgoing,
    /// Engine that holds the most of it.
    pub holder: usize,
    /// Tokens of what the holder holds.
    pub held: Vec<u32>,
}

/// Why there are no prompts.
#[derive(Debug)]
pub enum PromptsError {
    /// Too little text.
    Corpus(CorpusError),
    /// The model refused a conversation.
    Model,
}

impl std::fmt::Display for PromptsError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Corpus(error) => error.fmt(formatter),
            Self::Model => formatter.write_str("the model's template refused a conversation"),
        }
    }
}

impl std::error::Error for PromptsError {}

impl From<CorpusError> for PromptsError {
    fn from(error: CorpusError) -> Self {
        Self::Corpus(error)
    }
}

/// The system prompt of an engine.
#[must_use]
pub fn system(engine: usize) -> Value {
    let [who, what, how] = match engine % ENGINES {
        0 => ["a careful assistant for people who run large clusters", "answer briefly", "units"],
        1 => ["a reviewer of code in many languages", "point at the line that is wrong", "tests"],
        2 => ["a translator who keeps names and numbers as they are", "translate", "footnotes"],
        _ => ["an analyst of tables, logs and measurements", "tell what stands out", "doubts"],
    };
    let content = format!(
        "You are {who}. Read everything below before you begin, then {what}. If something is \
         missing, say so, and never invent it. Mention {how} where they matter, and stop there."
    );
    json!({"role": "system", "content": content})
}

fn message(role: &str, content: String) -> Value {
    json!({"role": role, "content": content})
}

/// A request with these messages.
#[must_use]
pub fn request(messages: &[Value]) -> Outgoing {
    let body = json!({"model": MODEL, "messages": messages, "max_tokens": 1});
    Outgoing::chat(body.to_string().into())
}

/// Tokens of a conversation, as the engines count them.
///
/// # Errors
///
/// [`PromptsError::Model`].
pub fn tokens(model: &Model, messages: &[Value]) -> Result<Vec<u32>, PromptsError> {
    let shown = messages.iter().map(|message| serde_json::from_value::<Shown>(message.clone()));
    let messages: Vec<Shown> = shown.collect::<Result<_, _>>().map_err(|_| PromptsError::Model)?;
    let context = ChatContext { messages, add_generation_prompt: true, ..ChatContext::default() };
    model.chat_tokens(&context).map_err(|_| PromptsError::Model)
}

/// Prompts of one size and kind.
///
/// # Errors
///
/// [`PromptsError`].
pub fn make(
    corpus: &mut Corpus,
    model: &Model,
    kind: Kind,
    bytes: usize,
    count: usize,
) -> Result<Vec<Prompt>, PromptsError> {
    let made = (0..count).map(|number| {
        let holder = number % ENGINES;
        let system = system(holder);
        let length = system.to_string().len();
        let text = (bytes * TEXT_PERCENT / 100).saturating_sub(length).max(64);
        match kind {
            Kind::First => {
                let messages = [system, message("user", corpus.text(text)?)];
                let request = request(&messages);
                Ok(Prompt { earlier: None, request, holder, held: Vec::new() })
            }
            Kind::Turn => {
                let messages = conversation(corpus, system, text)?;
                let before = messages.len().saturating_sub(2);
                let earlier = messages.get(..before).unwrap_or_default();
                Ok(Prompt {
                    earlier: Some(request(earlier)),
                    request: request(&messages),
                    holder,
                    held: tokens(model, earlier)?,
                })
            }
        }
    });
    made.collect()
}

/// A conversation that ends with a question.
fn conversation(
    corpus: &mut Corpus,
    system: Value,
    bytes: usize,
) -> Result<Vec<Value>, PromptsError> {
    let last = (bytes / 3).min(TURN_BYTES_MAX);
    let before = bytes - last;
    // Odd, so that it begins and ends with the user.
    let messages = (before / MESSAGE_BYTES_MIN).clamp(1, MESSAGES_MAX);
    let messages = messages - (messages + 1) % 2;
    let mut all = vec![system];
    for number in 0..messages {
        let role = if number % 2 == 0 { "user" } else { "assistant" };
        all.push(message(role, corpus.text(before / messages)?));
    }
    all.push(message("assistant", corpus.text(last * 2 / 3)?));
    all.push(message("user", corpus.text(last / 3)?));
    Ok(all)
}
