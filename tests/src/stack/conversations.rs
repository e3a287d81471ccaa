//! Conversations: the requests of demo and smoke.
//!
//! Sessions of several turns; several sessions share a system prompt, as those
//! of one application do. Everything follows from a seed. Turns of different
//! sessions are interleaved: each round sends one turn of every session, in an
//! order of its own, so that a cache that cannot hold all sessions forgets a
//! session before its next turn comes.

use super::client::Chat;

/// How many and how long.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// System prompts.
    pub groups: usize,
    /// Sessions that share one.
    pub sessions_per_group: usize,
    /// Turns of a session.
    pub turns: usize,
    /// Words of a system prompt.
    pub system_words: usize,
    /// Words of a user's message.
    pub user_words: usize,
    /// Tokens of an answer.
    pub answer_tokens: u32,
}

/// Words that messages are made of; short and common, so that any tokenizer
/// gives one or two tokens each.
const WORDS: [&str; 48] = [
    "the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "as",
    "his", "they", "be", "at", "one", "have", "this", "from", "or", "had", "by", "hot", "word",
    "but", "what", "some", "we", "can", "out", "other", "were", "all", "there", "when", "up",
    "use", "your", "how", "said", "an", "each", "she", "which", "do",
];

/// Numbers from a seed (SplitMix64).
#[derive(Clone, Debug)]
pub struct Numbers(u64);

impl Numbers {
    /// Starts from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number below `bound` (0 for 0).
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let mixed = mixed ^ (mixed >> 31);
        usize::try_from(mixed % bound.max(1) as u64).unwrap_or(0)
    }

    /// A text of so many words.
    pub fn text(&mut self, words: usize) -> String {
        let words: Vec<&str> = (0..words)
            .map(|_| WORDS.get(self.below(WORDS.len())).copied().unwrap_or_default())
            .collect();
        words.join(" ")
    }

    /// Puts a list into a random order.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            list.swap(last, self.below(last + 1));
        }
    }
}

/// One session: what was said so far.
#[derive(Clone, Debug)]
pub struct Session {
    messages: Vec<(&'static str, String)>,
    questions: Vec<String>,
    turn: usize,
    answer_tokens: u32,
}

impl Session {
    /// The next request: everything so far and the next question. Every other
    /// turn is streamed.
    pub fn ask(&mut self) -> Chat {
        let question = self.questions.get(self.turn).cloned().unwrap_or_default();
        self.messages.push(("user", question));
        self.turn += 1;
        Chat {
            messages: self.messages.clone(),
            max_tokens: self.answer_tokens,
            stream: self.turn.is_multiple_of(2),
        }
    }

    /// Notes the answer.
    pub fn answered(&mut self, text: String) {
        self.messages.push(("assistant", text));
    }
}

/// All sessions, and the order in which their turns come.
#[derive(Clone, Debug)]
pub struct Conversations {
    /// The sessions.
    pub sessions: Vec<Session>,
    /// Indices into `sessions`, one per request.
    pub order: Vec<usize>,
}

impl Conversations {
    /// Makes the sessions of a seed.
    #[must_use]
    pub fn new(shape: &Shape, seed: u64) -> Self {
        let mut numbers = Numbers::new(seed);
        let mut sessions = Vec::new();
        for _ in 0..shape.groups {
            let system = numbers.text(shape.system_words);
            for _ in 0..shape.sessions_per_group {
                sessions.push(Session {
                    messages: vec![("system", system.clone())],
                    questions: (0..shape.turns).map(|_| numbers.text(shape.user_words)).collect(),
                    turn: 0,
                    answer_tokens: shape.answer_tokens,
                });
            }
        }
        let mut order = Vec::new();
        for _ in 0..shape.turns {
            let mut round: Vec<usize> = (0..sessions.len()).collect();
            numbers.shuffle(&mut round);
            order.extend(round);
        }
        Self { sessions, order }
    }
}

#[cfg(test)]
mod tests;
