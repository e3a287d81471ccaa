//! Envelope: what every message of the event plane comes in.
//!
//! On NATS the message is the envelope. On ZMQ there are four frames: topic,
//! publisher and sequence (eight bytes each, the most significant one first),
//! and the envelope behind a version byte and its length.

use bytes::Bytes;

use super::{PlaneError, each_field, finished};
use crate::adapter::msgpack::Reader;

/// The version of the ZMQ frame that we read.
const FRAME_VERSION: u8 = 1;

/// What a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Topic {
    /// What caches hold.
    KvEvents,
    /// How busy ranks are, as workers and routers say it.
    KvMetrics,
    /// How busy ranks are, said with each pass of the model.
    ForwardPass,
    /// What routers have booked.
    ActiveSequences,
    /// What sidecars tell each other of all that they have booked; ours alone.
    Accounts,
}

impl Topic {
    /// All of Dynamo's.
    pub const ALL: [Self; 4] =
        [Self::KvEvents, Self::KvMetrics, Self::ForwardPass, Self::ActiveSequences];

    /// Its name on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::KvEvents => "kv-events",
            Self::KvMetrics => "kv_metrics",
            Self::ForwardPass => "forward-pass-metrics",
            Self::ActiveSequences => "active_sequences_events",
            Self::Accounts => "warmpath_sequences",
        }
    }
}

/// One message, out of its envelope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who sent it.
    pub publisher: u64,
    /// Its number among the publisher's messages, from 0.
    pub sequence: u64,
    /// What is in it.
    pub payload: Bytes,
}

/// Writes an envelope, as a NATS message has it.
///
/// - `at_ms`: the time of day, in milliseconds since 1970.
#[must_use]
pub fn encode_envelope(message: &Message, topic: Topic, at_ms: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(message.payload.len() + 128);
    // Writing to a vector cannot fail.
    let _ = rmp::encode::write_map_len(&mut bytes, 5);
    for (name, value) in [
        ("publisher_id", message.publisher),
        ("sequence", message.sequence),
        ("published_at", at_ms),
    ] {
        let _ = rmp::encode::write_str(&mut bytes, name);
        let _ = rmp::encode::write_uint(&mut bytes, value);
    }
    let _ = rmp::encode::write_str(&mut bytes, "topic");
    let _ = rmp::encode::write_str(&mut bytes, topic.name());
    let _ = rmp::encode::write_str(&mut bytes, "payload");
    let _ = rmp::encode::write_bin(&mut bytes, &message.payload);
    bytes
}

/// Writes the frames of a ZMQ message.
///
/// - `named`: frame 0, as in [`decode_frames`].
/// - `envelope`: of [`encode_envelope`], of the same message.
#[must_use]
pub fn encode_frames(message: &Message, named: &str, envelope: &[u8]) -> [Bytes; 4] {
    let mut frame = Vec::with_capacity(envelope.len() + 5);
    frame.push(FRAME_VERSION);
    // Messages are far shorter than 32 bits can say.
    frame.extend_from_slice(&u32::try_from(envelope.len()).unwrap_or(u32::MAX).to_be_bytes());
    frame.extend_from_slice(envelope);
    [
        Bytes::copy_from_slice(named.as_bytes()),
        Bytes::copy_from_slice(&message.publisher.to_be_bytes()),
        Bytes::copy_from_slice(&message.sequence.to_be_bytes()),
        frame.into(),
    ]
}

/// Reads an envelope, as a NATS message has it.
///
/// - `topic`: what the message must be about.
///
/// # Errors
///
/// A [`PlaneError`]; [`PlaneError::Contradiction`] if it is about something else.
pub fn decode_envelope(bytes: &Bytes, topic: Topic) -> Result<Message, PlaneError> {
    let (mut publisher, mut sequence, mut payload) = (None, None, None);
    let mut named = None;
    let mut reader = Reader::new(bytes);
    each_field(&mut reader, |name, value| {
        match name {
            "publisher_id" => publisher = Some(value.u64()?),
            "sequence" => sequence = Some(value.u64()?),
            "topic" => named = Some(value.text()?),
            "payload" => payload = Some(value.bytes()?),
            _ => {}
        }
        Ok(())
    })?;
    finished(&reader)?;
    if named.is_some_and(|named| named != topic.name()) {
        return Err(PlaneError::Contradiction);
    }
    Ok(Message {
        publisher: publisher.ok_or(PlaneError::Missing)?,
        sequence: sequence.ok_or(PlaneError::Missing)?,
        payload: bytes.slice_ref(payload.ok_or(PlaneError::Missing)?),
    })
}

/// Reads the frames of a ZMQ message.
///
/// - `named`: what frame 0 must be: the bare topic from a publisher's own
///   socket, the full subject from a broker.
/// - `topic`: what the message must be about.
///
/// # Errors
///
/// A [`PlaneError`].
pub fn decode_frames(frames: &[Bytes], named: &str, topic: Topic) -> Result<Message, PlaneError> {
    let [name, publisher, sequence, frame] = frames else { return Err(PlaneError::Frames) };
    if name.as_ref() != named.as_bytes() {
        return Err(PlaneError::Contradiction);
    }
    let number = |bytes: &Bytes| {
        bytes.as_ref().try_into().map(u64::from_be_bytes).map_err(|_| PlaneError::Frames)
    };
    let (publisher, sequence) = (number(publisher)?, number(sequence)?);
    let (version, rest) = frame.split_first().ok_or(PlaneError::Frames)?;
    if *version != FRAME_VERSION {
        return Err(PlaneError::Version);
    }
    let (len, envelope) = rest.split_first_chunk::<4>().ok_or(PlaneError::Frames)?;
    if usize::try_from(u32::from_be_bytes(*len)) != Ok(envelope.len()) {
        return Err(PlaneError::Frames);
    }
    let message = decode_envelope(&frame.slice_ref(envelope), topic)?;
    if (message.publisher, message.sequence) != (publisher, sequence) {
        return Err(PlaneError::Contradiction);
    }
    Ok(message)
}
