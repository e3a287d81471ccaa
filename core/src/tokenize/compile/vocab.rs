//! Vocabulary and merges as tables for the engine.
//!
//! # Terms
//!
//! - *canonical form* of a token string: the bytes of text it stands for. For
//!   `ByteLevel` those that its characters name; for SentencePiece its own with
//!   a space for every U+2581. A string without one never occurs in text.

use super::json::Model;
use super::map::{HashMap, HashSet};
use super::perfect_hash;
use super::write::Writer;
use super::{CompileError, inconsistent, unsupported};
use crate::ids::TokenId;
use crate::limits::TOKEN_IDS_MAX;
use crate::tokenize::file::{Kind, NO_TOKEN, Section};
use crate::tokenize::key::WordKey;
use crate::tokenize::merge::{MERGE_SLOT, merge_slot, pair_key};
use crate::tokenize::words::{
    LOW_LINE, WORD_BYTES_MAX, WORD_LEN_SHIFT, WORD_SLOT, WORD_SLOT_BYTES, seam_bit,
};

/// Bits per pair of characters in the set of seams: more make fewer borders
/// look mergeable that are not.
const SEAM_BITS_PER_PAIR: usize = 12;

/// Bytes that UTF-8 never holds.
const NEVER_IN_UTF8: [u8; 13] =
    [0xC0, 0xC1, 0xF5, 0xF6, 0xF7, 0xF8, 0xF9, 0xFA, 0xFB, 0xFC, 0xFD, 0xFE, 0xFF];

/// Rank and product of a merge.
type Merges = HashMap<(TokenId, TokenId), (u32, TokenId)>;

/// A vocabulary, checked.
pub(super) struct Vocabulary {
    kind: Kind,
    ignore_merges: bool,
    ids: HashMap<String, TokenId>,
    /// The canonical form of each token, in the order of ids.
    forms: Vec<Option<Vec<u8>>>,
    merges: Merges,
    /// Merges read so far: the rank of the next one.
    ranks: u32,
    byte_tokens: Vec<TokenId>,
    /// Pairs of characters that stand together in the product of a merge.
    seams: HashSet<(char, char)>,
}

impl Vocabulary {
    /// Takes in the vocabulary and the merges of a model.
    pub(super) fn read(kind: Kind, model: &Model) -> Result<Self, CompileError> {
        let ids: HashMap<String, TokenId> = model.vocab.0.iter().cloned().collect();
        let distinct: HashSet<TokenId> = ids.values().copied().collect();
        if distinct.len() != ids.len() {
            return unsupported("vocabulary with two tokens of the same id");
        }
        let slots = distinct.iter().max().map_or(0, |&id| id as usize + 1);
        if slots > TOKEN_IDS_MAX as usize {
            return Err(CompileError::TooLarge("ids of the vocabulary"));
        }
        let mut read = Self {
            kind,
            ignore_merges: model.ignore_merges == Some(true),
            forms: vec![None; slots],
            byte_tokens: byte_tokens(kind, &ids)?,
            ids,
            merges: Merges::default(),
            ranks: 0,
            seams: HashSet::default(),
        };
        for (text, &id) in &read.ids {
            if let Some(form) = read.forms.get_mut(id as usize) {
                *form = canonical(kind, text);
            }
        }
        read.read_merges(model)?;
        Ok(read)
    }

    fn read_merges(&mut self, model: &Model) -> Result<(), CompileError> {
        let byte_tokens: HashSet<TokenId> = self.byte_tokens.iter().copied().collect();
        for merge in model.merges.iter().flatten() {
            if merge.0.is_empty() || merge.1.is_empty() {
                return unsupported("merge with an empty string");
            }
            let text = [merge.0.as_str(), merge.1.as_str()].concat();
            let ids = (self.id(&merge.0), self.id(&merge.1), self.id(&text));
            let (Some(left), Some(right), Some(product)) = ids else {
                return inconsistent("merge of or to a token that the vocabulary lacks");
            };
            let rank = self.ranks;
            if rank >= TOKEN_IDS_MAX {
                return Err(CompileError::TooLarge("merges"));
            }
            if self.kind == Kind::SentencePiece {
                // Borders are found by characters, which such a token is not.
                if [left, right, product].iter().any(|id| byte_tokens.contains(id)) {
                    return unsupported("merge with a byte fallback token");
                }
                let spaced = text.replace(LOW_LINE, " ");
                self.seams.extend(spaced.chars().zip(spaced.chars().skip(1)));
            }
            self.ranks += 1;
            // Of the same pair twice, the later rank counts, as with HF.
            self.merges.insert((left, right), (rank, product));
        }
        Ok(())
    }

    /// Number of tokens: where ids of added tokens start.
    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.ids.len()).unwrap_or(u32::MAX)
    }

    /// The id of a token string.
    pub(super) fn id(&self, text: &str) -> Option<TokenId> {
        self.ids.get(text).copied()
    }

    /// Writes all tables of the model.
    pub(super) fn write(&self, writer: &mut Writer) -> Result<(), CompileError> {
        writer.u32s(Section::ByteTokens, &self.byte_tokens);
        self.write_merges(writer)?;
        self.write_words(writer)?;
        self.write_chars(writer);
        self.write_seams(writer);
        Ok(())
    }

    fn write_merges(&self, writer: &mut Writer) -> Result<(), CompileError> {
        // In the order of ranks, so that equal inputs give equal files.
        let mut merges: Vec<(u32, u64, TokenId)> = self
            .merges
            .iter()
            .map(|(&(left, right), &(rank, product))| (rank, pair_key(left, right), product))
            .collect();
        merges.sort_unstable();
        let hashes: Vec<u64> =
            merges.iter().map(|&(_, key, _)| crate::tokenize::perfect_hash::mix(key)).collect();
        let placement =
            perfect_hash::place(&hashes).ok_or(CompileError::TooLarge("merge table"))?;
        let mut slots = vec![[u32::MAX; MERGE_SLOT]; placement.slots];
        for (&(rank, key, product), &slot) in merges.iter().zip(&placement.slot_of) {
            if let Some(to) = slots.get_mut(slot) {
                *to = merge_slot(key, rank, product);
            }
        }
        writer.u16s(Section::MergePilots, &placement.pilots);
        writer.u32s(Section::MergeSlots, slots.as_flattened());
        Ok(())
    }

    /// Words that are looked up whole: all if the model says so, else those
    /// that merging makes one token of.
    fn write_words(&self, writer: &mut Writer) -> Result<(), CompileError> {
        let mut words: Vec<(TokenId, &[u8])> = Vec::new();
        for (id, form) in (0_u32..).zip(&self.forms) {
            if let Some(form) = form
                && (self.ignore_merges || self.merged(form) == Some(vec![id]))
            {
                words.push((id, form));
            }
        }
        let keys: Vec<WordKey> = words.iter().map(|(_, word)| WordKey::of(word, 0, word)).collect();
        let hashes: Vec<u64> = keys.iter().map(|key| key.hash).collect();
        let placement = perfect_hash::place(&hashes).ok_or(CompileError::TooLarge("word table"))?;
        let mut slots = vec![[u32::MAX; WORD_SLOT]; placement.slots];
        let mut bytes = Vec::new();
        for ((&(id, word), key), &slot) in words.iter().zip(&keys).zip(&placement.slot_of) {
            let len = u32::try_from(word.len()).ok().filter(|_| word.len() <= WORD_BYTES_MAX);
            let len = len.ok_or(CompileError::TooLarge("token"))?;
            let [first, second] = halves(key.first);
            let third = if word.len() <= WORD_SLOT_BYTES {
                halves(key.second)[0]
            } else {
                let at = u32::try_from(bytes.len()).map_err(|_| CompileError::TooLarge("words"))?;
                bytes.extend(word.iter().skip(size_of::<u64>()));
                at
            };
            if let Some(to) = slots.get_mut(slot) {
                *to = [first, second, third, id | (len << WORD_LEN_SHIFT)];
            }
        }
        writer.u16s(Section::WordPilots, &placement.pilots);
        writer.u32s(Section::WordSlots, slots.as_flattened());
        writer.bytes(Section::WordBytes, bytes);
        Ok(())
    }

    /// Characters that merging may start from as one symbol.
    fn write_chars(&self, writer: &mut Writer) {
        let lowest = LowestRanks::of(&self.merges, self.forms.len());
        let (mut pages, mut tokens) = (vec![0_u16; 0x1100], Vec::new());
        for (id, form) in (0_u32..).zip(&self.forms) {
            let text = form.as_ref().and_then(|form| std::str::from_utf8(form).ok());
            let mut characters = text.unwrap_or_default().chars();
            let (Some(character), None) = (characters.next(), characters.next()) else { continue };
            let safe = match self.kind {
                Kind::SentencePiece => true,
                Kind::ByteLevel | Kind::Json => self.merges_first(character, id, &lowest),
            };
            let code = character as usize;
            let Some(page) = pages.get_mut(code >> 8) else { continue };
            if !safe {
                continue;
            }
            if *page == 0 {
                tokens.resize(tokens.len() + 256, NO_TOKEN);
                *page = u16::try_from(tokens.len() / 256).unwrap_or(0);
            }
            let start = usize::from(*page).saturating_sub(1) * 256;
            if let Some(to) = tokens.get_mut(start + (code & 0xFF)) {
                *to = id;
            }
        }
        writer.u16s(Section::CharPages, &pages);
        writer.u32s(Section::CharTokens, &tokens);
    }

    /// Whether the bytes of `character` become token `id` before anything is
    /// merged across its edges, whatever stands beside it.
    ///
    /// So it is if every merge across an edge, of the whole character or of a
    /// part that touches the edge, ranks above all merges within: as long as
    /// the character is not whole, one of those is there and comes first.
    fn merges_first(&self, character: char, id: TokenId, lowest: &LowestRanks) -> bool {
        let mut buffer = [0; 4];
        let bytes = character.encode_utf8(&mut buffer).as_bytes();
        if bytes.len() < 2 {
            return false;
        }
        let mut symbols = self.first_symbols(bytes);
        let (mut highest, mut left_parts, mut right_parts) = (0, Vec::new(), Vec::new());
        while symbols.len() > 1 {
            left_parts.extend(symbols.first().copied());
            right_parts.extend(symbols.last().copied());
            let Some((at, rank, product)) = self.lowest_merge(&symbols) else { return false };
            highest = highest.max(rank);
            apply(&mut symbols, at, product);
        }
        let after =
            |ranks: &[u32], id: TokenId| ranks.get(id as usize).is_some_and(|&rank| rank > highest);
        symbols == [id]
            && after(&lowest.as_left, id)
            && after(&lowest.as_right, id)
            && left_parts.iter().all(|&part| after(&lowest.as_right, part))
            && right_parts.iter().all(|&part| after(&lowest.as_left, part))
    }

    fn write_seams(&self, writer: &mut Writer) {
        let bits = self.seams.len().max(1) * SEAM_BITS_PER_PAIR;
        let mut set = vec![0_u64; bits.div_ceil(64).next_power_of_two()];
        for &(left, right) in &self.seams {
            let (word, bit) = seam_bit(left, right, set.len());
            if let Some(word) = set.get_mut(word) {
                *word |= 1 << bit;
            }
        }
        writer.u64s(Section::Seams, &set);
    }

    /// What merging makes of a canonical form; `None` if it is not text and
    /// the model merges characters.
    fn merged(&self, form: &[u8]) -> Option<Vec<TokenId>> {
        let mut symbols = match self.kind {
            Kind::SentencePiece => {
                let mut symbols = Vec::new();
                for character in std::str::from_utf8(form).ok()?.chars() {
                    let mut buffer = [0; 4];
                    let shown = if character == ' ' { LOW_LINE } else { character };
                    match self.ids.get(&*shown.encode_utf8(&mut buffer)) {
                        Some(&id) => symbols.push(id),
                        None => {
                            let text = character.encode_utf8(&mut buffer);
                            symbols.extend(self.first_symbols(text.as_bytes()));
                        }
                    }
                }
                symbols
            }
            Kind::ByteLevel | Kind::Json => self.first_symbols(form),
        };
        while let Some((at, _, product)) = self.lowest_merge(&symbols) {
            apply(&mut symbols, at, product);
        }
        Some(symbols)
    }

    fn first_symbols(&self, bytes: &[u8]) -> Vec<TokenId> {
        let token = |&byte: &u8| self.byte_tokens.get(usize::from(byte)).copied();
        bytes.iter().filter_map(token).collect()
    }

    fn lowest_merge(&self, symbols: &[TokenId]) -> Option<(usize, u32, TokenId)> {
        let pairs = symbols.iter().zip(symbols.iter().skip(1)).enumerate();
        pairs
            .filter_map(|(at, (&left, &right))| {
                self.merges.get(&(left, right)).map(|&(rank, product)| (at, rank, product))
            })
            .min_by_key(|&(at, rank, _)| (rank, at))
    }
}

/// The lower and the upper half of a number.
#[expect(clippy::cast_possible_truncation, reason = "the halves of a u64 are taken apart")]
fn halves(number: u64) -> [u32; 2] {
    [number as u32, (number >> 32) as u32]
}

fn apply(symbols: &mut Vec<TokenId>, at: usize, product: TokenId) {
    symbols.remove(at + 1);
    if let Some(symbol) = symbols.get_mut(at) {
        *symbol = product;
    }
}

/// The lowest rank of any merge with a token on its left or right side.
struct LowestRanks {
    as_left: Vec<u32>,
    as_right: Vec<u32>,
}

impl LowestRanks {
    fn of(merges: &Merges, ids: usize) -> Self {
        let mut lowest = Self { as_left: vec![u32::MAX; ids], as_right: vec![u32::MAX; ids] };
        for (&(left, right), &(rank, _)) in merges {
            for (side, id) in [(&mut lowest.as_left, left), (&mut lowest.as_right, right)] {
                if let Some(known) = side.get_mut(id as usize) {
                    *known = rank.min(*known);
                }
            }
        }
        lowest
    }
}

/// The bytes of text that a token string stands for.
fn canonical(kind: Kind, text: &str) -> Option<Vec<u8>> {
    let form = match kind {
        Kind::ByteLevel => text.chars().map(byte_of_char).collect::<Option<Vec<u8>>>()?,
        _ if text.contains(' ') => return None,
        _ => text.replace(LOW_LINE, " ").into_bytes(),
    };
    (!form.is_empty()).then_some(form)
}

/// The token of each byte value.
fn byte_tokens(kind: Kind, ids: &HashMap<String, TokenId>) -> Result<Vec<TokenId>, CompileError> {
    let mut tokens = Vec::with_capacity(256);
    for byte in 0..=u8::MAX {
        let name = match kind {
            Kind::ByteLevel => char_of_byte(byte).to_string(),
            Kind::SentencePiece | Kind::Json => format!("<0x{byte:02X}>"),
        };
        match ids.get(&name) {
            Some(&id) => tokens.push(id),
            // No text holds it, so any number will do.
            None if NEVER_IN_UTF8.contains(&byte) => tokens.push(0),
            None => return unsupported("vocabulary without a token for every byte"),
        }
    }
    Ok(tokens)
}

/// The character that stands for a byte in `ByteLevel` vocabularies (GPT-2):
/// printable Latin-1 for itself, the others from U+0100 on in order.
fn char_of_byte(byte: u8) -> char {
    if stands_for_itself(byte) {
        return char::from(byte);
    }
    let others = (0..byte).filter(|&byte| !stands_for_itself(byte)).count();
    u32::try_from(0x100 + others)
        .ok()
        .and_then(char::from_u32)
        .unwrap_or(char::REPLACEMENT_CHARACTER)
}

fn byte_of_char(character: char) -> Option<u8> {
    match u8::try_from(character) {
        Ok(byte) if stands_for_itself(byte) => Some(byte),
        Ok(_) => None,
        Err(_) => (0..=u8::MAX)
            .filter(|&byte| !stands_for_itself(byte))
            .nth((character as usize).checked_sub(0x100)?),
    }
}

fn stands_for_itself(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}
