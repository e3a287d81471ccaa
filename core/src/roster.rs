//! Roster: the workers that may be chosen, as the feed carries them.
//!
//! A roster frame is always the whole roster. The sidecar sends one whenever
//! anything in it changes; a failed look-up of workers never sends an empty
//! one.

use crate::ids::{DpRank, Worker, WorkerId, WorkerSlot};
use crate::limits::{ENDPOINT_BYTES_MAX, ROSTER_WORKERS_MAX};
use crate::wire::{Reader, WireError, Writer};

/// What a worker does for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Prefill and decode.
    Aggregated,
    /// Prefill only.
    Prefill,
    /// Decode only.
    Decode,
}

/// How far our block hashes agree with those of a worker's own events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Parity {
    /// Compared and equal.
    Exact,
    /// Not compared yet: the worker has not stored a block we could check.
    Unproven,
    /// Its cache cannot be seen: no event source, or blocks that do not fit
    /// the model's block size. Routed by load.
    Blind,
}

/// One choosable worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RosterWorker {
    /// Stands for this incarnation in deltas and bookings.
    pub slot: WorkerSlot,
    /// Who it is.
    pub worker: Worker,
    /// Index of its model in the card frame.
    pub model: u16,
    /// What it does.
    pub role: Role,
    /// How well its cache is known.
    pub parity: Parity,
    /// Where the gateway sends requests: `ip:port`, IPv6 in brackets.
    pub endpoint: String,
    /// Blocks its cache holds; 0 if not known.
    pub total_kv_blocks: u64,
}

/// All workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roster {
    /// In ascending order of slots.
    pub workers: Vec<RosterWorker>,
}

/// Fixed part of a worker's entry in bytes.
const WORKER_BYTES_MIN: usize = 2 + 2 + 1 + 1 + 2 + 8 + 4 + 8 + 4;

impl Roster {
    /// Encodes the body of a roster frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.count(self.workers.len());
        for entry in &self.workers {
            writer.u16(entry.slot.0);
            writer.u16(entry.model);
            writer.u8(match entry.role {
                Role::Aggregated => 0,
                Role::Prefill => 1,
                Role::Decode => 2,
            });
            writer.u8(match entry.parity {
                Parity::Exact => 0,
                Parity::Unproven => 1,
                Parity::Blind => 2,
            });
            writer.u16(0);
            writer.u64(entry.worker.id.0);
            writer.u32(entry.worker.rank.0);
            writer.u64(entry.total_kv_blocks);
            writer.text(&entry.endpoint);
        }
        writer.into_bytes()
    }

    /// Decodes the body of a roster frame.
    ///
    /// # Errors
    ///
    /// A [`WireError`]; the caller keeps the roster it has.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let count = reader.count(ROSTER_WORKERS_MAX, WORKER_BYTES_MIN)?;
        let mut workers = Vec::with_capacity(count);
        for _ in 0..count {
            workers.push(read_worker(&mut reader)?);
        }
        reader.finish()?;
        Ok(Self { workers })
    }
}

fn read_worker(reader: &mut Reader<'_>) -> Result<RosterWorker, WireError> {
    let slot = WorkerSlot(reader.u16()?);
    let model = reader.u16()?;
    let role = match reader.u8()? {
        0 => Role::Aggregated,
        1 => Role::Prefill,
        2 => Role::Decode,
        _ => return Err(WireError::UnknownCase),
    };
    let parity = match reader.u8()? {
        0 => Parity::Exact,
        1 => Parity::Unproven,
        2 => Parity::Blind,
        _ => return Err(WireError::UnknownCase),
    };
    reader.u16()?;
    let id = WorkerId(reader.u64()?);
    let rank = DpRank(reader.u32()?);
    let total_kv_blocks = reader.u64()?;
    let endpoint = reader.text(ENDPOINT_BYTES_MAX)?.to_owned();
    if endpoint.parse::<core::net::SocketAddr>().is_err() {
        // It becomes a header value: nothing but an address may.
        return Err(WireError::UnknownCase);
    }
    let worker = Worker { id, rank };
    Ok(RosterWorker { slot, worker, model, role, parity, endpoint, total_kv_blocks })
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn example() -> Roster {
        let entry = |slot, endpoint: &str| RosterWorker {
            slot: WorkerSlot(slot),
            worker: Worker { id: WorkerId(u64::MAX - u64::from(slot)), rank: DpRank(1) },
            model: 2,
            role: Role::Decode,
            parity: Parity::Unproven,
            endpoint: endpoint.to_owned(),
            total_kv_blocks: 1200,
        };
        Roster { workers: vec![entry(0, "10.0.0.1:8000"), entry(7, "[fd00::1]:8000")] }
    }

    #[test]
    fn a_roster_survives_the_wire() {
        assert_eq!(Roster::decode(&example().encode()), Ok(example()));
        assert_eq!(Roster::decode(&Roster::default().encode()), Ok(Roster::default()));
    }

    #[test]
    fn every_cut_is_refused() {
        let good = example().encode();
        for len in 0..good.len() {
            assert!(Roster::decode(&good[..len]).is_err(), "{len} bytes");
        }
    }

    /// Goal: nothing but an address can become the destination header.
    #[test]
    fn endpoints_that_are_no_address_are_refused() {
        for endpoint in
            ["", "worker.example:80", "10.0.0.1", "10.0.0.1:80\r\nx: y", "10.0.0.1:80,10.0.0.2:80"]
        {
            let mut roster = example();
            roster.workers[0].endpoint = endpoint.to_owned();
            assert_eq!(
                Roster::decode(&roster.encode()),
                Err(WireError::UnknownCase),
                "{endpoint:?}"
            );
        }
    }

    #[cfg(not(target_arch = "wasm32"))]
    proptest::proptest! {
        #[test]
        fn decoding_is_total(at in 0_usize..80, byte in proptest::num::u8::ANY) {
            let mut bytes = example().encode();
            if let Some(target) = bytes.get_mut(at) {
                *target = byte;
            }
            let _ = Roster::decode(&bytes);
        }
    }
}
