//! Message: the protobuf messages that carry frames on the feed's streams.

use warmpath_core::frame::{Frame, Kind};
use warmpath_core::limits::FRAME_BODY_BYTES_MAX;

use crate::host;

/// Sends a frame that is outside the log.
pub(super) fn send(stream: u32, kind: Kind, body: &[u8]) -> bool {
    let frame = Frame { kind, epoch: 0, sequence: 0, body }.encode();
    host::send(stream, &wrap_message(&frame)).is_ok()
}

/// The feed's messages have one field, number 1, of bytes.
const FIELD_FRAME: u8 = 1 << 3 | 2;

/// Encodes the protobuf message that holds a frame.
pub(super) fn wrap_message(frame: &[u8]) -> Vec<u8> {
    let mut message = vec![FIELD_FRAME];
    let mut len = frame.len();
    loop {
        #[expect(clippy::cast_possible_truncation, reason = "7 bits")]
        let low = (len & 0x7f) as u8;
        len >>= 7;
        if len == 0 {
            message.push(low);
            break;
        }
        message.push(low | 0x80);
    }
    message.extend_from_slice(frame);
    message
}

/// The frame in a protobuf message; `None` if it is none of ours.
pub(super) fn unwrap_message(message: &[u8]) -> Option<&[u8]> {
    let (field, mut rest) = message.split_first()?;
    if *field != FIELD_FRAME {
        return None;
    }
    let mut len = 0_usize;
    for shift in [0, 7, 14, 21] {
        let (byte, after) = rest.split_first()?;
        rest = after;
        len |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            let is_whole = len == rest.len() && len <= FRAME_BODY_BYTES_MAX + 64;
            return is_whole.then_some(rest);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_protobuf() {
        assert_eq!(wrap_message(b"abc"), b"\x0a\x03abc");
        assert_eq!(wrap_message(&[7; 300])[..3], *b"\x0a\xac\x02");
        for len in [0, 1, 127, 128, 16_383, 16_384, 1_000_000] {
            let frame = vec![9; len];
            assert_eq!(unwrap_message(&wrap_message(&frame)), Some(frame.as_slice()));
        }
    }

    #[test]
    fn other_messages_are_refused() {
        for message in [&b""[..], b"\x0a", b"\x0a\x05abc", b"\x0a\x02abc", b"\x12\x03abc"] {
            assert_eq!(unwrap_message(message), None, "{message:?}");
        }
        assert_eq!(unwrap_message(b"\x0a\xff\xff\xff\xff\xff"), None);
    }
}
