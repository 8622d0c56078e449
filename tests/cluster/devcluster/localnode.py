"""Backend `local`: a node in namespaces of this machine, for Linux as root where Docker does not work.

Owns starting, repairing and ending the node from outside. The inside is node.py's; the objects in it contents.py's.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from devcluster import cgroups, node, packages, pki, tools
from devcluster.apiclient import Api, open_api
from devcluster.components import SERVICE_API
from devcluster.errors import ClusterError
from devcluster.layout import ClusterPaths, cache_root
from devcluster.ociarchive import archive_of_program
from devcluster.places import FIRST, Place
from devcluster.processes import Process, children, choose_port, is_alive, kill, start
from devcluster.progress import Progress
from devcluster.state import State, read_state, write_state

FIRST_PORT = 16443
START_TIMEOUT_S = 150
NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc", "--cgroup")


@dataclass(frozen=True)
class Health:
    """What can be said of a node without asking Kubernetes: is it there, and who of its components has ended."""

    runs: bool
    ready: bool
    ended: dict[str, int]
    forwards: bool


def up(paths: ClusterPaths, gpus: int, port: int | None, progress: Progress) -> State:
    """Bring the node to Ready: start it, or start again what has died of it."""
    state = read_state(paths.state)
    health = observe(paths, state)
    if state and health.runs and health.ready:
        if health.ended:
            state = repair(paths, state, health, progress)
        if not health.forwards:
            state = forward(paths, state, port)
        if gpus != state.gpus:
            state = replace(state, gpus=gpus)
        write_state(paths.state, state)
        return state
    return start_node(paths, state, gpus, port, progress)


def observe(paths: ClusterPaths, state: State | None) -> Health:
    processes = state.processes if state else {}
    runs = "node" in processes and is_alive(processes["node"])
    forwards = "forward" in processes and is_alive(processes["forward"])
    report: dict[str, Any] = {}
    if runs:
        with suppress(OSError, ValueError):
            report = json.loads(paths.components.read_text())
    return Health(runs, bool(report.get("ready")), dict(report.get("ended", {})), forwards)


def start_node(paths: ClusterPaths, old: State | None, gpus: int, port: int | None, progress: Progress) -> State:
    packages.ensure(packages.FOR_NODE, progress, paths.logs)
    programs = tools.ensure(tools.FOR_NODE, progress)
    clear(paths, old)
    chosen = port or choose_port(old.port if old else None, FIRST_PORT)
    models = cache_root() / "models"
    for folder in (paths.logs, paths.sockets, models):
        folder.mkdir(parents=True, exist_ok=True)
    for log in paths.logs.glob("*.log"):
        if log.name != "apt.log":
            log.rename(log.with_suffix(".log.previous"))
    with progress.step("certificates"):
        addresses = ["127.0.0.1", FIRST.address, SERVICE_API]
        pki.make(paths.pki, [*pki.CLIENTS, pki.kubelet(FIRST.name), pki.server(addresses)])
        context = f"gpumeter-{paths.name}"
        pki.write_kubeconfig(paths.kubeconfig, paths.pki, "admin", f"https://127.0.0.1:{chosen}", context)
    cni = packages.cni_folder() or ""
    settings = node.Settings(
        paths.name, str(paths.root), str(paths.sockets), str(models), {k: str(v) for k, v in programs.items()}, cni
    )
    settings_file = paths.root / "settings.json"
    settings_file.write_text(json.dumps(asdict(settings), indent=1))
    state = State("local", chosen, gpus)
    begun = datetime.now(UTC)
    try:
        with progress.step("control plane, containerd and CoreDNS running in namespaces of their own"):
            state = launch(paths, settings_file, state)
            state = forward(paths, state, chosen)
            wait_for_report(paths, state)
        with progress.step("node Ready"):
            import_image(paths, node.PAUSE_IMAGE, programs)
            wait_ready(paths, open_api(paths.kubeconfig), FIRST, begun)
    except BaseException:
        clear(paths, read_state(paths.state))  # half a node helps nobody; its logs stay
        raise
    return state


def clear(paths: ClusterPaths, old: State | None) -> None:
    """End whatever is left of an earlier start of this cluster; its data stays."""
    if old and (left := kill(list(old.processes.values()))):
        raise ClusterError(f"The processes {[process.pid for process in left]} of an earlier start do not end.")
    cgroups.remove(cgroups.find(paths.name, cgroups.inspect()))
    shutil.rmtree(paths.sockets, ignore_errors=True)
    paths.components.unlink(missing_ok=True)


def launch(paths: ClusterPaths, settings_file: Path, state: State) -> State:
    folders = cgroups.make(cgroups.inspect(), paths.name)
    package = str(Path(__file__).resolve().parents[1])
    outer = start(
        ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "--propagation", "private",
         sys.executable, "-m", "devcluster.node", str(settings_file)],
        paths.logs / "node.log",
        cgroups=folders,
        environment={"PYTHONPATH": package, "PATH": f"{os.environ['PATH']}:{packages.SYSTEM_PATH}"},
    )  # fmt: skip
    state = replace(state, processes={"unshare": outer})
    write_state(paths.state, state)
    end = time.monotonic() + 10
    while not (inner := children(outer)):
        if not is_alive(outer) or time.monotonic() > end:
            raise ClusterError("The namespaces of the node could not be made.", paths.logs / "node.log")
        time.sleep(0.02)
    state = replace(state, processes={"unshare": outer, "node": inner[0]})
    write_state(paths.state, state)
    for folder in outside(paths):
        (folder / "cgroup.procs").write_text(str(outer.pid))
    return state


def outside(paths: ClusterPaths) -> list[Path]:
    """Return the cgroups of what belongs to the cluster but not to its node.

    In version 2 that is a child, because a group that hands controllers down may hold no process itself.
    """
    mounted = cgroups.inspect()
    folders = cgroups.places(mounted, paths.name)
    if mounted.version == 1:
        return folders
    child = folders[0] / "outside"
    child.mkdir(exist_ok=True)
    return [child]


def forward(paths: ClusterPaths, state: State, port: int | None) -> State:
    """Publish the node's API at 127.0.0.1: the node itself has no way to the machine's network."""
    listen = f"TCP-LISTEN:{port or state.port},bind=127.0.0.1,fork,reuseaddr,nodelay,backlog=512"
    forwarder = start(
        ["socat", listen, f"UNIX-CONNECT:{paths.api_socket}"], paths.logs / "forward.log", cgroups=outside(paths)
    )
    state = replace(state, port=port or state.port, processes={**state.processes, "forward": forwarder})
    write_state(paths.state, state)
    return state


def wait_for_report(paths: ClusterPaths, state: State) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while not (health := observe(paths, state)).ready:
        if not health.runs:
            raise ClusterError(*why_it_ended(paths))
        if not health.forwards:
            raise ClusterError(f"Port {state.port} of 127.0.0.1 cannot be used.", paths.logs / "forward.log")
        if time.monotonic() > end:
            raise ClusterError("The node's components were not ready in time.", paths.logs / "node.log")
        time.sleep(0.05)


def why_it_ended(paths: ClusterPaths) -> tuple[str, Path]:
    """Choose the log that matters: the first component's that ended, else the node's own."""
    with suppress(OSError, ValueError):
        for name, code in json.loads(paths.components.read_text())["ended"].items():
            return f"{name} ended with code {code} while the node started.", paths.logs / f"{name}.log"
    return "The node's first process ended while the node started.", paths.logs / "node.log"


def wait_ready(paths: ClusterPaths, api: Api, place: Place, since: datetime) -> None:
    """Wait for a kubelet that says Ready after `since`: what an earlier one said is still in etcd."""
    end = time.monotonic() + START_TIMEOUT_S
    while not node_is_ready(api, place, since):
        if time.monotonic() > end:
            raise ClusterError(f"{place.name} did not become Ready in time.", paths.logs / "kubelet.log")
        time.sleep(0.1)


def node_is_ready(api: Api, place: Place = FIRST, since: datetime | None = None) -> bool:
    try:
        conditions = api.get(place.path).get("status", {}).get("conditions", [])
    except ClusterError:
        return False
    return any(
        one["type"] == "Ready"
        and one["status"] == "True"
        and (since is None or datetime.fromisoformat(one["lastHeartbeatTime"]) >= since.replace(microsecond=0))
        for one in conditions
    )


def import_image(paths: ClusterPaths, reference: str, programs: dict[str, Path]) -> None:
    ctr = [str(programs["ctr"]), "-a", str(paths.containerd_socket), "-n", "k8s.io", "images"]
    if reference in subprocess.run([*ctr, "ls", "-q"], capture_output=True, text=True, check=False).stdout.split():
        return
    archive = archive_of_program(reference, "pause", programs["pause"].read_bytes())
    done = subprocess.run([*ctr, "import", "-"], input=archive, capture_output=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"The image {reference} cannot be imported: {done.stderr.decode(errors='replace')}")


def repair(paths: ClusterPaths, state: State, health: Health, progress: Progress) -> State:
    begun = datetime.now(UTC)
    with progress.step(f"starting again: {', '.join(health.ended)}"):
        os.kill(state.processes["node"].pid, signal.SIGHUP)
        end = time.monotonic() + 30
        while observe(paths, state).ended:
            if time.monotonic() > end:
                raise ClusterError(*why_it_ended(paths))
            time.sleep(0.05)
        api = open_api(paths.kubeconfig)
        while not api.is_ready():
            if time.monotonic() > end:
                raise ClusterError("The API server does not come back.", paths.logs / "kube-apiserver.log")
            time.sleep(0.1)
        wait_ready(paths, api, FIRST, begun)
    return state


def stop(paths: ClusterPaths) -> None:
    """End every process, namespace, mount, cgroup and socket of the cluster. Its data stays."""
    clear(paths, read_state(paths.state))
    with suppress(OSError):
        paths.sockets.parent.rmdir()


def node_process(state: State) -> Process:
    return state.processes["node"]
