//! Config: the flags of `engine-sim`, parsed once.

use std::path::PathBuf;

use super::batch::Timing;
use super::events::{EventForm, HashForm};
use super::limits::CACHE_BLOCKS_MAX;

/// What `engine-sim --help` prints.
pub const USAGE: &str = "\
engine-sim: an OpenAI-compatible server with vLLM's prefix cache and KV events

  --model-dir DIR            tokenizer.json, tokenizer_config.json [, chat_template.jinja]
  --port N                   HTTP port on 127.0.0.1 (0: any)
  --name NAME                sent back as x-engine-id            [engine]
  --model-name NAME          served model                        [qwen3]
  --lora NAME                served adapter; may be repeated
  --events-port N            ZMQ PUB port on 127.0.0.1 (0: any)  [0]
  --replay-port N            ZMQ ROUTER port (0: any)            [0]
  --events-topic TEXT        first frame of every message        [empty]
  --events-form FORM         map | positional | sglang           [map]
  --events-hash FORM         int | bytes                         [int]
  --buffer-steps N           batches kept for replay             [10000]
  --dp-rank N                rank named in event batches         [0]
  --block-size N             tokens per block                    [16]
  --blocks N                 blocks of the cache                 [1200]
  --max-running N            requests computed at once           [256]
  --max-step-tokens N        tokens computed in one step         [8192]
  --max-model-len N          longest prompt plus answer, tokens  [131072]
  --prefill-us-per-token N   per uncached prompt token           [100]
  --decode-us-per-token N    per step: a token of each request   [2000]
  --sequence-us N            per request in a step               [100]
  --context-ns N             per token that a step attends to    [0]
  --speedup N                times faster than all of these      [1]
  --stream-interval N        tokens of an answer sent together   [1]
  --early-head BOOL          a stream's head before its 1st token [true]
";

/// All flags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Where tokenizer and template are.
    pub model_dir: PathBuf,
    /// HTTP port on 127.0.0.1; 0 for any.
    pub port: u16,
    /// Sent back as `x-engine-id`.
    pub name: String,
    /// Model served.
    pub model_name: String,
    /// Adapters served as models of their own.
    pub loras: Vec<String>,
    /// Port of the event publisher; 0 for any.
    pub events_port: u16,
    /// Port of the replay socket; 0 for any.
    pub replay_port: u16,
    /// First frame of every event message.
    pub events_topic: String,
    /// Whose event layout.
    pub events_form: EventForm,
    /// How hashes are written.
    pub events_hash: HashForm,
    /// Batches kept for replay.
    pub buffer_steps: usize,
    /// Rank named in event batches.
    pub dp_rank: u32,
    /// Tokens per block.
    pub block_size: u32,
    /// Blocks of the cache.
    pub blocks: usize,
    /// Requests computed at once.
    pub running_max: usize,
    /// Tokens computed in one step.
    pub step_tokens_max: usize,
    /// Tokens of an answer that are sent together, but for its first.
    pub stream_interval: usize,
    /// Longest prompt plus answer, in tokens.
    pub model_tokens_max: usize,
    /// Whether a stream's head is sent at once, as vLLM does, or with its first
    /// token. A sped-up engine does the latter: what TCP makes of two small writes
    /// on some routers' sockets, 40 ms, would count as many times as much.
    pub early_head: bool,
    /// How long work takes. The only part of the simulator's behaviour that does
    /// not follow from the requests.
    pub timing: Timing,
}

/// Why the flags are no good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigError {
    /// `--help` was asked for.
    Help,
    /// Not a flag of this program.
    UnknownFlag(String),
    /// A flag without its value.
    MissingValue(String),
    /// A value that the flag does not take.
    BadValue(String),
    /// `--model-dir` is missing.
    NoModelDir,
}

impl std::fmt::Display for ConfigError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Help => write!(formatter, "{USAGE}"),
            Self::UnknownFlag(flag) => write!(formatter, "unknown flag {flag}; try --help"),
            Self::MissingValue(flag) => write!(formatter, "{flag} needs a value"),
            Self::BadValue(flag) => write!(formatter, "bad value for {flag}"),
            Self::NoModelDir => write!(formatter, "--model-dir is required"),
        }
    }
}

impl std::error::Error for ConfigError {}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            model_dir: PathBuf::new(),
            port: 0,
            name: "engine".into(),
            model_name: "qwen3".into(),
            loras: Vec::new(),
            events_port: 0,
            replay_port: 0,
            events_topic: String::new(),
            events_form: EventForm::default(),
            events_hash: HashForm::default(),
            buffer_steps: 10_000,
            dp_rank: 0,
            block_size: 16,
            blocks: 1200,
            running_max: 256,
            step_tokens_max: 8192,
            stream_interval: 1,
            early_head: true,
            model_tokens_max: 131_072,
            timing: Timing {
                step_us: 2_000,
                prefill_us_per_token: 100,
                sequence_us: 100,
                context_ns_per_token: 0,
                speedup: 1,
            },
        }
    }
}

impl EngineConfig {
    /// Parses command line arguments, without the program's name.
    ///
    /// # Errors
    ///
    /// [`ConfigError`]; its text is meant for the person at the terminal.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        let mut arguments = arguments.into_iter();
        while let Some(flag) = arguments.next() {
            if flag == "--help" {
                return Err(ConfigError::Help);
            }
            let Some(value) = arguments.next() else {
                return Err(ConfigError::MissingValue(flag));
            };
            config.set(&flag, value)?;
        }
        if config.model_dir.as_os_str().is_empty() {
            return Err(ConfigError::NoModelDir);
        }
        Ok(config)
    }

    fn set(&mut self, flag: &str, value: String) -> Result<(), ConfigError> {
        match flag {
            "--model-dir" => self.model_dir = value.into(),
            "--port" => self.port = number(flag, &value, 0, u16::MAX)?,
            "--name" => self.name = value,
            "--model-name" => self.model_name = value,
            "--lora" => self.loras.push(value),
            "--events-port" => self.events_port = number(flag, &value, 0, u16::MAX)?,
            "--replay-port" => self.replay_port = number(flag, &value, 0, u16::MAX)?,
            "--events-topic" => self.events_topic = value,
            "--events-form" => {
                self.events_form = match value.as_str() {
                    "map" => EventForm::VllmMap,
                    "positional" => EventForm::VllmPositional,
                    "sglang" => EventForm::Sglang,
                    _ => return Err(ConfigError::BadValue(flag.into())),
                }
            }
            "--events-hash" => {
                self.events_hash = match value.as_str() {
                    "int" => HashForm::Integer,
                    "bytes" => HashForm::Bytes,
                    _ => return Err(ConfigError::BadValue(flag.into())),
                }
            }
            "--buffer-steps" => self.buffer_steps = number(flag, &value, 0, 1_000_000)?,
            "--dp-rank" => self.dp_rank = number(flag, &value, 0, u32::MAX)?,
            "--block-size" => self.block_size = number(flag, &value, 1, 4096)?,
            "--blocks" => self.blocks = number(flag, &value, 1, CACHE_BLOCKS_MAX)?,
            "--max-running" => self.running_max = number(flag, &value, 1, 65_536)?,
            "--max-step-tokens" => self.step_tokens_max = number(flag, &value, 1, 1 << 24)?,
            "--stream-interval" => self.stream_interval = number(flag, &value, 1, 4096)?,
            "--early-head" => {
                self.early_head = value.parse().map_err(|_| ConfigError::BadValue(flag.into()))?;
            }
            "--max-model-len" => self.model_tokens_max = number(flag, &value, 1, 1 << 24)?,
            "--prefill-us-per-token" => {
                self.timing.prefill_us_per_token = number(flag, &value, 0, 1_000_000)?;
            }
            "--decode-us-per-token" => {
                self.timing.step_us = number(flag, &value, 0, 10_000_000)?;
            }
            "--sequence-us" => self.timing.sequence_us = number(flag, &value, 0, 1_000_000)?,
            "--context-ns" => {
                self.timing.context_ns_per_token = number(flag, &value, 0, 1_000_000)?;
            }
            "--speedup" => self.timing.speedup = number(flag, &value, 1, 1_000_000)?,
            _ => return Err(ConfigError::UnknownFlag(flag.into())),
        }
        Ok(())
    }
}

/// A number between two bounds, both included.
fn number<N>(flag: &str, text: &str, least: N, most: N) -> Result<N, ConfigError>
where
    N: std::str::FromStr + PartialOrd,
{
    text.parse()
        .ok()
        .filter(|number| (&least..=&most).contains(&number))
        .ok_or_else(|| ConfigError::BadValue(flag.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<EngineConfig, ConfigError> {
        EngineConfig::parse(arguments.iter().map(ToString::to_string))
    }

    #[test]
    fn flags_are_read_and_mistakes_named() {
        let config = parse(&["--model-dir", "m", "--blocks", "7", "--lora", "a", "--lora", "b"]);
        let config = config.unwrap();
        assert_eq!((config.blocks, config.loras.len()), (7, 2));

        assert_eq!(parse(&["--help"]), Err(ConfigError::Help));
        assert_eq!(parse(&["--blocks", "7"]), Err(ConfigError::NoModelDir));
        assert_eq!(parse(&["--blocks"]), Err(ConfigError::MissingValue("--blocks".into())));
        assert_eq!(parse(&["--blocks", "0"]), Err(ConfigError::BadValue("--blocks".into())));
        assert_eq!(parse(&["--colour", "x"]), Err(ConfigError::UnknownFlag("--colour".into())));
    }

    /// Goal: the help text names every flag there is, so that none is secret.
    #[test]
    fn every_flag_in_the_help_exists() {
        let flags: Vec<&str> =
            USAGE.split_whitespace().filter(|word| word.starts_with("--")).collect();
        assert!(flags.len() >= 18, "{flags:?}");
        for flag in flags {
            let error = EngineConfig::default().set(flag, "?".into());
            assert!(!matches!(error, Err(ConfigError::UnknownFlag(_))), "{flag}");
        }
    }
}
