//! Events: cache changes as the engines put them on the wire, in msgpack.
//!
//! # Terms
//!
//! - *batch*: `[timestamp seconds, [events], data parallel rank]`, one ZMQ
//!   payload.
//! - *map form*: an event is a map whose key `type` names it (vLLM since 0.24,
//!   SGLang since 0.5.21).
//! - *positional form*: an event is an array whose element 0 names it; absent
//!   trailing fields are left out (vLLM before).
//!
//! # Invariants
//!
//! 1. Bytes equal those of the engines' own publishers for the same event: the
//!    tests compare with captures.
//! 2. Integers and lengths take their shortest form, as msgspec writes them.
//!
//! Sequence numbers and sockets are not known here.

use std::mem;

use super::cache::{CacheEvent, CacheKeys, EngineHash};

/// Which engine's form events take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EventForm {
    /// vLLM 0.31: maps.
    #[default]
    VllmMap,
    /// vLLM before 0.24: arrays by position.
    VllmPositional,
    /// SGLang 0.5.21: maps with other fields, signed hashes, removals grouped.
    Sglang,
}

/// How vLLM writes a block's hash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HashForm {
    /// The last eight bytes as an unsigned big-endian number (the default).
    #[default]
    Integer,
    /// All 32 bytes.
    Bytes,
}

/// What stays the same over all events of one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventFormat {
    /// Arrays or maps, and whose.
    pub form: EventForm,
    /// How hashes are written; SGLang knows integers only.
    pub hash: HashForm,
    /// Tokens per block.
    pub block_size: u32,
    /// Data parallel rank named in every batch.
    pub dp_rank: u32,
    /// vLLM's `kv_cache_spec_kind`; `None` leaves the slot out.
    pub kind: Option<&'static str>,
}

/// Where blocks of the simulator live, as the engines call it.
const MEDIUM: &str = "GPU";

/// Encodes one batch.
///
/// - `timestamp`: seconds since the epoch.
/// - `events`: in the order they happened.
#[must_use]
pub fn encode_batch(timestamp: f64, events: &[CacheEvent], format: &EventFormat) -> Vec<u8> {
    let mut encoder = Encoder { out: Vec::new(), format };
    let groups = encoder.group(events);
    encoder.array(3);
    encoder.float(timestamp);
    encoder.array(groups.len());
    for group in groups {
        encoder.event(&group);
    }
    encoder.unsigned(u64::from(format.dp_rank));
    mem::take(&mut encoder.out)
}

/// An event as it is written: SGLang removes several blocks at once.
enum Written<'a> {
    Stored {
        parent: Option<EngineHash>,
        hashes: &'a [EngineHash],
        tokens: &'a [u32],
        keys: &'a CacheKeys,
    },
    Removed(Vec<EngineHash>),
    Cleared,
}

/// Writes events as msgpack.
struct Encoder<'a> {
    out: Vec<u8>,
    format: &'a EventFormat,
}

impl Encoder<'_> {
    fn group<'e>(&self, events: &'e [CacheEvent]) -> Vec<Written<'e>> {
        let mut groups: Vec<Written<'e>> = Vec::new();
        for event in events {
            match event {
                CacheEvent::Stored { parent, hashes, tokens, keys } => {
                    groups.push(Written::Stored { parent: *parent, hashes, tokens, keys });
                }
                CacheEvent::Removed { hash } => match groups.last_mut() {
                    Some(Written::Removed(group)) if self.format.form == EventForm::Sglang => {
                        group.push(*hash);
                    }
                    _ => groups.push(Written::Removed(vec![*hash])),
                },
                CacheEvent::Cleared => groups.push(Written::Cleared),
            }
        }
        groups
    }

    fn event(&mut self, event: &Written<'_>) {
        let positional = self.format.form == EventForm::VllmPositional;
        match event {
            Written::Stored { parent, hashes, tokens, keys } => match self.format.form {
                EventForm::VllmMap => self.stored_map(*parent, hashes, tokens, keys),
                EventForm::VllmPositional => self.stored_array(*parent, hashes, tokens, keys),
                EventForm::Sglang => self.stored_sglang(*parent, hashes, tokens, keys),
            },
            Written::Removed(hashes) if positional => {
                self.array(4);
                self.text("BlockRemoved");
                self.hashes(hashes);
                self.text(MEDIUM);
                self.unsigned(0);
            }
            Written::Removed(hashes) => {
                let sglang = self.format.form == EventForm::Sglang;
                self.map(if sglang { 3 } else { 4 });
                self.tag("BlockRemoved");
                self.key("block_hashes");
                self.hashes(hashes);
                self.key("medium");
                self.text(MEDIUM);
                if !sglang {
                    self.key("group_idx");
                    self.unsigned(0);
                }
            }
            Written::Cleared if positional => {
                self.array(1);
                self.text("AllBlocksCleared");
            }
            Written::Cleared => {
                self.map(1);
                self.tag("AllBlocksCleared");
            }
        }
    }

    fn stored_map(
        &mut self,
        parent: Option<EngineHash>,
        hashes: &[EngineHash],
        tokens: &[u32],
        keys: &CacheKeys,
    ) {
        self.map(if self.format.kind.is_some() { 11 } else { 10 });
        self.stored_head(parent, hashes, tokens);
        self.key("lora_name");
        self.optional_text(keys.lora_name.as_deref());
        self.key("extra_keys");
        self.extra_keys(parent.is_none(), hashes.len(), keys);
        self.key("group_idx");
        self.unsigned(0);
        if let Some(kind) = self.format.kind {
            self.key("kv_cache_spec_kind");
            self.text(kind);
        }
    }

    fn stored_sglang(
        &mut self,
        parent: Option<EngineHash>,
        hashes: &[EngineHash],
        tokens: &[u32],
        keys: &CacheKeys,
    ) {
        self.map(if keys.cache_salt.is_some() { 8 } else { 7 });
        self.stored_head(parent, hashes, tokens);
        if let Some(salt) = keys.cache_salt.as_deref() {
            self.key("cache_salt");
            self.text(salt);
        }
    }

    /// The seven fields that both map forms begin with.
    fn stored_head(&mut self, parent: Option<EngineHash>, hashes: &[EngineHash], tokens: &[u32]) {
        self.tag("BlockStored");
        self.key("block_hashes");
        self.hashes(hashes);
        self.key("parent_block_hash");
        self.optional_hash(parent);
        self.key("token_ids");
        self.tokens(tokens);
        self.key("block_size");
        self.unsigned(u64::from(self.format.block_size));
        self.key("lora_id");
        self.nil();
        self.key("medium");
        self.text(MEDIUM);
    }

    fn stored_array(
        &mut self,
        parent: Option<EngineHash>,
        hashes: &[EngineHash],
        tokens: &[u32],
        keys: &CacheKeys,
    ) {
        self.array(if self.format.kind.is_some() { 11 } else { 10 });
        self.text("BlockStored");
        self.hashes(hashes);
        self.optional_hash(parent);
        self.tokens(tokens);
        self.unsigned(u64::from(self.format.block_size));
        self.nil();
        self.text(MEDIUM);
        self.optional_text(keys.lora_name.as_deref());
        self.extra_keys(parent.is_none(), hashes.len(), keys);
        self.unsigned(0);
        if let Some(kind) = self.format.kind {
            self.text(kind);
        }
    }

    /// Per block nil or what was hashed beside the tokens: the adapter in every
    /// block, the salt in a prompt's first.
    fn extra_keys(&mut self, first_of_prompt: bool, blocks: usize, keys: &CacheKeys) {
        self.array(blocks);
        for block in 0..blocks {
            let salt = keys.cache_salt.as_deref().filter(|_| first_of_prompt && block == 0);
            let texts: Vec<&str> = keys.lora_name.as_deref().into_iter().chain(salt).collect();
            if texts.is_empty() {
                self.nil();
                continue;
            }
            self.array(texts.len());
            for text in texts {
                self.text(text);
            }
        }
    }

    fn hashes(&mut self, hashes: &[EngineHash]) {
        self.array(hashes.len());
        for hash in hashes {
            self.hash(hash);
        }
    }

    fn optional_hash(&mut self, hash: Option<EngineHash>) {
        match hash {
            Some(hash) => self.hash(&hash),
            None => self.nil(),
        }
    }

    fn hash(&mut self, hash: &EngineHash) {
        let [a, b, c, d, e, f, g, h, .., s, t, u, v, w, x, y, z] = hash.0;
        match (self.format.form, self.format.hash) {
            (EventForm::Sglang, _) => self.signed(i64::from_be_bytes([a, b, c, d, e, f, g, h])),
            (_, HashForm::Integer) => {
                self.unsigned(u64::from_be_bytes([s, t, u, v, w, x, y, z]));
            }
            (_, HashForm::Bytes) => self.binary(&hash.0),
        }
    }

    fn tokens(&mut self, tokens: &[u32]) {
        self.array(tokens.len());
        for &token in tokens {
            self.unsigned(u64::from(token));
        }
    }

    /// The key `type` and its value.
    fn tag(&mut self, name: &str) {
        self.key("type");
        self.text(name);
    }

    fn key(&mut self, name: &str) {
        self.text(name);
    }

    fn optional_text(&mut self, text: Option<&str>) {
        match text {
            Some(text) => self.text(text),
            None => self.nil(),
        }
    }

    fn nil(&mut self) {
        self.out.push(0xc0);
    }

    fn float(&mut self, value: f64) {
        self.out.push(0xcb);
        self.out.extend_from_slice(&value.to_be_bytes());
    }

    fn signed(&mut self, value: i64) {
        if let Ok(value) = u64::try_from(value) {
            self.unsigned(value);
        } else if let Ok(value) = i8::try_from(value) {
            if value < -32 {
                self.out.push(0xd0);
            }
            self.out.extend_from_slice(&value.to_be_bytes());
        } else if let Ok(value) = i16::try_from(value) {
            self.out.push(0xd1);
            self.out.extend_from_slice(&value.to_be_bytes());
        } else if let Ok(value) = i32::try_from(value) {
            self.out.push(0xd2);
            self.out.extend_from_slice(&value.to_be_bytes());
        } else {
            self.out.push(0xd3);
            self.out.extend_from_slice(&value.to_be_bytes());
        }
    }

    fn unsigned(&mut self, value: u64) {
        if let Ok(value) = u8::try_from(value) {
            if value > 0x7f {
                self.out.push(0xcc);
            }
            self.out.push(value);
        } else {
            self.wide(value, [0xcd, 0xce, 0xcf]);
        }
    }

    fn text(&mut self, text: &str) {
        match u8::try_from(text.len()) {
            Ok(length) if length < 32 => self.out.push(0xa0 | length),
            Ok(length) => self.out.extend_from_slice(&[0xd9, length]),
            Err(_) => self.wide(text.len() as u64, [0xda, 0xdb, 0xdb]),
        }
        self.out.extend_from_slice(text.as_bytes());
    }

    fn binary(&mut self, bytes: &[u8]) {
        match u8::try_from(bytes.len()) {
            Ok(length) => self.out.extend_from_slice(&[0xc4, length]),
            Err(_) => self.wide(bytes.len() as u64, [0xc5, 0xc6, 0xc6]),
        }
        self.out.extend_from_slice(bytes);
    }

    fn array(&mut self, length: usize) {
        self.container(length, 0x90, [0xdc, 0xdd, 0xdd]);
    }

    fn map(&mut self, length: usize) {
        self.container(length, 0x80, [0xde, 0xdf, 0xdf]);
    }

    fn container(&mut self, length: usize, short: u8, markers: [u8; 3]) {
        match u8::try_from(length) {
            Ok(length) if length < 16 => self.out.push(short | length),
            _ => self.wide(length as u64, markers),
        }
    }

    /// A number of 16, 32 or 64 bits after the marker of its width. Lengths
    /// never need the third: no block list comes near 4 Gi entries.
    fn wide(&mut self, value: u64, [m16, m32, m64]: [u8; 3]) {
        if let Ok(value) = u16::try_from(value) {
            self.out.push(m16);
            self.out.extend_from_slice(&value.to_be_bytes());
        } else if let Ok(value) = u32::try_from(value) {
            self.out.push(m32);
            self.out.extend_from_slice(&value.to_be_bytes());
        } else {
            self.out.push(m64);
            self.out.extend_from_slice(&value.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests;
