"""Schema: what an API server says of an object before it stores it.

The schemas of Kubernetes' own kinds are those that `kubernetes-validate`
carries; those of others are the CustomResourceDefinitions in crds/. An unknown
field is refused, where a server without strict validation would drop it; the
rules in CEL are evaluated, except those that call functions that only an API
server has, which are counted and named by `Schemas.skipped`.
"""

from __future__ import annotations

import copy
import json
import pathlib
import re
import urllib.parse

import cel
import jsonschema
import kubernetes_validate
import referencing
import referencing.jsonschema
import yaml

CRDS = pathlib.Path(__file__).resolve().parent / "crds"
CORE = pathlib.Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
# Versions of Kubernetes whose schemas count: the newest, and the oldest that we say we support
# with all that the chart can use.
VERSIONS = ("1.37.0", "1.33.0")

# Names, as the API server takes them: RFC 1123 subdomains and labels.
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
# Service names are older, and start with a letter.
SERVICE = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
QUALIFIED = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)")
VALUE = re.compile(r"(([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?)")

# Kinds of Kubernetes that we use: their plural and whether they are in namespaces.
CORE_KINDS = {
    ("v1", "ConfigMap"): ("configmaps", True), ("v1", "Namespace"): ("namespaces", False),
    ("v1", "PersistentVolumeClaim"): ("persistentvolumeclaims", True), ("v1", "Pod"): ("pods", True),
    ("v1", "Secret"): ("secrets", True), ("v1", "Service"): ("services", True),
    ("v1", "ServiceAccount"): ("serviceaccounts", True),
    ("apps/v1", "Deployment"): ("deployments", True), ("batch/v1", "Job"): ("jobs", True),
    ("networking.k8s.io/v1", "NetworkPolicy"): ("networkpolicies", True),
    ("policy/v1", "PodDisruptionBudget"): ("poddisruptionbudgets", True),
    ("rbac.authorization.k8s.io/v1", "Role"): ("roles", True),
    ("rbac.authorization.k8s.io/v1", "RoleBinding"): ("rolebindings", True),
}

# Functions that Kubernetes adds to CEL, as far as rules here call them.
FUNCTIONS = {
    "split": lambda text, separator: text.split(separator),
    "isURL": lambda text: bool(urllib.parse.urlsplit(text).scheme and urllib.parse.urlsplit(text).netloc),
    "url": lambda text: text,
    "getScheme": lambda text: urllib.parse.urlsplit(text).scheme,
}
# Those that are missing: their rules are not evaluated.
SERVER_ONLY = re.compile(r"\b(isIP|ip|isCIDR|cidr|quantity|format|oldSelf|optional)\b")


class Schemas:
    """Every kind that is known here."""

    def __init__(self) -> None:
        self.crds: dict[tuple[str, str], dict] = {}
        """CustomResourceDefinitions by `apiVersion` and `kind`."""
        self.skipped: set[str] = set()
        """Rules that were not evaluated."""
        self._validators: dict[tuple, jsonschema.Draft202012Validator] = {}
        self._rules: dict[str, object] = {}
        self._structure: dict[tuple[str, str], dict] = {}
        for path in sorted(CRDS.glob("*.yaml")):
            crd = yaml.load(path.read_text(), yaml.CSafeLoader)
            for version in crd["spec"]["versions"]:
                if version.get("served", True):
                    api = f"{crd['spec']['group']}/{version['name']}"
                    key = (api, crd["spec"]["names"]["kind"])
                    self.crds[key] = crd
                    self._structure[key] = version["schema"]["openAPIV3Schema"]

    def kinds(self) -> dict[tuple[str, str], tuple[str, bool]]:
        """Plural, and whether it is in namespaces, by `apiVersion` and `kind`."""
        own = {
            key: (crd["spec"]["names"]["plural"], crd["spec"]["scope"] == "Namespaced")
            for key, crd in self.crds.items()
        }
        return {**CORE_KINDS, **own}

    def structure(self, api: str, kind: str) -> dict | None:
        """The schema of a custom resource."""
        return self._structure.get((api, kind))

    def default(self, document: dict) -> dict:
        """The object with defaults filled in."""
        schema = self.structure(document.get("apiVersion", ""), document.get("kind", ""))
        filled = copy.deepcopy(document)
        if schema:
            fill(filled, schema)
        return filled

    def faults(self, document: object) -> list[str]:
        """Everything wrong with one object, each with its path."""
        if not isinstance(document, dict):
            return ["not an object"]
        api, kind = document.get("apiVersion"), document.get("kind")
        if not isinstance(api, str) or not isinstance(kind, str):
            return ["no apiVersion or no kind"]
        found = metadata_faults(document, self.kinds().get((api, kind)))
        if (api, kind) in CORE_KINDS:
            for version in VERSIONS:
                found += [f for f in self._core_faults(api, kind, version, document) if f not in found]
            return found + core_rules(document)
        structure = self.structure(api, kind)
        if structure is None:
            return [*found, f"no kind {kind} in {api}"]
        key = (api, kind)
        if key not in self._validators:
            self._validators[key] = validator(strict(structure), VERSIONS[0])
        body = {name: part for name, part in document.items() if name not in ("apiVersion", "kind", "metadata")}
        found += [words(error) for error in self._validators[key].iter_errors(body)]
        if not found:
            found += self._cel_faults(self.default(document), structure, "")
        return found

    def _core_faults(self, api: str, kind: str, version: str, document: dict) -> list[str]:
        group, _, short = api.rpartition("/")
        name = f"{kind.lower()}-{group.split('.')[0]}-{short}" if group else f"{kind.lower()}-{short}"
        key = (version, name)
        if key not in self._validators:
            self._validators[key] = validator({"$ref": f"{name}.json"}, version)
        return [words(error) for error in self._validators[key].iter_errors(document)]

    def _cel_faults(self, value: object, schema: dict, path: str) -> list[str]:
        found = []
        for rule in schema.get("x-kubernetes-validations", []):
            found += self._rule_faults(rule, value, path)
        if isinstance(value, dict):
            for name, part in value.items():
                inner = schema.get("properties", {}).get(name)
                if inner is None and isinstance(schema.get("additionalProperties"), dict):
                    inner = schema["additionalProperties"]
                if inner:
                    found += self._cel_faults(part, inner, f"{path}.{name}")
        elif isinstance(value, list) and isinstance(schema.get("items"), dict):
            for at, part in enumerate(value):
                found += self._cel_faults(part, schema["items"], f"{path}[{at}]")
        return found

    def _rule_faults(self, rule: dict, value: object, path: str) -> list[str]:
        text = rule["rule"]
        if SERVER_ONLY.search(text):
            self.skipped.add(text)
            return []
        try:
            if text not in self._rules:
                self._rules[text] = cel.compile(text)
            holds = self._rules[text].execute(cel.Context(variables={"self": value}, functions=FUNCTIONS))
        except Exception as error:  # noqa: BLE001 - the library has one class for all
            return [f"{path or 'object'}: rule {text!r} cannot be evaluated: {error}"]
        return [] if holds is True else [f"{path or 'object'}: {rule.get('message', text)}"]


def words(error: jsonschema.ValidationError) -> str:
    """A mistake with its path; of alternatives, the one that fits best."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
    return f"{path or 'object'}: {error.message[:300]}"


def validator(schema: dict, version: str) -> jsonschema.Draft202012Validator:
    """A validator that finds Kubernetes' own definitions by file name."""
    folder = CORE / f"v{version}-local-strict"

    def retrieve(uri: str) -> referencing.Resource:
        text = (folder / pathlib.PurePosixPath(uri).name).read_text()
        return referencing.jsonschema.DRAFT202012.create_resource(
            core_structure(json.loads(text)))

    registry = referencing.Registry(retrieve=retrieve)
    return jsonschema.Draft202012Validator(schema, registry=registry)


def core_structure(schema: dict) -> dict:
    """What is left to do to Kubernetes' definitions: a `$ref` stands alone in older drafts."""
    schema.pop("$schema", None)
    return schema


def strict(schema: object) -> object:
    """A structural schema as JSON schema that refuses unknown fields."""
    if not isinstance(schema, dict):
        return schema
    if "x-warmpath-kubernetes" in schema:
        return {"$ref": f"{schema['x-warmpath-kubernetes']}.json"}
    made = {}
    for name, part in schema.items():
        if name in ("properties", "patternProperties"):
            made[name] = {key: strict(value) for key, value in part.items()}
        elif name in ("items", "additionalProperties", "not") and isinstance(part, dict):
            made[name] = strict(part)
        elif name in ("allOf", "anyOf", "oneOf"):
            made[name] = [strict(value) for value in part]
        elif name == "nullable":
            continue
        elif name == "exclusiveMinimum" and part is True:
            continue
        elif name == "pattern":
            made[name] = part
        elif name == "type" and schema.get("nullable"):
            made[name] = [part, "null"]
        elif name in ("enum", "required", "type", "maximum", "minimum", "maxLength", "minLength",
                      "maxItems", "minItems", "maxProperties", "minProperties", "uniqueItems", "multipleOf"):
            made[name] = part
    is_map = "additionalProperties" in schema
    keeps = schema.get("x-kubernetes-preserve-unknown-fields")
    # Alternatives and negations name fields of the object around them: no structure.
    if schema.get("type") == "object" and "properties" in schema and not is_map and not keeps:
        made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    return made


def fill(value: object, schema: dict) -> None:
    """Fills defaults in, in place."""
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if name not in value and "default" in inner:
                value[name] = copy.deepcopy(inner["default"])
            if name in value:
                fill(value[name], inner)
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict):
            for name in value.keys() - schema.get("properties", {}).keys():
                fill(value[name], extra)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for part in value:
            fill(part, schema["items"])


def metadata_faults(document: dict, of_kind: tuple[str, bool] | None) -> list[str]:
    """Syntax of name, namespace, labels and annotations."""
    metadata = document.get("metadata")
    if not isinstance(metadata, dict):
        return ["no metadata"]
    name = metadata.get("name")
    form = SERVICE if document["kind"] == "Service" else SUBDOMAIN
    most = 63 if document["kind"] in ("Service", "Namespace") else 253
    found = []
    if not isinstance(name, str) or not form.fullmatch(name) or len(name) > most:
        found.append(f".metadata.name: not a name: {name!r}")
    namespace = metadata.get("namespace")
    if namespace is not None and (not LABEL.fullmatch(str(namespace)) or len(namespace) > 63):
        found.append(f".metadata.namespace: not a namespace: {namespace!r}")
    if namespace is not None and of_kind and not of_kind[1]:
        found.append(".metadata.namespace: the kind is in no namespace")
    for of in ("labels", "annotations"):
        for key, value in (metadata.get(of) or {}).items():
            found += [f".metadata.{of}: {why}" for why in pair_faults(key, value, of == "labels")]
    return found


def pair_faults(key: str, value: object, is_label: bool) -> list[str]:
    """What is wrong with a label or an annotation."""
    prefix, slash, word = key.rpartition("/")
    found = []
    if not QUALIFIED.fullmatch(word) or len(word) > 63:
        found.append(f"not a key: {key!r}")
    if slash and (not SUBDOMAIN.fullmatch(prefix) or len(prefix) > 253):
        found.append(f"not a prefix: {key!r}")
    if not isinstance(value, str):
        found.append(f"{key}: not a string: {value!r}")
    elif is_label and (not VALUE.fullmatch(value) or len(value) > 63):
        found.append(f"{key}: not a label's value: {value!r}")
    return found


def core_rules(document: dict) -> list[str]:
    """Rules of Kubernetes' own kinds that are not in their schemas."""
    spec = document.get("spec") or {}
    found = []
    if document["kind"] in ("Deployment", "Job"):
        template = spec.get("template") or {}
        labels = (template.get("metadata") or {}).get("labels") or {}
        wanted = (spec.get("selector") or {}).get("matchLabels") or {}
        if not wanted.items() <= labels.items():
            found.append(".spec.selector: does not match the template's labels")
        for key, value in labels.items():
            found += [f".spec.template.metadata.labels: {why}" for why in pair_faults(key, value, True)]
        found += pod_faults(template.get("spec") or {})
    if document["kind"] == "Service":
        ports = spec.get("ports") or []
        names = [port.get("name") for port in ports]
        if len(ports) > 1 and (None in names or len(set(names)) < len(names)):
            found.append(".spec.ports: several ports need names, each its own")
    return found


def pod_faults(spec: dict) -> list[str]:
    """Volumes that are mounted are there; ports that probes name are, too."""
    found = []
    volumes = [volume["name"] for volume in spec.get("volumes", [])]
    if len(set(volumes)) < len(volumes):
        found.append("volumes: a name twice")
    for container in spec.get("containers", []) + spec.get("initContainers", []):
        name = container.get("name")
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                found.append(f"container {name}: mounts {mount['name']}, which is no volume")
        ports = {port.get("name"): port for port in container.get("ports", [])}
        for port in filter(None, ports):
            if not PORT_NAME.fullmatch(port) or len(port) > 15:
                found.append(f"container {name}: not a port's name: {port!r}")
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            port = (container.get(probe) or {}).get("httpGet", {}).get("port")
            if isinstance(port, str) and port not in ports:
                found.append(f"container {name}: {probe} names port {port}, which it has not")
    return found
