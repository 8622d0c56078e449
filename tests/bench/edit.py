"""From an edit of a service to its Deployment, with thousands of settled services beside it, on a real API server.

    python -m bench.edit [--services 1000] [--edits 200]

Owns the edits and the clock between the API server's answer to one and the moment at which a watch shows the Deployment
as edited. The world is that of bench.scale: a real operator process and control plane, kwok's nodes and pods, one
process for all workers. Each edit rolls a worker out, as edits do.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

from bench.reaction import quantile
from bench.scale import create_and_wait, settle, told
from bench.scale_world import World, connected, enter_namespace, world
from gpumeter_operator.adapters.kubernetes import DEPLOYMENTS, INFERENCE_SERVICES, Cluster

NAME = "edit"
RAW = Path(__file__).parents[2] / "build/bench" / f"{NAME}.json"
GOAL_MS = 2_000
GIVEN_UP_S = 60.0
VARIABLE = "GPUMETER_MAX_BATCH_SIZE"
MERGE = {"Content-Type": "application/merge-patch+json"}


def main() -> int:
    """Run; the exit code is 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--services", type=int, default=1_000)
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--every-s", type=float, default=0.5, help="mean time between two edits (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--raw", type=Path, default=RAW, help="where the figures are kept (%(default)s)")
    asked = parser.parse_args()
    enter_namespace("bench.edit", sys.argv[1:])
    with world(asked.services) as one:
        one.operator.start()
        took_s, _ = create_and_wait(one, asked.services)
        told(f"{asked.services} services Ready after {took_s:.1f} s")
        settle(one.operator)
        found = asyncio.run(_edits(one, asked.services, asked.edits, asked.every_s, random.Random(asked.seed)))
    return _report(found, asked.services, asked.raw)


async def _edits(one: World, services: int, edits: int, every_s: float, chance: random.Random) -> dict[str, Any]:
    cluster = Cluster.connect(one.kubeconfig)
    applied, observed = _Seen(), _Seen()
    watches = [
        asyncio.create_task(_follow(cluster, DEPLOYMENTS, applied, _batch_size)),
        asyncio.create_task(_follow(cluster, INFERENCE_SERVICES, observed, _observed)),
    ]
    await asyncio.gather(applied.ready.wait(), observed.ready.wait())
    waiting = []
    async with connected(one) as session:
        for number in range(edits):
            await asyncio.sleep(chance.expovariate(1 / every_s))
            which = chance.randrange(services)
            key, size = (one.namespace(which), f"service-{which}"), 100 + number  # no size twice
            path = f"/apis/gpumeter.io/v1alpha1/namespaces/{key[0]}/inferenceservices/{key[1]}"
            body = json.dumps({"spec": {"engine": {"maxBatchSize": size}}})
            async with session.patch(path, data=body, headers=MERGE) as answer:
                edited = await answer.json()
                if answer.status != 200:
                    raise RuntimeError(str(edited))
            begun_s = time.monotonic()
            waiting.append((begun_s, applied.at(key, size), observed.at(key, edited["metadata"]["generation"])))
            if (number + 1) % 50 == 0:
                told(f"{number + 1:>5}/{edits} edits")
        await asyncio.wait([one for _, *both in waiting for one in both], timeout=GIVEN_UP_S)
    for task in watches:
        task.cancel()
    await asyncio.gather(*watches, return_exceptions=True)
    await cluster.close()

    def milliseconds(which: int) -> list[float]:
        # One that never came counts as the time after which it was given up.
        return [
            1_000 * ((each[which].result() if each[which].done() else each[0] + GIVEN_UP_S) - each[0])  # type: ignore[attr-defined]
            for each in waiting
        ]

    return {"applied_ms": milliseconds(1), "observed_ms": milliseconds(2)}


class _Seen:
    """When a watch first showed a value of an object, or a larger one."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self._awaited: dict[tuple[str, str], list[tuple[int, asyncio.Future[float]]]] = {}

    def at(self, key: tuple[str, str], value: int) -> asyncio.Future[float]:
        """The moment, when it has come. Watches run in this loop, so none is missed that comes after this call; the
        operator's writes take longer than the answer to the edit."""
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._awaited.setdefault(key, []).append((value, future))
        return future

    def saw(self, key: tuple[str, str], value: int) -> None:
        for awaited in list(self._awaited.get(key, ())):
            if value >= awaited[0]:
                awaited[1].set_result(time.monotonic())
                self._awaited[key].remove(awaited)


async def _follow(cluster: Cluster, resource: Any, seen: _Seen, value_of: Any) -> None:
    _, version = await cluster.list_at(resource)
    seen.ready.set()
    async with aclosing(cluster.watch(resource, None, None, version)) as changes:  # type: ignore[type-var]
        async for change, item in changes:
            if change == "MODIFIED":
                metadata = item["metadata"]
                seen.saw((metadata["namespace"], metadata["name"]), value_of(item))


def _batch_size(deployment: dict[str, Any]) -> int:
    containers = deployment["spec"]["template"]["spec"]["containers"]
    return next(int(one["value"]) for one in containers[0]["env"] if one["name"] == VARIABLE)


def _observed(service: dict[str, Any]) -> int:
    return int((service.get("status") or {}).get("observedGeneration", 0))


def _report(found: dict[str, Any], services: int, raw: Path) -> int:
    raw.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    raw.write_text(json.dumps({"machine": machine, "services": services, **found}, indent=1))
    print(f"\n{'ms after an edit, ' + str(services) + ' services':<40} {'edits':>7} {'p50':>8} {'p99':>8} {'most':>8}")
    for key, name in (("applied_ms", "Deployment is as edited"), ("observed_ms", "status tells of it")):
        values = found[key]
        print(
            f"{name:<40} {len(values):>7} {quantile(values, 0.5):>8.0f} {quantile(values, 0.99):>8.0f} "
            f"{max(values):>8.0f}"
        )
    print(f"\nraw numbers: {raw}")
    p99_ms = quantile(found["applied_ms"], 0.99)
    met = p99_ms <= GOAL_MS
    print(f"{NAME} {p99_ms:.0f} ms p99, goal {GOAL_MS}: {'met' if met else 'short'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
