//! Account: what is booked, cut into messages.

use crate::adapter::plane::envelope::Topic;
use crate::adapter::plane::sequences::{Account, SequenceEvent, Step, encode_event, encode_events};
use crate::limits::{ACCOUNT_BYTES, SEQUENCES_BATCH};

use super::publisher::Publisher;

/// Says steps of requests, in messages as others take them.
pub(super) fn say_events(publisher: &mut Publisher, events: &[SequenceEvent], at_ms: u64) {
    if publisher.batches() {
        for batch in events.chunks(SEQUENCES_BATCH.0) {
            publisher.publish(Topic::ActiveSequences, encode_events(batch), at_ms);
        }
    } else {
        for event in events {
            publisher.publish(Topic::ActiveSequences, encode_event(event), at_ms);
        }
    }
}

/// An account in messages that are not too long; at least one.
pub(super) fn accounts(events: Vec<SequenceEvent>) -> Vec<Account> {
    let mut groups: Vec<Vec<SequenceEvent>> = vec![Vec::new()];
    let mut bytes = 0;
    for event in events {
        let len = match &event.step {
            // As MessagePack has it: nine bytes a hash, and names.
            Step::Added(added) => 300 + 9 * added.blocks.as_ref().map_or(0, Vec::len),
            Step::PrefillCompleted | Step::Freed => 200,
        };
        let held = groups.last().map_or(0, Vec::len);
        if held >= SEQUENCES_BATCH.0 || (held > 0 && bytes + len > ACCOUNT_BYTES) {
            groups.push(Vec::new());
            bytes = 0;
        }
        bytes += len;
        if let Some(group) = groups.last_mut() {
            group.push(event);
        }
    }
    let last = groups.len() - 1;
    let list = |(at, events)| Account::List { begins: at == 0, ends: at == last, events };
    groups.into_iter().enumerate().map(list).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::plane::sequences::Added;
    use warmpath_core::ids::{DpRank, SequenceHash, Worker, WorkerId};

    fn added(request: usize, blocks: usize) -> SequenceEvent {
        let worker = Worker { id: WorkerId(1), rank: DpRank(0) };
        let blocks = Some(vec![SequenceHash(u64::MAX); blocks]);
        let step = Step::Added(Added { blocks, ..Added::default() });
        SequenceEvent { request: request.to_string(), worker, router: 1, lora: None, step }
    }

    #[test]
    fn accounts_are_cut_where_messages_would_be_too_long() {
        let bounds = |accounts: &[Account]| -> Vec<(bool, bool, usize)> {
            let of = |account: &Account| match account {
                Account::List { begins, ends, events } => (*begins, *ends, events.len()),
                Account::Hello => panic!("no list"),
            };
            accounts.iter().map(of).collect()
        };
        assert_eq!(bounds(&accounts(Vec::new())), [(true, true, 0)]);
        let many = SEQUENCES_BATCH.0 + 1;
        let short = accounts((0..many).map(|it| added(it, 1)).collect());
        assert_eq!(bounds(&short), [(true, false, many - 1), (false, true, 1)]);
        let long = accounts((0..9).map(|it| added(it, 8_192)).collect());
        assert_eq!(bounds(&long), [(true, false, 3), (false, false, 3), (false, true, 3)]);
        for account in &long {
            assert!(account.encode(u64::MAX).len() <= ACCOUNT_BYTES);
        }
    }
}
