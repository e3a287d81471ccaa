//! Gateway: the sidecar and Envoy with the module, in front of whatever workers
//! a run has.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::child::Child;
use super::client::get;
use super::envoy::{self, Bootstrap};
use super::launch::{StackError, local, wait_until_ok};
use super::options::Options;
use super::ports::free_port;

/// How the gateway names the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// In headers.
    Endpoint,
    /// In the body.
    Body,
}

/// The running parts.
pub struct Gateway {
    /// Port for clients.
    pub port: u16,
    admin: u16,
    /// The sidecar's feed.
    pub feed: u16,
    status: u16,
    program: PathBuf,
    folder: PathBuf,
    sidecar: Child,
    envoy: Child,
}

impl Gateway {
    /// Starts both and waits until they are ready.
    ///
    /// - `sources`: what the sidecar's configuration says of models and workers.
    /// - `workers`: ports of the workers, or of the frontends before them.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn start(
        options: &Options,
        mode: Mode,
        sources: &str,
        workers: &[u16],
        folder: &Path,
    ) -> Result<Self, StackError> {
        Self::start_with(options, mode, sources, workers, "", folder).await
    }

    /// The same, with the plugin's `router` setting, as JSON.
    ///
    /// # Errors
    ///
    /// As [`Gateway::start`].
    pub async fn start_with(
        options: &Options,
        mode: Mode,
        sources: &str,
        workers: &[u16],
        router: &str,
        folder: &Path,
    ) -> Result<Self, StackError> {
        let (feed, status) = (free_port()?, free_port()?);
        let config = format!(
            "feed: {{listen: {:?}}}\nstatus: {{listen: {:?}}}\n{sources}",
            local(feed),
            local(status),
        );
        std::fs::write(folder.join("sidecar.yaml"), config)?;
        let program = options.program("warmpath-sidecar");
        let sidecar = start_sidecar(&program, status, folder).await?;
        let (port, admin) = (free_port()?, free_port()?);
        let template = match mode {
            Mode::Endpoint => "envoy.yaml",
            Mode::Body => "envoy-body.yaml",
        };
        let bootstrap = Bootstrap { name: "envoy", template, port, admin, feed, workers, router };
        let envoy = envoy::start(options, &bootstrap, folder).await?;
        let folder = folder.to_path_buf();
        Ok(Self { port, admin, feed, status, program, folder, sidecar, envoy })
    }

    /// Kills the sidecar without warning, starts it again and waits until it is
    /// ready.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn kill_sidecar(&mut self) -> Result<(), StackError> {
        self.sidecar.kill_now().await;
        self.sidecar = start_sidecar(&self.program, self.status, &self.folder).await?;
        Ok(())
    }

    /// Address for clients.
    #[must_use]
    pub fn address(&self) -> String {
        local(self.port)
    }

    /// Processes of both.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        [&self.sidecar, &self.envoy].into_iter().filter_map(Child::id).collect()
    }

    /// The sidecar's state page.
    pub async fn state(&self) -> Option<Value> {
        get(&local(self.status), "/v1/state").await.ok()?.json()
    }

    /// A stat of Envoy's, summed over its labels.
    pub async fn stat(&self, name: &str) -> Option<u64> {
        let page = get(&local(self.admin), &format!("/stats?filter={name}")).await.ok()?;
        let text = String::from_utf8_lossy(&page.body).into_owned();
        let values = text.lines().filter_map(|line| line.rsplit_once(": ")?.1.parse::<u64>().ok());
        values.reduce(|sum, value| sum + value)
    }

    /// Name and end of the log of a process that ended by itself.
    pub fn ended(&mut self) -> Option<(String, String)> {
        [&mut self.sidecar, &mut self.envoy]
            .into_iter()
            .find_map(|child| child.ended().map(|_| (child.name().into(), child.log_tail())))
    }

    /// Stops both.
    pub async fn stop(self) {
        self.envoy.stop().await;
        self.sidecar.stop().await;
    }
}

/// Starts a sidecar whose `sidecar.yaml` is in `folder`, and waits until it is
/// ready.
///
/// # Errors
///
/// [`StackError`].
pub async fn start_sidecar(
    program: &Path,
    status: u16,
    folder: &Path,
) -> Result<Child, StackError> {
    let arguments = ["--config".to_owned(), "sidecar.yaml".to_owned()];
    let mut sidecar = Child::start("sidecar", program, &arguments, folder)?;
    wait_until_ok("the sidecar's /readyz", &mut sidecar, status, "/readyz").await?;
    Ok(sidecar)
}
