"""What a round of closing costs: in an hour of a million records, and with ever more history behind it.

    python -m bench.closing [--records 1000000] [--pods 2000]

Owns the table and the figures that are kept. Journals are made up; ledger, folds and reports are the product's own.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gpumeter_operator.adapters.ledger.store import Ledger
from gpumeter_operator.billing.facts import Worker
from gpumeter_operator.flow.close import Closer, Pricing
from gpumeter_usage.period import DAY_NS, MINUTE_NS, SECOND_NS, Granularity
from gpumeter_usage.record import Account
from rigs.ledger import START_NS, FakeWorker, ended, gone, open_ledger, started, worker

NAME = "closing"
RAW = Path(__file__).parents[2] / "build/bench" / f"{NAME}.json"
HOUR_NS = 60 * MINUTE_NS
GROWTH_MAX = 1.2  # of a round, with all that history behind it
ROUND_S_MAX = 0.5  # of a round in a busy hour: a tenth of the interval between rounds
FEW = 1_000  # records that come between two rounds


def main() -> int:
    """Run and print; figures decide nothing about the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000, help="of one service in the open hour")
    parser.add_argument("--pods", type=int, default=1_000, help="that came and went in the days before")
    parser.add_argument("--raw", type=Path, default=RAW, help="where the figures are kept (%(default)s)")
    asked = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="gpumeter-closing-") as folder:
        figures |= _busy(Path(folder) / "busy.db", asked.records)
        figures |= _history(Path(folder) / "history.db", asked.pods)
    growth = figures["round with history, s"] / figures["round without history, s"]
    print()
    for name, value in figures.items():
        print(f"{name:<52} {value:>12.4f}")
    asked.raw.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    asked.raw.write_text(json.dumps({"machine": machine, "asked": {"records": asked.records}, "figures": figures}))
    print(f"\nraw numbers: {asked.raw}")
    busy_s = figures["round in a busy hour, s"]
    print(f"{NAME}-round {busy_s:.3f} s, goal {ROUND_S_MAX}: {'met' if busy_s <= ROUND_S_MAX else 'short'}")
    print(f"{NAME}-growth {growth:.2f} x, goal {GROWTH_MAX}: {'met' if growth <= GROWTH_MAX else 'short'}")
    return 0


def _busy(path: Path, records: int) -> dict[str, float]:
    ledger, fake = open_ledger(path, Granularity.HOUR), FakeWorker(worker(), START_NS)
    ledger.observe(fake.identity, [started("c", START_NS)], START_NS)
    step_ns = HOUR_NS // (records // 2 + 2 * FEW)
    # Minute edges cut a session in two, so there are a few more.
    made = _serve(ledger, fake, 0, records // 2, step_ns)
    now_ns = fake.frontier_ns
    closer = Closer(ledger, 10 * MINUTE_NS)
    first_s = _took(lambda: closer.close_all(Pricing({}, {}), now_ns))
    again_s = []
    for number in range(3):
        made += _serve(ledger, fake, records + number * FEW, FEW // 2, step_ns)
        again_s.append(_took(lambda: closer.close_all(Pricing({}, {}), fake.frontier_ns)))
    whole_s = _took(lambda: ledger.lines("team-a", "smollm2", START_NS + HOUR_NS))
    fake.spend(Account.IDLE, START_NS + HOUR_NS)
    _take(ledger, fake)
    ledger.settle(fake.identity.worker_uid, fake.frontier_ns)
    final_s = _took(lambda: closer.close_all(Pricing({}, {}), START_NS + HOUR_NS + 10 * SECOND_NS))
    assert ledger.last_final_ns("team-a", "smollm2") == START_NS + HOUR_NS
    ledger.close()
    return {
        "records in the busy hour": float(made),
        "first round after a start in the busy hour, s": first_s,
        "round in a busy hour, s": statistics.median(again_s),
        "the ledger's own sum of the hour, s": whole_s,
        "closing the busy hour, s": final_s,
    }


def _serve(ledger: Ledger, fake: FakeWorker, first: int, sessions: int, step_ns: int) -> int:
    before = len(fake.boot.links)
    for number in range(sessions):
        fake.serve(f"s-{first + number}", f"tenant-{number % 50:02d}", fake.frontier_ns + step_ns)
        if number % 2_000 == 1_999:
            _take(ledger, fake)
        if number % 100_000 == 99_999:
            print(f"  {2 * (number + 1)} records", flush=True)
    _take(ledger, fake)
    return len(fake.boot.links) - before


def _take(ledger: Ledger, fake: FakeWorker) -> None:
    while fake.boot.trimmed < len(fake.boot.links):
        page = fake.page(fake.boot.boot_id, fake.boot.trimmed)
        ledger.take(fake.identity, page, fake.frontier_ns)
        fake.boot.trimmed += len(page.links)


def _history(path: Path, pods: int) -> dict[str, float]:
    """One living pod; then as many as were asked for come and go over 20 days, and the round is timed again."""
    ledger = open_ledger(path, Granularity.HOUR)
    closer = Closer(ledger, 10 * MINUTE_NS)
    bare_s = _live_round(ledger, closer, worker(100_000), START_NS)
    for number in range(pods):
        fake = FakeWorker(worker(number), START_NS + number * 20 * DAY_NS // pods // HOUR_NS * HOUR_NS + SECOND_NS)
        begun_ns = fake.frontier_ns
        for session in range(10):
            fake.serve(f"s-{session}", "acme", fake.frontier_ns + 90 * SECOND_NS)
        fake.seal()
        life = [started("c", begun_ns), ended("c", fake.frontier_ns), gone(fake.frontier_ns)]
        ledger.observe(fake.identity, life, fake.frontier_ns)
        _take(ledger, fake)
        if number % 20 == 19:
            closer.close_all(Pricing({}, {}), fake.frontier_ns)
        if number % 500 == 499:
            print(f"  {number + 1} pods came and went", flush=True)
    closer.close_all(Pricing({}, {}), START_NS + 30 * DAY_NS)
    laden_s = _live_round(ledger, closer, worker(200_000), START_NS + 31 * DAY_NS)
    ledger.close()
    return {"round without history, s": bare_s, "round with history, s": laden_s}


def _live_round(ledger: Ledger, closer: Closer, identity: Worker, begun_ns: int) -> float:
    fake = FakeWorker(identity, begun_ns)
    ledger.observe(fake.identity, [started("c", begun_ns)], begun_ns)
    took_s = []
    for number in range(10):
        fake.serve(f"s-{number}", "acme", fake.frontier_ns + 20 * SECOND_NS)
        _take(ledger, fake)
        took_s.append(_took(lambda: closer.close_all(Pricing({}, {}), fake.frontier_ns)))
    fake.seal()
    ledger.observe(fake.identity, [ended("c", fake.frontier_ns), gone(fake.frontier_ns)], fake.frontier_ns)
    _take(ledger, fake)
    return statistics.median(took_s)


def _took(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


if __name__ == "__main__":
    sys.exit(main())
