//! File: Dynamo's file store, a directory of small files.
//!
//! Files are looked at again and again: the store has nobody to ask. A file
//! that its owner no longer touches counts as gone, as for Dynamo itself,
//! whose peers remove such files; where no peer lives they stay.

use std::collections::BTreeMap;
use std::fs::{self, DirEntry};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::mpsc;
use tokio::time::sleep;

use super::drive::Sight;
use super::listing::{Author, Listing};
use super::record::{Bucket, Key, parse};
use crate::limits::{FILE_STORE_EVERY, FILE_STORE_EXPIRES_AFTER, RECORD_BYTES_MAX, RECORDS_MAX};

/// What the store holds: each file's bytes, one more than a record may have at
/// most.
type Contents = BTreeMap<Key, Vec<u8>>;

/// Tells of a store and of its changes until nobody listens.
///
/// - `directory`: the store's root, `DYN_FILE_KV`.
/// - `clock`: the time that files' ages are measured at.
pub async fn watch(
    directory: PathBuf,
    clock: impl Fn() -> SystemTime + Send,
    sights: mpsc::Sender<Sight>,
) {
    let directory: Arc<Path> = directory.into();
    let mut seen = None;
    while !sights.is_closed() {
        let (root, now) = (Arc::clone(&directory), clock());
        let looked = tokio::task::spawn_blocking(move || look(&root, now)).await;
        let looked = looked.unwrap_or_else(|error| Err(error.to_string()));
        if seen.as_ref() != Some(&looked) {
            let sight = match &looked {
                Ok(contents) => Sight::Records(listing(contents)),
                Err(error) => Sight::Failed(format!("{}: {error}", directory.display())),
            };
            if sights.send(sight).await.is_err() {
                return;
            }
            seen = Some(looked);
        }
        sleep(FILE_STORE_EVERY).await;
    }
}

fn listing(contents: &Contents) -> Listing {
    let author = Arc::new(Author::default());
    let mut listing = Listing::default();
    for (key, bytes) in contents {
        listing.add(key, &parse(key, bytes).map(Arc::new), &author);
    }
    listing
}

/// Reads the whole store. What cannot be read at all is an error, so that it
/// cannot be mistaken for an empty store.
fn look(root: &Path, now: SystemTime) -> Result<Contents, String> {
    fs::metadata(root).map_err(|error| error.to_string())?;
    let mut contents = Contents::new();
    for bucket in Bucket::ALL {
        let entries = match fs::read_dir(root.join(bucket.path())) {
            Ok(entries) => entries,
            // Directories are made when the first of their files is.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error.to_string()),
        };
        for entry in entries {
            let entry = entry.map_err(|error| error.to_string())?;
            let name = entry.file_name();
            let Some(key) = name.to_str().and_then(|name| Key::of_file(bucket, name)) else {
                continue;
            };
            // One too many, so that the listing notes it.
            if contents.len() > RECORDS_MAX {
                return Ok(contents);
            }
            match read(&entry, now) {
                Ok(Some(bytes)) => {
                    contents.insert(key, bytes);
                }
                Ok(None) => {}
                // Gone since the directory was read.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }
    Ok(contents)
}

/// The bytes of a file; `None` if it is left behind or no file.
fn read(entry: &DirEntry, now: SystemTime) -> std::io::Result<Option<Vec<u8>>> {
    let about = fs::metadata(entry.path())?;
    // A time in the future is a young file, on a host with another clock.
    let age = now.duration_since(about.modified()?).unwrap_or_default();
    if !about.is_file() || age > FILE_STORE_EXPIRES_AFTER {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    let most = u64::try_from(RECORD_BYTES_MAX).unwrap_or(u64::MAX).saturating_add(1);
    fs::File::open(entry.path())?.take(most).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

    use super::*;
    use crate::config::discovery::{Backend, DiscoveryConfig, FrontendRule, NamespaceRule};
    use crate::discovery::{ListEvent, captures, drive};
    use crate::fleet::Fleet;

    fn path(root: &Path, key: &Key) -> PathBuf {
        let name = utf8_percent_encode(&key.rest, NON_ALPHANUMERIC).to_string();
        root.join(key.bucket.path()).join(name)
    }

    fn fill(root: &Path) {
        for bucket in Bucket::ALL {
            fs::create_dir_all(root.join(bucket.path())).unwrap();
        }
        for (key, value) in captures::file() {
            fs::write(path(root, &key), value.to_string()).unwrap();
        }
    }

    #[test]
    fn a_store_is_read_but_for_what_is_unfinished_or_left_behind() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        assert_eq!(look(root, SystemTime::now()), Ok(Contents::new()), "no bucket yet");
        fill(root);
        fs::write(root.join("v1/instances/.tmp_x"), "{").unwrap();
        fs::create_dir(root.join("v1/instances/directory")).unwrap();
        let now = SystemTime::now();
        let contents = look(root, now).unwrap();
        assert_eq!(contents.len(), 11);
        assert_eq!(listing(&contents).entries.len(), 11);
        assert_eq!(look(root, now + Duration::from_secs(9)).unwrap().len(), 11);
        assert_eq!(look(root, now - Duration::from_secs(60)).unwrap().len(), 11);
        assert_eq!(look(root, now + Duration::from_secs(11)).unwrap().len(), 0);
        assert!(look(&root.join("none"), now).is_err());
        fs::remove_dir_all(root.join("v1/mdc")).unwrap();
        fs::write(root.join("v1/mdc"), "").unwrap();
        assert!(look(root, now).is_err(), "what cannot be read is not empty");
    }

    #[test]
    fn a_file_that_is_too_long_is_a_problem() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fill(root);
        let long = vec![b' '; RECORD_BYTES_MAX + 10];
        fs::write(root.join("v1/instances/long"), long).unwrap();
        let listing = listing(&look(root, SystemTime::now()).unwrap());
        let problems = listing.problems.into_vec();
        assert_eq!((listing.entries.len(), problems.len()), (11, 1));
        assert_eq!(problems[0].reason, "record_too_long");
    }

    async fn taken(lists: &mut mpsc::Receiver<ListEvent>) -> Fleet {
        match lists.recv().await.unwrap() {
            ListEvent::Taken(fleet) => fleet,
            ListEvent::Refused(message) => panic!("{message}"),
        }
    }

    #[tokio::test]
    async fn changes_are_told_and_failures_empty_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("store");
        fs::create_dir(&root).unwrap();
        fill(&root);
        let config = DiscoveryConfig {
            backend: Backend::File(root.clone()),
            namespaces: NamespaceRule::Exact("dynamo".into()),
            frontend: FrontendRule::PodPort(8000),
        };
        let (events, mut lists) = mpsc::channel(1);
        let task = tokio::spawn(drive::run(config, Vec::new(), false, events));
        let first = taken(&mut lists).await;
        assert_eq!(first.ranks.len(), 2);

        let away = directory.path().join("away");
        fs::rename(&root, &away).unwrap();
        assert!(matches!(lists.recv().await, Some(ListEvent::Refused(_))));
        fs::rename(&away, &root).unwrap();
        assert_eq!(taken(&mut lists).await, first, "told again, so that the failure is over");

        let serving = captures::file()
            .into_iter()
            .find(|(key, _)| key.bucket == Bucket::Instances && key.rest.contains("/generate/"));
        fs::remove_file(path(&root, &serving.unwrap().0)).unwrap();
        assert_eq!(taken(&mut lists).await.ranks.len(), 0);
        drop(lists);
        task.await.unwrap();
    }
}
