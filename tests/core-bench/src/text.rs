//! How long a prompt takes from its bytes to its hashes, with one model family.
//!
//! Inputs: `card` (a body of a card frame), `tokenizer` (compiled), `texts` (a list
//! of [`Text`] as JSON).

use serde::{Deserialize, Serialize};
use warmpath_core::card::Cards;
use warmpath_core::choose::Random;
use warmpath_core::demands::Demands;
use warmpath_core::handover::{Handover, hand_over};
use warmpath_core::hash::{BlockShape, Salt, block_hash, sequence_hash, sequence_hashes};
use warmpath_core::ids::TokenId;
use warmpath_core::json::RawJson;
use warmpath_core::models::Models;
use warmpath_core::prefix::PrefixCache;
use warmpath_core::render::WallClock;
use warmpath_core::request::{Endpoint, ParsedRequest, Prompt, parse};
use warmpath_core::roster::Roster;
use warmpath_core::route::{Circumstances, Prepared, prepare};
use warmpath_core::tokenize::{AlignedBytes, Progress, Tokenizer};

use crate::Run;
use crate::figures::{Case, Figure, interleave, mix};

/// A text with its answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Text {
    /// `8k` and `128k` are ordinary text, `wide_8k` and `wide_128k` text of many
    /// languages and kinds; others have the name of what is odd.
    pub group: String,
    /// The text.
    pub text: String,
    /// [`digest`] of its tokens, by another tokenizer.
    pub tokens: u64,
}

/// Stands for tokens.
#[must_use]
pub fn digest(tokens: &[TokenId]) -> u64 {
    tokens.iter().fold(tokens.len() as u64, |all, token| mix(all, u64::from(*token)))
}

/// Groups of texts that are of one size.
const ORDINARY: [&str; 2] = ["8k", "128k"];
const WIDE: [&str; 2] = ["wide_8k", "wide_128k"];

/// Bytes of text in one slice, as the filter cuts it.
const SLICE_BYTES: usize = 4 * 1024;

/// Bytes of the prefix cache: more than what is read here.
const PREFIX_BYTES: usize = 64 * 1024 * 1024;

const NOW: WallClock = WallClock { unix_seconds: 1_750_000_000, utc_offset_seconds: 0 };

struct Family<'r> {
    run: &'r Run<'r>,
    cards: Cards,
    tokenizer: &'r [u8],
    texts: Vec<Text>,
}

impl<'r> Family<'r> {
    fn new(run: &'r Run<'r>) -> Self {
        Self {
            run,
            cards: Cards::decode(&run.inputs["card"]).unwrap(),
            tokenizer: &run.inputs["tokenizer"],
            texts: serde_json::from_slice(&run.inputs["texts"]).unwrap(),
        }
    }

    fn tokenizer(&self) -> Tokenizer {
        Tokenizer::load(AlignedBytes::from_slice(self.tokenizer)).unwrap()
    }

    fn models(&self) -> Models {
        let mut models = Models::default();
        models.take_cards(&self.cards);
        let blob = self.cards.models[0].tokenizer.unwrap();
        assert!(models.load(blob, AlignedBytes::from_slice(self.tokenizer)));
        *models.prefixes_mut() = PrefixCache::new(0, 1);
        models
    }

    fn of(&self, group: &str) -> Vec<&Text> {
        self.texts.iter().filter(|text| text.group == group).collect()
    }

    /// A text that no cache has seen.
    fn first_seen(&self, group: &str, passes: usize) -> Figure {
        let mut samples = Vec::new();
        let mut answer = 0;
        for _ in 0..passes {
            let mut tokenizer = self.tokenizer();
            for text in self.of(group) {
                let mut tokens = Vec::new();
                let from = self.run.clock.now_ns();
                tokenizer.encode(&text.text, &mut tokens).unwrap();
                samples.push(self.run.clock.now_ns() - from);
                assert_eq!(digest(&tokens), text.tokens, "{group}: wrong tokens");
                answer = mix(answer, text.tokens);
            }
        }
        Figure::of(format!("tokenize_first_{group}"), samples, answer)
    }

    /// One odd text, whole and in slices.
    fn adversarial(&self, text: &Text, passes: usize) -> [Figure; 2] {
        let (mut totals, mut longest) = (Vec::new(), Vec::new());
        let mut note = "";
        for _ in 0..passes {
            let mut tokenizer = self.tokenizer();
            let (mut tokens, mut progress) = (Vec::new(), Progress::default());
            let (mut total, mut most) = (0.0, 0.0_f64);
            loop {
                let from = self.run.clock.now_ns();
                let ended =
                    tokenizer.encode_slice(&text.text, &mut progress, SLICE_BYTES, &mut tokens);
                let took = self.run.clock.now_ns() - from;
                (total, most) = (total + took, most.max(took));
                match ended {
                    Ok(false) => {}
                    Ok(true) => {
                        assert_eq!(digest(&tokens), text.tokens, "{}: wrong tokens", text.group);
                        break;
                    }
                    Err(error) => {
                        note = error.reason();
                        break;
                    }
                }
            }
            totals.push(total);
            longest.push(most);
        }
        let name = &text.group;
        [
            Figure::of(format!("adversarial_{name}"), totals, text.tokens).note(note),
            Figure::of(format!("adversarial_{name}_slice"), longest, text.tokens).note(note),
        ]
    }
}

fn body(messages: &[(&str, &str)]) -> Vec<u8> {
    let messages: Vec<_> = messages
        .iter()
        .map(|(role, content)| serde_json::json!({ "role": role, "content": content }))
        .collect();
    let body = serde_json::json!({ "model": "m", "stream": true, "messages": messages });
    serde_json::to_vec(&body).unwrap()
}

fn request(body: &[u8]) -> ParsedRequest<'_> {
    parse(Endpoint::ChatCompletions, body).unwrap()
}

fn read(models: &mut Models, body: &[u8]) -> Prepared {
    let circumstances = Circumstances {
        body_bytes: body.len(),
        now: NOW,
        trusted_salt: None,
        salt_from_body: true,
        demands: &Demands::default(),
    };
    let random = &mut Random::seeded(1);
    prepare(models, &Roster::default(), &request(body), &circumstances, random)
}

/// The stages around tokenizing, in a text of one size.
fn stages(family: &Family<'_>, group: &str, rounds: usize) -> Vec<Figure> {
    let models = family.models();
    let template = models.model(0).unwrap().template().unwrap();
    let text = &family.of(group)[0].text;
    let body = body(&[("system", "You are helpful."), ("user", text)]);
    let request = request(&body);
    let Prompt::Chat(chat) = &request.prompt else { panic!("no chat") };
    let rendered = template.render(chat, NOW).unwrap();
    assert!(rendered.contains(text.trim()), "the template lost the text");
    let mut tokenizer = family.tokenizer();
    let mut tokens = Vec::new();
    tokenizer.encode(&rendered, &mut tokens).unwrap();
    let shape = BlockShape { block_size: 16, eagle: false };
    let handover = Handover { token_data: Some(&tokens), dp_rank: Some(0), ..Handover::default() };
    check_handover(&request, &handover, &tokens);
    check_hashes(&tokens, shape);
    let cases = vec![
        Case::new(format!("parse_{group}"), 1, || {
            let request = parse(Endpoint::ChatCompletions, std::hint::black_box(&body)).unwrap();
            u64::from(request.stream) + request.model.len() as u64
        }),
        Case::new(format!("render_{group}"), 1, || {
            template.render(chat, NOW).unwrap().len() as u64
        }),
        Case::new(format!("tokenize_seen_{group}"), 1, || {
            let mut tokens = Vec::new();
            tokenizer.encode(&rendered, &mut tokens).unwrap();
            digest(&tokens)
        }),
        Case::new(format!("hash_{group}"), 1, || {
            let mut hashes = Vec::new();
            sequence_hashes(&tokens, shape, Salt::default(), &mut hashes);
            hashes.last().map_or(0, |hash| hash.0)
        }),
        Case::new(format!("splice_{group}"), 1, || {
            hand_over(&request.splice, &handover).unwrap().len() as u64
        }),
    ];
    interleave(family.run.clock, rounds, cases)
}

/// What was written says the tokens.
fn check_handover(request: &ParsedRequest<'_>, handover: &Handover<'_>, tokens: &[TokenId]) {
    let written = hand_over(&request.splice, handover).unwrap();
    let value: serde_json::Value = serde_json::from_slice(&written).unwrap();
    let ids: Vec<TokenId> = serde_json::from_value(value["nvext"]["token_data"].clone()).unwrap();
    assert_eq!(ids, tokens);
    assert!(RawJson::parse(std::str::from_utf8(&written).unwrap()).is_ok());
}

/// The hashes are those of each block for itself, chained.
fn check_hashes(tokens: &[TokenId], shape: BlockShape) {
    let mut hashes = Vec::new();
    sequence_hashes(tokens, shape, Salt::default(), &mut hashes);
    let mut parent = None;
    for (block, hash) in tokens.chunks_exact(16).zip(&hashes) {
        let expected = sequence_hash(parent, block_hash(block, Salt::default().seed()));
        assert_eq!(*hash, expected);
        parent = Some(expected);
    }
    assert_eq!(hashes.len(), tokens.len() / 16);
}

/// The next turn of a conversation of 128 KB, with and without what was read of it
/// before; from the body's bytes to the hashes.
fn turns(family: &Family<'_>) -> Vec<Figure> {
    let (mut first, mut seen) = (Vec::new(), Vec::new());
    let clock = family.run.clock;
    for text in family.of("128k") {
        let mut cut = text.text.len() - 2_000;
        while !text.text.is_char_boundary(cut) {
            cut -= 1;
        }
        let (before, turn) = text.text.split_at(cut);
        let opening = body(&[("user", before)]);
        let next = body(&[("user", before), ("assistant", "As you said."), ("user", turn)]);
        let mut models = family.models();
        *models.prefixes_mut() = PrefixCache::new(PREFIX_BYTES, 1);
        let from = clock.now_ns();
        let cold = read(&mut models, &next);
        first.push(clock.now_ns() - from);
        // What only words that were seen would be worth is not counted: the same
        // caches of words serve both from here on.
        *models.prefixes_mut() = PrefixCache::new(PREFIX_BYTES, 1);
        read(&mut models, &opening);
        let from = clock.now_ns();
        let warm = read(&mut models, &next);
        seen.push(clock.now_ns() - from);
        assert!(!cold.hashes.is_empty());
        assert_eq!((&cold.tokens, &cold.hashes), (&warm.tokens, &warm.hashes));
        assert!(models.prefixes().counters().hits > 0, "the turn was not known");
    }
    vec![Figure::of("turn_first", first, 0), Figure::of("turn_seen", seen, 0)]
}

/// All of one family.
pub(crate) fn run(run: &Run<'_>) -> Vec<Figure> {
    let family = Family::new(run);
    let (passes, rounds) = if run.quick { (2, 15) } else { (7, 61) };
    let mut figures = Vec::new();
    for group in ORDINARY {
        figures.push(family.first_seen(group, passes));
        figures.extend(stages(&family, group, rounds));
    }
    figures.extend(turns(&family));
    figures.extend(WIDE.map(|group| family.first_seen(group, passes)));
    let odd = |text: &&Text| !ORDINARY.contains(&&*text.group) && !WIDE.contains(&&*text.group);
    for text in family.texts.iter().filter(odd) {
        figures.extend(family.adversarial(text, passes));
    }
    figures
}
