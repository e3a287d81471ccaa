//! The program itself: flags, exit codes, signals.

use std::process::{Command, Stdio};

use crate::support::*;

const PROGRAM: &str = env!("CARGO_BIN_EXE_warmpath-sidecar");

fn write(directory: &std::path::Path, workers: &str) -> std::path::PathBuf {
    std::fs::write(directory.join("workers.yaml"), workers).unwrap();
    let file = directory.join("sidecar.yaml");
    let text = format!(
        "feed: {{listen: \"127.0.0.1:0\"}}\n\
         status: {{listen: \"127.0.0.1:0\"}}\n\
         models: [{{name: tiny, directory: {MODEL:?}, block_size: {BLOCK}}}]\n\
         workers_file: workers.yaml\n"
    );
    std::fs::write(&file, text).unwrap();
    file
}

fn check(file: &std::path::Path, extra: &[&str]) -> (bool, String) {
    let output = Command::new(PROGRAM)
        .env_remove("WARMPATH_FEED_LISTEN")
        .args(["--check-config", "--config"])
        .arg(file)
        .args(extra)
        .output()
        .unwrap();
    (output.status.success(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_configuration_is_checked_without_starting() {
    let directory = tempfile::tempdir().unwrap();
    let file = write(directory.path(), "workers: []");
    assert_eq!(check(&file, &[]), (true, String::new()));
    let (ok, said) = check(&file, &["--feed-listen", "nowhere"]);
    assert!(!ok && said.contains("feed.listen: must be an address"), "{said}");
    let file = write(directory.path(), "workers: [{id: 1, model: tiny}, {model: huge}]");
    let (ok, said) = check(&file, &[]);
    assert!(!ok);
    for mistake in [
        "workers[0].endpoint: is missing",
        "workers[1].id: is missing",
        "workers[1].model: \"huge\" is not among the models",
    ] {
        assert!(said.contains(mistake), "{said}");
    }
    // A variable that is wrong is a mistake like any other.
    let output = Command::new(PROGRAM)
        .env("DYN_ROUTER_TEMPERATURE", "warm")
        .env("DYN_ROUTER_POLICY_CONFIG", directory.path().join("none.yaml"))
        .args(["--check-config", "--config"])
        .arg(&file)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    for mistake in ["DYN_ROUTER_TEMPERATURE: must be a number", "router_policy_config: "] {
        assert!(said.contains(mistake), "{said}");
    }
    let (ok, said) = check(&directory.path().join("none.yaml"), &[]);
    assert!(!ok && said.contains("none.yaml"), "{said}");
}

/// Goal: the program starts with a log of JSON lines, and a signal stops it
/// cleanly.
#[tokio::test]
async fn a_signal_stops_the_program() {
    use tokio::io::{AsyncBufReadExt, BufReader};
    let directory = tempfile::tempdir().unwrap();
    let file = write(directory.path(), "workers: []");
    let mut child = tokio::process::Command::new(PROGRAM)
        .env("XDG_CACHE_HOME", directory.path())
        .args(["--log-format", "json", "--config"])
        .arg(&file)
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut open = false;
    while let Some(line) = tokio::time::timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap()
    {
        let said: serde_json::Value = serde_json::from_str(&line).unwrap();
        if said["fields"]["message"] == "the index is open to filters" {
            open = true;
            let pid = child.id().unwrap().to_string();
            assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        }
    }
    assert!(open);
    let status = tokio::time::timeout(PATIENCE, child.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
    // The compiled tokenizer was kept.
    assert_eq!(std::fs::read_dir(directory.path().join("warmpath")).unwrap().count(), 1);
}
