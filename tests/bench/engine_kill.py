"""kill -9 of the engine under load, many times in a row: what clients were told, when it served again, what was kept.

    python -m bench.engine_kill [--kills 50] [--model tiny|smollm2]

Owns the rounds and the table; `rigs.enginekill` owns what a round is and what must be true of it. The tiny model has
random weights, so that a round is the life of the process and not the reading of a file.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rigs.enginekill import Round, bill_problems, kill_under_load, leaks, problems, seal
from rigs.tinymodel import tiny_model
from rigs.worker import Ledger, model_path, worker

NAME = "engine-kill"
RAW = Path(__file__).parents[2] / "build/bench" / f"{NAME}.json"


def main() -> int:
    """Run the rounds; the exit code is 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "model") if asked.model == "tiny" else model_path()
        rounds, wrong = _rounds(Path(folder), model, asked.kills)
    good = asked.kills - sum(bool(one) for one in wrong[: asked.kills])
    print(f"\n{'':<28} {'median':>8} {'worst':>8}")
    _row("client told after, s", [one.told_s for one in rounds])
    _row("service back after, s", [one.back_s for one in rounds])
    _row("  of that the engine's load", [one.load_s for one in rounds])
    _row("  beyond the load", [one.back_s - one.load_s for one in rounds])
    for what, first, last in (
        ("threads", rounds[0].threads, rounds[-1].threads),
        ("open files", rounds[0].files, rounds[-1].files),
    ):
        print(f"{what:<28} {first:>8} after the first kill, {last} after the last")
    for sentence in [sentence for one in wrong for sentence in one]:
        print(f"wrong: {sentence}")
    RAW.parent.mkdir(parents=True, exist_ok=True)
    RAW.write_text(
        json.dumps({"machine": platform.processor(), "model": asked.model, "rounds": _raw(rounds)}, indent=1)
    )
    met = not any(wrong)
    print(
        f"\nraw numbers: {RAW}\n{NAME} {good} of {asked.kills} kills, goal {asked.kills}: {'met' if met else 'short'}"
    )
    return 0 if met else 1


def _rounds(folder: Path, model: Path, kills: int) -> tuple[list[Round], list[list[str]]]:
    ledger, rounds, wrong = Ledger(), list[Round](), list[list[str]]()
    environment = {"GPUMETER_MODEL_URI": f"file://{model}", "GPUMETER_MAX_MODEL_LEN": "4096"}
    with worker(folder / "worker", environment) as process:
        process.ready()
        for number in range(1, kills + 1):
            began_s = time.monotonic()
            one = kill_under_load(process)
            process.collect(ledger)
            rounds.append(one)
            wrong.append(problems(one, "was killed by signal 9"))
            print(
                f"{number:>3}/{kills}  told {one.told_s:.3f} s  back {one.back_s:.2f} s  load {one.load_s:.2f} s  "
                f"threads {one.threads}  files {one.files}  ({time.monotonic() - began_s:.0f} s)",
                flush=True,
            )
        seal(process, ledger)
    wrong.append(leaks(rounds) + bill_problems(rounds, ledger))
    return rounds, wrong


def _row(what: str, values: list[float]) -> None:
    print(f"{what:<28} {statistics.median(values):>8.3f} {max(values):>8.3f}")


def _raw(rounds: list[Round]) -> list[dict[str, object]]:
    return [{name: value for name, value in vars(one).items() if name != "clients"} for one in rounds]


if __name__ == "__main__":
    sys.exit(main())
