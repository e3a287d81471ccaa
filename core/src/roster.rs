//! Roster: the workers that may be chosen, and the LoRA adapters that they hold,
//! as the feed carries them.
//!
//! # Terms
//!
//! - *adapter*: a LoRA adapter, which requests name in place of its base model.
//! - *holder*: a worker that has an adapter loaded.
//! - *taint*: a word of a worker, which requests can require or prefer. The
//!   topology that a worker is in comes as taints, too (Dynamo:
//!   `dynamo.topology/<domain>=<value>`).
//! - *tier*: where a worker keeps blocks: the device, and below it the host's
//!   memory, disks and external storage. What a lower tier holds is in the
//!   index under a slot of its own, as if it were another worker.
//!
//! A roster frame is always the whole roster. The sidecar sends one whenever
//! anything in it changes; a failed look-up of workers never sends an empty
//! one.

use std::collections::BTreeSet;

use crate::ids::{DpRank, Worker, WorkerId, WorkerSlot};
use crate::limits::{
    ADAPTER_HOLDERS_MAX, ADAPTER_NAME_BYTES_MAX, ADAPTERS_MAX, ENDPOINT_BYTES_MAX,
    FRAME_BODY_BYTES_MAX, ROSTER_TAINTS_MAX, ROSTER_WORKERS_MAX, TAINT_BYTES_MAX, TAINT_WORDS_MAX,
    WORKER_TAINTS_MAX,
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

/// The slots under which the index keeps what a worker's lower tiers hold; `None`
/// for a tier in which the worker has never stored a block.
///
/// External storage has one of its own although it is weighed like a disk: the
/// walk through a prompt leaves the disk before it comes there, and does not
/// come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TierSlots {
    /// Memory of the host.
    pub host: Option<WorkerSlot>,
    /// Disks of the host.
    pub disk: Option<WorkerSlot>,
    /// Shared or remote storage.
    pub external: Option<WorkerSlot>,
}

impl TierSlots {
    /// The tiers in the order in which a prompt is looked for in them.
    #[must_use]
    pub fn in_order(&self) -> [Option<WorkerSlot>; 3] {
        [self.host, self.disk, self.external]
    }

    /// Whether no lower tier has a slot.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
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
    /// Tokens that the engine takes into one step; 0 if not known.
    pub max_num_batched_tokens: u64,
    /// Its taints, ascending, each once: at most [`WORKER_TAINTS_MAX`] of 1 to
    /// [`TAINT_BYTES_MAX`] bytes.
    pub taints: Vec<String>,
    /// Where the index keeps what its lower tiers hold.
    pub tiers: TierSlots,
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

/// What did not fit a roster frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Adapters.
    pub adapters: usize,
    /// Taints, counted once for each worker that has one.
    pub taints: usize,
}

/// Fixed part of a worker's entry in bytes.
const WORKER_BYTES_MIN: usize = 2 + 2 + 1 + 1 + 1 + 1 + 8 + 4 + 8 + 8 + 4 + 4;

/// What the slots of a worker's lower tiers take in its entry, in bytes.
const TIERS_BYTES_MAX: usize = 3 * 2;

/// Fixed part of a roster in bytes: its three counts.
const ROSTER_BYTES_MIN: usize = 3 * 4;

const _: () = {
    let worker_bytes = WORKER_BYTES_MIN + TIERS_BYTES_MAX + ENDPOINT_BYTES_MAX;
    assert!(ROSTER_BYTES_MIN + ROSTER_WORKERS_MAX * worker_bytes <= FRAME_BODY_BYTES_MAX);
};

/// Fixed part of a taint in the list of all, in bytes.
const TAINT_WORD_BYTES_MIN: usize = 4;

/// Fixed part of an adapter's entry in bytes.
const ADAPTER_BYTES_MIN: usize = 4 + 2 + 4 + 4;

impl Roster {
    /// Encodes the body of a roster frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        let words = self.taint_words();
        writer.count(words.len());
        for word in &words {
            writer.text(word);
        }
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
            writer.u8(tier_bits(&entry.tiers));
            let taints = entry.taints.iter().filter_map(|taint| number_of(&words, taint));
            let taints: Vec<u16> = taints.take(WORKER_TAINTS_MAX).collect();
            writer.u8(u8::try_from(taints.len()).unwrap_or(u8::MAX));
            writer.u64(entry.worker.id.0);
            writer.u32(entry.worker.rank.0);
            writer.u64(entry.total_kv_blocks);
            writer.u64(entry.max_num_batched_tokens);
            writer.u32(entry.namespace);
            writer.text(&entry.endpoint);
            for slot in entry.tiers.in_order().into_iter().flatten() {
                writer.u16(slot.0);
            }
            for taint in taints {
                writer.u16(taint);
            }
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
        let count = reader.count(TAINT_WORDS_MAX, TAINT_WORD_BYTES_MIN)?;
        let words =
            (0..count).map(|_| reader.text(TAINT_BYTES_MAX)).collect::<Result<Vec<&str>, _>>()?;
        let count = reader.count(ROSTER_WORKERS_MAX, WORKER_BYTES_MIN)?;
        let mut workers = Vec::with_capacity(count);
        let mut room = ROSTER_TAINTS_MAX;
        for _ in 0..count {
            let worker = read_worker(&mut reader, &words, room)?;
            room -= worker.taints.len();
            workers.push(worker);
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

    /// The taints of all workers, ascending, each once.
    fn taint_words(&self) -> Vec<&str> {
        let all = self.workers.iter().flat_map(|entry| &entry.taints);
        let mut words: Vec<&str> = all.map(String::as_str).collect();
        words.sort_unstable();
        words.dedup();
        words
    }

    /// Puts taints in order and leaves out what does not fit a frame with the
    /// rest: taints and adapters with a name that is empty or too long, and
    /// those for which there is no room, the last first. A request that
    /// requires a taint that was left out does not go to that worker.
    ///
    /// Workers always fit: [`ROSTER_WORKERS_MAX`] of them with the longest
    /// endpoints and a slot for every tier.
    pub fn fit(&mut self) -> LeftOut {
        let of_worker =
            |entry: &RosterWorker| WORKER_BYTES_MIN + TIERS_BYTES_MAX + entry.endpoint.len();
        let bytes = ROSTER_BYTES_MIN + self.workers.iter().map(of_worker).sum::<usize>();
        let (bytes, taints) = self.fit_taints(bytes);
        LeftOut { adapters: self.fit_adapters(bytes), taints }
    }

    /// Fits the taints into what `bytes` leave. Returns the bytes with them,
    /// and how many were left out.
    fn fit_taints(&mut self, mut bytes: usize) -> (usize, usize) {
        let mut words: BTreeSet<String> = BTreeSet::new();
        let (mut count, mut left_out) = (0, 0);
        for entry in &mut self.workers {
            entry.taints.sort_unstable();
            entry.taints.dedup();
            let before = entry.taints.len();
            let mut of_worker = 0;
            entry.taints.retain(|taint| {
                let is_new = !words.contains(taint);
                let of_word = if is_new { TAINT_WORD_BYTES_MIN + taint.len() } else { 0 };
                let fits = (1..=TAINT_BYTES_MAX).contains(&taint.len())
                    && of_worker < WORKER_TAINTS_MAX
                    && count < ROSTER_TAINTS_MAX
                    && !(is_new && words.len() >= TAINT_WORDS_MAX)
                    && bytes + of_word + 2 <= FRAME_BODY_BYTES_MAX;
                if fits {
                    (of_worker, count, bytes) = (of_worker + 1, count + 1, bytes + of_word + 2);
                    if is_new {
                        words.insert(taint.clone());
                    }
                }
                fits
            });
            left_out += before - entry.taints.len();
        }
        (bytes, left_out)
    }

    /// Fits the adapters into what `bytes` leave. Returns how many were left
    /// out.
    fn fit_adapters(&mut self, mut bytes: usize) -> usize {
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

/// One bit a tier, the host's the lowest.
fn tier_bits(tiers: &TierSlots) -> u8 {
    let bits = tiers.in_order().into_iter().rev();
    bits.fold(0, |bits, slot| bits << 1 | u8::from(slot.is_some()))
}

/// Where a word stands among all, which are in order.
fn number_of(words: &[&str], word: &str) -> Option<u16> {
    words.binary_search(&word).ok().and_then(|at| u16::try_from(at).ok())
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

/// - `words`: all taints.
/// - `room`: most taints that it may have.
fn read_worker(
    reader: &mut Reader<'_>,
    words: &[&str],
    room: usize,
) -> Result<RosterWorker, WireError> {
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
    let (bits, taint_count) = (reader.u8()?, usize::from(reader.u8()?));
    if bits >> 3 != 0 {
        return Err(WireError::UnknownCase);
    }
    if taint_count > room.min(WORKER_TAINTS_MAX) {
        return Err(WireError::OverLimit);
    }
    let id = WorkerId(reader.u64()?);
    let rank = DpRank(reader.u32()?);
    let total_kv_blocks = reader.u64()?;
    let max_num_batched_tokens = reader.u64()?;
    let namespace = reader.u32()?;
    let endpoint = reader.text(ENDPOINT_BYTES_MAX)?.to_owned();
    if !endpoint.is_empty() && endpoint.parse::<core::net::SocketAddr>().is_err() {
        // It becomes a header value: nothing but an address may.
        return Err(WireError::UnknownCase);
    }
    let mut tier = |bit: u8| {
        let is_there = bits >> bit & 1 == 1;
        is_there.then(|| reader.u16().map(WorkerSlot)).transpose()
    };
    let tiers = TierSlots { host: tier(0)?, disk: tier(1)?, external: tier(2)? };
    let mut taints = Vec::with_capacity(taint_count);
    for _ in 0..taint_count {
        let word = words.get(usize::from(reader.u16()?)).ok_or(WireError::UnknownCase)?;
        taints.push((*word).to_owned());
    }
    // They are searched by halves.
    taints.sort_unstable();
    Ok(RosterWorker {
        slot,
        worker: Worker { id, rank },
        model,
        role,
        parity,
        namespace,
        endpoint,
        total_kv_blocks,
        max_num_batched_tokens,
        taints,
        tiers,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    /// A worker with nothing of its own but the slot.
    pub(crate) fn worker(slot: u16) -> RosterWorker {
        RosterWorker {
            slot: WorkerSlot(slot),
            worker: Worker { id: WorkerId(u64::MAX - u64::from(slot)), rank: DpRank(1) },
            model: 2,
            role: Role::Decode,
            parity: Parity::Unproven,
            namespace: 9,
            endpoint: String::new(),
            total_kv_blocks: 1200,
            max_num_batched_tokens: 8192,
            taints: Vec::new(),
            tiers: TierSlots::default(),
        }
    }

    fn example() -> Roster {
        let tier = |slot: u16, at: u16| Some(WorkerSlot(100 * at + slot));
        let entry = |slot, endpoint: &str| RosterWorker {
            endpoint: endpoint.to_owned(),
            taints: vec!["dynamo.topology/zone=a".to_owned(), format!("gpu{slot}")],
            tiers: TierSlots { host: tier(slot, 1), disk: None, external: tier(slot, 3) },
            ..worker(slot)
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
        let taints =
            "02000000 16000000 64796e616d6f2e746f706f6c6f67792f7a6f6e653d61 04000000 67707530";
        let worker = "0000 0200 02 01 05 02 ffffffffffffffff 01000000 b004000000000000 \
                      0020000000000000 09000000";
        let endpoint = "0d000000 31302e302e302e313a38303030 6400 2c01 0000 0100";
        let adapter = "03000000 73716c 0200 08000000 73716c2d6c6f7261 02000000 0000 0700";
        let hex: String = roster.encode().iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = format!("{taints} 01000000 {worker} {endpoint} 01000000 {adapter}");
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
        assert_eq!(roster.fit(), LeftOut::default());
        assert_eq!(roster, example());

        let long = "x".repeat(ADAPTER_NAME_BYTES_MAX + 1);
        roster.adapters.extend([adapter("", &[]), adapter(&long, &[])]);
        assert!(Roster::decode(&roster.encode()).is_err());
        assert_eq!(roster.fit().adapters, 2);
        assert_eq!(roster, example());

        let many = vec![1; ADAPTER_HOLDERS_MAX - 1];
        roster.adapters.extend([adapter("a", &many), adapter("b", &[1])]);
        assert!(Roster::decode(&roster.encode()).is_err(), "two holders too many");
        assert_eq!(roster.fit().adapters, 1, "the long list does not fit with those before it");

        roster.adapters = vec![adapter("n", &[1; 10]); ADAPTERS_MAX + 3];
        assert_eq!(Roster::decode(&roster.encode()), Err(WireError::OverLimit));
        assert_eq!(roster.fit().adapters, 3);
        assert_eq!(Roster::decode(&roster.encode()).map(|it| it.adapters.len()), Ok(ADAPTERS_MAX));
    }

    /// Goal: whatever `fit` leaves can be decoded; a worker's taints come in
    /// order, each once; of what is too much the last goes.
    #[test]
    fn taints_that_do_not_fit_are_left_out() {
        let tainted = |lists: &[Vec<String>]| {
            let entry = |taints: &Vec<String>| RosterWorker {
                taints: taints.clone(),
                ..example().workers[0].clone()
            };
            Roster { workers: lists.iter().map(entry).collect(), adapters: Vec::new() }
        };
        let words = |range: core::ops::Range<usize>| -> Vec<String> {
            range.map(|n| format!("t{n:04}")).collect()
        };
        let fitted = |lists: &[Vec<String>]| {
            let mut roster = tainted(lists);
            let left_out = roster.fit().taints;
            assert_eq!(Roster::decode(&roster.encode()), Ok(roster.clone()));
            (roster.workers.into_iter().map(|it| it.taints).collect::<Vec<_>>(), left_out)
        };
        let list = |words: &[&str]| words.iter().copied().map(str::to_owned).collect::<Vec<_>>();

        assert_eq!(fitted(&[list(&["b", "a", "b", ""])]), (vec![list(&["a", "b"])], 1));
        let long = ["x".repeat(TAINT_BYTES_MAX), "y".repeat(TAINT_BYTES_MAX + 1)];
        assert_eq!(fitted(&[long.to_vec()]), (vec![long[..1].to_vec()], 1));

        let many = words(0..WORKER_TAINTS_MAX + 2);
        let kept = words(0..WORKER_TAINTS_MAX);
        assert_eq!(fitted(&[many.clone(), list(&["a"])]), (vec![kept, list(&["a"])], 2));
        assert!(Roster::decode(&tainted(&[many]).encode()).is_ok(), "the first ones are written");

        let all: Vec<Vec<String>> = words(0..TAINT_WORDS_MAX + 1)
            .chunks(WORKER_TAINTS_MAX)
            .map(<[String]>::to_vec)
            .collect();
        let (kept, left_out) = fitted(&all);
        assert_eq!((kept.concat().len(), left_out), (TAINT_WORDS_MAX, 1));

        let each = words(0..WORKER_TAINTS_MAX);
        let workers = ROSTER_TAINTS_MAX / WORKER_TAINTS_MAX + 1;
        let (kept, left_out) = fitted(&vec![each; workers]);
        assert_eq!((kept.concat().len(), left_out), (ROSTER_TAINTS_MAX, WORKER_TAINTS_MAX));
    }

    #[test]
    fn more_taints_than_a_roster_may_have_are_refused() {
        let entry = |taints: usize| RosterWorker {
            taints: (0..taints).map(|n| format!("{n:02}")).collect(),
            ..example().workers[0].clone()
        };
        let full = ROSTER_TAINTS_MAX / WORKER_TAINTS_MAX;
        let mut workers = vec![entry(WORKER_TAINTS_MAX); full];
        let roster = Roster { workers: workers.clone(), adapters: Vec::new() };
        assert_eq!(Roster::decode(&roster.encode()), Ok(roster));
        workers.push(entry(1));
        let roster = Roster { workers, adapters: Vec::new() };
        assert_eq!(Roster::decode(&roster.encode()), Err(WireError::OverLimit));
    }

    /// Goal: every set of tiers comes back as it was.
    #[test]
    fn tiers_survive_the_wire() {
        for bits in 0..8_u16 {
            let tier = |bit: u16| (bits >> bit & 1 == 1).then_some(WorkerSlot(0xff00 + bit));
            let mut roster = example();
            let tiers = TierSlots { host: tier(0), disk: tier(1), external: tier(2) };
            roster.workers[1].tiers = tiers;
            assert_eq!(Roster::decode(&roster.encode()), Ok(roster), "{bits:#b}");
            assert_eq!(tiers.is_empty(), bits == 0);
        }
        let mut unknown = example().encode();
        let at = unknown.iter().position(|byte| *byte == 5).unwrap();
        assert_eq!(unknown[at - 2..at + 2], [2, 1, 5, 2], "role, parity, tiers, taints");
        unknown[at] = 1 << 3;
        assert_eq!(Roster::decode(&unknown), Err(WireError::UnknownCase));
    }

    #[test]
    fn the_largest_roster_fits_a_frame() {
        let mut roster = example();
        let endpoint = "[1111:2222:3333:4444:5555:6666:7777:8888]:65535";
        let taints = (0..6).map(|n| format!("t{n}")).collect();
        let tiers = TierSlots { disk: Some(WorkerSlot(5)), ..roster.workers[0].tiers };
        let endpoint = endpoint.to_owned();
        let entry = RosterWorker { endpoint, taints, tiers, ..roster.workers[0].clone() };
        roster.workers = vec![entry; ROSTER_WORKERS_MAX];
        let name = "n".repeat(ADAPTER_NAME_BYTES_MAX - 5);
        roster.adapters = vec![adapter(&name, &[1; 16]); ADAPTERS_MAX];
        assert!(roster.encode().len() > FRAME_BODY_BYTES_MAX);
        let left_out = roster.fit();
        assert!(left_out.adapters > 0);
        assert_eq!(left_out.taints, ROSTER_WORKERS_MAX * 6 - ROSTER_TAINTS_MAX);
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
