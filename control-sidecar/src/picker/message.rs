//! Message: what is taken out of the gateway's messages.

use prost_types::{Struct, value};
use warmpath_core::demands::SubsetHint;

use super::proto::{HeaderValue, HttpHeaders, Metadata};

/// Namespace and name of the gateway's subset hint.
const SUBSET_HINT: (&str, &str) = ("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset");

/// Namespace and name of what the gateway says of who has served.
const SERVED: (&str, &str) = ("envoy.lb", "x-gateway-destination-endpoint-served");

/// Names in lower case, and values.
pub(super) fn pairs(message: &HttpHeaders) -> Vec<(String, String)> {
    let headers = message.headers.iter().flat_map(|map| &map.headers);
    let value = |header: &HeaderValue| {
        if header.raw_value.is_empty() {
            return header.value.clone();
        }
        String::from_utf8_lossy(&header.raw_value).into_owned()
    };
    headers.map(|header| (header.key.to_ascii_lowercase(), value(header))).collect()
}

fn found<'a>(metadata: &'a Metadata, (namespace, name): (&str, &str)) -> Option<&'a value::Kind> {
    let Struct { fields } = metadata.filter_metadata.get(namespace)?;
    fields.get(name)?.kind.as_ref()
}

/// What the gateway says of the hosts that it allows; `None` if it does not.
/// Metadata is the gateway's own: no client can set it.
pub(super) fn subset_hint(metadata: &Metadata) -> Option<SubsetHint> {
    Some(match found(metadata, SUBSET_HINT)? {
        value::Kind::NullValue(_) => return None,
        value::Kind::StringValue(text) => SubsetHint::parse(text.as_bytes()),
        value::Kind::ListValue(list) => {
            SubsetHint::of(list.values.iter().map(|item| match &item.kind {
                Some(value::Kind::StringValue(text)) => Some(text.as_str()),
                _ => None,
            }))
        }
        _ => SubsetHint::of([None].into_iter()),
    })
}

/// Who the gateway says has served.
pub(super) fn served(metadata: &Metadata) -> Option<String> {
    match found(metadata, SERVED)? {
        value::Kind::StringValue(text) if !text.is_empty() => Some(text.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::proto::HeaderMap;
    use super::*;

    #[test]
    fn either_form_of_a_value_is_read() {
        let header = |key: &str, value: &str, raw: &'static [u8]| HeaderValue {
            key: key.to_owned(),
            value: value.to_owned(),
            raw_value: raw.into(),
        };
        let headers = vec![
            header("X-A", "text", b""),
            header("x-b", "", b"raw"),
            header("x-c", "", b"\xff"),
            header("x-d", "", b""),
        ];
        let message =
            HttpHeaders { headers: Some(HeaderMap { headers }), ..HttpHeaders::default() };
        let expected = [("x-a", "text"), ("x-b", "raw"), ("x-c", "\u{fffd}"), ("x-d", "")];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(pairs(&message), expected);
        assert!(pairs(&HttpHeaders::default()).is_empty());
    }

    #[test]
    fn what_is_not_said_is_not_found() {
        assert_eq!(subset_hint(&Metadata::default()), None);
        assert_eq!(served(&Metadata::default()), None);
    }
}
