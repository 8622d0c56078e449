"""The world in which the operator is measured at scale: a real control plane with a scheduler, nodes and pods by kwok,
and one process that answers for all workers, in a network namespace of this program's own.

Owns what is started, in which order, and that all of it ends. Inside the namespace the whole range of pod addresses
leads to the fleet simulator, so that pods have addresses as on a real network and the operator asks them as it always
does. Measures nothing.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from apiserver import CRDS, ROOT, Server, runner
from bench.scale_requests import sort_requests_of
from devcluster import control_plane, packages, pki, tools
from devcluster.components import scheduler
from devcluster.controlplane import ControlPlane
from devcluster.layout import cache_root
from devcluster.processes import Process, kill, start, wait_until
from devcluster.progress import Progress
from gpumeter_operator.settings import HOLD_MS
from operatorrun import NAMESPACE, OperatorProcess, identity_of_the_chart, let_controllers_work

INSIDE = "GPUMETER_BENCH_INSIDE"
POD_RANGE = "10.128.0.0/12"
STAGES = Path(__file__).with_name("scale_stages.yaml")
GPUS_OF_A_NODE = 64  # more than any node has: a thousand nodes would measure kwok
NAMESPACES = 20
STATUS_INTERVAL_MS = 3_000
"""The chart's default."""

PARALLEL = 32


@dataclass(frozen=True)
class World:
    """What a measurement speaks to."""

    server: Server
    operator: OperatorProcess
    kubeconfig: Path
    folder: Path

    def namespace(self, number: int) -> str:
        return f"team-{number % NAMESPACES}"


def enter_namespace(module: str, arguments: Sequence[str]) -> None:
    """Go on in a network namespace of our own, unless this is one; what must be fetched or built is so before."""
    if os.environ.get(INSIDE):
        for command in ("link set lo up", f"route add local {POD_RANGE} dev lo"):
            subprocess.run(["ip", *command.split()], check=True)
        return
    progress = Progress()
    packages.ensure((*packages.FOR_CONTROL_PLANE, "ip", "unshare"), progress, cache_root() / "bench")
    tools.ensure((*tools.FOR_CONTROL_PLANE, tools.KWOK, tools.HELM), progress)
    root = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    command = ["unshare", *root, "--net", "--fork", "--kill-child", sys.executable, "-m", module, *arguments]
    os.execvpe(command[0], command, {**os.environ, INSIDE: "1"})  # noqa: S606 - the same program, elsewhere


@contextmanager
def world(services: int) -> Iterator[World]:
    """A cluster with room for so many workers, and an operator that is not started yet."""
    processes: list[Process] = []
    with control_plane("scale") as kubeconfig:
        folder = kubeconfig.parent
        server, kubectl = Server(kubeconfig), runner("kubectl", kubeconfig)
        helm = runner("helm", kubeconfig, HELM_CACHE_HOME=str(folder / "helm"))
        try:
            kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
            for plural in CRDS:
                kubectl("wait", "--for=condition=Established", "--timeout=60s", f"crd/{plural}.gpumeter.io")
            let_controllers_work(kubectl)
            processes += _machinery(kubeconfig, folder)
            _nodes(server, services)
            for number in range(min(services, NAMESPACES)):
                _must(server.call("POST", "/api/v1/namespaces", {"metadata": {"name": f"team-{number}"}}))
            identity = identity_of_the_chart(kubectl, helm, kubeconfig, folder)
            sort_requests_of(server, NAMESPACE, "gpumeter-operator")
            pace = {"GPUMETER_STATUS_INTERVAL_MS": str(STATUS_INTERVAL_MS), "GPUMETER_STATUS_HOLD_MS": str(HOLD_MS)}
            operator = OperatorProcess(identity, folder, **pace)
            try:
                yield World(server, operator, kubeconfig, folder)
            finally:
                if operator.runs:
                    operator.stop()
                keep_log(operator.log)
        finally:
            kill(processes)


async def create(one: World, manifests: Sequence[dict[str, Any]]) -> None:
    """Create all of them, thirty-two at a time."""
    waiting = iter(manifests)
    async with connected(one) as session:

        async def some() -> None:
            for manifest in waiting:
                namespace = manifest["metadata"]["namespace"]
                path = f"/apis/gpumeter.io/v1alpha1/namespaces/{namespace}/inferenceservices"
                async with session.post(path, json=manifest) as answer:
                    if answer.status != 201:
                        raise RuntimeError(await answer.text())

        await asyncio.gather(*(some() for _ in range(PARALLEL)))


def connected(one: World) -> aiohttp.ClientSession:
    """A session with the API server, as its administrator."""
    api = one.server.api
    return aiohttp.ClientSession(
        f"https://{api.address.netloc}",
        connector=aiohttp.TCPConnector(ssl=api.tls, limit=PARALLEL),
        timeout=aiohttp.ClientTimeout(total=120),
    )


def keep_log(log: Path) -> None:
    """The operator's log outlives the world's folder: it tells what was slow."""
    kept = ROOT / "build/bench" / "scale-operator.log"
    kept.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        shutil.copyfile(log, kept)


def _machinery(kubeconfig: Path, folder: Path) -> list[Process]:
    """Scheduler, kwok and the fleet simulator."""
    programs = tools.ensure((*tools.FOR_CONTROL_PLANE, tools.KWOK), Progress(quiet=True))
    context = json.loads(kubeconfig.read_text())["clusters"][0]
    url, keys, logs = context["cluster"]["server"], folder / "pki", folder / "logs"
    plane = ControlPlane(programs, keys, folder, "127.0.0.1", 0, 0, 0)
    pki.write_kubeconfig(plane.kubeconfig("scheduler"), keys, "scheduler", url, context["name"])
    # As many requests as the other controllers may make here: the default, 50 pods a second, would be what is measured.
    fast = ("--kube-api-qps=200", "--kube-api-burst=400")
    kwok = (
        str(programs["kwok"]),
        f"--kubeconfig={kubeconfig}",
        "--manage-all-nodes",
        f"--cidr={POD_RANGE}",
        f"--config={STAGES}",
        "--node-lease-duration-seconds=40",
    )
    fleet = (sys.executable, "-m", "bench.scale_fleet")
    commands = {"scheduler": (*scheduler(plane).argv, *fast), "kwok": kwok, "fleet": fleet}
    started = []
    for name, argv in commands.items():
        started.append(start(argv, logs / f"{name}.log", dies_with_parent=True))
    if not wait_until(lambda: "ready" in (logs / "fleet.log").read_text(), 30):
        raise RuntimeError(f"The fleet simulator does not listen: {(logs / 'fleet.log').read_text()}")
    return started


def _nodes(server: Server, services: int) -> None:
    """Nodes that kwok keeps alive, with a third more GPUs than there are services, for the second pods of edits."""
    number = -(-services * 4 // 3 // GPUS_OF_A_NODE)
    room = {"cpu": "1k", "memory": "100Ti", "pods": "1k", "nvidia.com/gpu": str(GPUS_OF_A_NODE)}
    for one in range(number):
        labels = {"kubernetes.io/os": "linux", "kubernetes.io/hostname": f"node-{one}"}
        metadata = {"name": f"node-{one}", "labels": labels}
        node = {"metadata": metadata, "status": {"capacity": room, "allocatable": room}}
        _must(server.call("POST", "/api/v1/nodes", node))

    def ready() -> bool:
        nodes = server.call("GET", "/api/v1/nodes").body["items"]
        return all(not (one["spec"].get("taints")) for one in nodes)

    if not wait_until(ready, 60, 0.5):
        raise RuntimeError("kwok's nodes do not get ready.")


def _must(answer: Any) -> None:
    if answer.code != 201:
        raise RuntimeError(f"The API server answers {answer.code}: {answer.body}")
