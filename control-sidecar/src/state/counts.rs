//! Counts: what was noticed in an engine's events, by reason.

/// Why something that an engine said is not in the index, or was odd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(usize)]
pub enum Notice {
    /// In a lower tier for which no slot was free.
    NoTierSlot,
    /// In a lower tier, and the page before is not known: not yet in the index.
    LowerTierOrphan,
    /// As many blocks of lower tiers wait for their parents as may.
    OrphansFull,
    /// Of a cache that is not the main attention's.
    OtherGroup,
    /// A page named without its tokens.
    Placeholder,
    /// Pages that do not fit the model's blocks.
    WrongBlockSize,
    /// More or fewer tokens than the pages have.
    TokenCount,
    /// Keys that we cannot hash.
    UnknownKeys,
    /// A page stored twice in one event, or as its own parent.
    SelfReference,
    /// The page before is not known.
    ParentUnknown,
    /// The rank remembers as many pages as it may.
    PagesFull,
    /// As many pages are passed over as can be remembered.
    PassedOverFull,
    /// More groups than can be remembered.
    GroupsFull,
    /// A removal of a page that is not known.
    RemovedUnknown,
    /// A page announced again.
    Repeated,
}

impl Notice {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 15] = [
        Self::NoTierSlot,
        Self::LowerTierOrphan,
        Self::OrphansFull,
        Self::OtherGroup,
        Self::Placeholder,
        Self::WrongBlockSize,
        Self::TokenCount,
        Self::UnknownKeys,
        Self::SelfReference,
        Self::ParentUnknown,
        Self::PagesFull,
        Self::PassedOverFull,
        Self::GroupsFull,
        Self::RemovedUnknown,
        Self::Repeated,
    ];

    /// Fixed word for metrics.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::NoTierSlot => "no_tier_slot",
            Self::LowerTierOrphan => "lower_tier_orphan",
            Self::OrphansFull => "orphans_full",
            Self::OtherGroup => "other_group",
            Self::Placeholder => "placeholder",
            Self::WrongBlockSize => "wrong_block_size",
            Self::TokenCount => "token_count",
            Self::UnknownKeys => "unknown_keys",
            Self::SelfReference => "self_reference",
            Self::ParentUnknown => "parent_unknown",
            Self::PagesFull => "pages_full",
            Self::PassedOverFull => "passed_over_full",
            Self::GroupsFull => "groups_full",
            Self::RemovedUnknown => "removed_unknown",
            Self::Repeated => "repeated",
        }
    }
}

/// What has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    notices: [u64; Notice::ALL.len()],
    /// Blocks that became held.
    pub stored: u64,
    /// Blocks that ceased to be, clears not included.
    pub removed: u64,
    /// Clears.
    pub cleared: u64,
}

impl Counts {
    /// How often something was noticed: events or pages.
    #[must_use]
    pub fn of(&self, notice: Notice) -> u64 {
        self.notices.get(notice as usize).copied().unwrap_or(0)
    }

    /// Something was noticed so many times.
    pub(super) fn note(&mut self, notice: Notice, times: usize) {
        if let Some(count) = self.notices.get_mut(notice as usize) {
            *count += times as u64;
        }
    }

    /// Adds another's counts.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.notices.iter_mut().zip(other.notices) {
            *mine += theirs;
        }
        self.stored += other.stored;
        self.removed += other.removed;
        self.cleared += other.cleared;
    }
}
