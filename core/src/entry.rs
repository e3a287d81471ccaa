//! Entry: what the ring log carries.
//!
//! Feed frames as they came, and what happens to bookings.

use std::borrow::Cow;

use crate::approximate::{Decision, Retention};
use crate::demands::SessionKey;
use crate::ids::{SequenceHash, WorkerSlot};
use crate::limits::BOOKING_BLOCKS_MAX;
use crate::load::{Booking, BookingId};
use crate::wire::{Reader, WireError, Writer};

/// One entry of the ring log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry<'a> {
    /// An encoded feed frame ([`crate::frame`]).
    Feed(&'a [u8]),
    /// A request was placed.
    Booked(Booking),
    /// A request was placed on two workers: one computes its prompt, the other
    /// answers. One entry, so that both are booked or neither.
    BookedPair {
        /// The worker that answers.
        serving: Booking,
        /// The worker that computes the prompt.
        prefill: Booking,
    },
    /// A request was placed, and more is to be remembered of it.
    Noted {
        /// The request's booking or bookings: an encoded entry.
        booked: Cow<'a, [u8]>,
        /// What else.
        note: Note,
    },
    /// Its worker has begun to answer.
    PrefillDone(BookingId),
    /// Its answer fills more blocks.
    OutputBlocks {
        /// The request.
        id: BookingId,
        /// Blocks that the answer fills beyond those of the prompt, in all.
        blocks: u32,
        /// Tokens of the answer so far.
        tokens: u32,
    },
    /// It still runs, at this time of the host's monotonic clock.
    Refreshed(BookingId, u64),
    /// It has ended.
    Freed(BookingId),
}

/// What is remembered of a placed request besides its bookings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Note {
    /// The session that it belongs to.
    pub session: Option<SessionKey>,
    /// The blocks that its worker will hold, where own decisions stand for caches.
    pub decision: Option<Decision>,
}

impl<'a> Entry<'a> {
    /// Encodes the entry. Of a booking's blocks at most
    /// [`BOOKING_BLOCKS_MAX`] are kept.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        match self {
            Self::Feed(frame) => {
                writer.u8(1);
                writer.raw(frame);
            }
            Self::Booked(booking) => {
                writer.u8(2);
                write_booking(&mut writer, booking);
            }
            Self::BookedPair { serving, prefill } => {
                writer.u8(6);
                write_booking(&mut writer, serving);
                write_booking(&mut writer, prefill);
            }
            Self::Noted { booked, note } => {
                writer.u8(9);
                write_note(&mut writer, note);
                writer.raw(booked);
            }
            Self::PrefillDone(id) => {
                writer.u8(3);
                writer.u64(id.0);
            }
            Self::OutputBlocks { id, blocks, tokens } => {
                writer.u8(7);
                writer.u64(id.0);
                writer.u32(*blocks);
                writer.u32(*tokens);
            }
            Self::Refreshed(id, at_ms) => {
                writer.u8(4);
                writer.u64(id.0);
                writer.u64(*at_ms);
            }
            Self::Freed(id) => {
                writer.u8(5);
                writer.u64(id.0);
            }
        }
        writer.into_bytes()
    }

    /// Whether an encoded entry is a feed frame.
    #[must_use]
    pub fn is_feed(bytes: &[u8]) -> bool {
        bytes.first() == Some(&1)
    }

    /// Decodes an entry.
    ///
    /// # Errors
    ///
    /// A [`WireError`]; the reader passes over the entry and counts it.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let entry = match reader.u8()? {
            1 => return Ok(Self::Feed(bytes.get(1..).unwrap_or_default())),
            2 => Self::Booked(read_booking(&mut reader)?),
            3 => Self::PrefillDone(BookingId(reader.u64()?)),
            4 => Self::Refreshed(BookingId(reader.u64()?), reader.u64()?),
            5 => Self::Freed(BookingId(reader.u64()?)),
            6 => Self::BookedPair {
                serving: read_booking(&mut reader)?,
                prefill: read_booking(&mut reader)?,
            },
            9 => {
                let note = read_note(&mut reader)?;
                return Ok(Self::Noted { booked: Cow::Borrowed(reader.rest()), note });
            }
            7 => Self::OutputBlocks {
                id: BookingId(reader.u64()?),
                blocks: reader.u32()?,
                tokens: reader.u32()?,
            },
            _ => return Err(WireError::UnknownCase),
        };
        reader.finish()?;
        Ok(entry)
    }
}

fn write_note(writer: &mut Writer, note: &Note) {
    writer.u8(u8::from(note.session.is_some()) | u8::from(note.decision.is_some()) << 1);
    if let Some(SessionKey(key)) = note.session {
        writer.raw(&key.to_le_bytes());
    }
    if let Some(Decision { id, slot, at_ms, retention, hashes }) = &note.decision {
        writer.u64(id.0);
        writer.u16(slot.0);
        writer.u64(*at_ms);
        let (kind, amount) = match retention {
            Retention::Time(ttl_ms) => (1, ttl_ms),
            Retention::Room(blocks) => (2, blocks),
        };
        writer.u8(kind);
        writer.u64(*amount);
        write_hashes(writer, hashes);
    }
}

fn read_note(reader: &mut Reader<'_>) -> Result<Note, WireError> {
    let parts = reader.u8()?;
    if parts > 3 {
        return Err(WireError::UnknownCase);
    }
    let session = match parts & 1 {
        0 => None,
        _ => {
            let (low, high) = (reader.u64()?, reader.u64()?);
            Some(SessionKey(u128::from(high) << 64 | u128::from(low)))
        }
    };
    let decision = match parts & 2 {
        0 => None,
        _ => Some(Decision {
            id: BookingId(reader.u64()?),
            slot: WorkerSlot(reader.u16()?),
            at_ms: reader.u64()?,
            retention: match (reader.u8()?, reader.u64()?) {
                (1, ttl_ms) => Retention::Time(ttl_ms),
                (2, blocks) => Retention::Room(blocks),
                _ => return Err(WireError::UnknownCase),
            },
            hashes: read_hashes(reader)?,
        }),
    };
    Ok(Note { session, decision })
}

fn write_hashes(writer: &mut Writer, hashes: &[SequenceHash]) {
    let hashes = hashes.get(..BOOKING_BLOCKS_MAX).unwrap_or(hashes);
    writer.count(hashes.len());
    for hash in hashes {
        writer.u64(hash.0);
    }
}

fn read_hashes(reader: &mut Reader<'_>) -> Result<Vec<SequenceHash>, WireError> {
    let count = reader.count(BOOKING_BLOCKS_MAX, 8)?;
    (0..count).map(|_| reader.u64().map(SequenceHash)).collect()
}

fn write_booking(writer: &mut Writer, booking: &Booking) {
    writer.u64(booking.id.0);
    writer.u16(booking.slot.0);
    writer.u32(booking.prefill_tokens);
    writer.u64(booking.at_ms);
    writer.u32(booking.unshared_blocks);
    writer.u32(booking.expected_output_tokens);
    let blocks = booking.blocks.get(..BOOKING_BLOCKS_MAX).unwrap_or(&booking.blocks);
    writer.count(blocks.len());
    for hash in blocks {
        writer.u64(hash.0);
    }
}

fn read_booking(reader: &mut Reader<'_>) -> Result<Booking, WireError> {
    let id = BookingId(reader.u64()?);
    let slot = WorkerSlot(reader.u16()?);
    let prefill_tokens = reader.u32()?;
    let at_ms = reader.u64()?;
    let unshared_blocks = reader.u32()?;
    let expected_output_tokens = reader.u32()?;
    let count = reader.count(BOOKING_BLOCKS_MAX, 8)?;
    let blocks =
        (0..count).map(|_| reader.u64().map(SequenceHash)).collect::<Result<Vec<_>, _>>()?;
    Ok(Booking {
        prefill_tokens,
        blocks,
        unshared_blocks,
        expected_output_tokens,
        ..Booking::new(id, slot, at_ms)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn booking(blocks: usize) -> Booking {
        Booking {
            prefill_tokens: 77,
            blocks: (0..blocks as u64).map(SequenceHash).collect(),
            unshared_blocks: 12,
            expected_output_tokens: 200,
            ..Booking::new(BookingId(1 << 40), WorkerSlot(3), 5)
        }
    }

    #[test]
    fn entries_survive_the_wire() {
        for entry in [
            Entry::Feed(b"frame"),
            Entry::Booked(booking(3)),
            Entry::BookedPair { serving: booking(0), prefill: booking(2) },
            Entry::PrefillDone(BookingId(9)),
            Entry::OutputBlocks { id: BookingId(9), blocks: 2, tokens: 18 },
            Entry::Refreshed(BookingId(9), 10),
            Entry::Freed(BookingId(9)),
        ] {
            let bytes = entry.encode();
            assert_eq!(Entry::decode(&bytes), Ok(entry.clone()));
            assert_eq!(Entry::is_feed(&bytes), matches!(entry, Entry::Feed(_)));
            if !matches!(entry, Entry::Feed(_)) {
                for len in 0..bytes.len() {
                    assert!(Entry::decode(&bytes[..len]).is_err(), "{entry:?} cut at {len}");
                }
            }
        }
    }

    #[test]
    fn notes_survive_the_wire() {
        let booked = Entry::Booked(booking(2)).encode();
        let hashes = vec![SequenceHash(7), SequenceHash(u64::MAX)];
        let (id, slot, retention) = (BookingId(9), WorkerSlot(4), Retention::Room(77));
        let decision = Decision { id, slot, at_ms: 5, retention, hashes };
        let session = Some(SessionKey(u128::MAX - 5));
        for note in [
            Note::default(),
            Note { session, decision: None },
            Note { session: None, decision: Some(decision.clone()) },
            Note { session, decision: Some(decision) },
        ] {
            let entry = Entry::Noted { booked: Cow::Borrowed(&booked), note };
            let bytes = entry.encode();
            assert_eq!(Entry::decode(&bytes), Ok(entry));
            for len in 0..bytes.len() - booked.len() {
                assert!(Entry::decode(&bytes[..len]).is_err(), "cut at {len}");
            }
        }
    }

    /// Goal: the bytes of bookings do not change unnoticed: with them the number
    /// in the keys of the shared data must.
    #[test]
    fn the_bytes_of_bookings_are_known() {
        let entry = Entry::BookedPair { serving: booking(0), prefill: booking(1) };
        let serving = "0000000000010000 0300 4d000000 0500000000000000 0c000000 c8000000 00000000";
        let prefill = "0000000000010000 0300 4d000000 0500000000000000 0c000000 c8000000 01000000 0000000000000000";
        let hex: String = entry.encode().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, format!("06{serving}{prefill}").replace(' ', ""));
        let output = Entry::OutputBlocks { id: BookingId(9), blocks: 2, tokens: 18 };
        let bytes = [7, 9, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 18, 0, 0, 0];
        assert_eq!(output.encode(), bytes);
    }

    #[cfg(not(target_arch = "wasm32"))]
    proptest::proptest! {
        #[test]
        fn decoding_is_total(at in 0_usize..120, byte in proptest::num::u8::ANY) {
            let entry = Entry::BookedPair { serving: booking(2), prefill: booking(3) };
            let mut bytes = entry.encode();
            if let Some(target) = bytes.get_mut(at) {
                *target = byte;
            }
            let _ = Entry::decode(&bytes);
        }
    }

    #[test]
    fn a_long_prompt_keeps_its_leading_blocks() {
        let bytes = Entry::Booked(booking(BOOKING_BLOCKS_MAX + 5)).encode();
        assert_eq!(Entry::decode(&bytes), Ok(Entry::Booked(booking(BOOKING_BLOCKS_MAX))));
    }
}
