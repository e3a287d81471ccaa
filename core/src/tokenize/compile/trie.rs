//! Added tokens: their ids as HF gives them, and the tries they are matched by.

use std::collections::BTreeMap;

use unicode_normalization_alignments::UnicodeNormalization;

use super::json::AddedToken;
use super::vocab::Vocabulary;
use super::write::Writer;
use super::{CompileError, Normalizer, inconsistent, unsupported};
use crate::ids::TokenId;
use crate::limits::{ADDED_TOKEN_BYTES_MAX, TOKEN_IDS_MAX};
use crate::tokenize::file::{NO_TOKEN, Section};
use crate::tokenize::words::LOW_LINE;

/// Writes the two tries.
pub(super) fn write(
    vocab: &Vocabulary,
    from_file: &[AddedToken],
    extra: &[AddedToken],
    normalizer: Normalizer,
    writer: &mut Writer,
) -> Result<(), CompileError> {
    let mut added = Added::default();
    added.add(vocab, from_file)?;
    added.add(vocab, extra)?;
    let (mut raw, mut normal) = (Builder::default(), Builder::default());
    for (&id, token) in &added.tokens {
        if id >= TOKEN_IDS_MAX {
            return Err(CompileError::TooLarge("ids of added tokens"));
        }
        if !token.normalized {
            raw.insert(&token.content, id)?;
            continue;
        }
        match normalizer {
            Normalizer::None => normal.insert(&token.content, id)?,
            Normalizer::Nfc => {
                let form: String = token.content.nfc().map(|(c, _)| c).collect();
                normal.insert(&form, id)?;
            }
            // The engine replaces spaces as it goes, so that the text it
            // matches on still has them.
            Normalizer::LowLines if token.content.contains([' ', LOW_LINE]) => {
                return unsupported("normalized added token with a space or U+2581");
            }
            Normalizer::LowLines => normal.insert(&token.content, id)?,
        }
    }
    raw.write(Section::AddedNodes, Section::AddedEdges, writer)?;
    normal.write(Section::NormalAddedNodes, Section::NormalAddedEdges, writer)
}

/// The added tokens by id. A later one of the same id replaces an earlier one.
#[derive(Default)]
struct Added {
    tokens: BTreeMap<TokenId, AddedToken>,
    ids: BTreeMap<String, TokenId>,
}

impl Added {
    /// Adds one batch. The ids written in the file do not count: a token has
    /// the id it has already, else that of the vocabulary, else the next one.
    fn add(&mut self, vocab: &Vocabulary, tokens: &[AddedToken]) -> Result<(), CompileError> {
        let size = vocab.len();
        let mut next = match self.tokens.last_key_value() {
            Some((&last, _)) if last >= size || size == 0 => last + 1,
            _ => size,
        };
        for token in tokens.iter().filter(|token| !token.content.is_empty()) {
            for (set, name) in [
                (token.single_word, "single_word"),
                (token.lstrip, "lstrip"),
                (token.rstrip, "rstrip"),
            ] {
                if set {
                    return unsupported(format!("added token with {name}"));
                }
            }
            let known = self.ids.get(&token.content).copied().or_else(|| vocab.id(&token.content));
            let id = known.unwrap_or(next);
            if known.is_none() {
                next += 1;
            }
            self.ids.insert(token.content.clone(), id);
            self.tokens.insert(id, token.clone());
        }
        Ok(())
    }
}

#[derive(Default)]
struct Node {
    edges: BTreeMap<u8, usize>,
    token: Option<TokenId>,
}

struct Builder {
    nodes: Vec<Node>,
}

impl Default for Builder {
    fn default() -> Self {
        Self { nodes: vec![Node::default()] }
    }
}

impl Builder {
    fn insert(&mut self, text: &str, token: TokenId) -> Result<(), CompileError> {
        if text.len() > ADDED_TOKEN_BYTES_MAX {
            return Err(CompileError::TooLarge("added token"));
        }
        let mut at = 0;
        for &byte in text.as_bytes() {
            let fresh = self.nodes.len();
            let Some(node) = self.nodes.get_mut(at) else { break };
            at = *node.edges.entry(byte).or_insert(fresh);
            if at == fresh {
                self.nodes.push(Node::default());
            }
        }
        match self.nodes.get_mut(at) {
            Some(node) if at > 0 && node.token.is_none() => {
                node.token = Some(token);
                Ok(())
            }
            _ => inconsistent("two added tokens of the same text, or an empty one"),
        }
    }

    fn write(
        &self,
        nodes_to: Section,
        edges_to: Section,
        writer: &mut Writer,
    ) -> Result<(), CompileError> {
        let (mut nodes, mut edges) = (Vec::new(), Vec::new());
        let too_large = |_| CompileError::TooLarge("added tokens");
        for node in &self.nodes {
            nodes.push(u32::try_from(edges.len()).map_err(too_large)?);
            nodes.push(u32::try_from(node.edges.len()).map_err(too_large)?);
            nodes.push(node.token.unwrap_or(NO_TOKEN));
            for (&byte, &to) in &node.edges {
                let to = u32::try_from(to).map_err(too_large)?;
                if to >= 1 << 24 {
                    return Err(CompileError::TooLarge("added tokens"));
                }
                edges.push((to << 8) | u32::from(byte));
            }
        }
        writer.u32s(nodes_to, &nodes);
        writer.u32s(edges_to, &edges);
        Ok(())
    }
}
