"""What the autoscaler's loop costs: CPU over a thousand services, each asked and decided about every two seconds.

    python -m bench.scaling_cost [--services 1000] [--seconds 20]

Owns the fleet (plain objects, as the mirrors hold them) and the reading of this process's CPU time. Loop, decisions and
the HTTP client are the product's; one server in a process of its own answers for all workers, with a text as long as a
worker's. Kubernetes is not asked, for at rest nothing is written.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from gpumeter_operator.adapters.kubernetes import Manifest
from gpumeter_operator.adapters.signals import Signals
from gpumeter_operator.decide.spec import Problem
from gpumeter_operator.flow.scale import EVERY_S, Scaler

NAME = "scaling-cost"
RAW = Path(__file__).parents[2] / "build/bench" / f"{NAME}.json"
GOAL_PERCENT = 20.0


class Settled:
    """Services at rest: what the mirrors and the gateways tell of them. A write would be a defect."""

    def __init__(self, number: int) -> None:
        self.objects = {("bench", f"s{one}"): _service(one) for one in range(number)}
        self._pods = {("bench", f"s{one}"): [_pod(one)] for one in range(number)}
        self.writes = 0

    def pods_of(self, namespace: str, name: str) -> list[Manifest]:
        return self._pods[namespace, name]

    def deployment(self, namespace: str, name: str) -> Manifest:
        return {"spec": {"replicas": 1}, "status": {}}

    def asked(self) -> Mapping[str, Any]:
        return {}

    def silent(self) -> tuple[str, ...]:
        return ()

    async def patch(self, *_: object, **__: object) -> None:
        self.writes += 1

    async def reconcile(self, service: Manifest) -> None:
        self.writes += 1

    async def tell(self, service: Manifest, told: Problem, normal: bool, now: datetime) -> None:
        self.writes += 1


def main() -> int:
    """Run; the exit code is 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--services", type=int, default=1_000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--raw", type=Path, default=RAW)
    asked = parser.parse_args()
    ports: Any = multiprocessing.Queue()
    server = multiprocessing.Process(target=_serve, args=(ports,), daemon=True)
    server.start()
    try:
        found = asyncio.run(_measure(asked.services, asked.seconds, ports.get(timeout=20)))
    finally:
        server.terminate()
    print(f"{asked.services} services at rest, {found['seconds']:.0f} s, {found['heard']} workers heard at the end")
    for name in ("percent_of_a_core", "percent_decisions_alone"):
        print(f"{name.replace('_', ' '):<28} {found[name]:>6.1f}")
    machine = {"processor": platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    asked.raw.parent.mkdir(parents=True, exist_ok=True)
    asked.raw.write_text(json.dumps({"machine": machine, **found}, indent=1))
    met = found["percent_of_a_core"] <= GOAL_PERCENT and found["writes"] == 0
    print(f"\nraw numbers: {asked.raw}")
    print(f"{NAME} {found['percent_of_a_core']:.1f} % of a core, goal {GOAL_PERCENT:.0f}: {'met' if met else 'short'}")
    return 0 if met else 1


async def _measure(number: int, seconds: float, port: int) -> dict[str, Any]:
    settled, signals = Settled(number), Signals(port)
    scaler = Scaler(
        settled,
        settled,  # type: ignore[arg-type]
        signals,
        settled,  # type: ignore[arg-type]
        settled,  # type: ignore[arg-type]
        reconcile=settled.reconcile,
        tell=settled.tell,
    )
    for _ in range(3):  # connections, and what is read once
        await scaler.tick()
        await asyncio.sleep(EVERY_S / 4)
    loop = asyncio.create_task(scaler.run())
    begun_s, begun_cpu_s = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    took_s, cpu_s = time.monotonic() - begun_s, time.process_time() - begun_cpu_s
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    begun_cpu_s = time.process_time()
    for service in settled.objects.values():
        scaler.look_at([f"bench/{service['metadata']['name']}"])
    decisions_s = time.process_time() - begun_cpu_s
    heard = sum(signals.load(f"u{one}") is not None for one in range(number))
    await signals.close()
    return {
        "services": number,
        "seconds": took_s,
        "percent_of_a_core": 100 * cpu_s / took_s,
        "percent_decisions_alone": 100 * decisions_s / EVERY_S,
        "heard": heard,
        "writes": settled.writes,
    }


def _service(number: int) -> Manifest:
    metadata = {"namespace": "bench", "name": f"s{number}", "uid": f"s-{number}", "generation": 1}
    scaling = {"minReplicas": 1, "maxReplicas": 8}
    return {"metadata": metadata, "spec": {"model": {"uri": "hf://o/n"}, "scaling": scaling}}


def _pod(number: int) -> Manifest:
    return {
        "metadata": {
            "namespace": "bench",
            "name": f"p{number}",
            "uid": f"u{number}",
            "resourceVersion": "1",
            "labels": {"gpumeter.io/draining": "false"},
            "annotations": {"gpumeter.io/service-uid": f"s-{number}"},
            "creationTimestamp": "2026-11-21T10:00:00Z",
        },
        "spec": {"nodeName": "n"},
        "status": {"phase": "Running", "podIP": "127.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
    }


def _serve(ports: Any) -> None:
    filler = "".join(f'gpumeter_step_duration_seconds_bucket{{le="{one}"}} 0.0\n' for one in range(200))
    told = filler + "vllm:num_requests_waiting 0\nvllm:num_requests_running 1\ngpumeter_sessions_total 4\n"
    answer = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(told)}\r\n\r\n{told}".encode()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(one, "127.0.0.1", 0, backlog=2_000)
        ports.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


if __name__ == "__main__":
    sys.exit(main())
