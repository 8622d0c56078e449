"""What the operator takes with thousands of InferenceServices, on a real API server with kwok's nodes and pods.

    python -m bench.scale [--services 100 1000 5000] [--rest-s 60]

Owns the phases and the figures: created in parallel until all are Ready, at rest with decisions every two seconds, and
a restart with all of them settled; with --floor also how long plain objects take where no operator is. The operator is
the real process with the chart's own rights; API server, etcd, controller manager and scheduler are real; kubelets are
kwok's, and one process answers for all workers. All of them share this machine's cores.
"""

import argparse
import asyncio
import json
import math
import os
import platform
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.scale_floor import floors
from bench.scale_processes import cpu_by_name, cpu_seconds, cpu_since, memory_mib
from bench.scale_requests import counted, since
from bench.scale_world import NAMESPACES, World, connected, create, enter_namespace, world
from operatorrun import OperatorProcess, condition, service

NAME = "scale"
RAW = Path(__file__).parents[2] / "build/bench" / f"{NAME}.json"
# name -> (key of a result, unit, goal by number of services)
GOALS: dict[str, tuple[str, str, dict[int, float]]] = {
    "ready": ("ready_s", "s", {1_000: 60}),
    "restart": ("restart_s", "s", {1_000: 20}),
    "rewritten": ("rewritten", "objects", {100: 0, 1_000: 0, 5_000: 0}),
    "memory": ("rss_mib", "MiB", {1_000: 200, 5_000: 600}),
    "cpu-at-rest": ("rest_percent", "% of a core", {1_000: 20}),
}
OWNED = (
    "/apis/gpumeter.io/v1alpha1/inferenceservices",
    "/apis/apps/v1/deployments",
    "/apis/policy/v1/poddisruptionbudgets",
    "/api/v1/services",
    "/api/v1/serviceaccounts",
    "/api/v1/secrets",
    "/api/v1/pods",
)
SETTLED_S = 10.0  # without a write of the operator


def main() -> int:
    """Run; the exit code is 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--services", type=int, nargs="+", default=[100, 1_000, 5_000])
    parser.add_argument("--rest-s", type=float, default=60, help="how long CPU at rest is measured (%(default)s)")
    parser.add_argument("--raw", type=Path, default=RAW, help="where the figures are kept (%(default)s)")
    parser.add_argument("--floor", action="store_true", help="also what the control plane takes without an operator")
    asked = parser.parse_args()
    enter_namespace("bench.scale", sys.argv[1:])
    found = []
    for number in asked.services:
        with world(number) as one:
            found.append(measure(one, number, asked.rest_s))
        if asked.floor:
            found[-1]["floor"] = floors(services(number))
            for name, floor in found[-1]["floor"].items():
                told(f"without an operator, {name}: {number} Ready after {floor['ready_s']:.1f} s")
    return _report(found, asked.raw)


def measure(one: World, number: int, rest_s: float) -> dict[str, Any]:
    """All phases for one number of services."""
    operator = one.operator
    operator.start()
    empty_mib, before, plane = memory_mib(operator.pid), counted(one.server), cpu_by_name()
    took_s, cpu_s = create_and_wait(one, number)
    plane_cpu_s = cpu_since(plane)
    told(f"{number} services Ready after {took_s:.1f} s, {cpu_s:.1f} s of the operator's CPU")
    settle(operator)
    made = since(before, counted(one.server))
    rest_percent, at_rest = rest(one, rest_s)
    rss_mib, peak_mib = memory_mib(operator.pid), memory_mib(operator.pid, "VmHWM")
    told(f"at rest {rest_percent:.1f} % of a core, {rss_mib:.0f} MiB (most {peak_mib:.0f}), requests {at_rest}")
    restarted = restart(one, number)
    told(f"restarted: all looked at after {restarted['restart_s']:.1f} s, {restarted['rewritten']} objects rewritten")
    return {
        "services": number,
        "ready_s": took_s,
        "ready_cpu_s": cpu_s,
        "plane_cpu_s": plane_cpu_s,
        "requests": made,
        "requests_per_service": sum(made.values()) / number,
        "writes_per_service": sum(value for name, value in made.items() if name.startswith("write")) / number,
        "rest_percent": rest_percent,
        "rest_requests": at_rest,
        "empty_mib": empty_mib,
        "rss_mib": max(rss_mib, restarted["rss_mib"]),
        "first_rss_mib": rss_mib,
        "peak_mib": max(peak_mib, restarted.pop("peak_mib")),
        "restarted_rss_mib": restarted.pop("rss_mib"),
        **restarted,
    }


def create_and_wait(one: World, number: int) -> tuple[float, float]:
    """Seconds from the first creation until all are Ready in the API, and the operator's CPU seconds."""
    manifests = services(number)
    begun_s, begun_cpu_s = time.monotonic(), cpu_seconds(one.operator.pid)
    asyncio.run(create(one, manifests))
    told(f"{number} services created in {time.monotonic() - begun_s:.1f} s")
    wait_ready(one, number, begun_s, 60 + number)
    return time.monotonic() - begun_s, cpu_seconds(one.operator.pid) - begun_cpu_s


def services(number: int) -> list[dict[str, Any]]:
    """So many InferenceServices, each with one GPU and the autoscaler, over all namespaces of the world."""
    return [
        service(
            f"team-{each % NAMESPACES}",
            f"service-{each}",
            model={"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"},
            resources={"gpu": {"count": 1}},
            scaling={"minReplicas": 1, "maxReplicas": 4},
        )
        for each in range(number)
    ]


def wait_ready(one: World, number: int, begun_s: float, limit_s: float) -> None:
    """Until the operator says that all are Ready, and the API says so too."""
    last_s = begun_s
    while True:
        if not one.operator.runs:
            raise RuntimeError(f"The operator ended: {one.operator.said.splitlines()[-1]}")
        ready = one.operator.metric('gpumeter_operator_services{ready="True"}')
        if ready >= number and asyncio.run(_ready_in_api(one)) >= number:
            return
        now_s = time.monotonic()
        if now_s - last_s > 10:
            last_s = now_s
            told(f"  {ready:.0f} of {number} Ready, {now_s - begun_s:.0f} s")
        if now_s - begun_s > limit_s:
            raise TimeoutError(f"Only {ready:.0f} of {number} services were Ready after {limit_s:.0f} s.")
        time.sleep(0.5)


async def _ready_in_api(one: World) -> int:
    async with connected(one) as session, session.get(OWNED[0]) as answer:
        items = (await answer.json())["items"]
    return sum(condition(item.get("status") or {}).get("status") == "True" for item in items)


def settle(operator: OperatorProcess) -> None:
    """Until the operator has written nothing for a while."""
    writes, since_s = -1.0, time.monotonic()
    while time.monotonic() - since_s < SETTLED_S:
        now = operator.metric("gpumeter_operator_api_writes_total")
        if now != writes:
            writes, since_s = now, time.monotonic()
        time.sleep(1)


def rest(one: World, seconds: float) -> tuple[float, dict[str, int]]:
    """The operator's share of a core while nothing happens, and what it asked of the API server."""
    before = counted(one.server)
    begun_s, begun_cpu_s = time.monotonic(), cpu_seconds(one.operator.pid)
    time.sleep(seconds)
    percent = 100 * (cpu_seconds(one.operator.pid) - begun_cpu_s) / (time.monotonic() - begun_s)
    return percent, since(before, counted(one.server))


def restart(one: World, number: int) -> dict[str, Any]:
    """Stop and start the operator: when it has looked at all again, and which objects have another version then."""
    one.operator.stop()
    versions, before = asyncio.run(_versions(one)), counted(one.server)
    begun_s = time.monotonic()
    one.operator.start()
    started_s = time.monotonic() - begun_s
    wait_ready(one, number, begun_s, 60 + number)
    took_s, cpu_s = time.monotonic() - begun_s, cpu_seconds(one.operator.pid)
    settle(one.operator)
    asked = since(before, counted(one.server))
    after = asyncio.run(_versions(one))
    rewritten = sorted(key for key in versions.keys() | after.keys() if versions.get(key) != after.get(key))
    for key in rewritten[:10]:
        told(f"  rewritten: {key}")
    return {
        "restart_s": took_s,
        "restart_started_s": started_s,
        "restart_cpu_s": cpu_s,
        "restart_requests": asked,
        "restart_writes": sum(value for name, value in asked.items() if name.startswith("write")),
        "rewritten": len(rewritten),
        "rss_mib": memory_mib(one.operator.pid),
        "peak_mib": memory_mib(one.operator.pid, "VmHWM"),
    }


async def _versions(one: World) -> dict[str, str]:
    """resourceVersion of every object that the operator writes or could write."""
    only = {"Accept": "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"}
    found = {}
    async with connected(one) as session:
        for path in OWNED:
            async with session.get(path, headers=only) as answer:
                for item in (await answer.json())["items"]:
                    metadata = item["metadata"]
                    key = f"{path.rpartition('/')[2]} {metadata['namespace']}/{metadata['name']}"
                    found[key] = metadata["resourceVersion"]
    return found


def told(text: str) -> None:
    print(text, flush=True)


ROWS = (
    ("ready_s", "all Ready, s", 1),
    ("ready_cpu_s", "  CPU of the operator, s", 1),
    ("requests_per_service", "  requests a service", 1),
    ("writes_per_service", "  writes a service", 1),
    ("rest_percent", "at rest, % of a core", 1),
    ("empty_mib", "memory without services, MiB", 0),
    ("first_rss_mib", "memory at rest, MiB", 0),
    ("restarted_rss_mib", "memory after a restart, MiB", 0),
    ("peak_mib", "most memory, MiB", 0),
    ("restart_s", "restart, all looked at, s", 1),
    ("restart_cpu_s", "  CPU of the operator, s", 1),
    ("restart_writes", "  writes", 0),
    ("rewritten", "  objects rewritten", 0),
)
FLOORS = {"bare": "floor: Deployments and Services, s", "owned": "floor: all that services own, s"}
API_SERVER = "kube-apiserver"
WIDTH = 36


def _report(found: list[dict[str, Any]], raw: Path) -> int:
    raw.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    raw.write_text(json.dumps({"machine": machine, "results": found}, indent=1))
    print(f"\n{'InferenceServices':<{WIDTH}}" + "".join(f"{one['services']:>10}" for one in found))
    for key, name, digits in ROWS:
        print(f"{name:<{WIDTH}}" + "".join(f"{one[key]:>10.{digits}f}" for one in found))
        if key == "ready_cpu_s":
            _plane([one["plane_cpu_s"] for one in found])
            _floors(found)
    for one in found:
        each = ", ".join(f"{name} {value / one['services']:.2f}" for name, value in sorted(one["requests"].items()))
        print(f"requests a service at {one['services']}: {each}")
    print(f"\nraw numbers: {raw}")
    met = True
    for name, (key, unit, goals) in GOALS.items():
        for one in found:
            if (goal := goals.get(one["services"])) is not None:
                good = one[key] <= goal
                met &= good
                value = f"{one[key]:.1f} {unit} at {one['services']}"
                print(f"{NAME}-{name} {value}, goal {goal:.0f}: {'met' if good else 'short'}")
    for smaller, larger in pairwise(found):
        met &= _growth(smaller, larger)
    return 0 if met else 1


def _floors(found: list[dict[str, Any]]) -> None:
    for name, label in FLOORS.items():
        floor = [one["floor"][name] for one in found if "floor" in one]
        if floor:
            print(f"{label:<{WIDTH}}" + "".join(f"{one['ready_s']:>10.1f}" for one in floor))
            _plane([one["cpu_s"] for one in floor])


def _plane(cpu_s: list[dict[str, float]]) -> None:
    print(f"{'  CPU of the API server, s':<{WIDTH}}" + "".join(f"{one.get(API_SERVER, 0.0):>10.1f}" for one in cpu_s))


def _growth(smaller: dict[str, Any], larger: dict[str, Any]) -> bool:
    """CPU for one service more, as a power of their number: 1 is linear."""
    times, more = larger["ready_cpu_s"] / smaller["ready_cpu_s"], larger["services"] / smaller["services"]
    power = math.log(times) / math.log(more)
    good = power <= 1.05  # what two runs of the same differ by
    span = f"{smaller['services']} to {larger['services']}"
    print(f"{NAME}-growth n^{power:.2f} of CPU from {span}, goal n^1: {'met' if good else 'short'}")
    return good


if __name__ == "__main__":
    sys.exit(main())
