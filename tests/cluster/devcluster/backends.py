"""Which backend a machine gets, and why.

Owns the decision and asking the machine for what it depends on. Does not know how a backend works.
"""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass

from devcluster.errors import ClusterError

AUTO, KIND, LOCAL, CURRENT = "auto", "kind", "local", "current"
NAMES = (AUTO, KIND, LOCAL, CURRENT)
DOCKER_TIMEOUT_S = 20


@dataclass(frozen=True)
class Machine:
    """What the decision depends on."""

    docker_works: bool
    system: str
    is_root: bool


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it, in words."""

    backend: str
    reason: str


def ask_machine() -> Machine:
    return Machine(docker_works(), platform.system(), os.geteuid() == 0)


def docker_works() -> bool:
    """Ask Docker's server, not the client: the client is often there alone."""
    if not shutil.which("docker"):
        return False
    command = ["docker", "info", "--format", "{{.ServerVersion}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOCKER_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and bool(done.stdout.strip())


def choose(wanted: str, remembered: str | None, machine: Machine) -> Choice:
    """Choose a backend. A cluster that exists keeps its own; `current` is never chosen without being asked for."""
    if remembered and wanted not in (AUTO, remembered):
        raise ClusterError(
            f"This cluster was made with the backend '{remembered}', not '{wanted}': take it down first "
            "(`devcluster down`), or name another one with --name."
        )
    if remembered:
        return Choice(remembered, "the cluster was made with it")
    if wanted == CURRENT:
        return Choice(CURRENT, "asked for")
    if wanted in (AUTO, KIND) and machine.docker_works:
        return Choice(KIND, "Docker answers")
    if wanted == KIND:
        raise ClusterError(
            "Docker does not answer (`docker info`), and kind needs it: start Docker, or do without it: "
            "make cluster-up BACKEND=local (devcluster up --backend local)."
        )
    if machine.system == "Linux" and machine.is_root:
        return Choice(LOCAL, "Docker does not answer, and this is Linux as root" if wanted == AUTO else "asked for")
    if machine.system == "Linux":
        raise ClusterError(
            "Docker does not answer (`docker info`), and a node without Docker needs root for its namespaces: "
            "start Docker, or run this as root."
        )
    raise ClusterError("Docker does not answer (`docker info`): start it. Only on Linux is there a way without it.")


def can_be_local() -> bool:
    return platform.system() == "Linux" and os.geteuid() == 0
