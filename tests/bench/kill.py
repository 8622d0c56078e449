"""kill -9 of worker and collector at random points, seeded: what reached the ledger, and what was lost before a commit.

    python -m bench.kill [--runs 1000] [--seed 1]

Owns the table and the figures that are kept; `rigs.killing` owns what a run is and what must be true of it. A worker's
time in here is made up and its steps take none, so losses are in the worker's own seconds; kills, disk, HTTP, journal,
collector and ledger are real.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rigs.killing import LOSS_NS_MAX, Outcome, run_all

NAME = "kill"
RAW = Path(__file__).parents[2] / "build/bench" / f"{NAME}.json"


def main() -> int:
    """Run; the exit code is 1 where anything was lost or doubled."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="the first run's; each run has the next one")
    parser.add_argument("--raw", type=Path, default=RAW, help="where the figures of each run are kept (%(default)s)")
    asked = parser.parse_args()
    seeds = range(asked.seed, asked.seed + asked.runs)
    began_s, done = time.monotonic(), Counter[str]()

    def tell(one: Outcome) -> None:
        done["runs"] += 1
        done["bad"] += bool(one.problems)
        for problem in one.problems:
            print(f"  seed {one.seed}: {problem}", flush=True)
        if done["runs"] % 50 == 0 or done["runs"] == asked.runs:
            print(f"{done['runs']:>5}/{asked.runs} runs, {time.monotonic() - began_s:.0f} s", flush=True)

    with tempfile.TemporaryDirectory(prefix="gpumeter-kill-") as folder:
        outcomes = run_all(seeds, Path(folder), tell)
    _table(outcomes)
    asked.raw.parent.mkdir(parents=True, exist_ok=True)
    asked.raw.write_text(json.dumps(_raw(outcomes), indent=1))
    good = sum(not one.problems for one in outcomes)
    met = good == asked.runs
    print(f"\nraw numbers: {asked.raw}")
    print(f"{NAME} {good} of {asked.runs} runs, goal {asked.runs}: {'met' if met else 'short'}")
    return 0 if met else 1


def _table(outcomes: list[Outcome]) -> None:
    kills = sum((one.kills for one in outcomes), Counter[str]())
    losses_s = [loss_ns / 1e9 for one in outcomes for loss_ns in one.losses_ns]
    print(f"\n{'killed at':<36} {'times':>7}")
    for point, count in sorted(kills.items()):
        print(f"{point:<36} {count:>7}")
    print(f"\n{'records in the ledger':<36} {sum(one.records for one in outcomes):>12}")
    if losses_s:
        print(f"{'lost with a boot, s, median':<36} {statistics.median(losses_s):>12.3f}")
        print(f"{'lost with a boot, s, most':<36} {max(losses_s):>12.3f}   (bound {LOSS_NS_MAX / 1e9:.1f})")
    print(f"{'lost in all, ns':<36} {sum(one.lost_ns for one in outcomes):>12}")
    print(f"{'unaccounted in the ledger, ns':<36} {sum(one.unaccounted_ns for one in outcomes):>12}")
    print(f"{'a run, s, median':<36} {statistics.median(one.took_s for one in outcomes):>12.3f}")


def _raw(outcomes: list[Outcome]) -> dict[str, object]:
    return {
        "machine": {"processor": platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "loss_bound_ns": LOSS_NS_MAX,
        "runs": [vars(one) for one in outcomes],
    }


if __name__ == "__main__":
    sys.exit(main())
