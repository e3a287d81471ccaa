//! Targets: what is measured side by side, and how each is started.
//!
//! All Envoys have one worker thread and the same configuration but for the filter
//! that decides: the picker's is that of `envoy-config/envoy.yaml` with `ext_proc` in
//! the place of the module.

use std::path::{Path, PathBuf};
use std::time::Instant;

use tokio::time::sleep;

use super::engines::{BLOCKS, Engines};
use crate::bench::load::{Answer, Fault};
use crate::dynamo::peers::write_model;
use crate::quality::rivals::dynamo_environment;
use crate::stack::child::Child;
use crate::stack::envoy::{start_filled, with_places};
use crate::stack::gateway::start_sidecar;
use crate::stack::launch::{BLOCK_SIZE, EnginePorts, MODEL, StackError, fill, local};
use crate::stack::limits::{POLL_START, READY_WITHIN};
use crate::stack::options::Options;
use crate::stack::ports::free_port;

/// Longest prompt that Dynamo lets through, in tokens: more than any has.
const POSITIONS_MAX: u32 = 2_000_000;

/// Times that Dynamo's mocked workers are faster than real ones: they answer at once.
const SPEEDUP: u32 = 1_000_000;

/// `ext_proc` in the place of the module: the body is held and sent whole, or streamed
/// there and back.
const EXT_PROC: &str = r#"          - name: picker
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor
              grpc_service: {envoy_grpc: {cluster_name: picker}, timeout: 120s}
              message_timeout: 120s
              processing_mode:
                request_header_mode: SEND
                request_body_mode: BODY_MODE
                response_header_mode: SEND
                response_body_mode: NONE
                request_trailer_mode: TRAILER_MODE
                response_trailer_mode: SKIP
"#;

/// Modes of `ext_proc` for body and trailers: held and sent whole.
const BUFFERED: [&str; 2] = ["BUFFERED", "SKIP"];

/// The same: streamed there and back. It wants the trailers as well.
const DUPLEX: [&str; 2] = ["FULL_DUPLEX_STREAMED", "SEND"];

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Envoy alone, one engine after the other.
    Envoy,
    /// Envoy with the module.
    Warmpath,
    /// The same, tokens handed over.
    WarmpathTokens,
    /// Envoy with the picker, fastokens.
    PickerFastokens,
    /// Envoy with the picker, Hugging Face's tokenizers.
    PickerHf,
    /// Envoy with the picker, fastokens, the body streamed.
    PickerDuplex,
    /// SGLang's router, `cache_aware`.
    SglangRouter,
    /// Dynamo's frontend, `kv`, before mocked workers of its own.
    Dynamo,
    /// The same with fastokens.
    DynamoFastokens,
}

impl Target {
    /// All.
    pub const ALL: [Self; 9] = [
        Self::Envoy,
        Self::Warmpath,
        Self::WarmpathTokens,
        Self::PickerFastokens,
        Self::PickerHf,
        Self::PickerDuplex,
        Self::SglangRouter,
        Self::Dynamo,
        Self::DynamoFastokens,
    ];

    /// Name in rows and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Envoy => "envoy",
            Self::Warmpath => "warmpath",
            Self::WarmpathTokens => "warmpath_token_data",
            Self::PickerFastokens => "picker_fastokens",
            Self::PickerHf => "picker_hf",
            Self::PickerDuplex => "picker_fastokens_duplex",
            Self::SglangRouter => "sglang_router",
            Self::Dynamo => "dynamo",
            Self::DynamoFastokens => "dynamo_fastokens",
        }
    }

    /// Whether it decides by the engines' events and names its choice.
    #[must_use]
    pub fn decides(self) -> bool {
        matches!(
            self,
            Self::Warmpath
                | Self::WarmpathTokens
                | Self::PickerFastokens
                | Self::PickerHf
                | Self::PickerDuplex
        )
    }

    /// Whether an answer is right; if so, the port of the engine that gave it, for
    /// those that decide.
    ///
    /// # Errors
    ///
    /// [`Fault::Wrong`].
    pub fn served(self, answer: &Answer) -> Result<Option<u16>, Fault> {
        let text = std::str::from_utf8(&answer.body).unwrap_or_default();
        if !text.contains("\"choices\"") {
            return Err(Fault::Wrong("no choices"));
        }
        if !self.decides() {
            return Ok(None);
        }
        let served = answer.header(super::engines::SERVED).and_then(|port| port.parse().ok());
        let served: u16 = served.ok_or(Fault::Wrong("not of an engine"))?;
        // What comes after the first are places to retry.
        let told = answer.header(super::engines::TOLD).and_then(|told| told.split(',').next());
        if told == Some(&local(served)) {
            Ok(Some(served))
        } else {
            Err(Fault::Wrong("not the engine that was named"))
        }
    }
}

/// A running target.
pub struct Running {
    /// Which.
    pub target: Target,
    /// Where it listens.
    pub address: String,
    children: Vec<Child>,
}

impl Running {
    /// Its processes; for Dynamo the frontend alone, its workers stand for engines.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        self.children.iter().filter_map(Child::id).collect()
    }

    /// Name and end of the log of a process that ended by itself.
    pub fn ended(&mut self) -> Option<(String, String)> {
        let ended = self.children.iter_mut().find_map(|child| child.ended().map(|_| child));
        ended.map(|child| (child.name().to_owned(), child.log_tail()))
    }

    /// Ends of the logs of all its processes.
    #[must_use]
    pub fn logs(&self) -> String {
        let logs =
            self.children.iter().map(|child| format!("{}: {}", child.name(), child.log_tail()));
        logs.collect::<Vec<_>>().join("\n")
    }

    /// Stops it.
    pub async fn stop(self) {
        for child in self.children.into_iter().rev() {
            child.stop().await;
        }
    }
}

/// What all targets are started with.
pub struct Starter<'a> {
    /// Where things are.
    pub options: &'a Options,
    /// The engines.
    pub engines: &'a Engines,
    /// For configuration and logs; each target has a folder in it.
    pub folder: &'a Path,
}

impl Starter<'_> {
    /// Starts a target. Dynamo's need [`Starter::mockers`].
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn start(&self, target: Target) -> Result<Running, StackError> {
        let folder = self.folder.join(target.name());
        std::fs::create_dir_all(&folder)?;
        let (address, children) = match target {
            Target::Envoy => self.envoy(&folder, "envoy-round-robin.yaml", 0, "", None).await?,
            Target::Warmpath => self.warmpath(&folder, "false").await?,
            Target::WarmpathTokens => self.warmpath(&folder, "false, \"token_data\": true").await?,
            Target::PickerFastokens => self.picker(&folder, "fastokens", &BUFFERED).await?,
            Target::PickerHf => self.picker(&folder, "hf", &BUFFERED).await?,
            Target::PickerDuplex => self.picker(&folder, "fastokens", &DUPLEX).await?,
            Target::SglangRouter => self.sglang(&folder)?,
            Target::Dynamo => self.dynamo(&folder, &[])?,
            Target::DynamoFastokens => self.dynamo(&folder, &["--tokenizer", "fastokens"])?,
        };
        Ok(Running { target, address, children })
    }

    async fn envoy(
        &self,
        folder: &Path,
        template: &str,
        feed: u16,
        debug_headers: &str,
        picker: Option<&[&str; 2]>,
    ) -> Result<(String, Vec<Child>), StackError> {
        let workers = self.engines.http();
        let template = std::fs::read_to_string(self.options.envoy_config(template))?;
        let template = with_places(&template, workers.len());
        let template = match picker {
            Some(modes) => with_ext_proc(&template, modes)?,
            None => template,
        };
        let (port, admin) = (free_port()?, free_port()?);
        let mut values = vec![
            ("GATEWAY_ADDRESS".to_owned(), "127.0.0.1".to_owned()),
            ("GATEWAY_PORT".into(), port.to_string()),
            ("ADMIN_PORT".into(), admin.to_string()),
            ("FEED_PORT".into(), feed.to_string()),
            ("WASM_FILE".into(), self.options.wasm.display().to_string()),
            ("DEBUG_HEADERS".into(), debug_headers.to_owned()),
        ];
        for (number, worker) in (1..).zip(&workers) {
            values.push((format!("WORKER_{number}_PORT"), worker.to_string()));
        }
        let values: Vec<(&str, String)> =
            values.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
        let text = fill(&template, &values)?;
        let child = start_filled(self.options, "envoy", &text, 1, admin, folder).await?;
        Ok((local(port), vec![child]))
    }

    async fn warmpath(
        &self,
        folder: &Path,
        settings: &str,
    ) -> Result<(String, Vec<Child>), StackError> {
        let (feed, status) = (free_port()?, free_port()?);
        let config = format!(
            "feed: {{listen: {:?}}}\nstatus: {{listen: {:?}}}\n\
             models:\n  - {{name: {MODEL}, directory: {:?}, block_size: {BLOCK_SIZE}}}\n\
             workers_file: workers.yaml\n",
            local(feed),
            local(status),
            self.options.model_dir,
        );
        std::fs::write(folder.join("sidecar.yaml"), config)?;
        let mut list = String::from("workers:\n");
        for (number, EnginePorts { http, events, replay }) in (1..).zip(&self.engines.ports) {
            list.push_str(&format!(
                "  - {{id: {number}, model: {MODEL}, engine: vllm, role: aggregated, \
                 endpoint: {:?}, kv_events: \"tcp://{}\", replay: \"tcp://{}\", \
                 total_kv_blocks: {BLOCKS}}}\n",
                local(*http),
                local(*events),
                local(*replay),
            ));
        }
        std::fs::write(folder.join("workers.yaml"), list)?;
        let program = self.options.program("warmpath-sidecar");
        let sidecar = start_sidecar(&program, status, folder).await?;
        let (address, mut children) =
            self.envoy(folder, "envoy.yaml", feed, settings, None).await?;
        children.insert(0, sidecar);
        Ok((address, children))
    }

    async fn picker(
        &self,
        folder: &Path,
        tokenizer: &str,
        modes: &[&str; 2],
    ) -> Result<(String, Vec<Child>), StackError> {
        let port = free_port()?;
        let mut arguments = vec!["--listen".to_owned(), local(port)];
        arguments.extend(["--tokenizer".into(), tokenizer.into()]);
        arguments.extend(["--model-name".into(), MODEL.into(), "--model-dir".into()]);
        arguments.push(self.options.model_dir.display().to_string());
        arguments.extend(["--block-size".into(), BLOCK_SIZE.to_string()]);
        arguments.extend(["--total-kv-blocks".into(), BLOCKS.to_string()]);
        for ports in &self.engines.ports {
            arguments.push("--worker".into());
            arguments.push(format!("{}=tcp://{}", local(ports.http), local(ports.events)));
        }
        let mut picker = Child::start("picker", &picker_program(self.options), &arguments, folder)?;
        // It listens once its tokenizer is loaded.
        let deadline = Instant::now() + READY_WITHIN;
        while tokio::net::TcpStream::connect(local(port)).await.is_err() {
            if let Some(status) = picker.ended() {
                return Err(StackError::Ended(format!("picker ({status})"), picker.log_tail()));
            }
            if Instant::now() > deadline {
                return Err(StackError::NotReady("the picker's port", picker.log_tail()));
            }
            sleep(POLL_START).await;
        }
        let (address, mut children) =
            self.envoy(folder, "envoy.yaml", port, "", Some(modes)).await?;
        children.insert(0, picker);
        Ok((address, children))
    }

    fn sglang(&self, folder: &Path) -> Result<(String, Vec<Child>), StackError> {
        let (port, metrics) = (free_port()?.to_string(), free_port()?.to_string());
        let arguments = ["launch", "--host", "127.0.0.1", "--policy", "cache_aware", "--log-level"];
        let more = ["warn", "--prometheus-host", "127.0.0.1", "--prometheus-port", &metrics];
        let last = ["--port", &port, "--worker-urls"];
        let words = arguments.iter().chain(&more).chain(&last);
        let mut arguments: Vec<String> = words.map(ToString::to_string).collect();
        arguments.extend(
            self.engines.http().into_iter().map(|worker| format!("http://{}", local(worker))),
        );
        let program = sglang_program(self.options);
        let child = Child::start("sglang-router", &program, &arguments, folder)?;
        Ok((format!("127.0.0.1:{port}"), vec![child]))
    }

    fn dynamo(&self, folder: &Path, more: &[&str]) -> Result<(String, Vec<Child>), StackError> {
        let port = free_port()?;
        let words = ["-m", "dynamo.frontend", "--router-mode", "kv", "--http-host", "127.0.0.1"];
        let mut arguments: Vec<String> =
            words.iter().chain(more).map(ToString::to_string).collect();
        arguments.extend(["--http-port".into(), port.to_string()]);
        let child = Child::start_with(
            "dynamo",
            &self.options.python,
            &arguments,
            &dynamo_environment(self.folder),
            folder,
        )?;
        Ok((local(port), vec![child]))
    }

    /// Starts Dynamo's mocked workers: as many as there are engines.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub fn mockers(&self) -> Result<Child, StackError> {
        let model = write_model(&self.options.model_dir, self.folder, POSITIONS_MAX)?;
        let pairs = [
            ("--model-path", model.display().to_string()),
            ("--model-name", MODEL.to_owned()),
            ("--num-workers", super::engines::ENGINES.to_string()),
            ("--block-size", BLOCK_SIZE.to_string()),
            ("--num-gpu-blocks-override", BLOCKS.to_string()),
            ("--speedup-ratio", SPEEDUP.to_string()),
        ];
        let mut arguments = vec!["-m".to_owned(), "dynamo.mocker".into()];
        arguments.extend(pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
        let python = &self.options.python;
        Ok(Child::start_with(
            "mockers",
            python,
            &arguments,
            &dynamo_environment(self.folder),
            self.folder,
        )?)
    }
}

/// The picker, where `scripts/bench-gateway.sh` builds it.
#[must_use]
pub fn picker_program(options: &Options) -> PathBuf {
    options.root.join("target/picker/release/ext-proc-picker")
}

/// SGLang's router, where `scripts/bench-gateway.sh` installs it.
#[must_use]
pub fn sglang_program(options: &Options) -> PathBuf {
    options.root.join(".cache/peers/sglang-router/bin/sglang-router")
}

/// The template of the gateway with `ext_proc` in the place of the module.
fn with_ext_proc(template: &str, [body, trailer]: &[&str; 2]) -> Result<String, StackError> {
    let missing = |what: &str| StackError::Unfilled(format!("{what} of envoy.yaml"));
    let (before, rest) =
        template.split_once("          - name: warmpath\n").ok_or_else(|| missing("the filter"))?;
    let (_, after) = rest
        .split_once("          - name: envoy.filters.http.router\n")
        .ok_or_else(|| missing("the router"))?;
    let filter = EXT_PROC.replace("BODY_MODE", body).replace("TRAILER_MODE", trailer);
    let text = format!("{before}{filter}          - name: envoy.filters.http.router\n{after}");
    // A picker that tokenizes a megabyte does not answer pings meanwhile.
    let text = text.lines().filter(|line| !line.contains("connection_keepalive"));
    let text: String = text.flat_map(|line| [line, "\n"]).collect();
    Ok(text.replace("warmpath_feed", "picker"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pickers_envoy_is_ours_but_for_the_filter() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../envoy-config/envoy.yaml");
        let ours = std::fs::read_to_string(path).unwrap();
        let text = with_ext_proc(&ours, &DUPLEX).unwrap();
        assert!(
            text.contains("ext_proc.v3.ExternalProcessor") && text.contains("- name: picker\n")
        );
        assert!(text.contains("body_mode: FULL_DUPLEX_STREAMED\n"));
        assert!(!text.contains("wasm.v3.Wasm") && !text.contains("warmpath_feed"));
        let kept = ["strip_routing_headers", "override_host", "${FEED_PORT}", "retry_policy"];
        assert!(kept.iter().all(|part| text.contains(part)));
        assert!(with_ext_proc("", &DUPLEX).is_err());
    }
}
