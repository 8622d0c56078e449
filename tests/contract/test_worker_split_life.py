"""A real worker whose model is split over two ranks: one of them dies, clients are told, and the bill stays true."""

import os
import signal
from pathlib import Path

import pytest

from rigs.enginekill import bill_problems, kill_under_load, leaks, problems, seal
from rigs.engines import children, is_gone
from rigs.tinymodel import tiny_model
from rigs.worker import Ledger, WorkerProcess, until, worker


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    model = tiny_model(tmp_path_factory.mktemp("model"), kv_heads=2)
    return {
        "GPUMETER_MODEL_URI": f"file://{model}",
        "GPUMETER_MAX_MODEL_LEN": "4096",
        "GPUMETER_TENSOR_PARALLEL": "2",
    }


def test_a_killed_rank_costs_its_requests_and_every_nanosecond_counts_on_both_devices(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    ledger = Ledger()
    with worker(tmp_path, environment) as process:
        process.ready()
        (former,) = ranks_of(process)
        one = kill_under_load(process, streams=2, whom=lambda engine: children_of(engine)[0])
        assert problems(one, "ended itself (rank 1 of 2 was killed by signal 9)") == []
        assert is_gone(former)
        (rank,) = ranks_of(process)
        seal(process, ledger)
        until(lambda: is_gone(rank), "the rank ends with its engine", 10)
    assert leaks([one]) == []
    assert bill_problems([one], ledger, devices=2) == []
    accounts = {record.account for record in ledger.all() if record.gpu_ns}
    assert {"init", "load", "warmup", "attributed", "host_gap"} <= accounts


def test_ranks_end_with_a_worker_that_is_killed_though_they_are_stopped(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    with worker(tmp_path, environment) as process:
        until(lambda: ranks_of(process), "the rank is there")
        (rank,) = ranks_of(process)
        until(lambda: _handles(rank, signal.SIGUSR2), "it has tied itself to its parent, which is what it does first")
        os.kill(rank, signal.SIGSTOP)
        process.process.kill()
        process.process.wait()
        until(lambda: is_gone(rank), "the rank is gone", 10)


def children_of(pid: int) -> list[int]:
    """Those that are not gone; none where it is gone itself."""
    try:
        return [child for child in children(pid) if not is_gone(child)]
    except ProcessLookupError:
        return []


def ranks_of(process: WorkerProcess) -> list[int]:
    """The process ids of ranks 1 and up of the engine that runs; none while none does."""
    return [rank for engine in process.children() for rank in children_of(engine)]


def _handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal: SigCgt of proc(5), in which bit 0 is signal 1."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)
