"""Records per second through the product's own `Ledger.take`: verify, parse, accept, insert, cursor, durable commit.

Owns the load and the clock around it. Pages are made ahead of the time that counts; four threads bring them, as the
collector does, one page of a worker at a time, from 64 workers of 20 services and 50 tenants. Both databases commit
every page to the disk (SQLite: WAL, synchronous=FULL; PostgreSQL: fsync and synchronous_commit on).
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.collection import Figure, Measured
from gpumeter_operator.adapters.ledger.rows import ContainerEvent
from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.facts import Worker
from gpumeter_usage.page import MAX_PAGE_RECORDS, Page
from gpumeter_usage.period import SECOND_NS, Granularity
from rigs.ledger import START_NS
from rigs.pages import Boot
from rigs.postgres import DURABLE, server

THREADS = 4  # the collector's
BOOTS = 64
BATCH_PAGES = 64  # made at a time: 320,000 records, 200 MB
NOW_NS = START_NS + 10 * 86_400 * SECOND_NS
GOALS = {"sqlite": 75_000, "postgresql": 100_000}
GROWTH_GOAL = 1.2
SETTINGS = DURABLE | {
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "autovacuum_naptime": "1min",  # PostgreSQL's default; the tests' servers look more often
}


@dataclass(frozen=True)
class Batch:
    """What came in between two looks: rows in the ledger after it, records/s, and processor time per record."""

    rows: int
    per_s: float
    here_us: float
    server_us: float

    @property
    def processor_us(self) -> float:
        """Of all processors together."""
        return self.here_us + self.server_us


def measure(asked: argparse.Namespace) -> Measured:
    """Fill each database, and say how fast it took the first million and the last."""
    figures: list[Figure] = []
    raw: dict[str, object] = {"postgresql_settings": SETTINGS}
    for kind in asked.on.split(","):
        print(f"\n{kind}: {asked.rows:,} records in pages of {MAX_PAGE_RECORDS:,}", flush=True)
        with _database(kind, asked.folder) as database:
            batches = _fill(database, asked.rows)
        raw[kind] = [asdict(batch) for batch in batches]
        rate = statistics.median(batch.per_s for batch in batches)
        figures.append(Figure(kind, round(rate), "records/s", f"goal >= {GOALS[kind]}", rate >= GOALS[kind]))
        early = [batch for batch in batches if batch.rows <= 1_500_000]
        late = [batch for batch in batches if batch.rows > asked.rows - 1_000_000]
        # Seconds depend on who else is on the machine; processor time much less so.
        costs: dict[str, Callable[[Batch], float]] = {
            "cost": lambda batch: 1 / batch.per_s,
            "processor-time": lambda batch: batch.processor_us,
        }
        for name, cost in costs.items():
            growth = statistics.median(map(cost, late)) / statistics.median(map(cost, early))
            figures.append(Figure(f"{kind}-{name}-at-{asked.rows}-over-1000000", round(growth, 3), "x",
                                  f"goal <= {GROWTH_GOAL}", growth <= GROWTH_GOAL))  # fmt: skip
    return Measured(figures, raw)


def _fill(database: "_Database", rows: int) -> list[Batch]:
    ledger = Ledger(database.url)
    ledger.set_granularity(Granularity.HOUR, START_NS)
    boots = [Boot(number, START_NS) for number in range(BOOTS)]
    for boot in boots:
        ledger.observe(boot.worker, [ContainerEvent("c", "started", START_NS)], NOW_NS)
    found: list[Batch] = []
    done = 0
    with ThreadPoolExecutor(THREADS) as threads:
        while done < rows:
            batch = [(boot.worker, boot.page(MAX_PAGE_RECORDS)) for boot in boots[:BATCH_PAGES]]
            began_s, here_s, server_s = time.perf_counter(), time.process_time(), database.server_s()
            taken = sum(threads.map(lambda pair: _take(ledger, *pair), batch))
            took_s, here_s = time.perf_counter() - began_s, time.process_time() - here_s
            done += taken
            server_s = database.server_s() - server_s
            found.append(Batch(done, taken / took_s, here_s / taken * 1e6, server_s / taken * 1e6))
            print(f"  {done:>11,} rows {taken / took_s:>9,.0f} records/s, {found[-1].here_us:.2f} us of a core here "
                  f"and {found[-1].server_us:.2f} at the server, {_gigabytes(database.size):.2f} GB",
                  flush=True)  # fmt: skip
    ledger.close()
    return found


def _take(ledger: Ledger, worker: Worker, page: Page) -> int:
    return ledger.take(worker, page, NOW_NS).inserted


@dataclass(frozen=True)
class _Database:
    """An empty database, the folder whose size is its, and how long its server has had a processor, if it has one."""

    url: str
    size: Path
    server_s: Callable[[], float] = lambda: 0.0


@contextmanager
def _database(kind: str, folder: Path | None) -> Iterator[_Database]:
    if kind == "postgresql":
        with server(SETTINGS, folder=folder) as running:
            yield _Database(running.url(running.database()), running.folder / "data", lambda: _processor_s(running.pid))
        return
    home = Path(tempfile.mkdtemp(prefix="gpumeter-collection-", dir=folder))
    try:
        yield _Database(f"sqlite:///{home}/ledger.db", home)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _processor_s(pid: int) -> float:
    """Of a process, its children, and those of them that have ended (proc(5), /proc/PID/stat)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            of_process = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if stat.parent.name == str(pid):
            ticks += sum(int(each) for each in of_process[11:15])
        elif of_process[1] == str(pid):
            ticks += sum(int(each) for each in of_process[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def _gigabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9
