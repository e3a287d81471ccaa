//! Frame: the envelope of everything that travels on the feed.
//!
//! The sidecar sends frames down a gRPC stream; the leading filter VM appends
//! them to the ring log in the gateway's shared data; every VM decodes them.
//! Filters send frames up the same stream.
//!
//! ```text
//! offset size
//!      0    3  "WPF"
//!      3    1  version, 1
//!      4    1  kind
//!      5    3  zero
//!      8    8  epoch: the sidecar's incarnation, never zero
//!     16    8  sequence: position in that epoch's log; 0 outside the log
//!     24    4  body length in bytes
//!     28    4  zero
//!     32    8  XXH3-64 (seed 0) over bytes 0..32, then the body
//!     40    …  body
//! ```
//!
//! # Terms
//!
//! - *epoch*: one life of a sidecar. Positions of different epochs cannot be
//!   compared; a new epoch means that the index must be taken anew.
//! - *log frame*: a frame that changes state ([`Kind::Delta`],
//!   [`Kind::Roster`], [`Kind::Card`], [`Kind::Settings`]); these have consecutive sequence
//!   numbers from 1.
//!
//! # Invariants
//!
//! 1. A frame is believed whole or not at all: the checksum covers header and
//!    body, and is checked before anything else is read.
//! 2. A version this code does not know is refused, not guessed at.

use xxhash_rust::xxh3::Xxh3;

use crate::limits::FRAME_BODY_BYTES_MAX;
use crate::wire::{Reader, WireError, Writer};

const MAGIC: [u8; 3] = *b"WPF";
const VERSION: u8 = 1;

/// Length of a frame's header in bytes.
pub const HEADER_BYTES: usize = 40;

/// What a frame's body holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Down, in the log: [`crate::delta`].
    Delta = 1,
    /// Down, in the log: [`crate::roster`], the whole of it.
    Roster = 2,
    /// Down, in the log: [`crate::card`], all models.
    Card = 3,
    /// Down, every [`crate::limits::HEARTBEAT_MS`]: nothing but the position. Its
    /// sequence is that of the last log frame sent on this stream before it.
    Heartbeat = 4,
    /// Down, to a follower: the position it asked to resume from is not held
    /// any more (or is of another epoch). Its sequence is that of the last log
    /// frame before the stream continues. The body is empty.
    Resync = 5,
    /// Down, to a snapshot reader: the snapshot shows the log's state after the
    /// frame of this sequence. Body: [`crate::delta::SnapshotStart`].
    SnapshotStart = 6,
    /// Down, to a snapshot reader: stored operations, as in a delta.
    SnapshotPart = 7,
    /// Down, to a snapshot reader: complete.
    SnapshotEnd = 8,
    /// Down, on request: a part of a blob ([`crate::uplink::BlobPart`]).
    BlobPart = 9,
    /// Down, in the log: [`crate::settings`], of all models.
    Settings = 10,
    /// Down, beside the log: what other routers have booked
    /// ([`crate::bookings`]). To a follower the list first and then every change;
    /// to a snapshot reader what there is when the snapshot ends. Its sequence
    /// is 0.
    Remote = 11,
    /// Down, beside the log, when it has changed and every few seconds: how full
    /// the workers' caches are ([`crate::cache_usage`]). Replaces the one before.
    CacheUsage = 12,
    /// Up: first frame of every stream ([`crate::uplink::Hello`]).
    Hello = 32,
    /// Up: the reader has room for more parts ([`crate::uplink::More`]).
    More = 33,
    /// Up: wants a blob ([`crate::uplink::FetchBlob`]).
    FetchBlob = 34,
    /// Up: what this gateway has booked ([`crate::bookings`]).
    Bookings = 35,
}

impl Kind {
    fn from_u8(value: u8) -> Result<Self, WireError> {
        Ok(match value {
            1 => Self::Delta,
            2 => Self::Roster,
            3 => Self::Card,
            4 => Self::Heartbeat,
            5 => Self::Resync,
            6 => Self::SnapshotStart,
            7 => Self::SnapshotPart,
            8 => Self::SnapshotEnd,
            9 => Self::BlobPart,
            10 => Self::Settings,
            11 => Self::Remote,
            12 => Self::CacheUsage,
            32 => Self::Hello,
            33 => Self::More,
            34 => Self::FetchBlob,
            35 => Self::Bookings,
            _ => return Err(WireError::UnknownCase),
        })
    }

    /// Whether frames of this kind are numbered consecutively.
    #[must_use]
    pub fn is_in_log(self) -> bool {
        matches!(self, Self::Delta | Self::Roster | Self::Card | Self::Settings)
    }
}

/// A decoded envelope. The body is checked for integrity, not yet for meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// What the body holds.
    pub kind: Kind,
    /// The sidecar's incarnation.
    pub epoch: u64,
    /// Position in the epoch's log.
    pub sequence: u64,
    /// The content.
    pub body: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Encodes the frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.raw(&MAGIC);
        writer.u8(VERSION);
        writer.u8(self.kind as u8);
        writer.raw(&[0; 3]);
        writer.u64(self.epoch);
        writer.u64(self.sequence);
        writer.count(self.body.len());
        writer.u32(0);
        let mut bytes = writer.into_bytes();
        let checksum = checksum(&bytes, self.body);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes.extend_from_slice(self.body);
        bytes
    }

    /// Decodes exactly one frame.
    ///
    /// # Errors
    ///
    /// A [`WireError`]; the caller drops the bytes, counts the reason and asks
    /// for a resync if the frame could have been of the log.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let header = reader.take(HEADER_BYTES - 8)?;
        let expected = reader.u64()?;
        let mut fields = Reader::new(header);
        if fields.take(3)? != MAGIC || fields.u8()? != VERSION {
            return Err(WireError::NotAFrame);
        }
        let kind = fields.u8()?;
        fields.take(3)?;
        let epoch = fields.u64()?;
        let sequence = fields.u64()?;
        let body_len = fields.u32()? as usize;
        if body_len > FRAME_BODY_BYTES_MAX {
            return Err(WireError::OverLimit);
        }
        let body = reader.take(body_len)?;
        reader.finish()?;
        if checksum(header, body) != expected {
            return Err(WireError::Checksum);
        }
        Ok(Self { kind: Kind::from_u8(kind)?, epoch, sequence, body })
    }
}

fn checksum(header: &[u8], body: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(header);
    hasher.update(body);
    hasher.digest()
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const EXAMPLE: Frame<'static> =
        Frame { kind: Kind::Delta, epoch: 7, sequence: 9, body: b"body" };

    #[test]
    fn a_frame_survives_the_wire() {
        assert_eq!(Frame::decode(&EXAMPLE.encode()), Ok(EXAMPLE));
    }

    /// Goal: the layout does not change unnoticed; an old filter must be able
    /// to read a new sidecar's frames of the same version.
    #[test]
    fn the_layout_is_pinned() {
        let bytes = EXAMPLE.encode();
        assert_eq!(bytes[..8], [b'W', b'P', b'F', 1, 1, 0, 0, 0]);
        assert_eq!(bytes[8..16], 7_u64.to_le_bytes());
        assert_eq!(bytes[16..24], 9_u64.to_le_bytes());
        assert_eq!(bytes[24..32], [4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[40..], *b"body");
    }

    /// Goal: no damage of one bit goes unseen.
    /// Method: every bit of a frame, flipped alone.
    #[test]
    fn every_flipped_bit_is_refused() {
        let good = EXAMPLE.encode();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Frame::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn every_cut_is_refused() {
        let good = EXAMPLE.encode();
        for len in 0..good.len() {
            assert!(Frame::decode(&good[..len]).is_err(), "{len} bytes");
        }
        let mut long = good;
        long.push(0);
        assert_eq!(Frame::decode(&long), Err(WireError::TrailingBytes));
    }

    #[test]
    fn a_hostile_length_is_refused_before_it_is_believed() {
        let mut bytes = EXAMPLE.encode();
        bytes[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Frame::decode(&bytes), Err(WireError::OverLimit));
    }
}
