//! Card: what a filter must know about each model to tokenize as its engine does.

use crate::limits::{
    CARD_ALIASES_MAX, CARD_MODELS_MAX, CARD_NAME_BYTES_MAX, CARD_PREFIX_TOKENS_MAX,
    CARD_TEMPLATES_MAX, TEMPLATE_BYTES_MAX, TOKENIZER_BYTES_MAX,
};
use crate::render::Flavour;
use crate::wire::{Reader, WireError, Writer};

/// Content address of a blob: XXH3-64 (seed 0) of its bytes, and its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlobId {
    /// XXH3-64 of the bytes.
    pub hash: u64,
    /// Length in bytes.
    pub len: u64,
}

impl BlobId {
    /// The address of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self { hash: xxhash_rust::xxh3::xxh3_64(bytes), len: bytes.len() as u64 }
    }
}

/// Why prompts of a model cannot be tokenized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blind {
    /// The tokenizer file is missing, unreadable or damaged.
    Tokenizer,
    /// The tokenizer is of a kind that only a module built with
    /// `hf-tokenizers` could load, and none is configured.
    TokenizerKind,
    /// The files are still on their way: there are no templates either.
    Loading,
}

/// One chat template by name; an unnamed one is called `default`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTemplate {
    /// `default`, `tool_use`, ….
    pub name: String,
    /// Jinja source.
    pub source: String,
}

/// One model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelCard {
    /// Name that requests use. Several cards may have the same: generations of
    /// a model during a rollout. Empty where the number is free: no request
    /// means such a card.
    pub name: String,
    /// Further names.
    pub aliases: Vec<String>,
    /// Tokens of one block of the engines' caches.
    pub block_size: u32,
    /// Longest prompt and answer together, in tokens; 0 if not known.
    pub context_length: u32,
    /// Whether block hashes cover one token more (eagle-style drafts).
    pub eagle: bool,
    /// What its engine does to messages before the template.
    pub flavour: Flavour,
    /// The binary tokenizer ([`crate::tokenize`]), or why there is none.
    pub tokenizer: Result<BlobId, Blind>,
    /// Chat templates; empty if the model has none.
    pub templates: Vec<NamedTemplate>,
    /// Special tokens by the name that templates know them by (`bos_token`, …).
    pub special_tokens: Vec<(String, String)>,
    /// Tokens that the engine puts before a `/v1/completions` text prompt:
    /// plain vLLM adds the tokenizer's special tokens there, Dynamo does not.
    pub completion_prefix: Vec<u32>,
}

/// All models, in the order that rosters refer to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cards {
    /// The models.
    pub models: Vec<ModelCard>,
}

impl Cards {
    /// Encodes the body of a card frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.count(self.models.len());
        for card in &self.models {
            write_card(&mut writer, card);
        }
        writer.into_bytes()
    }

    /// Decodes the body of a card frame.
    ///
    /// # Errors
    ///
    /// A [`WireError`]; the caller keeps the cards it has.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let count = reader.count(CARD_MODELS_MAX, 1)?;
        let models = (0..count).map(|_| read_card(&mut reader)).collect::<Result<_, _>>()?;
        reader.finish()?;
        Ok(Self { models })
    }
}

fn write_card(writer: &mut Writer, card: &ModelCard) {
    writer.text(&card.name);
    writer.count(card.aliases.len());
    for alias in &card.aliases {
        writer.text(alias);
    }
    writer.u32(card.block_size);
    writer.u32(card.context_length);
    writer.u8(u8::from(card.eagle));
    writer.u8(match card.flavour {
        Flavour::Raw => 0,
        Flavour::Vllm => 1,
        Flavour::Dynamo => 2,
    });
    match card.tokenizer {
        Ok(blob) => {
            writer.u8(0);
            writer.u64(blob.hash);
            writer.u64(blob.len);
        }
        Err(Blind::Tokenizer) => writer.u8(1),
        Err(Blind::TokenizerKind) => writer.u8(2),
        Err(Blind::Loading) => writer.u8(3),
    }
    writer.count(card.templates.len());
    for template in &card.templates {
        writer.text(&template.name);
        writer.text(&template.source);
    }
    writer.count(card.special_tokens.len());
    for (name, token) in &card.special_tokens {
        writer.text(name);
        writer.text(token);
    }
    writer.count(card.completion_prefix.len());
    for token in &card.completion_prefix {
        writer.u32(*token);
    }
}

fn read_card(reader: &mut Reader<'_>) -> Result<ModelCard, WireError> {
    let name = reader.text(CARD_NAME_BYTES_MAX)?.to_owned();
    let aliases = read_list(reader, CARD_ALIASES_MAX, |reader| {
        Ok(reader.text(CARD_NAME_BYTES_MAX)?.to_owned())
    })?;
    let block_size = reader.u32()?;
    let context_length = reader.u32()?;
    let eagle = match reader.u8()? {
        0 => false,
        1 => true,
        _ => return Err(WireError::UnknownCase),
    };
    let flavour = match reader.u8()? {
        0 => Flavour::Raw,
        1 => Flavour::Vllm,
        2 => Flavour::Dynamo,
        _ => return Err(WireError::UnknownCase),
    };
    let tokenizer = match reader.u8()? {
        0 => Ok(BlobId { hash: reader.u64()?, len: reader.u64()? }),
        1 => Err(Blind::Tokenizer),
        2 => Err(Blind::TokenizerKind),
        3 => Err(Blind::Loading),
        _ => return Err(WireError::UnknownCase),
    };
    if tokenizer.is_ok_and(|blob| blob.len > TOKENIZER_BYTES_MAX) {
        return Err(WireError::OverLimit);
    }
    let templates = read_list(reader, CARD_TEMPLATES_MAX, |reader| {
        let name = reader.text(CARD_NAME_BYTES_MAX)?.to_owned();
        let source = reader.text(TEMPLATE_BYTES_MAX)?.to_owned();
        Ok(NamedTemplate { name, source })
    })?;
    let special_tokens = read_list(reader, CARD_ALIASES_MAX, |reader| {
        let name = reader.text(CARD_NAME_BYTES_MAX)?.to_owned();
        Ok((name, reader.text(CARD_NAME_BYTES_MAX)?.to_owned()))
    })?;
    let completion_prefix = read_list(reader, CARD_PREFIX_TOKENS_MAX, Reader::u32)?;
    Ok(ModelCard {
        name,
        aliases,
        block_size,
        context_length,
        eagle,
        flavour,
        tokenizer,
        templates,
        special_tokens,
        completion_prefix,
    })
}

fn read_list<'a, T>(
    reader: &mut Reader<'a>,
    max: usize,
    mut item: impl FnMut(&mut Reader<'a>) -> Result<T, WireError>,
) -> Result<Vec<T>, WireError> {
    let count = reader.count(max, 4)?;
    (0..count).map(|_| item(reader)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn example() -> Cards {
        let card = ModelCard {
            name: "qwen3".to_owned(),
            aliases: vec!["Qwen/Qwen3-0.6B".to_owned()],
            block_size: 16,
            context_length: 40_960,
            eagle: false,
            flavour: Flavour::Dynamo,
            tokenizer: Ok(BlobId::of(b"blob")),
            templates: vec![NamedTemplate { name: "default".into(), source: "{{ x }}".into() }],
            special_tokens: vec![("eos_token".into(), "<|im_end|>".into())],
            completion_prefix: vec![1, 2],
        };
        let blind =
            ModelCard { name: "blind".into(), tokenizer: Err(Blind::Tokenizer), ..card.clone() };
        let loading = ModelCard { tokenizer: Err(Blind::Loading), ..blind.clone() };
        let kind = ModelCard { tokenizer: Err(Blind::TokenizerKind), ..blind.clone() };
        let free = ModelCard { name: String::new(), ..blind.clone() };
        Cards { models: vec![card, blind, loading, kind, free] }
    }

    #[test]
    fn cards_survive_the_wire() {
        assert_eq!(Cards::decode(&example().encode()), Ok(example()));
    }

    #[test]
    fn every_cut_is_refused() {
        let good = example().encode();
        for len in 0..good.len() {
            assert!(Cards::decode(&good[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn a_blob_beyond_the_limit_is_refused() {
        let mut cards = example();
        cards.models[0].tokenizer = Ok(BlobId { hash: 1, len: TOKENIZER_BYTES_MAX + 1 });
        assert_eq!(Cards::decode(&cards.encode()), Err(WireError::OverLimit));
    }

    #[cfg(not(target_arch = "wasm32"))]
    proptest::proptest! {
        #[test]
        fn decoding_is_total(at in 0_usize..500, byte in proptest::num::u8::ANY) {
            let mut bytes = example().encode();
            if let Some(target) = bytes.get_mut(at) {
                *target = byte;
            }
            let _ = Cards::decode(&bytes);
        }
    }
}
