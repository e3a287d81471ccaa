//! Selection: our route from a prepared request to its workers, against Dynamo's
//! eligibility and production selector over its own loads.
//!
//! A scene is a fleet with caches and bookings, told to a replica as the feed and
//! the ring log tell it, and to Dynamo's active sequences. Requests with their own
//! settings and demands are then placed by both.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use dynamo_kv_router::conditional_disagg::{
    ConditionalDisaggDecisionInput, make_conditional_disagg_policy,
};
use dynamo_kv_router::indexer::{LowerTierMatchDetails, TieredMatchDetails};
use dynamo_kv_router::protocols::{PrefillLoadHint, StorageTier, WorkerWithDpRank};
use dynamo_kv_router::scheduling::{AdvisoryWorkerLoad, OverlapAnalysis};
use dynamo_kv_router::{
    ActiveSequencesMultiWorker, KvSchedulerError, NoopSequencePublisher, SchedulingRequest,
    SequenceRequest, WorkerType,
};
use fastrand::Rng;
use tokio::time::Instant;
use warmpath_core::choose::Random;
use warmpath_core::delta::{Operation, SnapshotStart, encode_operations};
use warmpath_core::demands::{Demands, Host, Pin};
use warmpath_core::entry::Entry;
use warmpath_core::frame::{Frame, Kind};
use warmpath_core::ids::{DpRank, SequenceHash, Worker, WorkerId, WorkerSlot};
use warmpath_core::load::{Booking, BookingId};
use warmpath_core::reason::Reason;
use warmpath_core::replica::Replica;
use warmpath_core::roster::{Parity, Role, Roster, RosterWorker, TierSlots};
use warmpath_core::route::{Leg, Prepared, Unplaced, select};
use warmpath_core::settings::{
    BusyThresholds, ConditionalDisagg, ConditionalDisaggPolicy, Settings,
};

use crate::Outcome;
use crate::bookings::chained;
use crate::dynamo::{Instance, Seeds, Selector, Taken, request};
use crate::states::{TAINTS, ascending, config, fleet, held, settings};

const SEED: u64 = 0x5e1e_c700_0000_0005;
const SCENES: u64 = 5_000;
const REQUESTS_EACH: u64 = 20;
/// Most blocks of a prompt.
const BLOCKS_MAX: u32 = 40;
/// Index entries of a scene.
const INDEX_BLOCKS_MAX: usize = 1_000;
const PORT: u16 = 8_000;
/// Capacity of a worker that does not say how much it takes.
const BATCH_TOKENS_UNKNOWN: u64 = 10_000_000;
/// Choices on our side of each request, each with another seed.
const PICKS: u64 = 3;

/// One rank in a scene.
struct Rank {
    worker: WorkerWithDpRank,
    slot: WorkerSlot,
    /// Blocks of the trunk that its tiers hold, each from where the one before
    /// ends: device, host, disk, external.
    tiers: [u32; 4],
}

/// The workers of one role.
struct Pool {
    role: Role,
    instances: HashMap<u64, Instance>,
    ranks: Vec<Rank>,
    loads: ActiveSequencesMultiWorker<NoopSequencePublisher>,
}

struct Scene {
    block_size: u32,
    /// Hashes that prompts begin with.
    trunk: Vec<u64>,
    replica: Replica,
    pools: Vec<Pool>,
}

/// One request with its settings.
struct Asked {
    settings: Settings,
    prepared: Prepared,
    hashes: Vec<u64>,
    /// Blocks that it has in common with the trunk.
    common: u32,
    /// As Dynamo has them.
    preferred: HashMap<String, f32>,
}

#[derive(Default)]
struct Counts {
    legs: u64,
    tied: u64,
    pinned: u64,
    bypassed: u64,
    refused: HashMap<&'static str, u64>,
}

/// Places requests on both sides.
pub(crate) fn compare() -> Outcome {
    let mut rng = Rng::with_seed(SEED);
    let seeds = Seeds::new();
    let mut counts = Counts::default();
    for at in 0..SCENES {
        let mut scene = Scene::random(&mut rng)?;
        for number in 0..REQUESTS_EACH {
            let asked = scene.ask(&mut rng);
            let told = |difference: String| {
                format!(
                    "scene {at}, request {number}: {difference}; {:?}, {:?}",
                    asked.prepared, asked.settings
                )
            };
            scene.place(&asked, &seeds, &mut rng, &mut counts).map_err(told)?;
        }
    }
    let mut refused: Vec<_> = counts.refused.iter().collect();
    refused.sort_unstable();
    let refused: Vec<String> = refused.iter().map(|(why, n)| format!("{why} {n}")).collect();
    Ok(format!(
        "{} requests in {SCENES} scenes: {} legs placed on a worker that Dynamo would take, with \
         as many tokens to compute ({} out of several that tie, {} on a worker that was named), {} prompts sent to the \
         decode worker as Dynamo's conditional disaggregation would; \
         refused by both with the same error: {}",
        SCENES * REQUESTS_EACH,
        counts.legs,
        counts.tied,
        counts.pinned,
        counts.bypassed,
        refused.join(", ")
    ))
}

impl Pool {
    fn random(rng: &mut Rng, role: Role, first_slot: u16, trunk: u32) -> Self {
        let base = u64::from(first_slot) * 1_000;
        let mut instances: HashMap<u64, Instance> =
            fleet(rng).into_iter().map(|(id, instance)| (base + id, instance)).collect();
        let ids = ascending(&instances);
        for id in &ids {
            let batch = rng.bool().then(|| rng.u64(1..4_000));
            let blocks = (rng.u32(0..4) > 0).then(|| rng.u64(1..400));
            if let Some(instance) = instances.get_mut(id) {
                instance.max_num_batched_tokens = batch;
                instance.total_kv_blocks = blocks;
            }
        }
        let mut slot = first_slot;
        let mut ranks = Vec::new();
        for id in &ids {
            for rank in 0..instances[id].ranks {
                let (found, external) = held(rng, trunk);
                ranks.push(Rank {
                    worker: WorkerWithDpRank::new(*id, rank),
                    slot: WorkerSlot(slot),
                    tiers: [found.device, found.host, found.disk - external, external],
                });
                slot += 1;
            }
        }
        let sizes = instances.iter().map(|(id, it)| (*id, (0, it.ranks))).collect();
        let loads =
            ActiveSequencesMultiWorker::new(NoopSequencePublisher, 16, sizes, false, 1, "decode");
        Self { role, instances, ranks, loads }
    }

    fn roster(&self) -> impl Iterator<Item = RosterWorker> + '_ {
        self.ranks.iter().map(|rank| {
            let instance = &self.instances[&rank.worker.worker_id];
            let mut taints: Vec<String> = instance.taints.iter().cloned().collect();
            taints.sort_unstable();
            RosterWorker {
                slot: rank.slot,
                worker: Worker {
                    id: WorkerId(rank.worker.worker_id),
                    rank: DpRank(rank.worker.dp_rank),
                },
                model: 0,
                role: self.role,
                parity: Parity::Exact,
                namespace: 0,
                endpoint: SocketAddr::new(address(rank.worker.worker_id), PORT).to_string(),
                total_kv_blocks: instance.total_kv_blocks.unwrap_or(0),
                max_num_batched_tokens: instance.max_num_batched_tokens.unwrap_or(0),
                taints,
                tiers: TierSlots {
                    host: Some(WorkerSlot(rank.slot.0 + 1_000)),
                    disk: Some(WorkerSlot(rank.slot.0 + 2_000)),
                    external: Some(WorkerSlot(rank.slot.0 + 3_000)),
                },
            }
        })
    }
}

/// Where an instance is reached.
fn address(id: u64) -> IpAddr {
    let id = u32::try_from(id).unwrap_or(0);
    IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + id))
}

impl Scene {
    fn random(rng: &mut Rng) -> Result<Self, String> {
        let block_size = [1, 7, 16, 32, 64][rng.usize(0..5)];
        let blocks = rng.u32(1..=BLOCKS_MAX);
        let start = rng.u64(..);
        let trunk: Vec<u64> = (0..blocks)
            .scan(start, |before, _| {
                *before = chained(*before, 0);
                Some(*before)
            })
            .collect();
        let roles: &[Role] =
            if rng.bool() { &[Role::Aggregated] } else { &[Role::Decode, Role::Prefill] };
        let pools = roles
            .iter()
            .zip([1, 501])
            .map(|(role, slot)| Pool::random(rng, *role, slot, blocks))
            .collect();
        let mut scene = Self { block_size, trunk, replica: Replica::new(INDEX_BLOCKS_MAX), pools };
        scene.feed();
        scene.book(rng)?;
        Ok(scene)
    }

    /// Roster and index, as the sidecar sends them.
    fn feed(&mut self) {
        let frame = |kind, body: &[u8]| Frame { kind, epoch: 1, sequence: 1, body }.encode();
        let workers = self.pools.iter().flat_map(Pool::roster).collect();
        let roster = Roster { workers, adapters: Vec::new() }.encode();
        self.replica.apply_entry(&Entry::Feed(&frame(Kind::Roster, &roster)).encode());
        self.replica.begin_snapshot();
        let start = SnapshotStart { blocks: 0 }.encode();
        self.replica.apply_snapshot_frame(&frame(Kind::SnapshotStart, &start));
        let hashes: Vec<SequenceHash> = self.trunk.iter().map(|hash| SequenceHash(*hash)).collect();
        for rank in self.pools.iter().flat_map(|pool| &pool.ranks) {
            let mut operations = Vec::new();
            let mut from = 0;
            for (blocks, offset) in rank.tiers.iter().zip([0, 1_000, 2_000, 3_000]) {
                let to = from + *blocks as usize;
                let slot = WorkerSlot(rank.slot.0 + offset);
                operations.push((Operation::Stored, slot, &hashes[from..to]));
                from = to;
            }
            let part = encode_operations(&operations);
            self.replica.apply_snapshot_frame(&frame(Kind::SnapshotPart, &part));
        }
        self.replica.apply_snapshot_frame(&frame(Kind::SnapshotEnd, &[]));
    }

    /// Running requests, as the ring log tells them.
    fn book(&mut self, rng: &mut Rng) -> Result<(), String> {
        let mut id = 0;
        let most = rng.u64(1..6);
        for pool in &self.pools {
            for rank in &pool.ranks {
                for _ in 0..rng.u64(0..most) {
                    id += 1;
                    let (hashes, _) = prompt(rng, &self.trunk);
                    let tokens = rng.u32(0..2_000);
                    // A prefill worker has no blocks, a decode worker no prefill.
                    let prefill = if pool.role == Role::Decode { 0 } else { tokens };
                    let hashes = if pool.role == Role::Prefill { Vec::new() } else { hashes };
                    let booking = Booking {
                        prefill_tokens: prefill,
                        blocks: hashes.iter().map(|hash| SequenceHash(*hash)).collect(),
                        ..Booking::new(BookingId(id), rank.slot, 0)
                    };
                    self.replica.apply_entry(&Entry::Booked(booking).encode());
                    let request = SequenceRequest {
                        request_id: id.to_string(),
                        token_sequence: Some(hashes),
                        track_prefill_tokens: true,
                        expected_output_tokens: None,
                        prefill_load_hint: Some(PrefillLoadHint {
                            initial_effective_prefill_tokens: prefill as usize,
                            expected_prefill_duration: None,
                        }),
                        worker: rank.worker,
                        lora_name: None,
                    };
                    pool.loads
                        .add_request(request, Instant::now())
                        .map_err(|error| error.to_string())?;
                }
            }
        }
        Ok(())
    }

    fn ask(&self, rng: &mut Rng) -> Asked {
        let (hashes, common) = prompt(rng, &self.trunk);
        let prompt_tokens = u32::try_from(hashes.len()).unwrap_or(0) * self.block_size
            + rng.u32(0..self.block_size);
        let mut settings = settings(rng);
        settings.router_track_active_blocks = rng.u32(0..6) > 0;
        settings.router_assume_kv_reuse = rng.u32(0..6) > 0;
        settings.router_track_prefill_tokens = rng.u32(0..4) > 0;
        settings.busy_thresholds = BusyThresholds {
            active_prefill_tokens: (rng.u32(0..4) == 0).then(|| rng.u64(0..6_000)),
            active_prefill_tokens_frac: (rng.u32(0..4) == 0).then(|| rng.f64() * 2.0),
            ..BusyThresholds::default()
        };
        let mut demands = Demands::default();
        let mut preferred = HashMap::new();
        if rng.u32(0..3) == 0 {
            let taints = TAINTS.iter().filter(|_| rng.u32(0..4) == 0);
            demands.required_taints = taints.map(|taint| (*taint).to_owned()).collect();
        }
        if rng.u32(0..3) == 0 {
            for taint in TAINTS {
                let weight = rng.f32() * 4.0 - 2.0;
                preferred.insert((*taint).to_owned(), weight);
                demands.preferred_taints.push(((*taint).to_owned(), f64::from(weight)));
            }
        }
        if rng.u32(0..3) == 0 {
            let hosts = self.pools.iter().flat_map(|pool| ascending(&pool.instances));
            let hosts: Vec<u64> = hosts.filter(|_| rng.u32(0..3) > 0).collect();
            let host = |id: u64| match id % 2 {
                0 => Host::Address(address(id)),
                _ => Host::Socket(SocketAddr::new(address(id), PORT)),
            };
            demands.hosts = Some(hosts.into_iter().map(host).collect());
        }
        for pool in &self.pools {
            if rng.u32(0..6) == 0 {
                let pin = Some(pool.pin(rng));
                match pool.role {
                    Role::Prefill => demands.prefill = pin,
                    _ => demands.serving = pin,
                }
            }
        }
        if rng.u32(0..3) == 0 {
            let policies = [
                ConditionalDisaggPolicy::IslBounding,
                ConditionalDisaggPolicy::PrefillLoad,
                ConditionalDisaggPolicy::IslOrLoad,
            ];
            settings.conditional_disagg = Some(ConditionalDisagg {
                policy: policies[rng.usize(0..3)],
                eff_isl_threshold: rng.u32(0..1_500),
                eff_isl_ratio_threshold: rng.f64(),
                prefill_busy_threshold: Some(rng.f64() * 2.0),
                decode_busy_threshold: rng.bool().then(|| rng.f64() * 2.0),
            });
        }
        let prepared = Prepared {
            model: Some(0),
            holders: None,
            reason: Reason::Kv,
            prompt_tokens,
            tokens: Vec::new(),
            hashes: hashes.iter().map(|hash| SequenceHash(*hash)).collect(),
            block_size: self.block_size,
            is_whole: true,
            demands,
        };
        Asked { settings, prepared, hashes, common, preferred }
    }

    fn place(
        &mut self,
        asked: &Asked,
        seeds: &Seeds,
        rng: &mut Rng,
        counts: &mut Counts,
    ) -> Result<(), String> {
        let mut theirs = Vec::new();
        for pool in &self.pools {
            theirs.push(pool.take(asked, self.block_size, pool.role, seeds, rng)?);
        }
        let bypasses = self.bypasses(asked, &theirs)?;
        // Then the decode worker does all of it.
        let whole = match bypasses.contains(&true) {
            true => {
                let role = Role::Aggregated;
                self.pools[0].take(asked, self.block_size, role, seeds, rng)?.ok()
            }
            false => None,
        };
        for _ in 0..PICKS {
            let mut random = Random::seeded(rng.u64(..));
            let ours = select(&mut self.replica, &asked.prepared, &asked.settings, 0, &mut random);
            let refused = theirs.iter().find_map(|it| it.as_ref().err());
            match (ours, refused) {
                (Ok(choice), None) if choice.prefill.is_none() && bypasses.contains(&true) => {
                    let whole = whole.as_ref().ok_or("nobody to do all of it")?;
                    whole.agree(&choice.serving)?;
                    counts.bypassed += 1;
                }
                (Ok(choice), None) => {
                    if self.pools.len() == 2 && !bypasses.contains(&false) {
                        return Err("Dynamo sends the prompt to the decode worker".to_owned());
                    }
                    let legs = [Some(&choice.serving), choice.prefill.as_ref()];
                    for (leg, their) in legs.into_iter().flatten().zip(theirs.iter().flatten()) {
                        their.agree(leg)?;
                        counts.legs += 1;
                        counts.tied += u64::from(their.lowest.len() > 1);
                        counts.pinned += u64::from(their.is_pinned);
                    }
                    if choice.prefill.is_some() != (theirs.len() == 2) {
                        return Err("another number of legs".to_owned());
                    }
                }
                (Err(error), Some(their)) if class(error) == *their => {
                    *counts.refused.entry(their).or_default() += 1;
                }
                (ours, their) => return Err(format!("ours {ours:?}, Dynamo's {their:?}")),
            }
        }
        Ok(())
    }
}

impl Scene {
    /// What Dynamo may decide on sending the prompt to the decode worker, for each
    /// pair that ties.
    fn bypasses(
        &self,
        asked: &Asked,
        theirs: &[Result<Theirs, &'static str>],
    ) -> Result<BTreeSet<bool>, String> {
        let Some(conditional) = asked.settings.conditional_disagg else {
            return Ok(BTreeSet::from([false]));
        };
        let [Ok(decode), Ok(prefill)] = theirs else { return Ok(BTreeSet::from([false])) };
        if prefill.is_pinned {
            return Ok(BTreeSet::from([false]));
        }
        let config = config(&asked.settings);
        let policy = make_conditional_disagg_policy(Some(&config));
        let isl = asked.prepared.prompt_tokens as usize;
        let mut decisions = BTreeSet::new();
        for answers in &decode.lowest {
            let taken = decode.taken[answers];
            let potential = taken.potential_decode_blocks as u64;
            let gate = conditional.decode_busy_threshold.map(|threshold| {
                // A worker that does not say how much it holds counts as busy.
                self.pools[0].advisory(*answers).decode_load_exceeds(potential, threshold)
                    != Some(false)
            });
            for computes in &prefill.lowest {
                let threshold = conditional.prefill_busy_threshold.unwrap_or(f64::INFINITY);
                let is_busy = self.pools[1].advisory(*computes).prefill_load_exceeds(threshold);
                let input = ConditionalDisaggDecisionInput::new(isl, taken.cached_tokens)
                    .with_prefill_chosen_worker_busy(Some(is_busy));
                let waker = std::task::Waker::noop();
                let mut context = std::task::Context::from_waker(waker);
                let mut decision = policy.should_bypass_remote_prefill(input);
                match decision.as_mut().poll(&mut context) {
                    std::task::Poll::Ready(bypasses) => {
                        decisions.insert(bypasses && gate != Some(true));
                    }
                    std::task::Poll::Pending => return Err("Dynamo waits".to_owned()),
                }
            }
        }
        Ok(decisions)
    }
}

/// A prompt that leaves the trunk somewhere, and how many blocks it shares.
fn prompt(rng: &mut Rng, trunk: &[u64]) -> (Vec<u64>, u32) {
    let common = rng.usize(0..=trunk.len());
    let mut hashes = trunk[..common].to_vec();
    let mut before = hashes.last().copied().unwrap_or(rng.u64(..));
    for _ in 0..rng.u32(0..12) {
        before = chained(before, 1 + rng.u64(0..2));
        hashes.push(before);
    }
    (hashes, u32::try_from(common).unwrap_or(0))
}

/// What Dynamo would do with a leg.
struct Theirs {
    /// The workers that it may take.
    lowest: BTreeSet<WorkerWithDpRank>,
    taken: HashMap<WorkerWithDpRank, Taken>,
    /// Tokens of the prompt.
    isl: u64,
    is_pinned: bool,
}

impl Theirs {
    fn agree(&self, leg: &Leg) -> Result<(), String> {
        let worker = WorkerWithDpRank::new(leg.worker.id.0, leg.worker.rank.0);
        if !self.lowest.contains(&worker) {
            return Err(format!("ours {worker:?}, Dynamo's {:?}", self.lowest));
        }
        let tokens = self.isl.saturating_sub(self.taken[&worker].cached_tokens as u64);
        if tokens != u64::from(leg.prefill_tokens) {
            return Err(format!("{worker:?} computes {} and {tokens}", leg.prefill_tokens));
        }
        Ok(())
    }
}

impl Pool {
    fn pin(&self, rng: &mut Rng) -> Pin {
        let rank = &self.ranks[rng.usize(0..self.ranks.len())];
        let mut worker = rank.worker;
        match rng.u32(0..8) {
            0 => worker.worker_id += 1,
            1 => worker.dp_rank = 4,
            _ => {}
        }
        Pin { worker: WorkerId(worker.worker_id), rank: Some(DpRank(worker.dp_rank)) }
    }

    /// Instances all of whose ranks have more prefill booked than a threshold.
    fn overloaded(&self, thresholds: &BusyThresholds) -> HashSet<u64> {
        let booked = self.loads.active_tokens(Instant::now());
        let is_beyond = |id: u64, rank: u32| {
            let tokens = booked[&WorkerWithDpRank::new(id, rank)];
            let of_batch = self.instances[&id].max_num_batched_tokens;
            thresholds.active_prefill_tokens.is_some_and(|most| tokens as u64 > most)
                || thresholds
                    .active_prefill_tokens_frac
                    .zip(of_batch)
                    .is_some_and(|(share, batch)| tokens as f64 / batch as f64 > share)
        };
        let ids = self.instances.iter();
        ids.filter(|(id, it)| (0..it.ranks).all(|rank| is_beyond(**id, rank)))
            .map(|(id, _)| *id)
            .collect()
    }

    /// The leg of this pool as Dynamo's host asks for it; or its error's class.
    ///
    /// - `does`: what its worker is to do: its role, or all of it.
    fn take(
        &self,
        asked: &Asked,
        block_size: u32,
        does: Role,
        seeds: &Seeds,
        rng: &mut Rng,
    ) -> Result<Result<Theirs, &'static str>, String> {
        let Asked { settings, prepared, .. } = asked;
        let role = match self.role {
            Role::Aggregated => WorkerType::Aggregated,
            Role::Prefill => WorkerType::Prefill,
            Role::Decode => WorkerType::Decode,
        };
        let selector = Selector::new(&config(settings), role)?;
        let mut request = self.request(asked, block_size, does, selector.wants_cache(), rng);
        let overloaded = self.overloaded(&settings.busy_thresholds);
        let pin = match self.role {
            Role::Prefill => prepared.demands.prefill,
            _ => prepared.demands.serving,
        };
        request.pinned_worker =
            pin.map(|pin| WorkerWithDpRank::new(pin.worker.0, pin.rank.map_or(0, |rank| rank.0)));
        let overloaded = Some(&overloaded);
        let taken = match selector.take(&self.instances, &request, overloaded, block_size) {
            Ok(taken) => taken,
            Err(error) => return Ok(Err(class_of(&error)?)),
        };
        // The prompt comes computed to a decode worker.
        let isl = if does == Role::Decode { 0 } else { u64::from(prepared.prompt_tokens) };
        if pin.is_some() {
            let lowest = BTreeSet::from([taken.worker]);
            let taken = HashMap::from([(taken.worker, taken)]);
            return Ok(Ok(Theirs { lowest, taken, isl, is_pinned: true }));
        }
        let allowed = self.ranks.iter().filter(|rank| {
            let id = rank.worker.worker_id;
            request.allowed_worker_ids.as_ref().is_none_or(|ids| ids.contains(&id))
                && prepared
                    .demands
                    .required_taints
                    .iter()
                    .all(|taint| self.instances[&id].taints.contains(taint))
                && !overloaded.is_some_and(|ids| ids.contains(&id))
        });
        let candidates = allowed.count();
        let all = selector
            .all(&self.instances, &request, overloaded, block_size, candidates, seeds)
            .map_err(|error| error.to_string())?;
        let least = all.iter().map(|it| it.cost).fold(f64::INFINITY, f64::min);
        let lowest: BTreeSet<_> = all
            .iter()
            .filter(|it| it.cost - least <= 1e-12 * least.abs())
            .map(|it| it.worker)
            .collect();
        if !lowest.contains(&taken.worker) {
            return Err(format!("Dynamo takes {taken:?} of {lowest:?}"));
        }
        let taken = all.into_iter().map(|it| (it.worker, it)).collect();
        Ok(Ok(Theirs { lowest, taken, isl, is_pinned: false }))
    }

    /// A worker's load as conditional disaggregation looks at it.
    fn advisory(&self, worker: WorkerWithDpRank) -> AdvisoryWorkerLoad {
        let instance = &self.instances[&worker.worker_id];
        let batch = instance.max_num_batched_tokens.unwrap_or(BATCH_TOKENS_UNKNOWN);
        AdvisoryWorkerLoad {
            active_prefill_tokens: self.loads.active_tokens(Instant::now())[&worker],
            prefill_token_capacity: batch as usize,
            total_kv_blocks: instance.total_kv_blocks.map(|blocks| blocks as usize),
        }
    }

    fn request(
        &self,
        asked: &Asked,
        block_size: u32,
        does: Role,
        wants_cache: bool,
        rng: &mut Rng,
    ) -> SchedulingRequest {
        let Asked { settings, prepared, hashes, common, preferred } = asked;
        let tracks_prefill = settings.router_track_prefill_tokens && does != Role::Decode;
        let mut request = request(prepared.prompt_tokens as usize, tracks_prefill);
        let shares = settings.router_assume_kv_reuse && does != Role::Decode;
        request.token_seq = match () {
            () if self.role == Role::Prefill || !settings.router_track_active_blocks => None,
            () if shares => Some(hashes.clone()),
            () => Some(hashes.iter().map(|_| rng.u64(..)).collect()),
        };
        request.worker_loads =
            self.loads.project_worker_loads(request.token_seq.as_deref(), Instant::now());
        if wants_cache {
            let found = self.found(*common);
            request.overlap = OverlapAnalysis::new(&config(settings), block_size, &found).signals();
        }
        request.routing_constraints.required_taints =
            prepared.demands.required_taints.iter().cloned().collect();
        request.routing_constraints.preferred_taints.clone_from(preferred);
        request.allowed_worker_ids = prepared.demands.hosts.as_ref().map(|hosts| {
            let is_one = |id: u64| {
                hosts.iter().any(|host| match host {
                    Host::Socket(socket) => socket.ip() == address(id),
                    Host::Address(ip) => *ip == address(id),
                })
            };
            self.instances.keys().copied().filter(|id| is_one(*id)).collect()
        });
        request
    }

    /// What each rank holds of a prompt with so many blocks of the trunk.
    fn found(&self, common: u32) -> TieredMatchDetails {
        let mut found = TieredMatchDetails::default();
        for rank in &self.ranks {
            let mut from = 0;
            let mut hits = rank.tiers.map(|blocks| {
                let to = (from + blocks).min(common);
                let hit = to.saturating_sub(from);
                from += blocks;
                hit
            });
            let device = std::mem::take(&mut hits[0]);
            if device > 0 {
                found.device.overlap_scores.scores.insert(rank.worker, device);
            }
            let tiers = [StorageTier::HostPinned, StorageTier::Disk, StorageTier::External];
            for (tier, hit) in tiers.into_iter().zip(&hits[1..]) {
                if *hit > 0 {
                    let matches =
                        found.lower_tier.entry(tier).or_insert_with(LowerTierMatchDetails::default);
                    matches.hits.insert(rank.worker, *hit as usize);
                }
            }
        }
        found
    }
}

/// Errors that differ for the client.
fn class(error: Unplaced) -> &'static str {
    match error {
        Unplaced::PinOverloaded => "named worker overloaded",
        Unplaced::Overloaded => "all overloaded",
        _ => "no worker",
    }
}

fn class_of(error: &KvSchedulerError) -> Result<&'static str, String> {
    match error {
        KvSchedulerError::PinnedWorkerOverloaded { .. } => Ok("named worker overloaded"),
        KvSchedulerError::AllEligibleWorkersOverloaded => Ok("all overloaded"),
        KvSchedulerError::NoEndpoints | KvSchedulerError::PinnedWorkerNotAllowed { .. } => {
            Ok("no worker")
        }
        other => Err(other.to_string()),
    }
}
