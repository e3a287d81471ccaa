"""API server: a stand-in that kubectl and Helm talk to, on 127.0.0.1.

It discovers, stores, lists, patches and deletes objects of the kinds in
schema.py, as far as those two programs ask for. What it stores is checked as
there, strictly; what refers to nothing is stored, as in a cluster, but its
status says so, as controllers would. `dryRun=All` checks and stores nothing.
Whatever is awaited in a cluster is done at once: pods run, volumes are bound.
Watches, fields' owners and protobuf are not there.
"""

from __future__ import annotations

import copy
import json
import threading
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

import kube_proto
import references
from schema import CORE_KINDS, Schemas

# Written by whom.
NOW = "2026-01-01T00:00:00Z"
PROTO = "application/json"


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = {"apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure",
                       "code": code, "reason": reason, "message": message}


class Store:
    """The objects of a cluster."""

    def __init__(self, schemas: Schemas) -> None:
        self.schemas = schemas
        self.objects: dict[tuple[str, str, str | None, str], dict] = {}
        self.version = 0
        self.lock = threading.RLock()
        self.resources: dict[str, dict[str, tuple[str, bool]]] = {}
        """By `apiVersion`, kinds by plural, and whether they are in namespaces."""
        for (api, kind), (plural, in_namespaces) in schemas.kinds().items():
            self.resources.setdefault(api, {})[plural] = (kind, in_namespaces)
        for namespace in ("default", "kube-system"):
            self.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})

    def get(self, api: str, kind: str, namespace: str | None, name: str) -> dict:
        found = self.objects.get((api, kind, namespace, name))
        if found is None:
            plural = self.schemas.kinds()[api, kind][0]
            group = api.rpartition("/")[0]
            raise Refused(404, "NotFound", f'{plural}{"." + group if group else ""} "{name}" not found')
        return found

    def list(self, api: str, kind: str, namespace: str | None, selector: str) -> list[dict]:
        wanted = [part.partition("=") for part in selector.split(",") if "=" in part and "!=" not in part]
        return [
            document for (of_api, of_kind, of_namespace, _), document in sorted(
                self.objects.items(), key=lambda item: [part or "" for part in item[0]])
            if (of_api, of_kind) == (api, kind) and namespace in (None, of_namespace)
            and all(document["metadata"].get("labels", {}).get(key) == value.lstrip("=")
                    for key, _, value in wanted)
        ]

    def put(self, document: dict, is_dry: bool = False) -> dict:
        """Checks an object and stores it."""
        api, kind = document.get("apiVersion", ""), document.get("kind", "")
        found = self.schemas.faults(document)
        if found:
            name = document.get("metadata", {}).get("name")
            raise Refused(422, "Invalid", f'{kind} "{name}" is invalid: ' + "; ".join(found))
        metadata = document["metadata"]
        namespace = metadata.get("namespace")
        if namespace is not None and ("v1", "Namespace", None, namespace) not in self.objects:
            raise Refused(404, "NotFound", f'namespaces "{namespace}" not found')
        made = self.schemas.default(document)
        metadata = made["metadata"]
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", NOW)
        metadata["generation"] = metadata.get("generation", 0) + 1
        metadata["resourceVersion"] = str(self.version + 1)
        if is_dry:
            return made
        self.version += 1
        self.objects[api, kind, namespace, metadata["name"]] = made
        return made

    def delete(self, api: str, kind: str, namespace: str | None, name: str) -> dict:
        found = self.get(api, kind, namespace, name)
        del self.objects[api, kind, namespace, name]
        if (api, kind) == ("v1", "Namespace"):
            for key in [key for key in self.objects if key[2] == name]:
                del self.objects[key]
        return found

    def with_status(self, document: dict) -> dict:
        """An object with what controllers would say of it."""
        shown = copy.deepcopy(document)
        kind, generation = shown["kind"], shown["metadata"]["generation"]
        name = f"{kind} {shown['metadata']['name']}: "
        wrong = [why for why in references.faults(list(self.objects.values())) if why.startswith(name)]
        holds = "False" if wrong else "True"

        def condition(of: str, status: str = holds) -> dict:
            return {"type": of, "status": status, "reason": "Done" if status == "True" else "Invalid",
                    "message": "; ".join(wrong), "observedGeneration": generation, "lastTransitionTime": NOW}

        if kind == "Deployment":
            replicas = shown["spec"].get("replicas", 1)
            shown["status"] = {"observedGeneration": generation, "replicas": replicas, "updatedReplicas": replicas,
                               "readyReplicas": replicas, "availableReplicas": replicas,
                               "conditions": [condition("Available"), condition("Progressing", "True")]}
        elif kind == "Gateway":
            shown["status"] = {"addresses": [{"type": "IPAddress", "value": "127.0.0.1"}],
                               "conditions": [condition("Accepted"), condition("Programmed")]}
        elif kind == "HTTPRoute":
            shown["status"] = {"parents": [{"parentRef": parent, "controllerName": "stand-in",
                                            "conditions": [condition("Accepted"), condition("ResolvedRefs")]}
                                           for parent in shown["spec"].get("parentRefs", [])]}
        elif kind == "Job":
            shown["status"] = {"succeeded": 1, "conditions": [condition("Complete", "True")]}
        elif kind == "PersistentVolumeClaim":
            shown["status"] = {"phase": "Bound"}
        elif kind == "DynamoGraphDeployment":
            shown["status"] = {"state": "successful", "conditions": [condition("Ready")]}
        return shown


def merge_patch(target: object, patch: object) -> object:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    made = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            made.pop(name, None)
        else:
            made[name] = merge_patch(made.get(name), value)
    return made


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    store: Store

    def do_GET(self) -> None:
        self.respond(self.read)

    def do_POST(self) -> None:
        self.respond(self.create)

    def do_PUT(self) -> None:
        self.respond(self.replace)

    def do_PATCH(self) -> None:
        self.respond(self.patch)

    def do_DELETE(self) -> None:
        self.respond(self.remove)

    def respond(self, act) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        self.parts = [part for part in url.path.split("/") if part]
        length = int(self.headers.get("content-length", 0))
        self.sent = self.rfile.read(length)
        try:
            with self.store.lock:
                code, answer = act()
        except Refused as refused:
            code, answer = refused.status["code"], refused.status
        text = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("content-type", PROTO)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def body(self) -> dict:
        if "protobuf" in self.headers.get("content-type", ""):
            try:
                return kube_proto.decode(self.sent)
            except (ValueError, KeyError, IndexError) as error:
                raise Refused(415, "UnsupportedMediaType", str(error)) from error
        document = yaml.load(self.sent, yaml.CSafeLoader)
        if not isinstance(document, dict):
            raise Refused(400, "BadRequest", "not an object")
        return document

    def target(self) -> tuple[str, str, str | None, str | None]:
        """`apiVersion`, kind, namespace and name that the path is about."""
        parts = self.parts
        if parts[0] == "api":
            api, rest = parts[1], parts[2:]
        elif parts[0] == "apis" and len(parts) > 2:
            api, rest = "/".join(parts[1:3]), parts[3:]
        else:
            raise Refused(404, "NotFound", self.path)
        namespace = None
        if len(rest) > 2 and rest[0] == "namespaces":
            namespace, rest = rest[1], rest[2:]
        kind = self.store.resources.get(api, {}).get(rest[0] if rest else "")
        if kind is None:
            raise Refused(404, "NotFound", f"the server could not find {self.path}")
        return api, kind[0], namespace, rest[1] if len(rest) > 1 else None

    # --- discovery ---

    def read(self) -> tuple[int, dict]:
        parts = self.parts
        if parts == ["version"]:
            return 200, {"major": "1", "minor": "33", "gitVersion": "v1.33.0", "platform": "linux/amd64"}
        if parts == ["api"]:
            return 200, {"kind": "APIVersions", "versions": ["v1"]}
        if parts == ["apis"]:
            return 200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": self.groups()}
        if parts[:2] == ["openapi", "v3"]:
            return 200, self.openapi("/".join(parts[2:]))
        if parts in (["api", "v1"], ) or (parts[:1] == ["apis"] and len(parts) == 3):
            return 200, self.resource_list("/".join(parts[1:]))
        api, kind, namespace, name = self.target()
        if name is not None:
            return 200, self.store.with_status(self.store.get(api, kind, namespace, name))
        found = self.store.list(api, kind, namespace, self.query.get("labelSelector", ""))
        field = self.query.get("fieldSelector", "")
        if field.startswith("metadata.name="):
            found = [each for each in found if each["metadata"]["name"] == field.partition("=")[2]]
        return 200, {"kind": f"{kind}List", "apiVersion": api,
                     "metadata": {"resourceVersion": str(self.store.version)},
                     "items": [self.store.with_status(each) for each in found]}

    def groups(self) -> list[dict]:
        names = sorted({api.rpartition("/")[0] for api in self.store.resources} - {""})
        made = []
        for name in names:
            versions = [{"groupVersion": api, "version": api.rpartition("/")[2]}
                        for api in sorted(self.store.resources) if api.rpartition("/")[0] == name]
            versions.sort(key=lambda version: ("alpha" in version["version"], "beta" in version["version"]))
            made.append({"name": name, "versions": versions, "preferredVersion": versions[0]})
        return made

    def resource_list(self, api: str) -> dict:
        resources = [
            {"name": plural, "singularName": kind.lower(), "kind": kind, "namespaced": in_namespaces,
             "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"]}
            for plural, (kind, in_namespaces) in self.store.resources.get(api, {}).items()]
        if not resources:
            raise Refused(404, "NotFound", api)
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api, "resources": resources}

    def openapi(self, path: str) -> dict:
        def at(api: str) -> str:
            return f"api/{api}" if "/" not in api else f"apis/{api}"

        if not path:
            return {"paths": {at(api): {"serverRelativeURL": f"/openapi/v3/{at(api)}"}
                              for api in self.store.resources}}
        api = path.partition("/")[2]
        group, _, version = api.rpartition("/")
        # That it knows dry runs and strict fields is all that is asked.
        known = [{"name": name, "in": "query", "schema": {"type": "string"}}
                 for name in ("dryRun", "fieldValidation")]
        paths = {}
        for plural, (kind, in_namespaces) in self.store.resources.get(api, {}).items():
            middle = "namespaces/{namespace}/" if in_namespaces else ""
            paths[f"/{path}/{middle}{plural}/{{name}}"] = {"patch": {
                "parameters": known, "x-kubernetes-action": "patch",
                "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind}}}
        return {"openapi": "3.0.0", "info": {"title": "stand-in", "version": "1"}, "paths": paths,
                "components": {"schemas": {}}}

    # --- writing ---

    def is_dry(self) -> bool:
        return self.query.get("dryRun") == "All"

    def placed(self, document: dict, api: str, kind: str, namespace: str | None) -> dict:
        """An object at the place that the path says."""
        if (document.get("apiVersion"), document.get("kind")) != (api, kind):
            raise Refused(400, "BadRequest", "the object is of another kind than the path")
        metadata = document.setdefault("metadata", {})
        if metadata.get("namespace", namespace) != namespace:
            raise Refused(400, "BadRequest", "the object is of another namespace than the path")
        if namespace is not None:
            metadata["namespace"] = namespace
        metadata.pop("managedFields", None)
        document.pop("status", None)
        return document

    def create(self) -> tuple[int, dict]:
        api, kind, namespace, _ = self.target()
        document = self.placed(self.body(), api, kind, namespace)
        key = (api, kind, namespace, document["metadata"].get("name"))
        if key in self.store.objects:
            raise Refused(409, "AlreadyExists", f'{kind} "{key[3]}" already exists')
        return 201, self.store.with_status(self.store.put(document, self.is_dry()))

    def replace(self) -> tuple[int, dict]:
        api, kind, namespace, name = self.target()
        self.store.get(api, kind, namespace, name)
        return 200, self.store.put(self.placed(self.body(), api, kind, namespace), self.is_dry())

    def patch(self) -> tuple[int, dict]:
        api, kind, namespace, name = self.target()
        is_apply = self.headers.get("content-type", "").startswith("application/apply-patch")
        existing = self.store.objects.get((api, kind, namespace, name))
        if existing is None and not is_apply:
            self.store.get(api, kind, namespace, name)
        made = merge_patch(existing or {}, self.body())
        document = self.placed(made, api, kind, namespace)
        return 200 if existing else 201, self.store.with_status(self.store.put(document, self.is_dry()))

    def remove(self) -> tuple[int, dict]:
        api, kind, namespace, name = self.target()
        if self.is_dry():
            return 200, self.store.get(api, kind, namespace, name)
        return 200, self.store.delete(api, kind, namespace, name)

    def log_message(self, *_: object) -> None:
        pass


class ApiServer:
    """A stand-in that runs; a context manager."""

    def __init__(self, schemas: Schemas) -> None:
        self.store = Store(schemas)
        handler = type("BoundHandler", (Handler,), {"store": self.store})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True

    def __enter__(self) -> "ApiServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def kubeconfig(self) -> str:
        """A configuration for kubectl and Helm."""
        url = f"http://127.0.0.1:{self.server.server_address[1]}"
        return yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": url}}],
            "users": [{"name": "me", "user": {}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}]})
