//! Position: whether the gateway knows what the engines have announced.
//!
//! Three numbers must meet: an engine's last event batch and the one that the
//! sidecar has applied of it; then the sidecar's last feed frame and the one
//! that the module has applied. Between applying a batch and logging its frame
//! the sidecar gathers for up to a millisecond, so the numbers must meet in two
//! looks in a row.

use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::time::sleep;

use super::client::{CallError, get};
use super::launch::{Stack, local};
use super::limits::{ENGINES, POLL};

/// Names under which the sidecar may tell the last event batch it applied.
const ENGINE_SEQUENCE: [&str; 3] = ["last_engine_sequence", "last_sequence", "engine_sequence"];

/// Time between the two looks: well above the sidecar's gathering time.
const SETTLED: Duration = Duration::from_millis(4);

/// Why the position is not as wished.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Behind {
    /// A page could not be read.
    Unreadable(&'static str),
    /// The sidecar has not applied this engine's last batch.
    Sidecar {
        /// Worker id.
        worker: u64,
        /// Last batch of the engine.
        announced: u64,
        /// Last batch applied.
        applied: Option<u64>,
    },
    /// The module has not applied the sidecar's last frame.
    Module {
        /// Last frame of the sidecar.
        logged: u64,
        /// Last frame applied.
        applied: u64,
    },
}

/// Waits until the module knows everything that the engines have announced.
/// The engines should be idle.
///
/// # Errors
///
/// What was still behind when the time was up.
pub async fn caught_up(stack: &Stack, within: Duration) -> Result<(), Behind> {
    let deadline = Instant::now() + within;
    let mut met = 0;
    loop {
        match look(stack).await {
            Ok(()) if met > 0 => return Ok(()),
            Ok(()) => {
                met += 1;
                sleep(SETTLED).await;
            }
            Err(behind) if Instant::now() > deadline => return Err(behind),
            Err(_) => {
                met = 0;
                sleep(POLL).await;
            }
        }
    }
}

/// Waits until the module knows what one engine had announced when this was
/// called, whatever the others do.
///
/// # Errors
///
/// What was still behind when the time was up.
pub async fn known(stack: &Stack, engine: usize, within: Duration) -> Result<(), Behind> {
    let deadline = Instant::now() + within;
    let Some(announced) = announced(stack, engine).await? else {
        return Ok(());
    };
    loop {
        let reached = reached(stack, engine, announced).await;
        match reached {
            Ok(()) => return Ok(()),
            Err(behind) if Instant::now() > deadline => return Err(behind),
            Err(_) => sleep(POLL).await,
        }
    }
}

async fn reached(stack: &Stack, engine: usize, announced: u64) -> Result<(), Behind> {
    let state = sidecar_state(stack).await?;
    applied_at_least(&state, engine, announced)?;
    // The frame of that batch is logged within the time the sidecar gathers.
    sleep(SETTLED).await;
    let logged = logged(&sidecar_state(stack).await?)?;
    let applied = module_sequence(stack).await?;
    if applied >= logged { Ok(()) } else { Err(Behind::Module { logged, applied }) }
}

async fn look(stack: &Stack) -> Result<(), Behind> {
    let state = sidecar_state(stack).await?;
    for engine in 0..ENGINES {
        if let Some(announced) = announced(stack, engine).await? {
            applied_at_least(&state, engine, announced)?;
        }
    }
    let logged = logged(&state)?;
    let applied = module_sequence(stack).await?;
    if applied == logged { Ok(()) } else { Err(Behind::Module { logged, applied }) }
}

/// Number of the last batch that an engine has announced, if any.
async fn announced(stack: &Stack, engine: usize) -> Result<Option<u64>, Behind> {
    let unreadable = Behind::Unreadable("an engine's next_sequence");
    let address = stack.engine_addresses().nth(engine).ok_or(unreadable.clone())?;
    let state = page(address, "/control/state", "an engine's /control/state").await?;
    let next = state.get("next_sequence").and_then(Value::as_u64).ok_or(unreadable)?;
    Ok(next.checked_sub(1))
}

async fn sidecar_state(stack: &Stack) -> Result<Value, Behind> {
    page(local(stack.ports.status), "/v1/state", "the sidecar's /v1/state").await
}

fn logged(state: &Value) -> Result<u64, Behind> {
    let logged = state.get("sequence").and_then(Value::as_u64);
    logged.ok_or(Behind::Unreadable("the sidecar's sequence"))
}

async fn module_sequence(stack: &Stack) -> Result<u64, Behind> {
    let applied = gauge(stack, "warmpath_feed_sequence").await;
    applied.ok_or(Behind::Unreadable("the module's warmpath_feed_sequence"))
}

fn applied_at_least(state: &Value, engine: usize, announced: u64) -> Result<(), Behind> {
    let worker = engine as u64 + 1;
    match applied_batch(state, worker) {
        Some(applied) if applied >= announced => Ok(()),
        applied => Err(Behind::Sidecar { worker, announced, applied }),
    }
}

async fn page(address: String, path: &str, what: &'static str) -> Result<Value, Behind> {
    let response = get(&address, path).await.ok().and_then(|response| response.json());
    response.ok_or(Behind::Unreadable(what))
}

/// The last event batch of a worker that the sidecar has applied.
fn applied_batch(state: &Value, worker: u64) -> Option<u64> {
    let workers = state.get("workers")?.as_array()?;
    let entry = workers.iter().find(|entry| {
        ["id", "worker", "worker_id"]
            .iter()
            .any(|key| entry.get(key).and_then(Value::as_u64) == Some(worker))
    })?;
    let own = std::iter::once(entry);
    let ranks = entry.get("ranks").and_then(Value::as_array).into_iter().flatten();
    own.chain(ranks).find_map(|place| {
        ENGINE_SEQUENCE.iter().find_map(|key| place.get(key).and_then(Value::as_u64))
    })
}

/// A stat of the gateway with the module, summed over its labels; `None` if
/// there is no such stat.
pub async fn gauge(stack: &Stack, name: &str) -> Option<u64> {
    let stats = stats(stack, name).await.ok()?;
    let values: Vec<u64> = stats.into_iter().map(|(_, value)| value).collect();
    if values.is_empty() { None } else { Some(values.iter().sum()) }
}

/// Stats of the gateway whose full name contains `part`, as Envoy names them.
///
/// # Errors
///
/// [`CallError`] if the admin page cannot be read.
pub async fn stats(stack: &Stack, part: &str) -> Result<Vec<(String, u64)>, CallError> {
    let path = format!("/stats?filter={part}");
    let response = get(&local(stack.ports.admin), &path).await?;
    let text = String::from_utf8_lossy(&response.body).into_owned();
    let stat = |line: &str| {
        let (name, value) = line.split_once(": ")?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    Ok(text.lines().filter_map(stat).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_applied_batch_is_found() {
        let state = json!({"sequence": 9, "workers": [
            {"id": 1, "ranks": [{"rank": 0, "last_sequence": 4}]},
            {"id": 2, "ranks": [{"rank": 0, "last_sequence": null}]},
        ]});
        assert_eq!(applied_batch(&state, 1), Some(4));
        assert_eq!(applied_batch(&state, 2), None);
        assert_eq!(applied_batch(&state, 3), None);
    }
}
