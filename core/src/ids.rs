//! Identifiers: newtypes wherever two integers could be swapped.
//!
//! Everything hashed or sent between processes is `u64` or `u32`: the sidecar
//! is a 64-bit program, the module a 32-bit one, so `usize` never appears here.

/// A token id, as the engine's tokenizer numbers them.
pub type TokenId = u32;

/// Hash of one block's tokens and salt, independent of what precedes it
/// (Dynamo: local block hash).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash(pub u64);

/// Hash of a block chained to everything before it: the index's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceHash(pub u64);

/// An engine's own opaque name for a cached block, as its events report it
/// (Dynamo: external sequence hash). Never compared across engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EngineHash(pub u64);

/// Identity of a worker instance: Dynamo's instance id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u64);

/// Data-parallel rank inside one instance, from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DpRank(pub u32);

/// The unit of choice: one rank of one instance. Each has a cache of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Worker {
    /// The instance.
    pub id: WorkerId,
    /// The data-parallel rank within it.
    pub rank: DpRank,
}

/// A small number that stands for one incarnation of a [`Worker`] in the feed
/// and in the index. The sidecar hands them out; one is used again only after
/// a `cleared` operation for it has gone through the feed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerSlot(pub u16);
