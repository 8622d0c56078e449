"""The nodes beside the first: joined to a running cluster, killed, cut off and brought back. Backend `local` alone.

Each has its own root, namespaces, cgroups, containerd and kubelet, and a state file of its own. Owns their lives; what
one looks like inside is node.py's, the wire between two links.py's.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from devcluster import cgroups, links, localnode, node, packages, pki, seeding, tools
from devcluster.apiclient import open_api
from devcluster.contents import offer_gpus
from devcluster.errors import ClusterError
from devcluster.layout import ClusterPaths, cache_root, other_node_paths
from devcluster.places import EVERY, FIRST, Place
from devcluster.processes import Process, children, is_alive, kill
from devcluster.progress import Progress
from devcluster.state import State, read_state, write_state

OTHERS = tuple(place for place in EVERY if not place.is_first)


def up(paths: ClusterPaths, state: State, progress: Progress) -> None:
    """Bring as many nodes as the cluster shall have to Ready; nodes beyond that number go."""
    for place in OTHERS:
        if place.number > state.nodes:
            remove(paths, place)
            continue
        own = other_node_paths(paths, place.number)
        told = read_state(own.state)
        health = localnode.observe(own, told)
        if told and health.runs and health.ready:
            links.lay(localnode.node_process(state), localnode.node_process(told), place)
            links.mend(localnode.node_process(state), place)
            if health.ended:
                os.kill(localnode.node_process(told).pid, signal.SIGHUP)
                wait_for_report(own, told)
        else:
            start(paths, state, place, progress)
        offer_gpus(open_api(paths.kubeconfig), place.name, state.gpus)


def start(paths: ClusterPaths, state: State, place: Place, progress: Progress) -> None:
    """Start one node, with what it had before if it was killed, and wait until it is Ready."""
    own = other_node_paths(paths, place.number)
    programs = tools.ensure(tools.FOR_NODE, progress)
    localnode.clear(own, read_state(own.state))
    models = cache_root() / "models"
    for folder in (own.logs, own.sockets, own.pki):
        folder.mkdir(parents=True, exist_ok=True)
    identities(paths, own, place)
    inside = {program: str(path) for program, path in programs.items()}
    cni = packages.cni_folder() or ""
    settings = node.Settings(paths.name, str(own.root), str(own.sockets), str(models), inside, cni, number=place.number)
    settings_file = own.root / "settings.json"
    settings_file.write_text(json.dumps(asdict(settings), indent=1))
    begun = datetime.now(UTC)
    try:
        with progress.step(f"{place.name} Ready, in namespaces of its own"):
            seeding.seed(paths, localnode.node_process(state), own)
            told = localnode.launch(own, settings_file, State(state.backend, 0, state.gpus))
            join(localnode.node_process(state), localnode.node_process(told), place, own)
            wait_for_report(own, told)
            localnode.import_image(own, node.PAUSE_IMAGE, programs)
            localnode.wait_ready(own, open_api(paths.kubeconfig), place, begun)
    except BaseException:
        localnode.clear(own, read_state(own.state))
        raise
    write_state(own.state, told)


def identities(paths: ClusterPaths, own: ClusterPaths, place: Place) -> None:
    """Give the node a certificate of its own and nothing of the cluster's keys."""
    name = f"kubelet-{place.number}"
    pki.make(paths.pki, [pki.kubelet(place.name, name)])
    shutil.copy(paths.pki / "ca.crt", own.pki / "ca.crt")
    url = f"https://{FIRST.address}:{node.API_PORT}"
    for identity, file in ((name, "kubelet"), ("proxy", "proxy")):
        pki.write_kubeconfig(own.pki / f"{file}.kubeconfig", paths.pki, identity, url, f"gpumeter-{paths.name}")


def join(first: Process, other: Process, place: Place, own: ClusterPaths) -> None:
    """Lay the wire as soon as the node has made its bridge."""
    end = time.monotonic() + 30
    while links.ask(other, ["link", "show", node.BRIDGE]).returncode != 0:
        if not is_alive(other) or time.monotonic() > end:
            raise ClusterError(f"{place.name} has made no network.", own.logs / "node.log")
        time.sleep(0.02)
    links.drop(first, place)  # one that leads to where the node was before, and would be taken for the new one
    links.lay(first, other, place)


def wait_for_report(own: ClusterPaths, told: State) -> None:
    """Wait until the node's first process says that everything runs."""
    end = time.monotonic() + localnode.START_TIMEOUT_S
    while not (health := localnode.observe(own, told)).ready or health.ended:
        if not health.runs or time.monotonic() > end:
            raise ClusterError(*localnode.why_it_ended(own))
        time.sleep(0.05)


def problems(paths: ClusterPaths, state: State) -> list[str]:
    """Say in words what is wrong with the other nodes."""
    found = []
    for place in OTHERS[: state.nodes - 1]:
        own = other_node_paths(paths, place.number)
        health = localnode.observe(own, read_state(own.state))
        if not health.runs:
            found.append(f"{place.name} does not run (`up` starts it again)")
        found += [f"{place.name}: {name} has ended, log {own.logs / name}.log" for name in health.ended]
    return found


def lose(paths: ClusterPaths, place: Place) -> None:
    """Kill every process of a node at once, as a power cut does. Its disk stays for `up`."""
    told = running(paths, place)
    inner = localnode.node_process(told)
    if left := kill([inner]):  # the kernel kills whatever is in its pid namespace with it
        raise ClusterError(f"{place.name} does not end: {left}.")
    kill([*told.processes.values(), *(child for one in told.processes.values() for child in children(one))])


def cut_off(paths: ClusterPaths, place: Place) -> None:
    """Leave the node running and let nothing through between it and the cluster."""
    running(paths, place)
    links.cut(localnode.node_process(first_state(paths)), place)


def mend(paths: ClusterPaths, place: Place) -> None:
    """End a cut."""
    running(paths, place)
    links.mend(localnode.node_process(first_state(paths)), place)


def bring_back(paths: ClusterPaths, place: Place, progress: Progress) -> None:
    """Start a node that was lost, with the disk that it had."""
    start(paths, first_state(paths), place, progress)


def running(paths: ClusterPaths, place: Place) -> State:
    own = other_node_paths(paths, place.number)
    told = None if place.is_first else read_state(own.state)
    if told is None or not localnode.observe(own, told).runs:
        raise ClusterError(f"{place.name} is no other node that runs here: bring it up with `devcluster up --nodes`.")
    return told


def first_state(paths: ClusterPaths) -> State:
    state = read_state(paths.state)
    if state is None:
        raise ClusterError(f"There is no cluster '{paths.name}'.")
    return state


def sockets(paths: ClusterPaths, state: State) -> Sequence[Path]:
    """The containerd sockets of every node beside the first."""
    return [other_node_paths(paths, place.number).containerd_socket for place in OTHERS[: state.nodes - 1]]


def stop_all(paths: ClusterPaths) -> None:
    """End every process, namespace, mount, cgroup and socket of the other nodes. Their data stays."""
    for place in OTHERS:
        own = other_node_paths(paths, place.number)
        localnode.clear(own, read_state(own.state))


def remove(paths: ClusterPaths, place: Place) -> None:
    """End a node that the cluster shall not have any more, with its data and its object."""
    own = other_node_paths(paths, place.number)
    if not own.root.exists() and not cgroups.find(own.name, cgroups.inspect()):
        return
    localnode.clear(own, read_state(own.state))
    shutil.rmtree(own.root, ignore_errors=True)
    api = open_api(paths.kubeconfig)
    if api.exists(place.path):
        api.delete(place.path)
