//! Proto: the messages of `envoy.service.ext_proc.v3` that are spoken here,
//! written out.
//!
//! Numbers and types are those of Envoy's own .proto files; fields that mean
//! nothing here are left out, and skipped when they come. A code generator and
//! all of Envoy's API would be the larger part of the build.

use std::collections::HashMap;

use bytes::Bytes;
pub use prost_types::{ListValue, Struct, Value, value};

/// Whole name of the service.
pub const SERVICE: &str = "envoy.service.ext_proc.v3.ExternalProcessor";

/// Path of its one method.
pub const PROCESS: &str = "/envoy.service.ext_proc.v3.ExternalProcessor/Process";

/// How a body is sent here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum BodyMode {
    /// Not at all.
    None = 0,
    /// Piece by piece; each waits for its answer, the headers for none.
    Streamed = 1,
    /// Whole.
    Buffered = 2,
    /// As much of it as fits.
    BufferedPartial = 3,
    /// Piece by piece, and sent back whenever we like.
    FullDuplexStreamed = 4,
}

/// What the gateway says once of how it will speak.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct ProtocolConfiguration {
    /// Of requests.
    #[prost(enumeration = "BodyMode", tag = "1")]
    pub request_body_mode: i32,
    /// Of responses.
    #[prost(enumeration = "BodyMode", tag = "2")]
    pub response_body_mode: i32,
}

/// What other filters have said of the stream.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Metadata {
    /// By namespace.
    #[prost(map = "string, message", tag = "1")]
    pub filter_metadata: HashMap<String, Struct>,
}

/// A header. Envoy fills `raw_value`, others may fill `value`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HeaderValue {
    /// Name.
    #[prost(string, tag = "1")]
    pub key: String,
    /// Value, as text.
    #[prost(string, tag = "2")]
    pub value: String,
    /// Value, as it is.
    #[prost(bytes = "bytes", tag = "3")]
    pub raw_value: Bytes,
}

/// All headers.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HeaderMap {
    /// In order.
    #[prost(message, repeated, tag = "1")]
    pub headers: Vec<HeaderValue>,
}

/// Headers of a request or response.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HttpHeaders {
    /// They.
    #[prost(message, optional, tag = "1")]
    pub headers: Option<HeaderMap>,
    /// Whether no body follows.
    #[prost(bool, tag = "3")]
    pub end_of_stream: bool,
}

/// A piece of a body.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HttpBody {
    /// Its bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub body: Bytes,
    /// Whether it is the last, and no trailers follow.
    #[prost(bool, tag = "2")]
    pub end_of_stream: bool,
}

/// Trailers.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HttpTrailers {
    /// They.
    #[prost(message, optional, tag = "1")]
    pub trailers: Option<HeaderMap>,
}

/// From the gateway.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ProcessingRequest {
    /// What other filters have said of the stream.
    #[prost(message, optional, tag = "8")]
    pub metadata_context: Option<Metadata>,
    /// Whether no answer is waited for.
    #[prost(bool, tag = "10")]
    pub observability_mode: bool,
    /// In the first message.
    #[prost(message, optional, tag = "11")]
    pub protocol_config: Option<ProtocolConfiguration>,
    /// The part of the stream.
    #[prost(oneof = "Part", tags = "2, 3, 4, 5, 6, 7")]
    pub request: Option<Part>,
}

/// A part of a stream, from the gateway.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Part {
    /// The request's headers.
    #[prost(message, tag = "2")]
    RequestHeaders(HttpHeaders),
    /// The response's headers.
    #[prost(message, tag = "3")]
    ResponseHeaders(HttpHeaders),
    /// A piece of the request's body.
    #[prost(message, tag = "4")]
    RequestBody(HttpBody),
    /// A piece of the response's body.
    #[prost(message, tag = "5")]
    ResponseBody(HttpBody),
    /// The request's trailers.
    #[prost(message, tag = "6")]
    RequestTrailers(HttpTrailers),
    /// The response's trailers.
    #[prost(message, tag = "7")]
    ResponseTrailers(HttpTrailers),
}

/// A header to be set.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HeaderValueOption {
    /// It.
    #[prost(message, optional, tag = "1")]
    pub header: Option<HeaderValue>,
    /// What becomes of one that is there: [`OVERWRITE_OR_ADD`].
    #[prost(int32, tag = "3")]
    pub append_action: i32,
}

/// Takes the place of a header that is there.
pub const OVERWRITE_OR_ADD: i32 = 2;

/// What becomes of headers.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HeaderMutation {
    /// To be set.
    #[prost(message, repeated, tag = "1")]
    pub set_headers: Vec<HeaderValueOption>,
    /// Names to be removed, before others are set.
    #[prost(string, repeated, tag = "2")]
    pub remove_headers: Vec<String>,
}

/// A piece of a body that is sent back.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StreamedBodyResponse {
    /// Its bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub body: Bytes,
    /// Whether it is the last.
    #[prost(bool, tag = "2")]
    pub end_of_stream: bool,
}

/// What becomes of a body.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BodyMutation {
    /// It.
    #[prost(oneof = "Body", tags = "1, 3")]
    pub mutation: Option<Body>,
}

/// What becomes of a body.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Body {
    /// Another takes its place.
    #[prost(bytes = "bytes", tag = "1")]
    Whole(Bytes),
    /// A piece of it, with [`BodyMode::FullDuplexStreamed`].
    #[prost(message, tag = "3")]
    Streamed(StreamedBodyResponse),
}

/// What becomes of headers or a body.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CommonResponse {
    /// Of the headers.
    #[prost(message, optional, tag = "2")]
    pub header_mutation: Option<HeaderMutation>,
    /// Of the body.
    #[prost(message, optional, tag = "3")]
    pub body_mutation: Option<BodyMutation>,
    /// Whether the route is looked for again.
    #[prost(bool, tag = "5")]
    pub clear_route_cache: bool,
}

/// An answer to headers, or to a body.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Common {
    /// What becomes of them.
    #[prost(message, optional, tag = "1")]
    pub response: Option<CommonResponse>,
}

/// An answer to trailers.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TrailersResponse {
    /// What becomes of them.
    #[prost(message, optional, tag = "1")]
    pub header_mutation: Option<HeaderMutation>,
}

/// A status.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct HttpStatus {
    /// Its number.
    #[prost(int32, tag = "1")]
    pub code: i32,
}

/// An answer in place of the request.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ImmediateResponse {
    /// Status.
    #[prost(message, optional, tag = "1")]
    pub status: Option<HttpStatus>,
    /// Headers.
    #[prost(message, optional, tag = "2")]
    pub headers: Option<HeaderMutation>,
    /// Body.
    #[prost(bytes = "bytes", tag = "3")]
    pub body: Bytes,
    /// For access logs.
    #[prost(string, tag = "5")]
    pub details: String,
}

/// To the gateway.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ProcessingResponse {
    /// For other filters, by namespace.
    #[prost(message, optional, tag = "8")]
    pub dynamic_metadata: Option<Struct>,
    /// The answer to a part.
    #[prost(oneof = "Reply", tags = "1, 2, 3, 4, 5, 6, 7")]
    pub response: Option<Reply>,
}

/// An answer to a part of a stream.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Reply {
    /// To the request's headers.
    #[prost(message, tag = "1")]
    RequestHeaders(Common),
    /// To the response's headers.
    #[prost(message, tag = "2")]
    ResponseHeaders(Common),
    /// To a piece of the request's body.
    #[prost(message, tag = "3")]
    RequestBody(Common),
    /// To a piece of the response's body.
    #[prost(message, tag = "4")]
    ResponseBody(Common),
    /// To the request's trailers.
    #[prost(message, tag = "5")]
    RequestTrailers(TrailersResponse),
    /// To the response's trailers.
    #[prost(message, tag = "6")]
    ResponseTrailers(TrailersResponse),
    /// To all of it.
    #[prost(message, tag = "7")]
    Immediate(ImmediateResponse),
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    /// Goal: bytes are those that the published .proto files mean; worked out by
    /// hand from their field numbers.
    #[test]
    fn the_bytes_are_known() {
        let header = HeaderValue { key: "a".into(), raw_value: "b".into(), ..Default::default() };
        let request = ProcessingRequest {
            metadata_context: None,
            observability_mode: false,
            protocol_config: Some(ProtocolConfiguration {
                request_body_mode: BodyMode::FullDuplexStreamed.into(),
                response_body_mode: BodyMode::Buffered.into(),
            }),
            request: Some(Part::RequestHeaders(HttpHeaders {
                headers: Some(HeaderMap { headers: vec![header] }),
                end_of_stream: true,
            })),
        };
        let headers = [0x12, 12, 0x0a, 8, 0x0a, 6, 0x0a, 1, b'a', 0x1a, 1, b'b', 0x18, 1];
        let modes = [0x5a, 4, 0x08, 4, 0x10, 2];
        let bytes = request.encode_to_vec();
        assert_eq!(ProcessingRequest::decode(&bytes[..]).unwrap(), request);
        assert_eq!(bytes.len(), headers.len() + modes.len());
        for part in [&headers[..], &modes] {
            assert!(bytes.windows(part.len()).any(|window| window == part), "{bytes:x?}");
        }
        let piece = StreamedBodyResponse { body: "x".into(), end_of_stream: true };
        let response = CommonResponse {
            body_mutation: Some(BodyMutation { mutation: Some(Body::Streamed(piece)) }),
            clear_route_cache: true,
            ..CommonResponse::default()
        };
        let response = ProcessingResponse {
            response: Some(Reply::RequestBody(Common { response: Some(response) })),
            ..ProcessingResponse::default()
        };
        let expected = [0x1a, 13, 0x0a, 11, 0x1a, 7, 0x1a, 5, 0x0a, 1, b'x', 0x10, 1, 0x28, 1];
        assert_eq!(response.encode_to_vec(), expected);
        let refused = ImmediateResponse {
            status: Some(HttpStatus { code: 503 }),
            body: "{}".into(),
            details: "d".into(),
            ..ImmediateResponse::default()
        };
        let refused = ProcessingResponse {
            response: Some(Reply::Immediate(refused)),
            ..ProcessingResponse::default()
        };
        let expected = [0x3a, 12, 0x0a, 3, 0x08, 0xf7, 0x03, 0x1a, 2, b'{', b'}', 0x2a, 1, b'd'];
        assert_eq!(refused.encode_to_vec(), expected);
    }

    /// Goal: what Envoy sends beside what is known here is skipped.
    #[test]
    fn unknown_fields_are_skipped() {
        let mut bytes = ProcessingRequest::default().encode_to_vec();
        bytes.extend_from_slice(&[0x62, 2, 0x08, 1]);
        assert_eq!(ProcessingRequest::decode(&bytes[..]).unwrap(), ProcessingRequest::default());
    }
}
