//! Builds the pilots of a perfect hash table; see `tokenize::perfect_hash`.

use crate::tokenize::perfect_hash::{bucket, slot};

/// Keys per bucket, on average: fewer make more pilots, more take longer.
const KEYS_PER_BUCKET: usize = 4;
/// Slots per 100 keys.
const SLOTS_PERCENT: usize = 108;

/// Pilots, and the slot of each key in the order of the keys.
pub(super) struct Placement {
    pub(super) pilots: Vec<u16>,
    pub(super) slots: usize,
    pub(super) slot_of: Vec<usize>,
}

/// Places keys given by their mixed hashes, which must be distinct.
///
/// `None` if some bucket cannot be placed with any pilot, as with two equal
/// hashes.
pub(super) fn place(hashes: &[u64]) -> Option<Placement> {
    let slots = (hashes.len() * SLOTS_PERCENT).div_ceil(100) + 1;
    let buckets = hashes.len().div_ceil(KEYS_PER_BUCKET) + 1;
    let mut members: Vec<Vec<usize>> = vec![Vec::new(); buckets];
    for (key, &hash) in hashes.iter().enumerate() {
        members.get_mut(bucket(hash, buckets))?.push(key);
    }
    let mut order: Vec<usize> = (0..buckets).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(members.get(index).map_or(0, Vec::len)));

    let mut placement =
        Placement { pilots: vec![0; buckets], slots, slot_of: vec![0; hashes.len()] };
    let mut taken = vec![false; slots];
    for index in order {
        let keys = members.get(index)?;
        let (pilot, places) = (0..=u16::MAX)
            .find_map(|pilot| Some((pilot, free_places(hashes, keys, pilot, &taken)?)))?;
        *placement.pilots.get_mut(index)? = pilot;
        for (&key, place) in keys.iter().zip(places) {
            *taken.get_mut(place)? = true;
            *placement.slot_of.get_mut(key)? = place;
        }
    }
    Some(placement)
}

/// The slots of `keys` under `pilot`, if all are free and distinct.
fn free_places(hashes: &[u64], keys: &[usize], pilot: u16, taken: &[bool]) -> Option<Vec<usize>> {
    let mut places = Vec::with_capacity(keys.len());
    for &key in keys {
        let place = slot(*hashes.get(key)?, pilot, taken.len());
        if *taken.get(place)? || places.contains(&place) {
            return None;
        }
        places.push(place);
    }
    Some(places)
}
