"""References: whether what objects name is there.

An API server stores an object whose references lead nowhere; controllers then
say so in a status, or nobody does. Here every reference that a manifest of ours
makes is followed. What controllers make by themselves is known: the account of
a Gateway's pods, the pods of a Dynamo graph.
"""

from __future__ import annotations

import copy
import re

import yaml

from schema import pod_faults

SERVICE_HOST = re.compile(r"(?P<name>[^.]+)\.(?P<namespace>[^.]+)\.svc\.cluster\.local")
OUTBOUND = re.compile(r"outbound\|(?P<port>\d+)\|\|(?P<host>.+)")
# Names of ports by which Istio knows HTTP/2.
HTTP2_NAME = re.compile(r"(grpc|http2|grpc-web)(-.*)?")
HTTP2_PROTOCOLS = ("kubernetes.io/h2c", "grpc", "http2")


class Objects:
    """Objects of a cluster, by kind, namespace and name."""

    def __init__(self, documents: list[dict]) -> None:
        self.documents = documents
        self.by_name = {}
        for document in documents:
            metadata = document["metadata"]
            self.by_name[document["kind"], metadata.get("namespace"), metadata["name"]] = document

    def get(self, kind: str, namespace: str | None, name: str) -> dict | None:
        """One object."""
        return self.by_name.get((kind, namespace, name))

    def of(self, kind: str) -> list[dict]:
        """All of a kind."""
        return [document for document in self.documents if document["kind"] == kind]

    def pods(self) -> list[dict]:
        """A pod of each workload: its namespace, labels and spec."""
        found = []
        for deployment in self.of("Deployment"):
            template = deployment["spec"]["template"]
            found.append({"namespace": space(deployment), "labels": template["metadata"]["labels"],
                          "spec": template["spec"]})
        for graph in self.of("DynamoGraphDeployment"):
            found += graph_pods(graph)
        for gateway in self.of("Gateway"):
            found.append(gateway_pod(self, gateway))
        return found

    def service_port(self, namespace: str | None, name: str, port: int) -> dict | None:
        """A port of a Service."""
        service = self.get("Service", namespace, name)
        ports = service["spec"].get("ports", []) if service else []
        return next((each for each in ports if each["port"] == port), None)


def space(document: dict) -> str | None:
    """An object's namespace."""
    return document["metadata"].get("namespace")


def graph_pods(graph: dict) -> list[dict]:
    """The pods that Dynamo's operator makes of a graph."""
    name, namespace = graph["metadata"]["name"], space(graph)
    found = []
    for component in graph["spec"].get("components", []):
        template = copy.deepcopy(component.get("podTemplate") or {"spec": {"containers": []}})
        kind = component.get("type", "worker")
        labels = {
            "nvidia.com/dynamo-graph-deployment-name": name,
            "nvidia.com/dynamo-component": component["name"],
            "nvidia.com/dynamo-component-type": kind,
            "nvidia.com/dynamo-namespace": f"{namespace}-{name}",
            "nvidia.com/dynamo-discovery-enabled": "true",
            **({"nvidia.com/dynamo-component-class": "worker"}
               if kind in ("worker", "prefill", "decode") else {}),
            **(template.get("metadata") or {}).get("labels", {}),
        }
        for container in template["spec"]["containers"]:
            if container["name"] == component.get("frontendSidecar"):
                container.setdefault("ports", []).append({"name": "http", "containerPort": 8000})
        found.append({"namespace": namespace, "labels": labels, "spec": template["spec"]})
    return found


def gateway_pod(objects: Objects, gateway: dict) -> dict:
    """The pod that a gateway's controller makes, with what is laid over it."""
    name, namespace = gateway["metadata"]["name"], space(gateway)
    spec = {"containers": []}
    reference = gateway["spec"].get("infrastructure", {}).get("parametersRef") or {}
    parameters = objects.get(reference.get("kind", ""), namespace, reference.get("name", ""))
    if parameters:
        spec = overlay(parameters).get("spec", {}).get("template", {}).get("spec", spec)
    of_envoy_gateway = reference.get("kind") == "EnvoyProxy"
    label = ("gateway.envoyproxy.io/owning-gateway-name" if of_envoy_gateway
             else "gateway.networking.k8s.io/gateway-name")
    return {"namespace": "envoy-gateway-system" if of_envoy_gateway else namespace,
            "labels": {label: name}, "spec": spec}


def overlay(parameters: dict) -> dict:
    """What a Gateway's parameters lay over the Deployment of its proxies."""
    if parameters["kind"] == "ConfigMap":
        return yaml.load(parameters["data"].get("deployment", "{}"), yaml.CSafeLoader)
    kubernetes = parameters["spec"].get("provider", {}).get("kubernetes", {})
    return kubernetes.get("envoyDeployment", {}).get("patch", {}).get("value", {})


def matches(labels: dict, selector: dict | None) -> bool:
    """Whether a selector takes what has these labels."""
    return (selector or {}).get("matchLabels", {}).items() <= labels.items()


def faults(documents: list[dict]) -> list[str]:
    """Every reference that leads nowhere."""
    objects = Objects(documents)
    found = []
    for document in documents:
        of_kind = CHECKS.get(document["kind"])
        if of_kind:
            name = f"{document['kind']} {document['metadata']['name']}"
            found += [f"{name}: {why}" for why in of_kind(objects, document)]
    return found


def of_pod(objects: Objects, namespace: str | None, spec: dict) -> list[str]:
    """What a pod names."""
    wanted = []
    for volume in spec.get("volumes", []):
        if "configMap" in volume:
            wanted.append(("ConfigMap", volume["configMap"]["name"]))
        if "secret" in volume:
            wanted.append(("Secret", volume["secret"]["secretName"]))
        if "persistentVolumeClaim" in volume:
            wanted.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
    for container in spec.get("containers", []):
        for source in container.get("envFrom", []):
            for member, kind in (("secretRef", "Secret"), ("configMapRef", "ConfigMap")):
                if member in source:
                    wanted.append((kind, source[member]["name"]))
    wanted += [("Secret", secret["name"]) for secret in spec.get("imagePullSecrets", [])]
    if spec.get("serviceAccountName"):
        wanted.append(("ServiceAccount", spec["serviceAccountName"]))
    return [f"no {kind} {name} in {namespace}" for kind, name in wanted
            if not objects.get(kind, namespace, name)]


def of_deployment(objects: Objects, deployment: dict) -> list[str]:
    return of_pod(objects, space(deployment), deployment["spec"]["template"]["spec"])


def of_graph(objects: Objects, graph: dict) -> list[str]:
    found = []
    for pod in graph_pods(graph):
        spec = {**pod["spec"], "volumes": pod["spec"].get("volumes", [])}
        found += of_pod(objects, pod["namespace"], spec) + pod_faults(spec)
    return found


def of_gateway(objects: Objects, gateway: dict) -> list[str]:
    reference = gateway["spec"].get("infrastructure", {}).get("parametersRef")
    if reference and not objects.get(reference["kind"], space(gateway), reference["name"]):
        return [f"no {reference['kind']} {reference['name']}"]
    pod = gateway_pod(objects, gateway)
    # Its own accounts and secrets are the controller's business.
    return of_pod(objects, pod["namespace"], pod["spec"]) + pod_faults(pod["spec"])


def of_service(objects: Objects, service: dict) -> list[str]:
    selector = {"matchLabels": service["spec"].get("selector") or {}}
    pods = [pod for pod in objects.pods()
            if pod["namespace"] == space(service) and matches(pod["labels"], selector)]
    if not pods:
        return [f"selects no pod: {selector['matchLabels']}"]
    found = []
    for port in service["spec"].get("ports", []):
        target = port.get("targetPort", port["port"])
        for pod in pods:
            if not any(target in (each.get("name"), each["containerPort"]) for each in ports_of(pod)):
                found.append(f"port {port['port']}: no container has port {target}")
                break
    return found


def ports_of(pod: dict) -> list[dict]:
    """Ports of a pod's containers."""
    return [port for container in pod["spec"]["containers"] for port in container.get("ports", [])]


def of_role_binding(objects: Objects, binding: dict) -> list[str]:
    found = []
    if not objects.get("Role", space(binding), binding["roleRef"]["name"]):
        found.append(f"no Role {binding['roleRef']['name']}")
    made = {(space(gateway), f"{gateway['metadata']['name']}-istio") for gateway in objects.of("Gateway")
            if gateway["spec"]["gatewayClassName"] == "istio"}
    for subject in binding["subjects"]:
        at = (subject["namespace"], subject["name"])
        # Envoy Gateway puts a hash behind the name.
        is_made = at in made or re.fullmatch(r"envoy-.+-[0-9a-f]{8}", subject["name"])
        if not is_made and not objects.get("ServiceAccount", *at):
            found.append(f"no ServiceAccount {subject['name']} in {subject['namespace']}")
    return found


def of_selector(objects: Objects, document: dict) -> list[str]:
    selector = document["spec"].get("selector") or document["spec"].get("podSelector")
    pods = [pod for pod in objects.pods()
            if pod["namespace"] == space(document) and matches(pod["labels"], selector)]
    return [] if pods else [f"selects no pod: {selector.get('matchLabels')}"]


def of_network_policy(objects: Objects, policy: dict) -> list[str]:
    found = of_selector(objects, policy)
    selector = policy["spec"]["podSelector"]
    names = {port.get("name") for pod in objects.pods() if matches(pod["labels"], selector)
             for port in ports_of(pod)}
    for rule in policy["spec"].get("ingress", []):
        for port in rule.get("ports", []):
            if isinstance(port["port"], str) and port["port"] not in names:
                found.append(f"no selected pod has a port {port['port']}")
        for peer in rule.get("from", []):
            wanted = peer.get("namespaceSelector", {}).get("matchLabels", {})
            inside = wanted.get("kubernetes.io/metadata.name", space(policy))
            if "podSelector" in peer and not any(
                    pod["namespace"] == inside and matches(pod["labels"], peer["podSelector"])
                    for pod in objects.pods()):
                found.append(f"lets in pods that are not there: {peer}")
    return found


def of_service_monitor(objects: Objects, monitor: dict) -> list[str]:
    services = [service for service in objects.of("Service")
                if space(service) == space(monitor)
                and matches(service["metadata"].get("labels", {}), monitor["spec"]["selector"])]
    found = [] if services else ["selects no Service"]
    for endpoint in monitor["spec"]["endpoints"]:
        names = [port.get("name") for service in services for port in service["spec"]["ports"]]
        if endpoint["port"] not in names:
            found.append(f"no Service has a port {endpoint['port']}")
    return found


def of_route(objects: Objects, route: dict) -> list[str]:
    found = []
    for parent in route["spec"].get("parentRefs", []):
        namespace = parent.get("namespace", space(route))
        gateway = objects.get("Gateway", namespace, parent["name"])
        if not gateway:
            found.append(f"no Gateway {parent['name']} in {namespace}")
            continue
        allowed = [listener.get("allowedRoutes", {}).get("namespaces", {}).get("from", "Same")
                   for listener in gateway["spec"]["listeners"]]
        if namespace != space(route) and "All" not in allowed:
            found.append(f"Gateway {parent['name']} takes no routes of other namespaces")
    for rule in route["spec"].get("rules", []):
        for backend in rule.get("backendRefs", []):
            found += of_backend(objects, route, backend)
    return found


def of_backend(objects: Objects, route: dict, backend: dict) -> list[str]:
    namespace = backend.get("namespace", space(route))
    kind, name = backend.get("kind", "Service"), backend["name"]
    found = []
    if kind == "Service":
        if not objects.service_port(namespace, name, backend["port"]):
            found.append(f"no Service {name} in {namespace} with port {backend['port']}")
    elif not objects.get(kind, namespace, name):
        found.append(f"no {kind} {name} in {namespace}")
    if namespace != space(route) and not is_granted(objects, route, backend, namespace):
        found.append(f"no ReferenceGrant in {namespace} for {kind} {name}")
    return found


def is_granted(objects: Objects, route: dict, backend: dict, namespace: str) -> bool:
    for grant in objects.of("ReferenceGrant"):
        origins = [(origin["group"], origin["kind"], origin["namespace"])
                   for origin in grant["spec"]["from"]]
        targets = [(target["group"], target["kind"], target.get("name", backend["name"]))
                   for target in grant["spec"]["to"]]
        wanted = (backend.get("group", ""), backend.get("kind", "Service"), backend["name"])
        if (space(grant) == namespace and wanted in targets
                and ("gateway.networking.k8s.io", "HTTPRoute", space(route)) in origins):
            return True
    return False


def of_pool(objects: Objects, pool: dict) -> list[str]:
    found = of_selector(objects, pool)
    picker = pool["spec"].get("endpointPickerRef")
    if picker:
        port = picker.get("port", {}).get("number", 0)
        if not objects.service_port(space(pool), picker["name"], port):
            found.append(f"no Service {picker['name']} with port {port} for the endpoint picker")
    return found


def of_targets(objects: Objects, document: dict) -> list[str]:
    spec = document["spec"]
    targets = spec.get("targetRefs") or [spec["targetRef"]]
    found = [f"no {target['kind']} {target['name']} in {space(document)}" for target in targets
             if not objects.get(target["kind"], space(document), target["name"])]
    for config in filter_configs(spec):
        found += of_feed_cluster(objects, document, config.get("feed_cluster", ""))
    return found


def filter_configs(spec: object):
    """Every configuration of the filter in a policy."""
    if isinstance(spec, dict):
        if "pluginConfig" in spec:
            yield spec["pluginConfig"]
        if str(spec.get("@type", "")).endswith("google.protobuf.StringValue"):
            yield yaml.load(spec["value"], yaml.CSafeLoader)
        for part in spec.values():
            yield from filter_configs(part)
    elif isinstance(spec, list):
        for part in spec:
            yield from filter_configs(part)


def of_feed_cluster(objects: Objects, document: dict, name: str) -> list[str]:
    outbound = OUTBOUND.fullmatch(name)
    if not outbound:
        added = [patch.get("patch", {}).get("value", {}).get("name")
                 for patch in document["spec"].get("configPatches", [])]
        added += [patch["name"] for patch in document["spec"].get("jsonPatches", [])]
        filters = [each for each in objects.of("EnvoyFilter") if space(each) == space(document)]
        added += [patch.get("patch", {}).get("value", {}).get("name")
                  for each in filters for patch in each["spec"]["configPatches"]]
        return [] if name in added else [f"nobody makes the cluster {name}"]
    return of_host(objects, outbound["host"], int(outbound["port"]), wants_http2=True)


def of_host(objects: Objects, host: str, port: int, wants_http2: bool = False) -> list[str]:
    """Whether a host's name is that of a Service with such a port."""
    service = SERVICE_HOST.fullmatch(host)
    # A pool's Service is made by Istio.
    if service and re.search(r"-ip-[0-9a-f]{8}$", service["name"]):
        return []
    found = service and objects.service_port(service["namespace"], service["name"], port)
    if not found:
        return [f"no Service {host} with port {port}"]
    is_http2 = (HTTP2_NAME.fullmatch(found.get("name", ""))
                or found.get("appProtocol") in HTTP2_PROTOCOLS)
    return [] if is_http2 or not wants_http2 else [f"port {port} of {host} is not known as HTTP/2"]


def of_envoy_filter(objects: Objects, document: dict) -> list[str]:
    found = of_targets(objects, document)
    for patch in document["spec"]["configPatches"]:
        cluster = patch.get("match", {}).get("cluster", {})
        if "service" in cluster:
            found += of_host(objects, cluster["service"], cluster["portNumber"])
    return found


def of_patch_policy(objects: Objects, document: dict) -> list[str]:
    found = of_targets(objects, document)
    listeners = {f"{space(gateway)}/{gateway['metadata']['name']}/{listener['name']}"
                 for gateway in objects.of("Gateway") for listener in gateway["spec"]["listeners"]}
    clusters = {f"httproute/{space(route)}/{route['metadata']['name']}/rule/{at}"
                for route in objects.of("HTTPRoute") for at in range(len(route["spec"]["rules"]))}
    for patch in document["spec"]["jsonPatches"]:
        is_new = patch["operation"].get("path") == ""
        if patch["type"].endswith("Listener") and patch["name"] not in listeners:
            found.append(f"no listener {patch['name']}")
        if patch["type"].endswith("Cluster") and not is_new and patch["name"] not in clusters:
            found.append(f"no cluster {patch['name']}")
    return found


def of_destination_rule(objects: Objects, rule: dict) -> list[str]:
    ports = [each["port"]["number"]
             for each in rule["spec"].get("trafficPolicy", {}).get("portLevelSettings", [])]
    return [why for port in ports for why in of_host(objects, rule["spec"]["host"], port)]


CHECKS = {
    "Deployment": of_deployment, "DynamoGraphDeployment": of_graph, "Gateway": of_gateway,
    "Service": of_service, "RoleBinding": of_role_binding, "PodDisruptionBudget": of_selector,
    "NetworkPolicy": of_network_policy, "ServiceMonitor": of_service_monitor, "HTTPRoute": of_route,
    "InferencePool": of_pool, "EnvoyFilter": of_envoy_filter, "WasmPlugin": of_targets,
    "TrafficExtension": of_targets, "EnvoyPatchPolicy": of_patch_policy,
    "DestinationRule": of_destination_rule,
}
