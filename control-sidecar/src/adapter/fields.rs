//! Fields: one event as the engine wrote it, in whichever form.
//!
//! Reads the list form (fields by position) and the map form (fields by name)
//! into the same structure; what the fields mean is decided afterwards.

use warmpath_core::event::{Group, GroupKind, Medium, ObjectHash, Removed, Stored};
use warmpath_core::ids::{EngineHash, TokenId};
use warmpath_core::limits::{EVENT_BLOCKS_MAX, EVENT_NAME_BYTES_MAX, EVENT_TOKENS_MAX};

use super::Skip;
use super::keys;
use super::msgpack::{MsgpackError, Reader, Shape};

/// The field that each position holds, by name; position 0 is the tag.
#[derive(Clone, Copy, Debug)]
pub struct Slots {
    /// Of a stored event.
    pub stored: &'static [&'static str],
    /// Of a removed event.
    pub removed: &'static [&'static str],
}

/// What kind of event it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tag {
    /// `BlockStored`.
    Stored,
    /// `BlockRemoved`.
    Removed,
    /// `AllBlocksCleared`.
    Cleared,
    /// Any other.
    Unknown,
}

impl Tag {
    fn parse(word: &str) -> Self {
        match word {
            "BlockStored" => Self::Stored,
            "BlockRemoved" => Self::Removed,
            "AllBlocksCleared" => Self::Cleared,
            _ => Self::Unknown,
        }
    }
}

/// A field whose value may be impossible without making the event unreadable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Read<T> {
    /// Not there, or nil.
    #[default]
    Absent,
    /// There and possible.
    Value(T),
    /// There, but of an impossible shape or value.
    Bad,
}

impl<T> Read<T> {
    /// Reads the value that is next, and passes over one that is odd, so that it
    /// leaves the rest readable.
    fn next<'a>(
        reader: &mut Reader<'a>,
        read: impl FnOnce(&mut Reader<'a>) -> Result<T, MsgpackError>,
    ) -> Result<Self, MsgpackError> {
        let mut value = *reader;
        if let Ok(read) = read(&mut value) {
            *reader = value;
            return Ok(Self::Value(read));
        }
        reader.skip()?;
        Ok(Self::Bad)
    }

    /// Takes a value out that is there and possible.
    fn take(&mut self) -> Option<T> {
        match core::mem::take(self) {
            Self::Value(value) => Some(value),
            Self::Absent | Self::Bad => None,
        }
    }
}

/// The fields of one event.
#[derive(Clone, Debug, Default)]
pub struct Fields<'a> {
    /// What kind of event it is.
    pub tag: Option<Tag>,
    /// Kind of the group of caches.
    pub kind: Option<GroupKind>,
    /// Name of the LoRA adapter, as the engine gave it.
    pub lora_name: Read<&'a str>,
    /// Whether an adapter is numbered.
    pub lora_numbered: bool,
    /// Cache salt, as SGLang names it.
    pub cache_salt: Read<&'a str>,
    /// vLLM's further keys of each block, unread.
    pub extra_keys: Option<Reader<'a>>,
    /// TensorRT-LLM's keys of objects in each block, unread.
    pub mm_keys: Option<Reader<'a>>,
    /// Dynamo's description of objects in each block, unread.
    pub mm_infos: Option<Reader<'a>>,
    hashes: Read<Vec<EngineHash>>,
    parent: Read<EngineHash>,
    tokens: Read<Tokens>,
    block_size: Read<u32>,
    medium: Read<&'a str>,
    group: Read<u32>,
    locality: Read<&'a str>,
    ownership: Read<&'a str>,
}

/// Tokens of an event, in either form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Tokens {
    ids: Vec<TokenId>,
    pairs: bool,
    text: bool,
}

impl<'a> Fields<'a> {
    /// Reads one event.
    ///
    /// # Errors
    ///
    /// A [`MsgpackError`] if it is neither a list nor a map.
    pub fn read(reader: &mut Reader<'a>, slots: Slots) -> Result<Self, MsgpackError> {
        match reader.shape()? {
            Shape::List => Self::read_list(reader, slots),
            Shape::Map => Self::read_map(reader),
            _ => Err(MsgpackError::Shape),
        }
    }

    fn read_list(reader: &mut Reader<'a>, slots: Slots) -> Result<Self, MsgpackError> {
        let mut fields = Self::default();
        let values = reader.list()?;
        if values == 0 {
            return Ok(fields);
        }
        let tag = Tag::parse(reader.text()?);
        fields.tag = Some(tag);
        let names = match tag {
            Tag::Stored => slots.stored,
            Tag::Removed => slots.removed,
            Tag::Cleared => &["ownership"],
            Tag::Unknown => &[],
        };
        let mut at = 0;
        for _ in 1..values {
            let Some(name) = names.get(at) else {
                reader.skip()?;
                continue;
            };
            let shape = reader.shape()?;
            if *name == "group_idx" && shape == Shape::List {
                // An older tail starts with the objects of each block.
                fields.field(b"block_mm_infos", reader)?;
                continue;
            }
            // An older SGLang puts a map of metadata where vLLM has a name.
            let name = if shape == Shape::Map { "metadata" } else { name };
            fields.field(name.as_bytes(), reader)?;
            at += 1;
        }
        Ok(fields)
    }

    fn read_map(reader: &mut Reader<'a>) -> Result<Self, MsgpackError> {
        let mut fields = Self::default();
        for _ in 0..reader.map()? {
            let name = reader.text_bytes()?;
            if name == b"type" {
                fields.tag = Some(Tag::parse(reader.text()?));
            } else {
                fields.field(name, reader)?;
            }
        }
        Ok(fields)
    }

    /// Reads the value of one named field; passes over unknown ones.
    fn field(&mut self, name: &[u8], reader: &mut Reader<'a>) -> Result<(), MsgpackError> {
        if reader.nil()? {
            return Ok(());
        }
        match name {
            b"block_hashes" => self.hashes = Read::next(reader, read_hashes)?,
            b"parent_block_hash" => self.parent = Read::next(reader, read_hash)?,
            b"token_ids" => self.tokens = Read::next(reader, read_tokens)?,
            b"block_size" => self.block_size = Read::next(reader, Reader::u32)?,
            b"medium" => self.medium = Read::next(reader, read_name)?,
            b"group_idx" => self.group = Read::next(reader, Reader::u32)?,
            b"kv_cache_spec_kind" => {
                let mut word = Read::next(reader, Reader::text)?;
                self.kind = Some(word.take().map_or(GroupKind::Other, GroupKind::parse));
            }
            b"locality" => self.locality = Read::next(reader, read_name)?,
            b"ownership" => self.ownership = Read::next(reader, read_name)?,
            b"lora_name" => self.lora_name = Read::next(reader, read_name)?,
            b"cache_salt" => self.cache_salt = Read::next(reader, read_name)?,
            _ => return self.untyped(name, reader),
        }
        Ok(())
    }

    /// The fields whose values are read later, if at all.
    fn untyped(&mut self, name: &[u8], reader: &mut Reader<'a>) -> Result<(), MsgpackError> {
        let mut value = *reader;
        reader.skip()?;
        match name {
            b"lora_id" => self.lora_numbered = true,
            b"extra_keys" => self.extra_keys = Some(value),
            b"mm_keys" => self.mm_keys = Some(value),
            b"block_mm_infos" => self.mm_infos = Some(value),
            b"metadata" => self.metadata(&mut value)?,
            _ => {}
        }
        Ok(())
    }

    fn metadata(&mut self, reader: &mut Reader<'a>) -> Result<(), MsgpackError> {
        for _ in 0..reader.map()? {
            if reader.text_bytes()? != b"cache_salt" {
                reader.skip()?;
            } else if !reader.nil()? {
                self.cache_salt = Read::next(reader, read_name)?;
            }
        }
        Ok(())
    }

    /// Whether the event is about what this worker itself holds.
    #[must_use]
    pub fn is_the_workers(&self) -> bool {
        match self.ownership {
            Read::Absent => true,
            Read::Value(owner) => matches!(owner, "" | "none" | "worker"),
            Read::Bad => false,
        }
    }

    fn place(&self) -> Result<(Medium, Group), Skip> {
        match self.locality {
            Read::Absent => {}
            Read::Value(word) if word.eq_ignore_ascii_case("LOCAL") => {}
            _ => return Err(Skip::Remote),
        }
        if !self.is_the_workers() {
            return Err(Skip::NotTheWorkers);
        }
        let medium = match self.medium {
            Read::Absent => Medium::Device,
            Read::Value(word) => Medium::parse(word).ok_or(Skip::UnknownMedium)?,
            Read::Bad => return Err(Skip::UnknownMedium),
        };
        let index = match self.group {
            Read::Absent => None,
            Read::Value(index) => Some(index),
            Read::Bad => return Err(Skip::Malformed),
        };
        Ok((medium, Group { index, kind: self.kind }))
    }

    /// The event as a removal. Takes its pages out.
    ///
    /// # Errors
    ///
    /// Why it says nothing about what we index.
    pub fn removed(&mut self) -> Result<Removed, Skip> {
        let (medium, group) = self.place()?;
        let pages = self.hashes.take().ok_or(Skip::Malformed)?;
        Ok(Removed { pages, medium, group })
    }

    /// The event as a store. Takes its pages and tokens out.
    ///
    /// - `read_keys`: the engine's way of naming salts and objects.
    ///
    /// # Errors
    ///
    /// Why it says nothing about what we index.
    pub fn stored(&mut self, read_keys: impl FnOnce(&mut Stored, &Self)) -> Result<Stored, Skip> {
        let (medium, group) = self.place()?;
        let pages = self.hashes.take().ok_or(Skip::Malformed)?;
        let parent = match self.parent {
            Read::Absent => None,
            Read::Value(parent) => Some(parent),
            Read::Bad => return Err(Skip::Malformed),
        };
        let (Some(tokens), Some(page_size)) = (self.tokens.take(), self.block_size.take()) else {
            return Err(Skip::Malformed);
        };
        if tokens.text {
            return Err(Skip::TokenText);
        }
        let mut stored = Stored {
            understood: pages.len(),
            pages,
            parent,
            tokens: tokens.ids,
            page_size,
            pairs: tokens.pairs,
            lora: None,
            cache_salt: None,
            objects: Vec::new(),
            medium,
            group,
        };
        read_keys(&mut stored, self);
        keys::read_object_keys(&mut stored, self);
        Ok(stored)
    }

    /// Reads the adapter's name into the event. An adapter without a name
    /// cannot be hashed.
    pub(super) fn read_lora(&self, stored: &mut Stored) {
        match self.lora_name {
            Read::Value(name) if !name.is_empty() => stored.lora = Some(name.to_owned()),
            Read::Bad => stored.understood = 0,
            _ if self.lora_numbered => stored.understood = 0,
            _ => {}
        }
    }
}

/// Reads one hash: an integer's 64 bits, or the last 8 of its bytes.
fn read_hash(reader: &mut Reader<'_>) -> Result<EngineHash, MsgpackError> {
    if reader.shape()? == Shape::Bytes {
        let bytes = reader.bytes()?;
        let last = bytes.last_chunk::<8>().ok_or(MsgpackError::Value)?;
        return Ok(EngineHash(u64::from_be_bytes(*last)));
    }
    reader.integer_bits().map(EngineHash)
}

fn read_hashes(reader: &mut Reader<'_>) -> Result<Vec<EngineHash>, MsgpackError> {
    let count = reader.list()?;
    if count > EVENT_BLOCKS_MAX {
        return Err(MsgpackError::Value);
    }
    (0..count).map(|_| read_hash(reader)).collect()
}

/// Reads tokens: ids, or pairs of neighbouring ids.
fn read_tokens(reader: &mut Reader<'_>) -> Result<Tokens, MsgpackError> {
    let count = reader.list()?;
    if count > EVENT_TOKENS_MAX {
        return Err(MsgpackError::Value);
    }
    let mut tokens = Tokens { ids: Vec::with_capacity(count), ..Tokens::default() };
    let mut last_second = None;
    for _ in 0..count {
        match reader.shape()? {
            Shape::List => {
                if reader.list()? != 2 {
                    return Err(MsgpackError::Shape);
                }
                tokens.ids.push(reader.u32()?);
                last_second = Some(reader.u32()?);
            }
            Shape::Text => {
                reader.skip()?;
                tokens.text = true;
            }
            // A pair before this one: the forms do not mix.
            _ if last_second.is_some() => return Err(MsgpackError::Shape),
            _ => tokens.ids.push(reader.u32()?),
        }
    }
    if let Some(second) = last_second {
        // All pairs, or the forms were mixed the other way round.
        if tokens.ids.len() != count || tokens.text {
            return Err(MsgpackError::Shape);
        }
        tokens.ids.push(second);
        tokens.pairs = true;
    }
    Ok(tokens)
}

/// Reads a text no longer than a name may be.
fn read_name<'a>(reader: &mut Reader<'a>) -> Result<&'a str, MsgpackError> {
    let name = reader.text()?;
    if name.len() > EVENT_NAME_BYTES_MAX {
        return Err(MsgpackError::Value);
    }
    Ok(name)
}

/// The objects of TensorRT-LLM's and Dynamo's forms are added by `keys`.
pub(super) fn push_object(stored: &mut Stored, page: usize, hash: u64) {
    stored.objects.push(ObjectHash { page, hash });
}
