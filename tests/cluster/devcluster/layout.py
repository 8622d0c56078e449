"""Where everything lies: caches, clusters, logs, sockets.

Owns the names of folders and files. Creates nothing and knows no process.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from devcluster.errors import ClusterError

NAME = re.compile(r"[a-z]([a-z0-9-]{0,28}[a-z0-9])?")
"""Short, because the name is part of socket paths (108 bytes at most) and of a host name."""

REPOSITORY = Path(__file__).resolve().parents[3]
MODULES = Path(__file__).resolve().parents[1] / "modules"


def cache_root(environment: dict[str, str] | None = None) -> Path:
    """$GPUMETER_CACHE, or ~/.cache/gpumeter: everything that is built or downloaded outside the tree."""
    env = dict(os.environ) if environment is None else environment
    return Path(env["GPUMETER_CACHE"]) if env.get("GPUMETER_CACHE") else Path.home() / ".cache" / "gpumeter"


def checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ClusterError(
            f"'{name}' cannot name a cluster: take lower-case letters, digits and dashes, at most 30, "
            "beginning with a letter."
        )
    return name


@dataclass(frozen=True)
class ClusterPaths:
    """The folder of one cluster and what lies in it."""

    name: str
    root: Path
    lock: Path
    sockets: Path

    @property
    def state(self) -> Path:
        return self.root / "state.json"

    @property
    def kubeconfig(self) -> Path:
        return self.root / "kubeconfig"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def pki(self) -> Path:
        return self.root / "pki"

    @property
    def components(self) -> Path:
        """What the node's first process says of the components that it started."""
        return self.root / "components.json"

    @property
    def api_socket(self) -> Path:
        return self.sockets / "api.sock"

    @property
    def containerd_socket(self) -> Path:
        return self.sockets / "containerd.sock"


def cluster_paths(name: str, cache: Path | None = None) -> ClusterPaths:
    clusters = (cache or cache_root()) / "clusters"
    checked_name(name)
    return ClusterPaths(name, clusters / name, clusters / f".{name}.lock", Path("/run/gpumeter") / name)


def other_node_paths(paths: ClusterPaths, number: int) -> ClusterPaths:
    """Return where a node beside the first has its own; no cluster's name has a dot, so nothing is found twice."""
    name = f"{paths.name}.{number}"
    return ClusterPaths(name, paths.root / "nodes" / str(number), paths.lock, paths.sockets.with_name(name))


def control_plane_paths(name: str, cache: Path | None = None) -> ClusterPaths:
    planes = (cache or cache_root()) / "control-planes"
    checked_name(name)
    return ClusterPaths(name, planes / name, planes / f".{name}.lock", planes / name)
