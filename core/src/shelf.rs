//! Shelf: blobs in the gateway's shared data, for VMs that come later.
//!
//! The VM that follows the feed puts each tokenizer file on the shelf, part by
//! part; every VM takes its copy from there, a few parts a tick. A VM that
//! starts while the sidecar is away finds all it needs.
//!
//! A place holds one blob; its label is written when the last part is there, and
//! names the blob. Keys cannot be removed, so places are used again: an
//! unlabelled or unwanted one first.
//!
//! # Invariants
//!
//! 1. A labelled place holds the whole blob; it is unlabelled before its parts
//!    are overwritten.
//! 2. A reader checks the content address at the end: whatever raced, a wrong
//!    blob is never used.

use crate::card::BlobId;
use crate::limits::{BLOB_PART_BYTES_MAX, SHELF_PLACES};
use crate::shared::{KEY_PREFIX, SharedData, Unavailable};
use crate::wire::{Reader, Writer};

/// A place on the shelf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(u32);

fn label_key(place: Place) -> String {
    format!("{KEY_PREFIX}/shelf/{}", place.0)
}

fn part_key(place: Place, part: u64) -> String {
    format!("{KEY_PREFIX}/shelf/{}/{part}", place.0)
}

fn label(store: &impl SharedData, place: Place) -> Result<Option<BlobId>, Unavailable> {
    let Some(found) = store.get(&label_key(place))? else { return Ok(None) };
    let mut reader = Reader::new(&found.value);
    let (Ok(hash), Ok(len)) = (reader.u64(), reader.u64()) else { return Ok(None) };
    Ok((len > 0).then_some(BlobId { hash, len }))
}

fn write_label(
    store: &impl SharedData,
    place: Place,
    blob: Option<BlobId>,
) -> Result<(), Unavailable> {
    let blob = blob.unwrap_or(BlobId { hash: 0, len: 0 });
    let mut writer = Writer::new();
    writer.u64(blob.hash);
    writer.u64(blob.len);
    store.set(&label_key(place), &writer.into_bytes(), None)?;
    Ok(())
}

/// Where a complete blob stands, if anywhere.
///
/// # Errors
///
/// [`Unavailable`].
pub fn find(store: &impl SharedData, blob: BlobId) -> Result<Option<Place>, Unavailable> {
    for place in (0..SHELF_PLACES).map(Place) {
        if label(store, place)? == Some(blob) {
            return Ok(Some(place));
        }
    }
    Ok(None)
}

/// A place to put a blob: one that holds none of `wanted`. `None` if every
/// place is taken by a wanted blob.
///
/// # Errors
///
/// [`Unavailable`].
pub fn claim(store: &impl SharedData, wanted: &[BlobId]) -> Result<Option<Place>, Unavailable> {
    for place in (0..SHELF_PLACES).map(Place) {
        match label(store, place)? {
            Some(blob) if wanted.contains(&blob) => {}
            Some(_) => {
                write_label(store, place, None)?;
                return Ok(Some(place));
            }
            None => return Ok(Some(place)),
        }
    }
    Ok(None)
}

/// Puts a part of a blob into a claimed place.
///
/// - `offset`: a multiple of [`BLOB_PART_BYTES_MAX`].
///
/// # Errors
///
/// [`Unavailable`].
pub fn put(
    store: &impl SharedData,
    place: Place,
    offset: u64,
    bytes: &[u8],
) -> Result<(), Unavailable> {
    store.set(&part_key(place, offset / BLOB_PART_BYTES_MAX as u64), bytes, None)?;
    Ok(())
}

/// Declares a place complete.
///
/// # Errors
///
/// [`Unavailable`].
pub fn complete(store: &impl SharedData, place: Place, blob: BlobId) -> Result<(), Unavailable> {
    write_label(store, place, Some(blob))
}

/// The part that begins at `offset`, if it is there.
///
/// # Errors
///
/// [`Unavailable`].
pub fn take(
    store: &impl SharedData,
    place: Place,
    offset: u64,
) -> Result<Option<Vec<u8>>, Unavailable> {
    let part = offset / BLOB_PART_BYTES_MAX as u64;
    Ok(store.get(&part_key(place, part))?.map(|found| found.value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::memory::MemoryStore;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn a_blob_is_found_once_it_is_complete() {
        let store = MemoryStore::default();
        let bytes = vec![7_u8; BLOB_PART_BYTES_MAX + 10];
        let blob = BlobId::of(&bytes);
        let place = claim(&store, &[blob]).unwrap().unwrap();
        for (part, chunk) in (0..).zip(bytes.chunks(BLOB_PART_BYTES_MAX)) {
            assert_eq!(find(&store, blob), Ok(None));
            put(&store, place, part * BLOB_PART_BYTES_MAX as u64, chunk).unwrap();
        }
        complete(&store, place, blob).unwrap();
        assert_eq!(find(&store, blob), Ok(Some(place)));
        let mut copy = take(&store, place, 0).unwrap().unwrap();
        copy.extend(take(&store, place, BLOB_PART_BYTES_MAX as u64).unwrap().unwrap());
        assert_eq!(BlobId::of(&copy), blob);
    }

    #[test]
    fn places_of_unwanted_blobs_are_used_again() {
        let store = MemoryStore::default();
        let blob = |n: u32| BlobId { hash: n.into(), len: 1 };
        let all: Vec<BlobId> = (0..SHELF_PLACES).map(blob).collect();
        for blob in &all {
            let place = claim(&store, &all).unwrap().unwrap();
            complete(&store, place, *blob).unwrap();
        }
        assert_eq!(claim(&store, &all), Ok(None));
        let place = claim(&store, &all[1..]).unwrap().unwrap();
        assert_eq!(find(&store, all[0]), Ok(None), "unlabelled before it is overwritten");
        complete(&store, place, blob(99)).unwrap();
        assert_eq!(find(&store, blob(99)), Ok(Some(place)));
    }
}
