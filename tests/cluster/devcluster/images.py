"""Builds the project's images and brings them into a cluster; does nothing where nothing has changed.

Owns the order: base, build, load. Does not know how a base is made or how a program is called.
"""

import configparser
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from devcluster import backends, baseimages, imageload, kindnode, othernodes, packages
from devcluster.buildah import Buildah
from devcluster.errors import ClusterError
from devcluster.imagekeys import DEVELOPMENT, IMAGES, WORKER, Image, key_of
from devcluster.layout import REPOSITORY, ClusterPaths, cache_root, cluster_paths
from devcluster.progress import Progress
from devcluster.state import State, locked, read_state

PIP_SETTINGS = ("index-url", "extra-index-url", "find-links", "trusted-host", "timeout")
PIP_FILES = ("/etc/pip.conf", "~/.pip/pip.conf", "~/.config/pip/pip.conf")


@dataclass(frozen=True)
class Wish:
    """What `images` was asked for; `bases` by distribution, where one is named."""

    cluster: str
    bases: Mapping[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    development: bool = False

    def images(self) -> tuple[Image, ...]:
        """What is to be built, in this order: the development image is made of the worker's."""
        chosen = [image for image in IMAGES if not self.only or image.distribution in self.only]
        if not self.development:
            return tuple(chosen)
        return (*(image for image in chosen if image is not WORKER), WORKER, DEVELOPMENT)


def build_and_load(wish: Wish, progress: Progress) -> None:
    paths = cluster_paths(wish.cluster)
    state = read_state(paths.state)
    with_docker = (state.backend == backends.KIND) if state else backends.docker_works()
    with locked(cache_root() / "images" / ".lock", progress):
        for image in wish.images():
            if with_docker:
                build_with_docker(image, wish.bases.get(image.distribution), progress)
            else:
                build_with_buildah(image, wish.bases.get(image.distribution), progress)
            load(image, paths, state, progress)


def load(image: Image, paths: ClusterPaths, state: State | None, progress: Progress) -> None:
    if state is None or not state.ready:
        progress.say(f"{image.reference} is built; there is no cluster '{paths.name}' to load it into")
    elif state.backend == backends.CURRENT:
        raise ClusterError(
            f"{image.reference} is built, but the nodes of your own cluster cannot be reached from here: "
            "push it to a registry that they use."
        )
    elif state.backend == backends.KIND:
        with progress.step(f"loading {image.reference} into the cluster"):
            kindnode.load(paths, image.reference)
    else:
        with progress.step(f"loading {image.reference} into the cluster"):
            size = imageload.load(oci_folder(image), image.reference, paths.containerd_socket)
            for socket in othernodes.sockets(paths, state):
                imageload.load(oci_folder(image), image.reference, socket)
        progress.say(f"{image.reference}: {size // 1_000_000} MB were new to the node")


def build_with_buildah(image: Image, base: str | None, progress: Progress) -> None:
    """Build with buildah and write the result as an OCI layout; without a base of its own, make one."""
    folder = cache_root() / "images"
    packages.ensure(packages.FOR_IMAGES, progress, folder)
    buildah = Buildah(folder)
    if image is DEVELOPMENT:
        base = WORKER.reference
    base = base or baseimages.ensure(baseimages.BASES[image.distribution], buildah, progress)
    key = key_of(image, REPOSITORY, base_version(image, base, folder))
    if read_built(folder).get(image.name) == key and imageload.has(oci_folder(image), image.reference):
        progress.say(f"{image.reference} is up to date")
        return
    log = folder / f"{image.name}.log"
    log.write_bytes(b"")
    with progress.step(f"building {image.reference}", lambda: f"log {log}"), pip_configuration() as pip:
        arguments = ["-f", image.dockerfile, "--build-arg", f"{image.base_argument}={base}", "-t", image.reference]
        arguments += ["--secret", f"id=pip,src={pip}"]
        buildah.build(arguments, REPOSITORY, log, f"Building {image.reference} failed.")
    with progress.step(f"writing {image.reference}"):
        oci_folder(image).parent.mkdir(exist_ok=True)
        buildah.push_to_folder(image.reference, oci_folder(image), log)
        imageload.sweep(oci_folder(image), image.reference)
    write_built(folder, {**read_built(folder), image.name: key})


def build_with_docker(image: Image, base: str | None, progress: Progress) -> None:
    """Build with Docker, whose own cache decides what is to be done."""
    folder = cache_root() / "images"
    base = WORKER.reference if image is DEVELOPMENT else base or image.official_base
    key = key_of(image, REPOSITORY, base_version(image, base, folder))
    known = subprocess.run(["docker", "image", "inspect", image.reference], capture_output=True, check=False)
    if read_built(folder).get(image.name) == f"docker-{key}" and known.returncode == 0:
        progress.say(f"{image.reference} is up to date")
        return
    log = folder / f"{image.name}.log"
    step = progress.step(f"building {image.reference} on {base}", lambda: f"log {log}")
    with step, pip_configuration() as pip, log.open("wb") as output:
        command = ["docker", "build", "-f", image.dockerfile, "--build-arg", f"{image.base_argument}={base}"]
        command += ["--secret", f"id=pip,src={pip}", "-t", image.reference, "."]
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "DOCKER_BUILDKIT": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        )
        if done.returncode != 0:
            raise ClusterError(f"Building {image.reference} failed.", log)
    write_built(folder, {**read_built(folder), image.name: f"docker-{key}"})


def base_version(image: Image, base: str, folder: Path) -> str:
    """Return what changes when the base does: the worker's image keeps its name, so that is what it was built of."""
    return f"{base}@{read_built(folder)[WORKER.name]}" if image is DEVELOPMENT else base


def oci_folder(image: Image) -> Path:
    return cache_root() / "images" / "oci" / image.name


def read_built(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / "built.json").read_text()))
    except (OSError, ValueError):
        return {}


def write_built(folder: Path, built: dict[str, str]) -> None:
    (folder / "built.json").write_text(json.dumps(built, indent=1, sort_keys=True) + "\n")


@contextmanager
def pip_configuration() -> Iterator[str]:
    """Yield a file with this machine's pip settings, for the builds; it lives as long as the build."""
    files = [Path(name).expanduser() for name in PIP_FILES]
    texts = [file.read_text() for file in files if file.is_file()]
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write(merged_pip_settings(texts, os.environ))
        file.flush()
        yield file.name


def merged_pip_settings(texts: list[str], environment: Mapping[str, str]) -> str:
    """Merge as pip does: later files before earlier ones, the environment before all. Paths of this machine stay out,

    because they mean nothing inside a build.
    """
    settings: dict[str, str] = {}
    for text in texts:
        parser = configparser.RawConfigParser()
        parser.read_string(text)
        for section in ("global", "install"):
            if parser.has_section(section):
                settings.update(dict(parser.items(section)))
    for name in PIP_SETTINGS:
        value = environment.get(f"PIP_{name.upper().replace('-', '_')}")
        if value:
            settings[name] = value
    kept = {name: value for name, value in settings.items() if name in PIP_SETTINGS and not value.startswith("/")}
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in sorted(kept.items()))
