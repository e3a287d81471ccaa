//! Cluster: Kubernetes objects to Dynamo's records.
//!
//! Pure. A custom resource counts while its own pod is ready: the pod of its
//! name, and of the uid that the resource's owner has, so that what a pod's
//! predecessor left behind says nothing.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::DynamicObject;

use super::listing::{Author, Listing, Parsed};
use super::record::{Bucket, Key, parse_value};
use crate::config::discovery::{KubernetesConfig, ReadyBy};
use crate::limits::RECORDS_MAX;

/// What is kept of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// Its uid.
    pub uid: String,
    /// Its address.
    pub ip: Option<IpAddr>,
    /// The port that it names `http`.
    pub http_port: Option<u16>,
    /// Whether it is ready, and is not being deleted.
    pub ready: bool,
    /// Which of its containers are ready.
    pub ready_containers: Vec<String>,
    /// How often its containers have been restarted, together.
    pub restarts: u64,
    /// What its label says that it does.
    pub role: Option<String>,
}

/// Label by which llm-d tells prefill and decode pods apart.
const ROLE_LABEL: &str = "llm-d.ai/role";

impl PodFacts {
    /// What is kept of a pod.
    #[must_use]
    pub fn of(pod: Pod) -> Self {
        let (meta, status) = (pod.metadata, pod.status.unwrap_or_default());
        let mut conditions = status.conditions.into_iter().flatten();
        let ready = conditions.any(|it| it.type_ == "Ready" && it.status == "True");
        let statuses = status.container_statuses.unwrap_or_default();
        let containers = pod.spec.map(|spec| spec.containers).unwrap_or_default();
        let mut ports = containers.into_iter().filter_map(|it| it.ports).flatten();
        let http = ports.find(|port| port.name.as_deref() == Some("http"));
        Self {
            uid: meta.uid.unwrap_or_default(),
            ip: status.pod_ip.and_then(|ip| ip.parse().ok()),
            http_port: http.and_then(|port| u16::try_from(port.container_port).ok()),
            ready: ready && meta.deletion_timestamp.is_none(),
            restarts: statuses.iter().filter_map(|it| u64::try_from(it.restart_count).ok()).sum(),
            ready_containers: statuses
                .into_iter()
                .filter(|it| it.ready)
                .map(|it| it.name)
                .collect(),
            role: meta.labels.and_then(|mut labels| labels.remove(ROLE_LABEL)),
        }
    }
}

/// One ready endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadyPod {
    /// Name of its pod.
    pub name: String,
    /// Uid of its pod.
    pub uid: String,
    /// Its address.
    pub ip: Option<IpAddr>,
}

/// The ready endpoints of a slice that are pods. An endpoint that does not say
/// counts as ready, as Kubernetes has it.
#[must_use]
pub fn ready_pods(slice: EndpointSlice) -> Vec<ReadyPod> {
    let ready = |it: &k8s_openapi::api::discovery::v1::Endpoint| {
        it.conditions.as_ref().and_then(|it| it.ready).unwrap_or(true)
    };
    slice
        .endpoints
        .into_iter()
        .filter(ready)
        .filter_map(|endpoint| {
            let target = endpoint.target_ref.filter(|it| it.kind.as_deref() == Some("Pod"))?;
            let ip = endpoint.addresses.first().and_then(|ip| ip.parse().ok());
            Some(ReadyPod { name: target.name?, uid: target.uid?, ip })
        })
        .collect()
}

/// What is kept of a custom resource.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResourceFacts {
    /// Name and uid of the pod that owns it.
    pub owner: Option<(String, String)>,
    /// Its records.
    pub records: Vec<(Key, Parsed)>,
}

impl ResourceFacts {
    /// What is kept of a custom resource.
    #[must_use]
    pub fn of(resource: DynamicObject) -> Self {
        let owners = resource.metadata.owner_references.unwrap_or_default();
        let owner = owners.into_iter().find(|owner| owner.kind == "Pod");
        let data = resource.data.pointer("/spec/data");
        let records = Bucket::ALL
            .into_iter()
            .filter_map(|bucket| Some((bucket, data?.get(bucket.section())?.as_object()?)))
            .flat_map(|(bucket, section)| section.iter().map(move |it| (bucket, it)))
            .take(RECORDS_MAX)
            .map(|(bucket, (name, value))| {
                let key = Key::of_resource(bucket, name);
                let parsed = parse_value(&key, value).map(Arc::new);
                (key, parsed)
            })
            .collect();
        Self { owner: owner.map(|owner| (owner.name, owner.uid)), records }
    }
}

/// What is known of a cluster.
#[derive(Clone, Copy, Debug)]
pub struct Cluster<'a> {
    /// Custom resources, by name.
    pub resources: &'a BTreeMap<String, ResourceFacts>,
    /// Ready endpoints, by the name of their slice.
    pub slices: &'a BTreeMap<String, Vec<ReadyPod>>,
    /// Pods, by name.
    pub pods: &'a BTreeMap<String, PodFacts>,
}

impl Cluster<'_> {
    /// The records of ready workers.
    #[must_use]
    pub fn listing(&self, config: &KubernetesConfig) -> Listing {
        let mut listing = Listing::default();
        let ready = self.ready_by_name();
        for (name, resource) in self.resources {
            let Some((pod, uid)) = &resource.owner else {
                listing.problems.add(name, "no_owner");
                continue;
            };
            let found = match config.ready_by {
                ReadyBy::Pod => by_slices(name, uid, &ready),
                ReadyBy::Container => self.by_container(name, pod, uid),
            };
            let ip = match found {
                Ok(Some(ip)) => ip,
                Ok(None) => continue,
                Err(reason) => {
                    listing.problems.add(name, reason);
                    continue;
                }
            };
            let about = self.pods.get(pod).filter(|about| about.uid == *uid);
            let author = Arc::new(Author {
                instance: Some(config.id_bits.id_of(name).0),
                vouched: true,
                pod: Some(pod.clone()),
                uid: Some(uid.clone()),
                ip: about.and_then(|about| about.ip).or(ip.0),
                http_port: about.and_then(|about| about.http_port),
            });
            for (key, parsed) in &resource.records {
                listing.add(key, parsed, &author);
            }
        }
        listing
    }

    fn ready_by_name(&self) -> BTreeMap<&str, Vec<&ReadyPod>> {
        let mut ready: BTreeMap<&str, Vec<&ReadyPod>> = BTreeMap::new();
        for pod in self.slices.values().flatten() {
            ready.entry(&pod.name).or_default().push(pod);
        }
        ready
    }

    fn by_container(&self, name: &str, pod: &str, uid: &str) -> Found {
        let container = match name.strip_prefix(pod) {
            Some("") => "main",
            Some(rest) => rest.strip_prefix('-').ok_or("foreign_record")?,
            None => return Err("foreign_record"),
        };
        let ready = self.pods.get(pod).filter(|about| {
            about.uid == uid && about.ready_containers.iter().any(|it| it == container)
        });
        Ok(ready.map(|about| Address(about.ip)))
    }
}

/// Where a ready worker is, if that is known.
#[derive(Clone, Copy, Debug)]
struct Address(Option<IpAddr>);

/// A ready worker; `None` if it is not ready; or why it cannot be told.
type Found = Result<Option<Address>, &'static str>;

fn by_slices(name: &str, uid: &str, ready: &BTreeMap<&str, Vec<&ReadyPod>>) -> Found {
    let pods = ready.get(name).map(Vec::as_slice).unwrap_or_default();
    // Two pods of one name: which of them is meant cannot be told.
    if pods.first().is_some_and(|first| pods.iter().any(|pod| pod.uid != first.uid)) {
        return Err("conflicting_pods");
    }
    Ok(pods.iter().find(|pod| pod.uid == uid).map(|pod| Address(pod.ip)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config::discovery::IdBits;
    use crate::discovery::captures;

    fn config(ready_by: ReadyBy) -> KubernetesConfig {
        KubernetesConfig {
            namespace: None,
            selector: String::new(),
            ready_by,
            id_bits: IdBits::Masked,
        }
    }

    fn resource(change: impl Fn(&mut Value)) -> ResourceFacts {
        let mut body = captures::resource_body();
        change(&mut body);
        ResourceFacts::of(serde_json::from_value(body).unwrap())
    }

    const NAME: &str = "tiny-prefill-0";
    const UID: &str = "11111111-2222-3333-4444-555555555555";

    fn ready(name: &str, uid: &str) -> ReadyPod {
        ReadyPod { name: name.to_owned(), uid: uid.to_owned(), ip: None }
    }

    /// Records and problems of the capture's resource beside ready endpoints.
    fn listed(resource: ResourceFacts, slices: &[&[ReadyPod]]) -> (usize, Vec<&'static str>) {
        let resources = BTreeMap::from([(NAME.to_owned(), resource)]);
        let slices = slices.iter().enumerate();
        let slices = slices.map(|(at, pods)| (at.to_string(), pods.to_vec())).collect();
        let pods = BTreeMap::new();
        let cluster = Cluster { resources: &resources, slices: &slices, pods: &pods };
        let listing = cluster.listing(&config(ReadyBy::Pod));
        let problems = listing.problems.into_vec();
        (listing.entries.len(), problems.iter().map(|it| it.reason).collect())
    }

    #[test]
    fn a_resource_counts_while_its_own_pod_is_ready() {
        let own = || resource(|_| {});
        assert_eq!(listed(own(), &[&[ready(NAME, UID)]]), (7, vec![]));
        assert_eq!(listed(own(), &[&[], &[ready(NAME, UID)]]), (7, vec![]));
        // One pod behind two services.
        let both: &[&[_]] = &[&[ready(NAME, UID)], &[ready(NAME, UID)]];
        assert_eq!(listed(own(), both), (7, vec![]));
        assert_eq!(listed(own(), &[]), (0, vec![]));
        assert_eq!(listed(own(), &[&[ready("other", UID)]]), (0, vec![]));
        assert_eq!(listed(own(), &[&[ready(NAME, "another pod's")]]), (0, vec![]));
        let two: &[&[_]] = &[&[ready(NAME, UID)], &[ready(NAME, "another pod's")]];
        assert_eq!(listed(own(), two), (0, vec!["conflicting_pods"]));
        let orphan = resource(|body| body["metadata"]["ownerReferences"] = json!([]));
        assert_eq!(listed(orphan, &[&[ready(NAME, UID)]]), (0, vec!["no_owner"]));
    }

    #[test]
    fn maps_may_be_missing_or_nothing() {
        for (section, left) in [("event_sources", 6), ("event_channels", 4)] {
            let without = resource(|body| body["spec"]["data"][section] = Value::Null);
            assert_eq!(listed(without, &[&[ready(NAME, UID)]]), (left, vec![]));
        }
        let none = resource(|body| body["spec"] = json!({}));
        assert_eq!(listed(none, &[&[ready(NAME, UID)]]), (0, vec![]));
    }

    #[test]
    fn endpoints_that_do_not_say_are_ready_and_only_pods_count() {
        let target = json!({"kind": "Pod", "name": "p", "uid": "u"});
        let slice = json!({
            "metadata": {"name": "s"}, "addressType": "IPv4",
            "endpoints": [
                {"addresses": ["10.0.0.1"], "targetRef": target},
                {"addresses": ["10.0.0.2"], "conditions": {"ready": false}, "targetRef": target},
                {"addresses": ["10.0.0.3"], "targetRef": {"kind": "Node", "name": "n", "uid": "u"}},
                {"addresses": ["10.0.0.4"]},
            ]
        });
        let ready = ready_pods(serde_json::from_value(slice).unwrap());
        let ip = Some([10, 0, 0, 1].into());
        assert_eq!(ready, [ReadyPod { name: "p".into(), uid: "u".into(), ip }]);
    }

    #[test]
    fn a_pod_that_is_being_deleted_is_not_ready() {
        let pod = |deleted: Value| {
            let pod = json!({
                "metadata": {"name": "p", "uid": "u", "deletionTimestamp": deleted},
                "status": {"conditions": [{"type": "Ready", "status": "True"}]}
            });
            PodFacts::of(serde_json::from_value(pod).unwrap()).ready
        };
        assert!(pod(Value::Null));
        assert!(!pod(json!("2026-11-23T00:00:00Z")));
    }
}
