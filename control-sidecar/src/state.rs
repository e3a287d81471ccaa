//! State: what every worker's cache holds, and the deltas that say so.
//!
//! Third stage of the feed path. Pure: events and worker lists in, bodies of
//! delta frames and rosters out; no clock, no I/O. Its one owner is `keeper`.
//!
//! # Terms
//!
//! - *rank*: one data-parallel rank of one instance, a worker of the roster.
//! - *incarnation*: one appearance of a rank in the worker list with the same
//!   model and address. Each has a slot of its own.
//! - *fenced*: listed, but seen to be dead. Discovery can lag behind a death by
//!   the time of a lease; until it catches up, or the rank is back, the rank is
//!   not in the roster, unless nobody else could take its place.
//!
//! # Invariants
//!
//! 1. Applying all deltas in order gives exactly [`State::held`].
//! 2. A block is held by a rank only if the rank said so and has not taken it
//!    back. Whatever is not understood makes a block missing, never present.
//! 3. A slot is used again only after a `cleared` operation for it.
//!
//! Where events come from, gaps and restarts are not known here; see
//! `source::sequence`.

pub mod counts;
mod orphans;
pub mod outbox;
pub mod rank;
pub mod slots;
mod tier;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use warmpath_core::event::{KvEvent, Medium};
use warmpath_core::hash::BlockShape;
use warmpath_core::ids::{Worker, WorkerId, WorkerSlot};
use warmpath_core::limits::ROSTER_WORKERS_MAX;
use warmpath_core::roster::{Adapter, LeftOut, Parity, Role, Roster, RosterWorker, TierSlots};

use crate::fleet::AdapterSpec;
use counts::Counts;
use outbox::Outbox;
use rank::{Held, Rank, Sink};
use slots::Slots;

/// What a worker list says about one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankSpec {
    /// Who it is.
    pub worker: Worker,
    /// Index of its model.
    pub model: u16,
    /// How its model cuts blocks.
    pub shape: BlockShape,
    /// What it does.
    pub role: Role,
    /// Where requests go, an address; empty if the worker has none of its own
    /// and is only named by its id, to a frontend.
    pub endpoint: String,
    /// Blocks its cache holds; 0 if not known.
    pub total_kv_blocks: u64,
    /// Tokens that it takes into one step; 0 if not known.
    pub max_num_batched_tokens: u64,
    /// Its taints, ascending, each once.
    pub taints: Vec<String>,
    /// Whether its pages may be smaller than a block.
    pub small_pages: bool,
    /// Whether it publishes events.
    pub has_events: bool,
    /// Tells lives of the rank apart where discovery can: from a pod's uid, a
    /// publisher's id, a lease. 0 where it cannot.
    pub incarnation: u64,
    /// Stands for its Dynamo namespace; 0 without Dynamo.
    pub namespace: u32,
}

impl RankSpec {
    /// Whether `other` is the same incarnation: what was learnt of the one's
    /// cache holds for the other.
    fn same_incarnation(&self, other: &Self) -> bool {
        self.model == other.model
            && self.shape == other.shape
            && self.endpoint == other.endpoint
            && self.small_pages == other.small_pages
            && self.has_events == other.has_events
            && self.incarnation == other.incarnation
            && self.namespace == other.namespace
    }
}

/// One incarnation of a rank.
#[derive(Clone, Debug)]
pub struct Tracked {
    /// Stands for it in the feed.
    pub slot: WorkerSlot,
    /// Stand for its lower tiers; given when one first stores something.
    pub tiers: TierSlots,
    /// What the worker list says.
    pub spec: RankSpec,
    /// What its cache holds.
    pub rank: Rank,
    /// Whether it was seen to be dead.
    pub is_fenced: bool,
}

impl Tracked {
    /// Its slot, and those of its tiers.
    fn all_slots(&self) -> impl Iterator<Item = WorkerSlot> {
        core::iter::once(self.slot).chain(self.tiers.in_order().into_iter().flatten())
    }

    /// What each of its tiers holds, under the tier's slot.
    fn held(&self) -> impl Iterator<Item = (WorkerSlot, Arc<Held>)> {
        let TierSlots { host, disk, external } = self.tiers;
        let slots = [
            (Medium::Device, Some(self.slot)),
            (Medium::HostPinned, host),
            (Medium::Disk, disk),
            (Medium::External, external),
        ];
        slots.into_iter().filter_map(|(medium, slot)| Some((slot?, self.rank.held(medium))))
    }
}

/// What a new worker list changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Slots of ranks that are new.
    pub added: Vec<(Worker, WorkerSlot)>,
    /// Slots of ranks that went.
    pub removed: Vec<(Worker, WorkerSlot)>,
    /// Ranks left out because there are too many.
    pub refused: usize,
}

/// Everything known about every worker.
#[derive(Debug, Default)]
pub struct State {
    ranks: BTreeMap<Worker, Tracked>,
    by_slot: BTreeMap<u16, Worker>,
    slots: Slots,
    outbox: Outbox,
    adapters: Vec<AdapterSpec>,
    roster_changed: bool,
    /// Counts of ranks that went.
    past: Counts,
}

impl State {
    /// Knows no worker.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes over a new worker list, the whole of it.
    ///
    /// - `list`: no worker twice. Beyond [`ROSTER_WORKERS_MAX`] ranks are left
    ///   out, the last first.
    ///
    /// Ranks that went, and those that came back as something else, are cleared
    /// in the feed; slots of new ranks are given in the order of the list, so
    /// that a restart with the same list gives the same slots.
    pub fn set_workers(&mut self, list: &[RankSpec]) -> Changes {
        let taken = list.get(..ROSTER_WORKERS_MAX).unwrap_or(list);
        let mut changes = Changes { refused: list.len() - taken.len(), ..Changes::default() };
        let wanted: BTreeMap<Worker, &RankSpec> =
            taken.iter().map(|spec| (spec.worker, spec)).collect();
        let gone: Vec<Worker> = self
            .ranks
            .iter()
            .filter(|(worker, tracked)| {
                wanted.get(worker).is_none_or(|spec| !tracked.spec.same_incarnation(spec))
            })
            .map(|(worker, _)| *worker)
            .collect();
        for worker in gone {
            if let Some(tracked) = self.ranks.remove(&worker) {
                self.past.add(tracked.rank.counts());
                self.by_slot.remove(&tracked.slot.0);
                for slot in tracked.all_slots() {
                    self.outbox.clear(slot);
                    self.slots.free(slot);
                }
                changes.removed.push((worker, tracked.slot));
            }
        }
        for spec in taken {
            if let Some(tracked) = self.ranks.get_mut(&spec.worker) {
                self.roster_changed |= tracked.spec != *spec;
                tracked.spec = spec.clone();
                continue;
            }
            let Some(slot) = self.slots.take() else {
                changes.refused += 1;
                continue;
            };
            let rank = Rank::new(spec.shape, spec.small_pages, spec.total_kv_blocks);
            self.by_slot.insert(slot.0, spec.worker);
            let tiers = TierSlots::default();
            let tracked = Tracked { slot, tiers, spec: spec.clone(), rank, is_fenced: false };
            self.ranks.insert(spec.worker, tracked);
            changes.added.push((spec.worker, slot));
        }
        self.roster_changed |= !changes.added.is_empty() || !changes.removed.is_empty();
        changes
    }

    /// Applies what one incarnation's engine said. Events for a slot that is
    /// not in use any more are dropped.
    pub fn apply(&mut self, slot: WorkerSlot, events: &[KvEvent]) {
        self.change(slot, |rank, sink| {
            for event in events {
                rank.apply(event, sink);
            }
        });
    }

    /// Takes over a whole account of what one incarnation holds.
    pub fn replace(&mut self, slot: WorkerSlot, events: &[KvEvent]) {
        self.change(slot, |rank, sink| rank.replace(events, sink));
    }

    /// Changes what one incarnation holds, and notes what of it is in the roster.
    fn change(&mut self, slot: WorkerSlot, change: impl FnOnce(&mut Rank, &mut Sink<'_>)) {
        let Self { ranks, by_slot, slots, outbox, roster_changed, .. } = self;
        let Some(tracked) = by_slot.get(&slot.0).and_then(|worker| ranks.get_mut(worker)) else {
            return;
        };
        let Tracked { tiers, rank, .. } = tracked;
        let before = (rank.evidence(), *tiers);
        change(rank, &mut Sink { slot, tiers, slots, outbox });
        *roster_changed |= before != (rank.evidence(), *tiers);
    }

    /// Keeps one incarnation out of the roster, or lets it in again.
    pub fn fence(&mut self, slot: WorkerSlot, is_fenced: bool) {
        let Self { ranks, by_slot, roster_changed, .. } = self;
        if let Some(tracked) = by_slot.get(&slot.0).and_then(|worker| ranks.get_mut(worker)) {
            *roster_changed |= tracked.is_fenced != is_fenced;
            tracked.is_fenced = is_fenced;
        }
    }

    /// Forgets what one incarnation holds: its engine restarted, or what it
    /// said was lost.
    ///
    /// - `also_evidence`: whether its block size is to be proven anew.
    pub fn clear(&mut self, slot: WorkerSlot, also_evidence: bool) {
        self.change(slot, |rank, sink| {
            rank.clear(sink);
            if also_evidence {
                rank.forget_evidence();
            }
        });
    }

    /// Bodies of delta frames that are due: full ones only.
    pub fn full_deltas(&mut self) -> Vec<Vec<u8>> {
        self.outbox.full()
    }

    /// Bodies of delta frames with everything that has changed.
    pub fn all_deltas(&mut self) -> Vec<Vec<u8>> {
        self.outbox.all()
    }

    /// Whether a change waits for its frame.
    #[must_use]
    pub fn has_deltas(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Whether the roster has changed since the last call.
    pub fn take_roster_changed(&mut self) -> bool {
        core::mem::take(&mut self.roster_changed)
    }

    /// Every incarnation, in the order of slots.
    pub fn tracked(&self) -> impl Iterator<Item = &Tracked> {
        self.by_slot.values().filter_map(|worker| self.ranks.get(worker))
    }

    /// The roster as it now is, and what had no room in it.
    #[must_use]
    pub fn roster(&self) -> (Roster, LeftOut) {
        let place = |spec: &RankSpec| (spec.model, role_number(spec.role));
        let alive: BTreeSet<(u16, u8)> =
            self.tracked().filter(|it| !it.is_fenced).map(|it| place(&it.spec)).collect();
        let workers = self
            .tracked()
            .filter(|it| !it.is_fenced || !alive.contains(&place(&it.spec)))
            .map(|Tracked { slot, tiers, spec, rank, .. }| RosterWorker {
                slot: *slot,
                worker: spec.worker,
                model: spec.model,
                role: spec.role,
                parity: if spec.has_events { rank.parity() } else { Parity::Blind },
                namespace: spec.namespace,
                endpoint: spec.endpoint.clone(),
                total_kv_blocks: spec.total_kv_blocks,
                max_num_batched_tokens: spec.max_num_batched_tokens,
                taints: spec.taints.clone(),
                tiers: *tiers,
            })
            .collect();
        let mut roster = Roster { workers, adapters: self.adapters() };
        let left_out = roster.fit();
        (roster, left_out)
    }

    fn adapters(&self) -> Vec<Adapter> {
        let slots_of = |holders: &[WorkerId]| {
            let of_holders = |it: &&Tracked| holders.contains(&it.spec.worker.id);
            self.tracked().filter(of_holders).map(|it| it.slot).collect()
        };
        let adapter = |spec: &AdapterSpec| Adapter {
            name: spec.name.clone(),
            model: spec.model,
            lora: spec.lora.clone(),
            holders: slots_of(&spec.holders),
        };
        self.adapters.iter().map(adapter).collect()
    }

    /// Takes over the adapters, all of them; their models are numbers.
    pub fn set_adapters(&mut self, adapters: Vec<AdapterSpec>) {
        self.roster_changed |= self.adapters != adapters;
        self.adapters = adapters;
    }

    /// What everyone holds, as it is now; later changes do not show in it.
    ///
    /// # Cost
    ///
    /// One reference count a tier. A rank that changes while its part is still
    /// held is copied once, whole.
    #[must_use]
    pub fn held(&self) -> Vec<(WorkerSlot, Arc<Held>)> {
        self.tracked().flat_map(Tracked::held).collect()
    }

    /// What was noticed, over all ranks that ever were.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = self.past;
        for tracked in self.ranks.values() {
            counts.add(tracked.rank.counts());
        }
        counts
    }
}

fn role_number(role: Role) -> u8 {
    match role {
        Role::Aggregated => 0,
        Role::Prefill => 1,
        Role::Decode => 2,
    }
}

#[cfg(test)]
mod tests;
