//! Fleet: the engines of one run, started afresh for each.

use std::path::Path;

use serde_json::Value;

use super::engines::{BLOCK_SIZE, BOUNDS, ENGINES, TIMING};
use super::figures::Worked;
use crate::stack::child::Child;
use crate::stack::client::get;
use crate::stack::launch::{EnginePorts, MODEL, StackError, local, wait_until_ok};
use crate::stack::options::Options;
use crate::stack::ports::free_port;

/// The running engines.
pub struct Fleet {
    /// Where they are.
    pub ports: Vec<EnginePorts>,
    /// Blocks of each one's cache.
    pub blocks: usize,
    children: Vec<Child>,
}

impl Fleet {
    /// Starts the engines and waits until they serve.
    ///
    /// - `speedup`: times that they are faster than real ones.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn start(
        options: &Options,
        blocks: usize,
        speedup: u64,
        folder: &Path,
    ) -> Result<Self, StackError> {
        let mut fleet = Self { ports: Vec::new(), blocks, children: Vec::new() };
        for number in 1..=ENGINES {
            let ports =
                EnginePorts { http: free_port()?, events: free_port()?, replay: free_port()? };
            let name = format!("engine-{number}");
            let pairs = [
                ("--model-dir", options.model_dir.display().to_string()),
                ("--name", name.clone()),
                ("--model-name", MODEL.to_owned()),
                ("--port", ports.http.to_string()),
                ("--events-port", ports.events.to_string()),
                ("--replay-port", ports.replay.to_string()),
                ("--block-size", BLOCK_SIZE.to_string()),
                ("--blocks", blocks.to_string()),
                ("--max-running", BOUNDS.running_max.to_string()),
                ("--max-step-tokens", BOUNDS.step_tokens_max.to_string()),
                ("--stream-interval", BOUNDS.stream_interval.to_string()),
                ("--decode-us-per-token", TIMING.step_us.to_string()),
                ("--prefill-us-per-token", TIMING.prefill_us_per_token.to_string()),
                ("--sequence-us", TIMING.sequence_us.to_string()),
                ("--context-ns", TIMING.context_ns_per_token.to_string()),
                ("--speedup", speedup.to_string()),
                ("--early-head", "false".to_owned()),
            ];
            let arguments: Vec<String> =
                pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect();
            let program = options.program("engine-sim");
            fleet.children.push(Child::start(&name, &program, &arguments, folder)?);
            fleet.ports.push(ports);
        }
        for (child, ports) in fleet.children.iter_mut().zip(&fleet.ports) {
            wait_until_ok("an engine's /health", child, ports.http, "/health").await?;
        }
        Ok(fleet)
    }

    /// Addresses for HTTP.
    pub fn addresses(&self) -> impl Iterator<Item = String> + '_ {
        self.ports.iter().map(|ports| local(ports.http))
    }

    /// Processes.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        self.children.iter().filter_map(Child::id).collect()
    }

    /// What each engine has done so far, in real time. `None` if one does not say.
    pub async fn worked(&self) -> Option<Vec<Worked>> {
        let mut all = Vec::new();
        for address in self.addresses() {
            let state = get(&address, "/control/state").await.ok()?.json()?;
            let number = |key: &str| state.get(key).and_then(Value::as_u64);
            let prompts = number("prefix_queries")?.saturating_sub(number("prefix_hits")?);
            all.push(Worked {
                finished: number("finished")?,
                request_ms: number("request_ms")?,
                computed_tokens: prompts + number("generation_tokens")?,
                busy_ms: number("busy_ms")?,
                late_ms: number("late_ms")?,
            });
        }
        Some(all)
    }

    /// Stops all.
    pub async fn stop(self) {
        for child in self.children {
            child.stop().await;
        }
    }
}
