"""Records per second through the product's own `Ledger.take`: verify, parse, accept, insert, cursor, durable commit.

Owns the load and the clock around it. Pages are made ahead of the time that counts; four threads bring them, as the
collector does, one page of a worker at a time, from 64 workers of 20 services and 50 tenants. Both databases commit
every page to the disk (SQLite: WAL, synchronous=FULL; PostgreSQL: fsync and synchronous_commit on).
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
SETTINGS = DURABLE | {"shared_buffers": "512MB", "max_wal_size": "4GB", "checkpoint_timeout": "15min"}


def measure(asked: argparse.Namespace) -> Measured:
    """Fill each database, and say how fast it took the first million and the last."""
    figures: list[Figure] = []
    raw: dict[str, object] = {"postgresql_settings": SETTINGS}
    for kind in asked.on.split(","):
        print(f"\n{kind}: {asked.rows:,} records in pages of {MAX_PAGE_RECORDS:,}", flush=True)
        with _database(kind, asked.folder) as (url, size):
            batches = _fill(url, asked.rows, size)
        raw[kind] = batches
        rates = [rate for _, rate, _ in batches]
        figures.append(Figure(kind, round(statistics.median(rates)), "records/s", f"goal >= {GOALS[kind]}",
                              statistics.median(rates) >= GOALS[kind]))  # fmt: skip
        early = [rate for rows, rate, _ in batches if rows <= 1_500_000]
        late = [rate for rows, rate, _ in batches if rows > asked.rows - 1_000_000]
        growth = statistics.median(early) / statistics.median(late)
        name = f"{kind}-cost-at-{asked.rows}-over-1000000"
        figures.append(Figure(name, round(growth, 3), "x", f"goal <= {GROWTH_GOAL}", growth <= GROWTH_GOAL))
    return Measured(figures, raw)


def _fill(url: str, rows: int, size: Path) -> list[tuple[int, float, float]]:
    """(rows in the ledger, records/s, seconds of the processors per second) of each batch."""
    ledger = Ledger(url)
    ledger.set_granularity(Granularity.HOUR, START_NS)
    boots = [Boot(number, START_NS) for number in range(BOOTS)]
    for boot in boots:
        ledger.observe(boot.worker, [ContainerEvent("c", "started", START_NS)], NOW_NS)
    found: list[tuple[int, float, float]] = []
    done = 0
    with ThreadPoolExecutor(THREADS) as threads:
        while done < rows:
            batch = [(boot.worker, boot.page(MAX_PAGE_RECORDS)) for boot in boots[:BATCH_PAGES]]
            began_s, cpu_s = time.perf_counter(), time.process_time()
            taken = sum(threads.map(lambda pair: _take(ledger, *pair), batch))
            took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
            done += taken
            found.append((done, taken / took_s, cpu_s / took_s))
            print(f"  {done:>11,} rows {taken / took_s:>9,.0f} records/s, {cpu_s / took_s:.2f} of a core here, "
                  f"{_gigabytes(size):.2f} GB", flush=True)  # fmt: skip
    ledger.close()
    return found


def _take(ledger: Ledger, worker: Worker, page: Page) -> int:
    return ledger.take(worker, page, NOW_NS).inserted


@contextmanager
def _database(kind: str, folder: Path | None) -> Iterator[tuple[str, Path]]:
    """The URL of an empty database, and the folder whose size is its."""
    if kind == "postgresql":
        with server(SETTINGS, folder=folder) as running:
            yield running.url(running.database()), running.folder / "data"
        return
    home = Path(tempfile.mkdtemp(prefix="gpumeter-collection-", dir=folder))
    try:
        yield f"sqlite:///{home}/ledger.db", home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _gigabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9
