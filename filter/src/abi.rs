//! Abi: the forms in which a host takes and gives what is more than a number or a
//! text. What is done with them is in [`host`](crate::host).

use warmpath_core::wire::Reader;

/// Reads the ABI's form of a header map; `None` if it is not one.
pub(crate) fn read_headers(bytes: &[u8]) -> Option<Vec<(String, String)>> {
    let mut lengths = Reader::new(bytes);
    let count = lengths.u32().ok()? as usize;
    let mut texts = lengths;
    texts.take(count.checked_mul(8)?).ok()?;
    let mut text = |len: u32| -> Option<Option<String>> {
        let text = texts.take(len as usize).ok()?;
        texts.u8().ok()?;
        Some(String::from_utf8(text.to_vec()).ok())
    };
    let mut pairs = Vec::new();
    for _ in 0..count {
        let name = text(lengths.u32().ok()?);
        let value = text(lengths.u32().ok()?);
        if let (Some(name), Some(value)) = (name?, value?) {
            pairs.push((name, value));
        }
    }
    Some(pairs)
}

/// The ABI's form of a header map: count, lengths, then the texts, each with a
/// zero byte behind it.
pub(crate) fn write_headers(headers: &[(&str, &str)]) -> Vec<u8> {
    let length = |len: usize| u32::try_from(len).unwrap_or(0).to_le_bytes();
    let mut bytes = length(headers.len()).to_vec();
    for (name, value) in headers {
        bytes.extend_from_slice(&length(name.len()));
        bytes.extend_from_slice(&length(value.len()));
    }
    for text in headers.iter().flat_map(|(name, value)| [name, value]) {
        bytes.extend_from_slice(text.as_bytes());
        bytes.push(0);
    }
    bytes
}

/// The authority of the streams. Without one Envoy takes the cluster's name, which
/// in Istio has characters that no HTTP/2 server lets pass.
const AUTHORITY: &str = "warmpath-sidecar";

/// Longest field of a protobuf message whose length is one byte, and that byte a
/// character.
const SHORT_FIELD_MAX: usize = 0x7F;

/// Envoy's `GrpcService` message for a cluster: `envoy_grpc` (field 1) with
/// `cluster_name` (1) and `authority` (2). `None` for a name of more than 107 bytes:
/// the SDK takes text, and the lengths in such a message are none. It goes by its
/// name alone, as the authority, too.
pub(crate) fn grpc_service(cluster: &str) -> Option<String> {
    let field = |tag: u8, text: &str| {
        let len =
            u8::try_from(text.len()).ok().filter(|len| usize::from(*len) <= SHORT_FIELD_MAX)?;
        Some(format!("{}{}{text}", char::from(tag), char::from(len)))
    };
    let inner = field(0x0A, cluster)? + &field(0x12, AUTHORITY)?;
    field(0x0A, &inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_is_named_with_an_authority_if_it_fits() {
        let inner = b"\x0A\x04feed\x12\x10warmpath-sidecar";
        let expected = [&[0x0A, 24_u8], inner.as_slice()].concat();
        assert_eq!(grpc_service("feed").map(String::into_bytes), Some(expected));
        assert!(grpc_service(&"a".repeat(107)).is_some_and(|it| it.as_bytes()[1] == 0x7F));
        assert_eq!(grpc_service(&"a".repeat(108)), None);
    }

    #[test]
    fn a_header_map_has_the_abi_s_form() {
        let bytes = write_headers(&[("a", "bc"), ("", "d")]);
        let expected = b"\x02\0\0\0\x01\0\0\0\x02\0\0\0\0\0\0\0\x01\0\0\0a\0bc\0\0d\0";
        assert_eq!(bytes, expected);
        let pairs = [("a", "bc"), ("", "d")].map(|(n, v)| (n.to_owned(), v.to_owned()));
        assert_eq!(read_headers(&bytes), Some(pairs.to_vec()));
        for len in 0..bytes.len() {
            assert_eq!(read_headers(&bytes[..len]), None, "cut at {len}");
        }
        assert_eq!(read_headers(&[255; 8]), None);
    }
}
