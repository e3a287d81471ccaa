//! Load: how busy ranks are, as Dynamo's workers and SGLang say it.

use warmpath_core::ids::{DpRank, Worker, WorkerId};

use super::{PlaneError, each_field, finished, optional_u64};
use crate::adapter::msgpack::Reader;
use crate::fleet::RankLoad;

/// Reads the payload of a message on the topic `kv_metrics`. Nil means "as it
/// was".
///
/// # Errors
///
/// A [`PlaneError`].
pub fn decode_kv_metrics(payload: &[u8]) -> Result<(Worker, RankLoad), PlaneError> {
    let mut load = RankLoad::default();
    let (mut worker, mut rank) = (None, 0);
    let mut reader = Reader::new(payload);
    each_field(&mut reader, |name, value| {
        match name {
            "worker_id" => worker = Some(value.u64()?),
            "dp_rank" => rank = value.u32()?,
            "active_decode_blocks" => load.active_decode_blocks = optional_u64(value)?,
            "active_prefill_tokens" => load.active_prefill_tokens = optional_u64(value)?,
            "kv_used_blocks" => load.kv_used_blocks = optional_u64(value)?,
            _ => {}
        }
        Ok(())
    })?;
    finished(&reader)?;
    Ok((worker_of(worker, rank)?, load))
}

/// Reads the payload of a message on the topic `forward-pass-metrics`. The
/// worker's id is a text there.
///
/// # Errors
///
/// A [`PlaneError`].
pub fn decode_forward_pass(payload: &[u8]) -> Result<(Worker, RankLoad), PlaneError> {
    let (mut worker, mut rank) = (None, 0);
    let (mut scheduled, mut queued) = (Requests::default(), Requests::default());
    let mut reader = Reader::new(payload);
    each_field(&mut reader, |name, value| {
        match name {
            "worker_id" => worker = value.text()?.parse().ok(),
            "dp_rank" => rank = value.u32()?,
            "scheduled_requests" => scheduled = Requests::read(value)?,
            "queued_requests" => queued = Requests::read(value)?,
            _ => {}
        }
        Ok(())
    })?;
    finished(&reader)?;
    let load = RankLoad {
        running: scheduled.count(),
        waiting: queued.count(),
        active_prefill_tokens: sum(scheduled.prefill_tokens, queued.prefill_tokens),
        ..RankLoad::default()
    };
    Ok((worker_of(worker, rank)?, load))
}

/// Reads the payload of a message of SGLang's load stream: a list that begins
/// with its name and grows at its end. Returns the rank that it speaks of.
///
/// # Errors
///
/// A [`PlaneError`].
pub fn decode_load_stat(payload: &[u8]) -> Result<(DpRank, RankLoad), PlaneError> {
    let mut reader = Reader::new(payload);
    let values = reader.list()?;
    // Later releases append.
    if values < 6 || reader.text()? != "LoadStat" {
        return Err(PlaneError::Missing);
    }
    let (running, waiting) = (reader.u64()?, reader.u64()?);
    let (tokens, tokens_max) = (reader.u64()?, reader.u64()?);
    let rank = DpRank(if reader.nil()? { 0 } else { reader.u32()? });
    let waiting_tokens = if values > 6 { optional_u64(&mut reader)? } else { None };
    for _ in 7..values {
        reader.skip()?;
    }
    finished(&reader)?;
    let load = RankLoad {
        running: Some(running),
        waiting: Some(waiting),
        active_prefill_tokens: waiting_tokens,
        cache_usage: share(tokens, tokens_max),
        ..RankLoad::default()
    };
    Ok((rank, load))
}

/// Requests of one kind in a pass of the model.
#[derive(Clone, Copy, Debug, Default)]
struct Requests {
    prefill: Option<u64>,
    decode: Option<u64>,
    prefill_tokens: Option<u64>,
}

impl Requests {
    fn read(reader: &mut Reader<'_>) -> Result<Self, PlaneError> {
        let mut requests = Self::default();
        each_field(reader, |name, value| {
            match name {
                "num_prefill_requests" => requests.prefill = optional_u64(value)?,
                "num_decode_requests" => requests.decode = optional_u64(value)?,
                "sum_prefill_tokens" => requests.prefill_tokens = optional_u64(value)?,
                _ => {}
            }
            Ok(())
        })?;
        Ok(requests)
    }

    fn count(self) -> Option<u64> {
        sum(self.prefill, self.decode)
    }
}

fn sum(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    Some(one?.saturating_add(other?))
}

/// `part` of `whole`, between 0 and 1; `None` of nothing.
#[expect(clippy::cast_precision_loss, reason = "a share needs no 53 bits")]
fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| (part as f64 / whole as f64).min(1.0))
}

fn worker_of(id: Option<u64>, rank: u32) -> Result<Worker, PlaneError> {
    Ok(Worker { id: WorkerId(id.ok_or(PlaneError::Missing)?), rank: DpRank(rank) })
}
