//! Sections with and without mistakes, and what the environment says.

use proptest::prelude::*;

use super::*;
use crate::config::{Config, Overrides, WorkerSource};

fn parse(text: &str, env: &[(&str, &str)]) -> Result<Config, String> {
    let variable = |name: &str| {
        env.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
    };
    let overrides =
        Overrides { discovery: DiscoveryEnv::from_env(variable), ..Overrides::default() };
    Config::parse(text, Path::new("/etc/w"), &overrides).map_err(|mistakes| mistakes.to_string())
}

fn discovery(text: &str, env: &[(&str, &str)]) -> DiscoveryConfig {
    let WorkerSource::Discovery(config) = parse(text, env).unwrap().workers else { panic!() };
    config
}

#[test]
fn each_backend_is_read_with_its_defaults() {
    let file = discovery("discovery: {backend: file, directory: store}", &[]);
    assert_eq!(file.backend, Backend::File("/etc/w/store".into()));
    assert_eq!(file.namespaces, NamespaceRule::Exact("vllm-agg".into()));
    assert_eq!(file.frontend, FrontendRule::PodPort(8000));
    let etcd = discovery(
        "discovery: {backend: etcd, endpoints: ['http://a:1'], user: u, password: p, namespace: team, frontend: {address: '10.0.0.1:80'}}",
        &[],
    );
    let user = Some(("u".to_owned(), Secret("p".to_owned())));
    assert_eq!(etcd.backend, Backend::Etcd { endpoints: vec!["http://a:1".into()], user });
    assert_eq!(etcd.namespaces, NamespaceRule::Exact("team".into()));
    assert_eq!(etcd.frontend, FrontendRule::Fixed("10.0.0.1:80".parse().unwrap()));
    assert!(!format!("{etcd:?}").contains("\"p\""), "a password is never shown");
    let kubernetes = discovery(
        "discovery: {backend: kubernetes, namespace_prefix: team, mode: container, id_bits: 64, frontend: {none: true}}",
        &[("POD_NAMESPACE", "prod")],
    );
    let expected = KubernetesConfig {
        namespace: Some("prod".into()),
        selector: SELECTOR_DEFAULT.into(),
        ready_by: ReadyBy::Container,
        id_bits: IdBits::Whole,
    };
    assert_eq!(kubernetes.backend, Backend::Kubernetes(expected));
    assert_eq!(kubernetes.frontend, FrontendRule::None);
    let pods = discovery(
        "discovery: {backend: pods, selector: 'app=vllm', engine: sglang, kv_events_port: 5557, frontend: {port: 30000}}",
        &[],
    );
    let expected = PodsConfig {
        namespace: None,
        selector: "app=vllm".into(),
        engine: Engine::Sglang,
        port: 30_000,
        kv_events_port: Some(5557),
        replay_port: None,
    };
    assert_eq!(pods.backend, Backend::Pods(expected));
}

#[test]
fn the_environment_fills_in_and_the_file_wins() {
    let env = [
        ("DYN_DISCOVERY_BACKEND", "etcd"),
        ("ETCD_ENDPOINTS", "http://a:1, http://b:2"),
        ("DYN_NAMESPACE", "n"),
        ("DYN_NAMESPACE_PREFIX", "p"),
        ("DYN_FILE_KV", "/kv"),
        ("DYN_KUBE_DISCOVERY_MODE", "container"),
    ];
    let config = discovery("", &env);
    assert_eq!(config.namespaces, NamespaceRule::Prefix("p".into()), "the prefix wins");
    let endpoints = vec!["http://a:1".to_owned(), "http://b:2".to_owned()];
    assert_eq!(config.backend, Backend::Etcd { endpoints, user: None });
    let config = discovery("discovery: {backend: file, namespace: own}", &env);
    assert_eq!(config.backend, Backend::File("/kv".into()));
    assert_eq!(config.namespaces, NamespaceRule::Exact("own".into()));
    let config = discovery("discovery: {backend: kubernetes}", &env);
    let Backend::Kubernetes(kubernetes) = config.backend else { panic!() };
    assert_eq!(kubernetes.ready_by, ReadyBy::Container);
    // An empty variable is none, and a list of workers wins over a variable.
    assert!(parse("", &[("DYN_DISCOVERY_BACKEND", "")]).is_err());
    let listed = "{models: [{name: m, directory: d, block_size: 16}], workers: []}";
    assert!(matches!(parse(listed, &env).unwrap().workers, WorkerSource::Inline(_)));
}

#[test]
fn the_event_plane_is_one_of_three() {
    let plane = |text: &str, env: &[(&str, &str)]| {
        let text = format!("discovery: {{backend: file, directory: d}}\n{text}");
        parse(&text, env).map(|config| config.event_plane)
    };
    assert_eq!(plane("", &[]), Ok(EventPlane::Zmq));
    assert_eq!(plane("", &[("DYN_EVENT_PLANE", "zmq")]), Ok(EventPlane::Zmq));
    assert_eq!(
        plane("", &[("DYN_EVENT_PLANE", "nats"), ("NATS_SERVER", "nats://n:1")]),
        Ok(EventPlane::Nats(vec!["nats://n:1".into()]))
    );
    let brokers = "xsub=tcp://a:5555;tcp://b:5555 , xpub=tcp://a:5556;tcp://b:5556";
    assert_eq!(
        plane("", &[("DYN_ZMQ_BROKER_URL", brokers)]),
        Ok(EventPlane::Broker(vec!["a:5556".into(), "b:5556".into()]))
    );
    assert_eq!(
        plane("event_plane: {kind: broker, url: 'tcp://c:1'}", &[("DYN_EVENT_PLANE", "nats")]),
        Ok(EventPlane::Broker(vec!["c:1".into()]))
    );
    for (text, env, expected) in [
        ("event_plane: {kind: broker}", "", "event_plane.urls: is missing"),
        ("event_plane: {kind: broker, url: x}", "", "event_plane.urls: must be tcp://host:port"),
        ("event_plane: {url: 'tcp://c:1'}", "", "found by discovery"),
        ("event_plane: {kind: kafka}", "", "event_plane.kind: must be one of"),
        ("", "kafka", "DYN_EVENT_PLANE: must be zmq or nats"),
    ] {
        let mistakes = plane(text, &[("DYN_EVENT_PLANE", env)]).unwrap_err();
        assert!(mistakes.contains(expected), "{text}: {mistakes}");
    }
}

#[test]
fn mistakes_are_named() {
    for (text, expected) in [
        ("discovery: {}", "discovery.backend: is missing"),
        ("discovery: {backend: mem}", "discovery.backend: must be one of file, etcd"),
        ("discovery: {backend: file}", "discovery.directory: is missing"),
        ("discovery: {backend: file, directory: d, endpoints: [a]}", "discovery.endpoints: is not"),
        ("discovery: {backend: etcd, user: u}", "discovery.user: user and password"),
        ("discovery: {backend: kubernetes, id_bits: 60}", "discovery.id_bits: must be 53 or 64"),
        ("discovery: {backend: kubernetes, mode: node}", "discovery.mode: must be one of"),
        ("discovery: {backend: pods}", "discovery.selector: is missing"),
        ("discovery: {backend: pods, selector: a, frontend: {none: true}}", "own ports only"),
        ("discovery: {backend: etcd, frontend: {port: 1, none: true}}", "one of port, address"),
        ("discovery: {backend: etcd, frontend: {address: here}}", "discovery.frontend.address"),
        ("discovery: {backend: etcd, namespace: a, namespace_prefix: b}", "either namespace"),
        ("{discovery: {backend: etcd}, workers_file: w}", "give one of them: workers_file, disc"),
    ] {
        let mistakes = parse(text, &[]).unwrap_err();
        assert!(mistakes.contains(expected), "{text}: {mistakes}");
    }
    let mistakes = parse("", &[("DYN_DISCOVERY_BACKEND", "mem")]).unwrap_err();
    assert!(mistakes.contains("DYN_DISCOVERY_BACKEND is \"mem\""), "{mistakes}");
}

proptest! {
    #[test]
    fn generations_belong_to_their_namespace_alone(
        name in "[a-z0-9-]{1,20}", generation in "[0-9a-f]{8}", other in "[a-z0-9-]{0,20}",
    ) {
        let exact = NamespaceRule::Exact(name.clone());
        let next = format!("{name}-{generation}");
        prop_assert!(exact.admits(&name) && exact.admits(&next));
        let longer = format!("{next}0");
        prop_assert!(!exact.admits(&longer));
        let is_generation = other.strip_prefix(&format!("{name}-")).is_some_and(is_generation);
        prop_assert_eq!(exact.admits(&other), other == name || is_generation);
        let prefix = NamespaceRule::Prefix(name.clone());
        prop_assert!(prefix.admits(&next));
        prop_assert_eq!(prefix.admits(&other), other.starts_with(&name));
    }
}
