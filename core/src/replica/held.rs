//! Held: what each worker holds of a prompt, by all that is known.

use super::Replica;
use crate::ids::SequenceHash;
use crate::overlap::{Overlap, tiered_overlaps};
use crate::settings::Settings;

impl Replica {
    /// Counts the leading blocks of a prompt that each worker holds, as it says or
    /// as own decisions let expect.
    ///
    /// - `out`: is cleared first; then in ascending order of slots.
    pub fn held(
        &mut self,
        prompt: &[SequenceHash],
        settings: &Settings,
        now_ms: u64,
        out: &mut Vec<Overlap>,
    ) {
        out.clear();
        if !settings.use_kv_events {
            self.approximate.overlaps(prompt, now_ms, out);
            return;
        }
        if self.was_live {
            self.overlaps(prompt, out);
        }
        if settings.router_predicted_ttl_ms.is_some() {
            let mut predicted = Vec::new();
            self.approximate.overlaps(prompt, now_ms, &mut predicted);
            take_longer(out, &predicted);
        }
    }

    /// Counts the leading blocks of a prompt that each worker holds in all its
    /// tiers; see [`tiered_overlaps`].
    pub fn overlaps(&mut self, prompt: &[SequenceHash], out: &mut Vec<Overlap>) {
        tiered_overlaps(&mut self.index, &self.tiers, prompt, out);
    }
}

/// Takes the longer of two overlaps of each worker; both ascend by slots.
fn take_longer(out: &mut Vec<Overlap>, others: &[Overlap]) {
    for other in others {
        match out.binary_search_by_key(&other.slot, |overlap| overlap.slot) {
            Ok(at) => {
                if let Some(overlap) = out.get_mut(at) {
                    overlap.blocks = overlap.blocks.max(other.blocks);
                }
            }
            Err(at) => out.insert(at, *other),
        }
    }
}
