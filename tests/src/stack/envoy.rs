//! Envoy: a bootstrap of `envoy-config/`, filled in, and the process.

use std::path::Path;

use super::child::Child;
use super::launch::{StackError, fill, wait_until_ok};
use super::options::Options;

/// Places for workers in the templates.
const PLACES: usize = 3;

/// One Envoy to be started.
#[derive(Clone, Copy, Debug)]
pub struct Bootstrap<'a> {
    /// Name of the process, its log and its filled bootstrap.
    pub name: &'a str,
    /// File of `envoy-config/`.
    pub template: &'a str,
    /// Port for clients.
    pub port: u16,
    /// Admin port.
    pub admin: u16,
    /// Port of the sidecar's feed.
    pub feed: u16,
    /// Ports of the workers; used in turn for the places that the template has,
    /// which gets a place for each if they are more.
    pub workers: &'a [u16],
    /// The plugin's `router` setting, as JSON; nothing if empty.
    pub router: &'a str,
}

/// Starts an Envoy and waits until it is ready.
///
/// # Errors
///
/// [`StackError`].
pub async fn start(
    options: &Options,
    bootstrap: &Bootstrap<'_>,
    folder: &Path,
) -> Result<Child, StackError> {
    let Bootstrap { name, template, port, admin, feed, workers, router } = *bootstrap;
    let template = std::fs::read_to_string(options.envoy_config(template))?;
    let template = with_places(&template, workers.len());
    // It ends the plugin's configuration, so another member fits behind it.
    let debug_headers =
        if router.is_empty() { "true".into() } else { format!("true, \"router\": {router}") };
    let mut values = vec![
        ("GATEWAY_ADDRESS", "127.0.0.1".to_owned()),
        ("GATEWAY_PORT", port.to_string()),
        ("ADMIN_PORT", admin.to_string()),
        ("FEED_PORT", feed.to_string()),
        ("WASM_FILE", options.wasm.display().to_string()),
        ("DEBUG_HEADERS", debug_headers),
    ];
    let places: Vec<String> = (1..=workers.len().max(PLACES)).map(place).collect();
    for (place, worker) in places.iter().zip(workers.iter().cycle()) {
        values.push((place, worker.to_string()));
    }
    start_filled(options, name, &fill(&template, &values)?, 2, admin, folder).await
}

/// Starts an Envoy with a bootstrap that is filled in, and waits until it is
/// ready.
///
/// - `concurrency`: its worker threads.
///
/// # Errors
///
/// [`StackError`].
pub async fn start_filled(
    options: &Options,
    name: &str,
    bootstrap: &str,
    concurrency: u32,
    admin: u16,
    folder: &Path,
) -> Result<Child, StackError> {
    std::fs::write(folder.join(format!("{name}.yaml")), bootstrap)?;
    let arguments = [
        "-c",
        &format!("{name}.yaml"),
        "--concurrency",
        &concurrency.to_string(),
        // Several run on one machine; none inherits another's sockets.
        "--disable-hot-restart",
        "--log-level",
        "warning",
        "--component-log-level",
        "wasm:info",
    ];
    let mut envoy = Child::start(name, &options.envoy, &arguments.map(str::to_owned), folder)?;
    wait_until_ok("Envoy's /ready", &mut envoy, admin, "/ready").await?;
    Ok(envoy)
}

fn place(number: usize) -> String {
    format!("WORKER_{number}_PORT")
}

/// Repeats the last worker's line for those that the template has no place for.
pub(crate) fn with_places(template: &str, workers: usize) -> String {
    let last = place(PLACES);
    let mut text = String::new();
    for line in template.lines() {
        text.extend([line, "\n"]);
        if line.contains(&last) && !line.starts_with('#') {
            for number in PLACES + 1..=workers {
                text.extend([line.replace(&last, &place(number)).as_str(), "\n"]);
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_workers_get_more_places() {
        let template = "# WORKER_3_PORT\na: ${WORKER_2_PORT}\nb: ${WORKER_3_PORT}\n";
        assert_eq!(with_places(template, 2), template);
        assert_eq!(
            with_places(template, 5),
            format!("{template}b: ${{WORKER_4_PORT}}\nb: ${{WORKER_5_PORT}}\n")
        );
    }
}
