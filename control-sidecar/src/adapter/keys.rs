//! Keys: what separates blocks of equal tokens, beside the adapter.
//!
//! Engines attach untyped keys to blocks: hashes of images, cache salts,
//! digests of embeddings. What we can hash as the filter does goes into the
//! event; from the first block on that carries anything else, the event is not
//! indexed (`Stored::understood`).

use warmpath_core::event::Stored;
use warmpath_core::limits::EVENT_NAME_BYTES_MAX;
use xxhash_rust::xxh3::xxh3_64;

use super::fields::{Fields, push_object};
use super::msgpack::{MsgpackError, Reader, Shape};

/// How Dynamo marks its own cache salts among vLLM's keys.
const DYNAMO_SALT_PREFIX: &str = "dynamo-cache-salt:";

/// Length of an object's identifier that is a hash in hexadecimal.
const HASH_IDENTIFIER_LEN: usize = 64;

/// The hash of an object's identifier: the first 64 bits of one that is 256
/// bits in hexadecimal, else XXH3-64 of the text (Dynamo's router, 1.6.1).
///
/// Returns `None` for an empty identifier.
#[must_use]
pub fn object_hash(identifier: &str) -> Option<u64> {
    if identifier.is_empty() {
        return None;
    }
    if is_hash(identifier) {
        return identifier.get(..16).and_then(|digits| u64::from_str_radix(digits, 16).ok());
    }
    Some(xxh3_64(identifier.as_bytes()))
}

fn is_hash(text: &str) -> bool {
    text.len() == HASH_IDENTIFIER_LEN && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Reads vLLM's `extra_keys` into the event: for each block nil or a list of
/// keys. The adapter's name must have been read before, since it is a key too.
pub(super) fn read_extra_keys(stored: &mut Stored, keys: Reader<'_>) {
    each_page(stored, keys, read_page_keys);
}

/// Reads the objects that TensorRT-LLM and Dynamo describe in fields of their
/// own.
pub(super) fn read_object_keys(stored: &mut Stored, fields: &Fields<'_>) {
    if let Some(keys) = fields.mm_keys {
        each_page(stored, keys, |stored, page, reader| {
            for _ in 0..reader.list()? {
                let hash = map_value(reader, "hash")?;
                let identifier = hash.ok_or(MsgpackError::Shape)?.text()?;
                push_object(stored, page, object_hash(identifier).ok_or(MsgpackError::Value)?);
            }
            Ok(())
        });
    }
    if let Some(infos) = fields.mm_infos {
        each_page(stored, infos, |stored, page, reader| {
            let mut objects = map_value(reader, "mm_objects")?.ok_or(MsgpackError::Shape)?;
            for _ in 0..objects.list()? {
                let mut hash = map_value(&mut objects, "mm_hash")?.ok_or(MsgpackError::Shape)?;
                push_object(stored, page, hash.integer_bits()?);
            }
            Ok(())
        });
    }
    stored.objects.sort_by_key(|object| object.page);
}

/// Calls `read` for each page's value that is not nil; on the first that is not
/// readable the event counts as understood only up to there.
fn each_page<'a>(
    stored: &mut Stored,
    mut reader: Reader<'a>,
    mut read: impl FnMut(&mut Stored, usize, &mut Reader<'a>) -> Result<(), MsgpackError>,
) {
    let Ok(count) = reader.list() else {
        stored.understood = 0;
        return;
    };
    for page in 0..count {
        let mut value = reader;
        let outcome = reader
            .skip()
            .and_then(|()| value.nil())
            .and_then(|nil| if nil { Ok(()) } else { read(stored, page, &mut value) });
        if outcome.is_err() {
            stored.understood = stored.understood.min(page);
            return;
        }
    }
}

fn read_page_keys(
    stored: &mut Stored,
    page: usize,
    reader: &mut Reader<'_>,
) -> Result<(), MsgpackError> {
    for _ in 0..reader.list()? {
        match reader.shape()? {
            // An object and where it starts; where is not hashed.
            Shape::List => {
                let values = reader.list()?;
                if values == 0 {
                    return Err(MsgpackError::Shape);
                }
                let identifier = reader.text()?;
                for _ in 1..values {
                    reader.skip()?;
                }
                push_object(stored, page, object_hash(identifier).ok_or(MsgpackError::Value)?);
            }
            Shape::Text => read_text_key(stored, page, reader.text()?)?,
            // Digests of prompt embeddings, and whatever comes next.
            _ => return Err(MsgpackError::Shape),
        }
    }
    Ok(())
}

fn read_text_key(stored: &mut Stored, page: usize, key: &str) -> Result<(), MsgpackError> {
    if key.len() > EVENT_NAME_BYTES_MAX {
        return Err(MsgpackError::Value);
    }
    if stored.lora.as_deref() == Some(key) {
        return Ok(());
    }
    if let Some(salt) = key.strip_prefix(DYNAMO_SALT_PREFIX) {
        stored.cache_salt = Some(salt.to_owned());
        return Ok(());
    }
    if is_hash(key) {
        // Older releases name an object without saying where it starts.
        push_object(stored, page, object_hash(key).ok_or(MsgpackError::Value)?);
        return Ok(());
    }
    // A salt stands at a prompt's start and nowhere else.
    if page == 0 && stored.parent.is_none() && stored.cache_salt.is_none() {
        stored.cache_salt = Some(key.to_owned());
        return Ok(());
    }
    Err(MsgpackError::Value)
}

/// Reads a map and returns where the value of one of its keys stands.
fn map_value<'a>(reader: &mut Reader<'a>, key: &str) -> Result<Option<Reader<'a>>, MsgpackError> {
    let mut found = None;
    for _ in 0..reader.map()? {
        let name = reader.text()?;
        if name == key {
            found = Some(*reader);
        }
        reader.skip()?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vectors of Dynamo's router 1.6.1.
    #[test]
    fn object_hashes_are_dynamos() {
        assert_eq!(object_hash("opaque-renderer-image-0"), Some(14_437_604_544_409_538_977));
        assert_eq!(object_hash(&"0123456789abcdef".repeat(4)), Some(81_985_529_216_486_895));
        assert_eq!(object_hash(""), None);
    }
}
