//! Variant: another gateway in front of the same engines, with the same sidecar
//! and a bootstrap that differs.

use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::time::sleep;

use super::super::child::Child;
use super::super::client::{Chat, get};
use super::super::envoy::{self, Bootstrap};
use super::super::launch::{MODEL, Stack, StackError, local};
use super::super::limits::{POLL_START, READY_WITHIN};
use super::super::ports::free_port;

/// The native filter that removes routing headers, and what comes after it.
const STRIP: &str = "          # A client must not choose its worker.";
const MODULE: &str = "          - name: warmpath\n";

/// Longest time until a count that was made is told: many ticks.
const COUNTED_WITHIN: Duration = Duration::from_secs(5);

/// A running variant of a bootstrap.
pub(super) struct Variant {
    envoy: Child,
    port: u16,
    admin: u16,
    _folder: TempDir,
}

impl Variant {
    /// Starts it, and waits until it knows the workers.
    ///
    /// - `front`: filters that take the place of the native one that removes
    ///   routing headers.
    /// - `options`: members added to the plugin's configuration.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub(super) async fn start(
        stack: &Stack,
        name: &str,
        front: &str,
        options: &str,
    ) -> Result<Self, StackError> {
        let template = std::fs::read_to_string(stack.options.envoy_config("envoy.yaml"))?;
        let template = edited(&template, front, options)
            .ok_or_else(|| StackError::Unfilled("place for the variant".into()))?;
        Self::start_template(stack, name, &template).await
    }

    /// Starts a gateway with a bootstrap, and waits until it knows the workers.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub(super) async fn start_template(
        stack: &Stack,
        name: &str,
        template: &str,
    ) -> Result<Self, StackError> {
        let folder = tempfile::Builder::new().prefix("warmpath-variant-").tempdir()?;
        let path = folder.path().join("template.yaml");
        std::fs::write(&path, template)?;
        let (port, admin) = (free_port()?, free_port()?);
        let workers: Vec<u16> = stack.ports.engines.iter().map(|ports| ports.http).collect();
        let template = path.to_string_lossy();
        let feed = stack.ports.feed;
        let bootstrap = Bootstrap {
            name,
            template: &template,
            port,
            admin,
            feed,
            workers: &workers,
            router: "",
        };
        let envoy = envoy::start(&stack.options, &bootstrap, folder.path()).await?;
        let variant = Self { envoy, port, admin, _folder: folder };
        variant.settle().await?;
        Ok(variant)
    }

    /// Waits until several connections in a row, which meet all worker threads,
    /// show a gateway that knows the workers.
    async fn settle(&self) -> Result<(), StackError> {
        const ANSWERS: u32 = 12;
        let chat = Chat {
            messages: vec![("user", "who is there, and who else is there? ".repeat(8))],
            max_tokens: 1,
            stream: false,
        };
        let deadline = Instant::now() + READY_WITHIN;
        let mut shown = 0;
        while shown < ANSWERS {
            let answer = chat.send(&self.address(), MODEL, &[]).await;
            // What it says of refusals is what some variants are for.
            let knows = match &answer {
                Ok(answer) => answer.reason() == Some("kv"),
                Err(_) => false,
            };
            shown = if knows { shown + 1 } else { 0 };
            if !knows {
                if Instant::now() > deadline {
                    let log = self.envoy.log_tail();
                    return Err(StackError::NotReady("a variant of the gateway", log));
                }
                sleep(POLL_START).await;
            }
        }
        Ok(())
    }

    /// Address for clients.
    pub(super) fn address(&self) -> String {
        local(self.port)
    }

    /// A counter of the module's, which tells of its counts on ticks: once it has
    /// reached `least`, or when that takes too long.
    pub(super) async fn counter(&self, name: &str, least: u64) -> Option<u64> {
        let deadline = Instant::now() + COUNTED_WITHIN;
        loop {
            let page = get(&local(self.admin), &format!("/stats?filter={name}")).await.ok()?;
            let text = String::from_utf8_lossy(&page.body).into_owned();
            let values = text.lines().filter_map(|line| line.rsplit_once(": ")?.1.parse().ok());
            let value = values.into_iter().next();
            if value.is_some_and(|value: u64| value >= least) || Instant::now() > deadline {
                return value;
            }
            sleep(POLL_START).await;
        }
    }

    /// The end of its log.
    pub(super) fn log(&self) -> String {
        self.envoy.log_tail()
    }

    /// Stops it.
    pub(super) async fn stop(self) {
        self.envoy.stop().await;
    }
}

fn edited(template: &str, front: &str, options: &str) -> Option<String> {
    let (before, rest) = template.split_once(STRIP)?;
    let (_, after) = rest.split_once(MODULE)?;
    let mode = "{\"mode\": \"endpoint\", ";
    after.contains(mode).then(|| {
        let after = after.replacen(mode, &format!("{mode}{options}, "), 1);
        format!("{before}{front}{MODULE}{after}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bootstrap_has_the_places_that_a_variant_changes() {
        let template = include_str!("../../../../envoy-config/envoy.yaml");
        let variant =
            edited(template, "          - name: front\n", "\"trust_pins\": true").unwrap();
        assert!(variant.contains("- name: front\n          - name: warmpath\n"));
        assert!(variant.contains("\"mode\": \"endpoint\", \"trust_pins\": true, \"feed"));
        assert!(!variant.contains("remove: x-dynamo-worker-instance-id"));
    }
}
