//! Bookings: entries about placed requests, on their way between gateways.
//!
//! A filter sends up what its own gateway books; the sidecar sends down what
//! other gateways and routers have booked. Both are the entries of the ring log
//! as they are ([`crate::entry`]), several to a frame.
//!
//! # Terms
//!
//! - *local*, *remote*: booked by this gateway, or by another router. The two
//!   have names of different ranges ([`REMOTE_BIT`]).
//! - *list*: the whole of one side's bookings, over one or more frames, from one
//!   that begins it to one that ends it. What the other side knows and the list
//!   does not name has ended meanwhile.
//!
//! # Invariants
//!
//! 1. Whoever applies frames twice, or gets a list of what it knows, is where it
//!    was: entries name bookings, and names are never used again.
//! 2. Clocks of different processes are not compared: times in the entries are
//!    the sender's, and so is [`Bookings::now_ms`], from which an age follows.

use std::borrow::Cow;

use crate::entry::Entry;
use crate::limits::{BOOKING_ENTRY_BYTES_MAX, BOOKINGS_FRAME_BYTES, BOOKINGS_FRAME_ENTRIES_MAX};
use crate::load::BookingId;
use crate::wire::{Reader, WireError, Writer};

mod outbox;

pub use outbox::Outbox;

/// Set in the names of remote bookings, clear in those of local ones: a VM's
/// number, the upper half of a local name, stays far below it.
pub const REMOTE_BIT: u64 = 1 << 63;

impl BookingId {
    /// Whether another router has booked it.
    #[must_use]
    pub fn is_remote(self) -> bool {
        self.0 & REMOTE_BIT != 0
    }
}

/// What a frame is in the course of things.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// A list begins with this frame.
    pub begins: bool,
    /// A list ends with this frame.
    pub ends: bool,
    /// Down: whether the sidecar wants to hear of local bookings.
    pub wanted: bool,
}

impl Flags {
    fn to_bits(self) -> u8 {
        u8::from(self.begins) | u8::from(self.ends) << 1 | u8::from(self.wanted) << 2
    }

    fn from_bits(bits: u8) -> Result<Self, WireError> {
        if bits > 7 {
            return Err(WireError::UnknownCase);
        }
        Ok(Self { begins: bits & 1 != 0, ends: bits & 2 != 0, wanted: bits & 4 != 0 })
    }
}

/// A frame's body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bookings<'a> {
    /// What the frame is.
    pub flags: Flags,
    /// The sender's clock, in the milliseconds that its entries are in.
    pub now_ms: u64,
    /// Encoded entries, none of them a feed frame; at most
    /// [`BOOKINGS_FRAME_ENTRIES_MAX`].
    pub entries: Vec<&'a [u8]>,
}

impl<'a> Bookings<'a> {
    /// Encodes the body.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.u8(self.flags.to_bits());
        writer.u64(self.now_ms);
        writer.count(self.entries.len());
        for entry in &self.entries {
            writer.bytes(entry);
        }
        writer.into_bytes()
    }

    /// Decodes the body; what the entries say is left to [`Bookings::read`].
    ///
    /// # Errors
    ///
    /// A [`WireError`].
    pub fn decode(body: &'a [u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let flags = Flags::from_bits(reader.u8()?)?;
        let now_ms = reader.u64()?;
        let count = reader.count(BOOKINGS_FRAME_ENTRIES_MAX, 4)?;
        let entries = (0..count)
            .map(|_| reader.bytes(BOOKING_ENTRY_BYTES_MAX))
            .collect::<Result<Vec<_>, _>>()?;
        reader.finish()?;
        Ok(Self { flags, now_ms, entries })
    }

    /// The entries, and for each that is none about a booking its error.
    pub fn read(&self) -> impl Iterator<Item = Result<Entry<'a>, WireError>> {
        self.entries.iter().map(|bytes| match Entry::decode(bytes)? {
            Entry::Feed(_) | Entry::Noted { .. } => Err(WireError::UnknownCase),
            entry => Ok(entry),
        })
    }
}

/// What of an encoded entry of the ring log others are told: bookings as they
/// are, without what only this gateway remembers of them. The blocks of answers
/// are no business of others, as with Dynamo.
#[must_use]
pub fn told(entry: &[u8]) -> Option<Cow<'_, [u8]>> {
    match Entry::decode(entry) {
        Ok(Entry::Feed(_) | Entry::OutputBlocks { .. }) | Err(_) => None,
        Ok(Entry::Noted { booked, .. }) => Some(booked),
        Ok(_) => Some(Cow::Borrowed(entry)),
    }
}

/// Whether so much more fits a frame.
///
/// - `entries`, `bytes`: what is in it.
/// - `len`: of the next entry.
#[must_use]
pub fn fits_frame(entries: usize, bytes: usize, len: usize) -> bool {
    entries == 0 || (entries < BOOKINGS_FRAME_ENTRIES_MAX && bytes + len <= BOOKINGS_FRAME_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Note;
    use crate::ids::WorkerSlot;
    use crate::limits::BOOKING_BLOCKS_MAX;
    use crate::load::Booking;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn frames_survive_the_wire() {
        let one = Entry::PrefillDone(BookingId(9)).encode();
        let two = Entry::Freed(BookingId(9 | REMOTE_BIT)).encode();
        for bits in 0..8 {
            let flags = Flags::from_bits(bits).unwrap();
            let frame = Bookings { flags, now_ms: 5, entries: vec![&one, &two] };
            let body = frame.encode();
            assert_eq!(Bookings::decode(&body), Ok(frame));
            for len in 0..body.len() {
                assert!(Bookings::decode(&body[..len]).is_err(), "cut at {len}");
            }
        }
        assert_eq!(Bookings::decode(&[8; 13]), Err(WireError::UnknownCase));
    }

    #[test]
    fn a_feed_frame_is_no_booking() {
        let entry = Entry::Feed(b"frame").encode();
        assert_eq!(told(&entry), None);
        let frame = Bookings { flags: Flags::default(), now_ms: 0, entries: vec![&entry] };
        assert_eq!(frame.read().next(), Some(Err(WireError::UnknownCase)));
    }

    #[test]
    fn others_are_told_of_bookings_only() {
        let booked = Entry::Booked(Booking::new(BookingId(1), WorkerSlot(1), 1)).encode();
        let note = Note { session: Some(crate::demands::SessionKey(5)), decision: None };
        let noted = Entry::Noted { booked: booked.as_slice().into(), note }.encode();
        assert_eq!(told(&noted).as_deref(), Some(&booked[..]));
        assert_eq!(told(&booked).as_deref(), Some(&booked[..]));
        let output = Entry::OutputBlocks { id: BookingId(1), blocks: 1, tokens: 2 }.encode();
        assert_eq!(told(&output), None);
        assert_eq!(told(b""), None);
    }

    /// Goal: the longest entry there can be is let through.
    #[test]
    fn the_longest_entry_fits() {
        let blocks = vec![crate::ids::SequenceHash(1); BOOKING_BLOCKS_MAX];
        let longest =
            || Booking { blocks: blocks.clone(), ..Booking::new(BookingId(1), WorkerSlot(1), 1) };
        let entry = Entry::BookedPair { serving: longest(), prefill: longest() }.encode();
        let frame = Bookings { flags: Flags::default(), now_ms: 0, entries: vec![&entry] };
        let body = frame.encode();
        assert_eq!(Bookings::decode(&body).unwrap().read().count(), 1);
        assert!(fits_frame(0, 0, entry.len()) && !fits_frame(1, 10, entry.len()));
    }
}
