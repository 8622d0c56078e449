"""The engine's bench: what it makes of the answers, and that an engine that is not asked stands still."""

import json
import sys
from pathlib import Path

import pytest

from bench.engine_report import Results, figures, percentile, tables
from bench.engines.serving import Stepping, many, streams, throughput
from bench.pipe import Child, EngineLost
from devcluster.layout import REPOSITORY
from rigs.worker import until

PROGRAM = """
import sys
from bench.engines.serving import serve
from test_bench_engine import OneEach
print("a library says something")
serve(lambda setup: OneEach())
"""


class OneEach(Stepping):
    """Gives every request one token a step, or one that is not streamed all of them at the end."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.most = 0

    def about(self) -> dict[str, str]:
        return {"engine": "1", "remarks": ""}

    def submit(self, name: str, prompt: list[int], new: int, *, stream: bool) -> None:
        print("and again")
        self.left[name] = new

    def step(self) -> list[tuple[str, int]]:
        self.most = max(self.most, len(self.left))
        given = [(name, 1) for name in self.left]
        self.left = {name: left - 1 for name, left in self.left.items() if left > 1}
        return given


class TooMany(OneEach):
    """Gives a token more than it was asked for."""

    def step(self) -> list[tuple[str, int]]:
        return [(name, count + 1) for name, count in super().step()]


def test_streamed_tokens_are_timed_one_by_one() -> None:
    answer = throughput(OneEach(), [[1], [2], [3]], new=5, stream=True)
    assert len(answer["first_s"]) == 3
    assert len(answer["gaps_s"]) == 3 * 4
    assert max(answer["first_s"]) <= answer["seconds"]


def test_an_engine_that_gives_another_number_of_tokens_is_not_measured() -> None:
    with pytest.raises(AssertionError, match="asked for 5 tokens each"):
        throughput(TooMany(), [[1]], new=5, stream=True)


def test_only_the_running_streams_gaps_count_while_prompts_arrive() -> None:
    engine = OneEach()
    answer = streams(engine, [[1]] * 2, new=50, arrivals=[[1]] * 600, every_s=0.0)
    assert len(answer["gaps_s"]) == 2 * 49
    assert answer["arrived"] >= 40
    assert not engine.left


def test_short_requests_are_never_more_at_once_and_memory_is_read_where_asked() -> None:
    engine = OneEach()
    answer = many(engine, 100, 8, [10, 100])
    assert sorted(answer["resident_bytes"]) == [10, 100]
    assert engine.most == 8


def test_figures_say_their_goal_and_whether_it_is_met() -> None:
    results = Results({"processor": "p", "threads": 2, "cores": 2, "python": "3", "preload": []}, 64, 4.0)
    results.about = {name: {"remarks": ""} for name in ("ours-eager", "vllm-eager", "one-at-a-time")}
    results.rates = {
        (32, 8, "ours-eager"): [90.0, 110.0, 100.0],
        (32, 8, "vllm-eager"): [100.0, 120.0],
        (32, 8, "one-at-a-time"): [20.0],
    }
    results.streams = {("ours-eager", False): (0, [0.01] * 100), ("ours-eager", True): (3, [0.01] * 98 + [0.03] * 2)}
    results.resident_bytes = {"ours-eager": {1000: 2**30, 10_000: 2**30 + 2**20}}
    assert figures(results) == [
        "engine-eager-8x32-vs-vllm 0.92 x >=1 short",
        "engine-eager-8x32-vs-one-at-a-time 5.50 x >=5 met",
        "engine-eager-gap-p99-under-prompts 3.00 x <=2 short",
        "engine-eager-memory-growth 1.00 MiB <=8 met",
    ]
    assert "| ours-eager                 | 110 (100) |" in tables(results)
    assert json.loads(json.dumps(results.raw()))["tokens_per_s"][0]["rounds"] == [90.0, 110.0, 100.0]


def test_percentiles_are_of_the_nearest_rank() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 99) == 99.0
    assert percentile([7.0], 99) == 7.0


def test_an_engine_stands_still_until_it_is_asked_and_what_libraries_print_is_no_answer(tmp_path: Path) -> None:
    child = a_child(tmp_path)
    try:
        assert child.about == {"engine": "1", "remarks": ""}
        until(lambda: state(child) == "T", "it is stopped")
        for _ in range(2):
            answer = child.ask("throughput", prompts=[[1], [2]], new=3, stream=True)
            assert len(answer["gaps_s"]) == 4
            until(lambda: state(child) == "T", "it is stopped again")
    finally:
        child.end()
    assert not Path(f"/proc/{child.pid}").exists()


def test_an_engine_that_breaks_is_told_with_its_log(tmp_path: Path) -> None:
    child = a_child(tmp_path)
    try:
        with pytest.raises(EngineLost, match=r"engine\.log"):
            child.ask("throughput", prompts=[[1]], new=3, stream="?", wrong=1)
    finally:
        child.end()
    assert "unexpected keyword argument 'wrong'" in (tmp_path / "engine.log").read_text()


def a_child(folder: Path) -> Child:
    setup = json.dumps({"model": "", "mode": "", "threads": 1})
    paths = f"{REPOSITORY}/tests:{REPOSITORY}/tests/cluster:{Path(__file__).parent}"
    return Child("engine", [sys.executable, "-c", PROGRAM, setup], {"PYTHONPATH": paths}, folder / "engine.log")


def state(child: Child) -> str:
    return Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
