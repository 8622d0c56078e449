"""From a queue that is there to replicas that are patched, on a real API server: of a running service, and from zero.

    python -m bench.reaction [--spikes 50] [--hpa 50]

Owns the spikes, the clock between them and the Deployment's watch, and the figures. Operator, kopf, API server, etcd
and controller manager are real; workers, gateway and kubelet are stand-ins that tell what the bench sets. Beside it the
stock HorizontalPodAutoscaler of the same controller manager, on the same spike told by an external metrics API.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import kopf

from apiserver import CRDS, ROOT, Server, runner
from bench.reaction_hpa import hpa_reactions
from devcluster import control_plane
from gpumeter_operator.adapters.kubernetes import DEPLOYMENTS, Cluster
from gpumeter_operator.adapters.mirror import Mirror
from gpumeter_operator.decide.workload import Installation
from gpumeter_operator.flow.operation import Operation
from gpumeter_operator.handled import HandledInMemory
from gpumeter_operator.main import handlers
from gpumeter_operator.settings import configure_kopf
from operatorrun import MASTER_KEY, let_controllers_work, service
from rigs.standins import StandInDoors, StandInKubelet, StandInWorkers

NAME = "reaction"
RAW = Path(__file__).parents[2] / "build/bench" / f"{NAME}.json"
GOAL_MS, GOAL_FROM_ZERO_MS = 3_000, 1_000
NAMESPACE = "bench-reaction"
BUSY, IDLE = "127.77.0.1", "127.77.0.2"
QUICK = {"scaleDown": {"stabilizationWindowSeconds": 0}}


def main() -> int:
    """Run; the exit code is 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spikes", type=int, default=50)
    parser.add_argument("--hpa", type=int, default=50, help="spikes for the stock HPA; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--raw", type=Path, default=RAW)
    asked = parser.parse_args()
    with control_plane(NAME) as kubeconfig:
        kubectl = runner("kubectl", kubeconfig)
        kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
        for plural in CRDS:
            kubectl("wait", "--for=condition=Established", "--timeout=60s", f"crd/{plural}.gpumeter.io")
        kubectl("create", "namespace", NAMESPACE)
        let_controllers_work(kubectl)
        os.environ["KUBECONFIG"] = str(kubeconfig)
        found = asyncio.run(_measure(kubeconfig, asked.spikes, random.Random(asked.seed)))
        if asked.hpa:
            found["hpa"] = hpa_reactions(kubeconfig, kubectl, NAMESPACE, asked.hpa, random.Random(asked.seed))
    return _report(found, asked.raw)


async def _measure(kubeconfig: Path, spikes: int, chance: random.Random) -> dict[str, list[float]]:
    cluster, server = Cluster.connect(kubeconfig), Server(kubeconfig)
    doors: list[StandInDoors] = []

    def open_doors(on_change: Any) -> StandInDoors:
        doors.append(StandInDoors(on_change))
        return doors[0]

    installation = Installation("localhost/worker:bench", "IfNotPresent", "http://gateway")
    operation = Operation(
        Cluster.connect(kubeconfig),
        installation,
        MASTER_KEY,
        interval_s=3,
        deletion_margin=timedelta(seconds=1),
        http=("127.0.0.1", 0),
        open_doors=open_doors,
    )
    settings, handled = kopf.OperatorSettings(), HandledInMemory()
    configure_kopf(settings, handled)
    stop = asyncio.Event()
    operator = asyncio.create_task(
        kopf.operator(
            registry=handlers(handled),
            settings=settings,
            memo=operation,
            standalone=True,
            clusterwide=True,
            stop_flag=stop,
        )
    )
    workers = StandInWorkers(BUSY, 8000), StandInWorkers(IDLE, 8000)
    for one in workers:
        await one.start()
    kubelet = StandInKubelet(server, cluster, lambda name: BUSY if name == "busy" else IDLE)
    watch = _Deployments(cluster)
    tasks = [asyncio.create_task(kubelet.run()), asyncio.create_task(watch.mirror.run()), operator]
    try:
        running = await _spikes(watch, server, workers[0], spikes, chance)
        zero = await _from_zero(watch, server, doors[0], spikes, chance)
    finally:
        stop.set()
        await asyncio.wait([operator], timeout=10)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await operation.stop()
        for one in workers:
            await one.close()
        await cluster.close()
    return {"running": running, "from_zero": zero}


class _Deployments:
    """Replicas of Deployments as a watch tells them, and when."""

    def __init__(self, cluster: Cluster) -> None:
        self._event = asyncio.Event()
        self.mirror = Mirror(cluster, DEPLOYMENTS, namespace=NAMESPACE, on_change=self._event.set)

    def replicas(self, name: str) -> int | None:
        found = self.mirror.objects.get((NAMESPACE, name))
        return None if found is None else int(found["spec"]["replicas"])

    async def until(self, look: Callable[[], bool], what: str, timeout_s: float = 90) -> float:
        """The moment at which `look` was true."""
        end_s = time.monotonic() + timeout_s
        while not look():
            if time.monotonic() > end_s:
                raise TimeoutError(f"not within {timeout_s:.0f} s: {what}")
            self._event.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._event.wait()
        return time.monotonic()


async def _create(server: Server, name: str, **spec: Any) -> None:
    made = await asyncio.to_thread(server.create, NAMESPACE, "inferenceservices", service(NAMESPACE, name, **spec))
    if made.code != 201:
        raise RuntimeError(str(made.body))


async def _spikes(
    watch: _Deployments, server: Server, worker: StandInWorkers, spikes: int, chance: random.Random
) -> list[float]:
    await _create(server, "busy", scaling={"minReplicas": 1, "maxReplicas": 8, "behavior": QUICK})
    await watch.until(lambda: watch.replicas("busy") == 1 and worker.asked > 2, "a first worker that is asked")
    found = []
    for number in range(1, spikes + 1):
        await watch.until(lambda: watch.replicas("busy") == 1, "one worker again")
        await asyncio.sleep(0.5 + chance.random() * 2)  # anywhere between two rounds
        worker.waiting, begun_s = 20, time.monotonic()
        found.append((await watch.until(lambda: (watch.replicas("busy") or 0) > 1, "a reaction") - begun_s) * 1_000)
        worker.waiting = 0
        _progress("running", number, spikes, found)
    return found


async def _from_zero(
    watch: _Deployments, server: Server, doors: StandInDoors, spikes: int, chance: random.Random
) -> list[float]:
    names = [f"zero-{number}" for number in range(spikes)]
    for name in names:
        await _create(server, name, scaling={"minReplicas": 0, "maxReplicas": 8, "scaleToZeroAfter": "30s"})
    print(f"{spikes} services get ready and go to zero", flush=True)
    await watch.until(lambda: all(watch.replicas(name) == 0 for name in names), "all at zero", 300)
    found = []
    for number, name in enumerate(names, start=1):
        await asyncio.sleep(chance.random() * 0.5)
        begun_s = time.monotonic()
        doors.put(f"{NAMESPACE}/{name}", 1)
        found.append((await watch.until(lambda n=name: watch.replicas(n) == 1, "a start from zero") - begun_s) * 1_000)
        _progress("from zero", number, spikes, found)
    return found


def _progress(what: str, number: int, of: int, found: list[float]) -> None:
    if number % 10 == 0 or number == of:
        print(f"{what:<10} {number:>4}/{of}, median {statistics.median(found):.0f} ms", flush=True)


def _report(found: dict[str, list[float]], raw: Path) -> int:
    print(f"\n{'queue spike to patched replicas, ms':<40} {'spikes':>7} {'p50':>8} {'p99':>8} {'most':>8}")
    names = {"running": "gpumeter, running", "from_zero": "gpumeter, from zero", "hpa": "stock HPA, running"}
    for key, values in found.items():
        print(
            f"{names[key]:<40} {len(values):>7} {quantile(values, 0.5):>8.0f} {quantile(values, 0.99):>8.0f} "
            f"{max(values):>8.0f}"
        )
    raw.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    raw.write_text(json.dumps({"machine": machine, "milliseconds": found}, indent=1))
    print(f"\nraw numbers: {raw}")
    met = True
    for name, key, goal_ms in ((NAME, "running", GOAL_MS), (f"{NAME}-from-zero", "from_zero", GOAL_FROM_ZERO_MS)):
        p99_ms = quantile(found[key], 0.99)
        good = p99_ms <= goal_ms
        met &= good
        print(f"{name} {p99_ms:.0f} ms p99, goal {goal_ms}: {'met' if good else 'short'}")
    return 0 if met else 1


def quantile(values: list[float], share: float) -> float:
    """The smallest value that is at least as large as `share` of all."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * len(ordered) * 1_000) // 1_000) - 1))]


if __name__ == "__main__":
    sys.exit(main())
