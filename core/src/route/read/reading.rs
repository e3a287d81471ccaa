//! Reading: a prompt that is read a part at a time, so that a gateway's thread
//! serves others in between.

use super::{Circumstances, Source, Target, cache_salt, find_target, source};
use crate::card::{BlobId, ModelCard};
use crate::choose::Random;
use crate::demands::Demands;
use crate::hash::{BlockShape, Salt, next_sequence_hashes};
use crate::ids::{SequenceHash, TokenId, WorkerSlot};
use crate::limits::PREFIX_CHUNK_BYTES;
use crate::models::{Models, Reader};
use crate::prefix::{Scope, Trail};
use crate::reason::Reason;
use crate::render::Flavour;
use crate::request::ParsedRequest;
use crate::roster::Roster;
use crate::route::{BYTES_PER_TOKEN_ESTIMATE, Prepared};
use crate::tokenize::Progress;

/// Tokens that are hashed in about the time in which a byte of text is
/// tokenized.
const TOKENS_HASHED_PER_BYTE: usize = 4;

/// A request whose prompt is being read. It borrows nothing: the body may go,
/// and cards and rosters may change between two steps.
#[derive(Debug)]
pub struct Reading {
    stage: Stage,
    /// The model's number in rosters; `None` if no card has its name.
    model: Option<u16>,
    /// Its name, to notice that the number stands for another one by now.
    name: String,
    /// Its tokenizer, to notice that it has another one by now.
    tokenizer: Option<BlobId>,
    holders: Option<Vec<WorkerSlot>>,
    demands: Demands,
    body_bytes: usize,
    /// How a request with such a prompt is routed.
    reason: Reason,
    /// Whether the tokens are the whole prompt as the engine will see it.
    is_whole: bool,
    /// What is tokenized; empty once it is.
    text: String,
    progress: Progress,
    /// Tokens that go before the text.
    tokens_before: usize,
    /// How far the text is known to the prefix cache.
    trail: Option<Trail>,
    /// Bytes of budget that tokenizing has taken.
    spent: usize,
    tokens: Vec<TokenId>,
    shape: BlockShape,
    seed: u64,
    hashes: Vec<SequenceHash>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Tokenize,
    Hash,
    /// It cannot be read.
    ByLoad(Reason),
}

impl Reading {
    /// Finds the model and renders the prompt.
    ///
    /// - `roster`: says how many workers each generation of the model has, and
    ///   which LoRA adapters there are.
    /// - `random`: is drawn from only if there are several generations.
    pub fn begin(
        models: &mut Models,
        roster: &Roster,
        request: &ParsedRequest<'_>,
        circumstances: &Circumstances<'_>,
        random: &mut Random,
    ) -> Self {
        let mut reading = Self {
            stage: Stage::ByLoad(Reason::UnknownModel),
            model: None,
            name: String::new(),
            tokenizer: None,
            holders: None,
            demands: circumstances.demands.clone(),
            body_bytes: circumstances.body_bytes,
            reason: Reason::Kv,
            is_whole: false,
            text: String::new(),
            progress: Progress::default(),
            tokens_before: 0,
            trail: None,
            spent: 0,
            tokens: Vec::new(),
            shape: BlockShape { block_size: 0, eagle: false },
            seed: 0,
            hashes: Vec::new(),
        };
        let target = find_target(models, roster, &request.model, random);
        let Some(Target { model: number, adapter }) = target else { return reading };
        reading.model = Some(number);
        reading.holders = adapter.map(|adapter| adapter.holders.clone());
        let salt = Salt {
            lora: adapter.map(|adapter| adapter.lora.as_str()),
            cache_salt: cache_salt(request, circumstances),
        };
        reading.seed = salt.seed();
        match source(models, number, request, circumstances.now) {
            Ok((Source::Text(prefix, text), reason)) => {
                (reading.stage, reading.reason) = (Stage::Tokenize, reason);
                (reading.tokens, reading.text) = (prefix, text);
            }
            Ok((Source::Tokens(tokens), reason)) => {
                (reading.stage, reading.reason) = (Stage::Hash, reason);
                reading.tokens = tokens;
            }
            Err(reason) => reading.stage = Stage::ByLoad(reason),
        }
        if let Some(card) = models.model(number).map(|model| model.card()) {
            reading.name.clone_from(&card.name);
            reading.tokenizer = card.tokenizer.ok();
            // The other flavours refuse media when they render.
            let has_media = card.flavour == Flavour::Raw && request.prompt.has_media();
            reading.is_whole = reading.reason == Reason::Kv && !has_media;
            reading.shape = BlockShape { block_size: card.block_size, eagle: card.eagle };
        }
        reading.find_prefix(models);
        reading
    }

    /// Takes over what is known of the text from others that began alike.
    fn find_prefix(&mut self, models: &mut Models) {
        self.tokens_before = self.tokens.len();
        let (Stage::Tokenize, Some(number)) = (self.stage, self.model) else { return };
        let Ok(reader) = models.reader(number) else { return };
        self.tokens.reserve(self.text.len() / BYTES_PER_TOKEN_ESTIMATE);
        let scope = Scope { tokenizer: reader.number, seed: self.seed };
        let (text, shape) = (&self.text, self.shape);
        let trail = reader.prefixes.find(scope, text, shape, &mut self.tokens, &mut self.hashes);
        if let Some(progress) = Progress::resume(text, &trail.border()) {
            (self.progress, self.spent) = (progress, trail.border().at);
            self.trail = Some(trail);
        }
    }

    /// Reads on for about `bytes_budget` bytes of text, at least a little of it.
    /// Returns the request once it is read; there is nothing more to read then.
    ///
    /// - `models`: as they are by now. If the model is gone, or has another
    ///   tokenizer, the request is routed by load.
    pub fn step(&mut self, models: &mut Models, bytes_budget: usize) -> Option<Prepared> {
        let mut budget = bytes_budget;
        if self.stage == Stage::Tokenize {
            let left = self.text.len().saturating_sub(self.spent);
            match self.tokenize(models, budget) {
                Ok(true) => {
                    self.stage = Stage::Hash;
                    self.text = String::new();
                    self.progress = Progress::default();
                    budget = budget.saturating_sub(left);
                    if budget == 0 {
                        return None;
                    }
                }
                Ok(false) => return None,
                Err(reason) => self.stage = Stage::ByLoad(reason),
            }
        }
        if let Stage::ByLoad(reason) = self.stage {
            return Some(self.give_up(models, reason));
        }
        match self.hash(models, budget) {
            Ok(true) => {
                self.remember_hashes(models);
                Some(self.finish())
            }
            Ok(false) => None,
            Err(reason) => Some(self.give_up(models, reason)),
        }
    }

    /// Reads no further: the request, routed by load.
    pub fn give_up(&mut self, models: &Models, reason: Reason) -> Prepared {
        // Workers of a model that is gone are none for it, and neither are those
        // of the one that has its number now.
        let model = self.model.filter(|_| self.card(models).is_some());
        Prepared {
            holders: self.holders.take().filter(|_| model.is_some()),
            demands: core::mem::take(&mut self.demands),
            ..Prepared::by_load(reason, model, self.body_bytes)
        }
    }

    /// About how many bytes of text are still to be read; an estimate. 0 if the
    /// prompt is not to be read at all.
    #[must_use]
    pub fn bytes_left(&self) -> usize {
        match self.stage {
            Stage::Tokenize => {
                let tokens = self.text.len() / BYTES_PER_TOKEN_ESTIMATE;
                self.text.len().saturating_sub(self.spent) + tokens / TOKENS_HASHED_PER_BYTE
            }
            Stage::Hash => {
                let hashed = self.hashes.len() * self.shape.block_size as usize;
                self.tokens.len().saturating_sub(hashed) / TOKENS_HASHED_PER_BYTE
            }
            Stage::ByLoad(_) => 0,
        }
    }

    /// Bytes of memory held for the prompt.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.text.capacity()
            + self.tokens.capacity() * size_of::<TokenId>()
            + self.hashes.capacity() * size_of::<SequenceHash>()
    }

    /// What is said of the model by now; `None` if it is gone.
    fn card<'m>(&self, models: &'m Models) -> Option<&'m ModelCard> {
        let card = models.model(self.model?)?.card();
        (card.name == self.name).then_some(card)
    }

    /// Whether the text has come to its end.
    fn tokenize(&mut self, models: &mut Models, budget: usize) -> Result<bool, Reason> {
        let card = self.card(models).ok_or(Reason::UnknownModel)?;
        if card.tokenizer.ok() != self.tokenizer {
            // What was read before is of no use with the new one.
            return Err(Reason::WarmingModel);
        }
        let mut reader = models.reader(self.model.ok_or(Reason::UnknownModel)?)?;
        self.spent = self.spent.saturating_add(budget);
        let mut left = budget;
        loop {
            let remembers = self.trail.as_ref().is_some_and(Trail::is_open);
            let part = if remembers { left.min(PREFIX_CHUNK_BYTES) } else { left };
            let (text, progress) = (&self.text, &mut self.progress);
            let has_ended = reader
                .tokenizer
                .encode_slice(text, progress, part, &mut self.tokens)
                .map_err(|_| Reason::PromptTooLong)?;
            self.remember(&mut reader);
            left -= part;
            if has_ended || left == 0 {
                return Ok(has_ended);
            }
        }
    }

    /// Remembers what was tokenized since the last time, if it is enough.
    fn remember(&mut self, reader: &mut Reader<'_>) {
        let Some(trail) = self.trail.as_mut().filter(|trail| trail.is_open()) else { return };
        let Some(border) = reader.tokenizer.border(&self.text, &self.progress) else { return };
        let tokens = self.tokens.get(self.tokens_before..).unwrap_or_default();
        reader.prefixes.remember(trail, &self.text, border, tokens);
    }

    /// Remembers the hashes of what was remembered.
    fn remember_hashes(&self, models: &mut Models) {
        let (Some(trail), 0, Some(number)) = (&self.trail, self.tokens_before, self.model) else {
            return;
        };
        if let Ok(reader) = models.reader(number) {
            reader.prefixes.remember_hashes(trail, self.shape, &self.hashes);
        }
    }

    /// Whether all blocks are hashed.
    fn hash(&mut self, models: &Models, budget: usize) -> Result<bool, Reason> {
        let card = self.card(models).ok_or(Reason::UnknownModel)?;
        let shape = BlockShape { block_size: card.block_size, eagle: card.eagle };
        if shape != self.shape {
            self.shape = shape;
            self.hashes.clear();
        }
        let tokens = budget.saturating_mul(TOKENS_HASHED_PER_BYTE);
        let blocks = tokens.checked_div(shape.block_size as usize).unwrap_or(0).max(1);
        Ok(next_sequence_hashes(&self.tokens, shape, self.seed, blocks, &mut self.hashes))
    }

    fn finish(&mut self) -> Prepared {
        let is_short = self.hashes.is_empty();
        Prepared {
            model: self.model,
            holders: self.holders.take(),
            reason: if is_short { Reason::ShortPrompt } else { self.reason },
            prompt_tokens: u32::try_from(self.tokens.len()).unwrap_or(u32::MAX),
            tokens: core::mem::take(&mut self.tokens),
            hashes: core::mem::take(&mut self.hashes),
            block_size: self.shape.block_size,
            is_whole: self.is_whole,
            demands: core::mem::take(&mut self.demands),
        }
    }
}
