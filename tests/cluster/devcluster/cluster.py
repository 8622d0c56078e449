"""One cluster from outside: up, down, status. Joins a backend with what every cluster offers.

Owns the order of the steps. The backends and the contents know nothing of each other.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from devcluster import backends, contents, currentcontext, kindnode, localnode, model, node, othernodes
from devcluster.apiclient import open_api
from devcluster.errors import ClusterError
from devcluster.layout import ClusterPaths, cluster_paths
from devcluster.places import FIRST
from devcluster.processes import is_alive
from devcluster.progress import Progress
from devcluster.state import State, locked, read_state, write_state

DEFAULT_NAME = "gpumeter"
DEFAULT_GPUS = 2


@dataclass(frozen=True)
class Wish:
    """What `up` was asked for; None leaves it to what is remembered or chosen."""

    name: str = DEFAULT_NAME
    backend: str = backends.AUTO
    gpus: int | None = None
    port: int | None = None
    nodes: int | None = None
    with_model: bool = True


def up(wish: Wish, progress: Progress) -> ClusterPaths:
    """Bring the cluster to where everything in the wish holds; changes nothing that holds already."""
    paths = cluster_paths(wish.name)
    with locked(paths.lock, progress):
        old = read_state(paths.state)
        gpus = wish.gpus if wish.gpus is not None else old.gpus if old else DEFAULT_GPUS
        if old and old.ready and old.backend == backends.LOCAL and wish.port not in (None, old.port):
            raise ClusterError(f"The cluster is at port {old.port}: take it down before giving it another.")
        nodes = wish.nodes if wish.nodes is not None else old.nodes if old else 1
        backend = old.backend if old and wish.backend == backends.AUTO else pick(wish, old, progress)
        if nodes > 1 and backend != backends.LOCAL:
            raise ClusterError(f"Only the backend 'local' knows more than one node; this cluster's is '{backend}'.")
        existed = bool(old and old.ready and is_up(paths, old))
        if backend == backends.CURRENT:
            state = currentcontext.up(paths, gpus, progress)
        elif backend == backends.KIND:
            state = kindnode.up(paths, gpus, wish.port, progress)
        else:
            state = replace(localnode.up(paths, gpus, wish.port, progress), nodes=nodes)
            write_state(paths.state, state)
            othernodes.up(paths, state, progress)
        if backend != backends.CURRENT:
            models = model.ensure(progress) if wish.with_model else model.converted()
            fill(paths, state, models, progress)
        write_state(paths.state, replace(state, ready=True, gpus=gpus))
    where = f" at 127.0.0.1:{state.port}" if state.port else ", as your current context has it"
    verb = "runs already" if existed else "is ready"
    progress.say(f"cluster '{wish.name}' ({backend}) {verb}{where}; KUBECONFIG={paths.kubeconfig}")
    return paths


def pick(wish: Wish, old: State | None, progress: Progress) -> str:
    choice = backends.choose(wish.backend, old.backend if old else None, backends.ask_machine())
    progress.say(f"backend '{choice.backend}': {choice.reason}")
    return choice.backend


def fill(paths: ClusterPaths, state: State, models: Path | None, progress: Progress) -> None:
    """Put into the cluster what every cluster offers."""
    inside = f"{node.MODELS}/{models.name}" if models else ""
    if state.backend == backends.LOCAL:
        beside = tuple(place.name for place in FIRST.others)
        offer = contents.Offer(FIRST.name, state.gpus, str(node.VOLUMES), inside, beside)
        outside = paths.root / "var/lib/gpumeter/volumes"
    else:  # kind brings a default class with a provisioner of its own
        offer = contents.Offer(kindnode.node_name(paths), state.gpus, "", inside)
        outside = None
    done = contents.bring(open_api(paths.kubeconfig), offer, outside)
    if done:
        progress.say(", ".join(done))


def is_up(paths: ClusterPaths, state: State) -> bool:
    return not problems(paths, state)


def problems(paths: ClusterPaths, state: State) -> list[str]:
    """Say in words what is wrong with a cluster; an empty list means that it runs."""
    if state.backend == backends.KIND:
        word = kindnode.observe(paths)
        return [] if word == "running" else [f"the node's container is {word}"]
    if state.backend == backends.CURRENT:
        return [] if currentcontext.answers(paths, Progress()) else ["the API server does not answer"]
    health = localnode.observe(paths, state)
    if not health.runs:
        return ["the node does not run (`up` starts it again)"]
    found = [f"{name} has ended with code {code}, log {paths.logs / name}.log" for name, code in health.ended.items()]
    if not health.ready:
        found.append(f"the node has not finished starting, log {paths.logs / 'node.log'}")
    if not health.forwards:
        found.append("the forwarder to 127.0.0.1 has ended")
    elif not found:
        api = open_api(paths.kubeconfig, timeout_s=3)
        if not api.is_ready():
            found.append(f"the API server does not answer, log {paths.logs / 'kube-apiserver.log'}")
        elif not localnode.node_is_ready(api):
            found.append(f"the node is not Ready, log {paths.logs / 'kubelet.log'}")
    return found + othernodes.problems(paths, state)


def status(name: str, progress: Progress) -> int:
    """Print how the cluster is; returns 0 when all of it runs, 3 when there is none, 1 when something is wrong."""
    paths = cluster_paths(name)
    state = read_state(paths.state)
    if state is None:
        progress.say(f"there is no cluster '{name}'")
        return 3
    found = problems(paths, state)
    print(f"cluster {name}: {'running' if not found else 'NOT WELL'}")
    print(f"  backend     {state.backend}")
    print(f"  api         {f'127.0.0.1:{state.port}' if state.port else 'as your current context has it'}")
    print(f"  kubeconfig  {paths.kubeconfig}")
    print(f"  logs        {paths.logs}")
    for process, identity in sorted(state.processes.items()):
        print(f"  {process:<11} pid {identity.pid}, {'alive' if is_alive(identity) else 'ended'}")
    for problem in found:
        print(f"  problem: {problem}")
    return 1 if found else 0


def down(name: str, progress: Progress, *, keep_data: bool) -> None:
    """End the cluster. Its data (etcd, images, volumes) goes with it unless it is kept for the next `up`."""
    paths = cluster_paths(name)
    with locked(paths.lock, progress):
        state = read_state(paths.state)
        if state is None and not paths.root.exists():
            progress.say(f"no cluster '{name}' here")
        if state and state.backend == backends.KIND:
            with progress.step("kind removes the node"):
                kindnode.stop(paths) if keep_data else kindnode.delete(paths, progress)
        elif (state is None or state.backend == backends.LOCAL) and backends.can_be_local():
            othernodes.stop_all(paths)
            localnode.stop(paths)
        if state and keep_data:
            write_state(paths.state, replace(state, processes={}, ready=False))
            progress.say(f"cluster '{name}' is stopped; its data waits in {paths.root}")
        elif paths.root.exists():
            shutil.rmtree(paths.root)
            yours = state is not None and state.backend == backends.CURRENT
            done = "is forgotten here; nothing in it was touched" if yours else "and its data are gone"
            progress.say(f"cluster '{name}' {done}")
    if not keep_data:
        paths.lock.unlink(missing_ok=True)
