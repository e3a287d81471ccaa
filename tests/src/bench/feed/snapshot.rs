//! Snapshot: a large index into a fresh VM.

use std::path::Path;
use std::time::Instant;

use tokio::runtime::Handle;
use tokio::time::sleep;

use super::engines::Engine;
use super::flow::Flow;
use super::gateway::{Gateway, MODEL, Sidecar};
use super::{Failure, Row, at_most, call, chat, list, pause_note, percentile};
use crate::bookings::workers::Workers;
use crate::stack::limits::POLL;
use crate::stack::options::Options;
use crate::stack::report::line;

/// Engines whose caches are taken over.
const ENGINES: u32 = 64;

/// Blocks that each stores at once.
const BLOCKS_AT_ONCE: u64 = 1_250;

/// Times that each does so: 10 million blocks in all, or a tenth.
const TIMES: u64 = 125;
const TIMES_QUICK: u64 = 12;

/// Batches that may be on their way to the sidecar, each of 32 kB.
const BATCHES_AHEAD_MAX: u64 = 512;

/// Fills the engines, lets the sidecar hear of it all, and only then starts Envoy.
pub(super) async fn run(
    is_quick: bool,
    options: &Options,
    runtime: &Handle,
    folder: &Path,
) -> Result<Vec<Row>, Failure> {
    let times = if is_quick { TIMES_QUICK } else { TIMES };
    let mut engines = Vec::new();
    for _ in 0..ENGINES {
        engines.push(runtime.spawn(Engine::start()).await??);
    }
    let workers = Workers::start(engines.len(), runtime)?;
    let listed = list(engines.iter(), &workers);
    let sidecar = Sidecar::start(options, &listed, folder).await?;
    call(engines.iter(), &sidecar).await?;
    let started = Instant::now();
    fill(&mut engines, &sidecar, times).await?;
    let blocks: u64 = engines.iter().map(|engine| engine.blocks).sum();
    line(format_args!(
        "the sidecar knows {blocks} blocks after {:.1} s",
        started.elapsed().as_secs_f64()
    ));

    let gateway = Gateway::start(options, &sidecar, &listed, blocks + blocks / 8, folder).await?;
    let is_real_time = gateway.set_real_time(true);
    let flow = Flow::start(gateway.address(), &chat("a short question").body(MODEL));
    let seen = gateway.until("the snapshot", |seen| seen.is_live).await?;
    let requests_ms = flow.take();
    flow.stop()?;
    let wrong = (1_u64..).zip(&engines).find(|(id, engine)| seen.blocks_of(*id) != engine.blocks);
    if wrong.is_some() || seen.blocks != blocks {
        return Err(format!("{} blocks instead of {blocks}", seen.blocks).into());
    }
    line(format_args!(
        "snapshot: {} messages, together {:.2} s, longest {:.2} ms, tick {:.2} ms, pause {:.2} ms; \
         {:.2} bytes a block; requests p50 {:.2} p99 {:.2} max {:.2} ms",
        seen.messages.count,
        seen.messages.total_ns as f64 / 1e9,
        seen.messages.max_ms(),
        seen.ticks.max_ms(),
        seen.pauses.max_ms(),
        seen.bytes as f64 / blocks as f64,
        percentile(&requests_ms, 0.5),
        percentile(&requests_ms, 0.99),
        percentile(&requests_ms, 1.0),
    ));
    gateway.stop().await;
    sidecar.stop().await;
    let seconds = seen.live_at_ns.saturating_sub(seen.snapshot_began_ns) as f64 / 1e9;
    let pause = seen.pauses.max_ms();
    if is_quick {
        return Ok(vec![
            Row::alone("snapshot_1m", "s", seconds),
            Row::alone("snapshot_1m_pause_max", "ms", pause).note(pause_note(is_real_time)),
        ]);
    }
    Ok(vec![
        Row::alone("snapshot_10m", "s", seconds)
            .goal(at_most(10.0))
            .note("from asking for it until the index is live, two VMs at once"),
        Row::alone("snapshot_10m_pause_max", "ms", pause)
            .goal(at_most(2.0))
            .note(pause_note(is_real_time)),
    ])
}

/// Each engine stores its blocks, no faster than the sidecar takes them in.
async fn fill(engines: &mut [Engine], sidecar: &Sidecar, times: u64) -> Result<(), Failure> {
    let before: u64 = engines.iter().map(Engine::batches).sum();
    let mut sent = 0;
    for time in 0..times {
        for (chain, engine) in (0..).zip(engines.iter_mut()) {
            engine.store_chain(chain, time * BLOCKS_AT_ONCE, BLOCKS_AT_ONCE);
            sent += 1;
        }
        loop {
            let applied = sidecar.applied().await.ok_or("the sidecar does not answer")?;
            let applied: u64 = applied.iter().filter_map(|(last, _)| Some((*last)? + 1)).sum();
            if before + sent <= applied + BATCHES_AHEAD_MAX {
                break;
            }
            sleep(POLL).await;
        }
    }
    let batches: Vec<u64> = engines.iter().map(Engine::batches).collect();
    Ok(sidecar.until_applied(&batches).await?)
}
