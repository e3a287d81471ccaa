"""Tests of the module's image and of the bills of materials.

    python3 scripts/test_image.py

The module must have been built, and skopeo, umoci, a registry and CycloneDX' own
schemas be there (`make setup`). `scripts/image.sh` is run twice; the tools of others
must find the same module, and each fault that the checks are there to find is
shown to them. The last line is `N passed, N failed`.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import unittest
import urllib.request
import zlib
from unittest import mock

import oci_image
import sbom
from ports import free_port
from test_scripts import Count

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULE = ROOT / "target" / "warmpath.wasm"
LAYOUT = ROOT / "target" / "image" / "warmpath"
SMALL = b"\0asm\1\0\0\0" + bytes(range(256)) * 600


def run(*command: str, **options) -> str:
    """What a command prints; it must succeed."""
    return subprocess.run(
        [str(word) for word in command], cwd=ROOT, check=True, stdout=subprocess.PIPE,
        text=True, **options,
    ).stdout


def linked(command: list[str], program: str) -> set[str]:
    """Crates that cargo's own plan of a build links into a program."""
    plan = json.loads(run(
        *command, "--unit-graph", "-Z", "unstable-options",
        env={**os.environ, "RUSTC_BOOTSTRAP": "1"}))
    units = plan["units"]
    left = [root for root in plan["roots"] if units[root]["target"]["name"] == program]
    crates, seen = set(), set()
    while left:
        number = left.pop()
        unit = units[number]
        if number in seen or sbom.NOT_LINKED & set(unit["target"]["kind"]):
            continue
        seen.add(number)
        # `SOURCE#NAME@VERSION`, or `SOURCE/NAME#VERSION` of a folder.
        source, _, named = unit["pkg_id"].rpartition("#")
        name, _, version = named.rpartition("@")
        crates.add(f"{name or source.rpartition('/')[2]}@{version}")
        left += [dependency["index"] for dependency in unit["dependencies"]]
    return crates


class Image(unittest.TestCase):
    """Goal: the module's bytes and the version decide the digest, nothing else does."""

    def digest(self, module=SMALL, version="1.0.0", **options) -> str:
        return oci_image.build(module, version, "t", **options)[1]

    def test_the_same_twice_and_another_for_another_byte(self):
        self.assertEqual(self.digest(), self.digest())
        changed = bytearray(SMALL)
        changed[1000] ^= 1
        self.assertNotEqual(self.digest(), self.digest(bytes(changed)))
        self.assertNotEqual(self.digest(), self.digest(version="1.0.1"))
        self.assertNotEqual(self.digest(), self.digest(source="https://example.com/warmpath"))

    def test_neither_commit_nor_bill_change_the_image(self):
        self.assertEqual(self.digest(), self.digest(revision="a" * 40, sbom=b"{}"))

    def test_a_time_is_told_only_if_asked(self):
        timeless = oci_image.build(SMALL, "1", "1")[0].blobs.values()
        self.assertFalse(any(b'created"' in blob for blob in timeless))
        with mock.patch.dict(os.environ, {"SOURCE_DATE_EPOCH": "86400"}):
            layout, digest = oci_image.build(SMALL, "1", "1")
            self.assertIn(b'"1970-01-02T00:00:00Z"', layout.blobs[digest])
            self.assertEqual(digest, oci_image.build(SMALL, "1", "1")[1])

    def test_what_is_no_module_is_refused(self):
        with self.assertRaises(oci_image.Malformed):
            oci_image.build(b"MZ", "1", "1")

    def test_gzip_is_read_by_others(self):
        for length in [0, 1, 0xFFFE, 0xFFFF, 0x10000, 3 * 0xFFFF, 200_000]:
            data = (b"module " * 30_000)[:length]
            packed = oci_image.stored_gzip(data)
            self.assertEqual(gzip.decompress(packed), data)
            self.assertEqual(zlib.decompress(packed, 31), data)

    def test_the_layer_tells_nothing_of_the_machine(self):
        with tarfile.open(fileobj=io.BytesIO(oci_image.archive(SMALL))) as tar:
            entries = tar.getmembers()
        self.assertEqual([entry.name for entry in entries], ["plugin.wasm"])
        entry = entries[0]
        self.assertEqual((entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname, entry.mode),
                         (0, 0, 0, "", "", 0o444))

    def test_damage_is_seen(self):
        with tempfile.TemporaryDirectory() as folder:
            layout = pathlib.Path(folder) / "layout"
            made, _ = oci_image.build(SMALL, "1", "t")
            made.write(layout)
            self.assertEqual(oci_image.extract(layout, "t"), SMALL)
            with self.assertRaises(oci_image.Malformed):
                oci_image.extract(layout, "other")
            blobs = list((layout / "blobs" / "sha256").iterdir())
            self.assertEqual(len(blobs), 3)
            for blob in blobs:
                good = blob.read_bytes()
                blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
                with self.assertRaises(oci_image.Malformed):
                    oci_image.extract(layout, "t")
                blob.write_bytes(good)

    def test_the_bill_refers_to_the_image(self):
        layout, digest = oci_image.build(SMALL, "1", "t", sbom=b'{"a": 1}')
        described = layout.manifests[1]
        manifest = json.loads(layout.blobs[described["digest"]])
        self.assertEqual(manifest["subject"], {
            key: layout.manifests[0][key] for key in ("mediaType", "digest", "size")})
        self.assertEqual(manifest["subject"]["digest"], digest)
        self.assertEqual(layout.blobs[manifest["layers"][0]["digest"]], b'{"a": 1}')
        self.assertEqual(manifest["artifactType"], "application/vnd.cyclonedx+json")


class Made(unittest.TestCase):
    """Goal: what `make image` leaves is what others find in it."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        # A commit in between would tell another revision beside the image.
        cls.printed, cls.files = [], []
        for _ in range(2):
            cls.printed.append(run("scripts/image.sh").splitlines()[-1])
            cls.files.append({
                path.relative_to(LAYOUT): path.read_bytes()
                for path in sorted(LAYOUT.rglob("*")) if path.is_file()
            })
        cls.name, cls.digest = cls.printed[0].split()

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def test_twice_the_same_digest(self):
        self.assertEqual(self.printed[0], self.printed[1])
        self.assertRegex(self.digest, r"^sha256:[0-9a-f]{64}$")

    def test_twice_the_same_bytes(self):
        self.assertEqual(self.files[0], self.files[1])

    def test_skopeo_finds_it(self):
        seen = json.loads(run("skopeo", "inspect", f"oci:{self.name}"))
        self.assertEqual(seen["Digest"], self.digest)
        self.assertEqual(len(seen["Layers"]), 1)
        copied = pathlib.Path(self.folder.name) / "copied"
        run("skopeo", "copy", "--quiet", f"oci:{self.name}", f"dir:{copied}")
        manifest = json.loads((copied / "manifest.json").read_text())
        layer = (copied / manifest["layers"][0]["digest"].partition(":")[2]).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(layer), mode="r:gz") as tar:
            self.assertEqual(tar.extractfile("plugin.wasm").read(), MODULE.read_bytes())
        # A copy has the digest that manifests pin.
        again = pathlib.Path(self.folder.name) / "again"
        run("skopeo", "copy", "--quiet", f"oci:{self.name}", f"oci:{again}:x")
        self.assertEqual(
            json.loads(run("skopeo", "inspect", f"oci:{again}:x"))["Digest"], self.digest)

    def test_umoci_unpacks_it(self):
        bundle = pathlib.Path(self.folder.name) / "bundle"
        run("umoci", "--log", "error", "unpack", "--rootless", "--image", self.name, bundle)
        files = [path for path in (bundle / "rootfs").rglob("*") if path.is_file()]
        self.assertEqual([path.name for path in files], ["plugin.wasm"])
        self.assertEqual(files[0].read_bytes(), MODULE.read_bytes())

    def test_another_byte_gives_another_digest(self):
        module = bytearray(MODULE.read_bytes())
        module[-1] ^= 1
        other = pathlib.Path(self.folder.name) / "other.wasm"
        other.write_bytes(module)
        version = self.name.rpartition(":")[2]
        digests = [
            run(sys.executable, "scripts/oci_image.py", path,
                pathlib.Path(self.folder.name) / "warmpath", "--version", version).strip()
            for path in (MODULE, other)
        ]
        self.assertEqual(digests[0], self.digest)
        self.assertNotEqual(digests[1], self.digest)

    def test_the_bill_is_in_it_and_names_this_module(self):
        index = json.loads((LAYOUT / "index.json").read_text())
        manifest = json.loads(oci_image.read_blob(LAYOUT, index["manifests"][1]))
        bill = json.loads(oci_image.read_blob(LAYOUT, manifest["layers"][0]))
        self.assertEqual(manifest["subject"]["digest"], self.digest)
        hashes = bill["metadata"]["component"]["hashes"]
        self.assertEqual(hashes[0]["content"], run("sha256sum", MODULE).split()[0])

    def test_the_bills_keep_to_the_schema(self):
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
        validator = JsonStrictValidator(SchemaVersion.V1_6)
        for name in ("warmpath", "warmpath-sidecar"):
            text = (ROOT / f"target/image/{name}.cdx.json").read_text()
            self.assertIsNone(validator.validate_str(text), name)
            self.assertNotIn(str(ROOT), text)
            document = json.loads(text)
            document["components"][0]["licences"] = []
            self.assertIsNotNone(validator.validate_str(json.dumps(document)))

    def test_the_sidecars_bill_is_what_its_image_links(self):
        dockerfile = (ROOT / "envoy-config" / "Dockerfile").read_text()
        command = re.search(r"cargo build [^\\\n]*--package warmpath-sidecar\b[^\\\n]*", dockerfile)
        bill = json.loads((ROOT / "target/image/warmpath-sidecar.cdx.json").read_text())
        listed = {each["bom-ref"] for each in bill["components"]} - {sbom.STANDARD_LIBRARY}
        own = bill["metadata"]["component"]["bom-ref"]
        self.assertEqual(linked(command[0].split(), "warmpath-sidecar"), listed | {own})
        # Together with the simulator it would be others.
        both = ["cargo", "build", "--release", "--locked", "--bin", "warmpath-sidecar",
                "--bin", "engine-sim"]
        self.assertNotEqual(linked(both, "warmpath-sidecar"), listed | {own})

    def test_macros_and_other_programs_are_in_no_bill(self):
        for name in ("warmpath", "warmpath-sidecar"):
            bill = json.loads((ROOT / f"target/image/{name}.cdx.json").read_text())
            listed = {each["name"] for each in bill["components"]}
            self.assertIn("warmpath-core", listed)
            self.assertFalse(listed & {"serde_derive", "syn", "proptest", "warmpath-tests"})


class Pushed(unittest.TestCase):
    """Goal: what a registry gives out is the module, under the digest that was printed."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.address = f"127.0.0.1:{free_port()}"
        config = pathlib.Path(cls.folder.name) / "config.yaml"
        config.write_text(json.dumps({
            "version": 0.1, "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": cls.folder.name}},
            "http": {"addr": cls.address}}))
        cls.process = subprocess.Popen(
            ["docker-registry", "serve", config], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                cls.get("/v2/")
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    @classmethod
    def tearDownClass(cls):
        cls.process.terminate()
        cls.process.wait()
        cls.folder.cleanup()

    @classmethod
    def get(cls, path: str):
        request = urllib.request.Request(
            f"http://{cls.address}{path}", headers={"accept": oci_image.MANIFEST})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read(), answer.headers

    def push(self, name: str, tag: str) -> None:
        run("skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{name}",
            f"docker://{self.address}/warmpath:{tag}")

    def test_the_module_comes_back_under_its_digest(self):
        name, digest = run("scripts/image.sh").splitlines()[-1].split()
        self.push(name, "pushed")
        text, headers = self.get("/v2/warmpath/manifests/pushed")
        self.assertEqual(headers["docker-content-digest"], digest)
        self.assertEqual(oci_image.digest_of(text), digest)
        # Pinned by digest, as manifests of Kubernetes do, it is the same.
        self.assertEqual(self.get(f"/v2/warmpath/manifests/{digest}")[0], text)
        # As Istio's agent looks for it: the last layer, of this media type.
        layer = json.loads(text)["layers"][-1]
        self.assertEqual(layer["mediaType"], "application/vnd.oci.image.layer.v1.tar+gzip")
        blob, _ = self.get(f"/v2/warmpath/blobs/{layer['digest']}")
        with tarfile.open(fileobj=io.BytesIO(blob), mode="r:gz") as tar:
            self.assertEqual(tar.extractfile("plugin.wasm").read(), MODULE.read_bytes())

    def test_the_bill_comes_back(self):
        name, digest = run("scripts/image.sh").splitlines()[-1].split()
        self.push(name, "pushed")
        self.push(f"{name}-sbom", "pushed-sbom")
        manifest = json.loads(self.get("/v2/warmpath/manifests/pushed-sbom")[0])
        self.assertEqual(manifest["subject"]["digest"], digest)
        blob, _ = self.get(f"/v2/warmpath/blobs/{manifest['layers'][0]['digest']}")
        self.assertEqual(blob, (ROOT / "target/image/warmpath.cdx.json").read_bytes())


class Bill(unittest.TestCase):
    """Goal: a crate too many or too few is found."""

    TREE = ("0 warmpath-filter v0.1.0 (/x/filter)|Apache-2.0\n1 a v1.0.0|MIT/Apache-2.0\n"
            "2 b v2.0.0+zstd.1|MIT\n1 c v3.0.0|ISC\n2 a v1.0.0|MIT/Apache-2.0 (*)\n")
    LOCK = {
        ("warmpath-filter", "0.1.0"): {},
        **{(name, version): {"source": sbom.REGISTRY, "checksum": "0" * 64}
           for name, version in [("a", "1.0.0"), ("b", "2.0.0+zstd.1"), ("c", "3.0.0"),
                                 ("d", "4.0.0")]},
    }

    def bill(self, tree=TREE, lock=LOCK) -> dict:
        return sbom.bill(sbom.PROGRAMS["module"], tree, lock, "1.95.0", None)

    def test_what_the_tree_says(self):
        bill = self.bill()
        names = [each["bom-ref"] for each in bill["components"]]
        self.assertEqual(names, ["a@1.0.0", "b@2.0.0+zstd.1", "c@3.0.0", "rust-standard-library"])
        self.assertEqual(bill["components"][0]["licenses"], [{"expression": "MIT OR Apache-2.0"}])
        self.assertEqual(bill["components"][1]["purl"], "pkg:cargo/b@2.0.0%2Bzstd.1")
        edges = {each["ref"]: each.get("dependsOn") for each in bill["dependencies"]}
        self.assertEqual(edges["c@3.0.0"], ["a@1.0.0", "rust-standard-library"])
        self.assertEqual(edges["a@1.0.0"], ["b@2.0.0+zstd.1", "rust-standard-library"])
        self.assertEqual(bill, self.bill())

    def test_what_cannot_be_told_is_refused(self):
        for tree, lock in [
            (self.TREE + "1 e v1.0.0|MIT\n", self.LOCK),
            (self.TREE + "1 d v4.0.0|\n", self.LOCK),
            (self.TREE + "?\n", self.LOCK),
            ("1 a v1.0.0|MIT\n", self.LOCK),
            (self.TREE, {**self.LOCK, ("c", "3.0.0"): {"source": "git+https://example.com"}}),
        ]:
            with self.assertRaises(sbom.Wrong):
                self.bill(tree, lock)

    def test_differences_to_what_was_built(self):
        built = {("warmpath-filter", "0.1.0", False), ("a", "1.0.0", False),
                 ("b", "2.0.0+zstd.1", False), ("c", "3.0.0", False), ("core", "0.0.0", True),
                 ("std-only", "1.0.0", False)}
        standard = {("std-only", "1.0.0")}
        self.assertEqual(sbom.differences(self.bill(), built, standard), [])
        more = built | {("d", "4.0.0", False)}
        self.assertEqual(sbom.differences(self.bill(), more, standard),
                         ["built and not in the bill: d@4.0.0"])
        less = built - {("c", "3.0.0", False)}
        self.assertEqual(sbom.differences(self.bill(), less, standard),
                         ["in the bill and not built: c@3.0.0"])

    def test_what_cargo_says_it_built(self):
        def message(package: str, kind="lib", folder="wasm-target") -> str:
            return json.dumps({
                "reason": "compiler-artifact", "package_id": package, "target": {"kind": [kind]},
                "filenames": [f"/x/{folder}/wasm/deps/y.rlib"]})
        messages = "\n".join([
            message("registry+https://x#a@1.0.0"),
            message("registry+https://x#syn@2.0.0", folder="release"),
            message("registry+https://x#serde_derive@1.0.0", kind="proc-macro"),
            message("path+file:///t/lib/rustlib/src/rust/library/core#0.0.0"),
            message("path+file:///x/filter#warmpath-filter@0.1.0", kind="cdylib"),
            '{"reason": "build-finished", "success": true}',
        ])
        self.assertEqual(sbom.built(messages), {
            ("a", "1.0.0", False), ("core", "0.0.0", True), ("warmpath-filter", "0.1.0", False)})


if __name__ == "__main__":
    runner = unittest.TextTestRunner(stream=sys.stdout, resultclass=Count, verbosity=2)
    result = runner.run(unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"]))
    failed = len(result.failures) + len(result.errors)
    print(f"{result.passed} passed, {failed} failed")
    sys.exit(1 if failed or not result.passed else 0)
