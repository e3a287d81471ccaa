//! Gateway: the sidecar and Envoy with the module, in front of frontends.

use std::path::Path;

use serde_json::Value;

use super::cases::Mode;
use crate::stack::child::Child;
use crate::stack::client::get;
use crate::stack::launch::{StackError, fill, free_port, local, wait_until_ok};
use crate::stack::options::Options;

/// The running parts.
pub struct Gateway {
    /// Port for clients.
    pub port: u16,
    admin: u16,
    /// The sidecar's feed.
    pub feed: u16,
    status: u16,
    sidecar: Child,
    envoy: Child,
}

impl Gateway {
    /// Starts both and waits until they are ready.
    ///
    /// - `discovery`: what the sidecar's configuration says of its sources.
    /// - `frontends`: their ports.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn start(
        options: &Options,
        mode: Mode,
        discovery: &str,
        frontends: &[u16],
        folder: &Path,
    ) -> Result<Self, StackError> {
        let (feed, status) = (free_port()?, free_port()?);
        let config = format!(
            "feed: {{listen: {:?}}}\nstatus: {{listen: {:?}}}\n{discovery}",
            local(feed),
            local(status),
        );
        std::fs::write(folder.join("sidecar.yaml"), config)?;
        let arguments = ["--config".to_owned(), "sidecar.yaml".to_owned()];
        let program = options.program("warmpath-sidecar");
        let mut sidecar = Child::start("sidecar", &program, &arguments, folder)?;
        wait_until_ok("the sidecar's /readyz", &mut sidecar, status, "/readyz").await?;
        let (port, admin) = (free_port()?, free_port()?);
        let envoy = start_envoy(options, mode, [port, admin, feed], frontends, folder).await?;
        Ok(Self { port, admin, feed, status, sidecar, envoy })
    }

    /// Address for clients.
    #[must_use]
    pub fn address(&self) -> String {
        local(self.port)
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

async fn start_envoy(
    options: &Options,
    mode: Mode,
    [port, admin, feed]: [u16; 3],
    frontends: &[u16],
    folder: &Path,
) -> Result<Child, StackError> {
    let template = match mode {
        Mode::Endpoint => "envoy.yaml",
        Mode::Body => "envoy-body.yaml",
    };
    let template = std::fs::read_to_string(options.envoy_config(template))?;
    let mut values = vec![
        ("GATEWAY_ADDRESS", "127.0.0.1".to_owned()),
        ("GATEWAY_PORT", port.to_string()),
        ("ADMIN_PORT", admin.to_string()),
        ("FEED_PORT", feed.to_string()),
        ("WASM_FILE", options.wasm.display().to_string()),
        ("DEBUG_HEADERS", "true".to_owned()),
    ];
    let names = ["WORKER_1_PORT", "WORKER_2_PORT", "WORKER_3_PORT"];
    for (name, frontend) in names.into_iter().zip(frontends.iter().cycle()) {
        values.push((name, frontend.to_string()));
    }
    std::fs::write(folder.join("envoy.yaml"), fill(&template, &values)?)?;
    let arguments = [
        "-c",
        "envoy.yaml",
        "--concurrency",
        "2",
        "--disable-hot-restart",
        "--log-level",
        "warning",
        "--component-log-level",
        "wasm:info",
    ];
    let mut envoy = Child::start("envoy", &options.envoy, &arguments.map(str::to_owned), folder)?;
    wait_until_ok("Envoy's /ready", &mut envoy, admin, "/ready").await?;
    Ok(envoy)
}
