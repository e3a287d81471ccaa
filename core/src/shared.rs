//! Shared: the key-value store that the VMs of one gateway process share.
//!
//! The host's calls stand behind a trait, so that the protocols over it (`ring`,
//! `lease`, `shelf`) are pure and can be tested without a gateway.

/// A value and the number that a conditional write of it must name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned {
    /// The bytes.
    pub value: Vec<u8>,
    /// Changes with every write of the key; never 0.
    pub version: u32,
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// The value is in force.
    Done,
    /// Somebody else wrote the key since the named version.
    Lost,
}

/// The host refused a call. Not seen in practice; the caller gives up what it
/// was doing and counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unavailable;

/// The store. Keys can be written but never removed, so every caller uses a
/// bounded set of them.
pub trait SharedData {
    /// The value of a key, or `None` if it was never written.
    ///
    /// # Errors
    ///
    /// [`Unavailable`].
    fn get(&self, key: &str) -> Result<Option<Versioned>, Unavailable>;

    /// Writes a key.
    ///
    /// - `version`: `Some` to write only if the key still has this version.
    ///   On a key that was never written a conditional write always succeeds,
    ///   which is why slots exist before they are used.
    ///
    /// # Errors
    ///
    /// [`Unavailable`].
    fn set(&self, key: &str, value: &[u8], version: Option<u32>) -> Result<Write, Unavailable>;
}

/// Prefix of every key. Istio gives all its plugins one namespace, so keys name
/// their owner; the number changes whenever the meaning of a key does, so that
/// an old and a new module can run side by side during an upgrade.
pub const KEY_PREFIX: &str = "warmpath/3";

#[cfg(any(test, feature = "memory-store"))]
pub mod memory {
    //! A store in memory, with the host's rules, for tests.

    use super::{SharedData, Unavailable, Versioned, Write};
    use hashbrown::HashMap;
    use std::sync::Mutex;

    /// Behaves as the store of proxy-wasm hosts does.
    #[derive(Debug, Default)]
    pub struct MemoryStore {
        inner: Mutex<(u32, HashMap<String, Versioned, foldhash::fast::FixedState>)>,
    }

    impl SharedData for MemoryStore {
        fn get(&self, key: &str) -> Result<Option<Versioned>, Unavailable> {
            Ok(self.inner.lock().map_err(|_| Unavailable)?.1.get(key).cloned())
        }

        fn set(&self, key: &str, value: &[u8], version: Option<u32>) -> Result<Write, Unavailable> {
            let mut inner = self.inner.lock().map_err(|_| Unavailable)?;
            let (last, entries) = &mut *inner;
            if let (Some(expected), Some(present)) = (version, entries.get(key))
                && present.version != expected
            {
                return Ok(Write::Lost);
            }
            *last += 1;
            let versioned = Versioned { value: value.to_vec(), version: *last };
            entries.insert(key.to_owned(), versioned);
            Ok(Write::Done)
        }
    }
}
