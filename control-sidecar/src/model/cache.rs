//! Cache: compiled tokenizers on disk, so that a restart need not compile.
//!
//! Compiling takes a second or more, and until it is done a restarted sidecar
//! has no cards to send. A file is named by what it was compiled from and by
//! which program; it carries the hash of its own bytes, so that one that was cut
//! or damaged is compiled anew. Without a usable folder everything still works.

use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use tracing::debug;
use warmpath_core::limits::TOKENIZER_BYTES_MAX;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::read_bytes;
use crate::limits::CACHE_FILES_MAX;

const EXTENSION: &str = "tokenizer";

/// A folder of compiled tokenizers, or none.
#[derive(Clone, Debug, Default)]
pub struct Cache {
    directory: Option<PathBuf>,
    program: u64,
}

impl Cache {
    /// Uses a folder, made if it is not there; without one nothing is kept.
    #[must_use]
    pub fn new(directory: Option<PathBuf>) -> Self {
        Self { directory, program: this_program() }
    }

    fn name(&self, source: &[u8]) -> String {
        format!("{:032x}-{:016x}.{EXTENSION}", xxh3_128(source), self.program)
    }

    /// The compiled form of `source`, if it is there and whole.
    #[must_use]
    pub fn find(&self, source: &[u8]) -> Option<Vec<u8>> {
        let directory = self.directory.as_deref()?;
        let mut bytes = read_bytes(directory, &self.name(source), TOKENIZER_BYTES_MAX + 8).ok()?;
        let len = bytes.len().checked_sub(8)?;
        let hash = bytes.split_off(len);
        (xxh3_64(&bytes).to_le_bytes() == *hash).then_some(bytes)
    }

    /// Keeps the compiled form of `source`. A folder that cannot be written is
    /// noted and nothing else.
    pub fn keep(&self, source: &[u8], compiled: &[u8]) {
        let Some(directory) = self.directory.as_deref() else { return };
        let mut bytes = compiled.to_vec();
        bytes.extend_from_slice(&xxh3_64(compiled).to_le_bytes());
        // Under a name of its own first: a reader sees all of it or nothing.
        let name = self.name(source);
        let draft = directory.join(format!("{name}.{}", std::process::id()));
        let outcome = std::fs::create_dir_all(directory)
            .and_then(|()| std::fs::write(&draft, &bytes))
            .and_then(|()| std::fs::rename(&draft, directory.join(&name)));
        if let Err(error) = outcome {
            debug!(%error, "the compiled tokenizer is not kept");
            // If it was never made there is nothing to remove.
            let _ = std::fs::remove_file(&draft);
        }
        self.sweep(directory);
    }

    /// Removes the oldest files beyond the limit.
    fn sweep(&self, directory: &Path) {
        let mut files: Vec<_> = std::fs::read_dir(directory)
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let ours = path.extension().is_some_and(|extension| extension == EXTENSION);
                let time = path.metadata().and_then(|metadata| metadata.modified()).ok()?;
                ours.then_some((time, path))
            })
            .collect();
        files.sort();
        let surplus = files.len().saturating_sub(CACHE_FILES_MAX);
        for (_, path) in files.iter().take(surplus) {
            // Another sidecar may have removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Tells one build of this program from another: what an older one compiled
/// may be wrong.
fn this_program() -> u64 {
    let metadata = std::env::current_exe().and_then(|path| path.metadata());
    let modified = metadata.as_ref().ok().and_then(|it| it.modified().ok());
    let since = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let nanos = since.map_or(0, |since| since.as_nanos());
    let len = metadata.map_or(0, |it| it.len());
    xxh3_64(format!("{} {nanos} {len}", env!("CARGO_PKG_VERSION")).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_found_whole_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("made");
        let cache = Cache::new(Some(folder.clone()));
        assert_eq!(cache.find(b"source"), None);
        cache.keep(b"source", b"compiled");
        assert_eq!(cache.find(b"source").as_deref(), Some(&b"compiled"[..]));
        assert_eq!(cache.find(b"other"), None);
        assert_eq!(Cache { program: 1, ..cache.clone() }.find(b"source"), None);
        let path = folder.join(cache.name(b"source"));
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            assert_eq!(cache.find(b"source"), None, "byte {at}");
            std::fs::write(&path, &whole[..at]).unwrap();
            assert_eq!(cache.find(b"source"), None, "{at} bytes");
        }
    }

    #[test]
    fn no_folder_or_a_bad_one_is_no_trouble() {
        let cache = Cache::new(None);
        cache.keep(b"source", b"compiled");
        assert_eq!(cache.find(b"source"), None);
        let file = tempfile::NamedTempFile::new().unwrap();
        let cache = Cache::new(Some(file.path().to_owned()));
        cache.keep(b"source", b"compiled");
        assert_eq!(cache.find(b"source"), None);
    }

    #[test]
    fn the_folder_does_not_grow_without_end() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(Some(directory.path().to_owned()));
        for number in 0..CACHE_FILES_MAX + 5 {
            cache.keep(&number.to_le_bytes(), b"compiled");
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), CACHE_FILES_MAX);
    }
}
