//! A gateway that speaks ext_proc, message by message.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use bytes::Bytes;
use prost_types::{ListValue, Struct, Value, value};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;
use warmpath_sidecar::picker::proto::{
    Body, BodyMode, Common, HeaderMap, HeaderMutation, HeaderValue, HttpBody, HttpHeaders,
    HttpTrailers, ImmediateResponse, Metadata, PROCESS, Part, ProcessingRequest,
    ProcessingResponse, ProtocolConfiguration, Reply,
};

use crate::support::PATIENCE;

/// Both modes of a gateway that streams both ways.
pub(super) const DUPLEX: (BodyMode, BodyMode) =
    (BodyMode::FullDuplexStreamed, BodyMode::FullDuplexStreamed);

/// Those of one that holds request bodies.
pub(super) const BUFFERED: (BodyMode, BodyMode) = (BodyMode::Buffered, BodyMode::Streamed);

/// One request at the picker.
pub(super) struct Exchange {
    up: mpsc::Sender<ProcessingRequest>,
    down: Streaming<ProcessingResponse>,
    modes: Option<ProtocolConfiguration>,
    metadata: BTreeMap<(&'static str, &'static str), value::Kind>,
}

pub(super) async fn connect(picker: SocketAddr) -> Channel {
    Channel::from_shared(format!("http://{picker}")).unwrap().connect().await.unwrap()
}

impl Exchange {
    pub(super) async fn open(picker: SocketAddr, modes: (BodyMode, BodyMode)) -> Self {
        Self::try_open(connect(picker).await, Some(modes)).await.unwrap()
    }

    /// - `modes`: nothing is said of them if `None`.
    pub(super) async fn try_open(
        channel: Channel,
        modes: Option<(BodyMode, BodyMode)>,
    ) -> Result<Self, Status> {
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await.unwrap();
        let (up, messages) = mpsc::channel(256);
        let codec = ProstCodec::<ProcessingRequest, ProcessingResponse>::default();
        let path = PathAndQuery::from_static(PROCESS);
        let request = Request::new(ReceiverStream::new(messages));
        let down = client.streaming(request, path, codec).await?.into_inner();
        let modes = modes.map(|(request, response)| ProtocolConfiguration {
            request_body_mode: request.into(),
            response_body_mode: response.into(),
        });
        Ok(Self { up, down, modes, metadata: BTreeMap::new() })
    }

    /// Says something in the metadata of all messages from now on.
    pub(super) fn say(&mut self, namespace: &'static str, name: &'static str, kind: value::Kind) {
        self.metadata.insert((namespace, name), kind);
    }

    /// Says which hosts are allowed.
    pub(super) fn allow(&mut self, hosts: &[&str]) {
        let values = hosts
            .iter()
            .map(|host| Value { kind: Some(value::Kind::StringValue((*host).to_owned())) })
            .collect();
        let list = value::Kind::ListValue(ListValue { values });
        self.say("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset", list);
    }

    pub(super) async fn send(&mut self, part: Part) {
        let mut metadata = Metadata::default();
        for ((namespace, name), kind) in &self.metadata {
            let fields =
                &mut metadata.filter_metadata.entry((*namespace).to_owned()).or_default().fields;
            fields.insert((*name).to_owned(), Value { kind: Some(kind.clone()) });
        }
        let message = ProcessingRequest {
            metadata_context: Some(metadata),
            observability_mode: false,
            protocol_config: self.modes.take(),
            request: Some(part),
        };
        self.send_message(message).await;
    }

    pub(super) async fn send_message(&self, message: ProcessingRequest) {
        self.up.send(message).await.unwrap();
    }

    /// Sends the headers of a request.
    pub(super) async fn headers(
        &mut self,
        method: &str,
        path: &str,
        more: &[(&str, &str)],
        ends: bool,
    ) {
        let mut pairs = vec![(":method", method), (":path", path), (":authority", "a")];
        pairs.extend_from_slice(more);
        self.send(Part::RequestHeaders(headers(&pairs, ends))).await;
    }

    /// Sends the headers of a chat or completion with a body.
    pub(super) async fn post(&mut self, path: &str) {
        self.headers("POST", path, &[("content-type", "application/json")], false).await;
    }

    pub(super) async fn body(&mut self, bytes: impl Into<Bytes>, ends: bool) {
        self.send(Part::RequestBody(HttpBody { body: bytes.into(), end_of_stream: ends })).await;
    }

    pub(super) async fn trailers(&mut self) {
        self.send(Part::RequestTrailers(HttpTrailers::default())).await;
    }

    pub(super) async fn respond(&mut self, status: &str, ends: bool) {
        self.send(Part::ResponseHeaders(headers(&[(":status", status)], ends))).await;
    }

    pub(super) async fn response_body(&mut self, bytes: impl Into<Bytes>, ends: bool) {
        self.send(Part::ResponseBody(HttpBody { body: bytes.into(), end_of_stream: ends })).await;
    }

    /// The next reply.
    pub(super) async fn next(&mut self) -> Result<ProcessingResponse, Status> {
        let next = timeout(PATIENCE, self.down.message()).await.expect("a reply in time")?;
        next.ok_or_else(|| Status::cancelled("the stream has ended"))
    }

    pub(super) async fn reply(&mut self) -> ProcessingResponse {
        self.next().await.unwrap()
    }

    /// The reply that answers the request.
    pub(super) async fn answer(&mut self) -> ImmediateResponse {
        match self.reply().await.response {
            Some(Reply::Immediate(answer)) => answer,
            other => panic!("{other:?}"),
        }
    }

    /// Whether nothing comes for long enough that something on its way would.
    pub(super) async fn is_silent(&mut self) -> bool {
        timeout(std::time::Duration::from_millis(150), self.down.message()).await.is_err()
    }

    /// The pieces of the request's body that come back, up to the last; whether
    /// each is short enough is looked at, too.
    pub(super) async fn whole_body(&mut self, until_trailers: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        loop {
            match self.reply().await.response {
                Some(Reply::RequestBody(common)) => {
                    let (piece, ends) = streamed(common);
                    assert!(piece.len() <= 62_000);
                    bytes.extend_from_slice(&piece);
                    if ends {
                        assert!(!until_trailers);
                        return bytes;
                    }
                }
                Some(Reply::RequestTrailers(_)) if until_trailers => return bytes,
                other => panic!("{other:?}"),
            }
        }
    }
}

pub(super) fn headers(pairs: &[(&str, &str)], ends: bool) -> HttpHeaders {
    let header = |(name, value): &(&str, &str)| HeaderValue {
        key: (*name).to_owned(),
        value: String::new(),
        raw_value: Bytes::copy_from_slice(value.as_bytes()),
    };
    let headers = Some(HeaderMap { headers: pairs.iter().map(header).collect() });
    HttpHeaders { headers, end_of_stream: ends }
}

/// A piece of a body that is sent back.
pub(super) fn streamed(common: Common) -> (Bytes, bool) {
    match common.response.unwrap().body_mutation.unwrap().mutation {
        Some(Body::Streamed(piece)) => (piece.body, piece.end_of_stream),
        other => panic!("{other:?}"),
    }
}

/// What becomes of headers, by name.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Mutated {
    pub(super) set: BTreeMap<String, String>,
    pub(super) removed: Vec<String>,
    pub(super) destination: Option<String>,
    pub(super) reason: Option<String>,
    pub(super) body: Option<Bytes>,
    pub(super) clears_route: bool,
}

/// Takes the reply to headers, or to a whole body, apart.
pub(super) fn mutated(response: ProcessingResponse) -> Mutated {
    let mut mutated = Mutated::default();
    if let Some(Struct { fields }) = response.dynamic_metadata {
        let text = |namespace: &str, name: &str| match &fields.get(namespace)?.kind {
            Some(value::Kind::StructValue(inner)) => match &inner.fields.get(name)?.kind {
                Some(value::Kind::StringValue(text)) => Some(text.clone()),
                _ => None,
            },
            _ => None,
        };
        mutated.destination = text("envoy.lb", "x-gateway-destination-endpoint");
        mutated.reason = text("warmpath", "reason");
    }
    let common = match response.response {
        Some(Reply::RequestHeaders(it) | Reply::RequestBody(it) | Reply::ResponseHeaders(it)) => it,
        other => panic!("{other:?}"),
    };
    let Some(common) = common.response else { return mutated };
    mutated.clears_route = common.clear_route_cache;
    if let Some(Body::Whole(body)) = common.body_mutation.and_then(|it| it.mutation) {
        mutated.body = Some(body);
    }
    let HeaderMutation { set_headers, remove_headers } = common.header_mutation.unwrap_or_default();
    for option in set_headers {
        assert_eq!(option.append_action, 2, "takes the place of what is there");
        let header = option.header.unwrap();
        let value = String::from_utf8(header.raw_value.to_vec()).unwrap();
        assert_eq!(mutated.set.insert(header.key, value), None, "set once");
    }
    mutated.removed = remove_headers;
    mutated
}
