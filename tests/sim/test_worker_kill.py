"""Fifty runs of bench-kill: worker and collector killed at random points, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_kill_9_of_worker_and_collector_loses_nothing_that_was_committed_and_doubles_nothing(tmp_path: Path) -> None:
    raw = tmp_path / "kill.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.kill", "--runs", "50", "--raw", raw],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads(raw.read_text())["runs"]
    assert [one["problems"] for one in runs] == [[]] * 50
    kills = {point for one in runs for point in one["kills"]}
    assert {"worker: outside", "worker: commit", "worker: insert", "collector: statement"} <= kills
    assert sum(one["lost_ns"] for one in runs) > 0, "no kill hit anything"
    assert sum(one["records"] for one in runs) > 5000
