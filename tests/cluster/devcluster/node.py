"""The node's first process, alone in mount, network, pid, host name, ipc and cgroup namespaces of its own.

Owns what the node looks like from inside, and the components that it starts, watches and reports in
components.json. Does not know the machine outside: only what settings.json says.

SIGHUP starts again what has died; the end of this process is the end of everything in the node.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from devcluster import cgroups, components, pki
from devcluster.components import Component, ControlPlane, Node
from devcluster.mounts import MS_PRIVATE, MS_REC, MS_SHARED, bind, mount
from devcluster.places import DOMAIN_SERVER, FIRST, Place
from devcluster.processes import wait_until

API_PORT = 6443
BRIDGE = "node0"
HOME = Path("/run/node")
TOOLS = Path("/run/tools")
VOLUMES = Path("/var/lib/gpumeter/volumes")
MODELS = Path("/var/lib/gpumeter/models")
PAUSE_IMAGE = "localhost/pause:3"
READY_TIMEOUT_S = 120


@dataclass(frozen=True)
class Settings:
    """What the outside tells the node: paths are the machine's."""

    cluster: str
    root: str
    sockets: str
    models: str
    tools: dict[str, str]
    cni_programs: str
    number: int = 1

    def inside(self) -> dict[str, Path]:
        """Return the programs' paths as the node sees them."""
        return {program: TOOLS / Path(path).parent.name / program for program, path in self.tools.items()}


def main(settings_file: str) -> None:
    settings = Settings(**json.loads(Path(settings_file).read_text()))
    place = Place(settings.number)
    programs = settings.inside()
    build_filesystem(settings)
    version = build_cgroups()
    build_network(place)
    plane = ControlPlane(programs, HOME / "pki", HOME, FIRST.address, API_PORT, 2379, 2380)
    node = Node(programs, place, HOME, Path(settings.sockets), settings.cni_programs, version)
    write_node_files(node, plane)
    containerd_folder = programs["containerd"].parent
    os.environ["PATH"] = f"{containerd_folder}:{settings.cni_programs}:{os.environ['PATH']}"
    supervisor = Supervisor(HOME / "components.json", HOME / "logs")
    if place.is_first:
        write_control_plane_files(settings, node, plane)
        supervisor.start([components.etcd(plane), components.apiserver(plane, alone=False)])
    supervisor.start([components.containerd(node)])
    supervisor.wait("containerd listens", lambda: listens(node.containerd_socket))
    if place.is_first:
        forward = f"UNIX-LISTEN:{node.sockets / 'api.sock'},fork,unlink-early,backlog=512"
        to = f"TCP:{place.address}:{API_PORT},nodelay"
        supervisor.start([Component("api-socket", ("socat", forward, to))])
    supervisor.wait("the API server is ready", lambda: api_is_ready(plane))
    supervisor.start([components.kubelet(node, plane.kubeconfig("kubelet"))])
    if place.is_first:
        supervisor.start([components.controller_manager(plane, alone=False), components.scheduler(plane)])
    supervisor.start([components.proxy(node, plane.kubeconfig("proxy"))])
    if place.is_first:
        supervisor.start([components.coredns(node)])
    supervisor.wait("names are answered", lambda: dns_answers(DOMAIN_SERVER))
    supervisor.watch()


def build_filesystem(settings: Settings) -> None:
    """Give the node its own /run, /var, /sys, and the folders of the cluster at places that never change."""
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    root = Path(settings.root)
    var = root / "var"
    for folder in ("lib/kubelet", "lib/cni", "lib/gpumeter/volumes", "lib/gpumeter/models", "log", "cache", "tmp"):
        (var / folder).mkdir(parents=True, exist_ok=True)
    (var / "tmp").chmod(0o1777)
    for name in ("run", "lock"):
        if not (var / name).is_symlink():
            (var / name).symlink_to("/run")
    bind(settings.models, str(var / "lib/gpumeter/models"), read_only=True)
    # The new /run hides the old one, so what is needed of it is held open meanwhile.
    held = os.open(settings.sockets, os.O_PATH)
    mount("run", "/run", "tmpfs", options="mode=755")
    Path(settings.sockets).mkdir(parents=True)
    bind(f"/proc/self/fd/{held}", settings.sockets)
    os.close(held)
    HOME.mkdir()
    bind(str(root), str(HOME))
    for tool_folder in sorted({Path(path).parent for path in settings.tools.values()}):
        (TOOLS / tool_folder.name).mkdir(parents=True)
        bind(str(tool_folder), str(TOOLS / tool_folder.name), read_only=True)
    bind(str(HOME / "var"), "/var")
    mount("sysfs", "/sys", "sysfs")
    # The kubelet wants mounts that it makes to be seen by the containers.
    mount("none", "/", flags=MS_REC | MS_SHARED)


def build_cgroups() -> int:
    """Mount the cgroups anew: inside the namespace they begin at the cluster's own group."""
    mounted = cgroups.inspect_membership()
    target = Path("/sys/fs/cgroup")
    if mounted.version == 2:
        mount("cgroup2", str(target), "cgroup2")
        first = target / "init"
        first.mkdir(exist_ok=True)
        (first / "cgroup.procs").write_text(str(os.getpid()))
        # Outside, the parent of this process is just being moved out of this group; until then it is busy.
        wait_until(lambda: cgroups.hands_down(target), timeout_s=10)
        return 2
    mount("cgroups", str(target), "tmpfs", options="mode=755")
    for folder, options in cgroups.cgroup_mounts(mounted).items():
        (target / folder).mkdir()
        mount("cgroup", str(target / folder), "cgroup", options=options)
        for name in folder.split(","):
            if name != folder:
                (target / name).symlink_to(folder)
    return 1


def build_network(place: Place) -> None:
    """Make a bridge the node's only interface: it needs no module, and nothing leads to the machine's network.

    Other nodes are plugged into it from outside (links.py); the way to their pods is known from the start.
    """
    socket.sethostname(place.name)
    for command in (
        "link set lo up",
        f"link add {BRIDGE} type bridge",
        f"address add {place.address}/24 dev {BRIDGE}",
        f"link set {BRIDGE} up",
        f"route add default dev {BRIDGE}",
        *(f"route add {other.pods} via {other.address} dev {BRIDGE}" for other in place.others),
    ):
        subprocess.run(["ip", *command.split()], check=True)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def write_node_files(node: Node, plane: ControlPlane) -> None:
    (HOME / "cni").mkdir(exist_ok=True)
    (HOME / "cni" / "10-pods.conflist").write_text(components.cni_conflist(node.place))
    (HOME / "containerd.toml").write_text(components.containerd_toml(node, PAUSE_IMAGE))
    (HOME / "kubelet.json").write_text(components.kubelet_json(node, plane.pki))
    (HOME / "resolv.conf").write_text(f"nameserver {DOMAIN_SERVER}\n")


def write_control_plane_files(settings: Settings, node: Node, plane: ControlPlane) -> None:
    context = f"gpumeter-{settings.cluster}"
    for identity in ("controller-manager", "scheduler", "proxy", "kubelet", "coredns"):
        pki.write_kubeconfig(plane.kubeconfig(identity), plane.pki, identity, plane.url, context)
    (HOME / "Corefile").write_text(components.corefile(node, plane.kubeconfig("coredns"), context))


@dataclass
class Supervisor:
    """Starts components, reaps every orphan of the node, and writes down who lives."""

    report: Path
    logs: Path
    known: dict[str, Component] = field(default_factory=dict)
    pids: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    ready: bool = False
    woken: int = field(init=False)

    def __post_init__(self) -> None:
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.woken = reading
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, lambda *_: None)

    def start(self, wanted: list[Component]) -> None:
        for component in wanted:
            with (self.logs / f"{component.name}.log").open("ab") as log:
                child = subprocess.Popen(
                    component.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            child.returncode = 0  # reaped by this class, not by the destructor
            self.known[component.name] = component
            self.pids[component.name] = child.pid
            self.ended.pop(component.name, None)
        self.write()

    def write(self) -> None:
        text = json.dumps({"ready": self.ready, "alive": self.pids, "ended": self.ended}, indent=1)
        fresh = self.report.with_suffix(".new")
        fresh.write_text(text + "\n")
        fresh.replace(self.report)

    def reap(self) -> None:
        with suppress(ChildProcessError):
            while (pair := os.waitpid(-1, os.WNOHANG))[0]:
                for name, pid in list(self.pids.items()):
                    if pid == pair[0]:
                        del self.pids[name]
                        self.ended[name] = os.waitstatus_to_exitcode(pair[1])
                        print(f"{name} ended with {self.ended[name]}", flush=True)
                        self.write()

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait for a condition of the start; a component that ends meanwhile fails it, in words, in this log."""
        end = time.monotonic() + READY_TIMEOUT_S
        while not condition():
            self.reap()
            if self.ended:
                raise SystemExit(f"{', '.join(self.ended)} ended before {what}")
            if time.monotonic() > end:
                raise SystemExit(f"not within {READY_TIMEOUT_S} s: {what}")
            time.sleep(0.05)
        print(f"{what}", flush=True)

    def watch(self) -> None:
        self.ready = True
        self.write()
        while True:
            select.select([self.woken], [], [])
            numbers = set(os.read(self.woken, 4096))
            self.reap()
            if signal.SIGTERM in numbers:
                raise SystemExit("told to end")
            if signal.SIGHUP in numbers:
                self.start([self.known[name] for name in list(self.ended)])


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def api_is_ready(plane: ControlPlane) -> bool:
    context = pki.tls_context(plane.pki)
    try:
        with urllib.request.urlopen(f"{plane.url}/readyz", timeout=2, context=context) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def dns_answers(address: str) -> bool:
    """Ask for the API's own Service; code 0 (no error) in the answer means that the zone is loaded."""
    name = b"".join(bytes([len(part)]) + part for part in b"kubernetes.default.svc.cluster.local".split(b"."))
    query = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + name + b"\x00\x00\x01\x00\x01"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(0.5)
        try:
            asking.sendto(query, (address, 53))
            answer: Any = asking.recv(512)
        except OSError:
            return False
    return len(answer) > 8 and answer[3] & 15 == 0 and answer[7] > 0


if __name__ == "__main__":
    main(sys.argv[1])
