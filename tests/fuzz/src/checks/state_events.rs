//! Events as no decoder limits them: few pages and tokens, so that they meet.
//!
//! Input: a byte that chooses the model, then events of a few bytes each.

use warmpath_core::event::{
    Group, GroupKind, Hashed, KvEvent, Medium, ObjectHash, Removed, Stored,
};
use warmpath_core::ids::{BlockHash, EngineHash, TokenId};

use super::engine_batch::{Index, one_worker};

/// Most events of one input.
const EVENTS_MAX: usize = 256;

pub(super) fn seeds() -> Vec<Vec<u8>> {
    // A chain of two blocks of four; one removed; announced again; cleared.
    let chain = [0, 2, 4, 0, 1, 2, 0, 2, 1, 3, 0, 9, 0, 2, 4, 0, 1, 2, 0, 3];
    // The same with pages of half a block and of a quarter.
    let halves = [0, 4, 2, 0, 1, 2, 3, 4, 0, 2, 1, 2, 0, 4, 2, 0, 1, 2, 3, 4, 0];
    let quarters = [0, 4, 1, 0, 1, 2, 3, 4, 0, 2, 1, 3, 0, 1, 1, 2, 3, 5];
    [&chain[..], &halves, &quarters]
        .iter()
        .flat_map(|events| [0x0a, 0x08, 0x0e, 0x02].map(|head| [&[head], *events].concat()))
        .collect()
}

pub(super) fn check(data: &[u8]) {
    let Some((head, mut rest)) = data.split_first() else { return };
    let (mut state, slot) = one_worker(*head);
    let eagle = head & 4 != 0;
    let mut index = Index::default();
    for _ in 0..EVENTS_MAX {
        let Some(event) = read_event(&mut rest, eagle) else { break };
        state.apply(slot, &[event]);
        index.take(&mut state);
        index.agrees(&state);
    }
}

fn byte(rest: &mut &[u8]) -> Option<u8> {
    let (first, after) = rest.split_first()?;
    *rest = after;
    Some(*first)
}

fn page(value: u8) -> EngineHash {
    EngineHash(u64::from(value % 16))
}

fn pages(rest: &mut &[u8]) -> Option<Vec<EngineHash>> {
    let count = byte(rest)? % 6;
    (0..count).map(|_| byte(rest).map(page)).collect()
}

/// Parent 0 is none.
fn parent(rest: &mut &[u8]) -> Option<Option<EngineHash>> {
    Some(Some(byte(rest)?).filter(|value| *value != 0).map(page))
}

fn read_event(rest: &mut &[u8], eagle: bool) -> Option<KvEvent> {
    let kind = byte(rest)?;
    // The upper bits make an event odd in one way each.
    let medium = if kind & 0x80 == 0 { Medium::Device } else { Medium::HostPinned };
    let group = Group {
        index: (kind & 0x40 != 0).then_some(1),
        kind: match kind & 0x30 {
            0x10 => Some(GroupKind::Main),
            0x20 => Some(GroupKind::Other),
            _ => None,
        },
    };
    Some(match kind % 4 {
        0 | 1 => {
            let pages = pages(rest)?;
            let page_size = u32::from(byte(rest)? % 9);
            let odd = byte(rest)?;
            let tokens = pages.len() * page_size as usize + usize::from(eagle);
            let first = if kind % 4 == 1 { u32::from(byte(rest)?) } else { 0 };
            KvEvent::Stored(Stored {
                parent: parent(rest)?,
                tokens: (first..).take(tokens + usize::from(odd & 1)).collect::<Vec<TokenId>>(),
                page_size,
                pairs: eagle ^ (odd & 2 != 0),
                lora: (odd & 4 != 0).then(|| "a".to_owned()),
                cache_salt: (odd & 8 != 0).then(|| "s".to_owned()),
                objects: (0..usize::from(odd >> 6))
                    .map(|page| ObjectHash { page, hash: 7 })
                    .collect(),
                understood: if odd & 16 == 0 { pages.len() } else { pages.len() / 2 },
                pages,
                medium,
                group,
            })
        }
        2 => KvEvent::Removed(Removed { pages: pages(rest)?, medium, group }),
        _ if kind & 0x08 != 0 => {
            let blocks = pages(rest)?;
            let blocks = blocks.into_iter().map(|page| (page, BlockHash(page.0 ^ 5))).collect();
            KvEvent::Hashed(Hashed { blocks, parent: parent(rest)?, medium })
        }
        _ => KvEvent::Cleared,
    })
}
