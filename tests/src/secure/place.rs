//! Place: engines, a sidecar and Envoy whose feed is as a run wants it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::time::sleep;

use crate::stack::child::Child;
use crate::stack::client::{Answer, Chat, get};
use crate::stack::launch::{MODEL, Stack, StackError, fill, local, wait_until_ok};
use crate::stack::limits::{POLL, POLL_START, READY_WITHIN};
use crate::stack::options::Options;
use crate::stack::smoke::ENGINE_SHAPE;

/// What every feed cluster begins with; in a bootstrap it is the last one.
const FEED_CLUSTER: &str = "  - name: warmpath_feed\n";

/// Answers in a row that must have been routed by cache before the gateway counts as
/// warm: enough to meet both worker threads.
const WARM_REQUESTS: u32 = 12;

/// What a run wants.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan {
    /// Members of the sidecar's `feed`.
    pub(super) feed: String,
    /// The feed's cluster; the bootstrap's own if empty.
    pub(super) cluster: String,
    /// Bootstrap of `envoy-config/`.
    pub(super) template: &'static str,
    /// Members added to the plugin's configuration, each with a comma behind it.
    pub(super) plugin: &'static str,
    /// Port of a relay that Envoy takes for the sidecar.
    pub(super) relay: Option<u16>,
    /// Whether everything is logged that can be.
    pub(super) is_traced: bool,
}

/// The running parts.
pub(super) struct Place {
    /// The engines.
    pub(super) stack: Stack,
    /// Folder of all files, logs among them.
    pub(super) folder: PathBuf,
    kept: Option<TempDir>,
    options: Options,
    plan: Plan,
    port: u16,
    admin: u16,
    pub(super) feed_port: u16,
    pub(super) status_port: u16,
    sidecar: Option<Child>,
    envoy: Option<Child>,
}

impl Place {
    /// Starts the engines.
    pub(super) async fn engines(options: &Options) -> Result<Self, StackError> {
        let stack = Stack::engines(options.clone(), ENGINE_SHAPE, None).await?;
        let (port, admin) = (stack.ports.gateway, stack.ports.admin);
        let (feed_port, status_port) = (stack.ports.feed, stack.ports.status);
        let kept = tempfile::Builder::new().prefix("warmpath-secure-").tempdir()?;
        Ok(Self {
            stack,
            folder: kept.path().to_path_buf(),
            kept: Some(kept),
            options: options.clone(),
            plan: Plan::default(),
            port,
            admin,
            feed_port,
            status_port,
            sidecar: None,
            envoy: None,
        })
    }

    /// Starts a sidecar and waits until it is ready.
    pub(super) async fn start_sidecar(&mut self, plan: &Plan) -> Result<(), StackError> {
        self.plan = plan.clone();
        let mut text = format!(
            "feed: {{{}}}\nstatus: {{listen: {:?}}}\nmodels:\n  - {{name: {MODEL}, directory: \
             {:?}, block_size: 16}}\nworkers:\n",
            plan.feed,
            local(self.status_port),
            self.options.model_dir,
        );
        for (id, ports) in (1..).zip(&self.stack.ports.engines) {
            text.push_str(&format!(
                "  - {{id: {id}, model: {MODEL}, endpoint: \"127.0.0.1:{}\", kv_events: \
                 \"tcp://127.0.0.1:{}\", replay: \"tcp://127.0.0.1:{}\", total_kv_blocks: {}}}\n",
                ports.http, ports.events, ports.replay, ENGINE_SHAPE.blocks,
            ));
        }
        std::fs::write(self.folder.join("sidecar.yaml"), text)?;
        let program = self.options.program("warmpath-sidecar");
        let arguments = ["--config".to_owned(), "sidecar.yaml".to_owned()];
        let level = if plan.is_traced { "trace" } else { "info" };
        let environment = [("RUST_LOG", level.to_owned())];
        let mut sidecar =
            Child::start_with("sidecar", &program, &arguments, &environment, &self.folder)?;
        wait_until_ok("the sidecar's /readyz", &mut sidecar, self.status_port, "/readyz").await?;
        self.sidecar = Some(sidecar);
        Ok(())
    }

    /// Kills the sidecar without warning.
    pub(super) async fn kill_sidecar(&mut self) {
        if let Some(mut sidecar) = self.sidecar.take() {
            sidecar.kill_now().await;
        }
    }

    /// Starts Envoy and waits until it answers.
    pub(super) async fn start_envoy(&mut self, plan: &Plan) -> Result<(), StackError> {
        let template = std::fs::read_to_string(self.options.envoy_config(plan.template))?;
        let template = with_feed(&template, &plan.cluster)
            .ok_or_else(|| StackError::Unfilled("place for the feed's cluster".into()))?;
        let folder = self.folder.display().to_string();
        let mut values = vec![
            ("GATEWAY_ADDRESS", "127.0.0.1".to_owned()),
            ("GATEWAY_PORT", self.port.to_string()),
            ("ADMIN_PORT", self.admin.to_string()),
            ("FEED_PORT", plan.relay.unwrap_or(self.feed_port).to_string()),
            ("FEED_FILES", folder.clone()),
            ("FEED_NAME", super::SIDECAR.to_owned()),
            ("FEED_SOCKET", format!("{folder}/feed.sock")),
            ("WASM_FILE", self.options.wasm.display().to_string()),
            ("DEBUG_HEADERS", "true".to_owned()),
        ];
        let places = ["WORKER_1_PORT", "WORKER_2_PORT", "WORKER_3_PORT"];
        values.extend(
            places.into_iter().zip(self.stack.ports.engines.map(|ports| ports.http.to_string())),
        );
        let mode = "{\"mode\": ";
        let text =
            fill(&template, &values)?.replacen(mode, &format!("{{{}\"mode\": ", plan.plugin), 1);
        std::fs::write(self.folder.join("envoy.yaml"), text)?;
        for name in ["certificate.yaml", "authority.yaml", "token.yaml"] {
            let path = self.options.envoy_config("feed/sds").join(name);
            let filled = fill(&std::fs::read_to_string(path)?, &values)?;
            std::fs::write(self.folder.join(name), filled)?;
        }
        let level = if plan.is_traced { "trace" } else { "warning" };
        let arguments = [
            "-c",
            "envoy.yaml",
            "--concurrency",
            "2",
            "--disable-hot-restart",
            "--log-level",
            level,
            "--component-log-level",
            if plan.is_traced { "wasm:trace" } else { "wasm:info" },
        ];
        let arguments = arguments.map(str::to_owned);
        let mut envoy = Child::start("envoy", &self.options.envoy, &arguments, &self.folder)?;
        wait_until_ok("Envoy's /ready", &mut envoy, self.admin, "/ready").await?;
        self.envoy = Some(envoy);
        Ok(())
    }

    /// Stops Envoy.
    pub(super) async fn stop_envoy(&mut self) {
        if let Some(envoy) = self.envoy.take() {
            envoy.stop().await;
        }
    }

    /// Waits until answers in a row, each on a connection of its own, were routed
    /// by cache on what the feed says now.
    pub(super) async fn until_warm(&self, within: Duration) -> Result<Duration, String> {
        // A worker whose events were never seen is not yet known to count tokens as
        // the gateway does.
        for (index, address) in self.stack.engine_addresses().enumerate() {
            let text = format!("engine {index} says hello {}", "and hello again ".repeat(32));
            let _shown = chat(text).send(&address, MODEL, &[]).await;
        }
        let started = Instant::now();
        let (mut warm, mut sent, mut last) = (0, 0_u64, String::new());
        while warm < WARM_REQUESTS {
            if started.elapsed() > within {
                return Err(format!("not within {within:?}; last: {last}; {}", self.log_tail()));
            }
            sent += 1;
            let text = format!("probe {sent} {}", "of the gateway ".repeat(16));
            let answer = chat(text).send(&self.gateway(), MODEL, &[]).await;
            match answer {
                Ok(answer) if answer.reason() == Some("kv") => {
                    warm += 1;
                    continue;
                }
                Ok(answer) => last = format!("reason {:?}", answer.reason()),
                Err(error) => last = error.to_string(),
            }
            warm = 0;
            sleep(POLL_START).await;
        }
        Ok(started.elapsed())
    }

    fn log_tail(&self) -> String {
        self.envoy.as_ref().map(Child::log_tail).unwrap_or_default()
    }

    /// Address for clients.
    pub(super) fn gateway(&self) -> String {
        local(self.port)
    }

    /// Address of Envoy's admin pages.
    pub(super) fn admin(&self) -> String {
        local(self.admin)
    }

    /// Address of the sidecar's pages.
    pub(super) fn status(&self) -> String {
        local(self.status_port)
    }

    /// A prompt's answer through the gateway.
    pub(super) async fn ask(&self, text: &str) -> Result<Answer, String> {
        let answer = chat(text.to_owned()).send(&self.gateway(), MODEL, &[]).await;
        answer.map_err(|error| error.to_string())
    }

    /// A number on the sidecar's page for Prometheus; 0 if it is not there.
    pub(super) async fn counted(&self, line: &str) -> u64 {
        let Ok(page) = get(&self.status(), "/metrics").await else { return 0 };
        let text = String::from_utf8_lossy(&page.body).into_owned();
        text.lines().find_map(|it| it.strip_prefix(line)?.trim().parse().ok()).unwrap_or(0)
    }

    /// Envoy's stats whose names this regular expression finds, summed.
    pub(super) async fn stat(&self, name: &str) -> u64 {
        let Ok(page) = get(&self.admin(), &format!("/stats?filter={name}")).await else {
            return 0;
        };
        let text = String::from_utf8_lossy(&page.body).into_owned();
        text.lines().filter_map(|line| line.rsplit_once(": ")?.1.parse::<u64>().ok()).sum()
    }

    /// Name and end of the log of a process that ended by itself.
    pub(super) fn ended(&mut self) -> Option<String> {
        let children = self.sidecar.iter_mut().chain(&mut self.envoy);
        let ended = children.filter_map(|it| it.ended().map(|_| (it.name().into(), it.log_tail())));
        let (name, log): (String, String) = ended.chain(self.stack.ended()).next()?;
        Some(format!("{name} ended:\n{log}"))
    }

    /// Keeps the folder; where it is.
    pub(super) fn keep(&mut self) -> PathBuf {
        self.kept.take().map_or_else(|| self.folder.clone(), TempDir::keep)
    }

    /// Stops everything.
    pub(super) async fn stop(self) {
        for child in [self.envoy, self.sidecar].into_iter().flatten() {
            child.stop().await;
        }
        self.stack.stop().await;
    }
}

/// A small request.
pub(super) fn chat(text: String) -> Chat {
    Chat { messages: vec![("user", text)], max_tokens: 1, stream: false }
}

/// Waits until something is at least so large.
pub(super) async fn until(
    what: &str,
    least: u64,
    mut look: impl AsyncFnMut() -> u64,
) -> Result<u64, String> {
    let deadline = Instant::now() + READY_WITHIN / 3;
    loop {
        let seen = look().await;
        if seen >= least {
            return Ok(seen);
        }
        if Instant::now() > deadline {
            return Err(format!("{what}: {seen}, never {least}"));
        }
        sleep(POLL).await;
    }
}

/// Replaces a file at once, as those do who rotate certificates.
pub(super) fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let beside = path.with_extension("new");
    std::fs::write(&beside, text)?;
    std::fs::rename(beside, path)
}

/// A bootstrap with another feed cluster in place of its own.
fn with_feed(template: &str, cluster: &str) -> Option<String> {
    let (before, _) = template.split_once(FEED_CLUSTER)?;
    if cluster.is_empty() {
        return Some(template.to_owned());
    }
    let (_, own) = cluster.split_once(FEED_CLUSTER)?;
    Some(format!("{before}{FEED_CLUSTER}{own}"))
}
