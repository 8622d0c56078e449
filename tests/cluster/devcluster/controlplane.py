"""A control plane alone: API server, etcd and controller manager on 127.0.0.1, without a node and without root.

Owns its life, from the command line and for a test session. Does not know what is tested with it.
"""

import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from devcluster import packages, pki, tools
from devcluster.apiclient import Api, open_api
from devcluster.components import (
    SERVICE_API,
    Component,
    ControlPlane,
    apiserver,
    controller_manager,
    etcd,
)
from devcluster.errors import ClusterError
from devcluster.layout import ClusterPaths, control_plane_paths
from devcluster.processes import Process, choose_port, is_alive, kill, start
from devcluster.progress import Progress
from devcluster.state import State, locked, read_state, write_state

PORTS = range(20000, 29990)
TRIES = 3
TAKEN = "address already in use"
READY_TIMEOUT_S = 60
DEFAULT_ACCOUNT = "/api/v1/namespaces/default/serviceaccounts/default"


@contextmanager
def control_plane(name: str = "test", progress: Progress | None = None) -> Iterator[Path]:
    """Yield the kubeconfig (context gpumeter-NAME) of a fresh control plane that ends with the block or its process."""
    folder = Path(tempfile.mkdtemp(prefix=f"gpumeter-{name}-"))
    paths = ClusterPaths(name, folder, folder / "lock", folder)
    processes: dict[str, Process] = {}
    try:
        launch_somewhere(paths, progress or Progress(quiet=True), processes, dies_with_parent=True)
        yield paths.kubeconfig
    finally:
        kill(list(processes.values()))
        shutil.rmtree(folder, ignore_errors=True)


def up(name: str, progress: Progress) -> ClusterPaths:
    """Start a control plane that stays until `down`; says so when it runs already."""
    paths = control_plane_paths(name)
    with locked(paths.lock, progress):
        state = read_state(paths.state)
        if state and state.ready and all(map(is_alive, state.processes.values())) and answers(paths):
            progress.say(f"control plane '{name}' runs already at 127.0.0.1:{state.port}")
            return paths
        remove(paths)
        processes: dict[str, Process] = {}
        try:
            launch_somewhere(paths, progress, processes, dies_with_parent=False)
        except BaseException:
            kill(list(processes.values()))
            raise
    return paths


def down(name: str, progress: Progress) -> None:
    paths = control_plane_paths(name)
    with locked(paths.lock, progress):
        existed = paths.root.exists()
        remove(paths)
    paths.lock.unlink(missing_ok=True)
    progress.say(f"control plane '{name}' and its data are gone" if existed else f"no control plane '{name}' here")


def remove(paths: ClusterPaths) -> None:
    state = read_state(paths.state)
    if state and (left := kill(list(state.processes.values()))):
        raise ClusterError(f"The processes {[process.pid for process in left]} do not end.")
    shutil.rmtree(paths.root, ignore_errors=True)


def answers(paths: ClusterPaths) -> bool:
    return paths.kubeconfig.exists() and open_api(paths.kubeconfig, timeout_s=3).is_ready()


def launch_somewhere(
    paths: ClusterPaths, progress: Progress, processes: dict[str, Process], *, dies_with_parent: bool
) -> None:
    """Launch, and once more at other ports where somebody else took one between its choice and its use."""
    for left in reversed(range(TRIES)):
        try:
            return launch(paths, progress, processes, dies_with_parent=dies_with_parent)
        except ClusterError as problem:
            if not left or problem.log is None or TAKEN not in problem.log.read_text(errors="replace"):
                raise
            progress.say("a port was taken by another program meanwhile: once more at others")
            kill(list(processes.values()))
            processes.clear()
            for folder in (paths.logs, paths.root / "etcd"):
                shutil.rmtree(folder, ignore_errors=True)


def launch(paths: ClusterPaths, progress: Progress, processes: dict[str, Process], *, dies_with_parent: bool) -> None:
    """Start everything and wait for it; `processes` fills as they start, so that the caller can end what began."""
    paths.logs.mkdir(parents=True, exist_ok=True)
    packages.ensure(packages.FOR_CONTROL_PLANE, progress, paths.logs)
    programs = tools.ensure(tools.FOR_CONTROL_PLANE, progress)
    first = choose_port(None, random.choice(PORTS))
    second = choose_port(None, first + 1)
    third = choose_port(None, second + 1)
    plane = ControlPlane(programs, paths.pki, paths.root, "127.0.0.1", first, second, third)
    write_state(paths.state, State("control-plane", plane.port))
    with progress.step("certificates"):
        pki.make(paths.pki, [*pki.CLIENTS, pki.server(["127.0.0.1", SERVICE_API])])
        context = f"gpumeter-{paths.name}"
        manager = "controller-manager"
        pki.write_kubeconfig(plane.kubeconfig(manager), paths.pki, manager, plane.url, context)
        pki.write_kubeconfig(paths.kubeconfig, paths.pki, "admin", plane.url, context)

    def run(component: Component) -> None:
        log = paths.logs / f"{component.name}.log"
        processes[component.name] = start(component.argv, log, dies_with_parent=dies_with_parent)
        write_state(paths.state, State("control-plane", plane.port, processes=processes))

    api = open_api(paths.kubeconfig, timeout_s=3)
    with progress.step("etcd and API server ready"):
        run(etcd(plane))
        run(apiserver(plane, alone=True))
        wait(api, "/readyz", processes, paths)
    with progress.step("controller manager ready"):
        run(controller_manager(plane, alone=True))
        wait(api, DEFAULT_ACCOUNT, processes, paths)
    write_state(paths.state, State("control-plane", plane.port, processes=processes, ready=True))


def wait(api: Api, path: str, processes: dict[str, Process], paths: ClusterPaths) -> None:
    """Wait until the API answers `path`; a program that ends meanwhile is the failure to show."""
    end = time.monotonic() + READY_TIMEOUT_S
    while not api.exists(path):
        for name, process in processes.items():
            if not is_alive(process):
                raise ClusterError(f"{name} ended while it started.", paths.logs / f"{name}.log")
        if time.monotonic() > end:
            sentence = f"The control plane was not ready within {READY_TIMEOUT_S} s ({path})."
            raise ClusterError(sentence, paths.logs / "kube-apiserver.log")
        time.sleep(0.05)
