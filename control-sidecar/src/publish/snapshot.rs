//! Snapshot: the whole index to one filter VM, in parts, against its credit.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;
use warmpath_core::delta::{DeltaBuilder, Operation, SnapshotStart};
use warmpath_core::frame::{Frame, Kind};
use warmpath_core::uplink::Hello;

use super::service::{End, FromFilter, Said, Shared, ToFilter};
use crate::keeper::Question;
use crate::limits::{CREDIT_MAX, SNAPSHOT_STALL};

/// Serves one snapshot.
///
/// # Errors
///
/// Why the stream ends early.
pub(super) async fn serve(
    shared: &Shared,
    hello: &Hello,
    from: &mut FromFilter,
    to: &ToFilter,
) -> Result<(), End> {
    let outcome = serve_counted(shared, hello, from, to).await;
    shared.metrics.snapshot_ended(match outcome {
        Ok(()) => "complete",
        Err(End::Stalled) => "stalled",
        Err(_) => "ended",
    });
    outcome
}

async fn serve_counted(
    shared: &Shared,
    hello: &Hello,
    from: &mut FromFilter,
    to: &ToFilter,
) -> Result<(), End> {
    let mut credit = Credit::default();
    // Until the index is whole and it is this one's turn; what the filter says
    // meanwhile counts.
    let mut progress = shared.log.watch();
    let turn = async {
        progress.wait_for(|progress| progress.open).await.map_err(|_| End::Stopping)?;
        shared.snapshots.acquire().await.map_err(|_| End::Stopping)
    };
    tokio::pin!(turn);
    let _permit = loop {
        tokio::select! {
            permit = &mut turn => break permit?,
            said = from.said() => credit.hear(said?)?,
        }
    };
    let (answer, snapshot) = oneshot::channel();
    shared.questions.send(Question::Snapshot(answer)).await.map_err(|_| End::Stopping)?;
    let snapshot = snapshot.await.map_err(|_| End::Stopping)?;

    let (epoch, sequence) = (shared.log.epoch(), snapshot.sequence);
    let blocks = snapshot.ranks.iter().map(|(_, held)| held.len() as u64).sum();
    let body = SnapshotStart { blocks }.encode();
    to.frame(Frame { kind: Kind::SnapshotStart, epoch, sequence, body: &body }).await?;
    let mut part = DeltaBuilder::new();
    for (slot, held) in snapshot.ranks {
        for hash in held.keys() {
            part.push(Operation::Stored, slot, *hash);
            if part.is_full() {
                send_part(&mut part, epoch, sequence, &mut credit, from, to).await?;
            }
        }
    }
    if !part.is_empty() {
        send_part(&mut part, epoch, sequence, &mut credit, from, to).await?;
    }
    if hello.gateway != 0 {
        // Whoever starts late has not seen how they came.
        let (list, _) = shared.exchange.remote.follow();
        for body in &list {
            to.frame(Frame { kind: Kind::Remote, epoch, sequence: 0, body }).await?;
        }
    }
    to.frame(Frame { kind: Kind::SnapshotEnd, epoch, sequence, body: &[] }).await
}

async fn send_part(
    part: &mut DeltaBuilder,
    epoch: u64,
    sequence: u64,
    credit: &mut Credit,
    from: &mut FromFilter,
    to: &ToFilter,
) -> Result<(), End> {
    credit.spend(from, SNAPSHOT_STALL).await?;
    let body = part.take();
    to.frame(Frame { kind: Kind::SnapshotPart, epoch, sequence, body: &body }).await
}

/// Parts that the filter has room for.
#[derive(Debug, Default)]
struct Credit(u64);

impl Credit {
    fn hear(&mut self, said: Said) -> Result<(), End> {
        match said {
            Said::More(parts) => {
                self.0 = self.0.saturating_add(u64::from(parts)).min(CREDIT_MAX);
                Ok(())
            }
            Said::Fetch(_) | Said::Bookings(_) => Err(End::BadFrame),
        }
    }

    /// Takes one part's credit, waiting for it if there is none.
    async fn spend(&mut self, from: &mut FromFilter, patience: Duration) -> Result<(), End> {
        while self.0 == 0 {
            let said = timeout(patience, from.said()).await.map_err(|_| End::Stalled)??;
            self.hear(said)?;
        }
        self.0 -= 1;
        Ok(())
    }
}
