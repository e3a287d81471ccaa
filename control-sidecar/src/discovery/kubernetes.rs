//! Kubernetes: Dynamo's records in custom resources.
//!
//! Three kinds of objects are watched: the resources, the endpoint slices that
//! say which pods are ready, and the pods, which have the addresses. Nothing is
//! told before each of them has been listed once.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use kube::api::{Api, DynamicObject};
use kube::core::{ApiResource, GroupVersionKind};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::cluster::{Cluster, PodFacts, ReadyPod, ResourceFacts, ready_pods};
use super::drive::Sight;
use super::watching::{Table, Told, Watching};
use crate::config::discovery::KubernetesConfig;
use crate::limits::{BACKEND_PAUSE, CONNECT_TIMEOUT, KUBERNETES_CHANGES_QUEUED_MAX};

/// Tells of the records and of their changes until nobody listens.
pub async fn watch(config: KubernetesConfig, sights: mpsc::Sender<Sight>) {
    if let Some(client) = connect(&sights).await {
        watch_with(client, config, sights).await;
    }
}

/// A client as the environment has it: of the pod's service account, else of
/// the user's own configuration. Asks until there is one; `None` if nobody
/// listens any more.
pub(super) async fn connect(sights: &mpsc::Sender<Sight>) -> Option<Client> {
    let mut pause = BACKEND_PAUSE.0;
    loop {
        let message = match kube::Config::infer().await {
            Ok(mut config) => {
                config.connect_timeout = Some(CONNECT_TIMEOUT);
                match Client::try_from(config) {
                    Ok(client) => return Some(client),
                    Err(error) => error.to_string(),
                }
            }
            Err(error) => error.to_string(),
        };
        sights.send(Sight::Failed(format!("kubernetes: {message}"))).await.ok()?;
        sleep(pause).await;
        pause = (pause * 2).min(BACKEND_PAUSE.1);
    }
}

/// As [`watch`], with a client.
pub async fn watch_with(client: Client, config: KubernetesConfig, sights: mpsc::Sender<Sight>) {
    let namespace =
        config.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    let kind = GroupVersionKind::gvk("nvidia.com", "v1alpha1", "DynamoWorkerMetadata");
    let kind = ApiResource::from_gvk_with_plural(&kind, "dynamoworkermetadatas");
    // The resources themselves carry no labels.
    let resources = Watching {
        api: Api::<DynamicObject>::namespaced_with(client.clone(), &namespace, &kind),
        selector: String::new(),
        keep: ResourceFacts::of,
    };
    let slices = Watching {
        api: Api::<EndpointSlice>::namespaced(client.clone(), &namespace),
        selector: config.selector.clone(),
        keep: ready_pods,
    };
    let pods = Watching {
        api: Api::<Pod>::namespaced(client, &namespace),
        selector: config.selector.clone(),
        keep: PodFacts::of,
    };
    let (resource_out, resource_queue) = mpsc::channel(KUBERNETES_CHANGES_QUEUED_MAX);
    let (slice_out, slice_queue) = mpsc::channel(KUBERNETES_CHANGES_QUEUED_MAX);
    let (pod_out, pod_queue) = mpsc::channel(KUBERNETES_CHANGES_QUEUED_MAX);
    let queues = Queues { resources: resource_queue, slices: slice_queue, pods: pod_queue };
    tokio::select! {
        () = resources.run(resource_out) => {}
        () = slices.run(slice_out) => {}
        () = pods.run(pod_out) => {}
        () = queues.merge(&config, &sights) => {}
    }
}

/// What the three watches tell.
struct Queues {
    resources: mpsc::Receiver<Told<ResourceFacts>>,
    slices: mpsc::Receiver<Told<Vec<ReadyPod>>>,
    pods: mpsc::Receiver<Told<PodFacts>>,
}

impl Queues {
    async fn merge(mut self, config: &KubernetesConfig, sights: &mpsc::Sender<Sight>) {
        let mut known = Known::default();
        let mut changed = false;
        loop {
            tokio::select! {
                Some(told) = self.resources.recv() => known.resources.take(told),
                Some(told) = self.slices.recv() => known.slices.take(told),
                Some(told) = self.pods.recv() => known.pods.take(told),
                // Only when there is room: a burst of changes is one sight.
                room = sights.reserve(), if changed => {
                    let Ok(room) = room else { return };
                    if let Some(sight) = known.sight(config) {
                        room.send(sight);
                    }
                    changed = false;
                    continue;
                }
                else => return,
            }
            changed = true;
        }
    }
}

/// What is known of the cluster.
#[derive(Debug, Default)]
struct Known {
    resources: Table<ResourceFacts>,
    slices: Table<Vec<ReadyPod>>,
    pods: Table<PodFacts>,
}

impl Known {
    /// What is to be told now; `None` before everything has been listed.
    fn sight(&self, config: &KubernetesConfig) -> Option<Sight> {
        let kinds = [
            (&self.resources.failed, "dynamoworkermetadatas"),
            (&self.slices.failed, "endpointslices"),
            (&self.pods.failed, "pods"),
        ];
        let failed = kinds.iter().find_map(|(failed, kind)| Some((failed.as_ref()?, kind)));
        if let Some((error, kind)) = failed {
            return Some(Sight::Failed(format!("kubernetes: {kind}: {error}")));
        }
        if !(self.resources.whole && self.slices.whole && self.pods.whole) {
            return None;
        }
        let cluster = Cluster {
            resources: &self.resources.rows,
            slices: &self.slices.rows,
            pods: &self.pods.rows,
        };
        let mut listing = cluster.listing(config);
        if self.resources.too_many || self.slices.too_many || self.pods.too_many {
            listing.problems.add("kubernetes", "too_many_objects");
        }
        Some(Sight::Records(listing))
    }
}

#[cfg(test)]
mod tests;
