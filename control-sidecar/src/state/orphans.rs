//! Orphans: blocks of lower tiers whose parent is not known yet.
//!
//! Dynamo's relay gives out what a lower tier holds block by block and in no
//! order, and a block may stay on a disk after the one before it has gone from
//! everywhere. Neither can be chained to a prompt's start before its parent is
//! known; then it can, as in Dynamo, where such a block is found from then on.

use std::collections::HashMap;

use foldhash::fast::RandomState;
use warmpath_core::event::Medium;
use warmpath_core::ids::{BlockHash, EngineHash};

use crate::limits::RANK_ORPHANS_MAX;

/// A block in a tier, by its engine's name.
pub(super) type Place = (Medium, EngineHash);

/// Blocks that wait for their parents.
#[derive(Clone, Debug, Default)]
pub(super) struct Orphans {
    blocks: HashMap<Place, (EngineHash, BlockHash), RandomState>,
    by_parent: HashMap<EngineHash, Vec<Place>, RandomState>,
}

impl Orphans {
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Lets a block wait for its parent; one that waits already goes on waiting
    /// for the one that it was said to have first. Returns whether there was room.
    pub(super) fn add(&mut self, place: Place, parent: EngineHash, hash: BlockHash) -> bool {
        if self.blocks.contains_key(&place) {
            return true;
        }
        if self.blocks.len() >= RANK_ORPHANS_MAX {
            return false;
        }
        self.blocks.insert(place, (parent, hash));
        self.by_parent.entry(parent).or_default().push(place);
        true
    }

    /// Forgets a block. Returns whether it waited.
    pub(super) fn remove(&mut self, place: Place) -> bool {
        let Some((parent, _)) = self.blocks.remove(&place) else { return false };
        if let Some(children) = self.by_parent.get_mut(&parent) {
            children.retain(|child| *child != place);
            if children.is_empty() {
                self.by_parent.remove(&parent);
            }
        }
        true
    }

    /// Takes out the blocks that wait for a parent.
    pub(super) fn of_parent(&mut self, parent: EngineHash) -> Vec<(Place, BlockHash)> {
        let places = self.by_parent.remove(&parent).unwrap_or_default();
        let take = |place| Some((place, self.blocks.remove(&place)?.1));
        places.into_iter().filter_map(take).collect()
    }
}
