"""Every nanosecond has one owner: an hour on a made-up clock, exact to the nanosecond, and minutes of real load.

    python -m bench.conservation [--seconds 3600] [--minutes 10] [--seed 1] [--model tiny|smollm2]

Owns the table and the figures that are kept; `rigs.hour` and `rigs.realload` own the loads and what must be true. With
0 either half is left out.
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

from rigs.hour import Count, Hour, Load
from rigs.realload import Sums, load
from rigs.tinymodel import tiny_model
from rigs.worker import model_path

NAME = "conservation"
RAW = Path(__file__).parents[2] / "build/bench" / f"{NAME}.json"
RESIDUAL_PER_MILLE_MAX = 1
LOST_WITH_A_KILL_NS_MAX = 1_000_000_000
"""Nobody measures the step in flight when its engine is killed: `unaccounted`, told apart from what clocks leave."""


def main() -> int:
    """Run both; the exit code is 1 where something does not add up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=3600, help="of the made-up hour (%(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="of real load (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill-every", type=float, default=150, help="seconds between engines killed (%(default)s)")
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="smollm2")
    asked = parser.parse_args()
    found: dict[str, object] = {"machine": {"processor": platform.processor(), "cores": os.cpu_count()}}
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="gpumeter-conservation-") as folder:
        if asked.seconds:
            began_s = time.monotonic()
            (Path(folder) / "hour").mkdir()
            count = asyncio.run(Hour(Path(folder) / "hour", asked.seed, Load(seconds=asked.seconds)).run())
            _tell_hour(asked.seconds, count, time.monotonic() - began_s)
            problems += count.problems
            found["made_up"] = {
                name: value for name, value in vars(count).items() if not isinstance(value, dict) or name == "sessions"
            }
        if asked.minutes:
            model = tiny_model(Path(folder) / "model") if asked.model == "tiny" else model_path()
            sums = load(Path(folder) / "worker", model, asked.minutes, seed=asked.seed, kill_every_s=asked.kill_every)
            unexplained_ns = sums.residual_ns - sums.unmeasured_ns
            if 1000 * abs(unexplained_ns) > RESIDUAL_PER_MILLE_MAX * sums.allocated_ns:
                sums.problems.append(f"the residual is {unexplained_ns} ns of {sums.allocated_ns} ns")
            if sums.unmeasured_ns > LOST_WITH_A_KILL_NS_MAX * sums.kills:
                sums.problems.append(f"{sums.kills} kills took {sums.unmeasured_ns} ns along, more than a second each")
            _tell_real(asked.minutes, sums)
            problems += sums.problems
            found["real"] = vars(sums) | {"residual_ns": sums.residual_ns}
    for problem in problems[:50]:
        print(f"wrong: {problem}")
    RAW.parent.mkdir(parents=True, exist_ok=True)
    RAW.write_text(json.dumps(found, indent=1))
    print(f"\nraw numbers: {RAW}\n{NAME} {len(problems)} differences, goal 0: {'short' if problems else 'met'}")
    return 1 if problems else 0


def _tell_hour(seconds: int, count: Count, took_s: float) -> None:
    print(f"\n{seconds} s on a made-up clock, in {took_s:.0f} s")
    sessions = ", ".join(f"{number} {status}" for status, number in sorted(count.sessions.items()))
    for what, value in (
        ("sessions", sessions),
        ("engines that crashed, workers killed", f"{count.crashes}, {count.kills}"),
        ("shares recomputed after preemptions", count.preempted),
        ("steps: sum of shares = step", count.steps),
        ("flushes: sum of slices = attributed", count.flushes),
        ("minutes: accounts = allocated", count.minutes),
        ("records", count.records),
        ("allocated, ns", count.allocated_ns),
        ("attributed, ns", count.attributed_ns),
        ("nonbillable, ns", count.nonbillable_ns),
        ("lost with a step or a kill, ns", count.lost_ns),
        ("unaccounted in the ledger, ns", count.unaccounted_ns),
        ("differences", len(count.problems)),
    ):
        print(f"  {what:<40} {value:>24}")


def _tell_real(minutes: float, sums: Sums) -> None:
    print(f"\n{minutes:g} minutes of real load, {sums.kills} engines killed")
    print(f"  {'sessions':<40} {', '.join(f'{n} {status}' for status, n in sorted(sums.sessions.items())):>24}")
    print(f"  {'allocated, ns':<40} {sums.allocated_ns:>24}")
    for account, gpu_ns in sorted(sums.accounts_ns.items()):
        print(f"  {account + ', ns':<40} {gpu_ns:>24}")
    print(f"  {'sum of slices, ns':<40} {sums.slices_ns:>24}")
    clock_ns = sums.residual_ns - sums.unmeasured_ns
    for what, gpu_ns, limit in (
        ("unaccounted, ns", sums.residual_ns, ""),
        ("  of that lost with an engine, ns", sums.unmeasured_ns, f" (at most {sums.kills} s)"),
        ("  residual of the clocks, ns", clock_ns, f" (at most {RESIDUAL_PER_MILLE_MAX / 10} %)"),
    ):
        print(f"  {what:<40} {gpu_ns:>24}   {100 * gpu_ns / sums.allocated_ns:.4f} %{limit}")


if __name__ == "__main__":
    sys.exit(main())
