//! Read: from a parsed request to what [`select`](super::select()) weighs.

use super::Prepared;
use crate::choose::Random;
use crate::demands::Demands;
use crate::ids::TokenId;
use crate::limits::CARD_MODELS_MAX;
use crate::models::Models;
use crate::reason::Reason;
use crate::render::WallClock;
use crate::request::{ParsedRequest, Prompt};
use crate::roster::{Adapter, Role, Roster};

mod reading;

pub use reading::Reading;

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

/// Reads a request's prompt at once: finds the model, renders, tokenizes, hashes.
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
    let mut reading = Reading::begin(models, roster, request, circumstances, random);
    loop {
        if let Some(prepared) = reading.step(models, usize::MAX) {
            return prepared;
        }
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

/// What the model is to read, as far as the request alone says it.
enum Source {
    /// It is tokenized already.
    Tokens(Vec<TokenId>),
    /// Text, and the tokens that go before it.
    Text(Vec<TokenId>, String),
}

/// Finds or renders the prompt, and says how a request with it is routed.
fn source(
    models: &mut Models,
    number: u16,
    request: &ParsedRequest<'_>,
    now: WallClock,
) -> Result<(Source, Reason), Reason> {
    if matches!(request.prompt, Prompt::Unread) {
        return Err(Reason::ByLoadApi);
    }
    if let Some(tokens) = request.nvext.as_ref().and_then(|nvext| nvext.token_data.as_ref()) {
        return Ok((Source::Tokens(tokens.clone()), Reason::Kv));
    }
    if request.alteration.is_some() {
        return Err(Reason::AlteredPrompt);
    }
    let model = models.model(number).ok_or(Reason::UnknownModel)?;
    let prefix = |is_by_default| match request.add_special_tokens.unwrap_or(is_by_default) {
        true => model.card().completion_prefix.clone(),
        false => Vec::new(),
    };
    let found = match &request.prompt {
        Prompt::Unread => return Err(Reason::ByLoadApi),
        Prompt::Tokens(tokens) => (Source::Tokens(tokens.clone()), Reason::Kv),
        Prompt::TokenLists(lists) => {
            (Source::Tokens(lists.first().cloned().unwrap_or_default()), Reason::Batch)
        }
        Prompt::Text(text) => (Source::Text(prefix(true), text.clone().into_owned()), Reason::Kv),
        Prompt::Texts(texts) => {
            let first = texts.first().map_or_else(String::new, |text| text.clone().into_owned());
            (Source::Text(prefix(true), first), Reason::Batch)
        }
        Prompt::Chat(chat) => {
            let text = model.template()?.render(chat, now).map_err(|_| Reason::RenderFailed)?;
            // Templates print their own special tokens; engines add none to
            // them unless told to.
            (Source::Text(prefix(false), text), Reason::Kv)
        }
    };
    if let (Source::Text(..), _) = found {
        models.tokenizer(number)?;
    }
    Ok(found)
}
