//! Sets: interned sets of workers.
//!
//! Blocks name a set by number. Equal sets have one number, so a run of blocks
//! that the same workers hold is one comparison a block on the request path.

use core::hash::BuildHasher as _;

use foldhash::fast::FixedState;
use hashbrown::HashTable;

/// Bits of a set's number.
pub(super) const SET_BITS: u32 = 22;

const SETS_MAX: usize = (1 << SET_BITS) - 1;

/// A set's number; 0 is never one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SetId(pub(super) u32);

/// One incarnation of a worker, as sets know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Member(pub(crate) u16);

#[derive(Debug, Default)]
struct Set {
    /// Ascending.
    members: Box<[Member]>,
    /// Blocks that name the set.
    blocks: u64,
}

/// The last answer of one kind of step from set to set. Events come in runs of
/// blocks that share a set, so one remembered step answers nearly all.
#[derive(Clone, Copy, Debug)]
struct Step {
    from: SetId,
    member: Member,
    to: SetId,
}

/// Members are hashed under a fixed seed: answers must not depend on a process's
/// randomness, and members come from the sidecar, not from clients.
#[derive(Debug, Default)]
pub(super) struct Sets {
    /// By number minus one.
    sets: Vec<Set>,
    /// All numbers in use, by their members.
    numbers: HashTable<SetId>,
    free: Vec<SetId>,
    /// The number of each member's own set, while there is one.
    singletons: Vec<Option<SetId>>,
    last_with: Option<Step>,
    last_without: Option<Step>,
}

fn hash_of(members: &[Member]) -> u64 {
    FixedState::default().hash_one(members)
}

impl Sets {
    fn set(&self, id: SetId) -> Option<&Set> {
        self.sets.get((id.0 as usize).checked_sub(1)?)
    }

    fn set_mut(&mut self, id: SetId) -> Option<&mut Set> {
        self.sets.get_mut((id.0 as usize).checked_sub(1)?)
    }

    pub(super) fn members(&self, id: SetId) -> &[Member] {
        self.set(id).map_or(&[], |set| &set.members)
    }

    pub(super) fn contains(&self, id: SetId, member: Member) -> bool {
        self.members(id).binary_search(&member).is_ok()
    }

    /// The set of one member; `None` if every number is in use.
    pub(super) fn singleton(&mut self, member: Member) -> Option<SetId> {
        let at = usize::from(member.0);
        if let Some(Some(set)) = self.singletons.get(at) {
            return Some(*set);
        }
        let set = self.number(&[member])?;
        if self.singletons.len() <= at {
            self.singletons.resize(at + 1, None);
        }
        if let Some(place) = self.singletons.get_mut(at) {
            *place = Some(set);
        }
        Some(set)
    }

    /// The set with a member added; `None` if every number is in use.
    pub(super) fn with(&mut self, from: SetId, member: Member) -> Option<SetId> {
        if let Some(step) = self.last_with
            && step.from == from
            && step.member == member
        {
            return Some(step.to);
        }
        let old = self.members(from);
        let to = match old.binary_search(&member) {
            Ok(_) => from,
            Err(at) => {
                let mut members = old.to_vec();
                members.insert(at, member);
                self.number(&members)?
            }
        };
        self.last_with = Some(Step { from, member, to });
        Some(to)
    }

    /// The set with a member taken out; `Some(None)` if nobody is left, `None`
    /// if every number is in use.
    #[expect(clippy::option_option, reason = "nobody left is not an exhausted number space")]
    pub(super) fn without(&mut self, from: SetId, member: Member) -> Option<Option<SetId>> {
        if let Some(step) = self.last_without
            && step.from == from
            && step.member == member
        {
            return Some(Some(step.to));
        }
        let old = self.members(from);
        let Ok(at) = old.binary_search(&member) else {
            return Some(Some(from));
        };
        if old.len() == 1 {
            return Some(None);
        }
        let mut members = old.to_vec();
        members.remove(at);
        let to = self.number(&members)?;
        self.last_without = Some(Step { from, member, to });
        Some(Some(to))
    }

    /// One more block names the set.
    pub(super) fn acquire(&mut self, id: SetId) {
        if let Some(set) = self.set_mut(id) {
            set.blocks += 1;
        }
    }

    /// One block fewer names the set; its number is free after the last.
    pub(super) fn release(&mut self, id: SetId) {
        let Some(set) = self.set_mut(id) else { return };
        set.blocks = set.blocks.saturating_sub(1);
        if set.blocks > 0 {
            return;
        }
        let members = core::mem::take(&mut set.members);
        if let Ok(number) = self.numbers.find_entry(hash_of(&members), |number| *number == id) {
            number.remove();
        }
        if let [member] = &*members
            && let Some(single) = self.singletons.get_mut(usize::from(member.0))
        {
            *single = None;
        }
        self.free.push(id);
        // A remembered step may lead to or from the number that is free now.
        let is_of = |step: &Step| step.from == id || step.to == id;
        self.last_with = self.last_with.filter(|step| !is_of(step));
        self.last_without = self.last_without.filter(|step| !is_of(step));
    }

    fn number(&mut self, members: &[Member]) -> Option<SetId> {
        let hash = hash_of(members);
        if let Some(id) = self.numbers.find(hash, |id| self.members(*id) == members) {
            return Some(*id);
        }
        let id = match self.free.pop() {
            Some(id) => id,
            None if self.sets.len() < SETS_MAX => {
                self.sets.push(Set::default());
                SetId(u32::try_from(self.sets.len()).ok()?)
            }
            None => return None,
        };
        if let Some(set) = self.set_mut(id) {
            set.members = members.into();
        }
        let Self { sets, numbers, .. } = self;
        let rehash = |id: &SetId| {
            let set = (id.0 as usize).checked_sub(1).and_then(|at| sets.get(at));
            hash_of(set.map_or(&[], |set| &set.members))
        };
        numbers.insert_unique(hash, id, rehash);
        Some(id)
    }

    pub(super) fn bytes(&self) -> usize {
        let lists: usize =
            self.sets.iter().map(|set| set.members.len() * size_of::<Member>()).sum();
        self.sets.capacity() * size_of::<Set>()
            + self.numbers.allocation_size()
            + self.singletons.capacity() * size_of::<Option<SetId>>()
            + self.free.capacity() * size_of::<SetId>()
            + lists
    }
}
