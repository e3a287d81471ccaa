//! Against a stand-in for the API server.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use super::*;
use crate::config::discovery::{FrontendRule, IdBits, NamespaceRule, ReadyBy};
use crate::discovery::join::Rules;
use crate::discovery::stand_in::{Right, StandIn};
use crate::discovery::{ListEvent, captures, drive};
use crate::fleet::Fleet;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(20);

const RESOURCES: &str = "dynamoworkermetadatas";
const SLICES: &str = "endpointslices";
const PODS: &str = "pods";

fn config(ready_by: ReadyBy) -> KubernetesConfig {
    KubernetesConfig {
        namespace: Some("prod".into()),
        selector: "nvidia.com/dynamo-discovery-enabled=true".into(),
        ready_by,
        id_bits: IdBits::Masked,
    }
}

/// An aggregated worker's resource: the capture's, which is a prefill worker's,
/// under another name and with another card.
fn resource(name: &str, pod: &str, uid: &str) -> Value {
    let id = IdBits::Masked.id_of(name).0;
    let mut body = captures::resource_body();
    body["metadata"]["name"] = json!(name);
    body["metadata"]["ownerReferences"][0]["name"] = json!(pod);
    body["metadata"]["ownerReferences"][0]["uid"] = json!(uid);
    let text = body.to_string();
    let text = text.replace("6917097255046897", &id.to_string());
    let text = text.replace("18931034c38ef1", &format!("{id:x}"));
    let text = text.replace(r#""worker_type":"prefill""#, r#""worker_type":"aggregated""#);
    let text = text.replace(r#""needs":[["decode"]]"#, r#""needs":[]"#);
    serde_json::from_str(&text).unwrap()
}

fn slice(name: &str, pods: &[(&str, &str, bool)]) -> Value {
    let endpoint = |(pod, uid, ready): &(&str, &str, bool)| {
        json!({"addresses": ["10.0.0.7"], "conditions": {"ready": ready},
            "targetRef": {"kind": "Pod", "name": pod, "uid": uid}})
    };
    let endpoints: Vec<Value> = pods.iter().map(endpoint).collect();
    json!({"metadata": {"name": name}, "addressType": "IPv4", "endpoints": endpoints})
}

fn pod(name: &str, uid: &str, container: &str, ready: bool) -> Value {
    json!({
        "metadata": {"name": name, "uid": uid},
        "spec": {"containers": [{"name": container, "ports": [
            {"name": "system", "containerPort": 9090}, {"name": "http", "containerPort": 8123}]}]},
        "status": {
            "podIP": "10.0.0.8",
            "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
            "containerStatuses": [{"name": container, "ready": ready, "restartCount": 0,
                "image": "i", "imageID": "i"}]
        }
    })
}

/// A running backend and what it tells.
struct Run {
    server: StandIn,
    lists: mpsc::Receiver<ListEvent>,
    task: tokio::task::JoinHandle<()>,
}

impl Run {
    async fn start(server: StandIn, config: KubernetesConfig) -> Self {
        let (sights, queue) = mpsc::channel(4);
        let (events, lists) = mpsc::channel(1);
        let client = server.client();
        let rules = Rules {
            namespaces: NamespaceRule::Exact("dynamo".into()),
            frontend: FrontendRule::PodPort(8000),
            models: Vec::new(),
            brokers: false,
        };
        let task = tokio::spawn(async move {
            tokio::select! {
                () = watch_with(client, config, sights) => {}
                () = drive::settle(queue, &rules, &events) => {}
            }
        });
        Self { server, lists, task }
    }

    async fn next(&mut self) -> ListEvent {
        timeout(PATIENCE, self.lists.recv()).await.expect("in time").expect("it goes on")
    }

    /// The next fleet; a failure is none.
    async fn fleet(&mut self) -> Fleet {
        match self.next().await {
            ListEvent::Taken(fleet) => fleet,
            ListEvent::Refused(message) => panic!("{message}"),
        }
    }

    async fn watches(&self, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.server.watches() != count {
            assert!(Instant::now() < deadline, "never {count} watches");
            sleep(Duration::from_millis(5)).await;
        }
    }
}

fn names(fleet: &Fleet) -> Vec<&str> {
    fleet.ranks.iter().map(|rank| rank.name.as_deref().unwrap()).collect()
}

/// Two workers, ready.
async fn two_workers() -> StandIn {
    let server = StandIn::start().await;
    for (name, uid) in [("w-0", "u0"), ("w-1", "u1")] {
        server.put(RESOURCES, resource(name, name, uid));
        server.put(PODS, pod(name, uid, "main", true));
    }
    server.put(SLICES, slice("s", &[("w-0", "u0", true), ("w-1", "u1", true)]));
    server
}

#[tokio::test]
async fn workers_come_and_go_with_readiness_and_identity() {
    let mut run = Run::start(two_workers().await, config(ReadyBy::Pod)).await;
    let fleet = run.fleet().await;
    assert_eq!(fleet.problems, []);
    let mut expected = ["w-0", "w-1"].map(|name| IdBits::Masked.id_of(name));
    expected.sort();
    let ids: Vec<_> = fleet.ranks.iter().map(|rank| rank.spec.worker.id).collect();
    assert_eq!(ids, expected);
    assert!(fleet.ranks.iter().all(|rank| rank.spec.endpoint == "10.0.0.8:8123"));
    assert!(fleet.ranks.iter().all(|rank| rank.spec.has_events));

    run.server.put(SLICES, slice("s", &[("w-0", "u0", false), ("w-1", "u1", true)]));
    assert_eq!(names(&run.fleet().await), ["w-1"]);
    run.server.put(SLICES, slice("s", &[("w-0", "u9", true), ("w-1", "u1", true)]));
    // Another pod of that name is ready, and not the resource's: no change, so
    // the next fleet is that of the resource's new owner.
    run.server.put(RESOURCES, resource("w-0", "w-0", "u9"));
    let back = run.fleet().await;
    assert_eq!(back.ranks.len(), 2);
    let life = |fleet: &Fleet| {
        fleet.ranks.iter().find(|it| it.name.as_deref() == Some("w-0")).unwrap().spec.incarnation
    };
    assert_ne!(life(&fleet), life(&back), "another pod, another life");
    // Its pod's own record is not there: the slice has an address too.
    let moved = back.ranks.iter().find(|it| it.name.as_deref() == Some("w-0")).unwrap();
    assert_eq!(moved.spec.endpoint, "10.0.0.7:8000");

    run.server.put(SLICES, slice("t", &[("w-0", "u0", true)]));
    let fleet = run.fleet().await;
    assert_eq!(names(&fleet), ["w-1"]);
    assert_eq!(fleet.problems[0].reason, "conflicting_pods");
    run.server.delete(SLICES, "t");
    assert_eq!(run.fleet().await.ranks.len(), 2);
    run.server.delete(RESOURCES, "w-1");
    assert_eq!(names(&run.fleet().await), ["w-0"]);
    drop(run.lists);
    run.server.delete(RESOURCES, "w-0");
    timeout(PATIENCE, run.task).await.expect("it ends when nobody listens").unwrap();
}

#[tokio::test]
async fn a_resource_cannot_speak_for_another_worker() {
    let server = two_workers().await;
    // What w-0 says, in the resource of w-1.
    let mut foreign = resource("w-0", "w-1", "u1");
    foreign["metadata"]["name"] = json!("w-1");
    server.put(RESOURCES, foreign);
    let mut run = Run::start(server, config(ReadyBy::Pod)).await;
    let fleet = run.fleet().await;
    assert_eq!(names(&fleet), ["w-0"]);
    assert!(fleet.problems.iter().all(|problem| problem.reason == "foreign_record"));
    assert_eq!(fleet.problems.len(), 4);
}

#[tokio::test]
async fn containers_are_workers_of_their_own_where_told() {
    let server = StandIn::start().await;
    for name in ["p", "p-engine"] {
        server.put(RESOURCES, resource(name, "p", "u"));
    }
    server.put(PODS, pod("p", "u", "engine", true));
    let mut run = Run::start(server, config(ReadyBy::Container)).await;
    let fleet = run.fleet().await;
    let [rank] = fleet.ranks.as_slice() else { panic!("{fleet:?}") };
    assert_eq!(rank.spec.worker.id, IdBits::Masked.id_of("p-engine"));
    run.server.put(PODS, pod("p", "u", "main", true));
    let fleet = run.fleet().await;
    assert_eq!(fleet.ranks[0].spec.worker.id, IdBits::Masked.id_of("p"));
    assert_eq!(fleet.ranks.len(), 1);
}

#[tokio::test]
async fn a_watch_that_ends_is_taken_up_without_another_list() {
    let server = two_workers().await;
    server.set_page(1);
    let mut run = Run::start(server, config(ReadyBy::Pod)).await;
    assert_eq!(run.fleet().await.ranks.len(), 2, "pages make one list");
    run.watches(3).await;
    let lists = run.server.lists();
    run.server.bookmark();
    run.server.disconnect();
    run.server.delete(RESOURCES, "w-0");
    assert_eq!(names(&run.fleet().await), ["w-1"]);
    run.watches(3).await;
    assert_eq!(run.server.lists(), lists);
}

#[tokio::test]
async fn a_place_that_is_gone_is_listed_anew_and_replaces_everything() {
    for silently in [false, true] {
        let mut run = Run::start(two_workers().await, config(ReadyBy::Pod)).await;
        assert_eq!(run.fleet().await.ranks.len(), 2);
        run.watches(3).await;
        run.server.delete_silently(RESOURCES, "w-0");
        if silently {
            run.server.compact_silently();
        } else {
            run.server.compact();
        }
        assert_eq!(names(&run.fleet().await), ["w-1"], "what was not told is found");
    }
}

#[tokio::test]
async fn a_list_that_fails_empties_nothing() {
    let mut run = Run::start(two_workers().await, config(ReadyBy::Pod)).await;
    let first = run.fleet().await;
    run.watches(3).await;
    run.server.set_failing(true);
    run.server.compact();
    let ListEvent::Refused(message) = run.next().await else { panic!("emptied") };
    assert!(message.contains("500: etcd is away"), "{message}");
    let lists = run.server.lists();
    while run.server.lists() < lists + 4 {
        sleep(Duration::from_millis(5)).await;
    }
    run.server.set_failing(false);
    loop {
        match run.next().await {
            // One kind after the other fails and recovers.
            ListEvent::Refused(_) => {}
            ListEvent::Taken(fleet) => {
                assert_eq!(fleet, first);
                break;
            }
        }
    }
}

#[test]
fn a_client_can_speak_tls() {
    // It panics when the process has no one provider of cryptography, which
    // depends on what all dependencies together ask for.
    let mut config = kube::Config::new("https://127.0.0.1:1".parse().unwrap());
    config.root_cert = Some(Vec::new());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    assert!(Client::try_from(config).is_ok());
}

/// Group, resource and verb of every rule in a role of the manifests.
fn granted(role: &Value) -> BTreeSet<Right> {
    let words = |rule: &Value, name: &str| -> Vec<String> {
        rule[name].as_array().unwrap().iter().map(|it| it.as_str().unwrap().to_owned()).collect()
    };
    let mut rights = BTreeSet::new();
    for rule in role["rules"].as_array().unwrap() {
        for group in words(rule, "apiGroups") {
            for resource in words(rule, "resources") {
                for verb in words(rule, "verbs") {
                    rights.insert((group.clone(), resource.clone(), verb));
                }
            }
        }
    }
    rights
}

#[tokio::test]
async fn the_manifests_role_is_what_is_used_and_no_more() {
    let mut run = Run::start(two_workers().await, config(ReadyBy::Pod)).await;
    run.fleet().await;
    run.watches(3).await;
    let manifests = include_str!("../../../../envoy-config/kubernetes/rbac.yaml");
    let documents = manifests.split("\n---\n").map(|text| crate::config::yaml(text).unwrap());
    let roles: Vec<Value> = documents.filter(|document| document["kind"] == "Role").collect();
    let [role] = roles.as_slice() else { panic!("one role") };
    assert_eq!(granted(role), run.server.rights());
}
