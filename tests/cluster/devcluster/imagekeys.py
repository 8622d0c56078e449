"""What an image depends on, as one key: the same key means that nothing has to be built.

Owns the list of inputs and their hash. Builds nothing.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

IGNORED_FOLDERS = {"__pycache__", "build", "dist"}
IGNORED_SUFFIXES = (".pyc", ".egg-info")


@dataclass(frozen=True)
class Image:
    """One image of the project: its short name, and what names its Dockerfile, its requirements and its sources.

    An image that holds sources holds the distribution of that name and `usage`.
    """

    name: str
    distribution: str
    official_base: str
    base_argument: str = "BASE_IMAGE"
    holds_sources: bool = True

    @property
    def reference(self) -> str:
        return f"localhost/{self.name}:dev"

    @property
    def dockerfile(self) -> str:
        return f"Dockerfile.{self.distribution}"

    def inputs(self) -> tuple[str, ...]:
        """Return the files and folders that the Dockerfile copies, and itself."""
        sources = ("requirements/build.txt", "usage", self.distribution) if self.holds_sources else ()
        return (self.dockerfile, ".dockerignore", f"requirements/{self.distribution}.txt", *sources)


OPERATOR = Image("gpumeter-operator", "operator", "python:3.13-slim-trixie")
WORKER = Image("gpumeter-worker", "worker", "pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime")
IMAGES = (OPERATOR, WORKER)
DEVELOPMENT = Image(
    "gpumeter-development", "development", "gpumeter-worker", base_argument="WORKER_IMAGE", holds_sources=False
)
"""JupyterLab on the worker's image. Only who wants it waits for it."""


def key_of(image: Image, repository: Path, base: str) -> str:
    """Hash names, modes and contents of every input and the base; times do not count."""
    digest = hashlib.sha256(base.encode())
    for file in files(repository, image.inputs()):
        executable = bool(file.stat().st_mode & 0o100)
        digest.update(f"\0{file.relative_to(repository)}\0{executable}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:24]


def files(repository: Path, inputs: Iterable[str]) -> list[Path]:
    found: list[Path] = []
    for name in inputs:
        path = repository / name
        found += [path] if path.is_file() else [file for file in path.rglob("*") if counts(file, path)]
    return sorted(found)


def counts(file: Path, root: Path) -> bool:
    parts = file.relative_to(root).parts
    ignored = any(part in IGNORED_FOLDERS or part.endswith(IGNORED_SUFFIXES) for part in parts)
    return file.is_file() and not ignored
