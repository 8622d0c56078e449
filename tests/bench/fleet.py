"""One collector and ten thousand workers: how far behind the slowest are, and whether memory stays flat.

    python -m bench.fleet [--workers 10000] [--seconds 120] [--http] [--ledger sqlite:///PATH]

Workers make real records in real time (a flush of 4 every 5 s), answered in this process or, with --http, by another
one over real connections; the collector, its turns and the ledger are the product's. Every 100th worker never
answers, and one has a backlog. Owns the load, the table and the figures; `rigs.fleet` owns what a worker is.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from aiohttp import web

from gpumeter_operator.adapters.ledger.rows import ContainerEvent
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.adapters.workers import Target, Workers
from gpumeter_operator.billing.facts import Worker
from gpumeter_operator.flow.collect import Collector, WorkersPort
from gpumeter_usage.page import decode_acknowledgement, encode_page, encode_status
from gpumeter_usage.period import SECOND_NS, Granularity
from rigs.fleet import CHECKPOINT_NS, SLICES, Fleet, Measured, address, worker_of_fleet
from rigs.ledger import TOKEN

NAME = "fleet"
RAW = Path(__file__).parents[2] / "build/bench" / f"{NAME}.json"
PULL_S = 2.0  # the collector's default
SILENT_EVERY = 100
GROWTH_MAX = 0.05
FLUSH_RECORDS = SLICES + 2

T = TypeVar("T")


@dataclass
class Watched:
    """What was seen while the fleet ran, a sample a second."""

    rss_mib: list[float] = field(default_factory=list)
    lags_s: list[list[float]] = field(default_factory=list)
    records: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """What is asked of a run."""

    workers: int
    services: int
    seconds: float
    backlog: int
    http: bool


def main() -> int:
    """Run; the exit code is 1 where something was lost, or memory grew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=10_000)
    parser.add_argument("--services", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--backlog", type=int, default=100_000, help="records that one worker has not sent yet")
    parser.add_argument("--http", action="store_true", help="the workers answer over HTTP, from a process of their own")
    parser.add_argument("--ledger", default="", help="URL of an empty ledger; default: a new SQLite file")
    parser.add_argument("--raw", type=Path, default=RAW, help="where the figures are kept (%(default)s)")
    asked = parser.parse_args()
    load = Load(asked.workers, asked.services, asked.seconds, asked.backlog, asked.http)
    with tempfile.TemporaryDirectory(prefix="gpumeter-fleet-") as folder:
        figures = run(load, asked.ledger or f"sqlite:///{folder}/ledger.db", print)
    asked.raw.parent.mkdir(parents=True, exist_ok=True)
    asked.raw.write_text(json.dumps(figures, indent=1))
    print(f"\nraw numbers: {asked.raw}")
    return 0 if told(figures) else 1


def run(load: Load, ledger_url: str, tell: Callable[[str], None]) -> dict[str, object]:
    """The figures of one run against an empty ledger."""
    tell(f"making {load.workers} workers, one of them {load.backlog} records behind")
    now_ns = time.time_ns()
    fleet = [Measured(worker_of_fleet(number, load.services), now_ns) for number in range(load.workers)]
    late = fleet[1]
    late.frontier_ns = now_ns - load.backlog // FLUSH_RECORDS * CHECKPOINT_NS
    late.live(now_ns)
    ledger = Ledger(ledger_url)
    try:
        ledger.set_granularity(Granularity.HOUR, now_ns)
        for worker in fleet:
            began_ns = worker.frontier_ns if worker is not late else now_ns - (load.backlog + 4) * CHECKPOINT_NS
            ledger.observe(worker.identity, [ContainerEvent("c", "started", began_ns)], now_ns)
        return asyncio.run(_over_http(load, fleet, ledger, tell) if load.http else _in_here(load, fleet, ledger, tell))
    finally:
        ledger.close()


async def _in_here(
    load: Load, fleet: Sequence[Measured], ledger: Ledger, tell: Callable[[str], None]
) -> dict[str, object]:
    port = Fleet(fleet, time.time_ns)
    port.silent = {address(number) for number in range(0, len(fleet), SILENT_EVERY)}
    watched, cpu_s, settled = await _collect(load, port, port.targets(), ledger, tell)
    port.silent = set()
    heads = {worker.identity.worker_uid: (worker.head_seq, worker.trimmed) for worker in fleet}
    return _figures(load, watched, cpu_s, ledger, heads, settled=settled, making_s=port.making_s)


async def _over_http(
    load: Load, fleet: Sequence[Measured], ledger: Ledger, tell: Callable[[str], None]
) -> dict[str, object]:
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(list(fleet), theirs), daemon=True)
    process.start()
    port = await asyncio.to_thread(ours.recv)
    workers = Workers()
    targets = [(worker.identity, Target(address(number), TOKEN, port)) for number, worker in enumerate(fleet)]
    try:
        watched, cpu_s, settled = await _collect(load, workers, targets, ledger, tell)
        ours.send("heads")
        heads = await asyncio.to_thread(ours.recv)
    finally:
        await workers.close()
        process.terminate()
        process.join()
    return _figures(load, watched, cpu_s, ledger, heads, settled=settled, making_s=0.0)


async def _collect(
    load: Load,
    port: WorkersPort,
    targets: list[tuple[Worker, Target]],
    ledger: Ledger,
    tell: Callable[[str], None],
) -> tuple[Watched, float, dict[str, int]]:
    threads = ThreadPoolExecutor(4)

    async def execute(call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, call)

    collector = Collector(ledger, port, execute, time.time_ns)
    watched, begun_s, cpu_s = Watched(), time.monotonic(), time.process_time()
    next_pull_s = begun_s
    silent = {worker.worker_uid for number, (worker, _) in enumerate(targets) if number % SILENT_EVERY == 0}
    silent = silent if not load.http else set()
    began_ns = time.time_ns()
    while (spent_s := time.monotonic() - begun_s) < load.seconds:
        if time.monotonic() >= next_pull_s:
            collector.start_pulls(targets)
            next_pull_s += PULL_S
        await asyncio.sleep(max(0.0, min(1.0, next_pull_s - time.monotonic())))
        now_ns, settled = time.time_ns(), collector.counters.settled_ns
        lags = [now_ns - settled.get(worker.worker_uid, began_ns) for worker, _ in targets]
        names = [worker.worker_uid for worker, _ in targets]
        watched.lags_s.append([lag / SECOND_NS for uid, lag in zip(names, lags, strict=True) if uid not in silent])
        watched.rss_mib.append(_rss_mib())
        watched.records.append(collector.counters.records)
        if len(watched.records) % 10 == 0:
            p99 = _quantile(watched.lags_s[-1], 0.99)
            tell(
                f"{spent_s:>6.0f} s  {watched.records[-1]:>9} records  {len(settled):>6} workers  lag p99 {p99:5.1f} s"
                f"  {watched.rss_mib[-1]:6.0f} MiB"
            )
    cpu_s = time.process_time() - cpu_s
    await collector.stop()
    threads.shutdown()
    return watched, cpu_s, dict(collector.counters.settled_ns)


def _serve(fleet: list[Measured], answers: Connection) -> None:
    asyncio.run(_serving(fleet, answers))


async def _serving(fleet: list[Measured], answers: Connection) -> None:
    by_host = {address(number): worker for number, worker in enumerate(fleet)}

    async def handle(request: web.Request) -> web.Response:
        worker = by_host[request.host.partition(":")[0]]
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.Response(status=401)
        if request.path.endswith("/status"):
            worker.live(time.time_ns())
            return web.Response(body=encode_status(worker.status()))
        if request.path.endswith("/acknowledge"):
            worker.acknowledge(decode_acknowledgement(await request.read()))
            return web.Response(status=204)
        query = request.query
        return web.Response(body=encode_page(worker.page(query["boot"], int(query["after"]), int(query["limit"]))))

    app = web.Application()
    app.router.add_route("*", "/usage/v1/{what}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", 0, backlog=4096).start()
    answers.send(runner.addresses[0][1])
    await asyncio.to_thread(answers.recv)
    answers.send({worker.identity.worker_uid: (worker.head_seq, worker.trimmed) for worker in fleet})
    await asyncio.Event().wait()


def _figures(
    load: Load,
    watched: Watched,
    cpu_s: float,
    ledger: Ledger,
    heads: dict[str, tuple[int, int]],
    *,
    settled: dict[str, int],
    making_s: float,
) -> dict[str, object]:
    """Of the second half, when everybody has been met and the backlog is a matter of turns."""
    half = len(watched.rss_mib) // 2
    lags = [lag for sample in watched.lags_s[half:] for lag in sample]
    quarter = max(1, len(watched.rss_mib) // 4)
    before, after = (
        statistics.median(watched.rss_mib[quarter : 2 * quarter]),
        statistics.median(watched.rss_mib[-quarter:]),
    )
    wrong = 0
    for uid, (head, trimmed) in heads.items():
        committed = sum(boot.committed_seq for boot in ledger.boots(uid))
        wrong += not trimmed <= committed <= head
    return {
        "machine": {"processor": platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "load": vars(load),
        "lag_s": {"p50": _quantile(lags, 0.5), "p99": _quantile(lags, 0.99), "max": max(lags)},
        "rss_mib": {"second_quarter": before, "last_quarter": after, "samples": watched.rss_mib},
        "records": watched.records[-1],
        "records_per_s": (watched.records[-1] - watched.records[half]) / max(1, len(watched.records) - half),
        "workers_settled": len(settled),
        "workers_wrong": wrong,
        "cpu_s": cpu_s,
        "making_records_s": making_s,
        "rss_max_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def told(figures: dict[str, object]) -> bool:
    """Print the table and the lines of the figures; whether every goal is met."""
    lag, rss, load = figures["lag_s"], figures["rss_mib"], figures["load"]
    assert isinstance(lag, dict) and isinstance(rss, dict) and isinstance(load, dict)
    growth = rss["last_quarter"] / rss["second_quarter"] - 1
    answering = load["workers"] if load["http"] else load["workers"] - -(-load["workers"] // SILENT_EVERY)
    rows = (
        ("workers", f"{load['workers']}"),
        ("of these answered and settled", f"{figures['workers_settled']}"),
        ("records committed", f"{figures['records']}"),
        ("records/s, second half", f"{figures['records_per_s']:.0f}"),
        ("lag p50 / p99 / max, s", f"{lag['p50']:.1f} / {lag['p99']:.1f} / {lag['max']:.1f}"),
        ("resident, second / last quarter, MiB", f"{rss['second_quarter']:.0f} / {rss['last_quarter']:.0f}"),
        ("CPU, s (of it making the records)", f"{figures['cpu_s']:.1f} ({figures['making_records_s']:.1f})"),
    )
    print()
    for what, value in rows:
        print(f"{what:<40} {value:>22}")
    all_met = figures["workers_settled"] == answering and not figures["workers_wrong"]
    flat = growth <= GROWTH_MAX
    print(f"\n{NAME}-lag-p99 {lag['p99']:.1f} s, stated")
    print(f"{NAME}-memory {growth:+.1%} from the second to the last quarter, goal +{GROWTH_MAX:.0%}: {_met(flat)}")
    print(f"{NAME} {figures['workers_settled']} workers by one collector, goal {answering}: {_met(all_met)}")
    return all_met and flat


def _met(goal: bool) -> str:
    return "met" if goal else "short"


def _rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


if __name__ == "__main__":
    sys.exit(main())
