//! Lease: which VM of a gateway process follows the feed.
//!
//! One VM reads the sidecar's stream and appends it to the ring log for all.
//! It renews its lease on every tick; if its VM dies, or its thread is stuck,
//! the lease runs out and another VM takes over.
//!
//! Two VMs that both believe to lead, for a moment, do no harm: feed frames are
//! numbered, and readers pass over what they have.

use crate::shared::{KEY_PREFIX, SharedData, Unavailable, Write};
use crate::wire::{Reader, Writer};

fn key() -> String {
    format!("{KEY_PREFIX}/lease")
}

/// Takes or renews the lease. Returns whether `vm` holds it now.
///
/// - `vm`: this VM's number; never 0.
/// - `now_ms`: the host's monotonic clock, which all VMs of a process share.
/// - `term_ms`: how long the lease holds without renewal.
///
/// # Errors
///
/// [`Unavailable`]; the caller does not lead.
pub fn hold(
    store: &impl SharedData,
    vm: u64,
    now_ms: u64,
    term_ms: u64,
) -> Result<bool, Unavailable> {
    let found = store.get(&key())?;
    let holder = found.as_ref().and_then(|found| {
        let mut reader = Reader::new(&found.value);
        Some((reader.u64().ok()?, reader.u64().ok()?))
    });
    let is_other = holder.is_some_and(|(owner, until)| {
        // An expiry further away than a term was written by a clock that this
        // one has nothing to do with (the process's predecessor, say).
        owner != vm && now_ms < until && until <= now_ms.saturating_add(term_ms)
    });
    if is_other {
        return Ok(false);
    }
    let mut writer = Writer::new();
    writer.u64(vm);
    writer.u64(now_ms.saturating_add(term_ms));
    let version = found.as_ref().map(|found| found.version);
    if store.set(&key(), &writer.into_bytes(), version)? == Write::Lost {
        return Ok(false);
    }
    // The first write of a key cannot be conditional: look who won.
    let owner = store.get(&key())?.and_then(|found| Reader::new(&found.value).u64().ok());
    Ok(owner == Some(vm))
}

/// Gives the lease up, if `vm` holds it, so that another VM need not wait.
///
/// # Errors
///
/// [`Unavailable`].
pub fn release(store: &impl SharedData, vm: u64) -> Result<(), Unavailable> {
    let Some(found) = store.get(&key())? else { return Ok(()) };
    if Reader::new(&found.value).u64().ok() == Some(vm) {
        let mut writer = Writer::new();
        writer.u64(0);
        writer.u64(0);
        store.set(&key(), &writer.into_bytes(), Some(found.version))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::memory::MemoryStore;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn one_vm_holds_it_until_it_runs_out() {
        let store = MemoryStore::default();
        assert_eq!(hold(&store, 1, 100, 1_000), Ok(true));
        assert_eq!(hold(&store, 2, 500, 1_000), Ok(false));
        assert_eq!(hold(&store, 1, 900, 1_000), Ok(true), "renewed");
        assert_eq!(hold(&store, 2, 1_899, 1_000), Ok(false));
        assert_eq!(hold(&store, 2, 1_900, 1_000), Ok(true), "run out");
        assert_eq!(hold(&store, 1, 1_901, 1_000), Ok(false));
    }

    #[test]
    fn giving_it_up_lets_the_next_in_at_once() {
        let store = MemoryStore::default();
        hold(&store, 1, 100, 1_000).unwrap();
        release(&store, 2).unwrap();
        assert_eq!(hold(&store, 2, 101, 1_000), Ok(false), "not the other's to give up");
        release(&store, 1).unwrap();
        assert_eq!(hold(&store, 2, 101, 1_000), Ok(true));
    }

    #[test]
    fn a_lease_of_another_clock_is_not_waited_for() {
        let store = MemoryStore::default();
        hold(&store, 1, 1_000_000, 1_000).unwrap();
        assert_eq!(hold(&store, 2, 5, 1_000), Ok(true));
    }

    #[test]
    fn rubbish_is_overwritten() {
        let store = MemoryStore::default();
        store.set(&key(), b"rubbish", None).unwrap();
        assert_eq!(hold(&store, 2, 5, 1_000), Ok(true));
    }
}
