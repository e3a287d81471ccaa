//! Roster: the workers that may be chosen, and the LoRA adapters that they hold,
//! as the feed carries them.
//!
//! # Terms
//!
//! - *adapter*: a LoRA adapter, which requests name in place of its base model.
//! - *holder*: a worker that has an adapter loaded.
//!
//! A roster frame is always the whole roster. The sidecar sends one whenever
//! anything in it changes; a failed look-up of workers never sends an empty
//! one.

use crate::ids::{DpRank, Worker, WorkerId, WorkerSlot};
use crate::limits::{
    ADAPTER_HOLDERS_MAX, ADAPTER_NAME_BYTES_MAX, ADAPTERS_MAX, ENDPOINT_BYTES_MAX,
    FRAME_BODY_BYTES_MAX, ROSTER_WORKERS_MAX,
};
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
    /// Stands for the Dynamo namespace, and so the generation, that it belongs
    /// to; 0 if there are none. Prefill and decode workers work together only
    /// within one.
    pub namespace: u32,
    /// Where the gateway sends requests: `ip:port`, IPv6 in brackets. Empty for
    /// a worker that is reached through a Dynamo frontend, which knows its id.
    pub endpoint: String,
    /// Blocks its cache holds; 0 if not known.
    pub total_kv_blocks: u64,
}

/// One adapter of one model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adapter {
    /// Name that requests use, at most [`ADAPTER_NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// Index of its base model in the card frame.
    pub model: u16,
    /// Name that enters the blocks' hashes, as the engines know it; of the same
    /// length at most.
    pub lora: String,
    /// Its holders, in ascending order; empty if they are not known.
    pub holders: Vec<WorkerSlot>,
}

/// All workers and adapters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roster {
    /// In ascending order of slots.
    pub workers: Vec<RosterWorker>,
    /// At most [`ADAPTERS_MAX`], with at most [`ADAPTER_HOLDERS_MAX`] holders
    /// together.
    pub adapters: Vec<Adapter>,
}

/// Fixed part of a worker's entry in bytes.
const WORKER_BYTES_MIN: usize = 2 + 2 + 1 + 1 + 2 + 8 + 4 + 8 + 4 + 4;

/// Fixed part of an adapter's entry in bytes.
const ADAPTER_BYTES_MIN: usize = 4 + 2 + 4 + 4;

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
            writer.u32(entry.namespace);
            writer.text(&entry.endpoint);
        }
        writer.count(self.adapters.len());
        for adapter in &self.adapters {
            writer.text(&adapter.name);
            writer.u16(adapter.model);
            writer.text(&adapter.lora);
            writer.count(adapter.holders.len());
            for holder in &adapter.holders {
                writer.u16(holder.0);
            }
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
        let count = reader.count(ADAPTERS_MAX, ADAPTER_BYTES_MIN)?;
        let mut adapters = Vec::with_capacity(count);
        let mut room = ADAPTER_HOLDERS_MAX;
        for _ in 0..count {
            let adapter = read_adapter(&mut reader, room)?;
            room -= adapter.holders.len();
            adapters.push(adapter);
        }
        reader.finish()?;
        Ok(Self { workers, adapters })
    }

    /// Leaves out the adapters that do not fit a frame with the others: those
    /// with a name that is empty or too long, and those for which there is no
    /// room, the last first. Returns how many.
    ///
    /// Workers always fit: [`ROSTER_WORKERS_MAX`] of them with the longest
    /// endpoints.
    pub fn fit(&mut self) -> usize {
        let of_worker = |entry: &RosterWorker| WORKER_BYTES_MIN + entry.endpoint.len();
        let mut bytes = 4 + self.workers.iter().map(of_worker).sum::<usize>() + 4;
        let (mut count, mut holders) = (0, 0);
        let before = self.adapters.len();
        self.adapters.retain(|adapter| {
            let names = adapter.name.len() + adapter.lora.len();
            let bytes_with = bytes + ADAPTER_BYTES_MIN + names + 2 * adapter.holders.len();
            let holders_with = holders + adapter.holders.len();
            let fits = count < ADAPTERS_MAX
                && bytes_with <= FRAME_BODY_BYTES_MAX
                && holders_with <= ADAPTER_HOLDERS_MAX
                && (1..=ADAPTER_NAME_BYTES_MAX).contains(&adapter.name.len())
                && adapter.lora.len() <= ADAPTER_NAME_BYTES_MAX;
            if fits {
                (count, bytes, holders) = (count + 1, bytes_with, holders_with);
            }
            fits
        });
        before - self.adapters.len()
    }
}

/// - `room`: most holders that it may have.
fn read_adapter(reader: &mut Reader<'_>, room: usize) -> Result<Adapter, WireError> {
    let name = reader.text(ADAPTER_NAME_BYTES_MAX)?.to_owned();
    let model = reader.u16()?;
    let lora = reader.text(ADAPTER_NAME_BYTES_MAX)?.to_owned();
    let count = reader.count(room, 2)?;
    let mut holders =
        (0..count).map(|_| reader.u16().map(WorkerSlot)).collect::<Result<Vec<_>, _>>()?;
    // They are searched by halves.
    holders.sort_unstable();
    Ok(Adapter { name, model, lora, holders })
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
    let namespace = reader.u32()?;
    let endpoint = reader.text(ENDPOINT_BYTES_MAX)?.to_owned();
    if !endpoint.is_empty() && endpoint.parse::<core::net::SocketAddr>().is_err() {
        // It becomes a header value: nothing but an address may.
        return Err(WireError::UnknownCase);
    }
    let worker = Worker { id, rank };
    Ok(RosterWorker { slot, worker, model, role, parity, namespace, endpoint, total_kv_blocks })
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
            namespace: 9,
            endpoint: endpoint.to_owned(),
            total_kv_blocks: 1200,
        };
        let workers = vec![entry(0, "10.0.0.1:8000"), entry(7, "[fd00::1]:8000"), entry(8, "")];
        Roster { workers, adapters: vec![adapter("sql", &[0, 7]), adapter("chat", &[])] }
    }

    fn adapter(name: &str, holders: &[u16]) -> Adapter {
        Adapter {
            name: name.to_owned(),
            model: 2,
            lora: format!("{name}-lora"),
            holders: holders.iter().copied().map(WorkerSlot).collect(),
        }
    }

    /// Goal: the format does not change unnoticed.
    #[test]
    fn the_bytes_of_a_roster_are_known() {
        let mut roster = example();
        roster.workers.truncate(1);
        roster.adapters.truncate(1);
        let worker = "0000 0200 02 01 0000 ffffffffffffffff 01000000 b004000000000000 09000000";
        let endpoint = "0d000000 31302e302e302e313a38303030";
        let adapter = "03000000 73716c 0200 08000000 73716c2d6c6f7261 02000000 0000 0700";
        let hex: String = roster.encode().iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = format!("01000000 {worker} {endpoint} 01000000 {adapter}");
        assert_eq!(hex, expected.replace(' ', ""));
    }

    #[test]
    fn holders_come_in_ascending_order() {
        let mut roster = example();
        roster.adapters = vec![adapter("sql", &[9, 1, 5])];
        let decoded = Roster::decode(&roster.encode()).unwrap();
        assert_eq!(decoded.adapters, [adapter("sql", &[1, 5, 9])]);
    }

    /// Goal: whatever `fit` leaves can be decoded, and what fits stays.
    #[test]
    fn adapters_that_do_not_fit_are_left_out() {
        let mut roster = example();
        assert_eq!(roster.fit(), 0);
        assert_eq!(roster, example());

        let long = "x".repeat(ADAPTER_NAME_BYTES_MAX + 1);
        roster.adapters.extend([adapter("", &[]), adapter(&long, &[])]);
        assert!(Roster::decode(&roster.encode()).is_err());
        assert_eq!(roster.fit(), 2);
        assert_eq!(roster, example());

        let many = vec![1; ADAPTER_HOLDERS_MAX - 1];
        roster.adapters.extend([adapter("a", &many), adapter("b", &[1])]);
        assert!(Roster::decode(&roster.encode()).is_err(), "two holders too many");
        assert_eq!(roster.fit(), 1, "the long list does not fit with those before it");

        roster.adapters = vec![adapter("n", &[1; 10]); ADAPTERS_MAX + 3];
        assert_eq!(Roster::decode(&roster.encode()), Err(WireError::OverLimit));
        assert_eq!(roster.fit(), 3);
        assert_eq!(Roster::decode(&roster.encode()).map(|it| it.adapters.len()), Ok(ADAPTERS_MAX));
    }

    #[test]
    fn the_largest_roster_fits_a_frame() {
        let mut roster = example();
        let endpoint = "[1111:2222:3333:4444:5555:6666:7777:8888]:65535";
        let entry = RosterWorker { endpoint: endpoint.to_owned(), ..roster.workers[0].clone() };
        roster.workers = vec![entry; ROSTER_WORKERS_MAX];
        let name = "n".repeat(ADAPTER_NAME_BYTES_MAX - 5);
        roster.adapters = vec![adapter(&name, &[1; 16]); ADAPTERS_MAX];
        assert!(roster.encode().len() > FRAME_BODY_BYTES_MAX);
        assert!(roster.fit() > 0);
        let len = roster.encode().len();
        assert!(len <= FRAME_BODY_BYTES_MAX && len > FRAME_BODY_BYTES_MAX - 2_000, "{len}");
        assert!(Roster::decode(&roster.encode()).is_ok());
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
            [" ", "worker.example:80", "10.0.0.1", "10.0.0.1:80\r\nx: y", "10.0.0.1:80,10.0.0.2:80"]
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
        fn decoding_is_total(at in 0_usize..250, byte in proptest::num::u8::ANY) {
            let mut bytes = example().encode();
            if let Some(target) = bytes.get_mut(at) {
                *target = byte;
            }
            let _ = Roster::decode(&bytes);
        }
    }
}
