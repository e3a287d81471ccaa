//! Truth: what the workers' caches hold, asked of the workers, against what the
//! sidecar believes, as its own snapshots say it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use hyper::body::Bytes;
use serde_json::Value;
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic_prost::ProstCodec;
use warmpath_core::delta::{Delta, Operation};
use warmpath_core::frame::{Frame, Kind};
use warmpath_core::uplink::{Hello, More, Purpose};

use super::peers::Peers;
use crate::stack::gateway::Gateway;
use crate::stack::launch::local;
use crate::stack::limits::{POLL_START, REQUEST_WITHIN};

/// Sequence hashes by `worker/rank`; ranks that hold nothing are left out.
pub type Blocks = BTreeMap<String, BTreeSet<u64>>;

/// What differs between two accounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Blocks that a worker holds and the sidecar does not know.
    pub missing: usize,
    /// Blocks that the sidecar believes in and no worker holds.
    pub extra: usize,
    /// Blocks of the workers.
    pub held: usize,
}

impl Difference {
    fn between(truth: &Blocks, belief: &Blocks) -> Self {
        let less = |from: &Blocks, what: &Blocks| {
            let ranks = from.iter().map(|(rank, held)| match what.get(rank) {
                Some(other) => held.difference(other).count(),
                None => held.len(),
            });
            ranks.sum()
        };
        let held = truth.values().map(BTreeSet::len).sum();
        Self { missing: less(truth, belief), extra: less(belief, truth), held }
    }

    /// Whether the two say the same, and something.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.missing == 0 && self.extra == 0 && self.held > 0
    }
}

/// Waits until the sidecar believes what the workers hold, and the module has
/// applied it. The workers should be idle.
///
/// # Errors
///
/// What differed when the time was up, in words.
pub async fn settled(
    peers: &Peers,
    gateway: &Gateway,
    python: &Path,
    script: &Path,
    within: Duration,
) -> Result<Difference, String> {
    let deadline = Instant::now() + within;
    loop {
        let difference = compare(peers, gateway, python, script).await;
        match difference {
            Ok(difference) if difference.is_none() && module_is_level(gateway).await => {
                return Ok(difference);
            }
            Ok(_) | Err(_) if Instant::now() < deadline => sleep(POLL_START).await,
            Ok(difference) => return Err(format!("{difference:?}")),
            Err(error) => return Err(error),
        }
    }
}

async fn module_is_level(gateway: &Gateway) -> bool {
    let state = gateway.state().await;
    let logged = state.and_then(|state| state.get("sequence")?.as_u64());
    let applied = gateway.stat("warmpath_feed_sequence").await;
    logged.is_some() && logged == applied
}

async fn compare(
    peers: &Peers,
    gateway: &Gateway,
    python: &Path,
    script: &Path,
) -> Result<Difference, String> {
    let truth = truth(peers, python, script).await?;
    let belief = belief(gateway).await.ok_or("the sidecar's snapshot cannot be had")?;
    Ok(Difference::between(&truth, &belief))
}

async fn truth(peers: &Peers, python: &Path, script: &Path) -> Result<Blocks, String> {
    let run = Command::new(python).arg(script).args(peers.registry()).kill_on_drop(true).output();
    let output = timeout(REQUEST_WITHIN, run)
        .await
        .map_err(|_| "the tree dump did not come in time")?
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let mut blocks: Blocks =
        serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())?;
    blocks.retain(|_, held| !held.is_empty());
    Ok(blocks)
}

/// One message of the feed, either way.
#[derive(Clone, PartialEq, prost::Message)]
struct Envelope {
    #[prost(bytes = "bytes", tag = "1")]
    frame: Bytes,
}

async fn belief(gateway: &Gateway) -> Option<Blocks> {
    let state = gateway.state().await?;
    let ranks: BTreeMap<u64, String> = state
        .get("workers")?
        .as_array()?
        .iter()
        .filter_map(|worker| {
            let number = |key| worker.get(key).and_then(Value::as_u64);
            Some((number("slot")?, format!("{}/{}", number("id")?, number("rank")?)))
        })
        .collect();
    let by_slot = timeout(REQUEST_WITHIN, snapshot(gateway.feed)).await.ok()??;
    let mut blocks = Blocks::new();
    for (slot, held) in by_slot {
        blocks.insert(ranks.get(&slot.into())?.clone(), held);
    }
    Some(blocks)
}

/// Takes a snapshot as a filter does.
async fn snapshot(feed: u16) -> Option<BTreeMap<u16, BTreeSet<u64>>> {
    let channel = Channel::from_shared(format!("http://{}", local(feed))).ok()?;
    let mut client = tonic::client::Grpc::new(channel.connect().await.ok()?);
    client.ready().await.ok()?;
    let (up, frames) = mpsc::channel(4);
    let say = |kind, body: Vec<u8>| {
        let frame = Frame { kind, epoch: 0, sequence: 0, body: &body }.encode().into();
        up.try_send(Envelope { frame }).ok()
    };
    let hello = Hello { purpose: Purpose::Snapshot, vm: 1, epoch: 0, sequence: 0, gateway: 0 };
    say(Kind::Hello, hello.encode())?;
    say(Kind::More, More { parts: u32::MAX }.encode())?;
    let path = PathAndQuery::from_static("/warmpath.feed.v1.Feed/Attach");
    let request = tonic::Request::new(ReceiverStream::new(frames));
    let codec = ProstCodec::<Envelope, Envelope>::default();
    let mut down = client.streaming(request, path, codec).await.ok()?.into_inner();
    let mut blocks: BTreeMap<u16, BTreeSet<u64>> = BTreeMap::new();
    loop {
        let message: Envelope = down.message().await.ok()??;
        let frame = Frame::decode(&message.frame).ok()?;
        match frame.kind {
            Kind::SnapshotEnd => return Some(blocks),
            Kind::SnapshotPart => {
                for group in Delta::decode(frame.body).ok()?.groups() {
                    if group.operation == Operation::Stored {
                        let held = blocks.entry(group.slot.0).or_default();
                        held.extend(group.hashes().map(|hash| hash.0));
                    }
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_counts_both_sides() {
        let blocks = |entries: &[(&str, &[u64])]| -> Blocks {
            let ranks = entries.iter();
            ranks.map(|(rank, held)| ((*rank).to_owned(), held.iter().copied().collect())).collect()
        };
        let truth = blocks(&[("1/0", &[1, 2]), ("1/1", &[3])]);
        let same = Difference::between(&truth, &truth);
        assert!(same.is_none() && same.held == 3);
        let belief = blocks(&[("1/0", &[2, 4, 5]), ("2/0", &[6])]);
        let other = Difference::between(&truth, &belief);
        assert_eq!(other, Difference { missing: 2, extra: 3, held: 3 });
        assert!(!Difference::between(&Blocks::new(), &Blocks::new()).is_none());
    }
}
