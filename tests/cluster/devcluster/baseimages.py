"""Base images where none can be pulled: Debian with python3, and with python3-torch, made by mmdebstrap.

Owns their recipe and where they are kept. Does not know what is built on them.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from devcluster import packages
from devcluster.buildah import Buildah
from devcluster.errors import ClusterError
from devcluster.layout import cache_root
from devcluster.progress import Progress

SUITE = "trixie"
PLAIN = ("python3", "python3-pip", "ca-certificates")
EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/include/*")
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
SOURCE_FOLDERS = ("/etc/apt/sources.list", "/etc/apt/sources.list.d")


@dataclass(frozen=True)
class Base:
    """One base image: its short name and the Debian packages in it."""

    name: str
    packages: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Where this machine gets Debian's packages from, and the keyring that it trusts for them ('' is apt's own)."""

    uri: str
    keyring: str


BASES = {
    "operator": Base("gpumeter-base-python", PLAIN),
    "worker": Base("gpumeter-base-torch", (*PLAIN, "python3-torch")),
}


def ensure(base: Base, buildah: Buildah, progress: Progress) -> str:
    """Return the reference of the base image, making it when it is missing or its recipe has changed."""
    bundle = machine_bundle()
    key = recipe_key(base, bundle.read_bytes() if bundle else b"")
    reference = f"localhost/{base.name}:{key}"
    if buildah.has(reference):
        return reference
    folder = cache_root() / "images"
    packages.ensure(packages.FOR_BASE_IMAGES, progress, folder)
    log = folder / f"{base.name}.log"
    tar = folder / f".{base.name}.tar"
    with progress.step(f"base image {base.name}: Debian {SUITE} with {', '.join(base.packages)}", lambda: f"log {log}"):
        try:
            bootstrap(base, find_source(), tar, log)
            buildah.commit_tar(tar, reference, bundle, BUNDLE, log)
        finally:
            tar.unlink(missing_ok=True)
    return reference


def recipe_key(base: Base, bundle: bytes) -> str:
    digest = hashlib.sha256(bundle)
    for part in (SUITE, *base.packages, *EXCLUDED, "1"):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:12]


def bootstrap(base: Base, source: Source, tar: Path, log: Path) -> None:
    signed = f"[signed-by={source.keyring}] " if source.keyring else ""
    command = [
        "mmdebstrap", "--variant=apt", "--mode=root", f"--include={','.join(base.packages)}",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED),
        "--customize-hook=rm -rf $1/var/lib/apt/lists/* $1/var/cache/apt/*",
        SUITE, str(tar), f"deb {signed}{source.uri} {SUITE} main",
    ]  # fmt: skip
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{packages.SYSTEM_PATH}"}
    with log.open("wb") as output:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, check=False
        )
    if done.returncode != 0:
        raise ClusterError(f"mmdebstrap could not make the base image {base.name}.", log)


def machine_bundle() -> Path | None:
    """Return the CA bundle that this machine trusts: a base image must trust it too, or pip fails while building."""
    named = os.environ.get("SSL_CERT_FILE", "")
    return next((path for path in map(Path, filter(None, (named, BUNDLE))) if path.is_file()), None)


def find_source() -> Source:
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    codename = release.get("VERSION_CODENAME", "").strip('"')
    texts = [(path.suffix, path.read_text()) for path in source_files() if os.access(path, os.R_OK)]
    for suffix, text in texts:
        found = parse_deb822(text, codename) if suffix == ".sources" else parse_one_line(text, codename)
        if found and release.get("ID", "").strip('"') == "debian":
            return found
    raise ClusterError(
        "Base images are made from Debian's packages, and this machine's apt has no Debian archive configured: "
        "name base images with --operator-base and --worker-base."
    )


def source_files() -> Iterable[Path]:
    for place in map(Path, SOURCE_FOLDERS):
        if place.is_file():
            yield place
        elif place.is_dir():
            yield from sorted(place.iterdir())


def parse_deb822(text: str, codename: str) -> Source | None:
    """Find the stanza that serves this release's `main`: its archive serves the other releases, too."""
    for stanza in text.split("\n\n"):
        lines = [line for line in stanza.splitlines() if not line.startswith("#")]
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        words = {name: fields.get(name, "").split() for name in ("types", "suites", "components", "uris")}
        if "deb" in words["types"] and codename in words["suites"] and "main" in words["components"]:
            return Source(words["uris"][0], fields.get("signed-by", ""))
    return None


def parse_one_line(text: str, codename: str) -> Source | None:
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words or words[0] != "deb":
            continue
        options = ""
        if words[1:] and words[1].startswith("["):
            end = next(index for index, word in enumerate(words) if word.endswith("]"))
            options = " ".join(words[1 : end + 1]).strip("[]")
            words = [words[0], *words[end + 1 :]]
        if len(words) > 3 and words[2] == codename and "main" in words[3:]:
            signed = [option.split("=", 1)[1] for option in options.split() if option.startswith("signed-by=")]
            return Source(words[1], signed[0] if signed else "")
    return None


def is_possible() -> bool:
    return shutil.which("apt-get") is not None
