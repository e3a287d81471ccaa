//! SGLang: positions of fields, and the salt.
//!
//! Released forms, all read: events by position (before 0.5.21), with a map of
//! metadata as last field or without; events by name. Pages may be as small as
//! one token, and pairs of tokens under eagle-style drafts.

use warmpath_core::event::Stored;

use super::fields::{Fields, Read, Slots};

/// Fields by position. Where vLLM has the adapter's name, SGLang has a map of
/// metadata; the value's shape tells.
pub(super) const SLOTS: Slots = Slots {
    stored: &[
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
    ],
    removed: &["block_hashes", "medium"],
};

/// Reads adapter and salt.
pub(super) fn read_keys(stored: &mut Stored, fields: &Fields<'_>) {
    fields.read_lora(stored);
    read_salt_field(stored, fields);
}

/// Reads the salt from the field of its own.
pub(super) fn read_salt_field(stored: &mut Stored, fields: &Fields<'_>) {
    match fields.cache_salt {
        Read::Value(salt) if !salt.is_empty() => stored.cache_salt = Some(salt.to_owned()),
        Read::Bad => stored.understood = 0,
        _ => {}
    }
}
