//! Reply: what the gateway is told, as messages.

use bytes::Bytes;
use prost_types::{Struct, Value, value};
use warmpath_core::answer::Answer;
use warmpath_core::headers::{DESTINATION, legacy_name};
use warmpath_core::reason::Reason;
use warmpath_core::route::Choice;

use super::proto::{
    Body, BodyMutation, Common, CommonResponse, HeaderMutation, HeaderValue, HeaderValueOption,
    HttpStatus, ImmediateResponse, OVERWRITE_OR_ADD, ProcessingResponse, Reply,
    StreamedBodyResponse, TrailersResponse,
};
use crate::config::picker::PickerConfig;
use crate::limits::PICKER_PIECE_BYTES_MAX;

/// Namespace of the metadata by which the choice is named.
pub const METADATA: &str = "envoy.lb";

/// Namespace of the metadata that say why; for access logs.
pub const OWN_METADATA: &str = "warmpath";

/// Headers to be set.
pub(super) type Headers = Vec<(&'static str, String)>;

/// The headers that name the workers.
pub(super) fn names(choice: &Choice, config: &PickerConfig) -> Headers {
    let mut headers = Headers::new();
    for (name, value) in choice.headers(config.prefiller_header) {
        let legacy = legacy_name(name).filter(|_| config.legacy_headers);
        headers.extend(legacy.map(|legacy| (legacy, value.clone())));
        headers.push((name, value));
    }
    headers
}

/// The metadata that name the destination and the reason.
pub(super) fn metadata(choice: Option<&Choice>, reason: Option<Reason>) -> Struct {
    let mut root = Struct::default();
    let destination = choice.map(|choice| choice.serving.endpoint.as_str());
    if let Some(destination) = destination.filter(|endpoint| !endpoint.is_empty()) {
        root.fields.insert(METADATA.to_owned(), one(DESTINATION, destination));
    }
    if let Some(reason) = reason {
        root.fields.insert(OWN_METADATA.to_owned(), one("reason", reason.word()));
    }
    root
}

fn one(name: &str, text: &str) -> Value {
    let text = Value { kind: Some(value::Kind::StringValue(text.to_owned())) };
    let fields = [(name.to_owned(), text)].into();
    Value { kind: Some(value::Kind::StructValue(Struct { fields })) }
}

/// A mutation of headers; `None` if nothing changes.
pub(super) fn mutation(set: Headers, remove: Vec<String>) -> Option<HeaderMutation> {
    // Whoever sets before it removes must not lose what is set.
    let is_set = |name: &String| set.iter().any(|(known, _)| known == name);
    let remove_headers: Vec<String> = remove.into_iter().filter(|name| !is_set(name)).collect();
    let set_headers: Vec<HeaderValueOption> = set.into_iter().map(option).collect();
    let is_empty = set_headers.is_empty() && remove_headers.is_empty();
    (!is_empty).then_some(HeaderMutation { set_headers, remove_headers })
}

fn option((name, value): (&'static str, String)) -> HeaderValueOption {
    let header =
        HeaderValue { key: name.to_owned(), value: String::new(), raw_value: value.into() };
    HeaderValueOption { header: Some(header), append_action: OVERWRITE_OR_ADD }
}

/// What of headers or a body changes.
#[derive(Debug, Default)]
pub(super) struct Change {
    pub(super) headers: Option<HeaderMutation>,
    pub(super) body: Option<Body>,
    /// Whether the request has a destination now.
    pub(super) is_placed: bool,
}

impl Change {
    fn common(self) -> Common {
        let Self { headers, body, is_placed } = self;
        let body_mutation = body.map(|body| BodyMutation { mutation: Some(body) });
        if headers.is_none() && body_mutation.is_none() && !is_placed {
            return Common::default();
        }
        let response = CommonResponse {
            header_mutation: headers,
            body_mutation,
            // Routes may ask for the headers that name the workers.
            clear_route_cache: is_placed,
        };
        Common { response: Some(response) }
    }
}

fn message(reply: Reply) -> ProcessingResponse {
    ProcessingResponse { dynamic_metadata: None, response: Some(reply) }
}

/// The answer to the request's headers.
pub(super) fn request_headers(change: Change) -> ProcessingResponse {
    message(Reply::RequestHeaders(change.common()))
}

/// The answer to the response's headers.
pub(super) fn response_headers(change: Change) -> ProcessingResponse {
    message(Reply::ResponseHeaders(change.common()))
}

/// The answer to the request's whole body, or to a piece of it that is not sent
/// back.
pub(super) fn request_body(change: Change) -> ProcessingResponse {
    message(Reply::RequestBody(change.common()))
}

/// The same of the response's.
pub(super) fn response_body(change: Change) -> ProcessingResponse {
    message(Reply::ResponseBody(change.common()))
}

/// The answer to the request's trailers.
pub(super) fn request_trailers() -> ProcessingResponse {
    message(Reply::RequestTrailers(TrailersResponse::default()))
}

/// The answer to the response's trailers.
pub(super) fn response_trailers() -> ProcessingResponse {
    message(Reply::ResponseTrailers(TrailersResponse::default()))
}

/// A body that is sent back, in pieces as long as the gateway takes them; one
/// without bytes if only the end is to be said.
///
/// - `ends`: whether the last piece is the last of the body.
pub(super) fn pieces(mut body: Bytes, ends: bool) -> Vec<Body> {
    let mut pieces = Vec::new();
    while !body.is_empty() || (ends && pieces.is_empty()) {
        let piece = body.split_to(body.len().min(PICKER_PIECE_BYTES_MAX));
        let end_of_stream = ends && body.is_empty();
        pieces.push(Body::Streamed(StreamedBodyResponse { body: piece, end_of_stream }));
    }
    pieces
}

/// An answer in place of the request.
///
/// - `more`: headers beside its own.
pub(super) fn immediate(
    answer: &Answer,
    reason: Option<Reason>,
    more: Headers,
) -> ProcessingResponse {
    let mut headers = answer.headers();
    headers.extend(more);
    let response = ImmediateResponse {
        status: Some(HttpStatus { code: i32::try_from(answer.status()).unwrap_or(500) }),
        headers: mutation(headers, Vec::new()),
        body: answer.body().into(),
        details: answer.code().to_owned(),
    };
    ProcessingResponse {
        dynamic_metadata: reason.map(|reason| metadata(None, Some(reason))),
        response: Some(Reply::Immediate(response)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole(pieces: &[Body]) -> (Vec<u8>, Vec<bool>) {
        let mut bytes = Vec::new();
        let mut ends = Vec::new();
        for piece in pieces {
            let Body::Streamed(piece) = piece else { panic!("{piece:?}") };
            assert!(piece.body.len() <= PICKER_PIECE_BYTES_MAX);
            bytes.extend_from_slice(&piece.body);
            ends.push(piece.end_of_stream);
        }
        (bytes, ends)
    }

    proptest! {
        /// Goal: nothing of a body is lost, and exactly the last piece ends it.
        #[test]
        fn pieces_are_the_body(len in 0_usize..200_000, ends: bool) {
            let body: Vec<u8> = (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect();
            let pieces = pieces(body.clone().into(), ends);
            let (bytes, marks) = whole(&pieces);
            prop_assert_eq!(bytes, body);
            prop_assert_eq!(marks.iter().filter(|mark| **mark).count(), usize::from(ends));
            prop_assert_eq!(marks.last().copied().unwrap_or(false), ends);
        }
    }

    #[test]
    fn what_is_set_is_not_removed() {
        let remove = vec![DESTINATION.to_owned(), "x-other".to_owned()];
        let mutation = mutation(vec![(DESTINATION, "a".into())], remove).unwrap();
        assert_eq!(mutation.remove_headers, ["x-other"]);
        assert_eq!(mutation.set_headers.len(), 1);
        assert_eq!(super::mutation(Vec::new(), Vec::new()), None);
    }
}
