//! Blocks that one worker holds for its bookings, with their weights.
//!
//! Prompts are kept as a tree of edges: runs of blocks that the same bookings
//! hold. Which blocks those are [`super::active`] knows; here they are counted.
//!
//! Edges are cut where prompts part and never joined again, and sums are kept by
//! edge, as Dynamo's router (1.6.1) does it: the sums are its own to the last
//! bit, and with them the rounding.
//!
//! # Invariants
//!
//! 1. An edge starts where its parent ends, and somebody ends in it or behind it.
//! 2. Without prompts, or without output, the sum of that is exactly zero.

use super::active::OfWorker;
use crate::ids::SequenceHash;
use crate::limits::BOOKING_OUTPUT_BLOCKS_MAX;

/// Number of an edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EdgeId(u32);

/// A run of blocks that the same bookings hold.
#[derive(Clone, Copy, Debug)]
struct Edge {
    parent: Option<EdgeId>,
    /// Depth of its first block in the prompt, from 0.
    start: u32,
    /// Depth behind its last block.
    end: u32,
    /// Edges that go on from here.
    children: u32,
    /// Bookings whose prompt ends here.
    ending: u32,
    /// What each of its blocks counts, `0.0..=1.0`.
    weight: f64,
}

impl Edge {
    fn len(&self) -> f64 {
        f64::from(self.end.saturating_sub(self.start))
    }

    /// Whether more than one booking, or none, comes by.
    fn is_shared(&self) -> bool {
        self.children.saturating_add(self.ending) != 1
    }
}

/// What one booking holds.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// Where its prompt ends; `None` without blocks.
    tail: Option<EdgeId>,
    /// Blocks of its answer.
    outputs: u32,
    /// What each of those counts.
    output_weight: f64,
}

/// What a worker holds.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    edges: Vec<Edge>,
    unused: Vec<EdgeId>,
    prompts: f64,
    outputs: f64,
    output_count: u64,
}

impl Blocks {
    /// Sum of the weights.
    pub(super) fn weight(&self) -> f64 {
        self.prompts + self.outputs
    }

    /// Bookings that end in an edge, and edges that go on from it, each of one
    /// booking at least: so many at least hold its blocks.
    pub(super) fn branches(&self, id: EdgeId) -> u64 {
        self.edge(id).map_or(0, |edge| u64::from(edge.children) + u64::from(edge.ending))
    }

    /// Number of edges.
    #[cfg(all(test, not(target_arch = "wasm32")))]
    pub(super) fn edges(&self) -> usize {
        self.edges.len() - self.unused.len()
    }

    /// Takes hold of a prompt's blocks and of `unshared` more behind them that
    /// have no hash.
    ///
    /// - `active`: what the worker holds already, and is told what it holds from now
    ///   on.
    pub(super) fn acquire(
        &mut self,
        prompt: &[SequenceHash],
        unshared: u32,
        active: &mut OfWorker<'_>,
    ) -> Chain {
        let (depth, found) = active.find(prompt);
        let at = found.map(|id| self.cut(id, depth, prompt, active));
        let end = u32::try_from(prompt.len()).unwrap_or(u32::MAX).saturating_add(unshared);
        let tail = if depth < end {
            let edge = Edge { parent: at, start: depth, end, children: 0, ending: 1, weight: 1.0 };
            self.prompts += edge.len();
            let id = self.insert(edge);
            active.hold(prompt, depth, id);
            if let Some(parent) = at.and_then(|at| self.edge_mut(at)) {
                parent.children += 1;
            }
            Some(id)
        } else {
            if let Some(edge) = at.and_then(|at| self.edge_mut(at)) {
                edge.ending += 1;
            }
            at
        };
        Chain { tail, ..Chain::default() }
    }

    /// Cuts an edge at a depth, unless it ends there. Returns the part before it;
    /// the part behind it keeps the number, by which chains know it.
    fn cut(
        &mut self,
        id: EdgeId,
        depth: u32,
        prompt: &[SequenceHash],
        active: &mut OfWorker<'_>,
    ) -> EdgeId {
        let Some(edge) = self.edge(id).copied().filter(|edge| depth < edge.end) else {
            return id;
        };
        let before = self.insert(Edge { end: depth, children: 1, ending: 0, ..edge });
        if let Some(behind) = self.edge_mut(id) {
            behind.parent = Some(before);
            behind.start = depth;
        }
        active.rename(prompt, edge.start, depth, before);
        before
    }

    /// Takes hold of blocks of the answer until there are `total`. If there are
    /// more than before and `weight` is given, all of them and the blocks of the
    /// prompt that nobody else holds count that much from now on.
    pub(super) fn extend(&mut self, chain: &mut Chain, total: u32, weight: Option<f64>) {
        let new = total.min(BOOKING_OUTPUT_BLOCKS_MAX).saturating_sub(chain.outputs);
        if new == 0 {
            return;
        }
        let held = chain.outputs;
        chain.outputs += new;
        self.output_count += u64::from(new);
        for _ in 0..new {
            self.outputs += 1.0;
        }
        let Some(weight) = weight else {
            chain.output_weight = 1.0;
            return;
        };
        // One by one, as Dynamo does, so that the sum is the same to the last bit.
        for _ in 0..held {
            self.outputs += weight - chain.output_weight;
        }
        for _ in 0..new {
            self.outputs += weight - 1.0;
        }
        chain.output_weight = weight;
        self.weigh_own(chain, weight);
    }

    fn weigh_own(&mut self, chain: &Chain, weight: f64) {
        let mut at = chain.tail;
        while let Some(id) = at {
            let Some(edge) = self.edge_mut(id).filter(|edge| !edge.is_shared()) else { return };
            let change = edge.len() * (weight - edge.weight);
            edge.weight = weight;
            at = edge.parent;
            self.prompts += change;
        }
    }

    /// Lets go of a booking's blocks.
    ///
    /// - `prompt`: as it was acquired.
    /// - `active`: is told what the worker holds no more.
    pub(super) fn release(
        &mut self,
        chain: &Chain,
        prompt: &[SequenceHash],
        active: &mut OfWorker<'_>,
    ) {
        for _ in 0..chain.outputs {
            self.outputs -= chain.output_weight;
        }
        self.output_count = self.output_count.saturating_sub(u64::from(chain.outputs));
        if self.output_count == 0 {
            self.outputs = 0.0;
        }
        if let Some(edge) = chain.tail.and_then(|tail| self.edge_mut(tail)) {
            edge.ending = edge.ending.saturating_sub(1);
        }
        let mut at = chain.tail;
        // One behind the other, so that the tree is gone through once for all of them:
        // other prompts may have cut this one in as many edges as it has blocks.
        let mut gone: Option<(u32, u32)> = None;
        let is_unheld = |edge: &Edge| edge.ending == 0 && edge.children == 0;
        while let Some((id, edge)) = at.and_then(|id| Some((id, *self.edge(id)?)))
            && is_unheld(&edge)
        {
            self.remove(id, &edge);
            gone = Some((edge.start, gone.map_or(edge.end, |(_, end)| end)));
            at = edge.parent;
        }
        if let Some((start, end)) = gone {
            active.let_go(prompt, start, end);
        }
    }

    fn remove(&mut self, id: EdgeId, edge: &Edge) {
        self.prompts -= edge.len() * edge.weight;
        if let Some(parent) = edge.parent.and_then(|parent| self.edge_mut(parent)) {
            parent.children = parent.children.saturating_sub(1);
        }
        self.unused.push(id);
        if self.unused.len() == self.edges.len() {
            self.edges.clear();
            self.unused.clear();
            self.prompts = 0.0;
        }
    }

    fn insert(&mut self, edge: Edge) -> EdgeId {
        if let Some(id) = self.unused.pop() {
            if let Some(place) = self.edge_mut(id) {
                *place = edge;
            }
            return id;
        }
        // No more than there are blocks, far below 2³².
        let id = EdgeId(u32::try_from(self.edges.len()).unwrap_or(u32::MAX));
        self.edges.push(edge);
        id
    }

    fn edge(&self, id: EdgeId) -> Option<&Edge> {
        self.edges.get(id.0 as usize)
    }

    fn edge_mut(&mut self, id: EdgeId) -> Option<&mut Edge> {
        self.edges.get_mut(id.0 as usize)
    }
}
