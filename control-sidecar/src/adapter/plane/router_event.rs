//! Router event: what one rank's cache holds, as Dynamo's relay says it.
//!
//! The relay has hashed the blocks already, has counted copies, and has left out
//! what is not the main attention's.

use warmpath_core::event::{Group, Hashed, KvEvent, Medium, Removed};
use warmpath_core::ids::{BlockHash, DpRank, EngineHash, Worker, WorkerId};
use warmpath_core::limits::{BATCH_EVENTS_MAX, EVENT_BLOCKS_MAX};

use super::{PlaneError, each_field, finished};
use crate::adapter::Skip;
use crate::adapter::msgpack::{MsgpackError, Reader, Shape};

/// One numbered event of one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouterEvent {
    /// Whose cache it is about.
    pub worker: Worker,
    /// Its number.
    pub id: u64,
    /// What it changes.
    pub change: Change,
    /// Why it, or a part of it, was passed over.
    pub skipped: Option<Skip>,
}

/// What a router event changes for us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing that is indexed.
    Nothing,
    /// The rank's cache changed.
    Event(KvEvent),
    /// Everything of every domain went. It holds whatever is missing before it,
    /// so it need not wait for that.
    ClearedAll,
}

/// Reads the payload of a message on the topic `kv-events`: a list of events.
///
/// # Errors
///
/// A [`PlaneError`]; nothing of the message may be used then.
pub fn decode_events(payload: &[u8]) -> Result<Vec<RouterEvent>, PlaneError> {
    let mut reader = Reader::new(payload);
    let events = read_events(&mut reader, BATCH_EVENTS_MAX)?;
    finished(&reader)?;
    Ok(events)
}

/// Reads a list of at most `events_max` events.
pub(super) fn read_events(
    reader: &mut Reader<'_>,
    events_max: usize,
) -> Result<Vec<RouterEvent>, PlaneError> {
    let count = reader.list()?;
    if count > events_max {
        return Err(PlaneError::TooMany);
    }
    (0..count).map(|_| read_event(reader)).collect()
}

/// Whose copy of the blocks an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Domain {
    /// Not said, as by older workers.
    Legacy,
    Worker,
    CacheOwner,
    /// Nil, or a word that is not known.
    Invalid,
}

impl Domain {
    fn read(reader: &mut Reader<'_>) -> Self {
        match reader.text() {
            Ok("worker") => Self::Worker,
            Ok("cache_owner") => Self::CacheOwner,
            _ => Self::Invalid,
        }
    }
}

fn read_tier(reader: &mut Reader<'_>) -> Option<Medium> {
    match reader.text() {
        Ok("device") => Some(Medium::Device),
        Ok("host_pinned") => Some(Medium::HostPinned),
        Ok("disk") => Some(Medium::Disk),
        Ok("external") => Some(Medium::External),
        _ => None,
    }
}

fn read_event(reader: &mut Reader<'_>) -> Result<RouterEvent, PlaneError> {
    let (mut worker, mut inside) = (None, None);
    let (mut tier, mut domain) = (Some(Medium::Device), Domain::Legacy);
    each_field(reader, |name, value| {
        match name {
            "worker_id" => worker = Some(value.u64()?),
            "storage_tier" => tier = read_tier(value),
            "residency_domain" => domain = Domain::read(value),
            "event" => inside = Some(*value),
            _ => {}
        }
        Ok(())
    })?;
    let (mut id, mut data, mut rank) = (None, None, 0);
    each_field(&mut inside.ok_or(PlaneError::Missing)?, |name, value| {
        match name {
            "event_id" => id = Some(value.u64()?),
            "dp_rank" => rank = value.u32()?,
            "data" => data = Some(*value),
            _ => {}
        }
        Ok(())
    })?;
    let id = id.ok_or(PlaneError::Missing)?;
    let worker = Worker { id: WorkerId(worker.ok_or(PlaneError::Missing)?), rank: DpRank(rank) };
    let (change, skipped) = match data {
        Some(data) => read_change(data, tier, domain),
        None => (Change::Nothing, Some(Skip::Malformed)),
    };
    Ok(RouterEvent { worker, id, change, skipped })
}

/// Reads what happened: the word `cleared`, or a map of one key.
fn read_change(
    mut data: Reader<'_>,
    tier: Option<Medium>,
    domain: Domain,
) -> (Change, Option<Skip>) {
    let skip = |reason| (Change::Nothing, Some(reason));
    match domain {
        Domain::Invalid => return skip(Skip::Malformed),
        Domain::CacheOwner => return skip(Skip::NotTheWorkers),
        Domain::Legacy | Domain::Worker => {}
    }
    let kind = if data.shape() == Ok(Shape::Map) {
        match data.map() {
            Ok(1) => data.text(),
            _ => Err(MsgpackError::Shape),
        }
    } else {
        data.text()
    };
    match (kind, tier) {
        (Ok("cleared"), _) if domain == Domain::Legacy => (Change::ClearedAll, None),
        (Ok("cleared"), _) => (Change::Event(KvEvent::Cleared), None),
        (Ok("stored" | "removed"), None) => skip(Skip::UnknownMedium),
        (Ok("stored"), Some(medium)) => match read_stored(&mut data, medium) {
            Ok(hashed) => (Change::Event(KvEvent::Hashed(hashed)), None),
            Err(_) => skip(Skip::Malformed),
        },
        (Ok("removed"), Some(medium)) => match read_removed(&mut data, medium) {
            Ok(removed) => (Change::Event(KvEvent::Removed(removed)), None),
            // What may be gone is never reported as held.
            Err(_) => (Change::Event(KvEvent::Cleared), Some(Skip::Malformed)),
        },
        (Ok(_), _) => skip(Skip::UnknownEvent),
        (Err(_), _) => skip(Skip::Malformed),
    }
}

fn read_stored(reader: &mut Reader<'_>, medium: Medium) -> Result<Hashed, PlaneError> {
    let (mut blocks, mut parent) = (None, None);
    each_field(reader, |name, value| {
        match name {
            "parent_hash" if !value.nil()? => parent = Some(EngineHash(value.integer_bits()?)),
            "blocks" => blocks = Some(read_blocks(value)?),
            _ => {}
        }
        Ok(())
    })?;
    Ok(Hashed { blocks: blocks.ok_or(PlaneError::Missing)?, parent, medium })
}

fn read_blocks(reader: &mut Reader<'_>) -> Result<Vec<(EngineHash, BlockHash)>, PlaneError> {
    let count = reader.list()?;
    if count > EVENT_BLOCKS_MAX {
        return Err(PlaneError::TooMany);
    }
    let mut blocks = Vec::with_capacity(count);
    for _ in 0..count {
        let (mut engine, mut tokens) = (None, None);
        each_field(reader, |name, value| {
            match name {
                "block_hash" => engine = Some(EngineHash(value.integer_bits()?)),
                // The hashes of images and other objects are in it already.
                "tokens_hash" => tokens = Some(BlockHash(value.integer_bits()?)),
                _ => {}
            }
            Ok(())
        })?;
        blocks.push((engine.ok_or(PlaneError::Missing)?, tokens.ok_or(PlaneError::Missing)?));
    }
    Ok(blocks)
}

fn read_removed(reader: &mut Reader<'_>, medium: Medium) -> Result<Removed, PlaneError> {
    let mut pages = None;
    each_field(reader, |name, value| {
        if name == "block_hashes" {
            let count = value.list()?;
            if count > EVENT_BLOCKS_MAX {
                return Err(PlaneError::TooMany);
            }
            let hashes: Result<Vec<_>, _> =
                (0..count).map(|_| value.integer_bits().map(EngineHash)).collect();
            pages = Some(hashes?);
        }
        Ok(())
    })?;
    let pages = pages.ok_or(PlaneError::Missing)?;
    Ok(Removed { pages, medium, group: Group::default() })
}
