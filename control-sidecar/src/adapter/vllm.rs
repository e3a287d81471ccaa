//! vLLM: positions of fields, and keys of blocks.
//!
//! Released forms, all read: batch of two or three values, events by position
//! with five to twelve fields (0.9 to 0.23), events by name (from about 0.24),
//! batch by name (one development snapshot); hashes signed, unsigned or bytes.

use warmpath_core::event::Stored;

use super::fields::{Fields, Slots};
use super::keys;

/// Fields by position, as releases appended them.
pub(super) const SLOTS: Slots = Slots {
    stored: &[
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
        "group_idx",
        "kv_cache_spec_kind",
        "kv_cache_spec_sliding_window",
        "locality",
        "ownership",
    ],
    removed: &[
        "block_hashes",
        "medium",
        "group_idx",
        "kv_cache_spec_kind",
        "kv_cache_spec_sliding_window",
        "locality",
        "ownership",
    ],
};

/// Reads adapter, salt and objects. vLLM puts the salt among the keys of a
/// prompt's first block; a field of that name is Dynamo's and wins.
pub(super) fn read_keys(stored: &mut Stored, fields: &Fields<'_>) {
    fields.read_lora(stored);
    if let Some(keys) = fields.extra_keys {
        keys::read_extra_keys(stored, keys);
    }
    super::sglang::read_salt_field(stored, fields);
}
