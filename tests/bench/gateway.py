"""What the gateway adds to a request: a steady rate through it, and the same requests sent to the worker directly.

    python -m bench.gateway [--rate 500] [--rounds 6] [--seconds 5]

Worker, gateway and client are processes of their own on 127.0.0.1. The worker is a stand-in that answers at once with
the same small completion, so whatever is measured is transport; the gateway is the real one with a hand-made cluster.
Requests are sent by the clock, not when the former answer is there (open loop). Rounds go to and fro between the two
ways, so that a noisy moment hits both.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web

from rigs.gateway import completion, gateway_rig

NAME = "gateway"
RAW = Path(__file__).parents[2] / "build/bench" / f"{NAME}.json"
GOALS_MS = {"p50": 1.0, "p99": 3.0}
PATH = "/v1/chat/completions"
BODY = json.dumps({"model": "smollm2", "messages": [{"role": "user", "content": "Hello " * 100}]}).encode()
HEADERS = {"Authorization": "Bearer key-of-acme", "Content-Type": "application/json"}


@dataclass(frozen=True)
class Round:
    """One way for some seconds: latencies of answers, in the order of sending, and how late the client itself was."""

    way: str
    latencies_ms: list[float]
    late_ms: list[float]
    refused: int


def main() -> int:
    """Run; the exit code is 1 where the figures are short of their goals."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=int, default=500, help="requests a second (%(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="of each way (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5, help="of one round (%(default)s)")
    parser.add_argument("--raw", type=Path, default=RAW, help="where the raw numbers are kept (%(default)s)")
    parser.add_argument("--part", choices=("worker", "gateway"), help=argparse.SUPPRESS)
    parser.add_argument("--worker-port", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part == "worker":
        return asyncio.run(_worker())
    if asked.part == "gateway":
        return asyncio.run(_gateway(asked.worker_port))
    cpu_ms = 0.0
    with _part("worker") as worker:
        worker_port = _port(worker)
        with _part("gateway", "--worker-port", str(worker_port)) as gateway:
            try:
                ways = {"direct": worker_port, "gateway": _port(gateway)}
                before_ms = _cpu_ms(gateway.pid)
                rounds = asyncio.run(_measure(ways, asked.rate, asked.rounds, asked.seconds))
                cpu_ms = _cpu_ms(gateway.pid) - before_ms
            finally:
                gateway.terminate()
                worker.terminate()
    through = sum(len(one.latencies_ms) for one in rounds if one.way == "gateway") + asked.rate
    return _tell(rounds, asked.rate, cpu_ms / through, asked.raw)


# The parts, each a process


async def _worker() -> int:
    answer = json.dumps(completion("Hello you")).encode()

    async def at_once(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=answer, content_type="application/json")

    app = web.Application()
    app.router.add_post(PATH, at_once)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(site.port, flush=True)
    await asyncio.Event().wait()
    return 0


async def _gateway(worker_port: int) -> int:
    # No limit of the gateway's may show: on a machine that stalls, requests pile up for a moment.
    async with gateway_rig(in_flight_max=100_000) as rig:
        rig.cluster.add_service("team-a", "smollm2", "smollm2", engine={"maxBatchSize": 100_000, "maxQueueLength": 0})
        rig.cluster.end_worker(rig.worker.port)
        rig.cluster.set_endpoint("team-a", "smollm2", worker_port)
        print(rig.gateway.port, flush=True)
        await asyncio.Event().wait()
    return 0


def _part(name: str, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "bench.gateway", "--part", name, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _port(process: "subprocess.Popen[str]") -> int:
    if process.stdout is None or not (line := process.stdout.readline()):
        raise SystemExit("A part of the bench did not start; its words are above.")
    return int(line)


def _cpu_ms(pid: int) -> float:
    """CPU time of a process so far, of user and system together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


# The client


async def _measure(ways: dict[str, int], rate: int, rounds: int, seconds: float) -> list[Round]:
    measured = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=HEADERS) as http:
        for number in range(rounds + 1):
            for way, port in ways.items():
                one = await _round(http, way, f"http://127.0.0.1:{port}{PATH}", rate, seconds if number else 1.0)
                if number:  # the first is for connections and caches
                    measured.append(one)
                    print(f"  {number}/{rounds} {way:<8} p50 {_quantile(one.latencies_ms, 0.5):6.2f} ms", flush=True)
    return measured


async def _round(http: aiohttp.ClientSession, way: str, url: str, rate: int, seconds: float) -> Round:
    latencies_ms: list[float] = []
    late_ms: list[float] = []
    refused: list[str] = []

    async def ask(due_s: float) -> None:
        async with http.post(url, data=BODY) as answer:
            await answer.read()
            if answer.status != 200:
                refused.append(await answer.text())
                return
        latencies_ms.append((time.perf_counter() - due_s) * 1000)

    began_s = time.perf_counter()
    running = []
    for number in range(int(rate * seconds)):
        due_s = began_s + number / rate
        if (wait_s := due_s - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        late_ms.append((time.perf_counter() - due_s) * 1000)
        running.append(asyncio.create_task(ask(time.perf_counter())))
    await asyncio.gather(*running)
    if refused:
        print(f"  {way}: {len(refused)} of {len(running)} were refused, the last with {refused[-1][:300]}", flush=True)
    return Round(way, latencies_ms, late_ms, len(refused))


# The figures


def _tell(rounds: list[Round], rate: int, cpu_ms: float, raw: Path) -> int:
    ways = {way: [one for one in rounds if one.way == way] for way in ("direct", "gateway")}
    print(
        f"\n{rate} requests a second, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    )
    print(f"{'ms':<10} {'p50':>8} {'p90':>8} {'p99':>8} {'max':>8} {'requests':>9}")
    for way, its in ways.items():
        all_ms = [ms for one in its for ms in one.latencies_ms]
        told = "".join(f" {_quantile(all_ms, q):>8.2f}" for q in (0.5, 0.9, 0.99, 1.0))
        print(f"{way:<10}{told} {len(all_ms):>9}")
    late_ms = [ms for one in rounds for ms in one.late_ms]
    print(f"the client itself sent late by p50 {_quantile(late_ms, 0.5):.2f} ms, p99 {_quantile(late_ms, 0.99):.2f} ms")
    print(f"the gateway's CPU time: {cpu_ms:.2f} ms a request")
    added = {name: _added(ways, q) for name, q in (("p50", 0.5), ("p99", 0.99))}
    raw.parent.mkdir(parents=True, exist_ok=True)
    kept = [{"way": one.way, "latencies_ms": one.latencies_ms, "late_ms": one.late_ms} for one in rounds]
    raw.write_text(json.dumps({"rate": rate, "cpu_ms_a_request": cpu_ms, "added_ms": added, "rounds": kept}))
    print(f"\nraw numbers: {raw}")
    for name, value in added.items():
        met = value <= GOALS_MS[name]
        print(f"{NAME}_{name} {value:.2f} ms added, goal {GOALS_MS[name]:g}: {'met' if met else 'short'}")
    if refused := sum(one.refused for one in rounds):
        print(f"{refused} requests were refused, so these figures are of a machine that did not keep up")
    return 0 if not refused and all(value <= GOALS_MS[name] for name, value in added.items()) else 1


def _added(ways: dict[str, list[Round]], q: float) -> float:
    """The median over the rounds of what the quantile through the gateway exceeds that of the direct round before."""
    pairs = zip(ways["direct"], ways["gateway"], strict=True)
    return statistics.median(
        _quantile(through.latencies_ms, q) - _quantile(direct.latencies_ms, q) for direct, through in pairs
    )


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


if __name__ == "__main__":
    sys.exit(main())
