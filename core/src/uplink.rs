//! Uplink: what a filter says to the sidecar, and the parts it gets on request.
//!
//! Every stream starts with a [`Hello`]. A *follower* (the VM that holds the
//! lease) then receives the log; a *snapshot reader* receives one snapshot and
//! the stream ends. Snapshot and blob parts are sent only against credit
//! ([`More`]), so that a filter never receives more than it can take in without
//! stalling its worker thread.

use crate::card::BlobId;
use crate::limits::BLOB_PART_BYTES_MAX;
use crate::wire::{Reader, WireError, Writer};

/// What a stream is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The log from a position on, cards and roster first, and blobs on demand.
    Follow,
    /// One snapshot.
    Snapshot,
}

/// First frame of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What the stream is for.
    pub purpose: Purpose,
    /// The filter VM, for logs; unique within its gateway process.
    pub vm: u64,
    /// Epoch of the last log frame applied; 0 for none.
    pub epoch: u64,
    /// Sequence of the last log frame applied.
    pub sequence: u64,
    /// The gateway process, unique among all; 0 from a filter of a release that
    /// does not say, which is not told of other gateways' bookings.
    pub gateway: u64,
}

impl Hello {
    /// Encodes the body.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.u8(match self.purpose {
            Purpose::Follow => 1,
            Purpose::Snapshot => 2,
        });
        writer.u64(self.vm);
        writer.u64(self.epoch);
        writer.u64(self.sequence);
        if self.gateway != 0 {
            writer.u64(self.gateway);
        }
        writer.into_bytes()
    }

    /// Decodes the body.
    ///
    /// # Errors
    ///
    /// A [`WireError`]; the sidecar ends the stream.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let purpose = match reader.u8()? {
            1 => Purpose::Follow,
            2 => Purpose::Snapshot,
            _ => return Err(WireError::UnknownCase),
        };
        let (vm, epoch, sequence) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let gateway = if reader.is_empty() { 0 } else { reader.u64()? };
        reader.finish()?;
        Ok(Self { purpose, vm, epoch, sequence, gateway })
    }
}

/// Room for so many more parts, on top of what was granted before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct More {
    /// Parts.
    pub parts: u32,
}

impl More {
    /// Encodes the body.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.parts.to_le_bytes().to_vec()
    }

    /// Decodes the body.
    ///
    /// # Errors
    ///
    /// A [`WireError`]; the sidecar ends the stream.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let parts = reader.u32()?;
        reader.finish()?;
        Ok(Self { parts })
    }
}

/// Asks for a blob from an offset on; answered by [`BlobPart`]s against credit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchBlob {
    /// Which blob.
    pub blob: BlobId,
    /// First byte wanted.
    pub offset: u64,
}

impl FetchBlob {
    /// Encodes the body.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.u64(self.blob.hash);
        writer.u64(self.blob.len);
        writer.u64(self.offset);
        writer.into_bytes()
    }

    /// Decodes the body.
    ///
    /// # Errors
    ///
    /// A [`WireError`]; the sidecar ends the stream.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let blob = BlobId { hash: reader.u64()?, len: reader.u64()? };
        let offset = reader.u64()?;
        reader.finish()?;
        Ok(Self { blob, offset })
    }
}

/// A part of a blob. An unknown blob is answered by one part without bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobPart<'a> {
    /// Which blob.
    pub blob: BlobId,
    /// Where the part begins.
    pub offset: u64,
    /// Its bytes, at most [`BLOB_PART_BYTES_MAX`].
    pub bytes: &'a [u8],
}

impl<'a> BlobPart<'a> {
    /// Encodes the body.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.u64(self.blob.hash);
        writer.u64(self.blob.len);
        writer.u64(self.offset);
        writer.bytes(self.bytes);
        writer.into_bytes()
    }

    /// Decodes the body.
    ///
    /// # Errors
    ///
    /// A [`WireError`]; also if the part does not lie within its blob.
    pub fn decode(body: &'a [u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let blob = BlobId { hash: reader.u64()?, len: reader.u64()? };
        let offset = reader.u64()?;
        let bytes = reader.bytes(BLOB_PART_BYTES_MAX)?;
        reader.finish()?;
        let end = offset.checked_add(bytes.len() as u64).ok_or(WireError::OverLimit)?;
        if end > blob.len {
            return Err(WireError::OverLimit);
        }
        Ok(Self { blob, offset, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn everything_survives_the_wire() {
        for purpose in [Purpose::Follow, Purpose::Snapshot] {
            for gateway in [0, 4] {
                let hello = Hello { purpose, vm: 1, epoch: 2, sequence: 3, gateway };
                assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
            }
        }
        let more = More { parts: 4 };
        assert_eq!(More::decode(&more.encode()), Ok(more));
        let fetch = FetchBlob { blob: BlobId::of(b"12345"), offset: 2 };
        assert_eq!(FetchBlob::decode(&fetch.encode()), Ok(fetch));
        let part = BlobPart { blob: BlobId::of(b"12345"), offset: 2, bytes: b"345" };
        assert_eq!(BlobPart::decode(&part.encode()), Ok(part));
    }

    #[test]
    fn a_part_outside_its_blob_is_refused() {
        for offset in [3, u64::MAX] {
            let part = BlobPart { blob: BlobId::of(b"12345"), offset, bytes: b"345" };
            assert_eq!(BlobPart::decode(&part.encode()), Err(WireError::OverLimit));
        }
    }
}
