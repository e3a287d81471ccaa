//! Usage: what ranks have said of their load, and what filters are told of it.
//!
//! Filters are told how full caches are, all at once, when a share has moved by
//! a hundredth, and again every few seconds. Pure but for the time, which is an
//! argument. Its one owner is `keeper`.

use std::collections::BTreeMap;

use tokio::time::Instant;
use warmpath_core::cache_usage::{CacheUsage, CacheUsages, Share};
use warmpath_core::ids::Worker;

use crate::fleet::RankLoad;
use crate::limits::{USAGE_AFTER, USAGE_EVERY, USAGE_STALE_AFTER};
use crate::state::Tracked;

/// What a rank has said.
#[derive(Clone, Copy, Debug, Default)]
struct Heard {
    load: RankLoad,
    /// When it last said a share of its cache.
    share_at: Option<Instant>,
}

impl Heard {
    /// How full the rank's cache is.
    ///
    /// - `total_kv_blocks`: as the worker list says; 0 if it does not.
    fn usage(&self, total_kv_blocks: u64, now: Instant) -> CacheUsage {
        let RankLoad { kv_used_blocks, active_decode_blocks, cache_usage, .. } = self.load;
        let total = match total_kv_blocks {
            0 => self.load.total_kv_blocks.unwrap_or(0),
            total => total,
        };
        let share = |blocks: Option<u64>| blocks.and_then(|blocks| Share::of(blocks, total));
        // Engines say a share every second. Dynamo's workers say blocks when
        // they change, and silence means "as it was": those do not age.
        let is_fresh = self.share_at.is_some_and(|at| now < at + USAGE_STALE_AFTER);
        let said = cache_usage.filter(|_| is_fresh).and_then(Share::of_one);
        CacheUsage { used: share(kv_used_blocks).or(said), active: share(active_decode_blocks) }
    }
}

/// What every listed rank has said.
#[derive(Debug, Default)]
pub struct Usages {
    ranks: BTreeMap<Worker, Heard>,
    told: CacheUsages,
    told_at: Option<Instant>,
    /// When to look again.
    at: Option<Instant>,
}

impl Usages {
    /// A rank is listed, and has said nothing yet.
    pub fn add(&mut self, worker: Worker) {
        self.ranks.insert(worker, Heard::default());
    }

    /// A rank is not listed any more.
    pub fn remove(&mut self, worker: &Worker, now: Instant) {
        if self.ranks.remove(worker).is_some() && !self.told.is_empty() {
            self.look_soon(now);
        }
    }

    /// Takes in what a rank says. Returns whether it is listed.
    pub fn take(&mut self, worker: &Worker, load: &RankLoad, now: Instant) -> bool {
        let Some(heard) = self.ranks.get_mut(worker) else { return false };
        heard.load.merge(load);
        if load.cache_usage.is_some() {
            heard.share_at = Some(now);
        }
        self.look_soon(now);
        true
    }

    fn look_soon(&mut self, now: Instant) {
        let soon = now + USAGE_AFTER;
        self.at = Some(self.at.map_or(soon, |at| at.min(soon)));
    }

    /// What a rank has said so far.
    #[must_use]
    pub fn of(&self, worker: &Worker) -> RankLoad {
        self.ranks.get(worker).map_or_else(RankLoad::default, |heard| heard.load)
    }

    /// When [`Usages::look`] is due; `None` while nothing can change.
    #[must_use]
    pub fn due_at(&self) -> Option<Instant> {
        self.at
    }

    /// The body of a frame, if filters are to be told something.
    pub fn look<'t>(
        &mut self,
        tracked: impl Iterator<Item = &'t Tracked>,
        now: Instant,
    ) -> Option<Vec<u8>> {
        let usage = |it: &Tracked| {
            let heard = self.ranks.get(&it.spec.worker)?;
            Some((it.slot, heard.usage(it.spec.total_kv_blocks, now)))
        };
        let usages = CacheUsages::of(tracked.filter_map(usage));
        let is_long_ago = self.told_at.is_none_or(|at| now >= at + USAGE_EVERY);
        let tells = usages.has_moved(&self.told) || is_long_ago && !usages.is_empty();
        if tells {
            self.told_at = Some(now);
            self.told = usages;
        }
        self.at = (!self.told.is_empty()).then_some(now + USAGE_EVERY);
        tells.then(|| self.told.encode())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use warmpath_core::hash::BlockShape;
    use warmpath_core::ids::{DpRank, WorkerId, WorkerSlot};
    use warmpath_core::roster::Role;

    use super::*;
    use crate::state::{RankSpec, State};

    fn worker(id: u64) -> Worker {
        Worker { id: WorkerId(id), rank: DpRank(0) }
    }

    /// Worker 1 of 1000 blocks, and worker 2 of which nothing is known.
    fn state() -> State {
        let spec = |id, total_kv_blocks| RankSpec {
            worker: worker(id),
            model: 0,
            shape: BlockShape { block_size: 4, eagle: false },
            role: Role::Aggregated,
            endpoint: format!("127.0.0.1:{id}"),
            total_kv_blocks,
            max_num_batched_tokens: 0,
            taints: Vec::new(),
            small_pages: false,
            has_events: false,
            incarnation: 0,
            namespace: 0,
        };
        let mut state = State::new();
        state.set_workers(&[spec(1, 1_000), spec(2, 0)]);
        state
    }

    fn usages() -> Usages {
        let mut usages = Usages::default();
        usages.add(worker(1));
        usages.add(worker(2));
        usages
    }

    /// What filters are told: each worker's share in per mille.
    fn told(usages: &mut Usages, state: &State, now: Instant) -> Option<[Option<i32>; 2]> {
        let body = usages.look(state.tracked(), now)?;
        let told = CacheUsages::decode(&body).unwrap();
        #[expect(clippy::cast_possible_truncation, reason = "at most 1000")]
        let of = |slot| {
            let share = told.of_slot(WorkerSlot(slot))?.share()?;
            Some((share * 1000.0).round() as i32)
        };
        Some([of(0), of(1)])
    }

    const NOTHING: RankLoad = RankLoad {
        kv_used_blocks: None,
        active_decode_blocks: None,
        active_prefill_tokens: None,
        running: None,
        waiting: None,
        cache_usage: None,
        total_kv_blocks: None,
    };

    fn blocks(used: Option<u64>, active: Option<u64>) -> RankLoad {
        RankLoad { kv_used_blocks: used, active_decode_blocks: active, ..NOTHING }
    }

    fn share(cache_usage: f64) -> RankLoad {
        RankLoad { cache_usage: Some(cache_usage), ..NOTHING }
    }

    /// Goal: filters are told of a move of a hundredth or more, soon and not
    /// more often than that; of less with the next regular word.
    #[test]
    fn moves_are_told_soon_and_the_rest_regularly() {
        let (state, mut usages) = (state(), usages());
        let mut now = Instant::now();
        assert_eq!((usages.due_at(), told(&mut usages, &state, now)), (None, None));
        assert!(usages.take(&worker(1), &blocks(Some(500), None), now));
        assert_eq!(usages.due_at(), Some(now + USAGE_AFTER));
        now += USAGE_AFTER;
        assert_eq!(told(&mut usages, &state, now), Some([Some(500), None]));
        assert_eq!(usages.due_at(), Some(now + USAGE_EVERY));
        usages.take(&worker(1), &blocks(Some(505), None), now);
        assert_eq!(usages.due_at(), Some(now + USAGE_AFTER));
        assert_eq!(told(&mut usages, &state, now + USAGE_AFTER), None);
        assert_eq!(told(&mut usages, &state, now + USAGE_EVERY), Some([Some(505), None]));
        now += USAGE_EVERY;
        // Nil leaves what was said; the larger share counts.
        usages.take(&worker(1), &blocks(None, Some(800)), now);
        assert_eq!(told(&mut usages, &state, now), Some([Some(800), None]));
        usages.take(&worker(1), &blocks(Some(900), None), now);
        assert_eq!(told(&mut usages, &state, now), Some([Some(900), None]));
        assert_eq!(usages.of(&worker(1)), blocks(Some(900), Some(800)));
        assert!(!usages.take(&worker(3), &blocks(Some(1), None), now));
    }

    /// Goal: blocks of an unknown whole say nothing until the whole is known; a
    /// share that has not been said for long is not known, blocks are.
    #[test]
    fn shares_age_and_blocks_do_not() {
        let (state, mut usages) = (state(), usages());
        let mut now = Instant::now();
        usages.take(&worker(1), &blocks(Some(250), None), now);
        usages.take(&worker(2), &blocks(Some(250), None), now);
        assert_eq!(told(&mut usages, &state, now), Some([Some(250), None]));
        usages.take(&worker(2), &share(0.5), now);
        assert_eq!(told(&mut usages, &state, now), Some([Some(250), Some(500)]));
        now += USAGE_STALE_AFTER - Duration::from_millis(1);
        assert_eq!(told(&mut usages, &state, now), Some([Some(250), Some(500)]));
        now += Duration::from_millis(1);
        assert_eq!(told(&mut usages, &state, now), Some([Some(250), None]));
        let whole = RankLoad { total_kv_blocks: Some(500), ..NOTHING };
        usages.take(&worker(2), &whole, now);
        assert_eq!(told(&mut usages, &state, now), Some([Some(250), Some(500)]));
    }

    /// Goal: what a worker has said goes with it, and filters are told once that
    /// nothing is known.
    #[test]
    fn a_worker_takes_along_what_it_said() {
        let (mut state, mut usages) = (state(), usages());
        let now = Instant::now();
        usages.take(&worker(1), &share(1.0), now);
        assert_eq!(told(&mut usages, &state, now), Some([Some(1_000), None]));
        state.set_workers(&[]);
        usages.remove(&worker(1), now);
        assert_eq!(usages.due_at(), Some(now + USAGE_AFTER));
        assert_eq!(told(&mut usages, &state, now), Some([None, None]));
        assert_eq!((usages.due_at(), told(&mut usages, &state, now)), (None, None));
    }
}
