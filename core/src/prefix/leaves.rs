//! Leaves in the order in which they were used: a list through the nodes
//! themselves, so that every step takes constant time.

use super::Node;

/// A leaf's neighbours.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Links {
    older: Option<u32>,
    newer: Option<u32>,
}

#[cfg(test)]
impl Links {
    pub(super) fn older(&self) -> Option<u32> {
        self.older
    }

    pub(super) fn newer(&self) -> Option<u32> {
        self.newer
    }
}

/// The ends of the list.
#[derive(Debug, Default)]
pub(super) struct Leaves {
    oldest: Option<u32>,
    newest: Option<u32>,
}

impl Leaves {
    /// The leaf that was not used for longest.
    pub(super) fn oldest(&self) -> Option<u32> {
        self.oldest
    }

    /// Makes a leaf the one that was used last. Other nodes stay as they are.
    pub(super) fn touch(&mut self, nodes: &mut [Node], index: u32) {
        if nodes.get(index as usize).is_some_and(|node| node.children == 0) {
            self.remove(nodes, index);
            self.push_newest(nodes, index);
        }
    }

    /// Adds a node as the leaf that was used last.
    pub(super) fn push_newest(&mut self, nodes: &mut [Node], index: u32) {
        set_links(nodes, index, Links { older: self.newest, newer: None });
        self.set_newer(nodes, self.newest, Some(index));
        self.newest = Some(index);
    }

    /// Adds a node as the leaf that was not used for longest.
    pub(super) fn push_oldest(&mut self, nodes: &mut [Node], index: u32) {
        set_links(nodes, index, Links { older: None, newer: self.oldest });
        self.set_older(nodes, self.oldest, Some(index));
        self.oldest = Some(index);
    }

    /// Takes a leaf out.
    pub(super) fn remove(&mut self, nodes: &mut [Node], index: u32) {
        let Some(node) = nodes.get_mut(index as usize) else { return };
        let Links { older, newer } = core::mem::take(&mut node.links);
        self.set_newer(nodes, older, newer);
        self.set_older(nodes, newer, older);
    }

    /// Sets what follows a leaf, or the whole list if there is none before.
    fn set_newer(&mut self, nodes: &mut [Node], index: Option<u32>, newer: Option<u32>) {
        match index.and_then(|index| nodes.get_mut(index as usize)) {
            Some(node) => node.links.newer = newer,
            None => self.oldest = newer,
        }
    }

    fn set_older(&mut self, nodes: &mut [Node], index: Option<u32>, older: Option<u32>) {
        match index.and_then(|index| nodes.get_mut(index as usize)) {
            Some(node) => node.links.older = older,
            None => self.newest = older,
        }
    }
}

fn set_links(nodes: &mut [Node], index: u32, links: Links) {
    if let Some(node) = nodes.get_mut(index as usize) {
        node.links = links;
    }
}
