//! Trace: the requests of one measurement, the same for every router.
//!
//! Everything follows from a seed or from a file, the answers too: an engine's
//! answer depends on the prompt alone, so a later turn's history is known before
//! the first is asked. Texts are made of words that the tokenizer keeps whole,
//! so lengths in tokens are what they are meant to be.
//!
//! Arrivals are fixed in advance and wait for nobody: a router that is slow gets
//! no easier a trace.

mod conversations;
mod hot_prefix;
mod mooncake;

use std::sync::Arc;

use serde_json::{Value, json};

use crate::engine::model::{ChatContext, Model, PromptError, answer_seed};
use crate::stack::conversations::Numbers;

/// Which requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Sessions of several turns, under system prompts of unequal popularity.
    Conversations,
    /// The beginning of a production trace.
    Mooncake,
    /// Nine of ten requests begin with the same 8,192 tokens.
    HotPrefix,
}

impl Kind {
    /// All.
    pub const ALL: [Self; 3] = [Self::Conversations, Self::Mooncake, Self::HotPrefix];

    /// Name in tables and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Conversations => "conversations",
            Self::Mooncake => "mooncake",
            Self::HotPrefix => "hot-prefix",
        }
    }
}

/// One message; texts are shared between the requests that repeat them.
pub type Message = (&'static str, Arc<str>);

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// When it is sent, in microseconds of the engines' time.
    pub at_us: u64,
    /// Its messages.
    pub messages: Vec<Message>,
    /// The tokens that an engine makes of them.
    pub prompt: Vec<u32>,
    /// Tokens to generate.
    pub output_tokens: usize,
}

/// All requests, by time.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Which.
    pub kind: Kind,
    /// Blocks of each engine's cache that the trace is meant for.
    pub engine_blocks: usize,
    /// The requests.
    pub requests: Vec<Request>,
}

/// Why there is no trace.
#[derive(Debug)]
pub enum TraceError {
    /// The file is missing or not what it should be.
    Unreadable,
    /// The model has no template, or its template refuses the messages.
    Prompt(PromptError),
}

impl std::fmt::Display for TraceError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Unreadable => "the trace's file is unreadable",
            Self::Prompt(_) => "the model's template does not take the trace's messages",
        })
    }
}

impl std::error::Error for TraceError {}

impl Trace {
    /// Makes a trace.
    ///
    /// - `load`: arrivals per time, as a share of what the trace is meant for.
    ///
    /// # Errors
    ///
    /// [`TraceError`].
    pub fn new(kind: Kind, model: &Model, seed: u64, load: f64) -> Result<Self, TraceError> {
        let mut writer = Writer { model, numbers: Numbers::new(seed) };
        let (engine_blocks, mut requests) = match kind {
            Kind::Conversations => conversations::requests(&mut writer),
            Kind::Mooncake => mooncake::requests(&mut writer),
            Kind::HotPrefix => hot_prefix::requests(&mut writer),
        }?;
        for request in &mut requests {
            request.at_us = micros(seconds(request.at_us) / load.max(0.01));
        }
        requests.sort_by_key(|request| request.at_us);
        Ok(Self { kind, engine_blocks, requests })
    }

    /// From the first arrival to the last, in microseconds.
    #[must_use]
    pub fn span_us(&self) -> u64 {
        self.requests.last().map_or(0, |request| request.at_us)
    }

    /// Prompt tokens of all requests.
    #[must_use]
    pub fn prompt_tokens(&self) -> usize {
        self.requests.iter().map(|request| request.prompt.len()).sum()
    }
}

impl Request {
    /// The body, streamed and with usage.
    #[must_use]
    pub fn body(&self, model: &str) -> Vec<u8> {
        let messages: Vec<Value> = self
            .messages
            .iter()
            .map(|(role, text)| json!({"role": role, "content": text.as_ref()}))
            .collect();
        let body = json!({
            "model": model, "messages": messages, "max_tokens": self.output_tokens,
            "stream": true, "stream_options": {"include_usage": true},
        });
        body.to_string().into_bytes()
    }
}

/// Makes texts and requests.
struct Writer<'m> {
    model: &'m Model,
    numbers: Numbers,
}

impl Writer<'_> {
    /// A text of so many tokens, at least one.
    fn text(&mut self, tokens: usize) -> Arc<str> {
        let seed = self.numbers.below(usize::MAX) as u64;
        self.words(seed, tokens)
    }

    /// The text that an engine makes of a seed.
    fn words(&self, seed: u64, tokens: usize) -> Arc<str> {
        let words = (0..tokens.max(1)).map(|place| self.model.word(seed, place).text);
        words.collect::<String>().into()
    }

    fn request(
        &self,
        at_us: u64,
        messages: Vec<Message>,
        output_tokens: usize,
    ) -> Result<Request, TraceError> {
        let context = ChatContext {
            messages: messages.iter().map(message).collect(),
            add_generation_prompt: true,
            ..ChatContext::default()
        };
        let prompt = self.model.chat_tokens(&context).map_err(TraceError::Prompt)?;
        Ok(Request { at_us, messages, prompt, output_tokens })
    }

    /// What the engines answer to a request.
    fn answer(&self, request: &Request) -> Message {
        ("assistant", self.words(answer_seed(&request.prompt), request.output_tokens))
    }

    /// A number between two bounds, small ones as likely as in each octave.
    fn length(&mut self, least: u32, most: u32) -> usize {
        let ratio = f64::from(most) / f64::from(least.max(1));
        let length = f64::from(least) * ratio.powf(self.share());
        usize::try_from(whole(length)).unwrap_or(usize::MAX)
    }

    /// A number below one.
    fn share(&mut self) -> f64 {
        const STEPS: u32 = 1 << 24;
        let drawn = u32::try_from(self.numbers.below(1 << 24)).unwrap_or(0);
        f64::from(drawn) / f64::from(STEPS)
    }

    /// A time between arrivals that do not know of each other, in seconds.
    fn gap(&mut self, mean_seconds: f64) -> f64 {
        -mean_seconds * (1.0 - self.share()).ln()
    }

    /// A rank below `ranks`; the `n`th is `n` times rarer than the first.
    fn zipf(&mut self, ranks: u32) -> usize {
        let total: f64 = (1..=ranks).map(|rank| 1.0 / f64::from(rank)).sum();
        let mut left = self.share() * total;
        for rank in 1..=ranks {
            left -= 1.0 / f64::from(rank);
            if left < 0.0 {
                return usize::try_from(rank - 1).unwrap_or(0);
            }
        }
        0
    }
}

fn message((role, text): &Message) -> minijinja::Value {
    minijinja::Value::from_pairs([("role", *role), ("content", text.as_ref())])
}

/// Seconds as microseconds.
fn micros(seconds: f64) -> u64 {
    whole(seconds * 1e6)
}

fn seconds(micros: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a trace has minutes")]
    let micros = micros as f64;
    micros / 1e6
}

/// The whole part of a number that is not negative.
fn whole(number: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "saturates, which no trace comes near"
    )]
    let whole = number as u64;
    whole
}

#[cfg(test)]
mod tests;
