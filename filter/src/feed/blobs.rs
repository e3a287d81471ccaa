//! Blobs: tokenizer files on their way from the sidecar to the shelf in shared
//! data, which the VM that follows the feed fills, and from there into each VM.

use warmpath_core::card::BlobId;
use warmpath_core::frame::Kind;
use warmpath_core::limits::BLOB_PART_BYTES_MAX;
use warmpath_core::shared::SharedData;
use warmpath_core::shelf::{self, Place};
use warmpath_core::tokenize::AlignedBytes;
use warmpath_core::uplink::{BlobPart, FetchBlob, More};

use super::message::send;
use crate::host;
use crate::limits::{BLOB_CREDIT, SHELF_PARTS_PER_TICK, SHELF_RETRY_MS};
use crate::metrics::Counter;
use crate::vm::Vm;

#[derive(Clone, Copy, Debug)]
pub(super) struct Fetch {
    blob: BlobId,
    place: Place,
    /// The next byte that must come.
    offset: u64,
}

/// A blob that this VM is copying off the shelf.
#[derive(Debug)]
pub(super) struct Loading {
    pub(super) blob: BlobId,
    place: Place,
    file: AlignedBytes,
    offset: u64,
}

impl Vm {
    /// Fetches the next tokenizer file that is not on the shelf.
    pub(super) fn drive_fetch(&mut self) {
        let Some(follow) = &self.feed.follow else { return };
        if follow.fetch.is_some() {
            return;
        }
        let wanted = self.models.named_blobs();
        let missing = wanted.iter().find(|blob| shelf::find(&self.store, **blob) == Ok(None));
        let Some(blob) = missing.copied() else { return };
        let Ok(Some(place)) = shelf::claim(&self.store, &wanted) else { return };
        let fetch = FetchBlob { blob, offset: 0 };
        let asked = send(follow.stream, Kind::FetchBlob, &fetch.encode())
            && send(follow.stream, Kind::More, &More { parts: BLOB_CREDIT }.encode());
        if asked && let Some(follow) = &mut self.feed.follow {
            follow.fetch = Some(Fetch { blob, place, offset: 0 });
        }
    }

    pub(super) fn on_blob_part(&mut self, part: &BlobPart<'_>) {
        let Some(follow) = &mut self.feed.follow else { return };
        let stream = follow.stream;
        let Some(fetch) = &mut follow.fetch else { return };
        if part.blob != fetch.blob || part.offset != fetch.offset {
            return;
        }
        if part.bytes.is_empty() {
            // The sidecar has dropped it: other cards are on their way.
            follow.fetch = None;
            return;
        }
        let kept = shelf::put(&self.store, fetch.place, part.offset, part.bytes).is_ok();
        fetch.offset += part.bytes.len() as u64;
        if !kept {
            follow.fetch = None;
        } else if fetch.offset == fetch.blob.len {
            let done = shelf::complete(&self.store, fetch.place, fetch.blob);
            follow.fetch = None;
            if done.is_err() {
                self.metrics.add(Counter::HostRefused, 1);
            }
        } else {
            send(stream, Kind::More, &More { parts: 1 }.encode());
        }
    }

    /// Copies a tokenizer file off the shelf, a few parts a tick.
    pub(super) fn drive_loading(&mut self, now_ms: u64) {
        if self.feed.loading.is_none() && now_ms >= self.feed.look_at_ms {
            self.feed.look_at_ms = now_ms + SHELF_RETRY_MS;
            self.begin_loading();
        }
        for _ in 0..SHELF_PARTS_PER_TICK {
            let Some(loading) = &mut self.feed.loading else { return };
            match load_part(&self.store, loading) {
                Progress::More => {}
                Progress::Raced => self.feed.loading = None,
                Progress::Complete => {
                    if let Some(loading) = self.feed.loading.take() {
                        self.finish_loading(loading);
                    }
                }
            }
        }
    }

    fn begin_loading(&mut self) {
        let Some(blob) = self.models.wanted_blob() else { return };
        let Ok(Some(place)) = shelf::find(&self.store, blob) else { return };
        let Ok(len) = usize::try_from(blob.len) else { return };
        let file = AlignedBytes::zeroed(len);
        self.feed.loading = Some(Loading { blob, place, file, offset: 0 });
    }

    fn finish_loading(&mut self, loading: Loading) {
        let Loading { blob, file, .. } = loading;
        if BlobId::of(file.as_bytes()) != blob {
            // Overwritten while it was copied; look again.
            return;
        }
        let started = host::monotonic_ns();
        let is_loaded = self.models.load(blob, file);
        let took_us = host::monotonic_ns().saturating_sub(started) / 1_000;
        if is_loaded {
            log::info!("warmpath: vm {} loaded a tokenizer in {took_us} us", self.number);
        } else {
            self.metrics.add(Counter::TokenizersRefused, 1);
            log::error!("warmpath: a tokenizer file cannot be used; its model is routed by load");
        }
    }
}

enum Progress {
    More,
    Complete,
    /// The place holds something else by now.
    Raced,
}

fn load_part(store: &impl SharedData, loading: &mut Loading) -> Progress {
    let Ok(Some(part)) = shelf::take(store, loading.place, loading.offset) else {
        return Progress::Raced;
    };
    let rest = loading.blob.len - loading.offset;
    let expected = rest.min(BLOB_PART_BYTES_MAX as u64);
    let start = usize::try_from(loading.offset).unwrap_or(usize::MAX);
    let target =
        loading.file.as_bytes_mut().get_mut(start..).and_then(|file| file.get_mut(..part.len()));
    match target {
        Some(target) if part.len() as u64 == expected => target.copy_from_slice(&part),
        _ => return Progress::Raced,
    }
    loading.offset += expected;
    if loading.offset == loading.blob.len { Progress::Complete } else { Progress::More }
}
