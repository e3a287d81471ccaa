//! Blobs: tokenizer files by content, cut into parts.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use warmpath_core::card::BlobId;
use warmpath_core::limits::BLOB_PART_BYTES_MAX;
use warmpath_core::uplink::{BlobPart, FetchBlob};

/// The blobs that cards name.
#[derive(Debug, Default)]
pub struct Blobs(Mutex<HashMap<BlobId, Bytes>>);

impl Blobs {
    /// Keeps a blob at its address.
    pub fn add(&self, id: BlobId, bytes: Vec<u8>) {
        self.lock().insert(id, bytes.into());
    }

    /// Drops the blobs that no card names. Whoever is being sent one gets it
    /// whole all the same.
    pub fn retain(&self, named: impl Fn(BlobId) -> bool) {
        self.lock().retain(|id, _| named(*id));
    }

    /// The blob at an address.
    #[must_use]
    pub fn find(&self, id: BlobId) -> Option<Bytes> {
        self.lock().get(&id).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<BlobId, Bytes>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A blob on its way to a filter.
#[derive(Clone, Debug)]
pub struct Fetch {
    wanted: FetchBlob,
    bytes: Bytes,
}

impl Fetch {
    /// Starts where the filter wants it to. An unknown blob, or an offset
    /// behind its end, gives one part without bytes.
    #[must_use]
    pub fn new(wanted: FetchBlob, blobs: &Blobs) -> Self {
        Self { wanted, bytes: blobs.find(wanted.blob).unwrap_or_default() }
    }

    /// The body of the next part, and whether it is the last.
    pub fn next_part(&mut self) -> (Vec<u8>, bool) {
        let start = usize::try_from(self.wanted.offset).unwrap_or(usize::MAX);
        let rest = self.bytes.get(start..).unwrap_or(&[]);
        let bytes = rest.get(..BLOB_PART_BYTES_MAX).unwrap_or(rest);
        let part = BlobPart { blob: self.wanted.blob, offset: self.wanted.offset, bytes };
        let body = part.encode();
        let is_last = bytes.len() == rest.len();
        self.wanted.offset += bytes.len() as u64;
        (body, is_last)
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "the tests' own small numbers")]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_a_blob_from_any_offset() {
        let blobs = Blobs::default();
        let bytes: Vec<u8> = (0..BLOB_PART_BYTES_MAX * 2 + 5).map(|at| at as u8).collect();
        let blob = BlobId::of(&bytes);
        blobs.add(blob, bytes.clone());
        for offset in [0, 1, BLOB_PART_BYTES_MAX, bytes.len() - 1, bytes.len()] {
            let mut fetch = Fetch::new(FetchBlob { blob, offset: offset as u64 }, &blobs);
            let mut got = Vec::new();
            loop {
                let (body, is_last) = fetch.next_part();
                let part = BlobPart::decode(&body).unwrap();
                assert_eq!(part.offset as usize, offset + got.len());
                got.extend_from_slice(part.bytes);
                if is_last {
                    break;
                }
            }
            assert_eq!(got, bytes[offset..]);
        }
    }

    #[test]
    fn blobs_that_nobody_names_go() {
        let blobs = Blobs::default();
        let [first, second] = [b"first", b"other"].map(|bytes| {
            let id = BlobId::of(bytes);
            blobs.add(id, bytes.to_vec());
            id
        });
        blobs.retain(|id| id == second);
        assert_eq!(blobs.find(first), None);
        assert_eq!(blobs.find(second).as_deref(), Some(&b"other"[..]));
    }

    #[test]
    fn an_unknown_blob_is_one_part_without_bytes() {
        let blob = BlobId { hash: 1, len: 10 };
        let mut fetch = Fetch::new(FetchBlob { blob, offset: 0 }, &Blobs::default());
        let (body, is_last) = fetch.next_part();
        assert!(is_last && BlobPart::decode(&body).unwrap().bytes.is_empty());
    }
}
