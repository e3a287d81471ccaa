//! Bookings: our loads against Dynamo's active sequences, step by step.
//!
//! Steps: placing (prompts that share prefixes, that share nothing, that are not
//! tracked; with and without prefill and an expected length of the answer),
//! prefill done, blocks of the answer, freeing, expiry, workers that leave and
//! come back; some of it as another router's event. After every step the loads of
//! all workers, and what a random prompt would add to each, must be equal.

use std::collections::HashMap;
use std::time::Duration;

use dynamo_kv_router::protocols::{
    ActiveSequenceEvent, ActiveSequenceEventData, PrefillLoadHint, WorkerWithDpRank,
};
use dynamo_kv_router::sequences::topology::WorkerDpRange;
use dynamo_kv_router::{ActiveSequencesMultiWorker, NoopSequencePublisher, SequenceRequest};
use fastrand::Rng;
use tokio::time::Instant;
use warmpath_core::ids::{SequenceHash, WorkerSlot};
use warmpath_core::load::{Booking, BookingId, Loads};

use crate::Outcome;

const SEED: u64 = 0x9e3d_51f0_77aa_0001;
const STEPS: u64 = 1_000_000;
const BLOCK_SIZE: usize = 16;
/// Instances and the ranks of each.
const WORKERS: &[(u64, u32)] = &[(11, 1), (12, 2), (13, 1), (14, 3)];
/// Most bookings at a time.
const LIVE_MAX: usize = 300;
/// Dynamo's default: what is older than this expires.
const EXPIRY_MS: u64 = 300_000;
const OWN_ROUTER: u64 = 1;
const OTHER_ROUTER: u64 = 2;
/// A weight this close to a half may round either way.
const TIE: f64 = 1e-9;

/// What the script knows of a live booking.
struct Live {
    id: u64,
    worker: WorkerWithDpRank,
    isl: u32,
    osl: u32,
    expected: u32,
    blocks: u32,
    placed_ms: u64,
}

#[derive(Default)]
struct Counts {
    steps: HashMap<&'static str, u64>,
    loads: u64,
    decayed: u64,
    ties: u64,
}

struct Pair {
    rng: Rng,
    theirs: ActiveSequencesMultiWorker<NoopSequencePublisher>,
    ours: Loads,
    now_ms: u64,
    live: Vec<Live>,
    next_id: u64,
    present: Vec<bool>,
    counts: Counts,
}

/// Compares both over [`STEPS`] random steps.
pub(crate) fn compare() -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .map_err(|error| error.to_string())?;
    runtime.block_on(async {
        let mut pair = Pair::new();
        for step in 0..STEPS {
            let what = pair.step().await?;
            *pair.counts.steps.entry(what).or_default() += 1;
            pair.check().map_err(|difference| format!("step {step}, {what}: {difference}"))?;
        }
        pair.drain()?;
        Ok(pair.counts.told())
    })
}

impl Counts {
    fn told(&self) -> String {
        let mut steps: Vec<_> = self.steps.iter().collect();
        steps.sort_unstable();
        let steps: Vec<String> = steps.iter().map(|(what, n)| format!("{what} {n}")).collect();
        format!(
            "{STEPS} steps ({}), {} loads of a worker equal, {} of them with weights below 1; \
             {} sums within {TIE} of a half that rounded differently",
            steps.join(", "),
            self.loads,
            self.decayed,
            self.ties
        )
    }
}

/// Slot that stands for a worker.
fn slot_of(worker: WorkerWithDpRank) -> WorkerSlot {
    WorkerSlot(
        u16::try_from(worker.worker_id * 8).unwrap() + u16::try_from(worker.dp_rank).unwrap(),
    )
}

/// A hash that stands for its prefix, as all do.
pub(crate) fn chained(before: u64, block: u64) -> u64 {
    let mut z = before.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (block + 1);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Pair {
    fn new() -> Self {
        let ranks = WORKERS.iter().map(|&(id, size)| (id, (0, size))).collect();
        Self {
            rng: Rng::with_seed(SEED),
            theirs: ActiveSequencesMultiWorker::new(
                NoopSequencePublisher,
                BLOCK_SIZE,
                ranks,
                true,
                OWN_ROUTER,
                "decode",
            ),
            ours: Loads::new(),
            now_ms: 0,
            live: Vec::new(),
            next_id: 0,
            present: vec![true; WORKERS.len()],
            counts: Counts::default(),
        }
    }

    async fn step(&mut self) -> Result<&'static str, String> {
        let chance = self.rng.u32(0..10_000);
        Ok(match chance {
            _ if self.live.is_empty() => self.add()?,
            0..2_400 if self.live.len() < LIVE_MAX => self.add()?,
            0..2_400 => self.free(),
            2_400..2_450 => self.add_again()?,
            2_450..4_000 => self.prefill_done(),
            4_000..7_800 => self.output(),
            7_800..9_900 => self.free(),
            9_900..9_960 => self.expire().await,
            9_960..9_980 => self.leave()?,
            _ => self.return_()?,
        })
    }

    fn any(&mut self) -> usize {
        self.rng.usize(0..self.live.len())
    }

    fn worker(&mut self) -> WorkerWithDpRank {
        let present: Vec<usize> = (0..WORKERS.len()).filter(|at| self.present[*at]).collect();
        let (id, ranks) = WORKERS[present[self.rng.usize(0..present.len())]];
        WorkerWithDpRank::new(id, self.rng.u32(0..ranks))
    }

    /// Blocks of a prompt out of a tree of few branches.
    fn prompt(&mut self) -> Vec<u64> {
        let len = match self.rng.u32(0..100) {
            0..4 => 0,
            4..60 => self.rng.usize(1..8),
            60..97 => self.rng.usize(1..60),
            _ => self.rng.usize(60..600),
        };
        let mut before = self.rng.u64(0..4);
        (0..len)
            .map(|_| {
                let block = if self.rng.u32(0..5) == 0 { self.rng.u64(0..3) } else { 0 };
                before = chained(before, block);
                before
            })
            .collect()
    }

    fn add(&mut self) -> Result<&'static str, String> {
        let id = self.next_id;
        self.next_id += 1;
        let worker = self.worker();
        self.place(id, worker)
    }

    /// A name that is taken, here or on another worker.
    fn add_again(&mut self) -> Result<&'static str, String> {
        let at = self.any();
        let id = self.live[at].id;
        let worker = self.worker();
        let refused = self.ours.refused();
        self.place(id, worker)?;
        if self.ours.refused() != refused + 1 {
            return Err("a name that is taken was not refused".to_owned());
        }
        Ok("taken name")
    }

    fn place(&mut self, id: u64, worker: WorkerWithDpRank) -> Result<&'static str, String> {
        let is_new = self.live.iter().all(|live| live.id != id);
        let prompt = self.prompt();
        let tail = self.rng.u32(0..16);
        let isl = u32::try_from(prompt.len()).unwrap() * 16 + tail;
        let kind = self.rng.u32(0..100);
        let (hashes, shared, unshared) = match kind {
            // Not tracked; then nothing shared.
            0..8 => (None, Vec::new(), 0),
            8..25 => {
                let random = prompt.iter().map(|_| self.rng.u64(..)).collect();
                (Some(random), Vec::new(), u32::try_from(prompt.len()).unwrap())
            }
            _ => {
                let shared = prompt.iter().map(|hash| SequenceHash(*hash)).collect();
                (Some(prompt), shared, 0)
            }
        };
        let tracks_prefill = self.rng.u32(0..10) > 0;
        let effective = if self.rng.u32(0..10) == 0 { 0 } else { self.rng.u32(0..=isl) };
        let expected = if self.rng.bool() { self.rng.u32(1..200) } else { 0 };
        let hint = PrefillLoadHint {
            initial_effective_prefill_tokens: effective as usize,
            expected_prefill_duration: None,
        };
        let expected_output_tokens = (expected > 0).then_some(expected);
        let is_remote = self.rng.u32(0..5) == 0;
        let request_id = id.to_string();
        if is_remote {
            let data = ActiveSequenceEventData::AddRequest {
                token_sequence: hashes,
                track_prefill_tokens: tracks_prefill,
                expected_output_tokens,
                prefill_load_hint: Some(hint),
            };
            self.remote(request_id, worker, data);
        } else {
            let request = SequenceRequest {
                request_id,
                token_sequence: hashes,
                track_prefill_tokens: tracks_prefill,
                expected_output_tokens,
                prefill_load_hint: Some(hint),
                worker,
                lora_name: None,
            };
            let added = self.theirs.add_request(request, Instant::now());
            if added.is_ok() != is_new {
                return Err(format!("Dynamo adds {id}: {added:?}"));
            }
        }
        self.ours.add(Booking {
            prefill_tokens: if tracks_prefill { effective } else { 0 },
            blocks: shared,
            unshared_blocks: unshared,
            expected_output_tokens: expected,
            ..Booking::new(BookingId(id), slot_of(worker), self.now_ms)
        });
        if is_new {
            let placed_ms = self.now_ms;
            self.live.push(Live { id, worker, isl, osl: 0, expected, blocks: 0, placed_ms });
        }
        Ok(if is_remote { "remote add" } else { "add" })
    }

    fn remote(&self, request_id: String, worker: WorkerWithDpRank, data: ActiveSequenceEventData) {
        self.theirs.apply_replica_batch(vec![ActiveSequenceEvent {
            request_id,
            worker,
            data,
            router_id: OTHER_ROUTER,
            lora_name: None,
        }]);
    }

    fn prefill_done(&mut self) -> &'static str {
        let at = self.any();
        let Live { id, worker, .. } = self.live[at];
        let request_id = id.to_string();
        self.ours.prefill_done(BookingId(id));
        if self.rng.u32(0..5) == 0 {
            self.remote(request_id, worker, ActiveSequenceEventData::MarkPrefillCompleted);
            return "remote prefill done";
        }
        // Dynamo is not sorry for a second one either.
        let _ = self.theirs.mark_prefill_completed(&request_id, Instant::now());
        "prefill done"
    }

    /// The answer grows by a few tokens; a block is added when one is begun.
    fn output(&mut self) -> &'static str {
        let at = self.any();
        let tokens = self.rng.u32(1..16);
        let live = &mut self.live[at];
        let before = (live.isl + live.osl).div_ceil(16);
        live.osl += tokens;
        if (live.isl + live.osl).div_ceil(16) == before {
            return "output within a block";
        }
        live.blocks += 1;
        let fraction = (live.expected > 0)
            .then(|| (1.0 - f64::from(live.osl) / f64::from(live.expected)).max(0.0));
        let _ = self.theirs.add_output_block(&live.id.to_string(), fraction);
        self.ours.output_blocks(BookingId(live.id), live.blocks, live.osl);
        if fraction.is_some() { "output block with a weight" } else { "output block" }
    }

    fn free(&mut self) -> &'static str {
        let at = self.any();
        let Live { id, worker, .. } = self.live.swap_remove(at);
        let request_id = id.to_string();
        self.ours.free(BookingId(id));
        if self.rng.u32(0..5) == 0 {
            self.remote(request_id, worker, ActiveSequenceEventData::Free);
            return "remote free";
        }
        let _ = self.theirs.free(&request_id, Instant::now());
        if self.rng.u32(0..10) == 0 {
            // Once more changes nothing.
            let _ = self.theirs.free(&id.to_string(), Instant::now());
            self.ours.free(BookingId(id));
        }
        "free"
    }

    /// Time passes, beyond the 30 s at which Dynamo looks again.
    async fn expire(&mut self) -> &'static str {
        let passed = 30_001 + self.rng.u64(0..60_000);
        tokio::time::advance(Duration::from_millis(passed)).await;
        self.now_ms += passed;
        self.theirs.force_expire_requests_across_all_workers();
        // Dynamo: older than; we: as old as.
        self.ours.expire(self.now_ms, EXPIRY_MS + 1);
        let now_ms = self.now_ms;
        self.live.retain(|live| now_ms - live.placed_ms <= EXPIRY_MS);
        "time passes"
    }

    fn leave(&mut self) -> Result<&'static str, String> {
        let at = self.rng.usize(0..WORKERS.len());
        if !self.present[at] || self.present.iter().filter(|it| **it).count() == 1 {
            return Ok("nobody leaves");
        }
        let (id, ranks) = WORKERS[at];
        self.present[at] = false;
        self.theirs.unregister_worker(id).map_err(|error| error.to_string())?;
        for rank in 0..ranks {
            self.ours.drop_worker(slot_of(WorkerWithDpRank::new(id, rank)));
        }
        self.live.retain(|live| live.worker.worker_id != id);
        Ok("worker leaves")
    }

    fn return_(&mut self) -> Result<&'static str, String> {
        let Some(at) = (0..WORKERS.len()).find(|at| !self.present[*at]) else {
            return Ok("nobody returns");
        };
        let (id, ranks) = WORKERS[at];
        self.present[at] = true;
        let range = WorkerDpRange::new(id, 0, ranks);
        self.theirs.register_worker(range).map_err(|error| error.to_string())?;
        Ok("worker returns")
    }

    /// Compares all that can be asked.
    fn check(&mut self) -> Result<(), String> {
        let query = self.prompt();
        let hashes: Vec<SequenceHash> = query.iter().map(|hash| SequenceHash(*hash)).collect();
        let theirs = self.theirs.project_worker_loads(Some(&query), Instant::now());
        for (worker, their) in &theirs {
            let slot = slot_of(*worker);
            let our = self.ours.of(slot);
            let equal = our.prefill_tokens == their.active_prefill_tokens as u64
                && our.requests == their.active_requests as u64
                && self.ours.additional_blocks(slot, &hashes)
                    == their.additional_active_blocks as u64;
            let weight = self.ours.weight(slot);
            let blocks_equal = our.active_blocks == their.active_decode_blocks as u64;
            let is_tie = (weight.fract() - 0.5).abs() < TIE
                && our.active_blocks.abs_diff(their.active_decode_blocks as u64) == 1;
            if !equal || !(blocks_equal || is_tie) {
                return Err(format!(
                    "{worker:?}: ours {our:?} of {weight}, additional {}; Dynamo's {their:?}",
                    self.ours.additional_blocks(slot, &hashes)
                ));
            }
            self.counts.loads += 1;
            self.counts.ties += u64::from(!blocks_equal);
            self.counts.decayed += u64::from(weight.fract() != 0.0);
        }
        if self.ours.bookings() != self.live.len() {
            return Err(format!("{} bookings of {}", self.ours.bookings(), self.live.len()));
        }
        let present: usize = (0..WORKERS.len())
            .filter(|at| self.present[*at])
            .map(|at| WORKERS[at].1 as usize)
            .sum();
        if theirs.len() != present {
            return Err(format!("Dynamo knows {} workers of {present}", theirs.len()));
        }
        Ok(())
    }

    /// Everything ends, and nothing is left.
    fn drain(&mut self) -> Result<(), String> {
        while !self.live.is_empty() {
            self.free();
            self.check()?;
        }
        let left = self.theirs.project_worker_loads(None, Instant::now());
        if self.ours.bookings() != 0 || left.values().any(|load| load.active_requests != 0) {
            return Err(format!("left: ours {}, Dynamo's {left:?}", self.ours.bookings()));
        }
        Ok(())
    }
}
