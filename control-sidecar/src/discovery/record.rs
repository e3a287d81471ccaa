//! Record: one entry of Dynamo's discovery, whatever store it lies in.
//!
//! Values are JSON, tagged by `type`, the same in etcd, in files and in the
//! custom resources of Kubernetes; only the keys are written differently. What
//! is not known is passed over, so that a newer Dynamo can be read; what
//! decides who a worker is must be there and agree with the key.

use core::fmt;
use std::borrow::Cow;

use percent_encoding::percent_decode_str;
use serde_json::Value;
use warmpath_core::limits::CARD_NAME_BYTES_MAX;

use super::card::Card;
use crate::fleet::RecoveryTarget;
use crate::limits::RECORD_BYTES_MAX;

/// Kinds of records, each with a place of its own in every store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Bucket {
    /// Endpoints that are served.
    Instances,
    /// Model cards.
    Models,
    /// Publishers of the event plane.
    Channels,
    /// What publishers of KV events publish for.
    Sources,
}

impl Bucket {
    /// Every bucket.
    pub const ALL: [Self; 4] = [Self::Instances, Self::Models, Self::Channels, Self::Sources];

    /// Its prefix of etcd keys, and its directory below the store's.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Instances => "v1/instances",
            Self::Models => "v1/mdc",
            Self::Channels => "v1/event_channels",
            Self::Sources => "v1/event_sources",
        }
    }

    /// Its map in a custom resource's `spec.data`.
    #[must_use]
    pub const fn section(self) -> &'static str {
        match self {
            Self::Instances => "endpoints",
            Self::Models => "model_cards",
            Self::Channels => "event_channels",
            Self::Sources => "event_sources",
        }
    }
}

/// Where a record lies, in the form of etcd's keys.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Which kind of record it should be.
    pub bucket: Bucket,
    /// What follows the bucket and a `/`.
    pub rest: String,
}

impl Key {
    /// From a key of etcd; `None` if it is none of discovery's.
    #[must_use]
    pub fn of_etcd(key: &str) -> Option<Self> {
        Bucket::ALL.into_iter().find_map(|bucket| {
            let rest = key.strip_prefix(bucket.path())?.strip_prefix('/')?;
            Some(Self { bucket, rest: rest.to_owned() })
        })
    }

    /// From the name of a file in a bucket's directory, which percent-encodes
    /// all that is not alphanumeric; `None` for files that are still being
    /// written and for names that are not text.
    #[must_use]
    pub fn of_file(bucket: Bucket, name: &str) -> Option<Self> {
        if name.starts_with(".tmp_") {
            return None;
        }
        let rest = percent_decode_str(name).decode_utf8().ok()?.into_owned();
        Some(Self { bucket, rest })
    }

    /// From the name of an entry in a map of a custom resource.
    #[must_use]
    pub fn of_resource(bucket: Bucket, name: &str) -> Self {
        Self { bucket, rest: name.to_owned() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.bucket.path(), self.rest)
    }
}

/// Why a record cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecordError {
    /// Longer than [`RECORD_BYTES_MAX`].
    TooLong,
    /// Not JSON.
    NotJson,
    /// Of a type that is not known here.
    UnknownType,
    /// A field that decides who the worker is is missing or out of range.
    Field,
    /// The key says something else than the value.
    Key,
}

impl RecordError {
    /// Fixed word for metrics and the state page.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::TooLong => "record_too_long",
            Self::NotJson => "record_not_json",
            Self::UnknownType => "record_unknown_type",
            Self::Field => "record_field",
            Self::Key => "record_key",
        }
    }
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "the record is too long",
            Self::NotJson => "the record is not JSON",
            Self::UnknownType => "the record is of an unknown type",
            Self::Field => "the record lacks a field",
            Self::Key => "the record's key and value disagree",
        })
    }
}

impl std::error::Error for RecordError {}

/// The full name of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointPath {
    /// Dynamo's namespace, one a generation of workers.
    pub namespace: String,
    /// Component, such as `backend`.
    pub component: String,
    /// Endpoint, such as `generate`.
    pub endpoint: String,
}

/// What an event channel is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// A whole namespace.
    Namespace(String),
    /// A component: namespace and name.
    Component(String, String),
    /// An endpoint.
    Endpoint(EndpointPath),
}

/// How an endpoint's requests reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Over TCP.
    Tcp(RecoveryTarget),
    /// In another way, which gives no address.
    Other,
}

/// Where a publisher's messages come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChannelTransport {
    /// The publisher's own ZMQ socket, `host:port`.
    Zmq(String),
    /// A subject of NATS or of the ZMQ brokers.
    Subject,
    /// Anything else, or an address that nobody can connect to.
    Unusable,
}

/// An endpoint that is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointRecord {
    /// Its name.
    pub path: EndpointPath,
    /// Who serves it.
    pub instance: u64,
    /// How to reach it.
    pub transport: Transport,
}

/// A model card, or an adapter's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelRecord {
    /// The endpoint that serves the model.
    pub path: EndpointPath,
    /// Who serves it.
    pub instance: u64,
    /// The card.
    pub card: Card,
}

/// A publisher of the event plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelRecord {
    /// What it is about.
    pub scope: Scope,
    /// Its topic.
    pub topic: String,
    /// The publisher's id; the record calls it `instance_id`.
    pub publisher: u64,
    /// Where its messages come from.
    pub transport: ChannelTransport,
}

/// Whose events a publisher publishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceRecord {
    /// What it is about.
    pub scope: Scope,
    /// Its topic.
    pub topic: String,
    /// The publisher's id.
    pub publisher: u64,
    /// Instance and data-parallel rank; `None` for kinds of sources that are
    /// not known here.
    pub worker: Option<(u64, u32)>,
    /// Where its history can be asked for.
    pub recovery: Option<RecoveryTarget>,
}

/// One entry of discovery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// An endpoint that is served.
    Endpoint(EndpointRecord),
    /// A model card.
    Model(Box<ModelRecord>),
    /// A publisher.
    Channel(ChannelRecord),
    /// Whose events a publisher publishes.
    Source(SourceRecord),
}

/// Parses a record.
///
/// # Errors
///
/// A [`RecordError`]; the record is left out, others are not touched.
pub fn parse(key: &Key, bytes: &[u8]) -> Result<Record, RecordError> {
    if bytes.len() > RECORD_BYTES_MAX {
        return Err(RecordError::TooLong);
    }
    let value: Value = serde_json::from_slice(bytes).map_err(|_| RecordError::NotJson)?;
    parse_value(key, &value)
}

/// Parses a record that is a tree already.
///
/// # Errors
///
/// As [`parse`].
pub fn parse_value(key: &Key, value: &Value) -> Result<Record, RecordError> {
    let (bucket, record) = match text(value, "/type").ok_or(RecordError::Field)? {
        "Endpoint" => (Bucket::Instances, Record::Endpoint(endpoint(value)?)),
        "Model" => (Bucket::Models, Record::Model(Box::new(model(value)?))),
        "EventChannel" => (Bucket::Channels, Record::Channel(channel(value)?)),
        "EventSource" => (Bucket::Sources, Record::Source(source(value)?)),
        _ => return Err(RecordError::UnknownType),
    };
    let agrees = key.bucket == bucket && agrees(&key.rest, &record);
    if agrees { Ok(record) } else { Err(RecordError::Key) }
}

fn endpoint(value: &Value) -> Result<EndpointRecord, RecordError> {
    let transport = text(value, "/transport/tcp").and_then(tcp_target);
    Ok(EndpointRecord {
        path: path(value, "endpoint").ok_or(RecordError::Field)?,
        instance: number(value, "/instance_id").ok_or(RecordError::Field)?,
        transport: transport.map_or(Transport::Other, Transport::Tcp),
    })
}

fn model(value: &Value) -> Result<ModelRecord, RecordError> {
    let card = value.get("card_json").ok_or(RecordError::Field)?;
    Ok(ModelRecord {
        path: path(value, "endpoint").ok_or(RecordError::Field)?,
        instance: number(value, "/instance_id").ok_or(RecordError::Field)?,
        card: Card::read(card).ok_or(RecordError::Field)?,
    })
}

fn channel(value: &Value) -> Result<ChannelRecord, RecordError> {
    let transport = match text(value, "/transport/kind") {
        Some("Zmq") => text(value, "/transport/config/endpoint")
            .and_then(zmq_address)
            .map_or(ChannelTransport::Unusable, ChannelTransport::Zmq),
        Some("Nats" | "ZmqBroker") => ChannelTransport::Subject,
        _ => ChannelTransport::Unusable,
    };
    Ok(ChannelRecord {
        scope: scope(value).ok_or(RecordError::Field)?,
        topic: name(value, "/topic").ok_or(RecordError::Field)?,
        publisher: number(value, "/instance_id").ok_or(RecordError::Field)?,
        transport,
    })
}

fn source(value: &Value) -> Result<SourceRecord, RecordError> {
    let publisher = number(value, "/publisher_id").ok_or(RecordError::Field)?;
    if number(value, "/metadata/publisher_id").is_some_and(|other| other != publisher) {
        return Err(RecordError::Field);
    }
    let rank = number(value, "/metadata/worker/dp_rank").and_then(|rank| u32::try_from(rank).ok());
    Ok(SourceRecord {
        scope: scope(value).ok_or(RecordError::Field)?,
        topic: name(value, "/topic").ok_or(RecordError::Field)?,
        publisher,
        worker: number(value, "/metadata/worker/worker_id").zip(rank),
        recovery: text(value, "/metadata/recovery_target/transport/tcp").and_then(tcp_target),
    })
}

fn path(value: &Value, last: &str) -> Option<EndpointPath> {
    Some(EndpointPath {
        namespace: name(value, "/namespace")?,
        component: name(value, "/component")?,
        endpoint: name(value, &format!("/{last}"))?,
    })
}

fn scope(value: &Value) -> Option<Scope> {
    match text(value, "/scope/kind")? {
        "endpoint" => path(value.pointer("/scope/endpoint")?, "name").map(Scope::Endpoint),
        "component" => {
            let component = value.pointer("/scope/component")?;
            Some(Scope::Component(name(component, "/namespace")?, name(component, "/name")?))
        }
        "namespace" => {
            let namespace = value.pointer("/scope/namespace")?;
            let plain = namespace.as_str().map(str::to_owned);
            plain.or_else(|| name(namespace, "/name")).map(Scope::Namespace)
        }
        _ => None,
    }
}

/// `host:port/path`, as Dynamo writes TCP transports.
fn tcp_target(text: &str) -> Option<RecoveryTarget> {
    let (address, path) = text.split_once('/').unwrap_or((text, ""));
    split_address(address)?;
    Some(RecoveryTarget { address: address.to_owned(), path: path.to_owned() })
}

/// `tcp://host:port` that one can connect to.
fn zmq_address(text: &str) -> Option<String> {
    let address = text.strip_prefix("tcp://")?;
    let (host, _) = split_address(address)?;
    let any = matches!(host, "*" | "0.0.0.0" | "[::]" | "::");
    (!any).then(|| address.to_owned())
}

/// Host and port of `host:port`; the port is not 0.
pub(super) fn split_address(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port != 0)?;
    (!host.is_empty()).then_some((host, port))
}

/// Whether a key's own words are those of the value. Names may be
/// percent-encoded in keys.
fn agrees(rest: &str, record: &Record) -> bool {
    let words: Vec<Cow<'_, str>> = rest
        .split('/')
        .map(|word| percent_decode_str(word).decode_utf8().unwrap_or_default())
        .collect();
    let words: Vec<&str> = words.iter().map(Cow::as_ref).collect();
    let is = |word: &str, id: u64| u64::from_str_radix(word, 16) == Ok(id);
    let on = |at: &EndpointPath, words: [&str; 3]| {
        [at.namespace.as_str(), at.component.as_str(), at.endpoint.as_str()] == words
    };
    match (record, words.as_slice()) {
        (Record::Endpoint(it), [namespace, component, endpoint, id]) => {
            on(&it.path, [namespace, component, endpoint]) && is(id, it.instance)
        }
        (
            Record::Model(it),
            [namespace, component, endpoint, id] | [namespace, component, endpoint, id, _],
        ) => on(&it.path, [namespace, component, endpoint]) && is(id, it.instance),
        (Record::Channel(it), [.., "topic", topic, id]) => {
            *topic == it.topic && is(id, it.publisher)
        }
        (Record::Source(it), [.., "topic", topic, id]) => {
            *topic == it.topic && is(id, it.publisher)
        }
        _ => false,
    }
}

/// The text at a JSON pointer.
pub(super) fn text<'v>(value: &'v Value, pointer: &str) -> Option<&'v str> {
    value.pointer(pointer)?.as_str()
}

/// The whole number at a JSON pointer.
pub(super) fn number(value: &Value, pointer: &str) -> Option<u64> {
    value.pointer(pointer)?.as_u64()
}

/// The name at a JSON pointer: a text of 1 to [`CARD_NAME_BYTES_MAX`] bytes.
pub(super) fn name(value: &Value, pointer: &str) -> Option<String> {
    let text = text(value, pointer)?;
    (!text.is_empty() && text.len() <= CARD_NAME_BYTES_MAX).then(|| text.to_owned())
}

#[cfg(test)]
mod tests;
