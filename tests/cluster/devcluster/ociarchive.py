"""Image archives in OCI's format, written without any image program.

Owns the format, byte for byte reproducible: same files, same digest. Does not know what is in the layers.
"""

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
REFERENCE = "io.containerd.image.name"


def archive_of_program(reference: str, name: str, program: bytes) -> bytes:
    """Return an image archive whose only file is one static program, run as uid 65535 as upstream's pause is."""
    layer = tar({name: program}, mode=0o755)
    machine = platform.machine()
    config = canonical(
        {
            "architecture": ARCHITECTURES.get(machine, machine),
            "os": "linux",
            "config": {"Entrypoint": [f"/{name}"], "User": "65535:65535"},
            "rootfs": {"type": "layers", "diff_ids": [digest(layer)]},
            "history": [{"created_by": "gpumeter devcluster"}],
        }
    )
    manifest = canonical(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", config),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", layer)],
        }
    )
    index = canonical(index_of(reference, descriptor("application/vnd.oci.image.manifest.v1+json", manifest)))
    blobs = {f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}": blob for blob in (layer, config, manifest)}
    return tar({"oci-layout": OCI_LAYOUT, "index.json": index, **blobs}, mode=0o644)


def index_of(reference: str, manifest: Mapping[str, object]) -> dict[str, object]:
    return {"schemaVersion": 2, "manifests": [{**manifest, "annotations": {REFERENCE: reference}}]}


def descriptor(media_type: str, blob: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest(blob), "size": len(blob)}


def digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def tar(files: Mapping[str, bytes], mode: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in sorted(files.items()):
            archive.addfile(tar_header(name, len(content), mode), io.BytesIO(content))
    return buffer.getvalue()


def tar_header(name: str, size: int, mode: int = 0o644) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size = size
    header.mode = mode
    return header


OCI_LAYOUT = canonical({"imageLayoutVersion": "1.0.0"})
