//! Active: the prompts of all bookings of all workers, as one tree.
//!
//! A *node* is a run of blocks that no two prompts part within. It knows which
//! workers hold it, so one way along a prompt tells for all of them how much of it
//! they have; and a booking costs what there are nodes on its way, not blocks.
//!
//! # Invariants
//!
//! 1. A node starts where its parent ends, and its first block is none of any
//!    other child of its parent.
//! 2. Every node has a holder, and whoever holds a node holds its parent.
//! 3. A worker's hold of a node names the edge of its [`super::blocks::Blocks`]
//!    that all of the node's blocks are in.

use core::hash::{Hash, Hasher};

use foldhash::fast::FixedState;
use hashbrown::HashMap;

use super::blocks::EdgeId;
use crate::ids::{SequenceHash, WorkerSlot};
use crate::overlap::find_next;

/// Leading blocks of a prompt that each worker has booked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ActiveBlocks {
    /// In ascending order of slots; workers without any are left out.
    counts: Vec<(WorkerSlot, u32)>,
}

impl ActiveBlocks {
    /// How many a worker has.
    ///
    /// - `at`: where the one that was asked for last stands; 0 before the first.
    ///   Workers that are asked for in their order are found at once.
    #[must_use]
    pub fn of(&self, slot: WorkerSlot, at: &mut usize) -> u32 {
        let found = find_next(&self.counts, slot, at, |(slot, _)| *slot);
        found.map_or(0, |(_, blocks)| *blocks)
    }
}

/// Number of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NodeId(u32);

/// Where a node is found: behind which other, or at the start, and with what
/// first block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    parent: Option<NodeId>,
    first: SequenceHash,
}

impl Hash for Key {
    /// One step, where the members would take three.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let parent = self.parent.map_or(0, |parent| u64::from(parent.0) + 1);
        state.write_u64(self.first.0 ^ parent.rotate_left(32));
    }
}

/// A worker's hold of a node.
#[derive(Clone, Copy, Debug)]
struct Holder {
    slot: WorkerSlot,
    edge: EdgeId,
}

#[derive(Debug)]
struct Node {
    parent: Option<NodeId>,
    /// At least one.
    blocks: Vec<SequenceHash>,
    /// In ascending order of slots.
    holders: Vec<Holder>,
}

impl Node {
    fn edge_of(&self, slot: WorkerSlot) -> Option<EdgeId> {
        let at = self.holders.binary_search_by_key(&slot, |holder| holder.slot).ok()?;
        self.holders.get(at).map(|holder| holder.edge)
    }

    /// From now on the worker holds it, by that edge.
    fn hold(&mut self, slot: WorkerSlot, edge: EdgeId) {
        match self.holders.binary_search_by_key(&slot, |holder| holder.slot) {
            Ok(at) => {
                if let Some(holder) = self.holders.get_mut(at) {
                    holder.edge = edge;
                }
            }
            Err(at) => self.holders.insert(at, Holder { slot, edge }),
        }
    }
}

/// Leading blocks of a prompt, up to the last that somebody has.
struct Way {
    /// The node of the last one; `None` before the first.
    last: Option<NodeId>,
    blocks: usize,
}

impl Way {
    const START: Self = Self { last: None, blocks: 0 };

    fn count(&self) -> u32 {
        u32::try_from(self.blocks).unwrap_or(u32::MAX)
    }
}

/// Those who are left and not among the holders have so many blocks.
///
/// - `left`: places in `counts`, whose slots ascend like those of the holders.
fn keep_holders(
    left: &mut Vec<usize>,
    counts: &mut [(WorkerSlot, u32)],
    holders: &[Holder],
    blocks: u32,
) {
    let mut holders = holders.iter().map(|holder| holder.slot).peekable();
    left.retain(|&at| {
        let Some((slot, count)) = counts.get_mut(at) else { return false };
        while holders.next_if(|holder| *holder < *slot).is_some() {}
        let stays = holders.peek() == Some(slot);
        if !stays {
            *count = blocks;
        }
        stays
    });
}

/// The tree.
#[derive(Debug, Default)]
pub(super) struct Active {
    nodes: Vec<Node>,
    unused: Vec<NodeId>,
    keys: HashMap<Key, NodeId, FixedState>,
}

impl Active {
    /// The tree, as it is for one worker.
    pub(super) fn of_worker(&mut self, slot: WorkerSlot) -> OfWorker<'_> {
        OfWorker { slot, active: self }
    }

    /// The leading blocks of a prompt that each worker has.
    ///
    /// # Cost
    ///
    /// One comparison a block, and one pass over those who are left wherever some
    /// drop out.
    pub(super) fn leading(&self, prompt: &[SequenceHash]) -> ActiveBlocks {
        let mut way = Way::START;
        let mut counts: Vec<(WorkerSlot, u32)> = Vec::new();
        // Places of those that have all so far.
        let mut left: Vec<usize> = Vec::new();
        while let Some((id, node, blocks)) = self.step(&way, prompt) {
            if way.last.is_none() {
                counts.extend(node.holders.iter().map(|holder| (holder.slot, 0)));
                left.extend(0..counts.len());
            } else if node.holders.len() < left.len() {
                keep_holders(&mut left, &mut counts, &node.holders, way.count());
            }
            way = Way { last: Some(id), blocks: way.blocks + blocks };
            if blocks < node.blocks.len() {
                break;
            }
        }
        keep_holders(&mut left, &mut counts, &[], way.count());
        ActiveBlocks { counts }
    }

    /// How many leading blocks of a prompt a worker has, and by which edge the last.
    pub(super) fn find(&self, slot: WorkerSlot, prompt: &[SequenceHash]) -> (u32, Option<EdgeId>) {
        let (mut way, mut last) = (Way::START, None);
        while let Some((id, node, blocks)) = self.step(&way, prompt) {
            let Some(edge) = node.edge_of(slot) else { break };
            last = Some(edge);
            way = Way { last: Some(id), blocks: way.blocks + blocks };
            if blocks < node.blocks.len() {
                break;
            }
        }
        (way.count(), last)
    }

    /// By which edge a worker has the last of so many leading blocks of a prompt.
    ///
    /// - `blocks`: at most as many as [`Self::find`] tells.
    pub(super) fn edge(
        &self,
        slot: WorkerSlot,
        prompt: &[SequenceHash],
        blocks: u32,
    ) -> Option<EdgeId> {
        let last = (blocks as usize).checked_sub(1)?;
        let (mut at, mut depth) = (None, 0);
        loop {
            let id = *self.keys.get(&Key { parent: at, first: *prompt.get(depth)? })?;
            let node = self.node(id)?;
            depth += node.blocks.len();
            if depth > last {
                return node.edge_of(slot);
            }
            at = Some(id);
        }
    }

    /// The node that follows on a prompt's way, and how many of its blocks the
    /// prompt has, at least one.
    #[inline]
    fn step(&self, way: &Way, prompt: &[SequenceHash]) -> Option<(NodeId, &Node, usize)> {
        let rest = prompt.get(way.blocks..)?;
        let id = *self.keys.get(&Key { parent: way.last, first: *rest.first()? })?;
        let node = self.node(id)?;
        let same = node.blocks.iter().zip(rest).take_while(|(own, other)| own == other).count();
        Some((id, node, same))
    }

    /// Cuts a node, unless it ends there: what comes before. The part behind keeps
    /// the number, by which its children know it.
    fn cut(&mut self, id: NodeId, blocks: usize) -> NodeId {
        let Some(node) = self.node_mut(id).filter(|node| blocks < node.blocks.len()) else {
            return id;
        };
        let behind = node.blocks.split_off(blocks);
        let before = Node {
            parent: node.parent,
            blocks: core::mem::replace(&mut node.blocks, behind),
            holders: node.holders.clone(),
        };
        let parts = (before.blocks.first().copied(), node.blocks.first().copied());
        let (Some(first), Some(first_behind)) = parts else { return id };
        let parent = before.parent;
        let before = self.insert(before);
        if let Some(node) = self.node_mut(id) {
            node.parent = Some(before);
        }
        self.keys.insert(Key { parent, first }, before);
        self.keys.insert(Key { parent: Some(before), first: first_behind }, id);
        before
    }

    fn insert(&mut self, node: Node) -> NodeId {
        if let Some(id) = self.unused.pop() {
            if let Some(place) = self.node_mut(id) {
                *place = node;
            }
            return id;
        }
        // No more than there are blocks, far below 2³².
        let id = NodeId(u32::try_from(self.nodes.len()).unwrap_or(u32::MAX));
        self.nodes.push(node);
        id
    }

    /// Takes out a node that nobody holds, and so no child of it.
    fn remove(&mut self, id: NodeId) {
        let Some(node) = self.node_mut(id) else { return };
        let (parent, blocks) = (node.parent, core::mem::take(&mut node.blocks));
        if let Some(first) = blocks.first() {
            self.keys.remove(&Key { parent, first: *first });
        }
        self.unused.push(id);
        if self.unused.len() == self.nodes.len() {
            self.nodes.clear();
            self.unused.clear();
        }
    }

    fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id.0 as usize)
    }

    fn node_mut(&mut self, id: NodeId) -> Option<&mut Node> {
        self.nodes.get_mut(id.0 as usize)
    }

    /// Number of nodes, as the list of them and their keys tell it.
    #[cfg(all(test, not(target_arch = "wasm32")))]
    pub(super) fn counts(&self) -> [usize; 2] {
        [self.nodes.len() - self.unused.len(), self.keys.len()]
    }
}

/// What one worker holds of the tree.
pub(super) struct OfWorker<'a> {
    slot: WorkerSlot,
    active: &'a mut Active,
}

impl OfWorker<'_> {
    /// See [`Active::find`].
    pub(super) fn find(&self, prompt: &[SequenceHash]) -> (u32, Option<EdgeId>) {
        self.active.find(self.slot, prompt)
    }

    /// The worker holds a prompt's blocks from a depth on, too, by that edge.
    ///
    /// - `from`: how many it has already.
    pub(super) fn hold(&mut self, prompt: &[SequenceHash], from: u32, edge: EdgeId) {
        let from = from as usize;
        let mut way = Way::START;
        while way.blocks < prompt.len() {
            let Some((id, _, same)) = self.active.step(&way, prompt) else {
                self.add(&way, prompt, edge);
                return;
            };
            let until = way.blocks + same;
            // No node reaches from what was held to what was not.
            let until = if way.blocks < from { until.min(from) } else { until };
            let id = self.active.cut(id, until - way.blocks);
            if way.blocks >= from
                && let Some(node) = self.active.node_mut(id)
            {
                node.hold(self.slot, edge);
            }
            way = Way { last: Some(id), blocks: until };
        }
    }

    /// A new node of all that is left of a prompt.
    fn add(&mut self, way: &Way, prompt: &[SequenceHash], edge: EdgeId) {
        let blocks = prompt.get(way.blocks..).unwrap_or_default().to_vec();
        let Some(&first) = blocks.first() else { return };
        let holders = vec![Holder { slot: self.slot, edge }];
        let id = self.active.insert(Node { parent: way.last, blocks, holders });
        self.active.keys.insert(Key { parent: way.last, first }, id);
    }

    /// What the worker holds of a prompt between two depths is of that edge now.
    ///
    /// - `prompt`: one that it holds up to `end`.
    pub(super) fn rename(&mut self, prompt: &[SequenceHash], start: u32, end: u32, edge: EdgeId) {
        let slot = self.slot;
        self.each(prompt, start, end, |active, id, blocks_max| {
            let id = active.cut(id, blocks_max);
            if let Some(node) = active.node_mut(id) {
                node.hold(slot, edge);
            }
            id
        });
    }

    /// The worker lets go of a prompt's blocks between two depths.
    ///
    /// - `prompt`: one that it holds up to `end`.
    pub(super) fn let_go(&mut self, prompt: &[SequenceHash], start: u32, end: u32) {
        let slot = self.slot;
        let mut empty = Vec::new();
        self.each(prompt, start, end, |active, id, _| {
            let Some(node) = active.node_mut(id) else { return id };
            if let Ok(at) = node.holders.binary_search_by_key(&slot, |holder| holder.slot) {
                node.holders.remove(at);
            }
            if node.holders.is_empty() {
                empty.push(id);
            }
            id
        });
        for id in empty {
            self.active.remove(id);
        }
    }

    /// Does something with each node of a prompt between two depths.
    ///
    /// - `visit`: of a node and how many blocks are left to the end; returns the node
    ///   that the next one is a child of.
    fn each(
        &mut self,
        prompt: &[SequenceHash],
        start: u32,
        end: u32,
        mut visit: impl FnMut(&mut Active, NodeId, usize) -> NodeId,
    ) {
        let (start, end) = (start as usize, end as usize);
        let (mut at, mut depth) = (None, 0);
        while depth < end {
            let Some(&first) = prompt.get(depth) else { return };
            let Some(&id) = self.active.keys.get(&Key { parent: at, first }) else { return };
            let id = if depth < start { id } else { visit(self.active, id, end - depth) };
            let blocks = self.active.node(id).map_or(0, |node| node.blocks.len());
            if blocks == 0 {
                return;
            }
            depth += blocks;
            at = Some(id);
        }
    }
}
