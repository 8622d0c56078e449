"""A 24-hour history of 20 services and 50 tenants, replayed from its journals in order and in disorder: the same bytes?

    python -m bench.replay [--services 20] [--tenants 50] [--replays 3] [--seed 1]

Owns the table and the figures that are kept; `rigs.history` owns the history and what a replay is.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path

from rigs.history import history, ledger_of

NAME = "replay"
RAW = Path(__file__).parents[2] / "build/bench" / f"{NAME}.json"


def main() -> int:
    """Run; the exit code is 1 where a replay gave other bytes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--services", type=int, default=20)
    parser.add_argument("--tenants", type=int, default=50)
    parser.add_argument("--replays", type=int, default=3, help="in disorder, beside the one in order")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--raw", type=Path, default=RAW, help="where the figures are kept (%(default)s)")
    asked = parser.parse_args()
    began_s = time.monotonic()

    def tell(what: str) -> None:
        print(f"  {time.monotonic() - began_s:>5.0f} s  {what}", flush=True)

    lives = history(asked.seed, services=asked.services, tenants=asked.tenants)
    records = sum(len(boot.links) for life in lives for boot in life.fake.boots)
    tell(f"made {records} records of {len(lives)} pods")
    runs: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="gpumeter-replay-") as folder:
        for number in range(asked.replays + 1):
            chaos = random.Random(asked.seed + number) if number else None
            at_s = time.monotonic()
            name = f"disorder-{number}" if chaos else "in-order"
            digest = ledger_of(Path(folder) / f"{name}.db", lives, chaos, tell)
            runs.append({"name": name, "digest": digest, "took_s": time.monotonic() - at_s})
    same = sum(run["digest"] == runs[0]["digest"] for run in runs[1:])
    print(f"\n{'replay':<14} {'seconds':>8}  SHA-256 of all reports")
    for run in runs:
        print(f"{run['name']:<14} {run['took_s']:>8.1f}  {run['digest']}")
    asked.raw.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    asked.raw.write_text(json.dumps({"machine": machine, "records": records, "runs": runs}, indent=1))
    met = same == asked.replays
    print(f"\nraw numbers: {asked.raw}")
    print(f"{NAME} {same} of {asked.replays} replays, goal {asked.replays}: {'met' if met else 'short'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
