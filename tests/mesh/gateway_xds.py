"""Gateway xDS: what Istio and Envoy Gateway make of manifests, as an Envoy bootstrap.

Of Gateway, HTTPRoute and Services comes what the controller would send to its
proxies: a listener, routes, a cluster a Service. Then its policies are applied, in
the controller's order and way: Istio's EnvoyFilter (with proto's merge, which
appends to lists), WasmPlugin and TrafficExtension; Envoy Gateway's
EnvoyPatchPolicy (JSON Patch). A place or an operation that is not known here is an
error, so that no patch is passed over.

`static` then turns that into a bootstrap which runs on this machine: what comes by
discovery comes from files, the module's image is a local file, names of Services
are addresses here.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib

import yaml

from references import SERVICE_HOST, space

HCM = "envoy.filters.network.http_connection_manager"
HCM_TYPE = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
ROUTER = {"name": "envoy.filters.http.router",
          "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}
CORS = {"name": "envoy.filters.http.cors",
        "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors"}}
WASM_TYPE = "type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm"
HTTP2 = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
    "explicit_http_config": {"http2_protocol_options": {"max_concurrent_streams": 1073741824}}}}
FAIL_POLICY = {"FAIL_CLOSE": "FAIL_CLOSED", "FAIL_OPEN": "FAIL_OPEN", "FAIL_RELOAD": "FAIL_RELOAD"}


class NotKnown(Exception):
    """A patch that this renderer cannot apply."""


@dataclasses.dataclass
class Xds:
    """Resources of one gateway's proxies."""

    listeners: list[dict]
    clusters: list[dict]
    extensions: dict[str, dict] = dataclasses.field(default_factory=dict)
    """Configurations of HTTP filters that are discovered, by name."""


def merge(into: dict, patch: dict) -> None:
    """Merges as proto does: fields win, lists grow. Entries of maps are replaced."""
    for name, value in patch.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict) and name != "typed_extension_protocol_options":
            if into[name].get("@type", value.get("@type")) != value.get("@type", into[name].get("@type")):
                raise NotKnown(f"types differ in {name}")
            merge(into[name], value)
        elif isinstance(value, dict) and name == "typed_extension_protocol_options":
            into[name] = {**into.get(name, {}), **copy.deepcopy(value)}
        elif isinstance(value, list) and isinstance(into.get(name), list):
            into[name] += copy.deepcopy(value)
        else:
            into[name] = copy.deepcopy(value)


def manager(listener: dict) -> dict:
    """The configuration of a listener's HTTP connection manager."""
    chain = listener.get("default_filter_chain") or listener["filter_chains"][0]
    return chain["filters"][0]["typed_config"]


def virtual_hosts(documents: list[dict], gateway: dict, cluster_of) -> list[dict]:
    """Routes of a gateway.

    - `cluster_of`: the cluster of a route's backend, by route, number of the rule and backend.
    """
    hosts = []
    for route in (d for d in documents if d["kind"] == "HTTPRoute"):
        parents = [(p.get("namespace", space(route)), p["name"]) for p in route["spec"]["parentRefs"]]
        if (space(gateway), gateway["metadata"]["name"]) not in parents:
            continue
        routes = []
        for at, rule in enumerate(route["spec"]["rules"]):
            timeout = rule.get("timeouts", {}).get("request", "15s")
            for match in rule["matches"]:
                routes.append({
                    "match": {"prefix": match["path"]["value"]},
                    "route": {
                        "cluster": cluster_of(route, at, rule["backendRefs"][0]), "timeout": timeout,
                        "retry_policy": {
                            "retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
                            "num_retries": 2, "retriable_status_codes": [503],
                            "host_selection_retry_max_attempts": "5",
                            "retry_host_predicate": [{
                                "name": "envoy.retry_host_predicates.previous_hosts",
                                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.retry.host."
                                                          "previous_hosts.v3.PreviousHostsPredicate"}}]},
                    }})
        hosts.append({"name": route["metadata"]["name"], "routes": routes,
                      "domains": route["spec"].get("hostnames", ["*"])})
    return hosts


def listener_of(name: str, gateway: dict, hosts: list[dict], chain: str) -> dict:
    """A listener as both controllers make it, as far as it matters here."""
    filters = [{"name": HCM, "typed_config": {
        "@type": HCM_TYPE, "stat_prefix": name, "use_remote_address": True, "normalize_path": True,
        "http_filters": [copy.deepcopy(CORS), copy.deepcopy(ROUTER)],
        "route_config": {"name": name, "virtual_hosts": hosts}}}]
    made = {"filters": filters}
    port = gateway["spec"]["listeners"][0]["port"]
    return {"name": name, "address": {"socket_address": {"address": "0.0.0.0", "port_value": port}},
            **({"default_filter_chain": made} if chain == "default" else {"filter_chains": [made]})}


def eds_cluster(name: str) -> dict:
    """A cluster whose hosts are discovered, as Istio configures it."""
    return {"name": name, "type": "EDS", "connect_timeout": "10s", "lb_policy": "LEAST_REQUEST",
            "common_lb_config": {}, "per_connection_buffer_limit_bytes": 32768,
            "circuit_breakers": {"thresholds": [{"max_connections": 4294967295, "max_requests": 4294967295,
                                                 "max_pending_requests": 4294967295, "max_retries": 4294967295}]},
            "eds_cluster_config": {"eds_config": {"ads": {}, "resource_api_version": "V3"}, "service_name": name}}


# --- Istio -------------------------------------------------------------------


def istio(documents: list[dict]) -> Xds:
    """What Istio's control plane would send to the proxies of the only Gateway."""
    gateway = next(d for d in documents if d["kind"] == "Gateway")
    pools = {d["metadata"]["name"]: f"outbound|54321||{d['metadata']['name']}-ip-0a1b2c3d.{space(d)}.svc.cluster.local"
             for d in documents if d["kind"] == "InferencePool"}

    def cluster_of(route: dict, _: int, backend: dict) -> str:
        if backend.get("kind") == "InferencePool":
            return pools[backend["name"]]
        namespace = backend.get("namespace", space(route))
        return f"outbound|{backend['port']}||{backend['name']}.{namespace}.svc.cluster.local"

    hosts = virtual_hosts(documents, gateway, cluster_of)
    port = gateway["spec"]["listeners"][0]["port"]
    xds = Xds([listener_of(f"0.0.0.0_{port}", gateway, hosts, "chains")],
              [eds_cluster(name) for name in pools.values()])
    for service in (d for d in documents if d["kind"] == "Service"):
        for each in service["spec"]["ports"]:
            cluster = eds_cluster(
                f"outbound|{each['port']}||{service['metadata']['name']}.{space(service)}.svc.cluster.local")
            if each["name"].startswith(("grpc", "http2")) or each.get("appProtocol") == "kubernetes.io/h2c":
                cluster["typed_extension_protocol_options"] = copy.deepcopy(HTTP2)
            xds.clusters.append(cluster)
    for rule in (d for d in documents if d["kind"] == "DestinationRule"):
        add_tls(xds, rule)
    add_plugins(xds, documents, gateway)
    filters = [d for d in documents if d["kind"] == "EnvoyFilter" and is_for(d, gateway)]
    filters.sort(key=lambda d: (d["spec"].get("priority", 0), space(d), d["metadata"]["name"]))
    # New resources first, then what patches them, as Istio does.
    for is_addition in (True, False):
        for document in filters:
            for patch in document["spec"]["configPatches"]:
                if (patch["patch"]["operation"] == "ADD") == is_addition:
                    apply_patch(xds, patch)
    return xds


def is_for(document: dict, gateway: dict) -> bool:
    """Whether a policy is about a Gateway."""
    names = [target["name"] for target in document["spec"].get("targetRefs", [])]
    return space(document) == space(gateway) and gateway["metadata"]["name"] in names


def add_tls(xds: Xds, rule: dict) -> None:
    """TLS towards a Service, as a DestinationRule says."""
    for setting in rule["spec"]["trafficPolicy"]["portLevelSettings"]:
        tls, name = setting["tls"], f"outbound|{setting['port']['number']}||{rule['spec']['host']}"
        if tls["mode"] in ("DISABLE", "ISTIO_MUTUAL"):
            # The mesh's own certificates are of no meaning outside of it.
            continue
        context = {"alpn_protocols": ["h2"], "validation_context": {}}
        if tls.get("caCertificates"):
            context["validation_context"]["trusted_ca"] = {"filename": tls["caCertificates"]}
        if tls.get("subjectAltNames"):
            context["validation_context"]["match_typed_subject_alt_names"] = [
                {"san_type": "DNS", "matcher": {"exact": san}} for san in tls["subjectAltNames"]]
        if tls["mode"] == "MUTUAL":
            context["tls_certificates"] = [{"certificate_chain": {"filename": tls["clientCertificate"]},
                                            "private_key": {"filename": tls["privateKey"]}}]
        for cluster in xds.clusters:
            if cluster["name"] == name:
                cluster["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                    "sni": tls.get("sni", ""), "common_tls_context": context}}


def add_plugins(xds: Xds, documents: list[dict], gateway: dict) -> None:
    """Plugins: Istio names no VM, and no setting of the filter but these."""
    for document in documents:
        if document["kind"] not in ("WasmPlugin", "TrafficExtension") or not is_for(document, gateway):
            continue
        wasm = document["spec"].get("wasm", document["spec"])
        name = f"extenstions.istio.io/{document['kind'].lower()}/{space(document)}.{document['metadata']['name']}"
        xds.extensions[name] = {"@type": WASM_TYPE, "config": {
            "name": name, "root_id": wasm.get("pluginName", ""),
            "failure_policy": FAIL_POLICY[wasm.get("failStrategy", "FAIL_CLOSE")],
            "configuration": {"@type": "type.googleapis.com/google.protobuf.StringValue",
                              "value": json.dumps(wasm["pluginConfig"])},
            "vm_config": {"runtime": "envoy.wasm.runtime.v8", "code": {
                "remote": {"http_uri": {"uri": wasm["url"], "cluster": "_", "timeout": "30s"}}}}}}
        for listener in xds.listeners:
            # Without a phase: behind authentication and statistics, in front of the router.
            insert(manager(listener)["http_filters"], discovered(name), "INSERT_BEFORE", ROUTER["name"])


def discovered(name: str) -> dict:
    """An HTTP filter whose configuration is discovered."""
    return {"name": name, "config_discovery": {
        "config_source": {"ads": {}, "initial_fetch_timeout": "0s", "resource_api_version": "V3"},
        "type_urls": [WASM_TYPE]}}


def insert(filters: list[dict], value: dict, operation: str, beside: str | None) -> None:
    """Puts an HTTP filter into a chain."""
    at = next((i for i, each in enumerate(filters) if each["name"] == beside), None)
    if operation == "INSERT_FIRST":
        filters.insert(0, value)
    elif operation in ("INSERT_BEFORE", "INSERT_AFTER") and at is not None:
        filters.insert(at + (operation == "INSERT_AFTER"), value)
    else:
        raise NotKnown(f"{operation} beside {beside}")


def apply_patch(xds: Xds, patch: dict) -> None:
    """One patch of an EnvoyFilter."""
    place, match = patch["applyTo"], patch.get("match", {})
    operation, value = patch["patch"]["operation"], copy.deepcopy(patch["patch"]["value"])
    if match.get("context", "ANY") not in ("ANY", "GATEWAY"):
        raise NotKnown(f"context {match['context']}")
    chain_filter = match.get("listener", {}).get("filterChain", {}).get("filter", {})
    if chain_filter.get("name", HCM) != HCM:
        raise NotKnown(f"filter {chain_filter['name']}")
    if (place, operation) == ("EXTENSION_CONFIG", "ADD"):
        xds.extensions[value["name"]] = value["typed_config"]
    elif (place, operation) == ("CLUSTER", "ADD"):
        xds.clusters.append(value)
    elif (place, operation) == ("CLUSTER", "MERGE"):
        patched = [c for c in xds.clusters if is_cluster(c["name"], match["cluster"])]
        if not patched:
            raise NotKnown(f"no cluster {match['cluster']}")
        for cluster in patched:
            merge(cluster, value)
    elif (place, operation) == ("LISTENER", "MERGE"):
        for listener in xds.listeners:
            merge(listener, value)
    elif (place, operation) == ("NETWORK_FILTER", "MERGE"):
        for listener in xds.listeners:
            merge(manager(listener), value["typed_config"])
    elif place == "HTTP_FILTER":
        for listener in xds.listeners:
            insert(manager(listener)["http_filters"], copy.deepcopy(value), operation,
                   chain_filter.get("subFilter", {}).get("name"))
    else:
        raise NotKnown(f"{place} {operation}")


def is_cluster(name: str, match: dict) -> bool:
    """Whether a patch is about a cluster of this name."""
    if "name" in match:
        return name == match["name"]
    return name == f"outbound|{match['portNumber']}||{match['service']}"


# --- Envoy Gateway -----------------------------------------------------------


def envoy_gateway(documents: list[dict]) -> Xds:
    """What Envoy Gateway would send to the proxies of the only Gateway."""
    gateway = next(d for d in documents if d["kind"] == "Gateway")

    def cluster_of(route: dict, at: int, _: dict) -> str:
        return f"httproute/{space(route)}/{route['metadata']['name']}/rule/{at}"

    hosts = virtual_hosts(documents, gateway, cluster_of)
    name = f"{space(gateway)}/{gateway['metadata']['name']}/{gateway['spec']['listeners'][0]['name']}"
    clusters = sorted({route["route"]["cluster"] for host in hosts for route in host["routes"]})
    xds = Xds([listener_of(name, gateway, hosts, "default")], [eds_cluster(each) for each in clusters])
    for policy in (d for d in documents if d["kind"] == "EnvoyPatchPolicy"):
        for patch in policy["spec"]["jsonPatches"]:
            kind = patch["type"].rsplit(".", 1)[-1]
            resources = {"Listener": xds.listeners, "Cluster": xds.clusters}[kind]
            operation = patch["operation"]
            if operation["op"] == "add" and operation["path"] == "":
                resources.append(copy.deepcopy(operation["value"]))
                continue
            found = [each for each in resources if each["name"] == patch["name"]]
            if not found:
                raise NotKnown(f"no {kind} {patch['name']}")
            json_patch(found[0], operation)
    return xds


def json_patch(document: dict, operation: dict) -> None:
    """One operation of RFC 6902; those that are used."""
    if operation["op"] not in ("add", "replace", "remove"):
        raise NotKnown(operation["op"])
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    at = document
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at[part]
    value = copy.deepcopy(operation.get("value"))
    if operation["op"] == "remove":
        del at[int(last) if isinstance(at, list) else last]
    elif isinstance(at, list) and operation["op"] == "add":
        at.insert(len(at) if last == "-" else int(last), value)
    else:
        at[int(last) if isinstance(at, list) else last] = value


# --- a bootstrap for this machine --------------------------------------------


def static(xds: Xds, folder: pathlib.Path, module: pathlib.Path, gateway_port: int, admin_port: int,
           hosts: dict[str, list[int]], discovers: bool) -> dict:
    """The bootstrap of an Envoy here.

    - `hosts`: ports on 127.0.0.1 by the name of a cluster, or of a Service's host.
    - `discovers`: filters' configurations are discovered, from files, as in a
      mesh; else they stand in the listener, where `--mode validate` reads them.
    """
    xds = copy.deepcopy(xds)
    for extension in xds.extensions.values():
        localize(extension, module)
    for listener in xds.listeners:
        listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": gateway_port}
        for at, each in enumerate(manager(listener)["http_filters"]):
            if each.get("typed_config", {}).get("@type") == WASM_TYPE:
                localize(each["typed_config"], module)
            if "config_discovery" not in each:
                continue
            config = xds.extensions[each["name"]]
            if not discovers:
                manager(listener)["http_filters"][at] = {"name": each["name"], "typed_config": config}
                continue
            path = folder / f"extension-{at}.yaml"
            path.write_text(yaml.safe_dump({"version_info": "1", "resources": [{
                "@type": "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
                "name": each["name"], "typed_config": config}]}))
            source = each["config_discovery"]["config_source"]
            del source["ads"]
            source["path_config_source"] = {"path": str(path)}
    for at, cluster in enumerate(xds.clusters):
        localize_cluster(cluster, folder / f"endpoints-{at}.yaml", hosts)
    return {"admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin_port}}},
            "node": {"id": "gateway", "cluster": "gateway"},
            "static_resources": {"listeners": xds.listeners, "clusters": xds.clusters}}


def localize(wasm: dict, module: pathlib.Path) -> None:
    """The agent beside Istio's proxy pulls the image and names the file; others mount it."""
    code = wasm["config"]["vm_config"]["code"]
    uri = code.get("remote", {}).get("http_uri", {}).get("uri", "oci://mounted@sha256:")
    if not uri.startswith("oci://") or "@sha256:" not in uri:
        raise NotKnown(f"not an image with its digest: {uri}")
    wasm["config"]["vm_config"]["code"] = {"local": {"filename": str(module)}}


def localize_cluster(cluster: dict, path: pathlib.Path, hosts: dict[str, list[int]]) -> None:
    """Addresses of a cluster's hosts on this machine."""
    if cluster["type"] == "EDS":
        ports = hosts.get(cluster["name"], [])
        endpoints = [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}},
                      "health_status": "HEALTHY"} for port in ports]
        path.write_text(yaml.safe_dump({"version_info": "1", "resources": [{
            "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            "cluster_name": cluster["name"], "endpoints": [{"lb_endpoints": endpoints}]}]}))
        cluster["eds_cluster_config"]["eds_config"] = {
            "path_config_source": {"path": str(path)}, "resource_api_version": "V3"}
        return
    for group in cluster["load_assignment"]["endpoints"]:
        for endpoint in group["lb_endpoints"]:
            address = endpoint["endpoint"]["address"]["socket_address"]
            ports = hosts.get(address["address"]) or hosts.get(cluster["name"])
            if ports:
                address["address"], address["port_value"] = "127.0.0.1", ports[0]
            elif SERVICE_HOST.fullmatch(address["address"]):
                address["address"] = "127.0.0.1"
    cluster["type"] = "STATIC"
