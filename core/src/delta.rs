//! Delta: changes of the prefix index, as the feed carries them.
//!
//! The sidecar's state turns engine events into deltas; `index` applies them.
//! A snapshot is a series of frames with the same body that hold only stored
//! blocks.
//!
//! Body: one group after another, each
//! `operation u8 | zero u8 | slot u16 | count u32 | count × sequence hash u64`.
//!
//! # Invariants
//!
//! 1. The order of groups is the order of events: applying them in order gives
//!    the state that the sidecar has.
//! 2. A block is stored for a worker slot, or it is not: the sidecar counts
//!    references, so `stored` of a stored block and `removed` of an absent one
//!    change nothing.

use crate::ids::{SequenceHash, WorkerSlot};
use crate::limits::{DELTA_OPERATIONS_MAX, SNAPSHOT_BLOCKS_MAX};
use crate::wire::{Reader, WireError};

/// What happened to blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The worker now holds the blocks.
    Stored,
    /// The worker no longer holds the blocks.
    Removed,
    /// The worker holds nothing any more. Carries no hashes.
    Cleared,
}

/// Collects operations into the body of a delta or snapshot part.
#[derive(Clone, Debug, Default)]
pub struct DeltaBuilder {
    bytes: Vec<u8>,
    /// Where the open group's count stands, with what it belongs to.
    open: Option<(usize, Operation, WorkerSlot, u32)>,
    operations: usize,
}

impl DeltaBuilder {
    /// An empty delta.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends one block's operation; joins the open group if it fits.
    pub fn push(&mut self, operation: Operation, slot: WorkerSlot, hash: SequenceHash) {
        self.group(operation, slot);
        self.bytes.extend_from_slice(&hash.0.to_le_bytes());
        self.operations += 1;
        if let Some((at, _, _, count)) = &mut self.open {
            *count += 1;
            if let Some(field) = self.bytes.get_mut(*at..*at + 4) {
                field.copy_from_slice(&count.to_le_bytes());
            }
        }
    }

    /// Appends "this worker holds nothing any more".
    pub fn clear(&mut self, slot: WorkerSlot) {
        self.open = None;
        self.group(Operation::Cleared, slot);
        self.open = None;
        self.operations += 1;
    }

    fn group(&mut self, operation: Operation, slot: WorkerSlot) {
        if matches!(self.open, Some((_, o, s, _)) if o == operation && s == slot) {
            return;
        }
        let code = match operation {
            Operation::Stored => 1,
            Operation::Removed => 2,
            Operation::Cleared => 3,
        };
        self.bytes.extend_from_slice(&[code, 0]);
        self.bytes.extend_from_slice(&slot.0.to_le_bytes());
        self.open = Some((self.bytes.len(), operation, slot, 0));
        self.bytes.extend_from_slice(&[0; 4]);
    }

    /// Operations collected so far: blocks, and one for each `cleared`.
    #[must_use]
    pub fn operations(&self) -> usize {
        self.operations
    }

    /// Whether nothing has been collected.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.operations == 0
    }

    /// Whether the delta has reached [`DELTA_OPERATIONS_MAX`] and must be sent
    /// before more is collected.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.operations >= DELTA_OPERATIONS_MAX
    }

    /// The body; the builder is empty afterwards.
    #[must_use]
    pub fn take(&mut self) -> Vec<u8> {
        self.open = None;
        self.operations = 0;
        core::mem::take(&mut self.bytes)
    }
}

/// One group of a delta: the same thing happened to several blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group<'a> {
    /// What happened.
    pub operation: Operation,
    /// To whose cache.
    pub slot: WorkerSlot,
    hashes: &'a [u8],
}

impl<'a> Group<'a> {
    /// The blocks, in order.
    pub fn hashes(&self) -> impl ExactSizeIterator<Item = SequenceHash> + Clone + use<'a> {
        read_hashes(self.hashes.as_chunks().0)
    }

    /// The same in batches of at most `len`, which is not 0.
    pub(crate) fn batches(
        &self,
        len: usize,
    ) -> impl Iterator<Item = impl Iterator<Item = SequenceHash> + Clone + use<'a>> + use<'a> {
        self.hashes.as_chunks().0.chunks(len).map(read_hashes)
    }
}

fn read_hashes(bytes: &[[u8; 8]]) -> impl ExactSizeIterator<Item = SequenceHash> + Clone + use<'_> {
    bytes.iter().map(|bytes| SequenceHash(u64::from_le_bytes(*bytes)))
}

/// A checked delta body.
#[derive(Clone, Copy, Debug)]
pub struct Delta<'a> {
    body: &'a [u8],
    operations: usize,
}

impl<'a> Delta<'a> {
    /// Checks a body from end to end, so that applying it cannot fail halfway.
    ///
    /// # Errors
    ///
    /// A [`WireError`]; nothing has been applied by then.
    pub fn decode(body: &'a [u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let mut operations = 0;
        while !reader.is_empty() {
            let group = read_group(&mut reader)?;
            operations += group.hashes().len().max(1);
            if operations > DELTA_OPERATIONS_MAX {
                return Err(WireError::OverLimit);
            }
        }
        Ok(Self { body, operations })
    }

    /// Operations in the body.
    #[must_use]
    pub fn operations(&self) -> usize {
        self.operations
    }

    /// The groups, in order.
    pub fn groups(&self) -> impl Iterator<Item = Group<'a>> {
        let mut reader = Reader::new(self.body);
        core::iter::from_fn(move || read_group(&mut reader).ok())
    }
}

fn read_group<'a>(reader: &mut Reader<'a>) -> Result<Group<'a>, WireError> {
    let operation = match reader.u8()? {
        1 => Operation::Stored,
        2 => Operation::Removed,
        3 => Operation::Cleared,
        _ => return Err(WireError::UnknownCase),
    };
    reader.u8()?;
    let slot = WorkerSlot(reader.u16()?);
    let max = if operation == Operation::Cleared { 0 } else { DELTA_OPERATIONS_MAX };
    let count = reader.count(max, 8)?;
    let hashes = reader.take(count * 8)?;
    Ok(Group { operation, slot, hashes })
}

/// Body of [`crate::frame::Kind::SnapshotStart`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotStart {
    /// Stored operations that will follow, for sizing and progress.
    pub blocks: u64,
}

impl SnapshotStart {
    /// Encodes the body.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.blocks.to_le_bytes().to_vec()
    }

    /// Decodes the body.
    ///
    /// # Errors
    ///
    /// A [`WireError`].
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let blocks = reader.u64()?;
        reader.finish()?;
        if blocks > SNAPSHOT_BLOCKS_MAX {
            return Err(WireError::OverLimit);
        }
        Ok(Self { blocks })
    }
}

/// Encodes several operations at once; for tests and small deltas.
#[must_use]
pub fn encode_operations(operations: &[(Operation, WorkerSlot, &[SequenceHash])]) -> Vec<u8> {
    let mut builder = DeltaBuilder::new();
    for (operation, slot, hashes) in operations {
        if *operation == Operation::Cleared {
            builder.clear(*slot);
        }
        for hash in *hashes {
            builder.push(*operation, *slot, *hash);
        }
    }
    builder.take()
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn flat(delta: &Delta<'_>) -> Vec<(Operation, u16, Vec<u64>)> {
        delta
            .groups()
            .map(|group| {
                (group.operation, group.slot.0, group.hashes().map(|hash| hash.0).collect())
            })
            .collect()
    }

    #[test]
    fn operations_come_back_in_order_and_grouped() {
        let mut builder = DeltaBuilder::new();
        builder.push(Operation::Stored, WorkerSlot(3), SequenceHash(1));
        builder.push(Operation::Stored, WorkerSlot(3), SequenceHash(2));
        builder.push(Operation::Removed, WorkerSlot(3), SequenceHash(1));
        builder.clear(WorkerSlot(3));
        builder.clear(WorkerSlot(4));
        builder.push(Operation::Stored, WorkerSlot(3), SequenceHash(9));
        assert_eq!(builder.operations(), 6);
        let body = builder.take();
        let delta = Delta::decode(&body).unwrap();
        assert_eq!(delta.operations(), 6);
        assert_eq!(
            flat(&delta),
            [
                (Operation::Stored, 3, vec![1, 2]),
                (Operation::Removed, 3, vec![1]),
                (Operation::Cleared, 3, vec![]),
                (Operation::Cleared, 4, vec![]),
                (Operation::Stored, 3, vec![9]),
            ]
        );
        assert!(builder.is_empty());
    }

    #[test]
    fn an_empty_body_is_an_empty_delta() {
        assert_eq!(Delta::decode(&[]).unwrap().operations(), 0);
    }

    #[test]
    fn a_clear_with_hashes_is_refused() {
        assert!(Delta::decode(&[3, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_err());
    }

    #[test]
    fn empty_groups_count_towards_the_limit() {
        let body = [1, 0, 0, 0, 0, 0, 0, 0].repeat(DELTA_OPERATIONS_MAX + 1);
        assert_eq!(Delta::decode(&body).unwrap_err(), WireError::OverLimit);
    }

    #[cfg(not(target_arch = "wasm32"))]
    proptest::proptest! {
        /// Goal: any bytes in, a delta or an error out, and a delta's groups
        /// add up to what it announced.
        #[test]
        fn decoding_is_total(bytes in proptest::collection::vec(0_u8..5, 0..200)) {
            if let Ok(delta) = Delta::decode(&bytes) {
                let sum: usize = delta.groups().map(|group| group.hashes().len().max(1)).sum();
                proptest::prop_assert_eq!(sum, delta.operations());
            }
        }
    }
}
