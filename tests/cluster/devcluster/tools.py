"""The programs of the cluster, each built once from a pinned Go module and kept in the cache.

Owns which module gives which program, the cache key and the build. Does not know how the programs are run.
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from devcluster.errors import ClusterError
from devcluster.layout import MODULES, cache_root
from devcluster.progress import Progress

VERSION_PACKAGE = "k8s.io/component-base/version"
BUILD_TIMEOUT_S = 3600
GO_NEEDED = (1, 21)
"""From 1.21 on, go fetches by itself the toolchain that a go.mod asks for."""


@dataclass(frozen=True)
class ToolSet:
    """Programs that are built together: a module's folder, a package pattern, and what comes out."""

    name: str
    module: str
    package: str
    programs: tuple[str, ...]


KUBERNETES = ToolSet(
    "kubernetes",
    "kubernetes",
    "tool",
    ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"),
)
KUBECTL = ToolSet("kubectl", "kubernetes", "k8s.io/kubernetes/cmd/kubectl", ("kubectl",))
ETCD = ToolSet("etcd", "etcd", "go.etcd.io/etcd/server/v3", ("etcd",))
CONTAINERD = ToolSet("containerd", "containerd", "tool", ("containerd", "containerd-shim-runc-v2", "ctr"))
COREDNS = ToolSet("coredns", "coredns", "tool", ("coredns",))
HELM = ToolSet("helm", "helm", "tool", ("helm",))
KIND = ToolSet("kind", "kind", "tool", ("kind",))
KWOK = ToolSet("kwok", "kwok", "tool", ("kwok",))
PAUSE = ToolSet("pause", "pause", ".", ("pause",))

FOR_NODE = (KUBERNETES, ETCD, CONTAINERD, COREDNS, PAUSE, HELM)
FOR_CONTROL_PLANE = (KUBERNETES, ETCD)
FOR_KIND = (KIND, KUBECTL, HELM)
FOR_CURRENT = (KUBECTL, HELM)


def ensure(tool_sets: tuple[ToolSet, ...], progress: Progress) -> dict[str, Path]:
    """Return the path of every program, building what the cache lacks."""
    found: dict[str, Path] = {}
    for tool_set in tool_sets:
        folder = folder_of(tool_set)
        if not is_built(tool_set, folder):
            build(tool_set, folder, progress)
        found.update({program: folder / program for program in tool_set.programs})
    return found


def tool(program: str, progress: Progress | None = None) -> Path:
    """Return the path of one program, e.g. "helm"; builds it when it is missing."""
    if program == "kubectl" and is_built(KUBERNETES, folder_of(KUBERNETES)):
        return folder_of(KUBERNETES) / "kubectl"
    for tool_set in (KUBECTL, HELM, ETCD, KIND, KWOK, COREDNS, CONTAINERD, KUBERNETES):
        if program in tool_set.programs:
            return ensure((tool_set,), progress or Progress())[program]
    raise ClusterError(f"No pinned module builds a program called '{program}'.")


def folder_of(tool_set: ToolSet) -> Path:
    return cache_root() / "tools" / f"{tool_set.name}-{key_of(tool_set, MODULES / tool_set.module)}"


def key_of(tool_set: ToolSet, module: Path) -> str:
    """Hash everything that the programs depend on: pinned versions, own sources, flags and the machine's kind."""
    digest = hashlib.sha256()
    for file in sorted([*module.glob("go.*"), *module.glob("*.go")]):
        digest.update(f"{file.name}\0".encode() + file.read_bytes() + b"\0")
    for part in (tool_set.package, *tool_set.programs, linker_flags(module), platform.machine()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def linker_flags(module: Path) -> str:
    """Strip symbols, and tell Kubernetes its own version, which its release builds do in the same way."""
    version = re.search(r"k8s\.io/kubernetes v((\d+)\.(\d+)\S*)", (module / "go.mod").read_text())
    if not version:
        return "-s -w"
    full, major, minor = version.groups()
    return (
        f"-s -w -X {VERSION_PACKAGE}.gitVersion=v{full}"
        f" -X {VERSION_PACKAGE}.gitMajor={major} -X {VERSION_PACKAGE}.gitMinor={minor}"
    )


def is_built(tool_set: ToolSet, folder: Path) -> bool:
    return all((folder / program).is_file() for program in tool_set.programs)


def build(tool_set: ToolSet, folder: Path, progress: Progress) -> None:
    """Build into a folder beside the final one and move it there whole, so that a cut-off build is never used."""
    go = find_go()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{tool_set.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with progress.step(f"waiting for another build of {tool_set.name}"):
                fcntl.flock(lock, fcntl.LOCK_EX)
            if is_built(tool_set, folder):
                return
        fresh = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        log = folder.with_name(f"{tool_set.name}.log")
        module = MODULES / tool_set.module
        target = fresh / tool_set.programs[0] if len(tool_set.programs) == 1 else f"{fresh}/"
        argv = [go, "build", "-v", "-ldflags", linker_flags(module), "-o", str(target), tool_set.package]

        def packages() -> str:
            return f"{log.read_text(errors='replace').count(chr(10))} packages, log {log}"

        with progress.step(f"building {', '.join(tool_set.programs)}", packages), log.open("wb") as output:
            done = subprocess.run(
                argv,
                cwd=module,
                env={**os.environ, "CGO_ENABLED": "0"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=BUILD_TIMEOUT_S,
                check=False,
            )
            if done.returncode != 0 or not is_built(tool_set, fresh):
                raise ClusterError(f"Building {tool_set.name} from its Go module failed.", log)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)


def find_go() -> str:
    candidates = [shutil.which("go"), "/usr/local/go/bin/go", "/usr/lib/go/bin/go"]
    for go in filter(None, candidates):
        if Path(go).exists() and parse_go_version(ask_go(go)) >= GO_NEEDED:
            return go
    raise ClusterError(
        f"Go {'.'.join(map(str, GO_NEEDED))} or newer is needed to build the cluster's programs and is not on PATH: "
        "install it (Debian 13: `apt-get install golang-go`), then run this again."
    )


def ask_go(go: str) -> str:
    return subprocess.run([go, "version"], capture_output=True, text=True, check=False).stdout


def parse_go_version(text: str) -> tuple[int, int]:
    match = re.search(r"go(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)
