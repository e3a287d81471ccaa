"""Writes the module as an OCI image, without a container engine.

    python3 scripts/oci_image.py MODULE LAYOUT --version 0.1.0 [--tag TAG] [--sbom FILE]
        [--source URL] [--revision COMMIT]
    python3 scripts/oci_image.py --extract LAYOUT TAG

The first makes the folder LAYOUT anew, an OCI image layout, and prints the
digest of the image's manifest; the image's title is the folder's name. The second
finds the module in a layout as Istio's agent does, checking every digest on
the way, and writes it to standard output.

The image is of the kind that the Wasm image specification calls *compat*: a
plain OCI image whose last layer is a `tar+gzip` with `plugin.wasm` in it. Istio's
agent and Envoy Gateway look for that kind first, and every registry and tool
for containers takes it. The other kind, *oci*, with media types of its own,
both take only when there are exactly two layers; nothing is gained by it.

The same module and version give the same bytes on every machine:

- the archive has one file, of no owner, no time and a fixed mode;
- it is not compressed: the gzip has stored blocks, since what a compressor makes
  of the same input depends on its version. A module of 1.4 MB is pulled once
  per gateway pod;
- the time of making is left out, unless SOURCE_DATE_EPOCH tells one;
- the commit is told beside the image (index and bill of materials), not in it: a
  digest that a commit pins in a manifest must not change with that commit.

A bill of materials (CycloneDX) becomes a second manifest whose `subject` is the
image, as registries' referrers API wants it. It has a tag as well, TAG-sbom, for
registries and tools that do not know of it.
"""

from __future__ import annotations

import argparse
import binascii
import datetime
import gzip
import hashlib
import io
import json
import os
import pathlib
import shutil
import struct
import sys
import tarfile

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
EMPTY = "application/vnd.oci.empty.v1+json"
SBOM = "application/vnd.cyclonedx+json"
# The name by which every host finds the module in the layer.
MODULE_NAME = "plugin.wasm"
MODULE_MAGIC = b"\0asm"
DESCRIPTION = "Proxy-wasm filter that routes LLM requests to the worker whose KV cache is warm"
LICENSE = "Apache-2.0"
# Most bytes of a stored block (RFC 1951, section 3.2.4).
STORED_MAX = 0xFFFF
# What a host would read at most; Envoy Gateway's limit.
MODULE_BYTES_MAX = 256 << 20
REF_NAME = "org.opencontainers.image.ref.name"


class Malformed(Exception):
    """A layout that does not hold what it says."""


def digest_of(data: bytes) -> str:
    """The digest of `data` as OCI writes it."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def stored_gzip(data: bytes) -> bytes:
    """`data` as gzip (RFC 1952) that any implementation reads and none varies."""
    out = bytearray(b"\x1f\x8b\x08\0\0\0\0\0\0\xff")
    blocks = range(0, len(data), STORED_MAX) or [0]
    for at in blocks:
        block = data[at:at + STORED_MAX]
        last = at + STORED_MAX >= len(data)
        out += struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF) + block
    return bytes(out + struct.pack("<II", binascii.crc32(data), len(data) & 0xFFFFFFFF))


def archive(module: bytes) -> bytes:
    """A tar with the module alone."""
    entry = tarfile.TarInfo(MODULE_NAME)
    entry.size, entry.mode, entry.mtime = len(module), 0o444, 0
    entry.uid = entry.gid = 0
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(entry, io.BytesIO(module))
    return out.getvalue()


class Layout:
    """An image layout that is being made: blobs by digest, and the index."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: list[dict] = []

    def blob(self, media_type: str, data: bytes) -> dict:
        """Keeps a blob and describes it."""
        digest = digest_of(data)
        self.blobs[digest] = data
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def json(self, media_type: str, value: dict) -> dict:
        """Keeps a JSON document, always in the same bytes."""
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
        return self.blob(media_type, text.encode())

    def write(self, folder: pathlib.Path) -> None:
        """Writes it beside, then puts it in the place of an older one."""
        new = folder.with_name(folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        (new / "blobs" / "sha256").mkdir(parents=True)
        for digest, data in self.blobs.items():
            (new / "blobs" / digest.replace(":", "/")).write_bytes(data)
        (new / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": self.manifests}
        (new / "index.json").write_text(json.dumps(index, sort_keys=True, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


def created() -> str | None:
    """The time of making, if SOURCE_DATE_EPOCH tells one."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    if not seconds:
        return None
    moment = datetime.datetime.fromtimestamp(int(seconds), datetime.timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def image(layout: Layout, module: bytes, annotations: dict[str, str]) -> dict:
    """Adds the image of the module; returns its descriptor."""
    tar = archive(module)
    layer = layout.blob(LAYER, stored_gzip(tar))
    time = annotations.get("org.opencontainers.image.created")
    config = {
        # Hosts of modules do not look at it; tools for containers know no other system.
        "architecture": "wasm",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [digest_of(tar)]},
        "history": [{"created_by": "scripts/oci_image.py", **({"created": time} if time else {})}],
        **({"created": time} if time else {}),
    }
    return layout.json(MANIFEST, {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": layout.json(CONFIG, config),
        "layers": [layer],
        "annotations": {"module.wasm.image/variant": "compat", **annotations},
    })


def bill(layout: Layout, sbom: bytes, subject: dict, annotations: dict[str, str]) -> dict:
    """Adds a bill of materials that refers to an image; returns its descriptor."""
    described = layout.json(MANIFEST, {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": SBOM,
        "config": layout.blob(EMPTY, b"{}"),
        "layers": [{
            **layout.blob(SBOM, sbom),
            "annotations": {"org.opencontainers.image.title": "sbom.cdx.json"},
        }],
        "subject": subject,
        "annotations": annotations,
    })
    return {**described, "artifactType": SBOM}


def build(module: bytes, version: str, tag: str, sbom: bytes | None = None,
          source: str | None = None, revision: str | None = None,
          title: str = "warmpath") -> tuple[Layout, str]:
    """The layout of a module, and its image's digest."""
    if not module.startswith(MODULE_MAGIC):
        raise Malformed("not a WebAssembly module")
    if len(module) > MODULE_BYTES_MAX:
        raise Malformed(f"a module of more than {MODULE_BYTES_MAX} bytes")
    annotations = {
        "org.opencontainers.image.title": title,
        "org.opencontainers.image.description": DESCRIPTION,
        "org.opencontainers.image.licenses": LICENSE,
        "org.opencontainers.image.version": version,
    }
    time = created()
    if source:
        annotations["org.opencontainers.image.source"] = source
    if time:
        annotations["org.opencontainers.image.created"] = time
    beside = {"org.opencontainers.image.revision": revision} if revision else {}
    layout = Layout()
    described = image(layout, module, annotations)
    layout.manifests.append({**described, "annotations": {REF_NAME: tag, **beside}})
    if sbom is not None:
        refers = bill(layout, sbom, described, {
            "org.opencontainers.image.title": f"bill of materials of {title}", **beside,
        })
        layout.manifests.append({**refers, "annotations": {REF_NAME: f"{tag}-sbom"}})
    return layout, described["digest"]


def read_blob(folder: pathlib.Path, descriptor: dict) -> bytes:
    """A blob of a layout, which must be what its descriptor says."""
    data = (folder / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes()
    if digest_of(data) != descriptor["digest"] or len(data) != descriptor["size"]:
        raise Malformed(f"blob {descriptor['digest']} is not what its descriptor says")
    return data


def extract(folder: pathlib.Path, tag: str) -> bytes:
    """The module in a layout, sought as Istio's agent seeks it."""
    index = json.loads((folder / "index.json").read_text())
    tagged = [
        each for each in index["manifests"] if each.get("annotations", {}).get(REF_NAME) == tag
    ]
    if len(tagged) != 1:
        raise Malformed(f"{len(tagged)} manifests have the tag {tag}")
    manifest = json.loads(read_blob(folder, tagged[0]))
    config = json.loads(read_blob(folder, manifest["config"]))
    last = manifest["layers"][-1]
    if last["mediaType"] != LAYER:
        raise Malformed(f"the last layer is {last['mediaType']}")
    tar = gzip.decompress(read_blob(folder, last))
    if digest_of(tar) != config["rootfs"]["diff_ids"][-1]:
        raise Malformed("the layer is not what the configuration says")
    with tarfile.open(fileobj=io.BytesIO(tar)) as entries:
        for entry in entries:
            if os.path.basename(entry.name) == MODULE_NAME:
                return entries.extractfile(entry).read()
    raise Malformed(f"no {MODULE_NAME} in the layer")


def main() -> int:
    parser = argparse.ArgumentParser(description="The module as an OCI image layout.")
    parser.add_argument("--extract", action="store_true")
    parser.add_argument("first", metavar="MODULE", help="or the layout, with --extract")
    parser.add_argument("second", metavar="LAYOUT", help="or the tag, with --extract")
    parser.add_argument("--version")
    parser.add_argument("--tag", help="the version unless given")
    parser.add_argument("--sbom", type=pathlib.Path)
    parser.add_argument("--source")
    parser.add_argument("--revision")
    options = parser.parse_args()
    try:
        if options.extract:
            sys.stdout.buffer.write(extract(pathlib.Path(options.first), options.second))
            return 0
        if not options.version:
            parser.error("--version is needed")
        layout, digest = build(
            pathlib.Path(options.first).read_bytes(), options.version,
            options.tag or options.version, options.sbom.read_bytes() if options.sbom else None,
            options.source, options.revision, pathlib.Path(options.second).name,
        )
        layout.write(pathlib.Path(options.second))
    except (Malformed, OSError, KeyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(digest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
