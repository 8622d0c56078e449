"""The wire between the first node and another one, laid, cut and mended from outside both.

Owns the pair of interfaces: one end in each node's network namespace, on the bridge that is the node's own network.
Does not know what runs in the nodes. The wire goes with either namespace.
"""

import os
import subprocess
from collections.abc import Sequence

from devcluster.errors import ClusterError
from devcluster.node import BRIDGE
from devcluster.packages import SYSTEM_PATH
from devcluster.places import Place
from devcluster.processes import Process


def lay(first: Process, other: Process, place: Place) -> None:
    """Join two nodes' networks; does nothing where they are joined. A wire that was cut stays so."""
    if exists(first, place):
        return
    end = end_of(place)
    # The other end's namespace is named by a process: both are seen from here, where both were started.
    within(first, ["link", "add", end, "type", "veth", "peer", "name", end, "netns", str(other.pid)])
    for node in (first, other):
        within(node, ["link", "set", end, "master", BRIDGE, "up"])


def drop(first: Process, place: Place) -> None:
    """Remove what is left of the wire to a node that is no more: its namespace goes a moment after its processes."""
    ask(first, ["link", "delete", end_of(place)])


def cut(first: Process, place: Place) -> None:
    """Let nothing through: what is sent is lost without a word, as when a cable is pulled."""
    within(first, ["link", "set", end_of(place), "down"])


def mend(first: Process, place: Place) -> None:
    """Let everything through again."""
    within(first, ["link", "set", end_of(place), "up"])


def exists(first: Process, place: Place) -> bool:
    return ask(first, ["link", "show", end_of(place)]).returncode == 0


def end_of(place: Place) -> str:
    return f"wire{place.number}"


def within(node: Process, arguments: Sequence[str]) -> None:
    done = ask(node, arguments)
    if done.returncode != 0:
        raise ClusterError(f"The wire between the nodes: ip {' '.join(arguments)}: {done.stderr.strip()}")


def ask(node: Process, arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    command = ["nsenter", f"--net=/proc/{node.pid}/ns/net", "ip", *arguments]
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:{SYSTEM_PATH}"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
