//! Streams: which publisher speaks for which rank, and where it is heard.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use warmpath_core::ids::WorkerId;

use super::super::listing::{Author, Listing, Problems};
use super::super::record::{ChannelTransport, EndpointPath, Record, Scope, SourceRecord};
use super::{Listed, Rules};
use crate::adapter::plane::envelope::Topic;
use crate::fleet::{Channel, LoadKind, LoadStream, PlanePublisher, PlaneStream, SequenceStream};
use crate::limits::{FLEET_LOAD_STREAMS_MAX, FLEET_SEQUENCE_STREAMS_MAX};

const KV_EVENTS: &str = "kv-events";
const KV_METRICS: &str = "kv_metrics";
const FORWARD_PASS: &str = "forward-pass-metrics";

/// Topics on which workers say how busy they are.
const LOADS: [&str; 2] = [KV_METRICS, FORWARD_PASS];

/// Topics on which it is said what becomes of requests.
const SEQUENCES: [Topic; 2] = [Topic::ActiveSequences, Topic::Accounts];

/// What is percent-encoded in a segment of a subject.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_');

/// A channel's publisher, and the instance that may use it.
#[derive(Debug)]
struct LoadChannel<'a> {
    path: &'a EndpointPath,
    topic: &'a str,
    publisher: u64,
    transport: &'a ChannelTransport,
    instance: Option<u64>,
}

/// The instance that wrote a record, where the backend vouches for that: then
/// nobody else's channel can stand in for its own.
type Voucher = Option<u64>;

fn voucher(author: &Author) -> Voucher {
    author.instance.filter(|_| author.vouched)
}

/// What one publisher publishes for a rank.
#[derive(Clone, Copy, Debug)]
struct Source<'a> {
    record: &'a SourceRecord,
    voucher: Voucher,
}

/// All publishers of a listing.
#[derive(Debug)]
pub(super) struct Publishers<'a> {
    sources: HashMap<(&'a EndpointPath, u64, u32), BTreeMap<u64, Source<'a>>>,
    channels: HashMap<(&'a EndpointPath, u64, Voucher), &'a ChannelTransport>,
    loads: Vec<LoadChannel<'a>>,
    sequences: Vec<SequenceChannel<'a>>,
}

/// A publisher of requests' steps: a router or a worker, whoever may use the
/// endpoint.
#[derive(Debug)]
struct SequenceChannel<'a> {
    path: &'a EndpointPath,
    topic: Topic,
    publisher: u64,
    transport: &'a ChannelTransport,
}

impl<'a> Publishers<'a> {
    /// Sorts out a listing's channels and sources, those of endpoints only.
    pub(super) fn of(listing: &'a Listing, rules: &Rules) -> Self {
        let mut all = Self {
            sources: HashMap::new(),
            channels: HashMap::new(),
            loads: Vec::new(),
            sequences: Vec::new(),
        };
        for entry in &listing.entries {
            match &*entry.record {
                Record::Source(source) if source.topic == KV_EVENTS => {
                    let (Scope::Endpoint(path), Some((instance, rank))) =
                        (&source.scope, source.worker)
                    else {
                        continue;
                    };
                    let of_rank = all.sources.entry((path, instance, rank)).or_default();
                    let voucher = voucher(&entry.author);
                    of_rank.insert(source.publisher, Source { record: source, voucher });
                }
                Record::Channel(channel) => {
                    let Scope::Endpoint(path) = &channel.scope else { continue };
                    let (topic, publisher) = (channel.topic.as_str(), channel.publisher);
                    if topic == KV_EVENTS {
                        let key = (path, publisher, voucher(&entry.author));
                        all.channels.insert(key, &channel.transport);
                    }
                    if let Some(topic) = SEQUENCES.into_iter().find(|it| it.name() == topic) {
                        let transport = &channel.transport;
                        all.sequences.push(SequenceChannel { path, topic, publisher, transport });
                    }
                    let load = LOADS.contains(&topic);
                    if load && rules.namespaces.admits(&path.namespace) {
                        let transport = &channel.transport;
                        let instance = entry.author.instance;
                        all.loads.push(LoadChannel { path, topic, publisher, transport, instance });
                    }
                }
                _ => {}
            }
        }
        all.loads.sort_by_key(|load| (load.path, load.topic, load.publisher));
        all.sequences.sort_by_key(|it| (it.path, it.topic.name(), it.publisher));
        all
    }

    /// The stream of one rank.
    ///
    /// # Errors
    ///
    /// Why there is none, as a problem's reason.
    pub(super) fn stream(
        &self,
        path: &EndpointPath,
        instance: u64,
        rank: u32,
    ) -> Result<PlaneStream, &'static str> {
        let sources = self.sources.get(&(path, instance, rank)).ok_or("no_event_source")?;
        // Two publishers of one rank: nobody can say whose events hold.
        let mut sources = sources.iter();
        let (Some((publisher, source)), None) = (sources.next(), sources.next()) else {
            return Err("ambiguous_publisher");
        };
        let channel = match self.channels.get(&(path, *publisher, source.voucher)) {
            Some(ChannelTransport::Zmq(address)) => Channel::Direct(address.clone()),
            // Publishers on brokers are not recorded as channels.
            Some(ChannelTransport::Subject) | None => Channel::Subject(subject(path, KV_EVENTS)),
            Some(ChannelTransport::Unusable) => return Err("bad_channel"),
        };
        Ok(PlaneStream { publisher: *publisher, channel, recovery: source.record.recovery.clone() })
    }

    /// Where the listed workers say how busy they are.
    pub(super) fn load_streams(
        &self,
        listed: &HashMap<WorkerId, Listed<'_>>,
        rules: &Rules,
        problems: &mut Problems,
    ) -> Vec<LoadStream> {
        let paths: BTreeSet<&EndpointPath> = listed.values().map(|unit| unit.path).collect();
        let mut streams = Vec::new();
        for load in self.loads.iter().filter(|load| paths.contains(load.path)) {
            let channel = match load.transport {
                ChannelTransport::Zmq(address) => Channel::Direct(address.clone()),
                ChannelTransport::Subject => Channel::Subject(subject(load.path, load.topic)),
                ChannelTransport::Unusable => {
                    problems.add(&format!("publisher {:x}", load.publisher), "bad_channel");
                    continue;
                }
            };
            let worker = load.instance.map(WorkerId);
            let unit = worker.and_then(|worker| listed.get(&worker));
            if worker.is_some() && unit.is_none() {
                continue;
            }
            let ranks = unit.map(|unit| unit.ranks.clone()).unwrap_or_default();
            let publisher = PlanePublisher { publisher: Some(load.publisher), channel };
            streams.push(LoadStream { kind: kind(load.topic, publisher), worker, ranks });
        }
        if rules.brokers {
            for (path, topic) in paths.iter().flat_map(|path| LOADS.map(|topic| (path, topic))) {
                let channel = Channel::Subject(subject(path, topic));
                let publisher = PlanePublisher { publisher: None, channel };
                let kind = kind(topic, publisher);
                streams.push(LoadStream { kind, worker: None, ranks: Vec::new() });
            }
        }
        if streams.len() > FLEET_LOAD_STREAMS_MAX {
            problems.add("load streams", "too_many_load_streams");
            streams.truncate(FLEET_LOAD_STREAMS_MAX);
        }
        streams
    }

    /// Where it is said what becomes of the listed workers' requests.
    pub(super) fn sequence_streams(
        &self,
        listed: &HashMap<WorkerId, Listed<'_>>,
        rules: &Rules,
        problems: &mut Problems,
    ) -> Vec<SequenceStream> {
        let paths: BTreeSet<&EndpointPath> = listed.values().map(|unit| unit.path).collect();
        let mut streams = Vec::new();
        for it in self.sequences.iter().filter(|it| paths.contains(it.path)) {
            let channel = match it.transport {
                ChannelTransport::Zmq(address) => Channel::Direct(address.clone()),
                ChannelTransport::Subject => Channel::Subject(subject(it.path, it.topic.name())),
                ChannelTransport::Unusable => {
                    problems.add(&format!("publisher {:x}", it.publisher), "bad_channel");
                    continue;
                }
            };
            let source = PlanePublisher { publisher: Some(it.publisher), channel };
            streams.push(SequenceStream { topic: it.topic, source });
        }
        if rules.brokers {
            for (path, topic) in paths.iter().flat_map(|path| SEQUENCES.map(|topic| (path, topic)))
            {
                let channel = Channel::Subject(subject(path, topic.name()));
                let source = PlanePublisher { publisher: None, channel };
                streams.push(SequenceStream { topic, source });
            }
        }
        if streams.len() > FLEET_SEQUENCE_STREAMS_MAX {
            problems.add("sequence streams", "too_many_sequence_streams");
            streams.truncate(FLEET_SEQUENCE_STREAMS_MAX);
        }
        streams
    }
}

fn kind(topic: &str, publisher: PlanePublisher) -> LoadKind {
    match topic {
        KV_METRICS => LoadKind::KvMetrics(publisher),
        _ => LoadKind::ForwardPass(publisher),
    }
}

/// The subject of an endpoint's topic:
/// `namespace.<ns>.component.<c>.endpoint.<e>.<topic>`, with what is not
/// alphanumeric, `-` or `_` percent-encoded in each segment.
pub(crate) fn subject(path: &EndpointPath, topic: &str) -> String {
    let segment = |text| utf8_percent_encode(text, SEGMENT);
    format!(
        "namespace.{}.component.{}.endpoint.{}.{}",
        segment(&path.namespace),
        segment(&path.component),
        segment(&path.endpoint),
        segment(topic),
    )
}
