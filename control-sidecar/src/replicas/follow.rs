//! Follow: what others say of requests, read.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::adapter::plane::envelope::Topic;
use crate::adapter::plane::sequences::{Account, SequenceEvent, decode_sequences};
use crate::fleet::{Channel, SequenceStream};
use crate::limits::PEERS_MAX;
use crate::metrics::Metrics;
use crate::source::plane::hub::{Heard, Hub};

/// What a subscription brings.
#[derive(Debug)]
pub(super) enum Said {
    /// Steps of requests, and the publisher that brought them.
    Events(u64, Vec<SequenceEvent>),
    /// An account: the publisher that brought it, and the router that gives it.
    Account(u64, u64, Account),
    /// A shared subject has come to be listened to.
    Listening,
    /// Nobody publishes there any more.
    Gone(Vec<u64>),
}

/// Follows a stream of others until the task is aborted.
pub(super) async fn follow(
    stream: SequenceStream,
    hub: Arc<Hub>,
    said: mpsc::Sender<Said>,
    metrics: Arc<Metrics>,
) {
    let SequenceStream { topic, source } = stream;
    let mut subscription = hub.subscribe(&source.channel, topic, source.publisher);
    let is_shared = matches!(source.channel, Channel::Subject(_));
    let mut publishers = BTreeSet::new();
    loop {
        let heard = match subscription.next().await {
            Heard::Message(message) => {
                let publisher = message.publisher;
                if !is_shared && publishers.len() < PEERS_MAX {
                    publishers.insert(publisher);
                }
                let read = match topic {
                    Topic::Accounts => Account::decode(&message.payload)
                        .map(|(router, account)| Said::Account(publisher, router, account)),
                    _ => decode_sequences(&message.payload)
                        .map(|events| Said::Events(publisher, events)),
                };
                match read {
                    Ok(said) => said,
                    Err(error) => {
                        metrics.load_dropped(error.reason());
                        continue;
                    }
                }
            }
            Heard::Link(link) if link.connected && is_shared && topic == Topic::Accounts => {
                Said::Listening
            }
            // Nobody listens at its address: it has died.
            Heard::Link(link) if link.gone && !publishers.is_empty() => {
                Said::Gone(core::mem::take(&mut publishers).into_iter().collect())
            }
            Heard::Link(_) | Heard::Lost => continue,
        };
        if said.send(heard).await.is_err() {
            return;
        }
    }
}
