//! Route: runs the stages of the request path, and is the only place that
//! decides what happens when one of them cannot do its work.
//!
//! In two steps, because only the second depends on what other VMs do at the
//! same time: [`prepare`] reads the prompt once, [`select`] weighs the workers
//! and may be repeated when the state has moved on.
//!
//! # Invariants
//!
//! 1. Every request that reaches a worker is counted under exactly one reason.
//! 2. What cannot be read is still routed, by load; nothing here fails a
//!    request except that no worker is there.

use crate::choose::{Random, lowest};
use crate::hash::{BlockShape, Salt, sequence_hashes};
use crate::ids::{SequenceHash, TokenId, Worker, WorkerSlot};
use crate::models::{Model, Models};
use crate::overlap::{Overlap, overlaps};
use crate::reason::Reason;
use crate::render::WallClock;
use crate::replica::Replica;
use crate::request::{ParsedRequest, Prompt};
use crate::roster::{Parity, Role, RosterWorker};
use crate::score::{Candidate, Knobs, PromptSize, cost};

/// Bytes that a token stands for when a prompt is not tokenized: only the load
/// of the request depends on it.
const BYTES_PER_TOKEN_ESTIMATE: usize = 4;

/// A request, read as far as routing needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// The model's number in rosters; `None` if no card has its name.
    pub model: Option<u16>,
    /// Why it will be routed as it is, as far as the prompt decides that.
    pub reason: Reason,
    /// Tokens of the prompt; an estimate if `tokens` is empty.
    pub prompt_tokens: u32,
    /// The prompt's tokens, if they are known: of the first prompt of several.
    pub tokens: Vec<TokenId>,
    /// Sequence hashes of the complete blocks of `tokens`.
    pub hashes: Vec<SequenceHash>,
    /// Tokens of a block; 0 if the model is not known.
    pub block_size: u32,
}

impl Prepared {
    /// A request of which only the length is known.
    #[must_use]
    pub fn by_load(reason: Reason, model: Option<u16>, body_bytes: usize) -> Self {
        let tokens = body_bytes / BYTES_PER_TOKEN_ESTIMATE;
        Self {
            model,
            reason,
            prompt_tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
            tokens: Vec::new(),
            hashes: Vec::new(),
            block_size: 0,
        }
    }

    /// Whether the tokens are the whole prompt as the engine will see it, so
    /// that they may be handed over in its place.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        matches!(self.reason, Reason::Kv | Reason::ShortPrompt)
    }
}

/// Reads a request's prompt: renders, tokenizes, hashes.
///
/// - `body_bytes`: length of the body, to estimate what cannot be read.
/// - `now`: for templates that print the date.
pub fn prepare(
    models: &mut Models,
    request: &ParsedRequest<'_>,
    body_bytes: usize,
    now: WallClock,
) -> Prepared {
    let Some((number, model)) = find_model(models, &request.model) else {
        return Prepared::by_load(Reason::UnknownModel, None, body_bytes);
    };
    let shape = BlockShape { block_size: model.card().block_size, eagle: model.card().eagle };
    let read = read_tokens(models, number, request, now);
    let (tokens, reason) = match read {
        Ok(read) => read,
        Err(reason) => return Prepared::by_load(reason, Some(number), body_bytes),
    };
    let mut hashes = Vec::new();
    let salt = Salt { lora: None, cache_salt: request.cache_salt.as_deref() };
    sequence_hashes(&tokens, shape, salt, &mut hashes);
    let reason = if hashes.is_empty() { Reason::ShortPrompt } else { reason };
    Prepared {
        model: Some(number),
        reason,
        prompt_tokens: u32::try_from(tokens.len()).unwrap_or(u32::MAX),
        tokens,
        hashes,
        block_size: shape.block_size,
    }
}

/// The model of a name. A request that names none goes to the only model, as
/// the engines do.
fn find_model<'a>(models: &'a Models, name: &str) -> Option<(u16, &'a Model)> {
    if name.is_empty() { models.only() } else { models.find(name) }
}

fn read_tokens(
    models: &mut Models,
    number: u16,
    request: &ParsedRequest<'_>,
    now: WallClock,
) -> Result<(Vec<TokenId>, Reason), Reason> {
    if let Some(tokens) = request.nvext.as_ref().and_then(|nvext| nvext.token_data.as_ref()) {
        return Ok((tokens.clone(), Reason::Kv));
    }
    if request.alteration.is_some() {
        return Err(Reason::AlteredPrompt);
    }
    match &request.prompt {
        Prompt::Tokens(tokens) => Ok((tokens.clone(), Reason::Kv)),
        Prompt::TokenLists(lists) => {
            Ok((lists.first().cloned().unwrap_or_default(), Reason::Batch))
        }
        Prompt::Text(text) => {
            completion_tokens(models, number, text, request).map(|tokens| (tokens, Reason::Kv))
        }
        Prompt::Texts(texts) => {
            let first = texts.first().map_or("", |text| text.as_ref());
            completion_tokens(models, number, first, request).map(|tokens| (tokens, Reason::Batch))
        }
        Prompt::Chat(chat) => {
            let model = models.model(number).ok_or(Reason::UnknownModel)?;
            let template = model.template().ok_or(Reason::BlindTemplate)?;
            let text = template.render(chat, now).map_err(|_| Reason::RenderFailed)?;
            // Templates print their own special tokens; engines add none to
            // them unless told to.
            let mut tokens = match request.add_special_tokens {
                Some(true) => model.card().completion_prefix.clone(),
                Some(false) | None => Vec::new(),
            };
            let tokenizer = models.tokenizer(number)?;
            tokenizer.encode(&text, &mut tokens).map_err(|_| Reason::PromptTooLong)?;
            Ok((tokens, Reason::Kv))
        }
    }
}

fn completion_tokens(
    models: &mut Models,
    number: u16,
    text: &str,
    request: &ParsedRequest<'_>,
) -> Result<Vec<TokenId>, Reason> {
    let model = models.model(number).ok_or(Reason::UnknownModel)?;
    let mut tokens = match request.add_special_tokens {
        Some(false) => Vec::new(),
        Some(true) | None => model.card().completion_prefix.clone(),
    };
    let tokenizer = models.tokenizer(number)?;
    tokenizer.encode(text, &mut tokens).map_err(|_| Reason::PromptTooLong)?;
    Ok(tokens)
}

/// The worker that a request goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Stands for the worker in bookings.
    pub slot: WorkerSlot,
    /// Who it is.
    pub worker: Worker,
    /// Where it is reached.
    pub endpoint: String,
    /// Leading blocks of the prompt that it holds.
    pub overlap_blocks: u32,
    /// Prompt tokens that it need not compute. At least the last token is
    /// always computed, for its logits are wanted, so a prompt that is held
    /// whole counts one block less.
    pub predicted_cached_tokens: u32,
    /// Why it was chosen so.
    pub reason: Reason,
}

impl Choice {
    /// Prompt tokens that the worker must compute, as the cost counts them.
    #[must_use]
    pub fn prefill_tokens(&self, prepared: &Prepared) -> u32 {
        let cached = self.overlap_blocks.saturating_mul(prepared.block_size);
        prepared.prompt_tokens.saturating_sub(cached)
    }
}

/// Chooses a worker for a prepared request; `None` if there is none.
pub fn select(
    replica: &mut Replica,
    prepared: &Prepared,
    knobs: &Knobs,
    random: &mut Random,
) -> Option<Choice> {
    let reason = reason(replica, prepared);
    let mut held = Vec::new();
    if replica.has_index() {
        overlaps(replica.index_mut(), &prepared.hashes, &mut held);
    }
    let eligible: Vec<&RosterWorker> = eligible(replica, prepared.model).collect();
    let prompt = PromptSize { tokens: prepared.prompt_tokens, block_size: prepared.block_size };
    let candidates: Vec<Candidate> =
        eligible.iter().map(|entry| candidate(replica, entry.slot, prepared, &held)).collect();
    let costs = candidates.iter().map(|candidate| cost(prompt, candidate, knobs));
    let at = lowest(costs, random)?;
    let (entry, candidate) = (eligible.get(at)?, candidates.get(at)?);
    Some(Choice {
        slot: entry.slot,
        worker: entry.worker,
        endpoint: entry.endpoint.clone(),
        overlap_blocks: candidate.overlap_blocks,
        predicted_cached_tokens: predicted(candidate.overlap_blocks, prepared),
        reason,
    })
}

fn reason(replica: &Replica, prepared: &Prepared) -> Reason {
    if !matches!(prepared.reason, Reason::Kv | Reason::Batch) {
        return prepared.reason;
    }
    if !replica.has_index() {
        return Reason::Warming;
    }
    let is_blind = |entry: &RosterWorker| entry.parity == Parity::Blind;
    if eligible(replica, prepared.model).all(is_blind) {
        return Reason::BlindWorkers;
    }
    if replica.is_live() { prepared.reason } else { Reason::Resyncing }
}

/// Workers that can take a request for a model. One whose model no card names
/// may be meant for any worker: the engines know their own aliases.
fn eligible(replica: &Replica, model: Option<u16>) -> impl Iterator<Item = &RosterWorker> {
    replica.roster().workers.iter().filter(move |entry| {
        entry.role != Role::Prefill && model.is_none_or(|model| entry.model == model)
    })
}

fn candidate(
    replica: &Replica,
    slot: WorkerSlot,
    prepared: &Prepared,
    held: &[Overlap],
) -> Candidate {
    let overlap_blocks = held
        .binary_search_by_key(&slot, |overlap| overlap.slot)
        .ok()
        .and_then(|at| held.get(at))
        .map_or(0, |overlap| overlap.blocks);
    let load = replica.loads().of(slot);
    Candidate {
        slot,
        overlap_blocks,
        prefill_tokens: load.prefill_tokens,
        active_blocks: load.active_blocks,
        additional_blocks: replica.loads().additional_blocks(slot, &prepared.hashes),
        requests: load.requests,
    }
}

fn predicted(overlap_blocks: u32, prepared: &Prepared) -> u32 {
    let before_last = prepared.prompt_tokens.saturating_sub(1);
    let most = before_last.checked_div(prepared.block_size).unwrap_or(0);
    overlap_blocks.min(most).saturating_mul(prepared.block_size)
}

#[cfg(test)]
mod tests;
