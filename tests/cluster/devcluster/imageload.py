"""Brings an image from an OCI layout on disk into a node's containerd, sending only the layers that it lacks.

Owns the layout's reading and the transfer. Does not know how the image was built.
"""

import io
import json
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from devcluster import tools
from devcluster.errors import ClusterError
from devcluster.ociarchive import OCI_LAYOUT, canonical, index_of, tar_header

NAME = "org.opencontainers.image.ref.name"


def load(layout: Path, reference: str, socket: Path) -> int:
    """Import the image under its reference; returns how many bytes were new to the node."""
    ctr = [str(tools.folder_of(tools.CONTAINERD) / "ctr"), "-a", str(socket), "-n", "k8s.io"]
    manifest = find_manifest(layout, reference)
    if already_there(ctr, reference, manifest["digest"]):
        return 0
    there = set(output([*ctr, "content", "ls", "-q"]).split())
    needed = digests(layout, manifest)
    # Manifest and configuration always travel: they are small, and the importer reads them from the archive.
    missing = [digest for digest in needed if digest not in there or digest in needed[:2]]
    importer = subprocess.Popen(
        [*ctr, "images", "import", "--local", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if importer.stdin is None or importer.stdout is None:
        raise ClusterError("ctr was started without pipes.")
    try:
        write_archive(importer.stdin, layout, reference, manifest, missing)
        importer.stdin.close()
    except BrokenPipeError:
        pass  # its own words follow
    said = importer.stdout.read().decode(errors="replace")
    if importer.wait() != 0:
        raise ClusterError(f"containerd refused the image {reference}: {said.strip()}")
    return sum(blob(layout, digest).stat().st_size for digest in missing)


def already_there(ctr: list[str], reference: str, digest: str) -> bool:
    lines = output([*ctr, "images", "ls", f"name=={reference}"]).splitlines()[1:]
    return any(line.split()[0] == reference and digest in line for line in lines)


def write_archive(target: Any, layout: Path, reference: str, manifest: dict[str, Any], missing: Iterable[str]) -> None:
    with tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        described = {name: manifest[name] for name in ("mediaType", "digest", "size")}
        for name, content in (("oci-layout", OCI_LAYOUT), ("index.json", canonical(index_of(reference, described)))):
            archive.addfile(tar_header(name, len(content)), io.BytesIO(content))
        for digest in missing:
            with blob(layout, digest).open("rb") as file:
                size = blob(layout, digest).stat().st_size
                archive.addfile(tar_header(f"blobs/{digest.replace(':', '/')}", size), file)


def has(layout: Path, reference: str) -> bool:
    try:
        find_manifest(layout, reference)
    except ClusterError:
        return False
    return True


def find_manifest(layout: Path, reference: str) -> dict[str, Any]:
    """Find the image's manifest in the layout's index; the last one with the name is the newest."""
    try:
        manifests: list[dict[str, Any]] = json.loads((layout / "index.json").read_text())["manifests"]
    except (OSError, ValueError, KeyError):
        manifests = []
    named = [one for one in manifests if one.get("annotations", {}).get(NAME) == reference]
    if not named:
        raise ClusterError(f"The image {reference} is not in {layout}: build it with `devcluster images`.")
    return named[-1]


def digests(layout: Path, manifest: dict[str, Any]) -> list[str]:
    """Return manifest, configuration and layers, in this order, each once."""
    content = json.loads(blob(layout, manifest["digest"]).read_text())
    found = [manifest["digest"], content["config"]["digest"], *(layer["digest"] for layer in content["layers"])]
    return list(dict.fromkeys(found))


def sweep(layout: Path, reference: str) -> None:
    """Keep only what the image needs: older builds' layers are not asked for again."""
    manifest = find_manifest(layout, reference)
    index = json.loads((layout / "index.json").read_text())
    (layout / "index.json").write_text(json.dumps({**index, "manifests": [manifest]}))
    needed = {digest.partition(":")[2] for digest in digests(layout, manifest)}
    for file in (layout / "blobs/sha256").iterdir():
        if file.name not in needed:
            file.unlink()


def blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"The node's containerd does not answer: {done.stderr.strip()}")
    return done.stdout
