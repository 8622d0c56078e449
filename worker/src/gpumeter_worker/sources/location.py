"""Reads spec.model.uri: a directory that is here already, or a source that must be asked.

Owns the schemes and what is said about the others. Asks nobody and imports no source's library.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gpumeter_worker.failure import MODEL_SOURCE_UNSUPPORTED, StartupFailed
from gpumeter_worker.sources.remote import Remote

FETCHED = ("hf", "s3", "oci")
_ON = ("1", "true", "yes", "on")


@dataclass(frozen=True, slots=True)
class Location:
    """A model that must be fetched."""

    uri: str
    revision: str
    allow_pickle: bool


def local_path(uri: str) -> Path | None:
    """The directory that a uri names, or None when it must be fetched first. Raises StartupFailed."""
    parts = urlsplit(uri)
    if parts.scheme in FETCHED:
        return None
    match parts.scheme:
        case "file" if parts.netloc in ("", "localhost"):
            return Path(unquote(parts.path))
        case "file":
            told = f"{uri} names the host {parts.netloc}; write file:///path/to/model"
        case "pvc":
            told = f"{uri} is mounted by the operator, which then says file://; by hand, write file:///path/to/model"
        case "":
            told = f"{uri} is a path without a scheme; write file:///path/to/model"
        case scheme:
            told = f"{scheme}:// is not a model source ({uri}); use hf://, s3://, oci://, pvc:// or file://"
    raise StartupFailed(MODEL_SOURCE_UNSUPPORTED, told)


def remote(location: Location, environment: Mapping[str, str]) -> Remote:
    """The source to ask, set up from the environment that its own tools read. Raises StartupFailed."""
    # Each library takes up to a second to import, and a worker needs one of them or none.
    scheme = urlsplit(location.uri).scheme
    if scheme == "hf":
        from gpumeter_worker.sources.hub import Hub  # noqa: PLC0415

        return Hub(location, offline=environment.get("HF_HUB_OFFLINE", "").lower() in _ON, environment=environment)
    if scheme == "s3":
        from gpumeter_worker.sources.s3 import Bucket  # noqa: PLC0415

        return Bucket(location, environment)
    if scheme == "oci":
        from gpumeter_worker.sources.oci import Registry  # noqa: PLC0415

        return Registry(location, environment)
    raise StartupFailed(MODEL_SOURCE_UNSUPPORTED, f"{location.uri} is not fetched from anywhere")
