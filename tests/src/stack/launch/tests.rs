//! Tests of the bootstraps and of how they are filled.

use std::process::Command;

use warmpath_core::headers::STRIPPED;

use super::*;
use crate::stack::smoke::ROUTING_HEADERS;

const FILES: [&str; 5] = [
    "envoy.yaml",
    "envoy-body.yaml",
    "envoy-buffer.yaml",
    "envoy-ext-proc.yaml",
    "envoy-round-robin.yaml",
];

const NAMES: [&str; 10] = [
    "GATEWAY_ADDRESS",
    "GATEWAY_PORT",
    "ADMIN_PORT",
    "FEED_PORT",
    "PICKER_PORT",
    "WORKER_1_PORT",
    "WORKER_2_PORT",
    "WORKER_3_PORT",
    "WASM_FILE",
    "DEBUG_HEADERS",
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../envoy-config")
}

fn values() -> Vec<(&'static str, String)> {
    NAMES.iter().map(|name| (*name, format!("/{name}/"))).collect()
}

fn template(name: &str) -> String {
    std::fs::read_to_string(folder().join(name)).unwrap()
}

/// Goal: a local run and a container get the same bootstrap.
#[test]
fn the_script_fills_as_the_run_does() {
    for file in FILES {
        let output = Command::new("sh")
            .arg("fill.sh")
            .arg(file)
            .current_dir(folder())
            .envs(values())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let script = String::from_utf8(output.stdout).unwrap();
        assert_eq!(script, fill(&template(file), &values()).unwrap(), "{file}");
    }
}

#[test]
fn a_missing_value_is_named() {
    let values: Vec<_> = values().into_iter().filter(|(name, _)| *name != "FEED_PORT").collect();
    let error = fill(&template("envoy.yaml"), &values);
    assert!(matches!(error, Err(StackError::Unfilled(name)) if name == "FEED_PORT"));
}

/// The names that a file removes from requests; a prefix ends in `*`.
fn removed(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.trim().strip_prefix("- remove: ") {
            names.push(name.to_owned());
        } else if let Some((_, rest)) = line.split_once("key_matcher: {prefix: ") {
            names.push(format!("{}*", rest.split(',').next().unwrap()));
        }
    }
    names
}

/// Goal: every bootstrap and the manifests remove what the module itself removes
/// and what the smoke run tries, so that a client gains nothing while the module is
/// down.
#[test]
fn every_bootstrap_removes_routing_headers() {
    for file in [
        "envoy.yaml",
        "envoy-body.yaml",
        "envoy-buffer.yaml",
        "envoy-ext-proc.yaml",
        "kubernetes/istio-endpoint.yaml",
        "kubernetes/istio-body.yaml",
        "kubernetes/istio-buffer.yaml",
        "kubernetes/envoy-gateway-endpoint.yaml",
    ] {
        let names = removed(&template(file));
        let covers = |wanted: &str| {
            names.iter().any(|name| match name.strip_suffix('*') {
                Some(prefix) => wanted.starts_with(prefix),
                None => wanted == name,
            })
        };
        let own = STRIPPED.iter().chain(&ROUTING_HEADERS);
        for name in own.map(|name| name.to_lowercase()) {
            // Our own answer's names steer nothing upstream; without prefixes
            // they are left to the module.
            let ours = name.starts_with("x-warmpath-") || name.starts_with("x-llm-d-");
            if !(ours && file.starts_with("kubernetes/")) {
                assert!(covers(&name), "{file} lets {name} pass");
            }
        }
    }
}

/// No connection of anybody's can take one before, or between, two servers.
#[test]
fn ports_are_not_of_those_that_the_system_hands_out() {
    let handed_out = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let handed_out = handed_out.local_addr().unwrap().port();
    let ports: std::collections::BTreeSet<u16> = (0..100).map(|_| free_port().unwrap()).collect();
    assert_eq!(ports.len(), 100);
    // Where the system hands out nearly all, nobody can do better.
    if handed_out < 32_768 {
        return;
    }
    assert!(ports.iter().all(|&port| port < 32_768.min(handed_out)));
}
