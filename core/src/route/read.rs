//! Read: from a parsed request to what [`select`](super::select()) weighs.

use super::Prepared;
use crate::choose::Random;
use crate::demands::Demands;
use crate::hash::{BlockShape, Salt, sequence_hashes};
use crate::ids::TokenId;
use crate::limits::CARD_MODELS_MAX;
use crate::models::Models;
use crate::reason::Reason;
use crate::render::{Flavour, WallClock};
use crate::request::{ParsedRequest, Prompt};
use crate::roster::{Adapter, Role, Roster};

/// What is known of a request besides its body.
#[derive(Clone, Copy, Debug)]
pub struct Circumstances<'a> {
    /// Length of the body, to estimate what cannot be read.
    pub body_bytes: usize,
    /// For templates that print the date.
    pub now: WallClock,
    /// The cache salt that a trusted hop has set; it counts before the body's.
    pub trusted_salt: Option<&'a str>,
    /// Whether the body's own cache salt counts at all.
    pub salt_from_body: bool,
    /// What the request asks of its workers.
    pub demands: &'a Demands,
}

/// Reads a request's prompt: finds the model, renders, tokenizes, hashes.
///
/// - `roster`: says how many workers each generation of the model has, and
///   which LoRA adapters there are.
/// - `random`: is drawn from only if there are several generations.
pub fn prepare(
    models: &mut Models,
    roster: &Roster,
    request: &ParsedRequest<'_>,
    circumstances: &Circumstances<'_>,
    random: &mut Random,
) -> Prepared {
    let body_bytes = circumstances.body_bytes;
    let by_load = |reason, model| Prepared {
        demands: circumstances.demands.clone(),
        ..Prepared::by_load(reason, model, body_bytes)
    };
    let Some(Target { model, adapter }) = find_target(models, roster, &request.model, random)
    else {
        return by_load(Reason::UnknownModel, None);
    };
    let holders = adapter.map(|adapter| adapter.holders.clone());
    let read = read_tokens(models, model, request, circumstances.now);
    let (tokens, reason) = match read {
        Ok(read) => read,
        Err(reason) => {
            return Prepared { holders, ..by_load(reason, Some(model)) };
        }
    };
    let shape = models.model(model).map_or(BlockShape { block_size: 0, eagle: false }, |model| {
        BlockShape { block_size: model.card().block_size, eagle: model.card().eagle }
    });
    let salt = Salt {
        lora: adapter.map(|adapter| adapter.lora.as_str()),
        cache_salt: cache_salt(request, circumstances),
    };
    let mut hashes = Vec::new();
    sequence_hashes(&tokens, shape, salt, &mut hashes);
    // The other flavours refuse media when they render.
    let may_have_media =
        models.model(model).is_some_and(|model| model.card().flavour == Flavour::Raw);
    let is_whole = reason == Reason::Kv && !(may_have_media && request.prompt.has_media());
    let reason = if hashes.is_empty() { Reason::ShortPrompt } else { reason };
    Prepared {
        model: Some(model),
        holders,
        reason,
        prompt_tokens: u32::try_from(tokens.len()).unwrap_or(u32::MAX),
        tokens,
        hashes,
        block_size: shape.block_size,
        is_whole,
        demands: circumstances.demands.clone(),
    }
}

fn cache_salt<'a>(
    request: &'a ParsedRequest<'_>,
    circumstances: &Circumstances<'a>,
) -> Option<&'a str> {
    let own = || request.cache_salt.as_deref().filter(|_| circumstances.salt_from_body);
    circumstances.trusted_salt.or_else(own)
}

/// What a request's `model` means.
struct Target<'a> {
    /// The number of the model, or of the adapter's base model.
    model: u16,
    adapter: Option<&'a Adapter>,
}

/// What a name means: a model, else an adapter. A request that names none goes
/// to the only model, as the engines do.
fn find_target<'a>(
    models: &Models,
    roster: &'a Roster,
    name: &str,
    random: &mut Random,
) -> Option<Target<'a>> {
    let numbers = if name.is_empty() { models.only() } else { models.find(name) };
    let mut targets: Vec<Target<'a>> =
        numbers.into_iter().map(|model| Target { model, adapter: None }).collect();
    if targets.is_empty() && !name.is_empty() {
        let named = roster.adapters.iter().filter(|adapter| {
            adapter.name == name && models.model(adapter.model).is_some_and(|m| !m.is_free())
        });
        let target = |it: &'a Adapter| Target { model: it.model, adapter: Some(it) };
        targets = named.map(target).take(CARD_MODELS_MAX).collect();
    }
    let at = generation(roster, &targets, random);
    (at < targets.len()).then(|| targets.swap_remove(at))
}

/// Draws one of several generations, each with the weight of its workers, as
/// Dynamo draws among worker sets. One without workers is drawn only if none has
/// any.
fn generation(roster: &Roster, targets: &[Target<'_>], random: &mut Random) -> usize {
    if targets.len() < 2 {
        return 0;
    }
    let weight = |target: &Target<'_>| {
        let serves = |role| role != Role::Prefill;
        let of_model = roster.workers.iter().filter(|it| it.model == target.model);
        u32::try_from(of_model.filter(|it| serves(it.role)).count()).unwrap_or(u32::MAX)
    };
    let weights: Vec<u32> = targets.iter().map(weight).collect();
    let mut drawn = random.below(weights.iter().sum());
    for (at, weight) in weights.iter().enumerate() {
        if drawn < *weight {
            return at;
        }
        drawn -= weight;
    }
    0
}

fn read_tokens(
    models: &mut Models,
    number: u16,
    request: &ParsedRequest<'_>,
    now: WallClock,
) -> Result<(Vec<TokenId>, Reason), Reason> {
    if matches!(request.prompt, Prompt::Unread) {
        return Err(Reason::ByLoadApi);
    }
    if let Some(tokens) = request.nvext.as_ref().and_then(|nvext| nvext.token_data.as_ref()) {
        return Ok((tokens.clone(), Reason::Kv));
    }
    if request.alteration.is_some() {
        return Err(Reason::AlteredPrompt);
    }
    match &request.prompt {
        Prompt::Unread => Err(Reason::ByLoadApi),
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
            let template = model.template()?;
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
